"""Use the building blocks in your own training loop: no config, no Lightning, no data set class.

    python examples/own_loop.py

You supply item codes and embeddings; a pool supplies candidates with their expected counts, and a loss uses all of
them. The same loop with `tt.negatives.corrections.NoCorrection()` shows the effect of the counts: without them, the
model penalises an item for being popular, and its log popularity is missing from the scores.
"""

import numpy as np
import torch

import twotower as tt

QUERIES, ITEMS, ROWS, DIMENSION = 200, 150, 20_000, 16


def interactions() -> tuple[torch.Tensor, torch.Tensor]:
    """Draw (query, item) rows: items by Zipf's law, each query more often from one half of the catalog."""
    rng = np.random.default_rng(0)
    queries = rng.integers(QUERIES, size=ROWS)
    popularity = 1.0 / np.arange(1, ITEMS + 1)
    items = np.empty(ROWS, dtype=np.int64)
    for half in (0, 1):
        rows = queries % 2 == half
        weight = np.where(np.arange(ITEMS) % 2 == half, 4.0, 1.0) * popularity
        items[rows] = rng.choice(ITEMS, size=rows.sum(), p=weight / weight.sum())
    return torch.from_numpy(queries), torch.from_numpy(items)


def train(pool: tt.negatives.Pool, queries: torch.Tensor, items: torch.Tensor, epochs: int = 8) -> float:
    """Train two embedding tables; return their full softmax loss over the whole catalog."""
    torch.manual_seed(0)
    query_tower, item_tower = torch.nn.Embedding(QUERIES, DIMENSION), torch.nn.Embedding(ITEMS, DIMENSION)
    optimizer = torch.optim.Adam([*query_tower.parameters(), *item_tower.parameters()], lr=0.02)
    for _ in range(epochs):
        for rows in torch.randperm(ROWS).split(256):
            drawn = pool.draw(items[rows])
            loss = tt.losses.sampled_softmax(
                query_tower(queries[rows]),
                item_tower(items[rows]),
                item_tower(drawn.items),
                drawn.log_expected_count,
                mask=drawn.mask,
            ).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return float(tt.losses.full_softmax(query_tower(queries), items, item_tower.weight).mean())


def main() -> None:
    """Train with and without the correction."""
    queries, items = interactions()
    frequency = tt.negatives.CountedFrequency(torch.bincount(items, minlength=ITEMS))
    corrections = {"expected count": None, "no correction": tt.negatives.corrections.NoCorrection()}
    for name, correction in corrections.items():
        pool = tt.negatives.Pool(
            tt.negatives.InBatch(frequency),
            tt.negatives.Sampled(tt.negatives.Uniform(ITEMS), size=32),
            correction=correction,
        )
        print(f"{name}: full softmax loss {train(pool, queries, items):.3f}")


if __name__ == "__main__":
    main()
