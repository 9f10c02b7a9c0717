"""The host half of the engine: which row sits in which slot, and code execution beside segments.

Finished rows leave and new ones enter at every segment's end. While programs of some rows run,
the other rows decode, and while the host looks at what a segment did, the device is busy with the
next one: `rollout.segments_in_flight` of them are launched before the first is looked at.

Several processes (one per host of a TPU slice) each have problems, slots and programs of their
own. They launch the same program equally often: what they must agree on, whether any row is left
or running anywhere, is in each segment's report.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cir_jax import mesh as meshes
from cir_jax.config import ModelConfig, RolloutConfig
from cir_jax.models import qwen
from cir_jax.records import (
    Author,
    Call,
    ExecResult,
    Problem,
    StopReason,
    Trajectory,
    prompt_text,
)
from cir_jax.rollout import decode, fence
from cir_jax.rollout.playback import Playback, at_once
from cir_jax.rollout.rows import Row, State
from cir_jax.rollout.sampling import PLAIN, Sampling, row_keys
from cir_jax.sandbox.pool import Sandbox
from cir_jax.sandbox.text import result_text
from cir_jax.tokenizer import Tokenizer

# Where nothing runs on any device, processes look at each other's rows so often, seconds.
_AGREEMENT_S = 0.05


@dataclasses.dataclass
class RolloutStats:
    """Seconds, of this process.

    idle_s: in which the device had nothing to do; of these tool_wait_s waiting for programs
    because no row could decode. host_s: in which this process worked, the device busy or not.
    """

    wall_s: float = 0.0
    idle_s: float = 0.0
    tool_wait_s: float = 0.0
    host_s: float = 0.0
    num_segments: int = 0
    num_model_tokens: int = 0


# Told of each row's new tokens, as they come in, and of its calls with their results.
OnTokens = Callable[[Row, np.ndarray, Author], None]


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
        """dtype: of decoding, and of its cache unless the config has another; a name of numpy's."""
        self.model = model
        self.cfg = cfg
        self.tokenizer = tokenizer
        self.sandbox = sandbox
        self.max_prompt_tokens = max_prompt_tokens
        self.cache_dtype = dtype if cfg.cache_dtype == "compute" else cfg.cache_dtype
        self.seed = seed
        self.boundary = fence.BOUNDARIES[cfg.boundary]
        self.table = jnp.asarray(fence.token_table(tokenizer, model.vocab_size, self.boundary))
        self._template = template
        self._cast = jax.jit(lambda params: qwen.for_decoding(params, model, dtype)[0])

    def rollout(
        self,
        params: qwen.Params,
        problems: Sequence[Problem],
        *,
        samples: int,
        max_calls: int,
        sampling: Sampling | Sequence[Sampling],
        phase: str,
        step: int,
        prompts: Sequence[list[int]] | None = None,
        on_tokens: OnTokens | None = None,
    ) -> tuple[list[list[Trajectory]], RolloutStats]:
        """`samples` trajectories of each problem, [P][G].

        prompts: ids of each problem's prompt, if not those of the template with its question.
        sampling: of all problems, or of each. Of several processes, which all are given the same
        problems, each returns its own: an equal share, in order.

        A token depends on (seed, phase, step, index of the problem, sample, position) and the
        weights alone; wall-clock limits, where a row hits one, end it wherever it is. Raises
        RuntimeError if the sandbox itself fails. What `on_tokens` raises, or a KeyboardInterrupt,
        leaves the engine as it was; programs that run then go on in the sandbox.
        """
        each = [sampling] * len(problems) if isinstance(sampling, Sampling) else list(sampling)
        mine = _own_share(len(problems))
        n = np.arange(len(problems) * samples)
        keys = row_keys(self.seed, phase, step, n // samples, n % samples)
        rows = []
        for p in mine:
            prompt = self.prompt_ids(problems[p], None if prompts is None else prompts[p])
            limit, limited_by = self._limit(len(prompt))
            rows += [
                Row(
                    index=i,
                    group=p,
                    problem=problems[p],
                    sample=i % samples,
                    prompt_ids=prompt,
                    key=keys[i],
                    sampling=each[p],
                    max_calls=max_calls,
                    limit=limit,
                    limited_by=limited_by,
                )
                for i in range(p * samples, (p + 1) * samples)
            ]
        done, stats = _Run(self, params, rows, phase, step, on_tokens).run()
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
            for i in _own_share(len(recorded))
        ]
        with contextlib.ExitStack() as stack:
            answer = stack.enter_context(Playback()).submit if real_time else at_once
            return _Run(self, params, rows, "replay", 0, None, answer).run()

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

    def decoding_params(self, params: qwen.Params) -> tuple[qwen.Params, ModelConfig]:
        """The parameters as decoding uses them, and their model."""
        return self._cast(params), self.model.model_copy(update={"lora": None})

    def prompt_ids(self, problem: Problem, given: list[int] | None = None) -> list[int]:
        """The given ids, or those of the template; ValueError if they are too many."""
        ids = given
        if ids is None:
            ids = self.tokenizer.encode(prompt_text(self._template, problem))
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


def _own_share(count: int) -> range:
    """Of so many things, those that are this process's."""
    processes, index = jax.process_count(), jax.process_index()
    return range(count * index // processes, count * (index + 1) // processes)


class _Run:
    """One call of the engine: the slots, the rows in them, and those still to come."""

    def __init__(
        self,
        engine: Engine,
        params: qwen.Params,
        rows: list[Row],
        phase: str,
        step: int,
        on_tokens: OnTokens | None,
        answer: Callable[[ExecResult], concurrent.futures.Future] = at_once,
    ):
        """answer: to a recorded call, given what is on record for it."""
        self.answer = answer
        self.engine, self.cfg = engine, engine.cfg
        self.params, self.model = engine.decoding_params(params)
        self.phase, self.step, self.on_tokens = phase, step, on_tokens
        self.all_rows = rows
        self.queue = collections.deque(rows)
        self.rows: dict[int, Row] = {}
        self.slots = decode.make_slots(
            cfg=self.model,
            dtype=engine.cache_dtype,
            num_slots=self.cfg.slots,
            length=engine.max_length,
        )
        # This process's slots, and which of them share a device.
        self.num_slots = self.cfg.slots // jax.process_count()
        self.per_device = self.cfg.slots // meshes.num_row_shards()
        self.max_stopped = jnp.int32(int(self.cfg.return_share * self.cfg.slots))
        self.idle_work = self._no_work()
        width = engine.max_length if any(row.recorded for row in rows) else 1
        self.forced = np.full((self.num_slots, width), -1, np.int32)
        self.forced_on_device = meshes.put_rows(self.forced)
        self.launch = 0
        self.in_flight: collections.deque[tuple[int, dict[int, Row], decode.Report]] = (
            collections.deque()
        )
        self.stats = RolloutStats()
        self.device_done = time.perf_counter()

    def run(self) -> tuple[list[Trajectory], RolloutStats]:
        start = time.perf_counter()
        self.step_deadline = start + self.cfg.step_timeout_s
        waited = 0.0
        report = None
        while report is None or report.num_left:
            if report is not None and not report.num_running and not self.in_flight:
                self._wait_for_work()
            self._launch()
            # Where nothing runs, a segment is over at once.
            while self.in_flight and (
                len(self.in_flight) >= self.cfg.segments_in_flight
                or (report is not None and not report.num_running)
            ):
                report, seconds = self._harvest()
                waited += seconds
        while self.in_flight:
            self._harvest()
        for row in self.all_rows:
            if row.recorded is not None:
                _check_followed(row)
        self.stats.wall_s = time.perf_counter() - start
        self.stats.host_s = self.stats.wall_s - waited - self.stats.tool_wait_s
        done = [row.trajectory() for row in self.all_rows]
        self.stats.num_model_tokens = sum(t.num_model_tokens for t in done)
        return done, self.stats

    # --- before a segment

    def _no_work(self) -> decode.Work:
        B, T = self.num_slots, self.engine.max_prompt_tokens

        def zeros(dtype, *shape: int) -> np.ndarray:
            return np.zeros((B, *shape), dtype)

        return decode.Work(
            ends=zeros(bool),
            enters=zeros(bool),
            max_length=zeros(np.int32),
            calls_left=zeros(np.int32),
            keys=zeros(np.uint32, 2),
            sampling=Sampling(
                zeros(np.float32), zeros(np.float32), zeros(np.int32), zeros(np.float32)
            ),
            ids=zeros(np.int32, T),
            count=zeros(np.int32),
            source=np.full(B, -1, np.int32),
            is_output=zeros(bool),
            is_last=zeros(bool),
            queued=zeros(np.int32),
        )

    def _launch(self) -> None:
        """Dispatches a segment, and before it what there is to do."""
        self.launch += 1
        work = jax.tree.map(np.copy, self.idle_work)
        self._end_late_rows(work)
        self._put_back(work)
        self._admit(work)
        work.queued[0] = len(self.queue)
        if not self.in_flight:
            self.stats.idle_s += time.perf_counter() - self.device_done
        self.slots, report = decode.advance(
            self.params,
            self.slots,
            meshes.put_rows(work),
            self.engine.table,
            self.forced_on_device,
            self.max_stopped,
            cfg=self.model,
            steps=self.cfg.segment_steps,
            end_ids=self.engine.tokenizer.end_ids,
            prefill_rows=-(-self.cfg.prefill_rows // meshes.num_row_shards()),
            prefill_chunk=self.cfg.prefill_chunk,
        )
        self.in_flight.append((self.launch, dict(self.rows), report))
        self.stats.num_segments += 1

    def _end_late_rows(self, work: decode.Work) -> None:
        now = time.perf_counter()
        over = now >= self.step_deadline
        for slot, row in self.rows.items():
            if row.state is not State.ENDING and (over or now >= row.deadline):
                row.stop = "step_time" if over else "row_time"
                row.state, row.since = State.ENDING, self.launch
                if row.pending:
                    row.pending[2].cancel()
                work.ends[slot] = True
        while over and self.queue:
            row = self.queue.popleft()
            row.write(row.prompt_ids, Author.PROMPT)
            row.state, row.stop = State.DONE, "step_time"

    def _put_back(self, work: decode.Work) -> None:
        """Outputs of finished programs, and what is left of long ones, into their rows."""
        for slot, row in self.rows.items():
            if row.state is State.CALLING and row.pending[2].done():
                code, trailing, future = row.pending
                result = future.result()
                if result.status == "infra":
                    raise RuntimeError(
                        f"sandbox failed on {row.problem.problem_id}: {result.error}"
                    )
                text = self.engine.boundary.put_back(result_text(result), trailing)
                ids = self.engine.tokenizer.encode(text)
                count = row.write(ids, Author.TOOL)
                row.calls.append(Call(code, result, count))
                row.turn, row.pending, row.outgoing = row.length, None, ids[:count]
                row.state = State.RUNNING
                if self.on_tokens:
                    self.on_tokens(row, row.ids[row.length - count : row.length], Author.TOOL)
                work.is_output[slot] = True
            if row.outgoing and row.state is State.RUNNING:
                self._send(work, slot, row, row.outgoing)
                work.is_output[slot] = True

    def _send(self, work: decode.Work, slot: int, row: Row, ids: list[int]) -> None:
        T = work.ids.shape[1]
        part, row.outgoing = ids[:T], ids[T:]
        work.ids[slot, : len(part)] = part
        work.count[slot] = len(part)
        work.is_last[slot] = not row.outgoing
        row.since = self.launch

    def _admit(self, work: decode.Work) -> None:
        """New rows into free slots. A prompt that a row of the device holds is copied there."""
        free = [slot for slot in range(self.num_slots) if slot not in self.rows]
        holder = {(row.group, s // self.per_device): s for s, row in self.rows.items()}
        forced = False
        for slot in free[: len(self.queue)]:
            row = self.queue.popleft()
            device = slot // self.per_device
            work.enters[slot] = True
            work.max_length[slot] = row.limit
            work.calls_left[slot] = row.max_calls
            work.keys[slot] = row.key
            for held, value in zip(work.sampling, row.sampling, strict=True):
                held[slot] = value
            source = holder.setdefault((row.group, device), slot)
            self._send(work, slot, row, row.prompt_ids)
            if source != slot:
                work.source[slot] = source - device * self.per_device
            row.write(row.prompt_ids, Author.PROMPT)
            row.turn, row.state = row.length, State.RUNNING
            row.deadline = time.perf_counter() + self.cfg.row_timeout_s
            self.rows[slot] = row
            if row.recorded is not None:
                self.forced[slot] = -1
                self.forced[slot, : row.limit] = row.recorded.ids
                forced = True
        if forced:
            self.forced_on_device = meshes.put_rows(self.forced)

    # --- after a segment

    def _harvest(self) -> tuple[decode.Report, float]:
        """Of the oldest segment in flight: submits new calls, takes finished rows out.

        Returns its report, this process's part, and how long that was waited for.
        """
        launch, rows, report = self.in_flight.popleft()
        start = time.perf_counter()
        report = meshes.own_rows(report)
        self.device_done = time.perf_counter()
        for slot, row in rows.items():
            # Text that went in later is not part of this report, and rows may be done by now.
            ran = row.state is State.RUNNING and row.since <= launch
            ran_until_ended = row.state is State.ENDING and row.since > launch
            if ran or ran_until_ended:
                count = report.length[slot] - report.begin[slot]
                self._take(row, report.begin[slot], report.ids[slot], report.logp[slot], count)
                self._react(slot, row, report.status[slot])
            if row.state is State.ENDING and row.since <= launch + 1:
                self._finish(slot, row)
        return report, self.device_done - start

    def _take(self, row: Row, begin: int, ids: np.ndarray, logp: np.ndarray, count: int) -> None:
        if not count:
            return
        if begin != row.length:
            raise RuntimeError(f"row {row.index}: {row.length} tokens, {begin} on the device")
        row.write(ids[:count], Author.MODEL, logp[:count])
        if self.on_tokens:
            self.on_tokens(row, ids[:count], Author.MODEL)

    def _react(self, slot: int, row: Row, status: int) -> None:
        """To what has become of a row that ran."""
        if status in (decode.EOS, decode.FULL):
            row.stop = "eos" if status == decode.EOS else row.limited_by
            self._finish(slot, row)
        elif status == decode.WAITING and row.state is State.RUNNING:
            text = self.engine.tokenizer.decode(row.ids[row.turn : row.length])
            code, trailing = self.engine.boundary.find_call(text)
            row.pending = code, trailing, self._submit(row, code)
            row.state = State.CALLING

    def _finish(self, slot: int, row: Row) -> None:
        row.state = State.DONE
        del self.rows[slot]

    def _submit(self, row: Row, code: str) -> concurrent.futures.Future:
        if row.recorded is None:
            place = (self.engine.seed, self.phase, self.step, row.index, len(row.calls))
            digest = hashlib.blake2b(repr(place).encode(), digest_size=4).digest()
            return self.engine.sandbox.submit(code, seed=int.from_bytes(digest))
        return self.answer(row.recorded.calls[len(row.calls)].result)

    def _wait_for_work(self) -> None:
        """Until a program of this process is done, or a deadline has come."""
        free = len(self.rows) < self.num_slots
        if (self.queue and free) or any(row.outgoing for row in self.rows.values()):
            return
        start = time.perf_counter()
        limits = [row.deadline for row in self.rows.values()] + [self.step_deadline]
        limit = max(0.0, min(limits) - start)
        if jax.process_count() > 1:
            limit = min(limit, _AGREEMENT_S)
        concurrent.futures.wait(
            [row.pending[2] for row in self.rows.values() if row.pending],
            timeout=limit,
            return_when=concurrent.futures.FIRST_COMPLETED,
        )
        self.stats.tool_wait_s += time.perf_counter() - start


def _check_followed(row: Row) -> None:
    """A replayed row has the tokens and calls on record."""
    recorded, name = row.recorded, f"{row.problem.problem_id}, sample {row.sample}"
    ids, author = row.ids[: row.length], row.author[: row.length]
    same = len(ids) == len(recorded.ids)
    if not same or (ids != recorded.ids).any() or (author != recorded.author).any():
        n = min(len(ids), len(recorded.ids))
        differs = (ids[:n] != recorded.ids[:n]) | (author[:n] != recorded.author[:n])
        at = int(np.argmax(differs)) if differs.any() else n
        raise ValueError(f"replay of {name} leaves the record at token {at}")
    if [call.code for call in row.calls] != [call.code for call in recorded.calls]:
        raise ValueError(f"replay of {name} makes other calls than the record")


def model_turns(trajectory: Trajectory, tokenizer: Tokenizer) -> list[str]:
    """The stretches of text that the model wrote, in order, without the token that ended it."""
    authors = trajectory.author
    edges = np.flatnonzero(np.diff(authors, prepend=-1, append=-1))
    spans = zip(edges[:-1], edges[1:], strict=True)
    return [
        tokenizer.decode([i for i in trajectory.ids[a:b] if i not in tokenizer.end_ids])
        for a, b in spans
        if authors[a] == Author.MODEL
    ]
