"""Lightning's strategy for a training run: a single process, or the ranks that torchrun started."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.strategies import DDPStrategy

from twotower.distributed.communicator import Communicator
from twotower.distributed.launch import Launch
from twotower.towers.sharded_lookup import shared_tables_of
from twotower.training.checkpoint.parts import cut_optimizer_state, mark_parts
from twotower.training.gradient_sync import same_start


class RankStrategy(DDPStrategy):
    """A Lightning strategy for several processes that does not wrap the model in DDP.

    Lightning handles devices, the process group, decisions on which all ranks must agree, and checkpoints written by
    rank 0. `GradientExchange` sums the gradients; its docstring explains why DDP does not.
    """

    def configure_ddp(self) -> None:
        """Copy rank 0's parameters and buffers, except parts of sharded tables, to every rank; add no wrapper."""
        assert isinstance(self.model, torch.nn.Module)
        same_start(self.model, Communicator.current())

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint, on rank 0 only or, with sharded tables, on all ranks together."""
        module = self.lightning_module
        if module is None or not shared_tables_of(module):
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        mark_parts(checkpoint, module, self.optimizers)
        self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the optimizer state, cut to this rank's parts of sharded tables if it was saved whole."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            assert self.lightning_module is not None
            cut_optimizer_state(state, optimizer, self.lightning_module)
        super().load_optimizer_state_dict(checkpoint)


def trainer_options(timeout: int) -> dict[str, Any]:
    """Return the `Trainer` arguments that set devices and strategy, for one process or torchrun's ranks."""
    launch = Launch.of_environment()
    if Communicator.current().size == 1:
        return {"devices": 1}
    return {
        "devices": launch.local_size,
        "num_nodes": launch.nodes,
        "strategy": RankStrategy(timeout=timedelta(seconds=timeout)),
        "use_distributed_sampler": False,
    }
