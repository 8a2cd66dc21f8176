"""The known positives of a batch of queries, compared with a loop."""

import numpy as np
import polars as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.data import Interactions, KnownPositives, TrainingBatches


def interactions(n: int, queries: int, seed: int) -> Interactions:
    rng = np.random.default_rng(seed)
    item = np.concatenate([[0, 1], rng.integers(0, 25, n)])
    user = rng.integers(0, queries, n + 2)
    return Interactions.from_frame(pl.DataFrame({"user": user, "item": item, "timestamp": np.arange(n + 2)}))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 60), st.integers(1, 9), st.lists(st.integers(-1, 8), max_size=12), st.integers(0, 10**6))
def test_pairs_match_the_loop(n: int, queries: int, wanted: list[int], seed: int) -> None:
    data = interactions(n, queries, seed)
    wanted = [min(code, data.num_queries - 1) for code in wanted]
    expected = [
        (row, int(data.item_codes[place]))
        for row, code in enumerate(wanted)
        if code >= 0
        for place in range(data.offsets[code], data.offsets[code + 1])
    ]
    row, item = KnownPositives(data).pairs(torch.tensor(wanted, dtype=torch.int64))
    assert (row.dtype, item.dtype) == (torch.int64, torch.int64)
    assert list(zip(row.tolist(), item.tolist(), strict=True)) == expected


def test_the_positives_of_a_batch_are_known() -> None:
    data = interactions(80, 7, 0)
    known = KnownPositives(data)
    for batch in TrainingBatches(data, 10):
        pairs = set(zip(*(t.tolist() for t in known.pairs(batch.queries)), strict=True))
        assert {(row, int(item)) for row, item in enumerate(batch.items)} <= pairs
