import sys
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file

from edgecl_device.engines.onnx import OnnxEngine
from edgecl_device.errors import BundleError, EdgeclError, InputError
from edgecl_device.manifest import TensorSpec, read_manifest


@pytest.fixture
def engine(means):
    manifest = read_manifest(means)
    engine = OnnxEngine(means, manifest)
    engine.load(load_file(means / manifest.state_file))
    return engine


def inputs(label, value, weight=1.0):
    z = np.full((1, 8), value, np.float32) + np.arange(8, dtype=np.float32)
    return {"z": z, "target": np.array([label]), "weight": np.array([weight], np.float32)}


def test_steps_compute_what_numpy_computes(engine):
    total, count = np.zeros((5, 8)), np.zeros(5)
    for i in range(12):
        given = inputs(i % 3, i, 1 + i % 2)
        with np.errstate(invalid="ignore"):
            mean = total / np.maximum(count, 1)[:, None]
        expected = np.where(count > 0, -((mean - given["z"]) ** 2).sum(1), -1e30)
        outputs = engine.run("learn", given)
        np.testing.assert_allclose(outputs["scores"][0], expected, rtol=1e-5)
        np.testing.assert_allclose(engine.run("predict", {"z": given["z"]})["scores"][0], expected, rtol=1e-5)
        engine.run("learn", given)
        engine.commit()
        total[i % 3] += given["z"][0] * given["weight"]
        count[i % 3] += given["weight"][0]
        np.testing.assert_array_equal(engine.state()["sum"], total)
        np.testing.assert_array_equal(engine.state()["count"], count)


def test_nothing_changes_before_commit_and_a_later_run_drops_the_result(engine):
    engine.run("learn", inputs(1, 2))
    assert not engine.state()["count"].any()
    engine.run("predict", inputs(1, 2))
    engine.commit()
    assert not engine.state()["count"].any()
    engine.run("learn", inputs(1, 2))
    engine.run("learn", inputs(2, 2))
    engine.commit()
    engine.commit()
    assert engine.state()["count"].tolist() == [0, 0, 1, 0, 0]


def test_load_drops_an_uncommitted_result(engine):
    state = {"sum": np.ones((5, 8), np.float32), "count": np.full(5, 2, np.float32)}
    engine.run("learn", inputs(1, 2))
    engine.load(state)
    engine.commit()
    assert all((engine.state()[name] == value).all() for name, value in state.items())


def test_what_is_returned_is_a_copy(engine):
    outputs = engine.run("learn", inputs(1, 2))
    engine.commit()
    scores, state = outputs["scores"].copy(), engine.state()
    kept = {name: value.copy() for name, value in state.items()}
    for i in range(4):
        engine.run("learn", inputs(0, i))
        engine.commit()
    assert (outputs["scores"] == scores).all()
    assert all((state[name] == kept[name]).all() for name in kept)
    state["count"][:] = 99
    assert engine.state()["count"].max() < 99


def test_inputs_are_not_changed_and_not_kept(engine):
    given = inputs(1, 2)
    before = {name: value.copy() for name, value in given.items()}
    engine.run("learn", given)
    assert all((given[name] == before[name]).all() for name in given)
    given["z"][:] = -1e6
    engine.commit()
    assert engine.state()["sum"].min() == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("z", np.zeros((1, 7), np.float32)), ("z", np.zeros((1, 8))), ("target", np.zeros(1, np.int32)), ("weight", np.float32(1))],
)
def test_an_input_that_does_not_fit_is_refused(engine, name, value):
    with pytest.raises(InputError, match=f"{name}: step 'learn' takes"):
        engine.run("learn", {**inputs(1, 2), name: value})


def test_load_refuses_a_state_that_does_not_fit_and_keeps_the_old(engine):
    engine.run("learn", inputs(1, 2))
    engine.commit()
    before = engine.state()
    good = {"sum": np.zeros((5, 8), np.float32), "count": np.zeros(5, np.float32)}
    for bad in ({"sum": good["sum"]}, {**good, "count": np.zeros(4, np.float32)}, {**good, "count": np.full(5, np.inf, np.float32)}):
        with pytest.raises(InputError, match="count"):
            engine.load(bad)
        assert all((engine.state()[name] == value).all() for name, value in before.items())


def test_only_written_tensors_get_a_second_buffer(means):
    manifest = read_manifest(means)
    fixed = {name: replace(step, state_out=()) for name, step in manifest.steps.items() if name in ("encode", "predict")}
    engine = OnnxEngine(means, replace(manifest, steps=fixed))
    assert {name: len(values) for name, values in engine._values.items()} == {"sum": 1, "count": 1}
    assert {name: len(values) for name, values in OnnxEngine(means, manifest)._values.items()} == {"sum": 2, "count": 2}


@pytest.mark.parametrize("content", [b"", b"not a model", None])
def test_a_graph_that_cannot_be_loaded_is_named(means, content):
    path = means / "learn.onnx"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(BundleError, match=r"learn\.onnx: ONNX Runtime cannot load it"):
        OnnxEngine(means, read_manifest(means))


def test_a_graph_that_differs_from_the_manifest_is_named(means):
    manifest = read_manifest(means)
    predict = manifest.steps["predict"]
    for other, message in [
        (replace(predict, inputs=(TensorSpec("z", (1, 9), "float32"),)), "input 'z'"),
        (replace(predict, inputs=()), "input 'z'"),
        (replace(predict, outputs=(TensorSpec("scores", (1, 5), "float64"),)), "output 'scores'"),
        (replace(predict, state_in=("sum",)), r"input 'state\.count'"),
        (replace(predict, state_out=("sum",)), r"output 'next\.sum'"),
    ]:
        with pytest.raises(BundleError, match=rf"predict\.onnx: {message}"):
            OnnxEngine(means, replace(manifest, steps={**manifest.steps, "predict": other}))


def test_without_the_runtime_the_error_names_the_install_command(means, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EdgeclError, match=r"pip install 'edgecl\[device\]'"):
        OnnxEngine(means, read_manifest(means))
