"""The picture of a timeline: every computation is a box, in colours that differ in print, with numbers where they can be read."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megactl.report.timeline_plot import COLOURS, Box, shade, write_timeline

pytest.importorskip("matplotlib", reason="pictures need matplotlib")


def texts(path: Path) -> list[str]:
    """Words of an SVG, which matplotlib writes into a comment in front of the outlines of their letters."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    tree = ElementTree.parse(path, parser)
    return [node.text.strip() for node in tree.iter() if callable(node.tag)]


def rows(count: int, length: float = 1.0) -> list[list[Box]]:
    return [[Box("FBIW"[i % 4], i % 2, str(i), i * length, (i + 1) * length) for i in range(count)] for _ in range(2)]


def test_boxes_have_numbers_and_the_legend_names_the_kinds(tmp_path: Path):
    write_timeline(rows(8), tmp_path / "a.svg", title="a title")
    found = texts(tmp_path / "a.svg")
    assert all(found.count(str(number)) >= 2 for number in range(8))
    assert {"a title", "F forward", "B backward", "I input gradient", "W weight gradient", "darker: chunk 1"} <= set(found)


def test_numbers_too_small_to_read_are_left_out(tmp_path: Path):
    write_timeline(rows(2000), tmp_path / "a.svg", title="many")
    assert "1999" not in texts(tmp_path / "a.svg")


def test_very_many_boxes_are_a_picture_within_the_vector_file(tmp_path: Path):
    write_timeline(rows(12_000), tmp_path / "a.svg", title="very many")
    assert (tmp_path / "a.svg").stat().st_size < 1_000_000


def test_an_empty_timeline_is_an_empty_picture(tmp_path: Path):
    write_timeline([[], []], tmp_path / "a.png", title="nothing")
    assert (tmp_path / "a.png").stat().st_size > 0


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_colours_differ_and_chunks_get_darker(chunks: int):
    def light(kind: str, chunk: int) -> float:
        red, green, blue = shade(kind, chunk, chunks)
        return 0.299 * red + 0.587 * green + 0.114 * blue

    for kind in COLOURS:
        found = [light(kind, chunk) for chunk in range(chunks)]
        assert found == sorted(found, reverse=True) and len(set(found)) == chunks
    # On one chunk any two kinds differ by more than an eye could mistake.
    for one, other in combinations(COLOURS, 2):
        assert max(abs(a - b) for a, b in zip(shade(one, 0, chunks), shade(other, 0, chunks), strict=True)) > 0.1
