"""Compares the quantities of a golden batch with those that are computed anew."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from cir_jax.parity.golden import COMPARED, Golden
from cir_jax.parity.quantities import Weights


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """|file - here| <= absolute + relative * |here|."""

    absolute: float
    relative: float

    def times(self, scale: float) -> "Tolerance":
        return Tolerance(self.absolute * scale, self.relative * scale)


# Of what a few float32 operations make, and of what a model's forward or backward pass makes.
_OF_TOKENS = Tolerance(1e-5, 1e-4)
_OF_MODEL = Tolerance(1e-3, 1e-3)
_BY_MODEL = ("log_probs", "old_log_probs", "ref_log_prob", "entropy", "grad_norm")
_EXACT = ("position_ids",)


@dataclasses.dataclass(frozen=True)
class Finding:
    """Of one quantity. reason: why it was not compared, or where it first differs."""

    name: str
    compared: bool
    differs: bool
    largest: float
    largest_relative: float
    tolerance: Tolerance
    reason: str


def tolerance_of(name: str, weights: Weights | None) -> Tolerance:
    if name in _EXACT:
        return Tolerance(0.0, 0.0)
    of_model = name in _BY_MODEL or (name == "loss" and weights is not None)
    return _OF_MODEL if of_model else _OF_TOKENS


def compare(
    batch: Golden, here: Mapping[str, np.ndarray], weights: Weights | None, scale: float
) -> list[Finding]:
    """One finding for each quantity that a batch may have. scale: of all tolerances."""
    return [
        _finding(name, batch, here, tolerance_of(name, weights).times(scale), weights)
        for name in COMPARED
    ]


def _finding(
    name: str,
    batch: Golden,
    here: Mapping[str, np.ndarray],
    tolerance: Tolerance,
    weights: Weights | None,
) -> Finding:
    if name not in batch:
        return Finding(name, False, False, 0.0, 0.0, tolerance, "not in the file")
    if name not in here:
        return Finding(name, False, False, 0.0, 0.0, tolerance, _why_not(name, batch, weights))
    counts = _counted(name, batch)
    theirs, ours = batch[name].astype(np.float64), here[name].astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        difference = np.where(counts, np.abs(theirs - ours), 0)
        relative = np.where(difference == 0, 0, difference / np.abs(ours))
        # What is not finite is within no tolerance.
        off = counts & ~(difference <= tolerance.absolute + tolerance.relative * np.abs(ours))
    where = ""
    if off.any():
        at = tuple(int(i) for i in np.argwhere(off)[0])
        where = (
            f"first at {_place(name, batch, at)}: file {theirs[at]:.8g}, here {ours[at]:.8g}; "
            f"{int(off.sum())} of {int(counts.sum())}"
        )
    return Finding(
        name,
        True,
        bool(off.any()),
        float(np.max(difference)),
        float(np.max(relative)),
        tolerance,
        where,
    )


def _counted(name: str, batch: Golden) -> np.ndarray:
    """Where a quantity means something."""
    axes = COMPARED[name].axes
    if axes == "BT":
        return batch.attended
    if name == "token_level_rewards":
        return batch.response(batch.attended)
    return batch.trained if axes == "BR" else np.ones(batch[name].shape, bool)


def _place(name: str, batch: Golden, at: tuple[int, ...]) -> str:
    if COMPARED[name].axes == "M":
        return f"mini-batch {at[0]}"
    b, t = at
    is_response = COMPARED[name].axes == "BR"
    ids = batch.response(batch["input_ids"]) if is_response else batch["input_ids"]
    token = "response token" if is_response else "token"
    return f"row {b} (uid {batch['uid'][b]}), {token} {t} (id {ids[b, t]})"


def _why_not(name: str, batch: Golden, weights: Weights | None) -> str:
    rl = batch.rl
    if name == "returns" and rl.advantage != "gae":
        return f"rl.advantage={rl.advantage!r} has no critic"
    if name in ("returns", "vf_loss", "advantages") and "values" not in batch:
        return "needs values"
    if name == "kl_loss" and not (rl.kl_coef and rl.kl_in == "loss"):
        return "no KL in the loss"
    if name == "rollout_is_weights" and rl.importance_cap is None:
        return "rl.importance_cap is not set"
    if name == "log_probs" and "old_log_probs" not in batch:
        return "needs old_log_probs"
    if name == "old_log_probs" and weights is not None and "log_probs" in batch:
        return "of other weights than log_probs, which are those of --model"
    if name == "ref_log_prob":
        return "needs --reference"
    if weights is None and (name in _BY_MODEL or (name == "loss" and rl.entropy_coef)):
        return "needs --model"
    needed = ["old_log_probs"]
    needed += ["ref_log_prob"] if rl.kl_coef else []
    needed += ["rollout_log_probs"] if rl.importance_cap is not None else []
    missing = [field for field in needed if field not in batch]
    return f"needs {', '.join(missing or ['advantages'])}"
