"""Tables found in any text, cells replaced, and everything else left alone."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megactl.report.markdown import find_tables, prose, replace_cells, split_lines
from megactl.report.quantity import BILLIONS, COUNT, SECONDS, number_span, read_quantity

PAGE = """# Title

| GPUs | Size |
| ---: | :--- |
|   16 | 7.5B |
|      |
| 1    | a \\| b | more |

a | b
- | -
1 | 2

```
| x | y |
| - | - |
| 1 | 2 |
```
"""


def cells(row) -> list[str]:
    return [cell.text for cell in row.cells]


def test_tables_with_and_without_outer_pipes_and_none_in_code() -> None:
    first, second = find_tables(split_lines(PAGE))
    assert first.header == ("GPUs", "Size") and first.line == 2
    assert [cells(row) for row in first.rows] == [["16", "7.5B"], [""], ["1", "a \\| b", "more"]]
    assert first.rows[1].cell(1) is None and first.rows[0].cell(None) is None
    assert second.header == ("a", "b") and [cells(row) for row in second.rows] == [["1", "2"]]


def test_two_header_lines_are_one_header() -> None:
    text = "| TFlops | TFlops |\n| /GPU   |      % |\n| ---: | ---: |\n| 137 | 44% |\n"
    (table,) = find_tables(split_lines(text))
    assert table.header == ("TFlops /GPU", "TFlops %") and len(table.rows) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "| a |\n",
        "| - |\n| 1 |\n",
        "a\n---\nb | c\n",
        "| a | b |\n| - |\n",
        "\n\n| - | - |\n",
        "~~~\n| a |\n| - |\n| 1 |\n",
        "> ```\n> | a |\n| - |\n",
    ],
)
def test_what_is_no_table(text: str) -> None:
    assert find_tables(split_lines(text)) == []


def test_a_fence_ends_only_at_its_like() -> None:
    text = "````\n```\n| a |\n| - |\n````\n| a |\n| - |\n| 1 |\n"
    (table,) = find_tables(split_lines(text))
    assert table.line == 5


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("|   46.7 | x |", "49.7", "|   49.7 | x |"),
        ("|   6.7 | x |", "49.7", "|  49.7 | x |"),
        ("| 46.7   | x |", "9.7", "| 9.7    | x |"),
        ("|        | x |", "49.7", "|   49.7 | x |"),
        ("|6.7| x |", "49.7", "|49.7| x |"),
        ("| 6.7 | x |", "1149.7", "| 1149.7 | x |"),
        ("|  | x |", "49.7", "| 49.7 | x |"),
        ("|| x |", "49.7", "|49.7| x |"),
    ],
)
def test_a_cell_keeps_its_width_and_alignment(old: str, new: str, line: str) -> None:
    lines = ["| a | b |\r\n", "| - | - |\r\n", f"{old}\r\n"]
    assert replace_cells(lines, {(2, 0): new}, find_tables(lines))[2] == f"{line}\r\n"


def test_lines_end_where_newline_is() -> None:
    assert split_lines("a\r\nb\x0cc\u2028d\n\ne") == ["a\r\n", "b\x0cc\u2028d\n", "\n", "e"]
    assert "".join(split_lines(PAGE)) == PAGE


def test_a_long_line_of_blanks_takes_no_time() -> None:
    lines = ["| a |\n", " " * 200_000 + "| -\n", "|" * 100_000 + "\n", "| -" * 50_000 + "\n"]
    find_tables(lines)


words = st.sampled_from(["|", "-", ":", "---", "\n", "\r\n", " ", "a", "12", "```", "~~~", "\\", "TFlops", "\ufeff", "\udc80", "\t", ">"])
texts = st.one_of(st.text(), st.lists(words).map("".join))


@given(texts, st.text(alphabet="0123456789.", min_size=1, max_size=6), st.randoms(use_true_random=False))
@example("| a |\n| - |\n||\n", "1", None)
def test_only_the_cells_named_change(text: str, new: str, random) -> None:
    lines = split_lines(text)
    assert "".join(lines) == text
    tables = find_tables(lines)
    every = [(row.line, column) for table in tables for row in table.rows for column in range(len(row.cells))]
    chosen = [place for place in every if random is None or random.random() < 0.5]
    changed = replace_cells(lines, dict.fromkeys(chosen, new), tables)
    again = find_tables(changed)
    assert [table.header for table in again] == [table.header for table in tables]
    for before, after in zip(tables, again, strict=True):
        for old, row in zip(before.rows, after.rows, strict=True):
            assert [new if (old.line, column) in chosen else cell.text for column, cell in enumerate(old.cells)] == cells(row)
    untouched = {number for number, _ in chosen}
    assert [line for number, line in enumerate(changed) if number not in untouched] == [
        line for number, line in enumerate(lines) if number not in untouched
    ]
    assert len(list(prose(lines, tables))) <= len(lines)


@pytest.mark.parametrize(
    ("text", "units", "value", "half"),
    [
        ("137s", SECONDS, 137, 0.5), ("0.661 s", SECONDS, 0.661, 0.0005), ("2.5 min", SECONDS, 150, 3),
        ("6875.05ms", SECONDS, 6.87505, 5e-6),
        ("52B", BILLIONS, 52, 0.5), ("345M", BILLIONS, 0.345, 0.0005), ("1T", BILLIONS, 1000, 500), ("**7.5**", BILLIONS, 7.5, 0.05),
        ("1,024", COUNT, 1024, 0.5), ("1_536", COUNT, 1536, 0.5), ("5e8", COUNT, 5e8, 0.5e8), ("~90.5s", SECONDS, 90.5, 0.05),
    ],
)  # fmt: skip
def test_quantities(text: str, units, value: float, half: float) -> None:
    found = read_quantity(text, units)
    assert found is not None and found.value == pytest.approx(value) and found.half_unit == pytest.approx(half)


@pytest.mark.parametrize(
    "text", ["", "OOM", "fail", "nan", "inf", "-3", "1,439s", "1:30", "137 m", "1e999", "0x10", "1" * 99, "12 34", "٣"]
)
def test_what_is_no_time(text: str) -> None:
    assert read_quantity(text, SECONDS) is None


def test_counts_are_whole_and_a_header_may_give_the_unit() -> None:
    assert read_quantity("1.5", COUNT) is None and read_quantity("1024B", COUNT) is None
    assert read_quantity("127", SECONDS, default_unit="ms").value == pytest.approx(0.127)
    assert read_quantity("127s", SECONDS, default_unit="ms").value == 127
    assert number_span(" **46.7** ") == (3, 7) and number_span("fail") is None


@given(st.text(max_size=80))
def test_reading_never_fails(text: str) -> None:
    for units in (SECONDS, BILLIONS, COUNT):
        found = read_quantity(text, units)
        assert found is None or (found.value >= 0 and found.half_unit >= 0)
