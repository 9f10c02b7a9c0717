"""The host half of the engine: which row sits in which slot, and code execution between segments.

Finished rows leave and new ones enter at every segment's end. While programs of some rows run,
the other rows decode: the next segment starts before their outputs are in.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cir_jax.config import ModelConfig, RolloutConfig
from cir_jax.models import qwen
from cir_jax.records import Author, Call, ExecResult, Problem, Trajectory, prompt_text
from cir_jax.rollout import decode, fence
from cir_jax.rollout.sampling import row_keys
from cir_jax.sandbox.pool import Sandbox
from cir_jax.sandbox.text import result_text
from cir_jax.tokenizer import Tokenizer


@dataclasses.dataclass
class RolloutStats:
    """tool_wait_s: time in which no row could decode, all waiting for programs."""

    wall_s: float = 0.0
    tool_wait_s: float = 0.0
    num_segments: int = 0
    num_model_tokens: int = 0


@dataclasses.dataclass
class _Row:
    """A row on its way; `turn` is where the current model turn begins."""

    index: int
    group: int
    problem: Problem
    sample: int
    prompt_ids: list[int]
    turn: int = 0
    calls: list[Call] = dataclasses.field(default_factory=list)
    pending: tuple[str, str, concurrent.futures.Future[ExecResult]] | None = None


class Engine:
    """Samples responses with code execution; one engine per process, reused for every step."""

    def __init__(
        self,
        model: ModelConfig,
        cfg: RolloutConfig,
        tokenizer: Tokenizer,
        sandbox: Sandbox,
        *,
        template: str,
        max_prompt_tokens: int,
        dtype: str,
        seed: int,
    ):
        """dtype: of decoding and its cache, a name of numpy's."""
        self._model = model
        self._dtype = dtype
        self._cast = jax.jit(lambda params: qwen.for_decoding(params, model, dtype)[0])
        self._cfg = cfg
        self._tokenizer = tokenizer
        self._sandbox = sandbox
        self._template = template
        self._max_prompt_tokens = max_prompt_tokens
        self._seed = seed
        self._boundary = fence.BOUNDARIES[cfg.boundary]
        self._table = jnp.asarray(fence.token_table(tokenizer, model.vocab_size, self._boundary))

    def rollout(
        self,
        params: qwen.Params,
        problems: Sequence[Problem],
        *,
        samples: int,
        max_calls: int,
        temperature: float,
        top_p: float,
        phase: str,
        step: int,
    ) -> tuple[list[list[Trajectory]], RolloutStats]:
        """`samples` trajectories of each problem, [P][G].

        temperature 0 is greedy. A token depends on (seed, phase, step, index of the problem,
        sample, position) and the weights alone. Raises RuntimeError if the sandbox itself fails.
        """
        run = _Run(self, params, problems, samples, max_calls, temperature, top_p, phase, step)
        return run.run()

    def decoding_params(self, params: qwen.Params) -> tuple[qwen.Params, ModelConfig]:
        """The parameters in the type of decoding, adapters merged; themselves if that is all."""
        if self._dtype == "float32" and self._model.lora is None:
            return params, self._model
        return self._cast(params), self._model.model_copy(update={"lora": None})

    def prompt_ids(self, problem: Problem) -> list[int]:
        ids = self._tokenizer.encode(prompt_text(self._template, problem))
        if len(ids) > self._max_prompt_tokens:
            raise ValueError(
                f"data.max_prompt_tokens={self._max_prompt_tokens}: the prompt of problem "
                f"{problem.problem_id} has {len(ids)} tokens"
            )
        return ids


class _Run:
    """One call of `rollout`: the slots, the rows in them, and those still to come."""

    def __init__(
        self, engine, params, problems, samples, max_calls, temperature, top_p, phase, step
    ):
        self.engine = engine
        self.params, self.model = engine.decoding_params(params)
        self.cfg: RolloutConfig = engine._cfg
        self.max_calls = max_calls
        self.temperature, self.top_p = jnp.float32(temperature), jnp.float32(top_p)
        self.phase, self.step = phase, step
        self.samples = samples
        prompts = [engine.prompt_ids(problem) for problem in problems]
        self.waiting_room = collections.deque(
            _Row(p * samples + g, p, problems[p], g, prompts[p])
            for p in range(len(problems))
            for g in range(samples)
        )
        n = np.arange(len(problems) * samples)
        self.keys = row_keys(engine._seed, phase, step, n // samples, n % samples)
        self.rows: dict[int, _Row] = {}
        self.done: dict[int, Trajectory] = {}
        length = engine._max_prompt_tokens + self.cfg.max_response_tokens
        self.slots = decode.make_slots(
            cfg=self.model, dtype=engine._dtype, num_slots=self.cfg.slots, length=length
        )
        self.stats = RolloutStats()

    def run(self) -> tuple[list[list[Trajectory]], RolloutStats]:
        start = time.perf_counter()
        running: set[int] = set()
        while self.waiting_room or self.rows:
            running |= self._admit() | self._put_back(wait=not running)
            self._decode()
            self.stats.num_segments += 1
            running = self._harvest()
        self.stats.wall_s = time.perf_counter() - start
        ordered = [self.done[i] for i in range(len(self.done))]
        self.stats.num_model_tokens = sum(t.num_model_tokens for t in ordered)
        groups = range(0, len(ordered), self.samples)
        return [ordered[i : i + self.samples] for i in groups], self.stats

    def _decode(self) -> None:
        self.slots = decode.decode_segment(
            self.params,
            self.slots,
            self.engine._table,
            self.temperature,
            self.top_p,
            jnp.int32(self.cfg.return_share * self.cfg.slots),
            cfg=self.model,
            steps=self.cfg.segment_steps,
            eos_id=self.engine._tokenizer.eos_id,
        )

    def _fork(self, copies: list[tuple[int, int, int]]) -> None:
        """(source, target, tokens) each."""
        sources, targets, counts = (list(x) for x in zip(*copies, strict=True))
        self.slots = decode.fork(
            self.slots,
            self._padded(sources, 0),
            self._padded(targets, self.cfg.slots),
            self._padded(counts, 0),
            length=self.engine._max_prompt_tokens,
        )

    def _admit(self) -> set[int]:
        """New rows into free slots. A prompt that a row holds already is copied from there."""
        free = [slot for slot in range(self.cfg.slots) if slot not in self.rows]
        free = free[: len(self.waiting_room)]
        entering = [(slot, self.waiting_room.popleft()) for slot in free]
        for at in range(0, len(entering), self.cfg.prefill_rows):
            part = entering[at : at + self.cfg.prefill_rows]
            slots = [slot for slot, _ in part]
            limits = [len(row.prompt_ids) + self.cfg.max_response_tokens for _, row in part]
            self.slots = decode.admit(
                self.slots,
                self._padded(slots, self.cfg.slots),
                self._padded([self.keys[row.index] for _, row in part], np.zeros(2), np.uint32),
                self._padded(limits, 0),
                self._padded([self.max_calls] * len(part), 0),
            )
        holder = {row.group: slot for slot, row in self.rows.items()}
        prompts, copies = [], []
        for slot, row in entering:
            if row.group in holder:
                copies.append((holder[row.group], slot, len(row.prompt_ids)))
            else:
                holder[row.group] = slot
                prompts.append((slot, row.prompt_ids))
            row.turn = len(row.prompt_ids)
            self.rows[slot] = row
        self._extend(prompts, Author.PROMPT)
        for at in range(0, len(copies), self.cfg.prefill_rows):
            self._fork(copies[at : at + self.cfg.prefill_rows])
        return {slot for slot, _ in entering}

    def _put_back(self, *, wait: bool) -> set[int]:
        """Outputs of finished programs into their rows; with `wait`, of at least one."""
        pending = {slot: row for slot, row in self.rows.items() if row.pending}
        if wait and len(pending) == len(self.rows) and pending:
            start = time.perf_counter()
            concurrent.futures.wait(
                [row.pending[2] for row in pending.values()],
                return_when=concurrent.futures.FIRST_COMPLETED,
            )
            self.stats.tool_wait_s += time.perf_counter() - start
        outputs = []
        for slot, row in sorted(pending.items()):
            code, trailing, future = row.pending
            if not future.done():
                continue
            result = future.result()
            if result.status == "infra":
                raise RuntimeError(f"sandbox failed on {row.problem.problem_id}: {result.error}")
            text = self.engine._boundary.put_back(result_text(result), trailing)
            ids = self.engine._tokenizer.encode(text)
            limit = len(row.prompt_ids) + self.cfg.max_response_tokens
            row.calls.append(Call(code, result, min(len(ids), limit - row.turn)))
            row.turn += len(ids)
            row.pending = None
            outputs.append((slot, ids))
        self._extend(outputs, Author.TOOL)
        return {slot for slot, _ in outputs}

    def _extend(self, texts: list[tuple[int, list[int]]], author: Author) -> None:
        R, C = self.cfg.prefill_rows, self.cfg.prefill_chunk
        for at in range(0, len(texts), R):
            part = texts[at : at + R]
            for start in range(0, max(len(ids) for _, ids in part), C):
                chunk = [(slot, ids[start:]) for slot, ids in part if len(ids) > start]
                ids_RC = np.zeros((R, C), np.int32)
                for r, (_, ids) in enumerate(chunk):
                    ids_RC[r, : min(C, len(ids))] = ids[:C]
                self.slots = decode.extend(
                    self.params,
                    self.slots,
                    self._padded([slot for slot, _ in chunk], self.cfg.slots),
                    jnp.asarray(ids_RC),
                    self._padded([min(C, len(ids)) for _, ids in chunk], 0),
                    jnp.int32(author),
                    self._padded([len(ids) <= C for _, ids in chunk], False, bool),
                    cfg=self.model,
                )

    def _padded(self, values: list, fill, dtype=np.int32) -> jax.Array:
        """One entry per row of a prefill launch."""
        missing = self.cfg.prefill_rows - len(values)
        return jnp.asarray(np.array(values + [fill] * missing, dtype))

    def _harvest(self) -> set[int]:
        """After a segment: submits new calls, takes finished rows out; returns running slots."""
        status, length = jax.device_get((self.slots.status, self.slots.length))
        waiting = [s for s, row in self.rows.items() if status[s] == decode.WAITING]
        waiting = [s for s in waiting if self.rows[s].pending is None]
        finished = [s for s in self.rows if status[s] in (decode.EOS, decode.FULL)]
        if waiting or finished:
            written = jax.device_get((self.slots.ids, self.slots.author, self.slots.logp))
        for slot in sorted(waiting):
            row = self.rows[slot]
            text = self.engine._tokenizer.decode(written[0][slot, row.turn : length[slot]])
            code, trailing = self.engine._boundary.find_call(text)
            seed = self._program_seed(row)
            row.pending = (code, trailing, self.engine._sandbox.submit(code, seed=seed))
            row.turn = int(length[slot])
        for slot in finished:
            row = self.rows.pop(slot)
            ids, author, logp = (x[slot, : length[slot]].copy() for x in written)
            stop = "eos" if status[slot] == decode.EOS else "response_length"
            self.done[row.index] = Trajectory(
                row.problem, row.sample, ids, author, logp, tuple(row.calls), stop
            )
        return {slot for slot in self.rows if status[slot] == decode.RUNNING}

    def _program_seed(self, row: _Row) -> int:
        place = (self.engine._seed, self.phase, self.step, row.index, len(row.calls))
        return int.from_bytes(hashlib.blake2b(repr(place).encode(), digest_size=4).digest())


def model_turns(trajectory: Trajectory, tokenizer: Tokenizer) -> list[str]:
    """The stretches of text that the model wrote, in order, without the end-of-text token."""
    authors = trajectory.author
    edges = np.flatnonzero(np.diff(authors, prepend=-1, append=-1))
    spans = zip(edges[:-1], edges[1:], strict=True)
    return [
        tokenizer.decode([i for i in trajectory.ids[a:b] if i != tokenizer.eos_id])
        for a, b in spans
        if authors[a] == Author.MODEL
    ]
