"""Metrics over steps as small SVG figures, runs overlaid, and the numbers behind them."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from cir_jax.report import svg
from cir_jax.report.source import Row, Source

# Inches: shown about 350 pixels wide on a telephone and on a third of a desktop's page.
_SIZE = (3.5, 1.95)
# From so many steps on, a curve is drawn thin, and its mean over a tenth of the steps bold.
_SMOOTH_FROM = 30
_DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.5)), (0, (5, 1, 1, 1)))


@dataclasses.dataclass(frozen=True)
class Chart:
    """keys: metrics, with their names in the legend; drawn as far as any run has them.

    kind: of the lines. seconds: whether the keys are of timings.jsonl. marks: whether the raises
    of the budget are marked. note: what the figure shows, where the title does not say it.
    """

    title: str
    keys: dict[str, str]
    note: str = ""
    kind: str = "rl"
    seconds: bool = False
    marks: bool = True


CHARTS = (
    Chart("Reward", {"reward": "reward"}, "mean of a step's responses, shaping included"),
    Chart("Accuracy", {"accuracy": "correct"}, "share of a step's responses that are correct"),
    Chart(
        "Use of code",
        {"code_share": "all problems", "needed_code_share": "where code is needed"},
        "share of responses that run a program",
    ),
    Chart(
        "Executions",
        {"calls_per_response": "programs per response", "max_calls": "budget"},
    ),
    Chart(
        "Outcome of programs",
        {
            "programs_ok_share": "programs that run",
            "correct_after_failure_share": "correct responses with a failed one",
        },
        "shares",
    ),
    Chart("Response length", {"response_tokens": "tokens"}, "model and tool, mean"),
    Chart(
        "Limits",
        {"budget_used_share": "budget used up", "cut_share": "cut by a limit"},
        "share of responses",
    ),
    Chart("Entropy", {"entropy": "nats per token"}, "of the policy"),
    Chart(
        "Clipped tokens",
        {"clip_low_share": "low", "clip_high_share": "high", "dual_clip_share": "dual"},
        "share of trained tokens beyond a clip bound",
    ),
    Chart(
        "Sampler against trainer",
        {"sampler_mismatch_mean": "mean", "sampler_mismatch_max": "largest"},
        "difference of a token's log-probability",
    ),
    Chart("Gradient norm", {"grad_norm": "before clipping"}),
    Chart("Change per update", {"old_new_kl": "KL divergence"}, "from the policy that sampled"),
    Chart("Distance from the reference", {"ref_kl": "KL divergence"}),
    Chart("Loss", {"loss": "policy"}),
    Chart(
        "Seconds by stage",
        {
            "rollout_s": "rollout",
            "update_s": "update",
            "reward_s": "reward",
            "tool_wait_s": "waiting for programs",
            "device_idle_s": "device idle",
        },
        "of each step",
        seconds=True,
    ),
    Chart("Sampling speed", {"tokens_per_s": "tokens/s"}, seconds=True),
    Chart("SFT loss", {"loss": "training"}, kind="sft", marks=False),
    Chart("Held-out loss", {"loss": "held out"}, kind="held_out", marks=False),
)


class Curve(NamedTuple):
    """source, key: their numbers, in the report and in the chart."""

    source: int
    key: int
    steps: list[int]
    values: list[float]


def curves(chart: Chart, sources: Sequence[Source]) -> list[Curve]:
    """What there is to draw: finite numbers, of runs that have the key."""
    found = []
    for n, source in enumerate(sources):
        rows = (source.timings_of if chart.seconds else source.of_kind)(chart.kind)
        for k, key in enumerate(chart.keys):
            pairs = [(row["step"], row[key]) for row in rows if _is_number(row.get(key))]
            if pairs:
                steps, values = zip(*pairs, strict=True)
                found.append(Curve(n, k, list(steps), list(values)))
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and np.isfinite(value)


def raises(rows: Sequence[Row]) -> list[tuple[int, int]]:
    """The steps at which the budget rises, each with what it rises to."""
    return [
        (now["step"], now["max_calls"])
        for before, now in itertools.pairwise(rows)
        if now.get("max_calls", 0) > before.get("max_calls", 0)
    ]


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A chart as the page has it.

    legend: (name, colour's number or None for ink, dash's number) of each key, if there are more
    than one. data: for reading values off: the curves, and where steps lie in the picture.
    """

    title: str
    note: str
    picture: str
    legend: list[tuple[str, int | None, int]]
    data: dict[str, Any]


def draw_all(sources: Sequence[Source]) -> list[Drawn]:
    return [draw(chart, sources, found) for chart in CHARTS if (found := curves(chart, sources))]


def draw(chart: Chart, sources: Sequence[Source], found: Sequence[Curve]) -> Drawn:
    """One run: a colour for each key; several: a colour for each run, a dash for each key."""
    is_one = sum(bool(source.lines) for source in sources) == 1
    keys = [k for k in range(len(chart.keys)) if any(curve.key == k for curve in found)]
    names = list(chart.keys.values())
    with svg.style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        if chart.marks:
            _mark_raises(axes, sources)
        for curve in found:
            colour = svg.SERIES[(keys.index(curve.key) if is_one else curve.source) % svg.NUM]
            dash = "-" if is_one else _DASHES[keys.index(curve.key) % len(_DASHES)]
            _line(axes, curve, colour, dash, is_step=list(chart.keys)[curve.key] == "max_calls")
        largest = max(max(curve.values) for curve in found)
        least = min(min(curve.values) for curve in found)
        if least >= 0:
            axes.set_ylim(0, max(largest * 1.08, 1e-12))
        if largest == least == 0:
            axes.set_yticks([0])
        axes.locator_params(axis="x", integer=True, nbins=6)
        axes.set_xlabel("update" if chart.kind != "rl" else "RL step")
        picture, box = svg.render(figure, f"{chart.title} by step", axes)
    low, high = axes.get_xlim()
    legend = [
        (names[k], n % svg.NUM if is_one else None, 0 if is_one else n % len(_DASHES))
        for n, k in enumerate(keys)
    ]
    data = {
        "box": [round(x, 1) for x in box],
        "steps": [low, high],
        "curves": [
            {
                "run": c.source,
                "name": names[c.key],
                "x": c.steps,
                "y": [float(f"{y:.5g}") for y in c.values],
            }
            for c in found
        ],
    }
    return Drawn(chart.title, chart.note, picture, legend if len(keys) > 1 else [], data)


def _line(axes, curve: Curve, colour: str, dash, is_step: bool) -> None:
    steps, values = np.array(curve.steps), np.array(curve.values)
    if is_step:
        axes.step(steps, values, where="post", color=colour, linestyle=dash, linewidth=1)
        return
    if len(steps) < 2:
        axes.plot(steps, values, "o", color=colour, markersize=3)
        return
    if len(steps) < _SMOOTH_FROM:
        axes.plot(steps, values, color=colour, linestyle=dash, linewidth=1.4)
        return
    axes.plot(steps, values, color=colour, linestyle=dash, linewidth=0.5, alpha=0.45)
    width = len(steps) // 10
    means = np.convolve(values, np.ones(width) / width, "valid")
    axes.plot(steps[width - 1 :], means, color=colour, linestyle=dash, linewidth=1.6)


def _mark_raises(axes, sources: Sequence[Source]) -> None:
    marks = [raises(source.of_kind("rl")) for source in sources]
    are_equal = len({tuple(own) for own, s in zip(marks, sources, strict=True) if s.lines}) == 1
    for n, own in enumerate(marks):
        for step, budget in own:
            colour = svg.INK if are_equal else svg.SERIES[n % svg.NUM]
            axes.axvline(step, color=colour, linestyle=":", linewidth=0.8, alpha=0.6)
            if are_equal:
                axes.annotate(
                    str(budget),
                    (step, 1),
                    xycoords=("data", "axes fraction"),
                    xytext=(2, -1),
                    textcoords="offset points",
                    va="top",
                    fontsize=6.5,
                    alpha=0.8,
                )
        if are_equal and own:
            return
