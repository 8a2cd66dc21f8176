"""Embed every user of a saved model in a pool of processes, in batches, and score all items by a matrix product.

    python examples/embed_in_processes.py

Only the path of the model folder is sent to the processes; each opens the model at its first batch. Ray Data
and Spark use it in the same way: see docs/how-to/embed-in-other-engines.md.
"""

import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import polars as pl
import torch

import twotower as tt

USERS, ITEMS, BATCH = 120, 80, 50


def purchases() -> pl.DataFrame:
    """Generate purchases: even users buy even items, odd users odd items."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(USERS):
        bought = rng.choice(np.arange(user % 2, ITEMS, 2), size=15, replace=False)
        rows += [(f"u{user:03d}", int(item), 1_700_000_000 + 3600 * hour) for hour, item in enumerate(bought)]
    return pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")


def train(folder: Path) -> Path:
    """Train a small model and save it."""
    split = tt.splits.leave_last_out(tt.Interactions.from_frame(purchases()))
    config = tt.Config.load(overrides=["training.max_epochs=10", "training.batch_size=128"])
    return tt.fit(split, config, progress=False).save(folder)


def main() -> None:
    """Train, embed in two processes, and compare with the retriever."""
    with tempfile.TemporaryDirectory() as name:
        folder = train(Path(name) / "model")
        users = pl.DataFrame({"user_id": [f"u{user:03d}" for user in range(USERS)]})
        # Spawned, because a process forked after torch has started its threads can hang. One thread each is fastest.
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(2, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            embedded = pl.concat(pool.map(tt.serving.Embedder(folder), users.iter_slices(BATCH)))
            items = pool.submit(tt.serving.Embedder(folder, "items"), pl.DataFrame({"item_id": range(ITEMS)})).result()
        print(embedded.head(2))

        scores = embedded["embedding"].to_numpy() @ items["embedding"].to_numpy().T
        best = items["item_id"].gather(np.argmax(scores, axis=1))
        found = tt.Retriever.load(folder).recommend(users["user_id"].to_list(), k=1, exclude_seen=False)
        print(f"the retriever finds the same best item: {(best == found['item']).mean():.0%} of {len(users)} users")


if __name__ == "__main__":
    main()
