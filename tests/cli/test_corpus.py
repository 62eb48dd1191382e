"""A corpus of mistakes as people make them: each exits 2, none passes in silence, and the message holds the right way out."""

from __future__ import annotations

import os

import pytest

from megactl.cli import main

# Options as typed -> what the message must suggest.
FLAGS = [
    ("--hiden 64", "did you mean --hidden?"),
    ("--hidden_size 64", "did you mean --hidden-size?"),
    ("--layer 4", "did you mean --layers?"),
    ("--n-layers 4", "did you mean --num-layers?"),
    ("--num-layer 4", "did you mean --num-layers?"),
    ("--head 4", "did you mean --heads?"),
    ("--num-heads 4", "did you mean --heads?"),
    ("--vocabsize 300", "did you mean --vocab-size?"),
    ("--tensor-parallel-size 2", "did you mean --tensor-model-parallel-size?"),
    ("--tensor-model-parallel 2", "did you mean --tensor-model-parallel-size?"),
    ("--pipeline-parallel-size 2", "did you mean --pipeline-model-parallel-size?"),
    ("--data-parallel-size 2", "did you mean --data-parallel?"),
    ("--zreo 1", "did you mean --zero?"),
    ("--micro-batchsize 2", "did you mean --micro-batch-size?"),
    ("--microbatch-size 2", "did you mean --micro-batch-size?"),
    ("--global-bath-size 8", "did you mean --global-batch-size?"),
    ("--mbs2 2", "did you mean --mbs?"),
    ("--seqlen 64", "did you mean --seq"),
    ("--seq-len 64", "did you mean --seq-length?"),
    ("--iteration 5", "did you mean --iterations?"),
    ("--train-iter 5", "did you mean --train-iters?"),
    ("--learning-rate 1e-4", "use --lr"),
    ("--d-model 64", "use --hidden"),
    ("--block_size 64", "use --seq-length"),
    ("--minlr 1e-5", "did you mean --min-lr?"),
    ("--warm-up 5", "did you mean --warmup?"),
    ("--wieght-decay 0.1", "did you mean --weight-decay?"),
    ("--clip-gard 1", "did you mean --clip-grad?"),
    ("--adam-beta3 0.9", "did you mean --adam-beta"),
    ("--mockdata", "did you mean --mock-data?"),
    ("--tokeniser byte", "did you mean --tokenizer?"),
    ("--run_dir x", "did you mean --run-dir?"),
    ("--rundir x", "did you mean --run-dir?"),
    ("--save-intervall 5", "did you mean --save-interval?"),
    ("--presset gpt-tiny", "did you mean --preset?"),
    ("--dryrun", "did you mean --dry-run?"),
    ("-tp 2", "did you mean --tp?"),
    ("--TP 2", "did you mean --tp?"),
    ("--sp", "use --tp 2 or more"),
    ("--vpp 2", "use --vpp 1"),
    ("--recompute everything", "one of none, selective, full"),
    ("--bf16", "use --precision bf16"),
    ("--fp16", "use --precision fp16"),
    ("--use-distributed-optimizer", "use --zero 1"),
    ("--train-samples 1000", "use --iterations"),
    ("--lr-warmup-fraction 0.01", "use --warmup P%"),
    ("--save out", "use --run-dir"),
    ("--vocab-file v.json", "use --tokenizer FOLDER"),
    ("--swiglu --gelu erf", "SwiGLU has no GELU"),
    ("--swiglu --activation gelu", "is the same setting as --activation gelu"),
    ("--kv-heads 3", "must divide --heads 4"),
    ("--hidden-act silu", "use --activation gelu or --activation swiglu"),
    ("--normalization RMSNorm", "did you mean rmsnorm?"),
    ("--position-embedding-type learned_absolute", "did you mean learned?"),
    ("--rotary-base 500000", "learned positions turn nothing"),
    ("--num-query-groups 2 --kv-heads 4", "is the same setting as --kv-heads 4"),
    ("--preset gpt-345", "did you mean gpt-345m?"),
    ("--preset gpt2", "no such preset"),
    ("--preset gpt-1.7B --pp x", "must be a whole number"),
    ("--precision fp8", "did you mean bf16?"),
    ("--precision half", "did you mean fp16?"),
    ("--precision bf6", "did you mean bf16?"),
    ("--device gpu", "did you mean cuda?"),
    ("--schedule interleaved", "did you mean 1f1b?"),
    ("--schedule 1f1", "did you mean 1f1b?"),
    ("--lr-schedule cosin", "did you mean cosine?"),
    ("--attention flash", "did you mean sdpa?"),
    ("--model llama", "did you mean gpt?"),
    ("--resume yes", "did you mean auto?"),
    ("--tp 1.5", "use 1 or 2"),
    ("--tp two", "must be a whole number"),
    ("--tp ''", "must be a whole number"),
    ("--lr 1,5e-4", "must be a number"),
    ("--lr fast", "must be a number"),
    ("--lr nan", "must be a number"),
    ("--lr inf", "must be a number"),
    ("--iterations 10k", "use 10000"),
    ("--iterations 10,000", "use 10_000"),
    ("--tp=", "must be a whole number"),
    ("--tp 2 --tensor-parallel 4", "is the same setting as --tp 2"),
    ("stray", "train takes options only"),
    ("--set lr=1", "did you mean optimizer.lr=VALUE?"),
    ("--set optimizer.lr", "write optimizer.lr=VALUE"),
    ("--set optimizer.lrr=1", "did you mean optimizer.lr?"),
    ("--set optimiser.lr=1", "did you mean optimizer.lr?"),
    ("--set model.tp=2", "did you mean parallel.tensor_parallel?"),
    ("--set training.bf16=true", "use --precision bf16"),
    ("--set preset=gpt-tiny", "use --preset gpt-tiny"),
    ("--set model.num_heads=four", "must be a whole number"),
    ("--set data.mock_data=maybe", "must be true or false"),
    ("--config missing.toml", "cannot be read"),
]

# TOML text -> what the message must say; the location is checked too.
FILES = [
    ("[modle]\nnum_layers = 2", "run.toml:1: [modle]: no such section; did you mean [model]?"),
    ("[model]\nnum_layer = 2", "run.toml:2: model.num_layer: [model] has no such setting; did you mean model.num_layers?"),
    ("[model]\nhidden = 64", "did you mean model.hidden_size?"),
    ("[model]\nn_heads = 4", "did you mean model.num_heads?"),
    ("[parallel]\ntp = 2", "did you mean parallel.tensor_parallel?"),
    ("[parallel]\nsequence_parallel = true", "use --tp 2 or more"),
    ("[training]\nlr = 1e-4", "did you mean optimizer.lr?"),
    ("[training]\nglobal_batchsize = 8", "did you mean training.global_batch_size?"),
    ("[optimizer]\nlr = '1e-4'", "must be a number, not text; write it without quotes"),
    ("[optimizer]\nbetas = [0.9, 0.95]", "did you mean optimizer.beta"),
    ("[optimizer]\nlr = [1e-4]", "must be a number, not a list"),
    ("[data]\nmock_data = 'true'", "must be true or false, not text; write it without quotes"),
    ("[data]\nmock_data = 1", "must be true or false"),
    ("[data]\nsplit = 969", 'must be text; write "969" in quotes'),
    ("[model]\nnum_layers = 2.5", "use 2 or 3"),
    ("[model]\nnum_layers = true", "not true or false"),
    ("[model]\nnum_layers = 2\n[model]\nnum_heads = 2", "run.toml:3: is not TOML"),
    ("lr = 1e-4", "run.toml:1: lr: no such section; write it as lr below [optimizer]"),
    ("[data]\ndata = corpus", 'put text in quotes: "corpus"'),
    ("prset = 'gpt-tiny'", "run.toml:1: prset: no such section"),
    ("schema_version = 2", "this megactl reads schema_version 1"),
    ("[zero_optimization]\nstage = 1", "no such section"),
]

# Several at once: every piece must be in the one message.
TOGETHER = [
    ("--hiden 64 --tp two --precision fp8", ["--hiden", "--tp two", "--precision fp8"]),
    ("--sp --vpp 2", ["--sp", "--vpp"]),
    ("--tp 3 --pp 3 --lr -1 --iterations 0", ["--tp 3", "--pp 3", "--lr -1", "--iterations 0"]),
    ("--set a.b=1 --set lr=2 --preset nope", ["--set a.b=1", "--set lr=2", "--preset nope"]),
    ("--beta1 2 --beta2 2 --hidden-dropout 1 --zero 5 --cp 3", ["--beta1 2", "--beta2 2", "--hidden-dropout 1", "--zero 5", "--cp 3"]),
]


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith(("MEGACTL_", "SLURM_")) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def outcome(capsys, arguments: str) -> str:
    import shlex

    base = [] if "--preset" in arguments else ["--preset", "gpt-tiny"]
    code = main(["train", *base, "--mock-data", "--device", "cpu", "--dry-run", *shlex.split(arguments)])
    captured = capsys.readouterr()
    assert code == 2, f"accepted: {arguments}"
    assert captured.out == "" and captured.err.startswith("error: ") and "Traceback" not in captured.err
    return captured.err


def test_the_corpus_is_large_enough():
    assert len(FLAGS) + len(FILES) + len(TOGETHER) >= 100


@pytest.mark.parametrize(("arguments", "message"), FLAGS, ids=[case[0] for case in FLAGS])
def test_flags(capsys, arguments, message):
    text = outcome(capsys, arguments)
    assert message in text, text


@pytest.mark.parametrize(("content", "message"), FILES, ids=[case[0].replace("\n", " ") for case in FILES])
def test_files(capsys, tmp_path, content, message):
    (tmp_path / "run.toml").write_text(content + "\n")
    text = outcome(capsys, "--config run.toml")
    assert message in text and "run.toml:" in text, text


@pytest.mark.parametrize(("arguments", "pieces"), TOGETHER, ids=[case[0] for case in TOGETHER])
def test_together(capsys, arguments, pieces):
    text = outcome(capsys, arguments)
    assert f"{len(pieces)} problems" in text and all(f"- {piece}" in text for piece in pieces), text


@pytest.mark.parametrize("step", [8, pytest.param(1, marks=pytest.mark.nightly)])
def test_every_single_slip_in_a_flag_is_caught(step):
    """One letter left out, doubled or swapped, in every flag (by day in one of `step`): never accepted unless it spells another flag."""
    from megactl.config.flags import all_flags
    from megactl.config.load import unknown_flag

    flags = [flag.name for flag in all_flags()]
    right = wrong = 0
    for flag in flags[::step]:
        word = flag.removeprefix("--")
        slips = {word[:i] + word[i + 1 :] for i in range(len(word))} | {word[:i] + word[i] + word[i:] for i in range(len(word))}
        slips |= {word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(len(word) - 1)}
        for slip in slips - {name.removeprefix("--") for name in flags} - {""}:
            instead = unknown_flag(f"--{slip}", flags)[1]
            right, wrong = (right + 1, wrong) if instead == f"did you mean {flag}?" else (right, wrong + 1)
    assert right / (right + wrong) > 0.97, (right, wrong)
