"""From a file of purchases to recommendations: read, split, train, evaluate, save, recommend.

    python examples/quickstart.py

The data is synthetic, so that the example takes seconds: there are two tastes, and users buy popular items of their
own taste.
"""

import tempfile
from pathlib import Path

import numpy as np
import polars as pl

import twotower as tt


def purchases(users: int = 120, items: int = 80, each: int = 20) -> pl.DataFrame:
    """Generate purchases: even users buy even items, odd users odd items; low item numbers are popular."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(users):
        taste = np.arange(user % 2, items, 2)
        weight = 1.0 / np.arange(1, len(taste) + 1)
        bought = rng.choice(taste, size=each, replace=False, p=weight / weight.sum())
        rows += [(f"u{user:03d}", int(item), 1_700_000_000 + 3600 * hour) for hour, item in enumerate(bought)]
    return pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")


def main() -> None:
    """Run every step in a temporary folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        purchases().write_csv(folder / "purchases.csv")
        data = tt.Interactions.read(folder / "purchases.csv", cache=folder / "cache")
        split = tt.splits.leave_last_out(data)
        print(split.account)  # what was dropped, and why

        config = tt.Config.load(overrides=["training.max_epochs=12", "training.batch_size=128"])
        model = tt.fit(split, config)
        print(tt.evaluate(model, split.test))
        model.save(folder / "model")

        retriever = tt.Retriever.load(folder / "model")  # needs no training code
        found = retriever.recommend(["u000", "u001"], k=5)
        print(found)
        own_taste = (found["item"] % 2 == found["query"].str.slice(1).cast(int) % 2).sum() / len(found)
        print(f"recommended items of the user's own taste: {own_taste:.0%}")


if __name__ == "__main__":
    main()
