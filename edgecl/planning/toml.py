"""A proposal as the configuration of a run."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgecl.ledger import ram_bytes
from edgecl.methods import METHODS
from edgecl.planning.result import Settings
from edgecl.planning.search import Option
from edgecl.planning.space import place_text
from edgecl.runs.config import RunConfig
from edgecl.tables import percent


def run_config(config: RunConfig, option: Option, settings: Settings, validation: int) -> str:
    """The text of a configuration for ``edgecl run``: the given one with the proposal as its learner, and as budget what that costs.

    Args:
        config: What the plan was made for.
        option: The proposal.
        settings: How it was looked for.
        validation: Held-out samples.
    """
    candidate, ledger = option.candidate, option.costs.ledger
    defaults = METHODS[candidate.method].Config()
    chosen = {
        field.name: value
        for field in dataclasses.fields(defaults)
        if (value := getattr(candidate.config, field.name)) != getattr(defaults, field.name)
    }
    values = config.model_dump(exclude_none=True, exclude={"learner", "budget"})
    values["data"] = {"name": config.data.name, **_absolute(config.data.model_extra or {}, config.dataset_options())}
    values["scenario"] = {"name": config.scenario.name, **_absolute(config.scenario.model_extra or {}, config.scenario_options())}
    model = config.model
    if ".py:" in model.name:
        values["model"]["name"] = str(config.folder / model.name)
    if model.weights is not None:
        values["model"]["weights"] = str(config.folder / model.weights)
    values["device"] |= {"engine": settings.engine, "pending": settings.pending}
    values["learner"] = {"method": candidate.method, "at": place_text(candidate.at), "config": chosen}
    values["budget"] = {
        "beyond_trunk": ledger["beyond_trunk"],
        "ram": ram_bytes(ledger),
        "update_macs": option.costs.update_macs,
    }
    head = f"# Planned: {candidate.words()}. Accuracy {percent(option.mean)} % on {validation} held-out training samples.\n"
    order = ("data", "scenario", "model", "learner", "budget", "device", "report")
    return head + "".join(f"\n[{name}]\n{_lines(values[name])}" for name in order if values.get(name))


def _absolute(given: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as given, their paths from the root."""
    return {name: str(path) if isinstance(path := options.get(name), Path) else value for name, value in given.items()}


def _lines(table: Mapping[str, Any]) -> str:
    return "".join(f"{key if key.isidentifier() else _value(key)} = {_value(value)}\n" for key, value in table.items())


def _value(value: Any) -> str:
    """A value as TOML has it.

    >>> _value({"a": [1, 2.5], "b": True, "c": "x", "d": None})
    '{ a = [1, 2.5], b = true, c = "x", d = "none" }'
    """
    if isinstance(value, Mapping):
        inner = ", ".join(line for line in _lines(value).splitlines())
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    if value is None:
        return '"none"'
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
