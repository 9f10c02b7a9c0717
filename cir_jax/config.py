"""One TOML file is one run: typed sections, `key.path=value` overrides, errors that name the key.

Every field's docstring gives its unit, and the source where a paper fixes its value;
`cir-jax train --help` prints them. Nothing here imports jax, so a bad config fails at once.
"""

import difflib
import functools
import json
import re
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pydantic
from pydantic import Field

CONFIG_FILE = "config.json"
PARAMS_DIR = "params"
PACKAGE_PREFIX = "package:"
ASSETS = Path(__file__).parent / "assets"

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class ConfigError(ValueError):
    """A config that cannot be used; the message is one line with key, value and expectation."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))


class Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class YarnConfig(Section):
    """YaRN scaling of the rotary embedding, for contexts longer than the model was trained on."""

    factor: Annotated[float, Field(ge=1)]
    """Context length divided by original_length (YaRN, section 2.3: s)."""
    original_length: PositiveInt
    """Context that the model was trained on before, positions (YaRN, section 2.3: L)."""
    beta_fast: PositiveFloat = 32.0
    """Wavelengths with more turns than this within original_length stay (YaRN, section 3.2)."""
    beta_slow: PositiveFloat = 1.0
    """Wavelengths with fewer turns than this are stretched by factor (YaRN, section 3.2)."""
    attention_factor: PositiveFloat | None = None
    """Scales cos and sin; null (leave out) = 0.1 ln(factor) + 1 (YaRN, section 3.4)."""
    truncate: bool = True
    """Round the two ends of the ramp between beta_fast and beta_slow outwards to whole pairs."""

    @pydantic.model_validator(mode="after")
    def _ramp(self) -> "YarnConfig":
        if self.beta_fast < self.beta_slow:
            raise ValueError(
                f"beta_fast={self.beta_fast}: must be at least beta_slow={self.beta_slow}"
            )
        return self


class ModelConfig(Section):
    """A Qwen2.5- or Qwen3-shaped decoder (dense)."""

    vocab_size: PositiveInt
    """Rows of the embedding table, tokens; at least the tokenizer's size."""
    width: PositiveInt
    """Residual width D."""
    num_layers: PositiveInt
    """Decoder blocks L."""
    num_heads: PositiveInt
    """Query heads N."""
    num_kv_heads: PositiveInt
    """Key/value heads K; divides num_heads."""
    head_dim: PositiveInt
    """Width of one head H; even."""
    mlp_width: PositiveInt
    """Hidden width F of the gated MLP."""
    rope_theta: PositiveFloat
    """Base of the rotary embedding's wavelengths, positions."""
    norm_eps: PositiveFloat = 1e-6
    """Added to the mean square in RMSNorm."""
    qkv_bias: bool = True
    """Bias on the q, k, v projections (Qwen2.5: true, Qwen3: false)."""
    qk_norm: bool = False
    """RMSNorm on each query and key head (Qwen3: true)."""
    tied_embeddings: bool = True
    """The output head is the embedding table."""
    max_positions: PositiveInt = 32768
    """Context named in exported configs, positions; nothing here is cut at it."""
    yarn: YarnConfig | None = None
    """Null (leave out): plain rotary embedding."""

    @pydantic.model_validator(mode="after")
    def _shapes(self) -> "ModelConfig":
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads}: must divide num_heads={self.num_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: must be even for rotary embedding")
        return self


class MeshConfig(Section):
    """Devices per mesh axis; their product must be the number of devices."""

    data: PositiveInt = 1
    """Devices that hold copies of the parameters and share the rows."""
    fsdp: PositiveInt = 1
    """Devices that share the rows and the parameters."""
    tensor: PositiveInt = 1
    """Devices that share heads, MLP and vocabulary."""


class DataConfig(Section):
    """Problems and prompts."""

    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    """Task kinds drawn with equal weight; names from cir_jax/data/tasks.py."""
    template: str = "{question}\n"
    """Prompt text; {question} is replaced. Raw text, no chat template (CIR, Math base model)."""
    max_prompt_tokens: PositiveInt = 1024
    """Longer prompts are an error, never cut, tokens (CIR: 1024)."""

    @pydantic.field_validator("template")
    @classmethod
    def _template(cls, value: str) -> str:
        if "{question}" not in value:
            raise ValueError("must contain {question}")
        return value


class OptimConfig(Section):
    """AdamW with global-norm clipping; a non-finite gradient norm skips the step."""

    learning_rate: PositiveFloat = 1e-6
    """Peak learning rate (CIR: 1e-6)."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant (CIR), or cosine to a tenth of the peak at the last update."""
    warmup_steps: NonNegativeInt = 0
    """Updates of linear warm-up (CIR: 0)."""
    beta1: Share = 0.9
    """Decay of the first moment (CIR: 0.9)."""
    beta2: Share = 0.999
    """Decay of the second moment (CIR: 0.999)."""
    eps: PositiveFloat = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay (CIR: 0.01)."""
    clip_norm: PositiveFloat = 1.0
    """Global norm to which gradients are scaled down (CIR: 1.0)."""


class SFTConfig(Section):
    """Cold start by masked fine-tuning on generated trajectories (R1-CI, first stage)."""

    weights: str = ""
    """Directory (or package:NAME) of weights to start from, as import-hf writes it or a Hugging
    Face one; if set, no SFT steps are run."""
    steps: NonNegativeInt = 0
    """Updates."""
    num_trajectories: PositiveInt = 20000
    """Trajectories written by the generator, their programs run in the sandbox."""
    text_share: Share = 0.6
    """Share of trajectories that answer by text alone, right or (on hard problems) guessed."""
    failed_share: Share = 0.1
    """Share of the programs' trajectories whose first program fails and is then mended."""
    batch_size: PositiveInt = 32
    """Trajectories per update (R1-CI: 32)."""
    micro_rows: PositiveInt = 16
    """Packed rows per forward/backward pass."""
    optim: OptimConfig = OptimConfig()
    """Optimizer of the SFT phase."""


Budget = NonNegativeInt | tuple[tuple[NonNegativeInt, NonNegativeInt], ...]


class RolloutConfig(Section):
    """Sampling with code execution between decode segments."""

    prompts_per_step: PositiveInt = 128
    """Problems per RL step, P (CIR: 128)."""
    samples_per_prompt: PositiveInt = 16
    """Responses per problem, G (CIR: 16)."""
    temperature: PositiveFloat = 1.0
    """Divides the logits, in sampling and in training (CIR: 1.0)."""
    max_calls: Budget = ((0, 2), (100, 3), (200, 4))
    """Executed programs per response: a number, or [[from RL step, calls], ...]; 0 = text only
    (CIR: 2, 3 from step 100, 4 from step 200)."""
    max_response_tokens: PositiveInt = 4096
    """Model and tool tokens per response (CIR: 4096)."""
    slots: PositiveInt = 64
    """Rows decoded together."""
    segment_steps: PositiveInt = 16
    """Decode steps between two looks of the host, tokens per row."""
    prefill_rows: PositiveInt = 16
    """Rows per prefill launch."""
    prefill_chunk: PositiveInt = 64
    """Tokens per row and prefill launch."""

    @pydantic.field_validator("max_calls", mode="wrap")
    @classmethod
    def _schedule(cls, value: Any, validate: Callable[[Any], Budget]) -> Budget:
        try:
            budget = validate(value)
        except pydantic.ValidationError:
            # A union's own errors speak of one of its types only.
            raise ValueError(
                "must be a whole number >= 0, or [[step, calls], ...] of such numbers"
            ) from None
        if isinstance(budget, int):
            return budget
        steps = [step for step, _ in budget]
        if not steps or steps[0] != 0 or steps != sorted(set(steps)):
            raise ValueError("the schedule's steps must start at 0 and rise")
        return budget


class SandboxConfig(Section):
    """Worker processes that run model-written programs."""

    num_workers: PositiveInt = 2
    """Programs run at the same time on this host."""
    timeout_s: PositiveFloat = 5.0
    """Wall time per program, seconds (CIR: 5)."""
    memory_bytes: PositiveInt = 2 * 1024**3
    """Address space per program, bytes."""


class RewardConfig(Section):
    """Graders: +1 if the last box of model-written text is right, else -1 (CIR)."""

    num_workers: PositiveInt = 1
    """Grader processes on this host."""
    timeout_s: PositiveFloat = 10.0
    """Wall time per answer, seconds."""


class RLConfig(Section):
    """Reinforcement learning on outcome rewards."""

    steps: NonNegativeInt = 300
    """RL steps: one rollout batch each (CIR: about 300)."""
    minibatch_prompts: PositiveInt = 64
    """Problems per update; divides rollout.prompts_per_step (CIR: 64, so two updates a step)."""
    micro_rows: PositiveInt = 16
    """Packed rows per forward/backward pass."""
    advantage: Literal["reinforce_pp_baseline"] = "reinforce_pp_baseline"
    """Estimator (CIR: REINFORCE++-baseline)."""
    whiten_tool_tokens: bool = False
    """Count tool tokens in the whitening's weights, as the reference code does."""
    clip_low: Share = 0.2
    """Lower clip distance of the probability ratio (CIR: 0.2)."""
    clip_high: PositiveFloat = 0.28
    """Upper clip distance of the probability ratio: clip-higher (CIR: 0.28)."""
    dual_clip: Annotated[float, Field(gt=1)] = 3.0
    """Bound on the ratio's weight where the advantage is negative (CIR: 3.0)."""
    optim: OptimConfig = OptimConfig()
    """Optimizer of the RL phase."""


class EvalConfig(Section):
    """Held-out evaluation, greedy."""

    num_problems: PositiveInt = 256
    """Held-out problems, split evenly over the tasks."""
    max_calls: NonNegativeInt | None = None
    """Executed programs per response; null (leave out) = the largest of rollout.max_calls."""


class CheckpointConfig(Section):
    """Saved training states."""

    every: PositiveInt = 10
    """Steps between two saves (CIR: 10)."""
    keep: PositiveInt = 2
    """Newest checkpoints kept."""


class Config(Section):
    """A run."""

    name: str
    """Name of the run; its directory is runs/NAME/NNN unless run_dir is set."""
    seed: NonNegativeInt = 0
    """Every random choice of the run is a function of it."""
    run_dir: str = ""
    """Directory of this run; empty: the next free number under runs/NAME."""
    resume: bool = False
    """Go on from the newest checkpoint of run_dir (or of the newest run under runs/NAME)."""
    tokenizer: str
    """Directory of a Hugging Face tokenizer, or package:NAME for one that is shipped."""
    samples_per_log: NonNegativeInt = 8
    """Trajectories written to samples.jsonl per RL step."""
    model: ModelConfig
    mesh: MeshConfig = MeshConfig()
    data: DataConfig
    sft: SFTConfig = SFTConfig()
    rollout: RolloutConfig = RolloutConfig()
    sandbox: SandboxConfig = SandboxConfig()
    reward: RewardConfig = RewardConfig()
    rl: RLConfig = RLConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @pydantic.model_validator(mode="after")
    def _divisible(self) -> "Config":
        if self.rollout.prompts_per_step % self.rl.minibatch_prompts:
            raise ValueError(
                f"rl.minibatch_prompts={self.rl.minibatch_prompts}: must divide "
                f"rollout.prompts_per_step={self.rollout.prompts_per_step}"
            )
        return self

    @property
    def max_length(self) -> int:
        """Tokens of the longest possible trajectory."""
        return self.data.max_prompt_tokens + self.rollout.max_response_tokens


def max_calls_at(budget: Budget, step: int) -> int:
    """The call budget of an RL step: the last entry of the schedule that has begun."""
    if isinstance(budget, int):
        return budget
    return [calls for start, calls in budget if start <= step][-1]


def eval_max_calls(cfg: Config) -> int:
    if cfg.eval.max_calls is not None:
        return cfg.eval.max_calls
    budget = cfg.rollout.max_calls
    return budget if isinstance(budget, int) else max(calls for _, calls in budget)


def asset_dir(path: str) -> Path:
    """Directory that a config names: package:NAME is one shipped with cir_jax."""
    if path.startswith(PACKAGE_PREFIX):
        return ASSETS / path.removeprefix(PACKAGE_PREFIX)
    return Path(path)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a TOML file, applies `key.path=value` overrides and checks everything.

    Raises ConfigError with one line naming the key, its value and the nearest valid name.
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"config={str(path)!r}: is a directory, must be a TOML file")
    if not path.is_file():
        raise ConfigError(missing_file("config", path))
    try:
        text = path.read_text(encoding="utf-8")
        tree = tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a TOML file: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not a TOML file: {_toml_error(error, text)}") from error
    for override in overrides:
        _apply_override(tree, override)
    return from_tree(tree)


def from_tree(tree: dict[str, Any]) -> Config:
    """A Config of plain nested values; lists stand for tuples."""
    try:
        cfg = Config.model_validate(_tuples(tree))
    except pydantic.ValidationError as error:
        raise ConfigError(_one_line(error, tree)) from error
    for key, value in (("tokenizer", cfg.tokenizer), ("sft.weights", cfg.sft.weights)):
        if value and not asset_dir(value).is_dir():
            raise ConfigError(missing_file(key, asset_dir(value)))
    return cfg


def _toml_error(error: tomllib.TOMLDecodeError, text: str) -> str:
    """The parser's message, which names a line by number if at all, with that line's text."""
    at = re.search(r"at line (\d+)", str(error))
    lines = text.splitlines()
    number = int(at.group(1)) if at else len(lines)
    shown = lines[number - 1].strip() if 0 < number <= len(lines) else ""
    return f"{error}: {shown!r}"


def override(cfg: Config, overrides: Sequence[str]) -> Config:
    """The config with `key.path=value` overrides applied."""
    tree = to_tree(cfg)
    for text in overrides:
        _apply_override(tree, text)
    return from_tree(tree)


def save_run(cfg: Config, run_dir: Path) -> None:
    """Writes the resolved config into a run directory."""
    text = json.dumps(to_tree(cfg), indent=1) + "\n"
    (run_dir / CONFIG_FILE).write_text(text, encoding="utf-8")


def holds_run(run_dir: Path) -> bool:
    return (run_dir / CONFIG_FILE).exists()


def holds_weights(directory: Path) -> bool:
    """Whether `cir-jax import-hf` made the directory."""
    return (directory / PARAMS_DIR).is_dir()


def load_run(run_dir: Path) -> Config:
    """The resolved config that a run directory was made with."""
    if not holds_run(run_dir):
        missing = run_dir / CONFIG_FILE if run_dir.is_dir() else run_dir
        raise ConfigError(missing_file("RUN_DIR", missing))
    return from_tree(json.loads((run_dir / CONFIG_FILE).read_text(encoding="utf-8")))


def to_tree(cfg: Config) -> dict[str, Any]:
    """The resolved config as plain nested values (JSON types)."""
    return cfg.model_dump(mode="json")


def missing_file(key: str, path: Path) -> str:
    """One line for a path that is not there, with the nearest name beside it."""
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    hint = f"; nearest: {path.parent / near[0]}" if near else ""
    return f"{key}={str(path)!r}: no such file or directory{hint}"


def describe() -> str:
    """Every key with default and meaning, for the command line's help."""
    return "\n".join(_describe(Config, ""))


def section_of(field: pydantic.fields.FieldInfo) -> type[Section] | None:
    """The section that a field holds, if it holds one: `Section` or `Section | None`."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None


def _describe(section: type[Section], prefix: str) -> list[str]:
    lines = []
    for name, field in section.model_fields.items():
        key = prefix + name
        if inner := section_of(field):
            summary = (inner.__doc__ or "").strip().splitlines()[0]
            lines += ["", f"[{key}]  {summary}", *_describe(inner, key + ".")]
            continue
        default = "required" if field.is_required() else f"default {_toml(field.default)}"
        text = " ".join((field.description or "").split())
        lines += [f"  {key}  ({default})", f"      {text}"]
    return lines


def _toml(value: Any) -> str:
    """The value as a config file would write it; null, which TOML lacks, for None."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if value is None or isinstance(value, bool | str):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def _all_keys(section: type[Section] = Config, prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        if inner := section_of(field):
            keys += _all_keys(inner, prefix + name + ".")
    return keys


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(f"override {override!r}: expected key.path=value")
    if key not in _all_keys():
        raise ConfigError(_unknown(key, _parse_value(text.strip())))
    *parents, leaf = key.split(".")
    for depth, part in enumerate(parents, start=1):
        section = ".".join(parents[:depth])
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{section}={_toml(tree)}: must be a table [{section}]")
    tree[leaf] = _parse_value(text.strip())


def _parse_value(text: str) -> Any:
    """A TOML value; anything that is none is taken as a bare string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    if isinstance(value, list):
        return tuple(_tuples(v) for v in value)
    return value


def _unknown(key: str, value: Any) -> str:
    keys = _all_keys()
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.4)
    if not near:
        leaf = key.rsplit(".", 1)[-1]
        near = [k for k in keys if k.rsplit(".", 1)[-1] == leaf][:1]
    hint = f"nearest valid key: {near[0]}" if near else "cir-jax train --help prints all keys"
    return f"{key}={_toml(value)}: unknown key; {hint}"


# What a value of the wrong type should be, in TOML's words instead of pydantic's.
_TYPES = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "a string, in quotes",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "too_short": "a list with at least one entry",
    "finite_number": "finite",
}


def _one_line(error: pydantic.ValidationError, tree: dict[str, Any]) -> str:
    # An unknown key first: misspelt, it is also the reason why another is missing.
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    valid = set(_all_keys())
    key = ""
    for part in first["loc"]:
        candidate = f"{key}.{part}" if key else str(part)
        if candidate not in valid and first["type"] != "extra_forbidden":
            break
        key = candidate
    if first["type"] == "extra_forbidden":
        return _unknown(key, first["input"])
    if first["type"] == "missing":
        return f"{key}: missing; {_meaning(key)}"
    if first["type"] == "model_type":
        return f"{key}={_toml(first['input'])}: must be a table [{key}]"
    message = first["msg"].removeprefix("Value error, ")
    if isinstance(first["input"], dict):
        # From a check over a whole section, which names the field itself.
        return f"{key}.{message}" if key else message
    if first["type"] in _TYPES:
        message = f"must be {_TYPES[first['type']]}"
    message = message.replace("Input should be", "must be")
    # The whole value, where the error is about an entry of a list.
    value = functools.reduce(lambda section, part: section[part], key.split("."), tree)
    return f"{key}={_toml(value)}: {message}; {_meaning(key)}"


def _meaning(key: str) -> str:
    section: Any = Config
    *parents, leaf = key.split(".")
    for part in parents:
        section = section_of(section.model_fields[part])
    return " ".join((section.model_fields[leaf].description or f"a table [{key}]").split())
