"""The contender of `bench update` that people use today: transformers and torch (an extra)."""

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cir_jax.bench.ceiling import SQUARE, product_rate, seconds
from cir_jax.bench.contest import Figures, serve
from cir_jax.config import RLConfig

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def start(*, config: dict[str, Any], batch: int, length: int, dtype: str) -> Callable[[], Figures]:
    """config: a config.json. No gradient checkpointing, which is its fastest form."""
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    policy.train()
    ids = torch.randint(0, config["vocab_size"], (batch, length))
    advantage = torch.randn(batch, 1)
    old_logp = torch.full((batch, length - 1), -math.log(config["vocab_size"]))
    square = torch.ones((SQUARE, SQUARE), dtype=_DTYPES[dtype])
    rl = RLConfig()

    def step() -> None:
        with torch.autocast("cpu", _DTYPES[dtype], enabled=dtype != "float32"):
            logits = policy(ids, use_cache=False).logits[:, :-1].float()
        logp = torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]
        ratio = torch.exp(logp - old_logp)
        clipped = ratio.clip(1 - rl.clip_low, 1 + rl.clip_high)
        loss = torch.maximum(-advantage * ratio, -advantage * clipped)
        dual = torch.minimum(loss, -advantage * rl.dual_clip)
        torch.where(advantage < 0, dual, loss).mean().backward()
        policy.zero_grad()

    def measure() -> Figures:
        ceiling = product_rate(lambda: square @ square)
        return {"seconds": seconds(step), "matmul_flops_per_s": ceiling}

    return measure


if __name__ == "__main__":
    serve(start)
