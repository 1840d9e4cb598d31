"""A finished bundle takes another's place: whatever ends the process, one whole bundle is there or can be found."""

import subprocess
import sys
from pathlib import Path

import pytest

from edgecl_device.manifest import check_files, read_manifest
from edgecl_export import export, place
from edgecl_export.bundle import SCRATCH


@pytest.fixture
def folders(tmp_path):
    """A new folder in a scratch folder, and an old one at the destination."""
    new, destination = tmp_path / "scratch" / "bundle", tmp_path / "b"
    for folder, text in ((new, "new"), (destination, "old")):
        folder.mkdir(parents=True)
        (folder / "one").write_text(text)
        (folder / "two").write_text(text)
    return new, destination


def content(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


OLD, NEW = ({"one": text, "two": text} for text in ("old", "new"))


def beside(destination):
    return sorted(p.name for p in destination.parent.iterdir() if p.name not in (destination.name, "scratch"))


def test_a_folder_takes_the_place_of_none(folders):
    new, destination = folders
    place.place(new, destination.with_name("c"))
    assert content(destination.with_name("c")) == NEW and not new.exists()


@pytest.mark.parametrize("swap", [True, False])
def test_a_folder_takes_the_place_of_another(folders, monkeypatch, swap):
    new, destination = folders
    if not swap:
        monkeypatch.setattr(place, "_swapped", lambda left, right: False)
    place.place(new, destination)
    assert content(destination) == NEW and beside(destination) == []
    if new.exists():
        assert content(new) == OLD, "the system swapped them"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("after", [True, False])
def test_an_interrupt_at_either_rename_leaves_one_whole_folder(folders, monkeypatch, error, first, after):
    new, destination = folders
    real = Path.rename

    def stopped(self, target):
        if (self == (destination if first else new)) and not after:
            raise error
        result = real(self, target)
        if self == (destination if first else new):
            raise error
        return result

    monkeypatch.setattr(place, "_swapped", lambda left, right: False)
    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(error):
        place.place(new, destination)
    assert content(destination) == (NEW if after and not first else OLD)
    assert beside(destination) == []


KILL = """
import importlib.util, os, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("place", sys.argv[1])
place = importlib.util.module_from_spec(spec)
spec.loader.exec_module(place)
moment, real = sys.argv[4], Path.rename
def rename(self, target):
    if moment == f"before {self.name}":
        os._exit(9)
    result = real(self, target)
    if moment == f"after {self.name}":
        os._exit(9)
place._swapped = lambda left, right: False
Path.rename = rename
place.place(Path(sys.argv[2]), Path(sys.argv[3]))
"""


@pytest.mark.parametrize("moment", ["before b", "after b", "before bundle", "after bundle"])
def test_a_kill_without_a_swap_leaves_the_old_folder_where_it_can_be_found(folders, moment):
    new, destination = folders
    done = subprocess.run([sys.executable, "-c", KILL, place.__file__, str(new), str(destination), moment], check=False)
    assert done.returncode == 9
    if destination.exists():
        assert content(destination) == (NEW if moment == "after bundle" else OLD)
    found = beside(destination)
    assert len(found) == (moment != "before b") and all(name.startswith(place.ASIDE) for name in found)
    assert all(content(destination.with_name(name)) == OLD for name in found)


@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize("swap", [True, False])
def test_an_interrupted_export_leaves_one_whole_bundle(toy, tmp_path, monkeypatch, swap, after):
    path = tmp_path / "bundle"
    export(toy.prepared("ncm"), path)
    before = toy.helpers.hashes(path)
    swapped, renamed = place._swapped, Path.rename

    def stopped(real, counts):
        def call(self, other):
            if not after and counts(self):
                raise KeyboardInterrupt
            result = real(self, other)
            if counts(self):
                raise KeyboardInterrupt
            return result

        return call

    if swap:
        monkeypatch.setattr(place, "_swapped", stopped(swapped, lambda path: True))
    else:
        monkeypatch.setattr(place, "_swapped", lambda left, right: False)
        monkeypatch.setattr(Path, "rename", stopped(renamed, lambda folder: folder.parent.name.startswith(SCRATCH)))
    with pytest.raises(KeyboardInterrupt):
        export(toy.prepared("slda"), path, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]
    manifest = read_manifest(path)
    check_files(path, manifest)
    assert manifest.method in ("ncm", "slda")
    if not swap:
        assert (toy.helpers.hashes(path) == before) == (not after)
