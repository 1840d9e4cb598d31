"""Models of several inputs: from prepare to the device's loop and its store."""

import numpy as np
import pytest
import torch
from torch import nn

from edgecl import EagerEngine, ImageU8, SplitError, Vector, prepare
from edgecl_device import Learner
from edgecl_device.cli import main
from edgecl_device.errors import InputError
from edgecl_export import export


class Two(nn.Module):
    """An image and a sensor's vector; the vector passes the cut beside the image's features."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.norm = nn.Linear(4, 4)
        self.mix = nn.Linear(7, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, image, sensor):
        features = self.conv(image)
        return self.head(torch.relu(self.mix(torch.cat([features, self.norm(sensor)], 1))))


def data(count, seed=0):
    rng = np.random.default_rng(seed)
    y = np.arange(count) % 3
    image = rng.integers(0, 60, (count, 6, 6), dtype=np.uint8)
    image[:, :3] += (60 * (y == 1)).astype(np.uint8)[:, None, None]
    sensor = (rng.standard_normal((count, 4)) + 3 * (y == 2)[:, None]).astype(np.float32)
    return {"sensor": sensor, "image": image}, y


def sample(x, i):
    return {name: part[i] for name, part in x.items()}


def untrained(method, at="conv", **options):
    preprocess = {"image": ImageU8([0.5], [0.5], "HW")}
    return prepare(Two(), at=at, example=data(1)[0], method=method, preprocess=preprocess, **{"classes": 3, **options})


def prepared(method="finetune"):
    return untrained(method).fit(*data(30))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    ready = prepared()
    return export(ready, tmp_path_factory.mktemp("two") / "b"), ready


def test_the_bundle_names_the_inputs_and_computes_the_model(bundle):
    exported, ready = bundle
    assert [spec.name for spec in exported.manifest.steps["encode"].inputs] == ["x.image", "x.sensor"]
    assert set(ready.learner.problem.features) == {"conv_3", "sensor"}
    x, _ = data(5, seed=1)
    image = ImageU8([0.5], [0.5], "HW")(torch.tensor(x["image"]))
    wanted = Two()(image, torch.tensor(x["sensor"])).detach().numpy()
    with Learner.load(exported.path) as learner:
        for i in range(5):
            np.testing.assert_allclose(learner.predict(sample(x, i)).scores, wanted[i], rtol=1e-4, atol=1e-5)


def test_engines_agree_and_learn(bundle, toy):
    exported, ready = bundle
    eager = Learner(exported.manifest, EagerEngine(ready.trunk, ready.learner), toy.helpers.arrays(ready.state))
    x, y = data(150, seed=2)
    with Learner.load(exported.path) as there, eager as here:
        for i in range(150):
            a, b = (learner.learn(sample(x, i), int(y[i]), lr=0.1) for learner in (there, here))
            assert i > 20 or a.loss == pytest.approx(b.loss, rel=1e-2, abs=1e-4)
        x, y = data(30, seed=3)
        assert np.mean([there.predict(sample(x, i)).label == y[i] for i in range(30)]) > 0.5


def test_a_label_that_comes_later_and_recovery(bundle, toy, tmp_path):
    exported, _ = bundle
    x, y = data(10, seed=4)
    learner = Learner.load(exported.path, tmp_path / "l.db")
    ids = [learner.predict(sample(x, i)).sample_id for i in range(10)]
    for i, sample_id in enumerate(ids):
        learner.learn(sample_id, int(y[i]))
    state = learner.state()
    learner._store.close()  # as a killed process
    with Learner.load(exported.path, tmp_path / "l.db") as again:
        assert toy.helpers.same(again.state(), state)


def test_ridge_behind_the_joint_features_takes_vectors_too(tmp_path):
    x, _ = data(12, seed=5)
    ready = untrained("ridge", at="mix", target=Vector(2), classes=None)
    y = np.stack([x["sensor"][:, 0], x["image"].mean((1, 2)) / 255], 1).astype(np.float32)
    ready.fit(x, y)
    with Learner.load(export(ready, tmp_path / "b").path) as learner:
        assert learner.predict(sample(x, 0)).value.shape == (2,)


def test_executorch_takes_several_inputs(bundle, tmp_path):
    exported = export(prepared("ncm"), tmp_path / "b", engine="executorch")
    here = prepared("ncm")
    x, y = data(3, seed=6)
    with Learner.load(exported.path) as there, Learner(exported.manifest, EagerEngine(here.trunk, here.learner), there.state()) as eager:
        for i in range(3):
            assert there.learn(sample(x, i), int(y[i])).loss == pytest.approx(eager.learn(sample(x, i), int(y[i])).loss, rel=1e-4)


def test_the_command_runs_a_stream_of_several_inputs(bundle, tmp_path, capsys):
    exported, _ = bundle
    x, y = data(9, seed=7)
    np.savez(tmp_path / "s.npz", y=y, **{f"x.{name}": part for name, part in x.items()})
    assert main(["run", str(exported.path), "--data", str(tmp_path / "s.npz")]) == 0
    assert main(["verify", str(exported.path)]) == 0
    assert main(["info", str(exported.path)]) == 0
    assert "image uint8 [1, 6, 6], sensor float32 [1, 4]" in capsys.readouterr().out
    np.savez(tmp_path / "s.npz", y=y, **{"x.image": x["image"], "x.sensor": x["sensor"][:5]})
    assert main(["run", str(exported.path), "--data", str(tmp_path / "s.npz")]) == 2
    assert "inputs must have equally many samples, got [9, 5]" in capsys.readouterr().err


def test_refusals(bundle):
    x, y = data(4)
    example = {name: part[:1] for name, part in x.items()}

    def wrong(model=None, example=example, **options):
        return prepare(model or Two(), at="conv", example=example, classes=3, **options)

    with pytest.raises(SplitError, match=r"forward must take one tensor, got \['image', 'sensor'\]; pass a mapping"):
        wrong(example=np.zeros((1, 1, 6, 6), np.float32))
    with pytest.raises(SplitError, match=r"forward must take \['picture', 'sensor'\], as the example has them, got \['image', 'sensor'\]"):
        wrong(example={"picture": example["image"], "sensor": example["sensor"]})
    with pytest.raises(InputError, match=r"example.sensor: must be a numpy array"):
        wrong(example={**example, "sensor": [1.0]})
    with pytest.raises(InputError, match=r"preprocess: must be None or a mapping of some of \['image', 'sensor'\]"):
        wrong(preprocess=ImageU8([0.5], [0.5], "HW"))
    with pytest.raises(InputError, match=r"x: inputs must have equally many samples, got \[4, 3\]"):
        bundle[1].fit({"sensor": x["sensor"], "image": x["image"][:3]}, y)
    with pytest.raises(InputError, match=r"x: must have the inputs of the example"):
        bundle[1].encode(x["sensor"])
    with pytest.raises(InputError, match=r"x.sensor: must be float32 \[N, 4\] as the example, got float64"):
        bundle[1].encode({**x, "sensor": x["sensor"].astype(float)})

    class Unused(Two):
        def forward(self, image, sensor):
            return self.head(torch.relu(self.mix(torch.cat([self.conv(image)] * 2 + [self.conv(image)[:, :1]], 1))))

    with pytest.raises(SplitError, match=r"forward must use every input, does not use \['sensor'\]"):
        wrong(model=Unused())
    with Learner.load(bundle[0].path) as learner:
        for bad, message in (
            (x["image"][0], "x: must be a mapping with the inputs image, sensor, got 'ndarray'"),
            ({"image": x["image"][0]}, r"x: must be a mapping with the inputs image, sensor, got \['image'\]"),
            ({**sample(x, 0), "sensor": np.full(4, np.nan, np.float32)}, "x.sensor: values must be finite"),
        ):
            with pytest.raises(InputError, match=message):
                learner.predict(bad)


def test_a_weight_is_a_number_of_copies_on_host_and_device(tmp_path):
    """Weighted batch ridge is the oracle; five copies, and a weight of five, are the same sum."""
    x, y = data(12, seed=8)
    weight = np.array([5, 1, 2, 1, 1, 3, 1, 1, 1, 4, 1, 1])
    times = np.repeat(np.arange(12), weight)
    weighted = untrained("ridge").fit(x, y, weight=weight)
    copied = untrained("ridge").fit({name: part[times] for name, part in x.items()}, y[times])
    phi = np.concatenate([torch.cat([t.flatten(1) for t in z.values()], 1).numpy() for z in weighted.encode(x)]).astype(np.float64)
    phi /= np.linalg.norm(phi, axis=1, keepdims=True)
    solution = np.linalg.solve(phi.T @ (phi * weight[:, None]) + 0.1 * np.eye(7), phi.T @ (np.eye(3)[y] * weight[:, None]))
    with Learner.load(export(untrained("ridge"), tmp_path / "b").path) as learner:
        for i in range(12):
            learner.learn(sample(x, i), int(y[i]), weight=float(weight[i]))
        states = [learner.state()["readout"], weighted.state["readout"].numpy(), copied.state["readout"].numpy()]
    for readout in states:
        np.testing.assert_allclose(readout, solution, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["finetune", "slda"])
def test_weights_that_a_method_does_not_take_are_refused(method):
    x, y = data(6)
    ready = untrained(method)
    with pytest.raises(InputError, match=f"weight: {method} takes no weight of a base sample; leave it out"):
        ready.fit(x, y, weight=np.ones(6))
    ragged = [[1], [1, 2], 1, 1, 1, 1], r"weight: must be numbers \[6\], one a sample, got \[\[1\], \[1, 2\], .*; reshape it"
    for wrong, message in (ragged, (np.ones(5), r"weight: must be numbers \[6\]"), (np.zeros(6), "weight of sample 0: must be .* above 0")):
        with pytest.raises(InputError, match=message):
            ready.fit(x, y, weight=wrong)
