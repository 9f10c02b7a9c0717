"""The cold start's data, step by step: recorded trajectories, or demonstrations, whose programs run
in the sandbox."""

import collections
import hashlib
import random
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol

from cir_jax import hosts
from cir_jax.config import Config, ConfigError, RolloutConfig
from cir_jax.data.demonstrations import Demonstration, check_demonstrated, demonstration
from cir_jax.prompts import prompt_ids
from cir_jax.records import Author, ExecResult, prompt_text
from cir_jax.rl.batch import Sequence1D
from cir_jax.rollout.fence import BOUNDARIES
from cir_jax.sandbox.executor import Submitter
from cir_jax.sandbox.pool import open_sandbox
from cir_jax.sandbox.text import result_text
from cir_jax.tokenizer import END_OF_TEXT, Tokenizer, train_bpe
from cir_jax.train import transcripts
from cir_jax.train.transcripts import tokenize

# Steps whose programs run while the current step trains.
_STEPS_AHEAD = 4


def segments(
    demo: Demonstration, results: Sequence[ExecResult], template: str, cfg: RolloutConfig
) -> list[tuple[Author, str]]:
    """The trajectory's stretches of text by author, as a rollout would have written them; a chat
    template is not in it."""
    boundary = BOUNDARIES[cfg.boundary]
    out = [(Author.PROMPT, prompt_text(template, demo.problem))]
    text = ""
    for code, result in zip(demo.programs, results, strict=True):
        text = result_text(result, cfg.result)
        out.append((Author.MODEL, f"```python\n{code}\n```{boundary.written}"))
        out.append((Author.TOOL, boundary.put_back(text, trailing="")))
    answer = text.removeprefix(cfg.result.prefix) if demo.answer is None else demo.answer
    out.append((Author.MODEL, f"The answer is \\boxed{{{answer}}}.{END_OF_TEXT}"))
    return out


class Trajectories(Protocol):
    """Trajectories by number: those to train on from 0, behind them those that are held out."""

    num_trained: int
    num_held_out: int

    def start(self, index: int) -> None:
        """Says that the trajectory will be asked for."""
        ...

    def share(self, indices: Sequence[int]) -> None:
        """Before trajectories are asked for, on all processes: so that each has all of them."""
        ...

    def sequence(self, index: int) -> Sequence1D: ...


class Generated:
    """Demonstrations, whose programs run from when they are said to be asked for; of several
    processes, each runs those of its share."""

    def __init__(self, cfg: Config, tokenizer: Tokenizer, sandbox: Submitter):
        """Raises ConfigError if a task has no demonstrations."""
        check_demonstrated(cfg.data.tasks)
        self.num_trained, self.num_held_out = cfg.sft.num_trajectories, cfg.sft.held_out
        self._cfg = cfg
        self._tokenizer = tokenizer
        self._sandbox = sandbox
        self._started: dict[int, tuple[Demonstration, list[Future[ExecResult]]]] = {}
        self._sequences: dict[int, Sequence1D] = {}

    def start(self, index: int) -> None:
        if index in self._started or index in self._sequences or not _is_own(index):
            return
        demo = _demonstration(self._cfg, index)
        self._started[index] = demo, [self._sandbox.submit(code) for code in demo.programs]

    def share(self, indices: Sequence[int]) -> None:
        # The same everywhere: what has been shared is known to all.
        new = [i for i in indices if i not in self._sequences]
        if hosts.count() > 1 and new:
            hosts.mark("programs of demonstrations")
            for part in hosts.gather({i: self.sequence(i) for i in new if _is_own(i)}):
                self._sequences |= part

    def sequence(self, index: int) -> Sequence1D:
        self.start(index)
        if index not in self._sequences:
            demo, futures = self._started.pop(index)
            results = [future.result() for future in futures]
            data = self._cfg.data
            prompt = prompt_ids(demo.problem, self._tokenizer, data.template, data.chat)
            _, *parts = segments(demo, results, data.template, self._cfg.rollout)
            self._sequences[index] = tokenize([(Author.PROMPT, prompt), *parts], self._tokenizer)
        return self._sequences[index]


class FromFiles:
    """Recorded trajectories. Which are held out is a function of the seed and their questions."""

    def __init__(self, cfg: Config, tokenizer: Tokenizer):
        """Raises ConfigError if the files cannot be used, or nothing is left to train on."""
        recorded, self.counts = transcripts.load(cfg, tokenizer)
        sizes = collections.Counter(row.question for row in recorded)
        held_out: set[str] = set()
        num_held_out = 0
        for question in sorted(sizes, key=lambda q: _drawn(cfg.seed, q)):
            if num_held_out >= cfg.sft.held_out:
                break
            held_out.add(question)
            num_held_out += sizes[question]
        self.num_held_out = num_held_out
        self.num_trained = len(recorded) - num_held_out
        recorded.sort(key=lambda row: row.question in held_out)
        self._sequences = [row.sequence for row in recorded]

    def start(self, index: int) -> None:
        """They are all there."""

    def share(self, indices: Sequence[int]) -> None:
        """They are all everywhere."""

    def sequence(self, index: int) -> Sequence1D:
        return self._sequences[index]


def _is_own(index: int) -> bool:
    return index % hosts.count() == hosts.index()


def _drawn(seed: int, question: str) -> bytes:
    return hashlib.blake2b(f"{seed}:{question}".encode(), digest_size=16).digest()


class SFTData:
    """Trajectories of each step, as a function of the step alone; programs run as they come up.

    An epoch takes every trajectory once, in an order of its own; those left over at its end
    by the batch size are not used.
    """

    def __init__(self, cfg: Config, source: Trajectories):
        if cfg.sft.batch_size > source.num_trained:
            raise ConfigError(
                f"sft.batch_size={cfg.sft.batch_size}: must be at most {source.num_trained}, the "
                f"trajectories to train on"
            )
        self._cfg = cfg
        self._source = source
        self._steps_per_epoch = source.num_trained // cfg.sft.batch_size
        self.num_steps = cfg.sft.steps or cfg.sft.epochs * self._steps_per_epoch
        self._order: tuple[int, list[int]] = (-1, [])

    def sequences(self, step: int) -> list[Sequence1D]:
        """The step's trajectories; programs of the next steps start to run meanwhile."""
        for near in range(step, step + _STEPS_AHEAD + 1):
            for i in self._indices(near):
                self._source.start(i)
        return self._all(self._indices(step))

    def held_out(self) -> list[Sequence1D]:
        """Trajectories that no step has, in order."""
        first = self._source.num_trained
        held_out = range(first, first + self._source.num_held_out)
        for i in held_out:
            self._source.start(i)
        return self._all(held_out)

    def _all(self, indices: Sequence[int]) -> list[Sequence1D]:
        self._source.share(indices)
        return [self._source.sequence(i) for i in indices]

    def _indices(self, step: int) -> list[int]:
        size = self._cfg.sft.batch_size
        epoch, at = divmod(step, self._steps_per_epoch)
        if self._order[0] != epoch:
            order = list(range(self._source.num_trained))
            random.Random(f"sft:{self._cfg.seed}:{epoch}").shuffle(order)
            self._order = (epoch, order)
        return self._order[1][at * size : (at + 1) * size]


def train_tokenizer(cfg: Config, directory: Path) -> None:
    """Trains the small tokenizer on all texts of the config's demonstrations.

    Raises ConfigError if there are none.
    """
    check_demonstrated(cfg.data.tasks)
    with open_sandbox(cfg.sandbox) as sandbox:
        demos = [_demonstration(cfg, i) for i in range(cfg.sft.num_trajectories)]
        futures = [[sandbox.submit(code) for code in demo.programs] for demo in demos]
        texts = [
            text.removesuffix(END_OF_TEXT)
            for demo, row in zip(demos, futures, strict=True)
            for _, text in segments(demo, [f.result() for f in row], cfg.data.template, cfg.rollout)
        ]
    train_bpe(texts, cfg.model.vocab_size, directory)


def _demonstration(cfg: Config, index: int) -> Demonstration:
    """Demonstration number `index` of a config, the tasks in turn."""
    names = cfg.data.tasks
    return demonstration(
        names[index % len(names)],
        index // len(names),
        text_share=cfg.sft.text_share,
        failed_share=cfg.sft.failed_share,
    )
