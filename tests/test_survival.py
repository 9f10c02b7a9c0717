"""What happens when something goes wrong: gates, watchdog, signals, other configs, other files."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from cir_jax import cli, diff_runs, exits, metrics
from cir_jax import config as configs
from cir_jax.config import ConfigError, GatesConfig, WatchdogConfig
from cir_jax.exits import Interrupted, RunError
from cir_jax.records import Author, ExecResult, Problem, Trajectory
from cir_jax.sandbox import canary
from cir_jax.sandbox.limits import Limits
from cir_jax.sandbox.store import Store
from cir_jax.train import resume, trace
from cir_jax.train.checkpoint import Place
from cir_jax.train.gates import Gates, Paused
from cir_jax.train.stopping import Stopper, exit_code
from cir_jax.watchdog import Watchdog
from cir_jax.workers import PoolError

ROOT = Path(__file__).parent.parent
RL = Place("rl", 5)


def load(*overrides):
    return configs.load(ROOT / "configs/quickstart.toml", overrides)


# --- another config


def test_other_keys_are_named_with_both_values():
    saved = configs.to_tree(load())
    cfg = load("rl.optim.learning_rate=1e-5", "rollout.temperature=0.5")
    with pytest.raises(ConfigError) as error:
        resume.check_config(cfg, saved, RL)
    assert "rl.optim.learning_rate=1e-05, was 0.0003" in str(error.value)
    assert "rollout.temperature=0.5, was 1.0" in str(error.value)
    for key in ("rl.optim.learning_rate", "rollout.temperature"):
        assert f"--override {key} " in str(error.value)
    allow = "resume_override=['rl.optim', 'rollout.temperature']"
    resume.check_config(load(allow, *_values(cfg)), saved, RL)
    with pytest.raises(ConfigError, match=r"config: rollout\.temperature=0\.5, was 1\.0; --ov"):
        resume.check_config(load("resume_override=['rl']", *_values(cfg)), saved, RL)
    resume.check_config(load("resume_override=['all']", *_values(cfg)), saved, RL)


def _values(cfg):
    learning_rate, temperature = cfg.rl.optim.learning_rate, cfg.rollout.temperature
    return f"rl.optim.learning_rate={learning_rate}", f"rollout.temperature={temperature}"


def test_keys_that_change_no_number_may_differ():
    saved = configs.to_tree(load())
    cfg = load("mesh.data=2", "checkpoint.every=3", "sandbox.num_workers=7", "watchdog.limit_s=9")
    resume.check_config(cfg, saved, RL)
    # As many steps as ever, unless learning rates depend on how many there are.
    resume.check_config(load("rl.steps=99"), saved, RL)
    cosine = "rl.optim.schedule=cosine"
    saved = configs.to_tree(load(cosine))
    resume.check_config(load(cosine, "rl.steps=99"), saved, Place("sft", 3))
    with pytest.raises(ConfigError, match="rl.steps=99, was 60"):
        resume.check_config(load(cosine, "rl.steps=99"), saved, RL)


def test_override_flag_may_stand_anywhere_and_set_a_value(monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "_run_phases", lambda cfg: seen.append(cfg) or 0)
    config = str(ROOT / "configs/quickstart.toml")
    args = ["--override", "rl.clip_low=0.1", "resume=true", "--override", "rollout"]
    assert cli.main(["train", config, *args]) == 0
    (cfg,) = seen
    assert cfg.resume and cfg.rl.clip_low == 0.1
    assert cfg.resume_override == ("rl.clip_low", "rollout")
    assert cli.main(["train", config, "--override", "rl.clip_lo=0.1"]) == cli.EXIT_CONFIG


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["resume_step=3"], "resume_step=3: only with resume=true"),
        (["resume=true", "resume_override=['rl.stps']"], "resume_override: rl.stps: .*rl.steps"),
    ],
)
def test_keys_that_mean_nothing(overrides, message):
    with pytest.raises(ConfigError, match=message):
        resume.check_keys(load(*overrides))


def test_one_process_a_run_directory(tmp_path):
    hold = "import sys, fcntl, os, time; f = os.open(sys.argv[1], os.O_RDONLY)"
    hold += "; fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        with pytest.raises(ConfigError, match="another process trains in it"):
            with resume.alone_in(tmp_path):
                pass
        other.kill()
        other.wait()
    with resume.alone_in(tmp_path):
        pass


# --- growing files


def test_files_are_cut_never_stretched(tmp_path):
    writer = metrics.MetricsWriter(tmp_path)
    for step in range(3):
        writer.write("rl", step, {"reward": 0.5}, {})
    sizes = writer.sizes()
    writer.write("rl", 3, {"reward": 0.5}, {})
    longer = (tmp_path / metrics.METRICS).read_bytes()
    assert resume.shorter(tmp_path, sizes) == resume.missing(tmp_path, sizes) == ""
    writer.truncate(sizes)
    writer.write("rl", 3, {"reward": 0.5}, {})
    # The chain goes on as if nothing had been cut.
    assert (tmp_path / metrics.METRICS).read_bytes() == longer
    os.truncate(tmp_path / metrics.METRICS, 10)
    assert "metrics.jsonl has 10 bytes, and had" in resume.shorter(tmp_path, sizes)
    (tmp_path / metrics.METRICS).unlink()
    assert resume.shorter(tmp_path, sizes) == ""
    assert "begun anew: metrics.jsonl" in resume.missing(tmp_path, sizes)
    (tmp_path / metrics.METRICS).touch()
    assert resume.shorter(tmp_path, sizes) == ""
    assert "begun anew: metrics.jsonl" in resume.missing(tmp_path, sizes)
    writer.truncate(sizes)
    assert (tmp_path / metrics.METRICS).read_bytes() == b""


def test_chain_sees_a_changed_line(tmp_path):
    writer = metrics.MetricsWriter(tmp_path)
    for step in range(4):
        writer.write("rl", step, {"reward": step / 7, "loss": float("nan")}, {})
    lines = metrics.read(tmp_path)
    assert metrics.broken_link(lines) is None
    lines[2]["reward"] += 1e-16
    lines[2]["reward"] = np.nextafter(lines[2]["reward"], 1.0).item()
    assert metrics.broken_link(lines) == 2
    assert metrics.broken_link(metrics.read(tmp_path)[1:]) == 0


class _Executor:
    """Answers at once; the answer can be seen before anyone else hears of it."""

    limits, description = Limits(timeout_s=1.0, memory_bytes=1), {"rung": "none"}

    def submit(self, code, *, seed=0):
        from concurrent.futures import Future

        future = Future()
        future.set_result(ExecResult("ok", code))
        return future

    def stats(self):
        return {}

    def close(self):
        pass


def test_record_of_programs_is_cut_with_the_rest(tmp_path):
    path = tmp_path / "programs.jsonl"
    with Store(_Executor(), path, recheck_share=0.0) as record:
        record.submit("one")
        size = record.size()
        assert size == path.stat().st_size and b'"one"' in path.read_bytes()
        record.submit("two")
    with Store(_Executor(), path, recheck_share=0.0) as record:
        record.truncate(size)
        record.submit("three")
    text = path.read_text()
    assert '"one"' in text and '"three"' in text and '"two"' not in text
    assert text.count('"settings"') == 2


def test_folder_of_a_killed_check_of_the_sandbox_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left = tmp_path / "cir_jax_canary_left"
    left.mkdir()
    (left / "file").touch()
    with canary._open_folder() as one, canary._open_folder() as other:
        # Not of one that is in use.
        assert {p.name for p in tmp_path.iterdir()} == {Path(one).name, Path(other).name}
    assert not list(tmp_path.iterdir())


# --- gates

FINE = {"sampler_kl": 0.001, "skipped": 0.0}


def test_gates_let_through_what_is_fine():
    notes = []
    gates = Gates(GatesConfig(), notes.append)
    gates.check(1, FINE, "")
    assert not notes


@pytest.mark.parametrize("kl", [0.2, float("nan"), float("inf")])
def test_gate_on_mismatch(kl):
    notes = []
    figures = FINE | {"sampler_kl": kl}
    gates = Gates(GatesConfig(), notes.append)
    for step in range(8):
        gates.check(step, figures, "")
    # At each doubling: the 1st, 2nd, 4th and 8th time.
    assert len(notes) == 4 and "sampler_kl" in notes[0] and "8 times" in notes[-1]
    with pytest.raises(Paused, match="disagree"):
        Gates(GatesConfig(on_mismatch="pause"), notes.append).check(1, figures, "")
    with pytest.raises(RunError, match="RL step 1: .*disagree") as error:
        Gates(GatesConfig(on_mismatch="stop"), notes.append).check(1, figures, "")
    assert error.value.code == exits.GATE


def test_gate_on_steps_without_an_update():
    notes = []
    gates = Gates(GatesConfig(skipped_steps=2), notes.append)
    skipped = FINE | {"skipped": 1.0}
    for figures in (skipped, FINE | {"skipped": 0.5}, skipped):
        gates.check(1, figures, "")
        assert gates.in_doubt == (figures is skipped)  # then the step is not saved
    assert any("50% of the updates" in note for note in notes)
    with pytest.raises(RunError, match="RL step 4: 2 steps in a row"):
        gates.check(4, skipped, "")
    goes_on = Gates(GatesConfig(skipped_steps=2, on_skipped="warn"), notes.append)
    goes_on.check(1, skipped, "")
    assert not goes_on.in_doubt


def test_parameters_that_are_not_finite_end_the_run():
    with pytest.raises(RunError, match="RL step 7: parameter embed is not finite"):
        Gates(GatesConfig(), print).check(7, FINE, "embed")


# --- watchdog


def test_watchdog_prints_stacks_once_per_doubling(tmp_path):
    with open(tmp_path / "out", "w+") as out:
        watchdog = Watchdog(WatchdogConfig(factor=2.0, min_s=0.1), out)
        for step in range(3):
            watchdog.begin("RL step", step)
        watchdog.begin("RL step", 3)
        time.sleep(0.5)
        watchdog.end()
        time.sleep(0.2)
        watchdog.close()
        out.seek(0)
        text = out.read()
    # After 0.1, 0.2 and 0.4 seconds.
    assert text.count("RL step 3 has taken") == 3
    assert "the median of 3 is 0.0 s" in text
    assert "test_watchdog_prints_stacks_once_per_doubling" in text
    assert "RL step 2" not in text


def test_watchdog_ends_a_process_that_hangs():
    code = (
        "import time\nfrom cir_jax.config import WatchdogConfig\n"
        "from cir_jax.watchdog import Watchdog\n"
        "Watchdog(WatchdogConfig(limit_s=0.2)).begin('RL step', 1)\n"
        "def stalled():\n    time.sleep(60)\nstalled()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == exits.AGAIN
    assert "in stalled" in done.stderr and "watchdog.limit_s=0.2: ended" in done.stderr


# --- signals


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_what_may_be_dropped_ends_at_once(signum):
    stopper = Stopper(lambda text: None, lambda: None)
    with stopper.listening():
        with pytest.raises(Interrupted) as error, stopper.droppable():
            os.kill(os.getpid(), signum)
            time.sleep(5)
        assert error.value.signum == signum
        # Asked already: nothing that may be dropped is begun.
        with pytest.raises(Interrupted), stopper.droppable():
            raise AssertionError


def test_nohup_counts():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stopper = Stopper(lambda text: None, lambda: None)
        with stopper.listening(), stopper.droppable():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.1)
        assert not stopper.signum
    finally:
        signal.signal(signal.SIGHUP, before)


def test_sigterm_and_ctrl_c_outside_of_what_may_be_dropped():
    stopper = Stopper(lambda text: None, lambda: None)
    with stopper.listening(), stopper.droppable():
        os.kill(os.getpid(), signal.SIGINT)
    assert stopper.signum == signal.SIGINT
    stopper = Stopper(lambda text: None, lambda: None)
    with stopper.listening():
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopper.signum == signal.SIGTERM


def test_a_machine_that_lets_no_worker_start_is_tried_again():
    assert exit_code(PoolError("3 times in a row")) == exits.AGAIN
    assert exit_code(RuntimeError("a fault of the program's")) is None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.ENOENT, errno.ENOTDIR])
def test_a_disk_that_is_full_or_gone_has_a_code(number):
    error = OSError(number, os.strerror(number), "runs/a/metrics.jsonl")
    assert exit_code(error) == exits.IO
    assert str(exits.storage_error(error)).startswith("runs/a/metrics.jsonl: ")


def test_a_job_outlasts_whoever_reads_its_output():
    code = (
        "import sys\nfrom cir_jax.train.display import Display\n"
        "display = Display()\ndisplay.note('begins')\nsys.stdin.readline()\n"
        "for stream in (sys.stdout, sys.stderr):\n"
        "    for _ in range(2):\n        print('lost', file=stream)\n"
        "display.note('lost')\ndisplay.begin('RL', 2)\ndisplay.step(2, {'reward': 1.0})\n"
        "open(sys.argv[1], 'w').write('went on')\n"
    )
    reader, writer = os.pipe()
    with tempfile.NamedTemporaryFile("r") as file:
        job = subprocess.Popen(
            [sys.executable, "-c", code, file.name],
            stdin=subprocess.PIPE,
            stdout=writer,
            stderr=writer,
        )
        os.close(writer)
        assert os.read(reader, 100) == b"begins\n"
        os.close(reader)
        job.communicate(b"\n", timeout=60)
        assert job.returncode == 0 and file.read() == "went on"


# --- where two runs differ


def row(sample, ids, *, author=None, logp=0.5):
    ids = np.array(ids)
    author = np.full(len(ids), Author.MODEL) if author is None else np.array(author)
    problem = Problem(f"p{sample}", "sum", "q", "a", "math")
    return Trajectory(problem, sample, ids, author, np.full(len(ids), logp), (), "eos")


@pytest.fixture
def twins(tmp_path):
    """Two equal runs of two steps; a function that writes another step to both."""
    runs = tmp_path / "a", tmp_path / "b"
    writers = []
    for run_dir in runs:
        run_dir.mkdir()
        writers.append(metrics.MetricsWriter(run_dir))

    def step(number, rows, others=None, *, leaves=None, others_leaves=None, keep=True):
        for run_dir, writer, own, own_leaves in zip(
            runs, writers, (rows, others or rows), (leaves, others_leaves or leaves), strict=True
        ):
            arrays = trace.step_arrays(own, [float(r.sample) for r in own])
            own_leaves = own_leaves or {"w": "0", "x": "1"}
            figures = {
                "reward": 0.5,
                "batch_digest": trace.batch_digest(arrays),
                "params_digest": "-".join(own_leaves.values()),
            }
            if keep:
                trace.write(run_dir, number, arrays, own_leaves)
            writer.write("rl", number, figures, {})

    for number in (1, 2):
        step(number, [row(0, [1, 2, 3]), row(1, [4, 5])])
    step.runs = runs
    return step


def diff(runs, capsys):
    code = cli.main(["diff-runs", *map(str, runs)])
    return code, capsys.readouterr().out


def test_equal_runs_do_not_differ(twins, capsys):
    code, out = diff(twins.runs, capsys)
    assert code == 0 and "no difference in 2 lines, up to rl step 2; both end there" in out
    shutil.rmtree(twins.runs[1])
    shutil.copytree(twins.runs[0], twins.runs[1])
    twins(3, [row(0, [1])])
    with open(twins.runs[0] / metrics.METRICS, "a") as file:
        file.write('{"kind": "rl", "step": 4, "reward": 1.0}\n')
    code, out = diff(twins.runs, capsys)
    assert code == 0 and "one goes on" in out
    assert "line 4 of metrics.jsonl is not as it was written" in out


def test_first_difference_is_named(twins, capsys):
    same = row(0, [1, 2, 3])
    tool = [Author.PROMPT, Author.MODEL, Author.TOOL, Author.TOOL]
    rows = [same, row(1, [4, 5, 6, 7], author=tool)]
    twins(3, rows, [same, row(1, [4, 5, 6, 8], author=tool)])
    twins(4, rows, [row(0, [9, 9, 9]), rows[1]])
    code, out = diff(twins.runs, capsys)
    assert code == 1
    assert out.splitlines() == [
        "first difference: rl step 3",
        "row: 1 (problem p1, sample 1)",
        "token: 3",
        "quantity: token (written by: tool): 7 and 8",
    ]


@pytest.mark.parametrize(
    "other, token, quantity",
    [
        (row(0, [1, 2, 3], logp=0.25), "0", "log-probability (written by: model): 0.5 and 0.25"),
        (row(0, [1, 2, 3], author=[1, 1, 2]), "2", "author (written by: model): model and tool"),
        (row(0, [1, 2, 3, 4]), None, "length: 3 and 4"),
        (row(5, [1, 2, 3]), None, "problem: p0 and p5"),
    ],
)
def test_each_quantity_of_a_row_is_compared(twins, capsys, other, token, quantity):
    twins(3, [row(0, [1, 2, 3])], [other])
    _, out = diff(twins.runs, capsys)
    assert f"quantity: {quantity}" in out
    assert (f"token: {token}" in out) == (token is not None)


def test_a_difference_in_the_update_alone(twins, capsys):
    twins(3, [row(0, [1])], leaves={"w": "0", "x": "1"}, others_leaves={"w": "0", "x": "2"})
    _, out = diff(twins.runs, capsys)
    assert "params_digest: 0-1 and 0-2; all rows are the same" in out
    assert "1 leaves differ, first x" in out


def test_without_rollouts_the_metric_is_named(twins, capsys):
    twins(3, [row(0, [1])], [row(0, [2])], keep=False)
    _, out = diff(twins.runs, capsys)
    assert "first difference: rl step 3\nquantity: batch_digest: " in out


def test_what_is_no_run_is_an_error(tmp_path, capsys):
    assert cli.main(["diff-runs", str(tmp_path), str(tmp_path)]) == cli.EXIT_CONFIG
    assert "RUN_A=" in capsys.readouterr().err


def test_rollouts_of_later_steps_are_dropped(twins):
    run_dir = twins.runs[0]
    (run_dir / "rollouts/000002.1.npz").touch()
    assert [p.name for p in trace.files_of(run_dir, 2)] == ["000002.npz", "000002.1.npz"]
    trace.drop_after(run_dir, 1)
    assert sorted(p.name for p in (run_dir / trace.ROLLOUTS).iterdir()) == ["000001.npz"]
    assert diff_runs._step(run_dir, 2) == {}
