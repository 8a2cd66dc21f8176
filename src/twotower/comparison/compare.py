"""Implementation of `twotower compare`: train objectives, evaluate them on the same queries, test and report."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from twotower import report
from twotower.audit import audit
from twotower.comparison.cells import Cell, make_cells, objective_names
from twotower.comparison.document import build_document, diagnostics
from twotower.comparison.examples import disagreements
from twotower.comparison.measure import Measurements, calibrations, measure_cells, per_query_frame
from twotower.comparison.processes import train_cells
from twotower.comparison.statistics import compare
from twotower.comparison.sweep import Sweep, sweep_curves
from twotower.config.run import Config
from twotower.data import Interactions, exposure_log
from twotower.data.schema.vocabulary import listed
from twotower.distributed.communicator import Communicator
from twotower.distributed.launch import Coordinator
from twotower.errors import InputError, counted
from twotower.features.from_config import context_to_read
from twotower.objectives.build import leaves_out_items
from twotower.report import findings
from twotower.run import audit_run, split_data, split_options
from twotower.run.data import read_together
from twotower.run.run_folder import is_run, reserved
from twotower.serving.model_folder import TOWERS, find_model, read_metadata
from twotower.system.filesystem import output_path, whole_file, write_text
from twotower.system.terminal import cell


def printed(document: dict[str, Any]) -> Group:
    """Build the table and the findings for a rich console."""
    metric, tail, kinds = document["metric"], document["tail_metric"], findings.verdicts(document)
    tests = findings.family(document, "all")
    contests = {one["name"]: one for one in (tests["contests"] if tests else [])}
    best = document["models"][0]["values"][metric]["mean"] or 1.0
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("objective", no_wrap=True)  # the longest name and these columns fit into 80 characters
    for title in (metric, "vs best", "p (Holm)", "tail", "cpu s"):
        table.add_column(title, justify="right")
    for entry in [*document["models"], *document["baselines"]]:
        found, one = entry["values"][metric], contests.get(entry["name"])
        rare = findings.value(entry, tail, "tail")
        time = findings.processor_time(entry) if "runs" in entry else None
        table.add_row(
            cell(entry["name"]),
            findings.number(found["mean"]),
            "-" if one is None else f"{100 * one['difference'] / best:+.1f} %",
            "-" if one is None or one["adjusted"] is None else f"{one['adjusted']:.3f}",
            "-" if rare is None else f"{rare['mean']:.3f}",
            "-" if time is None else f"{time:,.0f}",
            style="bold" if kinds.get(entry["name"]) == "best" else None,
        )
    evaluation = document["evaluation"]
    title = (
        f"{counted(evaluation['num_queries'], 'query', 'queries')}, full catalog of "
        f"{counted(evaluation['num_items'], 'item')}, {counted(len(document['seeds']), 'seed')}; "
        f"tail: {tail} on the targets in the tail"
    )
    words = [*findings.answer(document), *(f"note: {text}" for text in findings.cautions(document))]
    return Group(title, table, *(cell(f"* {text}") for text in words))


#: Number of rows and of redraws in the report's audit: enough to detect a bias of a few percent, in minutes on a small
#: catalog.
AUDIT_ROWS, AUDIT_DRAWS = 40, 24


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison.

    Attributes:
        document: all results as JSON values, as in `results.json`; empty on ranks after the first.
        directory: folder with `results.json`, `results.parquet`, `report.html` and the runs.
    """

    document: dict[str, Any]
    directory: Path

    def to_dict(self) -> dict[str, Any]:
        """Return the document."""
        return self.document

    def __rich__(self) -> Group:
        """Build the table and the findings for a rich console."""
        return printed(self.document)


def compare_run(
    source: str | Path,
    out: str | Path,
    base: Config,
    objectives: Sequence[str],
    *,
    seeds: int = 3,
    jobs: int = 1,
    audited: bool = True,
    sweep: Sweep | None = None,
    command: str | None = None,
    on_message: Callable[[str], None] = print,
    team: Coordinator | None = None,
) -> Comparison:
    """Train, evaluate and compare objectives with the same initial weights, data order and budget.

    Args:
        source: a file, a folder or the name of a data set.
        out: the folder of the comparison. Finished runs in it are not repeated; interrupted runs are resumed.
        base: the settings that all objectives share; `training.seed` is the first seed.
        objectives: names, YAML files with the fields of an objective, or `name=FILE`. If empty (only with a sweep), the
            objective of `base`.
        seeds: number of runs of each objective, with consecutive seeds.
        jobs: number of concurrent training runs.
        audited: whether to measure bias and spread of each objective's gradient on one of the models; ignored with a
            sweep.
        sweep: values of one numeric setting; each objective is trained with every value. None for no sweep.
        command: the command line, shown in the report.
        on_message: receives progress messages, on rank 0 only.
        team: the processes that share the comparison: each trains every W-th run, and they rank the test queries and
            draw for the audit together. All of them must share the folder `out`. None for a single process.

    Raises:
        InputError: a setting is wrong, `out` contains runs with different settings or data or cannot be written, or
            another process is writing into it.
        Interrupted: Ctrl-C was pressed; the same call resumes the comparison.
        RuntimeError: a training run failed.
    """
    directory, team = output_path(out), team or Coordinator(Communicator())
    ranks = team.ranks
    if not ranks.is_first:
        on_message = _discard
    if base.data.windows > 1:
        raise InputError("data.windows: objectives are compared on one window; use data.windows=1")
    rule = base.data.eligibility
    if rule is not None and rule.governs_rows and audited and sweep is None:
        raise InputError(
            "data.eligibility: the audit compares with the softmax over the whole catalog, which these models do not "
            "estimate; pass --no-audit"
        )
    with reserved(directory) if ranks.is_first else nullcontext():
        if ranks.is_first:
            _require_own(directory)
        data = read_together(source, base.data, team, context=context_to_read(base))
        team.require_shared(directory)
        split = split_data(data, base.data, **split_options(base))
        log = exposure_log(split, base.evaluation.exposure, base.evaluation.ks)
        cells = make_cells(base, objectives, seeds, directory, split, sweep=sweep)
        if audited and sweep is None:
            _require_softmax(cells)
        train_cells(str(source), cells, data.fingerprint, directory, team, jobs=jobs, on_message=on_message)
        on_message(f"ranking the test queries with {counted(len(cells), 'model')}")
        found = measure_cells(cells, split, base.evaluation, ranks, log)
        audited_gradients = _audit(cells, source, directory, team, on_message) if audited and sweep is None else None
        if not ranks.is_first:
            team.broadcast_text("report", "written")
            return Comparison({}, directory)
        ks = tuple(sorted(base.evaluation.ks))
        compared = compare(found.rows, found.baselines, metric=f"NDCG@{ks[0]}", tail_metric=f"Recall@{ks[0]}")
        document = build_document(
            "comparison",
            compared,
            found.evaluation,
            found.baselines,
            metadata=found.metadata,
            data=split.data,
            jobs=jobs,
            command=command,
            objectives={cell.name: cell.config.objective.model_dump(mode="json") for cell in cells},
            diagnostics={cell.name: diagnostics(cell.directory) for cell in cells if cell.seed == base.training.seed},
            calibration=calibrations({cell.name: cell.directory for cell in reversed(cells)}, split),
            examples=disagreements(found.ranked, split.test, split.train, base.evaluation.exclude_seen),
            audit=audited_gradients,
            sweep=None
            if sweep is None
            else sweep_curves(
                sweep,
                objective_names(objectives, base),
                compared,
                found.ranked,
                split.train.item_counts(),
                k=ks[0],
            ),
        )
        _write(document, directory, found, cells, split.data)
        team.broadcast_text("report", "written")
        return Comparison(document, directory)


def _require_own(directory: Path) -> None:
    """Check that all files that the comparison would replace belong to an earlier comparison.

    Raises:
        InputError: the folder contains other files with these names.
    """
    foreign = [
        name for name in ("results.json", "results.parquet", "report.html", "audit.json") if (directory / name).exists()
    ]
    if foreign and not any(map(is_run, (directory / "runs").glob("*"))):
        raise InputError(
            f"{directory}: exists and is not the folder of a comparison, because it contains {listed(foreign)} but no "
            "runs; choose another --out"
        )


def _discard(message: str) -> None:
    """Discard a message: only the first rank prints."""


def _require_softmax(cells: Sequence[Cell]) -> None:
    """Check that no objective leaves out items by their score, because an audit compares with the whole softmax."""
    for one in cells:
        if (setting := leaves_out_items(one.config.objective)) is not None:
            raise InputError(
                f"{setting}: the audit compares with the softmax over the whole catalog, which a model trained with it "
                "does not estimate; pass --no-audit"
            )


def _audit(
    cells: Sequence[Cell], source: str | Path, out: Path, team: Coordinator, on_message: Callable[[str], None]
) -> dict[str, Any]:
    """Measure bias and spread of each objective's gradient on one model, and cache the result in `audit.json`."""
    # Audit only objectives with their default sources: `twotower audit` measures pools from a file on their own models.
    plain = {cell.name: cell.config.objective for cell in cells}
    named = {name for name, own in plain.items() if own.name == name and own.sources is None and own.unique is None}
    # Not the best model: the best depends on the evaluation settings, whose change would invalidate the cached audit.
    subject = next((cell for cell in cells if cell.name == "expected-count"), cells[0])
    others = sorted(named - {subject.name})
    request = {
        "model": subject.directory.name,
        "checksum": read_metadata(find_model(subject.directory))["checksums"][TOWERS],
        "objectives": others,
        "rows": AUDIT_ROWS,
        "draws": AUDIT_DRAWS,
    }
    cache = out / "audit.json"
    written = cache.read_text(encoding="utf-8") if team.ranks.is_first and cache.exists() else "{}"
    known = json.loads(team.broadcast_text("audit", written))
    if known.get("asked") == request:
        return dict(known)
    number = counted(len(others) + 1, "objective")
    on_message(f"auditing the gradients of {number} on {subject.label} (saved in {cache.name})")
    measured = audit(
        audit_run(subject.directory, source, rows=AUDIT_ROWS, team=team),
        objectives=others,
        draws=AUDIT_DRAWS,
        batches=50,
    )
    result = {"asked": request, **measured.to_dict()}
    if team.ranks.is_first:
        write_text(cache, json.dumps(result, indent=1))
    return result


def _write(document: dict[str, Any], out: Path, found: Measurements, cells: Sequence[Cell], data: Interactions) -> None:
    write_text(out / "results.json", json.dumps(document, indent=1, ensure_ascii=False))
    queries = data.queries.decode(np.asarray(found.evaluation.queries))
    with whole_file(out / "results.parquet") as path:
        per_query_frame(found, cells, queries).write_parquet(path)
    write_text(out / "report.html", report.render(document))
