"""matplotlib's figures as SVG within a page: its colours become the style sheet's."""

import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from xml.sax.saxutils import quoteattr

# Stand-ins that no figure has by itself -> variables of the style sheet.
INK, GRID = "#010203", "#040506"
SERIES = tuple(f"#0a0b{n:02x}" for n in range(8))
NUM = len(SERIES)
_VARIABLES = {
    INK: "var(--ink)",
    GRID: "var(--rule)",
    # Of figures in matplotlib's own style.
    "#000000": "var(--ink)",
    "#ffffff": "var(--card)",
    "#b0b0b0": "var(--rule)",
} | {colour: f"var(--s{n})" for n, colour in enumerate(SERIES)}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Small figures in the page's colours, without a frame; text is text, not outlines."""
    import matplotlib
    from cycler import cycler

    settings = {
        "axes.prop_cycle": cycler(color=SERIES),
        "axes.edgecolor": GRID,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.labelcolor": INK,
        "axes.labelsize": 7.5,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.spines.left": False,
        "axes.formatter.useoffset": False,
        "figure.facecolor": "none",
        "legend.edgecolor": GRID,
        "legend.facecolor": "#ffffff",
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "xtick.labelsize": 7.5,
        "ytick.labelsize": 7.5,
        "xtick.major.size": 2,
        "ytick.major.size": 0,
        "text.parse_math": False,
    }
    with matplotlib.rc_context(settings):
        yield


def render(figure, label: str, axes=None) -> tuple[str, tuple[float, float, float, float]]:
    """The picture, and where the axes lie in it: left, top, right, bottom in its own units.

    label: what it shows, for those who cannot see it.
    """
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        with warnings.catch_warnings():
            # A character that the font lacks is drawn by the browser, with its own.
            warnings.filterwarnings("ignore", message="Glyph")
            figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    # Names of groups that every figure has; only those that are referred to stay.
    text = re.sub(r' id="[A-Za-z.]+_[0-9]+"', "", text)
    text = re.sub(r"\s*<!--.*?-->", "", text, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    text = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>',
        rf'<svg class="plot" role="img" aria-label={quoteattr(label)} viewBox="\1">',
        text,
        count=1,
    )
    if axes is None:
        return text, (0, 0, 0, 0)
    # Pixels at the figure's own resolution, from below -> points from above, as SVG has them.
    scale = 72 / figure.dpi
    box = axes.get_window_extent()
    height = figure.get_figheight() * 72
    return text, (box.x0 * scale, height - box.y1 * scale, box.x1 * scale, height - box.y0 * scale)
