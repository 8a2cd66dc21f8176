"""Where a training tells its loss, its metrics and the diagnostics of its objective: Lightning's loggers by name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pytorch_lightning.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger

from twotower.errors import InputError
from twotower.files import write_text

#: What each logger needs, and the extra that brings it.
NEEDS = {"tensorboard": ("tensorboard", "tensorboard"), "mlflow": ("mlflow", "tracking")}

#: The experiment that MLflow lists the runs under.
EXPERIMENT = "twotower"


def make_logger(
    name: Literal["csv", "tensorboard", "mlflow", "none"],
    directory: Path,
    hyperparameters: Mapping[str, Any] | None = None,
) -> Logger | Literal[False]:
    """The logger of a run.

    Args:
        name: csv writes `logs/metrics.csv`; tensorboard writes an event file in `logs/`; mlflow writes to the address
            in the environment variable MLFLOW_TRACKING_URI, or to `logs/mlflow/`, and takes up the same MLflow run
            again when the training is resumed; none keeps nothing.
        directory: the run folder.
        hyperparameters: settings that TensorBoard and MLflow show beside the curves, nested mappings allowed.

    Raises:
        InputError: the package that the logger needs is not installed.
    """
    if name in NEEDS:
        module, extra = NEEDS[name]
        if find_spec(module) is None:
            raise InputError(f"training.logger: {name} needs a package; pip install 'twotower[{extra}]', or choose csv")
    if name == "none":
        return False
    if name == "csv":
        return CSVLogger(directory, name="logs", version="")
    logger: Logger
    if name == "tensorboard":
        logger = TensorBoardLogger(directory, name="logs", version="", default_hp_metric=False)
    else:
        logger = _mlflow(directory)
    if hyperparameters is not None:
        logger.log_hyperparams(dict(hyperparameters))
    return logger


def _mlflow(directory: Path) -> MLFlowLogger:
    logs = directory / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    told = logs / "mlflow_run.txt"
    uri = os.environ.get("MLFLOW_TRACKING_URI") or (logs / "mlflow").resolve().as_uri()
    if uri.startswith("file:"):
        # MLflow asks who still uses its file store to say so; a run folder is a file store on purpose.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    known = told.read_text(encoding="utf-8").strip() if told.exists() else None
    logger = MLFlowLogger(EXPERIMENT, run_name=directory.resolve().name, tracking_uri=uri, run_id=known)
    write_text(told, f"{logger.run_id}\n")
    return logger
