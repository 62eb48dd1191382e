"""`megactl generate`: any layout, the cache against a plain forward pass, what is drawn, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from megactl.cli import main  # noqa: E402
from megactl.config.schema import Model  # noqa: E402
from megactl.engine import checkpoint, sampling  # noqa: E402
from megactl.engine.checkpoint import Piece, SingleProcess  # noqa: E402
from megactl.engine.models import GPT  # noqa: E402
from megactl.engine.models.layers import MicroBatch  # noqa: E402
from megactl.engine.sampling import Options  # noqa: E402
from megactl.errors import CheckpointError, RunError  # noqa: E402
from megactl.storage.bpe import train_bpe  # noqa: E402
from megactl.storage.tokenizer import load_tokenizer  # noqa: E402

CONFIG = Model(num_layers=2, hidden_size=32, num_heads=4, vocab_size=257, max_positions=24, ffn_size=128)
BYTE = {"spec": "byte", **load_tokenizer("byte").describe()}
CPU = torch.device("cpu")


LLAMA = dataclasses.replace(
    CONFIG, kv_heads=2, position_embedding="rope", normalization="rmsnorm", activation="swiglu", bias=False, untie_embeddings=True,
    rope_scaling_factor=8.0, rope_original_positions=64,
)  # fmt: skip


def random_model(config=CONFIG, seed=0, scale=0.3):
    generator = torch.Generator().manual_seed(seed)
    model = GPT(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator) + ("norm.weight" in name))
    return model


def whole(name, kind, tensor):
    return [Piece(name, kind, tuple(tensor.shape), tuple((0, n) for n in tensor.shape), None, tensor.contiguous())]


def rows(name, kind, tensor):
    """In two, as two tensor-parallel ranks hold it; row-parallel weights by columns."""
    dim = 1 if name.endswith(("output.weight", "down.weight")) else 0
    half = -(-tensor.shape[dim] // 2)
    pieces, start = [], 0
    for part in tensor.split(half, dim):
        box = [(0, n) for n in tensor.shape]
        box[dim] = (start, start + part.shape[dim])
        pieces.append(Piece(name, kind, tuple(tensor.shape), tuple(box), None, part.contiguous()))
        start += part.shape[dim]
    return pieces


def ranges(name, kind, tensor):
    """In three flat ranges, as a sharded optimizer holds its master copy."""
    box, flat = tuple((0, n) for n in tensor.shape), tensor.flatten()
    cuts = [0, flat.numel() // 3, flat.numel() // 2, flat.numel()]
    return [Piece(name, kind, tuple(tensor.shape), box, (a, b), flat[a:b].clone()) for a, b in itertools.pairwise(cuts)]


def write(run, source, *, step=10, layout=whole, precision="fp32", kinds=("weight",), tokenizer=BYTE, **changes):
    """A checkpoint as the trainer would write it: bf16 runs hold a bf16 weight and an fp32 master."""
    pieces = []
    for name, parameter in source.named_parameters():
        for kind in kinds:
            low = precision == "bf16" and kind == "weight"
            pieces += layout(source.canonical_name(name), kind, parameter.detach().to(torch.bfloat16 if low else torch.float32))
    header = {
        "consumed_samples": 1,
        "layout": {"tp": 1, "cp": 1, "dp": 1, "pp": 1, "zero": 0},
        "precision": precision,
        "model": dataclasses.asdict(source.config),
        "tokenizer": tokenizer,
        "state": {},
    } | changes
    return checkpoint.save(run / "checkpoints", step=step, pieces=pieces, header=header, group=SingleProcess(), keep=0, protect=None)


def run_cli(capsys, *arguments, code=0):
    """(stdout, stderr) of `megactl generate ...`."""
    found = main(["generate", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert found == code, err
    assert "Traceback" not in err
    return out, err


def json_of(capsys, *arguments):
    return json.loads(run_cli(capsys, *arguments, "--json")[0])


def plain_logits(model, tokens):
    """Logits of the token after `tokens`, by one forward pass of the whole model."""
    ids = torch.arange(len(tokens)).unsqueeze(0)
    batch = MicroBatch(rng=torch.zeros(3, dtype=torch.int64), position_ids=ids, dropout=False)
    with torch.no_grad():
        return model(torch.tensor([tokens]), batch)[0, -1]


def test_a_llama_of_any_layout_is_sampled_from_as_it_was_trained(tmp_path):
    model = random_model(LLAMA)
    for name, layout in (("whole", whole), ("ranges", ranges)):
        loaded, _, _ = sampling.load_model(write(tmp_path / name, model, layout=layout), CPU)
        assert all(torch.equal(one, other) for one, other in zip(loaded.parameters(), model.parameters(), strict=True))
    # The text outgrows the positions: the newer half is read again, from position 0 on.
    (made,) = sampling.sample(loaded, [5, 9], Options(max_tokens=30, vocabulary=257, temperature=0.0))
    text = [5, 9]
    for token in made.tokens[:22]:
        assert token == int(plain_logits(model, text).argmax())
        text.append(token)
    assert len(made.tokens) == 30 and len(set(made.tokens)) > 3


@pytest.mark.parametrize("attention", ["auto", "unfused"])
@pytest.mark.parametrize("untied", [False, True])
def test_greedy_sampling_is_the_argmax_of_a_forward_pass(attention, untied):
    model = random_model(dataclasses.replace(CONFIG, attention=attention, untie_embeddings=untied)).double()
    prompt = [5, 9, 200, 31]
    (made,) = sampling.sample(model, prompt, Options(max_tokens=21, vocabulary=257, temperature=0.0))
    text = list(prompt)
    for token in made.tokens:
        assert token == int(plain_logits(model, text).argmax())
        text.append(token)
    assert len(made.tokens) == 21 and made.finish == "length" and len(set(made.tokens)) > 3, "a model that says more than one thing"


@pytest.mark.parametrize("config", [CONFIG, LLAMA, dataclasses.replace(CONFIG, kv_heads=1)], ids=["gpt", "llama", "grouped"])
def test_cached_logits_equal_a_forward_pass_at_every_position(config):
    model, tokens = random_model(config).double(), [7, 1, 256, 40, 40, 2, 90, 13]
    with torch.no_grad(), sampling.decoding(model, 1, 8) as decoder:
        found = [decoder.advance(torch.tensor([tokens[:3]]))]
        found += [decoder.advance(torch.tensor([[token]])) for token in tokens[3:]]
        assert decoder.full
    for length, logits in enumerate(found, 3):
        torch.testing.assert_close(logits[0], plain_logits(model, tokens[:length]), rtol=1e-12, atol=1e-12)
    assert type(model.layers["0"].attention.core).__name__ == "CoreAttention", "the model is as it was"


def test_a_text_longer_than_the_positions_goes_on_with_the_newer_half():
    model = random_model().double()
    (made,) = sampling.sample(model, [3] * 20, Options(max_tokens=60, vocabulary=257, temperature=0.0))
    text, window = [3] * 20, [3] * 20
    for token in made.tokens:
        if len(window) > CONFIG.max_positions:
            window = text[-12:]
        assert token == int(plain_logits(model, window).argmax())
        text.append(token)
        window.append(token)
    assert len(made.tokens) == 60


@pytest.mark.parametrize("positions", [1, 2, 3])
def test_windows_of_a_few_positions(positions):
    model = random_model(dataclasses.replace(CONFIG, max_positions=positions))
    (made,) = sampling.sample(model, [3], Options(max_tokens=9, vocabulary=257, temperature=1.0))
    assert len(made.tokens) == 9


def frequencies(logits, options, count=20_000):
    uniform = torch.from_numpy(np.random.default_rng(0).random(count))
    drawn = sampling.choose(logits.expand(count, -1), uniform, options)
    return torch.bincount(drawn, minlength=logits.shape[-1]).double() / count


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_follow_the_softmax(temperature):
    logits = torch.tensor([[1.0, -1.0, 0.5, 2.0, -9.0]])
    found = frequencies(logits, Options(1, 5, temperature))
    assert (found - torch.softmax(logits[0].double() / temperature, -1)).abs().max() < 0.015


def test_top_k_top_p_and_vocabulary_leave_out_the_right_tokens():
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.05, 0.3, 0.15]]))

    def kept(*arguments):
        return frequencies(logits, Options(1, *arguments)).nonzero().flatten().tolist()

    assert kept(5, 1.0, 2) == [1, 3] and kept(5, 1.0, 1) == [1] and kept(5, 1.0, 5) == [0, 1, 2, 3, 4]
    # The fewest tokens that hold 0.6 are 0.4 and 0.3; 0.71 needs a third.
    assert kept(5, 1.0, None, 0.6) == [1, 3] and kept(5, 1.0, None, 0.71) == [1, 3, 4] and kept(5, 1.0, None, 1e-9) == [1]
    assert kept(5, 1.0, None, 1.0) == [0, 1, 2, 3, 4]
    # Of the best three (0.4, 0.3, 0.15; together 0.85), the share 0.8 is 0.68.
    assert kept(5, 1.0, 3, 0.8) == [1, 3] and kept(3) == [0, 1, 2]
    renormalised = frequencies(logits, Options(1, 5, 1.0, 2))
    assert abs(renormalised[1].item() - 4 / 7) < 0.015


def test_choosing_at_the_edges():
    logits = torch.tensor([[0.0, 5.0, 5.0, -1.0]])
    nearly_one = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert sampling.choose(logits, nearly_one, Options(1, 4, 1e-308)).item() in (1, 2), "a tiny temperature does not overflow"
    assert sampling.choose(logits * 1e30, nearly_one, Options(1, 4)).item() in (1, 2)
    assert sampling.choose(logits, nearly_one, Options(1, 4, 1.0, None, 0.999)).item() in (0, 1, 2, 3)
    assert sampling.choose(logits, torch.zeros(1, dtype=torch.float64), Options(1, 4, 0.0)).item() == 1


def test_samples_depend_on_the_seed_and_on_their_number_only():
    model = random_model().double()

    def made(seed, count):
        options = Options(max_tokens=12, vocabulary=257, seed=seed)
        return [item.tokens for item in sampling.sample(model, [5], options, count)]

    assert made(1, 3) == made(1, 3) and made(1, 3)[:2] == made(1, 2)
    assert made(1, 20)[:3] == made(1, 3), "also where they are drawn in several batches"
    everything = made(1, 20) + made(2, 20)
    assert len({tuple(tokens) for tokens in everything}) == 40


def test_a_sample_ends_at_the_end_of_document():
    model, prompt = random_model().double(), [5, 9]
    options = Options(max_tokens=24, vocabulary=257, seed=3)
    free = sampling.sample(model, prompt, options, 4)
    eod = free[1].tokens[6]
    ended = sampling.sample(model, prompt, dataclasses.replace(options, eod=eod), 4)
    for before, after in zip(free, ended, strict=True):
        cut = before.tokens.index(eod) if eod in before.tokens else None
        assert after.tokens == before.tokens[:cut] and after.finish == ("length" if cut is None else "eod")
    assert ended[1].finish == "eod" and len(ended[1].tokens) <= 6


def test_weights_that_are_not_numbers_are_an_error():
    model = random_model()
    with torch.no_grad():
        model.final_norm.bias[0] = torch.nan
    with pytest.raises(RunError, match="not finite"):
        sampling.sample(model, [1], Options(max_tokens=2, vocabulary=257))


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("layout", [whole, rows, ranges])
def test_every_layout_gives_the_model_back(tmp_path, layout, untied):
    model = random_model(dataclasses.replace(CONFIG, untie_embeddings=untied))
    folder = write(tmp_path, model, layout=layout)
    loaded, header, precision = sampling.load_model(folder, CPU)
    assert header.step == 10 and precision == "fp32"
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
    assert (loaded.head.weight is loaded.embedding.tokens.weight) == (not untied)
    assert loaded.embedding.tokens.weight.shape[0] == 257, "no padding rows"


@pytest.mark.parametrize("kinds", [("weight", "master"), ("master",), ("weight",)])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32", "fp64", None])
def test_every_precision_of_a_bf16_run(tmp_path, kinds, precision):
    """fp32 comes from the master copy where there is one, from the bf16 weight where there is none."""
    model = random_model()
    loaded, _, used = sampling.load_model(write(tmp_path, model, precision="bf16", kinds=kinds, layout=ranges), CPU, precision)
    assert used == (precision or "bf16")
    exact = kinds != ("weight",) and used != "bf16"
    for name, parameter in model.named_parameters():
        right = parameter if exact else parameter.bfloat16()
        assert torch.equal(loaded.get_parameter(name), right.to(sampling.DTYPES[used])), name


def test_headers_that_do_not_fit(tmp_path):
    model = random_model()
    good = dataclasses.asdict(CONFIG)
    for number, (change, rule) in enumerate([
        ({"rotary": True}, "model.rotary = True is no setting"),
        ({"num_layers": "two"}, "model.num_layers = 'two'"),
        ({"architecture": "bert"}, "holds a BERT, which fills gaps"),
        ({"architecture": "t5"}, "model.architecture = 't5'"),
        ({"vocab_size": None}, "does not say vocab_size"),
        ({"hidden_size": 64}, "stored with shape"),
        ({"num_layers": 3}, "layers.2.attention_norm.weight"),
    ]):  # fmt: skip
        with pytest.raises(CheckpointError, match=rule):
            sampling.load_model(write(tmp_path, model, step=number, model=good | change), CPU)


def test_a_bert_is_refused_and_not_called_damaged(tmp_path, capsys):
    write(tmp_path, random_model(), model=dataclasses.asdict(CONFIG) | {"architecture": "bert"})
    for path in (tmp_path, tmp_path / "checkpoints" / "step-00000010"):
        out, err = run_cli(capsys, path, "--prompt", "a", code=2)
        assert out == "" and "error: " in err and "holds a BERT, which fills gaps" in err and "--model gpt" in err
        assert "damaged" not in err and "restore" not in err


def test_text_on_stdout_facts_on_stderr(tmp_path, capsys):
    folder = write(tmp_path, random_model())
    out, err = run_cli(capsys, tmp_path, "--prompt", "Hi ", "--max-tokens", 8, "--temperature", 0)
    assert out.startswith("Hi ") and out.endswith("\n")
    assert str(folder) in err and "iteration 10" in err and "fp32 on cpu" in err and "tokens/s" in err
    assert run_cli(capsys, folder, "--prompt", "Hi ", "--max-tokens", 8, "--temperature", 0)[0] == out
    several, _ = run_cli(capsys, tmp_path, "--prompt", "Hi ", "--max-tokens", 3, "--num-samples", 2, "--seed", 1)
    assert several.count("Hi ") == 2 and "--- sample 1\n" in several


def test_json_document(tmp_path, capsys):
    model = random_model()
    folder = write(tmp_path, model)
    document = json_of(capsys, tmp_path, "--prompt", "naïve", "--max-tokens", 6, "-n", 2, "--seed", 4, "--temperature", 1, "--top-p", 0.9)
    assert document["checkpoint"] == str(folder) and document["iteration"] == 10 and document["prompt_tokens"] == 6
    assert document["settings"] == {"temperature": 1.0, "top_k": 40, "top_p": 0.9, "max_tokens": 6, "seed": 4}
    right = sampling.sample(model, list("naïve".encode()), Options(6, 257, 1.0, 40, 0.9, 256, 4), 2)
    for found, made in zip(document["samples"], right, strict=True):
        assert found["prompt"] == "naïve" and found["tokens"] == made.tokens and found["finish"] == made.finish
        assert found["text"] == load_tokenizer("byte").decode(made.tokens)


def test_the_seed_is_said_so_that_a_text_can_be_had_again(tmp_path, capsys):
    write(tmp_path, random_model())
    arguments = (tmp_path, "--prompt", "a", "--max-tokens", 10, "--temperature", 1)
    first = json_of(capsys, *arguments)
    again = json_of(capsys, *arguments, "--seed", first["settings"]["seed"])
    other = json_of(capsys, *arguments)
    assert again["samples"] == first["samples"] and other["samples"] != first["samples"]


def test_an_empty_prompt_is_a_new_document(tmp_path, capsys):
    model = random_model()
    write(tmp_path, model)
    for prompt in ((), ("--prompt", "")):
        (found,) = json_of(capsys, tmp_path, *prompt, "--max-tokens", 5, "--temperature", 0)["samples"]
        (right,) = sampling.sample(model, [256], Options(5, 257, 0.0, eod=256))
        assert found["tokens"] == right.tokens and found["prompt"] == "" and "endoftext" not in found["text"]


def test_prompt_from_a_file(tmp_path, capsys):
    write(tmp_path, random_model())
    file = tmp_path / "p.txt"
    file.write_text("two\nlines", "utf-8")
    assert json_of(capsys, tmp_path, "--prompt-file", file, "--max-tokens", 2)["samples"][0]["prompt"] == "two\nlines"
    file.write_bytes(b"\xff\xfe")
    assert "is not UTF-8" in run_cli(capsys, tmp_path, "--prompt-file", file, code=2)[1]
    assert "cannot be read" in run_cli(capsys, tmp_path, "--prompt-file", tmp_path / "none", code=2)[1]


def test_the_newest_good_checkpoint_is_used(tmp_path, capsys):
    old, new = write(tmp_path, random_model(seed=1), step=1), write(tmp_path, random_model(seed=2), step=2)
    arguments = ("--prompt", "a", "--max-tokens", 4, "--temperature", 0)
    assert json_of(capsys, tmp_path, *arguments)["iteration"] == 2
    assert json_of(capsys, old, *arguments)["iteration"] == 1
    assert json_of(capsys, tmp_path / "checkpoints", *arguments)["iteration"] == 2
    file = new / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    out, err = run_cli(capsys, tmp_path, *arguments, "--json")
    assert json.loads(out)["iteration"] == 1 and "step-00000002 is damaged and passed over" in err
    assert "checksum" in run_cli(capsys, new, *arguments, code=2)[1]
    (old / "manifest.json").write_text("{")
    assert "none of them good" in run_cli(capsys, tmp_path, *arguments, code=2)[1]


def test_paths_without_a_checkpoint(tmp_path, capsys):
    assert "does not exist" in run_cli(capsys, tmp_path / "none", code=2)[1]
    assert "holds no complete checkpoint" in run_cli(capsys, tmp_path, code=2)[1]


@pytest.mark.parametrize(
    ("options", "rules"),
    [
        (["--temperature", "-1"], ["--temperature -1.0: must be a finite number, 0 or more"]),
        (["--temperature", "nan"], ["--temperature nan"]),
        (["--top-k", "258"], ["--top-k 258: the tokenizer has 257 tokens"]),
        (["--top-k", "-1", "--top-p", "0", "--max-tokens", "0", "-n", "0"], ["4 problems", "--top-p 0.0", "--num-samples 0"]),
        (["--top-p", "1.5"], ["--top-p 1.5: must be above 0"]),
        (["--seed", "-3"], ["--seed -3"]),
        (["--device", "tpu"], ["--device tpu: must be one of auto, cpu, cuda"]),
        (["--precision", "fp8"], ["--precision fp8: must be one of"]),
        (["--prompt-file", "x"], ["--prompt-file is given too"]),
        (["--prompt", "x" * 25], ["25 tokens, the model has 24 positions"]),
    ],
)
def test_options_that_are_refused(tmp_path, capsys, options, rules):
    write(tmp_path, random_model())
    _, err = run_cli(capsys, tmp_path, *(["--prompt", "a"] if "--prompt" not in options else []), *options, code=2)
    assert all(rule in err for rule in rules), err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu(tmp_path, capsys):
    write(tmp_path, random_model())
    assert "sees no GPU" in run_cli(capsys, tmp_path, "--device", "cuda", code=2)[1]


def test_precisions_of_a_run_that_cannot_be_sampled_in(tmp_path, capsys):
    write(tmp_path, random_model(), precision="fp8")
    assert "set --precision" in run_cli(capsys, tmp_path, code=2)[1]
    assert json_of(capsys, tmp_path, "--precision", "fp32", "--max-tokens", 2)["precision"] == "fp32"


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A tokenizer.json of 280 tokens."""
    pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("bpe")
    (folder / "a.txt").write_text("the cause of the matter is the cause of all causes\n" * 30)
    train_bpe([folder / "a.txt"], 280, folder / "tokenizer.json")
    return folder / "tokenizer.json"


def recorded(path):
    return {"spec": str(path), **load_tokenizer(path).describe()}


def test_the_copy_in_the_run_directory_is_preferred(tmp_path, capsys, bpe):
    model = random_model(dataclasses.replace(CONFIG, vocab_size=300))
    moved = recorded(bpe) | {"spec": str(tmp_path / "gone.json")}
    folder = write(tmp_path, model, tokenizer=moved)
    arguments = (tmp_path, "--prompt", "the cause", "--max-tokens", 12, "--temperature", 2, "--top-k", 0)
    _, err = run_cli(capsys, *arguments, code=2)
    assert "gone.json does not exist here" in err and "--tokenizer" in err
    named = json_of(capsys, *arguments, "--tokenizer", bpe, "--seed", 1)
    shutil.copy(bpe, tmp_path / "tokenizer.json")
    found = json_of(capsys, folder, *arguments[1:], "--seed", 1)
    assert found["tokenizer"] == str(tmp_path / "tokenizer.json") and found["samples"] == named["samples"]
    size = load_tokenizer(bpe).vocab_size
    assert size < 300 and max(found["samples"][0]["tokens"]) < size, "ids without a text are not drawn"
    assert found["samples"][0]["text"] == load_tokenizer(bpe).decode(found["samples"][0]["tokens"])


def test_tokenizers_that_are_refused(tmp_path, capsys, bpe):
    model = random_model(dataclasses.replace(CONFIG, vocab_size=300))
    write(tmp_path / "a", model, tokenizer=recorded(bpe))
    assert "another tokenizer than byte" in run_cli(capsys, tmp_path / "a", "--tokenizer", "byte", code=2)[1]
    other = tmp_path / "tokenizer.json"
    other.write_text(bpe.read_text().replace("\n", " \n") + "\n")
    assert "another tokenizer" in run_cli(capsys, tmp_path / "a", "--tokenizer", other, code=2)[1]
    # Also where only the path was recorded.
    write(tmp_path / "d", model, tokenizer={"spec": "byte"})
    assert "another tokenizer than" in run_cli(capsys, tmp_path / "d", "--tokenizer", bpe, code=2)[1]
    shutil.copy(bpe, tmp_path / "d" / "tokenizer.json")
    assert json_of(capsys, tmp_path / "d", "--max-tokens", 2)["tokenizer"] == "byte"
    write(tmp_path / "b", model, tokenizer=None)
    assert "no tokenizer is recorded" in run_cli(capsys, tmp_path / "b", code=2)[1]
    assert json_of(capsys, tmp_path / "b", "--tokenizer", "byte", "--max-tokens", 2)["tokenizer"] == "byte"
    write(tmp_path / "c", random_model(dataclasses.replace(CONFIG, vocab_size=200)), tokenizer=None)
    assert "has 257 tokens, the model has 200" in run_cli(capsys, tmp_path / "c", "--tokenizer", "byte", code=2)[1]
    assert "does not exist" in run_cli(capsys, tmp_path / "b", "--tokenizer", tmp_path / "none.json", code=2)[1]


def test_a_long_text_says_that_it_forgets(tmp_path, capsys):
    write(tmp_path, random_model())
    assert "may outgrow the model's 24 positions" in run_cli(capsys, tmp_path, "--prompt", "abc", "--max-tokens", 23)[1]
    assert "outgrow" not in run_cli(capsys, tmp_path, "--prompt", "abc", "--max-tokens", 22)[1]


def test_a_trained_model_says_what_it_learnt(tmp_path, capsys):
    """A few plain gradient steps on one sentence, saved in two halves a tensor: greedy text is the sentence, and it ends."""
    sentence = b"to be or not to be"
    model = random_model(scale=0.08)
    tokens = torch.tensor([[256, *sentence, 256]])
    ids = torch.arange(tokens.shape[1] - 1).unsqueeze(0)
    batch = MicroBatch(rng=torch.zeros(3, dtype=torch.int64), position_ids=ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model.loss_sum(model(tokens[:, :-1], batch), tokens[:, 1:], torch.ones(ids.shape)) / ids.numel()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    write(tmp_path, model, layout=rows)
    assert run_cli(capsys, tmp_path, "--temperature", 0)[0] == sentence.decode() + "\n"
    (found,) = json_of(capsys, tmp_path, "--temperature", 0)["samples"]
    assert found["finish"] == "eod" and bytes(found["tokens"]) == sentence


@pytest.mark.gpu
def test_cuda_says_what_the_cpu_says(tmp_path, capsys):
    write(tmp_path, random_model(), layout=ranges)
    arguments = (tmp_path, "--prompt", "abc", "--max-tokens", 50, "--seed", 1, "--temperature", 1, "--precision", "fp64", "-n", 3)
    cpu, cuda = (json_of(capsys, *arguments, "--device", device) for device in ("cpu", "cuda"))
    assert cuda["device"] == "cuda" and cuda["samples"] == cpu["samples"]
    assert json_of(capsys, tmp_path, "--prompt", "abc", "--precision", "bf16")["device"] == "cuda"
