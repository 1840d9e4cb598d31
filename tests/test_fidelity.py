"""What tracing cannot see is found by running the user's own model beside its parts."""

import numpy as np
import pytest
import torch
from torch import nn

from edgecl import SplitError, prepare
from edgecl_device import Learner
from edgecl_export import export

X = np.random.default_rng(0).standard_normal((1, 6)).astype(np.float32)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.r, self.h, self.o = nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 4)
        self.register_buffer("n", torch.ones(1))

    def forward(self, x):
        return self.o(torch.tanh(self.back(self.front(x))))

    def front(self, x):
        return self.r(self.a(x))

    def back(self, x):
        return self.h(x)


class Autocast(Net):
    def front(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.a(x)
        return self.r(y.float())


class Drawn(Net):
    def back(self, x):
        return self.h(x + torch.rand(8))


class Dropped(Net):
    def front(self, x):
        return self.r(torch.nn.functional.dropout(self.a(x), 0.5, True))


class Counting(Net):
    def front(self, x):
        self.n += 1
        return self.r(self.a(x) * self.n)


class Moving(Net):
    def front(self, x):
        self.n = self.n * 0.9 + self.a(x).mean()
        return self.r(self.a(x) * self.n)


VALUES = {
    Autocast: "another result than the model itself; take contexts such as torch.autocast",
    Drawn: "two runs differ",
    Dropped: "two runs differ",
    Counting: "two runs differ",
    Moving: "two runs differ",
}


@pytest.mark.parametrize("model", VALUES)
@pytest.mark.parametrize("method", ["ridge", "finetune"])
def test_parts_that_compute_something_else_are_refused(model, method):
    net = model()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(SplitError, match=rf"^model: .*{VALUES[model]}"):
        prepare(net, at="r", example=X, method=method, classes=4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, gradient):
        return -3 * gradient


class Custom(Net):
    def back(self, x):
        return Reversed.apply(self.h(x))


class Stopped(Net):
    def back(self, x):
        with torch.no_grad():
            return self.h(x)


class Detached(Net):
    def back(self, x):
        return self.h(x).detach() + x


class Tied(Net):
    """The same layer in trunk and suffix."""

    def front(self, x):
        return self.r(self.h(self.a(x)))


@pytest.mark.parametrize("model", [Custom, Stopped])
@pytest.mark.parametrize("method", ["finetune", "latent_replay", "joint"])
def test_a_lost_backward_pass_is_refused_where_the_suffix_is_trained(model, method):
    with pytest.raises(SplitError, match=r"^model: .*; (take|write)"):
        prepare(model(), at="r", example=X, method=method, classes=4)
    prepare(model(), at="r", example=X, method="ridge", classes=4)


def test_a_model_without_gradients_is_refused():
    class Overwritten(Net):
        def back(self, x):
            y = torch.sigmoid(self.h(x))
            y += 1.0
            return y

    with pytest.raises(SplitError, match=r"model: its layers behind the cut must have gradients, got one of the variables .*; write"):
        prepare(Overwritten(), at="r", example=X, method="finetune", classes=4)


def test_the_gradient_that_differs_is_named():
    with pytest.raises(SplitError, match=r"the gradient of 'h\.weight' differs by \S+ between the model and its traced parts"):
        prepare(Stopped(), at="r", example=X, method="finetune", classes=4)


class TiedByAnotherName(Net):
    """Two layers of trunk and suffix that hold one weight."""

    def __init__(self):
        super().__init__()
        self.b = nn.Linear(8, 8)
        self.b.weight = self.h.weight

    def front(self, x):
        return self.r(self.b(self.a(x)))


@pytest.mark.parametrize("model", [Net, Detached, Tied, TiedByAnotherName])
def test_what_tracing_keeps_is_accepted(model):
    net = model()
    prepare(net, at="r", example=X, method="finetune", classes=4)
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


class Several(Net):
    def forward(self, x):
        y = self.front(x)
        return self.o(y), y


def test_a_model_of_several_outputs_has_no_scores_to_train():
    prepare(Several(), at="r", example=X, method="ridge", classes=4)
    with pytest.raises(ValueError, match=r"^model: must return one tensor of scores for finetune, got tuple; wrap it"):
        prepare(Several(), at="r", example=X, method="finetune", classes=4)


def test_nan_weights_are_not_taken_for_another_result():
    net = Net()
    net.o.bias.data[0] = float("nan")
    prepare(net, at="r", example=X, method="ridge", classes=4)


@pytest.mark.parametrize("at", ["0", "2"])
def test_an_example_that_the_suffix_cannot_take_is_refused_as_one_that_the_trunk_cannot(at):
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"^example: must suit preprocess and model, got float32 \[1, 3, 5, 5\] \(.*\); pass a raw sample"):
        prepare(net, at=at, example=np.zeros((1, 3, 5, 5), np.float32), method="latent_replay", classes=2)


class InPlace(Net):
    """A shifted input: the check of the gradients must not run on one that was shifted before."""

    def forward(self, x):
        x.sub_(0.5)
        return super().forward(x)


class Scaled(Net):
    """Integers that are a parameter, which has no gradient."""

    def __init__(self):
        super().__init__()
        self.order = nn.Parameter(torch.arange(7, -1, -1), requires_grad=False)

    def back(self, x):
        return self.h(x * self.order)


@pytest.mark.parametrize("model", [InPlace, Scaled])
@pytest.mark.parametrize("method", ["ridge", "finetune", "latent_replay", "joint"])
def test_models_that_change_their_input_or_have_integer_parameters_are_accepted(model, method):
    net, x = model(), X.copy()
    ready = prepare(net, at="r", example=x, method=method, classes=4)
    assert np.array_equal(x, X)
    assert not any("order" in name for name in ready.state), "integers are not trained"
    assert isinstance(net.get_parameter("order") if model is Scaled else net.o.weight, nn.Parameter), "the user's model is left alone"


def test_integers_that_are_a_parameter_ship(tmp_path):
    ready = prepare(Scaled(), at="r", example=X, method="finetune", classes=4)
    export(ready, tmp_path / "bundle")
    with Learner.load(tmp_path / "bundle") as learner:
        assert np.isfinite(learner.learn(X[0], 1).loss)
