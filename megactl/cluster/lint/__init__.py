"""`megactl slurm lint`: the known traps of batch scripts, found by reading them. Nothing is executed, and no Slurm is needed."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from megactl.cluster.lint import rules_commands, rules_directives, rules_ranks, rules_resources, rules_text
from megactl.cluster.lint.batch import Batch, walk
from megactl.cluster.lint.findings import Finding, Rule, Severity

__all__ = ["LARGEST", "RULES", "Finding", "Rule", "Severity", "lint_text"]

# Slurm's own limit (max_script_size of slurm.conf, 4 MiB): sbatch would refuse a longer script.
LARGEST = 4 * 1024 * 1024

RULES: tuple[Rule, ...] = (
    *rules_text.RULES,
    *rules_directives.RULES,
    *rules_resources.RULES,
    *rules_ranks.RULES,
    *rules_commands.RULES,
)


def lint_text(text: str, *, folder: Path | None = None, ignore: Collection[str] = ()) -> list[Finding]:
    """The findings of all rules but those of `ignore`, by line; scripts inside here-documents are read too.

    `folder` is where the job would be submitted: relative paths of directives begin there (None: they are not looked at).
    """
    found: dict[tuple[int, str, str], Finding] = {}
    for batch in walk(Batch(text, folder)):
        for rule in RULES:
            for hit in rule.check(batch) if rule.id not in ignore else ():
                line = hit.line + batch.first_line - 1
                finding = Finding(line, rule.id, rule.severity, hit.value, hit.message, hit.cure)
                found.setdefault((line, rule.id, hit.value), finding)
    return sorted(found.values(), key=lambda finding: (finding.line, finding.severity != "error", finding.rule))
