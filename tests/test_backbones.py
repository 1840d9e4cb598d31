import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from edgecl import prepare
from edgecl.backbones import (
    BACKBONES,
    Cnn1d,
    DsCnn,
    GruClassifier,
    MobileNetV2,
    SmallCnn,
    VisionTransformer,
    WeightsError,
    load_weights,
    resnet18,
    resnet20,
    resnet56,
)
from edgecl.options import INPUTS
from edgecl.streams import fashion_mnist_subset


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "count"),
    [
        # Idelbayev's README: 0.27 M, 0.46 M, 0.66 M, 0.85 M; option A adds none to convolutions, norms and classifier.
        ("resnet20", 269_722),
        ("resnet32", 464_154),
        ("resnet44", 658_586),
        ("resnet56", 853_018),
        ("wrn_40_2", 2_243_546),  # 2.2 M and 36.5 M in the paper's table
        ("wrn_28_10", 36_479_194),
        ("mobilenet_v2", 3_504_872),  # torchvision's documentation
        ("resnet18", 11_689_512),  # torchvision's documentation
        ("ds_cnn", 23_756),  # MLPerf Tiny's reference: 24,908 with 1,152 stored statistics
        # by hand: patches, class token, positions; a block: two norms, qkv, proj, two linear layers; norm and head
        ("vit", 49 * 192 + 66 * 192 + 4 * (768 + 193 * 576 + 193 * 192 + 193 * 768 + 769 * 192) + 384 + 1930),
        ("cnn1d", 73 * 128 + 641 * 256 + 769 * 128 + 2 * (128 + 256 + 128) + 129 * 6),
        ("gru", 3 * 64 * (9 + 64 + 2) + 3 * 64 * (64 + 64 + 2) + 65 * 6),
        ("small_cnn", 9 * (16 + 16 * 32 + 32 * 64 + 64 * 62) + 2 * (16 + 32 + 64 + 62) + 63 * 10),
    ],
)
def test_parameter_counts(name, count):
    assert parameters(BACKBONES[name]()) == count


@pytest.mark.parametrize(("width", "millions"), [(1.4, 6.06), (1.0, 3.47), (0.75, 2.61), (0.5, 1.95), (0.35, 1.66)])
def test_mobilenet_widths_equal_published_counts(width, millions):
    # The table beside the paper authors' checkpoints: 1,001 classes, norms folded into the convolutions and not counted.
    model = MobileNetV2(1001, width=width)
    norms = sum(parameters(module) for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    assert (parameters(model) - norms) / 1e6 == pytest.approx(millions, abs=0.005)


def test_keys_are_the_published_ones():
    resnet = set(resnet20().state_dict())
    assert {"conv1.weight", "bn1.running_var", "layer1.0.conv1.weight", "layer3.2.bn2.bias", "linear.bias"} <= resnet
    assert not any("shortcut" in key or "downsample" in key for key in resnet)
    mobilenet = set(MobileNetV2().state_dict())
    assert {
        "features.0.0.weight", "features.0.1.running_mean", "features.1.conv.0.0.weight", "features.1.conv.1.weight",
        "features.1.conv.2.bias", "features.2.conv.0.0.weight", "features.2.conv.1.0.weight", "features.17.conv.2.weight",
        "features.17.conv.3.running_var", "features.18.1.bias", "classifier.1.weight",
    } <= mobilenet  # fmt: skip
    large = set(resnet18().state_dict())
    assert {
        "conv1.weight",
        "bn1.running_var",
        "layer1.0.conv1.weight",
        "layer2.0.downsample.0.weight",
        "layer4.1.bn2.bias",
        "fc.bias",
    } <= large
    assert len(large) == 2 + 6 * 20
    vit = set(VisionTransformer().state_dict())
    assert {
        "cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight", "blocks.3.attn.qkv.bias", "blocks.0.attn.proj.weight",
        "blocks.2.norm2.bias", "blocks.1.mlp.fc1.weight", "blocks.1.mlp.fc2.bias", "norm.weight", "head.bias",
    } <= vit  # fmt: skip
    assert len(vit) == 4 + 4 * 12 + 4
    assert len(resnet) == 2 + 6 * 19 and len(mobilenet) == 2 + 6 * 52  # one convolution and one norm a layer, and the classifier


@pytest.mark.parametrize(
    ("model", "shape", "width"),
    [
        (resnet20(), (3, 32, 32), 64),
        (MobileNetV2(10, width=0.35), (3, 32, 32), 1280),
        (SmallCnn(), (1, 28, 28), 62),
        (resnet18(10, width=0.125), (3, 64, 64), 64),
        (DsCnn(10), (1, 49, 10), 64),
        (Cnn1d(10), (9, 128), 128),
    ],
)
def test_every_backbone_can_be_cut_at_its_vector_of_features(model, shape, width):
    assert not [key for key in model.state_dict() if key.startswith("pool")]
    ready = prepare(model, at="pool", example=torch.rand(1, *shape).numpy(), method="ridge", classes=10)
    assert ready.learner.problem.features.shape == (1, width)


@pytest.mark.parametrize(
    ("model", "at", "shape", "features"),
    [
        (VisionTransformer(size=24, heads=3), "blocks.1", (3, 32, 32), (1, 65, 24)),
        (GruClassifier(10, hidden=8), "gru1", (20, 9), (1, 20, 8)),
        (GruClassifier(10, hidden=8), "gru2", (20, 9), (1, 20, 8)),
    ],
)
def test_sequences_can_be_cut_between_their_layers(model, at, shape, features):
    ready = prepare(model, at=at, example=torch.rand(1, *shape).numpy(), method="ridge", classes=10)
    assert ready.learner.problem.features.shape == features


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_takes_its_input_and_gives_scores(name):
    model = BACKBONES[name](classes=7).eval().to("meta")
    assert model(torch.zeros(INPUTS[name], device="meta")).shape == (1, 7)


def test_resnet18_shapes_follow_the_paper():
    model, x, sizes = resnet18().to("meta"), torch.zeros(1, 3, 224, 224, device="meta"), []
    x = model.maxpool(model.conv1(x))
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        x = stage(x)
        sizes.append(tuple(x.shape[1:]))
    assert sizes == [(64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7)]


def test_ds_cnn_pads_as_mlperf_tiny_does():
    """Of 49 frames and 10 coefficients, 25 and 5 positions; the first window begins 4 frames before the first."""
    stem = DsCnn().eval().stem
    nn.init.zeros_(stem[1].bias)
    nn.init.ones_(stem[1].weight)
    assert stem(torch.ones(1, 1, 49, 10)).shape == (1, 64, 25, 5)
    sums = stem[1](stem[0](torch.ones(1, 1, 49, 10)))[0, 0]
    assert sums[0].tolist() == [6 * n for n in (3, 4, 4, 4, 3)] and sums[-1].tolist() == [5 * n for n in (3, 4, 4, 4, 3)]


def test_attention_equals_softmax_of_scaled_products():
    model = VisionTransformer(size=12, heads=3).eval()
    layer, x = model.blocks[0].attn, torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    q, k, v = (x @ layer.qkv.weight[i : i + 12].T + layer.qkv.bias[i : i + 12] for i in (0, 12, 24))
    heads = [torch.softmax(q[..., s] @ k[..., s].transpose(1, 2) / 2, -1) @ v[..., s] for s in (slice(0, 4), slice(4, 8), slice(8, 12))]
    expected = torch.cat(heads, -1) @ layer.proj.weight.T + layer.proj.bias
    assert torch.allclose(layer(x), expected, atol=1e-6)


def test_resnet_shortcut_takes_every_second_pixel_and_pads_channels():
    model = resnet20().eval()
    block = model.layer2[0]
    nn.init.zeros_(block.bn2.weight)  # only the shortcut is left
    x = torch.rand(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(1, 32, 4, 4)
    for channel in range(16):
        for row in range(4):
            for column in range(4):
                expected[0, channel + 8, row, column] = x[0, channel, 2 * row, 2 * column]
    assert torch.equal(block(x), expected)


def test_resnet_equals_the_same_net_written_with_functions():
    model = resnet20().eval()
    generator = torch.Generator().manual_seed(3)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    w = model.state_dict()
    x = torch.randn(2, 3, 32, 32, generator=generator)

    def norm(z: Tensor, key: str) -> Tensor:
        mean, var, scale, shift = (w[f"{key}.{f}"].reshape(1, -1, 1, 1) for f in ("running_mean", "running_var", "weight", "bias"))
        return (z - mean) / torch.sqrt(var + 1e-5) * scale + shift

    z = torch.relu(norm(F.conv2d(x, w["conv1.weight"], padding=1), "bn1"))
    for stage in (1, 2, 3):
        for block in range(3):
            key, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            out = torch.relu(norm(F.conv2d(z, w[f"{key}.conv1.weight"], stride=stride, padding=1), f"{key}.bn1"))
            out = norm(F.conv2d(out, w[f"{key}.conv2.weight"], padding=1), f"{key}.bn2")
            if stride == 2:
                zeros = z.new_zeros(2, z.shape[1] // 2, *out.shape[2:])
                z = torch.cat([zeros, z[:, :, ::2, ::2], zeros], 1)
            z = torch.relu(out + z)
    expected = z.mean((2, 3)) @ w["linear.weight"].T + w["linear.bias"]
    assert torch.allclose(model(x), expected, rtol=1e-4, atol=1e-5 * float(expected.detach().abs().max()))


def test_mobilenet_shapes_follow_the_paper():
    model = MobileNetV2().eval()
    x, shapes = torch.zeros(1, 3, 224, 224, device="meta"), []
    for layer in model.to("meta").features:
        x = layer(x)
        shapes.append((x.shape[1], x.shape[2]))
    blocks = [(32, 112, 1), (16, 112, 1), (24, 56, 2), (32, 28, 3), (64, 14, 4), (96, 14, 3), (160, 7, 3), (320, 7, 1), (1280, 7, 1)]
    assert shapes == [(channels, size) for channels, size, count in blocks for _ in range(count)]


def test_small_cnn_macs():
    model, macs = SmallCnn().eval(), []

    def count(module: nn.Module, _: object, out: Tensor) -> None:
        macs.append(out[0].numel() * module.weight[0].numel())

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    model(torch.zeros(1, 1, 28, 28))
    assert macs == [9 * 16 * 784, 9 * 16 * 32 * 196, 9 * 32 * 64 * 49, 9 * 64 * 62 * 9, 620]
    assert sum(macs) == pytest.approx(2.24e6, rel=0.01)


def test_small_cnn_learns_fashion_mnist():
    data = fashion_mnist_subset()
    base = data.y < 6
    x, y = torch.from_numpy(data.x[base]).float().unsqueeze(1) / 255, torch.from_numpy(data.y[base])
    generator = torch.Generator().manual_seed(0)
    model = SmallCnn(6, generator=generator)
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(3):
        for rows in torch.randperm(len(x), generator=generator).split(32):
            optimiser.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimiser.step()
    model.eval()
    test = data.y_test < 6
    right = model(torch.from_numpy(data.x_test[test]).float().unsqueeze(1) / 255).argmax(1).numpy() == data.y_test[test]
    assert right.mean() > 0.8


@pytest.mark.parametrize("name", ["small_cnn", "resnet20", "ds_cnn", "cnn1d"])
def test_initial_weights_come_from_the_generator(name):
    torch.manual_seed(1)
    first = BACKBONES[name](classes=4, generator=torch.Generator().manual_seed(5)).state_dict()
    torch.manual_seed(2)
    same = BACKBONES[name](classes=4, generator=torch.Generator().manual_seed(5)).state_dict()
    other = BACKBONES[name](classes=4, generator=torch.Generator().manual_seed(6)).state_dict()
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert sum(not torch.equal(first[key], other[key]) for key in first) == sum(value.ndim > 1 for value in first.values())


@pytest.mark.parametrize("name", ["vit", "gru"])
def test_initial_weights_of_sequences_come_from_the_generator(name):
    first, same, other = (BACKBONES[name](generator=torch.Generator().manual_seed(seed)).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(first[key], same[key]) for key in first)
    drawn = [key for key in first if not torch.equal(first[key], other[key])]
    assert set(drawn) >= {key for key, value in first.items() if value.ndim > 1}


def test_initialisation_has_the_variance_of_he():
    weight = resnet56().layer3[1].conv1.weight.detach()
    assert float(weight.std()) == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)


def different(model: nn.Module) -> dict[str, Tensor]:
    return {key: value + 1 for key, value in model.state_dict().items()}


@pytest.mark.parametrize("form", ["th", "pth", "safetensors"])
def test_load_weights_of_every_form(tmp_path, form):
    model = resnet20()
    wanted = different(model)
    path = tmp_path / f"weights.{form}"
    if form == "th":
        old = {f"module.{key}": value for key, value in wanted.items() if not key.endswith("num_batches_tracked")}
        torch.save({"state_dict": old, "best_prec1": 91.7}, path)
    elif form == "pth":
        torch.save(wanted, path)
    else:
        save_file(wanted, path)
    load_weights(model, path)
    got = model.state_dict()
    assert all(torch.equal(got[key], wanted[key]) for key in wanted if form != "th" or not key.endswith("num_batches_tracked"))


def saved(tmp_path, change) -> tuple[nn.Module, str]:
    model = SmallCnn(3)
    weights = different(model)
    change(weights)
    torch.save(weights, tmp_path / "w.pth")
    return model, str(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("fc.bias"), "missing fc.bias; unexpected none"),
        (lambda w: w.update(extra=torch.zeros(1)), "missing none; unexpected extra"),
        (lambda w: w.update({"fc.weight": torch.zeros(4, 62)}), r"fc.weight must have shape \[3, 62\], got \[4, 62\]"),
        (lambda w: [w.pop(key) for key in list(w) if key.startswith("block")], r"missing .* and 12 more"),
        (lambda w: w.update(epoch=3), "mapping of names to tensors"),
        (lambda w: w.update({1: torch.zeros(1)}), "mapping of names to tensors"),
        (lambda w: w.update({"module.fc.bias": torch.zeros(3)}), "keys must be different, some are there with and without 'module.'"),
        (
            lambda w: w.update({"fc.bias": torch.full((3,), 1e300, dtype=torch.float64)}),
            r"fc.bias must hold torch.float32 .*too large.*; save",
        ),
        (lambda w: w.update({"fc.bias": torch.zeros(3, dtype=torch.complex64)}), "fc.bias must hold .*, got torch.complex64"),
        (lambda w: w.update({"fc.bias": torch.zeros(3).to_sparse()}), r"fc.bias must hold .* \(.*sparse.*\); save the weights as dense"),
        (lambda w: w.update({"fc.bias": torch.zeros(3, device="meta")}), "fc.bias must hold .*; save the weights as dense"),
    ],
)
def test_weights_that_do_not_fit_leave_the_model_alone(tmp_path, change, words):
    model, path = saved(tmp_path, change)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(WeightsError, match=words):
        load_weights(model, path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_unreadable_files_are_refused(tmp_path, capsys, name):
    path = tmp_path / name
    with pytest.raises(WeightsError, match="no such file"):
        load_weights(SmallCnn(), path)
    path.write_bytes(b"")
    with pytest.raises(WeightsError, match="not a readable weight file"):
        load_weights(SmallCnn(), path)
    path.write_bytes(b"not weights")
    with pytest.raises(WeightsError, match="not a readable weight file"):
        load_weights(SmallCnn(), path)
    torch.save({"fc.weight": Evil()}, path)
    with pytest.raises(WeightsError, match="not a readable weight file"):
        load_weights(SmallCnn(), path)
    assert capsys.readouterr().out == ""
    for odd in ("a" * 5000, "a\0b", tmp_path):
        with pytest.raises(WeightsError, match="no such file"):
            load_weights(SmallCnn(), odd)
    with pytest.raises(WeightsError, match="path: must be a file's path, got 3"):
        load_weights(SmallCnn(), 3)
