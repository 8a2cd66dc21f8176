"""A storage writer for torch.distributed.checkpoint that never holds a second copy of a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from twotower.ranks import Ranks
from twotower.shared_files import save_rows

#: Metadata key under which `HuggingFaceStorageReader` looks for the offsets of a file's rows.
PLACE, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"


class StreamedWriter(HuggingFaceStorageWriter):
    """A writer of the files of `HuggingFaceStorageWriter` with `save_distributed`, one per tensor and rank.

    The base class serializes a file in memory before writing it, so that a rank would need up to three times the memory
    of its rows; here they are written block by block.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path, save_distributed=True)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's tensors."""
        shard = plan.storage_data["shard_index"]
        for number, item in enumerate(plan.items, start=1):
            data = item.tensor_data
            assert data is not None
            place = {item.index.fqn: {OFFSETS: list(data.chunk.offsets)}}
            name = f"shard-{shard:05d}-model-{number:05d}-of-{len(plan.items):05d}.safetensors"
            tensor: Any = planner.resolve_data(item)
            save_rows(Path(self.path) / name, {item.index.fqn: tensor}, {}, Ranks(), {PLACE: json.dumps(place)})
        done: Future[Any] = Future()
        done.set_result([])
        return done
