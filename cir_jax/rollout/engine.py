"""The engine: problems in, trajectories out; recorded trajectories in, the same again out."""

import contextlib
from collections.abc import Sequence
from concurrent.futures import Future

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cir_jax.config import ModelConfig, RolloutConfig
from cir_jax.models import qwen
from cir_jax.prompts import prompt_ids
from cir_jax.records import (
    Author,
    ExecResult,
    Problem,
    StopReason,
    Trajectory,
    author_spans,
)
from cir_jax.rollout import compiled, fence
from cir_jax.rollout.playback import Playback, at_once
from cir_jax.rollout.rows import Row
from cir_jax.rollout.sampling import PLAIN, Sampling, row_keys
from cir_jax.rollout.schedule import OnTokens, RolloutStats, Schedule, Setting
from cir_jax.rollout.sharing import Shared, program_seed
from cir_jax.sandbox.executor import Submitter
from cir_jax.tokenizer import Tokenizer


class Engine:
    """Samples responses with code execution; one engine per process, reused for every step."""

    def __init__(
        self,
        model: ModelConfig,
        cfg: RolloutConfig,
        tokenizer: Tokenizer,
        sandbox: Submitter | None,
        *,
        template: str,
        chat: bool,
        max_prompt_tokens: int,
        dtype: str,
        seed: int,
        mesh: Mesh | None = None,
    ):
        """sandbox: None for an engine that only replays.

        dtype: of decoding, and of its cache unless the config has another; a name of numpy's.
        mesh: of decoding; None: that of `jax.set_mesh`. The parameters may lie on another one of
        the same devices in the same order.
        """
        self.model = model
        self.cfg = cfg
        self.tokenizer = tokenizer
        self.sandbox = sandbox
        self.max_prompt_tokens = max_prompt_tokens
        self._cache_dtype = compiled.cache_dtype(cfg, dtype)
        self._mesh = mesh
        self.seed = seed
        self._boundary = fence.BOUNDARIES[cfg.boundary]
        table = fence.token_table(tokenizer, model.vocab_size, self._boundary)
        with self._on_mesh():
            self._table = jnp.asarray(table)
        self._template, self._chat = template, chat
        self._cast = compiled.decoding_weights(model, dtype)

    def rollout(
        self,
        params: qwen.Params,
        problems: Sequence[Problem],
        *,
        samples: int,
        max_calls: int | Sequence[int],
        sampling: Sampling | Sequence[Sampling],
        phase: str,
        step: int,
        indices: Sequence[int] | None = None,
        prompts: Sequence[list[int]] | None = None,
        begun: Sequence[int] | None = None,
        on_tokens: OnTokens | None = None,
    ) -> tuple[list[list[Trajectory]], RolloutStats]:
        """`samples` trajectories of each problem, [P][G].

        prompts: ids of each problem's prompt, if not those of the template with its question.
        begun: how many of each one's last ids count as tokens of the response, whose limit is that
        much nearer.
        max_calls, sampling: of all problems, or of each. indices: the problems', where they are a
        part of more; else from 0. Of several processes, which all are given the same problems, each
        returns its own: an equal share, in order.

        A token depends on (seed, phase, step, index of the problem, sample, position) and the
        weights alone, and so does the seed of each program (sharing.py); wall-clock limits, where
        a row hits one, end it wherever it is. Raises workers.PoolError if the sandbox itself fails.
        What `on_tokens` raises, or a KeyboardInterrupt, leaves the engine as it was; programs that
        run then go on in the sandbox.
        """
        each = [sampling] * len(problems) if isinstance(sampling, Sampling) else list(sampling)
        calls = [max_calls] * len(problems) if isinstance(max_calls, int) else list(max_calls)
        mine = own_share(len(problems))
        index = range(len(problems)) if indices is None else indices
        n = np.arange(len(problems) * samples)
        keys = row_keys(self.seed, phase, step, np.repeat(index, samples), n % samples)
        rows = []
        for p in mine:
            prompt = self.prompt_ids(problems[p], None if prompts is None else prompts[p])
            limit, limited_by = self._limit(len(prompt) - (0 if begun is None else begun[p]))
            rows += [
                Row(
                    index=i,
                    group=p,
                    problem=problems[p],
                    sample=i % samples,
                    prompt_ids=prompt,
                    key=keys[i],
                    sampling=each[p],
                    max_calls=calls[p],
                    limit=limit,
                    limited_by=limited_by,
                )
                for i in range(p * samples, (p + 1) * samples)
            ]

        shared = Shared(self.sandbox)

        def submit(row: Row, code: str) -> Future[ExecResult]:
            group = (self.seed, phase, step, index[row.group])
            return shared.submit(code, program_seed(code, group, (row.sample, len(row.calls))))

        with self._on_mesh():
            done, stats = Schedule(self._setting(params, submit, on_tokens), rows).run()
        stats.num_shared = shared.num_shared
        groups = range(0, len(done), samples)
        return [done[i : i + samples] for i in groups], stats

    def replay(
        self, params: qwen.Params, recorded: Sequence[Trajectory], *, real_time: bool = False
    ) -> tuple[list[Trajectory], RolloutStats]:
        """The recorded trajectories again, with these weights' log-probabilities.

        Model tokens are forced, and calls, noticed as they were, get the results on record: no
        program runs. real_time: each result comes as long after its call as its program had
        taken (`wall_s`); else at once. Log-probabilities are those at temperature 1.

        Raises ValueError where a trajectory cannot be followed: its tokens are not what this
        engine makes of its calls.
        """
        longest = max((len(trajectory.ids) for trajectory in recorded), default=0)
        if longest > self.max_length:
            raise ValueError(f"a trajectory of {longest} tokens: more than {self.max_length}")
        rows = [
            Row(
                index=i,
                group=i,
                problem=recorded[i].problem,
                sample=recorded[i].sample,
                prompt_ids=recorded[i].ids[: recorded[i].num_prompt_tokens].tolist(),
                key=np.zeros(2, np.uint32),
                sampling=PLAIN,
                max_calls=len(recorded[i].calls),
                limit=len(recorded[i].ids),
                limited_by=recorded[i].stop_reason,
                recorded=recorded[i],
            )
            for i in own_share(len(recorded))
        ]
        with contextlib.ExitStack() as stack:
            answer = stack.enter_context(Playback()).submit if real_time else at_once

            def submit(row: Row, code: str) -> Future[ExecResult]:
                return answer(row.recorded.calls[len(row.calls)].result)

            stack.enter_context(self._on_mesh())
            return Schedule(self._setting(params, submit), rows).run()

    def fits(self, problem: Problem) -> bool:
        """Whether the prompt is short enough. Raises ValueError if it cannot be one."""
        return len(self._ids(problem)) <= min(self.max_prompt_tokens, self._context - 1)

    def _ids(self, problem: Problem) -> list[int]:
        return prompt_ids(problem, self.tokenizer, self._template, self._chat)

    @property
    def max_length(self) -> int:
        """Tokens of the longest possible row."""
        return min(self.max_prompt_tokens + self.cfg.max_response_tokens, self._context)

    @property
    def _context(self) -> int:
        return self.cfg.max_context or self.model.max_positions

    def _limit(self, prompt: int) -> tuple[int, StopReason]:
        limit = prompt + self.cfg.max_response_tokens
        return (limit, "response_length") if limit <= self._context else (self._context, "context")

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def _setting(self, params: qwen.Params, submit, on_tokens: OnTokens | None = None) -> Setting:
        return Setting(
            cfg=self.cfg,
            params=self._cast(params),
            model=self.model.model_copy(update={"lora": None}),
            cache_dtype=self._cache_dtype,
            tokenizer=self.tokenizer,
            boundary=self._boundary,
            table=self._table,
            max_prompt_tokens=self.max_prompt_tokens,
            max_length=self.max_length,
            submit=submit,
            on_tokens=on_tokens,
        )

    def prompt_ids(self, problem: Problem, given: list[int] | None = None) -> list[int]:
        """The given ids, or those of the template; ValueError if they are too many."""
        ids = self._ids(problem) if given is None else given
        if len(ids) > self.max_prompt_tokens:
            raise ValueError(
                f"data.max_prompt_tokens={self.max_prompt_tokens}: the prompt of problem "
                f"{problem.problem_id} has {len(ids)} tokens"
            )
        if len(ids) >= self._context:
            raise ValueError(
                f"a context of {self._context} tokens (rollout.max_context, model.max_positions): "
                f"the prompt of problem {problem.problem_id} has {len(ids)}"
            )
        return ids


def own_share(count: int) -> range:
    """Of so many things, those that are this process's."""
    processes, index = jax.process_count(), jax.process_index()
    return range(count * index // processes, count * (index + 1) // processes)


def model_turns(trajectory: Trajectory, tokenizer: Tokenizer) -> list[str]:
    """The stretches of text that the model wrote, in order, without the token that ended it."""
    return [
        tokenizer.decode([i for i in trajectory.ids[at] if i not in tokenizer.end_ids])
        for author, at in author_spans(trajectory.author)
        if author == Author.MODEL
    ]
