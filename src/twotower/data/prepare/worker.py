"""Helper process that reads shards: `python -m twotower.data.prepare.worker`, with a task on standard input."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

from twotower.data.io import readers
from twotower.data.prepare.cache import into_folder
from twotower.data.prepare.first_pass import FileReader
from twotower.data.prepare.shards import Shards, in_turn


def main() -> None:
    """Go through all shards once, and read those that no other process has taken."""
    task = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # With smaller chunks, all helper processes together need only as much memory as a single process.
    readers.CHUNK_ROWS = max(readers.CHUNK_ROWS // task["shares"], 1)
    readers.TEXT_CHUNK_ROWS = max(readers.TEXT_CHUNK_ROWS // task["shares"], 1)
    files = [Path(file) for file in task["files"]]
    shards = Shards(Path(task["root"]), files, task["reading"], task.get("purpose", ""))
    for file in in_turn(files, task["number"], task["processes"]):
        shards.take(file, into_folder(FileReader.of_dict(task["reading"])), wait=False)


def _end_with_parent() -> None:
    """End this process when its parent ends for any reason, which closes standard input."""
    while sys.stdin.read(1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
