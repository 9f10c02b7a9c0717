"""Which problems a step sees: grain datasets indexed by element; a resume needs no state."""

import functools
import random
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import grain

from cir_jax.config import Config
from cir_jax.data import curriculum, sources
from cir_jax.data.sources import Source
from cir_jax.records import Problem


def train_problems(
    found: Sequence[Source], seed: int | str, weights: Sequence[float] | None = None
) -> grain.MapDataset:
    """The sources in turn (or by weights), each in a seeded order, another one whenever it begins
    anew.

    Element i is a function of (sources, seed, i), for any i: a step's problems are a slice.
    """

    def one(source: Source) -> grain.MapDataset:
        order_seed = zlib.crc32(f"{source.name}:{seed}".encode())
        draws = grain.MapDataset.range(len(source)).shuffle(seed=order_seed)
        return draws.map(lambda i: source[int(i)])

    return grain.MapDataset.mix([one(source).repeat() for source in found], weights)


def step_problems(dataset: grain.MapDataset, step: int, count: int) -> list[Problem]:
    return [dataset[i] for i in range(step * count, (step + 1) * count)]


def rl_problems(cfg: Config, found: Sequence[Source]) -> Callable[[int], list[Problem]]:
    """The problems of a round by its number, of which each RL step has rollout.refill_rounds + 1.

    found: the training sources. Raises ConfigError if there is a curriculum that names what is
    not in them.
    """
    count = cfg.rollout.prompts_per_step
    if not cfg.data.curriculum:
        dataset = train_problems(found, cfg.seed, sources.weights(cfg.data, found))
        return lambda number: step_problems(dataset, number, count)
    plan = curriculum.read(Path(cfg.data.curriculum))
    find = sources.finder(cfg.data, found)
    by_name = {name: find(plan.by, name) for stage in plan.stages for name in stage.names}
    rounds = cfg.rollout.refill_rounds + 1

    @functools.cache
    def drawn_from(stage: int) -> Callable[[int], Problem]:
        drawn = [by_name[name] for name in plan.at(plan.stages[stage].from_step)[1]]
        if plan.by == "task":
            # An order of each stage's own: a task's draws come up once, whatever joins it.
            return train_problems(drawn, f"{cfg.seed}:{stage}").__getitem__
        return functools.partial(_shuffled, drawn, f"curriculum:{cfg.seed}:{stage}")

    def problems(number: int) -> list[Problem]:
        stage, _ = plan.at(number // rounds)
        first = (number - plan.stages[stage].from_step * rounds) * count
        return [drawn_from(stage)(i) for i in range(first, first + count)]

    return problems


def _shuffled(problems: Sequence[Source], seed: str, index: int) -> Problem:
    """Number `index` of endless passes, each over all sources of one problem in another order."""
    epoch, at = divmod(index, len(problems))
    return problems[_order(len(problems), f"{seed}:{epoch}")[at]][0]


@functools.lru_cache(maxsize=4)
def _order(count: int, seed: str) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def first_problems(found: Sequence[Source], count: int) -> list[Problem]:
    """The sources' first problems in turn, the same for every seed; fewer if there are no more."""
    problems: list[Problem] = []
    for i in range(max(map(len, found))):
        problems += [source[i] for source in found if i < len(source)]
        if len(problems) >= count:
            break
    return problems[:count]
