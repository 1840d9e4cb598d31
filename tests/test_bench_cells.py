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
