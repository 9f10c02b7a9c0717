"""Tables and figures of saved samples and metrics, each a function of what was saved.

ANALYSES maps a name to a function from evaluations and runs (`load` of folders), in the order of
time, to an Analysis, or to None where they have nothing for it.
"""

from collections.abc import Callable, Sequence

from cir_jax.analyses import accuracy, code, counterfactual, curve
from cir_jax.analyses.analysis import Analysis
from cir_jax.analyses.saved import Saved, load

ANALYSES: dict[str, Callable[[Sequence[Saved]], Analysis | None]] = {
    "results": accuracy.results,
    "compared": accuracy.compared,
    "pass_at_k": accuracy.pass_k,
    "tokens": accuracy.tokens,
    "budgets": accuracy.budgets,
    "types": accuracy.types,
    "code": code.code,
    "failures": code.failures,
    "behaviours": code.behaviours,
    "counterfactual": counterfactual.counterfactual,
    "learning_curve": curve.learning_curve,
}

__all__ = ["ANALYSES", "Analysis", "Saved", "load"]
