"""What a run compiles: the jitted functions, with the arguments that its config gives them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from cir_jax import mesh as meshes
from cir_jax.config import Config
from cir_jax.jitted import Jitted, abstract
from cir_jax.models import value
from cir_jax.rl.batch import TrainBatch, abstract_batch, max_micro
from cir_jax.rollout import compiled as rollout_compiled
from cir_jax.train.state import (
    TrainState,
    abstract_reference,
    abstract_state,
    make_optimizer,
)
from cir_jax.train.step import (
    Given,
    make_update,
    make_value_update,
    old_logprobs,
    old_values,
    rl_loss_fn,
    sft_loss_fn,
)

BATCH_AXES = (None, "batch", "length")


def updates_per_step(cfg: Config) -> int:
    return cfg.rl.epochs * cfg.rollout.prompts_per_step // cfg.rl.minibatch_prompts


def sequences_per_update(cfg: Config) -> int:
    return cfg.rl.minibatch_prompts * cfg.rollout.samples_per_prompt


def rl_optimizer(cfg: Config) -> optax.GradientTransformation:
    return make_optimizer(cfg.rl.optim, cfg.rl.steps * updates_per_step(cfg))


def critic_optimizer(cfg: Config) -> optax.GradientTransformation:
    return make_optimizer(cfg.rl.critic.optim, cfg.rl.steps * updates_per_step(cfg))


def abstract_critic(cfg: Config, mesh: Mesh) -> TrainState:
    return abstract_state(value.critic_model(cfg.model), mesh, critic_optimizer(cfg), value)


# --- functions


def policy_update(cfg: Config, mesh: Mesh) -> Callable:
    return make_update(cfg.model, cfg.compute, mesh, rl_optimizer(cfg), rl_loss_fn(cfg.rl))


def critic_update(cfg: Config, mesh: Mesh) -> Callable:
    model = value.critic_model(cfg.model)
    return make_value_update(model, cfg.compute, mesh, critic_optimizer(cfg), cfg.rl.critic.clip)


def sft_update(cfg: Config, mesh: Mesh, num_steps: int) -> Callable:
    optimizer = make_optimizer(cfg.sft.optim, num_steps)
    return make_update(cfg.model, cfg.compute, mesh, optimizer, sft_loss_fn)


# --- what is computed of a step's rollouts before its first update, by the fields of Given


def before_updates(cfg: Config) -> tuple[str, ...]:
    rl = cfg.rl
    names = []
    if updates_per_step(cfg) > 1 or (rl.kl_coef and rl.kl_in == "reward"):
        names.append("old_logp")
    if rl.kl_coef:
        names.append("ref_logp")
    if rl.advantage == "gae":
        names.append("old_values")
    return tuple(names)


def given_to_policy(cfg: Config) -> tuple[str, ...]:
    of_loss = ("old_logp", *(("ref_logp",) if cfg.rl.kl_in == "loss" else ()))
    return tuple(name for name in before_updates(cfg) if name in of_loss)


GIVEN_TO_CRITIC = ("old_values", "targets")


# --- all of a run


def jitted(cfg: Config, mesh: Mesh, end_ids: tuple[int, ...]) -> list[Jitted]:
    """Every program of the run's phases that works on devices for longer than a moment.

    mesh: of training. end_ids: the tokenizer's.
    """
    policy = abstract_state(cfg.model, mesh, rl_optimizer(cfg))
    programs = rollout_compiled.jitted(
        cfg.rollout,
        cfg.model,
        policy.params,
        dtype=cfg.compute.dtype,
        end_ids=end_ids,
        max_prompt_tokens=cfg.data.max_prompt_tokens,
        max_length=longest_row(cfg),
        mesh=meshes.decoding_mesh(mesh, cfg.mesh),
    )
    number, fraction = (
        abstract(mesh, (), jax.ShapeDtypeStruct((), dtype)) for dtype in (jnp.int32, jnp.float32)
    )
    options = {"cfg": cfg.model, "compute": cfg.compute}

    def add(name: str, function: Callable, args: tuple, held: str, options: dict) -> None:
        programs.append(Jitted(name, function, args, options, mesh, {0: held}))

    if cfg.sft.trains:
        batch = _batch(cfg, mesh, cfg.sft.batch_size, cfg.sft.micro_rows)
        sft = abstract_state(cfg.model, mesh, make_optimizer(cfg.sft.optim, 1))
        args = (sft, batch, Given(), number, fraction)
        add("sft update", sft_update(cfg, mesh, 1), args, "policy", {})
    if not cfg.rl.steps:
        return programs
    batch = _batch(cfg, mesh, sequences_per_update(cfg), cfg.rl.micro_rows)
    before = before_updates(cfg)
    if "old_logp" in before:
        args = (policy.params, batch, number, fraction)
        add("old log-probabilities", old_logprobs, args, "policy", options)
    if "ref_logp" in before:
        reference = abstract_reference(cfg.model, cfg.compute, mesh)
        args = (reference, batch, number, fraction)
        add("reference log-probabilities", old_logprobs, args, "reference", options)

    def given(names: tuple[str, ...]) -> Given:
        return Given(**dict.fromkeys(names, batch.advantage))

    if "old_values" in before:
        critic = abstract_critic(cfg, mesh)
        model = value.critic_model(cfg.model)
        args = (critic.params, batch, number)
        add("values", old_values, args, "critic", options | {"cfg": model})
        args = (critic, batch, given(GIVEN_TO_CRITIC), number, fraction)
        add("critic update", critic_update(cfg, mesh), args, "critic", {})
    args = (policy, batch, given(given_to_policy(cfg)), number, fraction)
    add("update", policy_update(cfg, mesh), args, "policy", {})
    return programs


def longest_row(cfg: Config) -> int:
    """Tokens of the longest row that a rollout can have."""
    return min(cfg.max_length, cfg.rollout.max_context or cfg.model.max_positions)


def held(cfg: Config, mesh: Mesh) -> dict[str, object]:
    """What stays on the devices through an RL run, by the names that `Jitted.held` uses."""
    trees: dict[str, object] = {"policy": abstract_state(cfg.model, mesh, rl_optimizer(cfg))}
    if cfg.rl.kl_coef:
        trees["reference"] = abstract_reference(cfg.model, cfg.compute, mesh)
    if cfg.rl.advantage == "gae":
        trees["critic"] = abstract_critic(cfg, mesh)
    return trees


def _batch(cfg: Config, mesh: Mesh, num_sequences: int, micro_rows: int) -> TrainBatch:
    shape = (max_micro(num_sequences, micro_rows), micro_rows, cfg.max_length)
    return abstract(mesh, BATCH_AXES, abstract_batch(shape))
