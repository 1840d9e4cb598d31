"""Rules of the whole run: one thread a process, and a test that skips fails the run."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

# The tensors are small: more threads only wait for each other. Read by the libraries when they are first imported.
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

NOT_RUN = ("skipped", "xfailed", "xpassed")


def not_run(config: pytest.Config) -> list[str]:
    """Names of the tests that did not run or were expected to fail; empty on an xdist worker, which reports nothing."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    return [report.nodeid for kind in NOT_RUN for report in reporter.stats.get(kind, [])] if reporter else []


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if not_run(session.config) and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name in not_run(terminalreporter.config):
        terminalreporter.write_line(f"FAILED {name}: no test may skip or be expected to fail", red=True)


@pytest.fixture(scope="session")
def toy(request: pytest.FixtureRequest) -> Any:
    """A small model, its data and its bundles (helpers.py); loaded late, because the device's tests run without PyTorch."""
    spec = importlib.util.spec_from_file_location("edgecl_test_helpers", Path(__file__).with_name("helpers.py"))
    assert spec is not None and spec.loader is not None
    helpers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(helpers)
    toy = helpers.Toy(request.config.cache.mkdir("bundles"))
    toy.helpers = helpers
    return toy
