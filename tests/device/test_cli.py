import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from edgecl_device import Learner, StoreFullError, cli
from edgecl_device.manifest import TargetSpec
from edgecl_device.targets import VectorTarget


@pytest.fixture
def data(tmp_path, stream):
    np.savez(tmp_path / "stream.npz", x=stream[0], y=stream[1])
    return tmp_path / "stream.npz"


@pytest.fixture
def call(capsys):
    def run(*arguments):
        code = cli.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_info_is_the_manifests(call, head):
    code, out, _ = call("info", head, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["method"] == "head" and found["input"] == "uint8 [1, 4, 4]" and found["replay"] == "300 bytes, reservoir"
    assert found["state_bytes"] == 180
    assert found["file_bytes"] == sum(p.stat().st_size for p in head.iterdir() if p.name != "manifest.json")
    assert {step["step"]: step["canonical_macs"] for step in found["steps"]} == {"encode": 128, "predict": 40, "learn": 120}
    code, table, _ = call("info", head)
    assert "2 named of 5" in table
    assert ["learn", "120", "120", "1,024"] in [line.split()[:4] for line in table.splitlines()]


@pytest.mark.parametrize("name", ["means", "head"])
def test_verify_leaves_the_files_as_they_are(call, request, name):
    bundle = request.getfixturevalue(name)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in bundle.iterdir()}
    code, out, _ = call("verify", bundle, "--json")
    assert code == 0 and json.loads(out)["valid"] is True
    assert [check["check"] for check in json.loads(out)["checks"]] == [
        "schema, hashes, state, graphs",
        "predict",
        "learn",
        "files unchanged",
    ]
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in bundle.iterdir()} == before


def test_verify_of_a_learner_that_knows_no_class(call, means, head):
    assert json.loads(call("verify", means, "--json")[1])["checks"][1]["result"] == "no class yet"
    assert json.loads(call("verify", head, "--json")[1])["checks"][1]["result"] == "class 0"


def test_verify_says_when_the_update_was_refused_or_files_changed(call, means, monkeypatch):
    def breaking(self, x, y):
        (means / "manifest.json").write_text("{}")
        raise cli.UpdateRefusedError("learn: refused")

    monkeypatch.setattr(Learner, "learn", breaking)
    code, _, err = call("verify", means)
    assert code == 2 and "files changed while they were verified" in err
    monkeypatch.undo()
    code, _, err = call("verify", means)
    assert code == 2 and "manifest.json: schema must be a positive integer" in err


def test_run_is_prequential(call, means, data, stream):
    code, out, err = call("run", means, "--data", data, "--json")
    found = json.loads(out)
    with Learner.load(means) as learner:
        hits = 0
        for x, y in zip(*stream, strict=True):
            hits += learner.predict(x).label == y
            learner.learn(x, int(y))
    assert (code, err) == (0, "")
    assert found["prequential_accuracy"] == hits / 120 > 0.8
    assert found["samples"] == found["learned_in_all"] == 120 and found["refused"] == 0
    assert found["macs"] == 120 * (128 + 40 + 120)
    assert sum(row["samples"] for row in found["classes"]) == 120
    assert sum(row["samples"] * row["prequential_accuracy"] for row in found["classes"]) == pytest.approx(hits)


def test_run_keeps_the_learner_in_the_store_and_counts_refusals(call, means, stream, loud, tmp_path):
    np.savez(tmp_path / "some.npz", x=np.stack([stream[0][0], loud, stream[0][1]]), y=np.array([0, 1, 2]))
    arguments = ("run", means, "--data", tmp_path / "some.npz", "--store", tmp_path / "l.db", "--json")
    found = json.loads(call(*arguments)[1])
    assert found["refused"] == 1 and found["learned_in_all"] == 2 and found["bytes_written"] > 0
    found = json.loads(call(*arguments, "--limit", 1)[1])
    assert found["samples"] == 1 and found["learned_in_all"] == 3


def test_the_bytes_that_run_tells_are_all_that_it_wrote(call, means, data, tmp_path):
    def wrote():
        return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["wchar"])

    call("run", means, "--data", data, "--json")
    before = wrote()
    found = json.loads(call("run", means, "--data", data, "--store", tmp_path / "l.db", "--json")[1])
    assert found["bytes_written"] == pytest.approx(wrote() - before, rel=0.1)


@pytest.mark.parametrize("terminal", [False, True])
def test_ctrl_c_is_one_line_and_what_was_learned_is_in_the_store(request, call, means, data, monkeypatch, tmp_path, terminal):
    learn = Learner.learn

    def pressed(self, x, y, **options):
        if self.report()["learned"] == 7:
            signal.raise_signal(signal.SIGINT)
        return learn(self, x, y, **options)

    monkeypatch.setattr(Learner, "learn", pressed)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what it runs in the background without one
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, handler))
    code, out, err = call("run", means, "--data", data, "--store", tmp_path / "l.db")
    said = "edgecl-device: interrupted; with --store, what was learned is in the store\n"
    assert (code, out) == (130, "") and err.endswith(said) and err.count("\n") == 1
    assert err.startswith("\r\x1b[K") if terminal else err == said
    with Learner.load(means, tmp_path / "l.db") as learner:
        assert learner.report()["learned"] == 7


def test_without_stderr_it_works_all_the_same(means, data, tmp_path):
    def command(*arguments):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(cli.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])}
        shell = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-m", "edgecl_device.cli", *map(str, arguments)]
        return subprocess.run(shell, text=True, env=environment, check=False, stdout=subprocess.PIPE)

    done = command("run", means, "--data", data, "--store", tmp_path / "l.db", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["samples"] == 120
    done = command("run", means, "--data", tmp_path / "none.npz")
    assert (done.returncode, done.stdout) == (2, "")  # the message does not go to stdout instead


@pytest.mark.parametrize(("field", "value"), [("inputs", []), ("outputs", [{"name": "z", "shape": [1, 8], "dtype": "foo"}])])
@pytest.mark.parametrize("command", ["info", "verify"])
def test_a_manifest_that_the_loop_cannot_serve_is_an_error_of_one_line(call, means, edit_manifest, command, field, value):
    steps = json.loads((means / "manifest.json").read_text())["steps"]
    steps["encode"][field] = value
    edit_manifest(means, steps=steps)
    code, out, err = call(command, means)
    assert code == 2 and out == "" and err.startswith("edgecl-device: step 'encode': ") and err.count("\n") == 1
    steps["encode"]["inputs"] = [{"name": "x", "shape": [4], "dtype": "foo"}]
    edit_manifest(means, steps=steps)
    assert call(command, means)[0] == 2


def test_run_of_a_method_that_does_not_learn_predicts(call, means, data, edit_manifest):
    (means / "learn.onnx").unlink()
    described = json.loads((means / "manifest.json").read_text())
    del described["steps"]["learn"], described["files"]["learn.onnx"]
    edit_manifest(means, steps=described["steps"], files=described["files"])
    code, out, err = call("run", means, "--data", data, "--json")
    assert (code, err) == (0, "") and json.loads(out)["samples"] == 120 and json.loads(out)["learned_in_all"] == 0


def test_run_of_nothing(call, means, data):
    code, out, _ = call("run", means, "--data", data, "--limit", 0)
    assert code == 0 and "prequential_accuracy  -" in out


def test_a_stream_is_checked_before_its_first_sample_is_learned(call, means, stream, tmp_path):
    y = np.zeros(20, np.int64)
    y[13] = 5
    np.savez(tmp_path / "bad.npz", x=stream[0][:20], y=y)
    code, _, err = call("run", means, "--data", tmp_path / "bad.npz", "--store", tmp_path / "l.db")
    assert code == 2 and "edgecl-device: sample 13: y: must be in [0, 5)" in err
    assert not (tmp_path / "l.db").exists()
    code, out, _ = call("run", means, "--data", tmp_path / "bad.npz", "--limit", 13, "--json")
    assert code == 0 and json.loads(out)["samples"] == 13


def test_an_error_in_the_middle_of_a_stream_names_its_sample(call, means, data, monkeypatch):
    learn = Learner.learn

    def full(self, x, y, **options):
        if self.report()["learned"] == 7:
            raise StoreFullError("no space left")
        return learn(self, x, y, **options)

    monkeypatch.setattr(Learner, "learn", full)
    code, _, err = call("run", means, "--data", data)
    assert (code, err) == (2, "edgecl-device: sample 7: no space left\n")


def damaged_streams(folder, x, y):
    np.savez_compressed(folder / "deflate.npz", x=x, y=y)
    content = bytearray((folder / "deflate.npz").read_bytes())
    content[100:400] = bytes(300)
    (folder / "deflate.npz").write_bytes(content)
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (100000000000000, 16), }"
    array = b"\x93NUMPY\x01\x00" + (len(header) + 1).to_bytes(2, "little") + header + b"\n"
    for name, members in (
        ("lying", {"x.npy": array, "y.npy": array}),
        ("bytes", {"x": b"not", "y": b"arrays"}),
        ("short", {"x.npy": array[:20]}),
    ):
        with zipfile.ZipFile(folder / f"{name}.npz", "w") as file:
            for member, data in members.items():
                file.writestr(member, data)


@pytest.mark.parametrize("name", ["deflate", "lying", "bytes", "short"])
def test_damaged_streams_are_errors_of_one_line(call, means, stream, tmp_path, name):
    damaged_streams(tmp_path, *stream)
    code, out, err = call("run", means, "--data", tmp_path / f"{name}.npz")
    assert code == 2 and out == "" and err.count("\n") == 1
    assert f"{name}.npz: " in err and "numpy.savez" in err


def bad_weights(folder, x):
    good = {"x": x, "y": np.zeros(len(x), np.int64)}
    np.savez(folder / "objects.npz", weight=np.array([None] * len(x)), **good)
    np.savez(folder / "few.npz", weight=np.ones(3), **good)
    np.savez(folder / "zero.npz", weight=np.arange(len(x))[::-1], **good)
    np.savez(folder / "flipped.npz", weight=np.ones(len(x)), **good)
    content = bytearray((folder / "flipped.npz").read_bytes())
    content[content.index(np.ones(1).tobytes(), content.index(b"weight.npy"))] ^= 1
    (folder / "flipped.npz").write_bytes(content)
    np.savez(folder / "text.npz", **good)
    with zipfile.ZipFile(folder / "text.npz", "a") as file:
        file.writestr("weight.npy", b"no array")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("objects", "objects.npz: must be an npz file with arrays weight (Object arrays cannot be loaded"),
        ("few", "few.npz: weight must hold one number a sample, got float64 [3]"),
        ("zero", "sample 119: weight: must be finite in float32 and above 0, got "),
        ("flipped", "flipped.npz: must be an npz file with arrays weight (Bad CRC-32"),
        ("text", "text.npz: weight must be arrays; write them with numpy.savez"),
    ],
)
def test_bad_weights_are_errors_of_one_line(call, means, stream, tmp_path, name, message):
    bad_weights(tmp_path, stream[0])
    code, out, err = call("run", means, "--data", tmp_path / f"{name}.npz", "--store", tmp_path / "l.db")
    assert code == 2 and out == "" and err.count("\n") == 1
    assert message in err and not (tmp_path / "l.db").exists()


def test_weights_that_the_method_does_not_take_are_refused_before_the_first_sample(call, means, stream, tmp_path, edit_manifest):
    described = json.loads((means / "manifest.json").read_text())
    del described["steps"]["learn"], described["files"]["learn.onnx"]
    (means / "learn.onnx").unlink()
    edit_manifest(means, steps=described["steps"], files=described["files"])
    np.savez(tmp_path / "s.npz", x=stream[0][:6], y=stream[1][:6], weight=[1, 1, 2, 1, 1, 1])
    code, _, err = call("run", means, "--data", tmp_path / "s.npz", "--store", tmp_path / "l.db")
    assert (code, err) == (2, "edgecl-device: sample 2: weight: means takes no sample weight, got 2.0; leave it at 1\n")
    assert not (tmp_path / "l.db").exists()
    assert call("run", means, "--data", tmp_path / "s.npz", "--limit", 2)[0] == 0


def test_squared_errors_beyond_float32_are_finite():
    target = VectorTarget(TargetSpec("vector", (1, 2), "float32"), 2)
    assert target.measured(np.array([0, -1e30], np.float32), np.array([[0, 1e30]], np.float32)) == pytest.approx(2e60)


def as_command(means, *arguments, **options):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(cli.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "edgecl_device.cli", *arguments, str(means)]
    return subprocess.run(command, text=True, env=environment | options.pop("env", {}), check=False, stderr=subprocess.PIPE, **options)


def test_output_that_nobody_reads_or_that_has_no_room_is_no_traceback(means):
    reading, writing = os.pipe()
    os.close(reading)
    done = as_command(means, "info", stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")
    with Path("/dev/full").open("w") as full:
        done = as_command(means, "info", stdout=full)
    assert done.returncode == 2 and done.stderr.startswith("edgecl-device: the output cannot be written") and done.stderr.count("\n") == 1


def test_names_that_the_terminal_has_not_are_escaped(means, edit_manifest):
    edit_manifest(means, class_names=["Tässchen", "half \ud800"])
    done = as_command(means, "info", stdout=subprocess.PIPE, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "T\\xe4sschen, half \\ud800" in done.stdout


def bad_streams(folder, x):
    np.save(folder / "array.npz", x)
    (folder / "array.npz.npy").rename(folder / "array.npz")
    np.savez(folder / "no_y.npz", x=x)
    np.savez(folder / "short.npz", x=x, y=np.zeros(3, np.int64))
    np.savez(folder / "floats.npz", x=x, y=np.zeros(len(x)))
    np.savez(folder / "objects.npz", x=np.array([None] * 3), y=np.zeros(3, np.int64))
    np.savez(folder / "shape.npz", x=x[:, :3], y=np.zeros(len(x), np.int64))
    np.savez(folder / "label.npz", x=x, y=np.full(len(x), 9))
    (folder / "cut.npz").write_bytes((folder / "no_y.npz").read_bytes()[:100])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", "none.npz: must be an npz file"),
        ("array", "array.npz: must be an npz file"),
        ("no_y", "no_y.npz: must be an npz file with arrays x and y"),
        ("cut", "cut.npz: must be an npz file"),
        ("objects", "objects.npz: must be an npz file"),
        ("short", "y must hold one integer a sample, got int64 [3] for 120 samples"),
        ("floats", "y must hold one integer a sample, got float64"),
        ("shape", "x: shape must be [1, 4, 4], got [3, 4]"),
        ("label", "y: must be in [0, 5)"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(call, means, stream, tmp_path, name, message):
    bad_streams(tmp_path, stream[0])
    code, out, err = call("run", means, "--data", tmp_path / f"{name}.npz")
    assert code == 2 and out == ""
    assert err.startswith("edgecl-device: ") and err.count("\n") == 1
    assert message in err


def test_a_wrong_folder_and_a_wrong_limit(call, means, data, tmp_path):
    code, _, err = call("info", tmp_path / "none")
    assert code == 2 and "no manifest; pass the folder that edgecl export wrote" in err
    code, _, err = call("info", tmp_path / ("n" * 300))
    assert code == 2 and "cannot be read ([Errno 36] File name too long" in err
    code, _, err = call("run", means, "--data", "/dev/null")  # as /dev/zero, at whose end a reader never comes
    assert code == 2 and "/dev/null: must be an npz file with arrays x and y (a folder or a device)" in err
    code, _, err = call("run", means, "--data", data, "--threads", 0)
    assert code == 2 and "threads: must be at least 1 and at most 64, got 0" in err
    code, _, err = call("run", means, "--data", data, "--limit", -1)
    assert code == 2 and "--limit: must be at least 0, got -1" in err


@pytest.mark.parametrize("arguments", [["--help"], ["info", "--help"], ["verify", "--help"], ["run", "--help"]])
def test_help_has_examples(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 0
    assert "edgecl-device run bundle/ --data stream.npz" in capsys.readouterr().out


def test_as_a_command_without_a_traceback(means, tmp_path):
    (means / "learn.onnx").write_bytes(b"altered")
    done = as_command(means, "verify", stdout=subprocess.PIPE, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert "learn.onnx: SHA-256 differs" in done.stderr and done.stderr.count("\n") == 1


def test_progress_only_on_a_terminal(capsys, monkeypatch):
    assert list(cli.progress(3)) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    ticks = iter(range(10))
    monkeypatch.setattr(cli.time, "perf_counter", lambda: next(ticks))
    assert list(cli.progress(3)) == [0, 1, 2]
    assert "2 of 3 samples" in capsys.readouterr().err
