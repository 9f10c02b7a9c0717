"""What responses did with code, and what became of them when it failed or misled."""

import re
from collections.abc import Sequence

from cir_jax.analyses.accuracy import each, flat, mean_of
from cir_jax.analyses.analysis import Analysis, percent, plotted
from cir_jax.analyses.saved import Saved, evaluations
from cir_jax.evals.codestats import code_stats
from cir_jax.evals.samples import Sample

_BLOCK = re.compile(r"```python.*?(```|\Z)", re.DOTALL)

# Of `code_stats`, in the order of the table: what the column is called, and whether it is a share.
_COLUMNS = {
    "code_share": ("with code %", True),
    "calls_per_response": ("programs per response", False),
    "programs_ok_share": ("programs that ran %", True),
    "correct_after_failure_share": ("correct ones with a failed program %", True),
    "cut_share": ("cut by a limit %", True),
}


def holds(text: str, answer: str | None) -> bool:
    """Whether an answer stands in a text, not as part of a longer number or word."""
    bare = (answer or "").strip().strip("$").strip()
    if not bare:
        return False
    return re.search(rf"(?<![\w.]){re.escape(bare)}(?!\w|\.\d)", text) is not None


def _samples(saved: Sequence[Saved]) -> list[tuple[Saved, str, list[Sample]]]:
    """Of each evaluation by setting, of each run all that it has kept."""
    found = [
        (one, setting.name, [s for groups in tasks.values() for s in flat(groups)])
        for one, setting, tasks in each(saved)
    ]
    return found + [(one, "training", one.samples) for one in saved if one.is_run and one.samples]


def code(saved: Sequence[Saved]) -> Analysis | None:
    """Shares of responses with code and of programs that run, and how they ended."""
    rows = []
    for one, setting, samples in _samples(saved):
        by_task: dict[str, list[Sample]] = {}
        for sample in samples:
            by_task.setdefault(sample.task, []).append(sample)
        parts = {**by_task, **({"all": samples} if len(by_task) > 1 else {})}
        for task, part in parts.items():
            stats = code_stats([s.trajectory() for s in part], [s.verdict() for s in part])
            ends = {k.removeprefix("programs_"): n for k, n in stats.items() if k in _ENDS and n}
            cells = (
                percent(stats[k]) if is_share else stats[k] for k, (_, is_share) in _COLUMNS.items()
            )
            told = ", ".join(f"{name} {n}" for name, n in ends.items())
            rows.append((one.name, setting, task, len(part), *cells, told or None))
    note = (
        "Failed programs are those with an error, a timeout, a crash or too little memory. The "
        "share of correct ones with a failed program is of correct responses (CIR: 39.4 %)."
    )
    columns = ("model", "setting", "task", "responses", *(t for t, _ in _COLUMNS.values()))
    return Analysis("Code", note, (*columns, "how programs ended"), rows) if rows else None


_ENDS = tuple(f"programs_{end}" for end in ("ok", "error", "timeout", "crashed", "oom"))


def outcome(sample: Sample) -> str | None:
    """What code did to a response: None without programs, else one of OUTCOMES."""
    if not sample.calls:
        return None
    if any(call.result.status != "ok" for call in sample.calls):
        return "recovered" if sample.correct else "not recovered"
    if sample.correct:
        return "right"
    misled = holds(sample.calls[-1].result.stdout, sample.answer)
    return "misled" if misled else "wrong otherwise"


OUTCOMES = ("right", "misled", "wrong otherwise", "recovered", "not recovered")


def failures(saved: Sequence[Saved]) -> Analysis | None:
    """The effect of failed code, and of code that runs and is wrong."""
    rows, bars = [], []
    for one, setting, samples in _samples(saved):
        outcomes = [outcome(sample) for sample in samples]
        counts = {name: outcomes.count(name) for name in OUTCOMES}
        ran = sum(counts[name] for name in OUTCOMES[:3])
        failed = sum(counts[name] for name in OUTCOMES[3:])
        if not ran + failed:
            continue
        again = [s for s in samples if any(c.result.status != "ok" for c in s.calls[:-1])]
        rows.append(
            (
                one.name,
                setting,
                ran,
                *(percent(counts[name] / ran) if ran else None for name in OUTCOMES[:3]),
                failed,
                *(percent(counts[name] / failed) if failed else None for name in OUTCOMES[3:]),
                percent(len(again) / failed) if failed else None,
            )
        )
        bars.append((f"{one.name}, {setting}", counts))
    note = (
        "Of responses whose programs all ran: right; misled, when the wrong answer is what the "
        "last program printed; wrong otherwise. Of those with a failed program: recovered, if the "
        "answer is right all the same, or not; tried again, if another program came after it."
    )
    columns = ("model", "setting", "all ran", "right %", "misled %", "wrong otherwise %", "failed")
    columns += ("recovered %", "not recovered %", "tried again %")
    if not rows:
        return None

    def draw(axes) -> None:
        left = [0] * len(bars)
        for name in OUTCOMES:
            widths = [counts[name] for _, counts in bars]
            axes.barh(range(len(bars)), widths, left=left, label=name)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize=7)
        axes.invert_yaxis()
        axes.set(xlabel="responses with programs")
        axes.legend(fontsize=7)

    figure = plotted(draw, (8, 1.5 + 0.4 * len(bars)))
    return Analysis("Effect of failed code", note, columns, rows, figure)


def checks_itself(sample: Sample) -> bool:
    """Whether a program printed the final answer when that already stood in the response: in the
    output of an earlier program, or in what the model had written outside of its programs."""
    turns = sample.turns
    known = False
    for n, call in enumerate(sample.calls):
        before = "".join(span.text for span in turns[n : n + 1])
        known = known or holds(_BLOCK.sub("", before), sample.answer)
        printed = call.result.status == "ok" and holds(call.result.stdout, sample.answer)
        if known and printed:
            return True
        known = known or printed
    return False


def _quarters(one: Saved) -> list[tuple[str, list[Sample]]]:
    """A run's samples by the quarter of its steps."""
    last = max(sample.step for sample in one.samples)
    parts: dict[int, list[Sample]] = {}
    for sample in one.samples:
        parts.setdefault(min(3, 4 * (sample.step - 1) // last), []).append(sample)
    return [
        (f"training, steps {part[0].step} to {part[-1].step}", part)
        for _, part in sorted(parts.items())
    ]


def behaviours(saved: Sequence[Saved]) -> Analysis | None:
    """R1-CI's: self-checking by code, turns, length, and code where text suffices."""
    parts = _samples(evaluations(saved))
    for one in saved:
        if one.is_run and one.samples:
            parts += [(one, name, samples) for name, samples in _quarters(one)]
    rows = []
    for one, name, samples in parts:
        easy, hard = _by_need(one, samples)
        with_code = [s for s in samples if s.calls]
        rows.append(
            (
                one.name,
                name,
                len(samples),
                percent(mean_of(with_code, checks_itself)),
                mean_of(samples, lambda s: len(s.turns)),
                mean_of(samples, lambda s: s.num_response_tokens),
                mean_of(samples, lambda s: s.num_model_tokens),
                percent(mean_of(easy, lambda s: bool(s.calls))),
                percent(mean_of(hard, lambda s: bool(s.calls))),
            )
        )
    note = (
        "Self-checking: of responses with programs, those in which one printed the final answer "
        "when that already stood in the text or in an earlier output. Text suffices: problems that "
        "the same model answers right without tools at least half of the time, or, where that was "
        "not asked, of tasks that are known not to need code."
    )
    columns = ("model", "setting", "responses", "self-checking %", "turns", "tokens")
    columns += ("by the model", "code where text suffices %", "code elsewhere %")
    return Analysis("Behaviours", note, columns, rows) if rows else None


def _by_need(one: Saved, samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Those of problems that text suffices for, and the others; none if that is not known."""
    text = one.without_tools
    if text is None:
        if len({sample.needs_code for sample in samples}) < 2:
            return [], []
        is_easy = [not sample.needs_code for sample in samples]
    else:
        right: dict[tuple[str, str], list[bool]] = {}
        for sample in one.samples:
            if sample.setting == text:
                right.setdefault((sample.task, sample.problem_id), []).append(sample.correct)
        easy = {key for key, found in right.items() if 2 * sum(found) >= len(found)}
        is_easy = [(sample.task, sample.problem_id) in easy for sample in samples]
    pairs = list(zip(samples, is_easy, strict=True))
    return [s for s, yes in pairs if yes], [s for s, yes in pairs if not yes]
