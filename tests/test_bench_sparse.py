"""``edgecl bench sparse``: its figures against hand-worked ones, and a run that goes on where it was stopped."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from edgecl.bench import sparse
from edgecl.bench.quick import colour_squares
from edgecl.bench.sparse import Plan, cases, run_sparse
from edgecl.bench.sparse_step import measure
from edgecl.bench.sparse_tables import accuracy_table, nominal_table, step_table
from edgecl.cli import main
from edgecl_device.errors import InputError

torch.set_num_threads(1)
COSTS = {"seconds": 1, "gate_macs": 5, "update_macs": 7}
CASES = ("dense, er", "structured 75%, er")
PLAN = Plan("resnet8", 1, 1, 64 << 10, 2, (), ((0.75, 1),), 1, CASES)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("bench")
    return run_sparse(colour_squares(40), colour_squares(40), PLAN, folder), folder


def test_every_part_can_be_left_out() -> None:
    names = set(cases())
    assert {"dense, er", "dense, der++"} < names and len(names) == 16
    for granularity in ("structured", "unstructured"):
        for without in ("no DGM", "no DDR", "no DGM, no DDR"):
            assert f"{granularity} 75%, {without}, er" in names
    assert cases()["structured 75%, no DGM, er"]["gradient_sparsity"] == 0.75
    assert cases()["structured 75%, no DDR, er"]["skip_above"] == 1.0


def test_costs_and_figures_of_cases(found: Any) -> None:
    dense, structured = found[0]["rows"]
    forward = 9 * (32 * 32 * (27 * 16 + 2 * 144 * 16) + 16 * 16 * 32 * (144 + 288) + 8 * 8 * 64 * (288 + 576) + 640)
    first = 9 * 32 * 32 * 27 * 16  # needs no input gradient
    assert dense["update_macs"] == dense["sample_macs"] == 3 * forward - first
    assert structured["update_macs"] < 0.4 * dense["update_macs"]
    assert structured["gate_macs"] < 3 * forward / 27 and dense["gate_macs"] == 0  # of one image, narrower
    assert structured["sample_macs"] == round(structured["gate_macs"] + structured["learned"] * structured["update_macs"])
    assert structured["beyond_trunk"] < dense["beyond_trunk"]
    assert dense["memory_rows"] == structured["memory_rows"] == (64 << 10) // (3 * 32 * 32 + 8) - 8  # the rows of an update take room, too
    assert dense["difference"] is None and structured["difference"] == pytest.approx(structured["accuracy"] - dense["accuracy"])
    assert 0 <= structured["learned"] <= dense["learned"] == 1


def test_differences_are_paired_and_have_students_interval() -> None:
    def of(*accuracies: float) -> list[dict[str, Any]]:
        keys = ("average_incremental_accuracy", "forgetting", "learned")
        return [{"accuracy": a, **dict.fromkeys(keys, 0.0)} for a in accuracies]

    row = sparse._summary("structured 75%, er", {"dense, er": of(0.5, 0.6, 0.4), "structured 75%, er": of(0.52, 0.6, 0.41)}, COSTS)
    mean, sd = 0.01, 0.01  # of 0.02, 0, 0.01
    assert row["difference"] == pytest.approx(mean)
    assert row["interval"] == pytest.approx([mean - 4.302653 * sd / 3**0.5, mean + 4.302653 * sd / 3**0.5])
    assert "seconds" not in row


def test_a_second_run_computes_nothing_and_another_plan_is_refused(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    result, folder = found
    for name in ("prepare", "run_stream", "train", "capture"):
        monkeypatch.setattr(sparse, name, None)
    assert run_sparse(colour_squares(40), colour_squares(40), PLAN, folder) == result
    with pytest.raises(InputError, match=r"^--out: .* holds figures of other pretraining_epochs \(there 1, here 2\); choose"):
        run_sparse(colour_squares(40), colour_squares(40), Plan("resnet8", 2, 1, 64 << 10, 2, (), ((0.75, 1),), 1, CASES), folder)


def test_what_is_not_there_is_refused_before_anything_runs(tmp_path: Path) -> None:
    data = colour_squares(40)
    with pytest.raises(InputError, match=r"^cases: must be some of .*, got \['dense'\]"):
        run_sparse(data, data, Plan(cases=("dense",)), tmp_path / "a")
    with pytest.raises(InputError, match=r"^device: must be a device that PyTorch has here, as 'cpu' or 'cuda', got 'nowhere'"):
        run_sparse(data, data, Plan(device="nowhere"), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_on_another_device_the_same_loop_runs_the_steps_in_pytorch(found: Any, tmp_path: Path) -> None:
    """``cpu:0`` stands in for one; a run on ONNX Runtime ends the same, but for rounding, on two images of each task."""
    plan = dataclasses.replace(PLAN, device="cpu:0", cases=("structured 75%, er",))
    (row,) = run_sparse(colour_squares(40), colour_squares(40), plan, tmp_path)["rows"]
    other = found[0]["rows"][1]
    assert row["learned"] == other["learned"] and row["difference"] is None
    assert abs(row["accuracy"] - other["accuracy"]) <= 0.2


def test_steps_are_set_beside_their_work() -> None:
    dense, masked = measure("resnet8", ((0.75, 4),), repeats=1)
    assert dense["speed_up"] == dense["mac_reduction"] == 1 and dense["sparsity"] is None
    assert masked["mac_reduction"] == dense["canonical_macs"] / masked["canonical_macs"] > 2
    assert masked["share"] == pytest.approx(masked["speed_up"] / masked["mac_reduction"])
    assert masked["state_bytes"] < dense["state_bytes"]


def test_tables_and_command(found: Any, capsys: pytest.CaptureFixture[str]) -> None:
    result = found[0]
    assert [round(row["times_less"], 1) for row in result["nominal"]] == [5.3, 12.2, 21.4]
    assert [table.row_count for table in (nominal_table(result), step_table(result), accuracy_table(result))] == [3, 0, 2]
    assert main(["bench", "sparse"]) == 2
    assert "--data: must be given, or --quick" in capsys.readouterr().err
