"""Training: the step, the optimizer, the loop around them."""

from twotower.training.fit import FitResult, fit_towers
from twotower.training.memory_plan import MemoryPlan, check_tables, plan_memory
from twotower.training.model import TrainingModule, batch_loss
from twotower.training.optimizers import TableOptimizer

__all__ = [
    "FitResult",
    "MemoryPlan",
    "TableOptimizer",
    "TrainingModule",
    "batch_loss",
    "check_tables",
    "fit_towers",
    "plan_memory",
]
