"""Checkpoints of a run by orbax: training state, place in the run, sizes of its growing files."""

import dataclasses
from pathlib import Path

import orbax.checkpoint as ocp

from cir_jax.config import ConfigError
from cir_jax.models import qwen
from cir_jax.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a run stands: `step` steps of `phase` are done.

    The data position is a function of it. file_sizes: bytes of the run's JSON lines then.
    extra_calls: by how much the call budget was raised beyond its schedule.
    """

    phase: str
    step: int
    file_sizes: dict[str, int] = dataclasses.field(default_factory=dict)
    extra_calls: int = 0


class Checkpoints:
    """Numbered in the order of saving; the newest `keep` stay."""

    def __init__(self, run_dir: Path, keep: int):
        self._manager = ocp.CheckpointManager(
            (run_dir / "checkpoints").absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
        )
        self._number = self._manager.latest_step() or 0
        self._reference = (run_dir / "reference").absolute()

    def save(self, state: TrainState, place: Place, critic: TrainState | None = None) -> None:
        """Starts an asynchronous save."""
        self._number += 1
        states = {"state": state} | ({} if critic is None else {"critic": critic})
        self._manager.save(
            self._number,
            args=ocp.args.Composite(
                **{name: ocp.args.StandardSave(s._asdict()) for name, s in states.items()},
                place=ocp.args.JsonSave(dataclasses.asdict(place)),
            ),
        )

    def restore(self, target: TrainState) -> tuple[TrainState, Place] | None:
        """The newest state, laid out as `target` says (abstract arrays); None if there is none."""
        if not self._number:
            return None
        restored = self._manager.restore(
            self._number,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(target._asdict()),
                place=ocp.args.JsonRestore(),
            ),
        )
        return TrainState(**restored["state"]), Place(**restored["place"])

    def restore_critic(self, target: TrainState) -> TrainState:
        """Of the newest checkpoint; ConfigError if that holds none."""
        if not (self._manager.directory / str(self._number) / "critic").exists():
            raise ConfigError("rl.advantage='gae': this run began without a critic")
        args = ocp.args.Composite(critic=ocp.args.StandardRestore(target._asdict()))
        return TrainState(**self._manager.restore(self._number, args=args)["critic"])

    def save_reference(self, params: qwen.Params) -> None:
        """The run's reference model, once and for all of the run."""
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(self._reference, params, force=True)

    def restore_reference(self, target: qwen.Params) -> qwen.Params:
        """Raises ConfigError if the run began without one."""
        if not self._reference.exists():
            raise ConfigError(
                "rl.kl_coef: is above 0, but this run began without a reference model"
            )
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(self._reference, target)

    def close(self) -> None:
        """Waits for saves under way."""
        self._manager.wait_until_finished()
        self._manager.close()
