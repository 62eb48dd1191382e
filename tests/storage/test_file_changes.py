import json
import os
import stat

import pytest

from megactl.errors import ConfigError, DataError, RunError
from megactl.storage import durable
from megactl.storage.file_changes import Rename, Rewrite, apply, check, undo


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text(f"text of {name}\n")
    return tmp_path


def everything(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "undo.json"}


def test_changes_are_made_and_taken_back(folder):
    before = everything(folder)
    apply([Rename(folder / "a", folder / "a2"), Rewrite(folder / "b", b"text of b\n", b"new\xff\r\n")], folder / "undo.json")
    assert everything(folder) == {"a2": b"text of a\n", "b": b"new\xff\r\n", "c": b"text of c\n"}
    assert len(undo(folder / "undo.json")) == 2
    assert everything(folder) == before
    assert undo(folder / "undo.json") == []


def test_bytes_that_are_no_text_come_back_as_they_were(folder):
    (folder / "b").write_bytes(b"\xff\xfe caf\xe9\r\n")
    apply([Rewrite(folder / "b", b"\xff\xfe caf\xe9\r\n", b"x")], folder / "undo.json")
    undo(folder / "undo.json")
    assert (folder / "b").read_bytes() == b"\xff\xfe caf\xe9\r\n"


def test_a_script_stays_executable_and_a_link_stays_a_link(folder):
    (folder / "a").chmod(0o750)
    (folder / "link").symlink_to("a")
    apply([Rewrite(folder / "link", b"text of a\n", b"new")], folder / "undo.json")
    assert (folder / "link").is_symlink() and (folder / "a").read_bytes() == b"new"
    assert stat.S_IMODE((folder / "a").stat().st_mode) == 0o750


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([("a", "b")], "exists"),
        ([("a", "new"), ("b", "new")], "would get the name of"),
        ([("a", "b"), ("b", "new")], "run it again"),
        ([("gone", "new")], "is gone"),
        ([("a", "dangling")], "exists"),
    ],
)
def test_a_name_that_is_taken_stops_everything(folder, changes, words):
    (folder / "dangling").symlink_to("nowhere")
    before = sorted(os.listdir(folder))
    planned = [Rename(folder / "c", folder / "c2"), *(Rename(folder / old, folder / new) for old, new in changes)]
    with pytest.raises(ConfigError, match=words):
        apply(planned, folder / "undo.json")
    assert sorted(os.listdir(folder)) == before


def test_a_file_that_came_since_the_check_is_not_replaced(folder, monkeypatch):
    create = durable.create

    def somebody_was_faster(path):
        if path.name == "new":
            path.write_text("theirs")
        return create(path)

    monkeypatch.setattr(durable, "create", somebody_was_faster)
    with pytest.raises(RunError, match="0 of 1 changes"):
        apply([Rename(folder / "a", folder / "new")], folder / "undo.json")
    assert (folder / "new").read_text() == "theirs" and (folder / "a").read_text() == "text of a\n"


def test_a_file_that_changed_since_it_was_read_is_left_alone(folder):
    assert [str(problem) for problem in check([Rewrite(folder / "a", b"other", b"new")])]
    apply([Rewrite(folder / "b", b"text of b\n", b"new\n")], folder / "undo.json")
    (folder / "b").write_text("edited by hand\n")
    with pytest.raises(ConfigError, match="was changed since"):
        undo(folder / "undo.json")
    assert (folder / "b").read_text() == "edited by hand\n"


def test_a_failure_half_way_names_the_undo_file_which_then_works(folder, monkeypatch):
    before, real, calls = everything(folder), os.rename, []

    def fails_the_second_time(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(*arguments)

    monkeypatch.setattr(os, "rename", fails_the_second_time)
    with pytest.raises(RunError, match="1 of 2 changes were made") as raised:
        apply([Rename(folder / "a", folder / "a2"), Rename(folder / "b", folder / "b2")], folder / "undo.json")
    assert "undo.json" in raised.value.hint and not (folder / "b2").exists()
    monkeypatch.undo()
    assert len(undo(folder / "undo.json")) == 1
    assert everything(folder) == before


def test_the_undo_file_is_never_overwritten(folder):
    (folder / "undo.json").write_text("older")
    with pytest.raises(ConfigError, match="never overwritten"):
        apply([Rename(folder / "a", folder / "a2")], folder / "undo.json")
    with pytest.raises(ConfigError, match="cannot be written"):
        apply([Rename(folder / "a", folder / "a2")], folder / "no" / "undo.json")
    assert (folder / "a").exists() and (folder / "undo.json").read_text() == "older"


@pytest.mark.parametrize(
    "content",
    [None, "", "{}", "[]", '{"format": "megactl-undo", "version": 9, "changes": []}',
     '{"format": "megactl-undo", "version": 1, "changes": [{"rename": 3, "to": "x"}]}'],
)  # fmt: skip
def test_what_is_no_undo_file_is_said_to_be_none(folder, content):
    if content is not None:
        (folder / "undo.json").write_text(content)
    with pytest.raises(DataError, match=r"undo\.json"):
        undo(folder / "undo.json")


def test_the_undo_file_can_be_read_by_people(folder):
    apply([Rename(folder / "a", folder / "a2")], folder / "undo.json")
    document = json.loads((folder / "undo.json").read_text())
    assert document["changes"] == [{"rename": str(folder / "a"), "to": str(folder / "a2")}]
