"""Runs: one configuration file from data to a report, resumable at any moment."""

from edgecl.runs.config import RunConfig, read_config
from edgecl.runs.run import run

__all__ = ["RunConfig", "read_config", "run"]
