"""Training: the step, the optimizer, the loop around them."""

from twotower.training.fit import FitResult, fit_towers
from twotower.training.model import TrainingModule, batch_loss
from twotower.training.optimizers import TableOptimizer

__all__ = ["FitResult", "TableOptimizer", "TrainingModule", "batch_loss", "fit_towers"]
