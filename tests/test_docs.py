import re
import tomllib
from pathlib import Path

import pytest

from edgecl import METHODS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md")])
MARK = "<!-- runs -->"
BLOCK = re.compile(r"^<!-- runs -->\n+```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)[^)]*\)|(?:src|href)=\"([^\"]+)\"")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """The names GitHub gives a page's headings."""
    headings = re.findall(r"^#+ +(.*)$", FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def broken(page: Path) -> list[str]:
    """Relative links of a page that lead nowhere."""
    found = []
    for match in LINK.finditer(FENCED.sub("", page.read_text(encoding="utf-8"))):
        link = match[1] or match[2]
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if MARK in page.read_text(encoding="utf-8")], ids=name)
def test_marked_examples_run(page, tmp_path, monkeypatch):
    """All marked blocks of a page, in order and in one namespace, as a reader would paste them."""
    text = page.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == text.count(MARK), f"{name(page)}: a mark without a python block right after it"
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    registry = dict(METHODS)
    try:
        for block in blocks:
            # Blank lines in front make a traceback show the page's own line numbers.
            code = "\n" * text.count("\n", 0, block.start(1)) + block[1]
            exec(compile(code, str(page), "exec"), namespace)
    finally:  # a page may register a method
        METHODS.clear()
        METHODS.update(registry)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_resolve(page):
    assert broken(page) == []


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One two\n[a](page.md#one-two) [b](gone.md) [c](#three) [d](https://example.org) ![e](no.png)\n```\n[f](no)\n```\n")
    assert broken(page) == ["gone.md", "#three", "no.png"]


def test_changelog_has_the_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"\n## {version}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_readme_has_one_test_line():
    lines = re.findall(r"^<!-- test -->\n+```\w*\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(lines) == 1
    assert lines[0].strip().endswith("&& pytest")
    assert lines[0].count("\n") == 1


def test_no_doctest_is_skipped():
    sources = [path for folder in ("edgecl", "export", "device") for path in (ROOT / folder).glob("**/*.py")]
    assert sources
    assert [name(path) for path in sources if "doctest: +SKIP" in path.read_text(encoding="utf-8")] == []
