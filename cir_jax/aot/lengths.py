"""What a step of RL is taken to look like: mean lengths, and what follows of them."""

import dataclasses
import math

from cir_jax.config import Config


@dataclasses.dataclass(frozen=True)
class Lengths:
    """prompt, response, output: mean tokens of a prompt, of a response with the outputs of its
    programs, and of one output. outputs: of each response, in the mean."""

    prompt: int
    response: int
    output: int
    outputs: float

    def rows(self, cfg: Config, sequences: int) -> int:
        """Packed rows of so many."""
        return math.ceil(sequences * (self.prompt + self.response) / cfg.max_length)

    def bucket(self, longest: int) -> int:
        """Positions of the cache that attention reads, in the mean: up to a device's longest row,
        taken to be twice a mean response."""
        return min(longest, self.prompt + 2 * self.response)


def default(cfg: Config, prompt: int | None, response: int | None) -> Lengths:
    """A quarter of the prompt's limit, three tenths of the response's, and one output each."""
    return Lengths(
        prompt=prompt or max(1, cfg.data.max_prompt_tokens // 4),
        response=response or max(1, cfg.rollout.max_response_tokens * 3 // 10),
        # About four characters a token, and the fences around them.
        output=min(cfg.rollout.result.max_chars, 400) // 4 + 8,
        outputs=1.0,
    )
