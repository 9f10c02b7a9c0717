"""What responses did with code: shares and means over trajectories.

Source: CIR, arXiv:2505.24480, analysis of code usage.
"""

from collections.abc import Sequence
from typing import get_args

import numpy as np

from cir_jax.records import ExecStatus, Score, Trajectory

# Of programs that responses hold; one that the sandbox failed on ends the run.
ENDS = [status for status in get_args(ExecStatus) if status != "infra"]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0


def code_stats(trajectories: Sequence[Trajectory], scores: Sequence[Score]) -> dict[str, float]:
    """Shares are of responses unless the name says otherwise; lengths in tokens.

    code_share: at least one executed program; needed_code_share: the same on the problems that
    need it; programs_ok_share: of programs, those that ran without error or timeout;
    programs_STATUS: number of programs that ended so;
    correct_after_failure_share: of correct responses, those with a failed program; cut_share:
    ended by a limit, late_share by one on wall-clock time.
    """
    calls = [call for t in trajectories for call in t.calls]
    correct = [t for t, s in zip(trajectories, scores, strict=True) if s.value > 0]
    failed = [any(c.result.status != "ok" for c in t.calls) for t in correct]
    return {
        "accuracy": len(correct) / max(1, len(trajectories)),
        "code_share": _mean([bool(t.calls) for t in trajectories]),
        "needed_code_share": _mean([bool(t.calls) for t in trajectories if t.problem.needs_code]),
        "calls_per_response": len(calls) / max(1, len(trajectories)),
        "programs_ok_share": _mean([c.result.status == "ok" for c in calls]),
        **{f"programs_{name}": sum(c.result.status == name for c in calls) for name in ENDS},
        "correct_after_failure_share": _mean(failed),
        "response_tokens": _mean([t.num_response_tokens for t in trajectories]),
        "cut_share": _mean([t.stop_reason != "eos" for t in trajectories]),
        "late_share": _mean([t.stop_reason in ("row_time", "step_time") for t in trajectories]),
    }


def accuracy_by_task(
    trajectories: Sequence[Trajectory], scores: Sequence[Score]
) -> dict[str, float]:
    """Share of correct responses of each task, by name."""
    by_task: dict[str, list[float]] = {}
    for t, s in zip(trajectories, scores, strict=True):
        by_task.setdefault(t.problem.task, []).append(float(s.value > 0))
    return {task: _mean(values) for task, values in sorted(by_task.items())}
