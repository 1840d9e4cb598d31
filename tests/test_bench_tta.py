"""``edgecl bench tta``: its figures against plain loops over PyTorch's own batch norm, and a run that goes on where it was stopped."""

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgecl.backbones.resnet_cifar import ResNetCifar
from edgecl.bench import cells, tta
from edgecl.bench.adapting import BATCHES, RUNS, Entry, learner_of, saved_bytes
from edgecl.bench.jitter import jittered
from edgecl.bench.quick import GREY, colour_fashion
from edgecl.bench.tta import Plan, run_tta
from edgecl.bench.tta_tables import cost_table, error_tables
from edgecl.cli import main
from edgecl.engine import copies_on
from edgecl.figures import machine
from edgecl.streams import Corrupted
from edgecl_device.errors import InputError

torch.set_num_threads(1)
PLAN = Plan((12,), False, ("contrast", "pixelate"), 30, 2, 4, 2, ("source", "batch statistics", "TENT"))


def network() -> nn.Module:
    """Of six layers, random weights, statistics of its own."""
    net = ResNetCifar(1)
    with torch.no_grad():
        net.train()(GREY(torch.from_numpy(colour_fashion().x[:64])))
    return net.eval()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Any]:
    folder = tmp_path_factory.mktemp("bench")
    return run_tta(colour_fashion(), network(), GREY, PLAN, folder), folder


def error(net: nn.Module, seed: int) -> dict[str, float]:
    """Error in % of each corruption, in batches of 12, the last of 6."""
    data = colour_fashion()
    stream = Corrupted(
        type(data)(data.x, data.y, data.x_test[:30], data.y_test[:30], data.class_names), corruptions=["contrast", "pixelate"], seed=seed
    )
    wrong = {}
    for stretch in stream.stretches:
        x = GREY(torch.from_numpy(stream.images(stretch)))
        with torch.no_grad():
            guess = torch.cat([net(part).argmax(1) for part in x.split(12)])
        wrong[str(stretch.corruption[0])] = 100 * float((guess.numpy() != stream.dataset.y_test[stretch.index]).mean())
    return wrong


def test_errors_are_those_of_plain_loops(found: Any) -> None:
    rows = {row["label"]: row for row in found[0]["tables"]["batch 12"]}
    plain, batch = network(), copy.deepcopy(network())
    for module in batch.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    for label, net in (("source", plain), ("batch statistics", batch)):
        for seed in range(2):
            assert rows[label]["errors"][seed] == pytest.approx(np.mean(list(error(net, seed).values())))
    assert rows["TENT"]["by_corruption"].keys() == {"contrast", "pixelate"} and rows["TENT"]["error_sd"] is not None


def test_rounds_begin_with_the_first_pass(found: Any) -> None:
    rows = {row["label"]: row for row in found[0]["tables"]["batch 12, 2 passes"]}
    assert all(len(row["rounds"]) == 2 for row in rows.values())
    assert rows["source"]["rounds"][0] == rows["source"]["rounds"][1], "nothing moves it"


def test_a_second_run_computes_nothing_and_another_plan_is_refused(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    result, folder = found
    monkeypatch.setattr(tta, "in_batches", None)
    monkeypatch.setattr(tta, "profile", None)
    assert run_tta(colour_fashion(), network(), GREY, PLAN, folder) == result
    with pytest.raises(
        InputError, match=r"^--out: .* holds figures of other corruptions .*, images \(there 30, here 2000\), .*; choose another folder"
    ):
        run_tta(colour_fashion(), network(), GREY, Plan((10,)), folder)


def test_a_folder_that_lacks_nothing_is_read_of_whatever_version(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    result, folder = found
    monkeypatch.setattr(cells, "versions", lambda engine: {"torch": "1.0"})
    assert run_tta(colour_fashion(), network(), GREY, PLAN, folder) == result
    assert result["machine"] == machine() and result["versions"]["torch"] == torch.__version__
    with pytest.raises(InputError, match=r"^--out: .* holds figures of other versions"):
        run_tta(colour_fashion(), network(), GREY, replace(PLAN, seeds=3), folder)


def test_single_samples_alone(tmp_path: Path) -> None:
    plan = replace(PLAN, batches=(), single=True, seeds=1, run=1, entries=("source",))
    result = run_tta(colour_fashion(), network(), GREY, plan, tmp_path)
    assert list(result["tables"]) == ["batch 1", "batch 1, long runs of a class"] and result["costs"] == []
    for rows in result["tables"].values():
        assert rows[0]["by_corruption"] == pytest.approx(error(network(), 0))


def test_batches_on_copies_are_the_same(found: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on another device."""
    monkeypatch.setattr("edgecl.bench.adapting.parts_on", copies_on)
    again = run_tta(colour_fashion(), network(), GREY, replace(PLAN, seeds=1, rounds=0), tmp_path)
    rows = {row["label"]: row["errors"][0] for row in found[0]["tables"]["batch 12"]}
    assert {row["label"]: row["errors"][0] for row in again["tables"]["batch 12"]} == rows


def test_a_device_that_is_not_there_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^device: must be a device that PyTorch has here"):
        run_tta(colour_fashion(), network(), GREY, replace(PLAN, device="nowhere"), tmp_path / "bench")
    assert not (tmp_path / "bench").exists()


def test_a_batch_of_one_image_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^--images: must leave no batch of a single image, got 25 in batches of 12; take one less"):
        run_tta(colour_fashion(), network(), GREY, replace(PLAN, images=25), tmp_path / "bench")
    assert not (tmp_path / "bench").exists()


def test_a_state_to_start_from_that_was_altered_is_refused(found: Any, tmp_path: Path) -> None:
    folder = tmp_path / "bench"
    shutil.copytree(found[1], folder)
    (folder / "seed1" / "batch-12" / "tent.json").unlink()
    start = folder / "fitted" / "tent.pth"
    start.write_bytes(start.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"tent.pth: must be as 'source samples for tent' wrote it, it is gone or altered; delete .*json"):
        run_tta(colour_fashion(), network(), GREY, PLAN, folder)


def test_what_is_kept_for_the_backward_pass() -> None:
    """EcoTTA keeps less when no gradient passes its frozen parts, and the student of CoTTA, whose convolutions learn, the most."""
    data, z, kept = colour_fashion(), torch.randn(2, 16, 28, 28), {}
    for label in ("TENT", "EcoTTA, released", "EcoTTA, detached", "CoTTA, 8 views"):
        entry = next(entry for entry in BATCHES if entry.label == label)
        prepared = learner_of(entry, network(), GREY, data)
        kept[label] = saved_bytes(prepared.learner, prepared.state, torch.randn(2, 3, 28, 28) if label.startswith("CoTTA") else z)
    norms = 2 * 4 * 28 * 28 * (16 * 3 + 32 // 4 * 2 + 64 // 16 * 2)  # the input of each, of two images
    assert norms <= kept["TENT"] < 3 * norms
    assert kept["EcoTTA, detached"] < kept["EcoTTA, released"]
    assert kept["TENT"] < kept["CoTTA, 8 views"]
    assert saved_bytes(learner_of(Entry("", "bn_stats"), network(), GREY, data).learner, {}, z) == 0


def test_long_runs_are_adapted_to_from_balanced_rows() -> None:
    """Statistics that follow each sample, and the last rows, become those of one class."""
    data, net = colour_fashion(), network()
    for entry in RUNS:
        learner: Any = learner_of(entry, net, GREY, data).learner
        if learner.replay is None:
            assert entry.label in ("source", "BN-alpha .1") and learner.config.statistics == "source"
        else:
            assert (learner.replay.policy, learner.config.statistics) == ("balanced", "rows")


def test_augmentation_is_the_images_own() -> None:
    images = colour_fashion().x[:60].transpose(0, 2, 3, 1)
    made = jittered(images, seed=1)
    assert made.dtype == np.uint8 and np.array_equal(made, jittered(images, seed=1))
    assert np.array_equal(made[:7], jittered(images[:7], seed=1))
    changed = (made != images).any((1, 2, 3)).mean()  # of grey images neither saturation, hue nor grey shows
    assert 0.3 < changed < 0.75, "1 - 0.6 * 0.8 = 0.52"


def test_tables_and_command(found: Any, capsys: pytest.CaptureFixture[str]) -> None:
    titles = [table.title for table in error_tables(found[0])]
    assert titles == [
        "batch 12: mean error over corruptions of 30 images each",
        "batch 12, 2 passes: mean error over corruptions of 12 images each in pass 2",
    ]
    assert cost_table(found[0]).row_count == 3
    macs = {row["label"]: row["macs"] for row in found[0]["costs"]}
    forward = 28 * 28 * 16 * 27 + 28 * 28 * 2 * 16 * 144 + 14 * 14 * 32 * (144 + 288) + 7 * 7 * 64 * (288 + 576) + 640
    assert macs["source"] == forward
    assert macs["TENT"] == 2 * forward - 28 * 28 * 16 * 27, "no gradient goes through the convolution in front of the first norm"
    assert main(["bench", "tta"]) == 2
    assert "--data, --weights: must be given, or --quick" in capsys.readouterr().err


@pytest.mark.parametrize("only", ["", "batches", "singles"])
def test_the_command_runs_one_half_or_both(only: str, found: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plans: list[Plan] = []

    def run(data: Any, net: Any, preprocess: Any, plan: Plan, *rest: Any) -> dict[str, Any]:
        plans.append(plan)
        return dict(found[0])

    monkeypatch.setattr(tta, "run_tta", run)
    monkeypatch.setattr("edgecl.bench.quick.small_network", network)
    given = ["--only", only] if only else []
    assert main(["bench", "tta", "--quick", "--device", "cpu:0", "--out", str(tmp_path), *given]) == 0
    (plan,) = plans
    assert (bool(plan.batches), plan.single, plan.device) == (only != "singles", only != "batches", "cpu:0")
    assert [path.name for path in tmp_path.iterdir()] == [f"tta-{only}.json" if only else "tta.json"]
