"""Each layout against the truth that torch knows: parts, degrees, what is missing, and that every byte is counted once."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from megactl.commands.checkpoint_view import compare  # noqa: E402
from megactl.costmodel.checkpoint import stored_elements  # noqa: E402
from megactl.errors import CheckpointError  # noqa: E402
from megactl.storage.layouts import Inventory, inspect  # noqa: E402


def truth(folder: Path) -> Counter[str]:
    """Bytes by the words in the keys, over every torch file, by loading them: an oracle that shares no code with the reader."""
    found: Counter[str] = Counter()

    def walk(value, keys):
        if isinstance(value, torch.Tensor):
            words = "/".join(keys)
            last = keys[-1] if keys else ""
            if last in ("exp_avg", "exp_avg_sq"):
                found[last] += value.nbytes
            elif "fp32" in words or last == "param":
                found["master"] += value.nbytes
            elif "rng" in words:
                found["rng"] += value.nbytes
            elif not words.startswith("optimizer"):
                found["weights"] += value.nbytes
        elif isinstance(value, dict):
            for key, item in value.items():
                walk(item, [*keys, str(key)])
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                walk(item, [*keys, str(index)])

    for path in folder.rglob("*.pt"):
        walk(torch.load(path, weights_only=False), [])
    return found


def disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def check(inventory: Inventory, folder: Path) -> None:
    assert inventory.good, inventory.findings
    assert sum(inventory.parts.values()) == inventory.size == disk(folder)
    assert not inventory.parts["unread"] and not inventory.parts["unused"]
    comparison = compare(inventory, None)
    assert comparison is None or comparison.reason is None


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (2, 2), (1, 4)])
def test_megatron(make, tmp_path, tp, pp, distributed):
    folder = make.megatron(tmp_path, tp=tp, pp=pp, distributed=distributed)
    inventory = inspect(tmp_path)
    check(inventory, folder)
    assert (inventory.system, inventory.iteration, inventory.path) == ("megatron", 1000, folder)
    assert (inventory.layout["tp"], inventory.layout["pp"]) == (tp, pp)
    expected = truth(folder)
    for part in ("weights", "master", "exp_avg", "exp_avg_sq"):
        assert inventory.parts[part] == expected[part], part
    # numpy's state lies in the pickle, so the oracle of tensors does not see it.
    assert inventory.parts["rng"] == expected["rng"] + tp * pp * 624 * 4
    comparison = compare(inventory, None)
    assert comparison is not None and not comparison.differs
    assert all(expected == found for _, expected, found in comparison.rows), comparison.rows


def test_megatron_in_the_format_before_zip(make, tmp_path):
    folder = make.megatron(tmp_path, legacy=True)
    inventory = inspect(folder)
    check(inventory, folder)
    assert inventory.parts["master"] == truth(folder)["master"]


def test_megatron_of_2022_has_an_optimizer_file_for_each_replica(make, tmp_path):
    for tp in range(2):
        (tmp_path / f"mp_rank_{tp:02d}").mkdir()
        torch.save(
            {"args": make.arguments(tensor_model_parallel_size=2), "iteration": 5, "model": make.gpt_stage(2, 1, 0)},
            tmp_path / f"mp_rank_{tp:02d}/model_rng.pt",
        )
        for dp in range(2):
            (tmp_path / f"mp_rank_{tp:02d}_{dp:03d}").mkdir()
            torch.save(
                {0: {torch.float32: {"param": torch.zeros(9), "exp_avg": torch.zeros(9)}}}, tmp_path / f"mp_rank_{tp:02d}_{dp:03d}/optim.pt"
            )
    inventory = inspect(tmp_path)
    assert inventory.good and inventory.layout["tp"] == 2 and inventory.layout["pp"] == 1
    assert inventory.parts["master"] == inventory.parts["exp_avg"] == 4 * 9 * 4
    shutil.rmtree(tmp_path / "mp_rank_01_000")
    assert inspect(tmp_path).missing == ["mp_rank_01_000/optim.pt"]


def test_megatron_names_each_missing_rank(make, tmp_path):
    folder = make.megatron(tmp_path, tp=2, pp=2)
    shutil.rmtree(folder / "mp_rank_01_000")
    assert inspect(tmp_path).missing == ["mp_rank_01_000/model_optim_rng.pt"]
    # The last stage shows only in the arguments.
    shutil.rmtree(folder / "mp_rank_00_001")
    shutil.rmtree(folder / "mp_rank_01_001")
    inventory = inspect(tmp_path)
    assert len(inventory.missing) == 3 and not inventory.good


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("bf16", [False, True])
def test_deepspeed_with_a_pipeline(make, tmp_path, zero, bf16):
    folder = make.deepspeed_pipeline(tmp_path, tp=2, pp=2, dp=2, zero=zero, bf16=bf16)
    inventory = inspect(tmp_path)
    check(inventory, folder)
    assert (inventory.system, inventory.iteration) == ("deepspeed", 500)
    assert {name: inventory.layout[name] for name in ("tp", "pp", "dp", "zero")} == {"tp": 2, "pp": 2, "dp": 2, "zero": zero}
    expected = truth(folder)
    for part in ("weights", "master", "exp_avg", "exp_avg_sq"):
        assert inventory.parts[part] == expected[part], part
    comparison = compare(inventory, None)
    assert comparison is not None and all(expected == found for _, expected, found in comparison.rows), comparison.rows


def test_deepspeed_names_missing_layers_ranks_and_shares(make, tmp_path):
    folder = make.deepspeed_pipeline(tmp_path, tp=2, pp=2, dp=2, zero=1)
    gone = ["layer_04-model_01-model_states.pt", "mp_rank_03_model_states.pt", "zero_pp_rank_1_mp_rank_02_optim_states.pt"]
    for name in gone:
        (folder / name).unlink()
    assert sorted(inspect(folder).missing) == sorted(gone)
    # A layer of which no rank is left, between two of the same size.
    (folder / "layer_04-model_00-model_states.pt").unlink()
    assert "layer_04-model_00-model_states.pt" in inspect(folder).missing


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_deepspeed_without_a_pipeline(make, tmp_path, zero):
    folder = make.deepspeed_flat(tmp_path, zero=zero)
    inventory = inspect(folder)
    check(inventory, folder)
    assert inventory.layout["zero"] == zero and inventory.iteration == 20
    expected = truth(folder)
    for part in ("weights", "master", "exp_avg", "exp_avg_sq"):
        assert inventory.parts[part] == expected[part], part
    assert any("zero_to_fp32" in finding.message for finding in inventory.findings) == (zero == 3)


def test_universal(make, tmp_path):
    folder = make.universal(tmp_path)
    inventory = inspect(tmp_path)
    check(inventory, folder)
    count = sum(value.numel() for value in make.gpt_stage(1, 1, 0).values())
    assert inventory.parts["master"] == inventory.parts["exp_avg"] == inventory.parts["exp_avg_sq"] == 4 * count
    (folder / "zero/embedding.word_embeddings.weight/exp_avg.pt").unlink()
    assert inspect(tmp_path).missing == ["zero/embedding.word_embeddings.weight/exp_avg.pt"]


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_huggingface(make, tmp_path, kind):
    make.huggingface(tmp_path, kind=kind)
    inventory = inspect(tmp_path)
    assert inventory.good and inventory.iteration == 77 and inventory.system == "huggingface"
    assert inventory.size == disk(tmp_path) == sum(inventory.parts.values())
    count = sum(value.numel() for value in make.gpt_stage(1, 1, 0).values())
    assert inventory.parts["weights"] == 2 * count and inventory.parts["exp_avg"] == 4 * count
    assert any("full precision" in finding.message for finding in inventory.findings)
    comparison = compare(inventory, None)
    assert comparison is not None and not comparison.differs and comparison.rows[0][1:] == (count, count)


def test_huggingface_index_against_its_files(make, tmp_path):
    make.huggingface(tmp_path, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    inventory = inspect(tmp_path)
    assert inventory.missing == ["model-00002-of-00003.safetensors"]
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00002-of-00003.safetensors", "../../../etc/passwd"))
    messages = [finding.message for finding in inspect(tmp_path).findings]
    assert any("outside its folder" in message for message in messages)
    index.write_text("{")
    assert any("not valid JSON" in finding.message for finding in inspect(tmp_path).findings)


def test_huggingface_with_deepspeed_inside(make, tmp_path):
    make.huggingface(tmp_path)
    make.deepspeed_flat(tmp_path, zero=1)
    inventory = inspect(tmp_path)
    assert inventory.good and "DeepSpeed" in inventory.title and inventory.layout["zero"] == 1
    assert inventory.size == disk(tmp_path) == sum(inventory.parts.values())


@pytest.mark.parametrize("megatron_keys", [True, False])
def test_distributed(make, tmp_path, megatron_keys):
    folder = make.distributed(tmp_path, megatron_keys=megatron_keys)
    inventory = inspect(folder)
    check(inventory, folder)
    count = sum(value.numel() for value in make.gpt_stage(1, 1, 0).values())
    assert inventory.parts["weights"] == 2 * count
    assert inventory.parts["exp_avg"] == inventory.parts["exp_avg_sq"] == 4 * count
    assert inventory.parts["master"] == (4 * count if megatron_keys else 0)
    assert inventory.parts["rng"] > 5000 and inventory.iteration == 7
    rows = {(row.name, row.part) for row in inventory.rows.values()}
    name = "embedding.word_embeddings.weight"
    assert (name if megatron_keys else f"model.{name}", "weights") in rows and (name, "exp_avg") in rows


def test_distributed_shards_cut_short_or_gone(make, tmp_path):
    folder = make.distributed(tmp_path)
    shard = next(folder.glob("*.distcp"))
    os.truncate(shard, shard.stat().st_size // 2)
    inventory = inspect(tmp_path)
    assert not inventory.good and any("cut short" in finding.message for finding in inventory.findings)
    assert sum(inventory.parts.values()) == disk(folder)
    shard.unlink()
    assert inspect(tmp_path).missing == [shard.name]
    (folder / ".metadata").unlink()
    (folder / "__0_0.distcp").write_bytes(b"x")
    assert ".metadata" in inspect(tmp_path).missing


def test_pointers(make, tmp_path):
    make.megatron(tmp_path, tp=1, pp=1, iteration=10)
    make.megatron(tmp_path, tp=1, pp=1, iteration=20)
    pointer = tmp_path / "latest_checkpointed_iteration.txt"
    pointer.write_text("10\n")
    inventory = inspect(tmp_path)
    assert inventory.good and inventory.iteration == 10 and any("newer" in finding.message for finding in inventory.findings)
    for wrong in ("30", "../elsewhere", "", "\x1b[31m", "9" * 4000):
        pointer.write_text(wrong)
        inventory = inspect(tmp_path)
        assert not inventory.good and inventory.iteration == 20, wrong
    pointer.unlink()
    assert inspect(tmp_path).iteration == 20


def test_a_view_of_a_large_buffer(tmp_path):
    buffer = torch.zeros(1_000_000)
    torch.save(
        {"a": buffer[:10], "b": buffer[10:20].view(2, 5), "again": buffer[:10], "columns": torch.zeros(100, 1000)[:, :10]},
        tmp_path / "x.pt",
    )
    inventory = inspect(tmp_path / "x.pt")
    assert inventory.parts["weights"] == 4 * (20 + 1000)
    assert inventory.parts["unused"] == 4 * (1_000_000 - 20 + 100_000 - 1000)
    assert any(".clone()" in finding.message for finding in inventory.findings)
    assert inventory.elements["weights"] == 20 + 1000
    assert sum(inventory.parts.values()) == inventory.size


def test_a_small_rank_and_moments_that_are_missing(make, tmp_path):
    folder = tmp_path / "iter_0000001"
    for rank in range(4):
        (folder / f"mp_rank_{rank:02d}").mkdir(parents=True)
        count = 100 if rank == 2 else 100_000
        state = {
            "args": None,
            "iteration": 1,
            "model": {"w": torch.zeros(count)},
            "optimizer": {"state": {0: {"exp_avg": torch.zeros(count // 2)}}},
        }
        torch.save(state, folder / f"mp_rank_{rank:02d}/model_optim_rng.pt")
    inventory = inspect(folder)
    assert inventory.good
    found = {(finding.where, finding.severity) for finding in inventory.findings}
    assert ("mp_rank_02/model_optim_rng.pt", "warning") in found
    assert any("exp_avg has" in finding.message and "50 %" in finding.message for finding in inventory.findings)


def test_ranks_of_different_iterations(make, tmp_path):
    folder = make.megatron(tmp_path, tp=2, pp=1)
    torch.save(
        {"args": make.arguments(tensor_model_parallel_size=2), "iteration": 900, "model": make.gpt_stage(2, 1, 0)},
        folder / "mp_rank_01/model_optim_rng.pt",
    )
    assert any("different iterations" in finding.message for finding in inspect(folder).findings)


def test_one_damaged_file_does_not_hide_the_others(make, tmp_path):
    folder = make.megatron(tmp_path, tp=2, pp=2)
    whole = inspect(folder)
    victim = folder / "mp_rank_01_001/model_optim_rng.pt"
    os.truncate(victim, victim.stat().st_size - 100)
    inventory = inspect(folder)
    assert [finding.where for finding in inventory.findings if finding.severity == "problem"] == ["mp_rank_01_001/model_optim_rng.pt"]
    assert inventory.parts["unread"] == victim.stat().st_size and inventory.parts["weights"] < whole.parts["weights"]
    assert len(inventory.files) == 4


def test_no_checkpoint(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    for path in (tmp_path, tmp_path / "gone"):
        with pytest.raises(CheckpointError):
            inspect(path)
    inventory = inspect(tmp_path / "notes.txt")
    assert not inventory.good and "neither a torch file nor a pickle" in inventory.findings[0].message


def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    inventory = inspect(tmp_path)
    assert not inventory.good and "plain file" in inventory.findings[0].message


def test_prediction_of_what_other_systems_store():
    from megactl.config.schema import Model

    model = Model(num_layers=4, hidden_size=16, num_heads=4, vocab_size=256)
    whole = stored_elements(model, "megactl", tp=2, pp=2, seq_length=32)
    copies = stored_elements(model, "megatron", tp=2, pp=2, seq_length=32)
    assert whole.weights == whole.state < copies.weights == copies.state
