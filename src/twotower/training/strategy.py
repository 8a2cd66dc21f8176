"""How Lightning runs the processes of a training: one that is alone, or the ranks that torchrun started."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from pytorch_lightning.strategies import DDPStrategy

from twotower.launch import Launch
from twotower.ranks import Ranks
from twotower.training.exchange import same_start


class RankStrategy(DDPStrategy):
    """Lightning's strategy for several processes, without the wrapper around the model.

    Devices, process group, decisions taken together and checkpoints written by the first rank are Lightning's.
    Gradients are summed by `GradientExchange`, which says why.
    """

    def configure_ddp(self) -> None:
        """Give every rank the weights of the first, and leave the model as it is."""
        assert isinstance(self.model, torch.nn.Module)
        same_start(self.model, Ranks.current())


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
