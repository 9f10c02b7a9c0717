"""The file of a golden batch: one .npz of arrays in veRL's names and shapes.

Rows lie as in veRL: prompts padded on the left, responses on the right, and what is told of
response tokens has R columns, the last ones of input_ids. Entry t tells of token t (its own
log-probability, not its successor's). Padding may hold anything.
"""

import dataclasses
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pydantic

from cir_jax.config import RLConfig
from cir_jax.records import Author


class Field(NamedTuple):
    """axes: B rows, T tokens, R response tokens, M mini-batches."""

    axes: str
    dtype: type
    text: str


# What every file has.
REQUIRED = {
    "settings": Field("", str, 'JSON: {"temperature": 1.0, "rl": {keys of [rl]}}'),
    "input_ids": Field("BT", int, "prompt and response"),
    "attention_mask": Field("BT", int, "1 where there is a token"),
    "response_mask": Field("BR", int, "1 on the tokens that the loss counts"),
    "uid": Field("B", str, "the group of a row: its problem, as text or number"),
    "token_level_scores": Field("BR", float, "rewards, before a KL penalty"),
}
# What others are made of, and nothing here makes.
GIVEN = {
    "author": Field("BT", int, "0 prompt, 1 model, 2 tool; absent: by response_mask"),
    "minibatch": Field("B", int, "number of the row's update; absent: all are one"),
    "responses": Field("BR", int, "the last R of input_ids"),
    "rollout_log_probs": Field("BR", float, "by the sampler"),
    "values": Field("BR", float, "the critic's, before each token; gae needs them"),
}
# What is computed from the others and compared.
COMPARED = {
    "position_ids": Field("BT", int, "from 0 at the prompt's first token"),
    "old_log_probs": Field("BR", float, "by the weights before the step"),
    "log_probs": Field("BR", float, "by the weights of the update; absent: old_log_probs"),
    "ref_log_prob": Field("BR", float, "by the reference model"),
    "token_level_rewards": Field("BR", float, "scores less the KL penalty"),
    "advantages": Field("BR", float, "where response_mask is 1"),
    "returns": Field("BR", float, "what the critic learns (gae), where response_mask is 1"),
    "rollout_is_weights": Field("BR", float, "importance weights (importance_cap)"),
    "pg_loss": Field("M", float, "clipped surrogate"),
    "pg_clipfrac": Field("M", float, "share of tokens that clip_low or clip_high clips"),
    "pg_clipfrac_lower": Field("M", float, "share of tokens that dual_clip clips"),
    "ppo_kl": Field("M", float, "mean of old_log_probs - log_probs"),
    "kl_loss": Field("M", float, "KL from the reference, the same kind of mean as the loss"),
    "entropy": Field("M", float, "mean over the loss's tokens"),
    "loss": Field("M", float, "pg_loss + kl_coef kl_loss - entropy_coef entropy"),
    "vf_loss": Field("M", float, "the critic's loss where its values are the old ones"),
    "grad_norm": Field("M", float, "of the loss, at the weights, before clipping"),
}
FIELDS = REQUIRED | GIVEN | COMPARED

# Keys of [rl] that a file's settings may have.
_RL_KEYS = (
    "advantage gamma critic whiten_tool_tokens clip_low clip_high dual_clip loss_mean loss_length "
    "train_tool_tokens kl_coef kl_in kl_estimator entropy_coef importance_cap"
).split()
_CRITIC_KEYS = ("lam", "clip")

# Writes the file from veRL's trainer. Numbers of tokens are below 2^24: float32 holds them exactly.
SNIPPET = """\
import json
import numpy as np

NAMES = (
    "input_ids attention_mask position_ids responses response_mask token_level_scores "
    "token_level_rewards old_log_probs ref_log_prob rollout_log_probs values advantages returns"
).split()

def write_golden(path, data, settings, **results):
    # data: the DataProto that update_actor is given; results: numbers that veRL made of it
    arrays = {k: data.batch[k].float().cpu().numpy() for k in NAMES if k in data.batch.keys()}
    arrays |= {k: np.atleast_1d(v) for k, v in results.items()}
    uid = np.asarray(data.non_tensor_batch["uid"]).astype(str)
    np.savez(path, settings=json.dumps(settings), uid=uid, **arrays)

# With one mini-batch and one micro-batch, so that the metrics are the whole batch's:
# write_golden("golden.npz", batch, {"temperature": 1.0, "rl": {"advantage": "grpo"}},
#     grad_norm=metrics["actor/grad_norm"], pg_loss=metrics["actor/pg_loss"])
"""


def describe() -> str:
    """The table of fields, for the command's help."""
    lines = []
    for title, fields in (
        ("needed", REQUIRED),
        ("used if there", GIVEN),
        ("compared if there", COMPARED),
    ):
        lines.append(f"{title}:")
        lines += [f"  {n:20}{'[' + ','.join(f.axes) + ']':8}{f.text}" for n, f in fields.items()]
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Golden:
    """A batch. arrays: by the names of FIELDS but settings, of int64, float64 or str."""

    rl: RLConfig
    temperature: float
    arrays: Mapping[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    @property
    def attended(self) -> np.ndarray:
        """[B,T]: where there is a token."""
        return self["attention_mask"] == 1

    @property
    def trained(self) -> np.ndarray:
        """[B,R]: what the loss counts."""
        return self["response_mask"] == 1

    @property
    def num_response(self) -> int:
        return self["response_mask"].shape[1]

    def response(self, x_BT: np.ndarray) -> np.ndarray:
        """The response's columns [B,R]."""
        return x_BT[:, -self.num_response :]

    @property
    def author(self) -> np.ndarray:
        """[B,T]: who wrote each token; PROMPT in padding."""
        if "author" in self:
            return np.where(self.attended, self["author"], Author.PROMPT)
        out = np.full(self["input_ids"].shape, Author.PROMPT, np.int64)
        out[:, -self.num_response :] = np.where(self.trained, Author.MODEL, Author.TOOL)
        return np.where(self.attended, out, Author.PROMPT)

    @property
    def minibatches(self) -> list[np.ndarray]:
        """The rows' numbers of each update."""
        if "minibatch" not in self:
            return [np.arange(len(self["input_ids"]))]
        number = self["minibatch"]
        return [np.flatnonzero(number == m) for m in range(number.max() + 1)]


def settings_of(rl: RLConfig) -> dict[str, Any]:
    """The keys of [rl] that a file has, as plain values."""
    tree = rl.model_dump(mode="json", include=set(_RL_KEYS))
    return tree | {"critic": {key: tree["critic"][key] for key in _CRITIC_KEYS}}


def write(path: Path, golden: Golden) -> None:
    settings = {"temperature": golden.temperature, "rl": settings_of(golden.rl)}
    small = {
        name: x.astype(np.int32 if x.dtype.kind == "i" else np.float32)
        if FIELDS[name].axes in ("BT", "BR")
        else x
        for name, x in golden.arrays.items()
    }
    with open(path, "wb") as file:
        np.savez_compressed(file, settings=json.dumps(settings), **small)


def read(path: Path) -> Golden:
    """Raises ValueError naming array, value and what was expected; OSError."""
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not an .npz of plain arrays: {error}") from error
    try:
        return golden(arrays)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def golden(arrays: Mapping[str, np.ndarray]) -> Golden:
    """A checked batch of a file's arrays. Raises ValueError as above."""
    unknown = sorted(set(arrays) - set(FIELDS))
    if unknown:
        raise ValueError(f"array {unknown[0]!r}: unknown; there are: {', '.join(FIELDS)}")
    for name in REQUIRED:
        if name not in arrays:
            raise ValueError(f"array {name!r}: missing, [{','.join(REQUIRED[name].axes)}]")
    rl, temperature = _settings(str(arrays["settings"]))
    out = {name: _array(name, x) for name, x in arrays.items() if name != "settings"}
    sizes = {"B": out["input_ids"].shape[0], "T": out["input_ids"].shape[1]}
    sizes["R"] = out["response_mask"].shape[1]
    sizes["M"] = int(out["minibatch"].max()) + 1 if "minibatch" in out else 1
    for name, x in out.items():
        shape = tuple(sizes[axis] for axis in FIELDS[name].axes)
        if x.shape != shape:
            axes = ",".join(FIELDS[name].axes)
            raise ValueError(f"array {name!r}: of shape {x.shape}, must be [{axes}] = {shape}")
    if sizes["R"] > sizes["T"]:
        raise ValueError(f"array 'response_mask': {sizes['R']} columns, input_ids has {sizes['T']}")
    batch = Golden(rl, temperature, out)
    _check_masks(batch)
    return batch


def _settings(text: str) -> tuple[RLConfig, float]:
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"settings: not JSON: {error}") from error
    if not isinstance(tree, dict) or set(tree) - {"temperature", "rl"}:
        raise ValueError(f"settings={text}: must be {REQUIRED['settings'].text[6:]}")
    rl, temperature = tree.get("rl", {}), tree.get("temperature", 1.0)
    if not isinstance(temperature, int | float) or not temperature > 0:
        raise ValueError(f"settings: temperature={temperature!r}: must be above 0")
    for name in rl if isinstance(rl, dict) else ():
        if name not in _RL_KEYS:
            raise ValueError(f"settings: rl.{name}: there are: {', '.join(_RL_KEYS)}")
    try:
        return RLConfig.model_validate(rl), float(temperature)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, ("rl", *first["loc"])))
        raise ValueError(f"settings: {key}={first['input']!r}: {first['msg']}") from error


def _array(name: str, x: np.ndarray) -> np.ndarray:
    kind = FIELDS[name].dtype
    if len(FIELDS[name].axes) != x.ndim:
        axes = ",".join(FIELDS[name].axes)
        raise ValueError(f"array {name!r}: of shape {x.shape}, must be [{axes}]")
    if kind is str:
        return x.astype(str)
    if x.dtype.kind not in "biuf":
        raise ValueError(f"array {name!r}: of type {x.dtype}, must be of numbers")
    if kind is int and not np.array_equal(x, x.astype(np.int64)):
        raise ValueError(f"array {name!r}: must be of whole numbers")
    return x.astype(np.int64 if kind is int else np.float64)


def _check_masks(batch: Golden) -> None:
    """Tokens of a row lie together, and what is trained on is a token of the response."""
    attended, trained = batch.attended, batch.trained
    for name in ("attention_mask", "response_mask"):
        if not np.isin(batch[name], (0, 1)).all():
            raise ValueError(f"array {name!r}: must be of 0 and 1")
    starts = np.diff(attended.astype(np.int8), axis=1, prepend=0) == 1
    for b in np.flatnonzero(starts.sum(axis=1) != 1):
        raise ValueError(f"array 'attention_mask': row {b}: the tokens must lie together")
    for b in np.flatnonzero((trained & ~batch.response(attended)).any(axis=1)):
        raise ValueError(f"array 'response_mask': row {b}: is 1 where attention_mask is 0")
    for b in np.flatnonzero((trained[:, :1] & starts[:, [-batch.num_response]]).any(axis=1)):
        raise ValueError(f"array 'response_mask': row {b}: its first token has no prompt before it")
    if not trained.any():
        raise ValueError("array 'response_mask': must be 1 somewhere")
    if "responses" in batch:
        other = (batch["responses"] != batch.response(batch["input_ids"])) & batch.response(
            attended
        )
        for b, t in np.argwhere(other):
            raise ValueError(
                f"array 'responses': row {b}, token {t}: {batch['responses'][b, t]}, but "
                f"input_ids has {batch.response(batch['input_ids'])[b, t]}"
            )
    if "author" in batch:
        tokens = batch.response(batch.author)
        own = (tokens == Author.MODEL) | (batch.rl.train_tool_tokens & (tokens == Author.TOOL))
        for b, t in np.argwhere(own != trained):
            raise ValueError(
                f"array 'response_mask': row {b}, token {t}: {int(trained[b, t])}, but its author "
                f"is {tokens[b, t]} and rl.train_tool_tokens is {batch.rl.train_tool_tokens}"
            )
    if "minibatch" in batch:
        for m, rows in enumerate(batch.minibatches):
            if not len(rows):
                raise ValueError(f"array 'minibatch': number {m} has no row")
        if batch["minibatch"].min() < 0:
            raise ValueError("array 'minibatch': must be numbers from 0")
