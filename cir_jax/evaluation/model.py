"""What MODEL|RUN|CONFIG of `cir-jax eval` is: a config, and weights that are yet to be read.

jax is imported when they are read: a bad config fails at once.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cir_jax import config as configs
from cir_jax.config import Config, ConfigError
from cir_jax.config.errors import missing_file
from cir_jax.data import sources

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from cir_jax.models import qwen


@dataclasses.dataclass(frozen=True)
class Model:
    """A model with its config.

    identity, weights: tell it from others, and from what lies in its place later. folder: where its
    evaluations are put if nothing else is said. load: reads the parameters, and says of what stage
    they are; ConfigError if they cannot be read.
    """

    name: str
    cfg: Config
    identity: str
    weights: list[str]
    folder: Path
    load: "Callable[[Mesh], tuple[qwen.Params, str]]"


def find_model(
    name: str, values: Mapping[str, Any], overrides: Sequence[str], files: Sequence[Path]
) -> Model:
    """Of a TOML file (its sft.weights, or random ones), of weights, or of a run's newest ones.

    values: of keys of the config that the suite changes; overrides win over them. files: of
    problems, which a config for weights alone takes as its data.

    Raises ConfigError if there is no such file or directory, or nothing in it.
    """
    path = configs.asset_dir(name)
    if path.suffix == ".toml":
        cfg = configs.load(path, overrides)
        make = _of_config
    elif not path.is_dir():
        raise ConfigError(missing_file("MODEL", path))
    elif configs.holds_weights(path):
        cfg = configs.override(_config_of_weights(name, path, files), overrides)
        make = _of_weights
    elif configs.holds_run(path):
        cfg = configs.override(configs.load_run(path), overrides)
        make = _of_run
    else:
        raise ConfigError(f"MODEL={name!r}: holds neither a run nor weights")
    given = {override.partition("=")[0].strip() for override in overrides}
    cfg = configs.with_values(cfg, {k: v for k, v in values.items() if k not in given})
    sources.check(cfg.data)
    return make(name, path, cfg)


def _of_config(name: str, path: Path, cfg: Config) -> Model:
    given = cfg.sft.weights

    def load(mesh: "Mesh") -> "tuple[qwen.Params, str]":
        from cir_jax.train.loop import given_params
        from cir_jax.train.state import init_params

        if given:
            return given_params("sft.weights", given, cfg.model, mesh, cfg.seed), "sft.weights"
        return init_params(cfg.model, mesh, cfg.seed), "random weights"

    weights = configs.weights_in(configs.asset_dir(given)) if given else ["random"]
    return Model(cfg.name, cfg, given, weights, Path("runs/evals"), load)


def _config_of_weights(name: str, path: Path, files: Sequence[Path]) -> Config:
    if not files:
        raise ConfigError(
            f"MODEL={name!r}: holds weights alone; --suite says what they are to be asked"
        )
    from cir_jax.models.hf_config import read_config

    try:
        model = read_config(path)
    except ValueError as error:
        raise ConfigError(f"MODEL={name!r}: {error}") from error
    return configs.from_tree(
        {
            "name": path.resolve().name,
            "tokenizer": name,
            "model": model.model_dump(mode="json"),
            # Decoding in bfloat16 is for who asks for it.
            "compute": {"dtype": "float32"},
            "data": dict.fromkeys(("files", "eval_files"), [str(file) for file in files]),
        }
    )


def _of_weights(name: str, path: Path, cfg: Config) -> Model:
    def load(mesh: "Mesh") -> "tuple[qwen.Params, str]":
        from cir_jax.train.loop import given_params

        return given_params("MODEL", name, cfg.model, mesh, cfg.seed), "weights"

    identity, weights = str(path.resolve()), configs.weights_in(path)
    return Model(cfg.name, cfg, identity, weights, Path("runs/evals"), load)


def _of_run(name: str, path: Path, cfg: Config) -> Model:
    def load(mesh: "Mesh") -> "tuple[qwen.Params, str]":
        from cir_jax.train.loop import newest_stage

        return newest_stage(cfg, path, mesh)

    title, weights = "/".join(path.resolve().parts[-2:]), configs.weights_in(path)
    return Model(title, cfg, str(path.resolve()), weights, path / "evals", load)
