"""The command line: every command as a user calls it, and every bad input as one line with exit code 2."""

import json
import shlex
import subprocess
import sys
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from edgecl import cli, console, options, tables
from edgecl.backbones import BACKBONES, SmallCnn
from edgecl.graph import cost
from edgecl.graph.capture import capture_encode
from edgecl.graph.lowering import canonicalise
from edgecl.learner import Problem
from edgecl.methods import METHODS, ridge
from edgecl.prepare import prepare
from edgecl.profiling import profile, split_points
from edgecl.splitting import SplitError, split
from edgecl_device.errors import InputError
from edgecl_device.manifest import TensorSpec, read_manifest

OWN = """
from torch import nn

def build():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))

def broken():
    raise RuntimeError("no file of weights\\nhere")

def number():
    return 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with an own model and base samples."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    (tmp_path / "net.py").write_text(OWN)
    for file, model in (("small.pth", SmallCnn(classes=10)), ("resnet20.th", BACKBONES["resnet20"](classes=10))):  # the help names them
        torch.save(model.state_dict(), file)
    generator = np.random.default_rng(0)
    x = generator.standard_normal((40, 6)).astype(np.float32)
    np.savez("base.npz", x=x, y=np.arange(40) % 4)
    np.savez("empty.npz", x=x[:0], y=np.arange(0))
    np.savez("bytes.npz", x=generator.integers(0, 256, (12, 28, 28)).astype(np.uint8), y=np.arange(12) % 3)
    np.savez_compressed("damaged.npz", x=x, y=np.arange(40) % 4)
    data = bytearray((tmp_path / "damaged.npz").read_bytes())
    data[100:300] = bytes(200)
    (tmp_path / "damaged.npz").write_bytes(data)
    (tmp_path / "text.pth").write_text("hello, this is text")  # the unpickler pops from an empty stack
    np.savez("wide.npz", x=np.zeros((4, 7), np.float32), y=np.arange(4))
    return tmp_path


def run(capsys, *words):
    """Exit code, stdout and stderr of one call."""
    code = cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def good(capsys, *words):
    code, out, err = run(capsys, *words)
    assert code == 0, err
    return out


def test_version_and_help(capsys):
    assert good(capsys, "--version") == "edgecl 0.1.0\n"
    text = good(capsys, "--help")
    assert all(name in text for name in ("demo", "methods", "profile", "export"))


def examples(capsys, command):
    text = " ".join(good(capsys, command, "--help").split("Examples:")[1].split())
    return ["edgecl " + part.strip() for part in text.split("edgecl ")[1:]]


@pytest.mark.parametrize("command", ["methods", "profile", "export"])
def test_examples_of_the_help_run(capsys, folder, command):
    found = [text.split()[1:] for text in examples(capsys, command) if "net.py" not in text]
    assert len(found) >= 2
    for words in found:
        good(capsys, *words)


def test_examples_of_the_demo_parse(capsys, folder, monkeypatch):
    calls = []
    monkeypatch.setattr(cli, "show_demo", lambda *values, engine: calls.append((*values, engine)))
    for text in examples(capsys, "demo"):
        good(capsys, *text.split(" > ")[0].split()[1:])
    own, usual = Path("edgecl-demo"), "onnx"
    assert calls == [(1, own, False, usual), (3, Path("figures"), False, usual), (1, own, False, "executorch"), (1, own, True, usual)]


def test_methods(capsys, folder):
    found = {row["method"]: row for row in json.loads(good(capsys, "methods", "--json"))}
    assert list(found) == list(METHODS)
    assert found["ridge"]["steps"] == ["predict", "learn", "forget", "relabel"] and found["ridge"]["forgets_exactly"]
    assert found["latent_replay"]["needs_suffix"] and not found["ncm"]["needs_suffix"]
    assert [name for name, row in found.items() if not row["on_device"]] == ["joint"]
    text = good(capsys, "methods")
    assert all(name in text for name in METHODS)
    assert "capacity_bytes=262144" in text


@pytest.mark.parametrize("method", METHODS)
def test_defaults_as_printed_are_read_back(method):
    config = METHODS[method].Config()
    pairs = [f"{key}={tables.config_text(value)}" for key, value in vars(config).items()]
    assert options.parse_config(method, pairs) == config


def test_profile_equals_the_exported_manifest(capsys, folder):
    words = ["net.py:build", "--at", "1", "--method", "ridge", "--classes", "4", "--config", "gamma=2", "--config", "dtype=float64"]
    found = json.loads(good(capsys, "profile", *words, "--input", "1,6", "--json"))
    good(capsys, "export", *words, "--data", "base.npz", "--out", "bundle", "--json")
    manifest = read_manifest(folder / "bundle")
    assert found["config"] == manifest.config and found["config"]["gamma"] == 2.0
    assert found["features"] == {"z": [1, 8]}
    assert {s["step"]: s["canonical_macs"] for s in found["steps"]} == {n: s.canonical_macs for n, s in manifest.steps.items()}
    assert {s["step"]: s["executed_macs"] for s in found["steps"]} == {n: s.executed_macs for n, s in manifest.steps.items()}
    assert found["steps"][0]["canonical"] == {"encode": 6 * 8}
    different = {name for name, value in manifest.ledger.items() if found["ledger"].get(name) != value}
    assert different == {"frozen_weights", "graphs", "not_counted"}


def test_frozen_bytes_count_equal_tensors_once():
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 4)).eval()
    found = []
    for weight in (net[2].weight.data, net[0].weight.data.clone()):
        net[2].weight.data = weight
        found.append(profile(prepare(net, at="3", example=np.zeros((1, 64), np.float32), method="ncm", classes=4)).ledger["frozen_weights"])
    assert found[0] - found[1] == 4 * 64 * 64
    assert found[1] >= 4 * (64 * 64 + 64)


def test_profile_needs_no_data_and_leaves_the_learner_alone():
    net = SmallCnn()
    prepared = prepare(net, at=SmallCnn.MAP, example=np.zeros((1, 1, 28, 28), np.float32), method="latent_replay", classes=10)
    codec, state = dict(vars(prepared.learner.codecs[""])), {name: t.clone() for name, t in prepared.state.items()}
    blank = profile(prepared)
    assert vars(prepared.learner.codecs[""]) == codec
    assert all(torch.equal(t, state[name]) for name, t in prepared.state.items())
    learn = next(s for s in blank.steps if s.step == "learn")
    rows = 1 + prepared.learner.config.rows_per_step
    conv, linear = 62 * 64 * 9 * 3 * 3, 62 * 10
    # the backward pass stops at the convolution's weight
    assert learn.canonical["forward"] == learn.canonical["weight_gradient"] == rows * (conv + linear)
    assert learn.canonical["input_gradient"] == rows * linear


def test_profile_shows_phases_and_gaps(capsys, folder):
    text = good(capsys, "profile", "resnet20", "--at", "layer3.1", "--method", "finetune")
    assert "weight_gradient" in text and "frozen_weights" in text and "equal" in text
    assert tables._gap(100, 107) == "1.070 GAP" and tables._gap(0, 1) == "GAP" and tables._gap(5, 5) == "equal"


@pytest.mark.parametrize(("name", "shape"), [("small_cnn", (1, 1, 28, 28)), ("resnet20", (1, 3, 32, 32))])
def test_split_points_equal_the_two_parts(name, shape):
    net, x = BACKBONES[name](classes=10).eval(), torch.zeros(shape)
    points = split_points(net, x, depth=3 if name == "small_cnn" else 1)
    assert len({p.at for p in points}) == len(points) > 4
    macs = [p.trunk_macs for p in points]
    assert macs == sorted(macs)
    for p in (points[0], points[len(points) // 2], points[-1]):
        parts = split(net, p.at)
        z = parts.trunk(x)
        assert p.features == (tuple(z.shape),)
        for part, given, want in ((parts.trunk, x, p.trunk_macs), (parts.suffix, z, p.suffix_macs)):
            graph = capture_encode(part.requires_grad_(False), TensorSpec("x", tuple(given.shape), "float32"))
            assert cost.count(canonicalise(graph)).total_macs == want
        assert p.trunk_parameters + p.suffix_parameters == sum(t.numel() for t in net.parameters())


def test_split_points_keep_dropout_and_drop_what_cannot_be_cut():
    net = nn.Sequential(nn.Linear(4, 3), nn.Dropout(), nn.ReLU(), nn.Linear(3, 2))
    assert [p.at for p in split_points(net, torch.zeros(1, 4))] == ["0", "2"]  # the dropout cuts where the first layer does

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.drop, self.fc = nn.Conv2d(1, 2, 3), nn.Dropout(), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.drop(self.conv(x).mean((2, 3))))

    points = split_points(Pooled(), torch.zeros(1, 1, 5, 5))
    assert [(p.at, p.features) for p in points] == [("conv", ((1, 2, 3, 3),)), ("drop", ((1, 2),))]
    with pytest.raises(SplitError, match="no module is called once and has something behind it"):
        split_points(nn.Sequential(nn.Linear(2, 2)), torch.zeros(1, 2))


def test_profile_lists_places(capsys, folder):
    found = json.loads(good(capsys, "profile", "net.py:build", "--input", "1,6", "--json"))
    assert [(p["at"], p["features"], p["trunk_macs"], p["suffix_macs"]) for p in found] == [
        ("0", [[1, 8]], 48, 32),
        ("1", [[1, 8]], 48, 32),
    ]
    text = good(capsys, "profile", "small_cnn", "--preprocess-u8", "HW", "--mean", "0.3", "--std", "0.3")
    assert "1x28x28 uint8" in text and "64x3x3" in text


def test_export_then_the_device_runs_it(capsys, folder):
    words = ["net.py:build", "--at", "1", "--method", "latent_replay", "--classes", "4", "--data", "base.npz", "--out", "bundle"]
    text = good(capsys, "export", *words, "--class-names", "a,b", "--config", "capacity_bytes=4096")
    assert "parity" in text and "beyond_trunk" in text and text.count("✓ yes") > 5
    assert read_manifest(folder / "bundle").class_names[:2] == ("a", "b")
    command = [Path(sys.executable).with_name("edgecl-device"), "run", "bundle", "--data", "base.npz", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["samples"] == 40
    found = json.loads(good(capsys, "export", *words, "--overwrite", "--json"))
    assert found["path"] == "bundle" and len(found["gates"]) == text.count("✓ yes")
    assert found["ledger"] == read_manifest(folder / "bundle").ledger


def test_a_memory_budget(capsys, folder):
    command = ("export", "small_cnn", "--at", "pool", "--method", "ncm")
    code, out, err = run(capsys, *command, "--ram-budget", "1KiB", "--out", "small")
    assert (code, out) == (2, "")
    assert "ram_budget_bytes (--ram-budget): must be at least" in err
    assert not Path("small").exists()
    for budget in ("1 MiB", "1000000"):
        good(capsys, *command, "--ram-budget", budget, "--out", budget)
    for wrong in ("much", "-1", "1TiB", "MiB", ""):
        with pytest.raises(InputError, match=r"^--ram-budget: must be bytes, as 64MiB"):
            options.parse_bytes("--ram-budget", wrong)


def test_export_puts_preprocessing_into_the_bundle(capsys, folder):
    words = ["--at", "pool", "--method", "ncm", "--preprocess-u8", "HW", "--mean", "0.3", "--std", "0.3"]
    good(capsys, "export", "small_cnn", *words, "--data", "bytes.npz", "--out", "bundle")
    x = read_manifest(folder / "bundle").steps["encode"].inputs[0]
    assert (x.dtype, x.shape) == ("uint8", (1, 28, 28))


def test_weights_of_fewer_classes_are_widened(folder):
    net = SmallCnn(6, generator=torch.Generator().manual_seed(3))
    torch.save(net.state_dict(), "six.pth")
    wide = options.load_model("small_cnn", 10, Path("six.pth"), 6)
    assert wide.fc.out_features == 10 and torch.equal(wide.fc.weight[:6], net.fc.weight)


EXPORT = ("export", "net.py:build", "--at", "1", "--classes", "4", "--data", "base.npz", "--out", "new")
PROFILE_LARGE = ("profile", "resnet20", "--at", "conv1", "--input", "1,3,64,64", "--method")
BAD = {
    "unknown command": (("bogus",), "No such command 'bogus'"),
    "unknown option": (("demo", "--bogus"), "No such option"),
    "no seeds": (("demo", "--seeds", "0"), "--seeds"),
    "demo into a file": (("demo", "--out", "net.py"), "--out: net.py cannot be made"),
    "no model": (("profile",), "Missing argument 'MODEL'"),
    "unknown backbone": (("profile", "resnet21"), "must be one of small_cnn"),
    "no such file": (("profile", "gone.py:build"), "existing file, got 'gone.py:build'"),
    "no such function": (("profile", "net.py:gone", "--input", "1,6"), "no attribute 'gone'"),
    "function fails": (("profile", "net.py:broken", "--input", "1,6"), "RuntimeError: no file of weights here"),
    "not a module": (("profile", "net.py:number", "--input", "1,6"), "must return an nn.Module, got int"),
    "no input": (("profile", "net.py:build"), "--input: is needed"),
    "input without sense": (("profile", "net.py:build", "--input", "1,x"), "--input: must be numbers"),
    "input batch": (("profile", "net.py:build", "--input", "2,6"), "--input: must be a batch of 1"),
    "input that does not fit": (("profile", "net.py:build", "--input", "1,7"), "shape"),
    "input that does not fit the learner": (("profile", "net.py:build", "--input", "1,7", "--at", "1"), "shape"),
    "dtype": (("profile", "small_cnn", "--dtype", "int8"), "--dtype: must be float32 or uint8"),
    "half a preprocessing": (("profile", "small_cnn", "--preprocess-u8", "HW"), "go together"),
    "no image": (("profile", "gru", "--preprocess-u8", "HW", "--mean", "0", "--std", "1"), "is for images, 'gru' takes"),
    "layout": (("profile", "small_cnn", "--preprocess-u8", "WH", "--mean", "0", "--std", "1"), "layout: must be"),
    "mean": (("profile", "small_cnn", "--preprocess-u8", "HW", "--mean", "a", "--std", "1"), "--mean: must be numbers"),
    "unknown place": (("profile", "small_cnn", "--at", "block9"), "choose one of: block"),
    "unknown method": (("profile", "small_cnn", "--at", "pool", "--method", "rigde"), "--method: must be one of"),
    "too few classes": (("profile", "small_cnn", "--classes", "1"), "--classes"),
    "unknown key": (("profile", "small_cnn", "--at", "pool", "--config", "lr=1"), "keys of ridge are gamma"),
    "no value": (("profile", "small_cnn", "--at", "pool", "--config", "gamma"), "KEY=VALUE"),
    "key twice": (("profile", "small_cnn", "--at", "pool", "--config", "gamma=1", "--config", "gamma=2"), "each key once"),
    "value of another type": (
        ("profile", "small_cnn", "--at", "pool", "--config", "projection=x"),
        "projection must be of type int | None",
    ),
    "tuple too short": (("profile", "small_cnn", "--at", "pool", "--method", "finetune", "--config", "betas=0.9"), "betas must be"),
    "value out of range": (("profile", "small_cnn", "--at", "pool", "--config", "gamma=-1"), "gamma: must be"),
    "no weights": (("profile", "small_cnn", "--weights", "gone.pth"), "gone.pth: no such file"),
    "weights of a text": (("profile", "small_cnn", "--weights", "text.pth"), "text.pth: not a readable weight file"),
    "too many features for ridge": ((*PROFILE_LARGE, "ridge"), "features: state and constants must take at most 4 GiB, got 65,536"),
    "too many features for slda": ((*PROFILE_LARGE, "slda"), "features: state and constants must take at most 4 GiB, got 65,536"),
    "too large a projection": (
        ("profile", "small_cnn", "--at", "pool", "--config", "projection=1000000"),
        "projection: state and constants must take at most 4 GiB, got 1,000,000 units for 62 features",
    ),
    "too many classes": (("profile", "small_cnn", "--at", "pool", "--classes", "100000000"), "--classes"),
    "too many classes of weights": (("profile", "small_cnn", "--model-classes", str(10**30)), "--model-classes"),
    "too large an input": (("profile", "small_cnn", "--input", "1,1,99999,99999"), "--input: must hold at most"),
    "damaged data": ((*EXPORT, "--data", "damaged.npz"), "damaged.npz: must be an npz file"),
    "weights that are none": (("profile", "small_cnn", "--weights", "net.py"), "not a readable weight file"),
    "model classes of an own model": (("profile", "net.py:build", "--input", "1,6", "--model-classes", "2"), "--model-classes"),
    "head too small": ((*EXPORT, "--method", "finetune", "--classes", "5"), "suffix: must return scores [1, 5]"),
    "no out": (EXPORT[:-2], "Missing option '--out'"),
    "no data": ((*EXPORT, "--data", "gone.npz"), "gone.npz"),
    "empty data": ((*EXPORT, "--data", "empty.npz"), "at least one sample"),
    "data of another width": ((*EXPORT, "--data", "wide.npz"), "shape"),
    "labels out of range": ((*EXPORT, "--classes", "3"), "y: "),
    "codec without data": (("export", "small_cnn", "--at", "pool", "--method", "latent_replay", "--out", "new"), "--data: is needed"),
    "host method": ((*EXPORT, "--method", "joint"), "joint"),
    "name twice": ((*EXPORT, "--class-names", "a,a"), "class_names"),
    "out exists": ((*EXPORT, "--out", "base.npz"), "--out: base.npz exists"),
    "out is no bundle": ((*EXPORT, "--out", "base.npz", "--overwrite"), "holds no bundle"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(capsys, folder, name):
    words, message = BAD[name]
    before = sorted(p.name for p in folder.iterdir())
    code, out, err = run(capsys, *words)
    errors = [line for line in err.splitlines() if line.startswith("edgecl: ")]
    assert (code, out) == (2, "")
    assert len(errors) == 1 and err.endswith(errors[0] + "\n") and message in errors[0], err
    assert "Traceback" not in err
    assert [p for p in sorted(p.name for p in folder.iterdir()) if p != "__pycache__"] == before


def test_the_installed_command_exits_with_2_when_piped(folder):
    command = [Path(sys.executable).with_name("edgecl"), "profile", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_without_arguments_the_help_is_all(capsys):
    code, out, err = run(capsys)
    assert code == 2 and "Usage: edgecl" in out + err and "edgecl: " not in out + err


def test_a_closed_stdout_is_no_error(folder):
    command = f"{Path(sys.executable).with_name('edgecl')} methods >&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_names_with_brackets_are_shown_as_they_are(capsys, folder):
    (folder / "n[red]:x:.py").write_text(OWN)
    text = good(capsys, "profile", "n[red]:x:.py:build", "--input", "1,6")
    assert text.startswith("Where n[red]:x:.py:build, input 1x6 float32 can be cut")


def test_the_next_command_can_be_pasted(capsys, folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    text = good(capsys, "export", "net.py:build", "--at", "1", "--method", "ncm", "--input", "1,6", "--out", "my [b] $bundle")
    command = text.splitlines()[-1].split("Look at it with: ")[1]
    assert shlex.split(command) == ["edgecl-device", "info", "my [b] $bundle"]


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")]
)
def test_no_memory_is_one_line(capsys, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(cli, "show_demo", fail)
    code, out, err = run(capsys, "demo")
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("edgecl: there is not enough memory for this; take fewer classes")


def test_a_defect_is_not_called_a_lack_of_memory(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a defect")

    monkeypatch.setattr(cli, "show_demo", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        cli.main(["demo"])


@pytest.mark.parametrize(
    ("method", "config", "features", "needs"),
    [
        ("ridge", {}, 8, 4 * (8 * 8 + 8 * 3)),
        ("ridge", {"dtype": "float64"}, 8, 8 * (8 * 8 + 8 * 3)),
        ("ridge", {"projection": 5}, 8, 4 * (5 * 5 + 5 * 3 + 8 * 5)),
        ("slda", {}, 8, 4 * (8 * 8 + 2 * 8 * 3)),
    ],
)
def test_the_bound_on_state_is_exact(monkeypatch, method, config, features, needs):
    kind, problem = METHODS[method], Problem(TensorSpec("z", (1, features), "float32"), 3)
    monkeypatch.setattr(ridge, "HOST_BYTES", needs)
    kind(problem, kind.Config(**config))
    monkeypatch.setattr(ridge, "HOST_BYTES", needs - 1)
    with pytest.raises(InputError, match=r"^(features|projection): state and constants must take at most .*; "):
        kind(problem, kind.Config(**config))


@pytest.mark.parametrize("width", [30, 40, 60, 80])
def test_no_number_is_broken_on_a_narrow_terminal(capsys, folder, monkeypatch, width):
    wide = json.loads(good(capsys, "profile", "small_cnn", "--at", "pool", "--json"))
    monkeypatch.setenv("COLUMNS", str(width))
    text = good(capsys, "profile", "small_cnn", "--at", "pool")
    assert max(map(len, text.splitlines())) <= width
    learn = next(step for step in wide["steps"] if step["step"] == "learn")
    line = next(line for line in text.splitlines() if line.startswith("learn"))
    assert tables.si(sum(learn["canonical"].values())) in line
    assert all(f" {value:,}" in text for value in wide["ledger"].values() if isinstance(value, int))
    left_out = " ".join(text.split()).count("Left out at this width: ")
    assert left_out == (2 if width < 60 else 1 if width < 80 else 0)


def test_output_is_plain_when_piped(capsys, folder):
    assert "\x1b" not in good(capsys, "methods") + good(capsys, "profile", "small_cnn", "--at", "pool")


def test_progress_in_plain_lines_names_each_stage_once(capsys):
    with console.progress(quiet=False) as step:
        for done in range(3):
            step("counting", done, 3)
        step("writing", 0, 1)
    assert capsys.readouterr().err == "counting (0 of 3)\nwriting\n"
    with console.progress(quiet=True) as step:
        step("counting", 0, 3)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("width", [80, 100, 140])
def test_tables_lose_nothing(width):
    text = StringIO()
    console = Console(file=text, width=width)
    rows = [{"name": "parity", "found": "state 1e-07, " * 12}]
    console.print(tables.gates_table(rows))
    console.print(tables.ledger_table({"state": 123_456_789, "beyond_trunk": 5, "not_counted": "scratch"}))
    words = text.getvalue()
    assert words.count("1e-07") == 12 and "123,456,789" in words and "118 MiB" in words and "…" not in words
