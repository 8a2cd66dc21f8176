"""Search by text on Cranfield: BM25, the frozen sentence model, towers trained on title -> abstract, and the hybrid.

The towers are one linear map each over the vectors of the sentence model, and start at its similarity; the frozen model
is this start. Training data are the pairs of a title and its document, without the pairs held out for validation and
test. The judged queries are the test. Cranfield has grades 1 (a complete answer) to 4 (of little interest); the gain of
nDCG is 5 minus the grade, and 0 for -1. Writes benchmarks/results/search_by_text.json.

    python benchmarks/search_by_text.py --data ../shared/data/cranfield --model FOLDER_OF_A_SENTENCE_MODEL
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import polars as pl

from twotower.config.run import Config
from twotower.evaluation.judgements import JudgedEvaluation
from twotower.run import train_run
from twotower.run.judgements import evaluate_judged

RESULTS = Path(__file__).parent / "results" / "search_by_text.json"


def settings(model: str, items: Path, seed: int, **training: Any) -> Config:
    """Return the settings of a run."""
    text = {"kind": "text", "model": model}
    return Config.model_validate(
        {
            "data": {"query_text": "query", "catalog": "table", "items": str(items)},
            "query_tower": {"hidden": None, "features": [{"column": "query", **text}]},
            "item_tower": {
                "dimension": 384,
                "id_embedding": False,
                "features": [{"column": "title", **text}, {"column": "text", **text}],
            },
            "training": {"learning_rate": 3e-4, "max_epochs": 20, "seed": seed, "logger": "none", **training},
            "evaluation": {"baselines": False},
        }
    )


def files(source: Path, folder: Path) -> tuple[Path, Path, Path]:
    """Write the pairs, the documents and the judgements with gains, and return their paths."""
    documents = pl.read_csv(source / "docs.tsv", separator="\t", quote_char=None)
    documents.write_parquet(folder / "documents.parquet")
    titled = documents.drop_nulls("title").filter(pl.col("title").str.strip_chars() != "")
    titled.select(query="title", doc_id="doc_id").write_parquet(folder / "pairs.parquet")
    judged = pl.read_csv(source / "qrels.tsv", separator="\t")
    gain = pl.when(pl.col("relevance") >= 1).then(5 - pl.col("relevance")).otherwise(0)
    judged.with_columns(relevance=gain).write_csv(folder / "qrels.tsv", separator="\t")
    return folder / "pairs.parquet", folder / "documents.parquet", folder / "qrels.tsv"


def main() -> None:
    """Train, measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    measured: dict[str, JudgedEvaluation] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pairs, documents, qrels = files(given.data, folder)
        for name, training in (("frozen", {"max_epochs": 1, "learning_rate": 1e-12}), ("trained", {})):
            config = settings(given.model, documents, given.seed, **training)
            train_run(pairs, folder / name, config, progress=False)
            measured[name] = evaluate_judged(folder / name, qrels, given.data / "queries.tsv")
            print(name, measured[name], sep="\n")
    rows = {"BM25": measured["frozen"].to_dict()["rows"]["BM25"]}
    for name, one in measured.items():
        found = one.to_dict()["rows"]
        rows |= {name: found["model"], f"{name} + BM25": found["hybrid"]}
    document = {
        "queries": len(measured["trained"].queries),
        "items": measured["trained"].num_items,
        "seed": given.seed,
        "model": Path(given.model).parent.name if Path(given.model).is_dir() else given.model,
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
