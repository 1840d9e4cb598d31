"""A plan as plain values: what ``edgecl plan --json`` prints, and what table and plot are drawn from."""

import dataclasses
from typing import Any

from edgecl.figures import machine, versions
from edgecl.planning.result import Planned, Settings
from edgecl.planning.search import Option
from edgecl.planning.space import place_text


def record(planned: Planned, settings: Settings, what: str) -> dict[str, Any]:
    """What was found.

    Args:
        planned: The result.
        settings: How it was looked for.
        what: Data and network in words.
    """
    front = planned.front()
    shown = [option for option in planned.options if option.accuracy]
    return {
        "what": what,
        "engine": settings.engine,
        "pending": settings.pending,
        "limits": planned.limits.given(),
        "validation_samples": planned.validation,
        "stream_samples": planned.rounds[-1].samples,
        "recommended": [option is planned.best for option in front].index(True),
        "front": [row(option) for option in front],
        "beaten": [row(option) for option in shown if not any(option is other for other in front)],
        "unmeasured": [row(option) for option in planned.options if not option.accuracy],
        "rounds": [dataclasses.asdict(done) for done in planned.rounds],
        "counts": planned.counts,
        "unsuited": planned.unsuited,
        "seconds": planned.seconds,
        "versions": versions(settings.engine),
        "machine": machine(),
    }


def row(option: Option) -> dict[str, Any]:
    """One proposal: accuracies are of held-out samples, costs are exact."""
    candidate, costs = option.candidate, option.costs
    return {
        "at": place_text(candidate.at),
        "method": candidate.method,
        "trains": candidate.trains,
        "codec": candidate.codec,
        "replay_rows": costs.rows,
        "config": dataclasses.asdict(candidate.config),
        **costs.totals(),
        "update_macs": costs.update_macs,
        "ledger": costs.ledger,
        "accuracy": option.mean if option.accuracy else None,
        "accuracy_sd": option.deviation,
        "accuracy_by_order": option.accuracy,
        "accuracy_first_quarter": option.first,
        "failed": option.failed or None,
    }
