"""Recommend items for a file of queries, which is read in blocks to bound memory; finished parts let a run resume."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from twotower.data.eligibility import Eligibility
from twotower.data.io.feature_tables import typed
from twotower.data.io.readers import ROW, open_source, split_cells
from twotower.data.io.text_format import damaged, magic
from twotower.data.schema.columns import USUAL_NAMES, plain_name, usual_column
from twotower.data.schema.vocabulary import Codes
from twotower.distributed.communicator import Communicator
from twotower.distributed.launch import Coordinator
from twotower.errors import InputError, Interrupted, require_flags
from twotower.index.popularity import checked_popularity
from twotower.serving.events import with_event
from twotower.serving.filters import Offer, allowed_items
from twotower.serving.queries import NO_HISTORY, QueryBatch, reads_history
from twotower.serving.request_tables import HISTORY_NAMES, RequestColumns
from twotower.serving.retriever import Retriever, checked_k
from twotower.serving.text_input import TextInput
from twotower.system.filesystem import require_file, require_file_name, whole_file, whole_folder, write_text
from twotower.system.parquet import READ_ERRORS, scan_parquet

#: Default number of queries in one part.
BLOCK = 8192
#: Counts stored with every part.
COUNTS = ("answered", "unknown", "rows")
#: File with the options of a run, in the folder of its parts.
JOURNAL = "journal.json"
#: Extension of the output file -> separator of the text; None for Parquet.
OUTPUTS = {"": None, ".parquet": None, ".pq": None, ".csv": ",", ".tsv": "\t", ".tab": "\t"}


@dataclass(frozen=True)
class BatchReport:
    """Counts for a file of queries.

    Attributes:
        queries: rows of the input.
        answered: rows of the file with at least one recommendation; an id in two rows counts twice, as in `queries`.
        unknown: queries that cannot be answered because nothing is known about them; see `QueryBatch.answerable`.
        rows: recommendations written.
        resumed: queries whose part was written by an earlier, interrupted run.
    """

    queries: int
    answered: int
    unknown: int
    rows: int
    resumed: int


def recommend_file(
    retriever: Retriever,
    source: str | Path,
    target: str | Path,
    *,
    k: int = 10,
    exclude_seen: bool = True,
    filter: str | None = None,  # noqa: A002  # as in Retriever.recommend
    allow: Sequence[Any] | None = None,
    deny: Sequence[Any] | None = None,
    popularity: float = 1.0,
    group: Any = None,
    time: Any = None,
    event: str | None = None,
    resume: bool = False,
    force: bool = False,
    shards: bool = False,
    block: int = BLOCK,
    progress: Callable[[int, int], None] | None = None,
    team: Coordinator | None = None,
) -> BatchReport:
    """Recommend items for every row of a file.

    Finished blocks are kept next to `target` in `.NAME.parts/` until all are done. Then they are merged into one file,
    or become the files of a folder. In both cases, the output appears complete or not at all.

    Args:
        retriever: the model.
        source: Parquet, CSV or TSV with a column of query ids (`query`, `user_id`, ... ), a column `history` with lists
            of item ids, oldest first (in CSV and TSV separated by spaces, commas, semicolons or bars), or both. If it
            has both, the given history is used for known and unknown queries. If the model reads no histories, they are
            used only to exclude seen items, and ids or a context are required. Columns declared in query_tower.context
            are the context of each row's request, from which an unknown query can also be answered. If the queries of
            the model are texts, they are read from the column named by the setting `data.query_text`, and ids only
            label the rows.
        target: file to write, with the columns `query` (id, or the row number from 0 if there are only histories),
            `rank`, `item`, `score`. The extension selects CSV, TSV or Parquet (the default).
        k: number of items per query.
        exclude_seen: leave out the items of the history.
        filter: a condition on the columns of the item table.
        allow: the only item ids that may be recommended.
        deny: item ids that may not be recommended.
        popularity: b, the setting of the popularity dial.
        group: the group of all requests; None to read it from a column that has the name of the model's group column or
            a common name (group, market). Required if the model has groups.
        time: the time of all requests, as in `Retriever.recommend`.
        event: the event type to recommend for; None for the type in the file, or else the model's default.
        resume: resume an interrupted run.
        force: replace `target`, and discard an interrupted run.
        shards: write a folder `target` of Parquet files, one for each block; sorted by name, they are in input order.
        block: number of queries in one part; fewer if some ranks would otherwise have no part.
        progress: called with the number of this rank's finished queries and the number of all its queries.
        team: the processes that divide the blocks among themselves. All must have access to the same files; rank 0
            writes `target`. None for a single process.

    Returns:
        The counts over all ranks, on rank 0; on other ranks, all counts except `queries` are 0. Queries that cannot be
        answered get no rows.

    Raises:
        InputError: a file or column is missing or has the wrong type, `target` exists, or an interrupted run had
            different options.
        Interrupted: the run was stopped by Ctrl-C; finished parts are kept.
    """
    require_flags(exclude_seen=exclude_seen, resume=resume, force=force, shards=shards)
    source, target, team = Path(source), Path(target), team or Coordinator(Communicator())
    ranks = team.ranks
    separator = _separator(target)
    _check_target(source, target, is_folder=shards)
    allowed = allowed_items(
        retriever.artifact.items, retriever.artifact.item_table, condition=filter, allow=allow, deny=deny
    )
    reader = _Reader.of(source, retriever.context_columns, _group_column(retriever, group), retriever.text_input)
    rule = retriever.artifact.eligibility
    if rule is not None and rule.member is not None and group is None and reader.group is None:
        raise InputError(
            f"{source}: expected a column 'group' with the group of each request, or --group for all of them"
        )
    # Checked before anything is written; the groups of a column are checked as they are read.
    shared = None if reader.group is not None else Offer.of(rule, group, time)
    now = None if rule is None or rule.start is None else Offer.moment(rule, time)
    if now is not None:  # the same on every rank
        now = int(team.broadcast_text("time", str(now)))
        shared = None if shared is None else replace(shared, time=now)
    columns = reader.columns
    if columns.query is None and not columns.context and columns.text is None and not reads_history(retriever.artifact):
        raise InputError(f"{source}: column {columns.history!r}: {NO_HISTORY}")
    named = with_event(retriever.events, None, event)
    for column in named or ():
        if column in columns.context:
            raise InputError(f"{source}: has a column {column!r} with the event type of each row; omit --event")
    block = _block(block, reader.rows, ranks)
    options = {
        "event": event,
        "model": _fingerprint(retriever),
        "source": [str(source.resolve()), source.stat().st_size, source.stat().st_mtime_ns],
        "block": block,
        "k": k,
        "exclude_seen": exclude_seen,
        "allowed": None if allowed is None else hashlib.sha256(np.packbits(allowed).tobytes()).hexdigest(),
        "popularity": checked_popularity(popularity),
        **({} if rule is None else {"group": None if group is None else str(group), "time": now}),
        **({"shards": True} if shards else {}),
    }
    _require_alike(options, source, team)
    parts, block, resumed = _open_together(target, options, reader.rows, team, resume=resume, force=force)
    answer = partial(
        retriever.answer,
        k=checked_k(k, retriever.artifact),
        exclude_seen=exclude_seen,
        allowed=allowed,
        popularity=popularity,
        titles=False,
    )

    def answer_block(start: int, stop: int) -> tuple[pl.DataFrame, int]:
        """Return the recommendations for some rows, and the number of queries that cannot be answered."""
        every = reader.queries(retriever, start, stop, named)
        known = every.answerable(retriever.artifact)
        queries = every.select(known)
        offers = None if shared is None else [shared] * len(queries.codes)
        if rule is not None and reader.group is not None:
            offers = [Offer(code, now) for code in reader.groups(rule, start, stop)[known].tolist()]
        return answer(queries, offers=offers), int((~known).sum())

    def answer_blocks() -> None:
        starts = range(0, max(reader.rows, 1), block)  # an empty file has one empty part
        own = starts[ranks.part(len(starts))]
        for start in own:
            stop = min(start + block, reader.rows)
            if not _part(parts, start, block).exists():
                _write_part(_part(parts, start, block), *answer_block(start, stop))
            if progress is not None:
                progress(stop - own[0], min(own[-1] + block, reader.rows) - own[0])

    try:
        team.all_at_once(answer_blocks, "blocks")
    except KeyboardInterrupt:
        raise Interrupted(f"{target}: stopped; finished parts are in {parts}") from None
    counts = _finish(parts, target, separator, shards=shards) if ranks.is_first else dict.fromkeys(COUNTS, 0)
    team.broadcast_text("output", "written")
    return BatchReport(queries=reader.rows, **counts, resumed=resumed)


def _block(block: int, rows: int, ranks: Communicator) -> int:
    """Return the number of queries in a part: at most `block`, and few enough that every rank has a part.

    Raises:
        InputError: `block` is below 1.
    """
    if block < 1:
        raise InputError(f"block: expected at least one query in a part, found {block}")
    return block if ranks.size == 1 else min(block, max(-(-rows // ranks.size), 1))


def _require_alike(options: dict[str, Any], source: Path, team: Coordinator) -> None:
    """Check that this rank has the same model, file and options as rank 0.

    Raises:
        InputError: something differs.
    """
    first = json.loads(team.broadcast_text("options", json.dumps(options)))
    if differing := sorted(name for name in options if first.get(name) != options[name]):
        raise InputError(
            f"{source}: rank {team.ranks.rank} and rank 0 differ in {', '.join(differing)}; give all ranks the same "
            "files and options"
        )


def _open_together(
    target: Path, options: dict[str, Any], rows: int, team: Coordinator, *, resume: bool, force: bool
) -> tuple[Path, int, int]:
    """Create the folder of the parts on rank 0, or find the folder of the interrupted run.

    Returns:
        The folder, the number of queries in a part, and on rank 0 the number of queries whose part is finished.
    """
    parts, block, resumed = _parts_of(target), 0, 0
    if team.ranks.is_first:
        # torchrun restarts with the same arguments, but --force must not discard the parts of the first attempt.
        again = team.resumes and (parts / JOURNAL).exists()
        block = _open_parts(parts, target, options, resume=resume or again, force=force and not again)
        starts = range(0, max(rows, 1), block)
        resumed = sum(min(block, rows - start) for start in starts if _part(parts, start, block).exists())
    block = int(team.broadcast_text("block", str(block)))
    team.require_shared(parts)
    team.begins()
    return parts, block, resumed


def _counted(parts: Path) -> dict[str, int]:
    """Add up the counts of the parts."""
    written = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(parts.glob("part-*.json"))]
    return {name: sum(part[name] for part in written) for name in COUNTS}


def _write_part(path: Path, found: pl.DataFrame, unknown: int) -> None:
    """Write the counts of a finished part, then the part, so that every existing part has counts."""
    counts = {"unknown": unknown, "answered": int((found["rank"] == 1).sum()), "rows": len(found)}
    write_text(path.with_suffix(".json"), json.dumps(counts))
    with whole_file(path) as temporary:
        found.write_parquet(temporary)


def _finish(parts: Path, target: Path, separator: str | None, *, shards: bool) -> dict[str, int]:
    """Combine the finished parts into the output, remove their folder, and return the total counts."""
    counts = _counted(parts)
    files = sorted(parts.glob("part-*.parquet"))
    if shards:
        with whole_folder(target) as folder:
            for file in files:
                file.rename(folder / file.name)  # after a failure, parts already moved are computed again
    else:
        with whole_file(target) as temporary:
            whole = scan_parquet(*files)
            if separator is None:
                whole.sink_parquet(temporary)
            else:
                whole.sink_csv(temporary, separator=separator)
    shutil.rmtree(parts)
    return counts


def _part(parts: Path, start: int, block: int) -> Path:
    """Return the file of the block that begins at row `start`."""
    return parts / f"part-{start // block:06d}.parquet"


def _separator(target: Path) -> str | None:
    """Return the separator of a text file to write; None for Parquet.

    Raises:
        InputError: the extension is not one of `OUTPUTS`.
    """
    if target.suffix.lower() not in OUTPUTS:
        raise InputError(f"{target}: unsupported output format; expected a name ending in .parquet, .csv or .tsv")
    return OUTPUTS[target.suffix.lower()]


def _check_target(source: Path, target: Path, *, is_folder: bool) -> None:
    """Check the name of the output, and that --force would not replace the input under the same or another name."""
    if is_folder and (target.suffix or not target.name):
        raise InputError(f"{target}: --shards writes a folder of Parquet files; expected a name without an extension")
    if not is_folder:
        require_file_name(target)
    if target.exists() and source.exists() and target.samefile(source):
        raise InputError(f"{target}: is also the file with the queries; choose another --output")


def _read(path: Path, text: TextInput | None) -> pl.LazyFrame:
    """Open a file with queries. Parquet is read in slices; text files are read completely.

    Raises:
        InputError: the file cannot be read.
    """
    require_file(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected Parquet or CSV with a column of query ids or of histories")
    if magic(path).startswith(b"PAR1"):
        return scan_parquet(path)
    source = open_source(path)
    frame = pl.concat(source.chunks(source.columns)).drop(ROW)
    if not source.text:
        return frame.lazy()
    words = None if text is None else text.column  # stays text, even if it looks like a number
    others = [name for name in source.columns if name != words]
    ids = usual_column(others, USUAL_NAMES["query"], "query", source.name)
    return frame.with_columns(
        split_cells(frame[name]) if frame.schema[name] == pl.String and plain_name(name) in HISTORY_NAMES
        else frame[name].str.strip_chars() if name in (ids, words) else typed(frame[name])
        for name in source.columns
    ).lazy()  # fmt: skip


@dataclass(frozen=True)
class _Reader:
    """A file with queries, read in slices."""

    path: Path
    frame: pl.LazyFrame
    rows: int
    columns: RequestColumns
    group: str | None = None

    @classmethod
    def of(
        cls, path: Path, context: Sequence[str] = (), group: Sequence[str] = (), text: TextInput | None = None
    ) -> _Reader:
        frame = _read(path, text)
        try:
            schema = frame.collect_schema()
            rows = int(frame.select(pl.len()).collect().item())
        except READ_ERRORS as error:
            raise damaged(path, error) from None
        columns, names = RequestColumns.of(schema, str(path), context=context, text=text), list(schema)
        columns.require_ids_or_histories(names, text)
        groups = [name for name in names if name in group] or [name for name in names if plain_name(name) in group]
        return cls(path, frame, rows, columns, groups[0] if groups else None)

    def groups(self, rule: Eligibility, start: int, stop: int) -> Codes:
        """Read the group of rows start .. stop - 1 as codes.

        Raises:
            InputError: a row has no group or an unknown one.
        """
        assert self.group is not None and rule.names is not None
        values = self._rows([self.group], start, stop)[self.group]
        codes = self.columns.encoded(rule.names, values, self.group)
        if len(codes) and codes.min() < 0:
            row = int(np.flatnonzero(codes < 0)[0])
            raise InputError(
                f"{self.path}: column {self.group!r}, row {start + row + 1}: {values[row]!r} is not a group of this "
                f"model; expected one of {rule.known_groups()}"
            )
        return codes

    def queries(self, retriever: Retriever, start: int, stop: int, same: Mapping[str, Any] | None = None) -> QueryBatch:
        """Read rows start .. stop - 1, including unanswerable queries; `same` is a context shared by all rows."""
        rows = self._rows(self.columns.names, start, stop)
        return self.columns.queries(retriever.artifact, rows, first=start, same=same)

    def _rows(self, columns: Sequence[str], start: int, stop: int) -> pl.DataFrame:
        try:
            return self.frame.select(columns).slice(start, stop - start).collect()
        except READ_ERRORS as error:
            raise damaged(self.path, error) from None


def _group_column(retriever: Retriever, group: Any) -> tuple[str, ...]:
    """Return possible names of the group column; none if the group is given or the model has no groups."""
    rule = retriever.artifact.eligibility
    if rule is None or rule.member is None or group is not None:
        return ()
    data = retriever.artifact.config.data
    own = [name for name in (rule.settings.query_group, data.columns.group) if name is not None]
    return (*own, *(name for tier in USUAL_NAMES["group"] for name in tier))


def _parts_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.parts")


def _open_parts(parts: Path, target: Path, options: dict[str, Any], *, resume: bool, force: bool) -> int:
    """Create the folder of the parts, or check that an interrupted run had the same options.

    Returns:
        The number of queries in a part; when resuming, that of the interrupted run, whose number of ranks may differ.
    """
    journal, block = parts / JOURNAL, int(options["block"])
    if options.get("shards") and target.exists():
        _require_shards(target)
    if force:
        shutil.rmtree(parts, ignore_errors=True)
    elif journal.exists():
        if not resume:
            raise InputError(
                f"{target}: an interrupted run exists; pass --resume to continue it, or --force to start over"
            )
        try:
            before = json.loads(journal.read_text(encoding="utf-8"))
            options = {**options, "block": (block := int(before["block"]))}
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{journal}: damaged ({error}); start over with --force") from None
        changed = sorted(name for name in options.keys() | before.keys() if before.get(name) != options.get(name))
        if changed:
            raise InputError(
                f"{target}: the interrupted run had different options ({', '.join(changed)}); use the same options, or "
                "start over with --force"
            )
    elif target.exists():
        raise InputError(f"{target}: already exists; choose another --output, or replace it with --force")
    if not target.parent.is_dir():
        raise InputError(f"{target.parent}: no such folder; create it first")
    if parts.exists() and not parts.is_dir():
        raise InputError(f"{parts}: is a file, expected the folder of an interrupted run; remove it")
    parts.mkdir(exist_ok=True)
    write_text(journal, json.dumps(options))
    return block


def _require_shards(target: Path) -> None:
    """Check that a folder to be replaced contains only the files of an earlier run.

    Raises:
        InputError: `target` is a file, or contains other files.
    """
    if not target.is_dir() or any(not path.match("part-*.parquet") for path in target.iterdir()):
        raise InputError(f"{target}: exists and is not a folder of recommendations; choose another --output")


def _fingerprint(retriever: Retriever) -> str:
    checksums = retriever.artifact.metadata.get("checksums", {})
    identity = {"files": checksums, "index": retriever.index.kind}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
