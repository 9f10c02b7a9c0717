"""The cold start's data: demonstrations, their programs run in the sandbox, step by step."""

import random
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np

from cir_jax.config import Config, ConfigError, RolloutConfig
from cir_jax.data.demonstrations import Demonstration, demonstration
from cir_jax.prompts import prompt_ids
from cir_jax.records import Author, ExecResult, prompt_text
from cir_jax.rl.batch import Sequence1D
from cir_jax.rollout.fence import BOUNDARIES
from cir_jax.sandbox.executor import Submitter
from cir_jax.sandbox.pool import open_sandbox
from cir_jax.sandbox.text import result_text
from cir_jax.tokenizer import END_OF_TEXT, Tokenizer, train_bpe

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


def tokenize(
    prompt: Sequence[int], parts: Sequence[tuple[Author, str]], tokenizer: Tokenizer
) -> Sequence1D:
    """Each stretch encoded apart, so that masks follow authors by construction.

    prompt: ids of what comes before them.
    """
    ids = list(prompt)
    author: list[int] = [Author.PROMPT] * len(ids)
    for who, text in parts:
        new = tokenizer.encode(text.removesuffix(END_OF_TEXT))
        if text.endswith(END_OF_TEXT):
            new.append(tokenizer.eos_id)
        ids += new
        author += [who] * len(new)
    return Sequence1D(np.array(ids, np.int32), np.array(author, np.int8))


class SFTData:
    """Trajectories of each step, as a function of the step alone; programs run as they come up.

    An epoch takes every demonstration once, in an order of its own; those left over at its end
    by the batch size are not used.
    """

    def __init__(self, cfg: Config, tokenizer: Tokenizer, sandbox: Submitter):
        if cfg.sft.batch_size > cfg.sft.num_trajectories:
            raise ValueError(
                f"sft.batch_size={cfg.sft.batch_size}: more than "
                f"sft.num_trajectories={cfg.sft.num_trajectories}"
            )
        self._cfg = cfg
        self._tokenizer = tokenizer
        self._sandbox = sandbox
        self._started: dict[int, tuple[Demonstration, list[Future[ExecResult]]]] = {}
        self._sequences: dict[int, Sequence1D] = {}
        self._order: tuple[int, list[int]] = (-1, [])

    def sequences(self, step: int) -> list[Sequence1D]:
        """The step's trajectories; programs of the next steps start to run meanwhile."""
        for near in range(step, step + _STEPS_AHEAD + 1):
            for i in self._indices(near):
                self._start(i)
        return [self._sequence(i) for i in self._indices(step)]

    def _indices(self, step: int) -> list[int]:
        cfg = self._cfg.sft
        epoch, at = divmod(step, cfg.num_trajectories // cfg.batch_size)
        if self._order[0] != epoch:
            order = list(range(cfg.num_trajectories))
            random.Random(f"sft:{self._cfg.seed}:{epoch}").shuffle(order)
            self._order = (epoch, order)
        return self._order[1][at * cfg.batch_size : (at + 1) * cfg.batch_size]

    def _start(self, index: int) -> None:
        if index in self._started or index in self._sequences:
            return
        demo = _demonstration(self._cfg, index)
        self._started[index] = demo, [self._sandbox.submit(code) for code in demo.programs]

    def _sequence(self, index: int) -> Sequence1D:
        if index not in self._sequences:
            demo, futures = self._started.pop(index)
            results = [future.result() for future in futures]
            data = self._cfg.data
            prompt = prompt_ids(demo.problem, self._tokenizer, data.template, data.chat)
            _, *parts = segments(demo, results, data.template, self._cfg.rollout)
            self._sequences[index] = tokenize(prompt, parts, self._tokenizer)
        return self._sequences[index]


def train_tokenizer(cfg: Config, directory: Path) -> None:
    """Trains the small tokenizer on all texts of the config's demonstrations.

    Raises ConfigError if there are none.
    """
    if not cfg.data.tasks:
        raise ConfigError("data.tasks=[]: must have at least one entry, to be demonstrated")
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
