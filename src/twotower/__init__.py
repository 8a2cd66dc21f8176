"""Retrieval training with negatives whose sampling bias is corrected by construction.

Use the building blocks (`negatives`, `losses`, `towers`) in your own PyTorch loop, or the whole pipeline
(`Interactions`, `splits`, `fit`, `evaluate`, `Retriever`).
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from twotower import data, evaluation, index, losses, negatives, objectives, ranking, serving, towers, training
    from twotower.config import Config
    from twotower.data import Interactions, datasets, splits
    from twotower.errors import InputError
    from twotower.run import Model, continue_with, evaluate, fit
    from twotower.serving import Retriever

_ROOMS = (
    "data",
    "evaluation",
    "index",
    "losses",
    "negatives",
    "objectives",
    "ranking",
    "serving",
    "towers",
    "training",
)
_NAMES = {
    "Config": "twotower.config",
    "InputError": "twotower.errors",
    "Interactions": "twotower.data",
    "Model": "twotower.run",
    "Retriever": "twotower.serving",
    "continue_with": "twotower.run",
    "datasets": "twotower.data",
    "evaluate": "twotower.run",
    "fit": "twotower.run",
    "splits": "twotower.data",
}

__all__ = [
    "Config",
    "InputError",
    "Interactions",
    "Model",
    "Retriever",
    "continue_with",
    "data",
    "datasets",
    "evaluate",
    "evaluation",
    "fit",
    "index",
    "losses",
    "negatives",
    "objectives",
    "ranking",
    "serving",
    "splits",
    "towers",
    "training",
]


def __getattr__(name: str) -> Any:
    # Imported when first used, so that the building blocks do not load the trainer and `--help` does not load torch.
    from importlib import import_module  # noqa: PLC0415

    if name in _ROOMS:
        return import_module(f"twotower.{name}")
    if name in _NAMES:
        return getattr(import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'twotower' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
