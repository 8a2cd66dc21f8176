"""A small data set with a planted structure."""

import numpy as np
import polars as pl


def planted(queries: int = 60, items: int = 100, rows: int = 24, seed: int = 0) -> pl.DataFrame:
    """Make two groups that never mix: even queries have even items, odd ones odd items; low item numbers are popular.

    A model that has learnt anything ranks items of the right parity first; popularity cannot.
    """
    rng = np.random.default_rng(seed)
    user, item, time = [], [], []
    for query in range(queries):
        pool = np.arange(query % 2, items, 2)
        weight = 1.0 / np.arange(1, len(pool) + 1)
        chosen = rng.choice(pool, size=min(rows, len(pool) - 4), replace=False, p=weight / weight.sum())
        user += [f"u{query:03d}"] * len(chosen)
        item += chosen.tolist()
        time += np.sort(rng.integers(1_600_000_000, 1_700_000_000, len(chosen))).tolist()
    return pl.DataFrame({"user_id": user, "item_id": item, "timestamp": time})


def planted_titles(items: int = 100) -> pl.DataFrame:
    """Make a title per item."""
    return pl.DataFrame({"item_id": range(items), "title": [f"Item number {j}" for j in range(items)]})
