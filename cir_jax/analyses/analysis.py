"""What an analysis comes to: a table, a note on how to read it, and a figure if there is one."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Cell = str | int | float | None


@dataclasses.dataclass(frozen=True)
class Analysis:
    """rows: cells by `columns`; shares are in per cent where the column says so, None is unknown.

    figure: draws it when it is called, with matplotlib (the extra `figures`); None: there is none.
    """

    title: str
    note: str
    columns: tuple[str, ...]
    rows: list[tuple[Cell, ...]]
    figure: "Callable[[], Figure] | None" = None

    def markdown(self) -> str:
        lines = [f"### {self.title}", "", self.note, ""]
        lines += ["| " + " | ".join(self.columns) + " |", "|---" * len(self.columns) + "|"]
        lines += ["| " + " | ".join(map(cell_text, row)) + " |" for row in self.rows]
        return "\n".join(lines) + "\n"


def cell_text(cell: Cell) -> str:
    if cell is None:
        return "–"
    text = f"{cell:.4g}" if isinstance(cell, float) else str(cell)
    return text.replace("|", "\\|").replace("\n", " ")


def percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def plotted(draw: "Callable[[Any], None]", size: tuple[float, float] = (7, 4.5)):
    """A figure of one axes, drawn when it is called."""

    def figure() -> "Figure":
        from matplotlib.figure import Figure

        made = Figure(figsize=size, layout="constrained")
        draw(made.subplots())
        return made

    return figure


Line = tuple[str, Sequence[float], Sequence[float]]
"""Label, x and y."""


def curves(
    panels: Mapping[str, Sequence[Line]], *, xlabel: str, ylabel: str, log2: bool = False
) -> "Callable[[], Figure]":
    """A figure of lines in one panel for each title; one legend, since labels recur."""

    def figure() -> "Figure":
        from matplotlib.figure import Figure

        columns = min(4, len(panels))
        rows = -(-len(panels) // columns)
        made = Figure(figsize=(max(6, 3 * columns), 3 * rows + 1), layout="constrained")
        grid = made.subplots(rows, columns, squeeze=False, sharey=True).flat
        labels: dict[str, Any] = {}
        for axes, (title, lines) in zip(grid, panels.items(), strict=False):
            for label, x, y in lines:
                color = f"C{list(labels).index(label) if label in labels else len(labels)}"
                (labels[label],) = axes.plot(x, y, "o-", markersize=3, linewidth=1.3, color=color)
            if log2:
                axes.set_xscale("log", base=2)
            axes.set_title(title, fontsize=9)
            axes.grid(alpha=0.3)
        for axes in list(grid[len(panels) :]):
            axes.remove()
        made.supxlabel(xlabel, fontsize=9)
        made.supylabel(ylabel, fontsize=9)
        made.legend(labels.values(), labels, loc="outside upper center", fontsize=7)
        return made

    return figure
