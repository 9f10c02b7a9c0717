"""The command `cir-jax chat`."""

import argparse

from cir_jax.arguments import above_zero, count, not_negative, part, positive, share


def add(commands) -> None:
    chat = commands.add_parser(
        "chat",
        help="talk to a model, with its programs run",
        description="Answers questions, one a line, from the terminal or a pipe: text as it is "
        "sampled, programs run, their outputs put back. The prompt of a turn is the conversation "
        "so far. /reset forgets it, /exit or Ctrl-D ends, Ctrl-C stops an answer.",
    )
    chat.add_argument(
        "model",
        metavar="MODEL",
        help="run directory (its newest checkpoint; raw prompts, as in training), or Hugging Face "
        "directory (package:NAME for one that is shipped; in its chat template if it has one, "
        "thinking disabled)",
    )
    chat.add_argument("--tokenizer", metavar="DIR", help="of weights that have none with them")
    chat.add_argument(
        "--template",
        metavar="TEXT",
        help="of a question's text, in which {question} is replaced (default: the run's "
        "data.template; {question} in a chat template, else that and a newline)",
    )
    chat.add_argument("--system", metavar="TEXT", help="system message of the chat template")
    chat.add_argument("--raw", action="store_true", help="no chat template")
    of_run = "(default: the run's, else {})"
    for name, kind, default, meaning in (
        ("temperature", not_negative, "1", "divides the logits; 0 is greedy"),
        ("top-p", share, "1", "nucleus that is sampled from; 1 is all"),
        ("top-k", count, "0", "most likely tokens that are sampled from; 0 is all"),
        ("min-p", part, "0", "least probability, as a share of the most likely token's"),
        ("max-calls", count, "5", "programs an answer; a run's: as in its evaluation"),
        ("max-new", positive, "4096", "tokens of an answer, outputs of programs included"),
        ("timeout", above_zero, "5", "seconds of a program"),
    ):
        chat.add_argument(
            f"--{name}", type=kind, metavar="N", help=f"{meaning} {of_run.format(default)}"
        )
    chat.add_argument(
        "--context",
        type=positive,
        metavar="N",
        help="tokens of a conversation (default: 4096, or fewer if the model has fewer)",
    )
    chat.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help=f"of decoding {of_run.format('float32')}"
    )
    chat.add_argument(
        "--seed", type=count, default=0, metavar="N", help="of all random numbers (default: 0)"
    )
    chat.set_defaults(run=_chat)


def _chat(args: argparse.Namespace) -> int:
    from cir_jax.chat.session import Options, chat

    chat(Options(**{k: v for k, v in vars(args).items() if k != "run"}))
    return 0
