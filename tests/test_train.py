"""Whole runs of a tiny config: repeatable, resumable, interruptible, and the command line."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from models_table import ONE_DEVICE_FLAGS, TINY_RUN

from cir_jax import config as configs
from cir_jax import metrics
from cir_jax.analyses import ANALYSES, load
from cir_jax.chat.source import find_source
from cir_jax.evals import codestats, samples
from cir_jax.evaluation.model import find_model
from cir_jax.evaluation.run import Request, evaluate
from cir_jax.sandbox import packages, pool, store
from cir_jax.sandbox.errors import SandboxError
from cir_jax.sandbox.store import PROGRAMS
from cir_jax.train import loop, resume, stopping
from cir_jax.train.digest import params_digest
from cir_jax.train.display import Display

ROOT = Path(__file__).parent.parent
MAKE_MESH = loop.meshes.make_mesh
SIGINT_HANDLER = signal.getsignal(signal.SIGINT)


def tiny(run_dir, *overrides):
    extra = (f"run_dir={str(run_dir)!r}", *overrides)
    return configs.load(ROOT / "configs/quickstart.toml", TINY_RUN + extra)


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Runs see one device, unless a test gives them the real mesh back."""
    devices = np.array(jax.devices()[:1]).reshape(1, 1, 1)
    mesh = jax.sharding.Mesh(devices, ("data", "fsdp", "tensor"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.meshes, "make_mesh", lambda cfg: mesh)
        yield


def run(run_dir, *overrides):
    return loop.train(tiny(run_dir, *overrides), Display())


def files(run_dir):
    return {name: (run_dir / name).read_bytes() for name in (metrics.METRICS, metrics.SAMPLES)}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return run(tmp_path_factory.mktemp("run") / "first")


def test_run_leaves_what_the_readme_says(first):
    lines = metrics.read(first)
    assert [r["stage"] for r in lines if r["kind"] == "eval"] == [
        "before SFT",
        "before RL",
        "after RL",
    ]
    assert [r["step"] for r in lines if r["kind"] == "rl"] == [1, 2]
    assert configs.load_run(first) == tiny(first)
    assert len(metrics.read(first, metrics.TIMINGS)) == len(lines)
    samples = metrics.read(first, metrics.SAMPLES)
    assert len(samples) == 2 * 2
    for sample in samples:
        assert len(sample["ids"]) == len(sample["author"]) == len(sample["logp"])
        # Without shaping; all of a step's four groups are trained on.
        assert sample["reward"] == sample["score"] and 0 <= sample["group"] < 4
        assert isinstance(sample["advantage"], float) and sample["advantages"] is None
        assert sample["max_calls"] == 1 and sample["task"] == sample["problem_id"].split("/")[0]
    rl = [r for r in lines if r["kind"] == "rl"]
    assert all(r["sampler_mismatch_max"] == 0.0 and r["skipped"] == 0.0 for r in rl)


def check_programs(run_dir):
    """Counts in the metrics are of responses' calls; those that shared a run are once on record."""
    on_record = [json.loads(line) for line in (run_dir / PROGRAMS).read_bytes().splitlines()]
    described = json.loads((run_dir / "sandbox.json").read_text())
    cfg = configs.load_run(run_dir).sandbox
    limits = dataclasses.asdict(pool.limits_of(cfg))
    assert on_record[0]["settings"] == described | {"limits": limits}
    assert described["rung"].startswith("namespaces")
    assert described["versions"] == packages.locked_versions()
    assert described["lock"] == packages.lock_hash()
    timings = metrics.read(run_dir, metrics.TIMINGS)
    num_runs = sum("key" in line for line in on_record)
    assert sum(line["runs"] for line in timings) == num_runs > 0
    for line, seconds in zip(metrics.read(run_dir), timings, strict=True):
        if line["kind"] == "rl":
            calls = sum(line[f"programs_{status}"] for status in codestats.ENDS)
            assert calls == seconds["runs"] + seconds["runs_shared"]
            assert line["programs_ok"] == round(line["programs_ok_share"] * calls)
            assert 0 <= seconds["run_p50_s"] <= seconds["run_p99_s"] < cfg.timeout_s + 5


def test_programs_are_in_the_metrics_and_on_record(first):
    check_programs(first)


def test_a_recorded_run_is_replayed_without_a_sandbox(first, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "open_sandbox", None)
    again = run(tmp_path / "again", f"sandbox.replay={str(first)!r}")
    assert files(again) == files(first)
    assert (again / "sandbox.json").read_bytes() == (first / "sandbox.json").read_bytes()
    assert not (again / PROGRAMS).exists()
    # With other demonstrations, other programs are asked for.
    with pytest.raises(SandboxError, match="sandbox.replay=.*has left the recorded one"):
        run(tmp_path / "other", f"sandbox.replay={str(first)!r}", "sft.failed_share=1.0")


def test_same_seed_writes_the_same_bytes(first, tmp_path):
    assert files(run(tmp_path / "again")) == files(first)


@pytest.mark.slow
def test_another_seed_does_not(first, tmp_path):
    assert files(run(tmp_path / "other", "seed=1")) != files(first)


@pytest.mark.parametrize("stop_at", ["sft", "rl"])
def test_interrupted_and_resumed_equals_uninterrupted(first, tmp_path, monkeypatch, stop_at):
    """A stop asked for at the first step of a phase; the same command then goes on."""
    save_if_due = loop.Run.save_if_due

    def signalled(self, state, phase, step, critic=None, **options):
        if phase == stop_at:
            self.stopper.signum = signal.SIGINT
        save_if_due(self, state, phase, step, critic, **options)

    monkeypatch.setattr(loop.Run, "save_if_due", signalled)
    run_dir = tmp_path / "run"
    with pytest.raises(stopping.Interrupted):
        run(run_dir)
    monkeypatch.setattr(loop.Run, "save_if_due", save_if_due)
    # What was written after the checkpoint is dropped.
    with open(run_dir / metrics.METRICS, "a", encoding="utf-8") as file:
        file.write('{"kind": "lost"}\n')
    run(run_dir, "resume=true")
    assert files(run_dir) == files(first)


@pytest.mark.slow
def test_a_run_of_all_switches_resumes(tmp_path, monkeypatch):
    """Reference model, critic, and a budget that rises at each step: resumed after the first."""
    switches = (
        "rl.advantage=gae",
        "rl.critic.lam=0.95",
        "rl.kl_coef=0.01",
        "rl.entropy_coef=0.001",
        "rl.importance_cap=2",
        "rl.epochs=2",
        "rl.shuffle=true",
        "rl.loss_mean=sequence_mean",
        "rollout.refill_rounds=1",
        "rollout.max_calls=0",
        "rollout.raise_calls_above=0",
        "reward.overlong_buffer=20",
    )
    whole = run(tmp_path / "whole", *switches)
    lines = [r for r in metrics.read(whole) if r["kind"] == "rl"]
    assert [r["max_calls"] for r in lines] == [0, 1]
    # The first of the step's four updates is that of the reference's own weights.
    assert all(r["rounds"] == 2 and r["ref_kl"] > 0 and r["critic/loss"] > 0 for r in lines)
    save_if_due = loop.Run.save_if_due

    def signalled(self, state, phase, step, critic=None, **options):
        if phase == "rl":
            self.stopper.signum = signal.SIGINT
        save_if_due(self, state, phase, step, critic, **options)

    monkeypatch.setattr(loop.Run, "save_if_due", signalled)
    with pytest.raises(stopping.Interrupted):
        run(tmp_path / "run", *switches)
    monkeypatch.setattr(loop.Run, "save_if_due", save_if_due)
    run(tmp_path / "run", *switches, "resume=true")
    assert files(tmp_path / "run") == files(whole)
    # A run that has ended still holds its critic, for more steps.
    run(whole, *switches, "resume=true", "rl.steps=3")
    steps = [r["step"] for r in metrics.read(whole) if r["kind"] == "rl"]
    assert steps == [1, 2, 3]


def test_checkpoint_of_one_device_is_restored_on_eight(first):
    cfg = configs.load_run(first)
    mesh = MAKE_MESH(configs.MeshConfig(data=2, fsdp=2, tensor=2))
    one = loop.newest_params(cfg, first, loop.meshes.make_mesh(cfg.mesh))
    eight = loop.newest_params(cfg, first, mesh)
    assert {x.sharding.mesh for x in jax.tree.leaves(eight)} == {mesh}
    jax.tree.map(np.testing.assert_array_equal, one, eight)


def test_another_config_is_refused_and_nothing_is_lost(first, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(first, copy)
    before = files(copy)
    with pytest.raises(configs.ConfigError, match=r"rl\.clip_low=0\.1, was 0\.2"):
        run(copy, "resume=true", "rl.clip_low=0.1")
    assert files(copy) == before and configs.load_run(copy).rl.clip_low == 0.2
    # A step that is asked for; what came after it is made again.
    run(copy, "resume=true", "resume_step=1", "rl.steps=2")
    assert files(copy) == before
    assert (copy / "rollouts/000002.npz").read_bytes() == (
        first / "rollouts/000002.npz"
    ).read_bytes()


def test_lines_are_chained_and_tell_of_parameters(first):
    lines = metrics.read(first)
    assert metrics.broken_link(lines) is None
    params = loop.newest_params(configs.load_run(first), first, loop.meshes.make_mesh(None))
    last = [line for line in lines if line["kind"] == "rl"][-1]
    assert last["params_digest"] == params_digest(params)[0]
    assert len({line["params_digest"] for line in lines if line["kind"] != "eval"}) == 5


def test_finished_run_resumes_to_nothing_more(first, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(first, copy)
    run(copy, "resume=true")
    assert files(copy) == files(first)


@pytest.mark.slow
def test_eight_devices_write_the_same_run(first, tmp_path, monkeypatch):
    """Same tokens and verdicts; figures to float32's accuracy."""
    monkeypatch.setattr(loop.meshes, "make_mesh", MAKE_MESH)
    other = run(tmp_path / "eight", "mesh.data=4", "mesh.tensor=2")
    for a, b in zip(metrics.read(first), metrics.read(other), strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            if key in ("chain", "params_digest", "batch_digest"):
                continue  # to the last bit
            close = value if isinstance(value, str) else pytest.approx(value, rel=1e-3, abs=1e-5)
            assert b[key] == close, (key, a, b)
    for a, b in zip(*(metrics.read(d, metrics.SAMPLES) for d in (first, other)), strict=True):
        assert a["ids"] == b["ids"] and a["author"] == b["author"]


def test_eval_reproduces_the_last_row(first, tmp_path):
    model = find_model(str(first), {}, [], [])
    out = evaluate(model, Request(None, Path("."), "on"), tmp_path / "eval", Display())
    found = samples.read(out)
    stats = codestats.code_stats([s.trajectory() for s in found], [s.verdict() for s in found])
    last = [r for r in metrics.read(first) if r["kind"] == "eval"][-1]
    assert {k: last[k] for k in stats} == stats
    assert json.loads((out / samples.DESCRIPTION).read_text())["stage"] == "after RL"


def test_analyses_of_a_run(first):
    """Its curve, and what the samples did that it has kept."""
    (run,) = load([first])
    made = {name: analyse([run]) for name, analyse in ANALYSES.items()}
    assert [row[:4] for row in made["learning_curve"].rows] == [
        (run.name, 1, 1, 2),
    ]
    assert made["code"] is not None and made["behaviours"] is not None
    assert made["results"] is None and len(run.samples) == 2 * 2


def test_chat_finds_the_newest_weights_of_a_run(first, tmp_path):
    """The same as export-hf writes, and the run's settings; of weights alone no prompt's form."""
    cfg = tiny(first)
    loop.export_run(cfg, first, tmp_path / "hf")
    run, exported = find_source(str(first)), find_source(str(tmp_path / "hf"))
    assert run.model == exported.model == cfg.model
    assert (run.rollout, run.sandbox, run.template) == (cfg.rollout, cfg.sandbox, cfg.data.template)
    # The largest of the schedule's budgets, 1, 2 and 3.
    assert (run.max_calls, run.dtype, run.may_chat) == (3, "float32", False)
    assert exported.may_chat and exported.tokenizer == tmp_path / "hf"
    mesh = loop.meshes.make_mesh(cfg.mesh)
    jax.tree.map(np.testing.assert_array_equal, run.load(mesh), exported.load(mesh))


def test_run_dir_is_not_overwritten(first):
    with pytest.raises(configs.ConfigError, match="resume=true"):
        run(first)


def test_run_dirs_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = tiny("")
    assert resume.find_run_dir(cfg) == Path("runs/quickstart/001")
    assert resume.find_run_dir(cfg) == Path("runs/quickstart/002")
    resumed = cfg.model_copy(update={"resume": True})
    assert resume.find_run_dir(resumed) == Path("runs/quickstart/002")


@pytest.mark.slow
def test_hostile_programs_do_not_stop_a_run(tmp_path, monkeypatch):
    """Every program of the run is replaced by one that ends, hangs, floods or forks."""
    hostile = (
        "import os; os._exit(3)",
        "import ctypes; ctypes.string_at(0)",
        "while True: pass",
        "x = 'a' * 10**11",
        "import os\nwhile True: os.fork()",
    )
    submit = pool.Sandbox.submit
    count = [0]

    def replaced(self, code, *, seed=0):
        count[0] += 1
        return submit(self, hostile[count[0] % len(hostile)], seed=seed)

    monkeypatch.setattr(pool.Sandbox, "submit", replaced)
    weights = ("sft.weights=package:quickstart/cold_start", "rl.steps=1", "sandbox.timeout_s=0.5")
    full = tuple(o for o in TINY_RUN if not o.startswith("model.") and not o.startswith("sft."))
    overrides = (*full, *weights, f"run_dir={str(tmp_path / 'run')!r}", "eval.num_problems=1")
    overrides += ("rollout.max_response_tokens=104", "rollout.prompts_per_step=10")
    cfg = configs.load(ROOT / "configs/quickstart.toml", overrides)
    run_dir = loop.train(cfg, Display())
    (line,) = [r for r in metrics.read(run_dir) if r["kind"] == "rl"]
    assert count[0] >= 5 and line["calls_per_response"] > 0 and line["programs_ok_share"] == 0.0
    assert line["programs_crashed"] > 0 and line["programs_timeout"] > 0
    check_programs(run_dir)

    # Replayed, none of them runs, and all is the same.
    monkeypatch.setattr(store, "open_sandbox", None)
    changes = (f"run_dir={str(tmp_path / 'again')!r}", f"sandbox.replay={str(run_dir)!r}")
    assert files(loop.train(configs.override(cfg, changes), Display())) == files(run_dir)


def command(*args):
    return subprocess.Popen(
        [sys.executable, "-m", "cir_jax.cli", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": ONE_DEVICE_FLAGS},
    )


@pytest.mark.slow
def test_command_line_train_ctrl_c_resume_eval(tmp_path):
    """SIGINT in mid-run: exit code 130 and a checkpoint; resumed, the last line is the run."""
    run_dir = str(tmp_path / "run")
    args = [
        "train",
        "configs/quickstart.toml",
        *TINY_RUN,
        f"run_dir={run_dir}",
        "sft.steps=0",
        "rl.steps=40",
    ]
    process = command(*args)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        path = tmp_path / "run" / metrics.METRICS
        if path.exists() and '"rl", "step": 1' in path.read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "resume=true" in out
    steps = [r["step"] for r in metrics.read(tmp_path / "run") if r["kind"] == "rl"]
    assert 0 < len(steps) < 40

    args[-1] = f"rl.steps={len(steps) + 1}"
    out, err = command(*args, "resume=true").communicate(timeout=120)
    assert out.splitlines()[-1] == run_dir, err
    resumed = [r["step"] for r in metrics.read(tmp_path / "run") if r["kind"] == "rl"]
    assert resumed == [*steps, len(steps) + 1]

    out, err = command("eval", run_dir).communicate(timeout=120)
    assert "after RL" in out, err
    out, err = command("export-hf", run_dir, str(tmp_path / "hf")).communicate(timeout=120)
    assert json.loads((tmp_path / "hf/config.json").read_text())["model_type"] == "qwen2", err


@pytest.mark.slow
def test_recipe_of_the_shipped_weights_reproduces(tmp_path):
    """The first steps of the cold start's recipe, against the record shipped beside its weights."""
    shipped = configs.asset_dir("package:quickstart/cold_start") / metrics.METRICS
    want = [json.loads(line) for line in shipped.read_text().splitlines()]
    want = [r for r in want if r["kind"] == "sft"][:8]
    steps = want[-1]["step"]
    cfg = configs.load(
        ROOT / "configs/quickstart_sft.toml",
        [f"run_dir={str(tmp_path / 'run')!r}", "eval.num_problems=9"],
    )

    class Enough(Exception):
        pass

    def stop(self, state, phase, step, critic=None):
        if step == steps:
            raise Enough

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Enough):
        patch.setattr(loop.Run, "save_if_due", stop)
        loop.train(cfg, Display())
    got = [r for r in metrics.read(tmp_path / "run") if r["kind"] == "sft"]
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-3)
        np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=5e-3)


def test_environment_of_the_run_is_left_alone(first):
    """Signal handlers are put back after a run."""
    assert signal.getsignal(signal.SIGINT) is SIGINT_HANDLER
    assert os.path.isdir(first / "checkpoints")
