"""Tables of ``int8_trunk.py``."""

import statistics

from page_parts import Row, conditions, markdown

from edgecl.tables import percent, size

NETS = {"mobilenet_v2": "MobileNetV2, 96 px", "resnet20": "ResNet-20, 32 px", "ds_cnn": "DS-CNN, 49 x 10"}
ENGINES = {"onnx": "ONNX Runtime", "executorch": "ExecuTorch"}
DATA = {"cifar10": "CIFAR-10 by class, MobileNetV2", "digits": "spoken digits, a new speaker"}


def int8_part(result: Row) -> str:
    """Time, bytes and error of networks, then accuracy before and after."""
    lines = []
    for net, title in NETS.items():
        for engine, runtime in ENGINES.items():
            pair = {r["dtype"]: r for r in result["networks"] if (r["net"], r["engine"]) == (net, engine)}
            if pair:
                both = [pair["float32"], pair["int8"]]
                shown = [f"{r['ms']:.2f}" for r in both] + [
                    size(r[key]) for key in ("frozen_weights", "bundle_bytes", "activations") for r in both
                ]
                lines.append([title, runtime, *shown, percent(pair["int8"]["error"])])
    head = [
        "network",
        "runtime",
        "float32, ms",
        "int8, ms",
        "frozen weights",
        "int8",
        "bundle",
        "int8",
        "activations",
        "int8",
        "latents differ, %",
    ]
    return "\n\n".join([
        "The frozen trunk up to the pooled features, and the nearest class mean behind it. Random weights; medians, one thread, the "
        "engines in turn. Latents differ from float32's by that share of their norm, root mean square over 50 samples.",
        markdown(head, lines),
        "Accuracy of the same learner before and after; all else equal, from calibration to the order of the stream.",
        accuracy_table(result),
        f"`python benchmarks/int8_trunk.py`, {result['repeats']} repeats, {result['seeds']} seeds. {conditions(result)}",
    ])  # fmt: skip


def equal_table(result: Row) -> str:
    """How far each runtime's int8 latents are from the host's, as a share of what int8 itself costs."""
    lines = []
    for net, title in NETS.items():
        found = {r["engine"]: r for r in result["networks"] if (r["net"], r["dtype"]) == (net, "int8")}
        shares = [f"{found[engine]['from_eager'] / found[engine]['error']:.2f}" for engine in ENGINES]
        lines.append([f"{title}, random weights", percent(found["onnx"]["error"]) + " %", *shares])
    head = ["network", "latents against float32", *(f"{runtime} against the host, share of that" for runtime in ENGINES.values())]
    return markdown(head, lines) + f"\n\n`python benchmarks/int8_trunk.py`. {conditions(result)}"


def accuracy_table(result: Row) -> str:
    """Means and deviations over the seeds, and the paired difference."""
    lines = []
    for data, method in dict.fromkeys((r["data"], r["method"]) for r in result["accuracy"]):
        found = {
            dtype: [r for r in result["accuracy"] if (r["data"], r["method"], r["dtype"]) == (data, method, dtype)]
            for dtype in ("float32", "int8")
        }
        values = {dtype: [r["accuracy"] for r in rows] for dtype, rows in found.items()}
        apart = [100 * (b - a) for a, b in zip(values["float32"], values["int8"], strict=True)]
        bytes_ = [size(found[dtype][0]["bundle_bytes"]) for dtype in found]
        shown = [percent(statistics.fmean(v), statistics.stdev(v)) for v in values.values()]
        lines.append([DATA[data], method, *shown, f"{statistics.fmean(apart):+.1f}±{statistics.stdev(apart):.1f}", *bytes_])
    return markdown(["data", "method", "float32, %", "int8, %", "difference", "bundle, float32", "int8"], lines)
