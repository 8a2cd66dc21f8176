"""How Lightning runs the processes of a training: one that is alone, or the ranks that torchrun started."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.strategies import DDPStrategy

from twotower.launch import Launch
from twotower.ranks import Ranks
from twotower.towers.lookups import shared_tables_of
from twotower.training.exchange import same_start
from twotower.training.table_parts import cut_optimizer_state, mark_parts


class RankStrategy(DDPStrategy):
    """Lightning's strategy for several processes, without the wrapper around the model.

    Devices, process group, decisions taken together and checkpoints written by the first rank are Lightning's.
    Gradients are summed by `GradientExchange`, which says why.
    """

    def configure_ddp(self) -> None:
        """Give every rank the weights of the first, and leave the model as it is."""
        assert isinstance(self.model, torch.nn.Module)
        same_start(self.model, Ranks.current())

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Written by the first rank, or by all where they share tables."""
        module = self.lightning_module
        if module is None or not shared_tables_of(module):
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        mark_parts(checkpoint, module, self.optimizers)
        self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Of a state that was saved whole this rank takes its parts of the tables that are shared now."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            assert self.lightning_module is not None
            cut_optimizer_state(state, optimizer, self.lightning_module)
        super().load_optimizer_state_dict(checkpoint)


def trainer_options(timeout: int) -> dict[str, Any]:
    """Arguments of Lightning's `Trainer` that say where to run: this process alone, or the ranks of torchrun."""
    told = Launch.of_environment()
    if Ranks.current().size == 1:
        return {"devices": 1}
    return {
        "devices": told.local_size,
        "num_nodes": told.nodes,
        "strategy": RankStrategy(timeout=timedelta(seconds=timeout)),
        "use_distributed_sampler": False,
    }
