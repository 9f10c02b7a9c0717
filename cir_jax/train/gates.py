"""Gates: what ends a run, or is said, when a step's numbers are not what they should be."""

from collections.abc import Callable

from cir_jax import exits
from cir_jax.config import GatesConfig
from cir_jax.exits import RunError


class Paused(Exception):
    """A gate asks for a pause: the step is to be saved, then the run to be ended."""


class Gates:
    """Looks at each RL step's figures. note: is told of warnings, at most at each doubling."""

    def __init__(self, cfg: GatesConfig, note: Callable[[str], None]):
        self._cfg, self._note = cfg, note
        self._num_warnings: dict[str, int] = {}
        self._num_skipped = 0

    @property
    def in_doubt(self) -> bool:
        """Whether steps without an update may yet turn out to be the run's end: what is saved of
        them would go on without what they should have learnt."""
        return self._num_skipped > 0 and self._cfg.on_skipped == "stop"

    def check(self, step: int, figures: dict[str, float], unsound: str) -> None:
        """unsound: name of a parameter with a number that is not finite; "" if there is none.

        Raises:
          Paused: a gate says pause.
          RunError: a gate says stop.
        """
        if unsound:
            raise _stop(f"RL step {step}: parameter {unsound} is not finite")
        kl = figures["sampler_kl"]
        # Also where it is not a number at all.
        if not kl <= self._cfg.sampler_kl:
            self._act(
                self._cfg.on_mismatch,
                f"RL step {step}: sampler_kl={kl:.3g} is above "
                f"gates.sampler_kl={self._cfg.sampler_kl:g}: sampler and trainer disagree",
                "mismatch",
            )
        if figures["skipped"]:
            self._warn(
                f"RL step {step}: {figures['skipped']:.0%} of the updates were skipped, as their "
                "gradients were not finite",
                "skipped",
            )
        self._num_skipped = self._num_skipped + 1 if figures["skipped"] == 1.0 else 0
        if self._num_skipped >= self._cfg.skipped_steps:
            self._act(
                self._cfg.on_skipped,
                f"RL step {step}: {self._num_skipped} steps in a row without an update, as no "
                "gradient was finite (gates.skipped_steps)",
                "skipped_steps",
            )

    def _act(self, action: str, why: str, kind: str) -> None:
        if action == "warn":
            self._warn(why, kind)
        elif action == "pause":
            raise Paused(why)
        else:
            raise _stop(why)

    def _warn(self, why: str, kind: str) -> None:
        count = self._num_warnings[kind] = self._num_warnings.get(kind, 0) + 1
        if count & (count - 1) == 0:
            self._note(f"warning: {why}" + (f" ({count} times so far)" if count > 1 else ""))


def _stop(why: str) -> RunError:
    return RunError(
        f"{why}; this step is not saved, the last checkpoint is from before", exits.GATE
    )
