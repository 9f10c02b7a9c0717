"""Graders and what is added to the outcome."""

from typing import Annotated, Literal

from pydantic import Field

from cir_jax.config.base import NonNegativeInt, PositiveFloat, PositiveInt, Section

AnswerFormat = Literal["boxed", "angles"]


class RewardConfig(Section):
    """Graders: +1 if the last answer of model-written text is right, else -1 (CIR)."""

    num_workers: PositiveInt = 1
    """Grader processes on this host."""
    timeout_s: PositiveFloat = 10.0
    """Wall time per answer, seconds."""
    step_timeout_s: PositiveFloat = 600.0
    """Wall time of all answers of a step (or evaluation), seconds; those that are not graded by
    then count as timed out."""
    answer_format: AnswerFormat = "boxed"
    """How a response says its answer: boxed, in \\boxed{} (CIR), or angles, in <<<>>> (R1-CI)."""
    mode: Literal["strict", "lenient"] = "strict"
    """strict: the last answer of model-written text. lenient, for comparison with evaluations by
    math-verify alone: its own search of all model-written text, box or none."""
    gym_threshold: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Least score of Reasoning-Gym that is correct; its scorers give parts to what is partly right,
    and hundredths to any answer."""
    overlong_buffer: NonNegativeInt = 0
    """Tokens before rollout.max_response_tokens from which on a response loses reward, at the end
    overlong_factor (DAPO: 4096 of 20480); 0 = off (CIR)."""
    overlong_factor: PositiveFloat = 1.0
    """What the longest responses lose (DAPO: 1)."""
    failed_code_penalty: Annotated[float, Field(ge=0)] = 0.0
    """Taken off where any program failed (ToRL's ablation: 0.5; CIR: 0)."""
    format_reward: Annotated[float, Field(ge=0)] = 0.0
    """Given where all replies before the answer keep the format, taken off where one does not
    (R1-CI v2: 0.1; CIR: 0)."""
    turn_penalty: Annotated[float, Field(ge=0)] = 0.0
    """Taken off above turn_limit turns (R1-CI v2: 0.1; CIR: 0)."""
    turn_limit: PositiveInt = 6
    """Turns of the model, the answer among them, without penalty (R1-CI v2: 6)."""
