"""The command line: `twotower COMMAND`."""

from __future__ import annotations

import errno
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from twotower import __version__
from twotower.cli.console import console, messages, print_json, print_line, print_lines
from twotower.cli.data import commands as preparing
from twotower.cli.export import commands as exporting
from twotower.cli.items import commands as catalog
from twotower.cli.options import Command, ConfigFile, Data, Items, Json, MovedData, Overrides, Run, overrides
from twotower.cli.plan import commands as planning
from twotower.cli.query import commands
from twotower.cli.ranks import ranks_of
from twotower.cli.serve import commands as serving
from twotower.cli.tune import commands as tuning
from twotower.errors import InputError

app = typer.Typer(
    help="Train, evaluate and serve retrieval models with corrected negatives.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(preparing)
app.add_typer(commands)
app.add_typer(exporting)
app.add_typer(catalog)
app.add_typer(serving)
app.add_typer(planning)
app.add_typer(tuning)


def _print_version(requested: bool) -> None:
    if requested:
        console.print(f"twotower {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    del version
    from twotower.distributed.launch import Launch  # noqa: PLC0415  # imported late, as in `train`

    _STATE["debug"] = debug
    if Launch.of_environment().size > 1 and context.invoked_subcommand not in OVER_RANKS:
        raise InputError(
            f"torchrun: `twotower {context.invoked_subcommand}` runs in one process; start it without torchrun "
            f"(commands that support torchrun: {', '.join(OVER_RANKS)})"
        )


#: Commands that run on several ranks.
OVER_RANKS = ("train", "evaluate", "compare", "audit", "index", "recommend")


_STATE: dict[str, bool] = {"debug": False}


@app.command(cls=Command)
def train(
    data: Data,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Run folder to write.")],
    config: ConfigFile = None,
    settings: Overrides = None,
    items: Items = None,
    warm_start: Annotated[
        Path | None, typer.Option("--from", metavar="DIR", help="Continue training the model in DIR on new DATA.")
    ] = None,
    validation: Annotated[
        str | None,
        typer.Option("--validation", metavar="FILE", help="Validation file of a ready-made split; requires --test."),
    ] = None,
    test: Annotated[
        str | None,
        typer.Option("--test", metavar="FILE", help="Test file of a ready-made split; DATA is the training file."),
    ] = None,
    withdraw: Annotated[
        Path | None,
        typer.Option("--withdraw", metavar="FILE", help="With --from: ids of items to remove from the catalog."),
    ] = None,
    refit: Annotated[
        bool, typer.Option("--refit", help="After the evaluation, train on all rows and save that model instead.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the interrupted run in DIR.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the model in DIR.")] = False,
    as_json: Json = False,
) -> None:
    """Train a model, evaluate it against baselines, and save it to DIR."""
    from twotower import run  # noqa: PLC0415  # heavy imports only when needed
    from twotower.config.run import Config  # noqa: PLC0415
    from twotower.distributed.launch import Launch  # noqa: PLC0415

    if withdraw is not None and warm_start is None:
        raise InputError("--withdraw: requires --from DIR, the model whose catalog the items are removed from")
    if warm_start is not None and config is not None:
        raise InputError(
            "--config: with --from, the settings come from that model; override individual settings with --set"
        )
    if resume and config is None and (out / "config.yaml").exists():
        config = out / "config.yaml"
    changes = overrides(settings, items)
    if refit:
        changes.append("training.refit=true")
    changes += [
        f"data.{part}={json.dumps(file)}" for part, file in (("validation", validation), ("test", test)) if file
    ]
    base = run.settings_of(warm_start) if warm_start is not None and config is None else None
    completed = Config.load(config, changes, base=base)
    if warm_start is not None and out.resolve() == warm_start.resolve():
        raise InputError(f"{out}: --out is the folder of --from; choose another folder for the continued model")
    progress = messages if as_json else console
    _, measured = run.train_run(
        data,
        out,
        completed,
        warm_start=warm_start,
        withdraw=withdraw,
        resume=resume,
        replace=force,
        on_message=lambda text: print_lines(text, to=progress),
    )
    if not Launch.of_environment().is_first:
        return
    if as_json:
        print_json(measured.to_dict())
        return
    console.print(measured)
    rule = completed.data.eligibility
    group = " --group GROUP" if rule is not None and rule.item_groups is not None else ""
    asked = "--text 'WORDS'" if completed.data.texts_are_queries else "--query ID"
    print_lines(
        f"\nThe model is in {out}. Next steps:\n"
        f"  twotower recommend {out} {asked}{group}\n  twotower similar {out} --item ID{group}"
    )


@app.command(cls=Command)
def evaluate(
    directory: Run,
    data: MovedData = None,
    report: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE", help="Report file to write; default: DIR/report.html."),
    ] = None,
    no_report: Annotated[bool, typer.Option("--no-report", help="Do not write a report or per_query.parquet.")] = False,
    qrels: Annotated[
        Path | None,
        typer.Option(
            "--qrels", metavar="FILE", help="Evaluate on judged queries: relevance judgements in TREC or BEIR format."
        ),
    ] = None,
    queries: Annotated[
        Path | None,
        typer.Option("--queries", metavar="FILE", help="With --qrels: the texts of the queries (JSON lines or TSV)."),
    ] = None,
    text_columns: Annotated[
        str | None,
        typer.Option(
            "--text-columns",
            metavar="A,B",
            help="With --qrels: columns of the item table for BM25; default: the text features of the items.",
        ),
    ] = None,
    per_query: Annotated[
        Path | None,
        typer.Option("--per-query", metavar="FILE", help="With --qrels: Parquet file to write, with values per query."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Evaluate a trained model on its test queries, with baselines and a report, or on judged queries."""
    if qrels is not None or queries is not None:
        _evaluate_judged(directory, qrels, queries, text_columns, per_query, as_json)
        return
    if text_columns is not None or per_query is not None:
        raise InputError("--text-columns, --per-query: only with --qrels FILE and --queries FILE")
    from twotower.system.filesystem import require_file_name  # noqa: PLC0415

    page = None if no_report else report or directory / "report.html"
    if page is not None:
        require_file_name(page)  # before the evaluation, which takes a while
    from twotower.comparison import evaluate_folder  # noqa: PLC0415

    with ranks_of(directory) as team:
        measured = evaluate_folder(directory, data, page=page, team=team)
    if not team.ranks.is_first:
        return
    if as_json:
        print_json(measured.to_dict())
        return
    console.print(measured)
    if page is not None:
        print_line(f"The report is in {page}")


def _evaluate_judged(
    directory: Path,
    qrels: Path | None,
    queries: Path | None,
    text_columns: str | None,
    per_query: Path | None,
    as_json: bool,
) -> None:
    from twotower.distributed.launch import Launch  # noqa: PLC0415
    from twotower.run.judgements import evaluate_judged  # noqa: PLC0415
    from twotower.system.filesystem import require_file_name, whole_file  # noqa: PLC0415

    if Launch.of_environment().size > 1:
        raise InputError("torchrun: judged queries are evaluated in one process; start it without torchrun")
    if qrels is None or queries is None:
        raise InputError("evaluate: --qrels FILE and --queries FILE must be given together")
    if per_query is not None:
        require_file_name(per_query)
    columns = None if text_columns is None else [name.strip() for name in text_columns.split(",") if name.strip()]
    found = evaluate_judged(directory, qrels, queries, columns=columns)
    if per_query is not None:
        with whole_file(per_query) as temporary:
            found.per_query().write_parquet(temporary)
    if as_json:
        print_json(found.to_dict())
    else:
        console.print(found)


@app.command(cls=Command)
def compare(
    data: Data,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the comparison.")],
    objectives: Annotated[
        str | None,
        typer.Option("--objectives", metavar="A,B", help="Names, YAML files or NAME=FILE.yaml, separated by commas."),
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(
            "--sweep",
            metavar="KEY=V1,V2",
            help="Train with several values of one setting, e.g. objective.uniform=0,256,1024 (the size of a source) "
            "or training.learning_rate=1e-3,3e-3. Without --objectives: the objective of the settings.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Training runs per objective.")] = 3,
    config: ConfigFile = None,
    settings: Overrides = None,
    items: Items = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Training runs in parallel, in each process.")] = 1,
    no_audit: Annotated[bool, typer.Option("--no-audit", help="Skip the bias and spread of the gradients.")] = False,
    as_json: Json = False,
) -> None:
    """Train several objectives, or one with several values of a setting, and compare them on the same queries.

    Run the same command again to resume an interrupted comparison; finished runs are not repeated.
    """
    from twotower.comparison import Sweep, compare_run  # noqa: PLC0415
    from twotower.config.run import Config  # noqa: PLC0415
    from twotower.errors import Interrupted  # noqa: PLC0415

    if objectives is None and sweep is None:
        raise InputError("--objectives: expected names to compare, such as expected-count,in-batch-logq, or --sweep")
    progress, base = messages if as_json else console, Config.load(config, overrides(settings, items))
    try:
        with ranks_of(config=base) as team:
            found = compare_run(
                data,
                out,
                base,
                [name.strip() for name in (objectives or "").split(",") if name.strip()],
                seeds=seeds,
                jobs=jobs,
                audited=not no_audit,
                sweep=None if sweep is None else Sweep.parse(sweep),
                command=shlex.join(["twotower", *sys.argv[1:]]),
                on_message=lambda text: print_lines(text, to=progress),
                team=team,
            )
    except Interrupted as stop:
        print_line(f"twotower: {stop}; run the same command again to resume", to=messages)
        raise typer.Exit(130) from stop
    if not team.ranks.is_first:
        return
    if as_json:
        print_json(found.to_dict())
        return
    console.print(found)
    print_lines(f"\nThe report is in {out / 'report.html'}")


@app.command(cls=Command)
def audit(
    directory: Run,
    objectives: Annotated[
        str | None,
        typer.Option("--objectives", metavar="A,B", help="Additional objectives to measure, separated by commas."),
    ] = None,
    suggest: Annotated[
        bool, typer.Option("--suggest", help="Search for the candidate pool with the least spread.")
    ] = False,
    rows: Annotated[int, typer.Option("--rows", min=2, help="Training rows to measure.")] = 64,
    draws: Annotated[
        int | None, typer.Option("--draws", min=2, help="Number of redraws; default: 50, or 16 with --suggest.")
    ] = None,
    batches: Annotated[
        int,
        typer.Option(
            "--batches", min=20, help="Batches in which draws are counted; more batches reveal smaller errors."
        ),
    ] = 200,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of rows, batches and draws.")] = 0,
    per_query: Annotated[
        Path | None,
        typer.Option("--per-query", metavar="FILE", help="Parquet file to write, with values for each audited row."),
    ] = None,
    data: MovedData = None,
    as_json: Json = False,
) -> None:
    """Measure the gradient of an objective: its bias against the full softmax, and its spread."""
    from twotower.system.filesystem import require_file_name  # noqa: PLC0415

    if objectives is not None and suggest:
        raise InputError("audit: --objectives cannot be combined with --suggest")
    if per_query is not None and suggest:
        raise InputError("audit: --per-query cannot be combined with --suggest, which measures pools")
    if per_query is not None:
        require_file_name(per_query)
    from twotower import audit, run  # noqa: PLC0415

    found: audit.Suggestion | audit.Audit
    with ranks_of(directory) as team:
        subject = run.audit_run(directory, data, rows=rows, seed=seed, team=team)
        if suggest:
            found = audit.suggest(subject, draws=draws or 16, seed=seed)
        else:
            names = [name.strip() for name in (objectives or "").split(",") if name.strip()]
            found = audit.audit(subject, objectives=names, draws=draws or 50, batches=batches, seed=seed)
            if per_query is not None and team.ranks.is_first:
                found.write_per_query(per_query)
    if not team.ranks.is_first:
        return
    if as_json:
        print_json(found.to_dict())
    else:
        console.print(found)


def main() -> None:
    """Run the command line. Exit code: 0 success, 1 failure, 2 bad usage or bad input, 130 interrupted."""
    from twotower.errors import Interrupted, RankLost  # noqa: PLC0415
    from twotower.system.bus_errors import report_bus_errors  # noqa: PLC0415
    from twotower.system.parent import end_with_parent  # noqa: PLC0415
    from twotower.system.tuning import tune  # noqa: PLC0415

    if "RANK" in os.environ:  # report a lost rank in one line, without C++ addresses
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    end_with_parent()
    tune()  # before torch is imported and before the first large allocation
    report_bus_errors()
    try:
        app()
    except InputError as error:
        if _STATE["debug"]:
            raise
        print_line(f"twotower: {error}", to=messages, style="red")
        sys.exit(2)
    except RankLost as lost:
        if _STATE["debug"]:
            raise
        print_line(f"twotower: {lost}", to=messages, style="red")
        sys.stderr.flush()
        os._exit(1)  # exchange threads may still be waiting for the lost rank
    except Interrupted as stop:
        print_line(f"twotower: {stop}; continue with --resume", to=messages)
        sys.exit(130)
    except BaseException as error:
        # polars raises PanicException, which is not an Exception, after a failed assertion in Rust
        if _STATE["debug"] or not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        if (
            isinstance(error, OSError)
            and error.strerror is not None
            and (error.filename or error.errno == errno.ENOSPC)
        ):
            # A path from the user may be forbidden or too long, or the disk may be full (that error names no file).
            print_line(f"twotower: {error.filename or 'output'}: {error.strerror}", to=messages, style="red")
            sys.exit(2)
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            reason = f" ({str(error).splitlines()[0]})" if str(error) else ""
            print_line(
                f"twotower: not enough memory{reason}; lower training.batch_size, the sizes in objective.sources, "
                "query_tower.history.length or item_tower.dimension",
                to=messages,
                style="red",
            )
            sys.exit(2)
        text = " ".join(str(error).split()) or type(error).__name__
        print_line(
            f"twotower: {type(error).__name__}: {text} "
            "(internal error; twotower --debug COMMAND ... prints the traceback)",
            to=messages,
            style="red",
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
