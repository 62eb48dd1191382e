"""How `megactl checkpoint inspect` shows an inventory: tables for people, a document for programs, the comparison with the formulas."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megactl.commands.common import count, decimal_size, printable, size
from megactl.commands.tables import show_table
from megactl.errors import ConfigError
from megactl.storage.layouts import FileRow, Inventory, Verification

if TYPE_CHECKING:
    from megactl.commands.architecture_options import Request
    from megactl.config.schema import Model
    from megactl.costmodel.checkpoint import CheckpointEstimate, Elements

_FIRST = ("weights", "master", "exp_avg", "exp_avg_sq")
_LAST = ("rng", "other", "overhead", "unused", "unread")
_TOLERANCE = 0.03


@dataclass(frozen=True)
class Comparison:
    """Elements by part as the formulas have them and as found. `source`: "its own settings" or "--predict"; `reason`: why there is none."""

    source: str
    rows: tuple[tuple[str, int, int], ...] = ()
    reason: str | None = None

    @property
    def differs(self) -> bool:
        """Whether any part is further off than padding and replicated parameters explain."""
        return any(abs(found - expected) > _TOLERANCE * expected for _, expected, found in self.rows)


def compare(inventory: Inventory, request: Request | None) -> Comparison | None:
    """The inventory against the architecture asked for, or else against the one recorded in the checkpoint; None where there is neither."""
    if request is not None:
        return _compared(inventory, request.model, request.seq_length, "--predict")
    settings = inventory.architecture
    if not settings:
        return Comparison("its own settings", reason=f"it has {inventory.unpredictable}") if inventory.unpredictable else None
    if inventory.unpredictable:
        return Comparison("its own settings", reason=f"it has {inventory.unpredictable}")
    from megactl.config.schema import Model

    names = set(Model.__dataclass_fields__)
    values = {key.removeprefix("model."): value for key, value in settings.items() if key.startswith("model.")}
    try:
        model = Model(**{name: value for name, value in values.items() if name in names})
        return _compared(inventory, model, settings.get("training.seq_length"), "its own settings")
    except (TypeError, ValueError, AttributeError):
        return Comparison("its own settings", reason="they cannot be understood")


def _compared(inventory: Inventory, model: Model, seq_length: int | None, source: str) -> Comparison | None:
    # Imported here: files without an architecture are shown without the cost model.
    from megactl.costmodel.checkpoint import stored_elements

    tp, pp = inventory.layout.get("tp", 1), inventory.layout.get("pp", 1)
    system = "other" if inventory.layout.get("universal") or inventory.layout.get("zero") == 3 else inventory.system
    try:
        expected = stored_elements(model, system, tp=tp, pp=pp, seq_length=seq_length)
    except ConfigError as error:
        return Comparison(source, reason=error.message)
    elements = inventory.elements
    rows = [(part, _of(expected, part), elements[part]) for part in order(elements) if elements[part] and part not in _LAST]
    return Comparison(source, tuple(rows)) if rows else None


def _of(expected: Elements, part: str) -> int:
    return expected.weights if part == "weights" else expected.state


def order(parts: Counter[str] | dict[str, int]) -> list[str]:
    """Parts that are there: weights, master copy, moments, then the rest."""
    moments = sorted(part for part in parts if part not in _FIRST and part not in _LAST)
    return [part for part in (*_FIRST, *moments, *_LAST) if parts.get(part)]


def document(inventory: Inventory, comparison: Comparison | None, *, per_parameter: bool) -> dict[str, Any]:
    """The inventory as JSON. Sizes are bytes."""
    elements, dtypes = inventory.elements, inventory.dtypes
    found = {
        "path": str(inventory.path),
        "system": inventory.system,
        "title": inventory.title,
        "layout": inventory.layout,
        "iteration": inventory.iteration,
        "ok": inventory.good,
        "bytes": inventory.size,
        "parts": {
            part: {"bytes": inventory.parts[part], "elements": elements[part] or None, "dtypes": dict(dtypes.get(part, {}))}
            for part in order(inventory.parts)
        },
        "files": [_file_document(row) for row in inventory.files],
        "missing": inventory.missing,
        "findings": [vars(finding) for finding in inventory.findings],
        "architecture": inventory.architecture,
        "comparison": _comparison_document(comparison),
    }
    if per_parameter:
        found["parameters"] = [vars(row) for row in inventory.rows.values()]
    return found


def _file_document(row: FileRow) -> dict[str, Any]:
    return {"file": row.name, "role": row.role, "rank": row.rank, "bytes": row.size, "parts": dict(row.parts), "read": row.read}


def _comparison_document(comparison: Comparison | None) -> dict[str, Any] | None:
    if comparison is None:
        return None
    rows = {part: {"expected_elements": expected, "found_elements": found} for part, expected, found in comparison.rows}
    return {"source": comparison.source, "parts": rows, "reason": comparison.reason, "differs": comparison.differs}


def estimate_document(estimate: CheckpointEstimate) -> dict[str, Any]:
    """The prediction as JSON. Sizes are bytes."""
    return {
        "parameters": estimate.parameters,
        "bytes": estimate.total,
        "parts": estimate.parts,
        "optimizer": estimate.optimizer,
        "files": [vars(group) for group in estimate.files],
    }


def show(inventory: Inventory, comparison: Comparison | None, *, per_file: bool, per_parameter: bool) -> None:
    """Print an inventory: what it is, its parts, its files, its parameters if asked for, and what was found."""
    print(printable(str(inventory.path)))
    print(f"  {inventory.title}{_facts(inventory)}")
    print(f"  {both(inventory.size)} in {len(inventory.files)} file{'s' if len(inventory.files) != 1 else ''}{_each(inventory)}")
    _show_parts(inventory)
    (_show_files if per_file else _show_roles)(inventory)
    if per_parameter:
        _show_parameters(inventory)
    _show_comparison(comparison)
    _show_findings(inventory)
    print()


def _show_findings(inventory: Inventory) -> None:
    for finding in sorted(inventory.findings, key=lambda finding: ("problem", "warning", "note").index(finding.severity)):
        print(printable(f"{finding.severity}: {f'{finding.where}: ' if finding.where else ''}{finding.message}"))


def both(number: int) -> str:
    """A size in powers of 1000 and, in brackets, of 1024."""
    return f"{decimal_size(number)} ({size(number)})" if number >= 1000 else decimal_size(number)


def _facts(inventory: Inventory) -> str:
    layout = ", ".join(f"{name} {value}" for name, value in inventory.layout.items())
    iteration = "" if inventory.iteration is None else f", iteration {inventory.iteration}"
    return iteration + (f": {layout}" if layout else "")


def _each(inventory: Inventory) -> str:
    elements, parts = inventory.elements, inventory.parts
    base = next((part for part in ("weights", "master") if elements[part]), None)
    if base is None:
        return ""
    state = sum(parts[part] for part in order(parts) if part not in _LAST)
    return f"; {count(elements[base])} elements of {base}, {state / elements[base]:.4g} bytes each with all their state"


def _show_parts(inventory: Inventory) -> None:
    elements, dtypes, total = inventory.elements, inventory.dtypes, max(1, inventory.size)
    rows = []
    for part in order(inventory.parts):
        nbytes = inventory.parts[part]
        types = ", ".join(name for name, amount in dtypes.get(part, Counter()).most_common() if amount) or None
        many = f"{elements[part]:,}" if elements[part] else None
        each = f"{nbytes / elements[part]:.4g}" if elements[part] and part not in _LAST else None
        rows.append([part, decimal_size(nbytes), size(nbytes), f"{100 * nbytes / total:.1f} %", many, each, types])
    rows.append(["total", decimal_size(inventory.size), size(inventory.size), "", None, None, None])
    show_table(["part", "size", "binary", "share", "elements", "bytes each", "type"], rows, right=(1, 2, 3, 4, 5))


def _show_roles(inventory: Inventory) -> None:
    groups: dict[str, list[FileRow]] = {}
    for row in inventory.files:
        groups.setdefault(row.role, []).append(row)
    rows = []
    for role, members in groups.items():
        sizes = [row.size for row in members]
        rows.append([role, str(len(members)), both(min(sizes)), both(max(sizes)), both(sum(sizes)), members[0].name])
    show_table(["files", "count", "smallest", "largest", "together", "such as"], rows, right=(1, 2, 3, 4))


def _show_files(inventory: Inventory) -> None:
    parts = order(inventory.parts)
    rows = [
        [row.name, row.role, " ".join(f"{axis}{rank}" for axis, rank in row.rank.items()) or None, both(row.size)]
        + [decimal_size(row.parts[part]) if row.parts[part] else None for part in parts]
        for row in inventory.files
    ]
    show_table(["file", "for", "rank", "size", *parts], rows, right=tuple(range(3, 4 + len(parts))))


def _show_parameters(inventory: Inventory) -> None:
    rows = [
        [
            row.name or None,
            row.part,
            row.dtype,
            "x".join(map(str, row.shape)) or "scalar",
            str(row.pieces),
            f"{row.elements:,}",
            both(row.nbytes),
        ]
        for row in inventory.rows.values()
    ]
    show_table(["parameter", "part", "type", "a piece", "pieces", "elements", "size"], rows, right=(4, 5, 6))


def _show_comparison(comparison: Comparison | None) -> None:
    if comparison is None:
        return
    if comparison.reason is not None:
        print(printable(f"expected size, from {comparison.source}: not computed, {comparison.reason}"))
        return
    if all(expected == found for _, expected, found in comparison.rows):
        names = ", ".join(part for part, *_ in comparison.rows)
        print(f"{names}: as many elements as expected, {comparison.rows[0][1]:,}, from {comparison.source}")
        return
    groups: dict[tuple[int, int], list[str]] = {}
    for part, expected, found in comparison.rows:
        groups.setdefault((expected, found), []).append(part)
    for (expected, found), parts in groups.items():
        share = f"{100 * (found - expected) / expected:+.2f} %" if expected else "-"
        print(f"expected of {', '.join(parts)}, from {comparison.source}: {expected:,} elements; found {found:,} ({share})")
    if comparison.differs:
        print("warning: the checkpoint is not of the expected size")


def verification_document(verification: Verification) -> dict[str, Any]:
    """A verification as JSON."""
    inventory = verification.inventory
    return {
        "path": str(inventory.path),
        "system": inventory.system,
        "iteration": inventory.iteration,
        "ok": verification.good,
        "bytes": inventory.size,
        "bytes_checked": sum(check.nbytes for check in verification.files),
        "files": [vars(check) for check in verification.files],
        "missing": inventory.missing,
        "findings": [vars(finding) for finding in inventory.findings],
    }


def show_verification(verification: Verification) -> None:
    """Print a verification: how much was checked in which way, and what is wrong."""
    inventory = verification.inventory
    print(printable(f"{inventory.path}: {'good' if verification.good else 'DAMAGED'}"))
    print(f"  {inventory.title}{_facts(inventory)}, {both(inventory.size)}")
    for method, words in (("sha256", "SHA-256"), ("crc32", "CRC-32"), ("structure", "structure only: no checksum in these files")):
        checks = [check for check in verification.files if check.method == method]
        if checks:
            amount = f", {both(sum(check.nbytes for check in checks))} read back" if method != "structure" else ""
            print(f"  {len(checks)} file{'s' if len(checks) != 1 else ''} by {words}{amount}")
    said = {(finding.where, finding.message) for finding in inventory.findings}
    for check in verification.files:
        if check.problem is not None and (check.name, check.problem) not in said:
            print(printable(f"problem: {check.name}: {check.problem}"))
    _show_findings(inventory)
    print()


def show_estimate(estimate: CheckpointEstimate, request: Request) -> None:
    """Print a prediction: parts where each parameter is stored once, and the files that each system would write."""
    from megactl.costmodel.checkpoint import listed_size

    run = request.run
    layout = f"tp {run.parallel.tensor_parallel}, pp {run.parallel.pipeline_parallel}, dp {run.parallel.data_parallel or 1}"
    print(f"predicted: {count(estimate.parameters)} parameters ({estimate.parameters:,}), {run.training.precision}, {layout}")
    rows = [[part, f"{nbytes // estimate.parameters}", decimal_size(nbytes), size(nbytes)] for part, nbytes in estimate.parts.items()]
    rows.append(["optimizer", f"{estimate.optimizer // estimate.parameters}", decimal_size(estimate.optimizer), size(estimate.optimizer)])
    rows.append(["total", f"{estimate.total // estimate.parameters}", decimal_size(estimate.total), size(estimate.total)])
    show_table(["part", "bytes each", "size", "binary"], rows, right=(1, 2, 3))
    files = [
        [group.name, group.system, str(group.count), both(group.each), listed_size(group.each), both(group.largest), both(group.total)]
        for group in estimate.files
    ]
    show_table(["files", "system", "count", "each", "ls -h", "largest", "together"], files, right=(2, 3, 4, 5, 6))
