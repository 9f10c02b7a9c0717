"""Every quantity of a golden batch, computed by the trainer's own functions.

Each is computed from the batch's own values of what it is made of, where the batch has them: the
first stage that differs then differs alone.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from cir_jax.config import ModelConfig, RLConfig
from cir_jax.masked import masked_sum
from cir_jax.models import qwen
from cir_jax.models.qwen import REFERENCE
from cir_jax.parity.golden import Golden
from cir_jax.records import Author
from cir_jax.rl.advantage import ADVANTAGES, GROUPED, Rollouts, value_targets
from cir_jax.rl.batch import Layout, Sequence1D, TrainBatch, max_micro
from cir_jax.rl.kl import KL
from cir_jax.rl.loss import LOSS_MEANS, importance_weights, value_loss
from cir_jax.train.learn import put
from cir_jax.train.step import Counts, Given, gradients, old_logprobs, rl_loss_fn

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Weights:
    """Parameters in float32. policy: as they are in the update; None: not at hand."""

    mesh: Mesh
    model: ModelConfig
    policy: qwen.Params | None = None
    reference: qwen.Params | None = None


def recompute(batch: Golden, weights: Weights | None) -> Arrays:
    """The quantities of golden.COMPARED that can be computed, in float32.

    Raises ValueError if the batch's groups do not suit its estimator.
    """
    out: Arrays = {"position_ids": np.maximum(np.cumsum(batch.attended, axis=1) - 1, 0)}
    if weights is not None:
        out |= _log_probs(batch, weights)
    # The batch's own values go on, or ours where it has none.
    known = Golden(batch.rl, batch.temperature, out | dict(batch.arrays))
    out |= _rewards(known)
    known = Golden(batch.rl, batch.temperature, out | dict(batch.arrays))
    out |= _advantages(known)
    known = Golden(batch.rl, batch.temperature, out | dict(batch.arrays))
    if "advantages" in known:
        out |= _losses(known)
        if weights is not None and weights.policy is not None:
            out |= _by_gradients(known, weights)
    return out


def _log_probs(batch: Golden, weights: Weights) -> Arrays:
    out = {}
    if weights.policy is not None:
        # Where the batch has both, the old ones are of other weights.
        off_policy = "log_probs" in batch and "old_log_probs" in batch
        name = "log_probs" if off_policy else "old_log_probs"
        out[name] = log_probs(batch, weights, weights.policy)
    if weights.reference is not None:
        out["ref_log_prob"] = log_probs(batch, weights, weights.reference)
    return out


def _sequences(batch: Golden, rows: Sequence[int], **of_tokens: np.ndarray) -> list[Sequence1D]:
    """Rows without their padding. of_tokens: fields of Sequence1D as [B,R]."""
    attended, author = batch.attended, batch.author
    padding = batch["input_ids"].shape[1] - batch.num_response
    wide = {name: np.pad(x, ((0, 0), (padding, 0))) for name, x in of_tokens.items()}
    return [
        Sequence1D(
            batch["input_ids"][b, attended[b]],
            author[b, attended[b]],
            train_tool=batch.rl.train_tool_tokens,
            **{name: x[b, attended[b]] for name, x in wide.items()},
        )
        for b in rows
    ]


def _layout(sequences: Sequence[Sequence1D], mesh: Mesh) -> Layout:
    lengths = [len(s.ids) for s in sequences]
    return Layout(
        lengths,
        row_length=max(lengths),
        micro_rows=mesh.size,
        max_micro=max_micro(len(sequences), mesh.size),
    )


def log_probs(batch: Golden, weights: Weights, params: qwen.Params) -> np.ndarray:
    """Of the response's tokens [B,R], by these parameters; 0 in padding."""

    def compute(packed, num_micro):
        return old_logprobs(
            params,
            packed,
            num_micro,
            jnp.float32(batch.temperature),
            cfg=weights.model,
            compute=REFERENCE,
        )

    return packed_rows(batch, weights.mesh, compute)


def packed_rows(batch: Golden, mesh: Mesh, compute: Callable) -> np.ndarray:
    """What compute(packed rows, number of micro-batches) tells of the response's tokens [B,R]."""
    sequences = _sequences(batch, range(len(batch["input_ids"])))
    layout = _layout(sequences, mesh)
    packed = compute(put(layout.batch(sequences), mesh), jnp.int32(layout.num_micro))
    out = np.zeros(batch.attended.shape, np.float32)
    out[batch.attended] = np.concatenate(layout.unpack(np.asarray(packed)))
    return batch.response(out)


def _rewards(batch: Golden) -> Arrays:
    rl = batch.rl
    scores = batch["token_level_scores"]
    if not rl.kl_coef or rl.kl_in != "reward":
        return {"token_level_rewards": scores}
    if "old_log_probs" not in batch or "ref_log_prob" not in batch:
        return {}
    kl = KL[rl.kl_estimator](*(_f32(batch[k]) for k in ("old_log_probs", "ref_log_prob")))
    return {"token_level_rewards": scores - rl.kl_coef * np.where(batch.trained, kl, 0)}


def _advantages(batch: Golden) -> Arrays:
    rl = batch.rl
    if "token_level_rewards" not in batch or (rl.advantage == "gae" and "values" not in batch):
        return {}
    order, shape = _groups(batch)
    carriers = batch.trained
    if rl.whiten_tool_tokens:
        carriers = carriers | (batch.response(batch.author) == Author.TOOL)

    def by_group(x_BR: np.ndarray) -> jnp.ndarray:
        x_BR = x_BR.astype(np.float32) if x_BR.dtype.kind == "f" else x_BR
        return jnp.asarray(x_BR[order].reshape(*shape, -1))

    def by_row(x_PGR) -> np.ndarray:
        out = np.zeros(carriers.shape, np.float32)
        out[order] = np.asarray(x_PGR).reshape(carriers.shape)
        return out

    rollouts = Rollouts(
        by_group(batch["token_level_rewards"]),
        by_group(carriers),
        by_group(batch["values"]) if rl.advantage == "gae" else None,
        rl.gamma,
        rl.critic.lam,
    )
    out = {"advantages": by_row(ADVANTAGES[rl.advantage](rollouts))}
    if rl.advantage == "gae":
        out["returns"] = by_row(value_targets(rollouts))
    return out


def _groups(batch: Golden) -> tuple[np.ndarray, tuple[int, int]]:
    """Rows in the order of their groups, and (P, G)."""
    uid = batch["uid"]
    if batch.rl.advantage not in GROUPED:
        return np.arange(len(uid)), (len(uid), 1)
    names, first, group, count = np.unique(
        uid, return_index=True, return_inverse=True, return_counts=True
    )
    usual = np.bincount(count).argmax()
    for g in np.flatnonzero(count != usual):
        raise ValueError(
            f"array 'uid': group {names[g]} has {count[g]} rows, the others {usual}; rl.advantage="
            f"{batch.rl.advantage!r} needs groups of one size"
        )
    order = np.argsort(first[group], kind="stable")
    return order, (len(names), int(usual))


def _losses(batch: Golden) -> Arrays:
    """What the loss and its metrics are, given the tokens' log-probabilities."""
    lines = [_minibatch(batch, rows) for rows in batch.minibatches]
    names = [name for name in lines[0] if all(name in line for line in lines)]
    out = {name: np.array([float(line[name]) for line in lines]) for name in names}
    if batch.rl.importance_cap is not None and "rollout_log_probs" in batch:
        if "old_log_probs" in batch:
            out["rollout_is_weights"] = np.asarray(_importance(batch, slice(None)))
    return out


def _importance(batch: Golden, rows) -> jnp.ndarray:
    sampled = batch.response(batch.author)[rows] == Author.MODEL
    return importance_weights(
        _f32(batch["old_log_probs"][rows]),
        _f32(batch["rollout_log_probs"][rows]),
        jnp.asarray(sampled),
        batch.rl.importance_cap,
    )


def _weights_of(batch: Golden, rows: np.ndarray) -> np.ndarray:
    """Of each row: what its tokens weigh in the mini-batch's mean."""
    counts = batch.trained[rows].sum(axis=1)
    length = batch.rl.loss_length or batch.num_response
    return LOSS_MEANS[batch.rl.loss_mean](counts, length)


def _minibatch(batch: Golden, rows: np.ndarray) -> dict[str, object]:
    rl, trained = batch.rl, batch.trained[rows]
    count = jnp.float32(max(trained.sum(), 1))
    weight = _f32(trained * _weights_of(batch, rows)[:, None])
    out: dict[str, object] = {}
    if rl.advantage == "gae" and {"values", "returns"} <= set(batch.arrays):
        values, returns = (_f32(batch[name][rows]) for name in ("values", "returns"))
        out["vf_loss"], _ = value_loss(
            values,
            values,
            returns,
            jnp.asarray(trained),
            weight,
            clip=rl.critic.clip,
            num_tokens=count,
        )
    if "old_log_probs" not in batch:
        return out
    old = _f32(batch["old_log_probs"][rows])
    logp = _f32(batch["log_probs"][rows]) if "log_probs" in batch else old
    if rl.importance_cap is None or "rollout_log_probs" in batch:
        out |= _surrogate(batch, rows, logp, old, weight, count)
    out["ppo_kl"] = masked_sum(old - logp, _f32(trained)) / count
    if rl.kl_coef and rl.kl_in == "loss" and "ref_log_prob" in batch:
        kl = KL[rl.kl_estimator](logp, _f32(batch["ref_log_prob"][rows]))
        out["kl_loss"] = masked_sum(kl, weight) / count
    of_kl = rl.kl_coef and rl.kl_in == "loss"
    if "pg_loss" in out and not rl.entropy_coef and ("kl_loss" in out or not of_kl):
        out["loss"] = out["pg_loss"] + (rl.kl_coef * out["kl_loss"] if of_kl else 0.0)
    return out


def _surrogate(batch: Golden, rows, logp, old, weight, count) -> dict[str, object]:
    sampler = "rollout_log_probs" if "rollout_log_probs" in batch else "old_log_probs"
    sampled = jnp.asarray(batch.response(batch.author)[rows] == Author.MODEL)
    unused = jnp.zeros(logp.shape, jnp.int32)
    tokens = TrainBatch(
        ids=unused,
        positions=unused,
        segment_ids=unused,
        sampled=sampled,
        trained=jnp.asarray(batch.trained[rows]),
        weight=weight,
        sampler_logp=_f32(batch[sampler][rows]),
        advantage=_f32(batch["advantages"][rows]),
    )
    counts = Counts(count, jnp.maximum(jnp.sum(sampled), 1).astype(jnp.float32))
    alone = batch.rl.model_copy(update={"kl_coef": 0.0, "entropy_coef": 0.0})
    loss, metrics = rl_loss_fn(alone)(logp, unused, tokens, Given(old_logp=old), counts)
    return {
        "pg_loss": loss,
        "pg_clipfrac": metrics["clip_low_share"] + metrics["clip_high_share"],
        "pg_clipfrac_lower": metrics["dual_clip_share"],
    }


def _by_gradients(batch: Golden, weights: Weights) -> Arrays:
    """What only the weights tell: gradients, entropy, and the loss of which it is a part."""
    rl = batch.rl
    needed = {"old_log_probs"}
    needed |= {"ref_log_prob"} if rl.kl_coef and rl.kl_in == "loss" else set()
    needed |= {"rollout_log_probs"} if rl.importance_cap is not None else set()
    if not needed <= set(batch.arrays):
        return {}
    compute = jax.jit(gradients(weights.model, REFERENCE, rl_loss_fn(rl)))
    lines = [_gradient(batch, rows, weights, compute, rl) for rows in batch.minibatches]
    return {name: np.array([line[name] for line in lines]) for name in lines[0]}


def _gradient(batch: Golden, rows, weights: Weights, compute, rl: RLConfig) -> dict[str, float]:
    names = {"old_logp": "old_log_probs"}
    if rl.kl_coef and rl.kl_in == "loss":
        names["ref_logp"] = "ref_log_prob"
    of_tokens = {"advantage": batch["advantages"]}
    if "rollout_log_probs" in batch:
        of_tokens["sampler_logp"] = batch["rollout_log_probs"]
    sequences = [
        s._replace(weight=weight)
        for s, weight in zip(
            _sequences(batch, rows, **of_tokens), _weights_of(batch, rows), strict=True
        )
    ]
    layout = _layout(sequences, weights.mesh)

    def packed(name: str) -> np.ndarray:
        own = _sequences(batch, rows, advantage=batch[name])
        return layout.pack((s.advantage for s in own), np.float32)

    given = Given(**{field: packed(name) for field, name in names.items()})
    grads, metrics = compute(
        weights.policy,
        put(layout.batch(sequences), weights.mesh),
        put(given, weights.mesh),
        jnp.int32(layout.num_micro),
        jnp.float32(batch.temperature),
    )
    out = {"grad_norm": float(optax.tree.norm(grads)), "entropy": float(metrics["entropy"])}
    return out | {"loss": float(metrics["loss"])}


def _f32(x: np.ndarray) -> jnp.ndarray:
    return jnp.asarray(x, jnp.float32)
