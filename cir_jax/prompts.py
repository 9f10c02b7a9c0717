"""Prompts: a problem's messages as token ids."""

from cir_jax.records import Problem, prompt_text
from cir_jax.tokenizer import Tokenizer


def prompt_ids(problem: Problem, tokenizer: Tokenizer, template: str, chat: bool) -> list[int]:
    """Ids of the template's text with the problem's question.

    chat: as the user's message in the tokenizer's chat template, after the problem's other
      messages; else as raw text.

    Raises ValueError if a raw prompt would leave out messages, or the chat template cannot hold
    them.
    """
    text = prompt_text(template, problem)
    if chat:
        try:
            return tokenizer.chat_prompt([*problem.context, ("user", text)])
        except ValueError as error:
            raise ValueError(f"problem {problem.problem_id}: {error}") from error
    if problem.context:
        roles = ", ".join(role for role, _ in problem.context)
        raise ValueError(
            f"problem {problem.problem_id}: messages ({roles}) before the question, which a raw "
            "prompt would leave out; data.chat=true puts them into the chat template"
        )
    return tokenizer.encode(text)
