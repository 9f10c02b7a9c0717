"""The update: micro-batching, meshes, masks and non-finite gradients on a tiny model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cir_jax import mesh as meshes
from cir_jax.config import MeshConfig, ModelConfig, OptimConfig, RLConfig
from cir_jax.models import qwen
from cir_jax.records import Author
from cir_jax.rl.batch import Sequence1D, max_micro, pack
from cir_jax.train.state import TrainState, init_params, init_state, make_optimizer
from cir_jax.train.step import (
    batch_logprobs,
    make_update,
    old_logprobs,
    rl_loss_fn,
    sft_loss_fn,
)

MODEL = ModelConfig(
    vocab_size=48,
    width=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    mlp_width=24,
    rope_theta=100.0,
)
RL = RLConfig(optim=OptimConfig(learning_rate=1e-2))
ROW = 24


def sequences(count=10, seed=0):
    """Prompt, model turn, tool output, model turn; lengths and advantages differ."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        parts = [rng.integers(1, 6) for _ in range(4)]
        author = np.repeat([Author.PROMPT, Author.MODEL, Author.TOOL, Author.MODEL], parts)
        ids = rng.integers(0, 48, len(author))
        out.append(Sequence1D(ids, author, -rng.random(len(author)), float(rng.normal())))
    return out


def one_update(seqs, *, micro_rows, loss_fn=None, mesh=None, model=MODEL, old=None):
    """Parameters and metrics after one update from the same weights."""
    mesh = mesh or meshes.make_mesh(MeshConfig(data=8))
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(RL.optim, 10)
        state = init_state(init_params(model, mesh, 0), model, mesh, optimizer)
        batch, count = pack(
            seqs,
            row_length=ROW,
            micro_rows=micro_rows,
            max_micro=max_micro(len(seqs), micro_rows),
        )
        if old is None:
            # Away from the sampler's weights, so that ratios differ from 1 and clips are met.
            drift = jax.tree.map(lambda p: p * 1.5, state.params)
            old = old_logprobs(drift, batch, jnp.int32(count), jnp.float32(0.8), cfg=model)
        update = make_update(model, mesh, optimizer, loss_fn or rl_loss_fn(RL))
        state, metrics = update(state, batch, old, jnp.int32(count), jnp.float32(0.8))
        return jax.tree.map(np.asarray, state), jax.tree.map(float, metrics)


def assert_same(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


@pytest.mark.parametrize("loss_fn", [rl_loss_fn(RL), sft_loss_fn])
def test_micro_batching_and_packing_change_nothing(loss_fn):
    """1, 8 or 16 rows at a time; one trajectory per row or several."""
    reference, metrics = one_update(sequences(), micro_rows=8, loss_fn=loss_fn, mesh=one_device())
    for micro_rows in (1, 16):
        other, others = one_update(
            sequences(), micro_rows=micro_rows, loss_fn=loss_fn, mesh=one_device()
        )
        assert_same(metrics, others)
        assert_same(reference.params, other.params, atol=1e-5)


def one_device():
    devices = np.array(jax.devices()[:1]).reshape(1, 1, 1)
    return jax.sharding.Mesh(devices, ("data", "fsdp", "tensor"))


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (4, 1, 2), (1, 4, 2)])
def test_meshes_give_equal_loss_and_gradients(shape):
    reference, metrics = one_update(sequences(), micro_rows=8, mesh=one_device())
    mesh = meshes.make_mesh(MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2]))
    other, others = one_update(sequences(), micro_rows=8, mesh=mesh)
    assert_same(metrics, others)
    # Adam's first moment is 0.1 x the clipped gradient: gradients compared before rescaling.
    assert_same(reference.opt_state[1][0].mu, other.opt_state[1][0].mu)


def test_first_ratio_is_exactly_one():
    """Old log-probabilities come from the update's own program on the same micro-batches."""
    mesh = one_device()
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(RL.optim, 10)
        state = init_state(init_params(MODEL, mesh, 0), MODEL, mesh, optimizer)
        batch, count = pack(sequences(), row_length=ROW, micro_rows=4, max_micro=3)
        old = old_logprobs(state.params, batch, jnp.int32(count), jnp.float32(0.8), cfg=MODEL)
        update = make_update(MODEL, mesh, optimizer, rl_loss_fn(RL))
        _, metrics = update(state, batch, old, jnp.int32(count), jnp.float32(0.8))
    assert float(metrics["ratio_mean"]) == pytest.approx(1.0, abs=1e-6)
    assert float(metrics["old_new_kl"]) == pytest.approx(0.0, abs=1e-10)
    assert float(metrics["clip_high_share"]) == float(metrics["clip_low_share"]) == 0.0


def test_prompt_and_tool_tokens_have_exactly_zero_gradient():
    """The loss's gradient by the log-probability of each token, through the mask."""
    params = qwen.init(MODEL, jax.random.key(0))
    batch, _ = pack(sequences(), row_length=ROW, micro_rows=10, max_micro=1)
    batch = jax.tree.map(lambda x: jnp.asarray(x[0]), batch)
    logp, _ = batch_logprobs(params, MODEL, batch, 1.0)
    for loss_fn in (rl_loss_fn(RL), sft_loss_fn):
        grads = jax.grad(lambda x, f=loss_fn: f(x, batch, logp - 0.1, jnp.float32(7))[0])(logp)
        grads = np.asarray(grads)
        assert np.all(grads[~np.asarray(batch.trained)] == 0.0)
        assert np.all(grads[np.asarray(batch.trained)] != 0.0)


@pytest.mark.parametrize("loss_fn", [rl_loss_fn(RL), sft_loss_fn])
def test_tool_tokens_as_targets_move_no_parameter(loss_fn):
    """Trajectories that hold only prompt and tool tokens: the gradient is bitwise zero."""
    seqs = [
        s._replace(author=np.where(s.author == Author.MODEL, Author.TOOL, s.author))
        for s in sequences()
    ]
    state, metrics = one_update(seqs, micro_rows=8, loss_fn=loss_fn)
    assert metrics["grad_norm"] == 0.0
    assert all(np.all(m == 0) for m in jax.tree.leaves(state.opt_state[1][0].mu))


def test_masked_advantages_do_not_matter():
    """What prompt and tool tokens carry as sampler log-probability cannot reach the loss."""
    seqs = sequences()
    reference, _ = one_update(seqs, micro_rows=8)
    poisoned = [
        s._replace(sampler_logp=np.where(s.author == Author.MODEL, s.sampler_logp, np.nan))
        for s in seqs
    ]
    other, _ = one_update(poisoned, micro_rows=8)
    jax.tree.map(np.testing.assert_array_equal, reference, other)


def test_non_finite_gradient_skips_the_step():
    seqs = sequences()
    seqs[3] = seqs[3]._replace(advantage=float("nan"))
    state, metrics = one_update(seqs, micro_rows=8)
    assert metrics["skipped"] == 1.0
    assert state.num_updates == 0
    fresh = init_params(MODEL, meshes.make_mesh(MeshConfig(data=8)), 0)
    jax.tree.map(np.testing.assert_array_equal, state.params, jax.tree.map(np.asarray, fresh))
    finite, metrics = one_update(sequences(), micro_rows=8)
    assert metrics["skipped"] == 0.0 and finite.num_updates == 1


def test_update_compiles_once_whatever_the_filling():
    mesh = one_device()
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(RL.optim, 10)
        state = init_state(init_params(MODEL, mesh, 0), MODEL, mesh, optimizer)
        update = make_update(MODEL, mesh, optimizer, rl_loss_fn(RL))
        for seed in range(3):
            batch, count = pack(sequences(10, seed), row_length=ROW, micro_rows=2, max_micro=5)
            args = (jnp.int32(count), jnp.float32(1.0))
            old = old_logprobs(state.params, batch, *args, cfg=MODEL)
            state, _ = update(state, batch, old, *args)
    assert update._cache_size() == 1


def test_gradients_are_clipped_to_the_global_norm():
    """Adam's first moment after one update is (1 - beta1) x the clipped gradient."""
    state, metrics = one_update(sequences(), micro_rows=8)
    mu = state.opt_state[1][0].mu
    norm = np.sqrt(sum(float(np.sum(m**2)) for m in jax.tree.leaves(mu))) / (1 - RL.optim.beta1)
    assert norm == pytest.approx(min(metrics["grad_norm"], RL.optim.clip_norm), rel=1e-4)


def test_cosine_schedule_ends_at_a_tenth():
    """Linear warm-up to the peak, then half a cosine down to 0.1 of it."""
    cfg = OptimConfig(learning_rate=1.0, schedule="cosine", warmup_steps=4, weight_decay=0.0)
    optimizer = make_optimizer(cfg, 24)
    params = {"w": jnp.zeros(())}
    state = TrainState(params, optimizer.init(params), jnp.int32(0))
    steps = []
    for _ in range(25):
        updates, opt_state = optimizer.update({"w": jnp.ones(())}, state.opt_state, params)
        state = state._replace(opt_state=opt_state)
        steps.append(-float(updates["w"]))
    # Adam's step on a constant gradient of 1 is the learning rate, up to eps.
    np.testing.assert_allclose(steps[:5], [0.0, 0.25, 0.5, 0.75, 1.0], atol=1e-5)
    assert steps[24] == pytest.approx(0.1, abs=1e-5)
