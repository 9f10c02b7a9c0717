"""Which problems a step sees: grain datasets indexed by element; a resume needs no state."""

import zlib
from collections.abc import Sequence

import grain

from cir_jax.data import tasks
from cir_jax.records import Problem

# Draws per task and seed; far more than any run takes.
_DRAWS = 2**20


def train_problems(task_names: Sequence[str], seed: int) -> grain.MapDataset:
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


def eval_problems(task_names: Sequence[str], count: int) -> list[Problem]:
    """Held-out problems, the same for every seed, the tasks in turn."""
    return first_problems(task_names, "eval", count)


def first_problems(task_names: Sequence[str], split: tasks.Split, count: int) -> list[Problem]:
    """The first ones of a split, the tasks in turn."""
    n = len(task_names)
    return [tasks.problem(task_names[i % n], split, i // n) for i in range(count)]
