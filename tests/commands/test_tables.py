import csv
import io

from megactl.commands import tables as tables_module
from megactl.commands.tables import csv_table, markdown_table, show_table

HEADER = ("file", "TFLOPs")


def shown(rows: list[list[str | None]], header: tuple[str, ...] = HEADER, **more: object) -> str:
    stream = io.StringIO()
    show_table(header, rows, stream=stream, **more)
    return stream.getvalue()


def test_a_cell_is_text_and_never_markup() -> None:
    text = shown([["[red]a[/red].out", "1"], ["[/nothing opened]", None]])
    assert "[red]a[/red].out" in text and "[/nothing opened]" in text and "\x1b" not in text


def test_control_characters_are_shown_and_not_obeyed() -> None:
    assert "\x1b" not in shown([["\x1b]0;title\x07", "1"]])


def test_long_cells_are_not_folded_in_a_file() -> None:
    assert "x" * 300 in shown([["x" * 300, "1"]])


def test_numbers_stand_on_the_right() -> None:
    lines = shown([["a", "1"], ["b", "100.5"]], right=[1]).splitlines()
    assert [line.rstrip()[-1] for line in lines if line.strip().startswith(("a", "b"))] == ["1", "5"]
    assert len({len(line.rstrip()) for line in lines if line.strip().startswith(("a ", "b "))}) == 1


def test_markdown_escapes_what_would_open_a_column() -> None:
    page = markdown_table(HEADER, [["a|b\nc", None]])
    assert page.splitlines()[-1] == "| a\\|b c | -        |"


def test_markdown_of_no_rows_is_its_header() -> None:
    assert markdown_table(HEADER, []).startswith("| file")


def test_csv_survives_a_round_trip() -> None:
    rows = [['a,"b"\nc', "1"], ["", None]]
    assert list(csv.reader(io.StringIO(csv_table(HEADER, rows)))) == [list(HEADER), ['a,"b"\nc', "1"], ["", ""]]


def test_plain_tables_look_as_rich_draws_them(monkeypatch):
    """Off a terminal a table is printed without rich. Only blanks at the ends of lines differ."""
    tables = [
        (("a", "bb b"), [["1", "x"], ["22222", None]], [0]),
        (("a",), [["1"]], []),
        (("file", "", "n"), [["[red]", "", "1"], ["b" * 300, "x", "-2"]], [2]),
    ]
    for header, rows, right in tables:
        plain = shown(rows, header, right=right)
        monkeypatch.setattr(tables_module, "_plain_lines", lambda *_: None)
        drawn = shown(rows, header, right=right)
        monkeypatch.undo()
        assert [line.rstrip() for line in drawn.splitlines()] == plain.splitlines() != []


def test_wide_letters_are_left_to_rich():
    assert tables_module._plain_lines([["名"], ["x"]], (), 1000) is None
    assert tables_module._plain_lines([["a"], ["x\ny"]], (), 1000) is None
    assert tables_module._plain_lines([["a" * 10, "b"]], (), 16) is None
    assert tables_module._plain_lines([["a" * 10, "b"]], (), 18) is not None
