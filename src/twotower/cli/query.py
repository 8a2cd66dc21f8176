"""Commands that query a trained model: recommend, similar, explain, dial."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from twotower.cli.console import console, messages, print_frame, print_json, print_line
from twotower.cli.options import Command, Json, MovedData, Run
from twotower.cli.ranks import ranks_of
from twotower.errors import InputError, counted

if TYPE_CHECKING:
    from twotower.serving import Retriever


commands = typer.Typer()

Query = Annotated[list[str] | None, typer.Option("--query", help="Id of a query in the data; may be repeated.")]
History = Annotated[
    str | None,
    typer.Option("--history", help='Item ids, oldest first: "i1,i2,..."; double-quote an id with a comma.'),
]
Context = Annotated[
    str | None,
    typer.Option("--context", metavar="JSON", help='Context of the request, as JSON: \'{"device": "phone"}\'.'),
]
Event = Annotated[
    str | None,
    typer.Option("--event", metavar="TYPE", help="Event type to recommend for, if the model has data.events."),
]
Popularity = Annotated[
    float, typer.Option("--popularity", help="Popularity dial: 0 for discovery, 1 as trained, at most 2.")
]
Filter = Annotated[
    str | None, typer.Option("--filter", help="Condition on the item table: \"country = 'FR' and price < 20\".")
]
Allow = Annotated[
    str | None, typer.Option("--allow", help='Only these items: "i1,i2,...", or @FILE with one per line.')
]
Deny = Annotated[str | None, typer.Option("--deny", help="Never these items; same format as --allow.")]

Group = Annotated[
    str | None, typer.Option("--group", help="Group (market) of the request; required by a model with groups.")
]
Time = Annotated[
    str | None, typer.Option("--time", help="Time of the request: a date, ISO text or unix time. Default: now.")
]


@commands.command(cls=Command)
def recommend(
    directory: Run,
    query: Query = None,
    text: Annotated[
        list[str] | None,
        typer.Option("--text", help="Words to search for, if the model has data.query_text; may be repeated."),
    ] = None,
    history: History = None,
    features: Annotated[
        str | None, typer.Option("--features", metavar="JSON", help="Features of the query, as JSON: '{\"age\": 30}'.")
    ] = None,
    context: Context = None,
    event: Event = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Number of items.")] = 10,
    keep_seen: Annotated[bool, typer.Option("--keep-seen", help="Also recommend items in the history.")] = False,
    popularity: Popularity = 1.0,
    filter_: Filter = None,
    allow: Allow = None,
    deny: Deny = None,
    group: Group = None,
    time: Time = None,
    source: Annotated[
        Path | None,
        typer.Option("--input", metavar="FILE", help="Parquet, CSV or TSV with query ids, texts or histories."),
    ] = None,
    target: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="File to write: .parquet, .csv or .tsv.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume an interrupted --output.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace --output and discard an interrupted run.")] = False,
    shards: Annotated[
        bool, typer.Option("--shards", help="Write --output as a folder of Parquet files instead of one file.")
    ] = False,
    exact: Annotated[bool, typer.Option("--exact", help="Search every item, even if the model has an index.")] = False,
    as_json: Json = False,
) -> None:
    """Recommend items for a query, words, a history of items, features, or every row of a file."""
    from twotower.distributed.launch import Launch  # noqa: PLC0415
    from twotower.serving import Retriever  # noqa: PLC0415
    from twotower.serving.queries import require_something  # noqa: PLC0415

    options: dict[str, Any] = {
        "k": k,
        "exclude_seen": not keep_seen,
        "popularity": popularity,
        "event": event,
        "filter": filter_,
        "allow": option_ids(allow, "--allow"),
        "deny": option_ids(deny, "--deny"),
        "group": group,
        "time": time,
    }
    if source is not None or target is not None:
        asked = (query, text, history, features, context)
        if source is None or target is None or any(given is not None for given in asked):
            raise InputError(
                "recommend: expected --input FILE with --output FILE, without --query, --text, --history, --features "
                "or --context; give texts and context as columns of FILE"
            )
        with ranks_of(directory) as team:
            options |= {"resume": resume, "force": force, "shards": shards, "team": team}
            _file(Retriever.load(directory, exact=exact), source, target, options, as_json)
        return
    if Launch.of_environment().size > 1:
        raise InputError("torchrun: the processes divide a file of queries; pass --input FILE, or leave out torchrun")
    require_something(
        {"--query": query, "--text": text, "--history": history, "--features": features, "--context": context}
    )
    if query is not None and history is not None:
        raise InputError(
            "recommend: expected --query ID or --history ITEM,ITEM,..., found both; give only one of the two"
        )
    count = len(query) if query is not None else 1 if history is not None or text is None else len(text)
    feature_rows = None if features is None else [_object(features, "--features")] * count
    retriever = Retriever.load(directory, exact=exact)
    item_ids = None if history is None else _history(history, retriever)
    found = retriever.recommend(
        query,
        histories=None if item_ids is None else [item_ids],
        features=feature_rows,
        context=None if context is None else _object(context, "--context"),
        text=text[0] if text is not None and len(text) == 1 else text,
        **options,
    )
    if as_json:
        print_json(found.to_dicts())
        return
    is_text = text is not None and query is None
    for of, rows in found.group_by("query", maintain_order=True):
        if query is not None:
            print_frame(f"The latest items of {of[0]}", retriever.history(of[0]).tail(5).reverse())
        name = of[0] if query is not None else "this query" if history is None else "this history"
        if is_text and text is not None:
            name = repr(of[0] if isinstance(of[0], str) else text[of[0] if len(text) > 1 else 0])
        print_frame(f"Recommended for {name}", rows.drop("query"))
    if not len(found):
        print_line("No items left to recommend.")
    _print_index(retriever)


@commands.command(cls=Command)
def similar(
    directory: Run,
    item: Annotated[list[str], typer.Option("--item", help="Id of an item; may be repeated.")],
    k: Annotated[int, typer.Option("-k", min=1, help="Number of items.")] = 10,
    filter_: Filter = None,
    group: Group = None,
    time: Time = None,
    as_json: Json = False,
) -> None:
    """List the items nearest to an item."""
    from twotower.serving import Retriever  # noqa: PLC0415

    found = Retriever.load(directory, exact=True).similar(item, k, filter=filter_, group=group, time=time)
    if as_json:
        print_json(found.to_dicts())
        return
    for of, rows in found.group_by("of", maintain_order=True):
        print_frame(f"Like {of[0]}", rows.drop("of"))


@commands.command(cls=Command)
def explain(
    directory: Run,
    item: Annotated[str, typer.Option("--item", help="Id of the recommended item.")],
    query: Annotated[str | None, typer.Option("--query", help="Id of a query in the data.")] = None,
    history: History = None,
    context: Context = None,
    event: Event = None,
    popularity: Popularity = 1.0,
    as_json: Json = False,
) -> None:
    """Explain a recommendation: the contribution of each item in the history, and of popularity."""
    from twotower.serving import Retriever  # noqa: PLC0415
    from twotower.serving.queries import require_something  # noqa: PLC0415

    require_something({"--query": query, "--history": history, "--context": context})
    retriever = Retriever.load(directory, exact=True)
    item_ids = None if history is None else _history(history, retriever)
    request_context = None if context is None else _object(context, "--context")
    found = retriever.explain(
        query, item=item, history=item_ids, context=request_context, event=event, popularity=popularity
    )
    if as_json:
        print_json(found.to_dict())
        return
    name = retriever.describe([item])
    shown = name["title"][0] if "title" in name.columns else item
    print_line(f"{shown}: {found.lift:+.2f} logits above the mean of the catalog,")
    # Round first and add 0.0: a value near zero must not print as -0.00 (-0%).
    share = "" if found.popularity_share is None else f" ({round(found.popularity_share, 2) + 0.0:.0%})"
    print_line(f"of which {round(found.popularity, 2) + 0.0:+.2f}{share} is due to its popularity.")
    print_frame("Drop in the logit without this item of the history", found.history.head(10))


@commands.command(cls=Command)
def dial(
    directory: Run,
    data: MovedData = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Length of the ranked lists.")] = 20,
    on: Annotated[
        Literal["test", "validation"],
        typer.Option("--on", help="Queries to measure on; use validation queries to choose a setting."),
    ] = "test",
    as_json: Json = False,
) -> None:
    """Measure recall against discovery for settings of the popularity dial, on test or validation queries."""
    from twotower import run  # noqa: PLC0415
    from twotower.comparison.popularity_curve import popularity_curve  # noqa: PLC0415
    from twotower.incremental.saved_rows import lost_validation  # noqa: PLC0415
    from twotower.run.recent_prior import at_validation  # noqa: PLC0415
    from twotower.serving import Retriever  # noqa: PLC0415

    artifact, split = run.reread(directory, data)
    holdout = split.test if on == "test" else split.validation
    if on == "validation" and lost_validation(directory):
        raise InputError(
            f"--on validation: {directory} continues another model and was written by an older version, which did "
            "not save its validation queries; train it again with twotower train NEW_DATA --from MODEL"
        )
    if not len(holdout):
        raise InputError(f"--on {on}: the split of this model has no {on} queries")
    seen = artifact.config.evaluation.exclude_seen
    k = min(k, max(len(artifact.items), 1))
    if on == "validation":
        artifact = at_validation(artifact, split)
    found = popularity_curve(Retriever(artifact), holdout, train=split.train, k=k, exclude_seen=seen)
    if as_json:
        print_json(found.to_dict())
    else:
        console.print(found)


def _file(retriever: Retriever, source: Path, target: Path, options: dict[str, Any], as_json: bool) -> None:
    from rich.progress import Progress, TimeElapsedColumn  # noqa: PLC0415

    from twotower.serving.batch import recommend_file  # noqa: PLC0415

    is_first = options["team"].ranks.is_first
    columns = *Progress.get_default_columns(), TimeElapsedColumn()
    with Progress(*columns, console=messages, disable=not is_first) as bar:
        task = bar.add_task("queries", total=None)
        report = recommend_file(
            retriever,
            source,
            target,
            **options,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if not is_first:
        return
    if as_json:
        print_json(report.__dict__)
        return
    print_line(
        f"{target}: {counted(report.rows, 'row')} for {report.answered:,} of "
        f"{counted(report.queries, 'query', 'queries')}; "
        f"nothing is known about {counted(report.unknown, 'query', 'queries')}"
    )


def _print_index(retriever: Retriever) -> None:
    if not retriever.index.is_exact:
        print_line(f"Found by the {retriever.index.kind} index; --exact searches every item.")


def _object(text: str, option: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{option} {text:.80}: not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise InputError(f"{option} {text:.80}: expected an object of columns and values, such as " + "'{\"age\": 30}'")
    return row


def _ids(text: str) -> list[str]:
    """Split ids at commas; an id in double quotes may contain commas, as in CSV."""
    try:
        parts = next(csv.reader([text], skipinitialspace=True), [])
    except csv.Error:
        raise InputError(f"{text[:60]!r}...: an id of more than {csv.field_size_limit():,} characters") from None
    return [part.strip() for part in parts if part.strip()]


def _history(text: str, retriever: Retriever) -> list[str]:
    """Parse --history and report unknown ids, because the result does not show that they were ignored."""
    from twotower.serving.queries import codes_of  # noqa: PLC0415

    ids, items = _ids(text), retriever.artifact.items
    unknown = [one for one, code in zip(ids, codes_of(items, ids), strict=True) if code < 0]
    if 0 < len(unknown) < len(ids):
        print_line(
            f"--history: no such item: {', '.join(map(repr, unknown))}; ignored. Ids look like {items.ids[0]!r}",
            to=messages,
        )
    return ids


def option_ids(text: str | None, option: str) -> list[Any] | None:
    """Parse the ids of an option, or read them from the file it names.

    Raises:
        InputError: the file cannot be read.
    """
    if text is None or not text.startswith("@"):
        return None if text is None else _ids(text)
    from twotower.data.io.id_lists import read_ids  # noqa: PLC0415

    try:
        return read_ids(text[1:]).to_list()
    except InputError as error:
        raise InputError(f"{option} @{error}") from None
