"""Check that evaluation, `Retriever` and the service return the same ids for every test query of a trained model.

    twotower train ../shared/data/ml-1m-loo/sequences.parquet --out RUN --set data.split=leave-last-out
    python benchmarks/same_answers.py RUN --json benchmarks/results/same_answers.json
    ... --kinds hnsw,ivfpq,pgvector --postgres FOLDER

With exact search, the ranked ids of `evaluate`, of `Retriever.recommend` and of `POST /recommend` are compared in
order; the service is a separate `twotower serve` process with several concurrent clients over loopback. Queries whose
results differ are reported with the service's response. Then each approximate kind is built as by `twotower index`,
and its recall against exact search on all test queries is compared with the recall estimated when it was built.
"""

from __future__ import annotations

import argparse
import http.client
import json
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from service_load import service
from serving_index import database, room

from twotower.run import reread
from twotower.serving import Retriever, build_stored_index, find_model, read_index_report
from twotower.serving.model_folder import library_versions

#: Concurrent connections, so that the service processes batches of varying size.
CLIENTS = 8

#: Queries and their histories.
Asked = tuple[list[Any], list[list[Any]]]


def ids_of(retriever: Retriever, codes: np.ndarray) -> list[list[Any]]:
    """Decode ranked codes row by row, without the padding -1."""
    return [retriever.artifact.items.decode(row[row >= 0]).to_list() for row in codes]


def asked_by_id(retriever: Retriever, queries: list[Any], histories: list[list[Any]], k: int) -> list[list[Any]]:
    """Return the items of `Retriever.recommend` in the order of the queries."""
    found = retriever.recommend(queries, histories=histories, k=k)
    rows: dict[Any, list[Any]] = {query: [] for query in queries}
    for query, item in zip(found["query"].to_list(), found["item"].to_list(), strict=True):
        rows[query].append(item)
    return [rows[query] for query in queries]


def served(address: str, queries: list[Any], histories: list[list[Any]], k: int) -> list[list[Any] | str]:
    """Return the items from the service, or the error message if it rejects a query."""
    host = urlsplit(address).netloc

    def ask(client: int) -> list[list[Any] | str]:
        connection, answers = http.client.HTTPConnection(host, timeout=900), list[list[Any] | str]()
        for query, history in list(zip(queries, histories, strict=True))[client::CLIENTS]:
            body = json.dumps({"query_id": query, "history": history, "k": k})
            connection.request("POST", "/recommend", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            content = json.loads(answer.read())
            answers.append(
                [item["item"] for item in content["items"]]
                if answer.status == http.client.OK
                else f"{answer.status}: {content['detail']}"
            )
        return answers

    every: list[list[Any] | str] = [""] * len(queries)
    with ThreadPoolExecutor(CLIENTS) as pool:
        for client, answers in enumerate(pool.map(ask, range(CLIENTS))):
            every[client::CLIENTS] = answers
    return every


def share(found: list[list[Any]], best: list[list[Any]]) -> tuple[float, float]:
    """Compute the mean share of the best ids that were found, and its standard error."""
    shares = np.array([len(set(a) & set(b)) / max(len(b), 1) for a, b in zip(found, best, strict=True)])
    return float(shares.mean()), float(shares.std(ddof=1) / np.sqrt(len(shares)))


def approximate(run: Path, kind: str, settings: dict[str, Any], asked: Asked, best: Any) -> dict[str, Any]:
    """Build an approximate index into a copy of the model, and compare its results with exact search."""
    with tempfile.TemporaryDirectory(prefix="same-answers-") as folder:
        model = Path(shutil.copytree(find_model(run), Path(folder) / "model"))
        build_stored_index(model, kind, settings=settings)
        stated = read_index_report(model)
        assert stated is not None
        retriever = Retriever.load(model)
        recall, error = share(asked_by_id(retriever, *asked, k=int(stated["k"])), best)
        with service(model) as address:
            answers = served(address, *asked, k=int(stated["k"]))
        refused = sum(isinstance(answer, str) for answer in answers)
        by_service, _ = share([[] if isinstance(answer, str) else answer for answer in answers], best)
    return {
        "stated": stated["recall"],
        "stated_from_queries": stated["num_queries"],
        "k": stated["k"],
        "retriever": round(recall, 5),
        "retriever_standard_error": round(error, 5),
        "service": round(by_service, 5),
        "refused": refused,
    }


def main() -> None:
    """Compare and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path)
    parser.add_argument("-k", type=int, default=20)
    parser.add_argument("--kinds", default="hnsw,ivfpq")
    parser.add_argument("--postgres", type=Path, default=None, help="folder of pgvector's server")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    artifact, split = reread(arguments.run)
    retriever, holdout = Retriever(artifact), split.test
    queries = artifact.queries.decode(holdout.queries).to_list()
    flat = artifact.items.decode(holdout.history_items).to_list()
    ends = holdout.history_offsets.tolist()
    histories = [flat[left:right] for left, right in pairwise(ends)]
    evaluated = ids_of(retriever, retriever.rank(holdout, arguments.k, exclude_seen=True))
    recommended = asked_by_id(retriever, queries, histories, arguments.k)
    with service(find_model(arguments.run)) as address:
        answered = served(address, queries, histories, arguments.k)
    told: dict[str, Any] = {
        "benchmark": "same_answers",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": library_versions(),
        "data": artifact.metadata["data"].get("source"),
        "k": arguments.k,
        "queries": len(queries),
        "longest_history": max(map(len, histories)),
        "retriever_same": sum(a == b for a, b in zip(recommended, evaluated, strict=True)),
        "service_same": sum(a == b for a, b in zip(answered, evaluated, strict=True)),
        "service_differs": [
            {"query": query, "history": len(history), "answer": answer}
            for query, history, answer, expected in zip(queries, histories, answered, evaluated, strict=True)
            if answer != expected
        ][:20],
    }
    print(json.dumps(told, indent=1), flush=True)
    best = ids_of(retriever, retriever.rank(holdout, 100, exclude_seen=True))
    told["approximate"] = {}
    with database(arguments.postgres) as server:
        for kind in filter(None, arguments.kinds.split(",")):
            settings = {"url": room(server)} if kind == "pgvector" else {}
            found = approximate(arguments.run, kind, settings, (queries, histories), best)
            told["approximate"][kind] = found
            print(f"{kind}: {found}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
