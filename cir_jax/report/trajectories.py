"""Trajectories as the page's browser has them: a table of all, and the whole of each.

The table is one array per column, what lists and filters need. The whole of a trajectory:

| key | what |
|---|---|
| text | prompt, model and tool text, in one |
| spans | author (0 prompt, 1 model, 2 tool) and number of tokens of each stretch of one author |
| sizes | how many UTF-16 units of the text each token is: JavaScript's strings are made of them |
| logp | of each of the model's tokens, thousandths, as a positive number; None if not finite |
| advantages | of each token, where they differ, else absent |
| calls | code, status, stdout and error of each program |
| question, truth, answer | of the problem; and what the response gives, None if it gives none |

A token that ends within a character is 0 units long; the character belongs to the token that
completes it. Decoding is done here, from the run's tokenizer: files of runs keep tokens once.
"""

import codecs
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

from cir_jax.report.source import Row, Source
from cir_jax.reward.answer import last_boxed

# Names of authors in an evaluation's spans, in the order of records.Author.
_AUTHORS = ("prompt", "model", "tool")
# Characters of a question in the list.
_SHORT = 160

COLUMNS = (
    "run",
    "step",
    "task",
    "problem",
    "sample",
    "group",
    "score",
    "reason",
    "reward",
    "advantage",
    "stop",
    "calls",
    "failed",
    "budget",
    "tokens",
    "setting",
    "question",
)


def pieces(ids: Iterable[int], token_bytes: Sequence[bytes]) -> tuple[str, list[int]]:
    """The text of ids, as Tokenizer.decode has it, and each token's part in UTF-16 units."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    parts = [decoder.decode(token_bytes[i] if i < len(token_bytes) else b"") for i in ids]
    rest = decoder.decode(b"", final=True)
    if parts:
        parts[-1] += rest
    return "".join(parts), [_units(part) for part in parts]


def _units(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-16-le")) // 2


def _stretches(row: Row) -> list[tuple[int, int]]:
    """Author and number of tokens."""
    if "spans" in row:
        return [(_AUTHORS.index(s["author"]), s["end"] - s["start"]) for s in row["spans"]]
    return [(who, len(list(own))) for who, own in itertools.groupby(row["author"])]


def whole(row: Row, token_bytes: Sequence[bytes]) -> dict[str, Any]:
    """token_bytes: empty if there is no tokenizer: then text is what the row has of it."""
    spans = _stretches(row)
    text, sizes = pieces(row["ids"], token_bytes)
    if not token_bytes:
        text, sizes = row.get("text", "".join(s["text"] for s in row.get("spans", ()))), []
    authors = itertools.chain.from_iterable([who] * count for who, count in spans)
    logp = [
        round(-1000 * x) if math.isfinite(x) else None
        for x, who in zip(row["logp"], authors, strict=True)
        if who == 1
    ]
    found = {
        "text": text,
        "spans": spans,
        "sizes": sizes,
        "logp": logp,
        "calls": [[c["code"], c["status"], c["stdout"], c.get("error", "")] for c in row["calls"]],
        "question": row.get("question", ""),
        "truth": _truth(row),
        "answer": row["answer"] if "truth" in row else _boxed(text, sizes, spans),
    }
    if row.get("advantages") is not None:
        found["advantages"] = row["advantages"]
    return found


def _boxed(text: str, sizes: Sequence[int], spans: Sequence[tuple[int, int]]) -> str | None:
    """The last box of what the model wrote, as the grader takes it. Positions are of UTF-16."""
    wide, turns, token, at = text.encode("utf-16-le", "surrogatepass"), [], 0, 0
    for who, count in spans:
        end = at + 2 * sum(sizes[token : token + count])
        if who == 1:
            turns.append(wide[at:end].decode("utf-16-le", "surrogatepass"))
        token, at = token + count, end
    return last_boxed(turns)


def _truth(row: Row) -> str:
    """A training run's line has the problem's answer by that name; an evaluation's has both."""
    return row.get("truth", row["answer"])


def listed(row: Row, run: int) -> dict[str, Any]:
    """The row of the table; values that the file does not have are None."""
    statuses = [call["status"] for call in row["calls"]]
    prompt = sum(count for who, count in _stretches(row) if who == 0)
    fork = row.get("fork")
    setting = row.get("prompt", "")
    if fork:
        setting += f", call {fork['call'] + 1} {fork['branch']}"
    return {
        "run": run,
        "step": row.get("step"),
        "task": row.get("task") or row["problem_id"].partition("/")[0],
        "problem": row["problem_id"],
        "sample": row["sample"],
        "group": row.get("group"),
        "score": row["score"],
        "reason": row["reason"],
        "reward": row.get("reward"),
        "advantage": row.get("advantage"),
        "stop": row["stop_reason"],
        "calls": len(statuses),
        "failed": sum(status != "ok" for status in statuses),
        "budget": row.get("max_calls"),
        "tokens": len(row["ids"]) - prompt,
        "setting": setting,
        "question": row.get("question", "")[:_SHORT],
    }


def table(rows: Sequence[dict[str, Any]]) -> dict[str, list]:
    """Columns; those of text as numbers into a list of what occurs, under `names`."""
    columns: dict[str, list] = {name: [row[name] for row in rows] for name in COLUMNS}
    names = {}
    for name in ("task", "problem", "reason", "stop", "setting"):
        names[name] = list(dict.fromkeys(columns[name]))
        place = {text: n for n, text in enumerate(names[name])}
        columns[name] = [place[text] for text in columns[name]]
    return columns | {"names": names}


def chosen(sources: Sequence[Source], most: int) -> list[tuple[int, Row]]:
    """At most so many rows of all, each with its source's number: of each source an equal share,
    evenly spread over its file."""
    left, shares = most, [0] * len(sources)
    # Who has few leaves more to the others.
    order = sorted(range(len(sources)), key=lambda n: len(sources[n].samples))
    for done, n in enumerate(order):
        shares[n] = min(len(sources[n].samples), left // (len(sources) - done))
        left -= shares[n]
    return [
        (n, source.samples[i * len(source.samples) // shares[n]])
        for n, source in enumerate(sources)
        for i in range(shares[n])
    ]
