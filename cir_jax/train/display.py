"""What a person sees while a run goes on: one live display on a terminal, else lines."""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from cir_jax.output import outlast_readers

# Without a terminal: seconds between two lines of a phase.
_LINE_EVERY_S = 10.0

# Columns of the results table: figure of `code_stats` -> title.
_COLUMNS = {
    "accuracy": "accuracy",
    "code_share": "uses code",
    "needed_code_share": "where needed",
    "calls_per_response": "programs",
    "programs_ok_share": "run ok",
    "response_tokens": "tokens",
}


class Display:
    """Phase, step, figures of the step and time left.

    A job that has one goes on when nobody can see it any more.

    quiet: prints nothing, on all processes of a run but one.
    """

    def __init__(self, console: Console | None = None, *, quiet: bool = False):
        outlast_readers()
        self.console = console or Console(soft_wrap=True, quiet=quiet)
        self._live: Progress | None = None
        self._task = None
        self._phase = ""
        self._total = 0
        self._last_line = 0.0
        self._start = 0.0
        self._first = 0

    def note(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def begin(self, phase: str, total: int, done: int = 0) -> None:
        self.end()
        self._phase, self._total, self._first = phase, total, done
        self._start, self._last_line = time.monotonic(), 0.0
        if self.console.is_terminal:
            self._live = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.completed}/{task.total}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
                console=self.console,
            )
            self._live.start()
            self._task = self._live.add_task(phase, total=total, completed=done, figures="")

    def step(self, done: int, figures: dict[str, float]) -> None:
        text = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        if self._live:
            self._live.update(self._task, completed=done, figures=text)
            return
        now = time.monotonic()
        if now - self._last_line < _LINE_EVERY_S and done < self._total:
            return
        self._last_line = now
        left_s = (now - self._start) / max(1, done - self._first) * (self._total - done)
        self.note(f"{self._phase} {done}/{self._total}  {text}  ETA {left_s:.0f}s")

    def end(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def table(self, rows: list[dict]) -> None:
        """The results table; a row has `stage` and the figures of `code_stats`."""
        table = Table(title="Held-out problems, greedy; programs and tokens per response")
        table.add_column("stage")
        for title in _COLUMNS.values():
            table.add_column(title, justify="right")
        for row in rows:
            cells = (
                f"{row[key]:.1f}" if key == "response_tokens" else f"{row[key]:.3f}"
                for key in _COLUMNS
            )
            table.add_row(row["stage"], *cells)
        self.console.print(table)
