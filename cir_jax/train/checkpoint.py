"""Checkpoints of a run by orbax: training state, place in the run, sizes of its growing files."""

import dataclasses
from pathlib import Path

import orbax.checkpoint as ocp

from cir_jax.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a run stands: `step` steps of `phase` are done.

    The data position is a function of it. file_sizes: bytes of the run's JSON lines then.
    """

    phase: str
    step: int
    file_sizes: dict[str, int] = dataclasses.field(default_factory=dict)


class Checkpoints:
    """Numbered in the order of saving; the newest `keep` stay."""

    def __init__(self, run_dir: Path, keep: int):
        self._manager = ocp.CheckpointManager(
            (run_dir / "checkpoints").absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
        )
        self._number = self._manager.latest_step() or 0

    def save(self, state: TrainState, place: Place) -> None:
        """Starts an asynchronous save."""
        self._number += 1
        self._manager.save(
            self._number,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state._asdict()),
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

    def close(self) -> None:
        """Waits for saves under way."""
        self._manager.wait_until_finished()
        self._manager.close()
