"""Golden batches of our own: rollouts of a config or a run, or recorded ones."""

import contextlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from cir_jax import config as configs
from cir_jax import mesh as meshes
from cir_jax import metrics
from cir_jax.config import Config, ConfigError
from cir_jax.data import pipeline, sources
from cir_jax.models import qwen, value
from cir_jax.parity.golden import Golden
from cir_jax.parity.quantities import Weights, log_probs, packed_rows, recompute
from cir_jax.records import Author, Problem, Trajectory
from cir_jax.rl.advantage import outcome_rewards
from cir_jax.rl.batch import trained_tokens
from cir_jax.train import weights as stored
from cir_jax.train.checkpoint import Checkpoints
from cir_jax.train.compiled import abstract_critic
from cir_jax.train.display import Display
from cir_jax.train.experience import gather
from cir_jax.train.learn import init_critic
from cir_jax.train.loop import newest_params, open_run
from cir_jax.train.state import abstract_reference
from cir_jax.train.step import old_values

# Rows of a step: trajectories, and the reward of each.
Rows = tuple[list[Trajectory], list[float]]


def export(
    cfg: Config, run_dir: Path | None, rollouts: Path | None, step: int | None, off_policy: bool
) -> Golden:
    """The batch of a step, with everything that can be computed of it.

    run_dir: of the weights, its newest; None: they are sft.weights. rollouts: a samples.jsonl;
      None: they are sampled. step: of the rollouts, None being the last of a file and the first
      otherwise. off_policy: take the sampler's log-probabilities for the old ones.

    Raises ConfigError naming what cannot be used.
    """
    if cfg.model.lora is not None:
        raise ConfigError("model.lora: a golden batch is of a whole model; export-hf merges")
    if run_dir is None and not cfg.sft.weights:
        raise ConfigError("sft.weights='': must name the weights that the batch is of")
    with contextlib.ExitStack() as stack:
        if rollouts is None:
            trajectories, rewards = _sampled(cfg, run_dir, step or 0)
        else:
            trajectories, rewards = recorded(rollouts, step)
        mesh = meshes.make_mesh(cfg.mesh)
        stack.enter_context(jax.set_mesh(mesh))
        policy = _policy(cfg, run_dir, mesh)
        reference = None
        if cfg.rl.kl_coef:
            reference = policy if run_dir is None else _reference(cfg, run_dir, mesh)
        given = batch_of(cfg, trajectories, rewards)
        arrays = dict(given.arrays)
        weights = Weights(mesh, cfg.model, policy, reference)
        if cfg.rl.advantage == "gae":
            arrays["values"] = _values(cfg, run_dir, policy, given, mesh)
        if off_policy:
            arrays["old_log_probs"] = arrays["rollout_log_probs"]
            arrays["log_probs"] = log_probs(given, weights, policy)
        given = Golden(given.rl, given.temperature, arrays)
        return Golden(given.rl, given.temperature, arrays | recompute(given, weights))


def batch_of(cfg: Config, trajectories: Sequence[Trajectory], rewards: Sequence[float]) -> Golden:
    """What a batch is made of. Mini-batches are of whole groups, in order, as in a first epoch."""
    prompts = [t.num_prompt_tokens for t in trajectories]
    longest = max(prompts)
    R = max(t.num_response_tokens for t in trajectories)

    def table(of_rows: Sequence[np.ndarray], dtype: type) -> np.ndarray:
        out = np.zeros((len(trajectories), longest + R), dtype)
        for b, (x, num_prompt) in enumerate(zip(of_rows, prompts, strict=True)):
            out[b, longest - num_prompt : longest - num_prompt + len(x)] = x
        return out

    ids = table([t.ids for t in trajectories], np.int64)
    author = table([t.author for t in trajectories], np.int64)
    attended = table([np.ones(len(t.ids)) for t in trajectories], np.int64)
    response = slice(longest, None)
    train_tool = cfg.rl.train_tool_tokens
    trained = trained_tokens(author, train_tool)[:, response] & (attended[:, response] == 1)
    uids = _uids(trajectories)
    groups = list(dict.fromkeys(uids))
    length = cfg.rl.loss_length or cfg.rollout.max_response_tokens
    arrays = {
        "input_ids": ids,
        "attention_mask": attended,
        "response_mask": trained.astype(np.int64),
        "responses": ids[:, response],
        "author": author,
        "uid": np.array(uids),
        "minibatch": np.array([groups.index(u) // cfg.rl.minibatch_prompts for u in uids]),
        "rollout_log_probs": table([t.logp for t in trajectories], np.float64)[:, response],
        "token_level_scores": outcome_rewards(np.array([rewards]), trained[None])[0],
    }
    rl = cfg.rl.model_copy(update={"loss_length": length})
    return Golden(rl, cfg.rollout.temperature, arrays)


def _uids(trajectories: Sequence[Trajectory]) -> list[str]:
    """The problems' names; a step may have a problem twice, which are two groups."""
    seen: Counter[tuple[str, int]] = Counter()
    uids = []
    for t in trajectories:
        name = t.problem.problem_id
        again = seen[name, t.sample]
        seen[name, t.sample] += 1
        uids.append(f"{name}#{again}" if again else name)
    return uids


def recorded(path: Path, step: int | None) -> Rows:
    """The rows of one step of a samples.jsonl, None being the last; rewards are its scores.

    Raises ConfigError naming file, line and what was expected.
    """
    rows, last = [], None
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                last = row["step"]
                if step is None or step == last:
                    rows.append((last, _trajectory(row), float(row["score"])))
            except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
                raise ConfigError(
                    f"{path}, line {number}: not a line of a run's samples.jsonl: {error!r}"
                ) from error
    chosen = [(t, reward) for n, t, reward in rows if n == last or step is not None]
    if not chosen:
        raise ConfigError(f"{path}: holds no rollout of step {step}")
    by_problem: dict[str, list[tuple[Trajectory, float]]] = {}
    for t, reward in chosen:
        by_problem.setdefault(t.problem.problem_id, []).append((t, reward))
    ordered = [pair for group in by_problem.values() for pair in group]
    return [t for t, _ in ordered], [reward for _, reward in ordered]


def _trajectory(row: dict) -> Trajectory:
    ids, author, logp = (np.array(row[key]) for key in ("ids", "author", "logp"))
    if not ids.shape == author.shape == logp.shape or not np.isin(author, list(Author)).all():
        raise ValueError("ids, author and logp must be lists of one length")
    problem = Problem(row["problem_id"], "", "", row["answer"], "math")
    return Trajectory(problem, row["sample"], ids, author, logp, (), row["stop_reason"])


def _sampled(cfg: Config, run_dir: Path | None, step: int) -> Rows:
    """Rollouts of an RL step, as training makes them."""
    with contextlib.ExitStack() as stack:
        directory = run_dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        run = stack.enter_context(open_run(cfg, directory, Display(), record=False))
        found = sources.train_sources(cfg.data, run.engine.fits, run.display.note)
        new = gather(
            cfg,
            run.engine,
            run.grader,
            run.tokenizer,
            _policy(cfg, run_dir, run.mesh),
            pipeline.rl_problems(cfg, found),
            step=step,
            max_calls=run.max_calls(step),
            timer=metrics.Timer(),
        )
    return [t for group in new.groups for t in group], new.rewards_PG.reshape(-1).tolist()


def _policy(cfg: Config, run_dir: Path | None, mesh: Mesh) -> qwen.Params:
    if run_dir is not None:
        return newest_params(cfg, run_dir, mesh)
    try:
        return stored.load(configs.asset_dir(cfg.sft.weights), cfg.model, mesh, cfg.seed)
    except (ValueError, OSError) as error:
        raise ConfigError(f"sft.weights={cfg.sft.weights!r}: {error}") from error


@contextlib.contextmanager
def _checkpoints(cfg: Config, run_dir: Path) -> Iterator[Checkpoints]:
    with contextlib.closing(Checkpoints(run_dir, cfg.checkpoint.keep)) as checkpoints:
        yield checkpoints


def _reference(cfg: Config, run_dir: Path, mesh: Mesh) -> qwen.Params:
    with _checkpoints(cfg, run_dir) as checkpoints:
        return checkpoints.restore_reference(abstract_reference(cfg.model, cfg.compute, mesh))


def _values(
    cfg: Config, run_dir: Path | None, policy: qwen.Params, batch: Golden, mesh: Mesh
) -> np.ndarray:
    """The critic's [B,R]: the run's, or the one that a run begins with."""
    if run_dir is None:
        critic = init_critic(policy, cfg, mesh)
    else:
        with _checkpoints(cfg, run_dir) as checkpoints:
            critic = checkpoints.restore_critic(abstract_critic(cfg, mesh))

    def compute(packed, num_micro):
        return old_values(
            critic.params,
            packed,
            num_micro,
            cfg=value.critic_model(cfg.model),
            compute=qwen.REFERENCE,
        )

    return packed_rows(batch, mesh, compute) * batch.trained
