"""Cluster settings: where each comes from, what each must keep, and where each lands in a script."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from megactl.cluster.command import train_words
from megactl.cluster.formats import clock, seconds_of
from megactl.cluster.load import load_cluster
from megactl.cluster.quoting import Safe, quote
from megactl.cluster.settings import Slurm, slurm_settings
from megactl.config.load import load
from megactl.config.settings import all_settings
from megactl.errors import ConfigError

BASE = ("--preset", "gpt-tiny", "--mock-data", "--nodes", "2", "--gpus-per-node", "2")

# flag and value -> the #SBATCH line it makes
DIRECTIVES = [
    ("--job-name", "my-run", "--job-name=my-run"),
    ("--account", "proj1@gpu", "--account=proj1@gpu"),
    ("--partition", "gpu,fast", "--partition=gpu,fast"),
    ("--qos", "high", "--qos=high"),
    ("--reservation", "maint", "--reservation=maint"),
    ("--constraint", "[a100*2&ib]|h100", "--constraint=[a100*2&ib]|h100"),
    ("--gpu-type", "h100", "--gpus-per-node=h100:2"),
    ("--gpu-request", "gres", "--gres=gpu:2"),
    ("--cpus-per-task", "12", "--cpus-per-task=12"),
    ("--cpus-per-gpu", "12", "--cpus-per-task=12"),
    ("--mem", "500G", "--mem=500G"),
    ("--time", "90", "--time=01:30:00"),
    ("--time", "2-12", "--time=2-12:00:00"),
    ("--signal", "R:SIGUSR1@300", "--signal=R:SIGUSR1@300"),
    ("--hint", "nomultithread", "--hint=nomultithread"),
    ("--nodelist", "n[01-04],login", "--nodelist=n[01-04],login"),
    ("--exclude", "n7", "--exclude=n7"),
    ("--array", "1-5%1", "--array=1-5%1"),
    ("--log-dir", "logs/a", "--output=logs/a/%x-%j.out"),
    ("--chdir", "/scratch/me", "--chdir=/scratch/me"),
    ("--sbatch", "switches=1@10", "--switches=1@10"),
    ("--sbatch", "overcommit", "--overcommit"),
]


@pytest.mark.parametrize(("flag", "value", "line"), DIRECTIVES, ids=[f"{row[0]} {row[1]}" for row in DIRECTIVES])
def test_each_directive(rendered, flag, value, line):
    assert f"#SBATCH {line}\n" in rendered(flag, value)


def test_switches(rendered):
    assert "#SBATCH --exclusive\n" in rendered("--exclusive") and "--exclusive" not in rendered()
    assert "--gpus-per-node" not in rendered("--gpu-request", "none")
    text = rendered("--mail-user", "me@example.org", "--mail-type", "END,FAIL")
    assert "#SBATCH --mail-user=me@example.org\n" in text and "#SBATCH --mail-type=END,FAIL\n" in text


def test_every_setting_is_tried_by_a_test_of_this_folder():
    text = "".join(path.read_text() for path in Path(__file__).parent.glob("test_slurm_*.py"))
    assert [item.flag for item in slurm_settings().values() if f'"{item.flag}"' not in text and f'"--no-{item.flag[2:]}"' not in text] == []


def test_directives_stand_before_the_first_command(rendered):
    lines = rendered("--time", "60", "--module", "cuda").splitlines()
    first = next(index for index, line in enumerate(lines) if line and not line.startswith("#"))
    assert not [line for line in lines[first:] if line.startswith("#SBATCH")]


TOML = """preset = "gpt-tiny"
[data]
mock_data = true
[slurm]
account = "from-run"
nodes = 2
gpus_per_node = 2
modules = ["a", "b"]
[slurm.environment]
A = 1
B = "two words"
[slurm.sbatch]
switches = 1
overcommit = true
"""
CLUSTER = '[slurm]\naccount = "from-cluster"\npartition = "from-cluster"\ntime = "10:00"\nenvironment = ["A=0", "C=3"]\n'


def test_layers_from_the_cluster_file_to_the_flags(slurm, tmp_path, monkeypatch):
    (tmp_path / "run.toml").write_text(TOML)
    (tmp_path / "cluster.toml").write_text(CLUSTER)
    monkeypatch.setenv("MEGACTL_SLURM_PARTITION", "from-env")
    words = ("--config", str(tmp_path / "run.toml"), "--cluster", str(tmp_path / "cluster.toml"), "--set", "slurm.qos=from-set")
    code, text, err = slurm("render", *words, "--env", "B=flag")
    assert code == 0, err
    for line in ("--account=from-run", "--partition=from-env", "--qos=from-set", "--time=00:10:00", "--switches=1", "--overcommit"):
        assert f"#SBATCH {line}\n" in text
    exports = [line for line in text.splitlines() if line.startswith("export ")]
    assert exports[:3] == ["export A=1", "export C=3", "export B=flag"]
    assert "module load a b\n" in text


def test_train_takes_the_same_file(tmp_path):
    (tmp_path / "run.toml").write_text(TOML)
    assert load(config=str(tmp_path / "run.toml")).run.preset == "gpt-tiny"


PROBLEMS = [
    (("--account", "<account>"), "--account <account>: <account> is a placeholder"),
    (("--data-cache", "<cache>"), "--data-cache <cache>: is a placeholder"),
    (("--container-image", "<image.sqsh>"), "<image.sqsh> is a placeholder"),
    (("--sbatch", "comment=<x>"), "is a placeholder"),
    (("--account", "a b"), "an #SBATCH line cannot be quoted"),
    (("--account", "a;b"), "an #SBATCH line cannot be quoted"),
    (("--account", "$(id)"), "an #SBATCH line cannot be quoted"),
    (("--account", "-x"), "must not begin with a dash"),
    (("--account", "a\n#SBATCH --uid=0"), "must not contain line breaks"),
    (("--account", "a\u2028b"), "must be one line of printable text, and holds U+2028"),
    (("--env", "A=x\u0085y"), "must be one line of printable text, and holds U+0085"),
    (("--account", "a" * 2000), "must be at most 1000 bytes long"),
    (("--partition", "--wrap"), "must not begin with a dash"),
    (("--mem", "50GB"), "use 50G"),
    (("--time", "1h"), "must be minutes"),
    (("--time", "0"), "must be above zero"),
    (("--time", "2:00"), "before a time limit of 120 s"),
    (("--signal", "B:USR1@60"), "use USR1@60"),
    (("--signal", "KILL@60"), "would end it without a save"),
    (("--signal", "USR1"), "must be NAME@SECONDS"),
    (("--nodelist", "n[1"), "unclosed bracket"),
    (("--exclude", "n 1"), "must be host names"),
    (("--array", "0-9"), "use 0-9%1"),
    (("--array", "0-9%1", "--requeue"), "leave one out"),
    (("--array-limit", "2"), "there is no sweep to limit"),
    (("--mail-type", "SOMETIMES", "--mail-user", "a@b"), "no mail type SOMETIMES"),
    (("--mail-type", "END"), "has no address"),
    (("--mail-user", "a@b"), "Slurm sends nothing without a type"),
    (("--venv", "~/env"), "are not expanded"),
    (("--log-dir", "$SCRATCH/logs"), "are not expanded"),
    (("--command", "'"), "cannot be read as words"),
    (("--module", "cuda; id"), "must be the name of one module"),
    (("--env", "1A=2"), "must be NAME=VALUE"),
    (("--env", "MASTER_PORT=1"), "set by the script"),
    (("--env", "SLURM_JOB_ID=1"), "Slurm's to set"),
    (("--env", "WANDB_API_KEY=1"), "a secret must not be written"),
    (("--container-mount", "/a"), "must be SRC:DST"),
    (("--container-mount", "/a:/b"), "there is no container"),
    (("--container-workdir", "/w"), "there is no container"),
    (("--sbatch", "wrap=id"), "makes a script of its own"),
    (("--sbatch", "nodes=3"), "is a setting of its own; use --nodes"),
    (("--sbatch", "switchs=1"), "did you mean switches?"),
    (("--sbatch", "switches"), "takes a value"),
    (("--sbatch", "overcommit=1"), "takes no value"),
    (("--sbatch", "comment=a b"), "an #SBATCH line cannot be quoted"),
    (("--sbatch", "comment=a", "--sbatch", "comment=b"), "gives comment twice"),
    (("--srun", "kill-on-bad-exit=0"), "a rank that fails must end the others"),
    (("--srun", "mpy=pmix"), "did you mean mpi?"),
    (("--gpus-per-node", "0"), "--ntasks-per-node: is not set"),
    (("--ntasks-per-node", "4"), "a rank has one GPU"),
    (("--cpus-per-task", "0"), "must be at least 1"),
    (("--max-requeues", "-1"), "must be at least 0"),
    (("--device", "cpu"), "asks for GPUs that the run would not use"),
    (("--nproc", "4"), "the job's tasks are the ranks"),
    (("--resume", "never"), "a requeued job goes on from its own checkpoint"),
    (("--tp", "4", "--pp", "4"), "needs 16 ranks, 2 x 2 are asked for; try --tp 4 --pp 1, or --nodes 8"),
    (("--dp", "8"), "needs 8 ranks, 2 x 2 are asked for; use --dp 4, or --nodes 4"),
    (("--tp", "3"), "must divide"),
    (("--layers", "1.5"), "must be a whole number"),
    (("--launcher", "torchrun", "--signal", "TERM@60"), "torchrun ends its ranks on a signal"),
    (("--output", "logs/%j.out"), "use --log-dir"),
    (("--without", "vpp"), "belongs to --experiment"),
    (("--acount", "x"), "did you mean --account?"),
    (("--set", "slurm.acount=x"), "did you mean account?"),
    (("--set", "slurm.switches=1"), 'pass it through: sbatch = ["switches=VALUE"]'),
    (("--cluster", "missing.toml"), "cannot be read"),
    (("--sweep", "lr"), "must be SETTING=VALUE"),
    (("--sweep", "lrr=1,2"), "did you mean"),
    (("--sweep", "lr=1,x"), "must be a number"),
    (("--sweep", "lr=1,1"), "is there twice"),
    (("--sweep", "tp=1,3"), "point tensor-parallel-3: --tp 3"),
    (("--sweep", "lr=1e-4,2e-4", "--interactive"), "an allocation runs one run"),
    (("--sweep-file", "missing.csv"), "cannot be read"),
]


@pytest.mark.parametrize(("words", "message"), PROBLEMS, ids=[repr(" ".join(words))[:60] for words, _ in PROBLEMS])
def test_each_mistake(slurm, words, message):
    code, out, err = slurm("render", *BASE, *words)
    assert code == 2 and message in err and "Traceback" not in err
    # Nothing of a refused value reaches the terminal as a line of its own.
    assert out == "" and "\n#SBATCH" not in err


def test_all_mistakes_at_once(slurm):
    code, _, err = slurm(
        "render", *BASE, "--account", "<a>", "--mem", "x", "--time", "x", "--tp", "16", "--tokenizer", "<t>", "--srun", "x"
    )
    assert code == 2
    for part in ("7 problems", "--account", "--mem", "--time", "--tp 16", "--tokenizer", "--srun"):
        assert part in err


def test_the_cluster_file_of_the_package_lists_what_is_to_be_filled_in(slurm, tmp_path):
    code, text, _ = slurm("render", "--cluster-template")
    assert code == 0
    (tmp_path / "cluster.toml").write_text(text)
    code, _, err = slurm("render", *BASE, "--cluster", str(tmp_path / "cluster.toml"))
    assert code == 2
    for name in ("<account>", "<partition>", "<whole path of the virtual environment>"):
        assert f"{name} is a placeholder" in err
    # What is commented out are settings, too: with the marks taken away the file still holds nothing unknown.
    everything = re.sub(r"(?m)^# (?=\w+ = |\[)", "", text)
    (tmp_path / "everything.toml").write_text(everything)
    assert load_cluster(cluster=str(tmp_path / "everything.toml")).slurm.sbatch == ("switches=1",)


@pytest.mark.parametrize(
    ("text", "seconds", "shown"),
    [
        ("30", 1800, "00:30:00"), ("90:15", 5415, "01:30:15"), ("1:2:3", 3723, "01:02:03"), ("1-0", 86400, "1-00:00:00"),
        ("2-3:4", 183840, "2-03:04:00"), ("0-0:0:9", 9, "00:00:09"), ("UNLIMITED", None, "UNLIMITED"),
    ],
)  # fmt: skip
def test_time_limits(text, seconds, shown):
    assert seconds_of(text) == seconds and clock(seconds) == shown
    assert seconds_of(clock(seconds)) == seconds


def test_the_number_of_nodes_follows_from_the_layout(slurm):
    base = ("--preset", "gpt-tiny", "--mock-data", "--gpus-per-node", "4")
    code, text, _ = slurm("render", *base, "--tp", "2", "--pp", "2", "--dp", "4")
    assert code == 0 and "#SBATCH --nodes=4\n" in text
    assert "--nodes: is not set, and --dp is not either" in slurm("render", *base)[2]
    assert "do not fill nodes of 4" in slurm("render", *base, "--dp", "6")[2]
    assert "use --gpus-per-node 2" in slurm("render", *base, "--dp", "2")[2]


def test_the_options_of_train_read_back_to_the_same_run(slurm):
    """Every setting with a value that is not its default, through the script's words."""
    values = {}
    for item in all_settings().values():
        if item.choices:
            value = next(choice for choice in item.choices if choice != item.default)
        else:
            value = {bool: not item.default, int: 7, float: 0.37, str: "-odd 'te\"xt'"}[item.type]
        values[item.name] = value
    values |= {"optimizer.warmup": "3", "training.rampup_batch_size": "1 1 10"}
    assignments = [f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in values.items()]
    loaded = load(preset="gpt-345m", assignments=[*assignments, "model.vocab_size=none"])
    words = shlex.split(" ".join(shlex.join(option) for option in train_words(loaded)))
    assert read_back(words) == loaded.run


def read_back(words):
    """The run that `megactl train WORDS` would load."""
    import typer

    from megactl.cli import build_app
    from megactl.config.flags import given

    command = typer.main.get_command(build_app(["train"])).commands["train"]
    context = command.make_context("train", list(words), resilient_parsing=True)
    assert not context.args
    options = context.params
    return load(preset=options["preset"], config=options["config"], assignments=options["assignments"] or (), flags=given(options)).run


def test_a_template_cannot_print_what_has_not_been_quoted():
    from megactl.cluster.render import environment

    template = environment().from_string("{{ value }}")
    assert template.render(value=Safe("x")) == "x" and template.render(value=3) == "3"
    for value in ("x", None, True, 1.5):
        with pytest.raises(AssertionError):
            template.render(value=value)


def test_quote_is_the_gate():
    assert quote("a b", "shell", name="x") == "'a b'"
    with pytest.raises(ConfigError, match=r"x .a.*nb"):
        quote("a\nb", "shell", name="x")


def test_json_says_what_is_asked_for(slurm):
    import json

    code, out, _ = slurm("render", *BASE, "--json", "--tp", "2")
    document = json.loads(out)
    assert code == 0 and document["world_size"] == 4 and document["layout"] == {"tp": 2, "cp": 1, "dp": 2, "pp": 1}
    assert document["text"].startswith("#!/bin/bash\n") and "--nodes=2" in document["sbatch"] and document["memory_bytes"] > 0


def test_files_are_not_replaced_without_being_asked(slurm, tmp_path):
    path = tmp_path / "sub" / "train.sh"
    assert slurm("render", *BASE, "--output", str(path))[0] == 0
    assert path.stat().st_mode & 0o111
    assert "exists; choose another name, or add --overwrite" in slurm("render", *BASE, "--output", str(path))[2]
    assert slurm("render", *BASE, "--output", str(path), "--overwrite", "--tp", "2")[0] == 0
    assert "--tp 2" in path.read_text()


def test_data_that_is_not_on_this_machine_is_a_note(slurm):
    words = ("--preset", "gpt-345m", "--nodes", "1", "--gpus-per-node", "8", "--data", "/nowhere/corpus")
    code, out, err = slurm("render", *words)
    assert code == 0 and "note: --data /nowhere/corpus" in err and "--data /nowhere/corpus" in out
    assert "was not looked at" in err


def test_a_sweep_file(slurm, tmp_path):
    (tmp_path / "points.csv").write_text("optimizer.lr,seed\n1e-4,1\n\n3e-4,\n")
    code, out, err = slurm("render", *BASE, "--sweep-file", str(tmp_path / "points.csv"))
    assert code == 0, err
    assert "0) label=lr-1e-4_seed-1 point=(--lr 1e-4 --seed 1) ;;" in out and "1) label=lr-3e-4 point=(--lr 3e-4) ;;" in out
    (tmp_path / "points.csv").write_text("optimizer.lr,sed\n1e-4\n3e-4,1\n")
    err = slurm("render", *BASE, "--sweep-file", str(tmp_path / "points.csv"))[2]
    assert "points.csv:2: has 1 cells, the header has 2" in err and "did you mean training.seed?" in err


def test_defaults_ask_for_nothing_of_one_site():
    slurm = Slurm()
    assert (slurm.account, slurm.partition, slurm.gpus_per_node, slurm.memory, slurm.modules) == (None, None, None, None, ())


PAGE = (Path(__file__).resolve().parents[2] / "docs" / "slurm.md").read_text(encoding="utf-8")


def test_the_page_lists_every_setting():
    from megactl.config.flags import reference_table

    table = "\n".join(reference_table(slurm_settings().values()))
    assert table in PAGE, "docs/slurm.md, All cluster settings: print reference_table(slurm_settings().values()) of megactl.config.flags"


def test_the_page_shows_what_the_commands_print(slurm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.toml").write_text('[slurm]\naccount = "<account>"\npartition = "<partition>"\ngpus_per_node = 8\n')
    blocks = re.findall(r"```\n(\$ megactl slurm .*?)```", PAGE, flags=re.S)
    shown = [item for block in blocks for item in re.findall(r"\$ megactl slurm ([^\n]+)\n((?:(?!\$ ).*\n)*)", block)]
    assert len(shown) == 4
    for command, output in shown:
        _, out, err = slurm(*shlex.split(command))
        printed = "".join(f"{line.rstrip()}\n" for line in (out + err).splitlines() if line.strip())
        assert printed == "".join(f"{line}\n" for line in output.splitlines() if line.strip()), command
