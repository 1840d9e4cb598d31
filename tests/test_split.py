import copy
import operator
import re
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgecl.backbones import MobileNetV2, SmallCnn, resnet20
from edgecl.prepare import prepare
from edgecl.preprocess import ImageU8
from edgecl.splitting import Split, SplitError, check_backward, split, widen_head
from edgecl_device.errors import EdgeclError, InputError


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and buffer away from its initial value, so that a lost one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.5 + 0.1)
    return model


def images(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_exact(model: nn.Module, at: str, x: Tensor) -> Split:
    """The parts compute what the model did, hold its keys, share no memory with it, and change no input."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    training = model.training
    expected = copy.deepcopy(model).eval()(x.clone())
    parts = split(model, at=at)
    given = x.clone()
    z = parts.trunk(given)
    assert torch.equal(given, x)
    crossing = {parts.features[0]: z} if isinstance(z, Tensor) else z
    assert tuple(crossing) == parts.features
    kept = {name: value.clone() for name, value in crossing.items()}
    assert torch.equal(parts.suffix(z), expected)
    assert all(torch.equal(crossing[name], value) for name, value in kept.items())
    trunk, suffix = parts.trunk.state_dict(), parts.suffix.state_dict()
    assert set(trunk) | set(suffix) <= set(before)
    assert {name for name, _ in model.named_parameters()} <= set(trunk) | set(suffix)
    for part in (trunk, suffix):
        assert all(torch.equal(value, before[key]) for key, value in part.items())
    own = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert own.isdisjoint(tensor.data_ptr() for tensor in [*trunk.values(), *suffix.values()])
    assert model.training is training and not parts.trunk.training and not parts.suffix.training
    return parts


class Residual(nn.Module):
    """Functional ops, in-place ops, a shortcut and a concatenation, as user code has them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)  # one module, called twice
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.bn2 = nn.BatchNorm2d(8)
        self.side = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU())
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x))) * self.scale
        out = self.bn2(self.conv2(x))
        out += x
        out = self.relu(out)
        out = torch.cat([out, self.side(x)], dim=1) * 2
        return self.fc(F.adaptive_avg_pool2d(F.max_pool2d(out, 2), 1).flatten(1)) * self.scale.mean()


@pytest.mark.parametrize(
    ("at", "crossing"), [("conv1", 1), ("bn1", 1), ("conv2", 2), ("bn2", 2), ("side.0", 2), ("side.1", 2), ("side", 2), ("fc", 1)]
)
def test_residual_net_at_every_module(at, crossing):
    parts = assert_exact(randomised(Residual()), at, images(2, 3, 8, 8))
    assert len(parts.features) == crossing


def test_shared_parameter_becomes_two_and_unused_ones_stay_away():
    parts = split(randomised(Residual()), at="bn2")
    assert sorted(parts.suffix.state_dict()) == ["fc.bias", "fc.weight", "scale", "side.0.bias", "side.0.weight"]
    assert sorted(key for key in parts.trunk.state_dict() if "bn" not in key) == [
        "conv1.bias", "conv1.weight", "conv2.bias", "conv2.weight", "scale",
    ]  # fmt: skip
    early = split(randomised(Residual()), at="conv1")
    assert sorted(early.trunk.state_dict()) == ["conv1.bias", "conv1.weight"]
    with torch.no_grad():
        parts.suffix.get_parameter("scale").zero_()
    assert parts.trunk.get_parameter("scale").abs().sum() > 0


class LongSkip(nn.Module):
    """The input and an early map skip past the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.ReLU())
        self.middle = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh()))
        self.up = nn.ConvTranspose2d(8, 2, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        early = self.down(x)
        return self.up(torch.cat([early, self.middle(early)], 1)) + x


def test_skips_across_the_cut_become_named_tensors():
    parts = assert_exact(randomised(LongSkip()), "middle.1", images(1, 2, 8, 8))
    assert parts.features == ("x", "down_1", "middle_1_1")
    assert {name: tuple(z.shape) for name, z in parts.trunk(images(1, 2, 8, 8)).items()} == {
        "x": (1, 2, 8, 8), "down_1": (1, 4, 4, 4), "middle_1_1": (1, 4, 4, 4),
    }  # fmt: skip


@pytest.mark.parametrize("at", ["features.0", "features.1.conv.0", "features.3.conv.1.1", "features.16", "features", "classifier.0"])
def test_mobilenet(at):
    assert_exact(randomised(MobileNetV2(7, width=0.25)), at, images(1, 3, 32, 32))


@pytest.mark.parametrize("at", ["conv1", "layer1", "layer2.0.conv1", "layer3.0", "layer3.1.bn2", "layer3"])
def test_resnet(at):
    assert_exact(randomised(resnet20()), at, images(1, 3, 32, 32))


@pytest.mark.parametrize(("at", "shape"), [(SmallCnn.MAP, (1, 64, 3, 3)), (SmallCnn.FEATURE, (1, 62))])
def test_small_cnn_behind_preprocessing(at, shape):
    net = nn.Sequential(ImageU8([0.286], [0.353], "HW"), randomised(SmallCnn(6)))
    x = torch.randint(0, 256, (1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    parts = assert_exact(net, f"1.{at}", x)
    assert tuple(parts.trunk(x).shape) == shape


def test_hooks_on_leaf_modules_fire():
    parts = split(resnet20(), at="layer2")
    fired = []
    for part, name in ((parts.trunk, "layer2.0.conv1"), (parts.suffix, "layer3.0.conv1")):
        part.get_submodule(name).register_forward_hook(lambda *_, name=name: fired.append(name))
    parts.suffix(parts.trunk(images(1, 3, 32, 32)))
    assert fired == ["layer2.0.conv1", "layer3.0.conv1"]


def test_training_the_suffix_leaves_model_and_trunk():
    model = randomised(SmallCnn(6))
    before = copy.deepcopy(model.state_dict())
    parts = split(model, at="block3")
    parts.suffix(parts.trunk(images(1, 1, 28, 28))).sum().backward()
    assert all(parameter.grad is not None for parameter in parts.suffix.parameters())
    with torch.no_grad():
        for parameter in parts.suffix.parameters():
            parameter -= parameter.grad
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("tail", [nn.ReLU(inplace=True), nn.Sequential(nn.Flatten(0), nn.ReLU6(inplace=True))])
def test_in_place_layer_right_after_the_cut(tail):
    assert_exact(nn.Sequential(nn.Linear(3, 3), tail, nn.Identity()), "0", images(4, 3))


def test_in_place_first_layer():
    parts = split(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2), nn.Tanh()), at="1")
    x = -torch.ones(1, 3)
    parts.trunk(x)
    assert torch.equal(x, -torch.ones(1, 3))


class InPlaceMethod(nn.Module):
    def __init__(self, change) -> None:
        super().__init__()
        self.first, self.last, self.change = nn.Linear(3, 3), nn.Linear(3, 2), change

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        self.change(x)  # the result is not used: only the side effect counts
        return self.last(x)


@pytest.mark.parametrize("change", [lambda x: x.mul_(2), F.relu_, lambda x: F.relu(x, inplace=True), lambda x: x.view(-1).add_(1)])
def test_in_place_statement_after_the_cut(change):
    assert_exact(InPlaceMethod(change), "first", images(2, 3))


@pytest.mark.parametrize("function", [operator.iadd, operator.isub, operator.imul, operator.itruediv])
def test_augmented_assignment_changes_every_name_of_the_tensor(function):
    assert_exact(InPlaceMethod(lambda x: function(x, 3)), "first", images(2, 3))


class Chunks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.fc = nn.LSTM(4, 6, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        out, (h, _) = self.lstm(x)
        left, right = (out[:, -1] + h[0]).chunk(2, 1)
        return self.fc(left * right)


def test_module_that_returns_a_tuple():
    parts = assert_exact(Chunks(), "lstm", images(1, 5, 4))
    shapes = [tuple(z.shape) for z in parts.trunk(images(1, 5, 4)).values()]
    assert shapes == [(1, 5, 6), (1, 6)]  # the tuple is unpacked in the trunk, its tensors are sliced in the suffix


class Buffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(3.0), persistent=False)
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.b.weight.shape[0] > 9:  # shapes of parameters are known while tracing
            x = x * 2
        return self.b(self.a(x + self.table) * self.table + torch.full((3,), 0.5))


def test_non_persistent_buffers_and_constants_stay_out_of_the_state_dict():
    parts = assert_exact(Buffers(), "a", images(1, 3))
    assert sorted(parts.suffix.state_dict()) == ["b.bias", "b.weight"]


def test_output_may_be_a_dict():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            z = self.body(x)
            return {"a": self.a(z), "b": self.b(z), "z": z}

    model, x = Two(), images(1, 3)
    parts = split(model, at="body")
    expected, got = model(x), parts.suffix(parts.trunk(x))
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[key], got[key]) for key in expected)


def test_unknown_name_lists_valid_ones_close_first():
    with pytest.raises(SplitError, match=r"no module named 'layer33'.*choose one of: layer3, ") as caught:
        split(resnet20(), at="layer33")
    listed = str(caught.value).partition("choose one of: ")[2].split(", ")
    assert "layer1.2.conv2" in listed and "layer3.2" in listed
    assert "linear" not in listed  # nothing would be left for the suffix
    assert len(set(listed)) == len(listed)
    for name in listed[:3]:
        split(resnet20(), at=name)


@pytest.mark.parametrize(
    ("model", "at", "words"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "1", "nothing is left for the suffix after '1'; choose one of: 0"),
        (nn.Sequential(nn.Linear(2, 2), nn.Sequential(), nn.ReLU()), "1", "'1' computes nothing; choose one of: 0"),
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "", "no module named ''"),
        (Residual(), "relu", "'relu' is called 2 times"),
        (nn.Linear(2, 2), "x", "no module is called once and has something behind it; give every call"),
    ],
)
def test_names_that_cannot_be_cut_at(model, at, words):
    with pytest.raises(SplitError, match=words):
        split(model, at=at)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Sequential(nn.Linear(2, 2), Gate()), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(x))


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


def test_data_dependent_control_flow_names_the_place():
    with pytest.raises(SplitError, match=r"module 'inner\.1', .*test_split\.py:\d+ \(if x\.sum\(\) > 0:\).*submodule") as caught:
        split(Branches(), at="inner.0")
    assert isinstance(caught.value, EdgeclError) and isinstance(caught.value, ValueError)


def test_control_flow_in_the_models_own_forward_names_the_line():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            z = self.a(x)
            return z if z.mean() > 0 else x

    with pytest.raises(SplitError, match=r"in the model's own forward, .*if z\.mean\(\) > 0"):
        split(Own(), at="a")


class Clip(torch.autograd.Function):
    """Its gradient is autograd's own unless it is large, so that no comparison on a sample need find it."""

    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clamp(-1e3, 1e3)


clip = Clip.apply


class Clipped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return clip(x)


def clipped() -> nn.Module:
    return randomised(nn.Sequential(nn.Linear(3, 4), Clipped(), nn.Sequential(nn.Linear(4, 4), Clipped()), nn.Linear(4, 2)))


@pytest.mark.parametrize(("at", "place"), [("0", "'1'"), ("1", "'2.1'"), ("2.0", "'2.1'")])
def test_a_custom_backward_behind_the_cut_is_named(at, place):
    parts = assert_exact(clipped(), at, images(1, 3))
    with pytest.raises(SplitError, match=rf"^model: Clip, called in module {re.escape(place)}, lies behind the cut.*; write it as plain"):
        check_backward(parts)
    with pytest.raises(SplitError, match="Clip"):
        prepare(clipped(), at=at, example=np.ones((1, 3), np.float32), method="finetune", classes=2)
    prepare(clipped(), at=at, example=np.ones((1, 3), np.float32), method="ridge", classes=2)


def test_a_custom_backward_in_the_trunk_does_no_harm():
    check_backward(assert_exact(clipped(), "2", images(1, 3)))
    prepare(clipped(), at="2", example=np.ones((1, 3), np.float32), method="finetune", classes=2)


class Caching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.a(x)
        return self.b(self.kept)


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 2))


def test_a_model_that_cannot_be_copied_says_what_to_do():
    used = Caching()
    used(images(1, 3))
    for model, at in ((used, "a"), (old_weight_norm(), "0")):
        with pytest.raises(SplitError, match=r"model: cannot be copied.*let forward keep no result.*remove_weight_norm"):
            split(model, at=at)
        with pytest.raises(SplitError, match="cannot be copied"):
            widen_head(model, "b", 3)
    used.kept = None
    assert_exact(used, "a", images(1, 3))
    model = old_weight_norm()
    nn.utils.remove_weight_norm(model[0])
    assert_exact(model, "0", images(1, 3))


@pytest.mark.parametrize(
    ("model", "at", "words"),
    [
        (lambda x: x, "a", "model: must be a torch.nn.Module, got function"),
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU()), 0, "at: must be the name of a module, got 0"),
        (nn.Sequential(nn.Linear(2, 2).half(), nn.ReLU()), "0", r"model: 0\.weight must be .* got torch.float16; call model.float\(\)"),
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2).bfloat16()), "0", r"model: 1\.weight must be .* got torch.bfloat16"),
    ],
)
def test_models_and_names_of_another_type(model, at, words):
    with pytest.raises(SplitError, match=words):
        split(model, at=at)


def test_two_inputs_are_refused():
    class Sum(nn.Module):
        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return left + right

    with pytest.raises(SplitError, match=re.escape("must take one tensor, got ['left', 'right']; pass a mapping")):
        split(Sum(), at="left")


def test_a_size_cannot_cross():
    class View(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 2, 3), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            size = x.size(0) * 1
            return self.fc(self.conv(x).view(size, -1))

    with pytest.raises(SplitError, match=r"leaves the size .*mul.*flatten\(1\)"):
        split(View(), at="conv")


def test_widen_head_keeps_old_rows():
    model = randomised(SmallCnn(6)).eval()
    before = copy.deepcopy(model.state_dict())
    wide = widen_head(model, "fc", 10)
    x = images(2, 1, 28, 28)
    assert wide(x).shape == (2, 10)
    assert torch.equal(wide.fc.weight[:6], model.fc.weight) and torch.equal(wide.fc.bias[:6], model.fc.bias)
    assert not wide.fc.weight[6:].any() and not wide.fc.bias[6:].any()
    assert torch.allclose(wide(x)[:, :6], model(x)) and not wide(x)[:, 6:].any()
    assert wide.fc.out_features == 10 and model.fc.out_features == 6
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_widen_head_without_bias_nested_and_frozen():
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 2, bias=False)))
    model.requires_grad_(False)
    wide = widen_head(model, "0.0", 2)
    assert torch.equal(wide[0][0].weight, model[0][0].weight) and wide[0][0].weight.data_ptr() != model[0][0].weight.data_ptr()
    assert widen_head(model, "0.0", 4)[0][0].bias is None
    assert not widen_head(model, "0.0", 4)[0][0].weight.requires_grad


@pytest.mark.parametrize(
    ("name", "classes", "words"),
    [
        ("f", 9, "name: must be an nn.Linear of the model, got 'f'; choose one of: fc"),
        ("block1.0", 9, "must be an nn.Linear"),
        ("fc", 5, "at least the 6 outputs of 'fc', got 5"),
    ],
)
def test_widen_head_refuses(name, classes, words):
    with pytest.raises(SplitError, match=words):
        widen_head(SmallCnn(6), name, classes)


@pytest.mark.parametrize(("layout", "axes"), [("HWC", (0, 3, 1, 2)), ("CHW", (0, 1, 2, 3)), ("HW", None)])
def test_image_u8_equals_the_formula(layout, axes):
    channels = 1 if layout == "HW" else 3
    mean, std = [0.485, 0.456, 0.406][:channels], [0.229, 0.224, 0.225][:channels]
    shape = {"HWC": (2, 4, 5, 3), "CHW": (2, 3, 4, 5), "HW": (2, 4, 5)}[layout]
    x = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    kept = x.clone()
    planes = x.double().permute(axes) if axes else x.double()[:, None]
    expected = torch.stack([(planes[:, c] / 255 - mean[c]) / std[c] for c in range(channels)], 1)
    got = ImageU8(mean, std, layout)(x)
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(x, kept)


@pytest.mark.parametrize(
    ("mean", "std", "layout", "words"),
    [
        ([0.5], [0.5], "WH", "layout: must be"),
        ([0.5, 0.5], [0.5], "HWC", "got 2 and 1"),
        ([], [], "CHW", "got 0 and 0"),
        ([0.5], [0.0], "HW", "std positive, got"),
        ([0.5], [float("nan")], "HW", "must be finite"),
        ([float("inf")], [0.5], "HW", "must be finite"),
    ],
)
def test_image_u8_refuses(mean, std, layout, words):
    with pytest.raises(InputError, match=words):
        ImageU8(mean, std, layout)


@pytest.mark.parametrize("size", [(7, 3), (2, 9)])
def test_image_u8_resizes_as_interpolate_does(size):
    x = torch.randint(0, 256, (2, 4, 5, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    expected = nn.functional.interpolate(ImageU8(mean, std)(x).double(), size, mode="bilinear", align_corners=False)
    assert torch.allclose(ImageU8(mean, std, size=size)(x).double(), expected, rtol=0, atol=1e-5)


def test_image_u8_makes_a_grey_image_as_many_channels_as_there_are_means():
    x = torch.randint(0, 256, (2, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    assert torch.equal(ImageU8(mean, std, "HW", (8, 8))(x), ImageU8(mean, std, "CHW", (8, 8))(x[:, None].expand(-1, 3, -1, -1)))


@pytest.mark.parametrize("size", [(0, 4), (4,), (4, 5, 6), 96, "96", (4.5, 4), (4, 5000), (True, 4)])
def test_image_u8_refuses_a_size(size):
    with pytest.raises(InputError, match="size: must be "):
        ImageU8([0.5], [0.5], "HW", size)


def test_image_u8_refuses_an_image_of_other_channels():
    with pytest.raises(InputError, match="mean, std: must have one value for each of the image's 2 channels, got 3"):
        ImageU8([0.5] * 3, [0.5] * 3, "CHW")(torch.zeros(1, 2, 4, 4, dtype=torch.uint8))


class Uncopied:
    def __reduce_ex__(self, protocol):
        raise AttributeError("no pickling here")


def test_what_cannot_be_copied_for_any_reason_is_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model.helper = Uncopied()
    with pytest.raises(SplitError, match="model: cannot be copied"):
        split(model, at="0")


@pytest.mark.parametrize("name", ["class", "lambda", "q'q", "new\nline"])
def test_module_names_that_code_cannot_have_are_named(name):
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.heads = nn.Linear(2, 2), nn.ModuleDict({name: nn.Linear(2, 3)})

        def forward(self, x: Tensor) -> Tensor:
            return self.heads[name](self.first(x))

    with pytest.raises(SplitError, match=r"model: module .* must have a plain name, which torch\.fx can write into code"):
        split(Heads(), at="first")
