"""What a step's rollouts teach: forward passes, advantages, updates over mini-batches."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from cir_jax import hosts, metrics
from cir_jax import mesh as meshes
from cir_jax.config import Config, RLConfig
from cir_jax.models import qwen, value
from cir_jax.records import Author, Trajectory
from cir_jax.rl.advantage import ADVANTAGES, Rollouts, outcome_rewards, value_targets
from cir_jax.rl.batch import Layout, Sequence1D, max_micro, trained_tokens
from cir_jax.rl.kl import KL
from cir_jax.rl.loss import LOSS_MEANS
from cir_jax.train import compiled
from cir_jax.train.state import TrainState, init_state
from cir_jax.train.step import Given, old_logprobs, old_values

# Digits that are kept of what compares two programs, so that their last bits do not show.
_DIGITS = {"sampler_mismatch_max": 3, "sampler_mismatch_mean": 6, "sampler_kl": 6}


def init_critic(params: qwen.Params, cfg: Config, mesh: Mesh) -> TrainState:
    """A critic that begins with a policy's weights."""
    params = value.critic(params, cfg.model, jax.random.key(cfg.seed))
    model = value.critic_model(cfg.model)
    return init_state(params, model, mesh, compiled.critic_optimizer(cfg), value)


class Models(NamedTuple):
    """What an RL step changes. critic: with GAE alone."""

    policy: TrainState
    critic: TrainState | None = None


class Learner:
    """The updates of a run's RL phase. reference: parameters of the reference model, if any."""

    def __init__(self, cfg: Config, mesh: Mesh, reference: qwen.Params | None):
        self._cfg = cfg
        self._mesh = mesh
        self._reference = reference
        self._temperature = jnp.float32(cfg.rollout.temperature)
        self._update = compiled.policy_update(cfg, mesh)
        self._update_critic = compiled.critic_update(cfg, mesh)

    def learn(
        self,
        models: Models,
        groups: Sequence[Sequence[Trajectory]],
        rewards_PG: Float[np.ndarray, "P G"],
        step: int,
    ) -> tuple[Models, dict[str, float], list[np.ndarray]]:
        """One update per mini-batch; all that they are given is computed before the first.

        Returns the models, metrics, and the advantages [T] of each row of the groups.
        """
        policy, critic = models
        rl = self._cfg.rl
        rows = [t for group in groups for t in group]
        minibatches = self._minibatches(rewards_PG.shape, step)
        before = self._before(models, rows, minibatches)
        advantages, figures = self._advantages(rows, rewards_PG, before)
        lines = []
        for members in minibatches:
            counts = np.array([trained(rows[i], rl).sum() for i in members])
            length = rl.loss_length or self._cfg.rollout.max_response_tokens
            weights = LOSS_MEANS[rl.loss_mean](counts, length)
            sequences = [
                Sequence1D(
                    rows[i].ids,
                    rows[i].author,
                    rows[i].logp,
                    advantages[i],
                    weight,
                    rl.train_tool_tokens,
                )
                for i, weight in zip(members, weights, strict=True)
            ]
            layout = self._layout(sequences)
            batch, count = put(layout.batch(sequences), self._mesh), jnp.int32(layout.num_micro)

            def given(*names: str, members=members, layout=layout) -> Given:
                arrays = {
                    name: layout.pack((before[name][i] for i in members), np.float32)
                    for name in names
                }
                return put(Given(**arrays), self._mesh)

            line = {}
            hosts.mark_devices("update")
            if critic is not None:
                of_critic = given(*compiled.GIVEN_TO_CRITIC)
                critic, line = self._update_critic(
                    critic, batch, of_critic, count, self._temperature
                )
                line = {f"critic/{name}": x for name, x in line.items()}
            of_policy = given(*compiled.given_to_policy(self._cfg))
            policy, more = self._update(policy, batch, of_policy, count, self._temperature)
            line |= more
            lines.append(metrics.plain(line))
            hosts.mark("between updates")
        figures |= metrics.mean(lines)
        figures |= {k: round(figures[k], n) for k, n in _DIGITS.items()}
        return Models(policy, critic), figures, advantages

    def _minibatches(self, shape: tuple[int, int], step: int) -> list[list[int]]:
        """The rows of each update, by their numbers, epoch by epoch; the groups stay whole."""
        (P, G), rl = shape, self._cfg.rl
        out = []
        for epoch in range(rl.epochs):
            order = np.arange(P)
            if rl.shuffle:
                order = np.random.default_rng((self._cfg.seed, step, epoch)).permutation(P)
            for at in range(0, P, rl.minibatch_prompts):
                chosen = order[at : at + rl.minibatch_prompts, None] * G + np.arange(G)[None]
                out.append(chosen.reshape(-1).tolist())
        return out

    def _layout(self, sequences: Sequence[Sequence1D]) -> Layout:
        cfg = self._cfg
        return Layout(
            [len(s.ids) for s in sequences],
            row_length=cfg.max_length,
            micro_rows=cfg.rl.micro_rows,
            max_micro=max_micro(len(sequences), cfg.rl.micro_rows),
        )

    def _before(
        self, models: Models, rows: Sequence[Trajectory], minibatches: Sequence[Sequence[int]]
    ) -> dict[str, list[np.ndarray]]:
        """Of each row, arrays [T] by the fields of Given, as far as they are needed.

        In the mini-batches of the first epoch: there, the first ratio is exactly 1.
        """
        log_probabilities = functools.partial(
            old_logprobs,
            temperature=self._temperature,
            cfg=self._cfg.model,
            compute=self._cfg.compute,
        )

        def values(*args):
            model = value.critic_model(self._cfg.model)
            return old_values(models.critic.params, *args, cfg=model, compute=self._cfg.compute)

        ways = {
            "old_logp": functools.partial(log_probabilities, models.policy.params),
            "ref_logp": functools.partial(log_probabilities, self._reference),
            "old_values": values,
        }
        of_tokens = {name: ways[name] for name in compiled.before_updates(self._cfg)}
        out = {name: [np.zeros(0)] * len(rows) for name in of_tokens}
        first_epoch = minibatches[: len(minibatches) // self._cfg.rl.epochs]
        for members in first_epoch if of_tokens else ():
            sequences = [Sequence1D(rows[i].ids, rows[i].author) for i in members]
            layout = self._layout(sequences)
            batch, count = put(layout.batch(sequences), self._mesh), jnp.int32(layout.num_micro)
            for name, compute in of_tokens.items():
                own = layout.unpack(meshes.whole(compute(batch, count)))
                for i, x in zip(members, own, strict=True):
                    out[name][i] = x
        return out

    def _advantages(
        self,
        rows: Sequence[Trajectory],
        rewards_PG: Float[np.ndarray, "P G"],
        before: dict[str, list[np.ndarray]],
    ) -> tuple[list[np.ndarray], dict[str, float]]:
        """Of each row [T], by the config's estimator; and metrics of the rewards. What a critic is
        to learn joins `before`."""
        rl = self._cfg.rl

        def by_token(arrays: Sequence[np.ndarray], fill: float, dtype: type) -> np.ndarray:
            out = np.full((len(rows), self._cfg.max_length), fill, dtype)
            for i, x in enumerate(arrays):
                out[i, : len(x)] = x
            return out.reshape(*rewards_PG.shape, -1)

        author_PGT = by_token([t.author for t in rows], Author.PROMPT, np.int8)
        trained_PGT = trained_tokens(author_PGT, rl.train_tool_tokens)
        rewards_PGT = outcome_rewards(rewards_PG, trained_PGT)
        figures = {}
        if self._reference is not None and rl.kl_in == "reward":
            old, ref = (by_token(before[k], 0.0, np.float32) for k in ("old_logp", "ref_logp"))
            kl_PGT = np.asarray(KL[rl.kl_estimator](jnp.asarray(old), jnp.asarray(ref)))
            kl_PGT = np.where(trained_PGT, kl_PGT, 0)
            rewards_PGT = rewards_PGT - rl.kl_coef * kl_PGT
            figures["ref_kl"] = float(kl_PGT.sum() / max(trained_PGT.sum(), 1))
        carriers_PGT = trained_tokens(author_PGT, rl.train_tool_tokens or rl.whiten_tool_tokens)
        values_PGT = None
        if "old_values" in before:
            values_PGT = jnp.asarray(by_token(before["old_values"], 0.0, np.float32))
        rollouts = Rollouts(
            jnp.asarray(rewards_PGT, jnp.float32),
            jnp.asarray(carriers_PGT),
            values_PGT,
            rl.gamma,
            rl.critic.lam,
        )

        def by_row(array_PGT) -> list[np.ndarray]:
            flat = np.asarray(array_PGT).reshape(len(rows), -1)
            return [flat[i, : len(t.ids)] for i, t in enumerate(rows)]

        if values_PGT is not None:
            before["targets"] = by_row(value_targets(rollouts))
        return by_row(ADVANTAGES[rl.advantage](rollouts)), figures


def trained(row: Trajectory, rl: RLConfig) -> np.ndarray:
    return trained_tokens(row.author, rl.train_tool_tokens)


def put(tree, mesh: Mesh):
    """Arrays [M, R, T] onto the mesh: rows over the batch axes."""
    return meshes.put_same(tree, meshes.sharding(mesh, *compiled.BATCH_AXES))
