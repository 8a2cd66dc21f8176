"""Text embeddings from a sentence-transformers model, computed once and stored in the data cache."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.config.features import TextFeature
from twotower.data.io.folders import cache_root
from twotower.errors import InputError
from twotower.features.categorical import Form
from twotower.features.numeric import with_missing
from twotower.features.parsing import ErrorLocation, as_text, as_vectors
from twotower.system.filesystem import whole_file

#: Fewer texts than this are not cached, because a service embeds single items and would create many tiny files.
CACHE_FROM = 64


@dataclass(frozen=True)
class TextEncoder:
    """Encoder of text by a pretrained model; vectors have length 1, or are zero where the text is missing."""

    declared: TextFeature
    width: int
    note: str = ""
    form: ClassVar[Form] = "numbers"

    @classmethod
    def fit(cls, declared: TextFeature, column: pl.Series, place: ErrorLocation) -> TextEncoder:
        """Determine the width of the model's vectors; the model itself is not trained."""
        as_text(column, place)
        width = int(_model(declared.model).get_embedding_dimension())
        return cls(declared, width, f"{width} wide, by {Path(declared.model).name}")

    @property
    def size(self) -> int:
        """The width: the length of the vector, and one column for missing values."""
        return self.width + 1

    def encode(self, column: pl.Series, place: ErrorLocation) -> NDArray[np.float32]:
        """Encode as in `FeatureEncoder`; a column of vectors is used directly, as embeddings computed by the caller."""
        if column.dtype.is_nested():
            return with_missing(*as_vectors(column, self.width, place), normalise=True)
        texts = as_text(column, place)
        missing = texts.is_null().to_numpy()
        vectors = np.zeros((len(texts), self.width), dtype=np.float32)
        if not missing.all():
            known = texts.drop_nulls()
            distinct = known.unique().sort()
            whole = self.declared.prompt + distinct if self.declared.prompt else distinct
            vectors[~missing] = embed_texts(whole, self.declared.model)[distinct.search_sorted(known).to_numpy()]
        return with_missing(vectors, missing, normalise=True)

    def state(self) -> dict[str, Any]:
        """See `FeatureEncoder`."""
        return {"width": self.width}

    @classmethod
    def restore(cls, declared: TextFeature, state: dict[str, Any]) -> TextEncoder:
        """Restore from the result of `state`."""
        return cls(declared, int(state["width"]))


def embed_texts(texts: pl.Series, model: str) -> NDArray[np.float32]:
    """Compute the embeddings of texts, float32 [rows, width], or read them from the cache.

    Args:
        texts: the texts, without nulls.
        model: name or folder of a sentence-transformers model.

    Raises:
        InputError: sentence-transformers is not installed or cannot load the model.
    """
    if len(texts) < CACHE_FROM:
        return _embedded(texts, model)
    digest = hashlib.sha256(repr((_stamp(model), texts.to_list())).encode()).hexdigest()[:32]
    target = cache_root() / "text" / f"{digest}.npy"
    if target.is_file():
        cached: NDArray[np.float32] = np.load(target, allow_pickle=False)
        return cached
    vectors = _embedded(texts, model)
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as partial, partial.open("wb") as file:
        np.save(file, vectors, allow_pickle=False)
    return vectors


def _stamp(model: str) -> list[tuple[str, int, int]]:
    """Identify a model for the cache key by its name and, for a folder, by the state of its files."""
    folder = Path(model)
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    return [(model, 0, 0), *((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)]


def _embedded(texts: pl.Series, model: str) -> NDArray[np.float32]:
    vectors = _model(model).encode(texts.to_list(), show_progress_bar=False, convert_to_numpy=True)
    return np.asarray(vectors, dtype=np.float32)


@lru_cache(maxsize=2)
def _model(name: str) -> Any:
    try:
        from sentence_transformers import SentenceTransformer  # noqa: PLC0415  # slow to import, and an optional extra
    except ModuleNotFoundError as error:
        raise InputError(
            f"text model {name!r}: needs the package {error.name!r}; run pip install 'twotower[text]', or use model: "
            "words"
        ) from None
    try:
        return SentenceTransformer(name)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"text model {name!r}: cannot be loaded ({reason}); give the folder of a model, or use model: words"
        ) from None
