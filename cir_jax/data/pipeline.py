"""Which problems a step sees: grain datasets indexed by element; a resume needs no state."""

import zlib
from collections.abc import Sequence

import grain

from cir_jax.data.sources import Source
from cir_jax.records import Problem


def train_problems(sources: Sequence[Source], seed: int) -> grain.MapDataset:
    """The sources in turn, each in a seeded order, another one whenever it begins anew.

    Element i is a function of (sources, seed, i), for any i: a step's problems are a slice.
    """

    def one(source: Source) -> grain.MapDataset:
        order_seed = zlib.crc32(f"{source.name}:{seed}".encode())
        draws = grain.MapDataset.range(len(source)).shuffle(seed=order_seed)
        return draws.map(lambda i: source[int(i)])

    return grain.MapDataset.mix([one(source) for source in sources])


def step_problems(dataset: grain.MapDataset, step: int, count: int) -> list[Problem]:
    return [dataset[i] for i in range(step * count, (step + 1) * count)]


def eval_problems(sources: Sequence[Source], count: int) -> list[Problem]:
    """The sources' first problems in turn, the same for every seed; fewer if there are no more."""
    problems: list[Problem] = []
    for i in range(max(map(len, sources))):
        problems += [source[i] for source in sources if i < len(source)]
        if len(problems) >= count:
            break
    return problems[:count]
