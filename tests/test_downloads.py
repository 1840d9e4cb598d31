"""Downloads without a network: what a publisher's server would send is handed over by a function."""

import hashlib
import io
import re
import sys
import tarfile
from pathlib import Path

import pooch
import pytest

from edgecl.streams import load_cifar10
from edgecl.streams.downloads import SOURCES, DownloadError, Source, fetch
from edgecl_device.errors import EdgeclError, InputError

ADDRESS = "https://data.example.org/toy.tar.gz"


@pytest.fixture
def server(monkeypatch):
    """Files by address, and the addresses asked for."""
    files, asked = {}, []

    def download(url, output, _pooch, **_options):
        asked.append(url)
        if url not in files:
            raise OSError("no such host")
        Path(output).write_bytes(files[url])

    monkeypatch.setattr(pooch.core, "choose_downloader", lambda url, progressbar=False: download)
    return files, asked


def archive(names_and_contents):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, content in names_and_contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def test_an_archive_is_unpacked_once_and_loads(server, monkeypatch, tmp_path):
    files, asked = server
    files[ADDRESS] = archive({f"batches/{name}": bytes([3]) + bytes(3072) for name in ("data_batch_1.bin", "test_batch.bin")})
    monkeypatch.setitem(SOURCES, "toy", Source({ADDRESS: hashlib.sha256(files[ADDRESS]).hexdigest()}, "batches"))
    assert load_cifar10(fetch("toy", tmp_path)).y.tolist() == [3]
    assert load_cifar10(fetch("toy", tmp_path)).y.tolist() == [3]
    assert asked == [ADDRESS]


def test_single_files_stay_as_they_are(server, monkeypatch, tmp_path):
    files, asked = server
    files.update({"https://data.example.org/a.gz": b"one", "https://data.example.org/b.gz": b"two"})
    monkeypatch.setitem(SOURCES, "toy", Source({url: hashlib.sha256(content).hexdigest() for url, content in files.items()}))
    folder = fetch("toy", tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"a.gz": b"one", "b.gz": b"two"}
    (folder / "a.gz").write_bytes(b"damaged on the disk")
    assert (fetch("toy", tmp_path) / "a.gz").read_bytes() == b"one"
    assert len(asked) == 3


def test_a_file_that_differs_is_refused_and_not_kept(server, monkeypatch, tmp_path):
    files, _ = server
    files[ADDRESS] = b"something else"
    monkeypatch.setitem(SOURCES, "toy", Source({ADDRESS: "0" * 64}, "batches"))
    with pytest.raises(
        DownloadError, match=rf"toy: {re.escape(ADDRESS)} must .* have SHA-256 0{{64}}.*try again, or put .*toy\.tar\.gz by hand"
    ):
        fetch("toy", tmp_path)
    assert list((tmp_path / "toy").iterdir()) == []


def test_what_is_no_archive_and_a_server_out_of_reach_are_typed_errors(server, monkeypatch, tmp_path):
    files, _ = server
    monkeypatch.setitem(SOURCES, "toy", Source({ADDRESS: hashlib.sha256(b"no archive").hexdigest()}, "batches"))
    with pytest.raises(DownloadError, match="no such host"):
        fetch("toy", tmp_path)
    files[ADDRESS] = b"no archive"
    with pytest.raises(DownloadError, match="ReadError"):
        fetch("toy", tmp_path)


def test_every_source_is_pinned():
    for source in SOURCES.values():
        assert all(re.fullmatch("[0-9a-f]{64}", sha256) for sha256 in source.files.values())
        assert all(address.endswith(".tar.gz") or source.folder is None for address in source.files)
        assert len({address.rsplit("/", 1)[1] for address in source.files}) == len(source.files)


def test_unknown_names_and_an_absent_library(monkeypatch, tmp_path):
    with pytest.raises(InputError, match="name: must be one of fashion_mnist, cifar10, cifar100, fsdd, got 'mnist'"):
        fetch("mnist", tmp_path)
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(EdgeclError, match=r"pip install 'edgecl\[data\]'"):
        fetch("cifar10", tmp_path)
