"""The contender of `bench decode` that people use today: transformers' generate, on torch."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cir_jax.bench.ceiling import seconds
from cir_jax.bench.contest import Figures, serve

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def start(
    *,
    config: dict[str, Any],
    directory: str,
    slots: int,
    prompt: int,
    new: int,
    dtype: str,
    top_p: float,
) -> Callable[[], Figures]:
    """config: a config.json; directory: of the weights, "" for random ones."""
    torch.manual_seed(0)
    if directory:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=_DTYPES[dtype])
    else:
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**config), dtype=_DTYPES[dtype]
        )
    model.eval()
    ids = torch.randint(0, config["vocab_size"], (slots, prompt))

    def generate() -> None:
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=top_p,
            min_new_tokens=new,
            max_new_tokens=new,
            pad_token_id=0,
        )
        if out.shape != (slots, prompt + new):
            raise RuntimeError(f"rows of {out.shape[1]} tokens")

    return lambda: {"seconds": seconds(generate)}


if __name__ == "__main__":
    serve(start)
