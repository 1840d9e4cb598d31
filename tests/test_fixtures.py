import importlib.util
from pathlib import Path

DEVICE_TESTS = Path(__file__).resolve().parent / "device"


def test_the_committed_bundles_are_what_the_script_writes(tmp_path):
    spec = importlib.util.spec_from_file_location("make_fixtures", DEVICE_TESTS / "make_fixtures.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.write_all(tmp_path)
    committed = {p.relative_to(DEVICE_TESTS / "bundles"): p.read_bytes() for p in (DEVICE_TESTS / "bundles").rglob("*") if p.is_file()}
    written = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert len(committed) == 13
    assert committed == written
