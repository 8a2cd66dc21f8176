"""Gowalla, the split of LightGCN: id towers, Recall@20 and NDCG@20 beside the published figures.

    python benchmarks/gowalla.py --data ../shared/data/gowalla --epochs 12                  # choose: on validation
    python benchmarks/gowalla.py --data ../shared/data/gowalla --epochs 12 --final --seeds 0 1 2  # measure: on the test

The published split is a training and a test part. Here the training part comes as train.txt and valid.txt:
choices are made by training on the first and measuring on the second, and the test is not looked at. With
--final the chosen settings are trained on both, as the published models are, and the last weights are measured
on the test.

Every test user is ranked over all 40,981 items but those of its training part. Recall@20 is hits over the
number of the user's test items, NDCG@20 has binary gain, and both are averaged over the users, as in the
published evaluation.

The model is one vector for each user and item, cosine similarity, a fixed temperature. All rows of a user have
the same query embedding, hence the same softmax over the catalog, so it is computed once for the user and not
once for the row:

    loss_u = sum over the user's items y of ( -s_uy + log sum_j exp s_uj ),

exactly the full softmax's loss over all rows at 1/27 of its products, in bfloat16 with float32 sums. A row's
gradient and its weight are those of `full-softmax`; what differs from `twotower train` is that a batch holds
whole users. --start svd begins at the truncated singular value decomposition of the training matrix, each entry
divided by the roots of its row and column sums. --start FILE begins at the tables of another run (last.*.safetensors
in its folder): with --final a run that was chosen on the validation goes on with the validation's rows as well.

--rows trains the same model with `tt.fit` on sampled candidates instead (expected-count, rows in random order).
Every finished run is written to the results file at once and not repeated; an interrupted one goes on from its
last epoch (--runs).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

import twotower as tt
from twotower.data import Holdout, Interactions, Split
from twotower.data.parts import from_parts
from twotower.evaluation import EASE, ItemKNN, Popularity, evaluate_all
from twotower.files import write_text
from twotower.index import ExactIndex
from twotower.serving.artifact import library_versions

RESULTS = Path(__file__).parent / "results" / "gowalla.json"
PUBLISHED = {
    "LightGCN": {"Recall@20": 0.1830, "NDCG@20": 0.1554},
    "UltraGCN": {"Recall@20": 0.1862, "NDCG@20": 0.1580},
    "SimpleX": {"Recall@20": 0.1872, "NDCG@20": 0.1557},
    "EASE": {"Recall@20": 0.1765, "NDCG@20": 0.1467},
}
ROWS = [
    "query_tower.id_embedding=true",
    "query_tower.history=null",
    "query_tower.hidden=[]",
    "query_tower.dropout=0",
    "objective.sources=[{in_batch: {}}, {uniform: {size: 1024}}]",
    "training.batch_size=2048",
    "training.metric=NDCG@20",
    "training.patience=3",
]


@dataclass(frozen=True)
class Settings:
    """Of one training by whole users.

    Attributes:
        dimension: D.
        temperature: divides the cosine.
        learning_rate: of Adam; warm-up over 20 steps, then a cosine to a twentieth.
        users: of a batch.
        epochs: all of them are done.
        start: "svd", or "random", N(0, 0.1^2), or a file of tables that another run has left (--runs).
        user_weight: a user with n rows weighs n to this power: 1 for rows that weigh alike.
        seed: of the start and the order.
    """

    dimension: int = 64
    temperature: float = 0.1
    learning_rate: float = 1e-3
    users: int = 512
    epochs: int = 12
    start: str = "svd"
    user_weight: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Ranked:
    """Two tables of unit vectors as a ranker."""

    users: Tensor
    items: Tensor

    def rank(self, holdout: Holdout, k: int, exclude_seen: bool) -> NDArray[np.int64]:
        """Best items of every query, int64 [E, k]."""
        seen = (holdout.history_offsets, holdout.history_items) if exclude_seen else None
        return ExactIndex(self.items).search(self.users[torch.from_numpy(holdout.queries)], k, seen)[1].numpy()


class Softmax(torch.autograd.Function):
    """sum_u w_u log sum_j exp(<q_u, v_j> / T) for unit vectors; products in bfloat16, gradients on the way.

    A cosine is at most 1, so exp(s - 1/T) cannot overflow and no maximum is taken out. The sums of the rows come out of
    the product for the gradient: the items carry one more coordinate, which is 1.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, items: Tensor, weights: Tensor, temperature: float) -> Tensor:
        """[B, D], [N, D], [B] -> a scalar."""
        wide = torch.cat([items.bfloat16(), torch.ones(len(items), 16, dtype=torch.bfloat16)], 1)
        weight = ((query / temperature).bfloat16() @ wide[:, : items.shape[1]].T).sub_(1.0 / temperature).exp_()
        summed = weight @ wide
        total = summed[:, items.shape[1]].float()
        scale = (weights / total)[:, None]
        by_query = summed[:, : items.shape[1]].float() * scale / temperature
        ctx.save_for_backward(by_query, (weight.T @ (query * scale).bfloat16()).float() / temperature)
        return ((total.log() + 1.0 / temperature) * weights).sum()

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> tuple[Tensor | None, ...]:
        """Times the incoming gradient."""
        by_query, by_item = ctx.saved_tensors
        return outputs[0] * by_query, outputs[0] * by_item, None, None


class ByUsers:
    """Trains two tables on whole users."""

    def __init__(self, train: Interactions, settings: Settings) -> None:
        self.settings = settings
        self.offsets = torch.from_numpy(np.asarray(train.offsets, dtype=np.int64))
        self.items = torch.from_numpy(train.item_codes.astype(np.int64))
        self.sizes = self.offsets.diff()
        torch.manual_seed(settings.seed)
        scale, shapes = 0.1, ((train.num_queries, settings.dimension), (train.num_items, settings.dimension))
        tables = [torch.randn(shape) * scale for shape in shapes]
        if settings.start == "svd":
            found = singular_vectors(train, settings.dimension)
            tables = [F.normalize(table, dim=1) * scale * settings.dimension**0.5 for table in found]
        elif settings.start != "random":
            state = load_file(settings.start)
            tables = [state["table.0"], state["table.1"]]
            if tuple(table.shape for table in tables) != shapes:
                raise SystemExit(f"--start {settings.start}: tables of other users, items or another D")
        # The SVD hands out columns of a larger matrix: not a layout that a file can hold.
        self.tables = [table.contiguous().requires_grad_() for table in tables]
        self.optimizer = torch.optim.AdamW(self.tables, lr=settings.learning_rate, weight_decay=0.0, fused=True)
        self.users = self.sizes.nonzero().flatten()
        self.steps = -(-len(self.users) // settings.users) * settings.epochs

    def epoch(self, number: int) -> float:
        """One pass over all users, in an order that seed and epoch decide; the mean loss of a row."""
        order = torch.randperm(
            len(self.users), generator=torch.Generator().manual_seed(self.settings.seed * 1000 + number)
        )
        batches = torch.split(self.users[order], self.settings.users)
        total = 0.0
        for place, users in enumerate(batches):
            for group in self.optimizer.param_groups:
                group["lr"] = self.settings.learning_rate * self._factor(number * len(batches) + place)
            loss = self.loss(users)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            total += loss.item() / len(batches)
        return total

    def loss(self, users: Tensor) -> Tensor:
        """Mean loss of the rows of some users."""
        query, items = F.normalize(self.tables[0][users], dim=1), F.normalize(self.tables[1], dim=1)
        sizes = self.sizes[users]
        row = torch.repeat_interleave(torch.arange(len(users)), sizes)
        first = self.offsets[users] - (sizes.cumsum(0) - sizes)
        positives = self.items[torch.arange(len(row)) + first[row]]
        weights = sizes.float() ** self.settings.user_weight
        temperature = self.settings.temperature
        score = (query[row] * items.index_select(0, positives)).sum(1) / temperature * (weights / sizes)[row]
        partition: Tensor = Softmax.apply(query, items, weights, temperature)  # type: ignore[no-untyped-call]
        return (partition - score.sum()) / weights.sum()

    def ranked(self) -> Ranked:
        """The model as it is."""
        users, items = (F.normalize(table.detach(), dim=1) for table in self.tables)
        return Ranked(users, items)

    def state(self) -> dict[str, Tensor]:
        """Tables and the optimizer's state."""
        kept = {f"table.{n}": table.detach() for n, table in enumerate(self.tables)}
        for n, table in enumerate(self.tables):
            kept |= {f"{name}.{n}": value for name, value in self.optimizer.state[table].items()}
        return kept

    def restore(self, state: dict[str, Tensor]) -> None:
        """Back to a state."""
        for n, table in enumerate(self.tables):
            table.data.copy_(state[f"table.{n}"])
            self.optimizer.state[table] = {key: state[f"{key}.{n}"] for key in ("step", "exp_avg", "exp_avg_sq")}

    def _factor(self, step: int) -> float:
        if step < 20:
            return (step + 1) / 20
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / self.steps))


def singular_vectors(train: Interactions, dimension: int) -> tuple[Tensor, Tensor]:
    """Truncated SVD of A_ui / sqrt(n_u n_i) by random projection and four power steps: u sqrt(s), v sqrt(s)."""
    rows = torch.from_numpy(train.query_codes().astype(np.int64))
    columns = torch.from_numpy(train.item_codes.astype(np.int64))
    shape = (train.num_queries, train.num_items)
    counts = [torch.bincount(c, minlength=n).clamp(min=1).float() for c, n in zip((rows, columns), shape, strict=True)]
    values = (counts[0][rows] * counts[1][columns]) ** -0.5
    matrix = torch.sparse_coo_tensor(torch.stack([rows, columns]), values, shape).coalesce()
    flipped = matrix.t().coalesce()
    basis = matrix @ torch.randn(shape[1], dimension + 16)
    for _ in range(4):
        basis = torch.linalg.qr(matrix @ (flipped @ basis))[0]
    left, singular, right = torch.linalg.svd(flipped @ basis, full_matrices=False)
    root = singular[:dimension].sqrt()
    return (basis @ right.T)[:, :dimension] * root, left[:, :dimension] * root


def read(root: Path) -> tuple[Split, Split]:
    """Train, with validation; and train and validation together, with the test. A user's items in a random order."""
    parts: dict[str, Interactions] = {}
    for name in ("train", "valid", "test"):
        rows = Interactions.read(root / f"{name}.txt", part=True)
        parts[name] = Interactions.from_frame(frame(rows).sample(fraction=1.0, shuffle=True, seed=0))
    both = pl.concat([frame(parts["train"]), frame(parts["valid"])]).sample(fraction=1.0, shuffle=True, seed=0)
    return (
        from_parts(parts["train"], parts["valid"], parts["test"]),
        from_parts(Interactions.from_frame(both), None, parts["test"]),
    )


def frame(rows: Interactions) -> pl.DataFrame:
    """Interactions as a table of ids."""
    return pl.DataFrame(
        {"user_id": rows.queries.decode(rows.query_codes()), "item_id": rows.items.decode(rows.item_codes)}
    )


def measured(rankers: dict[str, Any], holdout: Holdout, train: Interactions) -> dict[str, dict[str, float]]:
    """The metrics of rankers, by name."""
    rows = evaluate_all(rankers, holdout, train=train, ks=(10, 20)).rows
    # What cannot be measured here, such as diversity without features, is no number, and JSON has none for that.
    return {row.name: {name: value for name, value in row.values.items() if not math.isnan(value)} for row in rows}


def by_users(split: Split, settings: Settings, asked: Holdout, directory: Path | None, every: int) -> dict[str, Any]:
    """Train on whole users; measure every few epochs where the holdout is the validation, at the end anyway."""
    training = ByUsers(split.train, settings)
    kept = None if directory is None else directory / "last.json"
    story: dict[str, Any] = {"epoch": 0, "seconds": 0.0, "curve": []}
    if kept is not None and kept.exists():
        story = json.loads(kept.read_text())
        training.restore(load_file(kept.with_suffix(f".{story['epoch']}.safetensors")))
    started = time.process_time() - story["seconds"]
    for number in range(story["epoch"], settings.epochs):
        loss = training.epoch(number)
        last = number + 1 == settings.epochs
        if last or (asked.name == "validation" and (number + 1) % every == 0):
            found = measured({"model": training.ranked()}, asked, split.train)["model"]
            story["curve"].append({"epoch": number + 1, "loss": round(loss, 4), **found})
            print(number + 1, round(loss, 4), {k: round(v, 4) for k, v in found.items() if "20" in k}, flush=True)
        story |= {"epoch": number + 1, "seconds": round(time.process_time() - started, 1)}
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            save_file(training.state(), kept.with_suffix(f".{number + 1}.safetensors"))
            write_text(kept, json.dumps(story))
            kept.with_suffix(f".{number}.safetensors").unlink(missing_ok=True)
    return {
        "metrics": {k: v for k, v in story["curve"][-1].items() if "@" in k},
        "curve": story["curve"],
        "cpu_seconds": story["seconds"],
        "settings": asdict(settings),
    }


def by_rows(split: Split, overrides: list[str], asked: Holdout, directory: Path | None) -> dict[str, Any]:
    """Train with `tt.fit`."""
    resume = directory is not None and (directory / "checkpoints" / "last.ckpt").exists()
    model = tt.fit(split, tt.Config.load(None, overrides), directory=directory, resume=resume, progress=False)
    return {
        "metrics": measured({"model": model.retriever}, asked, split.train)["model"],
        "curve": model.fit.history,
        "cpu_seconds": round(model.fit.cpu_seconds, 1),
        "settings": model.artifact.config.model_dump(mode="json"),
    }


def kept_runs(path: Path) -> list[dict[str, Any]]:
    """The runs that are finished."""
    runs: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return runs


def record(path: Path, entry: dict[str, Any]) -> None:
    """Add a run to the file, which is read again: another process may have written meanwhile."""
    stamp = {
        "threads": torch.get_num_threads(),
        "versions": library_versions(),
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
    }
    others = [old for old in kept_runs(path) if old["key"] != entry["key"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps([*others, {**entry, **stamp}], indent=1))


def main() -> None:
    """Measure what is asked for and not yet there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--final", action="store_true", help="train on both parts, measure on the test")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--baselines", action="store_true", help="popularity, item-kNN and EASE on the test")
    for name, default in asdict(Settings()).items():
        if name != "seed":
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--rows", action="store_true", help="train with tt.fit on sampled candidates")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="for --rows")
    parser.add_argument("--every", type=int, default=2, help="epochs between validations")
    parser.add_argument("--runs", type=Path, help="a folder for checkpoints, so that an interrupted run goes on")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    first, both = read(asked.data)
    split, holdout = (both, both.test) if asked.final else (first, first.validation)
    if asked.baselines:
        known = {
            "popularity": Popularity(both.train),
            "item-kNN": ItemKNN(both.train),
            "EASE": EASE(both.train, l2=200.0),
        }
        found = measured(known, both.test, both.train)
        record(asked.results, {"key": "baselines", "published": PUBLISHED, "metrics": found})
        return
    for seed in asked.seeds:
        settings = Settings(**{name: getattr(asked, name, seed) for name in asdict(Settings())})
        told = [*ROWS, f"objective.temperature={settings.temperature}", f"training.seed={seed}", *asked.overrides]
        what = told if asked.rows else asdict(settings)
        key = json.dumps([what, bool(asked.final)], sort_keys=True)
        if key in [run["key"] for run in kept_runs(asked.results)]:
            continue
        directory = None
        if asked.runs is not None:
            directory = asked.runs / "".join(c if c.isalnum() or c in ".-" else "_" for c in key)[-200:]
        found = (
            by_rows(split, told, holdout, directory)
            if asked.rows
            else by_users(split, settings, holdout, directory, asked.every)
        )
        print(key, {k: round(v, 4) for k, v in found["metrics"].items()}, f"{found['cpu_seconds']:.0f} s", flush=True)
        record(asked.results, {"key": key, "measured_on": holdout.name, "seed": seed, **found})


if __name__ == "__main__":
    main()
