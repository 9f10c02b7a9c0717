"""`cir-jax bench rollout --trace`: the engine against a schedule in rounds, on the same trace.

Both decode the same model with the same jitted program, slots and segments on the same devices.
Tokens are forced, so that lengths, calls and ends are the trace's; every token is decoded.

"engine": `Engine.replay` in real time. Rows come and go at every segment, stop at their block's
end on the device, and programs run beside decoding.

"rounds", as CIR's reference rolls out (arXiv 2505.24480 and its code): all rows that are not done
generate; when the last of them has come to its end of text, all programs of the round run; when
the last of those is done, the next round begins. Generation does not stop at the block: it goes
on to an end of text, and what follows the first block is thrown away. What would follow is not
on any record. It is taken to be the rest of the response's own model text: as much as the model
in fact had left to say, without the outputs that it would make up.

Where there is a choice it is the rounds' favour:
- within a round, rows are batched continuously and end where their text ends;
- all programs of a round run at once, on as many workers as it takes, and cost the longest of
  their latencies, which is added to the measured time and not slept through;
- scoring, re-tokenising and cutting of texts between rounds is free.
A round's rows begin with all their text so far as their prompt, whose keys and values are computed
again: the reference's rounds are calls of a generator that are given texts.

Where rows are many times the slots, hardly anyone waits for the slowest, and the ratio of rows/s
comes down to that of the tokens decoded, or below it by what the rounds are spared. By default
there are as many rows as slots: all of a batch begin together. A response's limit is an eighth of
CIR's then.
"""

import dataclasses
import json
from typing import Any

import jax

from cir_jax import config as configs
from cir_jax import mesh as meshes
from cir_jax.bench.trace import PROMPT_TOKENS, Trace, TraceRow, Writer
from cir_jax.config import MeshConfig, RolloutConfig, preset
from cir_jax.models import qwen
from cir_jax.rollout.engine import Engine
from cir_jax.rollout.schedule import RolloutStats
from cir_jax.tokenizer import Tokenizer
from cir_jax.train.state import init_params

_TOKENIZER = "package:quickstart/tokenizer"


@dataclasses.dataclass
class _Measured:
    """What a schedule took: the engine's own figures, summed, and waits that came on top."""

    stats: RolloutStats
    waits_s: float
    useful_tokens: int
    thrown_tokens: int

    def __add__(self, other: "_Measured") -> "_Measured":
        pairs = zip(dataclasses.astuple(self.stats), dataclasses.astuple(other.stats), strict=True)
        return _Measured(
            RolloutStats(*(a + b for a, b in pairs)),
            self.waits_s + other.waits_s,
            self.useful_tokens + other.useful_tokens,
            self.thrown_tokens + other.thrown_tokens,
        )

    def figures(self, num_rows: int) -> dict[str, float]:
        stats = self.stats
        seconds = stats.wall_s + self.waits_s
        decoding_s = stats.wall_s - stats.tool_wait_s
        return {
            "rows_per_s": num_rows / seconds,
            "seconds": seconds,
            "tool_wait_s": stats.tool_wait_s + self.waits_s,
            "idle_share": (stats.idle_s + self.waits_s) / seconds,
            "useful_tokens": self.useful_tokens,
            "thrown_tokens": self.thrown_tokens,
            "num_segments": stats.num_segments,
            "segment_s": decoding_s / stats.num_segments,
            "host_s_per_segment": stats.host_s / stats.num_segments,
            "host_share": stats.host_s / decoding_s,
        }


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Rows that begin together, each with its index in the trace."""

    writer: Writer
    rows: list[tuple[int, TraceRow]]
    seed: int


def bench_rollout(
    *, model: str, slots: int, rows: int, batches: int, seed: int, dtype: str, trace: Trace
) -> None:
    """Prints one line of JSON for each schedule, and one with the ratios.

    model: a preset, with random weights. rows: responses of each batch, each of a prompt of its
    own. The batches come one after the other, each by both schedules: machines are noisy.

    seconds: of all batches, without set-up and compilation. tool_wait_s: of these, in which
    nothing was decoded because all rows waited for programs. idle_share: of the seconds, in which
    the device had nothing to do; device-seconds of rows that are done are not idle.
    useful_tokens, thrown_tokens: decoded, of the response and past a block. segment_s: the time
    from one segment to the next, programs not waited for; host_share: of it, in which the host
    worked, mostly while the device did, too.
    Raises ValueError for an unknown preset, or slots that the devices cannot share equally.
    """
    cfg = preset(model)
    if slots % jax.device_count():
        raise ValueError(f"--slots {slots}: must be a multiple of {jax.device_count()} devices")
    tokenizer = Tokenizer(configs.asset_dir(_TOKENIZER))
    writer = Writer(tokenizer)
    drawn = trace.draw(batches * rows, seed, least=writer.least, output=len(writer.output))
    mesh = meshes.make_mesh(MeshConfig(fsdp=jax.device_count()))
    with jax.set_mesh(mesh):
        engine = Engine(
            cfg,
            RolloutConfig(
                slots=slots,
                max_response_tokens=trace.max_response,
                # What is put in after a call fits into a chunk, and few rows call at a time.
                prefill_rows=4,
                prefill_chunk=16,
            ),
            tokenizer,
            None,
            template="{question}",
            chat=False,
            max_prompt_tokens=PROMPT_TOKENS + trace.max_response,
            dtype=dtype,
            seed=seed,
        )
        params = init_params(cfg, mesh, seed)
        # Compiles; a row that calls once, as short as can be.
        short = TraceRow((writer.least, writer.least), (0.0,))
        engine.replay(params, [writer.response(short, 0, seed)], real_time=True)
        measured = dict.fromkeys(SCHEDULES, _Measured(RolloutStats(), 0.0, 0, 0))
        numbered = list(enumerate(drawn))
        for begin in range(0, len(drawn), rows):
            for schedule, measure in SCHEDULES.items():
                batch = _Batch(writer, numbered[begin : begin + rows], seed)
                measured[schedule] += measure(engine, params, batch)
    setup = {"model": model, "dtype": dtype, "slots": slots, "rows": rows}
    setup |= {"batches": batches, "seed": seed}
    figures = {schedule: m.figures(len(drawn)) for schedule, m in measured.items()}
    for schedule, of_schedule in figures.items():
        line = {"bench": "rollout", "schedule": schedule} | setup | dataclasses.asdict(trace)
        print(json.dumps(line | of_schedule), flush=True)
    print(json.dumps(_ratios(figures["engine"], figures["rounds"])), flush=True)


def _by_engine(engine: Engine, params: qwen.Params, batch: _Batch) -> _Measured:
    responses = [batch.writer.response(row, i, batch.seed) for i, row in batch.rows]
    _, stats = engine.replay(params, responses, real_time=True)
    return _Measured(stats, 0.0, stats.num_model_tokens, 0)


def _in_rounds(engine: Engine, params: qwen.Params, batch: _Batch) -> _Measured:
    total = _Measured(RolloutStats(), 0.0, 0, 0)
    for turn in range(max(len(row.turns) for _, row in batch.rows)):
        left = [(i, row) for i, row in batch.rows if turn < len(row.turns)]
        sampled = [batch.writer.overrun(row, i, batch.seed, turn) for i, row in left]
        _, stats = engine.replay(params, sampled)
        latencies_s = [row.latencies_s[turn] for _, row in left if turn < len(row.latencies_s)]
        useful = sum(row.turns[turn] for _, row in left)
        total += _Measured(
            stats, max(latencies_s, default=0.0), useful, stats.num_model_tokens - useful
        )
    return total


SCHEDULES = {"rounds": _in_rounds, "engine": _by_engine}


def _ratios(ours: dict[str, float], theirs: dict[str, float]) -> dict[str, Any]:
    decoded = [f["useful_tokens"] + f["thrown_tokens"] for f in (ours, theirs)]
    return {
        "bench": "rollout",
        "ratio": "engine/rounds",
        "rows_per_s": ours["rows_per_s"] / theirs["rows_per_s"],
        "decoded_tokens": decoded[0] / decoded[1],
    }
