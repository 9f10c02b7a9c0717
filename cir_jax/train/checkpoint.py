"""Checkpoints of a run by orbax: training state, critic, place in the run, and proof of soundness.

Orbax restores a flipped bit without a word, and lists half-written steps. So each checkpoint holds
a record with a digest of every leaf (digest.py), which are computed again after a restore; where
anything is wrong, the checkpoint before is taken.
"""

import contextlib
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import absl.logging
import jax
import orbax.checkpoint as ocp
from etils import epath

from cir_jax import exits, hosts
from cir_jax.config import CheckpointConfig, ConfigError
from cir_jax.exits import RunError
from cir_jax.models import qwen
from cir_jax.train import digest, reuse
from cir_jax.train.state import TrainState

_RECORD = "record"
_UNFINISHED = "*.orbax-checkpoint-tmp*"
_PAUSE_S = 1.0


class Damaged(Exception):
    """A checkpoint that cannot be used; the message says what is wrong with it."""


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


@dataclasses.dataclass(frozen=True)
class Record:
    """What a checkpoint says of itself.

    config: of the run, as plain nested values. digests: of each leaf of each state. score: what
    the best are chosen by; None if there is nothing to go by.
    """

    place: Place
    config: dict[str, Any]
    digests: dict[str, dict[str, str]]
    score: float | None = None

    def to_json(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        return fields | {"sum": _sum(fields)}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> "Record":
        """Raises ValueError if anything has changed in it."""
        fields = {name: value for name, value in tree.items() if name != "sum"}
        if tree.get("sum") != _sum(fields):
            raise ValueError("the record has changed")
        return cls(**(fields | {"place": Place(**fields["place"])}))


def _sum(fields: Mapping[str, Any]) -> str:
    text = json.dumps(fields, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Restored(NamedTuple):
    """critic: None if none was asked for, or the checkpoint has none."""

    state: TrainState
    critic: TrainState | None
    record: Record


class _Kept:
    """Orbax's question which checkpoints stay: the newest and the best of the sound ones."""

    def __init__(self, cfg: CheckpointConfig):
        self._cfg = cfg
        self.scores: dict[int, float] = {}
        self.damaged: set[int] = set()

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        sound = [c.step for c in checkpoints if c.step not in self.damaged]
        scored = sorted((self.scores[n], n) for n in sound if n in self.scores)
        best = [n for _, n in scored[::-1][: self._cfg.keep_best]]
        stay = {*sound[-self._cfg.keep :], *best}
        return [c.step in stay for c in checkpoints]


class Checkpoints:
    """Numbered in the order of saving.

    Args:
      note: is told, in a line, of what fails and is not the end; by default stderr is.
      writes: whether this run saves: then what a killed one left unfinished is removed.

    Raises:
      OSError: the directory cannot be made.
    """

    def __init__(
        self,
        run_dir: Path,
        cfg: CheckpointConfig,
        note: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
        *,
        writes: bool = False,
    ):
        # Orbax logs each failure several times over, tracebacks and all: it is noted once.
        absl.logging.set_verbosity(absl.logging.FATAL)
        self._cfg, self._note, self._writes = cfg, note, writes
        self.folder = epath.Path(cfg.dir or (run_dir / "checkpoints").absolute())
        beside = epath.Path(cfg.dir) if cfg.dir else epath.Path(run_dir.absolute())
        self._reference = beside / "reference"
        self._kept = _Kept(cfg)
        self._failures = 0
        self._is_pending = False
        self._manager: ocp.CheckpointManager | None = None
        self._copies: dict[str, TrainState] = {}
        self._open()
        numbers = self._numbers()
        self._number = max(numbers, default=0)
        for number in numbers if writes else ():
            with contextlib.suppress(Damaged):
                self._read(number)  # for its score: the best are to stay

    def _open(self) -> None:
        """A manager of what is there now: one whose save has failed lists it as saved."""
        if self._writes:
            self._remove_unfinished()
        elif not hosts.exchange("folder of checkpoints", self.folder.exists())[0]:
            return
        self._manager = ocp.CheckpointManager(
            self.folder,
            item_handlers={name: _arrays() for name in ("state", "critic")}
            | {_RECORD: ocp.JsonCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._kept, create=self._writes, read_only=not self._writes
            ),
        )

    def _remove_unfinished(self) -> None:
        if jax.process_index() != 0:
            return
        for folder in {self.folder, self._reference.parent}:
            for path in folder.glob(_UNFINISHED) if folder.exists() else ():
                with contextlib.suppress(OSError):
                    path.rmtree()

    def _numbers(self) -> list[int]:
        found = []
        if self._manager is not None:
            self._manager.reload()
            found = sorted(self._manager.all_steps())
        # What is there is seen later by some hosts than by others.
        return hosts.exchange("checkpoints", found)[0]

    # --- saving

    def save(
        self,
        state: TrainState,
        place: Place,
        critic: TrainState | None = None,
        *,
        config: Mapping[str, Any] = {},
        score: float | None = None,
        wait: bool = False,
    ) -> None:
        """Starts an asynchronous save.

        One that fails is noted, and the run goes on without; RunError after
        checkpoint.max_failures in a row. wait: until it is there, trying so often.
        """
        self.settle()
        states = {"state": state} | ({} if critic is None else {"critic": critic})
        digests = {name: digest.leaf_digests(s._asdict()) for name, s in states.items()}
        record = Record(place, dict(config), digests, score)
        if jax.default_backend() == "cpu":
            # An accelerator's arrays are read by orbax before it returns; a CPU's are not.
            states = self._copies = reuse.copied(states, self._copies)
            reuse.uncache(Path(self.folder, str(self._number)))
        args = ocp.args.Composite(
            **{name: ocp.args.PyTreeSave(s._asdict()) for name, s in states.items()},
            **{_RECORD: ocp.args.JsonSave(record.to_json())},
        )
        while True:
            self._number += 1
            if score is not None:
                self._kept.scores[self._number] = score
            error = _together(lambda: self._manager.save(self._number, args=args))
            if error is None:
                self._is_pending = True
            else:
                self._fail(error)
            if not wait or self.settle(wait=True):
                return
            time.sleep(_PAUSE_S)

    def settle(self, wait: bool = False) -> bool:
        """Waits for a save under way. Returns whether the last one is there."""
        if not self._is_pending:
            return not wait
        if error := _together(self._manager.wait_until_finished):
            self._fail(error)
            return False
        self._is_pending, self._failures = False, 0
        return True

    def check(self) -> None:
        """Notes a save that has failed meanwhile; RunError if it was one too many."""
        if self._is_pending and (error := _together(self._manager.check_for_errors)):
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Of whatever kind: orbax, its threads and its stores have errors of their own."""
        self._is_pending = False
        self._failures += 1
        why = f"{self.folder}: saving failed: {_first_line(error)}"
        with contextlib.suppress(Exception):
            self._manager.close()
        if self._failures >= self._cfg.max_failures:
            self._remove_unfinished()
            raise RunError(f"{why}; {self._failures} times in a row", exits.IO) from error
        self._note(f"{why}; the next save tries again")
        self._open()

    def close(self) -> None:
        """Waits for saves under way; RunError if the last one has failed."""
        if self._manager is None:
            return
        failed = None
        if self._is_pending:
            try:
                self._manager.wait_until_finished()
            except Exception as error:
                failed = error
        with contextlib.suppress(Exception):
            self._manager.close()
        self._manager, self._is_pending, self._copies = None, False, {}
        if failed is not None:
            self._remove_unfinished()
            raise RunError(
                f"{self.folder}: the last save failed: {_first_line(failed)}", exits.IO
            ) from failed

    # --- restoring

    def restore(
        self,
        state: TrainState,
        critic: TrainState | None = None,
        *,
        accept: Callable[[Record], None] = lambda record: None,
        step: int | Literal["best"] | None = None,
    ) -> Restored | None:
        """The newest sound checkpoint, laid out as the abstract states say; None if there is none.

        accept: called with a record before anything is read by it; Damaged says that it cannot
        be used, what else it raises goes through. step: of the RL step, or best; then later ones
        are dropped, if this run saves.

        Raises:
          ConfigError: there is none of that step.
          RunError: all are damaged, or the one of that step is.
        """
        numbers = self._numbers()
        candidates = numbers if step is None else [self._number_of(numbers, step)]
        for number in reversed(candidates):
            try:
                restored = self._restore(number, state, critic, accept)
            except Damaged as error:
                why = f"checkpoint {self.folder / str(number)} is damaged: {error}"
                if step is not None:
                    raise RunError(f"resume_step={step}: {why}", exits.DATA) from error
                self._kept.damaged.add(number)
                self._note(f"{why}; going back to the one before")
                continue
            if step is not None and self._writes:
                for later in numbers[numbers.index(number) + 1 :]:
                    self._manager.delete(later)
            return restored
        if numbers:
            raise RunError(
                f"{self.folder}: none of its {len(numbers)} checkpoints is sound", exits.DATA
            )
        return None

    def _number_of(self, numbers: list[int], step: int | Literal["best"]) -> int:
        found = {}
        for number in numbers:
            with contextlib.suppress(Damaged):
                found[number] = self._read(number)
        if step == "best":
            scores = [(r.score, n) for n, r in found.items() if r.score is not None]
            if not scores:
                raise ConfigError(
                    f"resume_step='best': no checkpoint in {self.folder} has a score; see "
                    "checkpoint.best"
                )
            return max(scores)[1]
        places = {n: r.place for n, r in found.items() if r.place.phase in ("rl", "done")}
        of_step = [n for n, place in places.items() if place.step == step]
        if of_step:
            return max(of_step)
        unreadable = [n for n in numbers if n not in found]
        if unreadable:
            named = ", ".join(str(self.folder / str(n)) for n in unreadable)
            raise RunError(
                f"resume_step={step}: no sound checkpoint of this step; damaged: {named}",
                exits.DATA,
            )
        there = sorted({place.step for place in places.values()})
        raise ConfigError(
            f"resume_step={step}: no checkpoint of this RL step in {self.folder}; there are {there}"
        )

    def _read(self, number: int) -> Record:
        args = ocp.args.Composite(**{_RECORD: ocp.args.JsonRestore()})
        with _naming_damage("its record"):
            tree = self._manager.restore(number, args=args)[_RECORD]
            record = Record.from_json(tree)
        if record.score is not None:
            self._kept.scores[number] = record.score
        return record

    def _restore(
        self,
        number: int,
        state: TrainState,
        critic: TrainState | None,
        accept: Callable[[Record], None],
    ) -> Restored:
        with _agreed("the checkpoint's record"):
            record = self._read(number)
            accept(record)
        targets = {"state": state}
        if critic is not None and "critic" in record.digests:
            targets["critic"] = critic
        args = {name: _as_laid_out(t._asdict()) for name, t in targets.items()}
        with _agreed("the checkpoint's arrays"), _naming_damage("its arrays"):
            restored = self._manager.restore(number, args=ocp.args.Composite(**args))
        states = {name: TrainState(**restored[name]) for name in targets}
        for name, tree in states.items():
            _verify(name, tree._asdict(), record.digests[name])
        return Restored(states["state"], states.get("critic"), record)

    # --- the reference model

    def save_reference(self, params: qwen.Params) -> None:
        """The run's reference model, once and for all of the run."""
        with ocp.Checkpointer(_reference_handler()) as checkpointer:
            checkpointer.save(
                self._reference,
                args=ocp.args.Composite(
                    params=ocp.args.PyTreeSave(params),
                    digests=ocp.args.JsonSave(digest.leaf_digests(params)),
                ),
                force=True,
            )

    def restore_reference(self, target: qwen.Params) -> qwen.Params:
        """Raises ConfigError if the run began without one, RunError if it is damaged."""
        if not self._reference.exists():
            raise ConfigError(
                "rl.kl_coef: is above 0, but this run began without a reference model"
            )
        args = ocp.args.Composite(params=_as_laid_out(target), digests=ocp.args.JsonRestore())
        try:
            with ocp.Checkpointer(_reference_handler()) as checkpointer:
                with _naming_damage("its files"):
                    restored = checkpointer.restore(self._reference, args=args)
            _verify("params", restored["params"], restored["digests"])
        except Damaged as error:
            raise RunError(
                f"{self._reference}: the reference model is damaged: {error}", exits.DATA
            ) from error
        return restored["params"]


def _arrays() -> ocp.PyTreeCheckpointHandler:
    """Uncompressed: for a twelfth of float32's bytes compression takes four times the processor's
    time, which the steps that go on meanwhile miss."""
    return ocp.PyTreeCheckpointHandler(use_compression=False)


def _reference_handler() -> ocp.CompositeCheckpointHandler:
    return ocp.CompositeCheckpointHandler(params=_arrays(), digests=ocp.JsonCheckpointHandler())


def _as_laid_out(target: Any) -> ocp.args.PyTreeRestore:
    """Arrays of the shapes, types and layouts of abstract ones, or an error."""
    return ocp.args.PyTreeRestore(
        item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target)
    )


def _together(act: Callable[[], Any]) -> Exception | None:
    """Does a part of a save. What has failed on any process has failed on all."""
    error = None
    try:
        act()
    except Exception as raised:
        error = raised
    reasons = hosts.exchange("saving", _first_line(error) if error else "")
    if error is None and (found := [i for i, reason in enumerate(reasons) if reason]):
        error = RuntimeError(f"process {found[0]}: {reasons[found[0]]}")
    return error


@contextlib.contextmanager
def _agreed(what: str) -> Iterator[None]:
    """Of several processes all raise Damaged, or none does."""
    why = ""
    try:
        yield
    except Damaged as error:
        why = str(error)
    reasons = hosts.exchange(what, why)
    if found := [i for i, reason in enumerate(reasons) if reason]:
        who = f"process {found[0]}: " if len(reasons) > 1 else ""
        raise Damaged(f"{who}{reasons[found[0]]}")


@contextlib.contextmanager
def _naming_damage(what: str) -> Iterator[None]:
    """Whatever orbax makes of files that are cut, gone or altered; not what a device says."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError):
        raise
    except Exception as error:
        raise Damaged(f"{what}: {_first_line(error)}") from error


def _verify(name: str, tree: Any, recorded: Mapping[str, str]) -> None:
    found = digest.leaf_digests(tree)
    differ = sorted(k for k in found.keys() | recorded.keys() if found.get(k) != recorded.get(k))
    if differ:
        first = differ[0]
        raise Damaged(
            f"{name}/{first} has the digest {found.get(first)}, saved was {recorded.get(first)}"
            + (f", and {len(differ) - 1} more leaves differ" if len(differ) > 1 else "")
        )


_MESSAGE_CHARS = 200


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:_MESSAGE_CHARS] if text else ''}".rstrip(": ")
