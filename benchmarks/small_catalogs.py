"""EASE cut to each rank in small catalogs, to decide the default D of the linear start.

    python benchmarks/small_catalogs.py --data ../shared/data

From each data set, pieces with about 150, 300, 600 and 1,200 items are taken: the most popular items ("top") or random
ones of medium popularity ("middle"), with 400 or 2,000 queries of at least five items. Random rows of each query are
held out (5 % validation, 10 % test). Reported is the test NDCG@10 of the item-item matrix cut to every rank, with the
ridge penalty that the product would choose, and which rank the rule takes: the smallest among N / 8 and its multiples
2 and 4 that is within one standard error of the best on the validation (`validation.simplest`). "zero diagonal" is
the truncation of EASE's matrix as it is, "filled diagonal" that of the product, which fills in the diagonal.

Results are in results/small_catalogs.json.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from defaults import Linear
from numpy.typing import NDArray
from torch import Tensor

import twotower as tt
from twotower.data import Holdout, Interactions, Split
from twotower.evaluation import evaluate_all
from twotower.ranking.baselines import ease_weights, gram
from twotower.run import linear_start
from twotower.run.linear_start import RIDGES
from twotower.run.validation import simplest
from twotower.serving.model_folder import library_versions
from twotower.system.filesystem import write_text

RESULTS = Path(__file__).parent / "results" / "small_catalogs.json"
SIZES, QUERIES, FEWEST = (150, 300, 600, 1200), (400, 2000), 5
#: Name -> number of times that the diagonal is filled in.
TRUNCATIONS = {"zero diagonal": 0, "filled diagonal": linear_start.FILLS}


def _sequences(path: Path) -> pl.DataFrame:
    lines = [line.split("\t")[0].split() for line in path.read_text().splitlines()]
    pairs = [(line[0], item) for line in lines for item in line[1:]]
    return pl.DataFrame(pairs, schema=["query", "item"], orient="row")


def tables(data: Path) -> Iterator[tuple[str, pl.DataFrame]]:
    """Yield the rows of every data set, with the columns query and item."""
    yield "ml-100k", pl.read_csv(data / "ml-100k/ml-100k.inter", separator="\t", glob=False)
    yield "online-retail", pl.read_parquet(data / "online-retail/interactions.parquet", glob=False)
    yield "movietweetings", pl.read_csv(data / "movietweetings/interactions.csv", glob=False)
    yield "steam", pl.read_csv(data / "steam/train.csv", glob=False)
    yield "beauty", _sequences(data / "amazon/beauty.txt")
    yield "gowalla", _sequences(data / "gowalla/train.txt")


def piece(rows: pl.DataFrame, items: int, queries: int, middle: bool) -> Interactions | None:
    """Take a piece of a data set, or return None if it has too few items or queries."""
    popular = rows.group_by("item").len().sort(["len", "item"], descending=True)["item"]
    if middle and len(popular) <= 3 * items:
        return None
    chosen = popular[items : 3 * items].sample(items, seed=1) if middle else popular[:items]
    part = rows.filter(pl.col("item").is_in(chosen.implode()))
    asked = part.group_by("query").len().filter(pl.col("len") >= FEWEST)["query"].sort()
    if len(asked) < 100:
        return None
    part = part.filter(pl.col("query").is_in(asked.sample(min(queries, len(asked)), seed=2).implode()))
    return Interactions.from_frame(part.unique(maintain_order=True))


def ndcg(weights: Tensor, holdout: Holdout, train: Interactions) -> NDArray[np.float64]:
    """Return the NDCG@10 of each query by an item-item matrix."""
    ranker = Linear(weights, torch.zeros(train.num_items))
    return evaluate_all({"it": ranker}, holdout, train=train, ks=(10,)).rows[0].per_query["NDCG@10"]


def measure(split: Split) -> dict[str, Any]:
    """Measure all ranks on one piece."""
    train, size = split.train, split.train.num_items
    products, counts = gram(train), train.item_counts()
    mean = float(counts.sum() / max((counts > 0).sum(), 1))
    by_ridge = {
        factor: ndcg(ease_weights(products.clone(), factor * mean), split.validation, train) for factor in RIDGES
    }
    ridge = simplest(by_ridge)
    eighth = int(np.clip(size // 8 // 16 * 16, 16, 512))
    tried = [rank for rank in (eighth, 2 * eighth, 4 * eighth) if rank == eighth or rank <= size // 2]
    ranks = sorted({*tried, *(size // part for part in (8, 4, 2, 1))})
    found = {}
    for name, fills in TRUNCATIONS.items():
        linear_start.FILLS = fills
        factors = linear_start.linear_factors(products, ranks, ridge * mean)
        cut = {rank: history @ vectors.T for rank, (history, vectors) in factors.items()}
        validated = {rank: ndcg(weights, split.validation, train) for rank, weights in cut.items()}
        found[name] = {
            "by the rule": simplest({rank: validated[rank] for rank in tried}),
            "validation": {rank: round(float(values.mean()), 4) for rank, values in validated.items()},
            "test": {rank: round(float(ndcg(weights, split.test, train).mean()), 4) for rank, weights in cut.items()},
        }
    return {"items": size, "queries": train.num_queries, "rows": len(train), "ridge": ridge, **found}


def summary(found: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return by size, and for all sizes, the number of pieces and the mean rank and losses of each truncation."""
    groups = {str(size): [one for one in found if one["asked"] == size] for size in SIZES} | {"all": found}
    return {
        group: {"pieces": len(pieces), **{name: mean_losses(pieces, name) for name in TRUNCATIONS}}
        for group, pieces in groups.items()
    }


def mean_losses(pieces: list[dict[str, Any]], name: str) -> dict[str, float]:
    """Average the rank that the rule takes and, at this rank and others, the loss of NDCG@10 against full rank."""
    rows = []
    for one in pieces:
        test, size, rank = one[name]["test"], one["items"], one[name]["by the rule"]
        at = {"by the rule": rank} | {f"at N / {part}": size // part for part in (8, 4, 2)}
        losses = {f"mean loss {place}": 1 - test[number] / test[size] for place, number in at.items()}
        rows.append({"mean rank by the rule": rank, **losses})
    return {key: round(float(np.mean([row[key] for row in rows])), 4) for key in rows[0]}


def main() -> None:
    """Measure every piece of every data set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    found = []
    for name, table in tables(options.data):
        rows = table.select(query=pl.nth(0), item=pl.nth(1))
        for size in SIZES:
            for queries in QUERIES:
                for middle in (False, True):
                    data = piece(rows, size, queries, middle)
                    if data is None:
                        continue
                    split = tt.splits.random_rows(data, validation=0.05, test=0.1)
                    part = {"set": name, "asked": size, "part": "middle" if middle else "top"}
                    found.append({**part, **measure(split)})
                    print(json.dumps(found[-1]), flush=True)
    result = {
        "summary": summary(found),
        "pieces": found,
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": library_versions(),
    }
    write_text(RESULTS, json.dumps(result, indent=1))
    print(json.dumps(result["summary"]))


if __name__ == "__main__":
    main()
