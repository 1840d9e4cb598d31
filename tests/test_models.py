"""Networks of the field, from PyTorch to a learning step on the device, through every gate.

All on ONNX Runtime; on ExecuTorch, whose lowering takes longer, the one that is unrolled: every layer is compared there in
``tests/graph/test_layers_executorch.py``. ``benchmarks/models.py`` does all on both, at full size.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgecl import METHODS, prepare
from edgecl.backbones import Cnn1d, DsCnn, GruClassifier, MobileNetV2, VisionTransformer, resnet18
from edgecl_device import Learner
from edgecl_export import export

torch.set_num_threads(1)

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str, str]] = {
    "resnet18": (lambda: resnet18(4, width=0.0625), (3, 32, 32), "layer3", "layer4.1.conv2.weight"),
    "mobilenet_v2": (lambda: MobileNetV2(4, width=0.1), (3, 32, 32), "features.15", "features.17.conv.1.0.weight"),
    "ds_cnn": (lambda: DsCnn(4, channels=8), (1, 49, 10), "block2", "block4.depthwise.0.weight"),
    "vit": (lambda: VisionTransformer(4, image=16, size=12), (3, 16, 16), "blocks.1", "blocks.3.attn.qkv.weight"),
    "cnn1d": (lambda: Cnn1d(4, width=0.0625), (9, 24), "block1", "block3.1.weight"),
    "gru": (lambda: GruClassifier(4, hidden=6), (3, 9), "gru1", "gru2.weight_hh_l0"),
}
"""Each with narrow layers: shape of a sample, cut before the last two blocks, and a weight that must learn."""


class LstmClassifier(nn.Module):
    """Windows [N, 3, T] through two LSTMs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LSTM(3, 6, batch_first=True), nn.LSTM(6, 6, batch_first=True)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.fc(self.second(self.first(x.transpose(1, 2))[0])[0].mean(1))
        return scores


MODELS["lstm"] = (LstmClassifier, (3, 9), "first", "second.weight_hh_l0")


@pytest.mark.parametrize(("name", "engine"), [*((name, "onnx") for name in MODELS), ("gru", "executorch")])
def test_a_network_learns_on_the_device(name: str, engine: str, tmp_path: Any) -> None:
    make, shape, at, trained = MODELS[name]
    x = np.random.default_rng(0).standard_normal((6, *shape)).astype(np.float32)
    config = METHODS["latent_replay"].Config(rows_per_step=2, capacity_bytes=1 << 17, lr=0.05)
    ready = prepare(make(), at=at, example=x[:1], method="latent_replay", classes=4, config=config)
    found = export(ready.fit(x, np.arange(6) % 3), tmp_path / "bundle", engine=engine)
    assert len(found.gates) == 7
    with Learner.load(tmp_path / "bundle") as learner:
        assert learner.predict(x[0]).label in range(3)
        before = learner.state()[f"param.{trained}"]
        losses = [learner.learn(x[0], 3).loss for _ in range(8)]
        assert losses[-1] < losses[0]
        assert not np.array_equal(before, learner.state()[f"param.{trained}"])
        assert learner.predict(x[0]).scores[3] > -1e29
