"""Model folders as someone who means harm may write them, and a program that loads them with bounded memory.

Each change is applied to a copy of a sound folder; unless it is about checksums, they are computed again afterwards, so
that the content has to be checked.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from safetensors.numpy import load_file, save_file

from twotower.config.run import Config
from twotower.data.schema.vocabulary import Vocabulary
from twotower.errors import InputError
from twotower.features.feature_set import EncodedTable
from twotower.hashing import file_sha256
from twotower.serving import Retriever, SavedModel, build_stored_index
from twotower.serving.stored_index import save_changes
from twotower.system.checksums import is_plain, write_checksums
from twotower.towers import build_towers

Change = Callable[[Path], None]
ITEMS, QUERIES, WIDTH = 60, 20, 8
BILLION = 1_000_000_000


def sound_folder(folder: Path, *, index: str | None = None, changes: bool = False) -> Path:
    """Write a model with features, a table, histories and, optionally, an index and changes of the catalog."""
    declared = "[{column: price, kind: numeric}, {column: genre, kind: categorical}, {column: tags, kind: multi}]"
    config = Config.load(
        None, [f"item_tower.dimension={WIDTH}", f"item_tower.features={declared}", "query_tower.history.length=5"]
    )
    ids = pl.Series("id", range(ITEMS))
    table = pl.DataFrame(
        {"item_id": ids, "price": ids * 1.5, "genre": [f"g{j % 4}" for j in ids], "tags": [["a", "b"]] * ITEMS}
    )
    features = EncodedTable.fit("item", config.item_tower.features, table, ids=ids)
    torch.manual_seed(0)
    towers = build_towers(config, num_queries=QUERIES, num_items=ITEMS, item_features=features).eval()
    rng = np.random.default_rng(0)
    SavedModel(
        config=config,
        towers=towers,
        item_embeddings=towers.item_embeddings(),
        item_counts=torch.ones(ITEMS, dtype=torch.int64),
        queries=Vocabulary([f"u{q}" for q in range(QUERIES)]),
        items=Vocabulary(ids),
        history_offsets=np.arange(QUERIES + 1) * 4,
        history_items=rng.integers(0, ITEMS, 4 * QUERIES).astype(np.int32),
        item_table=table,
        metadata={"data": {"source": "nowhere", "fingerprint": "0"}},
        rows={"learnt": np.full(QUERIES, 4, dtype=np.int64), "timestamps": np.arange(4 * QUERIES, dtype=np.int64)},
    ).save(folder)
    if index is not None:
        build_stored_index(folder, index, k=5, queries=10)
    if changes:
        retriever = Retriever.load(folder, exact=True)
        retriever.catalog.update([{"item_id": 3, "price": 9.0}])
        retriever.catalog.remove([5])
        save_changes(retriever.catalog, folder)
    return folder


def reseal(folder: Path) -> None:
    """Compute all checksums again, so that they agree with whatever the folder now contains."""
    for name in ("changes/changes.json", "index/index.json", "metadata.json"):
        path = folder / name
        part = path.parent
        if not path.is_file() or path.is_symlink() or path.stat().st_size > BILLION:
            continue
        try:
            values = json.loads(path.read_bytes())
            names = list(values["checksums"].items() and values["checksums"])
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
            names = []
        if names:
            files = [part / one for one in names if is_plain(one) and (part / one).is_file()]
            files = [path for path in files if not path.is_symlink()]
            values["checksums"] |= {one.name: file_sha256(one) for one in files if one.stat().st_size < BILLION}
            if path.name == "index.json" and (folder / "changes" / "changes.json").is_file():
                values["changes"] = file_sha256(folder / "changes" / "changes.json")
            path.write_text(json.dumps(values))
        write_checksums(part, [path.name])


def edited(name: str, change: Callable[[dict[str, Any]], Any]) -> Change:
    def apply(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        change(values)
        (folder / name).write_text(json.dumps(values))

    return apply


def config_set(path: str, value: Any) -> Change:
    def change(values: dict[str, Any]) -> None:
        place = values["config"]
        *parents, last = path.split(".")
        for parent in parents:
            place = place[parent]
        place[last] = value

    return edited("metadata.json", change)


def listed(name: str, digest: Any = "0" * 64) -> Change:
    return edited("metadata.json", lambda values: values["checksums"].update({name: digest}))


def written(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content) and None


def tensors(name: str, **changes: Callable[[np.ndarray], np.ndarray] | None) -> Change:
    def apply(folder: Path) -> None:
        found = load_file(folder / name)
        for key, change in changes.items():
            if change is None:
                found.pop(key)
            else:
                found[key] = np.ascontiguousarray(change(found.get(key, np.zeros(3, dtype=np.float32))))
        save_file(found, folder / name)

    return apply


def header(name: str, text: str, *, size: int = 0) -> Change:
    """Write a safetensors file with this header, followed by a hole of `size` bytes."""

    def apply(folder: Path) -> None:
        with (folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text.encode())
            file.truncate(8 + len(text) + size)

    return apply


def table(name: str, change: Callable[[pl.DataFrame], pl.DataFrame]) -> Change:
    return lambda folder: change(pl.read_parquet(folder / name)).write_parquet(folder / name)


def many_rows(name: str, rows: int) -> Change:
    """Write a small Parquet file of very many equal rows."""
    return lambda folder: pl.select(pl.repeat(1, rows, dtype=pl.Int64).alias("id")).write_parquet(
        folder / name, compression="zstd"
    )


def link(name: str, target: str) -> Change:
    def apply(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return apply


def pipe(name: str) -> Change:
    def apply(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return apply


def both(*changes: Change) -> Change:
    def apply(folder: Path) -> None:
        for change in changes:
            change(folder)

    return apply


_METADATA, _TOWERS, _ITEMS = "metadata.json", "towers.safetensors", "items.safetensors"
_HISTORIES, _FEATURES = "histories.safetensors", "item_features.json"


def state(place: int, **changes: Any) -> Change:
    return edited(_FEATURES, lambda values: values["features"][place]["state"].update(changes))


#: Changes that need only the model.
OF_MODELS: dict[str, Change] = {
    "name ../": listed("../secret"),
    "name absolute": listed("/etc/passwd"),
    "name with backslash": listed("..\\secret"),
    "name of a folder": listed("index/index.json"),
    "name dot-dot": listed(".."),
    "name empty": listed(""),
    "name with zero byte": listed("a\x00b"),
    "name with line end": listed("a\nb"),
    "name very long": listed("x" * 5000),
    "name missing": listed("nothing.bin"),
    "checksum is no text": listed("missing", 5),
    "checksums are a list": edited(_METADATA, lambda v: v.update(checksums=[1])),
    "checksums are empty": edited(_METADATA, lambda v: v.update(checksums={})),
    "a file without checksum": edited(_METADATA, lambda v: v["checksums"].pop("rows.safetensors")),
    "towers linked outside": link(_TOWERS, "/etc/passwd"),
    "items linked to a device": link(_ITEMS, "/dev/zero"),
    "metadata linked to a device": link(_METADATA, "/dev/zero"),
    "metadata linked outside": link(_METADATA, "/etc/hostname"),
    "vocabulary linked in a circle": link("items.parquet", "items.parquet"),
    "table is a pipe": pipe("item_table.parquet"),
    "metadata is a pipe": pipe(_METADATA),
    "metadata deep": written(_METADATA, b'{"schema_version": 1, "checksums": ' + b"[" * 200_000),
    "metadata deep objects": written(_METADATA, b'{"a":' * 100_000),
    "metadata huge": lambda folder: os.truncate(folder / _METADATA, 40 * BILLION),
    "metadata large array": written(_METADATA, b"[" + b"0," * 20_000_000 + b"0]"),
    "metadata of long digits": written(_METADATA, b'{"schema_version": ' + b"9" * 100_000 + b"}"),
    "checksum of another file": written("SHA256SUMS", b"0" * 64 + b"  ../../secret\n"),
    "checksums huge": lambda folder: os.truncate(folder / "SHA256SUMS", 40 * BILLION),
    "metadata is a list": written(_METADATA, b"[]"),
    "metadata not UTF-8": written(_METADATA, b"\xff\xfe{}"),
    "metadata empty": written(_METADATA, b""),
    "data is text": edited(_METADATA, lambda v: v.update(data="x")),
    "10^9 items": edited(_METADATA, lambda v: v.update(num_items=BILLION)),
    "10^9 queries": edited(_METADATA, lambda v: v.update(num_queries=BILLION)),
    "items negative": edited(_METADATA, lambda v: v.update(num_items=-1)),
    "items a fraction": edited(_METADATA, lambda v: v.update(num_items=60.0)),
    "items text": edited(_METADATA, lambda v: v.update(num_items="60")),
    "items too many for codes": edited(_METADATA, lambda v: v.update(num_items=10**30)),
    "items missing": edited(_METADATA, lambda v: v.pop("num_items")),
    "recent prior without one": edited(_METADATA, lambda v: v.update(recent_prior=True)),
    "config is a list": edited(_METADATA, lambda v: v.update(config=[])),
    "10^5 layers": config_set("item_tower.hidden", [8] * 100_000),
    "64 wide layers": config_set("item_tower.hidden", [1_000_000] * 64),
    "layer of 10^12": config_set("query_tower.hidden", [10**12]),
    "dimension 4096": config_set("item_tower.dimension", 4096),
    "10^4 positions": config_set("query_tower.history.sequence", {"blocks": 64}),
    "ids of queries": config_set("query_tower.id_embedding", True),
    "config deep": config_set("item_tower", json.loads("[" * 300 + "]" * 300)),
    "items of other rows": tensors(_ITEMS, embeddings=lambda a: a[:-1]),
    "counts of other rows": tensors(_ITEMS, counts=lambda a: a[:-1]),
    "embeddings of other width": tensors(_ITEMS, embeddings=lambda a: a[:, :-1]),
    "embeddings of other type": tensors(_ITEMS, embeddings=lambda a: a.astype(np.float64)),
    "embeddings missing": tensors(_ITEMS, embeddings=None),
    "header longer than the file": written(_ITEMS, struct.pack("<Q", 2**63) + b"{}"),
    "header not JSON": header(_ITEMS, "nonsense"),
    "header deep": header(_TOWERS, "[" * 200_000),
    "header of 10^5 tensors": header(
        _TOWERS, json.dumps({f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(100_000)})
    ),
    "header with a hole of 1 TB": header(
        _TOWERS,
        json.dumps({"item_tower.ids.weight": {"dtype": "F32", "shape": [BILLION, 250], "data_offsets": [0, 10**12]}}),
        size=10**12,
    ),
    "header with negative offsets": header(
        _ITEMS, json.dumps({"embeddings": {"dtype": "F32", "shape": [60, 8], "data_offsets": [-1920, 0]}})
    ),
    "header with overlap": header(
        _ITEMS,
        json.dumps(
            {
                "embeddings": {"dtype": "F32", "shape": [60, 8], "data_offsets": [0, 1920]},
                "counts": {"dtype": "I64", "shape": [60], "data_offsets": [0, 480]},
            }
        ),
        size=1920,
    ),
    "weights of another shape": tensors(_TOWERS, **{"item_tower.ids.weight": lambda a: a[:5]}),
    "weights missing": tensors(_TOWERS, **{"item_tower.ids.weight": None}),
    "weights unknown": tensors(_TOWERS, more=lambda a: a),
    "offsets too short": tensors(_HISTORIES, offsets=lambda a: a[:-1]),
    "offsets descend": tensors(_HISTORIES, offsets=lambda a: a[::-1]),
    "offsets past the end": tensors(_HISTORIES, offsets=lambda a: a * BILLION),
    "history of unknown items": tensors(_HISTORIES, items=lambda a: a + 1000),
    "history of negative items": tensors(_HISTORIES, items=lambda a: a - 1000),
    "gaps of other rows": tensors(_HISTORIES, gaps=lambda a: np.zeros(7, dtype=np.int8)),
    "rows of other queries": tensors("rows.safetensors", learnt=lambda a: a[:3]),
    "rows of other times": tensors("rows.safetensors", timestamps=lambda a: a[:3]),
    "vocabulary of other rows": table("items.parquet", lambda t: t[:-1]),
    "vocabulary of 10^8 rows": many_rows("items.parquet", 100_000_000),
    "vocabulary repeats": table("items.parquet", lambda t: t.with_columns(pl.lit(7, pl.Int64).alias("id"))),
    "vocabulary of lists": table("queries.parquet", lambda t: t.with_columns(pl.concat_list("id"))),
    "vocabulary of another column": table("queries.parquet", lambda t: t.rename({"id": "x"})),
    "codes of 10^9": table("items.parquet", lambda t: pl.DataFrame({"codes": [BILLION]})),
    "vocabulary not Parquet": written("items.parquet", b"PAR1" + b"\x00" * 100 + b"PAR1"),
    "footer of another length": written("items.parquet", b"PAR1" + b"\xff" * 40 + b"\xff\xff\xff\x7fPAR1"),
    "table of other rows": table("item_table.parquet", lambda t: t[:7]),
    "features of other rows": tensors("item_features.safetensors", **{"0": lambda a: a[:-1]}),
    "features of other width": tensors("item_features.safetensors", **{"0": lambda a: np.tile(a, 9)}),
    "features of unknown codes": tensors("item_features.safetensors", **{"1": lambda a: a + BILLION}),
    "features deep": written(_FEATURES, b"[" * 200_000),
    "features huge": lambda folder: os.truncate(folder / _FEATURES, 40 * BILLION),
    "features of another kind": edited(_FEATURES, lambda v: v["features"][0]["declared"].update(kind="dense")),
    "features of no kind": edited(_FEATURES, lambda v: v["features"][0]["declared"].update(kind="exec")),
    "10^9 buckets": state(1, values=None, buckets=BILLION),
    "state is a list": edited(_FEATURES, lambda v: v["features"][0].update(state=[1])),
    "features with a hole": header(
        "item_features.safetensors",
        json.dumps({"0": {"dtype": "F32", "shape": [ITEMS, BILLION], "data_offsets": [0, 4 * ITEMS * BILLION]}}),
        size=4 * ITEMS * BILLION,
    ),
    "rows with a hole": header(
        "rows.safetensors",
        json.dumps({"test.items": {"dtype": "I64", "shape": [BILLION], "data_offsets": [0, 8 * BILLION]}}),
        size=8 * BILLION,
    ),
    "widths of 10^9": edited(_FEATURES, lambda v: v.update(widths=[BILLION] * 3)),
}  # fmt: skip

_CHANGES = "changes/changes.safetensors"
#: Changes of a folder with changes of the catalog.
OF_CHANGES: dict[str, Change] = {
    "changes of unknown codes": tensors(_CHANGES, codes=lambda a: a + BILLION),
    "changes of negative codes": tensors(_CHANGES, codes=lambda a: a - BILLION),
    "changes leave unknown codes": tensors(_CHANGES, left=lambda a: a + BILLION),
    "changes of other rows": tensors(_CHANGES, embeddings=lambda a: np.zeros((9, WIDTH), np.float32)),
    "changes of other width": tensors(_CHANGES, embeddings=lambda a: a[:, :3]),
    "changes of 10^8 joined": many_rows("changes/joined.parquet", 100_000_000),
    "changes name ../": edited("changes/changes.json", lambda v: v["checksums"].update({"../x": "0"})),
    "changes deep": written("changes/changes.json", b"[" * 200_000),
}
_INDEX = "index/index.json"
_URL = {"url": "host=127.0.0.1 port=9", "table": "t", "links": 16, "build_effort": 64, "effort": 100}
#: Changes of a folder with an HNSW index.
OF_INDEXES: dict[str, Change] = {
    "index in a database": edited(_INDEX, lambda v: v.update(kind="pgvector", settings=_URL)),
    "index in a database by words": edited(
        _INDEX, lambda v: v.update(kind="pgvector", settings={**_URL, "url": "service=evil passfile=/etc/passwd"})
    ),
    "index name ../": edited(_INDEX, lambda v: v["checksums"].update({"../../secret": "0"})),
    "index of unknown kind": edited(_INDEX, lambda v: v.update(kind="os.system")),
    "index without settings": edited(_INDEX, lambda v: v.update(settings={})),
    "index settings are text": edited(_INDEX, lambda v: v["settings"].update(effort="many")),
    "index deep": written(_INDEX, b"[" * 200_000),
    "graph empty": written("index/graph.faiss", b""),
    "graph cut": lambda folder: os.truncate(folder / "index" / "graph.faiss", 500),
    "graph of another kind": written("index/graph.faiss", b"IxMp" + b"\x00" * 400),
    "graph rows of others": tensors("index/rows.safetensors", codes=lambda a: a[:3]),
    "graph rows of unknown items": tensors("index/rows.safetensors", codes=lambda a: a + BILLION),
    "graph with a hole": lambda folder: os.truncate(folder / "index" / "graph.faiss", 10**12),
    "graph linked outside": link("index/graph.faiss", "/etc/passwd"),
}


def main(work: Path, gib: float) -> None:
    """Load every hostile folder with bounded memory; print one JSON line for each."""
    groups = [(OF_MODELS, {}), (OF_CHANGES, {"changes": True})]
    if "faiss" in sys.argv:
        groups.append((OF_INDEXES, {"index": "hnsw"}))
    for number, (changes, options) in enumerate(groups):
        sound = sound_folder(work / f"sound{number}", **options)
        copy = work / "copy"
        shutil.copytree(sound, copy)
        reseal(copy)
        Retriever.load(copy).recommend(["u1"], k=3)  # a resealed folder without a change is read
        shutil.rmtree(copy)
        if not number:
            pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (pages + int(gib * 2**30),) * 2)
        for name, change in changes.items():
            shutil.copytree(sound, copy)
            change(copy)
            if not name.startswith(("checksum of", "checksums huge")):
                reseal(copy)
            begin, outcome = time.perf_counter(), "loaded"
            try:
                Retriever.load(copy)
            except InputError as error:
                outcome = "one line" if "\n" not in str(error) else f"lines: {error}"
            except BaseException as error:  # a panic of polars is no Exception
                outcome = f"{type(error).__name__}: {error}"
            print(json.dumps([name, outcome, round(time.perf_counter() - begin, 3)]), flush=True)
            shutil.rmtree(copy)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
