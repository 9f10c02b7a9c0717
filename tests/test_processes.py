"""The engine over two processes: each runs the programs of its own rows, and tokens are the same.

The processes stand for two hosts of a TPU slice: they find each other over the network, each has a
device of a common mesh, and each has slots, problems and a sandbox of its own.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAM = """
import json, sys
import jax

index, count, port, slow = json.loads(sys.argv[1])
if count > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", count, index)

import time
from cir_jax import config as configs, mesh as meshes
from cir_jax.config import MeshConfig
from cir_jax.data import pipeline, sources
from cir_jax.models import hf
from cir_jax.rollout.engine import Engine
from cir_jax.rollout.sampling import Sampling
from cir_jax.sandbox.pool import Sandbox
from cir_jax.tokenizer import Tokenizer

cfg = configs.load("configs/quickstart.toml", [])
mesh = meshes.make_mesh(MeshConfig(fsdp=jax.device_count()))
with Sandbox(num_workers=1) as sandbox, jax.set_mesh(mesh):
    engine = Engine(
        cfg.model,
        cfg.rollout.model_copy(update={"slots": 8}),
        Tokenizer(configs.asset_dir(cfg.tokenizer)),
        sandbox,
        template=cfg.data.template,
        chat=cfg.data.chat,
        max_prompt_tokens=cfg.data.max_prompt_tokens,
        dtype="float32",
        seed=0,
    )
    if slow:  # a host whose programs take long
        submit = sandbox.submit
        sandbox.submit = lambda *args, **kwargs: (time.sleep(0.2), submit(*args, **kwargs))[1]
    params = hf.load(configs.asset_dir(cfg.sft.weights), cfg.model, mesh)
    # An odd number of problems: one process has more to do than the other.
    groups, stats = engine.rollout(
        params,
        pipeline.first_problems(sources.of_tasks(cfg.data.tasks, "eval"), 11),
        samples=2,
        max_calls=2,
        sampling=Sampling(1.0),
        phase="test",
        step=0,
    )
    print(json.dumps({
        "rows": [[t.problem.problem_id, t.sample, t.ids.tolist(), t.author.tolist()]
                 for group in groups for t in group],
        "calls": sum(len(t.calls) for group in groups for t in group),
        "segments": stats.num_segments,
    }), flush=True)
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def run(count: int) -> list[dict]:
    """What each of `count` processes found, in order."""
    port = free_port()
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1 "
        "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, json.dumps([index, count, port, index == 1])],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


@pytest.mark.slow
def test_two_processes_share_the_rows():
    (alone,) = run(1)
    both = run(2)
    # 11 problems: the first five are the first process's, in order.
    assert [len(part["rows"]) for part in both] == [10, 12]
    assert both[0]["rows"] + both[1]["rows"] == alone["rows"]
    assert all(part["calls"] for part in both)
    # They launched the same programs equally often.
    assert both[0]["segments"] == both[1]["segments"]
