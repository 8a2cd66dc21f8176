"""Training: the step, the optimizer and the loop around them."""

from typing import TYPE_CHECKING, Any

from twotower.training.checkpoint.paths import LAST, require_checkpoint
from twotower.training.memory_plan import MemoryPlan, plan_memory
from twotower.training.optimizer import TableOptimizer
from twotower.training.placement import place_tables
from twotower.training.step import compute_loss

if TYPE_CHECKING:
    from twotower.training.fit import FitResult, fit_towers
    from twotower.training.module import TrainingModule

__all__ = [
    "LAST",
    "FitResult",
    "MemoryPlan",
    "TableOptimizer",
    "TrainingModule",
    "compute_loss",
    "fit_towers",
    "place_tables",
    "plan_memory",
    "require_checkpoint",
]

_OF_THE_TRAINER = {"FitResult": "fit", "TrainingModule": "module", "fit_towers": "fit"}


def __getattr__(name: str) -> Any:
    # Imported on first use: Lightning takes seconds to load, and custom loops, `audit` and `recommend` do not need it.
    from importlib import import_module  # noqa: PLC0415

    if name in _OF_THE_TRAINER:
        return getattr(import_module(f"{__name__}.{_OF_THE_TRAINER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
