"""What each key of a veRL launch is here: one table, with the effect of each key in a line.

The keys, and veRL's values for those that a launch leaves out, are those of its
verl/trainer/config/ppo_trainer.yaml (releases 0.3 to 0.6); besides them those that the reference
code of CIR and ToRL and the DAPO recipe have added. What of a launch has no counterpart here and
would change the result is `lacking`, unless it has the value at which it does nothing.
"""

import dataclasses
import fnmatch
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from cir_jax.config import PRESETS, asset_dir
from cir_jax.data.files import num_rows, suffix_problem

Category = Literal["honoured", "translated", "approximated", "ignored", "lacking", "unknown"]

# Our names of veRL's estimators, of its ways to add up the loss, and of its estimates of KL.
ESTIMATORS = {
    "reinforce_plus_plus_baseline": "reinforce_pp_baseline",
    "reinforce_plus_plus": "reinforce_pp",
    "grpo": "grpo",
    "grpo_vectorized": "grpo",
    "rloo": "rloo",
    "rloo_vectorized": "rloo",
    "gae": "gae",
}
AGGREGATIONS = {
    "token-mean": "token_mean",
    "seq-mean-token-mean": "sequence_mean",
    "seq-mean-token-sum": "sequence_sum",
    "seq-mean-token-sum-norm": "constant",
}
KL_ESTIMATORS = {
    "kl": "k1",
    "k1": "k1",
    "mse": "k2",
    "k2": "k2",
    "low_var_kl": "k3",
    "k3": "k3",
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a key. settings: keys of our config with their values."""

    category: Category
    text: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Launch:
    """The values of a launch: its own, else veRL's.

    tasks: of the config, in the place of the launch's files. weights: directory that import-hf has
      written, or "".
    """

    def __init__(self, values: Mapping[str, Any], tasks: tuple[str, ...], weights: str) -> None:
        self.values = values
        self.tasks = tasks
        self.weights = weights

    def __getitem__(self, key: str) -> Any:
        return self.values[key] if key in self.values else KEYS[key].default

    def calls(self) -> bool:
        """Whether programs are run."""
        return any(self.values.get(key) for key in _CALL_KEYS)

    def updates(self) -> int:
        """Optimizer updates per step."""
        prompts, minibatch = self["data.train_batch_size"], self[_ACTOR + "ppo_mini_batch_size"]
        epochs = whole(self[_ACTOR + "ppo_epochs"])
        return epochs * max(1, whole(prompts) // max(1, whole(minibatch)))

    def files(self, key: str) -> tuple[str, ...]:
        """The paths of a key; none where it is blank."""
        value = self[key]
        paths = value if isinstance(value, list) else [value]
        return tuple(os.path.expanduser(path) for path in paths if path)


# Raises ValueError or TypeError if the value is none that the key can have.
Rule = Callable[[Any, Launch], Outcome]


@dataclasses.dataclass(frozen=True)
class Key:
    """default: veRL's value where a launch has none. always: the rule is used with it then,
    because our own default differs, or may. nameable: the text of a value will do where the value
    is not known, as in run-$(date)."""

    rule: Rule
    default: Any = None
    always: bool = False
    nameable: bool = False


def whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError("must be a whole number")
    return value


def number(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError("must be a number")
    return float(value)


def same(key: str, kind: Callable[[Any], Any], effect: str) -> Rule:
    """Our key of the same meaning."""
    return lambda value, _: Outcome("honoured", effect, {key: kind(value)})


def only(*values: Any, effect: str) -> Rule:
    """Has one meaning here; blank is null."""

    def rule(value: Any, _: Launch) -> Outcome:
        if (None if value == "" else value) in values:
            return Outcome("honoured", effect)
        allowed = " or ".join("null" if v is None else str(v) for v in values)
        but = f" but {allowed}" if values else ""
        return Outcome("lacking", f"{effect}; has no counterpart here{but}")

    return rule


def ignored(effect: str) -> Rule:
    return lambda value, _: Outcome("ignored", effect)


def approximated(effect: str, unless: tuple[Any, ...] = ()) -> Rule:
    """Only nearly the same, but for values in `unless`."""
    return lambda value, _: Outcome("honoured" if value in unless else "approximated", effect)


def where(other: str, values: tuple[Any, ...], rule: Rule) -> Rule:
    """A key that has an effect only while another one has certain values."""

    def checked(value: Any, launch: Launch) -> Outcome:
        if launch[other] in values:
            return rule(value, launch)
        return Outcome("ignored", f"no effect while {other}={launch[other]}")

    return checked


def of_critic(rule: Rule) -> Rule:
    return where(_ESTIMATOR, ("gae",), rule)


def as_actor(key: str, effect: str) -> Rule:
    """Of a critic's key that has to say what the actor's says."""
    return of_critic(lambda value, launch: only(launch[_ACTOR + key], effect=effect)(value, launch))


def _estimator(value: Any, launch: Launch) -> Outcome:
    if value not in ESTIMATORS:
        return Outcome("lacking", f"advantage estimator; here: {', '.join(ESTIMATORS)}")
    by_std = launch["algorithm.norm_adv_by_std_in_grpo"]
    ours = ESTIMATORS[value]
    if ours == "grpo" and not by_std:
        ours = "dr_grpo"
    settings = {"rl.advantage": ours}
    if value == "reinforce_plus_plus" and launch.calls():
        text = (
            "returns reach what was written before a tool's output; veRL's begin anew there, so "
            "that it has no part in the outcome"
        )
        return Outcome("approximated", text, settings)
    text = "advantage estimator, under our name"
    if value == "gae":
        text = "PPO with a critic, a model like the policy that begins with its weights"
    return Outcome("translated", text, settings)


def _minibatch(value: Any, launch: Launch) -> Outcome:
    prompts = whole(launch["data.train_batch_size"])
    if whole(value) < 1:
        raise ValueError("must be at least 1")
    if value > prompts:
        text = f"problems per update: one update of all {prompts}"
        return Outcome("translated", text, {"rl.minibatch_prompts": prompts})
    if prompts % value:
        return Outcome("lacking", f"problems per update; must divide {prompts}, a step's")
    return Outcome("honoured", "problems per update", {"rl.minibatch_prompts": value})


def _aggregation(value: Any, launch: Launch) -> Outcome:
    if value in AGGREGATIONS:
        text = (
            "mean over the tokens of the whole mini-batch; veRL's is over each micro-batch's, "
            "which are then averaged"
        )
        if value == "seq-mean-token-sum-norm":
            text = "mean over sequences; veRL's sums them, so that its gradient is larger"
        return Outcome("approximated", text, {"rl.loss_mean": AGGREGATIONS[value]})
    return Outcome("lacking", f"how the loss is added up; here: {', '.join(AGGREGATIONS)}")


def _clip_ratio(value: Any, launch: Launch) -> Outcome:
    bounds = [_ACTOR + "clip_ratio_low", _ACTOR + "clip_ratio_high"]
    if value == 0.2 or all(key in launch.values for key in bounds):
        return Outcome("ignored", "clip_ratio_low and clip_ratio_high are what is used")
    text = (
        "has no effect in veRL where clip_ratio_low and clip_ratio_high have values of their own, "
        "and is both before they came: say those two"
    )
    return Outcome("lacking", text)


def _entropy(value: Any, launch: Launch) -> Outcome:
    text = "entropy bonus off"
    if _ACTOR + "entropy_coeff" not in launch.values:
        return Outcome("approximated", f"{text}, as in veRL since 0.4; before, and in CIR's: 0.001")
    settings = {"rl.entropy_coef": number(value)}
    return Outcome("honoured", "weight of the entropy bonus", settings)


def _kl_loss(value: Any, launch: Launch) -> Outcome:
    if value and number(launch[_ACTOR + "kl_loss_coef"]) == 0:
        return Outcome("honoured", "KL term with coefficient 0: none, and no reference model")
    return _kl(value, launch, "loss", _ACTOR + "kl_loss_coef", _ACTOR + "kl_loss_type")


def _kl_reward(value: Any, launch: Launch) -> Outcome:
    if value and number(launch["algorithm.kl_ctrl.kl_coef"]) == 0:
        return Outcome("honoured", "KL penalty with coefficient 0: none")
    if value and launch[_ACTOR + "use_kl_loss"]:
        return Outcome("lacking", "KL in the reward and in the loss at once")
    return _kl(value, launch, "reward", "algorithm.kl_ctrl.kl_coef", "algorithm.kl_penalty")


def _kl_coefficient(value: Any, launch: Launch) -> Outcome:
    """Before use_kl_in_reward came, in 0.3, it was in the reward wherever use_kl_loss was off."""
    in_reward = launch.values.get("algorithm.use_kl_in_reward")
    if in_reward:
        return Outcome("ignored", "see use_kl_in_reward")
    if in_reward is not None or number(value) == 0 or launch[_ACTOR + "use_kl_loss"]:
        return Outcome("ignored", "no KL in the reward")
    if "algorithm.kl_ctrl.kl_coef" in launch.values:
        text = (
            "without effect since veRL 0.3 unless use_kl_in_reward=True, and KL in the reward "
            "before: say algorithm.use_kl_in_reward"
        )
        return Outcome("lacking", text)
    if launch.calls():
        text = "no KL in the reward; in veRL before 0.3 this was so only where it is set to 0"
        return Outcome("approximated", text)
    return Outcome("ignored", "no KL in the reward")


def _kl(value: Any, launch: Launch, place: str, coefficient: str, estimator: str) -> Outcome:
    if not value:
        return Outcome("honoured", f"no KL in the {place}")
    if launch[estimator] not in KL_ESTIMATORS:
        return Outcome("lacking", f"KL in the {place}, estimated by {launch[estimator]}")
    settings = {
        "rl.kl_coef": number(launch[coefficient]),
        "rl.kl_in": place,
        "rl.kl_estimator": KL_ESTIMATORS[launch[estimator]],
    }
    return Outcome("translated", f"KL in the {place}: rl.kl_coef", settings)


def _warmup(section: str, ours: str) -> Rule:
    """Of veRL's section with a table `optim`, as ours."""

    def rule(value: Any, launch: Launch) -> Outcome:
        ratio = number(launch[section + "optim.lr_warmup_steps_ratio"])
        steps = whole(-1 if value is None else value)
        if steps < 0:
            total = launch["trainer.total_training_steps"]
            if ratio and total is None:
                text = (
                    f"lr_warmup_steps_ratio={ratio:g} is of trainer.total_training_steps: say that"
                )
                return Outcome("lacking", text)
            steps = int(ratio * (total or 0))
        text = "no warm-up"
        if steps:
            text = (
                f"warm-up over {steps} steps of {launch.updates()} updates; it rises with each "
                "update, veRL's with each step"
            )
        return Outcome("translated", text, {f"{ours}.warmup_steps": steps * launch.updates()})

    return rule


def _schedule(section: str, ours: str) -> Rule:
    def rule(value: Any, launch: Launch) -> Outcome:
        if value is None:
            return Outcome("ignored", "lr_scheduler_type says it")
        settings = {f"{ours}.schedule": value}
        if value == "constant":
            return Outcome("honoured", "learning rate after the warm-up", settings)
        if value == "cosine":
            least = float(number(launch[section + "optim.min_lr_ratio"] or 0))
            settings[f"{ours}.final_share"] = least
            return Outcome("honoured", f"cosine to {least:g} of the peak", settings)
        return Outcome("lacking", "learning rate's schedule; here: constant, cosine")

    return rule


def _betas(ours: str) -> Rule:
    def rule(value: Any, _: Launch) -> Outcome:
        beta1, beta2 = value
        settings = {f"{ours}.beta1": number(beta1), f"{ours}.beta2": number(beta2)}
        return Outcome("honoured", "decay of Adam's moments", settings)

    return rule


def _passes(value: Any, launch: Launch) -> Outcome:
    if whole(value) < 1:
        raise ValueError("must be at least 1")
    return Outcome("honoured", "passes over a step's rows", {"rl.epochs": value})


def _shuffle(value: Any, launch: Launch) -> Outcome:
    if not value:
        return Outcome("honoured", "a step's rows in order", {"rl.shuffle": False})
    text = (
        "each pass draws whole groups at random; veRL's Megatron actor draws rows, and its FSDP "
        "one none"
    )
    return Outcome("approximated", text, {"rl.shuffle": True})


def _importance(value: Any, launch: Launch) -> Outcome:
    """Weights of algorithm.rollout_is, a boolean, or of rollout_correction's, a level."""
    if not value:
        return Outcome("honoured", "no correction between sampler and trainer")
    if isinstance(value, str):
        level, mode, veto = value, "truncate", None
        threshold = launch[_CORRECTION + "rollout_is_threshold"]
    else:
        names = ("threshold", "level", "mode", "veto_threshold")
        threshold, level, mode, veto = (launch["algorithm.rollout_is_" + name] for name in names)
    if threshold is None:
        return Outcome("ignored", "no correction while rollout_is_threshold=null")
    if level != "token" or mode != "truncate":
        text = f"correction of level {level} and mode {mode}; here: token, truncate"
        return Outcome("lacking", text)
    settings = {"rl.importance_cap": number(threshold)}
    if veto is None:
        return Outcome("translated", "truncated correction between sampler and trainer", settings)
    text = (
        f"truncated correction; a row with a token that the trainer finds less than {veto:g} times "
        "as likely as the sampler does stays, veRL leaves it out"
    )
    return Outcome("approximated", text, settings)


def _filter_groups(value: Any, launch: Launch) -> Outcome:
    if not value:
        return Outcome("honoured", "no dynamic sampling", {"rollout.refill_rounds": 0})
    metric = launch["algorithm.filter_groups.metric"]
    if metric not in ("acc", "score", "seq_reward", "seq_final_reward"):
        return Outcome("lacking", f"dynamic sampling by {metric}; here: by the reward")
    prompts = whole(launch["data.train_batch_size"])
    drawn = whole(launch["data.gen_batch_size"] or prompts)
    batches = whole(launch["algorithm.filter_groups.max_num_gen_batches"] or 0)
    rounds = math.ceil(batches * drawn / prompts) if batches > 0 else _DAPO_ROUNDS
    text = (
        f"dynamic sampling in at most {rounds} rounds of {prompts} problems, by the whole reward; "
        "where too few groups differ, equal ones fill the batch, where veRL stops or goes on"
    )
    return Outcome("approximated", text, {"rollout.refill_rounds": rounds - 1})


def _overlong(section: str) -> Rule:
    """Of the section's `enable`."""

    def rule(value: Any, launch: Launch) -> Outcome:
        if not value:
            return Outcome("honoured", "no overlong shaping")
        manager = launch["reward_model.reward_manager"]
        if manager != "dapo":
            return Outcome("ignored", f"no effect while reward_manager={manager}")
        size, factor = launch[section + "len"], launch[section + "penalty_factor"]
        if not size or not factor:
            return Outcome("lacking", "overlong shaping without len and penalty_factor: say both")
        longest = launch["data.max_response_length"]
        if launch[_MAX_RESPONSE] not in (None, longest):
            text = f"overlong shaping up to other lengths than data.max_response_length={longest}"
            return Outcome("lacking", text)
        settings = {
            "reward.overlong_buffer": whole(int(size)),
            "reward.overlong_factor": number(factor),
        }
        return Outcome("translated", "overlong shaping, of model and tool tokens", settings)

    return rule


def _tool_length(value: Any, launch: Launch) -> Outcome:
    side = launch[_ROLLOUT + "multi_turn.tool_response_truncate_side"]
    if side != "middle":
        return Outcome("lacking", f"where outputs are cut: {side}; here: in the middle")
    text = "characters of an output; ... stands where it is cut, veRL's ...(truncated)..."
    return Outcome("approximated", text, {"rollout.result.max_chars": whole(value)})


def _top_k(value: Any, launch: Launch) -> Outcome:
    settings = {"rollout.top_k": max(0, whole(value))}
    if value < 0:
        return Outcome("translated", "-1, all tokens, is 0 here", settings)
    return Outcome("honoured", "most likely tokens that are sampled from", settings)


def _files(value: Any, launch: Launch, key: str) -> tuple[tuple[str, ...], str]:
    """The paths of a key, and what is wrong with them."""
    files = launch.files(key)
    if not files:
        return (), "names no file; --tasks says what to train on instead"
    for file in files:
        if re.search(r"[$`]", file):
            return (), "is not known without running the script: --var or an argument says it"
        if problem := suffix_problem(Path(file)):
            return (), problem
    return files, ""


def _train_files(value: Any, launch: Launch) -> Outcome:
    if launch.tasks:
        text = (
            f"trains on generated problems ({', '.join(launch.tasks)}), not on these files; "
            "prompts are data.template's text, not the files' messages in the model's chat template"
        )
        template = "cir" if launch.calls() else "cir_text"
        settings = {"data.tasks": launch.tasks, "data.template": template}
        return Outcome("approximated", text, settings)
    files, problem = _files(value, launch, "data.train_files")
    if problem:
        return Outcome("lacking", problem)
    settings = {"data.files": files, "data.template": "{question}", "data.chat": True}
    if launch.values.get(_ROLLOUT + "generate_method") == "CIR":
        text = (
            "problems to train on; their prompts are raw text, as CIR's for a base model; "
            "data.chat=true puts them into the model's chat template"
        )
        return Outcome("approximated", text, settings | {"data.chat": False})
    thinks = "qwen3" in str(launch[_MODEL + "path"]).lower() and launch[_THINKING] is not False
    if thinks:
        text = "problems to train on; thinking is disabled here, by default it is not in veRL"
        return Outcome("approximated", text, settings)
    return Outcome("translated", "problems to train on, in the model's chat template", settings)


def _val_files(value: Any, launch: Launch) -> Outcome:
    if launch.tasks:
        return Outcome("approximated", "evaluates on held-out problems of data.tasks")
    files, problem = _files(value, launch, "data.val_files")
    if problem:
        return Outcome("lacking", problem)
    text = "evaluates on the first eval.num_problems of them, from the files in turn"
    return Outcome("approximated", text, {"data.eval_files": files})


def of_files(rule: Rule) -> Rule:
    """Of a key that has a meaning only if the launch's files are read."""

    def checked(value: Any, launch: Launch) -> Outcome:
        return Outcome("ignored", "of the files") if launch.tasks else rule(value, launch)

    return checked


def _template_type(value: Any, launch: Launch) -> Outcome:
    if launch.tasks:
        return Outcome("approximated", "the prompt is data.template, CIR's")
    text = "which words stand around a question: here those that the files' messages have"
    return Outcome("approximated", text)


def _truncation(value: Any, launch: Launch) -> Outcome:
    if launch.tasks:
        return approximated("a longer prompt is an error here, not cut", ("error",))(value, launch)
    if launch["data.filter_overlong_prompts"]:
        return Outcome("ignored", "no effect while filter_overlong_prompts=True")
    there = "an error" if value == "error" else "cut"
    return Outcome("approximated", f"a longer prompt is left out and counted here, not {there}")


def _filter_prompts(value: Any, launch: Launch) -> Outcome:
    if launch.tasks:
        return approximated("a longer prompt is an error here, not left out", (False,))(
            value, launch
        )
    if value:
        return Outcome("honoured", "longer prompts are left out and counted")
    return Outcome("ignored", "data.truncation says what becomes of longer prompts")


def _response_length(value: Any, launch: Launch) -> Outcome:
    most = whole(launch["data.max_prompt_length"]) + whole(value)
    settings = {"rollout.max_response_tokens": value, "rollout.max_context": most}
    return Outcome("honoured", "tokens of a response, tool output included", settings)


def _context(value: Any, launch: Launch) -> Outcome:
    most = launch["data.max_prompt_length"] + launch["data.max_response_length"]
    if value is None or whole(value) >= most:
        return Outcome("ignored", "room for the longest prompt and response: cuts nothing")
    return Outcome("honoured", "tokens of a row", {"rollout.max_context": value})


def _steps(value: Any, launch: Launch) -> Outcome:
    if value is None:
        return Outcome("ignored", "as many steps as total_epochs make")
    return Outcome("honoured", "RL steps", {"rl.steps": whole(value)})


def _epochs(value: Any, launch: Launch) -> Outcome:
    if launch["trainer.total_training_steps"] is not None:
        return Outcome("ignored", "trainer.total_training_steps says how long the run is")
    files = () if launch.tasks else launch.files("data.train_files")
    if files and all(Path(file).is_file() for file in files):
        rows = sum(num_rows(Path(file)) for file in files)
        steps = whole(value) * (rows // whole(launch["data.train_batch_size"]))
        text = f"{steps} steps for the files' {rows} rows; those left out are counted, too"
        return Outcome("approximated", text, {"rl.steps": steps})
    text = (
        "how many steps that makes depends on the files: rl.steps is 300 (CIR: about 300); "
        "trainer.total_training_steps=N says it"
    )
    return Outcome("approximated", text, {"rl.steps": 300})


def _save(value: Any, launch: Launch) -> Outcome:
    if whole(value) > 0:
        return Outcome("honoured", "steps between two saves", {"checkpoint.every": value})
    return Outcome("approximated", "never in veRL; saved every 10 steps here, to be resumed")


def _name(value: Any, launch: Launch) -> Outcome:
    known = re.sub(r"\$\(.*?\)|\$\{.*?\}|\$\w+|`.*?`", "", str(value))
    name = re.sub(r"[^\w.-]+", "-", known).strip("-._")
    if not name:
        # Nothing of it is known, or it is of other letters.
        return Outcome("ignored", "the run's name, which is the script's here")
    category: Category = "honoured" if name == value else "translated"
    return Outcome(category, "name of the run and its directory", {"name": name})


def _calls(boundary: str, max_chars: int, effect: str) -> Rule:
    """max_chars: of an output."""
    return lambda value, _: Outcome(
        "translated",
        effect,
        {
            "rollout.max_calls": whole(value),
            "rollout.boundary": boundary,
            "rollout.result.max_chars": max_chars,
        },
    )


def _multi_turn(value: Any, launch: Launch) -> Outcome:
    if value:
        text = "calls are ```python blocks here, not the tool calls of a chat format"
        return Outcome("lacking", text)
    if launch.calls():
        return Outcome("ignored", "another key turns programs on")
    return Outcome("translated", "text only: no programs", {"rollout.max_calls": 0})


def _generate(value: Any, launch: Launch) -> Outcome:
    if value == "CIR":
        return Outcome("honoured", "```python blocks are run where they close")
    return Outcome("lacking", "how a response is generated; has no counterpart here but CIR")


def _state_masking(value: Any, launch: Launch) -> Outcome:
    if value is not True:
        if launch.values.get(_ROLLOUT + "generate_method") != "CIR":
            return Outcome("ignored", "a key of CIR's; tool tokens are masked here")
        text = "tool tokens in the loss"
        return Outcome("translated", text, {"rl.train_tool_tokens": True})
    text = (
        "tool tokens are masked, here by who wrote them; the reference's whitening counts them, "
        "ours does not (rl.whiten_tool_tokens=true does)"
    )
    return Outcome("approximated", text, {"rl.whiten_tool_tokens": False})


def _reward(value: Any, launch: Launch) -> Outcome:
    text = "+1 if math-verify finds the last \\boxed{} right, else -1"
    if value == "still_code_format":
        return Outcome("honoured", text)
    if value in ("naive", "dapo", "prime", "batch"):
        return Outcome("approximated", f"{text}; veRL's score depends on data_source, often 0 or 1")
    return Outcome("lacking", f"grader; ours: {text}")


def _model(value: Any, launch: Launch) -> Outcome:
    """A preset of the same name, or the config.json of a directory on this machine."""
    path = str(value).rstrip("/")
    name = PurePosixPath(path).name
    directory = launch.weights or path
    if settings := _model_of(directory):
        settings |= {"sft.weights": directory, "tokenizer": directory}
        return Outcome("translated", f"shape, weights and tokenizer of {directory}", settings)
    presets = {preset.lower(): preset for preset in PRESETS}
    known = presets.get(name.lower().removesuffix("-instruct"))
    if not known:
        text = (
            "is neither a directory here nor one of our presets: import the weights "
            "(`cir-jax import-hf HUB_ID OUT`) and say --weights OUT"
        )
        return Outcome("lacking", text)
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", path)
    owner = "deepseek-ai" if known.startswith("DeepSeek") else "Qwen"
    is_sibling = name.lower() not in presets
    full_name = name if is_sibling else known
    out = launch.weights or f"weights/{full_name}"
    source = path if is_hub_id else f"{owner}/{full_name}"
    text = f"preset {known}; its weights: cir-jax import-hf {source} {out}"
    settings = {"model.preset": known, "sft.weights": out, "tokenizer": out}
    if is_sibling:
        text += (
            f" (a shape other than {known}'s is an error that names the key, once they are read)"
        )
    return Outcome("translated", text, settings)


def _model_of(directory: str) -> dict[str, Any]:
    """The keys of [model] that the config.json of a directory says; none if it has none."""
    path = asset_dir(directory) / "config.json"
    if not path.is_file():
        return {}
    # jax comes along.
    from cir_jax.models import hf_config, hf_directory

    model = hf_config.from_hf_config(hf_directory.read_json(path))
    fields = model.model_dump(exclude_none=True)
    yarn = fields.pop("yarn", {})
    return {f"model.{k}": v for k, v in fields.items()} | {
        f"model.yarn.{k}": v for k, v in yarn.items()
    }


def _lora_rank(value: Any, launch: Launch) -> Outcome:
    if not value:
        return Outcome("honoured", "no adapters: all parameters are trained")
    alpha = number(launch["actor_rollout_ref.model.lora_alpha"])
    settings = {"model.lora.rank": whole(value), "model.lora.alpha": alpha}
    return Outcome("honoured", "rank of the adapters", settings)


_ACTOR = "actor_rollout_ref.actor."
_MODEL = "actor_rollout_ref.model."
_ROLLOUT = "actor_rollout_ref.rollout."
_CALL_KEYS = (_ROLLOUT + "max_call_time", _ROLLOUT + "num_llm_calls_available")

_ESTIMATOR = "algorithm.adv_estimator"
_HARDWARE = ignored("memory and speed on GPUs")
_MICRO = ignored("size of a micro-batch: rl.micro_rows, which does not change the loss here")
_PLACE = ignored("what is logged, and where to")
_VALIDATION = "held-out evaluation is greedy, one answer per problem; training does not see it"
_FILTER = where(
    "algorithm.filter_groups.enable", (True,), ignored("see algorithm.filter_groups.enable")
)
# Rounds where veRL has no limit.
_DAPO_ROUNDS = 10
_CORRECTION = "algorithm.rollout_correction."
_IMPORTANCE = where("algorithm.rollout_is", (True,), ignored("see rollout_is"))
_OVERLONG = (
    "reward_model.overlong_buffer.",
    "reward_model.reward_kwargs.overlong_buffer_cfg.",
    "custom_reward_function.overlong_buffer.",
)
_MAX_RESPONSE = "reward_model.reward_kwargs.max_resp_len"
_THINKING = "data.apply_chat_template_kwargs.enable_thinking"
_CRITIC = of_critic(only(effect="of the critic"))

KEYS: dict[str, Key] = {
    # Data.
    "data.train_files": Key(
        _train_files, "~/data/rlhf/gsm8k/train.parquet", always=True, nameable=True
    ),
    "data.val_files": Key(_val_files, "~/data/rlhf/gsm8k/test.parquet", always=True, nameable=True),
    "data.train_batch_size": Key(
        same("rollout.prompts_per_step", whole, "problems per step"), 1024, always=True
    ),
    "data.gen_batch_size": Key(_FILTER),
    "data.val_batch_size": Key(ignored("speed of the validation")),
    "data.shuffle": Key(only(True, effect="problems come in a seeded order"), True),
    "data.validation_shuffle": Key(ignored("order of the validation")),
    "data.seed": Key(
        lambda value, _: Outcome(
            "approximated",
            "seed of every random choice here; draws differ from veRL's",
            {"seed": whole(value)},
        )
    ),
    "data.max_prompt_length": Key(
        same("data.max_prompt_tokens", whole, "tokens of a prompt"), 512, always=True
    ),
    "data.max_response_length": Key(_response_length, 512, always=True),
    "data.truncation": Key(_truncation, "error", always=True),
    "data.filter_overlong_prompts": Key(_filter_prompts, False),
    "data.filter_overlong_prompts_workers": Key(_HARDWARE),
    "data.template_type": Key(_template_type),
    "data.prompt_key": Key(
        of_files(same("data.columns.prompt", str, "column of the messages")), "prompt"
    ),
    "data.reward_fn_key": Key(
        of_files(same("data.columns.source", str, "column that accuracies are reported by"))
    ),
    "data.train_max_samples": Key(of_files(only(-1, effect="all rows"))),
    "data.val_max_samples": Key(of_files(approximated("eval.num_problems", unless=(-1,)))),
    _THINKING: Key(of_files(only(False, effect="thinking is disabled"))),
    "data.apply_chat_template_kwargs.*": Key(of_files(only(effect="of the chat template"))),
    "data.image_key": Key(ignored("a column of the files")),
    "data.video_key": Key(ignored("a column of the files")),
    "data.return_raw_chat": Key(ignored("what is passed on with a prompt")),
    "data.return_raw_input_ids": Key(ignored("what is passed on with a prompt")),
    "data.return_full_prompt": Key(ignored("what is passed on with a prompt")),
    "data.return_multi_modal_inputs": Key(ignored("what is passed on with a prompt")),
    "data.dataloader_num_workers": Key(_HARDWARE),
    "data.use_shm": Key(_HARDWARE),
    "data.trust_remote_code": Key(ignored("code from the hub is never run here")),
    "data.tokenizer": Key(only(None, effect="a tokenizer other than the model's")),
    "data.custom_cls.path": Key(only(None, effect="a dataset of one's own")),
    "data.custom_cls.name": Key(only(None, effect="a dataset of one's own")),
    "data.sampler.class_path": Key(only(None, effect="an order of one's own")),
    "data.sampler.class_name": Key(only(None, effect="an order of one's own")),
    # Advantage and KL.
    _ESTIMATOR: Key(_estimator, "gae", always=True),
    "algorithm.gamma": Key(
        where(_ESTIMATOR, ("reinforce_plus_plus", "gae"), same("rl.gamma", number, "discount")),
        1.0,
    ),
    "algorithm.lam": Key(of_critic(same("rl.critic.lam", number, "GAE's lambda")), 1.0),
    "algorithm.norm_adv_by_std_in_grpo": Key(
        where(
            _ESTIMATOR,
            ("grpo", "grpo_vectorized"),
            ignored("says whether adv_estimator is our dr_grpo"),
        ),
        True,
    ),
    "algorithm.use_kl_in_reward": Key(_kl_reward, False),
    "algorithm.kl_penalty": Key(ignored("see use_kl_in_reward"), "kl"),
    "algorithm.kl_ctrl.kl_coef": Key(_kl_coefficient, 0.001, always=True),
    "algorithm.kl_ctrl.type": Key(
        where("algorithm.use_kl_in_reward", (True,), only("fixed", effect="the weight stays")),
        "fixed",
    ),
    "algorithm.kl_ctrl.*": Key(ignored("how a KL penalty adapts")),
    "algorithm.filter_groups.enable": Key(_filter_groups, False),
    "algorithm.filter_groups.metric": Key(_FILTER),
    "algorithm.filter_groups.max_num_gen_batches": Key(_FILTER, 0),
    "algorithm.filter_groups.*": Key(
        where("algorithm.filter_groups.enable", (True,), only(effect="dynamic sampling"))
    ),
    "algorithm.use_pf_ppo": Key(only(False, effect="preference feedback's weights"), False),
    "algorithm.pf_ppo.*": Key(ignored("preference feedback's weights, which are off")),
    "algorithm.rollout_is": Key(_importance, False),
    "algorithm.rollout_is_threshold": Key(_IMPORTANCE),
    "algorithm.rollout_is_level": Key(_IMPORTANCE, "token"),
    "algorithm.rollout_is_mode": Key(_IMPORTANCE, "truncate"),
    "algorithm.rollout_is_veto_threshold": Key(_IMPORTANCE, 1e-4),
    "algorithm.rollout_is_threshold_lower": Key(_IMPORTANCE),
    _CORRECTION + "rollout_is": Key(_importance),
    _CORRECTION + "rollout_is_threshold": Key(ignored("see rollout_is"), 2.0),
    _CORRECTION + "rollout_is_batch_normalize": Key(only(False, effect="weights as they are")),
    _CORRECTION + "bypass_mode": Key(only(False, effect="old log-probabilities are computed")),
    _CORRECTION + "rollout_rs": Key(only(None, effect="rejection between sampler and trainer")),
    # Update.
    _ACTOR + "ppo_mini_batch_size": Key(_minibatch, 256, always=True),
    _ACTOR + "ppo_micro_batch_size": Key(_MICRO),
    _ACTOR + "ppo_micro_batch_size_per_gpu": Key(_MICRO),
    _ACTOR + "use_dynamic_bsz": Key(_MICRO),
    _ACTOR + "ppo_max_token_len_per_gpu": Key(_MICRO),
    _ACTOR + "ppo_epochs": Key(_passes, 1),
    _ACTOR + "shuffle": Key(_shuffle, False),
    _ACTOR + "clip_ratio": Key(_clip_ratio, 0.2),
    _ACTOR + "clip_ratio_low": Key(same("rl.clip_low", number, "lower clip"), 0.2, always=True),
    _ACTOR + "clip_ratio_high": Key(same("rl.clip_high", number, "upper clip"), 0.2, always=True),
    _ACTOR + "clip_ratio_c": Key(same("rl.dual_clip", number, "dual clip"), 3.0, always=True),
    _ACTOR + "loss_agg_mode": Key(_aggregation, "token-mean", always=True),
    _ACTOR + "use_token_level_loss": Key(only(True, effect="mean over tokens")),
    _ACTOR + "policy_loss.loss_mode": Key(only("vanilla", effect="PPO's clipped loss"), "vanilla"),
    _ACTOR + "policy_loss.*": Key(ignored("of another loss_mode")),
    _ACTOR + "tis_imp_ratio_cap": Key(
        lambda value, _: Outcome(
            "honoured",
            "truncated correction between sampler and trainer",
            {"rl.importance_cap": number(value)} if number(value) > 0 else {},
        ),
        -1,
    ),
    _ACTOR + "entropy_coeff": Key(_entropy, 0, always=True),
    _ACTOR + "use_kl_loss": Key(_kl_loss, False),
    _ACTOR + "kl_loss_coef": Key(
        where(_ACTOR + "use_kl_loss", (True,), ignored("see use_kl_loss")), 0.001
    ),
    _ACTOR + "kl_loss_type": Key(ignored("see use_kl_loss"), "low_var_kl"),
    _ACTOR + "state_masking": Key(_state_masking, False, always=True),
    _ACTOR + "grad_clip": Key(same("rl.optim.clip_norm", number, "gradient clipping"), 1.0, True),
    _ACTOR + "optim.lr": Key(same("rl.optim.learning_rate", number, "learning rate"), 1e-6, True),
    _ACTOR + "optim.lr_warmup_steps": Key(_warmup(_ACTOR, "rl.optim"), -1, always=True),
    _ACTOR + "optim.lr_warmup_steps_ratio": Key(ignored("see lr_warmup_steps"), 0.0),
    _ACTOR + "optim.warmup_style": Key(_schedule(_ACTOR, "rl.optim"), "constant", always=True),
    _ACTOR + "optim.lr_scheduler_type": Key(_schedule(_ACTOR, "rl.optim")),
    _ACTOR + "optim.min_lr_ratio": Key(ignored("see warmup_style"), 0.0),
    _ACTOR + "optim.num_cycles": Key(
        where(_ACTOR + "optim.warmup_style", ("cosine",), only(0.5, effect="half a cosine")), 0.5
    ),
    _ACTOR + "optim.weight_decay": Key(
        same("rl.optim.weight_decay", number, "decoupled weight decay"), 0.01, always=True
    ),
    _ACTOR + "optim.betas": Key(_betas("rl.optim"), [0.9, 0.999], always=True),
    _ACTOR + "optim.clip_grad": Key(
        lambda value, launch: only(launch[_ACTOR + "grad_clip"], effect="see grad_clip")(
            value, launch
        )
    ),
    _ACTOR + "optim.total_training_steps": Key(ignored("veRL fills it in")),
    _ACTOR + "strategy": Key(_HARDWARE),
    _ACTOR + "use_torch_compile": Key(_HARDWARE),
    _ACTOR + "use_fused_kernels": Key(_HARDWARE),
    _ACTOR + "use_remove_padding": Key(_HARDWARE),
    _ACTOR + "ulysses_sequence_parallel_size": Key(_HARDWARE),
    _ACTOR + "entropy_from_logits_with_chunking": Key(_HARDWARE),
    _ACTOR + "entropy_checkpointing": Key(_HARDWARE),
    _ACTOR + "fsdp_config.model_dtype": Key(
        approximated("parameters are kept in float32", unless=("fp32", "float32")), "fp32"
    ),
    _ACTOR + "fsdp_config.*": Key(_HARDWARE),
    _ACTOR + "megatron.*": Key(_HARDWARE),
    _ACTOR + "checkpoint.*": Key(ignored("what a checkpoint holds; ours holds all to resume")),
    _ACTOR + "profiler.*": Key(_PLACE),
    "actor_rollout_ref.hybrid_engine": Key(_HARDWARE),
    "actor_rollout_ref.nccl_timeout": Key(_HARDWARE),
    # Model.
    _MODEL + "path": Key(_model, "~/models/deepseek-llm-7b-chat", always=True),
    _MODEL + "tokenizer_path": Key(only(None, effect="a tokenizer other than the model's")),
    _MODEL + "hf_config_path": Key(only(None, effect="a config.json other than the model's")),
    _MODEL + "override_config.attention_dropout": Key(only(0, effect="no dropout")),
    _MODEL + "override_config.embd_pdrop": Key(only(0, effect="no dropout")),
    _MODEL + "override_config.resid_pdrop": Key(only(0, effect="no dropout")),
    _MODEL + "override_config.max_position_embeddings": Key(
        same("model.max_positions", whole, "context that the model names")
    ),
    _MODEL + "custom_chat_template": Key(only(None, effect="another chat template")),
    _MODEL + "external_lib": Key(only(None, effect="code that patches the model")),
    _MODEL + "trust_remote_code": Key(ignored("code from the hub is never run here")),
    _MODEL + "lora_rank": Key(_lora_rank, 0),
    _MODEL + "lora_alpha": Key(ignored("numerator of the adapters' scale, with lora_rank"), 16),
    _MODEL + "target_modules": Key(only("all-linear", effect="projections with an adapter")),
    _MODEL + "exclude_modules": Key(only(None, effect="projections without an adapter")),
    _MODEL + "use_remove_padding": Key(_HARDWARE),
    _MODEL + "enable_gradient_checkpointing": Key(ignored("memory: compute.remat")),
    _MODEL + "enable_activation_offload": Key(_HARDWARE),
    _MODEL + "use_liger": Key(_HARDWARE),
    _MODEL + "use_fused_kernels": Key(_HARDWARE),
    _MODEL + "fused_kernel_options.*": Key(_HARDWARE),
    _MODEL + "use_shm": Key(_HARDWARE),
    "actor_rollout_ref.ref.*": Key(ignored("memory and speed of the reference model")),
    # Rollout.
    _ROLLOUT + "n": Key(same("rollout.samples_per_prompt", whole, "samples"), 1, always=True),
    _ROLLOUT + "temperature": Key(
        same("rollout.temperature", number, "divides the logits"), 1.0, always=True
    ),
    _ROLLOUT + "top_p": Key(same("rollout.top_p", number, "nucleus"), 1.0, always=True),
    _ROLLOUT + "top_k": Key(_top_k, -1, always=True),
    _ROLLOUT + "min_p": Key(same("rollout.min_p", number, "least share of the likeliest")),
    _ROLLOUT + "do_sample": Key(only(True, effect="sampling"), True),
    _ROLLOUT + "repetition_penalty": Key(only(1, effect="penalty on repetition")),
    _ROLLOUT + "presence_penalty": Key(only(0, effect="penalty on repetition")),
    _ROLLOUT + "frequency_penalty": Key(only(0, effect="penalty on repetition")),
    _ROLLOUT + "ignore_eos": Key(only(False, effect="goes on after the end of text")),
    _ROLLOUT + "use_fire_sampling": Key(only(False, effect="hotter first tokens")),
    _ROLLOUT + "max_model_len": Key(_context),
    _ROLLOUT + "prompt_length": Key(ignored("data.max_prompt_length is what is used")),
    _ROLLOUT + "response_length": Key(
        same("rollout.max_response_tokens", whole, "tokens of a response")
    ),
    _ROLLOUT + "generate_method": Key(_generate),
    _ROLLOUT + "max_call_time": Key(
        _calls(
            "fence",
            400,
            "programs per response, the same in all steps; the paper's schedule in one run is "
            "rollout.max_calls = [[0, 2], [100, 3], [200, 4]]",
        )
    ),
    _ROLLOUT + "num_llm_calls_available": Key(
        _calls(
            "stop_word",
            256,
            "programs per response, each asked for by ```output",
        )
    ),
    _ROLLOUT + "multi_turn.enable": Key(_multi_turn, False, always=True),
    _ROLLOUT + "multi_turn.max_tool_response_length": Key(
        where(_ROLLOUT + "multi_turn.enable", (True,), _tool_length), 256
    ),
    _ROLLOUT + "multi_turn.tool_response_truncate_side": Key(
        where(_ROLLOUT + "multi_turn.enable", (True,), ignored("see max_tool_response_length")),
        "middle",
    ),
    _ROLLOUT + "multi_turn.*": Key(
        where(_ROLLOUT + "multi_turn.enable", (True,), only(effect="of tool calls"))
    ),
    _ROLLOUT + "val_kwargs.do_sample": Key(approximated(_VALIDATION, unless=(False,)), False),
    _ROLLOUT + "val_kwargs.n": Key(approximated(_VALIDATION, unless=(1,)), 1),
    _ROLLOUT + "val_kwargs.*": Key(
        where(_ROLLOUT + "val_kwargs.do_sample", (True,), approximated(_VALIDATION))
    ),
    _ROLLOUT + "dtype": Key(
        approximated("compute.dtype: bfloat16", unless=("bfloat16",)), "bfloat16"
    ),
    _ROLLOUT + "quantization": Key(only(None, effect="quantised sampling")),
    _ROLLOUT + "name": Key(ignored("which engine samples: ours")),
    _ROLLOUT + "mode": Key(ignored("which engine samples: ours")),
    _ROLLOUT + "calculate_log_probs": Key(ignored("samples always come with them")),
    _ROLLOUT + "log_prob_*": Key(_MICRO),
    _ROLLOUT + "gpu_memory_utilization": Key(_HARDWARE),
    _ROLLOUT + "tensor_model_parallel_size": Key(_HARDWARE),
    _ROLLOUT + "data_parallel_size": Key(_HARDWARE),
    _ROLLOUT + "max_num_batched_tokens": Key(_HARDWARE),
    _ROLLOUT + "max_num_seqs": Key(ignored("rows at a time: rollout.slots")),
    _ROLLOUT + "enforce_eager": Key(_HARDWARE),
    _ROLLOUT + "free_cache_engine": Key(_HARDWARE),
    _ROLLOUT + "enable_chunked_prefill": Key(_HARDWARE),
    _ROLLOUT + "enable_prefix_caching": Key(_HARDWARE),
    _ROLLOUT + "load_format": Key(_HARDWARE),
    _ROLLOUT + "layered_summon": Key(_HARDWARE),
    _ROLLOUT + "disable_log_stats": Key(_PLACE),
    _ROLLOUT + "engine_kwargs.*": Key(_HARDWARE),
    _ROLLOUT + "cudagraph_capture_sizes": Key(_HARDWARE),
    _ROLLOUT + "update_weights_bucket_megabytes": Key(_HARDWARE),
    _ROLLOUT + "multi_stage_wake_up": Key(_HARDWARE),
    _ROLLOUT + "agent.num_workers": Key(_HARDWARE),
    _ROLLOUT + "trace.*": Key(_PLACE),
    # Reward.
    "reward_model.enable": Key(only(False, effect="a learnt reward"), False),
    "reward_model.reward_manager": Key(_reward, "naive", always=True),
    **{section + "enable": Key(_overlong(section), False) for section in _OVERLONG},
    **{
        section + name: Key(where(section + "enable", (True,), ignored("see enable")))
        for section in _OVERLONG
        for name in ("len", "penalty_factor", "log")
    },
    _MAX_RESPONSE: Key(ignored("see overlong_buffer_cfg.enable")),
    "custom_reward_function.path": Key(only(None, effect="a grader of one's own")),
    "custom_reward_function.name": Key(ignored("function of custom_reward_function.path")),
    "reward_model.sandbox_fusion.url": Key(only(None, effect="grades programs in a sandbox")),
    "reward_model.*": Key(
        where("reward_model.enable", (True,), only(effect="of the learnt reward"))
    ),
    # Critic.
    "critic.optim.lr": Key(
        of_critic(same("rl.critic.optim.learning_rate", number, "critic's learning rate"))
    ),
    "critic.optim.lr_warmup_steps": Key(of_critic(_warmup("critic.", "rl.critic.optim")), -1),
    "critic.optim.lr_warmup_steps_ratio": Key(
        of_critic(
            lambda value, launch: _warmup("critic.", "rl.critic.optim")(
                launch["critic.optim.lr_warmup_steps"], launch
            )
        ),
        0.0,
    ),
    "critic.optim.warmup_style": Key(of_critic(_schedule("critic.", "rl.critic.optim"))),
    "critic.optim.lr_scheduler_type": Key(of_critic(_schedule("critic.", "rl.critic.optim"))),
    "critic.optim.min_lr_ratio": Key(of_critic(ignored("see warmup_style")), 0.0),
    "critic.optim.weight_decay": Key(
        of_critic(same("rl.critic.optim.weight_decay", number, "decoupled weight decay"))
    ),
    "critic.optim.betas": Key(of_critic(_betas("rl.critic.optim"))),
    "critic.grad_clip": Key(
        of_critic(same("rl.critic.optim.clip_norm", number, "gradient clipping")), 1.0
    ),
    "critic.cliprange_value": Key(
        of_critic(same("rl.critic.clip", number, "clip of the critic's values"))
    ),
    "critic.ppo_epochs": Key(as_actor("ppo_epochs", "as many passes as the policy's")),
    "critic.ppo_mini_batch_size": Key(as_actor("ppo_mini_batch_size", "the policy's mini-batches")),
    "critic.loss_agg_mode": Key(as_actor("loss_agg_mode", "the same mean as the policy's loss")),
    "critic.shuffle": Key(as_actor("shuffle", "the policy's mini-batches")),
    "critic.model.path": Key(
        of_critic(
            lambda value, launch: only(launch[_MODEL + "path"], effect="the policy's weights")(
                value, launch
            )
        )
    ),
    "critic.model.lora_rank": Key(of_critic(only(0, effect="all parameters are trained"))),
    "critic.model.lora_alpha": Key(of_critic(ignored("of adapters, which are off"))),
    "critic.model.target_modules": Key(of_critic(ignored("of adapters, which are off"))),
    "critic.model.external_lib": Key(of_critic(only(None, effect="code that patches the model"))),
    "critic.model.override_config.*": Key(_CRITIC),
    "critic.model.*": Key(_HARDWARE),
    "critic.enable": Key(of_critic(only(None, True, effect="a critic"))),
    **{
        "critic." + name: Key(_HARDWARE)
        for name in (
            "strategy",
            "rollout_n",
            "ppo_micro_batch_size",
            "ppo_micro_batch_size_per_gpu",
            "forward_micro_batch_size",
            "forward_micro_batch_size_per_gpu",
            "use_dynamic_bsz",
            "ppo_max_token_len_per_gpu",
            "forward_max_token_len_per_gpu",
            "ulysses_sequence_parallel_size",
            "checkpoint.*",
            "megatron.*",
            "profiler.*",
        )
    },
    "critic.*": Key(_CRITIC),
    # Run.
    "trainer.total_training_steps": Key(_steps),
    "trainer.total_epochs": Key(_epochs, 30, always=True),
    "trainer.save_freq": Key(_save, -1),
    "trainer.test_freq": Key(approximated("evaluates before and after the training only")),
    "trainer.val_before_train": Key(approximated("evaluates before training", unless=(True,))),
    "trainer.val_only": Key(only(False, effect="no training")),
    "trainer.critic_warmup": Key(
        of_critic(only(0, effect="no steps that train the critic alone")), 0
    ),
    "trainer.experiment_name": Key(_name, nameable=True),
    "trainer.project_name": Key(_PLACE),
    "trainer.logger": Key(_PLACE),
    "trainer.log_val_generations": Key(_PLACE),
    "trainer.rollout_data_dir": Key(_PLACE),
    "trainer.validation_data_dir": Key(_PLACE),
    "trainer.samples_save_path": Key(_PLACE),
    "trainer.default_local_dir": Key(ignored("runs are in runs/NAME; run_dir=PATH elsewhere")),
    "trainer.default_hdfs_dir": Key(_PLACE),
    "trainer.resume_mode": Key(ignored("resume=true goes on from the newest checkpoint")),
    "trainer.resume_from_path": Key(only(None, effect="a checkpoint to start from")),
    "trainer.max_actor_ckpt_to_keep": Key(
        lambda value, _: Outcome(
            "ignored" if value is None else "honoured",
            "newest checkpoints kept",
            {} if value is None else {"checkpoint.keep": whole(value)},
        )
    ),
    "trainer.max_critic_ckpt_to_keep": Key(ignored("checkpoints of a critic")),
    "trainer.remove_previous_ckpt_in_save": Key(ignored("checkpoint.keep says how many stay")),
    "trainer.del_local_ckpt_after_load": Key(_PLACE),
    "trainer.balance_batch": Key(_HARDWARE),
    "trainer.n_gpus_per_node": Key(ignored("devices: [mesh]")),
    "trainer.nnodes": Key(ignored("devices: [mesh]")),
    "trainer.device": Key(_HARDWARE),
    "trainer.ray_wait_register_center_timeout": Key(_HARDWARE),
    "trainer.esi_redundant_time": Key(_HARDWARE),
    "ray_init.*": Key(_HARDWARE),
    "ray_kwargs.*": Key(_HARDWARE),
    "global_profiler.*": Key(_PLACE),
    "hydra.*": Key(_PLACE),
}


def key_of(name: str) -> Key | None:
    """The table's entry for a key: its own, else the longest pattern's that it matches."""
    if name in KEYS:
        return KEYS[name]
    patterns = [p for p in KEYS if p.endswith("*") and fnmatch.fnmatchcase(name, p)]
    return KEYS[max(patterns, key=len)] if patterns else None
