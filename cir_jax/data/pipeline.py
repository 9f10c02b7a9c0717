"""Which problems a step sees: grain datasets indexed by element; a resume needs no state."""

import functools
import random
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import grain

from cir_jax.config import Config, ConfigError
from cir_jax.data import curriculum, tasks
from cir_jax.data.curriculum import Curriculum
from cir_jax.records import Problem

# Draws per task and seed; far more than any run takes.
_DRAWS = 2**20


def train_problems(task_names: Sequence[str], seed: int | str) -> grain.MapDataset:
    """Problems of the rl split, the tasks in turn, each task's draws in a seeded order.

    Element i is a function of (tasks, seed, i): a step's problems are a slice.
    """

    def one_task(name: str) -> grain.MapDataset:
        order_seed = zlib.crc32(f"{name}:{seed}".encode())
        draws = grain.MapDataset.range(_DRAWS).shuffle(seed=order_seed)
        return draws.map(lambda i: tasks.problem(name, "rl", int(i)))

    return grain.MapDataset.mix([one_task(name) for name in task_names])


def step_problems(dataset: grain.MapDataset, step: int, count: int) -> list[Problem]:
    return [dataset[i] for i in range(step * count, (step + 1) * count)]


def rl_problems(cfg: Config) -> Callable[[int], list[Problem]]:
    """The problems of a round by its number, of which each RL step has rollout.refill_rounds + 1.

    Raises ConfigError if there is a curriculum that does not fit the tasks.
    """
    count = cfg.rollout.prompts_per_step
    if not cfg.data.curriculum:
        dataset = train_problems(cfg.data.tasks, cfg.seed)
        return lambda number: step_problems(dataset, number, count)
    plan = curriculum.read(Path(cfg.data.curriculum))
    _check_names(plan, cfg)
    rounds = cfg.rollout.refill_rounds + 1

    @functools.cache
    def drawn_from(stage: int) -> Callable[[int], Problem]:
        names = plan.at(plan.stages[stage].from_step)[1]
        if plan.by == "task":
            # An order of each stage's own: a task's draws come up once, whatever joins it.
            return train_problems(names, f"{cfg.seed}:{stage}").__getitem__
        return functools.partial(_shuffled, names, f"curriculum:{cfg.seed}:{stage}")

    def problems(number: int) -> list[Problem]:
        stage, _ = plan.at(number // rounds)
        first = (number - plan.stages[stage].from_step * rounds) * count
        return [drawn_from(stage)(i) for i in range(first, first + count)]

    return problems


def _shuffled(problem_ids: Sequence[str], seed: str, index: int) -> Problem:
    """Number `index` of endless passes, each over all problems in an order of its own."""
    epoch, at = divmod(index, len(problem_ids))
    return tasks.find_problem(problem_ids[_order(len(problem_ids), f"{seed}:{epoch}")[at]])


@functools.lru_cache(maxsize=4)
def _order(count: int, seed: str) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def _check_names(plan: Curriculum, cfg: Config) -> None:
    where = f"data.curriculum={cfg.data.curriculum!r}"
    for stage in plan.stages:
        for name in stage.names:
            try:
                task = name if plan.by == "task" else tasks.parse_id(name)[0]
            except ValueError as error:
                raise ConfigError(f"{where}: {error}") from error
            if task not in cfg.data.tasks:
                raise ConfigError(f"{where}: {name!r} is not of data.tasks={list(cfg.data.tasks)}")


def eval_problems(task_names: Sequence[str], count: int) -> list[Problem]:
    """Held-out problems, the same for every seed, the tasks in turn."""
    return first_problems(task_names, "eval", count)


def first_problems(task_names: Sequence[str], split: tasks.Split, count: int) -> list[Problem]:
    """The first ones of a split, the tasks in turn."""
    n = len(task_names)
    return [tasks.problem(task_names[i % n], split, i // n) for i in range(count)]
