"""Export of the query tower, as ONNX or as a torch.export program; neither needs this package to run."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from twotower.data.loading.gaps import GAP_CODES
from twotower.errors import InputError
from twotower.serving.model_folder import SavedModel, find_model
from twotower.serving.search import dial_of
from twotower.system.filesystem import output_path, require_replaceable, whole_folder
from twotower.towers import TwoTower
from twotower.towers.text import TextTransformer

FORMATS = {"onnx": "query_tower.onnx", "torch": "query_tower.pt2"}

#: Largest accepted difference between the export and the original.
TOLERANCE = 1e-5
REPORT = "export.json"


class QueryEncoder(nn.Module):
    """A query tower with explicit inputs and output, for export.

    Args:
        towers: the model.
        uses_queries: whether the tower has an id embedding; the input `query` is int64 [B], -1 for a new query.
        uses_history: whether the tower reads a history; the input `history` is int64 [B, L], item codes, newest last,
            padded with -1 on the left.
        uses_gaps: whether the tower reads the time between items; the input `gaps` is int64 [B, L], codes of
            data/loading/gaps.py, 0 for an unknown gap.
    """

    def __init__(self, towers: TwoTower, *, uses_queries: bool, uses_history: bool, uses_gaps: bool = False) -> None:
        super().__init__()
        self.towers = towers
        self.uses_queries = uses_queries
        self.uses_history = uses_history
        self.uses_gaps = uses_gaps

    def forward(self, *inputs: Tensor) -> Tensor:
        """Embed queries, float32 [B, D]; inputs are query, history and gaps, in this order, if the tower uses them."""
        rows = inputs[0]
        queries = rows if self.uses_queries else torch.full_like(rows[:, 0], -1)
        history = inputs[int(self.uses_queries)] if self.uses_history else None
        return self.towers.embed_queries(queries, history, gaps=inputs[-1] if self.uses_gaps else None).float()


def export_query_tower(directory: str | Path, out: str | Path, format: str = "onnx") -> dict[str, Any]:  # noqa: A002
    """Write the query tower, and the files needed to use it, to a folder.

    The files are `query_tower.onnx` or `query_tower.pt2`; `items.safetensors` with the item embeddings [N, D] and the
    popularity coordinate [N] (see `PopularityDial`); `items.parquet` and `queries.parquet`, row = code; `export.json`
    with the inputs, L, D, the temperature, and the largest difference from the original.

    The exported tower is compared with the original on random queries, in batches of 1, 3 and 64.

    Args:
        directory: a model folder, or the run folder that contains it.
        out: the folder to write.
        format: onnx or torch.

    Returns:
        The content of `export.json`.

    Raises:
        InputError: the format is unknown, a package is missing, `out` exists and is not an export, the query tower
            reads a text or a context, or the result differs from the original by more than 1e-5.
    """
    if format not in FORMATS:
        raise InputError(f"export: unknown format {format!r}; expected onnx or torch")
    target = output_path(out)
    require_replaceable(target, REPORT, "export")
    artifact = SavedModel.load(find_model(directory))
    config = artifact.config.query_tower
    if any(isinstance(module, TextTransformer) for module in artifact.towers.query_tower.modules()):
        raise InputError(
            "export: the query tower has a text encoder, and an exported file cannot tokenise a text; serve this model "
            "with `twotower serve` or the Retriever"
        )
    if not isinstance(config.context, str):
        columns = ", ".join(dict.fromkeys(one.column for one in config.context))
        raise InputError(
            f"export: the query tower reads the context of a request ({columns}), which an exported file cannot encode"
            "; serve this model with `twotower serve` or the Retriever, or train one without query_tower.context"
        )
    if artifact.config.data.texts_are_queries:
        raise InputError(
            "export: the queries of this model are texts (data.query_text), which an exported file cannot encode; "
            "serve it with `twotower serve` or the Retriever, or embed queries with twotower.serving.Embedder"
        )
    length = config.history.length if config.history else 0
    encoder = QueryEncoder(
        artifact.towers,
        uses_queries=config.id_embedding,
        uses_history=config.history is not None,
        uses_gaps=getattr(artifact.towers.query_tower, "gaps", None) is not None,
    ).eval()
    used = {"query": encoder.uses_queries, "history": encoder.uses_history, "gaps": encoder.uses_gaps}
    names = [name for name, is_used in used.items() if is_used]
    with whole_folder(target) as folder:
        path = folder / FORMATS[format]
        example = _inputs(artifact, 3, length, names)
        run = _export_onnx(encoder, example, names, path) if format == "onnx" else _export_torch(encoder, example, path)
        largest = 0.0
        for rows in (1, 3, 64):
            inputs = _inputs(artifact, rows, length, names)
            with torch.no_grad():
                expected = encoder(*inputs).numpy()
            largest = max(largest, float(np.abs(run(inputs) - expected).max()))
        if not largest <= TOLERANCE:
            raise InputError(
                f"export: the {format} file differs from the model by {largest:.1e}, more than {TOLERANCE:.0e}"
            )
        dial = dial_of(artifact)
        report = {
            "file": FORMATS[format],
            "inputs": {name: "int64 [B]" if name == "query" else f"int64 [B, {length}]" for name in names},
            "output": f"float32 [B, {artifact.item_embeddings.shape[1]}]",
            "history_length": length,
            "dimension": int(artifact.item_embeddings.shape[1]),
            "temperature": dial.temperature,
            "num_items": len(artifact.items),
            "largest_difference": largest,
        }
        _write_items(artifact, dial.coordinate(), folder)
        (folder / REPORT).write_text(json.dumps(report, indent=1), encoding="utf-8")
    return report


def _inputs(artifact: SavedModel, rows: int, length: int, names: list[str]) -> tuple[Tensor, ...]:
    """Draw random queries, some of them new, with histories of 1 to `length` items."""
    generator = torch.Generator().manual_seed(rows)
    made = {"query": torch.randint(-1, max(len(artifact.queries), 1), (rows,), generator=generator)}
    if length:
        history = torch.randint(0, len(artifact.items), (rows, length), generator=generator)
        present = torch.randint(1, length + 1, (rows, 1), generator=generator)
        made["history"] = torch.where(torch.arange(length, 0, -1) <= present, history, -1)
        made["gaps"] = torch.randint(0, GAP_CODES, (rows, length), generator=generator)
    return tuple(made[name] for name in names)


def _export_torch(encoder: QueryEncoder, example: tuple[Tensor, ...], path: Path) -> Any:
    batch = torch.export.Dim("batch", min=1)
    shapes = {"inputs": tuple({0: batch} for _ in example)}
    program = torch.export.export(encoder, example, dynamic_shapes=shapes)
    torch.export.save(program, path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")  # torch 2.10 warns about its own buffer
        loaded = torch.export.load(path).module()
    return lambda inputs: loaded(*inputs).detach().numpy()


def _export_onnx(encoder: QueryEncoder, example: tuple[Tensor, ...], names: list[str], path: Path) -> Any:
    try:
        import onnxruntime  # noqa: PLC0415  # an extra
        import onnxscript  # noqa: F401, PLC0415
    except ImportError:
        raise InputError(
            "export: the ONNX packages are missing; install them with: pip install 'twotower[onnx]'"
        ) from None
    batch = torch.export.Dim("batch", min=1)
    with warnings.catch_warnings(), _quiet("torch.onnx", "onnxscript", "onnx_ir"):
        warnings.simplefilter("ignore")  # deprecations inside the exporter
        torch.onnx.export(
            encoder,
            example,
            path,
            input_names=names,
            output_names=["query_vector"],  # the exporter uses names like "embedding" for its own values
            dynamic_shapes={"inputs": tuple({0: batch} for _ in example)},
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})[0]


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Silence the exporter, which logs optional packages it did not find, such as torchvision."""
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def _write_items(artifact: SavedModel, coordinate: Tensor, folder: Path) -> None:
    save_file(
        {"embeddings": artifact.item_embeddings.float().contiguous(), "popularity": coordinate.contiguous()},
        folder / "items.safetensors",
    )
    artifact.items.write(folder / "items.parquet")
    artifact.queries.write(folder / "queries.parquet")
