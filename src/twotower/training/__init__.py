"""Training: the step, the optimizer and the loop around them."""

from twotower.training.callbacks import LAST, require_checkpoint
from twotower.training.fit import FitResult, fit_towers
from twotower.training.memory_plan import MemoryPlan, plan_memory
from twotower.training.module import TrainingModule
from twotower.training.optimizer import TableOptimizer
from twotower.training.placement import place_tables
from twotower.training.step import compute_loss

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
