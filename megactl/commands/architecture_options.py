"""Options that name an architecture, for commands that compute with one and train nothing: --preset, --config, and flags of the schema.

    @with_settings(*ARCHITECTURE, "parallel.tensor_parallel", help="...", epilog="Examples: ...")
    def model_size(gpus: Annotated[...] = None, **settings: Any) -> int:
        request = read_request(settings)
        parameters = total_parameters(request.model, seq_length=request.seq_length)

The flags, their aliases (Megatron-LM's long names among them), help texts and messages are those of `megactl train`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer

from megactl.commands.schema_options import flag_annotation, parameter
from megactl.config.flags import PANELS, all_flags, given
from megactl.errors import ConfigError, Problem

if TYPE_CHECKING:
    from megactl.config.load import Loaded
    from megactl.config.schema import Model, Run

Command = TypeVar("Command", bound=Callable[..., Any])

ARCHITECTURE = (
    "model.architecture",
    "model.num_layers",
    "model.hidden_size",
    "model.num_heads",
    "model.kv_heads",
    "model.ffn_size",
    "model.vocab_size",
    "model.max_positions",
    "model.position_embedding",
    "model.normalization",
    "model.norm_position",
    "model.activation",
    "model.bias",
    "model.sentence_head",
    "model.untie_embeddings",
    "training.seq_length",
)
"""Settings that decide how many parameters and FLOPs a model has. Those that do not (dropout, GELU, ...) are no options here."""

# Without a preset nothing else says these, and a silent default would give the size of another model.
_NEEDED = ("model.num_layers", "model.hidden_size")
# Far above any model there is; a number beyond is a slip, and too large for the arithmetic of floats.
_MOST = {
    "model.num_layers": 10**5,
    "model.hidden_size": 10**7,
    "model.num_heads": 10**6,
    "model.kv_heads": 10**6,
    "model.ffn_size": 10**8,
    "model.vocab_size": 10**9,
    "model.max_positions": 10**9,
    "training.seq_length": 10**9,
    "training.micro_batch_size": 10**9,
    "training.global_batch_size": 10**12,
    "parallel.tensor_parallel": 10**7,
    "parallel.pipeline_parallel": 10**5,
    "parallel.data_parallel": 10**7,
}
# The defaults of training that are none here.
_HELP = {
    "model.num_layers": "Transformer layers",
    "model.hidden_size": "Width of the residual stream",
    "model.num_heads": "Attention heads (they change neither parameters nor FLOPs, unless they share keys and values)",
    "model.vocab_size": "Tokens in the vocabulary, before padding",
    "training.micro_batch_size": "Sequences in one forward pass of one replica",
    "training.global_batch_size": "Sequences in one optimizer step",
    "training.precision": "Arithmetic (fp64 is for verification)",
}
_HEAD_WIDTH = 64
_ASSUMED = "assumed"


@dataclass(frozen=True)
class TextOption:
    """An option of a command's own whose value the command reads itself; `flags[0]` is how messages name it."""

    flags: tuple[str, ...]
    metavar: str
    help: str
    panel: str

    @property
    def annotation(self) -> Any:
        """What Typer reads."""
        return Annotated[str | None, typer.Option(*self.flags, metavar=self.metavar, help=self.help, rich_help_panel=self.panel)]


def with_settings(
    *names: str, help: str, epilog: str, texts: Mapping[str, TextOption] = MappingProxyType({})
) -> Callable[[Command], Command]:
    """Give a command that ends in `**settings` the options --preset and --config, and one for each flag of the settings `names`.

    `settings` then holds what `read_request` takes, and the values of `texts` by their names.
    `help` (a paragraph a line) and `epilog` are what --help shows around the options.
    """
    files = {
        "preset": Annotated[str | None, typer.Option("--preset", metavar="NAME", help="A named model, such as gpt-52b")],
        "config": Annotated[str | None, typer.Option("--config", metavar="FILE.toml", help="The model of a run's settings.")],
    }

    def dress(function: Command) -> Command:
        hints = get_type_hints(function, include_extras=True)
        plain = inspect.signature(function).parameters.values()
        own = [parameter(item.name, hints[item.name], item.default) for item in plain if item.kind is not item.VAR_KEYWORD]
        more = [parameter(name, text.annotation, None) for name, text in texts.items()]
        more += [parameter(name, annotation, None) for name, annotation in files.items()]
        chosen = [flag for flag in all_flags() if flag.setting.name in names]
        for flag in chosen:
            annotation = flag_annotation(flag, PANELS[flag.setting.section], _HELP.get(flag.setting.name))
            more.append(parameter(flag.parameter, annotation, None))
        function.__annotations__ = {**{item.name: item.annotation for item in (*own, *more)}, "return": hints.get("return")}
        vars(function).update(__signature__=inspect.Signature([*own, *more]), command_options={"help": help, "epilog": epilog})
        return function

    return dress


@dataclass(frozen=True)
class Request:
    """What was asked for. `run` holds the settings; those that neither flag, file nor preset gave keep the schema's default.

    `named`: an architecture was named at all (otherwise `run.model` means nothing). `origins` as in `config.load.Loaded`.
    """

    run: Run
    origins: Mapping[str, str]
    named: bool

    @property
    def model(self) -> Model:
        """The architecture. Only where it was named."""
        assert self.named, "no architecture was named"
        return self.run.model

    @property
    def seq_length(self) -> int:
        """Tokens in a sequence."""
        return self.run.training.seq_length

    def is_set(self, name: str) -> bool:
        """Whether a flag, a file or the preset gave this setting."""
        return self.origins[name] not in ("default", _ASSUMED)

    def given(self, name: str) -> Any:
        """The setting's value, or None where nobody gave it."""
        from megactl.config.settings import all_settings

        return all_settings()[name].read(self.run) if self.is_set(name) else None


def read_request(settings: Mapping[str, Any], *, needs_model: bool = True) -> Request:
    """The settings as typed, checked by the rules of `megactl train`. Raises ConfigError holding every mistake.

    `needs_model`: no architecture at all is a mistake too.
    """
    from megactl.config.load import load

    loaded = load(preset=settings.get("preset"), config=settings.get("config"), flags=given(settings))
    named = any(origin != "default" for name, origin in loaded.origins.items() if name.startswith("model."))
    problems = [*_too_large(loaded), *(_unknown(loaded) if named or needs_model else ())]
    request = Request(loaded.run, loaded.origins, named)
    if not problems:
        request = _with_heads(request)
        problems += _broken_rules(request)
    if problems:
        raise ConfigError(problems)
    return request


def _too_large(loaded: Loaded) -> Iterator[Problem]:
    from megactl.config.settings import all_settings
    from megactl.config.shown import Names

    for name, most in _MOST.items():
        value = all_settings()[name].read(loaded.run)
        if value is not None and value > most:
            yield Problem(Names(loaded.run, loaded.origins).show(name), f"is above {most:,}, which no model needs", "check the number")


def _unknown(loaded: Loaded) -> Iterator[Problem]:
    from megactl.config.settings import all_settings

    for name in _NEEDED:
        if loaded.origins[name] == "default":
            yield Problem(all_settings()[name].flag, "is not set, and the model's size depends on it", "give it, or --preset NAME")
    if loaded.run.model.kv_heads is not None and loaded.origins["model.num_heads"] == "default":
        rule = f"is not set, and how wide --kv-heads {loaded.run.model.kv_heads} are depends on it"
        yield Problem(all_settings()["model.num_heads"].flag, rule, "give it, or leave --kv-heads out")
    if loaded.run.model.vocab_size is None:
        preset = f"preset {loaded.run.preset} takes its tokenizer's" if loaded.run.preset else "the embedding's size depends on it"
        yield Problem("--vocab", f"is not set, and {preset}", "give --vocab N, such as 50257 for GPT-2's")


def _with_heads(request: Request) -> Request:
    """Heads with keys of their own change neither parameters nor FLOPs; a number that is not given only has to divide the width."""
    from megactl.config.settings import replace

    hidden, name = request.run.model.hidden_size, "model.num_heads"
    if request.is_set(name) or hidden < 1:
        return request
    # RoPE turns pairs of elements.
    pair = 2 if request.run.model.position_embedding == "rope" and hidden % 2 == 0 else 1
    heads = hidden // _HEAD_WIDTH if hidden % _HEAD_WIDTH == 0 else hidden // pair
    return Request(replace(request.run, {name: heads}), {**request.origins, name: _ASSUMED}, request.named)


def _broken_rules(request: Request) -> list[Problem]:
    from megactl.config.checks import machine_independent
    from megactl.config.pipeline_split import model_chunks
    from megactl.config.settings import replace

    # Where the tokens come from is no question here, and without a model none that its widths divide.
    run = replace(request.run, {"data.data": None, "data.mock_data": True, "data.data_cache": None})
    if not request.named:
        tp, stages = run.parallel.tensor_parallel, run.parallel.pipeline_parallel * model_chunks(run.parallel)
        run = replace(
            run,
            {
                "parallel.pipeline_split": None,
                "model.num_layers": max(1, stages),
                "model.hidden_size": max(1, tp),
                "model.num_heads": max(1, tp),
            },
        )
    return machine_independent(run, request.origins)
