"""Recorded trajectories for SFT: rows of files -> the tokens that a rollout would have had.

A row has a question and one of three layouts of what came after it:

- "segments", as `cir-jax collect` writes them: [{"author", "text", "ids"}], model and tool in turn,
  texts as they stood in the context. "ids" count where the row's "tokenizer" is this one, so that
  sampled tokens stay as sampled; else the texts are encoded.
- "messages", a chat: [{"role", "content"}]: user (the question), assistant, then tool or user (what
  a program put out) and assistant in turn. An assistant's content may hold outputs itself, in
  ```output blocks.
- "response": one text with code and ```output blocks in it, beside a "question".

In the latter two the model's part ends where a rollout's would, at the closing fence of the first
non-blank ```python block, and an output is put back in this config's words, by the function that
rollouts use. Every stretch is encoded apart and belongs to one author: that is the loss's mask.
Blocks without an output are the model's where they end a response, as in a rollout whose budget is
used up.

Rows that cannot be trained on are left out and counted, by COUNTED. Rows that are not of one of
these forms are errors.
"""

import collections
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cir_jax.config import Config, ConfigError, RolloutConfig
from cir_jax.data.files import field, read_rows, wrong_field
from cir_jax.prompts import prompt_ids
from cir_jax.records import Author, ExecResult, Problem
from cir_jax.rl.batch import Sequence1D
from cir_jax.rollout.fence import BOUNDARIES, STOP_WORD, first_block
from cir_jax.sandbox.text import result_text
from cir_jax.tokenizer import END_OF_TEXT, Tokenizer

# Reasons for which rows are left out, and last, what was cut from rows that are not.
COUNTED = {
    "too_long": "left out; above data.max_prompt_tokens or rollout.max_response_tokens",
    "several_programs": "left out; several programs before an output, of one of them",
    "stray_output": "left out; ```output where no program stands before it",
    "no_answer": "left out; nothing, or no text after the last output",
    "cut_after_program": "without the text between a program and its output",
}

# A stretch of one author's: text, or ids where they are on record.
Part = tuple[Author, str | list[int]]
# A row's question, the stretches of its response, and whether text was left out of these.
Read = tuple[str, list[Part], bool]

# The closing fence stands on a line of its own.
_OUTPUT = re.compile(r"\s*```output[ \t\r]*\n((?:.*?\n)??)```[ \t\r]*(?:\n|\Z)", re.DOTALL)
# Of an output that ends in one, a rollout shows the last line alone.
_TRACEBACK = re.compile(r"^Traceback \(most recent call last\):\n(?:.*\n)*(\S.*)\Z", re.MULTILINE)


class Recorded(NamedTuple):
    """question: what came from the same one is kept together."""

    question: str
    sequence: Sequence1D


class _Unusable(Exception):
    """Why a row is left out, one of COUNTED."""


def tokenize(parts: Sequence[Part], tokenizer: Tokenizer) -> Sequence1D:
    """Each stretch encoded apart, so that masks follow authors by construction."""
    ids: list[int] = []
    author: list[int] = []
    for who, stretch in parts:
        new = stretch if isinstance(stretch, list) else _encode(stretch, tokenizer)
        ids += new
        author += [who] * len(new)
    return Sequence1D(np.array(ids, np.int32), np.array(author, np.int8))


def _encode(text: str, tokenizer: Tokenizer) -> list[int]:
    ids = tokenizer.encode(text.removesuffix(END_OF_TEXT))
    return [*ids, tokenizer.eos_id] if text.endswith(END_OF_TEXT) else ids


def load(cfg: Config, tokenizer: Tokenizer) -> tuple[list[Recorded], dict[str, int]]:
    """What the files of sft.data hold; rows by COUNTED, and those that are `kept`.

    Raises:
      ConfigError: a file is not what it should be, or nothing of it is kept.
    """
    kept = []
    counts = collections.Counter(dict.fromkeys(("kept", *COUNTED), 0))
    for name in cfg.sft.data:
        for where, row in read_rows(Path(name)):
            try:
                question, parts, is_cut = read_row(where, row, cfg.rollout, tokenizer)
                problem = Problem(where, "", question, answer="", verifier="math")
                prompt = prompt_ids(problem, tokenizer, cfg.data.template, cfg.data.chat)
                sequence = tokenize([(Author.PROMPT, prompt), *parts], tokenizer)
                num_prompt = int((sequence.author == Author.PROMPT).sum())
                num_response = len(sequence.ids) - num_prompt
                if (
                    num_prompt > cfg.data.max_prompt_tokens
                    or num_response > cfg.rollout.max_response_tokens
                ):
                    raise _Unusable("too_long")
            except _Unusable as reason:
                counts[str(reason)] += 1
            else:
                kept.append(Recorded(question, sequence))
                counts["kept"] += 1
                counts["cut_after_program"] += is_cut
    if not kept:
        raise ConfigError(f"sft.data={list(cfg.sft.data)}: nothing to train on; {dict(counts)}")
    return kept, dict(counts)


def read_row(where: str, row: dict[str, Any], cfg: RolloutConfig, tokenizer: Tokenizer) -> Read:
    """Raises ConfigError naming field and value if the row is of none of the layouts."""
    layouts: dict[str, Callable[..., Read]] = {
        "segments": _of_segments,
        "messages": _of_messages,
        "response": _of_response,
    }
    # A table of mixed rows has all columns in each of them.
    given = [name for name in layouts if row.get(name) is not None]
    if len(given) != 1:
        names = ", ".join(sorted(row)) or "none"
        raise ConfigError(
            f"{where}: must have one of the fields {', '.join(layouts)}; its fields: {names}"
        )
    return layouts[given[0]](where, row, cfg, tokenizer)


# --- as `cir-jax collect` writes them


def _of_segments(where: str, row: dict[str, Any], cfg: RolloutConfig, tokenizer: Tokenizer) -> Read:
    question = field(where, row, "question", str)
    same_tokenizer = row.get("tokenizer") == tokenizer.fingerprint
    find_call = BOUNDARIES[cfg.boundary].find_call
    segments = field(where, row, "segments", list)
    if len(segments) % 2 == 0:
        raise wrong_field(
            where, "segments", f"{len(segments)} of them", "model and tool in turn, model last"
        )
    parts: list[Part] = []
    for n, segment in enumerate(segments):
        name = f"segments[{n}]"
        if not isinstance(segment, dict):
            raise wrong_field(where, name, segment, "an object of fields")
        who = Author.TOOL if n % 2 else Author.MODEL
        author = field(where, segment, "author", str, within=f"{name}.")
        if author != who.name.lower():
            expected = f"{who.name.lower()!r}: model and tool in turn"
            raise wrong_field(where, f"{name}.author", author, expected)
        text = field(where, segment, "text", str, within=f"{name}.")
        is_last = n == len(segments) - 1
        if same_tokenizer and segment.get("ids") is not None:
            ids = _recorded_ids(where, name, segment, text, tokenizer)
        else:
            ids = tokenizer.encode(text)
            # A response that a limit ended has no end of its own.
            if is_last and row.get("stop_reason") in (None, "eos"):
                ids.append(tokenizer.eos_id)
        if who == Author.MODEL and not is_last:
            if find_call(tokenizer.decode(ids)) is None:
                expected = f"a call (boundary {cfg.boundary!r}), which the segment after it answers"
                raise wrong_field(where, f"{name}.text", text[-60:], expected)
            if find_call(tokenizer.decode(ids[:-1])) is not None:
                expected = "at its end where the call is, as a rollout's would be"
                raise wrong_field(where, f"{name}.text", text[-60:], expected)
        parts.append((who, ids))
    return question, parts, False


def _recorded_ids(
    where: str, name: str, segment: dict[str, Any], text: str, tokenizer: Tokenizer
) -> list[int]:
    ids = field(where, segment, "ids", list, within=f"{name}.")
    if not all(isinstance(i, int) and 0 <= i < tokenizer.size for i in ids):
        raise wrong_field(where, f"{name}.ids", ids, f"token ids below {tokenizer.size}")
    own = ids[:-1] if ids and ids[-1] in tokenizer.end_ids else ids
    if tokenizer.decode(own) != text:
        raise wrong_field(where, f"{name}.ids", tokenizer.decode(own), "the ids of the text")
    return ids


# --- chats and texts


def _of_response(where: str, row: dict[str, Any], cfg: RolloutConfig, tokenizer: Tokenizer) -> Read:
    question = field(where, row, "question", str)
    turns = _Turns(cfg)
    turns.end(turns.split(field(where, row, "response", str)))
    return question, turns.parts, turns.is_cut


def _of_messages(where: str, row: dict[str, Any], cfg: RolloutConfig, tokenizer: Tokenizer) -> Read:
    said = []
    for n, message in enumerate(field(where, row, "messages", list)):
        if not isinstance(message, dict):
            raise wrong_field(where, f"messages[{n}]", message, "an object of role and content")
        role, content = (
            field(where, message, name, str, within=f"messages[{n}].")
            for name in ("role", "content")
        )
        # Some sets have an empty one everywhere.
        if (role, content) != ("system", ""):
            said.append((n, role, content))
    if not said:
        raise wrong_field(where, "messages", [], "user, assistant, tool, ..., assistant")
    for place, (n, role, _) in enumerate(said):
        expected = ("assistant",) if place % 2 else ("tool", "user")
        if role not in (expected if place else ("user",)):
            names = " or ".join(map(repr, expected if place else ("user",)))
            hint = "; a system's text belongs into data.template" if role == "system" else ""
            raise wrong_field(where, f"messages[{n}].role", role, names + hint)
    if len(said) % 2:
        raise wrong_field(where, "messages", said[-1][1], "assistant's at the end")
    turns = _Turns(cfg)
    for n, role, content in said[1:]:
        if role == "assistant":
            rest = turns.split(content)
        elif (block := first_block(rest)) is None:
            raise wrong_field(
                where,
                f"messages[{n}].content",
                content,
                "preceded by a closed, non-blank ```python block, whose output it is",
            )
        else:
            turns.call(rest, block)
            turns.output(_unwrapped(content))
    turns.end(rest)
    return said[0][2], turns.parts, turns.is_cut


class _Turns:
    """Stretches of a response, written as a rollout of these settings would have."""

    def __init__(self, cfg: RolloutConfig):
        self._cfg = cfg
        self._boundary = BOUNDARIES[cfg.boundary]
        self.parts: list[Part] = []
        self.is_cut = False

    def split(self, text: str) -> str:
        """Takes the programs with their outputs; returns the text after them."""
        while (block := first_block(text)) and (output := _OUTPUT.match(text, block.end())):
            self.call(text[: block.end()], block)
            self.output(output[1])
            text = text[output.end() :]
        return text

    def call(self, text: str, block: re.Match[str]) -> None:
        after = text[block.end() :]
        if first_block(after):
            raise _Unusable("several_programs")
        self.is_cut |= bool(after.strip())
        self._model(text[: block.end()], self._boundary.written)

    def output(self, text: str) -> None:
        text = text.strip().removeprefix(self._cfg.result.prefix.strip())
        error = _TRACEBACK.search(text)
        result = ExecResult("error", error=error[1]) if error else ExecResult("ok", stdout=text)
        result = result_text(result, self._cfg.result)
        self.parts.append((Author.TOOL, self._boundary.put_back(result, trailing="")))

    def end(self, text: str) -> None:
        text = text.removesuffix(END_OF_TEXT)
        if not text.strip():
            raise _Unusable("no_answer")
        self._model(text, END_OF_TEXT)

    def _model(self, text: str, end: str) -> None:
        if STOP_WORD in text:
            raise _Unusable("stray_output")
        self.parts.append((Author.MODEL, text + end))


def _unwrapped(content: str) -> str:
    """An output, without the block that it may stand in."""
    block = _OUTPUT.fullmatch(content)
    return block[1] if block else content
