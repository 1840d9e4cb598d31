"""A run is what the parts give, and goes on from wherever a process was killed to the same bits."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from edgecl import cli
from edgecl.evaluate import run_stream
from edgecl.planning.source import source_of
from edgecl.runs import read_config, run
from edgecl.runs.budget import check_budget
from edgecl.runs.config import parse
from edgecl.runs.files import locked
from edgecl.runs.model import build
from edgecl.streams import ClassIncremental, load_windows
from edgecl_device import Learner
from edgecl_device.errors import InputError, UpdateRefusedError
from edgecl_device.manifest import read_manifest

KILLER = """
import os, signal, sys
from pathlib import Path

import torch._dynamo  # once, and not in every child

import edgecl.runs.model as model
import edgecl.runs.stages as runs
import edgecl_export.bundle as bundle
from edgecl.runs.config import read_config
from edgecl.runs.trail import Trail
from edgecl.tally import ClassTally
from edgecl_device import Learner

config, folder = Path(sys.argv[1]), Path(sys.argv[2])

def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

def tear(trail, entry):
    trail._file.write('{"predi')
    trail._file.flush()
    die()

def at(n, call, before=None, after=None):
    '''The n-th call is led or followed by the end of the process.'''
    count = iter(range(1, 1 << 30))
    def wrapped(*arguments, **options):
        hit = next(count) == n
        if hit and before:
            before(*arguments, **options)
        result = call(*arguments, **options)
        return die() if hit and after else result
    return wrapped

POINTS = [  # the first learner has 40 samples to learn
    (model, "save_network", 1, None, die),
    (bundle, "place", 1, die, None),
    (Learner, "learn", 7, die, None),
    (Learner, "learn", 5, None, die),
    (Trail, "add", 4, tear, None),
    (ClassTally, "test", 1, die, None),
    (ClassTally, "result", 1, die, None),
    (Learner, "learn", 15, None, die),
    (runs, "summarise", 1, die, None),
]
for owner, name, n, before, after in POINTS:
    child = os.fork()
    if child == 0:
        setattr(owner, name, at(n, getattr(owner, name), before, after))
        runs.run(read_config(config), config, folder)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, (name, n)
"""


def states(folder):
    """State and rows at the end of every learner's run, to the bit; sample ids apart, which never come again after a kill."""
    found = {}
    for store in sorted(folder.glob("seed*/*/store.db")):
        with Learner.load(store.parent / "bundle", store) as learner:
            for name, array in {**learner.state(), **learner.rows()}.items():
                if name != "replay.sample_id":
                    found[f"{store.parent.name}.{name}"] = (array.dtype.str, array.shape, array.tobytes())
    return found


def test_a_run_killed_at_nine_points_ends_in_the_same_bits(config, whole, small):
    folder = config.with_suffix(".run")
    done = subprocess.run([sys.executable, "-c", KILLER, config, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not (folder / "run.json").exists()
    found = run(read_config(config), config, folder)
    assert small.counted(json.loads(json.dumps(found))) == small.counted(json.loads((whole / "run.json").read_text()))
    copy = folder.parent / "copy.run"
    shutil.copytree(whole, copy)  # a store that is opened is written to
    assert states(folder) == states(copy)
    assert not list(folder.rglob(".edgecl-new-*")) and not list(folder.rglob("*.new"))


def test_figures_are_those_of_the_plain_loop(whole):
    result = json.loads((whole / "run.json").read_text())
    stream = ClassIncremental(load_windows(whole.parent / "windows.npz"), [0, 1, 2], [[3], [4]], seed=0)
    for row in result["learners"]:
        with Learner.load(whole / "seed0" / row["label"] / "bundle") as learner:
            plain = run_stream(learner, stream, every=10)
        assert row["matrix"] == plain.matrix.values.tolist() and row["curve"] == plain.curve
        assert (row["accuracy"], row["prequential"]) == (plain.accuracy, plain.prequential)
        assert row["refused"] == 0
    assert result["learners"][0]["accuracy"] > 0.8
    assert result["samples"] == {"base": 60, "stream": 40, "test": [30]}
    tasks = result["tasks_by_seed"][0]
    assert [(task["name"], task["first_sample"]) for task in tasks] == [("3 base classes", 0), ("climb", 0), ("fall", 20)]


def test_costs_are_the_bundles(whole):
    for row in json.loads((whole / "run.json").read_text())["learners"]:
        manifest = json.loads((whole / "seed0" / row["label"] / "bundle" / "manifest.json").read_text())
        assert row["ledger"] == manifest["ledger"] and row["bytes"] == manifest["ledger"]["beyond_trunk"]
        steps = {step["step"]: step for step in row["profile"]["steps"]}
        assert {name: sum(step["canonical"].values()) for name, step in steps.items()} == {
            name: step["canonical_macs"] for name, step in manifest["steps"].items()
        }
        assert row["update_macs"] == sum(steps["learn"]["canonical"].values())


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("every = 10", "every = 5", "device.every was 10, is 5"),
        ("lr = 0.05", "lr = 0.04", "learner[1].config.lr was 0.05, is 0.04"),
        ("steps = [[3], [4]]", "steps = [[4], [3]]", "scenario.steps was [[3], [4]], is [[4], [3]]"),
    ],
)
def test_another_configuration_is_refused(config, whole, old, new, said):
    folder = config.with_suffix(".run")
    shutil.copytree(whole, folder)
    config.write_text(config.read_text().replace(old, new))
    with pytest.raises(InputError) as error:
        run(read_config(config), config, folder)
    assert said in str(error.value) and "--fresh" in str(error.value)


def test_other_data_and_another_model_are_refused(config, whole, small):
    folder = config.with_suffix(".run")
    shutil.copytree(whole, folder)
    arrays = small.windows()
    arrays["x"][0, 0, 0] += 1
    np.savez(config.with_name("windows.npz"), **arrays)
    config.with_name("net.py").write_text(small.NET + "\n")
    with pytest.raises(InputError, match=r"data\.sha256 was .* files\.model\.name was "):
        run(read_config(config), config, folder)


def test_a_damaged_result_is_one_error(config, whole, tmp_path, capsys):
    damaged = tmp_path / "damaged.run"
    shutil.copytree(whole, damaged)
    (damaged / "run.json").write_text("{}")
    assert cli.main(["run", str(config), "--out", str(damaged)]) == 2
    assert "run.json must be as edgecl run writes it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("cost.json", b'{"ridge": 3, "replay": {}}', "cost.json: must be as the run wrote it, .* --fresh"),
        ("seed0/network.json", b"{}", "network.json: must be as the run wrote it, .* --fresh"),
        ("seed0/network.pth", b"PK", "network.pth: must hold the network of SHA-256 .*, got not a readable weight file .* --fresh"),
        ("seed0/network.pth", None, "network.pth: must hold the network of SHA-256 [0-9a-f]{64}, got [0-9a-f]{64}; .* --fresh"),
        ("seed0/ridge/result.json", b"{}", "result.json: must be as the run wrote it, .* --fresh"),
        ("seed0/ridge/store.db", b"x" * 600, "ridge: must be as the run left it, got .*is no store.*; delete that folder, or .* --fresh"),
        ("seed0/ridge/bundle/state.safetensors", b"x", "ridge: must be as the run left it, got .*SHA-256 differs.*; delete that folder"),
    ],
)  # fmt: skip
def test_a_damaged_file_of_a_run_is_one_error_with_its_mend(config, whole, name, content, said):
    folder = config.with_suffix(".run")
    shutil.copytree(whole, folder)
    (folder / "run.json").unlink()
    if not name.endswith("result.json"):
        (folder / "seed0" / "ridge" / "result.json").unlink()
    if name == "seed0/network.pth":
        shutil.rmtree(folder / "seed0" / "ridge")
    if content is None:
        weights = torch.load(folder / name)
        torch.save({key: value + 1 for key, value in weights.items()}, folder / name)
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=said):
        run(read_config(config), config, folder)


@pytest.mark.parametrize("name", ["cost.json", "seed0/network.json", "seed0/ridge/bundle.json", "seed0/ridge/result.json"])
def test_a_changed_digit_of_a_stage_is_not_gone_on_with(config, whole, name):
    folder = config.with_suffix(".run")
    shutil.copytree(whole, folder)
    (folder / "run.json").unlink()
    if name.endswith("bundle.json"):
        (folder / "seed0/ridge/result.json").unlink()
    text = (folder / name).read_text()
    at = re.search("[1-8]", text).start()
    (folder / name).write_text(f"{text[:at]}{int(text[at]) + 1}{text[at + 1 :]}")
    with pytest.raises(InputError, match=rf"{name}: must be as the run wrote it, .*; run it again with --fresh"):
        run(read_config(config), config, folder)


def test_a_store_in_use_is_not_to_be_deleted(config, whole):
    folder = config.with_suffix(".run")
    shutil.copytree(whole, folder)
    for path in (folder / "run.json", folder / "seed0" / "ridge" / "result.json"):
        path.unlink()
    in_use = Learner.load(folder / "seed0/ridge/bundle", folder / "seed0/ridge/store.db")
    with in_use, pytest.raises(InputError, match="another learner has it open; close that one"):
        run(read_config(config), config, folder)


def test_a_task_without_a_test_is_refused_before_anything_is_trained(config, small):
    arrays = small.windows()
    left = arrays["y_test"] != 4
    np.savez(config.with_name("windows.npz"), **{**arrays, "x_test": arrays["x_test"][left], "y_test": arrays["y_test"][left]})
    folder = config.with_suffix(".run")
    with pytest.raises(InputError, match=r"every task must have a test sample, got none in \[2\]"):
        run(read_config(config), config, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.toml", "lock.db", "start.json"]


def test_a_title_may_change_and_fresh_starts_anew(config, whole):
    folder = config.with_suffix(".run")
    shutil.copytree(whole, folder)
    config.write_text(config.read_text() + '\n[report]\ntitle = "Windows"\n')
    before = (folder / "seed0" / "ridge" / "result.json").stat().st_mtime_ns
    assert run(read_config(config), config, folder)["title"] == "Windows"
    assert (folder / "seed0" / "ridge" / "result.json").stat().st_mtime_ns == before
    text = config.read_text()
    config.write_text(text[: text.index("[[learner]]\nlabel")] + "[device]\nevery = 20\nstore = false\n")
    (folder / "notes.txt").write_text("mine")
    (folder / "seed8").write_text("no folder")
    (folder / "seed9").symlink_to(folder / "nowhere")
    found = run(read_config(config), config, folder, fresh=True)
    assert (folder / "notes.txt").read_text() == "mine"
    assert not (folder / "seed8").exists() and not (folder / "seed9").is_symlink()
    assert [row["label"] for row in found["learners"]] == ["ridge"] and not (folder / "seed0" / "replay").exists()
    assert not (folder / "seed0" / "ridge" / "store.db").exists()


def test_fresh_takes_nothing_from_a_seed_that_was_moved_elsewhere(config, whole, tmp_path):
    folder = config.with_suffix(".run")
    shutil.copytree(whole, folder)
    shutil.move(folder / "seed0", tmp_path / "moved")
    (folder / "seed0").symlink_to(tmp_path / "moved")
    text = config.read_text()
    config.write_text(text[: text.index("[[learner]]\nlabel")].replace("epochs = 3", "epochs = 1") + "[device]\nevery = 20\n")
    found = run(read_config(config), config, folder, fresh=True)
    before = json.loads((whole / "run.json").read_text())
    assert found["networks"] != before["networks"] and found["learners"][0]["matrices"] != before["learners"][0]["matrices"]
    assert not (folder / "seed0").is_symlink() and (tmp_path / "moved" / "ridge" / "result.json").exists()


def test_fresh_that_was_killed_leaves_nothing_that_another_configuration_takes(config, whole, monkeypatch):
    folder = config.with_suffix(".run")
    shutil.copytree(whole, folder)

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        run(read_config(config), config, folder, fresh=True)
    config.write_text(config.read_text().replace("every = 10", "every = 5"))
    with pytest.raises(InputError, match=r"holds a run of something else: device\.every was 10, is 5"):
        run(read_config(config), config, folder)
    (folder / "start.json").unlink()
    with pytest.raises(InputError, match=r"must hold start\.json beside results, got .*seed0 without it; pass --fresh to delete them"):
        run(read_config(config), config, folder)


def test_a_folder_of_something_else_and_one_in_use_are_refused(config, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    for fresh in (False, True):
        with pytest.raises(InputError, match="holds no run; choose another folder"):
            run(read_config(config), config, tmp_path / "other", fresh=fresh)
    assert (tmp_path / "other" / "thesis.txt").read_text() == "years of work"
    with locked(tmp_path / "busy"), pytest.raises(InputError, match="another process works in"):
        run(read_config(config), config, tmp_path / "busy")
    for name, make in (("junk", lambda path: path.write_bytes(b"x" * 600)), ("folder", lambda path: path.mkdir())):
        (tmp_path / name).mkdir()
        make(tmp_path / name / "lock.db")
        with pytest.raises(InputError, match=r"--out: .*lock\.db must be a file to lock, got an error \(.*\); delete it"):
            run(read_config(config), config, tmp_path / name)
    with pytest.raises(InputError, match=r"--out: .*cannot be made \(Not a directory\); choose another"):
        run(read_config(config), config, config / "inside")


@pytest.mark.parametrize("path", [".", "/", ""])
def test_what_is_no_file_is_named_as_the_configuration(path, capsys):
    assert cli.main(["run", path]) == 2
    assert capsys.readouterr().err == f"edgecl: CONFIG: {path or '.'} cannot be read (Is a directory); name a TOML file\n"


def test_an_example_that_cannot_be_written_names_its_parameter(tmp_path, capsys):
    assert cli.main(["run", "--init", str(tmp_path / "none" / "x.toml")]) == 2
    assert re.match(r"edgecl: CONFIG: .*x\.toml cannot be written \(No such file or directory\); name a file", capsys.readouterr().err)


def test_a_device_to_train_on_is_not_confused_with_the_table_device(config):
    config.write_text(config.read_text().replace("epochs = 3", 'epochs = 3\ndevice = "meta"'))
    with pytest.raises(InputError, match=r"^model\.pretrain\.device: must be a device that PyTorch has here"):
        run(read_config(config), config, config.with_suffix(".run"))


def budgeted(config, **budget):
    """The error of a run under a budget, and what was trained meanwhile: nothing."""
    folder = config.with_suffix(".run")
    config.write_text(config.read_text() + "\n[budget]\n" + "".join(f"{key} = {value!r}\n" for key, value in budget.items()))
    with pytest.raises(InputError) as error:
        run(read_config(config), config, folder)
    assert not list(folder.glob("seed*"))
    return str(error.value)


def test_a_budget_is_refused_before_anything_runs_and_its_mend_fits(config, whole):
    ledger = {row["label"]: row["ledger"] for row in json.loads((whole / "run.json").read_text())["learners"]}
    limit = ledger["replay"]["beyond_trunk"] - 500
    message = budgeted(config, beyond_trunk=limit)
    assert message.startswith(f"learner 'replay': budget.beyond_trunk: must be at least {limit + 500:,}, got {limit:,} (ledger: state ")
    assert f"replay {ledger['replay']['replay']:,}, activations_peak " in message and "pending_features 10,240 bytes; " in message
    capacity = int(message.split("config.capacity_bytes = ")[1].split(",")[0])
    assert capacity < 2048
    config.write_text(config.read_text().replace("capacity_bytes = 2048", f"capacity_bytes = {capacity}"))
    read = read_config(config)
    data = load_windows(config.with_name("windows.npz"))
    found = check_budget(read, read.learner[1], "replay", build(read, data, torch.Generator()), data, data.x)
    assert limit - 100 < found.ledger["beyond_trunk"] <= limit


def test_a_budget_names_a_cut_further_down(config):
    config.write_text(config.read_text().replace('at = "2"', 'at = "0"', 1))  # 12 features instead of 10
    message = budgeted(config, update_macs=350)
    assert message.startswith("learner 'ridge': budget.update_macs: must be at least ") and "cut at '1' (" in message


def undone(config, whole, label):
    """A copy of the whole run, without the device run of one learner."""
    folder = config.with_suffix(".run")
    shutil.copytree(whole, folder)
    for path in (folder / "run.json", *(folder / "seed0" / label / name for name in ("result.json", "trail.jsonl", "store.db"))):
        path.unlink()
    return folder


def test_a_refused_update_is_counted_and_the_stream_goes_on(config, whole, monkeypatch):
    folder = undone(config, whole, "ridge")
    learn, count = Learner.learn, iter(range(1000))

    def sometimes(self, *arguments):
        if next(count) % 8 == 3:
            raise UpdateRefusedError("learn: refused")
        return learn(self, *arguments)

    monkeypatch.setattr(Learner, "learn", sometimes)
    assert run(read_config(config), config, folder)["learners"][0]["refused"] == 5
    with Learner.load(folder / "seed0/ridge/bundle", folder / "seed0/ridge/store.db") as learner:
        assert learner.report()["learned"] == 35


def test_a_trail_that_lacks_a_line_starts_the_stream_again(config, whole, small):
    folder = config.with_suffix(".run")
    shutil.copytree(whole, folder)
    for path in (folder / "run.json", folder / "seed0" / "ridge" / "result.json"):
        path.unlink()
    trail = folder / "seed0" / "ridge" / "trail.jsonl"
    lines = trail.read_text().splitlines(keepends=True)
    at = next(n for n, line in enumerate(lines) if '"sample": 20,' in line)
    trail.write_text("".join(lines[:at] + lines[at + 1 :]))
    found = run(read_config(config), config, folder)
    assert small.counted(json.loads(json.dumps(found))) == small.counted(json.loads((whole / "run.json").read_text()))
    with Learner.load(folder / "seed0/ridge/bundle", folder / "seed0/ridge/store.db") as learner:
        assert learner.report()["learned"] == 40


def test_ctrl_c_leaves_a_run_that_goes_on(config, whole, capsys, monkeypatch, small):
    folder = undone(config, whole, "replay")

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("edgecl.tally.ClassTally.test", stop)
        assert cli.main(["run", str(config)]) == 130
    assert f"Go on with: edgecl run {config}" in capsys.readouterr().err
    assert cli.main(["run", str(config), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert small.counted(found) == small.counted(json.loads((whole / "run.json").read_text()))
    assert (folder / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ("CHW", r"mean, std: must have one value for each of the image's 2 channels, got 1; "),
        ("HWC", r"layout: must name the axes of one image, got \[2, 6\] of the data set's samples \(.*\); "),
    ],
)
def test_a_normalisation_that_does_not_suit_the_samples_is_named_by_itself(config, layout, said):
    """Not by the learner that would have been the first to be prepared with it."""
    config.write_text(
        config.read_text().replace("[model.pretrain]", f"[model.preprocess]\n{layout=}\nmean = [0.5]\nstd = [0.5]\n[model.pretrain]")
    )
    with pytest.raises(InputError, match=rf"^model\.preprocess\.{said}"):
        run(read_config(config), config, config.with_suffix(".run"))
    with pytest.raises(InputError, match=rf"^model\.preprocess\.{said}"):
        source_of(read_config(config), 40, lambda *_: None)


def test_a_trunk_in_int8_is_calibrated_on_the_base_set(config, whole):
    config.write_text(config.read_text().replace('at = "2"', 'at = "2"\ntrunk_dtype = "int8"', 1))
    folder = config.with_suffix(".int8")
    run(read_config(config), config, folder)
    float32, int8 = (read_manifest(place / "seed0" / "ridge" / "bundle") for place in (whole, folder))
    assert int8.ledger["frozen_weights"] < float32.ledger["frozen_weights"]
    other, same = (read_manifest(place / "seed0" / "replay" / "bundle").bundle_id for place in (whole, folder))
    assert other == same
    text = config.read_text().replace("base_classes = [0, 1, 2]", "base_classes = []").replace("steps = [[3]", "steps = [[0, 1, 2], [3]")
    config.write_text(text.replace("[model.pretrain]\nepochs = 3\nlr = 0.02\n", ""))
    with pytest.raises(InputError, match=r"^learner\[0\].trunk_dtype: must be left out without a base set"):
        run(read_config(config), config, config.with_suffix(".none"))


def test_a_run_where_joint_has_nothing_right_lacks_omega_all(config, small):
    arrays = small.windows()
    wrong = np.array([1, 2, 0, 3, 4])  # the tests of the base classes
    np.savez(config.with_name("windows.npz"), **{**arrays, "y_test": wrong[arrays["y_test"]]})
    joint = '[[learner]]\nmethod = "joint"\nat = "2"\nconfig = { epochs = 60, lr = 0.03 }\n[device]\nomega_all = true\n'
    config.write_text(config.read_text().replace("[device]\n", joint))
    ridge = run(read_config(config), config, config.with_suffix(".run"))["learners"][0]
    assert json.loads((config.with_suffix(".run") / "seed0/joint/result.json").read_text())["seen_accuracy"][0] == 0
    assert ridge["accuracy"] > 0 and "omega_all" not in ridge and "omega_all" not in ridge["metrics"]


def test_a_stream_from_nothing_with_offline_training_and_tasks_known(config):
    values = {
        "data": {"name": "windows", "path": "windows.npz"},
        "scenario": {"name": "task-incremental", "base_classes": [], "steps": [[0, 1], [2, 3, 4]]},
        "model": {"name": "net.py:build"},
        "learner": [{"method": "ncm", "at": "2"}, {"method": "joint", "at": "2", "config": {"epochs": 60, "lr": 0.03}}],
        "device": {"every": 25, "test_samples": 5, "seeds": [3, 4], "omega_all": True},
    }
    found = run(parse(values, config.parent), config, config.with_suffix(".run"))
    ncm, joint = found["learners"]
    assert [task["test_samples"] for task in found["tasks_by_seed"][1]] == [5, 5] and found["samples"]["base"] == 0
    assert len(ncm["matrices"]) == 2 and ncm["accuracy_sd"] >= 0 and "forward_transfer" in ncm
    assert joint["role"] == "offline" and joint["accuracy"] > 0.7 and ncm["joint"] == "joint"
    seen = [[m[0][0], (m[1][0] + m[1][1]) / 2] for m in ncm["matrices"]]  # two tasks of 5 test samples
    offline = [json.loads((config.with_suffix(".run") / f"seed{seed}/joint/result.json").read_text())["seen_accuracy"] for seed in (3, 4)]
    assert offline[0][1] > 0.7
    assert ncm["omega_all"] == pytest.approx(np.mean(np.array(seen) / offline)) and "omega_all" in ncm["metrics"]
    for learners in (values["learner"][:1], values["learner"][1:], [values["learner"][0], {**values["learner"][1], "at": "1"}]):
        with pytest.raises(InputError, match=r"device\.omega_all: must be false without a learner of method joint at another one's place"):
            parse({**values, "learner": learners}, config.parent)
    values["learner"], values["device"]["omega_all"] = [{"method": "latent_replay", "at": "2"}], False
    with pytest.raises(InputError, match=r"learner\[0\]\.config\.codec: must be 'float32' without a base set"):
        run(parse(values, config.parent), config, config.parent / "replay.run")
    values["model"]["pretrain"] = {}
    with pytest.raises(InputError, match=r"model\.pretrain: must have a base set"):
        run(parse(values, config.parent), config, config.parent / "pretrained.run")
