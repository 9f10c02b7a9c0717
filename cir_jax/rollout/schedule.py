"""One rollout: which row sits in which slot, and code execution beside segments.

Finished rows leave and new ones enter at every segment's end. While programs of some rows run,
the other rows decode, and while the host looks at what a segment did, the device is busy with the
next one: `rollout.segments_in_flight` of them are launched before the first is looked at.

Several processes (one per host of a TPU slice) each have rows, slots and programs of their own.
They launch the same program equally often: what they must agree on, whether any row is left or
running anywhere, is in each segment's report.
"""

import collections
import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Array, Int

from cir_jax import hosts
from cir_jax import mesh as meshes
from cir_jax.config import ModelConfig, RolloutConfig
from cir_jax.models import qwen
from cir_jax.records import Author, Call, ExecResult, Trajectory
from cir_jax.rollout import compiled, decode, fence
from cir_jax.rollout.rows import Row, State
from cir_jax.sandbox.text import result_text
from cir_jax.tokenizer import Tokenizer

# Where nothing runs on any device, processes look at each other's rows so often, seconds.
_AGREEMENT_S = 0.05


@dataclasses.dataclass
class RolloutStats:
    """Seconds, of this process.

    idle_s: in which the device had nothing to do; of these tool_wait_s waiting for programs
    because no row could decode. host_s: in which this process worked, the device busy or not.
    num_shared: calls that were answered by an equal program's run.
    """

    wall_s: float = 0.0
    idle_s: float = 0.0
    tool_wait_s: float = 0.0
    host_s: float = 0.0
    num_segments: int = 0
    num_model_tokens: int = 0
    num_shared: int = 0

    @classmethod
    def of_processes(cls, parts: Sequence["RolloutStats"]) -> "RolloutStats":
        """Of one rollout: the longest times, and all tokens and calls."""
        found = cls(*map(max, zip(*map(dataclasses.astuple, parts), strict=True)))
        found.num_model_tokens = sum(part.num_model_tokens for part in parts)
        found.num_shared = sum(part.num_shared for part in parts)
        return found


# Told of each row's new tokens and who wrote them, as they come in.
OnTokens = Callable[[Row, np.ndarray, Author], None]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a rollout works with.

    params, model: as decoding uses them. table: of the boundary's automaton over tokens.
    max_length: tokens of the longest possible row. submit: hands in a row's program.
    """

    cfg: RolloutConfig
    params: qwen.Params
    model: ModelConfig
    cache_dtype: str
    tokenizer: Tokenizer
    boundary: fence.Boundary
    table: Int[Array, "Q V"]
    max_prompt_tokens: int
    max_length: int
    submit: Callable[[Row, str], concurrent.futures.Future[ExecResult]]
    on_tokens: OnTokens | None = None


class Schedule:
    """The slots, the rows in them, and those still to come."""

    def __init__(self, setting: Setting, rows: list[Row]):
        self.setting, self.cfg = setting, setting.cfg
        self.all_rows = rows
        self.queue = collections.deque(rows)
        self.rows: dict[int, Row] = {}
        self.slots = decode.make_slots(
            cfg=self.setting.model,
            dtype=setting.cache_dtype,
            num_slots=self.cfg.slots,
            length=setting.max_length,
        )
        # This process's slots, and which of them share a device.
        self.num_slots = self.cfg.slots // jax.process_count()
        self.per_device = self.cfg.slots // meshes.num_row_shards()
        self.max_stopped = compiled.max_stopped(self.cfg)
        self.idle_work = compiled.no_work(self.num_slots, setting.max_prompt_tokens)
        width = setting.max_length if any(row.recorded for row in rows) else 1
        self.forced = compiled.nothing_forced(self.num_slots, width)
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
            if report is not None and report.num_left >= decode.STOP:
                self._drop()
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

    def _drop(self) -> None:
        """A process is asked to stop; the report says so to all at the same segment."""
        for row in self.rows.values():
            if row.pending:
                row.pending[2].cancel()
        while self.in_flight:
            self._harvest()
        raise hosts.Stopped

    # --- before a segment

    def _launch(self) -> None:
        """Dispatches a segment, and before it what there is to do."""
        self.launch += 1
        hosts.mark(f"rollout, before segment {self.launch}")
        work = jax.tree.map(np.copy, self.idle_work)
        self._end_late_rows(work)
        self._put_back(work)
        self._admit(work)
        work.queued[0] = len(self.queue) + (decode.STOP if hosts.asked_to_drop() else 0)
        hosts.mark_devices(f"rollout, segment {self.launch}", "rollout")
        if not self.in_flight:
            self.stats.idle_s += time.perf_counter() - self.device_done
        self.slots, report = decode.advance(
            self.setting.params,
            self.slots,
            meshes.put_rows(work),
            self.setting.table,
            self.forced_on_device,
            self.max_stopped,
            **compiled.advance_options(
                self.cfg, self.setting.model, self.setting.tokenizer.end_ids
            ),
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
                text = result_text(result, self.cfg.result)
                block = self.setting.boundary.put_back(text, trailing)
                ids = self.setting.tokenizer.encode(block)
                count = row.write(ids, Author.TOOL)
                row.calls.append(Call(code, result, count))
                row.turn, row.pending, row.outgoing = row.length, None, ids[:count]
                row.state = State.RUNNING
                if self.setting.on_tokens:
                    self.setting.on_tokens(
                        row, row.ids[row.length - count : row.length], Author.TOOL
                    )
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
        hosts.mark_devices(f"rollout, segment {launch}", "rollout")
        report = meshes.own_rows(report)
        self.device_done = time.perf_counter()
        hosts.mark(f"rollout, after segment {launch}")
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
        if self.setting.on_tokens:
            self.setting.on_tokens(row, ids[:count], Author.MODEL)

    def _react(self, slot: int, row: Row, status: int) -> None:
        """To what has become of a row that ran."""
        if status in (decode.EOS, decode.FULL):
            row.stop = "eos" if status == decode.EOS else row.limited_by
            self._finish(slot, row)
        elif status == decode.WAITING and row.state is State.RUNNING:
            text = self.setting.tokenizer.decode(row.ids[row.turn : row.length])
            code, trailing = self.setting.boundary.find_call(text)
            row.pending = code, trailing, self.setting.submit(row, code)
            row.state = State.CALLING

    def _finish(self, slot: int, row: Row) -> None:
        row.state = State.DONE
        del self.rows[slot]

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
