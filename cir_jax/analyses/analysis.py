"""What an analysis comes to: a table, a note on how to read it, and a figure if there is one."""

import dataclasses
from collections.abc import Callable, Sequence
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


def curves(
    lines: Sequence[tuple[str, Sequence[float], Sequence[float]]],
    *,
    xlabel: str,
    ylabel: str,
    log2: bool = False,
):
    """A figure of labelled lines (label, x, y)."""

    def draw(axes) -> None:
        for label, x, y in lines:
            axes.plot(x, y, marker="o", markersize=3, linewidth=1.3, label=label)
        if log2:
            axes.set_xscale("log", base=2)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)

    return plotted(draw)
