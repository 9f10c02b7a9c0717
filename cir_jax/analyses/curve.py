"""The learning curve of a run, with the steps at which its budget of calls rises."""

from collections.abc import Sequence

import numpy as np

from cir_jax.analyses.analysis import Analysis, percent
from cir_jax.analyses.saved import Saved

# Steps over which a curve is averaged.
_SMOOTH = 5


def learning_curve(saved: Sequence[Saved]) -> Analysis | None:
    """Accuracy of each stage of the budget: where it begins, dips and ends.

    Source: CIR, arXiv:2505.24480: accuracy dips at each raise of the budget, then recovers.
    """
    runs = [(one, [row for row in one.metrics if row["kind"] == "rl"]) for one in saved]
    runs = [(one, rows) for one, rows in runs if rows]
    table = [line for one, rows in runs for line in _stages(one.name, rows)]
    note = (
        f"Share of a step's responses that are correct, means of {_SMOOTH} steps (or as many as "
        "there are). Recovered: the step from which on such a mean has again reached that before "
        "the raise."
    )
    columns = ("run", "budget", "from step", "to step", "before %", "first %", "lowest %")
    columns += ("last %", "recovered")
    if not table:
        return None
    return Analysis("Learning curve", note, columns, table, lambda: _drawn(runs))


def _stages(name: str, rows: list[dict]) -> list[tuple]:
    budgets = [row["max_calls"] for row in rows]
    starts = [0, *(n for n in range(1, len(rows)) if budgets[n] != budgets[n - 1])]
    lines = []
    for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
        means = smooth([row["accuracy"] for row in rows[start:end]])
        before = smooth([row["accuracy"] for row in rows[:start]])
        back = None
        if len(before):
            reached = np.flatnonzero(means >= before[-1])
            # A mean is of the steps up to its last one.
            width = end - start - len(means) + 1
            back = rows[start + reached[0] + width - 1]["step"] if len(reached) else "not yet"
        lines.append(
            (
                name,
                budgets[start],
                rows[start]["step"],
                rows[end - 1]["step"],
                percent(float(before[-1])) if len(before) else None,
                *(percent(float(x)) for x in (means[0], means.min(), means[-1])),
                back,
            )
        )
    return lines


def smooth(values: Sequence[float]) -> np.ndarray:
    """Means of so many steps in a row."""
    width = min(_SMOOTH, len(values))
    return np.convolve(values, np.ones(width) / width, "valid") if width else np.zeros(0)


def _drawn(runs):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for one, rows in runs:
        steps = [row["step"] for row in rows]
        means = smooth([row["accuracy"] for row in rows])
        (line,) = axes.plot(steps[len(steps) - len(means) :], 100 * means, label=one.name)
        budgets = [row["max_calls"] for row in rows]
        for n in np.flatnonzero(np.diff(budgets)) + 1:
            axes.axvline(steps[n], color=line.get_color(), linestyle=":", linewidth=1)
            axes.annotate(
                f" {budgets[n]} calls",
                (steps[n], 0.02),
                xycoords=("data", "axes fraction"),
                fontsize=7,
            )
    axes.set(xlabel="RL step (dotted: the budget rises)", ylabel="correct, %")
    axes.legend(fontsize=8)
    return figure
