"""What a set of cluster settings must keep before anything is rendered. Each function yields problems; none raises."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megactl.cluster.formats import DIRECTIVES, FORMATS, PLACEHOLDER, seconds_of, signal_seconds
from megactl.cluster.load import LoadedCluster
from megactl.cluster.pass_through import pass_through_problem
from megactl.cluster.quoting import Place, broken_rule, shown
from megactl.cluster.settings import slurm_settings
from megactl.config.load import Loaded
from megactl.config.settings import all_settings
from megactl.errors import Problem

_AT_LEAST = {"nodes": 1, "gpus_per_node": 0, "ntasks_per_node": 1, "cpus_per_task": 1, "max_requeues": 0, "array_limit": 1}


def cluster_problems(cluster: LoadedCluster) -> list[Problem]:
    """Every mistake in the cluster settings that shows without the run."""
    found = [problem for key, text in _texts(cluster) if (problem := _text_problem(cluster, key, text)) is not None]
    broken = bool(found)
    for key, least in _AT_LEAST.items():
        value = getattr(cluster.slurm, key)
        if value is not None and value < least:
            found.append(Problem(cluster.show(key), f"must be at least {least}"))
    for entry in cluster.slurm.sbatch:
        problem = _placeholder("--sbatch", entry) or pass_through_problem("sbatch", entry)
        found += [problem] if problem else []
    for entry in cluster.slurm.srun:
        problem = _placeholder("--srun", entry) or pass_through_problem("srun", entry)
        found += [problem] if problem else []
    return found if broken else [*found, *_relations(cluster)]


def _texts(cluster: LoadedCluster) -> Iterator[tuple[str, str]]:
    """(key, text) of every text that is set; the pass-through lists are checked on their own."""
    for item in slurm_settings().values():
        value = getattr(cluster.slurm, item.key)
        if isinstance(value, str):
            yield item.key, value
        elif isinstance(value, tuple) and item.key not in ("sbatch", "srun"):
            yield from ((item.key, entry) for entry in value)


def _text_problem(cluster: LoadedCluster, key: str, text: str) -> Problem | None:
    where = cluster.show(key, shown(text))
    placeholder = _placeholder(where, text)
    if placeholder is not None:
        return placeholder
    place: Place = "directive" if key in DIRECTIVES else "shell"
    # The format's own message says more than the characters' does, but it may only look at one line of printable text.
    rule = broken_rule(text, "shell")
    if rule is None and key in FORMATS:
        broken = FORMATS[key](text)
        if broken is not None:
            return Problem(where, *broken)
    rule = rule or broken_rule(text, place)
    return Problem(where, rule, "use another value") if rule else None


def _placeholder(where: str, text: str) -> Problem | None:
    match = PLACEHOLDER.search(text)
    if match is None:
        return None
    named = where if text in where else f"{where} {shown(text)}"
    return Problem(named, f"{shown(match[0])} is a placeholder", "put the value of your cluster there, or leave the setting out")


def run_text_problems(loaded: Loaded) -> list[Problem]:
    """Texts of the run that were left as <...>, and those that cannot stand in a script."""
    found = []
    for item in all_settings().values():
        text = item.read(loaded.run)
        if not isinstance(text, str):
            continue
        rule = broken_rule(text, "shell")
        if re.fullmatch(r"<[^<>]*>", text.strip()):
            found.append(Problem(f"{item.flag} {shown(text)}", "is a placeholder", "put the real value there"))
        elif rule is not None:
            found.append(Problem(f"{item.flag} {shown(text)}", rule, "use another value"))
    return found


def _relations(cluster: LoadedCluster) -> Iterator[Problem]:
    slurm = cluster.slurm
    limit = seconds_of(slurm.time) if slurm.time else None
    if limit is not None and slurm.signal != "none" and signal_seconds(slurm.signal) >= limit:
        rule = f"is sent {signal_seconds(slurm.signal)} s before a time limit of {limit} s, so before the run begins"
        yield Problem(f"{cluster.show('signal')} with {cluster.show('time')}", rule, "use a longer --time, or a smaller number of seconds")
    if slurm.launcher == "torchrun" and cluster.origins["signal"] != "default" and slurm.signal != "none":
        rule = "torchrun ends its ranks on a signal, without a save"
        where = f"{cluster.show('signal')} with {cluster.show('launcher')}"
        yield Problem(where, rule, "leave --signal out: with --time, or --exit-duration, the ranks watch the time themselves")
    if slurm.gpus_per_node and slurm.ntasks_per_node is not None and slurm.ntasks_per_node != slurm.gpus_per_node:
        rule = "a rank has one GPU, and each GPU one rank"
        where = f"{cluster.show('ntasks_per_node')} with {cluster.show('gpus_per_node')}"
        yield Problem(where, rule, "leave --ntasks-per-node out, or set --gpus-per-node to the GPUs to use")
    if slurm.gpu_type is not None and not slurm.gpus_per_node:
        yield Problem(cluster.show("gpu_type"), "no GPUs are asked for", "give --gpus-per-node, or leave it out")
    if slurm.array is not None and cluster.origins["requeue"] != "default" and slurm.requeue:
        rule = "the next job of the chain goes on where one stopped, and a requeued one would do so as well"
        yield Problem(f"{cluster.show('array')} with {cluster.show('requeue')}", rule, "leave one out")
    for key in ("container_mounts", "container_workdir"):
        if getattr(slurm, key) and slurm.container_image is None:
            yield Problem(cluster.show(key), "there is no container", "give --container-image, or leave it out")
    if slurm.mail_type is not None and slurm.mail_type.upper() != "NONE" and slurm.mail_user is None:
        yield Problem(cluster.show("mail_type"), "has no address", "give --mail-user")
    if slurm.mail_user is not None and slurm.mail_type is None:
        yield Problem(cluster.show("mail_user"), "Slurm sends nothing without a type", "give --mail-type END,FAIL")
