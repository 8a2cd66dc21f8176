"""The command line: `twotower COMMAND`."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from twotower.cli_answers import commands
from twotower.cli_data import commands as preparing
from twotower.cli_export import commands as exporting
from twotower.cli_items import commands as catalog
from twotower.cli_plan import commands as planning
from twotower.cli_serve import commands as serving
from twotower.errors import InputError
from twotower.terminal import Json, Run, console, messages, print_json

app = typer.Typer(
    help="Train, evaluate and use retrieval models whose negatives are corrected by construction.",
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


@app.callback()
def _root(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    from twotower.launch import Launch  # noqa: PLC0415  # as in `train`

    _STATE["debug"] = debug
    if Launch.of_environment().size > 1 and context.invoked_subcommand not in OVER_RANKS:
        raise InputError(
            f"torchrun: `twotower {context.invoked_subcommand}` runs in one process; start it without torchrun "
            f"(over several: {', '.join(OVER_RANKS)})"
        )


#: Commands that several processes run together.
OVER_RANKS = ("train",)


_STATE: dict[str, bool] = {"debug": False}


@app.command()
def train(
    data: Annotated[str, typer.Argument(metavar="DATA", help="A file, a folder, or the name of a data set.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The run folder to write.")],
    config: Annotated[Path | None, typer.Option("--config", metavar="FILE", help="Settings in YAML.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One setting, such as training.seed=1.")
    ] = None,
    items: Annotated[str | None, typer.Option("--items", metavar="FILE", help="Item features and titles.")] = None,
    start: Annotated[
        Path | None, typer.Option("--from", metavar="DIR", help="Go on with the model in DIR; DATA holds new days.")
    ] = None,
    withdraw: Annotated[
        Path | None, typer.Option("--withdraw", metavar="FILE", help="With --from: item ids that leave the catalog.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run in DIR.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the model that is in DIR.")] = False,
    as_json: Json = False,
) -> None:
    """Train a model, evaluate it beside baselines, and write it to DIR."""
    from twotower import run  # noqa: PLC0415  # the heavy imports only when they are needed
    from twotower.config import Config  # noqa: PLC0415
    from twotower.launch import Launch  # noqa: PLC0415

    if withdraw is not None and start is None:
        raise InputError("--withdraw: needs --from DIR, the model whose catalog the items leave")
    if start is not None and config is not None:
        raise InputError("--config: the settings of a continued training are those of --from; change some with --set")
    if resume and config is None and (out / "config.yaml").exists():
        config = out / "config.yaml"
    changes = list(overrides or [])
    if items is not None:
        changes.append(f"data.items={json.dumps(items)}")
    base = run.settings_of(start) if start is not None and config is None else None
    settings = Config.load(config, changes, base=base)
    if start is not None and out.resolve() == start.resolve():
        raise InputError(f"{out}: --out is the folder of --from; give the continued model a folder of its own")
    told = messages if as_json else console
    _, measured = run.train_run(
        data,
        out,
        settings,
        start=start,
        withdraw=withdraw,
        resume=resume,
        replace=force,
        say=lambda text: told.print(str(text), highlight=False, markup=False, soft_wrap=True),
    )
    if not Launch.of_environment().is_first:
        return
    if as_json:
        print_json(measured.to_dict())
        return
    console.print(measured)
    console.print(f"\nThe model is in {out}. Next:", highlight=False)
    console.print(f"  twotower recommend {out} --query ID\n  twotower similar {out} --item ID", highlight=False)


@app.command()
def evaluate(
    directory: Run,
    data: Annotated[str | None, typer.Option("--data", help="Where the data is now, if it has moved.")] = None,
    report: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE", help="Where the report goes; DIR/report.html unless told."),
    ] = None,
    no_report: Annotated[bool, typer.Option("--no-report", help="Write no report and no per_query.parquet.")] = False,
    as_json: Json = False,
) -> None:
    """Measure a model on its test queries again, beside baselines, and write a report into its folder."""
    from twotower.comparison import evaluate_folder  # noqa: PLC0415

    page = None if no_report else report or directory / "report.html"
    measured = evaluate_folder(directory, data, page=page)
    if as_json:
        print_json(measured.to_dict())
        return
    console.print(measured)
    if page is not None:
        console.print(f"The report is in {page}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def compare(
    data: Annotated[str, typer.Argument(metavar="DATA", help="A file, a folder, or the name of a data set.")],
    objectives: Annotated[
        str, typer.Option("--objectives", metavar="A,B", help="Names, YAML files, or NAME=FILE.yaml, with commas.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder of the comparison.")],
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Trainings of each objective.")] = 3,
    config: Annotated[Path | None, typer.Option("--config", metavar="FILE", help="Settings in YAML.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One setting, such as training.max_epochs=4.")
    ] = None,
    items: Annotated[str | None, typer.Option("--items", metavar="FILE", help="Item features and titles.")] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Trainings at once.")] = 1,
    no_audit: Annotated[bool, typer.Option("--no-audit", help="Leave out bias and spread of the gradients.")] = False,
    as_json: Json = False,
) -> None:
    """Train objectives alike, compare them on the same test queries, and write a report to DIR.

    The same command goes on where it was interrupted; what is finished is not repeated.
    """
    from twotower.comparison import compare_run  # noqa: PLC0415
    from twotower.config import Config  # noqa: PLC0415
    from twotower.errors import Interrupted  # noqa: PLC0415

    changes = list(overrides or [])
    if items is not None:
        changes.append(f"data.items={json.dumps(items)}")
    told = messages if as_json else console
    try:
        found = compare_run(
            data,
            out,
            Config.load(config, changes),
            [name.strip() for name in objectives.split(",") if name.strip()],
            seeds=seeds,
            jobs=jobs,
            audited=not no_audit,
            command=shlex.join(["twotower", *sys.argv[1:]]),
            say=lambda text: told.print(text, highlight=False, markup=False, soft_wrap=True),
        )
    except Interrupted as stop:
        messages.print(f"twotower: {stop}; the same command goes on", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(130) from stop
    if as_json:
        print_json(found.to_dict())
        return
    console.print(found)
    console.print(f"\nThe report is in {out / 'report.html'}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def audit(
    directory: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="A run folder that `twotower train` made.")
    ] = None,
    objectives: Annotated[
        str | None, typer.Option("--objectives", metavar="A,B", help="Other objectives to measure as well.")
    ] = None,
    suggest: Annotated[bool, typer.Option("--suggest", help="Look for the candidate pool with least spread.")] = False,
    study: Annotated[bool, typer.Option("--study", help="The reference study; needs no model.")] = False,
    rows: Annotated[int, typer.Option("--rows", min=2, help="Rows of the training data to measure.")] = 64,
    draws: Annotated[
        int | None, typer.Option("--draws", min=2, help="Redraws; by default 50, 16 to suggest, 1,500 in the study.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of rows, batches and draws.")] = 0,
    data: Annotated[str | None, typer.Option("--data", help="Where the data is now, if it has moved.")] = None,
    as_json: Json = False,
) -> None:
    """Measure what the gradient of an objective is worth: its bias against full softmax, and its spread."""
    from twotower import analysis, run  # noqa: PLC0415

    if study == (directory is not None):
        raise InputError("audit: expected either DIR, the run folder of a trained model, or --study")
    if objectives is not None and (suggest or study):
        raise InputError("audit: --objectives goes with DIR alone, not with --suggest or --study")
    found: analysis.Study | analysis.Suggestion | analysis.Audit
    if directory is None:
        found = analysis.study(draws=draws or 1500, seed=seed)
    else:
        subject = run.audit_run(directory, data, rows=rows, seed=seed)
        if suggest:
            found = analysis.suggest(subject, draws=draws or 16, seed=seed)
        else:
            names = [name.strip() for name in (objectives or "").split(",") if name.strip()]
            found = analysis.audit(subject, objectives=names, draws=draws or 50, seed=seed)
    if as_json:
        print_json(found.to_dict())
    else:
        console.print(found)


def main() -> None:
    """Run the command line: exit code 0 done, 1 a failure of the program, 2 bad usage or bad input."""
    from twotower.errors import Interrupted, RankLost  # noqa: PLC0415
    from twotower.process import tune  # noqa: PLC0415

    if "RANK" in os.environ:  # a rank that is gone is told in one line, without the addresses of C++
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    tune()  # before torch is imported and before the first large block is asked for
    try:
        app()
    except InputError as error:
        if _STATE["debug"]:
            raise
        messages.print(f"twotower: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(2)
    except RankLost as lost:
        if _STATE["debug"]:
            raise
        messages.print(f"twotower: {lost}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.stderr.flush()
        os._exit(1)  # threads of the exchange may still wait for the rank that is gone
    except Interrupted as stop:
        messages.print(f"twotower: {stop}; go on with --resume", highlight=False, markup=False, soft_wrap=True)
        sys.exit(130)
    except Exception as error:
        if _STATE["debug"]:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        messages.print(
            f"twotower: {type(error).__name__}: {text} "
            "(a fault of the program; twotower --debug COMMAND ... shows where)",
            style="red",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
