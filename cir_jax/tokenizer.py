"""A Hugging Face tokenizer as the engine needs it: ids, bytes of each token, fence strings.

Text is encoded in separate stretches (prompt, each model turn, each tool output) and never
re-encoded: what was sampled stays as sampled.
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

FENCE_OPEN = "```python"
FENCE_CLOSE = "```"
OUTPUT_OPEN = "\n```output\n"
END_OF_TEXT = "<|endoftext|>"

# Qwen2.5's added tokens, in the order of their ids.
SPECIAL_TOKENS = (
    END_OF_TEXT,
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)


def put_back_text(result: str, trailing: str, written: str = "") -> str:
    """What follows a call's boundary (SPEC of CIR: an output block).

    written: the beginning of OUTPUT_OPEN that belongs to the boundary, so that the model has
    written it. trailing: characters that the boundary's last token carried past it. The sampled
    token stays as sampled; if it already brought the newline, the block does not bring another.
    """
    block = f"{OUTPUT_OPEN.removeprefix(written)}{result}\n```\n"
    return block.removeprefix("\n") if trailing.endswith("\n") else block


class Tokenizer:
    """Byte-level BPE tokenizer loaded through transformers."""

    def __init__(self, directory: str | Path):
        # transformers reads these when it is imported; a local directory needs no hub.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from tokenizers import Tokenizer as Backend
        from transformers import AutoTokenizer

        self.directory = Path(directory)
        self._hf = AutoTokenizer.from_pretrained(str(directory))
        # The same tokenizer without added tokens, some of which transformers would find in any
        # text: Qwen2.5 does not mark <tool_call> and others as special.
        backend = self._hf.backend_tokenizer
        self._plain = Backend(backend.model)
        self._plain.normalizer, self._plain.pre_tokenizer = (
            backend.normalizer,
            backend.pre_tokenizer,
        )
        self.size = len(self._hf)
        self.eos_id = self._hf.convert_tokens_to_ids(END_OF_TEXT)
        # What ends a response: an instruct model's own token is that of a turn's end.
        self.end_ids = tuple(sorted({self.eos_id, self._hf.eos_token_id}))
        self._parts: dict[tuple[str, ...], list[list[int]]] = {}

    def encode(self, text: str) -> list[int]:
        """Ids of plain text in Unicode's form NFC, as Qwen2.5 has it; the names of special and
        other added tokens in it are ordinary characters."""
        return self._plain.encode(text, add_special_tokens=False).ids

    @property
    def has_chat_template(self) -> bool:
        return self._hf.chat_template is not None

    def chat_prompt(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Messages, as (role, content), in the chat template: ids up to where the answer begins.

        If the first is not the system's, the template's own comes before it, if it has one.
        Special tokens are the template's alone: contents are encoded as `encode` does.
        Thinking is disabled in templates that know of it (Qwen3).
        Raises ValueError if the template fails, or does not hold the messages as they are.
        """
        parts = self._chat_parts(tuple(role for role, _ in messages))
        ids = list(parts[0])
        for (_, content), part in zip(messages, parts[1:], strict=True):
            ids += self.encode(content) + part
        return ids

    def chat_turn(self, text: str, *, system: str | None = None, is_first: bool) -> list[int]:
        """A user's turn in the chat template: ids up to where the model's answer begins.

        The first turn of a conversation begins with the system's message, the given one or the
        template's own if it has one. Any other begins with what closes the answer before it.
        Errors, special tokens and thinking as in `chat_prompt`.
        """
        if is_first:
            return self.chat_prompt([("system", system)] * bool(system) + [("user", text)])
        closing, after = self._chat_parts(("user", "assistant", "user"))[2:]
        return closing + self.encode(text) + after

    def _chat_parts(self, roles: tuple[str, ...]) -> list[list[int]]:
        """Ids of what the chat template writes before, between and after messages."""
        if roles not in self._parts:
            self._parts[roles] = self._render_parts(roles)
        return self._parts[roles]

    def _render_parts(self, roles: tuple[str, ...]) -> list[list[int]]:
        from jinja2 import TemplateError

        # Stand-ins for the messages, of a private use area: the template's parts lie between.
        messages = [{"role": role, "content": f"\ue000{n}\ue001"} for n, role in enumerate(roles)]
        try:
            rendered = self._hf.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        except TemplateError as error:
            raise ValueError(f"{self.directory}: its chat template fails: {error}") from error
        parts = re.split("\ue000([0-9]+)\ue001", rendered)
        if parts[1::2] != [str(n) for n in range(len(roles))]:
            raise ValueError(f"{self.directory}: its chat template leaves out or moves messages")
        return [self._with_special(part) for part in parts[::2]]

    def _with_special(self, text: str) -> list[int]:
        return self._hf.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of ids; padding rows of an embedding table beyond the tokenizer's size are empty."""
        table = self.token_bytes
        joined = b"".join(table[i] for i in map(int, ids) if i < self.size)
        return joined.decode("utf-8", errors="replace")

    @functools.cached_property
    def fingerprint(self) -> str:
        """Equal for tokenizers whose ids stand for the same bytes."""
        table = hashlib.blake2b(digest_size=16)
        for token in self.token_bytes:
            table.update(len(token).to_bytes(4, "big") + token)
        return table.hexdigest()

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes that each id stands for; a special token stands for its name."""
        special = set(self._hf.all_special_ids) | set(self._hf.added_tokens_decoder)
        char_byte = {char: byte for byte, char in _byte_chars().items()}
        table = []
        for i, token in enumerate(self._hf.convert_ids_to_tokens(list(range(self.size)))):
            if token is None:
                table.append(b"")
            elif i in special:
                table.append(token.encode())
            else:
                table.append(bytes(char_byte[c] for c in token))
        return table


@functools.cache
def _byte_chars() -> dict[int, str]:
    """Printable stand-ins for the 256 bytes, as in GPT-2's byte-level BPE."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    chars = {b: chr(b) for b in keep}
    rest = [b for b in range(256) if b not in chars]
    return chars | {b: chr(256 + n) for n, b in enumerate(rest)}


def train_bpe(texts: Iterable[str], size: int, directory: str | Path) -> None:
    """Trains a byte-level BPE tokenizer of Qwen2.5's class and special tokens and saves it.

    size: tokens in all. Words that do not recur in the texts stay split into bytes.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    # Qwen2.5's split: words with a leading space, single digits, punctuation with newlines.
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(SPECIAL_TOKENS),
        min_frequency=3,
        initial_alphabet=sorted(_byte_chars().values()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    backend.model.save(str(directory))
    first = backend.get_vocab_size()
    added = {
        str(first + n): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for n, token in enumerate(SPECIAL_TOKENS)
    }
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "model_max_length": 32768,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
