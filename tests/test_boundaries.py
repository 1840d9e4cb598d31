import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"edgecl": "edgecl", "edgecl_export": "export/edgecl_export", "edgecl_device": "device/edgecl_device"}
FOLDERS = ["device", "export", "tests", "benchmarks"]

BLOCKED = """
import importlib, pkgutil, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "onnx", "onnx_ir", "typer", "rich", "matplotlib", "edgecl", "edgecl_export"}:
            raise ImportError("blocked: " + name)

sys.meta_path.insert(0, Blocker())
try:
    import torch
except ImportError as error:
    assert str(error) == "blocked: torch"
else:
    raise AssertionError("the block does not work")

import edgecl_device
for module in pkgutil.walk_packages(edgecl_device.__path__, "edgecl_device."):
    importlib.import_module(module.name)
    print(module.name)
"""


def ruff(code: str, filename: str) -> str:
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--select", "TID251", "--stdin-filename", filename, "-"]
    return subprocess.run(command, input=code, cwd=ROOT, capture_output=True, text=True, check=False).stdout


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    paths = os.pathsep.join(str(root / path) for path in ("", "export", "device"))
    environment = {**os.environ, "PYTHONPATH": paths}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


def copied(target: Path) -> Path:
    for path in PACKAGES.values():
        shutil.copytree(ROOT / path, target / path, ignore=shutil.ignore_patterns("__pycache__", "data"))
    shutil.copy(ROOT / "pyproject.toml", target)
    return target


@pytest.mark.parametrize("name", ["torch", "edgecl", "edgecl_export", *FOLDERS])
def test_ruff_bans_it_on_the_device(name):
    assert f"TID251 `{name}`" in ruff(f"import {name}\n", "device/edgecl_device/example.py")


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("package", ["edgecl", "export/edgecl_export"])
def test_ruff_bans_folders_as_import_names(name, package):
    assert f"TID251 `{name}`" in ruff(f"import {name}\n", f"{package}/example.py")


def test_ruff_allows_what_each_package_needs():
    assert "TID251" not in ruff("import numpy, edgecl_device\n", "device/edgecl_device/example.py")
    assert "TID251" not in ruff("import torch, edgecl_device\n", "edgecl/example.py")


def test_imports_point_one_way():
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("importer", "imported"),
    [("edgecl_device", "torch"), ("edgecl_device", "edgecl"), ("edgecl_device", "edgecl_export"), ("edgecl", "edgecl_export")],
)
def test_an_import_against_the_arrow_is_found(tmp_path, importer, imported):
    root = copied(tmp_path)
    (root / PACKAGES[importer] / "against.py").write_text(f"import {imported}\n")
    result = lint_imports(root)
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"{importer}.against -> {imported}" in result.stdout


def test_the_command_may_import_the_bundle_writer(tmp_path):
    root = copied(tmp_path)
    for name in ("bench/tta", "cli", "demo", "runs/stages"):
        (root / "edgecl" / f"{name}.py").write_text("def run():\n    import edgecl_export\n    import edgecl_export.example\n")
    (root / "edgecl" / "planning" / "costs.py").write_text("def run():\n    import edgecl_export.example\n")
    (root / PACKAGES["edgecl_export"] / "example.py").write_text("")
    result = lint_imports(root)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "13 ignored imports" in result.stdout  # two a module, one of planning, and one of each other comparison as it is


def test_device_imports_without_the_host(tmp_path):
    result = subprocess.run([sys.executable, "-c", BLOCKED], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    modules = {path.stem for path in (ROOT / PACKAGES["edgecl_device"]).glob("*.py")} - {"__init__", "__main__"}
    assert {f"edgecl_device.{name}" for name in modules} <= set(result.stdout.split())
