"""The run from top to bottom: random weights -> cold start -> reinforcement learning."""

import contextlib
import dataclasses
import functools
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cir_jax import config as configs
from cir_jax import mesh as meshes
from cir_jax import metrics
from cir_jax.config import Config, ConfigError, ModelConfig
from cir_jax.data import pipeline, sources
from cir_jax.evals.codestats import code_stats
from cir_jax.evals.suite import Evaluation, evaluate
from cir_jax.models import hf, qwen
from cir_jax.records import Problem, Score, Trajectory
from cir_jax.reward.score import Grader
from cir_jax.rl.batch import max_micro, pack
from cir_jax.rollout.engine import Engine
from cir_jax.sandbox.store import Replay, Store
from cir_jax.tokenizer import Tokenizer
from cir_jax.train import weights
from cir_jax.train.checkpoint import Checkpoints, Place
from cir_jax.train.compiled import abstract_critic, rl_optimizer, sft_update
from cir_jax.train.display import Display
from cir_jax.train.experience import gather
from cir_jax.train.learn import Learner, Models, init_critic, put
from cir_jax.train.rollouts import open_rollouts
from cir_jax.train.sft import FromFiles, Generated, SFTData
from cir_jax.train.state import (
    TrainState,
    abstract_reference,
    abstract_state,
    init_params,
    init_state,
    make_optimizer,
    reference_params,
)
from cir_jax.train.step import Given, old_logprobs
from cir_jax.train.transcripts import COUNTED

# The table's rows, by the phase that is about to begin.
STAGES = {"sft": "before SFT", "rl": "before RL", "done": "after RL"}
SANDBOX_FILE = "sandbox.json"
SFT_FILE = "sft_data.json"


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: the state is saved, `resume=true` goes on from there."""


@dataclasses.dataclass
class Run:
    """What every phase of a run uses."""

    cfg: Config
    dir: Path
    mesh: Mesh
    tokenizer: Tokenizer
    sandbox: Store | Replay
    grader: Grader
    engine: Engine
    checkpoints: Checkpoints
    writer: metrics.MetricsWriter
    display: Display
    extra_calls: int = 0
    stop: bool = False

    def max_calls(self, step: int) -> int:
        """The call budget of an RL step: the schedule's, raised as far as the limit allows."""
        cfg = self.cfg.rollout
        scheduled = configs.max_calls_at(cfg.max_calls, step)
        return max(scheduled, min(scheduled + self.extra_calls, cfg.calls_limit))

    def raise_calls(self, used_share: float, max_calls: int) -> None:
        """Raises later steps' budget if more than enough responses used all of this one."""
        cfg = self.cfg.rollout
        if cfg.raise_calls_above is not None and max_calls < cfg.calls_limit:
            self.extra_calls += used_share > cfg.raise_calls_above

    def save(
        self, state: TrainState, phase: str, step: int, critic: TrainState | None = None
    ) -> None:
        place = Place(phase, step, self.writer.sizes(), self.extra_calls)
        self.checkpoints.save(state, place, critic)

    def save_if_due(
        self, state: TrainState, phase: str, step: int, critic: TrainState | None = None
    ) -> None:
        """Saves every so many steps, and when asked to stop (then raises Interrupted)."""
        if step % self.cfg.checkpoint.every == 0 or self.stop:
            self.save(state, phase, step, critic)
        if self.stop:
            raise Interrupted

    @functools.cached_property
    def eval_problems(self) -> list[Problem]:
        found = sources.eval_sources(self.cfg.data, self.engine.fits, self.display.note)
        return pipeline.first_problems(found, self.cfg.eval.num_problems)

    def evaluate(self, params: qwen.Params) -> Evaluation:
        """One greedy response to each held-out problem."""
        return evaluate(
            self.engine,
            self.grader,
            self.tokenizer,
            params,
            self.eval_problems,
            max_calls=configs.eval_max_calls(self.cfg),
        )

    def record_stage(self, params: qwen.Params, phase: str, step: int) -> None:
        """Evaluates, and writes the table's row; not if there is nothing to evaluate on."""
        if not self.cfg.eval.num_problems:
            return
        self.display.note(f"evaluating {STAGES[phase]} ...")
        result = self.evaluate(params)
        by_task = {f"accuracy/{task}": value for task, value in result.by_task.items()}
        row = {"stage": STAGES[phase]} | result.summary | by_task
        row |= metrics.reason_counts(result.scores)
        seconds = {"wall_s": result.stats.wall_s} | self.sandbox.figures()
        self.writer.write("eval", step, row, seconds)


@contextlib.contextmanager
def open_run(cfg: Config, run_dir: Path, display: Display, *, record: bool) -> Iterator[Run]:
    """Starts workers and engine; on the way out waits for saves and ends the workers.

    record: whether programs are written down, if the config says so.
    """
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(open_rollouts(cfg, run_dir if record else None))
        checkpoints = Checkpoints(run_dir, cfg.checkpoint.keep)
        stack.callback(checkpoints.close)
        stack.callback(display.end)
        writer = metrics.MetricsWriter(run_dir)
        run = Run(
            cfg,
            run_dir,
            opened.mesh,
            opened.tokenizer,
            opened.sandbox,
            opened.grader,
            opened.engine,
            checkpoints,
            writer,
            display,
        )
        with _stop_on_signal(run):
            yield run


def train(cfg: Config, display: Display) -> Path:
    """Trains as the config says and returns the run directory.

    Raises Interrupted after a signal, with the state saved.
    """
    run_dir = find_run_dir(cfg)
    display.note(f"run directory: {run_dir}")
    with open_run(cfg, run_dir, display, record=True) as run:
        state, place = restore(run) if cfg.resume else (None, Place("start", 0))
        critic = None
        configs.save_run(cfg, run_dir)
        save_description(run)
        data = sft_data(run) if cfg.sft.trains and place.phase in ("start", "sft") else None
        if place.phase == "start":
            given = bool(cfg.sft.weights)
            params = _weights(run) if given else init_params(cfg.model, run.mesh, cfg.seed)
            if data is not None:
                run.record_stage(params, "sft", 0)
            optimizer = make_optimizer(cfg.sft.optim, 0)
            state = init_state(params, cfg.model, run.mesh, optimizer)
            del params  # the state has a copy of its own
            place = Place("sft", 0)
        if place.phase == "sft":
            params = state.params if data is None else cold_start(run, data, state, place.step)
            run.record_stage(params, "rl", 0 if data is None else data.num_steps)
            state = init_state(params, cfg.model, run.mesh, rl_optimizer(cfg))
            del params
            place = Place("rl", 0)
            if cfg.rl.kl_coef:
                run.checkpoints.save_reference(
                    reference_params(state.params, cfg.model, cfg.compute, run.mesh)
                )
            if cfg.rl.advantage == "gae":
                critic = init_critic(state.params, cfg, run.mesh)
            run.save(state, "rl", 0, critic)
        if place.step < cfg.rl.steps:
            reference = None
            if cfg.rl.kl_coef:
                reference = run.checkpoints.restore_reference(
                    abstract_reference(cfg.model, cfg.compute, run.mesh)
                )
            if cfg.rl.advantage == "gae" and critic is None:
                critic = run.checkpoints.restore_critic(abstract_critic(cfg, run.mesh))
            models = reinforce(run, Models(state, critic), reference, place.step)
            run.record_stage(models.policy.params, "done", cfg.rl.steps)
            # Saved again with the row: a run that is resumed now has nothing left to do.
            run.save(models.policy, "done", cfg.rl.steps, models.critic)
        if cfg.eval.num_problems:
            display.table([r for r in metrics.read(run_dir) if r["kind"] == "eval"])
    return run_dir


def save_description(run: Run) -> None:
    """Writes what programs run on into the run directory; says so if it is not what it was."""
    text = json.dumps(run.sandbox.description, indent=1) + "\n"
    path = run.dir / SANDBOX_FILE
    if path.exists() and path.read_text() != text:
        run.display.note(f"programs run on something else than before; {path} says on what")
    path.write_text(text)


def given_params(key: str, name: str, model: ModelConfig, mesh: Mesh, seed: int) -> qwen.Params:
    """The weights that `key` names: of a run's newest checkpoint, or of a directory.

    Raises ConfigError if they are not of the model.
    """
    directory = configs.asset_dir(name)
    try:
        # Both have a file of the config's name.
        if configs.holds_weights(directory) or not configs.holds_run(directory):
            return weights.load(directory, model, mesh, seed)
        of_run = configs.load_run(directory)
        if of_run.model != model:
            raise ValueError("a run of another [model]")
        return newest_params(of_run, directory, mesh)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{key}={name!r}: {error}") from error


def _weights(run: Run) -> qwen.Params:
    cfg = run.cfg
    return given_params("sft.weights", cfg.sft.weights, cfg.model, run.mesh, cfg.seed)


def sft_data(run: Run) -> SFTData:
    """The trajectories of files or of the generator; says what of files is left out."""
    cfg = run.cfg
    if not cfg.sft.data:
        return SFTData(cfg, Generated(cfg, run.tokenizer, run.sandbox))
    source = FromFiles(cfg, run.tokenizer)
    run.display.note(
        f"sft.data: {source.num_trained} trajectories to train on, {source.num_held_out} held out"
    )
    for name, meaning in COUNTED.items():
        if source.counts[name]:
            run.display.note(f"sft.data: {source.counts[name]} {name}: {meaning}")
    (run.dir / SFT_FILE).write_text(json.dumps(source.counts, indent=1) + "\n")
    return SFTData(cfg, source)


def cold_start(run: Run, data: SFTData, state: TrainState, first_step: int) -> qwen.Params:
    """Masked SFT."""
    cfg = run.cfg
    update = sft_update(cfg, run.mesh, data.num_steps)
    num_max = max_micro(cfg.sft.batch_size, cfg.sft.micro_rows)
    run.display.begin("SFT", data.num_steps, first_step)
    if first_step == 0:
        record_held_out(run, data, state.params, 0)
    for step in range(first_step, data.num_steps):
        timer = metrics.Timer()
        with timer.stage("data_s"):
            batch, num_micro = pack(
                data.sequences(step),
                row_length=cfg.max_length,
                micro_rows=cfg.sft.micro_rows,
                max_micro=num_max,
            )
        with timer.stage("update_s"):
            state, figures = update(
                state, put(batch, run.mesh), Given(), jnp.int32(num_micro), jnp.float32(1.0)
            )
            figures = metrics.plain(figures)
        run.writer.write("sft", step + 1, figures, timer.seconds | run.sandbox.figures())
        run.display.step(step + 1, {"loss": figures["loss"]})
        if (step + 1) % cfg.sft.held_out_every == 0 or step + 1 == data.num_steps:
            record_held_out(run, data, state.params, step + 1)
        run.save_if_due(state, "sft", step + 1)
    return state.params


def record_held_out(run: Run, data: SFTData, params: qwen.Params, step: int) -> None:
    """The loss of the trajectories that are held out, if any are, over all their trained tokens."""
    cfg = run.cfg
    timer = metrics.Timer()
    total, count = 0.0, 0
    with timer.stage("held_out_s"):
        sequences = data.held_out()
        for at in range(0, len(sequences), cfg.sft.batch_size):
            batch, num_micro = pack(
                sequences[at : at + cfg.sft.batch_size],
                row_length=cfg.max_length,
                micro_rows=cfg.sft.micro_rows,
                max_micro=max_micro(cfg.sft.batch_size, cfg.sft.micro_rows),
            )
            logp = old_logprobs(
                params,
                put(batch, run.mesh),
                jnp.int32(num_micro),
                jnp.float32(1.0),
                cfg=cfg.model,
                compute=cfg.compute,
            )
            total -= np.asarray(logp, np.float64)[batch.trained].sum()
            count += int(batch.trained.sum())
    if count:
        run.writer.write("held_out", step, {"loss": total / count}, timer.seconds)


def reinforce(
    run: Run,
    models: Models,
    reference: qwen.Params | None,
    first_step: int,
) -> Models:
    """The CIR loop: rollout -> reward -> advantage -> updates, step by step."""
    cfg = run.cfg
    found = sources.train_sources(cfg.data, run.engine.fits, run.display.note)
    problems = pipeline.rl_problems(cfg, found)
    learner = Learner(cfg, run.mesh, reference)
    run.display.begin("RL", cfg.rl.steps, first_step)
    for step in range(first_step, cfg.rl.steps):
        timer = metrics.Timer()
        budget = run.max_calls(step)
        new = gather(
            cfg,
            run.engine,
            run.grader,
            run.tokenizer,
            models.policy.params,
            problems,
            step=step,
            max_calls=budget,
            timer=timer,
        )
        with timer.stage("update_s"):
            models, figures = learner.learn(models, new.groups, new.rewards_PG, step)

        timer.seconds |= {"tool_wait_s": new.stats.tool_wait_s, "device_idle_s": new.stats.idle_s}
        timer.seconds["tokens_per_s"] = new.stats.num_model_tokens / new.stats.wall_s
        timer.seconds |= run.sandbox.figures() | {"runs_shared": new.stats.num_shared}
        summary = code_stats(new.trajectories, new.scores)
        reward = float(np.mean(new.rewards))
        used = float(np.mean([len(t.calls) >= budget for t in new.trajectories]))
        run.raise_calls(used, budget)
        record = {"reward": reward, "max_calls": budget, "budget_used_share": used}
        record |= summary | new.figures | figures | metrics.reason_counts(new.scores)
        run.writer.write("rl", step + 1, record, timer.seconds)
        write_samples(run, step + 1, new.trajectories, new.scores)
        run.display.step(
            step + 1,
            {
                "reward": reward,
                "code": summary["code_share"],
                "calls": budget,
                "tokens/s": timer.seconds["tokens_per_s"],
            },
        )
        run.save_if_due(models.policy, "rl", step + 1, models.critic)
    return models


def write_samples(run: Run, step: int, trajectories: list[Trajectory], scores: list[Score]) -> None:
    """A few trajectories of a step, spread over its problems."""
    count = min(run.cfg.samples_per_log, len(trajectories))
    for i in np.linspace(0, len(trajectories) - 1, count, dtype=int):
        text = run.tokenizer.decode(trajectories[i].ids)
        run.writer.write_sample(step, trajectories[i], scores[i], text)


def restore(run: Run) -> tuple[TrainState | None, Place]:
    """The newest checkpoint's state and place; lines written after it are dropped."""
    restored = newest(run.cfg, run.checkpoints, run.mesh)
    if restored is None:
        run.display.note("no checkpoint to resume from: starting anew")
        run.writer.truncate(dict.fromkeys(run.writer.sizes(), 0))
        return None, Place("start", 0)
    state, place = restored
    run.writer.truncate(place.file_sizes)
    run.extra_calls = place.extra_calls
    run.display.note(f"resuming after {place.phase} step {place.step}")
    return state, place


def newest(cfg: Config, checkpoints: Checkpoints, mesh: Mesh) -> tuple[TrainState, Place] | None:
    return checkpoints.restore(abstract_state(cfg.model, mesh, rl_optimizer(cfg)))


def evaluate_run(cfg: Config, run_dir: Path, display: Display) -> Evaluation:
    """Evaluates a run's newest checkpoint and prints its row of the table; writes nothing."""
    if not cfg.eval.num_problems:
        raise ConfigError("eval.num_problems=0: must be above 0 to evaluate")
    with open_run(cfg, run_dir, display, record=False) as run:
        state, place = _saved(newest(cfg, run.checkpoints, run.mesh), run_dir)
        result = run.evaluate(state.params)
        begun = place.phase == "done" or place.step == 0
        stage = STAGES[place.phase] if begun else f"{place.phase} step {place.step}"
        display.table([{"stage": stage} | result.summary])
        return result


def export_run(cfg: Config, run_dir: Path, out: Path) -> None:
    """A run's newest weights as a Hugging Face directory."""
    params = newest_params(cfg, run_dir, meshes.make_mesh(cfg.mesh))
    hf.export(params, cfg.model, out, configs.asset_dir(cfg.tokenizer))


def newest_params(cfg: Config, run_dir: Path, mesh: Mesh) -> qwen.Params:
    """Of a run's newest checkpoint; ConfigError if there is none."""
    with contextlib.closing(Checkpoints(run_dir, cfg.checkpoint.keep)) as checkpoints:
        state, _ = _saved(newest(cfg, checkpoints, mesh), run_dir)
    return state.params


def _saved(restored: tuple[TrainState, Place] | None, run_dir: Path) -> tuple[TrainState, Place]:
    if restored is None:
        raise ConfigError(f"run directory={str(run_dir)!r}: holds no checkpoint")
    return restored


def find_run_dir(cfg: Config) -> Path:
    """run_dir, or the next (to resume: the newest) number under runs/NAME. Makes it."""
    parent = Path("runs") / cfg.name
    numbers = [int(p.name) for p in parent.glob("[0-9]*") if p.name.isdigit()]
    if cfg.run_dir:
        run_dir = Path(cfg.run_dir)
    else:
        run_dir = parent / f"{max(numbers, default=0) + (not (cfg.resume and numbers)):03d}"
    if configs.holds_run(run_dir) and not cfg.resume:
        raise ConfigError(
            f"run_dir={str(run_dir)!r}: holds a run; pass resume=true to go on with it"
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    return run_dir


@contextlib.contextmanager
def _stop_on_signal(run: Run) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM asks for a stop after the step, a second one ends at once."""

    def ask(signum, frame):
        if run.stop:
            run.display.end()
            os._exit(130)
        run.stop = True
        run.display.note("stopping after this step; once more to stop at once")

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
