"""Training: the step, the optimizer and the training loop."""

from twotower.training.fit import LAST, FitResult, fit_towers
from twotower.training.memory_plan import MemoryPlan, plan_memory
from twotower.training.model import TrainingModule, batch_loss
from twotower.training.optimizers import TableOptimizer
from twotower.training.placement import place_tables

__all__ = [
    "LAST",
    "FitResult",
    "MemoryPlan",
    "TableOptimizer",
    "TrainingModule",
    "batch_loss",
    "fit_towers",
    "place_tables",
    "plan_memory",
]
