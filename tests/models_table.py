"""The tiny models and runs that tests use, and what goes into them."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cir_jax import config as configs
from cir_jax.config import ModelConfig, YarnConfig
from cir_jax.models import qwen

TOKENIZER = configs.asset_dir("package:quickstart/tokenizer")
# XLA's flags for processes that a test starts.
ONE_DEVICE_FLAGS = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
# Overrides of configs/quickstart.toml that make a run of seconds.
TINY_RUN = (
    "sft.weights=''",
    "sft.steps=3",
    "sft.num_trajectories=64",
    "sft.batch_size=16",
    "sft.micro_rows=8",
    "rl.steps=2",
    "rl.minibatch_prompts=2",
    "rl.micro_rows=8",
    "rollout.prompts_per_step=4",
    "rollout.samples_per_prompt=2",
    "rollout.slots=8",
    "rollout.prefill_rows=8",
    "rollout.max_response_tokens=56",
    "eval.num_problems=9",
    "checkpoint.every=1",
    "checkpoint.keep=9",
    "sandbox.num_workers=1",
    "samples_per_log=2",
    "model.num_layers=2",
    "model.width=32",
    "model.head_dim=8",
    "model.mlp_width=32",
)

# No value is a model's default, so that a lost setting shows.
QWEN2 = ModelConfig(
    vocab_size=64,
    width=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_width=40,
    rope_theta=500.0,
    norm_eps=1e-5,
    max_positions=256,
)
UNTIED = QWEN2.model_copy(update={"tied_embeddings": False})
# Heads wider than width / num_heads, as in Qwen3.
QWEN3 = UNTIED.model_copy(update={"qkv_bias": False, "qk_norm": True, "head_dim": 10})
# Within 64 positions, pairs of heads of 6, 10 and 16 turn from 10 times to below 0.2 times: the
# ramp from 8 turns to 0.5 has pairs below, on and above it.
YARN = YarnConfig(factor=4.0, original_length=64, beta_fast=8.0, beta_slow=0.5)
OTHER_YARN = YARN.model_copy(update={"attention_factor": 1.3, "truncate": False})

TIED, EACH_ITS_OWN = {"tied_embeddings": True}, {"num_kv_heads": 4}
SEVEN = {"num_heads": 14, "num_kv_heads": 2}
MODELS = {
    "qwen2": QWEN2,
    "qwen2-gqa1": QWEN2.model_copy(update=EACH_ITS_OWN),
    "qwen2-untied-yarn": UNTIED.model_copy(update={"yarn": OTHER_YARN, "head_dim": 16}),
    "qwen2-gqa7-yarn": QWEN2.model_copy(update=SEVEN | {"yarn": YARN}),
    "qwen3": QWEN3,
    "qwen3-tied": QWEN3.model_copy(update=TIED),
    "qwen3-gqa1-yarn": QWEN3.model_copy(update=EACH_ITS_OWN | {"yarn": YARN}),
    "qwen3-gqa7": QWEN3.model_copy(update=SEVEN),
}  # fmt: skip
both_families = pytest.mark.parametrize("cfg", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])


def settings(cfg):
    """What MODELS varies: family, ties, query heads per key/value head, YaRN."""
    family = "qwen3" if cfg.qk_norm else "qwen2"
    return family, cfg.tied_embeddings, cfg.num_heads // cfg.num_kv_heads, cfg.yarn is not None


@functools.cache
def params_of(cfg, dtype=jnp.float32):
    """Random values everywhere: biases and norms too, which are 0 and 1 at the start."""
    rng = np.random.default_rng(0)

    def leaf(path, x):
        return jnp.asarray(rng.normal(path[-1].key == "scale", 0.3, x.shape), dtype)

    return jax.tree_util.tree_map_with_path(leaf, qwen.abstract_params(cfg))


@functools.cache
def one_device():
    devices = np.array(jax.devices()[:1]).reshape(1, 1, 1)
    return jax.sharding.Mesh(devices, ("data", "fsdp", "tensor"))


def random_ids(shape, seed=0):
    return np.random.default_rng(seed).integers(0, QWEN2.vocab_size, shape)


def pack_rows(segments, length):
    """One row per list of id arrays: ids, positions, segment_ids; 0 is padding."""
    arrays = np.zeros((3, len(segments), length), np.int32)
    for r, row in enumerate(segments):
        at = 0
        for n, ids in enumerate(row, start=1):
            arrays[:, r, at : at + len(ids)] = ids, np.arange(len(ids)), np.full(len(ids), n)
            at += len(ids)
    return arrays


def assert_near(got, expected, tolerance):
    """Largest difference, relative to the largest value."""
    difference = np.abs(np.asarray(got) - np.asarray(expected)).max()
    assert difference <= tolerance * np.abs(np.asarray(expected)).max()


def assert_same(got, expected):
    """Bit by bit, types too."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)
