"""``edgecl bench reprogram``: its figures against counts by hand and plain loops, and a run that goes on where it was stopped."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgecl.backbones import MobileNetV2
from edgecl.bench import reprogram
from edgecl.bench.quick import settled
from edgecl.bench.reprogram import Plan, run_reprogram, whole
from edgecl.bench.reprogram_tables import by_source, device_table, memory_table, task_table
from edgecl.bench.reprogram_tasks import CLASSES, Task, coloured, pictures, small_sequence
from edgecl.cli import main
from edgecl.preprocess import IMAGENET, ImageU8
from edgecl_device.errors import InputError

torch.set_num_threads(1)
PLAN = Plan(size=32, epochs=1, switches=4)


def tasks() -> tuple[list[Task], Task]:
    """Two, and one to choose by, of 18 training and 18 test images each."""
    (first, second, _), choice = small_sequence()
    few = [
        dataclasses.replace(task, x=task.x[::4], y=task.y[::4], x_test=task.x_test[::2], y_test=task.y_test[::2])
        for task in (first, second, choice)
    ]
    return few[:2], few[2]


def network() -> nn.Module:
    net = whole(MobileNetV2(CLASSES, width=0.1, generator=torch.Generator().manual_seed(0)), CLASSES)
    settled(net, ImageU8(*IMAGENET, "CHW", (32, 32))(torch.from_numpy(tasks()[0][0].x)))
    return net


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reprogram, "ROWS", [row for row in reprogram.ROWS if row.label != "CLR"])
        return run_reprogram(network(), *tasks(), PLAN, folder), folder


def test_bytes_a_task_are_counted(found: Any) -> None:
    rows, net = {row["row"]: row for row in found[0]["rows"]}, network()
    floats = sum(t.numel() for t in net.state_dict().values() if t.is_floating_point())
    assert rows["fine-tuned copy"]["bytes_a_task"] == 4 * floats
    d = 1280
    assert rows["linear head"]["bytes_a_task"] == 4 * (CLASSES * d + CLASSES + CLASSES)  # weights, biases, counts
    assert rows["CLR, last stages"]["bytes_a_task"] < rows["fine-tuned copy"]["bytes_a_task"]


def test_a_rate_is_chosen_on_the_other_task(found: Any) -> None:
    result, folder = found
    choice = reprogram.as_file(result["choice"])
    for row in (row for row in reprogram.ROWS if row.label != "CLR"):
        cells = {
            rate: json.loads((folder / reprogram.as_file(row.label) / f"{choice} {rate:g}.json").read_text())["accuracy"]
            for rate in row.rates
        }
        chosen = next(r["rate"] for r in result["rows"] if r["row"] == row.label)
        assert cells[chosen] == max(cells.values())


def test_tasks_on_the_device_stay_to_the_bit(found: Any) -> None:
    (row,) = found[0]["device"]
    assert row["bits_equal"] is True
    assert 0 <= row["identified_by_1"] <= 1 and row["switch_ms"]["worst"] >= row["switch_ms"]["median"] > 0


def test_a_second_run_computes_nothing_and_other_tasks_are_refused(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    result, folder = found
    monkeypatch.setattr(reprogram, "ROWS", [row for row in reprogram.ROWS if row.label != "CLR"])
    monkeypatch.setattr(reprogram, "prepare", None)
    assert run_reprogram(network(), *tasks(), PLAN, folder) == result
    with pytest.raises(InputError, match=r"^--out: .* holds figures of other tasks \(there .*, here .*\); choose another folder"):
        run_reprogram(network(), tasks()[0][:1], tasks()[1], PLAN, folder)


def test_a_trained_task_that_is_gone_is_named(found: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "bench"
    shutil.copytree(found[1], folder)
    monkeypatch.setattr(reprogram, "ROWS", [row for row in reprogram.ROWS if row.label != "CLR"])
    (device,) = (folder / "device").glob("*.json")
    device.unlink()
    (gone, *_) = sorted((folder / "clr--last-stages").glob(f"{reprogram.as_file(tasks()[0][0].name)} *.safetensors"))
    gone.unlink()
    with pytest.raises(
        InputError, match=r"\.safetensors: must be as 'CLR, last stages: .* wrote it, it is gone or altered; delete .*\.json"
    ):
        run_reprogram(network(), *tasks(), PLAN, folder)


def test_tables_and_command(found: Any, capsys: pytest.CaptureFixture[str]) -> None:
    result = found[0]
    assert [table.row_count for table in (task_table(result), device_table(result), memory_table(result))] == [4, 1, 4]
    row = {"accuracies": [0.5, 0.25]}
    assert by_source({"tasks": [{"source": "a"}, {"source": "a"}]}, row) == {"a": 0.375}
    assert main(["bench", "reprogram"]) == 2
    assert "--data, --weights: must be given, or --quick" in capsys.readouterr().err


def test_sounds_and_grey_images_become_images() -> None:
    grey = np.full((1, 28, 28), 200, np.uint8)
    made = coloured(grey)
    assert made.shape == (1, 3, 32, 32) and made[0, 0, 2:30, 2:30].min() == 200 and made.sum() == 3 * 200 * 28 * 28
    energies = np.array([[[[8.0, -16.0], [-4.0, 20.0]]]], np.float32)  # loudest, silence, between, louder still
    assert set(np.unique(pictures(energies))) == {0, 127, 255}
