"""One TOML file is one run: typed sections, `key.path=value` overrides, errors that name the key.

Every field's docstring gives its unit, and the source where a paper fixes its value;
`cir-jax train --help` prints them. Nothing here imports jax, so a bad config fails at once.
"""

from cir_jax.config.base import Section
from cir_jax.config.data import ColumnsConfig, DataConfig
from cir_jax.config.errors import ConfigError
from cir_jax.config.files import (
    CONFIG_FILE,
    asset_dir,
    check_key,
    differences,
    from_tree,
    from_tree_alone,
    holds_run,
    holds_weights,
    load,
    load_alone,
    load_run,
    override,
    save_run,
    to_tree,
    tree_differences,
    weights_in,
    with_values,
)
from cir_jax.config.hosts import HostsConfig
from cir_jax.config.keys import describe, section_of
from cir_jax.config.mesh import MeshConfig
from cir_jax.config.metrics import MetricsConfig
from cir_jax.config.model import ComputeConfig, LoRAConfig, ModelConfig, YarnConfig
from cir_jax.config.presets import PRESETS, preset
from cir_jax.config.reward import AnswerFormat, RewardConfig
from cir_jax.config.sections import (
    UPKEEP,
    Config,
    CriticConfig,
    EvalConfig,
    OptimConfig,
    ResultConfig,
    RLConfig,
    RolloutConfig,
    SandboxConfig,
    SFTConfig,
    eval_max_calls,
    max_calls_at,
    most_calls,
)
from cir_jax.config.survival import CheckpointConfig, GatesConfig, WatchdogConfig

__all__ = [
    "CONFIG_FILE",
    "PRESETS",
    "UPKEEP",
    "AnswerFormat",
    "CheckpointConfig",
    "ColumnsConfig",
    "ComputeConfig",
    "Config",
    "ConfigError",
    "CriticConfig",
    "DataConfig",
    "EvalConfig",
    "GatesConfig",
    "HostsConfig",
    "LoRAConfig",
    "MeshConfig",
    "MetricsConfig",
    "ModelConfig",
    "OptimConfig",
    "RewardConfig",
    "RLConfig",
    "ResultConfig",
    "RolloutConfig",
    "SandboxConfig",
    "Section",
    "SFTConfig",
    "WatchdogConfig",
    "YarnConfig",
    "asset_dir",
    "check_key",
    "describe",
    "differences",
    "eval_max_calls",
    "from_tree",
    "from_tree_alone",
    "holds_run",
    "holds_weights",
    "load",
    "load_alone",
    "load_run",
    "max_calls_at",
    "most_calls",
    "override",
    "preset",
    "save_run",
    "section_of",
    "to_tree",
    "tree_differences",
    "weights_in",
    "with_values",
]
