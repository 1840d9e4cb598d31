"""Streams of frames: the trunk carries state from frame to frame; the log-mel front end."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from edgecl import EagerEngine, LogMel, prepare
from edgecl_device import Learner
from edgecl_device.errors import BundleError, EdgeclError, InputError, StepMissingError, StoreFullError
from edgecl_device.manifest import sealed
from edgecl_export import export

FRAME, WINDOW, MELS = 32, 64, 5


class Causal(nn.Module):
    """Log-mel of the last two frames of PCM, then a convolution over the last three log-mel columns."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.mel = LogMel(8000, WINDOW, FRAME, MELS)
        self.conv = nn.Conv1d(MELS, 6, 3)

    def initial_state(self):
        return {"pcm": torch.zeros(1, WINDOW - FRAME), "mel": torch.zeros(1, MELS, 2)}

    def forward(self, x, state):
        pcm = torch.cat([state["pcm"], x.to(torch.float32) * (1 / 32768)], 1)
        mel = torch.cat([state["mel"], self.mel(pcm)], 2)
        return self.conv(mel).flatten(1), {"pcm": pcm[:, FRAME:], "mel": mel[:, :, 1:]}


class Gated(nn.Module):
    """A GRU cell written out; float frames."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.gru = nn.GRU(4, 6, batch_first=True)

    def initial_state(self):
        return {"hidden": torch.zeros(1, 6)}

    def forward(self, x, state):
        g, hidden = self.gru, state["hidden"]
        own = nn.functional.linear(x, g.weight_ih_l0, g.bias_ih_l0)
        past = nn.functional.linear(hidden, g.weight_hh_l0, g.bias_hh_l0)
        reset, update = (torch.sigmoid(own[:, i : i + 6] + past[:, i : i + 6]) for i in (0, 6))
        new = torch.tanh(own[:, 12:] + reset * past[:, 12:])
        hidden = (1 - update) * new + update * hidden
        return hidden, {"hidden": hidden * 1.0}


def head():
    torch.manual_seed(0)
    return nn.Sequential(nn.ReLU(), nn.Linear(6, 3))


def pcm(frames=12, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(-20000, 20000, (frames, FRAME)).astype(np.int16)


def prepared(stream=None, example=None, method="ridge"):
    return prepare(head(), at="0", example=pcm(1) if example is None else example, method=method, classes=3, stream=stream or Causal())


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    ready = prepared()
    return export(ready, tmp_path_factory.mktemp("stream") / "b"), ready


def whole_clip(clip):
    """The same features of a whole clip at once, [frames, 6]."""
    stream = Causal()
    wave = torch.cat([torch.zeros(WINDOW - FRAME), torch.tensor(clip.reshape(-1)) / 32768]).unsqueeze(0)
    mel = torch.cat([torch.zeros(1, MELS, 2), stream.mel(wave)], 2)
    return torch.relu(stream.conv(mel))[0].T.detach().numpy()


def features(learner, frame):
    return learner._pending.get(learner.predict(frame).sample_id)["z"][0]


def heard(learner):
    return {name: array.tobytes() for name, array in learner.state().items() if name.startswith("encode.")}


def test_log_mel_is_the_power_of_the_fourier_transform_in_triangles():
    rate, window, hop, mels = 16000, 256, 100, 20
    wave = np.random.default_rng(3).uniform(-1, 1, (2, 1000)).astype(np.float32)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    corners = np.linspace(2595 * np.log10(1 + 100 / 700), 2595 * np.log10(1 + 7000 / 700), mels + 2)
    corners = 700 * (10 ** (corners / 2595) - 1)
    bank = [np.interp(np.arange(129) * rate / window, corners[i : i + 3], [0, 1, 0], left=0, right=0) for i in range(mels)]
    wanted = np.zeros((2, mels, 8))
    for n in range(2):
        for t in range(8):
            power = np.abs(np.fft.rfft(wave[n, t * hop : t * hop + window] * hann)) ** 2
            wanted[n, :, t] = np.log(np.array(bank) @ power + 1e-6)
    front = LogMel(rate, window, hop, mels, low_hz=100, high_hz=7000)
    np.testing.assert_allclose(front(torch.tensor(wave)).numpy(), wanted, rtol=1e-4, atol=1e-4)
    whole = torch.tensor((wave * 32767).astype(np.int16))
    torch.testing.assert_close(front(whole), front(whole.float() / 32768))


def test_frame_by_frame_is_the_whole_clip_at_once(bundle, toy):
    exported, ready = bundle
    clip = pcm()
    wanted = whole_clip(clip)
    np.testing.assert_allclose(np.concatenate([z.numpy() for z in ready.encode(clip)]), wanted, rtol=1e-4, atol=1e-5)
    eager = Learner(exported.manifest, EagerEngine(ready.trunk, ready.learner), toy.helpers.arrays(ready.state))
    for runner in (eager, Learner.load(exported.path)):
        with runner as learner:
            np.testing.assert_allclose([features(learner, frame) for frame in clip], wanted, rtol=1e-4, atol=1e-5)


def test_a_recurrent_cell_is_torchs_own(tmp_path):
    x = np.random.default_rng(4).standard_normal((9, 4)).astype(np.float32)
    ready = prepared(Gated(), x[:1], "ncm")
    wanted = torch.relu(Gated().gru(torch.tensor(x)[None])[0][0]).detach().numpy()
    with Learner.load(export(ready, tmp_path / "b").path) as learner:
        np.testing.assert_allclose([features(learner, frame) for frame in x], wanted, rtol=1e-4, atol=1e-5)

        before = heard(learner)
        with pytest.raises(InputError, match="x: values must be finite"):
            learner.predict(np.full(4, np.nan, np.float32))
        assert heard(learner) == before


class Total(nn.Module):
    """The sum of all frames so far, which may overflow where no feature does."""

    def initial_state(self):
        return {"sum": torch.zeros(1, 6)}

    def forward(self, x, state):
        return x * 0.5, {"sum": state["sum"] + x}


def test_a_frame_whose_state_would_not_be_finite_is_refused(tmp_path):
    frame = np.full(6, 2e38, np.float32)
    ready = prepared(Total(), np.ones((1, 6), np.float32), "ncm")
    with Learner.load(export(ready, tmp_path / "b").path) as learner:
        learner.predict(np.ones(6, np.float32))
        with pytest.raises(InputError, match="x: its features are not finite"):
            learner.predict(frame)
        assert learner.state()["encode.sum"].tolist() == [[1.0] * 6]


def test_a_frame_that_is_not_predicted_is_not_heard(bundle, monkeypatch):
    """Given once more, after the failure, it gives what it would have given."""
    exported, _ = bundle
    clip = pcm(6, seed=4)
    with Learner.load(exported.path) as learner:
        for frame in clip[:3]:
            learner.predict(frame)
        before = heard(learner)
        for error in (StoreFullError("store: the disk is full"), KeyboardInterrupt()):
            with monkeypatch.context() as patch, pytest.raises(type(error)):
                patch.setattr(learner._store, "new_id", lambda error=error: (_ for _ in ()).throw(error))
                learner.predict(clip[3])
            assert heard(learner) == before
        np.testing.assert_allclose([features(learner, frame) for frame in clip[3:]], whole_clip(clip)[3:], rtol=1e-4, atol=1e-5)


def test_only_frames_advance_the_stream(bundle):
    exported, _ = bundle
    clip = pcm(6, seed=1)
    with Learner.load(exported.path) as learner:
        seen = [learner.predict(frame) for frame in clip]
        before = heard(learner)
        for i, one in enumerate(seen):
            learner.learn(one.sample_id, i % 3)
        learner.forget(seen[2].sample_id)
        learner.relabel(seen[1].sample_id, 0)
        assert heard(learner) == before
        with pytest.raises(InputError, match=r"x: a stream's frames go through predict.*; pass the sample_id"):
            learner.learn(clip[0], 1)
        assert heard(learner) == before
        learner.reset_stream()
        assert not learner.state()["encode.pcm"].any() and not learner.state()["encode.mel"].any()
        np.testing.assert_allclose([features(learner, frame) for frame in clip], whole_clip(clip), rtol=1e-4, atol=1e-5)
        assert learner.report()["learned"] == 6


def test_rollback_leaves_the_stream_where_it_is(bundle):
    exported, _ = bundle
    clip = pcm(6, seed=2)
    with Learner.load(exported.path) as learner:
        learner.learn(learner.predict(clip[0]).sample_id, 0)
        learner.save("one")
        readout = learner.state()["readout"]
        ids = [learner.learn(learner.predict(frame).sample_id, 1).sample_id for frame in clip[1:]]
        before = heard(learner)
        learner.rollback("one")
        assert heard(learner) == before and np.array_equal(learner.state()["readout"], readout)
        with pytest.raises(EdgeclError):
            learner.forget(ids[0])


def test_recovery_is_bit_for_bit_and_a_resumed_stream_equals_an_uninterrupted_one(bundle, tmp_path, toy):
    exported, _ = bundle
    clip = pcm(10, seed=3)

    def play(learner, frames):
        for i, frame in enumerate(frames):
            learner.learn(learner.predict(frame).sample_id, i % 3, weight=1.5)

    with Learner.load(exported.path) as whole:
        play(whole, clip[:6])
        whole.reset_stream()
        play(whole, clip[6:8])
        first = whole.state()
        play(whole, clip[8:])
        last = whole.state()
    learner = Learner.load(exported.path, tmp_path / "l.db")
    play(learner, clip[:6])
    learner.reset_stream()
    play(learner, clip[6:8])
    learner.predict(clip[0])  # nothing was learned behind it: a crash loses it
    learner._store.close()  # as a killed process: without a last snapshot
    with Learner.load(exported.path, tmp_path / "l.db") as again:
        assert toy.helpers.same(again.state(), first)
    with Learner.load(exported.path, tmp_path / "l.db") as resumed:
        play(resumed, clip[8:])
        assert toy.helpers.same(resumed.state(), last)
    learner = Learner.load(exported.path, tmp_path / "l.db")
    learner.reset_stream()
    learner._store.close()
    with Learner.load(exported.path, tmp_path / "l.db") as again:
        assert not again.state()["encode.mel"].any()


def test_base_frames_are_one_stream_from_its_start(bundle):
    clip = pcm(9, seed=4)
    ready = prepared(method="ncm").fit(clip, np.arange(9) % 3)
    unit = whole_clip(clip)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    np.testing.assert_allclose(ready.state["mean"], [unit[i::3].mean(0) for i in range(3)], rtol=1e-4, atol=1e-5)
    assert not ready.state["encode.pcm"].any(), "the device's stream has a start of its own"


def test_executorch_carries_the_state(bundle, tmp_path):
    exported = export(prepared(method="ncm"), tmp_path / "b", engine="executorch")
    clip = pcm(5, seed=5)
    with Learner.load(exported.path) as learner:
        np.testing.assert_allclose([features(learner, frame) for frame in clip], whole_clip(clip), rtol=1e-3, atol=1e-4)
        learner.reset_stream()
        np.testing.assert_allclose(features(learner, clip[0]), whole_clip(clip)[0], rtol=1e-3, atol=1e-4)


def test_a_bundle_whose_other_steps_touch_the_stream_is_refused(bundle, tmp_path):
    exported, _ = bundle
    for file in exported.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = json.loads((tmp_path / "manifest.json").read_text())
    data["steps"]["learn"]["state_in"].append("encode.pcm")
    (tmp_path / "manifest.json").write_text(json.dumps(sealed(data)))
    with pytest.raises(BundleError, match=r"step 'learn': must leave the stream's state to encode, got .*'encode.pcm'"):
        Learner.load(tmp_path)


class Odd(Causal):
    def __init__(self, state, shift=0):
        super().__init__()
        self.state, self.shift = state, shift

    def initial_state(self):
        return self.state

    def forward(self, x, state):
        z, new = super().forward(x, Causal.initial_state(self))
        return z, {**new, "pcm": new["pcm"][:, self.shift :]}


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (nn.Linear(2, 2), r"stream: must be a module with initial_state\(\), got Linear; define it"),
        (Odd(torch.zeros(2)), r"stream: initial_state\(\) must return tensors by name, got Tensor; return a dict"),
        (Odd({}), r"stream: initial_state\(\) must return tensors by name"),
        (Odd({"pcm": torch.full((1, 32), torch.nan)}), "stream: state 'pcm' must be finite"),
        (Odd(Causal().initial_state(), shift=1), r"stream: must return a tensor and state as initial_state\(\) has it"),
    ],
)
def test_wrong_streams_are_refused(stream, message):
    with pytest.raises(InputError, match=message):
        prepared(stream)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hop": 0}, "rate_hz, window, hop, mels: must be at least 1"),
        ({"high_hz": 5000.0}, "low_hz, high_hz: must rise within 0 to 4000, got 0 and 5000"),
        ({"eps": 0.0}, "eps: must be finite and above 0"),
        ({"mels": 40}, "mels: must leave a DFT bin to each filter, .* of 40 have none; take fewer"),
    ],
)
def test_wrong_front_ends_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        LogMel(**{"rate_hz": 8000, "window": 64, "hop": 32, "mels": 4, **options})


def test_a_bundle_without_a_stream_has_nothing_to_reset(tmp_path):
    ready = prepare(head(), at="0", example=np.zeros((1, 6), np.float32), method="ncm", classes=3)
    with Learner.load(export(ready, tmp_path / "b").path) as learner, pytest.raises(StepMissingError, match="carries no state"):
        learner.reset_stream()
