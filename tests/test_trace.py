"""A drawn trace, replay at recorded speed, and the benchmark that compares schedules on it."""

import dataclasses
import json
import time

import jax
import numpy as np
import pytest

from cir_jax import cli
from cir_jax import config as configs
from cir_jax.bench import rollout
from cir_jax.bench.trace import PROMPT_TOKENS, Lognormal, Trace, TraceRow, Writer
from cir_jax.config import PRESETS, ModelConfig, RolloutConfig
from cir_jax.records import Author, ExecResult
from cir_jax.rollout.engine import Engine
from cir_jax.rollout.playback import Playback
from cir_jax.rollout.schedule import RolloutStats, Schedule
from cir_jax.tokenizer import Tokenizer
from cir_jax.train.state import init_params

TINY = ModelConfig(
    vocab_size=640,
    width=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    mlp_width=8,
    rope_theta=1e4,
)
TRACE = Trace(Lognormal(32, 320), Lognormal(0.03, 3.0), max_response=512, timeout_s=5.0)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(configs.asset_dir("package:quickstart/tokenizer"))


@pytest.fixture(scope="module")
def writer(tokenizer):
    return Writer(tokenizer)


@pytest.fixture(scope="module")
def engine(tokenizer):
    return Engine(
        TINY,
        RolloutConfig(slots=4, max_response_tokens=256, segment_steps=8, prefill_chunk=16),
        tokenizer,
        sandbox=None,  # no program runs
        template="{question}",
        chat=False,
        max_prompt_tokens=PROMPT_TOKENS,
        dtype="float32",
        seed=0,
    )


@pytest.fixture(scope="module")
def params():
    mesh = jax.sharding.Mesh(
        np.array(jax.devices()[:1]).reshape(1, 1, 1), ("data", "fsdp", "tensor")
    )
    return init_params(TINY, mesh, 0)


def test_quantiles_are_the_given_ones():
    """Of 10^5 draws with sigma = ln(100) / 2.33 = 2, the median's relative standard error is
    2 x 1.25 / 316 = 0.8 %, the 99th percentile's 2 x 0.1 / 0.027 / 316 = 2.4 %."""
    drawn = Lognormal(0.03, 3.0).draw(np.random.default_rng(0), 10**5)
    assert np.median(drawn) == pytest.approx(0.03, rel=0.03)
    assert np.quantile(drawn, 0.99) == pytest.approx(3.0, rel=0.1)


def test_calls_are_none_to_four_and_bounds_hold():
    rows = TRACE.draw(2000, 0, least=13, output=15)
    counts = np.bincount([len(row.latencies_s) for row in rows])
    # A fifth of 2000 each, less those that the limit cuts; standard deviation 18.
    assert len(counts) == 5 and (np.abs(counts - 400) < 80).all()
    longest = max(sum(row.turns) + 15 * len(row.latencies_s) for row in rows)
    assert longest == 512
    assert min(min(row.turns) for row in rows) == 13
    assert max(max(row.latencies_s, default=0) for row in rows) == 5.0
    assert all(len(row.turns) == len(row.latencies_s) + 1 for row in rows)


def test_a_trace_is_its_seeds():
    rows = TRACE.draw(20, 3, least=13, output=15)
    assert TRACE.draw(30, 3, least=13, output=15)[:20] == rows
    assert TRACE.draw(20, 4, least=13, output=15) != rows


def test_overrun_is_the_rest_of_the_models_text(writer):
    row = TraceRow((20, 30, 40), (0.1, 0.2))
    response = writer.response(row, 5, 0)
    sampled = response.ids[response.author == Author.MODEL]
    assert len(sampled) == 90
    for turn, begin in enumerate((0, 20, 50)):
        overrun = writer.overrun(row, 5, 0, turn)
        assert overrun.ids[overrun.author == Author.MODEL].tolist() == sampled[begin:].tolist()
        before = PROMPT_TOKENS + begin + turn * len(writer.output)
        assert overrun.num_prompt_tokens == before
        assert overrun.ids[:before].tolist() == response.ids[:before].tolist()
        assert not overrun.calls


def test_replay_follows_what_was_written(engine, params, writer):
    """Calls are noticed at the written blocks' ends, or else replay would raise."""
    drawn = dataclasses.replace(TRACE, max_response=256).draw(
        12, 1, least=writer.least, output=len(writer.output)
    )
    responses = [writer.response(row, i, 1) for i, row in enumerate(drawn)]
    done, stats = engine.replay(params, responses)
    assert {len(t.calls) for t in done} >= {0, 1, 4}
    for row, response, t in zip(drawn, responses, done, strict=True):
        assert t.ids.tolist() == response.ids.tolist()
        assert t.author.tolist() == response.author.tolist()
        assert t.calls == response.calls and t.stop_reason == "eos"
        assert [call.result.wall_s for call in t.calls] == list(row.latencies_s)
        assert (t.logp[t.author == Author.MODEL] < 0).all()
    assert stats.num_model_tokens == sum(sum(row.turns) for row in drawn)
    overruns = [writer.overrun(row, i, 1, 0) for i, row in enumerate(drawn)]
    again, _ = engine.replay(params, overruns)
    assert [t.ids.tolist() for t in again] == [t.ids.tolist() for t in overruns]


def test_replay_in_real_time_waits_for_what_was_slow(engine, params, writer, monkeypatch):
    """A row whose program took 2 s ends after these; one that calls nothing ends before."""
    rows = [TraceRow((20, 20), (2.0,)), TraceRow((100,), ())]
    responses = [writer.response(row, i, 0) for i, row in enumerate(rows)]
    finish, finished = Schedule._finish, {}

    def noting(run, slot, row):
        finished[row.index] = time.perf_counter()
        finish(run, slot, row)

    monkeypatch.setattr(Schedule, "_finish", noting)
    engine.replay(params, responses)  # compiles
    start = time.perf_counter()
    done, stats = engine.replay(params, responses, real_time=True)
    assert finished[1] - start < 2.0 <= finished[0] - start
    assert 0 < stats.tool_wait_s <= stats.idle_s < stats.wall_s
    assert [t.ids.tolist() for t in done] == [t.ids.tolist() for t in responses]


def test_playback_answers_in_the_order_of_ends():
    with Playback() as playback:
        start = time.perf_counter()
        late = playback.submit(ExecResult("ok", "late", wall_s=0.5))
        given_up = playback.submit(ExecResult("ok", "given up", wall_s=0.01))
        given_up.cancel()
        early = playback.submit(ExecResult("ok", "early", wall_s=0.05))
        assert early.result().stdout == "early" and not late.done()
        assert late.result().stdout == "late"
        assert time.perf_counter() - start >= 0.5
        assert given_up.cancelled()


def test_rounds_by_hand(writer):
    """Round 1 decodes 45, 30 and 30 tokens, of which 20, 30 and 14 are of use, and waits 2 s.
    Round 2: 25 and 16, of which 15 and 16, 3 s. Round 3: 10."""

    class Counting:
        def replay(self, params, texts):
            tokens = sum(t.num_model_tokens for t in texts)
            return texts, RolloutStats(wall_s=1.0, idle_s=0.25, num_model_tokens=tokens)

    rows = [TraceRow((20, 15, 10), (1.0, 3.0)), TraceRow((30,), ()), TraceRow((14, 16), (2.0,))]
    batch = rollout._Batch(writer, list(enumerate(rows)), 0)
    measured = rollout._in_rounds(Counting(), None, batch)
    assert (measured.useful_tokens, measured.thrown_tokens) == (64 + 31 + 10, 41 + 10)
    assert (measured.stats.wall_s, measured.waits_s) == (3.0, 5.0)
    measured.stats.num_segments = 6
    figures = measured.figures(3)
    assert (figures["seconds"], figures["rows_per_s"]) == (8.0, 3 / 8)
    assert figures["idle_share"] == 5.75 / 8


def bench(*arguments):
    return cli.main(["bench", "rollout", "--trace", *arguments])


def test_the_command_prints_a_line_for_each_schedule(monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    small = ("--slots", "8", "--rows", "10", "--batches", "2", "--response", "64")
    assert bench("--preset", "tiny", *small, "--latency", "0.01", "0.02") == 0
    rounds, ours, ratio = map(json.loads, capsys.readouterr().out.splitlines())
    assert (rounds["schedule"], ours["schedule"]) == ("rounds", "engine")
    for line in (rounds, ours):
        assert line["rows_per_s"] == pytest.approx(20 / line["seconds"])
        assert line["latency_s"] == {"p50": 0.01, "p99": 0.02}
        assert 0 < line["host_share"] <= 1 and 0 <= line["idle_share"] < 1
        assert line["host_s_per_segment"] <= line["segment_s"]
    assert rounds["useful_tokens"] == ours["useful_tokens"] > 0
    assert rounds["thrown_tokens"] > 0 == ours["thrown_tokens"]
    assert ratio["rows_per_s"] == pytest.approx(ours["rows_per_s"] / rounds["rows_per_s"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--preset", "bensh"), "bench rollout: preset='bensh': unknown; nearest: bench"),
        (("--slots", "9"), "--slots 9: must be a multiple of 8 devices"),
        (("--turn", "9", "8"), "p50=9, p99=8: must be above 0, and rising"),
        (("--latency", "0", "8"), "argument --latency: 0: must be above 0"),
        (("--response", "5"), "max_response=5: must be at least "),
    ],
)
def test_wrong_arguments_are_named(arguments, message, capsys):
    try:
        code = bench(*arguments)
    except SystemExit as error:  # argparse's own
        code = error.code
    assert code == cli.EXIT_CONFIG
    assert message in capsys.readouterr().err.splitlines()[-1]
