"""The engine on the shipped cold start: real calls, whatever the slots, segments and latencies."""

import dataclasses
import random
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import jax
import numpy as np
import pytest

from cir_jax import config as configs
from cir_jax import mesh as meshes
from cir_jax.config import MeshConfig, ResultConfig
from cir_jax.data import pipeline, sources
from cir_jax.models import hf
from cir_jax.records import Author
from cir_jax.rl.batch import Sequence1D, pack
from cir_jax.rollout import decode
from cir_jax.rollout.engine import Engine, model_turns
from cir_jax.rollout.sampling import GREEDY, Sampling
from cir_jax.sandbox.pool import Sandbox
from cir_jax.sandbox.text import result_text
from cir_jax.tokenizer import Tokenizer, put_back_text
from cir_jax.train.step import old_logprobs

ROOT = Path(__file__).parent.parent
ONE_DEVICE = jax.devices()[:1]


class SlowSandbox:
    """Answers of a real sandbox, each held back for a random time."""

    def __init__(self, sandbox, seed):
        self._sandbox = sandbox
        self._random = random.Random(seed)

    def submit(self, code, *, seed=0):
        late = Future()
        delay_s = self._random.choice([0.0, 0.01, 0.2])

        def answer(future):
            threading.Timer(delay_s, lambda: late.set_result(future.result())).start()

        self._sandbox.submit(code, seed=seed).add_done_callback(answer)
        return late


@pytest.fixture(scope="module")
def cfg():
    return configs.load(ROOT / "configs/quickstart.toml")


@pytest.fixture(scope="module")
def tokenizer(cfg):
    return Tokenizer(configs.asset_dir(cfg.tokenizer))


@pytest.fixture(scope="module")
def mesh():
    return jax.sharding.Mesh(np.array(ONE_DEVICE).reshape(1, 1, 1), ("data", "fsdp", "tensor"))


@pytest.fixture(scope="module")
def params(cfg, mesh):
    return hf.load(configs.asset_dir(cfg.sft.weights), cfg.model, mesh)


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(num_workers=2) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def problems(cfg):
    return pipeline.first_problems(sources.of_tasks(cfg.data.tasks, "eval"), 10)


def make_engine(cfg, tokenizer, sandbox, **rollout):
    return Engine(
        cfg.model,
        # Few shapes: each is compiled.
        cfg.rollout.model_copy(update={"slots": 16} | rollout),
        tokenizer,
        sandbox,
        template=cfg.data.template,
        chat=cfg.data.chat,
        max_prompt_tokens=cfg.data.max_prompt_tokens,
        dtype=cfg.compute.dtype,
        seed=0,
    )


def sample(cfg, tokenizer, sandbox, params, problems, *, max_calls=3, temperature=1.0, **rollout):
    """Four trajectories of each problem."""
    groups, _ = make_engine(cfg, tokenizer, sandbox, **rollout).rollout(
        params,
        problems,
        samples=4,
        max_calls=max_calls,
        sampling=Sampling(temperature),
        phase="test",
        step=4,
    )
    return groups


@pytest.fixture(scope="module")
def groups(cfg, tokenizer, sandbox, params, problems):
    return sample(cfg, tokenizer, sandbox, params, problems, slots=16)


@pytest.fixture(scope="module")
def trajectories(groups):
    return [t for group in groups for t in group]


def test_there_are_calls_of_each_kind(trajectories):
    """What the other tests rest on: rows with no, one and several calls, failed ones too."""
    counts = {len(t.calls) for t in trajectories}
    assert {0, 1, 2} <= counts
    assert any(c.result.status == "error" for t in trajectories for c in t.calls)


def test_groups_stand_in_order(groups, problems):
    assert [[t.problem for t in group] for group in groups] == [[p] * 4 for p in problems]
    assert [[t.sample for t in group] for group in groups] == [[0, 1, 2, 3]] * 10


def test_trajectory_is_prompt_turns_and_tool_outputs(cfg, tokenizer, trajectories):
    check_parts(cfg, tokenizer, trajectories)


def check_parts(cfg, tokenizer, trajectories):
    """Every token is accounted for: the prompt's, the model's, and the put-back of each call."""
    for t in trajectories:
        prompt = tokenizer.encode(t.problem.question + "\n")
        assert t.ids[t.author == Author.PROMPT].tolist() == prompt
        put_back = []
        for turn, call in zip(model_turns(t, tokenizer), t.calls, strict=False):
            assert turn.startswith(f"```python\n{call.code}```") or call.code in turn
            trailing = turn[turn.index(call.code) + len(call.code) + 3 :]
            text = result_text(call.result, cfg.rollout.result)
            put_back += tokenizer.encode(put_back_text(text, trailing))
        assert t.ids[t.author == Author.TOOL].tolist() == put_back[: (t.author == 2).sum()]
        assert sum(c.num_tool_tokens for c in t.calls) == (t.author == Author.TOOL).sum()
        assert np.all(t.logp[t.author != Author.MODEL] == 0)
        assert np.all(t.logp[t.author == Author.MODEL] < 0)
        if t.stop_reason == "eos":
            assert t.ids[-1] == tokenizer.eos_id and t.author[-1] == Author.MODEL
        else:
            assert t.num_response_tokens == cfg.rollout.max_response_tokens


def test_results_are_worded_as_the_config_says(cfg, tokenizer, sandbox, params, problems):
    changes = {"result": ResultConfig(prefix="Results:\n", max_chars=2)}
    groups = sample(cfg, tokenizer, sandbox, params, problems[:4], slots=16, **changes)
    trajectories = [t for group in groups for t in group]
    assert any(len(c.result.stdout.strip()) > 2 for t in trajectories for c in t.calls)
    rollout = cfg.rollout.model_copy(update=changes)
    check_parts(cfg.model_copy(update={"rollout": rollout}), tokenizer, trajectories)


@pytest.mark.parametrize(
    "rollout",
    [
        {"slots": 4, "segment_steps": 1},
        {"slots": 64, "segment_steps": 64},
        {"slots": 16, "segments_in_flight": 1},
        {"slots": 16, "prefill_rows": 3, "prefill_chunk": 7, "segments_in_flight": 3},
    ],
)
def test_schedule_changes_no_token(
    cfg, tokenizer, sandbox, params, problems, trajectories, rollout
):
    """Slots, segment length, chunks and latencies: same tokens, log-probabilities to 1e-4."""
    slow = SlowSandbox(sandbox, seed=len(rollout))
    others = sample(cfg, tokenizer, slow, params, problems, **rollout)
    for a, b in zip(trajectories, [t for group in others for t in group], strict=True):
        assert a.ids.tolist() == b.ids.tolist()
        assert a.author.tolist() == b.author.tolist()
        np.testing.assert_allclose(a.logp, b.logp, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("in_flight", [1, 2])
@pytest.mark.parametrize("steps", [1, 8, 64])
@pytest.mark.parametrize("slots", [4, 16, 64])
def test_no_schedule_changes_a_token(
    cfg, tokenizer, sandbox, params, problems, trajectories, slots, steps, in_flight
):
    """Every combination, at once and with random latencies."""
    changes = {"slots": slots, "segment_steps": steps, "segments_in_flight": in_flight}
    for answers in (sandbox, SlowSandbox(sandbox, seed=slots + steps)):
        others = sample(cfg, tokenizer, answers, params, problems, **changes)
        for a, b in zip(trajectories, [t for group in others for t in group], strict=True):
            assert a.ids.tolist() == b.ids.tolist()
            assert a.author.tolist() == b.author.tolist()
            assert [c.code for c in a.calls] == [c.code for c in b.calls]
            np.testing.assert_allclose(a.logp, b.logp, atol=1e-4)


def test_latency_changes_no_bit(cfg, tokenizer, sandbox, params, problems, trajectories):
    """With the same shapes even the log-probabilities' last bits stay: a row's numbers depend
    neither on its slot nor on its neighbours."""
    others = sample(cfg, tokenizer, SlowSandbox(sandbox, 1), params, problems, slots=16)
    for a, b in zip(trajectories, [t for group in others for t in group], strict=True):
        assert a.logp.tobytes() == b.logp.tobytes()


def recomputed(cfg, params, trajectories):
    """Log-probabilities by the packed forward pass, and the batch that has the decode loop's."""
    sequences = [Sequence1D(t.ids, t.author, t.logp) for t in trajectories]
    batch, num_micro = pack(sequences, row_length=cfg.max_length, micro_rows=4, max_micro=10)
    old = old_logprobs(
        params, batch, num_micro, np.float32(1.0), cfg=cfg.model, compute=cfg.compute
    )
    return np.asarray(old), batch


def test_trainer_recomputes_log_probabilities(cfg, params, trajectories):
    """Packed forward pass against the decode loop, to 1e-4, after tool outputs as well."""
    old, batch = recomputed(cfg, params, trajectories)
    after_tool = np.zeros_like(batch.trained)
    after_tool[:, :, 1:] = batch.trained[:, :, 1:] & ~batch.trained[:, :, :-1]
    after_tool &= batch.positions > cfg.data.max_prompt_tokens
    assert after_tool.sum() > 5
    np.testing.assert_allclose(old[batch.trained], batch.sampler_logp[batch.trained], atol=1e-4)


@pytest.mark.slow
def test_an_int8_cache_samples_whole_trajectories(cfg, tokenizer, sandbox, params, problems):
    """With room for all rows, so that prompts are copied: calls run, and log-probabilities are
    the trainer's to 3e-3 on average, ten times what these weights show, but not to 1e-5."""
    groups = sample(cfg, tokenizer, sandbox, params, problems, slots=40, cache_dtype="int8")
    trajectories = [t for group in groups for t in group]
    check_parts(cfg, tokenizer, trajectories)
    assert sum(len(t.calls) for t in trajectories) > 5
    old, batch = recomputed(cfg, params, trajectories)
    off = np.abs(old - batch.sampler_logp)[batch.trained].mean()
    assert 1e-5 < off < 3e-3


def test_budget_bounds_the_calls(cfg, tokenizer, sandbox, params, problems, trajectories):
    """With budget 1 a row's first call is as before, and it has no second; with 0 none."""
    one = sample(cfg, tokenizer, sandbox, params, problems, max_calls=1)
    for a, b in zip(trajectories, [t for group in one for t in group], strict=True):
        assert [c.code for c in a.calls[:1]] == [c.code for c in b.calls]
    none = sample(cfg, tokenizer, sandbox, params, problems, max_calls=0)
    for t in [t for group in none for t in group]:
        assert not t.calls and not np.any(t.author == Author.TOOL)
        turns = model_turns(t, tokenizer)
        assert len(turns) == 1


def test_stop_word_is_the_models_own(cfg, tokenizer, sandbox, params, problems, monkeypatch):
    """rollout.boundary=stop_word: the closing fence is passed, and the output goes on after
    ```output. The sampler follows a script, since no model here writes that."""
    turn = tokenizer.encode("```python\nprint(1)\n```\nIt is\n```output")
    output = tokenizer.encode("\n1\n```\n")
    answer = [*tokenizer.encode("\\boxed{1}"), tokenizer.eos_id]
    prompt = tokenizer.encode(problems[0].question + "\n")
    script = jax.numpy.array(prompt + turn + output + answer)

    def scripted(logits_VB, keys_B2, positions_B, *_):
        return script.at[positions_B].get(mode="clip"), -jax.numpy.ones(len(positions_B))

    monkeypatch.setattr(decode, "sample", scripted)
    # Segments of a length of their own: the program is this test's alone.
    changes = {"boundary": "stop_word", "segment_steps": 5}
    for t in sample(cfg, tokenizer, sandbox, params, problems[:1], **changes)[0]:
        assert t.ids.tolist() == script.tolist() and t.stop_reason == "eos"
        written = [len(prompt), len(turn), len(output), len(answer)]
        who = [Author.PROMPT, Author.MODEL, Author.TOOL, Author.MODEL]
        assert t.author.tolist() == np.repeat(who, written).tolist()
        assert [(c.code, c.result.stdout) for c in t.calls] == [("print(1)\n", "1\n")]


def test_length_limit_cuts_tool_output(cfg, tokenizer, sandbox, params, problems):
    groups = sample(cfg, tokenizer, sandbox, params, problems, max_response_tokens=24, slots=8)
    cut = [t for g in groups for t in g if t.author[-1] == Author.TOOL]
    assert cut
    for t in cut:
        assert t.stop_reason == "response_length" and t.num_response_tokens == 24
        assert sum(c.num_tool_tokens for c in t.calls) == (t.author == Author.TOOL).sum()


def test_context_limits_a_row(cfg, tokenizer, sandbox, params, problems):
    """rollout.max_context counts the prompt too."""
    groups = sample(cfg, tokenizer, sandbox, params, problems, max_context=48)
    rows = [t for group in groups for t in group]
    assert {t.stop_reason for t in rows} == {"eos", "context"}
    assert all((len(t.ids) == 48) == (t.stop_reason == "context") for t in rows)
    with pytest.raises(ValueError, match="context of 4 tokens .*: the prompt of problem"):
        sample(cfg, tokenizer, sandbox, params, problems, max_context=4)


class Silent:
    """Programs of the first submission never end."""

    def __init__(self, sandbox):
        self._sandbox = sandbox
        self.held = None

    def submit(self, code, *, seed=0):
        if self.held is None:
            self.held, self.code = Future(), code
            return self.held
        return self._sandbox.submit(code, seed=seed)


def test_a_tool_that_never_returns_ends_its_row(
    cfg, tokenizer, sandbox, params, problems, trajectories
):
    """By rollout.row_timeout_s, and so do those of its group that ask for the same program; what
    they have written stays, and all other rows are as ever."""
    silent = Silent(sandbox)
    groups = sample(cfg, tokenizer, silent, params, problems, slots=16, row_timeout_s=4.0)
    rows = [t for group in groups for t in group]
    late = [i for i, t in enumerate(rows) if t.stop_reason == "row_time"]
    first = late[0] // 4 * 4
    assert late == [
        i
        for i in range(first, first + 4)
        if silent.code in [call.code for call in trajectories[i].calls]
    ]
    for i, (a, b) in enumerate(zip(trajectories, rows, strict=True)):
        if i in late:
            assert silent.code not in [call.code for call in b.calls]
            assert b.ids.tolist() == a.ids[: len(b.ids)].tolist()
            assert "```python" in tokenizer.decode(b.ids) and len(b.ids) < len(a.ids)
        else:
            assert a.ids.tolist() == b.ids.tolist()
    assert silent.held.cancelled()


def test_a_step_ends_by_its_limit(cfg, tokenizer, params, problems):
    """rollout.step_timeout_s: rows that have begun end where they are, others have no response."""

    class Never:
        def submit(self, code, *, seed=0):
            return Future()

    def rows(**limits):
        groups = sample(cfg, tokenizer, Never(), params, problems, slots=16, **limits)
        assert [t.problem for group in groups for t in group] == list(np.repeat(problems, 4))
        return [t for group in groups for t in group]

    begun = rows(step_timeout_s=3.0)
    late = [t for t in begun if t.stop_reason == "step_time"]
    assert any("```python" in tokenizer.decode(t.ids) for t in late)
    assert all(t.calls == () for t in begun)
    for t in rows(step_timeout_s=1e-6):
        assert t.stop_reason == "step_time" and t.num_response_tokens == 0
        assert t.ids.tolist() == tokenizer.encode(t.problem.question + "\n")


def test_each_problem_has_settings_of_its_own(
    cfg, tokenizer, sandbox, params, problems, trajectories
):
    """One problem greedy, one of few tokens, the others as before."""
    sampling = [Sampling(1.0)] * len(problems)
    sampling[0], sampling[1] = GREEDY, Sampling(1.0, top_k=1)
    groups, _ = make_engine(cfg, tokenizer, sandbox, slots=16).rollout(
        params, problems, samples=4, max_calls=3, sampling=sampling, phase="test", step=4
    )
    for group in groups[:2]:
        assert len({t.ids.tobytes() for t in group}) == 1
    others = [t for group in groups[2:] for t in group]
    for a, b in zip(trajectories[8:], others, strict=True):
        assert a.ids.tolist() == b.ids.tolist()


class Forbidden:
    def submit(self, code, *, seed=0):
        raise AssertionError("a program is run")


def test_replay_follows_the_record(cfg, tokenizer, params, trajectories):
    """The same tokens, calls and log-probabilities, and no program runs."""
    engine = make_engine(cfg, tokenizer, Forbidden(), slots=16)
    again, stats = engine.replay(params, trajectories)
    assert stats.num_model_tokens == sum(t.num_model_tokens for t in trajectories)
    for a, b in zip(trajectories, again, strict=True):
        assert (a.ids.tolist(), a.author.tolist()) == (b.ids.tolist(), b.author.tolist())
        assert (a.calls, a.stop_reason) == (b.calls, b.stop_reason)
        np.testing.assert_allclose(a.logp, b.logp, atol=1e-5)


def test_replay_says_where_it_cannot_follow(cfg, tokenizer, params, trajectories):
    """Other output of a program than on record: named by problem, sample and token."""
    engine = make_engine(cfg, tokenizer, Forbidden(), slots=16)
    called = next(t for t in trajectories if t.calls and t.stop_reason == "eos")
    first = int(np.flatnonzero(called.author == Author.TOOL)[0])
    result = dataclasses.replace(called.calls[0].result, status="ok", stdout="7\n" * 3, error="")
    calls = (dataclasses.replace(called.calls[0], result=result), *called.calls[1:])
    # The output block opens with a newline and ```output, as on record.
    at = first + len(tokenizer.encode("\n```output\n"))
    with pytest.raises(ValueError, match=f"sample {called.sample} leaves the record at token {at}"):
        engine.replay(params, [dataclasses.replace(called, calls=calls)])


def test_greedy_is_the_most_likely_token(cfg, tokenizer, sandbox, params, problems):
    """At temperature 0 the four samples of a problem are one, and no seed matters."""
    groups = sample(cfg, tokenizer, sandbox, params, problems, temperature=0.0)
    for group in groups:
        assert len({t.ids.tobytes() for t in group}) == 1


class Counting:
    """Keeps what it is asked to run."""

    def __init__(self, sandbox):
        self._sandbox = sandbox
        self.asked = []

    def submit(self, code, *, seed):
        self.asked.append((code, seed))
        return self._sandbox.submit(code, seed=seed)


def test_equal_programs_of_a_group_run_once(cfg, tokenizer, sandbox, params, problems):
    """Four samples of a problem: those that write the same program read the same run's output."""
    counting = Counting(sandbox)
    groups, stats = make_engine(cfg, tokenizer, counting).rollout(
        params, problems, samples=4, max_calls=3, sampling=Sampling(1.0), phase="test", step=4
    )
    calls = [(p, c) for p, group in enumerate(groups) for t in group for c in t.calls]
    runs = {(p, c.code): c.result for p, c in calls}
    assert sorted(code for code, _ in counting.asked) == sorted(code for _, code in runs)
    assert all(runs[p, c.code] is c.result for p, c in calls)
    assert stats.num_shared == len(calls) - len(runs) > 0


def test_nothing_recompiles_after_the_first_step(cfg, tokenizer, sandbox, params, problems):
    """Another batch of problems, another budget and temperature: not one new trace."""
    jitted = (decode.make_slots, decode.advance)
    sample(cfg, tokenizer, sandbox, params, problems)
    before = [f._cache_size() for f in jitted]
    others = pipeline.first_problems(sources.of_tasks(cfg.data.tasks, "eval"), 14)[3:]
    sample(cfg, tokenizer, sandbox, params, others, max_calls=2, temperature=0.7)
    assert [f._cache_size() for f in jitted] == before


def test_a_prompt_is_computed_once_and_copied(
    cfg, tokenizer, sandbox, params, problems, trajectories, monkeypatch
):
    """With room for all forty rows, ten prompts go through the model and thirty are copied."""
    works = []
    advance = decode.advance

    def watching(params, slots, work, *args, **kwargs):
        works.append(jax.tree.map(np.asarray, work))
        return advance(params, slots, work, *args, **kwargs)

    monkeypatch.setattr(decode, "advance", watching)
    groups = sample(cfg, tokenizer, sandbox, params, problems, slots=40)
    first = works[0]
    assert first.enters.all() and not any(work.enters.any() for work in works[1:])
    assert (first.source >= 0).sum() == 30
    for a, b in zip(trajectories, [t for group in groups for t in group], strict=True):
        assert a.ids.tolist() == b.ids.tolist()


def test_eight_devices_give_the_same_tokens(cfg, tokenizer, sandbox, problems, trajectories):
    """And decoding may share heads where training does not."""
    layout = MeshConfig(data=2, fsdp=4, decode_tensor=2)
    mesh = meshes.make_mesh(layout)
    params = hf.load(configs.asset_dir(cfg.sft.weights), cfg.model, mesh)
    with jax.set_mesh(meshes.decoding_mesh(mesh, layout)):
        others = sample(cfg, tokenizer, sandbox, params, problems, slots=16)
    for a, b in zip(trajectories, [t for group in others for t in group], strict=True):
        assert a.ids.tolist() == b.ids.tolist()
        np.testing.assert_allclose(a.logp, b.logp, atol=1e-4)


def test_infra_failure_is_raised_not_shown(cfg, tokenizer, params, problems):
    class Broken:
        def submit(self, code, *, seed=0):
            from cir_jax.records import ExecResult

            future = Future()
            future.set_result(ExecResult("infra", error="no worker"))
            return future

    with pytest.raises(RuntimeError, match="no worker"):
        sample(cfg, tokenizer, Broken(), params, problems)


def test_slow_program_does_not_hold_up_the_others(cfg, tokenizer, sandbox, params, problems):
    """While one row's program runs, segments go on: other rows are done before it ends."""

    class OneSlow:
        def __init__(self):
            self.first = True

        def submit(self, code, *, seed=0):
            slow, self.first = self.first, False
            if not slow:
                return sandbox.submit(code, seed=seed)
            late = Future()
            real = sandbox.submit(code, seed=seed)
            threading.Timer(3.0, lambda: late.set_result(real.result())).start()
            return late

    engine = make_engine(cfg, tokenizer, sandbox, slots=4)
    kwargs = dict(samples=4, max_calls=3, sampling=Sampling(1.0), phase="test", step=4)
    _, quiet = engine.rollout(params, problems, **kwargs)
    engine.sandbox = OneSlow()
    start = time.perf_counter()
    _, stats = engine.rollout(params, problems, **kwargs)
    assert time.perf_counter() - start >= 3.0
    # 40 rows through 3 slots while the fourth waits: what is waited for is less than the 3 s.
    assert stats.tool_wait_s < 3.0
    assert stats.num_segments >= quiet.num_segments
