"""The results of a comparison or evaluation as one JSON document: `results.json`, the content of the report."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from twotower.comparison.statistics import ComparisonStatistics, measured
from twotower.config.run import Config
from twotower.data import Interactions
from twotower.evaluation import Evaluation, Row
from twotower.objectives.build import OBJECTIVES

#: Incremented when an older version would misread newer documents.
DOCUMENT_VERSION = 1
#: Number of significant digits to keep.
DIGITS = 6
#: Diagnostics of the objective that the report shows, from the end of training.
DIAGNOSTICS = (
    "effective_candidates",
    "masked_share",
    "largest_weight",
    "gradient_head",
    "gradient_mid",
    "gradient_tail",
)


def build_document(
    kind: str,
    compared: ComparisonStatistics,
    found: Evaluation,
    baselines: Sequence[Row],
    *,
    metadata: Mapping[str, Sequence[Mapping[str, Any]]],
    data: Interactions,
    **more: Any,
) -> dict[str, Any]:
    """Build the document of a comparison or of the evaluation of one model.

    Args:
        kind: "comparison" or "evaluation".
        compared: means, intervals and tests.
        found: the evaluation from which `compared` was computed.
        baselines: evaluation rows of the baselines.
        metadata: for each model, the `metadata.json` of each seed.
        data: the complete interactions.
        more: additional sections: examples, audit, calibration, command, ...
    """
    metric = headline(found)
    order = sorted(compared.values, key=lambda name: -compared.values[name][metric].mean)
    first = next(iter(metadata.values()))[0]
    document: dict[str, Any] = rounded(
        {
            "document": DOCUMENT_VERSION,
            "kind": kind,
            "metric": metric,
            "tail_metric": f"Recall@{found.ks[0]}",
            "seeds": [int(meta["config"]["training"]["seed"]) for meta in next(iter(metadata.values()))],
            "models": [_model(name, compared, metadata[name]) for name in order],
            "baselines": [_baseline(row) for row in baselines],
            "tests": [family.to_dict() for family in compared.families],
            "evaluation": _protocol(found),
            "data": {
                "source": first["data"].get("source"),
                "fingerprint": first["data"]["fingerprint"],
                "account": first["data"]["account"]["lines"],
                "split": first["split"],
                "queries": data.num_queries,
                "items": data.num_items,
                "interactions": len(data),
            },
            "settings": _settings(first["config"]),
            "versions": first["versions"],
            **more,
        }
    )
    return document


def headline(found: Evaluation) -> str:
    """Return the name of the headline metric, NDCG at the smallest cut-off."""
    return f"NDCG@{found.ks[0]}"


def rounded(value: Any) -> Any:
    """Round every float to a few significant digits; the other digits are noise and would take most of the file."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    return value


def diagnostics(directory: Path) -> dict[str, float]:
    """Average an objective's diagnostics over the last quarter of training; empty without `logs/metrics.csv`."""
    log = directory / "logs" / "metrics.csv"
    if not log.is_file():
        return {}
    with log.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    found = {}
    for name in DIAGNOSTICS:
        values = [float(row[name]) for row in rows if row.get(name)]
        if values:
            found[name] = statistics.fmean(values[-max(len(values) // 4, 1) :])
    return found


def _model(name: str, compared: ComparisonStatistics, metadata: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    objective = Config.model_validate(metadata[0]["config"]).objective
    known = OBJECTIVES.get(objective.name)
    return {
        "name": name,
        "objective": objective.name,
        "about": known.summary if known else "",
        **compared.model(name),
        "runs": [_run(meta) for meta in metadata],
    }


def _run(metadata: Mapping[str, Any]) -> dict[str, Any]:
    training = metadata["training"]
    ended = datetime.fromisoformat(metadata["created"]).timestamp()
    return {
        "seed": metadata["config"]["training"]["seed"],
        "epochs": training["epochs"],
        "seconds": training["seconds"],
        "cpu_seconds": training.get("cpu_seconds"),
        "peak_memory": training.get("peak_memory"),
        "ended": int(ended),
        "history": training["history"],
    }


def _baseline(row: Row) -> dict[str, Any]:
    overall, slices = measured([row])
    return {"name": row.name, **ComparisonStatistics({row.name: overall}, {row.name: slices}, ()).model(row.name)}


def _protocol(found: Evaluation) -> dict[str, Any]:
    values = found.to_dict()
    values.pop("rows")
    values["slice_groups"] = {name: list(parts) for name, parts in found.slice_groups.items()}
    return values


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that all models share: everything except the objective and the seed."""
    shared = {section: dict(values) for section, values in config.items() if section != "objective"}
    shared["training"].pop("seed")
    return shared
