"""Rules and derived values: each refusal says value, rule and a value that is then accepted."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megactl.config.layout import nearest_layout
from megactl.config.load import load
from megactl.config.refused import REFUSED
from megactl.config.settings import all_settings
from megactl.config.shown import nearest_divisors, nearest_multiples
from megactl.config.validate import Resolved, resolve
from megactl.errors import ConfigError


def run_with(*assignments: str, preset: str | None = "gpt-tiny", mock: bool = True):
    extra = ["data.mock_data=true"] if mock else []
    return load(preset=preset, assignments=[*extra, *assignments])


def resolved(*assignments: str, world: int = 1, preset: str | None = "gpt-tiny", mock: bool = True, **facts) -> Resolved:
    loaded = run_with(*assignments, preset=preset, mock=mock)
    return resolve(loaded.run, world_size=world, origins=loaded.origins, **facts)


def problems(*assignments: str, **arguments) -> list[str]:
    with pytest.raises(ConfigError) as error:
        resolved(*assignments, **arguments)
    return [str(problem) for problem in error.value.problems]


RULES = [
    (["parallel.tensor_parallel=3"], 3, "--tp 3: must divide --heads 4 (preset gpt-tiny); use --tp 2 or 4"),
    (["parallel.pipeline_parallel=3"], 3, "--pp 3: must divide --layers 4 (preset gpt-tiny); use --pp 2 or 4, or --layers 3 or 6"),
    (
        ["model.hidden_size=130"],
        1,
        "--hidden 130: must be a multiple of --heads 4 (preset gpt-tiny); use --hidden 128 or 132, or --heads 2 or 5",
    ),
    (
        ["model.ffn_size=9", "parallel.tensor_parallel=2"],
        2,
        "--tp 2: must divide the width of the MLP, 9; use --ffn 8 or 10, or --tp 1 or 3",
    ),
    (["training.seq_length=64", "model.max_positions=32"], 1, "--seq-length 64: is longer than --max-positions 32; use --seq-length 32"),
    (
        ["training.global_batch_size=7", "training.micro_batch_size=2"],
        2,
        "must be a multiple of --micro-batch-size 2 x dp 2 = 4; use --global-batch-size 4 or 8",
    ),
    (
        ["parallel.context_method=all-to-all"],
        1,
        "--cp-method all-to-all with --cp 1 (default): each rank holds whole sequences, and attention has nothing to exchange; use --cp 2",
    ),
    (["optimizer.lr=0"], 1, "--lr 0: must be above 0; such as 0.0003"),
    (["optimizer.min_lr=1"], 1, "--min-lr 1: is above --lr 0.0003 (default); use --min-lr 3e-05"),
    (["optimizer.warmup=2000"], 1, "--warmup 2000: is longer than --iterations 1000 (default)"),
    (["optimizer.warmup=200%"], 1, "--warmup 200%: is longer than --iterations"),
    (["optimizer.warmup=soon"], 1, "--warmup soon: must be a number of iterations or a share"),
    (["optimizer.warmup=50", "optimizer.lr_decay_iterations=20"], 1, "--lr-decay-iterations 20: ends before the warm-up of 50"),
    (
        ["optimizer.lr_schedule=wsd", "optimizer.wsd_decay_iterations=2000"],
        1,
        "--wsd-decay-iterations 2000: is longer than the 1000 iterations",
    ),
    (["optimizer.wsd_decay_iterations=5"], 1, "only the wsd schedule has a final decay"),
    (["optimizer.lr_schedule=constant", "optimizer.lr_decay_iterations=5"], 1, "a constant learning rate does not decay"),
    (["optimizer.lr_schedule=constant", "optimizer.min_lr=1e-5"], 1, "a constant learning rate does not decay"),
    (["optimizer.beta1=1"], 1, "--beta1 1: must be at least 0 and below 1; such as 0.9"),
    (["optimizer.beta2=-0.1"], 1, "--beta2 -0.1: must be at least 0 and below 1"),
    (["model.hidden_dropout=1"], 1, "--hidden-dropout 1: must be at least 0 and below 1; such as 0.1"),
    (["data.mask_probability=0.2"], 1, "--mask-prob 0.2 with --model gpt (preset gpt-tiny): GPT predicts every token and masks none"),
    (["data.mask_ngrams=1"], 1, "--mask-ngrams 1 with --model gpt (preset gpt-tiny): GPT predicts every token and masks none"),
    (["data.whole_word_masking=false"], 1, "GPT predicts every token and masks none; use --model bert, or leave --whole-word-masking out"),
    (["data.short_seq_probability=0"], 1, "--short-seq-prob 0 with --model gpt (preset gpt-tiny): GPT samples are cut from running text"),
    (["data.sentence_task=nsp"], 1, "--sentence-task nsp with --model gpt (preset gpt-tiny): GPT has no sentence pairs; use --model bert"),
    (["model.architecture=bert", "data.reset_position_ids=true"], 1, "BERT's samples are pairs"),
    (["model.architecture=bert", "data.reset_attention_mask=true"], 1, "BERT's samples are pairs of sentences"),
    (["model.architecture=bert", "data.eod_mask_loss=true"], 1, "BERT's loss is on masked tokens alone; use --model gpt"),
    (
        ["model.architecture=bert", "model.sentence_head=false", "data.sentence_task=nsp"],
        1,
        "--sentence-task nsp with --no-sentence-head: without the sentence head a sample is one part",
    ),
    (["model.architecture=bert", "data.mask_probability=1"], 1, "--mask-prob 1: must be above 0 and below 1; such as 0.15"),
    (["model.architecture=bert", "data.mask_probability=0"], 1, "--mask-prob 0: must be above 0 and below 1"),
    (["model.architecture=bert", "data.short_seq_probability=1.5"], 1, "--short-seq-prob 1.5: must be from 0 to 1; such as 0.1"),
    (["model.architecture=bert", "data.mask_ngrams=0"], 1, "--mask-ngrams 0: must be at least 1; use 1 for single words"),
    (["model.architecture=bert", "training.seq_length=7"], 1, "--seq-length 7: is too short for [CLS] A [SEP] B [SEP]; use --seq-length 8"),
    (["training.loss_scale=2"], 1, "--loss-scale 2 with --precision fp32 (default): only gradients in fp16 need a loss scale"),
    (["training.precision=bf16", "training.min_loss_scale=1"], 1, "--min-loss-scale 1 with --precision bf16: only gradients in fp16 need"),
    (["training.precision=bf16", "training.loss_scale_window=9"], 1, "use --precision fp16, or leave --loss-scale-window out"),
    (["training.loss_scale_hysteresis=2"], 1, "use --precision fp16, or leave --loss-scale-hysteresis out"),
    (["training.initial_loss_scale=2"], 1, "use --precision fp16, or leave --initial-loss-scale out"),
    (
        ["training.precision=fp16", "training.loss_scale=2", "training.initial_loss_scale=4"],
        1,
        "--initial-loss-scale 4 with --loss-scale 2: a constant loss scale does not move; use --loss-scale 0, or leave",
    ),
    (["training.precision=fp16", "training.loss_scale=-1"], 1, "--loss-scale -1: must be at least 0; use 0 for a dynamic one"),
    (["training.precision=fp16", "training.initial_loss_scale=0"], 1, "--initial-loss-scale 0: must be above 0; such as 65536"),
    (["training.precision=fp16", "training.loss_scale_window=0"], 1, "--loss-scale-window 0: must be at least 1"),
    (
        ["training.precision=fp16", "training.initial_loss_scale=2", "training.min_loss_scale=4"],
        1,
        "--initial-loss-scale 2: is below --min-loss-scale 4; use --min-loss-scale 2",
    ),
    (["training.iterations=0"], 1, "--iterations 0: must be at least 1"),
    (["training.seed=-1"], 1, "--seed -1: must be at least 0"),
    (["training.seed=4294967296"], 1, "--seed 4294967296: must be at most 4294967295"),
    (["parallel.sequence_parallel=true"], 1, "--sp with --tp 1 (default): the ranks of tensor parallelism share the tokens"),
    (
        ["parallel.sequence_parallel=true", "parallel.tensor_parallel=4", "training.seq_length=31", "training.micro_batch_size=2"],
        4,
        "--micro-batch-size 2 with --seq-length 31: with --sp the tokens of a micro-batch must be a multiple of --tp 4; "
        "use --seq-length 30 or 32, or leave --sp out",
    ),
    (["parallel.zero=4"], 1, "--zero 4: ZeRO has the stages 0 to 3; use --zero 1, 2 or 3"),
    (["memory.offload=disk"], 1, "--offload disk: 'disk' is not one of optimizer, parameters, activations; such as --offload"),
    (["parallel.tensor_parallel=0"], 1, "--tp 0: must be at least 1; use 1 for none"),
    (["training.rampup_batch_size=1 1"], 1, "must be three whole numbers 'START INCREMENT SAMPLES'"),
    (["training.rampup_batch_size=2 2 100"], 1, "needs the batch size to grow to; give --global-batch-size"),
    (["training.rampup_batch_size=8 2 100", "training.global_batch_size=4"], 1, "START 8 must be below --global-batch-size 4"),
    (
        ["training.rampup_batch_size=2 4 100", "training.global_batch_size=8"],
        1,
        "INCREMENT 4 must divide global batch - START = 6; use INCREMENT 3 or 6",
    ),
    (
        ["training.rampup_batch_size=2 1 100", "training.global_batch_size=4"],
        2,
        "INCREMENT 1 of --rampup-batch-size '2 1 100': must be a multiple of",
    ),
    (["model.kv_heads=3"], 1, "--kv-heads 3: must divide --heads 4 (preset gpt-tiny), so that each serves as many of them; use"),
    (["model.kv_heads=0"], 1, "--kv-heads 0: must be at least 1; leave it out for one a head"),
    (
        ["model.kv_heads=2", "parallel.tensor_parallel=4"],
        4,
        "--tp 4: must divide --kv-heads 2: a rank holds whole groups of heads with their keys and values; use --tp 2",
    ),
    (["model.rope_base=500000"], 1, "--rope-base 500000 with --position-embedding learned (default): learned positions turn nothing"),
    (["model.rotary_percent=0.5"], 1, "use --position-embedding rope, or leave --rotary-percent out"),
    (["model.rope_scaling_factor=8"], 1, "use --position-embedding rope, or leave --rope-scaling-factor out"),
    (
        ["model.position_embedding=rope", "model.rope_original_positions=9"],
        1,
        "--rope-original-positions 9 with --rope-scaling-factor 1 (default): without a factor no wavelength is stretched",
    ),
    (["model.position_embedding=rope", "model.rope_low_frequency=2"], 1, "use --rope-scaling-factor 8, or leave --rope-low-frequency out"),
    (["model.position_embedding=rope", "model.rope_high_frequency=2"], 1, "or leave --rope-high-frequency out"),
    (
        ["model.position_embedding=rope", "model.rope_scaling_factor=8", "model.rope_low_frequency=4"],
        1,
        "--rope-low-frequency 4: must be below --rope-high-frequency 4 (default); leave both out for 1 and 4",
    ),
    (["model.position_embedding=rope", "model.rope_scaling_factor=0.5"], 1, "--rope-scaling-factor 0.5: must be at least 1; use 1"),
    (["model.position_embedding=rope", "model.rope_base=0"], 1, "--rope-base 0: must be above 0; such as 10000"),
    (["model.position_embedding=rope", "model.rotary_percent=0"], 1, "--rotary-percent 0: must be above 0 and at most 1; use 1 for whole"),
    (
        ["model.position_embedding=rope", "model.rotary_percent=0.05"],
        1,
        "--rotary-percent 0.05: leaves no pair of the 32 elements of a head to turn; use --rotary-percent 0.0625 or more",
    ),
    (["model.position_embedding=rope", "model.num_heads=128"], 1, "leaves heads 1 wide; use --heads so that hidden / heads is even"),
    (["model.activation=swiglu", "model.gelu=erf"], 1, "--gelu erf with --activation swiglu: SwiGLU has no GELU; use --activation gelu"),
    (["model.sentence_head=false"], 1, "--no-sentence-head with --model gpt (preset gpt-tiny): only BERT is trained on sentence pairs"),
    (
        ["parallel.pipeline_parallel=2", "parallel.virtual_pipeline=3"],
        2,
        "the 6 stages of --pp 2 with --vpp 3: must divide --layers 4 (preset gpt-tiny); use --layers 6, or --pp-split",
    ),
    (
        ["parallel.pipeline_parallel=3", "parallel.schedule=zb-v"],
        3,
        "the 6 stages of --pp 3 with --schedule zb-v: must divide --layers 4 (preset gpt-tiny); use --layers 6, or --pp-split",
    ),
    (["parallel.virtual_pipeline=2"], 1, "--vpp 2 with --pp 1 (default): one pipeline rank waits for no other"),
    (
        ["parallel.pipeline_parallel=2", "parallel.virtual_pipeline=2", "parallel.schedule=zb-v"],
        2,
        "--vpp 2 with --schedule zb-v: the V has two chunks on each rank",
    ),
    (
        ["parallel.pipeline_parallel=2", "parallel.virtual_pipeline=2", "parallel.schedule=zb-h1"],
        2,
        "--vpp 2 with --schedule zb-h1: this order is made for one stage a rank",
    ),
    (["parallel.schedule=zb-v"], 1, "--schedule zb-v with --pp 1 (default): no rank waits for another"),
    (["parallel.pipeline_split=4"], 1, "--pp-split 4 with --pp 1 (default): one pipeline rank holds all layers"),
    (
        ["parallel.pipeline_parallel=2", "parallel.pipeline_split=1,2,1"],
        2,
        "--pp-split 1,2,1: has 3 numbers for 2 stages; such as --pp-split 2,2",
    ),
    (["parallel.pipeline_parallel=2", "parallel.pipeline_split=2,3"], 2, "--pp-split 2,3: has 5 layers, and the model has 4"),
    (
        ["parallel.pipeline_parallel=2", "parallel.pipeline_split=embeding"],
        2,
        "--pp-split embeding: must be numbers of layers, or embedding",
    ),
    (["checkpoint.load_weights=true"], 1, "--load-weights: says what to take from --load"),
    (["checkpoint.load=x", "checkpoint.resume=must", "logging.run_dir=r"], 1, "--load x with --resume must: a run either starts"),
    (["checkpoint.resume=must"], 1, "without --run-dir the run directory is new"),
    (["data.data_cache=x"], 1, "generated tokens have no sample index"),
    (["data.split=9,1"], 1, "--split 9,1 with --mock-data: generated tokens are as many as a run asks for"),
    (["training.max_skipped_iterations=-1"], 1, "--max-skipped-iterations -1: must be at least 0; use 0 to go on skipping"),
    (["memory.recompute_method=block"], 1, "--recompute-method block with --recompute none (default): only full recomputation has groups"),
    (
        ["memory.recompute=selective", "memory.recompute_layers=2"],
        1,
        "--recompute-layers 2 with --recompute selective: only full recomputation has groups of layers; use --recompute full, or leave",
    ),
    (["memory.recompute=full", "memory.recompute_layers=5"], 1, "--recompute-layers 5: is more than --layers 4 (preset gpt-tiny); use"),
    (["memory.recompute=full", "memory.recompute_layers=0"], 1, "--recompute-layers 0: must be at least 1; use 1 or more"),
    (
        ["memory.partition_activations=true", "parallel.tensor_parallel=2"],
        2,
        "--partition-activations with --recompute none (default): only the inputs that full recomputation saves are the same on all",
    ),
    (
        ["memory.partition_activations=true", "memory.recompute=full"],
        1,
        "--partition-activations with --tp 1 (default): saved inputs are shared over the ranks of --tp, and there is one; use --tp 2",
    ),
    (
        ["memory.partition_activations=true", "memory.recompute=full", "parallel.sequence_parallel=true", "parallel.tensor_parallel=2"],
        2,
        "--partition-activations with --sp: under sequence parallelism a rank's saved inputs are its own share of the tokens already",
    ),
    (
        ["memory.offload=activations", "memory.recompute=selective"],
        1,
        "--offload activations with --recompute selective: only the inputs of recomputed layers are few enough bytes to copy beside",
    ),
    (
        ["memory.offload=optimizer,parameters", "parallel.zero=2"],
        2,
        "--offload optimizer,parameters with --zero 2: without ZeRO 3 all weights stay on the device between one use and the next",
    ),
    (["memory.offload=activation"], 1, "'activation' is not one of optimizer, parameters, activations; such as --offload optimizer"),
    (["parallel.data_parallel=3"], 4, "--dp 3: needs 3 ranks, 4 were started; use --dp 4"),
    (
        ["parallel.data_parallel=8"],
        4,
        "--dp 8: needs 8 ranks, 4 were started; use --dp 4, or megactl slurm render --nodes 1 --ntasks-per-node 8",
    ),
    (["parallel.zero=2", "parallel.zero_prefetch=2"], 2, "--zero-prefetch 2 with --zero 2: only ZeRO 3 gathers weights, which"),
    (["parallel.zero_prefetch=0"], 1, "--zero-prefetch 0 with no --zero: only ZeRO 3 gathers weights, which"),
    (["parallel.zero=1", "parallel.persistence_threshold=0"], 2, "with --zero 1: only ZeRO 3 divides the weights"),
    (["parallel.zero=0", "parallel.split_layers=true"], 2, "--split-layers with --zero 0: only ZeRO 3 gathers layers"),
    (["parallel.zero=2", "parallel.tile=2"], 2, "--tile 2 with --zero 2: without ZeRO 3 all tiles of a matrix are there at once"),
    (
        ["parallel.zero=3", "parallel.tile=5"],
        2,
        "--tile 5: must divide hidden = 128, queries, keys and values = 384, the MLP's width = 512; use --tile 4 or 8",
    ),
    (
        ["parallel.zero=3", "parallel.tile=128", "model.kv_heads=1"],
        2,
        "--tile 128: must divide queries, keys and values = 192; use --tile 64",
    ),
]


@pytest.mark.parametrize(("assignments", "world", "message"), RULES, ids=[" ".join(rule[0]) for rule in RULES])
def test_each_rule_alone(assignments, world, message):
    found = problems(*assignments, world=world)
    assert len(found) == 1 and message in found[0], found


def test_every_refused_combination_has_a_test():
    reasons = {row.reason for row in REFUSED}
    covered = {reason for reason in reasons if any(reason[:18] in message for _, _, message in RULES)}
    assert reasons - covered == {"fp64 is for verification and runs on the CPU only"}
    assert "fp64 is for verification and runs on the CPU only" in problems("training.precision=fp64", "training.device=cuda", gpus=1)[0]


def test_the_layout_message_of_the_contract():
    (message,) = problems("parallel.tensor_parallel=4", "parallel.pipeline_parallel=8", preset="gpt-345m", world=8, visible=8, gpus=8)
    instead = "try --tp 4 --pp 2, or megactl slurm render --nodes 4 --gpus-per-node 8"
    assert message == f"--tp 4 --pp 8: needs 32 ranks, this machine has 8; {instead}"


def test_layouts_that_do_not_divide():
    (message,) = problems("parallel.tensor_parallel=4", preset="gpt-345m", world=6, visible=6)
    assert message == "--tp 4: needs a multiple of 4 ranks, this machine has 6; try --tp 2 --pp 1, or --nproc 4"
    (message,) = problems("parallel.tensor_parallel=4", preset="gpt-345m", world=6)
    assert message.endswith("6 were started; try --tp 2 --pp 1, or start 4 or 8 ranks")
    (message,) = problems("parallel.tensor_parallel=2", "parallel.data_parallel=2", preset="gpt-345m", world=8, visible=8)
    assert message == "--tp 2 --dp 2: needs 4 ranks, this machine has 8; use --dp 4, or --nproc 4"


def test_layouts_on_cpus_with_nproc():
    assignments = ["parallel.tensor_parallel=4", "parallel.pipeline_parallel=8", "training.device=cpu", "training.nproc=8"]
    (message,) = problems(*assignments, preset="gpt-345m", world=8, visible=8)
    assert message == "--tp 4 --pp 8: needs 32 ranks, --nproc starts 8; try --tp 4 --pp 2, or --nproc 32"
    (message,) = problems("parallel.data_parallel=9", "training.device=cpu", "training.nproc=8", world=8, visible=8)
    assert message == "--dp 9: needs 9 ranks, --nproc starts 8; use --dp 8, or --nproc 9"


def test_a_task_of_srun_may_see_one_gpu_of_several():
    assert resolved("training.nproc=4", world=4, gpus=1, spawns=False).run.training.device == "cuda"


def test_several_mistakes_at_once():
    found = problems(
        "optimizer.lr=-1",
        "parallel.tensor_parallel=3",
        "parallel.pipeline_parallel=3",
        "training.iterations=0",
        "training.global_batch_size=5",
        "checkpoint.load_weights=true",
        mock=False,
        world=18,
    )
    starts = ["--iterations 0", "--lr -1", "--data", "--tp 3", "--pp 3", "--load-weights", "--global-batch-size 5"]
    assert [message.split(":")[0] for message in found] == starts


def test_data_is_one_of_two():
    assert problems(mock=False) == ["--data: is not set; give --data PREFIX, or --mock-data for generated tokens"]
    assert "a run reads either data or generated tokens" in problems("data.data=corpus", vocab_size=300)[0]


@pytest.mark.parametrize("text", ["0.5 a b", "1 a 0 b", "-1 a 2 b", "nan a 1 b"])
def test_bad_data(text):
    assert len(problems(f"data.data={text}", mock=False, vocab_size=300)) == 1


@pytest.mark.parametrize("text", ["a", "1,2,3,4", "-1,2", "0,0,0", "nan,1", ""])
def test_bad_split(text):
    with pytest.raises(ConfigError):
        resolved("data.data=corpus", f"data.split={text}", mock=False, vocab_size=300)


def test_split_must_leave_documents_for_what_is_asked():
    arguments = {"mock": False, "vocab_size": 300}
    (message,) = problems("data.data=c", "data.split=100,0,0", "training.eval_interval=5", **arguments)
    assert message.startswith("--split 100,0,0: leaves no documents for --eval-interval 5")
    assert "leaves no documents for training" in problems("data.data=c", "data.split=0,1,0", **arguments)[0]
    resolved("data.data=c", "data.split=100,0,0", **arguments)


def test_vocabulary():
    arguments = {"mock": False}
    (message,) = problems("data.data=c", vocab_hint="there is no c.json beside the data", **arguments)
    assert message == "--vocab: the size of the vocabulary is not known: there is no c.json beside the data; give --vocab N, or --tokenizer"
    (message,) = problems("data.data=c", "model.vocab_size=100", vocab_size=257, vocab_source="the data", **arguments)
    assert message == "--vocab 100: is smaller than the 257 tokens of the data; use --vocab 257"
    assert resolved("data.data=c", vocab_size=257, **arguments).run.model.vocab_size == 257
    assert resolved("data.data=c", "model.vocab_size=512", vocab_size=257, **arguments).run.model.vocab_size == 512
    assert resolved().run.model.vocab_size == 256
    assert resolved(preset="gpt-345m").run.model.vocab_size == 50257


def test_document_boundaries_need_their_token():
    arguments = {"mock": False, "vocab_size": 300, "vocab_source": "--tokenizer t"}
    (message,) = problems("data.data=c", "data.eod_mask_loss=true", **arguments)
    assert message.startswith("--eod-mask-loss: needs an end-of-document token, and --tokenizer t has none")
    resolved("data.data=c", "data.eod_mask_loss=true", eod=299, **arguments)


def test_devices():
    assert "no GPU is visible" in problems("training.device=cuda")[0]
    assert "torch 2.13.0+cpu is built for CPUs only" in problems("training.device=cuda", gpus=2, cpu_torch="2.13.0+cpu")[0]
    assert "needs a GPU for each rank, this machine has 2; use --nproc 2" in problems("training.nproc=4", world=4, visible=4, gpus=2)[0]
    assert resolved(gpus=2, world=2).run.training.device == "cuda"
    assert resolved(gpus=2, world=2, cpu_torch="2.13.0+cpu").run.training.device == "cpu"
    assert resolved("training.precision=fp64", gpus=2, world=2).run.training.device == "cpu"


def test_zero_with_one_replica_is_accepted_and_said():
    answer = resolved("parallel.zero=1")
    assert answer.run.parallel.zero == 0
    assert any(item.key == "parallel.zero" and "--zero 1 with dp 1" in item.reason for item in answer.derived)
    for stage, whole in ((2, "optimizer and all gradients"), (3, "model")):
        answer = resolved(f"parallel.zero={stage}")
        assert answer.run.parallel.zero == 0 and any(f"holds the whole {whole}" in item.reason for item in answer.derived)
        assert resolved(f"parallel.zero={stage}", world=2).run.parallel.zero == stage
    assert resolved(world=2).run.parallel.zero == 1
    assert resolved("parallel.zero=0", world=2).run.parallel.zero == 0


def test_derived_values_and_reasons():
    answer = resolved("optimizer.warmup=1%", "optimizer.lr_schedule=wsd", "training.micro_batch_size=2", world=4, run_dir="runs/x")
    found = {item.key: (item.value, item.reason) for item in answer.derived}
    assert found["parallel.data_parallel"] == (4, "4 ranks / (tp 1 x pp 1 x cp 1)")
    assert found["training.global_batch_size"] == (8, "micro-batch 2 x dp 4")
    assert found["warmup_iterations"][0] == answer.warmup_iterations == 10
    assert found["optimizer.wsd_decay_iterations"][0] == 100
    assert found["logging.run_dir"][0] == "runs/x" == answer.run.logging.run_dir
    assert all(item.reason for item in answer.derived)


NEVER_FILLED = {
    "model.sentence_head",
    "training.rampup_batch_size",
    "data.data",
    "data.tokenizer",
    "data.data_cache",
    "checkpoint.load",
    "memory.offload",
    "parallel.pipeline_split",
    "logging.tensorboard_dir",
    "logging.wandb_project",
    "optimizer.wsd_decay_iterations",
}


LOSS_SCALE = {f"training.{name}" for name in ("initial_loss_scale", "min_loss_scale", "loss_scale_window", "loss_scale_hysteresis")}


def test_nothing_is_left_open():
    run = resolved(run_dir="runs/x").run
    assert {name for name, setting in all_settings().items() if setting.read(run) is None} == NEVER_FILLED | LOSS_SCALE
    scaled = resolved("training.precision=fp16", run_dir="runs/x").run
    assert {name for name, setting in all_settings().items() if setting.read(scaled) is None} == NEVER_FILLED


def loss_scale_of(*assignments: str) -> tuple[float | None, ...]:
    training = resolved("training.precision=fp16", *assignments).run.training
    return training.initial_loss_scale, training.min_loss_scale, training.loss_scale_window, training.loss_scale_hysteresis


def test_the_loss_scale_that_follows_from_the_batch():
    assert loss_scale_of("training.global_batch_size=8", "training.seq_length=512") == (2.0**16, 1.0, 1000, 2)
    # Rounded down to a power of 2, which scales without rounding.
    assert loss_scale_of("training.global_batch_size=9", "training.seq_length=512")[0] == 2.0**16
    assert loss_scale_of("training.global_batch_size=512", "training.seq_length=2048")[0] == 2.0**24
    assert loss_scale_of("training.min_loss_scale=1e9")[0] == 1e9
    assert loss_scale_of("training.initial_loss_scale=0.5")[:2] == (0.5, 0.5)
    given = ("training.initial_loss_scale=3", "training.loss_scale_window=7", "training.loss_scale_hysteresis=1")
    assert loss_scale_of(*given) == (3, 1, 7, 1)
    assert loss_scale_of("training.loss_scale=4096") == (None,) * 4


def test_bert_has_a_sentence_head_unless_it_is_taken_away():
    answer = resolved(preset="bert-tiny")
    assert answer.run.model.sentence_head is True
    assert [item.reason for item in answer.derived if item.key == "model.sentence_head"] == ["BERT is trained on sentence pairs as well"]
    assert resolved("model.sentence_head=false", preset="bert-tiny").run.model.sentence_head is False


def test_resolving_twice_changes_nothing():
    answer = resolved("optimizer.warmup=1%", world=4, run_dir="r")
    assert resolve(answer.run, world_size=4).run == answer.run


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 64))
def test_the_suggested_layout_is_accepted(tp, pp, world):
    loaded = run_with(f"parallel.tensor_parallel={tp}", f"parallel.pipeline_parallel={pp}", preset="gpt-345m")
    new_tp, new_pp, new_cp = nearest_layout(loaded.run, world)
    assert new_tp <= tp and new_pp <= pp and new_cp == 1
    resolved(f"parallel.tensor_parallel={new_tp}", f"parallel.pipeline_parallel={new_pp}", preset="gpt-345m", world=world)


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(1, 100))
def test_suggested_numbers_keep_the_rule(value, base):
    assert all(int(word) % base == 0 and int(word) > 0 for word in nearest_multiples(value, base).split(" or "))
    assert all(value % int(word) == 0 for word in nearest_divisors(base, value).split(" or "))


def test_rampup_reaches_the_batch():
    answer = resolved("training.rampup_batch_size=2 2 100", "training.global_batch_size=8", world=2)
    assert answer.batch.at(0) == 2 and answer.batch.at(100) == 8 and answer.batch.micro_batches(0) == 1
