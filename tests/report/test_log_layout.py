import math

import pytest

from megactl.config.schema import Model
from megactl.report.logs.architecture import architecture_of
from megactl.report.logs.filename import experiment, facts
from megactl.report.logs.layout import layout_of
from megactl.report.logs.records import Run


def run(system="megatron-lm", file="x.out", batch=math.nan, **arguments):
    made = Run(file, 0, system=system, arguments={name: str(value) for name, value in arguments.items()})
    if not math.isnan(batch):
        made.iterations.append(1, global_batch=batch)
    return made


def test_what_is_stated_is_taken_and_what_follows_is_marked():
    layout = layout_of(
        run(world_size=64, tensor_model_parallel_size=4, pipeline_model_parallel_size=8, micro_batch_size=2, global_batch_size=1024)
    )
    assert (layout.tp, layout.pp, layout.dp, layout.gas) == (4, 8, 2, 256)
    assert layout.derived == {"dp": "gpus / (tp x pp)", "gas": "gbs / (mbs x dp)"}


def test_nothing_stated_is_nothing_known():
    layout = layout_of(run())
    known = {name: value for name, value in vars(layout).items() if value not in (None, {})}
    assert known == {}


@pytest.mark.parametrize("world", [48, 60])
def test_degrees_that_do_not_divide_the_ranks_give_no_dp(world):
    assert layout_of(run(world_size=world, tensor_model_parallel_size=4, pipeline_model_parallel_size=8)).dp is None


def test_the_names_of_each_era():
    old = layout_of(run("megatron-deepspeed", world_size=64, model_parallel_size=4, batch_size=48, gradient_accumulation_steps=1))
    assert (old.tp, old.pp, old.dp, old.mbs, old.gbs) == (4, 1, 16, 48, 768)
    pipe = layout_of(run("megatron-deepspeed", world_size=64, model_parallel_size=4, pipe_parallel_size=16))
    assert (pipe.pp, pipe.dp) == (16, 1)
    trainer = layout_of(run("hf-trainer", world_size=16, per_device_train_batch_size=4, gradient_accumulation_steps=1))
    assert (trainer.tp, trainer.pp, trainer.dp, trainer.gbs) == (1, 1, 16, 64)
    core = layout_of(run(world_size=64, tensor_model_parallel_size=4, pipeline_model_parallel_size=2, context_parallel_size=2))
    assert core.dp == 4


@pytest.mark.parametrize(
    ("arguments", "recompute"),
    [
        ({"recompute_granularity": "full"}, "full"),
        ({"recompute_granularity": "selective"}, "selective"),
        ({"recompute_granularity": "None"}, "none"),
        ({"checkpoint_activations": "True"}, "full"),
        ({"checkpoint_activations": "False"}, "none"),
        ({"gradient_checkpointing": "true"}, "full"),
        ({"recompute": "none"}, "none"),
        ({"recompute": "full"}, "full"),
        ({"recompute_activations": "True"}, "selective"),
        ({"activations_checkpoint_method": "uniform"}, "full"),
        ({}, None),
    ],
)
def test_recomputation(arguments, recompute):
    assert layout_of(run(**arguments)).recompute == recompute


@pytest.mark.parametrize(
    ("arguments", "offload"),
    [
        ({}, None),
        ({"zero_optimization.offload_optimizer.device": "cpu", "zero_optimization.offload_param.device": "none"}, "optimizer"),
        ({"zero_optimization.offload_optimizer.device": "cpu", "zero_optimization.offload_param.device": "cpu"}, "optimizer+parameters"),
        ({"zero_optimization.offload_optimizer.device": "none"}, "none"),
        ({"zero_optimization.cpu_offload": "true"}, "optimizer"),
        ({"optimizer_cpu_offload": "False"}, "none"),
        ({"offload": "None"}, "none"),
        ({"offload": "optimizer, activations"}, "optimizer+activations"),
    ],
)
def test_offload(arguments, offload):
    assert layout_of(run(**arguments)).offload == offload


def test_zero_and_its_bucket():
    sharded = layout_of(run(**{"zero_optimization.stage": 1, "zero_optimization.reduce_bucket_size": "5e8", "zero_stage": 0}))
    assert (sharded.zero, sharded.bucket) == (1, 500_000_000)
    assert layout_of(run(zero_stage=0, zero_reduce_bucket_size=50_000_000)).bucket is None
    off = layout_of(run(zero_stage=1, deepspeed="False"))
    assert (off.zero, off.derived["zero"]) == (0, "DeepSpeed is off")
    distributed = layout_of(run(use_distributed_optimizer="True"))
    assert distributed.zero == 1 and "zero" in distributed.derived


def test_the_batch_is_the_one_that_was_run():
    layout = layout_of(run(global_batch_size=1024, batch=64.0))
    assert layout.gbs == 64 and layout.derived["gbs"] == "of the last iteration line"


def test_chunks_follow_from_layers_a_chunk():
    arguments = {"num_layers": 60, "pipeline_model_parallel_size": 4, "num_layers_per_virtual_pipeline_stage": 5}
    assert layout_of(run(**arguments)).vpp == 3


def test_nodes_and_gpus_follow_from_each_other():
    assert layout_of(run(nnodes=16, gpus_per_node=4)).gpus == 64
    assert layout_of(run(world_size=64, nproc_per_node=4)).nodes == 16


def test_a_value_that_is_no_count_is_not_a_count():
    layout = layout_of(
        run(micro_batch_size="auto", global_batch_size="1e400", seq_length="nan", world_size="-3", tensor_model_parallel_size="0")
    )
    assert (layout.mbs, layout.gbs, layout.seq, layout.gpus, layout.tp) == (None,) * 5


def test_the_name_is_asked_only_where_wanted_and_only_where_the_log_is_silent():
    name = "logs/61B-megatron-mbs-2-pp16-dp-1-gas-512-200977.out"
    assert layout_of(run(file=name)).pp is None
    layout = layout_of(run(file=name, pipeline_model_parallel_size=8), from_filename=True)
    assert (layout.pp, layout.mbs, layout.gbs) == (8, 2, 1024) and layout.derived["mbs"] == "in the file's name"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("61B-megatron-mbs-2-pp16-dp-1-gas-512-200977.out", {"model_b": 61, "mbs": 2, "pp": 16, "dp": 1, "gas": 512, "gbs": 1024}),
        (
            "./a/55B-ds-zero1-mbs-4-pp8-dp-2-gas-128.18488.out",
            {"model_b": 55, "zero": 1, "mbs": 4, "pp": 8, "dp": 2, "gas": 128, "gbs": 1024},
        ),
        ("meg_gpt2_base_n4_dp1_tp4_pp4-1809579.out", {"nodes": 4, "dp": 1, "tp": 4, "pp": 4}),
        ("1.3B-mbs4.out", {"model_b": 1.3, "mbs": 4}),
        # Two values of one key, a key inside a word, a number inside a longer one.
        ("pp2-pp4.out", {}),
        ("app16-tp4x.out", {}),
        ("hf_ds_gpt2_perf_n16_bs4-mbs8.out", {"nodes": 16, "mbs": 8}),
        ("mbs-2-dp-2-gas-4-gbs-99.out", {"mbs": 2, "dp": 2, "gas": 4, "gbs": 99}),
    ],
)
def test_facts_in_names(name, expected):
    assert facts(name) == expected


def test_an_experiment_in_a_name():
    assert experiment("runs/figure_13-pp8.out") == "figure_13"
    assert experiment("Table-1_18B.out") == "table_1"
    assert experiment("figures.out") is None


SHAPE = {"num_layers": "4", "hidden_size": "64", "num_attention_heads": "4", "vocab_size": "1000"}


def test_a_shape_makes_a_model():
    model = architecture_of(SHAPE, 128).model
    assert (model.architecture, model.num_layers, model.hidden_size, model.num_heads, model.vocab_size) == ("gpt", 4, 64, 4, 1000)
    assert architecture_of({**SHAPE, "tokenizer_type": "BertWordPieceLowerCase"}, 128).model.architecture == "bert"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({name: value for name, value in SHAPE.items() if name != "num_layers"}, "num_layers"),
        ({**SHAPE, "group_query_attention": "True"}, "query groups"),
        ({**SHAPE, "multi_latent_attention": "True"}, "latent"),
        ({**SHAPE, "num_experts": "8"}, "experts"),
        ({**SHAPE, "kv_channels": "128"}, "heads"),
    ],
)
def test_another_kind_of_model_has_no_exact_figures_and_says_why(arguments, part):
    found = architecture_of(arguments, 128)
    assert found.model is None and part in found.problem


def test_llama_shapes_are_known_in_megatrons_words_and_ours():
    megatron = {
        "swiglu": "True", "group_query_attention": "True", "num_query_groups": "2", "normalization": "RMSNorm", "add_bias_linear": "False",
        "position_embedding_type": "rope", "ffn_hidden_size": "96",
    }  # fmt: skip
    ours = {
        "activation": "swiglu", "kv_heads": "2", "normalization": "rmsnorm", "bias": "false", "position_embedding": "rope",
        "ffn_size": "96",
    }  # fmt: skip
    expected = Model(
        num_layers=4, hidden_size=64, num_heads=4, vocab_size=1000, kv_heads=2, ffn_size=96, activation="swiglu", normalization="rmsnorm",
        bias=False, position_embedding="rope",
    )  # fmt: skip
    assert architecture_of(SHAPE | megatron, 128).model == architecture_of(SHAPE | ours, 128).model == expected


def test_a_default_that_is_switched_off_groups_nothing():
    arguments = {**SHAPE, "group_query_attention": "False", "num_query_groups": "1", "swiglu": "False", "normalization": "LayerNorm"}
    assert architecture_of(arguments, 128).model == architecture_of(SHAPE, 128).model


def test_the_vocabulary_of_a_published_tokenizer_is_known():
    arguments = {**SHAPE, "tokenizer_type": "GPT2BPETokenizer"}
    del arguments["vocab_size"]
    assert architecture_of(arguments, 128).model.vocab_size == 50257
