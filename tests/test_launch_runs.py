"""Whole runs under tpu_scripts: on processes of this machine, and through pre-emption."""

import os
import socket
import subprocess
import sys

import pods
import pytest
from cloud import ROOT, SCRIPTS, Cloud
from models_table import TINY_RUN

from cir_jax import metrics
from cir_jax.sandbox import packages

TINY = (
    *(o for o in TINY_RUN if not o.startswith(("sft.", "eval.", "rl.steps", "sandbox."))),
    "sft.weights=''",
    "sft.steps=0",
    "eval.num_problems=0",
    "rl.steps=4",
    "sandbox.num_workers=1",
)
FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"


def environment(tmp_path):
    """With `cir-jax` on PATH, and nothing of the test's own devices."""
    programs = tmp_path / "programs"
    programs.mkdir()
    program = programs / "cir-jax"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m cir_jax.cli "$@"\n')
    program.chmod(0o755)
    return os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": FLAGS,
        "CIR_POLL": "0.2",
        "CIR_LOCAL": str(tmp_path / "local"),
        "CIR_LAUNCH_PYTHON": sys.executable,
    }


def tokens(run):
    return [
        [(line["step"], line["problem_id"], line["sample"], line["ids"])]
        for line in metrics.read(run, metrics.SAMPLES)
    ]


@pytest.mark.slow
def test_the_laptops_command_line_runs_on_a_local_pod(tmp_path):
    command = ["cir-jax", "train", "configs/quickstart.toml", *TINY, "rl.steps=2"]
    env = environment(tmp_path)
    alone, pod = tmp_path / "alone", tmp_path / "pod"
    subprocess.run([*command, f"run_dir={str(alone)!r}"], env=env, cwd=ROOT, check=True)
    script = ["bash", str(SCRIPTS / "local_pod.sh"), "--processes=2", "--devices=4"]
    script += [f"--run-dir={pod}", "--retries=0", "--", *command]
    done = subprocess.run(script, env=env, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert tokens(pod) == tokens(alone) and len(tokens(pod)) == 4
    assert done.stdout.splitlines()[-2] == str(pod)
    # Nothing goes on, and the same command finds all done.
    again = subprocess.run(script, env=env, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert again.returncode == 0 and "attempt 2" not in again.stdout


@pytest.mark.slow
def test_a_preempted_run_ends_with_the_parameters_of_an_undisturbed_one(tmp_path):
    """No capacity at first; both hosts killed at the second checkpoint; a new slice; the end."""
    quiet, run = tmp_path / "quiet", tmp_path / "run"
    words = ("train", "configs/quickstart.toml", *TINY, "mesh.data=2", "mesh.fsdp=4")
    words += (f"sandbox.runtime={packages.default_folder()}",)
    pods.start(tmp_path, 2, 4, *pods.CLI, *words, f"run_dir={quiet}").check()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cloud = Cloud(
        tmp_path,
        replies={"create": [[1, "There is no more capacity in the zone"]]},
        preempt=[str(run / "checkpoints/3")],
        port=port,
        env={
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": os.environ["JAX_COMPILATION_CACHE_DIR"],
            "HF_HUB_OFFLINE": "1",
            "XLA_FLAGS": f"{FLAGS} --xla_force_host_platform_device_count=4",
        },
    )
    cloud.env |= {"CIR_POLL": "0.2", "CIR_SOURCE": str(ROOT)}
    try:
        script = cloud.command("watch", "--name=a", "--zone=us-a", "--type=v4-16", "--spot")
        script += ["--ttl=1h", f"--python={sys.executable}", f"--run-dir={run}"]
        done = subprocess.run(
            [*script, "--", "cir-jax", *words],
            env=cloud.env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert cloud.changes() == ["create", "create", "scp", "delete", "create", "scp", "delete"]
        assert "resuming after" in done.stdout
    finally:
        cloud.end()
    last = [metrics.read(d)[-1] for d in (quiet, run)]
    assert last[0]["params_digest"] == last[1]["params_digest"] and last[0] == last[1]
