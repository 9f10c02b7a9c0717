"""The contender of `bench update` that is this package: the trainer's own gradients."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from cir_jax import mesh as meshes
from cir_jax.bench.ceiling import seconds
from cir_jax.bench.ceiling_jax import products, wait
from cir_jax.bench.contest import Figures, serve
from cir_jax.config import ComputeConfig, MeshConfig, RLConfig, preset
from cir_jax.rl.batch import TrainBatch
from cir_jax.train.state import init_params
from cir_jax.train.step import Given, gradients, rl_loss_fn


def start(*, model: str, batch: int, length: int, dtype: str, remat: str) -> Callable[[], Figures]:
    cfg = preset(model)
    mesh = meshes.make_mesh(MeshConfig(fsdp=jax.device_count()))
    jax.set_mesh(mesh)
    params = init_params(cfg, mesh, 0)
    rows = meshes.sharding(mesh, None, "batch", "length")
    data = jax.device_put(random_batch(cfg.vocab_size, batch, length), rows)
    old_logp = jax.device_put(
        np.full((1, batch, length), -np.log(cfg.vocab_size), np.float32), rows
    )
    gradient = jax.jit(
        gradients(cfg, ComputeConfig(dtype=dtype, remat=remat), rl_loss_fn(RLConfig()))
    )
    step = wait(gradient, params, data, Given(old_logp), jnp.int32(1), jnp.float32(1.0))
    ceiling = products(mesh, dtype)

    def measure() -> Figures:
        return {"matmul_flops_per_s": ceiling(), "seconds": seconds(step)}

    return measure


def random_batch(vocab_size: int, rows: int, length: int) -> TrainBatch:
    """One micro-batch of rows of one trajectory each, all of whose tokens are trained."""
    rng = np.random.default_rng(0)
    shape = (1, rows, length)
    return TrainBatch(
        ids=rng.integers(0, vocab_size, shape, np.int32),
        positions=np.broadcast_to(np.arange(length, dtype=np.int32), shape),
        segment_ids=np.ones(shape, np.int32),
        sampled=np.ones(shape, bool),
        trained=np.ones(shape, bool),
        weight=np.ones(shape, np.float32),
        sampler_logp=np.zeros(shape, np.float32),
        advantage=np.broadcast_to(rng.normal(size=(1, rows, 1)), shape).astype(np.float32),
    )


if __name__ == "__main__":
    serve(start)
