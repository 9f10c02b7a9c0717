"""A run's config: every other section, from data to checkpoints, and the whole."""

import urllib.parse
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from pydantic import Field

from cir_jax.config.base import NonNegativeInt, PositiveFloat, PositiveInt, Section, Share
from cir_jax.config.data import DataConfig
from cir_jax.config.hosts import HostsConfig
from cir_jax.config.mesh import MeshConfig
from cir_jax.config.metrics import MetricsConfig
from cir_jax.config.model import ComputeConfig, ModelConfig
from cir_jax.config.reward import RewardConfig
from cir_jax.config.survival import CheckpointConfig, GatesConfig, WatchdogConfig


class OptimConfig(Section):
    """AdamW with global-norm clipping; a non-finite gradient norm skips the step."""

    learning_rate: PositiveFloat = 1e-6
    """Peak learning rate (CIR: 1e-6)."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant (CIR), or half a cosine, down to final_share at the last
    update."""
    final_share: Share = 0.1
    """Learning rate at the cosine's end, as a share of the peak."""
    warmup_steps: NonNegativeInt = 0
    """Updates of linear warm-up (CIR: 0)."""
    warmup_share: Share = 0.0
    """The same as a share of all updates, rounded up (R1-CI's predecessor: 0.1)."""
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
    moments: Literal["float32", "bfloat16"] = "float32"
    """Type that Adam's two moments are stored in; they are updated in float32."""

    @pydantic.model_validator(mode="after")
    def _one_warmup(self) -> "OptimConfig":
        if self.warmup_steps and self.warmup_share:
            raise ValueError(
                f"warmup_share={self.warmup_share:g}: only without warmup_steps="
                f"{self.warmup_steps}, which says the same"
            )
        return self


class SFTConfig(Section):
    """Cold start by masked fine-tuning on trajectories (R1-CI, first stage)."""

    weights: str = ""
    """Run directory, or directory (or package:NAME) of weights as import-hf writes it or a Hugging
    Face one. SFT starts from them; without SFT (no steps, no epochs) RL does."""
    data: tuple[str, ...] = ()
    """Files of trajectories, .jsonl, .json or .parquet, as `cir-jax collect` writes them or with
    messages of a chat (train/transcripts.py); empty: a generator writes them."""
    steps: NonNegativeInt = 0
    """Updates; 0 = as many as the epochs have."""
    epochs: NonNegativeInt = 0
    """Passes over the trajectories, in place of steps (R1-CI: 3)."""
    held_out: NonNegativeInt = 0
    """Trajectories that are kept aside to measure their loss: of files at least so many, with all
    others of their questions; of the generator the next ones."""
    held_out_every: PositiveInt = 100
    """Updates between two such measurements; the first is before all, the last after all."""
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

    @pydantic.field_validator("data", mode="before")
    @classmethod
    def _one_file(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @pydantic.model_validator(mode="after")
    def _one_length(self) -> "SFTConfig":
        if self.steps and self.epochs:
            raise ValueError(f"epochs={self.epochs}: only without steps={self.steps}")
        return self

    @property
    def trains(self) -> bool:
        """Whether there is an SFT phase at all."""
        return bool(self.steps or self.epochs)


Budget = NonNegativeInt | tuple[tuple[NonNegativeInt, NonNegativeInt], ...]


class ResultConfig(Section):
    """What the model reads of a program's result: stripped stdout, or the error's last line."""

    max_chars: PositiveInt = 400
    """Of a longer text the first and the last half are kept, with ... between (CIR: 400)."""
    prefix: str = ""
    """Stands before it, line break included, and is not cut (R1-CI: Code Execution Results:)."""

    @pydantic.field_validator("prefix")
    @classmethod
    def _keeps_the_block(cls, value: str) -> str:
        if "```" in value:
            raise ValueError("must not hold ```, which would end the output block")
        return value


class RolloutConfig(Section):
    """Sampling with code execution between decode segments."""

    prompts_per_step: PositiveInt = 128
    """Problems per RL step, P (CIR: 128)."""
    samples_per_prompt: PositiveInt = 16
    """Responses per problem, G (CIR: 16)."""
    temperature: PositiveFloat = 1.0
    """Divides the logits, in sampling and in training (CIR: 1.0)."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Mass of the most likely tokens that are sampled from; 1 = all of them (CIR: 1)."""
    top_k: NonNegativeInt = 0
    """Most likely tokens that are sampled from; 0 = all of them (CIR: all)."""
    min_p: Share = 0.0
    """Least probability of sampled tokens, as a share of the most likely one's; 0 = any (CIR)."""
    max_calls: Budget = ((0, 2), (100, 3), (200, 4))
    """Executed programs per response: a number, or [[from RL step, calls], ...]; 0 = text only
    (CIR: 2, 3 from step 100, 4 from step 200)."""
    raise_calls_above: Share | None = None
    """Raises the budget by one call, for good, after a step in which more than this share of the
    responses used all of it; null (leave out) = max_calls alone (CIR)."""
    calls_limit: NonNegativeInt = 4
    """Calls up to which raise_calls_above goes."""
    refill_rounds: NonNegativeInt = 0
    """Further rounds of prompts_per_step problems in a step that may replace groups whose rewards
    are all equal: dynamic sampling (DAPO: up to 9); 0 = off (CIR)."""
    boundary: Literal["fence", "stop_word"] = "fence"
    """A call begins where a non-blank ```python block closes, or (ablation) where the model itself
    writes ```output after one (CIR: the exact match of the fence)."""
    max_response_tokens: PositiveInt = 4096
    """Model and tool tokens per response (CIR: 4096)."""
    max_context: PositiveInt | None = None
    """Prompt, model and tool tokens per row; null (leave out) = model.max_positions."""
    row_timeout_s: PositiveFloat = 1800.0
    """Seconds after which a row that has entered is ended where it is."""
    step_timeout_s: PositiveFloat = 7200.0
    """Seconds after which all rows of a step (or evaluation) are, begun or not."""
    slots: PositiveInt = 64
    """Rows decoded together, on all devices."""
    segment_steps: PositiveInt = 16
    """Decode steps between two looks of the host, tokens per row."""
    segments_in_flight: PositiveInt = 2
    """Segments that are launched before the host looks at the first of them: 2 leave the devices
    no gap, with 1 rows enter and go on a segment earlier."""
    return_share: Share = 0.25
    """A segment ends early when more than this share of the slots has begun to wait for programs
    in it, or has become free while there are rows to enter."""
    prefill_rows: PositiveInt = 16
    """Rows whose prompts or tool outputs go through the model together."""
    prefill_chunk: PositiveInt = 64
    """Tokens of each of them at a time."""
    result: ResultConfig = ResultConfig()
    """What the model reads of a program's result."""
    cache_dtype: Literal["compute", "int8"] = "compute"
    """Type in which decoding keeps keys and values: compute.dtype, or int8 with one scale for each
    vector, about half of bfloat16's memory; no entry is off by more than a 254th of its vector's
    largest, so log-probabilities are not quite those of the trainer."""

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
    """Where and how model-written programs run."""

    url: str = ""
    """Of a SandboxFusion-compatible service that runs them; empty: worker processes here do."""
    max_requests: PositiveInt = 16
    """Programs sent to that service at the same time."""
    num_workers: PositiveInt = 2
    """Programs run at the same time on this host."""
    timeout_s: PositiveFloat = 5.0
    """Wall time per program, seconds (CIR: 5; R1-CI: 60)."""
    memory_bytes: PositiveInt = 2 * 1024**3
    """Address space per program, bytes."""
    isolation: Literal["namespaces", "landlock"] = "namespaces"
    """namespaces, or nothing runs; landlock is weaker and for containers that forbid namespaces."""
    allow_processes: bool = False
    """Let programs start processes."""
    runtime: str = ""
    """Directory of the packages that programs can import, built there if it is missing; empty: one
    for this version in ~/.cache/cir_jax/runtime; trainer: the trainer's own packages."""
    record: bool = True
    """Write every program and its result to programs.jsonl in the run directory."""
    replay: str = ""
    """Run directory (or its programs.jsonl) whose results are given again: no program runs, and one
    that is not on record ends the run; empty: programs run."""
    recheck_share: Share = 0.01
    """Share of programs that are run twice, to count those that do not do the same again."""

    @pydantic.field_validator("url")
    @classmethod
    def _of_a_service(cls, value: str) -> str:
        problem = "must be http://HOST:PORT or https://HOST, with a path if it has one"
        try:
            parts = urllib.parse.urlsplit(value)
            is_right = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            is_right = False
        if value and (not is_right or "@" in parts.netloc or parts.query or parts.fragment):
            raise ValueError(problem)
        return value


class CriticOptimConfig(OptimConfig):
    """AdamW, as the policy's, with a learning rate of its own."""

    learning_rate: PositiveFloat = 1e-5
    """Peak learning rate (veRL: 1e-5)."""


class CriticConfig(Section):
    """PPO's critic, only with rl.advantage='gae': a model like the policy, from its weights."""

    lam: Share = 1.0
    """GAE's lambda: 1 trusts the outcome alone, 0 the critic's next value."""
    clip: PositiveFloat = 0.5
    """Distance from its old value beyond which a value gets no gradient (veRL: 0.5)."""
    optim: CriticOptimConfig = CriticOptimConfig()
    """Its optimizer."""


class RLConfig(Section):
    """Reinforcement learning on outcome rewards."""

    steps: NonNegativeInt = 300
    """RL steps: one rollout batch each (CIR: about 300)."""
    minibatch_prompts: PositiveInt = 64
    """Problems per update; divides rollout.prompts_per_step (CIR: 64, so two updates a step)."""
    epochs: PositiveInt = 1
    """Times that a step's rollouts are trained on (CIR: 1)."""
    shuffle: bool = False
    """Draw each epoch's mini-batches of problems at random, not in order (CIR: in order)."""
    micro_rows: PositiveInt = 16
    """Packed rows per forward/backward pass."""
    advantage: Literal[
        "reinforce_pp_baseline", "reinforce_pp", "grpo", "dr_grpo", "rloo", "gae"
    ] = "reinforce_pp_baseline"
    """Estimator (CIR: REINFORCE++-baseline; R1-CI, ToRL: GRPO; gae: PPO with a critic); equations
    in rl/advantage.py."""
    gamma: Share = 1.0
    """Discount per model token; only reinforce_pp and gae have a use for it."""
    critic: CriticConfig = CriticConfig()
    """The critic of gae."""
    whiten_tool_tokens: bool = False
    """Let tool tokens carry the advantage and count in its whitening, as in the reference code;
    the loss leaves them out all the same."""
    clip_low: Share = 0.2
    """Lower clip distance of the probability ratio (CIR: 0.2)."""
    clip_high: PositiveFloat = 0.28
    """Upper clip distance of the probability ratio: clip-higher (CIR: 0.28)."""
    dual_clip: Annotated[float, Field(gt=1)] = 3.0
    """Bound on the ratio's weight where the advantage is negative (CIR: 3.0)."""
    loss_mean: Literal["token_mean", "sequence_mean", "sequence_sum", "constant"] = "token_mean"
    """The loss of a mini-batch: the mean over its trained tokens (CIR, DAPO), or over sequences of
    the mean over their tokens (GRPO), of the sum over them, or of this sum by a constant length
    (Dr. GRPO)."""
    loss_length: PositiveInt | None = None
    """Tokens by which loss_mean='constant' divides; null (leave out) =
    rollout.max_response_tokens."""
    train_tool_tokens: bool = False
    """Train on the tool's tokens too, as if the model had written them: the ablation of the
    feedback mask (CIR: off)."""
    kl_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the KL divergence from the weights that RL begins with (CIR: 0; R1-CI: 0.001);
    above 0 these are kept as the reference model."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where it counts: in the loss (GRPO), or taken off each token's reward (PPO)."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Its estimator, rl/kl.py; in the loss k1 has no gradient in the mean."""
    entropy_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the entropy bonus (CIR: 0)."""
    importance_cap: PositiveFloat | None = None
    """Weighs each token by the trainer's over the sampler's probability of it, at most this;
    null (leave out) = no correction (CIR)."""
    optim: OptimConfig = OptimConfig()
    """Optimizer of the RL phase."""


class EvalConfig(Section):
    """Held-out evaluation, greedy."""

    num_problems: NonNegativeInt = 256
    """Held-out problems, split evenly over the tasks; 0 = no evaluation."""
    max_calls: NonNegativeInt | None = None
    """Executed programs per response; null (leave out) = the largest of training."""


class Config(Section):
    """A run."""

    shorthands: ClassVar[dict[str, str]] = {
        "base": "Another TOML file, in or seen from this one's directory, whose keys this file's "
        "change."
    }

    name: str
    """Name of the run; its directory is runs/NAME/NNN unless run_dir is set."""
    seed: NonNegativeInt = 0
    """Every random choice of the run is a function of it."""
    run_dir: str = ""
    """Directory of this run; empty: the next free number under runs/NAME."""
    resume: bool = False
    """Go on from the newest sound checkpoint of run_dir (or of the newest run under runs/NAME);
    begin where there is none: the same command starts a run and goes on with it."""
    resume_step: NonNegativeInt | Literal["best"] | None = None
    """RL step of the checkpoint to go on from (or to evaluate), or best; what came after it is
    dropped. A damaged one is an error then. null (leave out) = the newest sound one."""
    resume_override: tuple[str, ...] = ()
    """Keys, or sections, in which this config may differ from the checkpoint's; `train --override
    KEY` adds one. Any other difference is an error."""
    tokenizer: str
    """Directory of a Hugging Face tokenizer, or package:NAME for one that is shipped."""
    samples_per_log: NonNegativeInt = 8
    """Trajectories written to samples.jsonl per RL step."""
    keep_rollouts: bool = True
    """Write all tokens of each RL step, 9 bytes each before compression, to rollouts/, so that
    `cir-jax diff-runs` can name a row and a token."""
    model: ModelConfig
    mesh: MeshConfig = MeshConfig()
    compute: ComputeConfig = ComputeConfig()
    data: DataConfig
    sft: SFTConfig = SFTConfig()
    rollout: RolloutConfig = RolloutConfig()
    sandbox: SandboxConfig = SandboxConfig()
    reward: RewardConfig = RewardConfig()
    rl: RLConfig = RLConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    hosts: HostsConfig = HostsConfig()
    gates: GatesConfig = GatesConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    metrics: MetricsConfig = MetricsConfig()
    ablate: dict[str, dict[str, Any]] = {}
    """Further keys of the run in which `cir-jax ablate` switches a strategy off, by its name."""

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "Config":
        if self.compute.attention == "cudnn" and self.compute.dtype == "float32":
            raise ValueError("compute.dtype='float32': compute.attention='cudnn' needs 'bfloat16'")
        devices = self.mesh.data * self.mesh.fsdp
        for key, rows in (
            ("sft.micro_rows", self.sft.micro_rows),
            ("rl.micro_rows", self.rl.micro_rows),
        ):
            if rows % devices:
                raise ValueError(
                    f"{key}={rows}: must be a multiple of mesh.data x mesh.fsdp = {devices}, "
                    "the devices that share the rows"
                )
        decoding = self.mesh.decoding
        devices = decoding.data * decoding.fsdp
        if self.rollout.slots % devices:
            others = "mesh.data x mesh.fsdp"
            if self.mesh.decode_tensor is not None:
                others = "all devices / mesh.decode_tensor"
            raise ValueError(
                f"rollout.slots={self.rollout.slots}: must be a multiple of {others} = {devices}, "
                "the devices that share the rows"
            )
        if (self.mesh.decode_tensor or 1) > self.model.num_kv_heads:
            raise ValueError(
                f"mesh.decode_tensor={self.mesh.decode_tensor}: must be at most "
                f"model.num_kv_heads={self.model.num_kv_heads}, the heads that are shared"
            )
        if self.rollout.prompts_per_step % self.rl.minibatch_prompts:
            raise ValueError(
                f"rl.minibatch_prompts={self.rl.minibatch_prompts}: must divide "
                f"rollout.prompts_per_step={self.rollout.prompts_per_step}"
            )
        if self.sft.trains and not self.sft.data and not self.data.tasks:
            key = "steps" if self.sft.steps else "epochs"
            raise ValueError(
                f"sft.{key}={getattr(self.sft, key)}: trajectories are of sft.data, or "
                "demonstrations of data.tasks, and there are neither"
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
    return most_calls(cfg.rollout) if cfg.eval.max_calls is None else cfg.eval.max_calls


def most_calls(cfg: RolloutConfig) -> int:
    """The largest call budget that training may come to."""
    budget = cfg.max_calls
    largest = budget if isinstance(budget, int) else max(calls for _, calls in budget)
    return largest if cfg.raise_calls_above is None else max(largest, cfg.calls_limit)


UPKEEP = (
    *("name", "run_dir", "resume", "resume_step", "resume_override", "samples_per_log"),
    *("keep_rollouts", "checkpoint", "gates", "hosts", "metrics", "watchdog", "ablate"),
)
"""Keys and sections that change no number: where and how often something is done or written."""
