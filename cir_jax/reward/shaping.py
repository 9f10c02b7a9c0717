"""What is added to the outcome for how a response came about; all off unless the config says so."""

from collections.abc import Sequence

from cir_jax.config import RewardConfig
from cir_jax.records import Trajectory

_OPENING = "```python"


def shaping(
    cfg: RewardConfig, trajectory: Trajectory, turns: Sequence[str], max_response_tokens: int
) -> float:
    """The sum of the terms below, each with its weight.

    turns: what the model wrote, in stretches between tool outputs.
    """
    return (
        overlong(
            trajectory.num_response_tokens,
            max_response_tokens,
            cfg.overlong_buffer,
            cfg.overlong_factor,
        )
        - cfg.failed_code_penalty * any(c.result.status != "ok" for c in trajectory.calls)
        + cfg.format_reward * keeps_format(trajectory, turns)
        - cfg.turn_penalty * (len(turns) > cfg.turn_limit)
    )


def overlong(length: int, longest: int, buffer: int, factor: float) -> float:
    """0 up to longest - buffer tokens, from there straight down to -factor at the longest.

    min(-(length - (longest - buffer)) / buffer * factor, 0); 0 without a buffer.
    Source: DAPO's soft overlong punishment, arXiv:2503.14476, section 3.4.
    """
    if not buffer:
        return 0.0
    return min((longest - buffer - length) / buffer * factor, 0.0)


def keeps_format(trajectory: Trajectory, turns: Sequence[str]) -> int:
    """+1 or -1: whether the replies before the answer keep to the format; 0 if there are none.

    Each that was executed did. What broke it shows in the last turn: a block that was begun and
    not executed (unclosed, blank or beyond the budget), or no end at all.
    Source: R1-Code-Interpreter v2, arXiv:2505.21668, of which only the term's size is known.
    """
    unexecuted = bool(turns) and _OPENING in turns[-1]
    if not trajectory.calls and not unexecuted:
        return 0
    return -1 if unexecuted or trajectory.stop_reason != "eos" else 1
