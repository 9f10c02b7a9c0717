"""`cir-jax chat`: questions from a terminal or a pipe, answers as they are sampled.

A conversation is its token ids: the prompt of a turn is what all turns before it have read and
written, as sampled, and the new question.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import jax
import numpy as np

from cir_jax import config as configs
from cir_jax import mesh as meshes
from cir_jax.chat.screen import Screen
from cir_jax.chat.source import Source, find_source
from cir_jax.config import ConfigError, MeshConfig, SandboxConfig
from cir_jax.config.errors import missing_file
from cir_jax.models import qwen
from cir_jax.records import Author, ExecResult, Problem, StopReason, prompt_text
from cir_jax.rollout.engine import Engine
from cir_jax.rollout.rows import Row
from cir_jax.rollout.sampling import Sampling
from cir_jax.sandbox.pool import open_sandbox
from cir_jax.tokenizer import Tokenizer

# Tokens between two looks at what has been sampled: so many appear at once.
_SEGMENT_STEPS = 4
# A conversation's tokens where nothing is said: its cache is kept on the device.
CONTEXT = 4096


@dataclasses.dataclass(frozen=True)
class Options:
    """The command line. None: as the model's source says.

    max_new: tokens of an answer, outputs included. context: of a conversation.
    """

    model: str
    tokenizer: str | None = None
    template: str | None = None
    system: str | None = None
    raw: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    max_calls: int | None = None
    max_new: int | None = None
    context: int | None = None
    timeout: float | None = None
    dtype: str | None = None
    seed: int = 0


class Programs:
    """The sandbox of one conversation: it tells when a program starts, and can give it up."""

    def __init__(self, cfg: SandboxConfig, started: Callable[[], None]):
        self._cfg, self._started = cfg, started
        self._sandbox = open_sandbox(cfg)
        self._latest: Future[ExecResult] | None = None

    def submit(self, code: str, *, seed: int = 0) -> Future[ExecResult]:
        self._latest = self._sandbox.submit(code, seed=seed)
        self._started()
        return self._latest

    def give_up(self) -> None:
        """Ends the program that runs, if any; the next one finds a sandbox."""
        if self._latest is not None and not self._latest.done():
            self.close()
            self._sandbox = open_sandbox(self._cfg)
        self._latest = None

    def close(self) -> None:
        self._sandbox.close()


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Questions as ids: in a chat template, or raw."""

    tokenizer: Tokenizer
    template: str
    chat: bool
    system: str | None = None

    def following(self, ids: list[int], problem: Problem) -> list[int]:
        """The conversation so far, which stays as it is, and a question."""
        text = prompt_text(self.template, problem)
        if not self.chat:
            return ids + self.tokenizer.encode(text)
        turn = self.tokenizer.chat_turn(text, system=self.system, is_first=not ids)
        # What closes an answer has mostly been sampled with it.
        return ids + turn[1:] if ids and turn[0] == ids[-1] else ids + turn


class Conversation:
    """Turns of one model; `ids` are those of all turns that have been answered."""

    def __init__(
        self,
        engine: Engine,
        params: qwen.Params,
        prompts: Prompts,
        screen: Screen,
        *,
        sampling: Sampling,
        max_calls: int,
    ):
        self.engine, self.params, self.prompts, self.screen = engine, params, prompts, screen
        self.sampling, self.max_calls = sampling, max_calls
        self.ids: list[int] = []
        self._num_turns = 0

    def reset(self) -> None:
        self.ids = []

    def ask(self, question: str) -> None:
        """Shows the answer as it comes in. What is raised meanwhile leaves `ids` as they were.

        Random numbers are a function of the engine's seed and the number of questions before.
        """
        turn, self._num_turns = self._num_turns, self._num_turns + 1
        problem = Problem(f"chat/{turn}", "chat", question, answer="", verifier="math")
        prompt = self.prompts.following(self.ids, problem)
        room = self.engine.max_length
        if len(prompt) >= room:
            self.screen.note(
                f"[the context is full: {len(prompt)} tokens with this question, and there is room "
                f"for {room}; /reset forgets the conversation]"
            )
            return
        answer: list[int] = []
        if not turn:
            self.screen.progress("compiling ...")
        try:
            stop = self._sample(problem, turn, prompt, answer)
        finally:
            self.screen.end()
        self.ids = prompt + answer
        if stop != "eos":
            self.screen.note(f"[{self._cut(stop)}]")

    def _sample(
        self, problem: Problem, turn: int, prompt: list[int], answer: list[int]
    ) -> StopReason:
        """Appends to `answer` what is read and written."""

        def on_tokens(row: Row, ids: np.ndarray, author: Author) -> None:
            answer.extend(map(int, ids))
            self.screen.tokens(ids, author)

        ((trajectory,),), _ = self.engine.rollout(
            self.params,
            [problem],
            samples=1,
            max_calls=self.max_calls,
            sampling=self.sampling,
            phase="chat",
            step=turn,
            prompts=[prompt],
            on_tokens=on_tokens,
        )
        return trajectory.stop_reason

    def _cut(self, stop: StopReason) -> str:
        cfg = self.engine.cfg
        return {
            "response_length": f"cut at --max-new={cfg.max_response_tokens} tokens",
            "context": f"cut: the context of {self.engine.max_length} tokens is full; /reset "
            "forgets the conversation",
            "row_time": f"cut after {cfg.row_timeout_s:g} s",
            "step_time": f"cut after {cfg.step_timeout_s:g} s",
        }[stop]


@contextlib.contextmanager
def open_conversation(
    options: Options, screen_of: Callable[[Tokenizer], Screen]
) -> Iterator[tuple[Conversation, Programs]]:
    """A Conversation with its screen, and its Programs. Raises ConfigError in one line."""
    try:
        source = find_source(options.model)
        tokenizer = _tokenizer(options, source)
        screen = screen_of(tokenizer)
        prompts = _prompts(options, source, tokenizer)
        context = _context(options, source)
    except ConfigError:
        raise
    except (ValueError, OSError) as error:
        raise ConfigError(f"MODEL={options.model!r}: {error}") from error
    timeout_s = _given(options.timeout, source.sandbox.timeout_s)
    sandbox = source.sandbox.model_copy(update={"timeout_s": timeout_s, "num_workers": 1})
    # Any device has a slot of its own, so that all of them can hold a part of the parameters.
    mesh = meshes.make_mesh(MeshConfig(fsdp=jax.device_count()))
    screen.progress(f"loading {options.model} ...")
    with contextlib.closing(Programs(sandbox, screen.running)) as programs, jax.set_mesh(mesh):
        try:
            params = source.load(mesh)
        except (ValueError, OSError) as error:
            raise ConfigError(f"MODEL={options.model!r}: {error}") from error
        settings = source.rollout
        engine = Engine(
            source.model,
            settings.model_copy(
                update={
                    "slots": meshes.num_row_shards(),
                    "segment_steps": _SEGMENT_STEPS,
                    "segments_in_flight": 1,
                    "prefill_rows": 1,
                    "max_response_tokens": _given(options.max_new, settings.max_response_tokens),
                    "max_context": context,
                }
            ),
            tokenizer,
            programs,
            template=prompts.template,
            chat=prompts.chat,
            max_prompt_tokens=context,
            dtype=_given(options.dtype, source.dtype),
            seed=options.seed,
        )
        sampling = Sampling(
            *(_given(getattr(options, k), getattr(settings, k)) for k in Sampling._fields)
        )
        max_calls = _given(options.max_calls, source.max_calls)
        yield (
            Conversation(engine, params, prompts, screen, sampling=sampling, max_calls=max_calls),
            programs,
        )


def _given(value, default):
    return default if value is None else value


def _tokenizer(options: Options, source: Source) -> Tokenizer:
    directory = configs.asset_dir(options.tokenizer) if options.tokenizer else source.tokenizer
    if not directory.is_dir():
        raise ConfigError(missing_file("--tokenizer", directory))
    if not any((directory / name).exists() for name in ("tokenizer.json", "vocab.json")):
        raise ConfigError(f"{directory}: holds no tokenizer; --tokenizer names the model's")
    tokenizer = Tokenizer(directory)
    if tokenizer.size > source.model.vocab_size:
        raise ConfigError(
            f"{directory}: a tokenizer of {tokenizer.size} tokens, the model has "
            f"{source.model.vocab_size}"
        )
    return tokenizer


def _prompts(options: Options, source: Source, tokenizer: Tokenizer) -> Prompts:
    chat = source.may_chat and tokenizer.has_chat_template and not options.raw
    template = _given(options.template, source.chat_template if chat else source.template)
    if "{question}" not in template:
        raise ConfigError(f"--template {template!r}: must contain {{question}}")
    if options.system is not None and not chat:
        raise ConfigError(f"--system {options.system!r}: there is no chat template to put it in")
    if chat:
        # A template that cannot be used is better known before the weights are read.
        tokenizer.chat_turn("", system=options.system, is_first=True)
        tokenizer.chat_turn("", is_first=False)
    return Prompts(tokenizer, template, chat, options.system)


def _context(options: Options, source: Source) -> int:
    most = source.rollout.max_context or source.model.max_positions
    context = _given(options.context, min(CONTEXT, most))
    if context > most:
        raise ConfigError(f"--context {context}: the model has {most} positions")
    return context


def chat(options: Options) -> None:
    """Answers questions, one a line, until their end or /exit.

    At a terminal, Ctrl-C gives up an answer, and with it its question, or at the prompt ends the
    session; elsewhere KeyboardInterrupt is raised.
    """
    # Bytes that are no text, or characters that a terminal has not, end no session.
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")
    at_terminal = sys.stdin.isatty()
    lines = _prompted() if at_terminal else iter(sys.stdin)
    with open_conversation(options, lambda t: Screen(sys.stdout, sys.stderr, t)) as opened:
        converse(*opened, lines, at_terminal=at_terminal)


def _prompted() -> Iterator[str]:
    # What input() edits lines with.
    import readline  # noqa: F401

    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            yield input("> ")
    print()


def converse(
    conversation: Conversation, programs: Programs, lines: Iterator[str], *, at_terminal: bool
) -> None:
    screen = conversation.screen
    if at_terminal:
        screen.note("/reset forgets the conversation, /exit ends; Ctrl-C stops an answer")
    for line in lines:
        match line.strip():
            case "":
                pass
            case "/exit":
                return
            case "/reset":
                conversation.reset()
            case question:
                try:
                    conversation.ask(question)
                except KeyboardInterrupt:
                    if not at_terminal:
                        raise
                    programs.give_up()
                    screen.note("[stopped; this question and its answer are forgotten]")
