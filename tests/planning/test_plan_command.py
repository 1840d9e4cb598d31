"""The command ``edgecl plan``."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from edgecl.cli import main
from edgecl.options import parse_bytes, parse_count
from edgecl.runs import read_config, run
from edgecl_device.errors import InputError

CONFIG = """
data = { name = "windows", path = "windows.npz" }
scenario = { name = "class-incremental", base_classes = [0, 1, 2], steps = [[3], [4]] }
model = { name = "net.py:build", pretrain = { epochs = 3, lr = 0.02 } }
learner = { method = "latent_replay", at = "2", config = { lr = 0.05, rows_per_step = 4, loss = "er-ace", codec = "packed" } }
device = { seeds = [3] }
"""
NET = """
from torch import nn

def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 5))
"""


@pytest.fixture
def config(small, tmp_path):
    data = small.windows()
    np.savez(tmp_path / "windows.npz", x=data.x, y=data.y, x_test=data.x[:5], y_test=data.y[:5], class_names=np.array(data.class_names))
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "run.toml").write_text(CONFIG)
    return tmp_path / "run.toml"


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(config, tmp_path, capsys):
    wrong = {
        ("--plot", str(tmp_path / "a.pdf")): f"--plot: must end in .png, got {tmp_path / 'a.pdf'}; name such a file",
        ("--plot", str(tmp_path / "folder.png")): f"--plot: {tmp_path / 'folder.png'} exists",
        ("--write", str(config)): f"--write: {config} exists",
        ("--write", "x" * 300): "cannot be written (File name too long)",
        ("--plot", str(tmp_path / "gone" / "a.png")): "--plot: must lie in an existing folder",
        ("--plot", str(tmp_path / "a.png"), "--write", str(tmp_path / "a.png")): "--plot, --write: must be two files",
    }
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "windows.npz").unlink()  # whoever comes to the data fails otherwise
    for options, words in wrong.items():
        assert main(["plan", str(config), *options]) == 2
        assert words in capsys.readouterr().err
    assert config.read_text() == CONFIG


def test_plan_is_shown_drawn_and_written_and_runs(config, tmp_path, capsys):
    other = tmp_path / "elsewhere"
    other.mkdir()
    plot, written = tmp_path / "plan.png", other / "planned.toml"
    methods = ["--method", "latent_replay", "--at", "2", "--orders", "1"]
    assert main(["plan", str(config), "--ram", "2KiB", *methods, "--json", "--plot", str(plot), "--write", str(written)]) == 0
    found = json.loads(capsys.readouterr().out)
    best = found["front"][found["recommended"]]
    assert best["ram"] <= 2048 and best["replay_rows"] > 0 and best["config"]["loss"] == "er-ace" and found["pending"] == 1
    assert imread(plot)[..., :3].std() > 0.05

    done = run(read_config(written), written, other / "planned.run")
    learner = done["learners"][0]
    assert learner["profile"]["config"] == best["config"]
    assert learner["ledger"] == best["ledger"]

    assert main(["plan", str(config), "--ram", "2KiB", *methods, "--seconds", "0", "--write", str(written)]) == 2
    assert "--write: " in capsys.readouterr().err
    assert main(["plan", str(config), "--method", "ncm", "--at", "2", "--orders", "1"]) == 0
    out = capsys.readouterr().out
    assert "1 *" in out and "ncm" in out and "25 held-out training samples" in out


def test_a_refusal_is_one_line_and_exit_code_2(config, capsys):
    assert main(["plan", str(config), "--ram", "100", "--macs", "5k", "--method", "ncm", "--at", "2"]) == 2
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert out == "" and last.startswith("edgecl: --ram 100 B, --macs 5.00 k: must allow some learner, none fits; nearest: --ram ")
    assert "(ncm at 2)" in last


@pytest.mark.parametrize(
    "wrong", [["--ram", "-5"], ["--flash", "nan"], ["--macs", "5 Mi"], ["--macs", "-1"], ["--ram", "1e3"]], ids=" ".join
)
def test_wrong_sizes_are_named(wrong, capsys):
    assert main(["plan", f"{wrong[0]}={wrong[1]}"]) == 2
    assert capsys.readouterr().err.startswith(f"edgecl: {wrong[0]}: must be ")


@pytest.mark.parametrize(
    "wrong", [["--method", "joint"], ["--method", "none"], ["--at", "9"], ["--plot", "no/such/folder.png"]], ids=" ".join
)
def test_wrong_choices_are_named(config, wrong, capsys):
    assert main(["plan", str(config), "--method", "ncm", *wrong] if wrong[0] != "--method" else ["plan", str(config), *wrong]) == 2
    assert wrong[1] in capsys.readouterr().err


@given(
    st.one_of(
        st.text(max_size=12),
        st.floats().map(str),
        st.integers().map(str),
        st.builds("{}{}".format, st.integers(), st.sampled_from(["k", "Mi", "MiB", "GB", " T", "x", ".5", "e3"])),
    )
)
def test_sizes_are_counts_or_refused(text):
    for option, parse in (("--ram", parse_bytes), ("--macs", parse_count)):
        try:
            value = parse(option, text)
        except InputError as error:
            assert str(error).startswith(f"{option}: must be ")
        else:
            assert value >= 0 and isinstance(value, int)
            assert not text.strip().startswith("-") and "nan" not in text and "inf" not in text


@given(st.integers(0, 10**12), st.sampled_from(["", "k", "K", "M", "G", "T"]))
def test_counts_are_exact(number, unit):
    assert parse_count("--macs", f"{number}{unit}") == number * 1000 ** " kMGT".index(unit.replace("K", "k") or " ")
