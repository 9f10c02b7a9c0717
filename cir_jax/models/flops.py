"""Model FLOPs and bytes: what the mathematics needs, whatever a program does twice.

Source: the accounting of PaLM, arXiv:2204.02311, appendix B, with causal attention counted half.
"""

from cir_jax.config import ModelConfig


def layer_params(cfg: ModelConfig) -> int:
    """Parameters of all layers that every token is multiplied with: all but norms and biases."""
    heads = (2 * cfg.num_heads + 2 * cfg.num_kv_heads) * cfg.head_dim
    return cfg.num_layers * (cfg.width * heads + 3 * cfg.width * cfg.mlp_width)


def matmul_params(cfg: ModelConfig) -> int:
    """The same and the output head; the embedding's lookup multiplies nothing."""
    return layer_params(cfg) + cfg.vocab_size * cfg.width


def prefill_flops(cfg: ModelConfig, rows: int, length: int) -> int:
    """Of the layers, for causal rows of one segment; nothing is predicted."""
    tokens = rows * length
    attention = 4 * cfg.num_heads * cfg.head_dim * length * tokens // 2
    return 2 * layer_params(cfg) * tokens + cfg.num_layers * attention


def forward_flops(cfg: ModelConfig, rows: int, length: int) -> int:
    """Of the same rows, log-probabilities of all tokens included."""
    head = 2 * cfg.vocab_size * cfg.width
    return prefill_flops(cfg, rows, length) + head * rows * length


def train_flops(cfg: ModelConfig, rows: int, length: int) -> int:
    """Of forward and backward pass: the backward takes two products for each of the forward."""
    return 3 * forward_flops(cfg, rows, length)


def decode_flops(cfg: ModelConfig, rows: int, length: float) -> float:
    """Of one decode step of rows that attend to this many positions in the mean."""
    attention = 4 * cfg.num_heads * cfg.head_dim * length
    return rows * (2 * matmul_params(cfg) + cfg.num_layers * attention)


def decode_bytes(cfg: ModelConfig, rows: int, length: float, itemsize: int) -> float:
    """That such a step must read: the matrices once, and each row's keys and values.

    itemsize: bytes of a weight and of a number in the cache.
    """
    cached = 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim * length
    return itemsize * (matmul_params(cfg) + rows * cached)
