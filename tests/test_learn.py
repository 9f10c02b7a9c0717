"""A step's updates from trajectories: what is computed before them, and with what."""

from pathlib import Path

import jax
import numpy as np
import pytest

from cir_jax import config as configs
from cir_jax.records import Author, Problem, Trajectory
from cir_jax.rl import batch as batches
from cir_jax.train import compiled, learn
from cir_jax.train.checkpoint import Checkpoints, Place
from cir_jax.train.state import (
    abstract_reference,
    abstract_state,
    init_params,
    init_state,
    reference_params,
)

TINY = (
    "model.num_layers=1",
    "model.width=16",
    "model.head_dim=4",
    "model.mlp_width=16",
    "model.vocab_size=64",
    "rl.minibatch_prompts=2",
    "rl.micro_rows=4",
    "rl.optim.learning_rate=1e-2",
    "rollout.prompts_per_step=4",
    "rollout.samples_per_prompt=3",
    "rollout.max_response_tokens=20",
    "data.max_prompt_tokens=4",
    "rl.clip_low=0.01",
    "rl.clip_high=0.01",
)

KEEP_1 = configs.CheckpointConfig(keep=1)


def tiny(*overrides):
    root = Path(__file__).parent.parent
    return configs.load(root / "configs/quickstart.toml", TINY + overrides)


@pytest.fixture(scope="module", autouse=True)
def mesh():
    mesh = jax.sharding.Mesh(
        np.array(jax.devices()[:1]).reshape(1, 1, 1), ("data", "fsdp", "tensor")
    )
    with jax.set_mesh(mesh):
        yield mesh


def step_of(seed=0):
    """Groups [4][3] of prompt, model turn, tool output, model turn; and rewards."""
    rng = np.random.default_rng(seed)
    problem = Problem("p", "sum", "?", "0", "math")

    def trajectory(sample):
        parts = rng.integers(1, 5, 4)
        author = np.repeat([Author.PROMPT, Author.MODEL, Author.TOOL, Author.MODEL], parts)
        ids = rng.integers(0, 64, len(author)).astype(np.int32)
        logp = np.where(author == Author.MODEL, -rng.random(len(author)), 0).astype(np.float32)
        return Trajectory(problem, sample, ids, author.astype(np.int8), logp, (), "eos")

    groups = [[trajectory(g) for g in range(3)] for _ in range(4)]
    return groups, rng.choice([-1.0, 1.0], (4, 3)).astype(np.float32)


def learnt(mesh, *overrides, steps=1):
    """Parameters and figures after some steps on the same trajectories."""
    cfg = tiny(*overrides)
    state = init_state(init_params(cfg.model, mesh, 0), cfg.model, mesh, compiled.rl_optimizer(cfg))
    reference = (
        reference_params(state.params, cfg.model, cfg.compute, mesh) if cfg.rl.kl_coef else None
    )
    learner = learn.Learner(cfg, mesh, reference)
    critic = None
    if cfg.rl.advantage == "gae":
        critic = learn.init_critic(state.params, cfg, mesh)
    models = learn.Models(state, critic)
    lines = []
    for step in range(steps):
        models, figures, _ = learner.learn(models, *step_of(), step)
        lines.append(figures)
    return jax.tree.map(np.asarray, models.policy.params), lines


def assert_differ(a, b):
    assert any(np.any(x != y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


@pytest.mark.parametrize("place", ["loss", "reward"])
def test_the_reference_is_what_rl_begins_with(mesh, place):
    """The first update's divergence is 0, later ones' is not; and it moves the weights."""
    plain, _ = learnt(mesh, "rl.minibatch_prompts=4", steps=2)
    keys = ("rl.kl_coef=0.5", f"rl.kl_in={place}", "rl.minibatch_prompts=4")
    params, (first, second) = learnt(mesh, *keys, steps=2)
    assert first["ref_kl"] == 0.0 and second["ref_kl"] > 1e-4
    assert_differ(params, plain)


def test_one_update_needs_no_old_log_probabilities(mesh, monkeypatch):
    calls = []
    old_logprobs = learn.old_logprobs
    monkeypatch.setattr(
        learn, "old_logprobs", lambda *a, **k: calls.append(1) or old_logprobs(*a, **k)
    )
    _, (figures,) = learnt(mesh, "rl.minibatch_prompts=4")
    assert not calls and figures["ratio_mean"] == 1.0 and figures["sampler_mismatch_max"] > 0
    _, (figures,) = learnt(mesh, "rl.minibatch_prompts=2")
    assert len(calls) == 2 and figures["ratio_mean"] != 1.0


@pytest.mark.parametrize(
    "override",
    [
        "rl.train_tool_tokens=true",
        "rl.whiten_tool_tokens=true",
        "rl.loss_mean=sequence_mean",
        "rl.advantage=grpo",
        "rl.importance_cap=1.2",
    ],
)
def test_switches_change_what_is_learnt(mesh, override):
    assert_differ(learnt(mesh)[0], learnt(mesh, override)[0])


def test_epochs_take_every_row_once_each(mesh):
    def minibatches(*overrides, step=0):
        cfg = tiny("rl.epochs=3", *overrides)
        return learn.Learner(cfg, mesh, None)._minibatches((4, 3), step)

    in_order = minibatches()
    assert in_order == [list(range(6)), list(range(6, 12))] * 3
    shuffled = minibatches("rl.shuffle=true")
    assert len(shuffled) == 6
    for epoch in range(3):
        first, second = shuffled[2 * epoch : 2 * epoch + 2]
        assert sorted(first + second) == list(range(12))
        # Groups stay whole: rows 3p, 3p + 1, 3p + 2.
        assert all(
            first[i : i + 3] == list(range(first[i], first[i] + 3)) and first[i] % 3 == 0
            for i in (0, 3)
        )
    assert shuffled == minibatches("rl.shuffle=true")
    assert shuffled != minibatches("rl.shuffle=true", step=1)
    assert shuffled != minibatches("rl.shuffle=true", "seed=1")


def test_epochs_are_updates_on_the_same_old_log_probabilities(mesh, monkeypatch):
    calls = []
    old_logprobs = learn.old_logprobs
    monkeypatch.setattr(
        learn, "old_logprobs", lambda *a, **k: calls.append(1) or old_logprobs(*a, **k)
    )
    keys = ("rl.minibatch_prompts=4", "rl.shuffle=true")
    one, _ = learnt(mesh, *keys)
    two, (figures,) = learnt(mesh, *keys, "rl.epochs=2")
    # One pass for the two epochs; the first's ratio is 1, the second's is not.
    assert len(calls) == 1 and 0 < abs(figures["ratio_mean"] - 1)
    assert_differ(one, two)


def test_the_critic_learns_the_outcome(mesh):
    """On the same trajectories again and again its error falls; the policy learns from it."""
    keys = ("rl.advantage=gae", "rl.critic.optim.learning_rate=0.01", "rl.critic.lam=0.9")
    params, lines = learnt(mesh, *keys, "rl.gamma=0.99", steps=12)
    # The outcomes are +-1, the first values near 0: a mean square of about 1, halved.
    assert 0.2 < lines[0]["critic/loss"] < 1.0
    assert lines[-1]["critic/loss"] < 0.7 * lines[0]["critic/loss"]
    assert all(line["critic/skipped"] == 0 for line in lines)
    assert_differ(params, learnt(mesh, steps=12)[0])


def test_values_and_targets_are_those_before_each_token(mesh):
    """Of a critic whose head is all bias: every value is 2; with lam = gamma = 1 the target of
    each model token is the outcome."""
    cfg = tiny("rl.advantage=gae")
    state = init_state(init_params(cfg.model, mesh, 0), cfg.model, mesh, compiled.rl_optimizer(cfg))
    critic = learn.init_critic(state.params, cfg, mesh)
    head = {"weight": jax.numpy.zeros(16), "bias": jax.numpy.float32(2)}
    critic = critic._replace(params=critic.params | {"value": head})
    learner = learn.Learner(cfg, mesh, None)
    groups, rewards = step_of()
    rows = [t for group in groups for t in group]
    before = learner._before(learn.Models(state, critic), rows, learner._minibatches((4, 3), 0))
    learner._advantages(rows, rewards, before)
    for row, values, targets, reward in zip(
        rows, before["old_values"], before["targets"], rewards.ravel(), strict=True
    ):
        # A row's first token has nothing before it.
        assert set(values.tolist()) <= {0.0, 2.0} and (values[1:] == 2).all()
        expected = np.where(row.author == Author.MODEL, reward, 0)
        np.testing.assert_allclose(targets, expected, atol=1e-5)


def test_critic_survives_a_restart(mesh, tmp_path):
    cfg = tiny("rl.advantage=gae", "model.tied_embeddings=false")
    state = init_state(init_params(cfg.model, mesh, 0), cfg.model, mesh, compiled.rl_optimizer(cfg))
    critic = learn.init_critic(state.params, cfg, mesh)
    assert "head" in state.params and "head" not in critic.params
    checkpoints = Checkpoints(tmp_path, KEEP_1, writes=True)
    checkpoints.save(state, Place("rl", 0), critic)
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, KEEP_1, writes=True)
    targets = (
        abstract_state(cfg.model, mesh, compiled.rl_optimizer(cfg)),
        compiled.abstract_critic(cfg, mesh),
    )
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(*targets).critic, critic)
    with pytest.raises(configs.ConfigError, match=r"rl\.kl_coef"):
        checkpoints.restore_reference(abstract_reference(cfg.model, cfg.compute, mesh))
    checkpoints.save(state, Place("rl", 1), wait=True)
    assert checkpoints.restore(*targets).critic is None
    checkpoints.close()


def test_reference_survives_a_restart(mesh, tmp_path):
    """In the type of its use: half the bytes, and the same log-probabilities to the bit."""
    cfg = tiny("compute.dtype=bfloat16")
    params = init_params(cfg.model, mesh, 0)
    reference = reference_params(params, cfg.model, cfg.compute, mesh)
    checkpoints = Checkpoints(tmp_path, KEEP_1, writes=True)
    checkpoints.save_reference(reference)
    restored = checkpoints.restore_reference(abstract_reference(cfg.model, cfg.compute, mesh))
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, restored, reference)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(
        lambda x: x.sharding, reference
    )
    assert sum(x.nbytes for x in jax.tree.leaves(reference)) < 0.51 * sum(
        x.nbytes for x in jax.tree.leaves(params)
    )
    rows = [t for group in step_of()[0] for t in group]
    batch, count = batches.pack(
        [batches.Sequence1D(t.ids, t.author) for t in rows],
        row_length=24,
        micro_rows=4,
        max_micro=3,
    )
    both = [
        learn.old_logprobs(p, batch, count, 1.0, cfg=cfg.model, compute=cfg.compute)
        for p in (params, reference)
    ]
    np.testing.assert_array_equal(*both)
