"""Files and folders that appear whole, or leave what there was."""

import os
from pathlib import Path

import pytest

from programs.writing import whole


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def write(part: Path, is_folder: bool, text: str) -> None:
    if is_folder:
        part.mkdir()
        part = part / "file"
    part.write_text(text)


@pytest.mark.parametrize("former", [False, True])
@pytest.mark.parametrize("is_folder", [False, True])
def test_it_takes_the_place_of_what_was_there(tmp_path, is_folder, former):
    place = tmp_path / "place"
    if former:
        write(place, is_folder, "former")
    with whole(place) as part:
        assert not part.exists() and part.name == "place" and part.parent.name.startswith(".saving-")
        write(part, is_folder, "new")
        assert place.exists() == former
    assert tree(tmp_path) == {"place/file" if is_folder else "place": "new"}
    assert list(tmp_path.iterdir()) == [place]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("is_folder", [False, True])
@pytest.mark.parametrize("when", ["written", "put in place", "nothing is written"])
def test_what_was_there_stays_when_it_fails(tmp_path, monkeypatch, is_folder, when, error):
    def fail(*_):
        raise error

    place = tmp_path / "place"
    write(place, is_folder, "former")
    if when == "put in place":
        monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(FileNotFoundError if when == "nothing is written" else error), whole(place) as part:
        if when != "nothing is written":
            write(part, is_folder, "new")
        if when == "written":
            fail()
    assert tree(tmp_path) == {"place/file" if is_folder else "place": "former"}
    assert list(tmp_path.iterdir()) == [place]


def test_a_part_that_cannot_be_deleted_is_said(tmp_path, monkeypatch, caplog):
    """On Windows a file that is open elsewhere stays."""
    place = tmp_path / "place"
    write(place, True, "former")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        with whole(place) as part:
            write(part, True, "new")
    (left,) = tmp_path.glob(".saving-*")
    assert caplog.messages == [f"{left} could not be deleted"]
    assert tree(place) == {"file": "new"} and tree(left) == {"former/file": "former"}


def test_a_name_as_long_as_a_file_system_takes(tmp_path):
    path = tmp_path / ("x" * 250)
    with whole(path) as part:
        part.write_text("it")
    assert path.read_text() == "it"
