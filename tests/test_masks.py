"""Criteria, choice, schedules and bitmaps against literal definitions, and the paper's FLOPs from the cost table."""

import numpy as np
import pytest
import torch
from torch import nn

from edgecl import METHODS
from edgecl.backbones.resnet import resnet18
from edgecl.graph import cost
from edgecl.graph.capture import capture
from edgecl.graph.lowering import canonicalise
from edgecl.learner import Problem
from edgecl.masks import Schedule, cwi, fixed_half, nominal_macs, output_magnitude, pack, places, random, slots, table_shape, top, unpack
from edgecl.removal import Removal
from edgecl_device.generator import WORD, Generator
from edgecl_device.manifest import TensorSpec


def test_importance_by_hand() -> None:
    weight, of_task, of_memory = torch.tensor([[-1.0, 0.0]]), torch.tensor([[2.0, -4.0]]), torch.tensor([[0.5, 8.0]])
    assert cwi(weight, of_task, of_memory).tolist() == [[1 + 0.5 * 2 + 0.5, 0 + 0.5 * 4 + 8]]
    assert cwi(weight, of_task, of_memory, alpha=0.0, beta=2.0).tolist() == [[2.0, 16.0]]


def test_the_best_are_those_of_a_stable_sort() -> None:
    generator = np.random.default_rng(0)
    for size in (1, 2, 7, 100):
        scores = generator.integers(0, 5, size).astype(np.float32)  # with many ties
        for count in range(size + 1):
            wanted = np.argsort(-scores, kind="stable")[:count]
            found = top(torch.from_numpy(scores), torch.tensor([count]), size)
            assert np.flatnonzero(found.numpy()).tolist() == sorted(wanted.tolist())
            assert places(found, size)[:count].tolist() == sorted(wanted.tolist())
            assert sorted(places(found, size).tolist()) == list(range(size))


def test_slots_invert_places() -> None:
    listed, live = torch.tensor([4, 0, 2]), torch.tensor([True, True, False])
    slot = slots(listed, live, 6)
    assert slot.tolist() == [2, 0, 0, 0, 1, 0]


@pytest.mark.parametrize("count", [1, 7, 8, 9, 100])
def test_a_bitmap_is_one_bit_a_weight(count: int) -> None:
    mask = np.random.default_rng(count).random(count) < 0.3
    packed = pack(torch.from_numpy(mask))
    assert packed.dtype == torch.uint8 and packed.numel() == -(-count // 8)
    assert packed.numpy().tolist() == np.packbits(mask, bitorder="little").tolist()
    assert unpack(packed, count).numpy().tolist() == mask.tolist()


def test_random_scores_choose_every_unit_equally_often() -> None:
    units, chosen = 23, 5
    generator, hits = Generator(1), np.zeros(23)
    first, second = table_shape(units)
    for _ in range(2000):
        tables = [torch.tensor([generator.below(WORD) for _ in range(n)]) for n in (first, second)]
        hits += top(random(*tables, units), torch.tensor([chosen]), chosen).numpy()
    expected = 2000 * chosen / units
    assert hits.sum() == 2000 * chosen
    assert np.abs(hits - expected).max() < 5 * np.sqrt(expected)  # five standard deviations


def test_other_criteria_by_hand() -> None:
    assert fixed_half(4).tolist() == [0, 1, 0, 1]
    assert output_magnitude(torch.tensor([[[1.0, -2.0], [0.5, 0.0]], [[0.0, 0.0], [-3.0, 0.0]]])).tolist() == [3.0, 3.5]


def test_a_schedule_grows_shrinks_and_exchanges_by_the_paper() -> None:
    """The authors' 75 % profile: 0.75 to 0.74 while new, then 0.76 to 0.75."""
    layer = Schedule(1000, density=0.25, grow=0.01, exchange=0.01)
    assert (layer.base, layer.most, layer.exchanged) == (250, 260, 10)
    for live, new, kept, grown in ((250, True, 250, 10), (260, True, 250, 10), (260, False, 240, 10), (250, False, 240, 10)):
        assert [int(n) for n in layer.counts(torch.tensor([live]), torch.tensor([new]))] == [kept, grown]
    assert Schedule(8, 0.01).base == 1, "a layer never vanishes"
    assert Schedule(8, 1.0, grow=0.1, exchange=0.1).most == 8 and Schedule(8, 1.0, exchange=0.1).exchanged == 0


def test_removal_drops_the_easiest() -> None:
    removal = Removal(6, share=0.5, windows=1)
    for right in ([1, 1, 0, 1, 0, 1], [1, 0, 0, 1, 1, 1]):
        removal.tell(removal.left, np.array(right, bool))
    assert removal.close().tolist() == [1, 2, 4]
    assert removal.close().tolist() == [1, 2, 4], "the last window is over"


@pytest.fixture(scope="module")
def resnet() -> tuple[dict[str, dict[str, int]], nn.Module]:
    """MACs of a dense update of ResNet-18 on 32x32 images, by layer and phase, and the network."""
    net = resnet18(classes=10)
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    problem = Problem(TensorSpec("z", (1, 3, 32, 32), "float32"), 10)
    learner = METHODS["finetune"](problem, suffix=net)
    return cost.count_by_module(canonicalise(capture(learner, "learn"))), net


def test_resnet_has_the_papers_macs(resnet: tuple[dict[str, dict[str, int]], nn.Module]) -> None:
    forward = {path: phases["forward"] for path, phases in resnet[0].items() if "forward" in phases}
    maskable = sum(macs for path, macs in forward.items() if path.startswith("layer") and ".conv" in path)
    assert round(maskable / 1e6, 1) == 547.4
    assert round((sum(forward.values()) - maskable) / 1e6, 1) == 8.1


@pytest.mark.parametrize(("sparsity", "gradients", "gain"), [(0.75, 0.80, 5.3), (0.90, 0.92, 12.1), (0.95, 0.9575, 21.0)])
def test_nominal_flops_are_those_of_the_paper(
    resnet: tuple[dict[str, dict[str, int]], nn.Module], sparsity: float, gradients: float, gain: float
) -> None:
    """Against dense training on all samples; the data fraction 0.775 is that of the authors' schedule."""
    layers, net = resnet
    problem = Problem(TensorSpec("z", (1, 3, 32, 32), "float32"), 10)
    kind = METHODS["sparcl"]
    for granularity in ("unstructured", "structured") if sparsity == 0.75 else ("unstructured",):  # 10 % of 64 are no whole channels
        config = kind.Config(
            granularity=granularity, sparsity=sparsity, gradient_sparsity=gradients, sparse=("layer*.conv*.weight",), capacity_bytes=1 << 20
        )
        sparse = kind(problem, config, suffix=net)
        dense = 3 * sum(phases.get("forward", 0) for phases in layers.values())
        assert dense / nominal_macs(layers, sparse.densities(), data=0.775) == pytest.approx(gain, rel=0.02)
