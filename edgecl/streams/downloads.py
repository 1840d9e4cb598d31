"""Downloads of public data sets from their publishers, each file checked against a pinned SHA-256.

Where the hashes are from: Fashion-MNIST, CIFAR-10 and CIFAR-100 from TensorFlow Datasets' checksum lists; their publishers
give an MD5 each, which ``docs/streams.md`` lists. The Free Spoken Digit Dataset is GitHub's archive of its tag v1.0.10, the
bytes of ``git archive | gzip -n``: made so, the archive of v1.0.9 has the hash that TensorFlow Datasets lists for it.
"""

import tarfile
from dataclasses import dataclass
from pathlib import Path

from edgecl_device.checks import entry
from edgecl_device.errors import EdgeclError

_ZALANDO = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
_TORONTO = "https://www.cs.toronto.edu/~kriz"


class DownloadError(EdgeclError):
    """A data set cannot be downloaded, or what came is not what its publisher released."""


@dataclass(frozen=True)
class Source:
    """Where a data set comes from.

    Attributes:
        files: SHA-256 of every file by its address.
        folder: Folder inside the archive that a loader takes; None when the files are no archives.
    """

    files: dict[str, str]
    folder: str | None = None


SOURCES = {
    "fashion_mnist": Source(
        {
            f"{_ZALANDO}/train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            f"{_ZALANDO}/train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            f"{_ZALANDO}/t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            f"{_ZALANDO}/t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        }
    ),
    "cifar10": Source(
        {f"{_TORONTO}/cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"},
        "cifar-10-batches-bin",
    ),
    "cifar100": Source(
        {f"{_TORONTO}/cifar-100-binary.tar.gz": "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec"},
        "cifar-100-binary",
    ),
    "fsdd": Source(
        {
            "https://github.com/Jakobovski/free-spoken-digit-dataset/archive/v1.0.10.tar.gz": (
                "feb479fad3a37883c3d21ed7f982281c2dd1c18d5aefd7e8a5d50f58023392aa"
            )
        },
        "free-spoken-digit-dataset-1.0.10/recordings",
    ),
}
"""Every data set that :func:`fetch` knows, by name."""


def fetch(name: str, cache: str | Path | None = None) -> Path:
    """Download a data set, unless it lies in the cache already, and return the folder that its loader takes.

    Args:
        name: One of :data:`SOURCES`.
        cache: Folder to keep downloads in; the operating system's cache folder of edgecl by default.

    Returns:
        The folder: of ``fashion_mnist`` for :func:`~edgecl.streams.load_idx`, of ``cifar10`` for
        :func:`~edgecl.streams.load_cifar10`, of ``cifar100`` for :func:`~edgecl.streams.load_cifar100`, of ``fsdd`` for
        :func:`~edgecl.streams.load_wavs`.

    Raises:
        InputError: when there is no such data set.
        DownloadError: when the publisher's server cannot be reached or its file has another hash.
        EdgeclError: when pooch is not installed.

    >>> fetch("imagenet")
    Traceback (most recent call last):
    edgecl_device.errors.InputError: name: must be one of fashion_mnist, cifar10, cifar100, fsdd, got 'imagenet'; pass one of them
    """
    source = entry("name", name, SOURCES)
    try:
        import pooch
    except ImportError as error:
        raise EdgeclError("pooch is not installed; install it with: pip install 'edgecl[data]'") from error
    place = Path(cache if cache is not None else pooch.os_cache("edgecl")) / name
    for address, sha256 in source.files.items():
        file = place / address.rsplit("/", 1)[1]
        processor = pooch.Untar(extract_dir="unpacked") if source.folder else None
        try:
            pooch.retrieve(address, f"sha256:{sha256}", file.name, place, processor)
        except (OSError, ValueError, tarfile.TarError) as error:  # no connection, no room; another hash; no archive
            raise DownloadError(
                f"{name}: {address} must be reachable and have SHA-256 {sha256}, got {type(error).__name__}: {error}; try again, or put"
                f" the publisher's file at {file} by hand"
            ) from error
    return place / "unpacked" / source.folder if source.folder else place
