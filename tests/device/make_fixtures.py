"""Writes the two tiny bundles of the device tests by hand, in ONNX's text format: python tests/device/make_fixtures.py [folder].

They need nothing of the host package, so that the device tests run where there is no PyTorch. ``encode`` is a linear map of
16 bytes to 8 features. ``means`` keeps class sums (learn, forget, relabel; its guard refuses features beyond 20);
``head`` is a softmax head trained by SGD on the sample and two replayed rows kept as bytes.
"""

import dataclasses
import hashlib
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper, parser
from safetensors.numpy import save

from edgecl_device.generator import Generator
from edgecl_device.manifest import UNSEEN_SCORE, FileEntry, Manifest, ReplaySpec, StepSpec, TargetSpec, TensorSpec, sha256_file, to_json

HERE = Path(__file__).resolve().parent
D, K, R = 8, 5, 2

X = TensorSpec("x", (1, 4, 4), "uint8")
Z = TensorSpec("z", (1, D), "float32")
TARGET = TensorSpec("target", (1,), "int64")
NEW_TARGET = TensorSpec("new_target", (1,), "int64")
WEIGHT = TensorSpec("weight", (1,), "float32")
LR = TensorSpec("lr", (), "float32")
SCORES = TensorSpec("scores", (1, K), "float32")
LOSS = TensorSpec("loss", (), "float32")
FINITE = TensorSpec("finite", (), "bool")
GUARD = TensorSpec("guard", (), "bool")
SIZE = TensorSpec("health.size", (), "float32")

ENCODE = "pixels = Cast <to = 1> (x)  flat = Reshape (pixels, row)  product = MatMul (flat, trunk)  z = Add (product, shift)"

FINITE_MEANS = """
    total_a = ReduceSum <keepdims = 0> (next_sum)  total_b = ReduceSum <keepdims = 0> (next_count)
    total = Add (total_a, total_b)  zeroed = Sub (total, total)  finite = Equal (zeroed, zero)
"""
MEANS_SCORES = """
    seen = Greater (state_count, zero)  divisor = Max (state_count, one)  column = Unsqueeze (divisor, last)
    mean = Div (state_sum, column)  apart = Sub (mean, z)  square = Mul (apart, apart)
    distance = ReduceSum <keepdims = 0> (square, last)  near = Neg (distance)  masked = Where (seen, near, unseen)
    scores = Unsqueeze (masked, first)
"""
HOT = "hot_flag = Equal ({target}, classes)  hot_raw = Cast <to = 1> (hot_flag)  {hot} = Mul (hot_raw, {weight})"
ADD = """
    hot_column = Unsqueeze ({hot}, last)  change = Mul (hot_column, z)
    next_sum = {op} (state_sum, change)  next_count = {op} (state_count, {hot})
"""
MEANS_GUARD = "absolute = Abs (z)  health_size = ReduceMax <keepdims = 0> (absolute)  guard = Less (health_size, limit)"
MEANS = {
    "predict": MEANS_SCORES,
    "learn": MEANS_SCORES
    + HOT.format(target="target", hot="hot", weight="weight")
    + ADD.format(hot="hot", op="Add")
    + "loss_sum = ReduceSum <keepdims = 0> (z)  loss = Abs (loss_sum)"
    + MEANS_GUARD
    + FINITE_MEANS,
    # Refused when the class would have fewer than no samples.
    "forget": HOT.format(target="target", hot="hot", weight="weight")
    + ADD.format(hot="hot", op="Sub")
    + "health_size = ReduceMin <keepdims = 0> (next_count)  guard = Greater (health_size, low)"
    + FINITE_MEANS,
    "relabel": HOT.format(target="new_target", hot="hot_new", weight="weight")
    + "old_flag = Equal (target, classes)  old_raw = Cast <to = 1> (old_flag)"
    + "hot_old = Mul (old_raw, weight)  hot = Sub (hot_new, hot_old)"
    + ADD.format(hot="hot", op="Add")
    + FINITE_MEANS,
}

HEAD = {
    "predict": "scores = Gemm (z, state_weight, state_bias)",
    "learn": """
    centred = Mul (z, sixteen)  lifted = Add (centred, middle)  rounded = Round (lifted)  clipped = Clip (rounded, zero, top)
    row_z = Cast <to = 2> (clipped)
    codes = Cast <to = 1> (replay_z)  lowered = Sub (codes, middle)  old = Div (lowered, sixteen)
    rows = Concat <axis = 0> (z, old)  labels = Concat <axis = 0> (target, replay_target)
    weights = Concat <axis = 0> (weight, replay_weight)
    logits = Gemm (rows, state_weight, state_bias)
    scores = Slice (logits, first, last, first)
    label_column = Unsqueeze (labels, last)  hot_flag = Equal (label_column, classes)  hot = Cast <to = 1> (hot_flag)
    total_weight = ReduceSum <keepdims = 0> (weights)  share = Div (weights, total_weight)  share_column = Unsqueeze (share, last)
    logp = LogSoftmax <axis = 1> (logits)  picked = Mul (hot, logp)  shared = Mul (picked, share_column)
    summed = ReduceSum <keepdims = 0> (shared)  loss = Neg (summed)
    p = Exp (logp)  error = Sub (p, hot)  delta = Mul (error, share_column)  step = Mul (delta, lr)
    turned = Transpose <perm = [1, 0]> (rows)  change = MatMul (turned, step)  next_weight = Sub (state_weight, change)
    bias_change = ReduceSum <keepdims = 0> (step, first)  next_bias = Sub (state_bias, bias_change)
    total_a = ReduceSum <keepdims = 0> (next_weight)  total_b = ReduceSum <keepdims = 0> (next_bias)
    total = Add (total_a, total_b)  zeroed = Sub (total, total)  finite = Equal (zeroed, zero)
""",
}


def trunk() -> np.ndarray:
    """Weights [16, D] of the linear trunk: multiples of 1/2**13, so that sums are exact in any order."""
    generator = Generator(seed=2024)
    return np.array([generator.below(257) - 128 for _ in range(16 * D)], np.float32).reshape(16, D) / 8192


def constants() -> dict[str, np.ndarray]:
    """Everything a graph's text may name."""
    scalars = {"zero": 0, "one": 1, "unseen": UNSEEN_SCORE, "limit": 20, "low": -0.5, "sixteen": 16, "middle": 128, "top": 255}
    return {
        **{name: np.array(value, np.float32) for name, value in scalars.items()},
        "row": np.array([1, 16], np.int64),
        "first": np.array([0], np.int64),
        "last": np.array([1], np.int64),
        "classes": np.arange(K, dtype=np.int64),
        "trunk": trunk(),
        "shift": np.full(D, -0.25, np.float32),
    }


def model(text: str, inputs: dict[str, TensorSpec], outputs: dict[str, TensorSpec]) -> onnx.ModelProto:
    """A model from the text of its nodes; the keys of ``inputs`` and ``outputs`` are its names in the file, dots written as ``_``."""

    def declared(specs: dict[str, TensorSpec]) -> str:
        kinds = {"float32": "float", "int64": "int64", "uint8": "uint8", "bool": "bool"}
        return ", ".join(f"{kinds[s.dtype]}[{', '.join(map(str, s.shape))}] {n.replace('.', '_')}" for n, s in specs.items())

    found = parser.parse_graph(f"step ({declared(inputs)}) => ({declared(outputs)}) {{ {text} }}")
    names = {name.replace(".", "_"): name for name in (*inputs, *outputs)}
    for value in (*found.input, *found.output):
        value.name = names[value.name]
        value.type.tensor_type.shape.SetInParent()
    for node in found.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    used = {name for node in found.node for name in node.input}
    found.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants().items() if name in used)
    made = onnx.helper.make_model(found, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 18)], producer_name="edgecl-tests")
    onnx.checker.check_model(made, full_check=True)
    return made


def write_bundle(
    folder: Path,
    method: str,
    texts: dict[str, str],
    state: dict[str, np.ndarray],
    steps: dict[str, tuple[list[TensorSpec], list[TensorSpec]]],
    rows: dict[str, np.ndarray] | None = None,
    **more: object,
) -> None:
    """Write graphs, state and manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    specs = {name: TensorSpec(name, value.shape, str(value.dtype)) for name, value in state.items()}
    found = {}
    for name, (inputs, outputs) in {"encode": ([X], [Z]), **steps}.items():
        reads = () if name == "encode" else tuple(specs)
        writes = () if name in ("encode", "predict") else tuple(specs)
        ins = {**{f"state.{n}": specs[n] for n in reads}, **{s.name: s for s in inputs}}
        outs = {**{s.name: s for s in outputs}, **{f"next.{n}": specs[n] for n in writes}}
        made = model(ENCODE if name == "encode" else texts[name], ins, outs)
        used = {name for node in made.graph.node for name in node.input}
        unread = [n for n in reads if f"state.{n}" not in used]
        assert not unread, (name, unread)
        (folder / f"{name}.onnx").write_bytes(made.SerializeToString(deterministic=True))
        macs = {"encode": 16 * D, "predict": D * K, "learn": 3 * D * K}.get(name, D * K)
        phases = {"encode" if name == "encode" else "forward": macs}
        found[name] = StepSpec(f"{name}.onnx", tuple(inputs), reads, tuple(outputs), writes, macs, macs, phases, 0, 1024)
    (folder / "state.safetensors").write_bytes(save(state))
    if rows is not None:
        (folder / "rows.safetensors").write_bytes(save(rows))
    files = {p.name: FileEntry(sha256_file(p), p.stat().st_size) for p in sorted(folder.iterdir()) if p.name != "manifest.json"}
    identity = f"{method} {files['encode.onnx'].sha256}"
    manifest = Manifest(
        method=method, config={}, target=TargetSpec(), max_classes=K, class_names=("cat", "dog"), steps=found, state=tuple(specs.values()),
        state_file="state.safetensors", bundle_id=hashlib.sha256(identity.encode()).hexdigest(),
        replay_file=None if rows is None else "rows.safetensors", pending_capacity=4, log_capacity_bytes=1 << 16, files=files, versions={},
    )  # fmt: skip
    (folder / "manifest.json").write_text(to_json(dataclasses.replace(manifest, **more)))


def write_all(root: Path) -> None:
    """Write both bundles under ``root``."""
    means = {"sum": np.zeros((K, D), np.float32), "count": np.zeros(K, np.float32)}
    write_bundle(
        root / "means", "means", MEANS, means, forgets=True,
        steps={
            "predict": ([Z], [SCORES]),
            "learn": ([Z, TARGET, WEIGHT], [SCORES, LOSS, FINITE, GUARD, SIZE]),
            "forget": ([Z, TARGET, WEIGHT], [FINITE, GUARD, SIZE]),
            "relabel": ([Z, TARGET, NEW_TARGET, WEIGHT], [FINITE]),
        },
    )  # fmt: skip
    fields = (TensorSpec("z", (D,), "uint8"),)
    replayed = [
        TensorSpec("replay.z", (R, D), "uint8"),
        TensorSpec("replay.target", (R,), "int64"),
        TensorSpec("replay.weight", (R,), "float32"),
    ]
    rows = {"replay.z": np.arange(3 * D, dtype=np.uint8).reshape(3, D), "replay.target": np.array([1, 0, 1])}
    write_bundle(
        root / "head", "head", HEAD, {"weight": np.full((D, K), 0.125, np.float32), "bias": np.zeros(K, np.float32)}, rows=rows,
        steps={
            "predict": ([Z], [SCORES]),
            "learn": ([Z, TARGET, WEIGHT, LR, *replayed], [SCORES, LOSS, FINITE, TensorSpec("row.z", (1, D), "uint8")]),
        },
        learning_rate=0.05, replay=ReplaySpec(fields, R, 300, "reservoir", seed=11, counter=5, seen=3),
    )  # fmt: skip


if __name__ == "__main__":
    write_all(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "bundles")
