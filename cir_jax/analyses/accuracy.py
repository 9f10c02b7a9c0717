"""How many answers are right: by benchmark, by k, by tokens, by budget, by type, and compared."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from cir_jax.analyses.analysis import Analysis, Cell, curves, percent, plotted
from cir_jax.analyses.saved import Groups, Saved, evaluations
from cir_jax.evals.bootstrap import interval, mean_interval, paired
from cir_jax.evals.majority import maj_at_k
from cir_jax.evals.passk import pass_at_k, powers_of_two
from cir_jax.evals.samples import Sample, Setting

MEAN = "mean of tasks"


def shares(groups: Groups) -> list[float]:
    """Of each problem, the share of correct samples."""
    return [float(np.mean([sample.correct for sample in group])) for group in groups]


def mean_of(samples: Sequence[Sample], value: Callable[[Sample], float]) -> float | None:
    return float(np.mean([value(sample) for sample in samples])) if samples else None


def flat(groups: Groups) -> list[Sample]:
    return [sample for group in groups for sample in group]


def fewest(groups: Groups) -> int:
    """Samples that every problem has."""
    return min(len(group) for group in groups)


def each(saved: Sequence[Saved]) -> Iterator[tuple[Saved, Setting, dict[str, Groups]]]:
    """Every setting of every evaluation, with its problems by task."""
    for one in evaluations(saved):
        for setting, tasks in one.groups().items():
            yield one, setting, tasks


def passed(groups: Groups, k: int) -> float:
    """pass@k, mean over problems."""
    return float(np.mean([pass_at_k(len(g), sum(s.correct for s in g), k) for g in groups]))


def voted(groups: Groups, k: int) -> float:
    """maj@k, mean over problems."""
    each_problem = [maj_at_k([s.vote for s in g], [s.correct for s in g], k) for g in groups]
    return float(np.mean(each_problem))


def results(saved: Sequence[Saved]) -> Analysis | None:
    """AVG@n, pass@n and maj@n of every benchmark."""
    rows = []
    for one, setting, tasks in each(saved):
        for task, groups in tasks.items():
            n, found = fewest(groups), interval(shares(groups))
            rows.append(
                (
                    one.name,
                    setting.name,
                    task,
                    len(groups),
                    one.left_out.get(task, 0),
                    n,
                    *map(percent, found),
                    percent(passed(groups, n)),
                    percent(voted(groups, n)),
                    percent(mean_of(flat(groups), lambda s: s.answer is None)),
                    mean_of(flat(groups), lambda s: s.num_response_tokens),
                )
            )
        if len(tasks) > 1:
            found = mean_interval([shares(groups) for groups in tasks.values()])
            num, left_out = sum(map(len, tasks.values())), sum(one.left_out.values())
            cells = (num, left_out, None, *map(percent, found), *[None] * 4)
            rows.append((one.name, setting.name, MEAN, *cells))
    note = (
        "AVG@n: correct samples, all n of each problem; its 95 % interval is a bootstrap over "
        "problems. pass@n: problems with a correct one among n; maj@n: those whose most frequent "
        "answer is correct. Left out: problems whose prompts fill the context."
    )
    columns = ("model", "setting", "task", "problems", "left out", "n", "AVG@n %", "from", "to")
    columns += ("pass@n %", "maj@n %", "no answer %", "tokens")
    return Analysis("Accuracy", note, columns, rows) if rows else None


def compared(saved: Sequence[Saved]) -> Analysis | None:
    """With tools less without; and each evaluation less the one before it."""
    found = evaluations(saved)
    pairs = [
        (one, one.without_tools, one, setting)
        for one in found
        for setting in one.settings
        if one.without_tools is not None and setting != one.without_tools
    ]
    pairs += [
        (before, setting, after, setting)
        for before, after in zip(found, found[1:], strict=False)
        for setting in before.settings
        if setting in after.settings
    ]
    rows = [
        row
        for one, base, other, setting in pairs
        for row in _differences(one, base, other, setting)
    ]
    note = (
        "Per cent of samples that are correct, on the same problems with the same random numbers: "
        "the second less the first, its 95 % interval by a paired bootstrap over problems, and the "
        "p-value by flipping signs of their differences; McNemar's exact one where each problem "
        "has one sample."
    )
    columns = ("first", "second", "task", "problems", "difference", "from", "to", "p", "McNemar p")
    return Analysis("Compared", note, columns, rows) if rows else None


def _differences(
    one: Saved, base: Setting, other: Saved, setting: Setting
) -> Iterator[tuple[Cell, ...]]:
    first, second = one.groups()[base], other.groups()[setting]
    same = one is other
    names = (
        base.name if same else f"{one.name}: {base.name}",
        setting.name if same else f"{other.name}: {setting.name}",
    )
    all_gained = []
    for task in first:
        a = {group[0].problem_id: group for group in first[task]}
        b = {group[0].problem_id: group for group in second.get(task, [])}
        common = [name for name in a if name in b]
        if not common:
            continue
        more, less = (shares([of[name] for name in common]) for of in (b, a))
        test = paired(more, less)
        difference = map(percent, test.difference)
        yield (*names, task, len(common), *difference, test.p_value, test.p_mcnemar)
        all_gained.append([x - y for x, y in zip(more, less, strict=True)])
    if len(all_gained) > 1:
        difference = map(percent, mean_interval(all_gained))
        yield (*names, MEAN, sum(map(len, all_gained)), *difference, None, None)


def pass_k(saved: Sequence[Saved]) -> Analysis | None:
    """pass@k and maj@k for k = 1, 2, 4, ..., every task, setting and evaluation a line."""
    rows, panels = [], {}
    for one, setting, tasks in each(saved):
        for task, groups in tasks.items():
            ks = powers_of_two(fewest(groups))
            at_k = [percent(passed(groups, k)) for k in ks]
            panels.setdefault(task, []).append((f"{one.name}, {setting.name}", ks, at_k))
            rows += [
                (one.name, setting.name, task, k, at, percent(voted(groups, k)))
                for k, at in zip(ks, at_k, strict=True)
            ]
    note = (
        "Problems with a correct sample among k, unbiased (Codex, equation 1), and those whose "
        "most frequent answer among k is correct. Text against code: two settings; before against "
        "after: two evaluations."
    )
    columns = ("model", "setting", "task", "k", "pass@k %", "maj@k %")
    if not rows:
        return None
    figure = curves(panels, xlabel="k", ylabel="pass@k, %", log2=True)
    return Analysis("pass@k", note, columns, rows, figure)


def tokens(saved: Sequence[Saved]) -> Analysis | None:
    """Accuracy against tokens: what a limit on the response would leave of it."""
    rows, lines = [], []
    for one, setting, tasks in each(saved):
        samples = [s for groups in tasks.values() for s in flat(groups)]
        lengths = np.array([s.num_response_tokens for s in samples])
        right = np.array([s.correct for s in samples])
        rows.append(
            (
                one.name,
                setting.name,
                percent(float(right.mean())),
                float(lengths.mean()),
                mean_of(samples, lambda s: s.num_model_tokens),
                mean_of([s for s in samples if s.correct], lambda s: s.num_response_tokens),
                mean_of([s for s in samples if not s.correct], lambda s: s.num_response_tokens),
            )
        )
        limits = powers_of_two(max(1, int(lengths.max())))
        within = [percent(float((right & (lengths <= limit)).mean())) for limit in limits]
        lines.append((f"{one.name}, {setting.name}", limits, within))
    note = (
        "Tokens per response: all, those that the model wrote, and those of correct and of wrong "
        "responses; means over all samples. The figure counts as wrong what is longer than a limit."
    )
    columns = ("model", "setting", "correct %", "tokens", "by the model", "correct ones")
    columns += ("wrong ones",)
    if not rows:
        return None
    label = "correct within the limit, %"
    xlabel = "limit on a response, tokens"
    figure = curves({"all tasks": lines}, xlabel=xlabel, ylabel=label, log2=True)
    return Analysis("Accuracy against tokens", note, columns, rows, figure)


def budgets(saved: Sequence[Saved]) -> Analysis | None:
    """Accuracy against the budget of calls, with the calls and tokens that it takes."""
    rows, panels = [], {}
    for one in evaluations(saved):
        found = sorted((s for s in one.settings if s.prompt != "text"), key=lambda s: s.max_calls)
        if len(found) < 2:
            continue
        groups = one.groups()
        for task in groups[found[0]]:
            at = []
            for setting in found:
                samples = flat(groups[setting][task])
                most = setting.max_calls
                at.append(percent(mean_of(samples, lambda s: s.correct)))
                rows.append(
                    (
                        one.name,
                        task,
                        most,
                        at[-1],
                        mean_of(samples, lambda s: len(s.calls)),
                        mean_of(samples, lambda s: s.num_response_tokens),
                        percent(mean_of(samples, lambda s, b=most: b > 0 and len(s.calls) >= b)),
                    )
                )
            panels.setdefault(task, []).append((one.name, [s.max_calls for s in found], at))
    columns = ("model", "task", "budget", "correct %", "calls", "tokens", "used up %")
    note = "At most so many programs per response, the same prompts and random numbers otherwise."
    if not rows:
        return None
    figure = curves(panels, xlabel="budget, calls", ylabel="correct, %")
    return Analysis("Budgets", note, columns, rows, figure)


def types(saved: Sequence[Saved]) -> Analysis | None:
    """By subject, level, or what else the benchmark says of its problems."""
    rows, bars = [], []
    for one in evaluations(saved):
        text, code = one.without_tools, one.with_tools
        by_type: dict[tuple[str, str, str], dict[Setting, dict[str, list[Sample]]]] = {}
        for sample in one.samples:
            for kind, value in sample.types.items():
                of_setting = by_type.setdefault((sample.task, kind, value), {})
                problems = of_setting.setdefault(sample.setting, {})
                problems.setdefault(sample.problem_id, []).append(sample)
        for (task, kind, value), found in sorted(by_type.items()):
            groups = {setting: list(problems.values()) for setting, problems in found.items()}
            a, b = (
                percent(float(np.mean(shares(groups[s])))) if s in groups else None
                for s in (text, code)
            )
            spread = interval(shares(groups[code])) if code in groups else (None,) * 3
            gain = None if a is None or b is None else b - a
            count = len(next(iter(groups.values())))
            rows.append((one.name, task, kind, value, count, a, b, *map(percent, spread[1:]), gain))
            bars.append((f"{task}: {value}", a, b))
    note = (
        "Per cent of samples that are correct without tools and with them, the 95 % interval of "
        "the latter, and the gain."
    )
    columns = ("model", "task", "type", "value", "problems", "without", "with", "from", "to")
    columns += ("gain",)
    if not rows:
        return None

    def draw(axes) -> None:
        at = np.arange(len(bars))
        for shift, label, values in (
            (-0.2, "without tools", [a for _, a, _ in bars]),
            (0.2, "with tools", [b for _, _, b in bars]),
        ):
            axes.barh(at + shift, [value or 0.0 for value in values], 0.4, label=label)
        axes.set_yticks(at, [label for label, _, _ in bars], fontsize=7)
        axes.invert_yaxis()
        axes.set(xlabel="correct, %")
        axes.legend(fontsize=7)

    figure = plotted(draw, (7, 1.5 + 0.28 * len(bars)))
    return Analysis("By type of problem", note, columns, rows, figure)
