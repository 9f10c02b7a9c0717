"""Evaluations by the command line: the whole suite, one that is killed, and one of two hosts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_processes import free_port

from cir_jax.evals.samples import PARTS
from cir_jax.metrics import SAMPLES, TIMINGS

ROOT = Path(__file__).parent.parent
CONFIG = "configs/quickstart.toml"
TABLES = (
    "Accuracy",
    "Compared",
    "pass@k",
    "Accuracy against tokens",
    "Budgets",
    "By type of problem",
    "Code",
    "Behaviours",
)
HELD_OUT = ("--samples", "2", "--problems", "20", "--tools", "both", "--part", "5")


def start(*args):
    return subprocess.Popen(
        [sys.executable, *args],
        cwd=ROOT,
        # One device, and fast machine code.
        env=os.environ | {"XLA_FLAGS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def command(*args):
    return start("-m", "cir_jax.cli", "eval", *args)


def told_by(process):
    try:
        out, errors = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, errors[-3000:]
    return out


@pytest.mark.slow
def test_a_random_model_takes_the_whole_suite(shared, tmp_path):
    """Five benchmarks, two prompts, two budgets, by one command in less than three minutes."""
    begun = time.monotonic()
    args = [CONFIG, "sft.weights=", "rollout.slots=32", "rollout.prefill_chunk=256"]
    args += ["--suite", "cir"]
    args += ["--data-dir", str(shared / "data/benchmarks"), "--out", str(tmp_path / "out")]
    args += ["--samples", "2", "--problems", "8", "--max-response-tokens", "64"]
    told = told_by(command(*args, "--budgets", "0", "2"))
    assert time.monotonic() - begun < 180
    for title in TABLES:
        assert f"### {title}\n" in told
    for name in ("math500", "amc23", "aime24", "aime25", "olymmath_en_easy", "mean of tasks"):
        assert f"| text | {name} |" in told
    lines = [json.loads(line) for line in (tmp_path / "out" / SAMPLES).read_text().splitlines()]
    # MATH500 is greedy, once; the others twice; two prompts and two more budgets.
    assert len(lines) == 4 * 8 * (1 + 4 * 2)


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_with_the_same_bytes(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    told_by(command(CONFIG, *HELD_OUT, "--out", str(whole)))
    process = command(CONFIG, *HELD_OUT, "--out", str(killed))
    deadline = time.monotonic() + 120
    while len(list((killed / PARTS).glob("*.jsonl"))) < 2 and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (killed / SAMPLES).exists()
    told = told_by(command(CONFIG, *HELD_OUT, "--out", str(killed)))
    assert (killed / SAMPLES).read_bytes() == (whole / SAMPLES).read_bytes()
    assert "before RL" not in told and "### Compared\n" in told
    timings = (killed / TIMINGS).read_text().splitlines()
    assert len(timings) == len((whole / TIMINGS).read_text().splitlines()) == 2 * 2 * 20


PROGRAM = """
import json, os, sys
from pathlib import Path

index, count, port, out = json.loads(sys.argv[1])
place = {"COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "NUM_PROCESSES": count, "PROCESS_ID": index}
os.environ |= {f"JAX_{name}": str(value) for name, value in place.items()}

from cir_jax.evaluation.model import find_model
from cir_jax.evaluation.run import Request, evaluate
from cir_jax.train import preflight
from cir_jax.train.display import Display

keys = ["rollout.slots=8", f"mesh.fsdp={count}"]
model = find_model("configs/quickstart.toml", {}, keys, [])
asked = Request(None, Path("."), "on", samples=2, problems=11, part=3, counterfactual=True)
with preflight.with_others(model.cfg):
    evaluate(model, asked, Path(out), Display())
"""


@pytest.mark.slow
def test_two_hosts_write_what_one_does(tmp_path):
    found = []
    for count in (1, 2):
        out, port = tmp_path / str(count), free_port()
        processes = [
            start("-c", PROGRAM, json.dumps([index, count, port, str(out)]))
            for index in range(count)
        ]
        try:
            for process in processes:
                told_by(process)
        finally:
            for process in processes:
                process.kill()
        found.append([json.loads(line) for line in (out / SAMPLES).read_text().splitlines()])
    # Log-probabilities are sums in another order on two devices.
    for one, two in zip(*found, strict=True):
        assert one.pop("logp") == pytest.approx(two.pop("logp"), abs=2e-3)
        assert one == two
    assert any(line["fork"] for line in found[0])
