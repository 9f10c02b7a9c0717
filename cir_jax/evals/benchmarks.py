"""Where a benchmark's problems come from."""

from pathlib import Path

from cir_jax.config import ColumnsConfig
from cir_jax.data.files import check_file, read_rows
from cir_jax.data.problems import read_problems
from cir_jax.evals.suites import Benchmark
from cir_jax.records import Problem


def path_of(benchmark: Benchmark, data_dir: Path) -> Path:
    """Raises ConfigError if the file is not there."""
    path = data_dir / benchmark.file
    check_file(path, f"--data-dir {str(data_dir)!r}: file of {benchmark.name}")
    return path


def problems_of(benchmark: Benchmark, data_dir: Path) -> list[Problem]:
    """All problems in the file's order, NAME/0, NAME/1, ...; `types` in their metadata.

    Raises ConfigError naming file, row, column, value and what was expected.
    """
    path = path_of(benchmark, data_dir)
    columns = ColumnsConfig(prompt=benchmark.problem, answer=benchmark.answer)
    problems = read_problems(path, columns)
    rows = (row for _, row in read_rows(path, benchmark.types))
    return [
        Problem(
            problem_id=f"{benchmark.name}/{n}",
            task=benchmark.name,
            question=problem.question,
            answer=problem.answer,
            verifier=problem.verifier,
            metadata={
                "types": {
                    name: str(row[name]) for name in benchmark.types if row.get(name) is not None
                }
            },
            context=problem.context,
        )
        for n, (problem, row) in enumerate(zip(problems, rows, strict=True))
    ]
