"""The processes that torchrun starts for one command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from twotower.config.run import Config
    from twotower.distributed.launch import Coordinator


@contextmanager
def ranks_of(model: Path | None = None, config: Config | None = None) -> Iterator[Coordinator]:
    """Join the ranks of a command within the block; without torchrun, there is a single process.

    The ranks of these commands compute on the CPU and communicate with gloo; `compare` trains in child processes.

    Args:
        model: the run or model folder, whose `training.exchange_timeout` applies.
        config: the settings, if there is no model yet.

    Raises:
        InputError: there is no model in the folder.
        RankLost: another rank has ended or does not respond.
    """
    from twotower.config.run import Config  # noqa: PLC0415  # heavy imports only when needed
    from twotower.distributed.launch import joined_processes  # noqa: PLC0415
    from twotower.serving.model_folder import find_model, read_metadata  # noqa: PLC0415

    if model is not None:
        config = Config.model_validate(read_metadata(find_model(model))["config"])
    timeout = (config or Config()).training.exchange_timeout
    with joined_processes(timeout=timeout, accelerator="cpu") as team:
        yield team
