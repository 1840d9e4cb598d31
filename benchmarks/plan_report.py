"""The tables of ``step_plan.py`` and ``step_recompute.py``."""

from page_parts import Row, conditions, markdown

from edgecl.tables import si, size

NETS = {"mobilenet_v2": "MobileNetV2, 96 px", "resnet20": "ResNet-20, 32 px", "ds_cnn": "DS-CNN, 49 x 10"}


def plan_table(result: Row) -> str:
    """What edgecl plans for an update against what the runtimes plan and use."""
    lines = []
    for row in result["rows"]:
        other, onnx = row["executorch"], row["onnx"]
        kept = onnx["kept_for_backward"]
        lines.append(
            [
                NETS[row["net"]],
                row["update"],
                *map(size, (other["arena"], other["portable"])),
                f"{other['arena'] / other['portable']:.3f}",
                *map(size, (other["own_planner"], other["shipped"], onnx["arena"], onnx["least"], onnx["requested"])),
                f"{onnx['least'] / onnx['requested']:.2f}",
                size(onnx["in_use"]),
                size(kept.get("float32", 0)),
                size(kept.get("bool", 0)),
            ]
        )
    head = ["network", "update", "plan for ExecuTorch", "its portable arena", "ratio", "by its own planner", "shipped arena"]
    head += ["plan for ONNX Runtime", "with results in place", "its use", "ratio", "with its rounding", "kept float32", "kept masks"]
    bound = max(row["onnx"]["peak"] / row["onnx"]["requested"] for row in result["rows"])

    def held(name: str) -> int:
        return sum(row["onnx"][name] <= row["onnx"]["requested"] for row in result["rows"])

    apart = max(abs(row["executorch"]["arena"] / row["executorch"]["portable"] - 1) for row in result["rows"])
    notes = [
        "Intermediate tensors of the step `learn`. ExecuTorch: arenas of the program with portable kernels alone, without inputs and",
        "outputs, by the better of edgecl's placement and its own planner, and by that planner alone; and the arena of the program that",
        "ships, with inputs and outputs, which holds nothing that XNNPACK takes for itself. ONNX Runtime: most bytes asked for after an",
        "operator by its own profile, and what its allocator held for them, memory patterns off, outputs bound; it has an order of its",
        "own. Kept: alive when the loss is there and read later.",
        "",
        markdown(head, lines),
        "",
        f"Target: within 5 % of ExecuTorch's portable plan: {100 * apart:.1f} % at most.",
        "Target: a lower bound of ONNX Runtime's use: the",
        f"plain peak in {held('peak')} of {len(result['rows'])} updates, at most {bound:.2f} times the use; the peak with elementwise",
        f"results in place of an operand that ends there in {held('least')}.",
        f"`python benchmarks/step_plan.py`. {conditions(result)}",
    ]
    return "\n".join(notes)


def recompute_table(result: Row) -> str:
    """Peak against work where activations are computed again."""
    lines = []
    for row in result["rows"]:
        plain = row["limits"][0]
        for found in row["limits"]:
            more = [f"{found['macs'] / plain['macs']:.2f}", f"{found['elementwise'] / plain['elementwise']:.2f}"]
            use = [size(found["requested"]), f"{found['time_ratio']:.2f}"] if "in_use" in found else ["-", "-"]
            limit = "-" if found["limit"] is None else f"{found['limit']:.0%}"
            lines.append([NETS[row["net"]], row["update"], row["engine"], limit, size(found["arena"]), si(found["macs"]), *more, *use])
    head = ["network", "update", "runtime", "limit", "arena", "executed MACs", "x MACs", "x elementwise", "in use", "x time"]
    notes = [
        "Arena of the step `learn` when it must fit into a part of its plan (0 %: as small as it gets), and the work that takes.",
        "In use and time on ONNX Runtime, whose order is its own; medians of turns.",
        "",
        markdown(head, lines),
        "",
        f"`python benchmarks/step_recompute.py`. {conditions(result)}",
    ]
    return "\n".join(notes)
