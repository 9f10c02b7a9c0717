"""An evaluation from top to bottom: a model, exams and forms in; samples in a directory out.

Problems are asked in parts, each written as a whole when it is done (evals/samples.py). Tokens do
not depend on the parts, so that a stop, or another number of hosts, changes nothing.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cir_jax import config as configs
from cir_jax import hosts
from cir_jax.config import Config, ConfigError
from cir_jax.data import pipeline, sources
from cir_jax.evals.benchmarks import path_of, problems_of
from cir_jax.evals.exam import Exam, Form, answer
from cir_jax.evals.samples import DESCRIPTION, Parts, Sample, Setting
from cir_jax.evals.suites import Suite
from cir_jax.evaluation.forks import answer_forks
from cir_jax.evaluation.model import Model
from cir_jax.models import qwen
from cir_jax.rollout.engine import Engine
from cir_jax.rollout.sampling import GREEDY, Sampling
from cir_jax.tokenizer import Tokenizer
from cir_jax.train.display import Display
from cir_jax.train.rollouts import Rollouts, open_rollouts

Tools = Literal["on", "off", "both"]

# Keys of the config that change no sample.
_WHERE_AND_HOW = (*configs.UPKEEP, "mesh", "sft", "rl")
# Rows of a part, in slots: while the last of a part end, slots stand empty.
_SLOTS_PER_PART = 4


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of the model; None: as the suite, or the config, says.

    suite: None for the config's own held-out problems. budgets: further numbers of calls, with
    tools. part: problems of a part.
    """

    suite: Suite | None
    data_dir: Path
    tools: Tools
    budgets: tuple[int, ...] = ()
    counterfactual: bool = False
    samples: int | None = None
    problems: int | None = None
    max_calls: int | None = None
    part: int | None = None


class Entry(NamedTuple):
    """A part of the whole: problems of an exam in a form, or the forks of that part's samples.

    asked: for forks, the number of the part that they begin in.
    """

    exam: Exam
    form: Form
    part: range
    asked: int | None = None


def evaluate(model: Model, request: Request, out: Path | None, display: Display) -> Path:
    """Asks what has not been answered yet; returns the directory, which is complete then.

    out: None for one that is named after all that decides the result.

    Raises ConfigError if the directory is of another request, or a config cannot be used.
    """
    asked = _asked(model, request)
    out = out or model.folder / _folder_name(request, asked)
    _check_same(out, asked)
    out.mkdir(parents=True, exist_ok=True)
    display.note(f"evaluation directory: {out}")
    parts = Parts(out, hosts.index(), hosts.count())
    if parts.complete:
        parts.remove()
        return out
    with contextlib.ExitStack() as stack:
        cfg, exams = model.cfg, []
        if request.suite is not None:
            cfg, exams = _suite_exams(cfg, request, display)
        tools = stack.enter_context(open_rollouts(cfg, None))
        stack.callback(display.end)
        if request.suite is None:
            exams = [_held_out(cfg, request, tools, display)]
        params, stage = model.load(tools.mesh)
        left_out = {exam.name: exam.left_out for exam in exams if exam.left_out}
        described = {"model": model.name, "stage": stage, "left_out": left_out, "asked": asked}
        _describe(out, described)
        plan = list(_plan(exams, forms_of(cfg, request), request, cfg.rollout.slots))
        missing = [number for number in range(len(plan)) if not parts.has(number)]
        # Nobody writes before all have seen what is missing.
        hosts.exchange("missing parts", None)
        display.begin("evaluation", len(plan), len(plan) - len(missing))
        forking = functools.cache(lambda: _fork_engine(cfg, tools))
        for done, number in enumerate(missing, start=len(plan) - len(missing) + 1):
            samples = _answered(tools, forking, params, parts, plan[number])
            parts.write(number, samples)
            correct = sum(sample.correct for sample in samples) / max(1, len(samples))
            display.step(done, {f"{plan[number].exam.name}, correct": correct})
        hosts.exchange("all parts written", None)
        if hosts.is_first():
            parts.merge(len(plan))
        hosts.exchange("parts merged", None)
    return out


def _answered(
    tools: Rollouts,
    forking: Callable[[], Engine],
    params: qwen.Params,
    parts: Parts,
    entry: Entry,
) -> list[Sample]:
    """forking: makes the engine for forks, once, if it is needed."""
    exam, form = entry.exam, entry.form
    if entry.asked is None:
        return answer(tools.engine, tools.grader, tools.tokenizer, params, exam, form, entry.part)
    hosts.exchange(f"fork {entry.asked}", None)
    return answer_forks(
        forking(), tools.grader, tools.tokenizer, params, exam, parts.read(entry.asked)
    )


def _fork_engine(cfg: Config, tools: Rollouts) -> Engine:
    """One whose prompts may be as long as a whole response."""
    return Engine(
        cfg.model,
        # No row gets longer than those that are forked.
        cfg.rollout.model_copy(update={"max_context": tools.engine.max_length}),
        tools.tokenizer,
        tools.sandbox,
        template=cfg.data.template,
        chat=cfg.data.chat,
        max_prompt_tokens=tools.engine.max_length,
        dtype=cfg.compute.dtype,
        seed=cfg.seed,
    )


# --- what is asked


def forms_of(cfg: Config, request: Request) -> list[Form]:
    """With tools, without, and at other budgets; a form that comes twice is asked once."""
    suite, chat = request.suite, cfg.data.chat
    if suite is None:
        most = configs.eval_max_calls(cfg) if request.max_calls is None else request.max_calls
        code, text = ("config", cfg.data.template), ("config", cfg.data.template)
    else:
        most = suite.max_calls if request.max_calls is None else request.max_calls
        code, text = ("code", suite.code_prompt), ("text", suite.text_prompt)
    wanted = [(code, most)] * (request.tools != "off") + [(text, 0)] * (request.tools != "on")
    wanted += [(code, budget) for budget in request.budgets]
    return [
        Form(Setting(kind, calls), template, chat)
        for (kind, template), calls in dict.fromkeys(wanted)
    ]


def _plan(
    exams: Sequence[Exam], forms: Sequence[Form], request: Request, slots: int
) -> Iterator[Entry]:
    number = 0
    for exam in exams:
        size = request.part or max(1, _SLOTS_PER_PART * slots // exam.samples)
        for form in forms:
            starts = range(0, len(exam.problems), size)
            ranges = [range(at, min(at + size, len(exam.problems))) for at in starts]
            yield from (Entry(exam, form, part) for part in ranges)
            first, number = number, number + len(ranges)
            if request.counterfactual and form is forms[0] and form.setting.max_calls:
                yield from (Entry(exam, form, part, first + n) for n, part in enumerate(ranges))
                number += len(ranges)


def _held_out(cfg: Config, request: Request, tools: Rollouts, display: Display) -> Exam:
    """As training does it (evals/suite.py): the same problems, prompts and random numbers."""
    found = sources.eval_sources(cfg.data, tools.engine.fits, display.note)
    count = request.problems or cfg.eval.num_problems
    if not count:
        raise ConfigError("eval.num_problems=0: must be above 0 to evaluate")
    samples, rollout = request.samples or 1, cfg.rollout
    drawn = Sampling(rollout.temperature, rollout.top_p, rollout.top_k, rollout.min_p)
    return Exam(
        "held-out",
        pipeline.first_problems(found, count),
        samples,
        GREEDY if samples == 1 else drawn,
        "eval",
    )


def _suite_exams(cfg: Config, request: Request, display: Display) -> tuple[Config, list[Exam]]:
    """The benchmarks, and the config with room for the longest prompt.

    Problems whose prompt leaves no room for an answer, in any form, are left out; that is said.
    """
    tokenizer = Tokenizer(configs.asset_dir(cfg.tokenizer))
    forms = forms_of(cfg, request)
    context = cfg.rollout.max_context or cfg.model.max_positions
    exams, longest = [], 1
    for benchmark in request.suite.benchmarks:
        problems = problems_of(benchmark, request.data_dir)[: request.problems]
        lengths = [
            max(len(form.prompt_ids(problem, tokenizer)) for form in forms) for problem in problems
        ]
        kept = [p for p, length in zip(problems, lengths, strict=True) if length < context]
        if len(kept) < len(problems):
            display.note(
                f"{benchmark.name}: {len(problems) - len(kept)} of {len(problems)} problems left "
                f"out, their prompts fill the context of {context} tokens (rollout.max_context, "
                "model.max_positions)"
            )
        if not kept:
            raise ConfigError(f"{benchmark.name}: no problem's prompt fits into the context")
        longest = max(longest, *(length for length in lengths if length < context))
        # All greedy samples of a problem would be the same.
        samples, drawn = 1, GREEDY
        if benchmark.temperature:
            samples = request.samples or benchmark.samples
            drawn = Sampling(benchmark.temperature, benchmark.top_p)
        left_out = len(problems) - len(kept)
        exams.append(Exam(benchmark.name, kept, samples, drawn, f"eval/{benchmark.name}", left_out))
    return configs.with_values(cfg, {"data.max_prompt_tokens": longest}), exams


# --- the directory


def _asked(model: Model, request: Request) -> dict[str, Any]:
    """All that decides the result, as JSON has it."""
    tree = configs.to_tree(model.cfg)
    for key in _WHERE_AND_HOW:
        del tree[key]
    if request.suite is not None:
        del tree["eval"]
    fields = {f.name: getattr(request, f.name) for f in dataclasses.fields(request)}
    data_dir = fields.pop("data_dir")
    benchmarks = request.suite.benchmarks if request.suite is not None else ()
    paths = [path_of(benchmark, data_dir) for benchmark in benchmarks]
    fields |= {
        "suite": request.suite and request.suite.model_dump(mode="json"),
        "files": {str(path.resolve()): path.stat().st_size for path in paths},
        "weights": model.weights,
        "model": model.identity,
        "config": tree,
    }
    return json.loads(json.dumps(fields))


def _folder_name(request: Request, asked: dict[str, Any]) -> str:
    name = "held-out" if request.suite is None else request.suite.name
    text = json.dumps(asked, sort_keys=True)
    return f"{name}-{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"


def _check_same(out: Path, asked: dict[str, Any]) -> None:
    path = out / DESCRIPTION
    if not path.exists():
        if out.is_dir() and any(out.iterdir()) and not (out / "parts").is_dir():
            raise ConfigError(f"--out {str(out)!r}: holds something else; must be new")
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["asked"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error!r}") from error
    for key, (was, is_now) in configs.tree_differences(before, asked).items():
        raise ConfigError(
            f"--out {str(out)!r}: was begun with {key}={was!r}, now it is {is_now!r}; another "
            "directory, or the same request"
        )


def _describe(out: Path, description: dict[str, Any]) -> None:
    path = out / DESCRIPTION
    aside = path.with_name(f"{path.name}.{hosts.index()}")
    aside.write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, path)
