"""`cir-jax bench save`: what a checkpoint, and the digests of each step, cost beside a step."""

import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from cir_jax import mesh as meshes
from cir_jax.bench.update_jax import random_batch
from cir_jax.config import (
    CheckpointConfig,
    ComputeConfig,
    ConfigError,
    MeshConfig,
    OptimConfig,
    RLConfig,
    preset,
)
from cir_jax.train.checkpoint import Checkpoints, Place
from cir_jax.train.digest import params_digest
from cir_jax.train.state import init_params, init_state, make_optimizer
from cir_jax.train.step import Given, make_update, rl_loss_fn

_WARM = 2
"""Saves before the measurement: the first makes the copies and, as the second, new files."""


def bench_save(*, model: str, batch: int, length: int, updates: int, rounds: int):
    """Prints one line of JSON.

    A step is `updates` updates of batch x length tokens, without its rollouts: less than a real
    one. Steps take turns, `rounds` of each kind: in one a checkpoint is saved at the beginning, and
    if its writing in the background outlasts the step it is waited for; in the other none is.
    save_s: by how much longer the first kind is; it is not known better than to step_sd_s, the
    standard deviation of the other kind's seconds. blocked_s: how long the call takes.
    step_share: save_s by the seconds of a step. digest_s: of the parameters' digest, each step.
    """
    try:
        cfg = preset(model)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    mesh = meshes.make_mesh(MeshConfig(fsdp=jax.device_count()))
    jax.set_mesh(mesh)
    optimizer = make_optimizer(OptimConfig(), 0)
    state = init_state(init_params(cfg, mesh, 0), cfg, mesh, optimizer)
    compute = ComputeConfig(dtype="float32", remat="minimal")
    update = make_update(cfg, compute, mesh, optimizer, rl_loss_fn(RLConfig()))
    rows = jax.device_put(
        random_batch(cfg.vocab_size, batch, length), meshes.sharding(mesh, None, "batch", "length")
    )
    one = jnp.int32(1), jnp.float32(1.0)
    folder = Path(tempfile.mkdtemp(prefix="cir_jax_bench_"))
    checkpoints = Checkpoints(
        folder, CheckpointConfig(keep=1, keep_best=0, max_failures=1), writes=True
    )
    seconds: dict[str, list[float]] = {"plain": [], "saving": [], "blocked": [], "digest": []}

    def run(kind: str, number: int) -> None:
        nonlocal state
        began = time.perf_counter()
        if kind == "saving":
            checkpoints.save(state, Place("rl", number))
            seconds["blocked"].append(time.perf_counter() - began)
        for _ in range(updates):
            state, _ = update(state, rows, Given(), *one)
        jax.block_until_ready(state)
        updated = time.perf_counter()
        params_digest(state.params)
        seconds["digest"].append(time.perf_counter() - updated)
        checkpoints.settle(wait=True)
        seconds[kind].append(time.perf_counter() - began)

    try:
        for _ in range(_WARM):
            run("saving", 0)
        for times in seconds.values():
            times.clear()
        for number in range(1, rounds + 1):
            run("plain", number)
            run("saving", number)
        checkpoints.close()
    finally:
        shutil.rmtree(folder)
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    save_s = middle["saving"] - middle["plain"]
    print(
        json.dumps(
            {
                "bench": "save",
                "model": model,
                "batch": batch,
                "length": length,
                "updates": updates,
                "rounds": rounds,
                "state_bytes": sum(x.nbytes for x in jax.tree.leaves(state)),
                "step_s": middle["plain"],
                "step_sd_s": statistics.stdev(seconds["plain"]) if rounds > 1 else None,
                "save_s": save_s,
                "blocked_s": middle["blocked"],
                "step_share": save_s / middle["plain"],
                "digest_s": middle["digest"],
                "digest_share": middle["digest"] / middle["plain"],
            }
        )
    )
