"""Files of every layout, written here byte by byte, and what the loaders make of them."""

import gzip
import re
import struct
import sys
import wave
import zipfile

import numpy as np
import pytest

from edgecl.given import check_names
from edgecl.streams import load_cifar10, load_cifar100, load_idx, load_wavs, load_windows
from edgecl.streams.loaders.wavs import log_mel
from edgecl_device.errors import EdgeclError, InputError

RNG = np.random.default_rng(0)


def refused(words):
    return pytest.raises(InputError, match=words)


# --- idx ---------------------------------------------------------------------------------------------------------------

PIXELS = RNG.integers(0, 256, (3, 2, 4), np.uint8)


def write_idx(folder, packed=(), **changes):
    files = {
        "train-images-idx3-ubyte": b"\0\0\x08\x03" + struct.pack(">iii", 3, 2, 4) + PIXELS.tobytes(),
        "train-labels-idx1-ubyte": b"\0\0\x08\x01" + struct.pack(">i", 3) + bytes([2, 0, 1]),
        "t10k-images-idx3-ubyte": b"\0\0\x08\x03" + struct.pack(">iii", 1, 2, 4) + bytes(range(8)),
        "t10k-labels-idx1-ubyte": b"\0\0\x08\x01" + struct.pack(">i", 1) + bytes([3]),
    }
    for name, content in {**files, **{key.replace("_", "-"): value for key, value in changes.items()}}.items():
        path = folder / (f"{name}.gz" if name in packed else name)
        path.write_bytes(gzip.compress(content) if name in packed else content)
    return folder


@pytest.mark.parametrize("packed", [(), ("train-images-idx3-ubyte", "t10k-labels-idx1-ubyte")])
def test_idx(tmp_path, packed):
    data = load_idx(write_idx(tmp_path, packed))
    assert np.array_equal(data.x, PIXELS) and data.x.dtype == np.uint8
    assert data.x_test.tolist() == [[[0, 1, 2, 3], [4, 5, 6, 7]]]
    assert data.y.tolist() == [2, 0, 1] and data.y_test.tolist() == [3]
    assert data.class_names == ("0", "1", "2", "3") and data.group is None
    assert load_idx(tmp_path, "abcde").class_names == tuple("abcde")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_labels_idx1_ubyte": b"\0\0\x0d\x01" + struct.pack(">i", 0)}, r"begin with the bytes \[0, 0, 8, 1\], got \[0, 0, 13, 1\]"),
        ({"train_labels_idx1_ubyte": b"\0\0"}, r"got \[0, 0\]"),
        ({"train_images_idx3_ubyte": b"\0\0\x08\x03" + bytes(4)}, "header of 16 bytes, got 8"),
        ({"train_images_idx3_ubyte": b"\0\0\x08\x03" + struct.pack(">iii", 3, 2, 4) + bytes(23)}, r"16 \+ 3 \* 2 \* 4 bytes.*got 39"),
        ({"train_images_idx3_ubyte": b"\0\0\x08\x03" + struct.pack(">iii", 3, 2, 4) + bytes(25)}, "got 41"),
        ({"train_labels_idx1_ubyte": b"\0\0\x08\x01" + struct.pack(">i", -1)}, "got 8"),
        ({"train_labels_idx1_ubyte": b"\0\0\x08\x01" + struct.pack(">i", 2) + bytes(2)}, "one label for each image, got 2 for 3"),
    ],
)  # fmt: skip
def test_damaged_idx_is_refused(tmp_path, changes, words):
    with refused(words):
        load_idx(write_idx(tmp_path, **changes))


def test_idx_names_what_is_missing_and_what_cannot_be_unpacked(tmp_path):
    with refused("folder: must be a folder"):
        load_idx(tmp_path / "none")
    with refused(r"train-images-idx3-ubyte\.gz: must be there"):
        load_idx(tmp_path)
    write_idx(tmp_path, ["train-images-idx3-ubyte"])
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for content in (whole[:-9], b"no gzip"):
        path.write_bytes(content)
        with refused("readable gzip.*get it again"):
            load_idx(tmp_path)
    path.write_bytes(whole)
    with refused(r"y_test: labels must be in 0\.\.2, got 3\.\.3"):
        load_idx(tmp_path, "abc")


# --- CIFAR ---------------------------------------------------------------------------------------------------------------


def image(red, green, blue):
    """A record's pixels: three planes, each of 1,024 bytes, row by row."""
    return bytes([red]) * 1024 + bytes([green]) * 1024 + bytes([blue]) * 1023 + bytes([7])


def test_cifar10(tmp_path):
    (tmp_path / "data_batch_1.bin").write_bytes(bytes([9]) + image(1, 2, 3) + bytes([0]) + image(4, 5, 6))
    (tmp_path / "data_batch_3.bin").write_bytes(bytes([4]) + image(7, 8, 9))
    (tmp_path / "test_batch.bin").write_bytes(bytes([5]) + image(250, 251, 252))
    data = load_cifar10(tmp_path)
    assert data.x.shape == (3, 3, 32, 32) and data.x.dtype == np.uint8 and data.x_test.shape == (1, 3, 32, 32)
    assert data.x[:, :, 0, 0].tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]] and (data.x[:, 2, 31, 31] == 7).all()
    assert data.y.tolist() == [9, 0, 4] and data.y_test.tolist() == [5]
    assert [data.class_names[k] for k in (0, 4, 5, 9)] == ["airplane", "deer", "dog", "truck"]


def test_cifar100(tmp_path):
    (tmp_path / "train.bin").write_bytes(bytes([1, 73]) + image(1, 2, 3) + bytes([19, 89]) + image(4, 5, 6))
    (tmp_path / "test.bin").write_bytes(bytes([14, 11]) + image(7, 8, 9))
    data = load_cifar100(tmp_path)
    assert data.x[:, :, 5, 5].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert data.y.tolist() == [73, 89] and [data.class_names[k] for k in data.y] == ["shark", "tractor"]
    assert [data.group_names[k] for k in data.group] == ["fish", "vehicles_2"]
    assert (data.class_names[data.y_test[0]], data.group_names[data.group_test[0]]) == ("boy", "people")
    assert len(set(data.class_names)) == 100 and data.class_names == tuple(sorted(data.class_names))
    assert len(set(data.group_names)) == 20


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (bytes(3072), "whole number of records of 3073 bytes, got 3072 bytes.*cut off"),
        (b"", "got 0 bytes"),
        (bytes(3073) + bytes([10]) + bytes(3072), r"byte 0 of every record must be a label in 0\.\.9, got 10 in record 1"),
    ],
)
def test_damaged_cifar10_is_refused(tmp_path, content, words):
    (tmp_path / "data_batch_2.bin").write_bytes(bytes(3073))
    (tmp_path / "test_batch.bin").write_bytes(content)
    with refused(f"test_batch.bin: .*{words}"):
        load_cifar10(tmp_path)


def test_damaged_cifar100_is_refused(tmp_path):
    with refused("data_batch_1.bin to data_batch_5.bin.*got none"):
        load_cifar10(tmp_path)
    (tmp_path / "train.bin").write_bytes(bytes(3074))
    with refused(r"test\.bin: must be there"):
        load_cifar100(tmp_path)
    for labels, words in (([20, 0], r"byte 0 .* 0\.\.19, got 20"), ([0, 100], r"byte 1 .* 0\.\.99, got 100")):
        (tmp_path / "test.bin").write_bytes(bytes(labels) + bytes(3072))
        with refused(words):
            load_cifar100(tmp_path)


# --- windows -----------------------------------------------------------------------------------------------------------

ARRAYS = {
    "x": np.arange(12, dtype=np.float32).reshape(2, 2, 3), "y": np.array([1, 0]),
    "x_test": np.ones((1, 2, 3), np.float32), "y_test": np.array([2]),
}  # fmt: skip
GROUPS = {"group": np.array([0, 1]), "group_test": np.array([1]), "group_names": np.array(["ann", "bob"])}


def test_windows_from_npz(tmp_path):
    np.savez(tmp_path / "plain.npz", **ARRAYS)
    data = load_windows(tmp_path / "plain.npz")
    assert np.array_equal(data.x, ARRAYS["x"]) and data.y.tolist() == [1, 0] and data.y_test.tolist() == [2]
    assert data.class_names == ("0", "1", "2") and data.group is None
    np.savez_compressed(tmp_path / "full.npz", **ARRAYS, **GROUPS, class_names=np.array(["sit", "walk", "run"]))
    full = load_windows(tmp_path / "full.npz")
    assert full.class_names == ("sit", "walk", "run") and full.group_names == ("ann", "bob")
    assert full.group.tolist() == [0, 1] and full.group_test.tolist() == [1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": None}, r"lacks \['x'\]"),
        ({"X": np.zeros(1)}, r"has \['X'\] beside"),
        ({"x": ARRAYS["x"].astype(np.float64)}, r"x must be float32 \[windows, channels, steps\], got float64"),
        ({"x": np.zeros((2, 3), np.float32), "x_test": np.zeros((1, 3), np.float32)}, r"windows, channels, steps\], got float32 \[2, 3\]"),
        ({"x": np.where(ARRAYS["x"] == 4, np.nan, ARRAYS["x"])}, r"x must be finite, got nan at \[window, channel, step\] \[0, 1, 1\]"),
        ({"x": np.float32(1)}, r"windows, channels, steps\], got float32 \[\]"),
        ({"x": np.zeros((2, 0, 3), np.float32), "x_test": np.zeros((1, 0, 3), np.float32)}, r"got float32 \[2, 0, 3\]"),
        ({"x_test": np.ones((1, 2, 4), np.float32)}, r"x_test: samples must be float32 \[2, 3\]"),
        ({"y": np.array([1.0, np.nan])}, "bad.npz: y: must be int64"),
        ({"y_test": np.array(["run"])}, "y_test: must be int64"),
        ({"group": np.array([0, 1])}, "must be given together, got group and group_names; give all"),
        ({**GROUPS, "group_test": np.array([2])}, r"group_test: groups must be in 0\.\.1, got 2\.\.2; add group names"),
        ({**GROUPS, "group": np.array([0])}, r"group: must be int64 \[2\], one group for each sample"),
        ({"y": np.array([0, 10**12])}, r"class_names: must be given where an index is above 1,048,575, got 1,000,000,000,000"),
        ({"class_names": np.array([["a", "b", "c"]])}, r"class_names: must be text \[K\], got <U1 \[1, 3\]; convert it"),
        ({"x": np.array([{}], object)}, "plain arrays.*without objects"),
    ],
)
def test_bad_npz_is_refused(tmp_path, changes, words):
    np.savez(tmp_path / "bad.npz", **{name: array for name, array in {**ARRAYS, **changes}.items() if array is not None})
    with refused(words):
        load_windows(tmp_path / "bad.npz")


def test_damaged_npz_and_other_files_are_refused(tmp_path):
    np.savez(tmp_path / "cut.npz", **ARRAYS)
    content = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[:-30])
    with refused("must be an npz archive"):
        load_windows(tmp_path / "cut.npz")
    with (tmp_path / "array.npz").open("wb") as file:
        np.save(file, ARRAYS["x"])
    with refused("array.npz: must be an npz archive"):
        load_windows(tmp_path / "array.npz")
    with refused(r"path: must end in \.npz or \.csv, got '.*\.txt'"):
        load_windows(tmp_path / "a.txt")
    with refused(r"none\.csv: must be there"):
        load_windows(tmp_path / "none.csv")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_with_any_byte_changed_loads_or_is_refused(tmp_path, save):
    path = tmp_path / "changed.npz"
    save(path, **ARRAYS)
    whole, refusals = path.read_bytes(), 0
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 0x81]) + whole[i + 1 :])
        try:
            load_windows(path)
        except InputError:
            refusals += 1
    assert refusals > len(whole) / 2


def test_an_npz_of_raw_bytes_is_refused(tmp_path):
    np.savez(tmp_path / "raw.npz", **{name: array for name, array in ARRAYS.items() if name != "y"})
    with zipfile.ZipFile(tmp_path / "raw.npz", "a") as file:
        file.writestr("y.npy", b"no array")
    with refused("must be an npz archive of plain arrays, got no array in y; save it"):
        load_windows(tmp_path / "raw.npz")


class Uncopied(tuple[str, ...]):
    """Names that may not be gone through anew for each of them: a data set may have a million."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        assert self.passes < 10
        return super().__iter__()


def test_checking_names_takes_no_pass_for_each():
    check_names("class_names", Uncopied(map(str, range(1000))), 1000)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a", "a", "b"], r"got \['a'\] more than once"),
        (["a", "", "b"], "none of them empty"),
        (["a", "\ud800", "b"], "text that UTF-8 can hold"),
    ],
)
def test_names_are_different_and_not_empty(tmp_path, names, words):
    np.savez(tmp_path / "named.npz", **ARRAYS, class_names=np.array(names))
    with refused(rf"named\.npz: class_names: .*{words}"):
        load_windows(tmp_path / "named.npz")
    np.savez(tmp_path / "grouped.npz", **ARRAYS, **{**GROUPS, "group_names": np.array(names)})
    with refused(rf"grouped\.npz: group_names: .*{words}"):
        load_windows(tmp_path / "grouped.npz")
    with refused(f"class_names: .*{words}"):
        load_idx(write_idx(tmp_path), [*names, "c"])


@pytest.mark.parametrize("load", [load_idx, load_cifar10, load_wavs, load_windows])
@pytest.mark.parametrize("path", [None, 3, "a\0b"])
def test_what_is_no_path_is_refused(load, path):
    with refused("(folder|path): must be a path, got "):
        load(path)


TABLE = """window,ax,label,split,ay,group
w1,1,10,train,-1,u2
w1,2,10,train,-2,u2
w2,3,9,test,-3.5,u1
w2,4,9,test,-4e1,u1
w0,5,9,train,-5,u1
w0,6,9,train,-6,u1
"""


def table(folder, text):
    path = folder / "table.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_windows_from_csv(tmp_path):
    data = load_windows(table(tmp_path, TABLE))
    assert data.x.dtype == np.float32
    assert data.x.tolist() == [[[1, 2], [-1, -2]], [[5, 6], [-5, -6]]] and data.x_test.tolist() == [[[3, 4], [-3.5, -40]]]
    assert data.class_names == ("9", "10") and data.y.tolist() == [1, 0] and data.y_test.tolist() == [0]
    assert data.group_names == ("u1", "u2") and data.group.tolist() == [1, 0] and data.group_test.tolist() == [0]
    bare = load_windows(table(tmp_path, re.sub(r",\w+$", "", TABLE, flags=re.MULTILINE)))
    assert bare.group is None and np.array_equal(bare.x, data.x)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("split,", "part,", "line 1: must name the columns window, label, split"),
        ("ay,", "ax,", "each once"),
        ("w1,2,10,train,-2,u2", "w1,2,10,train,-2", "line 3: must have 6 values as the header, got 5.*cut off"),
        ("w1,2,10", "w1,2,9", r"line 3: the rows of window 'w1' must agree, got \['9', 'train', 'u2'\]"),
        ("w0,6,9,train,-6,u1\n", "", "line 6: every window must have 2 rows as the first one, got 1 in 'w0'"),
        ("w0", "w1", "line 6: .*must follow each other, got 'w1' again"),
        ("test", "dev", "line 4: split must be train or test, got 'dev'"),
        ("-3.5", "x", "line 4: ay must be a finite float32, got 'x'"),
        ("-3.5", "-1e39", "got '-1e39'"),
        ("-3.5", "nan", "got 'nan'"),
        ("-3.5", "", "got ''"),
        ("-3.5", "-3_5", "line 4: ay must be a finite float32, got '-3_5'"),
        ("-3.5", "-\u0663", "line 4: ay must be a finite float32, got '-\u0663'"),
        ("w1,1,10", "w1,1,", r"line 2: label and group must be names, got \['', 'u2'\]; fill in"),
        ("u2", "", r"line 2: label and group must be names, got \['10', ''\]"),
        ("w1,1", '"w1,1', "table with commas"),
        (TABLE[TABLE.index("\n") :], "\n", "at least one row"),
    ],
)
def test_bad_csv_is_refused(tmp_path, old, new, words):
    with refused(words):
        load_windows(table(tmp_path, TABLE.replace(old, new)))


def test_a_table_without_a_channel_is_refused(tmp_path):
    with refused("must name at least one channel"):
        load_windows(table(tmp_path, "window,label,split\na,b,train\n"))


def test_a_name_of_very_many_digits_is_text(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f"window,label,split,a\n1,{'9' * 5000},train,1\n2,10,test,1\n")
    assert load_windows(path).class_names == ("10", "9" * 5000)


def test_csv_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "table.csv").write_bytes(TABLE.replace("u1", "ü").encode("latin-1"))
    with refused("UTF-8"):
        load_windows(tmp_path / "table.csv")


# --- wavs --------------------------------------------------------------------------------------------------------------


def write_wav(path, samples, rate=8000, channels=1, width=2):
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        file.writeframes(np.asarray(samples, "<i2").tobytes())


def kaldi_log_mel(samples, rate, mels):
    """Kaldi's filter banks, written from its documentation in float64."""
    size, hop, length = int(0.025 * rate), int(0.010 * rate), 1 << (int(0.025 * rate) - 1).bit_length()
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / (size - 1))) ** 0.85

    def mel(hz):
        return 1127 * np.log(1 + hz / 700)

    edges = np.linspace(mel(20), mel(rate / 2), mels + 2)
    bins = mel(np.arange(length // 2) * rate / length)
    up, down = (bins - edges[:-2, None]) / (edges[1] - edges[0]), (edges[2:, None] - bins) / (edges[1] - edges[0])
    triangles = np.maximum(0, np.minimum(up, down))
    rows = []
    for start in range(0, len(samples) - size + 1, hop):
        frame = samples[start : start + size] / 32768
        frame = frame - frame.mean()
        frame = frame - 0.97 * np.concatenate([frame[:1], frame[:-1]])
        power = np.abs(np.fft.rfft(frame * window, length)) ** 2
        rows.append(np.log(np.maximum(triangles @ power[: length // 2], np.finfo(np.float32).eps)))
    return np.array(rows)


@pytest.mark.parametrize(("rate", "mels"), [(8000, 40), (16000, 23)])
def test_log_mel_is_kaldis(rate, mels):
    samples = (3000 * np.sin(np.arange(rate) ** 1.3 / 50) + 500 * RNG.standard_normal(rate)).astype(np.int16)
    assert np.allclose(log_mel(samples, rate, mels=mels), kaldi_log_mel(samples, rate, mels), atol=2e-3)
    assert log_mel(samples, rate, seconds=0.5, mels=mels).shape == (48, mels)


def test_wavs(tmp_path):
    sounds = {
        name: (1000 * RNG.standard_normal(n)).astype(np.int16) for name, n in [("9_theo_0", 900), ("10_ann_5", 9000), ("9_ann_12", 2000)]
    }
    for name, samples in sounds.items():
        write_wav(tmp_path / f"{name}.wav", samples)
    (tmp_path / "notes.txt").write_text("left alone")
    data = load_wavs(tmp_path)
    assert data.x.shape == (2, 1, 98, 40) and data.x.dtype == np.float32 and data.x_test.shape == (1, 1, 98, 40)
    assert data.class_names == ("9", "10") and data.group_names == ("ann", "theo")
    assert data.y_test.tolist() == [0] and data.group_test.tolist() == [1]
    assert data.group.tolist() == [0, 0] and sorted(data.y.tolist()) == [0, 1]
    long = int(np.flatnonzero(data.y == 1)[0])
    assert np.array_equal(data.x[long, 0], log_mel(sounds["10_ann_5"][:8000], 8000))  # cut
    filled = np.concatenate([sounds["9_theo_0"], np.zeros(7100, np.int16)])
    assert np.array_equal(data.x_test[0, 0], log_mel(filled, 8000))
    assert np.allclose(data.x_test[0, 0, -1], np.log(np.finfo(np.float32).eps))  # silence


def test_bad_wavs_are_refused(tmp_path):
    with refused("must hold files named LABEL_SPEAKER_INDEX.wav, got none"):
        load_wavs(tmp_path)
    write_wav(tmp_path / "1_ann_0.wav", [1, 2, 3])
    with refused("test_below: must leave recordings for training and for the test, got 5"):
        load_wavs(tmp_path)
    path = tmp_path / "1_ann_9.wav"
    write_wav(path, [1, 2, 3], rate=16000)
    with refused("sample rate of 8000 Hz as 1_ann_0.wav, got 16000; resample"):
        load_wavs(tmp_path)
    for changes, words in (({"channels": 2}, "1 channel of 16 bits, got 2 of 16 bits"), ({"width": 1}, "got 1 of 8 bits")):
        write_wav(path, [1, 2, 3, 4], **changes)
        with refused(words):
            load_wavs(tmp_path)
    write_wav(path, np.arange(100))
    whole = path.read_bytes()
    for content, words in (
        (whole[:-20], "must have 100 samples.*got 90"),
        (whole[:20], "PCM wav"),
        (b"RIFF", "PCM wav"),
        (whole.replace(b"\x10\0\0\0\x01\0", b"\x10\0\0\0\x03\0"), "PCM wav file, got unknown format"),
    ):
        path.write_bytes(content)
        with refused(f"1_ann_9.wav: .*{words}"):
            load_wavs(tmp_path)
    path.rename(tmp_path / "one-ann.wav")
    with refused("must be named LABEL_SPEAKER_INDEX.wav, got 'one-ann.wav'"):
        load_wavs(tmp_path)


def test_damaged_headers_of_wavs_are_refused(tmp_path):
    path = tmp_path / "1_ann_9.wav"
    write_wav(path, np.zeros(800, np.int16))
    whole = path.read_bytes()
    for at, number, words in ((24, 1 << 30, "sample rate of at most 1,048,576 Hz, got 1,073,741,824"), (16, (1 << 31) - 1, "PCM wav")):
        path.write_bytes(whole[:at] + struct.pack("<I", number) + whole[at + 4 :])
        with refused(f"1_ann_9.wav: .*{words}"):
            load_wavs(tmp_path)


def test_log_mel_refuses_what_does_not_fit_the_rate():
    for seconds in (0.02, float("nan"), float("inf"), 1e9):
        with refused(f"seconds: must be from 0.025, one window, to 3600, got {seconds}"):
            log_mel(np.zeros(100, np.int16), 8000, seconds=seconds)
    with refused("mels: must fit a sample rate of 8000 Hz, got 100; pass fewer"):
        log_mel(np.zeros(100, np.int16), 8000, mels=100)
    for mels in (2, 0, -1, 10**9):
        with refused(f"mels: must be from 3 to 1024, got {mels}; pass 40"):
            log_mel(np.zeros(100, np.int16), 8000, mels=mels)
    with refused("mels: must be an integer, got 23.5 of type float"):
        log_mel(np.zeros(100, np.int16), 8000, mels=23.5)
    assert log_mel(np.zeros(100, np.int16), 8000, seconds=0.025).shape == (1, 40)


def test_an_absent_audio_library_names_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "kaldi_native_fbank", None)
    with pytest.raises(EdgeclError, match=r"pip install 'edgecl\[audio\]'"):
        log_mel(np.zeros(8000, np.int16), 8000)
