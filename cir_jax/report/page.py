"""The page: template, style sheet, script and data as one file."""

import base64
import gzip
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cir_jax import config as configs
from cir_jax.analyses import ANALYSES, Analysis, load
from cir_jax.analyses.analysis import cell_text
from cir_jax.config import ConfigError
from cir_jax.report import curves, svg, tables, trajectories
from cir_jax.report.source import Material, Source

_ASSETS = Path(configs.asset_dir("package:report"))
# Inches of an analysis' figure of one panel: letters are still large enough on a telephone.
_FIGURE = (4.4, 2.9)
# Trajectories that are unpacked together.
_CHUNK = 32


def render(material: Material, *, most: int) -> tuple[str, list[str]]:
    """The HTML, and what a person should know about what it lacks. most: trajectories in it."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    sources = material.sources
    drawn = curves.draw_all(sources)
    rows = trajectories.chosen(sources, most)
    found, notes = _token_bytes(sources)
    analyses, left_out = analyses_of(sources)
    notes += left_out
    total = sum(len(source.samples) for source in sources)
    if len(rows) < total:
        notes.append(f"{len(rows)} of {total} trajectories, evenly spread (--trajectories)")
    whole = [trajectories.whole(row, found[n]) for n, row in rows]
    index = {
        "runs": [source.name for source in sources],
        "charts": [chart.data for chart in drawn],
        "chunk": _CHUNK,
        "table": trajectories.table([trajectories.listed(row, n) for n, row in rows]),
    }
    script = (_ASSETS / "page.js").read_text(encoding="utf-8")
    environment = Environment(
        loader=FileSystemLoader(_ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("page.html").render(
        style=(_ASSETS / "page.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=_hash(script),
        cards=[tables.card(source) for source in sources],
        charts=drawn,
        tables=tables.tables(material),
        analyses=analyses,
        runs_with_curves=[(n, s.name) for n, s in enumerate(sources) if s.lines],
        notes=notes,
        num_trajectories=len(rows),
        index=pack(index),
        chunks=[pack(whole[at : at + _CHUNK]) for at in range(0, len(whole), _CHUNK)],
    )
    return html, notes


class Shown(NamedTuple):
    """An analysis as the page has it; picture: "" if it has none.

    points: the picture's own width, below which its letters get too small.
    """

    table: tables.Table
    picture: str
    points: int


# What files of a run that was stopped, or of other versions, come to: they cost an analysis, not
# the report.
_UNREADABLE = (ConfigError, OSError, ValueError, KeyError)


def analyses_of(sources: Sequence[Source]) -> tuple[list[Shown], list[str]]:
    """All that have something to say of these directories, and notes on those that fail."""
    try:
        saved = load([source.directory for source in sources])
    except _UNREADABLE as error:
        return [], [f"analyses left out: {error!r}"]
    # A run brings the evaluations in it, which are among the sources too.
    saved = list({one.folder.resolve(): one for one in saved}.values())
    found, notes = [], []
    for name, analyse in ANALYSES.items():
        try:
            analysis = analyse(saved)
            if analysis is not None:
                found.append(_shown(analysis))
        except _UNREADABLE as error:
            notes.append(f"analysis {name} left out: {error!r}")
    return found, notes


def _shown(analysis: Analysis) -> Shown:
    picture, points = "", 0
    if analysis.figure is not None:
        with svg.style():
            figure = analysis.figure()
            if len(figure.axes) == 1:
                figure.set_size_inches(_FIGURE)
            points = round(72 * figure.get_figwidth())
            picture, _ = svg.render(figure, analysis.title)
    rows = [[cell_text(cell) for cell in row] for row in analysis.rows]
    table = tables.Table(analysis.title, list(analysis.columns), rows, analysis.note)
    return Shown(table, picture, points)


def pack(value: Any) -> str:
    """Compressed JSON in letters that mean nothing in HTML."""
    # Half a UTF-16 pair, which JSON can hold and UTF-8 cannot, stays an escape.
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode("ascii"), 6, mtime=0)).decode("ascii")


def _hash(script: str) -> str:
    """As a policy for scripts names the one that may run."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")


def _token_bytes(sources: Sequence[Source]) -> tuple[list[Sequence[bytes]], list[str]]:
    """Of each source, the bytes of its tokens, empty where its tokenizer is not here any more; and
    notes that say so."""
    from cir_jax.tokenizer import Tokenizer

    tables_by_name: dict[str, Sequence[bytes]] = {}
    notes = []
    for source in sources:
        name = source.tokenizer
        if name in tables_by_name or not source.samples:
            continue
        try:
            tables_by_name[name] = Tokenizer(configs.asset_dir(name)).token_bytes
        except (OSError, ValueError) as error:
            tables_by_name[name] = ()
            reason = str(error).splitlines()[0]
            notes.append(f"{source.name}: text without tokens, tokenizer={name!r}: {reason}")
    return [tables_by_name.get(source.tokenizer, ()) for source in sources], notes
