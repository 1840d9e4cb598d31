"""Figures that are made once, by one process or by several."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from edgecl.bench.cells import Cell, fill, one_setting
from edgecl_device.errors import InputError


def made(text: str, calls: Path) -> dict[str, Any]:
    with calls.open("a") as file:
        file.write(f"{text}\n")
    if text == "bad":
        raise InputError("text: must be good, got 'bad'; write another")
    return {"text": text, "process": os.getpid()}


def cells(folder: Path, *texts: str) -> list[Cell]:
    return [Cell(folder / f"{text}.json", text, partial(made, text, folder / "calls.txt")) for text in texts]


@pytest.mark.parametrize("jobs", [1, 2])
def test_each_is_made_once(tmp_path: Path, jobs: int) -> None:
    said: list[tuple[str, int, int]] = []
    fill(cells(tmp_path, "a"))
    fill(cells(tmp_path, "a", "b", "c"), jobs, lambda *what: said.append(what))
    assert sorted((tmp_path / "calls.txt").read_text().split()) == ["a", "b", "c"]
    found = [cell.read() for cell in cells(tmp_path, "a", "b", "c")]
    assert [one["text"] for one in found] == ["a", "b", "c"] and all(one["seconds"] >= 0 for one in found)
    assert (found[1]["process"] != os.getpid()) == (jobs == 2)
    assert {text for text, _, _ in said} == {"b", "c", *(["2 figures, 2 at a time"] if jobs == 2 else [])}
    assert all(total == 2 for _, _, total in said)


def test_a_failure_is_told_and_leaves_no_figure(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^bad: text: must be good"):
        fill(cells(tmp_path, "a", "bad", "c"), 2)
    assert not (tmp_path / "bad.json").exists()


def test_a_folder_is_of_one_setting(tmp_path: Path) -> None:
    with one_setting(tmp_path, images=3) as setting:
        assert setting["images"] == 3 and {"versions", "machine"} < setting.keys()
        with pytest.raises(InputError, match="another process works in"), one_setting(tmp_path, images=3):
            pass
    with one_setting(tmp_path, images=3) as again:
        assert again == setting
    with (
        pytest.raises(InputError, match=r"^--out: .* holds figures of other images \(there 3, here 4\); choose another folder"),
        one_setting(tmp_path, images=4),
    ):
        pass


def test_figures_of_an_unknown_setting_are_refused(tmp_path: Path) -> None:
    with one_setting(tmp_path, images=3):
        fill(cells(tmp_path, "a"))
    (tmp_path / "start.json").unlink()
    with pytest.raises(InputError, match=r"^--out: .* holds a.json without start.json, .*; choose an empty folder"), one_setting(tmp_path):
        pass
    assert not (tmp_path / "start.json").exists()


def test_what_differs_of_versions_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with one_setting(tmp_path):
        pass
    monkeypatch.setattr("edgecl.bench.cells._sources", lambda: "other")
    with pytest.raises(InputError, match=r"figures of other versions.sources \(there '.*', here 'other'\); "), one_setting(tmp_path):
        pass


def test_a_file_of_another_figure_is_refused(tmp_path: Path) -> None:
    fill(cells(tmp_path, "a", "b"))
    (tmp_path / "a.json").rename(tmp_path / "b.json")
    for attempt in (lambda: fill(cells(tmp_path, "b", "c")), cells(tmp_path, "b")[0].read):
        with pytest.raises(InputError, match=r"b.json: must be the figure 'b', got 'a'; delete it, and it is made again"):
            attempt()
    assert not (tmp_path / "c.json").exists()


def write(path: Path) -> dict[str, Any]:
    path.write_text("weights")
    return {"n": 1}


@pytest.mark.parametrize("change", [Path.unlink, lambda path: path.write_text("other")])
def test_a_file_beside_is_as_it_was_written(tmp_path: Path, change: Any) -> None:
    cell = Cell(tmp_path / "a.json", "a", partial(write, tmp_path / "a.pth"), tmp_path / "a.pth")
    assert cell.read()["n"] == 1 and cell.read().keys() == {"n", "seconds"}
    change(tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"a.pth: must be as 'a' wrote it, it is gone or altered; delete .*a.json to make it again"):
        cell.read()
    (tmp_path / "a.json").unlink()
    assert cell.read()["n"] == 1
