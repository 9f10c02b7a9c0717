"""The run from top to bottom: random weights -> cold start -> reinforcement learning."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cir_jax import config as configs
from cir_jax import exits, hosts, metrics, sinks
from cir_jax import mesh as meshes
from cir_jax.config import Config, ConfigError, ModelConfig
from cir_jax.data import pipeline, sources
from cir_jax.evals.codestats import code_stats
from cir_jax.evals.suite import Evaluation, evaluate
from cir_jax.exits import RunError
from cir_jax.models import hf, qwen
from cir_jax.records import Problem
from cir_jax.reward.score import Grader
from cir_jax.rl.batch import max_micro, pack
from cir_jax.rollout.engine import Engine
from cir_jax.sandbox.store import Replay, Store, record_name
from cir_jax.tokenizer import Tokenizer
from cir_jax.train import resume, trace, weights
from cir_jax.train.checkpoint import Checkpoints, Damaged, Place, Record, Restored
from cir_jax.train.compiled import abstract_critic, rl_optimizer, sft_update
from cir_jax.train.digest import params_digest
from cir_jax.train.display import Display
from cir_jax.train.experience import Experience, gather
from cir_jax.train.gates import Gates, Paused
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
from cir_jax.train.stopping import Interrupted, Stopper
from cir_jax.train.transcripts import COUNTED
from cir_jax.watchdog import Watchdog

# The table's rows, by the phase that is about to begin.
STAGES = {"sft": "before SFT", "rl": "before RL", "done": "after RL"}
SANDBOX_FILE = "sandbox.json"
SFT_FILE = "sft_data.json"


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
    stopper: Stopper
    watchdog: Watchdog
    extra_calls: int = 0
    saved: tuple[str, int] | None = None

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
        self,
        state: TrainState,
        phase: str,
        step: int,
        critic: TrainState | None = None,
        *,
        wait: bool = False,
    ) -> None:
        hosts.mark("saving")
        records = hosts.exchange("sizes of records", self.sandbox.size())
        sizes = hosts.of_first("sizes of files", self.writer.sizes)
        sizes |= {record_name(i): size for i, size in enumerate(records)}
        score = hosts.of_first(
            "score", lambda: resume.score(self.cfg.checkpoint, self.dir, phase, step)
        )
        self.checkpoints.save(
            state,
            Place(phase, step, sizes, self.extra_calls),
            critic,
            config=configs.to_tree(self.cfg),
            score=score,
            wait=wait,
        )
        self.saved = (phase, step)

    def save_if_due(
        self,
        state: TrainState,
        phase: str,
        step: int,
        critic: TrainState | None = None,
        *,
        only_if_asked: bool = False,
    ) -> None:
        """Saves every so many steps, and when asked to stop (then raises Interrupted)."""
        self.checkpoints.check()
        asked = self.stopper.agreed()
        if asked or (step % self.cfg.checkpoint.every == 0 and not only_if_asked):
            self.save(state, phase, step, critic, wait=bool(asked))
        if asked:
            raise Interrupted(asked)

    @contextlib.contextmanager
    def droppable(
        self, state: TrainState, phase: str, step: int, critic: TrainState | None = None
    ) -> Iterator[None]:
        """What changes no state: SIGTERM, SIGHUP end it in the middle, with the state saved."""
        try:
            with self.stopper.droppable():
                yield
        except Interrupted:
            if self.saved != (phase, step):
                self.save(state, phase, step, critic, wait=True)
            raise

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

    def sandbox_figures(self) -> dict[str, float]:
        """Of the sandboxes of all processes: counts in all, and the longest times."""
        parts = hosts.exchange("figures of sandboxes", self.sandbox.figures())
        together = {name: max if name.endswith("_s") else sum for name in parts[0]}
        return {name: f([part[name] for part in parts]) for name, f in together.items()}

    def record_stage(self, params: qwen.Params, phase: str, step: int) -> None:
        """Evaluates, and writes the table's row; not if there is nothing to evaluate on."""
        if not self.cfg.eval.num_problems:
            return
        self.display.note(f"evaluating {STAGES[phase]} ...")
        self.watchdog.begin("evaluation", step)
        result = self.evaluate(params)
        by_task = {f"accuracy/{task}": value for task, value in result.by_task.items()}
        row = {"stage": STAGES[phase]} | result.summary | by_task
        row |= metrics.reason_counts(result.scores)
        seconds = {"wall_s": result.stats.wall_s} | self.sandbox_figures()
        self.writer.write("eval", step, row, seconds)
        self.watchdog.end()


@contextlib.contextmanager
def open_run(cfg: Config, run_dir: Path, display: Display, *, record: bool) -> Iterator[Run]:
    """Starts workers and engine; on the way out waits for saves and ends the workers.

    record: whether checkpoints are saved, and programs written down if the config says so.
    """
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(open_rollouts(cfg, run_dir if record else None))
        checkpoints = Checkpoints(run_dir, cfg.checkpoint, display.note, writes=record)
        stack.callback(checkpoints.close)
        stack.callback(display.end)
        writer = metrics.MetricsWriter(run_dir, writes=hosts.is_first())
        stack.callback(writer.close)
        stopper = Stopper(display.note, display.end)
        watchdog = Watchdog(cfg.watchdog)
        stack.callback(watchdog.close)
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
            stopper,
            watchdog,
        )
        # Without a state to save, a signal ends it as any program.
        listening = stopper.listening() if record else contextlib.nullcontext()
        with listening, hosts.guarded():
            yield run


def train(cfg: Config, display: Display) -> Path:
    """Trains as the config says and returns the run directory.

    Raises Interrupted after a signal, with the state saved, and RunError where it cannot go on.
    """
    sinks.check(cfg.metrics)
    resume.check_keys(cfg)
    run_dir = resume.agreed_run_dir(cfg)
    display.note(f"run directory: {run_dir}")
    with resume.alone_in(run_dir), open_run(cfg, run_dir, display, record=True) as run:
        state, critic, place = restore(run) if cfg.resume else (None, None, Place("start", 0))
        if hosts.is_first():
            configs.save_run(cfg, run_dir)
            run.writer.attach(sinks.open_sinks(cfg, run_dir))
            save_description(run)
        data = sft_data(run) if cfg.sft.trains and place.phase in ("start", "sft") else None
        if place.phase == "start":
            given = bool(cfg.sft.weights)
            params = _weights(run) if given else init_params(cfg.model, run.mesh, cfg.seed)
            if data is not None:
                with run.stopper.droppable():
                    run.record_stage(params, "sft", 0)
            optimizer = make_optimizer(cfg.sft.optim, 0)
            state = init_state(params, cfg.model, run.mesh, optimizer)
            del params  # the state has a copy of its own
            place = Place("sft", 0)
        if place.phase == "sft":
            params = state.params if data is None else cold_start(run, data, state, place.step)
            with run.stopper.droppable():
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
        # A run can have been killed between its last step and what comes after that.
        lacks_end = place.phase == "rl" and place.step == cfg.rl.steps > 0
        if place.step < cfg.rl.steps or lacks_end:
            reference = None
            if cfg.rl.kl_coef:
                reference = run.checkpoints.restore_reference(
                    abstract_reference(cfg.model, cfg.compute, run.mesh)
                )
            if cfg.rl.advantage == "gae" and critic is None:
                raise ConfigError("rl.advantage='gae': this run began without a critic")
            models = reinforce(run, Models(state, critic), reference, place.step)
            with run.droppable(models.policy, "rl", cfg.rl.steps, models.critic):
                run.record_stage(models.policy.params, "done", cfg.rl.steps)
            # Saved again with the row: a run that is resumed now has nothing left to do.
            run.save(models.policy, "done", cfg.rl.steps, models.critic, wait=True)
        if cfg.eval.num_problems and hosts.is_first():
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
    if hosts.is_first():
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
        run.watchdog.begin("SFT step", step + 1)
        hosts.mark(f"SFT step {step + 1}, its data")
        with timer.stage("data_s"):
            batch, num_micro = pack(
                data.sequences(step),
                row_length=cfg.max_length,
                micro_rows=cfg.sft.micro_rows,
                max_micro=num_max,
            )
        with timer.stage("update_s"):
            hosts.mark_devices("SFT update")
            state, figures = update(
                state, put(batch, run.mesh), Given(), jnp.int32(num_micro), jnp.float32(1.0)
            )
            figures = metrics.plain(figures)
        with timer.stage("digest_s"):
            digests = {
                "batch_digest": trace.batch_digest(batch._asdict()),
                "params_digest": params_digest(state.params)[0],
            }
        run.writer.write("sft", step + 1, figures | digests, timer.seconds | run.sandbox_figures())
        run.display.step(step + 1, {"loss": figures["loss"]})
        if (step + 1) % cfg.sft.held_out_every == 0 or step + 1 == data.num_steps:
            record_held_out(run, data, state.params, step + 1)
        run.save_if_due(state, "sft", step + 1)
    run.watchdog.end()
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
            total -= meshes.whole(logp).astype(np.float64)[batch.trained].sum()
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
    gates = Gates(cfg.gates, run.display.note)
    run.display.begin("RL", cfg.rl.steps, first_step)
    for step in range(first_step, cfg.rl.steps):
        timer = metrics.Timer()
        run.watchdog.begin("RL step", step + 1)
        hosts.mark(f"RL step {step + 1}, its problems")
        budget = run.max_calls(step)
        with run.droppable(models.policy, "rl", step, models.critic):
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
            models, figures, advantages = learner.learn(models, new.groups, new.rewards_PG, step)
        with timer.stage("digest_s"):
            arrays = trace.step_arrays(new.trajectories, new.rewards)
            batch = trace.batch_digest(arrays)
            params, leaves, unsound = params_digest(models.policy.params)
            if cfg.keep_rollouts and hosts.is_first():
                trace.write(run.dir, step + 1, arrays, leaves)

        timer.seconds |= {"tool_wait_s": new.stats.tool_wait_s, "device_idle_s": new.stats.idle_s}
        timer.seconds["tokens_per_s"] = new.stats.num_model_tokens / new.stats.wall_s
        timer.seconds |= run.sandbox_figures() | {"runs_shared": new.stats.num_shared}
        summary = code_stats(new.trajectories, new.scores)
        reward = float(np.mean(new.rewards))
        used = float(np.mean([len(t.calls) >= budget for t in new.trajectories]))
        run.raise_calls(used, budget)
        record = {"reward": reward, "max_calls": budget, "budget_used_share": used}
        record |= summary | new.figures | figures | metrics.reason_counts(new.scores)
        record |= {"batch_digest": batch, "params_digest": params}
        run.writer.write("rl", step + 1, record, timer.seconds)
        write_samples(run, step + 1, new, advantages, budget)
        run.display.step(
            step + 1,
            {
                "reward": reward,
                "code": summary["code_share"],
                "calls": budget,
                "tokens/s": timer.seconds["tokens_per_s"],
            },
        )
        try:
            gates.check(step + 1, figures, unsound)
        except Paused as why:
            run.save(models.policy, "rl", step + 1, models.critic, wait=True)
            raise RunError(f"{why}; paused: resume=true goes on after it", exits.GATE) from None
        run.save_if_due(models.policy, "rl", step + 1, models.critic, only_if_asked=gates.in_doubt)
    run.watchdog.end()
    return models


def write_samples(
    run: Run, step: int, new: Experience, advantages: list[np.ndarray], max_calls: int
) -> None:
    """A few trajectories of a step, spread over its problems. advantages: of new.groups' rows."""
    trained = [t for group in new.groups for t in group]
    of_trained = {id(t): a for t, a in zip(trained, advantages, strict=True)}
    count = min(run.cfg.samples_per_log, len(new.trajectories))
    for i in np.linspace(0, len(new.trajectories) - 1, count, dtype=int).tolist():
        t = new.trajectories[i]
        group = i // run.cfg.rollout.samples_per_prompt
        outcome = metrics.Outcome(step, group, max_calls, new.rewards[i], of_trained.get(id(t)))
        run.writer.write_sample(t, new.scores[i], outcome, run.tokenizer.decode(t.ids))


def restore(run: Run) -> tuple[TrainState | None, TrainState | None, Place]:
    """State, critic and place of the checkpoint to go on from; lines written after it are dropped.

    Raises ConfigError if the run was made with another config, RunError if its checkpoints are
    damaged or gone.
    """
    cfg = run.cfg

    def accept(record: Record) -> None:
        resume.check_config(cfg, record.config, record.place)
        if short := resume.shorter(run.dir, record.place.file_sizes):
            raise Damaged(short)

    restored = newest(
        cfg, run.checkpoints, run.mesh, with_critic=True, accept=accept, step=cfg.resume_step
    )
    if restored is None:
        resume.check_may_begin(cfg, run.dir)
        if configs.holds_run(run.dir):
            saved = configs.to_tree(configs.load_run(run.dir))
            resume.check_config(cfg, saved, Place("start", 0))
        run.display.note("no checkpoint to resume from: starting anew")
        place = Place("start", 0, dict.fromkeys(run.writer.sizes(), 0))
        state = critic = None
    else:
        state, critic, record = restored
        place = record.place
        run.display.note(f"resuming after {place.phase} step {place.step}")
        if begun_anew := resume.missing(run.dir, place.file_sizes):
            run.display.note(begun_anew)
        run.saved = (place.phase, place.step)
    hosts.check_same(checkpoint=f"{place.phase} step {place.step}")
    # Of another number of processes then, records may be left that none of these has open.
    sizes = dict(place.file_sizes)
    own = [sizes.pop(record_name(i), 0) for i in range(hosts.count())]
    run.sandbox.truncate(own[hosts.index()])
    run.writer.truncate(sizes)
    if hosts.is_first():
        trace.drop_after(run.dir, place.step if place.phase in ("rl", "done") else 0)
    run.extra_calls = place.extra_calls
    return state, critic, place


def newest(
    cfg: Config, checkpoints: Checkpoints, mesh: Mesh, *, with_critic: bool = False, **options
) -> Restored | None:
    """As Checkpoints.restore, with its options."""
    critic = abstract_critic(cfg, mesh) if with_critic and cfg.rl.advantage == "gae" else None
    state = abstract_state(cfg.model, mesh, rl_optimizer(cfg))
    return checkpoints.restore(state, critic, **options)


def export_run(cfg: Config, run_dir: Path, out: Path) -> None:
    """A run's newest weights as a Hugging Face directory."""
    params = newest_params(cfg, run_dir, meshes.make_mesh(cfg.mesh))
    hf.export(params, cfg.model, out, configs.asset_dir(cfg.tokenizer))


def newest_params(cfg: Config, run_dir: Path, mesh: Mesh) -> qwen.Params:
    """Of a run's newest checkpoint; ConfigError if there is none."""
    return newest_stage(cfg, run_dir, mesh)[0]


def newest_stage(cfg: Config, run_dir: Path, mesh: Mesh) -> tuple[qwen.Params, str]:
    """The same, and the name of their stage in tables; of cfg.resume_step's, if that is given."""
    with contextlib.closing(Checkpoints(run_dir, cfg.checkpoint)) as checkpoints:
        restored = newest(cfg, checkpoints, mesh, step=cfg.resume_step)
    if restored is None:
        raise ConfigError(f"run directory={str(run_dir)!r}: holds no checkpoint")
    place = restored.record.place
    begun = place.phase == "done" or place.step == 0
    stage = STAGES[place.phase] if begun else f"{place.phase} step {place.step}"
    return restored.state.params, stage
