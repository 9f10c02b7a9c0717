"""Attention: every back end computes what the plain one does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cir_jax import mesh as meshes
from cir_jax.config import ComputeConfig, MeshConfig
from cir_jax.models import attention

H = 16
# Rows of two packed segments and padding; rows of one; of three.
SEGMENTS = [[70, 30], [128], [1, 63, 40], [5]]


def inputs(T=128, N=4, K=2, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    B = len(SEGMENTS)
    q, k, v = (jnp.asarray(rng.normal(size=(B, T, n, H)), dtype) for n in (N, K, K))
    segments = np.zeros((B, T), np.int32)
    for row, lengths in enumerate(SEGMENTS):
        ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)[:T]
        segments[row, : len(ids)] = ids
    return (q, k, v), jnp.asarray(segments)


def by_hand(qkv, segments):
    """Query by query, in float64: softmax over the keys of its segment up to itself."""
    q, k, v = (np.asarray(x, np.float64) for x in qkv)
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(q.shape[:3]):
        s = np.arange(t + 1)[np.asarray(segments)[b, : t + 1] == segments[b, t]]
        kv = n // (q.shape[2] // k.shape[2])
        weights = np.exp(k[b, s, kv] @ q[b, t, n] / np.sqrt(H))
        out[b, t, n] = weights @ v[b, s, kv] / weights.sum()
    return out


def output_and_gradients(backend, qkv, segments):
    """The gradients of a weighted sum of the real tokens' outputs."""
    weight = np.random.default_rng(1).normal(size=qkv[0].shape).astype(np.float32)
    weight = jnp.where((segments > 0)[:, :, None, None], weight, 0.0)

    def loss(qkv):
        out = attention.attend_packed(*qkv, segments, backend)
        return jnp.sum(out * weight), out * (weight != 0)

    return jax.jit(jax.grad(loss, has_aux=True))(qkv)


@pytest.mark.parametrize("K", [1, 2, 4])
def test_the_plain_one_is_attention(K):
    qkv, segments = inputs(T=40, K=K)
    out = attention.attend_packed(*qkv, segments, "xla")
    np.testing.assert_allclose(out, by_hand(qkv, segments), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("T", [128, 100])
@pytest.mark.parametrize("K", [1, 2, 4])
def test_splash_is_the_plain_one(K, T):
    """Interpreted; rows that are no multiple of a tile's lanes as well."""
    qkv, segments = inputs(T=T, K=K)
    expected = output_and_gradients("xla", qkv, segments)
    got = output_and_gradients("splash", qkv, segments)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5), got, expected)


@pytest.mark.parametrize("inside", [False, True], ids=["all axes", "within the rows' axes"])
def test_splash_on_a_mesh(inside):
    """Rows and heads shared over eight devices, by one shard_map or by two nested ones."""
    qkv, segments = inputs()
    expected = attention.attend_packed(*qkv, segments, "xla")
    rows = ("batch", "length", "heads", "head_dim")
    with jax.set_mesh(meshes.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):

        def f(q, k, v, segments):
            return attention.attend_packed(q, k, v, segments, "splash")

        if inside:
            f = meshes.over_rows(f, (rows, rows, rows, ("batch", "length")), rows)
        got = jax.jit(f)(*qkv, segments)
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


def test_cudnn_is_called_with_the_packed_mask(monkeypatch):
    """Its kernel needs a GPU; what it is given is checked through jax's own XLA implementation."""
    qkv, segments = inputs(dtype=jnp.bfloat16)
    real, seen = jax.nn.dot_product_attention, []

    def on_xla(*args, implementation, **kwargs):
        seen.append(implementation)
        return real(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", on_xla)
    got = attention.attend_packed(*qkv, segments, "cudnn")
    expected = attention.attend_packed(*qkv, segments, "xla")
    assert seen == ["cudnn"]
    # bfloat16 has 8 bits: the weights are rounded before the sum in both.
    np.testing.assert_allclose(
        got.astype(jnp.float32), expected.astype(jnp.float32), rtol=0.03, atol=0.03
    )


@pytest.mark.parametrize(
    ("platform", "dtype", "expected"),
    [
        ("tpu", "bfloat16", "splash"),
        ("tpu", "float32", "splash"),
        ("gpu", "bfloat16", "cudnn"),
        ("gpu", "float32", "xla"),
        ("cpu", "bfloat16", "xla"),
    ],
)
def test_auto_is_the_platforms_best(monkeypatch, platform, dtype, expected):
    monkeypatch.setattr(meshes, "platform", lambda: platform)
    assert attention.backend(ComputeConfig(dtype=dtype)) == expected
    for name in attention.BACKENDS:
        assert attention.backend(ComputeConfig(dtype=dtype, attention=name)) == name


def test_the_platform_is_the_meshs():
    assert meshes.platform() == "cpu"
    with jax.set_mesh(meshes.make_mesh(MeshConfig(data=8))):
        assert meshes.platform() == "cpu"
