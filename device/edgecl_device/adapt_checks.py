"""Checks of what a manifest says about adaptation."""

import math

from edgecl_device.manifest import WHOLE, Manifest, TensorSpec

ADAPT = "adapt"
TRACK = "track"
RESETS = ("never", "every", "loss")
"""When the loop goes back to the start (:class:`edgecl_device.manifest.AdaptSpec`)."""


def adapting_fault(manifest: Manifest) -> str:
    """What does not fit together in a manifest's adaptation, with its mend; empty where all does."""
    step, spec, replay = manifest.steps.get(ADAPT), manifest.adapt, manifest.replay
    whole = replay is not None and replay.policy in WHOLE
    if (step is None) != (spec is None) or (step is None and (whole or TRACK in manifest.steps)):
        return f"adapt: must be there with a step {ADAPT!r}, and only then {TRACK!r} and a memory of {', '.join(WHOLE)}, got {spec}"
    if step is None or spec is None:
        return ""
    wrong = spec.reset not in RESETS or not math.isfinite(spec.reset_below)
    if wrong or spec.every < 1 or (spec.reset == "every" and spec.reset_every < 1):
        return f"adapt: every and reset_every must be at least 1, reset one of {', '.join(RESETS)}, reset_below finite, got {spec}"
    inputs = [port.name for port in step.inputs]
    reads = any(name.startswith("replay.") for name in inputs)
    if "learn" in manifest.steps:
        return f"adapt: must not be there beside 'learn', got steps {', '.join(sorted(manifest.steps))}"
    if reads != whole or reads != (TRACK in manifest.steps):
        return f"adapt: must read rows with a step {TRACK!r} and a memory of {', '.join(WHOLE)}, or none of them, got inputs {inputs}"
    if any(name.partition(".")[0] == "z" for name in inputs) == reads or (spec.every != 1 and not reads):
        return f"adapt: must read rows every so many samples, or each sample's z, got every {spec.every} and inputs {inputs}"
    if replay is not None and replay.policy == "balanced" and manifest.target.kind != "class":
        return f"replay: policy must be 'ring' for targets of kind {manifest.target.kind}, got 'balanced'"
    return ""


def adapting_outputs(manifest: Manifest) -> dict[str, list[TensorSpec]]:
    """Outputs that the loop needs of ``adapt`` and ``track``, by step."""
    one = manifest.target.scores(manifest.max_classes)
    replay = manifest.replay
    if replay is None or replay.policy not in WHOLE:
        return {ADAPT: [one, TensorSpec("loss", (), "float32"), TensorSpec("finite", (), "bool")]}
    scores = TensorSpec("scores", (replay.rows_per_step, *one.shape[1:]), one.dtype)
    rows = [TensorSpec(f"row.{f.name}", (1, *f.shape), f.dtype) for f in replay.fields]
    return {ADAPT: [scores, TensorSpec("loss", (), "float32"), TensorSpec("finite", (), "bool")], TRACK: [one, *rows]}
