"""Tables and plot of ``step_latency.py``."""

from collections.abc import Callable
from statistics import geometric_mean
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from page_parts import Row, conditions, markdown
from update_cases import SHAPES, UPDATES

from edgecl.tables import si

NAMES = {
    "onnx": "edgecl, ONNX Runtime",
    "ort_training": "ONNX Runtime training build",
    "ort_training_constants": "the same, frozen weights as constants",
    "eager": "eager PyTorch",
    "compile": "torch.compile",
    "executorch": "edgecl, ExecuTorch",
    "executorch_training": "ExecuTorch training extension",
    "forward": "forward pass",
}
"""Engines as the tables have them."""
COLOURS = {
    "onnx": "#1b6ca8",
    "ort_training": "#8fb8d8",
    "ort_training_constants": "#c9dcea",
    "eager": "#b0432f",
    "compile": "#e0a193",
    "executorch": "#2f7d4f",
    "executorch_training": "#9cc9ae",
}
NETS = {"mobilenet_v2": "MobileNetV2, 96 px", "resnet20": "ResNet-20, 32 px", "ds_cnn": "DS-CNN, 49 x 10"}

TARGETS: dict[str, tuple[float, ...]] = {
    "onnx/ort_training": (0.4, 0.6, 0.8, 0.6, 0.6, 0.7, 0.5),
    "onnx/eager": (0.25, 0.4, 0.6, 0.4, 0.4, 0.5, 0.35),
    "executorch/executorch_training": (1 / 50, 1 / 15, 1 / 5, 1 / 20, 1 / 20, 1 / 10, 1 / 10),
}
"""Of each ratio, W1 to W7: geometric means over the networks."""
LIMITS = {"W2": 1.6, "W5": 1.6, "W6": 1.6, "W3": 2.5}
"""Of an update's time over that of as many MACs in the forward pass."""


def ratio_table(result: Row) -> str:
    """Geometric means of the ratios over the networks, beside their targets."""
    rows = result["rows"]
    updates = sorted({row["update"] for row in rows})
    lines = []
    for name in dict.fromkeys(name for row in rows for name in row["ratio"]):
        if name == "onnx/forward":
            continue
        ours, theirs = (NAMES[part] for part in name.split("/"))
        cells = []
        for update in updates:
            found = [row["ratio"][name] for row in rows if row["update"] == update and name in row["ratio"]]
            text = share(name, geometric_mean(found)) if found else "-"
            if name in TARGETS:
                text += f" ({share(name, TARGETS[name][int(update[1:]) - 1])})"
            cells.append(text)
        lines.append([f"{ours} / {theirs}", *cells])
    cells = []
    for update in updates:
        found = [over_limit(row) for row in rows if row["update"] == update]
        cells.append(f"{geometric_mean(found):.1f}" + (f" ({LIMITS[update]:g})" if update in LIMITS else ""))
    lines.append(["edgecl, ONNX Runtime / forward pass x MACs", *cells])
    nets = [NETS[name] for name in SHAPES if any(row["net"] == name for row in rows)]
    meaning = "; ".join(f"{update} {UPDATES[update]}" for update in updates)
    return (
        markdown(["time of one update", *updates], lines)
        + f"\n\nGeometric means over {', '.join(nets)}; targets in brackets. {meaning}. One sample, one thread; the engines took turns "
        "of two updates, of which the second is timed, and a ratio is the median over the turns. All engines gave the same weights "
        f"(largest difference beyond two roundings {max(value for row in rows for value in row['distance'].values()):.0e} of an update). "
        "The last line divides an update's time by that of the network's forward pass with frozen weights, times the MACs of the update "
        f"over those of the pass. `python benchmarks/step_latency.py`. {conditions(result)}"
    )


def share(name: str, value: float) -> str:
    """A ratio; against ExecuTorch's training extension, which is many times slower, as a fraction."""
    return f"1/{1 / value:.0f}" if name == "executorch/executorch_training" else f"{value:.2f}".rstrip("0").rstrip(".")


def over_limit(row: Row) -> float:
    """An update's time over that of the forward pass for as many MACs."""
    return float(row["ratio"]["onnx/forward"] * row["forward_macs"] / row["update_macs"])


def case_table(result: Row) -> str:
    """Milliseconds of every engine on every case."""
    shown = [name for name in NAMES if any(name in row["ms"] for row in result["rows"])]
    lines = []
    for row in result["rows"]:
        times = [f"{row['ms'][name]:.3g}" if name in row["ms"] else "-" for name in shown]
        lines.append([NETS[row["net"]], row["update"], f"{row['trained_values']:,}", si(row["update_macs"]), *times])
    return markdown(["network", "update", "trained values", "MACs", *[NAMES[name] + ", ms" for name in shown]], lines)


def page(result: Row) -> str:
    """Both tables and the plot, for the results page."""
    return f"{ratio_table(result)}\n\n![Time of one update](figures/step_latency.png)\n\n{case_table(result)}"


MEMORY_TARGETS = {"W1": 1 / 4, "W3": 1 / 3}
"""Of edgecl's peak over eager PyTorch's."""


def memory_table(result: Row) -> str:
    """Resident memory of every engine's process."""
    lines = []
    for row in result["rows"]:
        found = row["bytes"]
        for name, sizes in found.items():
            ours = name.startswith("edgecl")
            cells = [f"{value / 1e6:.0f}" for value in (sizes["peak"], sizes["after_imports"], sizes["peak"] - sizes["after_imports"])]
            shares = [sizes["peak"] / found[other]["peak"] for other in ("eager", "ort_training")]
            target = f" (1/{1 / MEMORY_TARGETS[row['update']]:.0f})" if ours and row["update"] in MEMORY_TARGETS else ""
            ratios = [f"1/{1 / shares[0]:.1f}{target}" if ours else "-", f"{shares[1]:.2f} (1)" if ours else "-"]
            lines.append([NETS[row["net"]], row["update"], NAMES.get(name, name), *cells, *ratios])
    head = ["network", "update", "process", "peak, MB", "after imports, MB", "growth, MB", "peak / eager PyTorch", "peak / training build"]
    return (
        markdown(head, lines)
        + "\n\nResident memory of a fresh process that loads the update and makes it 200 times; targets in brackets. edgecl by the setting "
        f"`memory` of its learner. `python benchmarks/step_memory.py`, medians of {result['repeats']} processes. {conditions(result)}"
    )


START_TARGETS = {("W1", "first_prediction"): 0.5, ("W3", "first_prediction"): 0.5, ("W3", "export"): 15}
"""Seconds, by update and column."""


def start_table(result: Row) -> str:
    """Seconds to export, and from a bundle to its first prediction."""
    columns = {"export": "export, s", "gates": "of which gates, s", "import": "import, s", "load": "load, s"}
    columns |= {"first_prediction": "load to first prediction, s"}
    lines = []
    for row in result["rows"]:
        targets = {name: START_TARGETS.get((row["update"], name)) for name in columns}
        cells = [f"{row[name]:.2g}" + (f" ({target:g})" if (target := targets[name]) else "") for name in columns]
        lines.append([NETS[row["net"]], row["update"], *cells])
    return (
        markdown(["network", "update", *columns.values()], lines)
        + "\n\nOn ONNX Runtime; targets in brackets. Export as a user calls it, with every gate; starts are medians of "
        f"{result['processes']} fresh processes. `python benchmarks/step_start.py`. {conditions(result)}"
    )


PRODUCTS = {"Gemm", "FusedGemm", "MatMul", "Conv", "FusedConv", "ConvTranspose"}
MOVES = {"Gather", "Slice", "Pad", "Concat", "Transpose", "Reshape", "Split", "Expand", "ReorderInput", "ReorderOutput", "Cast"}


def profile_table(result: Row) -> str:
    """The operators that take longest, and what all of them come to."""
    rows = result["rows"]
    whole = sum(row["us"] for row in rows)

    def share(chosen: Callable[[Row], bool]) -> str:
        return f"{100 * sum(row['us'] for row in rows if chosen(row)) / whole:.0f} %"

    lines = [
        [row["operator"], "large" if row["large"] else "small", str(row["count"]), f"{row['us']:,.0f}", f"{100 * row['us'] / whole:.0f}"]
        for row in rows[:14]
    ]
    products, moves = share(lambda row: row["operator"] in PRODUCTS), share(lambda row: row["operator"] in MOVES)
    rest = share(lambda row: row["operator"] not in PRODUCTS | MOVES)
    return (
        markdown(["operator", "output", "count", "µs", "%"], lines)
        + f"\n\n{NETS[result['net']]}, {result['update']}, the worst case by time over the forward pass for as many MACs. Large outputs "
        f"have more than 4,096 values. Matrix products and convolutions take {products}, moving values about {moves}, elementwise "
        f"operators and sums {rest}. {share(lambda row: not row['large'])} of all goes to operators with small outputs: their call is most "
        f"of their time, and the profiler makes it longer. `python benchmarks/step_profile.py`. {conditions(result)}"
    )


def readme(result: Row) -> str:
    """The ratios, and where the rest is."""
    return f"{ratio_table(result)}\n\nEach network and engine: [docs/results.md](docs/results.md#updates-side-by-side)."


def plot(result: Row) -> Figure:
    """Milliseconds of an update, a panel a network."""
    nets = [name for name in SHAPES if any(row["net"] == name for row in result["rows"])]
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    panels: Any = figure.subplots(1, len(nets), squeeze=False)[0]
    for axes, net in zip(panels, nets, strict=True):
        rows = [row for row in result["rows"] if row["net"] == net]
        shown = [name for name in COLOURS if any(name in row["ms"] for row in rows)]
        width = 0.84 / len(shown)
        for i, name in enumerate(shown):
            places = [j + (i - (len(shown) - 1) / 2) * width for j, row in enumerate(rows) if name in row["ms"]]
            axes.bar(places, [row["ms"][name] for row in rows if name in row["ms"]], width, color=COLOURS[name], label=NAMES[name])
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(range(len(rows)), [row["update"] for row in rows])
        axes.set_title(NETS[net])
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    panels[0].set_ylabel("ms an update, one thread")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure
