"""Lightning's loggers by name, and filters for Lightning's own messages."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pytorch_lightning.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger

from twotower.errors import InputError
from twotower.system.filesystem import write_text

#: The package that each logger needs, and the extra that installs it.
NEEDS = {"tensorboard": ("tensorboard", "tensorboard"), "mlflow": ("mlflow", "tracking")}

#: The MLflow experiment of all runs.
EXPERIMENT = "twotower"

#: Warnings of Lightning and its loggers that a user of this library can do nothing about.
NOISE = (
    ".*isinstance\\(treespec, LeafSpec\\).* is deprecated.*",
    ".*does not have many workers.*",
    r"(?s).*Experiment logs directory .* exists and is not empty.*",
    ".*number of training batches .* is smaller than the logging interval.*",
    ".*GPU available but not used.*",
    ".*recommended to use `self.log.*sync_dist=True.*",  # every rank already has the global values
    ".*callbacks used to create the checkpoint need to be provided.*",  # older versions had other callbacks
    ".*MLFlow only allows.*special characters in metric name.*",  # NDCG@10 becomes NDCG10
)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning during the block, except for warnings that a user can act on."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in NOISE:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def make_logger(
    name: Literal["csv", "tensorboard", "mlflow", "none"],
    directory: Path,
    hyperparameters: Mapping[str, Any] | None = None,
) -> Logger | Literal[False]:
    """Create the logger of a run.

    Args:
        name: csv writes `logs/metrics.csv`; tensorboard writes an event file in `logs/`; mlflow writes to the address
            in the environment variable MLFLOW_TRACKING_URI, or to `logs/mlflow/`, and continues the same MLflow run
            when training is resumed; none disables logging.
        directory: the run folder.
        hyperparameters: settings that TensorBoard and MLflow show next to the curves, nested mappings allowed.

    Raises:
        InputError: the package that the logger needs is not installed.
    """
    if name in NEEDS:
        module, extra = NEEDS[name]
        if find_spec(module) is None:
            raise InputError(f"training.logger: {name} is not installed; pip install 'twotower[{extra}]', or use csv")
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
    run_file = logs / "mlflow_run.txt"
    uri = os.environ.get("MLFLOW_TRACKING_URI") or (logs / "mlflow").resolve().as_uri()
    if uri.startswith("file:"):
        # MLflow requires users of its file store to opt in; a run folder uses it on purpose.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    known = run_file.read_text(encoding="utf-8").strip() if run_file.exists() else None
    logger = MLFlowLogger(EXPERIMENT, run_name=directory.resolve().name, tracking_uri=uri, run_id=known)
    write_text(run_file, f"{logger.run_id}\n")
    return logger
