"""A process that helps to read shards: `python -m twotower.data.shard_worker`, told on standard input what to read."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

from twotower.data import reading
from twotower.data.first_pass import FirstPass
from twotower.data.preparation import into_folder
from twotower.data.shards import Shards, in_turn


def main() -> None:
    """Take shards that nobody else has taken, until all are."""
    told = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    reading.CHUNK_ROWS = max(
        reading.CHUNK_ROWS // told["shares"], 1
    )  # all processes together hold as much as one would
    reading.TEXT_CHUNK_ROWS = max(reading.TEXT_CHUNK_ROWS // told["shares"], 1)
    files = [Path(file) for file in told["files"]]
    shards = Shards(Path(told["root"]), files, told["reading"], told.get("purpose", ""))
    for file in in_turn(files, told["number"], told["processes"]):
        shards.take(file, into_folder(FirstPass.of_dict(told["reading"])), wait=False)


def _end_with_parent() -> None:
    """Standard input ends when the process that started this one does, however that happens."""
    while sys.stdin.read(1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
