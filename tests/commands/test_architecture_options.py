"""The architecture options of the desk commands, through a command as Typer runs it."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
import typer

from megactl.commands.architecture_options import ARCHITECTURE, Request, read_request, with_settings
from megactl.costmodel.parameters import total_parameters
from megactl.errors import ConfigError

SEED = "--hidden 4096 --layers 36 --seq 512 --vocab 50257"


def read(line: str, *, needs_model: bool = True) -> Request:
    """What a command with these options makes of `line`."""
    found: list[Request] = []

    @with_settings(*ARCHITECTURE, "parallel.tensor_parallel", help="A command.", epilog="Examples:")
    def command(gpus: Annotated[int | None, typer.Option("--gpus")] = None, **settings: Any) -> None:
        found.append(read_request(settings, needs_model=needs_model))

    app = typer.Typer()
    app.command()(command)
    app(args=line.split(), standalone_mode=False)
    return found[0]


def mistakes(line: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        read(line)
    return [str(problem) for problem in error.value.problems]


def test_the_shape_of_the_seed_needs_no_heads() -> None:
    request = read(SEED)
    assert request.named and request.seq_length == 512
    assert total_parameters(request.model, seq_length=512) == 7_457_632_256
    assert request.model.num_heads == 64 and not request.is_set("model.num_heads") and request.given("model.num_heads") is None


def test_megatrons_long_names_and_a_preset_with_changes() -> None:
    long = "--num-layers 36 --hidden-size 4096 --num-attention-heads 32 --seq-length 512 --vocab-size 50257 --tensor-model-parallel-size 4"
    assert read(long).run.parallel.tensor_parallel == 4
    assert read(f"{SEED} --heads 32 --tp 4").run == read(long).run
    changed = read("--preset gpt-7.5b --layers 12")
    assert changed.model.num_layers == 12 and changed.model.hidden_size == 4096 and changed.seq_length == 2048
    assert changed.origins["model.hidden_size"] == "preset gpt-7.5b"


def test_a_settings_file_names_a_model(tmp_path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[model]\nnum_layers = 2\nhidden_size = 64\nvocab_size = 100\n[data]\ndata = "corpus"\n')
    assert read(f"--config {path}").model.num_layers == 2


def test_no_architecture_at_all_is_a_mistake_only_where_one_is_needed() -> None:
    assert not read("--seq 2048", needs_model=False).named
    assert [line.split(":")[0] for line in mistakes("--seq 2048")] == ["--layers", "--hidden", "--vocab"]
    # Half an architecture is one that was meant.
    with pytest.raises(ConfigError, match=r"--hidden: is not set.*\n.*--vocab"):
        read("--layers 12", needs_model=False)


def test_mistakes_are_reported_together_and_say_what_to_do() -> None:
    found = mistakes("--preset gpt-7.5c --layers 1.5 --hidden 4,096")
    assert len(found) == 3
    assert "did you mean gpt-7.5b?" in found[0] and "use 1 or 2" in found[1] and "use 4_096" in found[2]
    assert mistakes(f"{SEED} --tp 3") == ["--tp 3: must divide --heads 64 (assumed); use --tp 2 or 4"]
    assert mistakes("--preset gpt-tiny") == [
        "--vocab: is not set, and preset gpt-tiny takes its tokenizer's; give --vocab N, such as 50257 for GPT-2's"
    ]
    assert "must be at least 1" in mistakes("--layers 0 --hidden -8 --vocab 100")[0]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400", "9" * 400, "1e18", "", "0x10"])
def test_absurd_numbers_are_refused(value: str) -> None:
    with pytest.raises(ConfigError):
        read(f"--layers 2 --vocab 100 --hidden={value}")
