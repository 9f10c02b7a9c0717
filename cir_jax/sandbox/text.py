"""The text of a result that is put back into the model's context."""

from cir_jax.config import ResultConfig
from cir_jax.records import ExecResult

ERROR_TEXTS = {
    "timeout": "TimeoutError: the program ran longer than its time limit",
    "crashed": "Crash: the program was ended by a signal",
    "oom": "MemoryError: the program needed more memory than its limit",
}
"""One fixed text for each way in which a program can be stopped."""


def result_text(result: ExecResult, cfg: ResultConfig) -> str:
    """What the model reads of a result.

    Stripped stdout, or the last line of the traceback if the program failed, or the fixed text of
    a timeout, crash or lack of memory. Over `cfg.max_chars` characters: the first half of so many,
    "...", the last half. `cfg.prefix` stands before it.

    Raises:
      ValueError: the sandbox itself failed; such a result says nothing about the program.
    """
    if result.status == "infra":
        raise ValueError("a failure of the sandbox must not be shown to the model")
    if result.status == "ok":
        text = result.stdout
    elif result.status == "error":
        text = result.error
    else:
        text = ERROR_TEXTS[result.status]
    text = text.strip()
    if len(text) > cfg.max_chars:
        half = cfg.max_chars // 2
        text = f"{text[:half]}...{text[len(text) - half :]}"
    return cfg.prefix + text
