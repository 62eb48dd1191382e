"""`megactl checkpoint verify`: a flipped bit is found wherever there is a checksum, and where there is none that is said."""

from __future__ import annotations

import hashlib
import json
import random

import pytest

torch = pytest.importorskip("torch")

from megactl.cli import main  # noqa: E402
from megactl.errors import CheckpointError  # noqa: E402
from megactl.storage.layouts import verify  # noqa: E402


def flip(path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def methods(verification) -> dict[str, str]:
    return {check.name: check.method for check in verification.files}


def test_bits_in_torchs_zip_files(make, tmp_path):
    folder = make.megatron(tmp_path, tp=2, pp=1)
    good = verify(tmp_path)
    assert good.good and set(methods(good).values()) == {"crc32"}
    victim = folder / "mp_rank_01/model_optim_rng.pt"
    before, source = victim.read_bytes(), random.Random(1)
    read = next(check.nbytes for check in good.files if "mp_rank_01" in check.name)
    assert read > 0.5 * len(before)
    found = 0
    for _ in range(40):
        flip(victim, source.randrange(len(before)))
        found += not verify(tmp_path).good
        victim.write_bytes(before)
    # What stands between the records (padding, local times) is under no checksum.
    assert found >= 0.6 * 40
    at = before.index(torch.zeros(200).numpy().tobytes())
    flip(victim, at + 100)
    result = verify(tmp_path)
    assert [check.name for check in result.files if check.problem] == ["mp_rank_01/model_optim_rng.pt"] and result.inventory.good


def test_formats_without_checksums_say_so(make, tmp_path):
    make.megatron(tmp_path / "old", legacy=True, tp=1, pp=1)
    make.huggingface(tmp_path / "hf", shards=1)
    make.distributed(tmp_path / "dcp")
    for name, file in (("old", "mp_rank_00/model_optim_rng.pt"), ("hf", "model-00001-of-00001.safetensors"), ("dcp", "__0_0.distcp")):
        result = verify(tmp_path / name)
        assert result.good and methods(result)[file] == "structure", name


def test_files_that_torch_wrote_without_crc(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(10)}, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    result = verify(tmp_path / "x.pt")
    assert result.good and methods(result) == {"x.pt": "structure"}


def test_megatrons_integrity_file(make, tmp_path):
    folder = make.distributed(tmp_path)
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    (folder / "integrity.json").write_text(json.dumps({"algorithm": "sha256", "files": sums}))
    good = verify(tmp_path)
    assert good.good and all(methods(good)[name] == "sha256" for name in sums)
    shard = folder / "__0_0.distcp"
    flip(shard, shard.stat().st_size // 2)
    result = verify(tmp_path)
    assert not result.good and [check.name for check in result.files if check.problem] == ["__0_0.distcp"]
    sums["__1_0.distcp"], sums["../../outside"] = "0" * 64, "0" * 64
    (folder / "integrity.json").write_text(json.dumps({"algorithm": "sha256", "files": sums}))
    assert verify(tmp_path).inventory.missing == ["__1_0.distcp"]
    for wrong in ("{", "[]", '{"algorithm": "md5", "files": {}}', '{"files": {"a": 3}}'):
        (folder / "integrity.json").write_text(wrong)
        assert not verify(tmp_path).good, wrong


def test_own_checkpoints_as_typed(capsys, tmp_path):
    from megactl.engine import checkpoint
    from megactl.engine.checkpoint import Piece, SingleProcess

    values = torch.randn(64, 8)
    pieces = [Piece("embedding.weight", "weight", (64, 8), ((0, 64), (0, 8)), None, values)]
    layout = {"tp": 1, "cp": 1, "dp": 1, "pp": 1, "zero": 0}
    header = {"consumed_samples": 1, "layout": layout, "precision": "fp32", "model": {}, "tokenizer": None, "state": {}}
    folder = checkpoint.save(tmp_path / "checkpoints", step=3, pieces=pieces, header=header, group=SingleProcess(), keep=2, protect=None)
    assert main(["checkpoint", "verify", str(tmp_path)]) == 0
    assert "good" in capsys.readouterr().out
    assert main(["checkpoint", "verify", str(folder), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)["checkpoints"][0]
    assert document["ok"] and {file["method"] for file in document["files"]} == {"sha256"}
    assert document["bytes_checked"] == document["bytes"]
    shard = folder / "rank-00000.safetensors"
    flip(shard, shard.stat().st_size - 9)
    assert main(["checkpoint", "verify", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "DAMAGED" in out and "does not match its checksum" in out
    shard.unlink()
    assert main(["checkpoint", "verify", str(folder), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["checkpoints"][0]["missing"] == ["rank-00000.safetensors"]
    with pytest.raises(CheckpointError):
        verify(tmp_path / "gone")
