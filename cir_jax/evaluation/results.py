"""Tables and figures of saved evaluations, on the screen and in files."""

import importlib.util
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cir_jax.analyses import ANALYSES, Analysis, Saved, load
from cir_jax.evals.codestats import code_stats
from cir_jax.evals.samples import DESCRIPTION, Setting
from cir_jax.train.display import Display

TABLES, VALUES = "analyses.md", "analyses.json"


def analyses_of(saved: Sequence[Saved], names: Iterable[str]) -> dict[str, Analysis]:
    """Those that there is something to say about."""
    made = {name: ANALYSES[name](saved) for name in names}
    return {name: analysis for name, analysis in made.items() if analysis is not None}


def write(made: dict[str, Analysis], folder: Path, *, figures: bool) -> None:
    """Tables as Markdown and as JSON, and each figure as NAME.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TABLES).write_text(as_text(made), encoding="utf-8")
    values = {
        name: {"title": a.title, "note": a.note, "columns": a.columns, "rows": a.rows}
        for name, a in made.items()
    }
    (folder / VALUES).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    if figures:
        for name, analysis in made.items():
            if analysis.figure is not None:
                analysis.figure().savefig(folder / f"{name}.png", dpi=120)


def can_draw() -> bool:
    """Whether matplotlib, the extra `figures`, is there."""
    return importlib.util.find_spec("matplotlib") is not None


def show(folder: Path, display: Display) -> None:
    """Prints an evaluation's tables and puts them, with figures, into its directory.

    Of a run's held-out problems: the row of its table, and the others if there is more to say.
    """
    (saved,) = load([folder])
    made = analyses_of([saved], ANALYSES)
    write(made, folder, figures=can_draw())
    described = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    if described["asked"]["suite"] is not None or len(saved.settings) > 1:
        print(as_text(made))
    if described["asked"]["suite"] is None:
        display.table([_row(described["stage"], saved, setting) for setting in saved.settings])


def as_text(made: dict[str, Analysis]) -> str:
    return "\n".join(analysis.markdown() for analysis in made.values())


def _row(stage: str, saved: Saved, setting: Setting) -> dict[str, Any]:
    """As training writes it after an evaluation (train/loop.py)."""
    samples = [sample for sample in saved.samples if sample.setting == setting]
    stats = code_stats([s.trajectory() for s in samples], [s.verdict() for s in samples])
    several = len(saved.settings) > 1
    return {"stage": f"{stage}, {setting.max_calls} calls" if several else stage} | stats
