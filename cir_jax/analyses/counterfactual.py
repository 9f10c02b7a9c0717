"""What the tool's output is worth: responses taken up again with it, without it, with another."""

from collections.abc import Sequence

import numpy as np

from cir_jax.analyses.accuracy import mean_of
from cir_jax.analyses.analysis import Analysis, percent, plotted
from cir_jax.analyses.code import holds
from cir_jax.analyses.saved import Saved
from cir_jax.evals.samples import Sample

_BRANCHES = ("on", "off", "corrupted")


def counterfactual(saved: Sequence[Saved]) -> Analysis | None:
    """Accuracy of forks by the number of the call and what became of the tool there."""
    rows, bars = [], []
    for one in saved:
        own = {(s.task, s.problem_id, s.sample, s.setting): s for s in one.samples}
        by_call: dict[int, list[Sample]] = {}
        for fork in one.forks:
            by_call.setdefault(fork.fork.call, []).append(fork)
        for call, forks in sorted(by_call.items()):
            parts = {b: [s for s in forks if s.fork.branch == b] for b in _BRANCHES}
            begun = [own.get((s.task, s.problem_id, s.fork.sample, s.setting)) for s in parts["on"]]
            right = [percent(mean_of(parts[b], lambda s: s.correct)) for b in _BRANCHES]
            rows.append(
                (
                    one.name,
                    call + 1,
                    len(parts["on"]),
                    percent(mean_of([s for s in begun if s], lambda s: s.correct)),
                    *right,
                    percent(mean_of(parts["corrupted"], took_over)),
                )
            )
            bars.append((f"{one.name}, call {call + 1}", right))
    note = (
        "Each response taken up again at each of its calls, with the output that it had (on), "
        "without it and without further programs (off), and with another output (corrupted); all "
        "three with the same new random numbers. Taken over: the answer stands in the corrupted "
        "output."
    )
    columns = ("model", "call", "forks", "as it was %", "on %", "off %", "corrupted %")
    columns += ("taken over %",)
    if not rows:
        return None

    def draw(axes) -> None:
        at = np.arange(len(bars))
        for n, branch in enumerate(_BRANCHES):
            values = [right[n] or 0.0 for _, right in bars]
            axes.bar(at + 0.27 * (n - 1), values, 0.27, label=branch)
        axes.set_xticks(at, [label for label, _ in bars], fontsize=7)
        axes.set(ylabel="correct, %")
        axes.legend(fontsize=7)

    return Analysis("Counterfactual tool", note, columns, rows, plotted(draw))


def took_over(fork: Sample) -> bool:
    """Whether the answer of a corrupted fork is in what it was given."""
    return holds(fork.calls[fork.fork.call].result.stdout, fork.answer)
