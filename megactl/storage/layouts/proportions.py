"""What is out of proportion in a checkpoint that is complete by its names."""

from __future__ import annotations

from statistics import median

from megactl.storage.layouts.inventory import MASTER, NOTE, OTHER, OVERHEAD, RNG, UNREAD, UNUSED, WARNING, WEIGHTS, FileRow, Inventory

_NOT_STATE = {WEIGHTS, OTHER, RNG, OVERHEAD, UNUSED, UNREAD}
_HALF = {"float16", "bfloat16"}
_TOLERANCE = 0.03
# Below this, padding and headers explain differences.
_SMALL = 65536
_SMALL_ELEMENTS = 4096
_TINY_SHARE = 0.1


def judge(inventory: Inventory) -> Inventory:
    """Add what looks odd, and return the inventory."""
    _uneven_files(inventory)
    _unused(inventory)
    if all(finding.severity != "problem" for finding in inventory.findings):
        # Missing files explain every difference between the parts.
        _uneven_parts(inventory)
    _no_master(inventory)
    unread = [row.name for row in inventory.files if row.parts[UNREAD] and not row.read and not _named(inventory, row)]
    if unread:
        inventory.say(NOTE, "", f"{len(unread)} files of no known kind were not opened, the first is {unread[0]}")
    return inventory


def _named(inventory: Inventory, row: FileRow) -> bool:
    return any(finding.where == row.name for finding in inventory.findings)


def _uneven_files(inventory: Inventory) -> None:
    """A rank's file much smaller than those of the ranks that hold the same stage or layer."""
    groups: dict[tuple[str, int | None], list[FileRow]] = {}
    for row in inventory.files:
        if row.rank and row.read:
            groups.setdefault((row.role, row.rank.get("pp", row.rank.get("layer"))), []).append(row)
    for (role, _), rows in groups.items():
        # Writers of a distributed checkpoint, and ranks of ours, share the work as it falls.
        usual = median(row.size for row in rows)
        if len(rows) < 2 or usual < _SMALL or role in ("shard", "tensors"):
            continue
        for row in rows:
            if row.size < _TINY_SHARE * usual:
                inventory.say(WARNING, row.name, f"{row.size} bytes, the others of its kind have about {usual:.0f}")


def _unused(inventory: Inventory) -> None:
    """Views saved with the whole of a large buffer: torch.save writes storages, not views."""
    rows = [row for row in inventory.files if row.parts[UNUSED] > max(_SMALL, _TOLERANCE * row.size)]
    for row in rows[:5]:
        rule = "tensors were saved as views of larger buffers; .clone() them before torch.save"
        inventory.say(WARNING, row.name, f"{row.parts[UNUSED]} of its {row.size} bytes belong to no tensor: {rule}")
    if len(rows) > 5:
        inventory.say(WARNING, "", f"{len(rows) - 5} more files hold bytes that belong to no tensor")


def _uneven_parts(inventory: Inventory) -> None:
    """Master copy and moments have as many elements as the weights they belong to."""
    elements = inventory.elements
    base = WEIGHTS if elements[WEIGHTS] else MASTER
    count = elements[base]
    for part in sorted(elements):
        difference = abs(elements[part] - count)
        if part in _NOT_STATE or part == base or not count or difference <= max(_TOLERANCE * count, _SMALL_ELEMENTS):
            continue
        share = 100 * elements[part] / count
        inventory.say(WARNING, "", f"{part} has {elements[part]:,} elements, {share:.3g} % of the {count:,} of {base}")


def _no_master(inventory: Inventory) -> None:
    """16-bit weights and moments, and nothing in full precision to resume from."""
    moments = [part for part, count in inventory.elements.items() if part not in _NOT_STATE and part != MASTER and count > _SMALL_ELEMENTS]
    types = inventory.dtypes.get(WEIGHTS)
    half = types is not None and sum(types[name] for name in _HALF) > 0.5 * types.total()
    if moments and half and not inventory.elements[MASTER]:
        rule = "the optimizer's state has no copy of the weights in full precision, so a resumed run starts from rounded ones"
        inventory.say(WARNING, "", rule)
