"""Matplotlib figures as SVG inside of a page: they take the page's colours, and bring no addresses and no ids twice."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from io import StringIO
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, FAINT = "#010203", "#040506"
"""Stand for the page's colours of text and of grid lines."""

_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "edgecl",  # the same figure gives the same file
    "text.parse_math": False,  # a dollar in a name is a dollar
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.facecolor": "none",
    "axes.titlesize": 10,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
}


@contextmanager
def style() -> Iterator[None]:
    """Draw inside, in the page's style."""
    with mpl.rc_context(_STYLE):
        yield


def inline(figure: Figure, name: str, alt: str) -> str:
    """A figure as an ``svg`` element.

    Args:
        figure: Drawn under :func:`style`.
        name: Start of its ids, different for each figure of a page.
        alt: What it shows, in words.
    """
    text = StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # text stays text: the browser has the fonts
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)
    svg = svg.replace(INK, "currentColor").replace(FAINT, "var(--line)")
    svg = re.sub(r"'DejaVu Sans'(, '[^']*')*, sans-serif", "sans-serif", svg)
    width, height = (float(value) for value in re.findall(r'\b(?:width|height)="([\d.]+)pt"', svg)[:2])
    head = f'<svg role="img" aria-label="{escape(alt)}" viewBox="0 0 {width:g} {height:g}" style="max-width:{width / 72:.2f}in"'
    return re.sub(r"<svg[^>]*", lambda _: head, svg, count=1).strip()


def bare(ax: Axes, grid: str) -> None:
    """Only the grid lines of one axis, ``x`` or ``y``, and no frame."""
    ax.grid(axis="x" if grid == "x" else "y", color=FAINT, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
