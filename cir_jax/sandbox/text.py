"""The text of a result that is put back into the model's context."""

from cir_jax.records import ExecResult

MAX_RESULT_CHARS = 400
_KEPT_CHARS = 200

ERROR_TEXTS = {
    "timeout": "TimeoutError: the program ran longer than its time limit",
    "crashed": "Crash: the program was ended by a signal",
    "oom": "MemoryError: the program needed more memory than its limit",
}
"""One fixed text for each way in which a program can be stopped."""


def result_text(result: ExecResult) -> str:
    """What the model reads of a result.

    Stripped stdout, or the last line of the traceback if the program failed, or the fixed text of
    a timeout, crash or lack of memory. Over 400 characters: the first 200, "...", the last 200.

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
    if len(text) > MAX_RESULT_CHARS:
        return f"{text[:_KEPT_CHARS]}...{text[-_KEPT_CHARS:]}"
    return text
