"""The optimisers against torch.optim, and masks that hold weights still to the bit."""

import dataclasses

import pytest
import torch

from edgecl.methods._optim import OPTIMISERS, Optimiser

STEPS = 30
SHAPES = {"conv.weight": (3, 2, 3, 3), "fc.weight": (4, 3), "fc.bias": (4,), "scale": ()}


def start(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}


def gradients(step):
    """Gradients with exact zeros among them, some of them zero for good."""
    made = start(100 + step)
    made["fc.weight"][1] = 0
    made["fc.bias"] = made["fc.bias"] * (step % 3 == 0)
    return made


def ours(optimiser, rates, masks=None):
    parameters, state = start(), optimiser.slots(start())
    state = {name: slot.double() for name, slot in state.items()}
    for step, rate in enumerate(rates):
        lr = torch.tensor(rate, dtype=torch.float64)
        seed = optimiser.seed(lr)
        scaled = {name: gradient * seed for name, gradient in gradients(step).items()}
        parameters, slots = optimiser.update(parameters, scaled, state, lr, masks or {})
        assert set(slots) == set(state)
        state = slots
    return parameters, state


def reference(make, rates, decay):
    parameters = {name: tensor.clone().requires_grad_(True) for name, tensor in start().items()}
    optimiser = make(parameters.values())
    for step, rate in enumerate(rates):
        optimiser.param_groups[0]["lr"] = rate
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.grad = gradients(step)[name]
                parameter.mul_(1 - rate * decay)  # decoupled, as AdamW's; before the step, which does not read the weight
        optimiser.step()
    return {name: tensor.detach() for name, tensor in parameters.items()}


RATES = {
    "fixed": [0.05] * STEPS,
    "changing": [0.1 / (1 + step) for step in range(STEPS)],
    "with zeros": [0.1 * (step % 2) for step in range(STEPS)],
}


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize(
    ("optimiser", "make"),
    [
        (Optimiser("sgd"), lambda p: torch.optim.SGD(p, 1.0)),
        (Optimiser("momentum"), lambda p: torch.optim.SGD(p, 1.0, momentum=0.9)),
        (Optimiser("momentum", momentum=0.5), lambda p: torch.optim.SGD(p, 1.0, momentum=0.5)),
        (Optimiser("adam"), lambda p: torch.optim.Adam(p, 1.0)),
        (Optimiser("adam", betas=(0.5, 0.9), eps=1e-3), lambda p: torch.optim.Adam(p, 1.0, betas=(0.5, 0.9), eps=1e-3)),
    ],
)
def test_equals_torch(optimiser, make, rates, decay):
    got, _ = ours(dataclasses.replace(optimiser, weight_decay=decay), RATES[rates])
    want = reference(make, RATES[rates], decay)
    for name, value in want.items():
        assert torch.allclose(got[name], value, rtol=1e-10, atol=1e-12), name
        assert got[name].shape == value.shape


def test_adam_with_decay_is_adamw():
    got, _ = ours(Optimiser("adam", weight_decay=0.2), RATES["fixed"])
    want = reference(lambda p: torch.optim.AdamW(p, 1.0, weight_decay=0.2), RATES["fixed"], 0.0)
    assert all(torch.allclose(got[name], want[name], rtol=1e-10, atol=1e-12) for name in want)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("kind", OPTIMISERS)
def test_masked_weights_and_slots_stay_to_the_bit(kind, decay):
    generator = torch.Generator().manual_seed(5)
    masks = {name: torch.rand(shape, generator=generator) < 0.5 for name, shape in SHAPES.items() if shape}
    optimiser = Optimiser(kind, weight_decay=decay)
    free, _ = ours(optimiser, RATES["fixed"])
    got, slots = ours(optimiser, RATES["fixed"], masks)
    for name, mask in masks.items():
        assert torch.equal(got[name][~mask], start()[name][~mask]), name
        assert torch.equal(got[name][mask], free[name][mask]), "the others move as without a mask"
        for slot in slots:
            if slot.endswith(f".{name}"):
                assert not slots[slot][~mask].any()
    assert torch.equal(got["scale"], free["scale"])


@pytest.mark.parametrize(("kind", "names"), [("sgd", ()), ("momentum", ("momentum",)), ("adam", ("adam_m", "adam_v"))])
def test_slots(kind, names):
    slots = Optimiser(kind).slots(start())
    expected = {f"{slot}.{name}": shape for slot in names for name, shape in SHAPES.items()}
    assert {name: tuple(t.shape) for name, t in slots.items()} == {**expected, **({"adam_step": ()} if kind == "adam" else {})}
    assert not any(t.any() for t in slots.values())
    assert len({t.untyped_storage().data_ptr() for t in slots.values()}) == len(slots)


def test_arguments_are_not_written():
    optimiser, parameters, gradient = Optimiser("adam"), start(), gradients(0)
    state = optimiser.slots(parameters)
    given = [*parameters.values(), *gradient.values(), *state.values()]
    versions = [t._version for t in given]
    optimiser.update(parameters, gradient, state, torch.tensor(0.1), {})
    assert [t._version for t in given] == versions
