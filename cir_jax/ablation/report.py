"""Table and figure of an ablation, from what its runs wrote down."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cir_jax import config as configs
from cir_jax import metrics
from cir_jax.ablation.strategies import ALL_ON, STRATEGIES

TABLE, FIGURES, PLOT = "ablation.md", "ablation.json", "ablation.png"
# Steps over which the figure's curves are averaged.
_SMOOTH = 5
# Student's t below which 95 % of what is 0 lies on both sides, for 2, 3, ... seeds.
_T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


def figures_of(run_dir: Path) -> dict[str, Any]:
    """Of a run that has ended: `rewards` of its RL steps, `accuracy` on held-out problems before
    and after them, and what the table shows of the rest."""
    rows = metrics.read(run_dir)
    rewards = [row["reward"] for row in rows if row["kind"] == "rl"]
    before, after = [row for row in rows if row["kind"] == "eval"][-2:]
    return {
        "num_problems": configs.load_run(run_dir).eval.num_problems,
        "rewards": rewards,
        "accuracy_before": before["accuracy"],
        "accuracy": after["accuracy"],
        "needed_code_share": after["needed_code_share"],
        "reward": float(np.mean(rewards)),
        "last_reward": float(np.mean(rewards[-max(1, len(rewards) // 10) :])),
    }


Results = Mapping[str, Mapping[int, dict[str, Any]]]
"""By strategy that is off and by seed: figures_of a run."""


More = Mapping[str, Mapping[str, Any]]
"""By strategy that is off: further keys in which its runs differ, as `ablate` of a config says."""


def write(results: Results, more: More, folder: Path) -> str:
    """Writes figures, table and plot into the folder. Returns the table, as Markdown."""
    (folder / FIGURES).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    text = table(results, more)
    (folder / TABLE).write_text(text, encoding="utf-8")
    plot(results, folder / PLOT)
    return text


def table(results: Results, more: More) -> str:
    """Mean and standard deviation over seeds; the difference is of runs of equal seeds. Below it
    stands how sure that is, and what else is not the same in a strategy's runs."""
    lines = [
        "| off | seeds | reward, all steps | reward, last tenth | held-out accuracy "
        "| less than with all six | code where needed |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, by_seed in results.items():

        def over(figure: str, runs=by_seed) -> str:
            return _spread([run[figure] for run in runs.values()])

        less = _less(results, name)
        cells = [
            "nothing" if name == ALL_ON else STRATEGIES[name].title,
            ", ".join(str(seed) for seed in by_seed),
            *(over(figure) for figure in ("reward", "last_reward", "accuracy")),
            "" if name == ALL_ON or not less else _spread(less),
            over("needed_code_share"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", _how_sure(results)]
    for name in results:
        if keys := more.get(name):
            changes = ", ".join(f"{key}={value}" for key, value in keys.items())
            lines += ["", f"Runs with {STRATEGIES[name].title} also have {changes}."]
    return "\n".join(lines) + "\n"


def _less(results: Results, name: str) -> list[float]:
    """By how much the accuracy without a strategy falls short of that of all six, seed by seed."""
    base = results.get(ALL_ON, {})
    both = [seed for seed in results[name] if seed in base]
    return [base[seed]["accuracy"] - results[name][seed]["accuracy"] for seed in both]


def _how_sure(results: Results) -> str:
    runs = [run for by_seed in results.values() for run in by_seed.values()]
    error = max((r["accuracy"] * (1 - r["accuracy"]) / r["num_problems"]) ** 0.5 for r in runs)
    text = (
        "Mean ± standard deviation over seeds. Which problems are held out alone moves an accuracy "
        f"by up to {error:.3f} (standard error)."
    )
    shown = []
    for name in results:
        less = _less(results, name)
        if name != ALL_ON and 2 <= len(less) <= len(_T95) + 1:
            error = np.std(less, ddof=1) / len(less) ** 0.5
            if abs(np.mean(less)) > _T95[len(less) - 2] * error:
                shown.append(STRATEGIES[name].title)
    if any(len(by_seed) > 1 for by_seed in results.values()):
        text += f" Different from all six at 95 % (paired t): {', '.join(shown) or 'none'}."
    return text


def _spread(values: Sequence[float]) -> str:
    text = f"{np.mean(values):.3f}"
    return f"{text} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else text


def plot(results: Results, path: Path) -> None:
    """Rewards by RL step, means over seeds; held-out accuracies, a dot for each seed and a bar for
    their mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    curves, dots = figure.subplots(1, 2, width_ratios=(3, 2))
    for n, (name, by_seed) in enumerate(results.items()):
        # Runs of one config have the same number of steps.
        mean = np.mean([run["rewards"] for run in by_seed.values()], axis=0)
        width = min(_SMOOTH, len(mean))
        smooth = np.convolve(mean, np.ones(width) / width, "valid")
        steps = np.arange(len(smooth)) + (width + 1) / 2
        title = STRATEGIES[name].title
        line = curves.plot(steps, smooth, label=title, linewidth=2.5 if name == ALL_ON else 1.2)
        accuracies = [run["accuracy"] for run in by_seed.values()]
        color = line[0].get_color()
        dots.scatter(accuracies, [-n] * len(accuracies), color=color, s=16, alpha=0.7)
        dots.scatter(np.mean(accuracies), -n, color=color, marker="|", s=400)
    before = {run["accuracy_before"] for by_seed in results.values() for run in by_seed.values()}
    for accuracy in before:
        dots.axvline(accuracy, color="grey", linestyle=":", linewidth=1)
    curves.set(xlabel="RL step", ylabel=f"reward, mean of {width} steps and all seeds")
    curves.legend(title="runs with", fontsize=8)
    dots.set(xlabel="held-out accuracy after RL\n(bar: mean of seeds; dotted: before RL)")
    dots.set_yticks([-n for n in range(len(results))], [STRATEGIES[n].title for n in results])
    figure.savefig(path, dpi=120)
