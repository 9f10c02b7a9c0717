"""The update: micro-batching, meshes, masks and non-finite gradients on a tiny model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cir_jax import mesh as meshes
from cir_jax.config import (
    ComputeConfig,
    LoRAConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RLConfig,
)
from cir_jax.models import lora, qwen, value
from cir_jax.models.qwen import REFERENCE
from cir_jax.records import Author
from cir_jax.rl import batch as batches
from cir_jax.rl.batch import Sequence1D, max_micro, pack
from cir_jax.rl.loss import LOSS_MEANS
from cir_jax.train.state import (
    abstract_state,
    init_params,
    init_state,
    make_optimizer,
    stochastic_bfloat16,
)
from cir_jax.train.step import (
    Counts,
    Given,
    batch_logprobs,
    make_update,
    make_value_update,
    old_logprobs,
    old_values,
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
ALL_TERMS = RLConfig(kl_coef=0.3, entropy_coef=0.2, importance_cap=1.5)
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


def one_update(
    seqs, *, micro_rows, loss_fn=None, mesh=None, model=MODEL, compute=REFERENCE, drifts=(1.5,)
):
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
        # Away from the sampler's weights, so that ratios differ from 1 and clips are met; and the
        # reference model's, where it is asked for.
        given = Given(
            *(
                old_logprobs(
                    jax.tree.map(lambda p, drift=drift: p * drift, state.params),
                    batch,
                    jnp.int32(count),
                    jnp.float32(0.8),
                    cfg=model,
                    compute=compute,
                )
                for drift in drifts
            )
        )
        update = make_update(model, compute, mesh, optimizer, loss_fn or rl_loss_fn(RL))
        state, metrics = update(state, batch, given, jnp.int32(count), jnp.float32(0.8))
        return jax.tree.map(np.asarray, state), jax.tree.map(float, metrics)


def assert_same(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def weighed(seqs, mean):
    """With each sequence's weight in the loss."""
    counts = np.array([s.trained.sum() for s in seqs])
    weights = LOSS_MEANS[mean](counts, 30)
    return [s._replace(weight=w) for s, w in zip(seqs, weights, strict=True)]


def same_update(mean, loss_fn, order=range(10), **kwargs):
    seqs = weighed(sequences(), mean)
    # The sampler's log-probabilities are near the trainer's, log(1/48) at first: some weights are
    # cut off, and the policy's part of the gradient is as large as the other terms'.
    seqs = [s._replace(sampler_logp=s.sampler_logp - 3.6) for s in seqs]
    return one_update([seqs[i] for i in order], loss_fn=loss_fn, drifts=(1.2, 0.9), **kwargs)


@pytest.mark.parametrize(
    ("loss_fn", "mean"),
    [(rl_loss_fn(ALL_TERMS), "sequence_mean"), (sft_loss_fn, "token_mean")],
    ids=["rl", "sft"],
)
def test_micro_batching_packing_and_order_change_nothing(loss_fn, mean, monkeypatch):
    """1, 2, 8 or 16 rows at a time; one trajectory per row or several; in any order."""
    mesh = one_device()
    reference, metrics = same_update(mean, loss_fn, micro_rows=8, mesh=mesh)
    others = [same_update(mean, loss_fn, micro_rows=n, mesh=mesh) for n in (1, 2, 16)]
    order = np.random.default_rng(3).permutation(10)
    others.append(same_update(mean, loss_fn, order, micro_rows=2, mesh=mesh))
    plan = lambda lengths, row_length: [[i] for i in range(len(lengths))]  # noqa: E731
    monkeypatch.setattr(batches, "plan_rows", plan)
    others.append(same_update(mean, loss_fn, micro_rows=2, mesh=mesh))
    for other, figures in others:
        assert_same(metrics, figures, rtol=1e-6, atol=1e-6)
        assert_close_gradients(reference, other)


def assert_close_gradients(a, b):
    """To a millionth of the gradient's norm. Adam's first moment is 0.1 x the clipped gradient:
    gradients are compared before rescaling."""
    a, b = (
        np.concatenate([x.ravel() for x in jax.tree.leaves(s.opt_state[1].mu)]).astype(np.float64)
        for s in (a, b)
    )
    assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(a) > 0


@pytest.mark.parametrize("mean", LOSS_MEANS)
@pytest.mark.parametrize(
    "rl",
    [
        RLConfig(kl_coef=0.3, kl_estimator="k1"),
        RLConfig(kl_coef=0.3, kl_estimator="k2"),
        RLConfig(kl_coef=0.3, kl_estimator="k3"),
        RLConfig(entropy_coef=0.2),
        RLConfig(importance_cap=1.5),
    ],
    ids=lambda rl: repr(rl.model_dump(exclude_defaults=True)),
)
def test_terms_of_the_loss_are_their_equations(rl, mean):
    """Token by token in float64, each term the same kind of mean over the batch."""
    rng = np.random.default_rng(0)
    seqs = [s._replace(train_tool=True) for s in weighed(sequences(), mean)]
    batch, _ = pack(seqs, row_length=ROW, micro_rows=10, max_micro=1)
    batch = jax.tree.map(lambda x: x[0], batch)
    logp, old, ref = (-rng.exponential(1.0, (10, ROW)) for _ in range(3))
    entropy = rng.random((10, ROW))
    counts = Counts(float(batch.trained.sum()), float(batch.sampled.sum()))
    with jax.enable_x64(True):
        arrays = [jnp.asarray(x, jnp.float64) for x in (logp, entropy, old, ref)]
        given = Given(arrays[2], arrays[3] if rl.kl_coef else None)
        wide = jax.tree.map(jnp.asarray, batch)
        loss, metrics = rl_loss_fn(rl)(*arrays[:2], wide, given, counts)
    expected = kl = 0.0
    for at in zip(*np.nonzero(batch.trained), strict=True):
        a, ratio = float(batch.advantage[at]), np.exp(logp[at] - old[at])
        token = max(-a * ratio, -a * min(max(ratio, 0.8), 1.28))
        token = min(token, -3 * a) if a < 0 else token
        if rl.importance_cap and batch.sampled[at]:
            token *= min(np.exp(old[at] - float(batch.sampler_logp[at])), 1.5)
        d = ref[at] - logp[at]
        kl_token = {"k1": -d, "k2": d * d / 2, "k3": min(np.exp(d) - 1 - d, 10)}[rl.kl_estimator]
        token += rl.kl_coef * kl_token - rl.entropy_coef * entropy[at]
        expected += float(batch.weight[at]) * token / counts.trained
        kl += kl_token / counts.trained
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    if rl.kl_coef:
        assert float(metrics["ref_kl"]) == pytest.approx(kl, rel=1e-6)


def test_without_old_log_probabilities_the_update_is_on_policy():
    """The ratio is 1 and the gradient that of -A logp, as with those of the same weights."""
    mesh = one_device()
    given, metrics = one_update(sequences(), micro_rows=8, mesh=mesh, drifts=(1.0,))
    omitted, figures = one_update(sequences(), micro_rows=8, mesh=mesh, drifts=())
    assert figures["ratio_mean"] == 1.0 and figures["old_new_kl"] == 0.0
    assert_same(metrics, figures, rtol=1e-6, atol=1e-6)
    assert_close_gradients(given, omitted)


def test_the_entropy_bonus_is_its_gradient():
    """Of the whole model, against jax's own derivative of the entropy of a softmax."""
    seqs = [s._replace(advantage=0.0) for s in sequences()]
    state, _ = one_update(
        seqs, micro_rows=16, loss_fn=rl_loss_fn(RLConfig(entropy_coef=1.0)), mesh=one_device()
    )
    batch, _ = pack(seqs, row_length=ROW, micro_rows=16, max_micro=1)
    batch = jax.tree.map(lambda x: jnp.asarray(x[0]), batch)

    def negative_entropy(params):
        hidden = qwen.forward(params, MODEL, *batch[:3])
        log_p = jax.nn.log_softmax(hidden @ qwen.head_table(params).T / 0.8)
        before = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)[:, :-1]
        trained = batch.trained[:, 1:]
        return -jnp.sum(before * trained) / jnp.sum(trained)

    grads = jax.grad(negative_entropy)(init_params(MODEL, one_device(), 0))
    norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads)))
    for g, mu in zip(*map(jax.tree.leaves, (grads, state.opt_state[1].mu)), strict=True):
        np.testing.assert_allclose(g * min(1, 1 / norm) * 0.1, mu, rtol=1e-4, atol=1e-7)


def test_mismatch_is_that_of_the_sampled_tokens():
    """Though tool tokens, which have no probability of the sampler's, are trained as well."""
    seqs = [
        s._replace(
            sampler_logp=np.where(s.author == Author.MODEL, s.sampler_logp, np.nan),
            train_tool=True,
        )
        for s in sequences()
    ]
    rl = RLConfig(importance_cap=1.5)
    _, metrics = one_update(seqs, micro_rows=8, loss_fn=rl_loss_fn(rl), drifts=(1.2,))
    params = init_params(MODEL, one_device(), 0)
    batch, _ = pack(seqs, row_length=ROW, micro_rows=16, max_micro=1)
    batch = jax.tree.map(lambda x: jnp.asarray(x[0]), batch)
    drifted = jax.tree.map(lambda p: p * 1.2, params)
    old = batch_logprobs(drifted, MODEL, REFERENCE, batch, 0.8)
    assert batch.trained.sum() > batch.sampled.sum()
    d = np.asarray(old - batch.sampler_logp, np.float64)[np.asarray(batch.sampled)]
    assert metrics["sampler_mismatch_max"] == pytest.approx(np.abs(d).max(), rel=1e-5)
    assert metrics["sampler_mismatch_mean"] == pytest.approx(np.abs(d).mean(), rel=1e-5)
    k3 = np.minimum(np.exp(d) - 1 - d, 10)
    assert metrics["sampler_kl"] == pytest.approx(k3.mean(), rel=1e-4)
    assert metrics["skipped"] == 0.0 and np.isfinite(metrics["grad_norm"])


def one_device():
    devices = np.array(jax.devices()[:1]).reshape(1, 1, 1)
    return jax.sharding.Mesh(devices, ("data", "fsdp", "tensor"))


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (4, 1, 2), (1, 4, 2)])
def test_meshes_give_equal_loss_and_gradients(shape):
    loss_fn = rl_loss_fn(ALL_TERMS)
    reference, metrics = same_update("sequence_mean", loss_fn, micro_rows=8, mesh=one_device())
    mesh = meshes.make_mesh(MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2]))
    other, others = same_update("sequence_mean", loss_fn, micro_rows=8, mesh=mesh)
    assert_same(metrics, others, rtol=1e-6, atol=1e-6)
    assert_close_gradients(reference, other)


def test_first_ratio_is_exactly_one():
    """Old log-probabilities come from the update's own program on the same micro-batches."""
    mesh = one_device()
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(RL.optim, 10)
        state = init_state(init_params(MODEL, mesh, 0), MODEL, mesh, optimizer)
        batch, count = pack(sequences(), row_length=ROW, micro_rows=4, max_micro=3)
        old = old_logprobs(
            state.params, batch, jnp.int32(count), jnp.float32(0.8), cfg=MODEL, compute=REFERENCE
        )
        update = make_update(MODEL, REFERENCE, mesh, optimizer, rl_loss_fn(RL))
        _, metrics = update(state, batch, Given(old), jnp.int32(count), jnp.float32(0.8))
    assert float(metrics["ratio_mean"]) == pytest.approx(1.0, abs=1e-6)
    assert float(metrics["old_new_kl"]) == pytest.approx(0.0, abs=1e-10)
    assert float(metrics["clip_high_share"]) == float(metrics["clip_low_share"]) == 0.0


def test_prompt_and_tool_tokens_have_exactly_zero_gradient():
    """The loss's gradient by the log-probability of each token, through the mask."""
    params = qwen.init(MODEL, jax.random.key(0))
    batch, _ = pack(sequences(), row_length=ROW, micro_rows=10, max_micro=1)
    batch = jax.tree.map(lambda x: jnp.asarray(x[0]), batch)
    logp = batch_logprobs(params, MODEL, REFERENCE, batch, 1.0)
    given, counts = Given(logp - 0.1, logp + 0.1), Counts(jnp.float32(7), jnp.float32(7))
    for loss_fn in (rl_loss_fn(RL), rl_loss_fn(ALL_TERMS), sft_loss_fn):
        grads = jax.grad(lambda x, f=loss_fn: f(x, x, batch, given, counts)[0])(logp)
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
    assert all(np.all(m == 0) for m in jax.tree.leaves(state.opt_state[1].mu))


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
        update = make_update(MODEL, REFERENCE, mesh, optimizer, rl_loss_fn(RL))
        for seed in range(3):
            batch, count = pack(sequences(10, seed), row_length=ROW, micro_rows=2, max_micro=5)
            args = (jnp.int32(count), jnp.float32(1.0))
            old = old_logprobs(state.params, batch, *args, cfg=MODEL, compute=REFERENCE)
            state, _ = update(state, batch, Given(old), *args)
    assert update._cache_size() == 1


def test_gradients_are_clipped_to_the_global_norm():
    """Adam's first moment after one update is (1 - beta1) x the clipped gradient."""
    state, metrics = one_update(sequences(), micro_rows=8)
    mu = state.opt_state[1].mu
    norm = np.sqrt(sum(float(np.sum(m**2)) for m in jax.tree.leaves(mu))) / (1 - RL.optim.beta1)
    assert norm == pytest.approx(min(metrics["grad_norm"], RL.optim.clip_norm), rel=1e-4)


def learning_rates(cfg, num_updates):
    """Of each update, the last included. Adam's step on a constant gradient of 1 is the learning
    rate, up to eps."""
    optimizer = make_optimizer(cfg, num_updates)
    params = {"w": jnp.zeros(())}
    state = optimizer.init(params)
    rates = []
    for _ in range(num_updates + 1):
        updates, state = optimizer.update({"w": jnp.ones(())}, state, params)
        rates.append(-float(updates["w"]))
    return rates


def test_cosine_schedule_ends_at_a_tenth():
    """Linear warm-up to the peak, then half a cosine down to 0.1 of it."""
    cfg = OptimConfig(learning_rate=1.0, schedule="cosine", warmup_steps=4, weight_decay=0.0)
    rates = learning_rates(cfg, 24)
    np.testing.assert_allclose(rates[:5], [0.0, 0.25, 0.5, 0.75, 1.0], atol=1e-5)
    assert rates[24] == pytest.approx(0.1, abs=1e-5)


@pytest.mark.parametrize("num_updates", [20, 19])
def test_warmup_may_be_a_share_and_the_cosine_end_elsewhere(num_updates):
    """A tenth of 20 and, rounded up, of 19 updates: 2. Half-way down the cosine: (1 + 0.2) / 2."""
    cfg = OptimConfig(learning_rate=1.0, weight_decay=0.0, warmup_share=0.1)
    np.testing.assert_allclose(
        learning_rates(cfg, num_updates), [0.0, 0.5] + [1.0] * (num_updates - 1), atol=1e-5
    )
    cfg = cfg.model_copy(update={"schedule": "cosine", "final_share": 0.2})
    rates = learning_rates(cfg, num_updates)
    np.testing.assert_allclose(rates[:3], [0.0, 0.5, 1.0], atol=1e-5)
    assert rates[num_updates] == pytest.approx(0.2, abs=1e-5)
    if num_updates == 20:
        assert rates[11] == pytest.approx(0.6, abs=1e-5)


# --- what is computed in what, and what is computed again


@pytest.mark.parametrize("remat", ["minimal", "full"])
def test_remat_changes_nothing(remat):
    reference, metrics = one_update(sequences(), micro_rows=8, mesh=one_device())
    compute = REFERENCE.model_copy(update={"remat": remat})
    other, others = one_update(sequences(), micro_rows=8, mesh=one_device(), compute=compute)
    assert_same(metrics, others)
    assert_same(reference.opt_state[1].mu, other.opt_state[1].mu)


def test_remat_keeps_less():
    """Bytes that live between forward and backward pass; a weight is never among them."""
    tall = MODEL.model_copy(update={"num_layers": 6})
    params = qwen.init(tall, jax.random.key(0))
    rows = jnp.broadcast_to(jnp.arange(64) % 48, (2, 64))

    def kept(remat):
        compute = ComputeConfig(dtype="bfloat16", remat=remat, attention="xla")

        def loss(params):
            return qwen.forward(params, tall, rows, rows, jnp.ones_like(rows), compute).sum()

        saved = jax.eval_shape(lambda p: jax.vjp(loss, p)[1], params)
        return [x for x in jax.tree.leaves(saved) if x.dtype == jnp.bfloat16]

    size = {r: sum(x.size for x in kept(r)) for r in ("none", "minimal", "full")}
    assert size["full"] < size["minimal"] < size["none"]
    # full: the residual stream before each layer and after the last, and what the head gets.
    assert size["full"] <= 8 * 2 * 64 * tall.width
    assert not any(x.shape == (6, 16, 24) for x in kept("none"))  # gate and up, all layers


def test_bfloat16_is_near_float32():
    """8 bits of mantissa: about 1 % in a gradient's norm; parameters and gradients are float32."""
    reference, metrics = one_update(sequences(), micro_rows=8, mesh=one_device())
    half = REFERENCE.model_copy(update={"dtype": "bfloat16"})
    state, others = one_update(sequences(), micro_rows=8, mesh=one_device(), compute=half)
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {np.dtype(np.float32)}
    assert others["grad_norm"] == pytest.approx(metrics["grad_norm"], rel=0.05)
    assert others["grad_norm"] != metrics["grad_norm"]


# --- moments in bfloat16


def test_stochastic_rounding_is_right_in_the_mean():
    """To the two neighbours, by distance. A standard deviation of the mean is 1/2 / sqrt(n)."""
    x = jnp.float32(1.0) + jnp.float32(2**-7) * 0.25  # neighbours 1 and 1 + 2^-7
    n = 10_000
    got = stochastic_bfloat16(jnp.full((2, n), jnp.stack([x, -x])[:, None]), jax.random.key(0))
    assert set(np.unique(got.astype(jnp.float32)[0])) == {1.0, 1.0 + 2**-7}
    np.testing.assert_array_less(abs(share_up(got[0]) - 0.25), 5 * 0.5 / n**0.5)
    np.testing.assert_array_less(abs(share_up(-got[1]) - 0.25), 5 * 0.5 / n**0.5)
    exact = jnp.array([0.0, -1.0, 3.0, 2**-130], jnp.float32)
    np.testing.assert_array_equal(stochastic_bfloat16(exact, jax.random.key(1)), exact)


def share_up(x):
    return float((x > 1).mean())


def test_bfloat16_moments_follow_float32_ones():
    """A second moment must shrink: g = 1, then 0; after n zeros it is (1 - b2) b2^n. Rounding to
    the nearest it would stay where it is."""
    params = {"w": jnp.ones((4096,))}
    cfg = OptimConfig(learning_rate=1e-2, clip_norm=1e9)
    optimizer = make_optimizer(cfg.model_copy(update={"moments": "bfloat16"}), 10)
    opt_state = optimizer.init(params)

    @jax.jit
    def step(opt_state, g):
        return optimizer.update({"w": jnp.full((4096,), g)}, opt_state, params)[1]

    opt_state = step(opt_state, 1.0)
    for _ in range(200):
        opt_state = step(opt_state, 0.0)
    mu, nu = opt_state[1].mu["w"], opt_state[1].nu["w"]
    assert mu.dtype == nu.dtype == jnp.bfloat16
    # 0.001 x 0.999^200 = 8.19e-4; 200 roundings of up to 2^-8 each, averaged over 4096.
    assert float(nu.astype(jnp.float32).mean()) == pytest.approx(8.19e-4, rel=0.01)


def test_bfloat16_moments_halve_the_optimizer():
    mesh = one_device()
    sizes = [
        sum(
            x.size * x.dtype.itemsize
            for x in jax.tree.leaves(abstract_state(MODEL, mesh, make_optimizer(cfg, 1)).opt_state)
            if x.ndim
        )
        for cfg in (OptimConfig(), OptimConfig(moments="bfloat16"))
    ]
    assert sizes[1] * 2 == sizes[0]


# --- low-rank adapters

LORA = MODEL.model_copy(
    update={"lora": LoRAConfig(rank=2, alpha=4.0, targets=("q", "o", "down")), "qk_norm": True}
)


def with_random_adapters(params):
    def leaf(path, x):
        key = jax.random.key(len(str(path)))
        return jax.random.normal(key, x.shape) * 0.3 if "_lora_" in path[-1].key else x

    return jax.tree_util.tree_map_with_path(leaf, params)


def test_a_fresh_adapter_changes_nothing():
    params = qwen.init(LORA, jax.random.key(0))
    merged, plain = lora.merge(params, LORA)
    assert plain.lora is None
    assert jax.tree.structure(merged) == jax.tree.structure(qwen.abstract_params(plain))
    expected = qwen.init(plain, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, merged, expected)


def test_merged_weights_compute_the_same():
    params = with_random_adapters(qwen.init(LORA, jax.random.key(0)))
    merged, plain = lora.merge(params, LORA)
    ids = jnp.arange(24)[None]
    args = ids, ids, jnp.ones_like(ids)
    got = qwen.forward(params, LORA, *args)
    np.testing.assert_allclose(got, qwen.forward(merged, plain, *args), rtol=1e-4, atol=1e-5)
    _, base = lora.split(params, LORA)
    assert np.abs(got - qwen.forward(base, plain, *args)).max() > 0.01


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_adapters_alone_are_trained(shape):
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    mesh = jax.sharding.Mesh(devices, ("data", "fsdp", "tensor"))
    before = init_params(LORA, mesh, 0)
    state, metrics = one_update(sequences(), micro_rows=8, mesh=mesh, model=LORA)
    trained, frozen = lora.split(state.params, LORA)
    assert metrics["grad_norm"] > 0
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(trained)}
    assert names == {f"{w}_lora_{ab}" for w in ("q", "o", "down") for ab in "ab"}
    jax.tree.map(np.testing.assert_array_equal, frozen, lora.split(before, LORA)[1])
    # B starts at zero and its gradient is not zero: it moves. A's gradient is B's: zero at first.
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(trained),
        jax.tree.leaves(lora.split(before, LORA)[0]),
        strict=True,
    ):
        if path[-1].key.endswith("_b"):
            assert np.all(x != 0) and np.all(np.asarray(y) == 0)
    assert jax.tree.structure(state.opt_state[1].mu) == jax.tree.structure(trained)


# --- the value head


def test_values_are_one_linear_map():
    params = value.init(MODEL, jax.random.key(0))
    assert jax.tree.structure(params) == jax.tree.structure(value.AXES, is_leaf=meshes.is_axes)
    hidden = jax.random.normal(jax.random.key(1), (2, 5, 16), jnp.bfloat16)
    got = value.values({**params, "bias": jnp.float32(3.0)}, hidden)
    assert got.dtype == jnp.float32
    expected = np.asarray(hidden, np.float32) @ np.asarray(params["weight"]) + 3
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("shape", "micro_rows"), [((8, 1, 1), 8), ((1, 4, 2), 8), ((1, 1, 1), 2)])
def test_the_critics_update_is_the_same_however_it_is_split(shape, micro_rows):
    def update(mesh, micro_rows):
        with jax.set_mesh(mesh):
            model = value.critic_model(LORA)
            optimizer = make_optimizer(RL.optim, 10)
            params = value.critic(init_params(LORA, mesh, 0), LORA, jax.random.key(1))
            state = init_state(params, model, mesh, optimizer, value)
            seqs = sequences()
            count = max_micro(len(seqs), micro_rows)
            layout = batches.Layout(
                [len(s.ids) for s in seqs], row_length=ROW, micro_rows=micro_rows, max_micro=count
            )
            batch, num_micro = layout.batch(seqs), jnp.int32(layout.num_micro)
            old = old_values(state.params, batch, num_micro, cfg=model, compute=REFERENCE)
            targets = layout.pack([s.advantage for s in seqs], np.float32)
            step = make_value_update(model, REFERENCE, mesh, optimizer, 0.5)
            given = Given(old_values=old, targets=targets)
            state, metrics = step(state, batch, given, num_micro, jnp.float32(1.0))
            return jax.tree.map(np.asarray, state), jax.tree.map(float, metrics)

    reference, metrics = update(one_device(), 8)
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    other, others = update(jax.sharding.Mesh(devices, meshes.AXES), micro_rows)
    assert metrics["loss"] > 0.01 and reference.num_updates == 1
    assert_same(metrics, others, rtol=2e-6, atol=1e-6)
    assert_close_gradients(reference, other)
