"""Tokens of texts, for a pretrained encoder that is trained with the towers.

The encoder itself is `towers.text.TextTransformer`. This module contains the tokenizer and the encoder's description,
which a model folder stores in place of the encoder's own files. Nothing is unpickled, no code from a model repository
is run, and a description from a file is checked (`PretrainedText.restore`) before anything is built from it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.config.features import TextFeature
from twotower.errors import InputError
from twotower.features.categorical import Form
from twotower.features.parsing import ErrorLocation, as_text
from twotower.hashing import file_sha256
from twotower.system.checksums import is_plain

#: Poolings of token vectors, as named in sentence-transformers.
POOLINGS = ("mean", "cls", "max", "lasttoken", "mean_sqrt_len_tokens")
#: Flag -> pooling, in files written by older versions of sentence-transformers.
_FLAGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
#: Kinds of transformers models that can be trained. A model folder names the kind and may be untrusted, so all other
#: kinds are rejected: some of them download parts when they are built.
KINDS = (
    *("albert", "bert", "camembert", "deberta-v2", "distilbert", "electra", "modernbert", "mpnet", "qwen3"),
    *("roberta", "xlm-roberta"),
)
#: Settings of a transformers model that choose code or number formats, which this package chooses itself.
_DROPPED = ("auto_map", "quantization_config", "dtype", "torch_dtype", "transformers_version", "custom_pipelines")
#: Settings in which an adapter and its pretrained model must agree.
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings", "dim")
#: Limits of a stored description: largest number, number of layers, depth of nesting, and number of values.
MOST_NUMBER, MOST_LAYERS, MOST_DEPTH, MOST_ENTRIES = 1 << 22, 256, 6, 100_000
#: A text is cut to this many characters per allowed token before it is tokenised.
CHARACTERS = 64
#: Number of texts tokenised at a time, and number of texts whose length is checked before training.
BLOCK, SAMPLE = 8192, 1000
NEEDS = "pip install 'twotower[text]'"


@dataclass(frozen=True)
class PretrainedText:
    """The description of a pretrained text encoder.

    Attributes:
        name: the name or folder that the settings declare.
        sha256: checksum of its weight files.
        config: settings of the transformers model, JSON values.
        pooling: one of `POOLINGS`.
        pad: id of the padding token.
        lower: whether text is converted to lower case first.
        width: width of the vectors.
        limit: maximum number of tokens that the model reads.
        tokenizer: the tokenizer, as JSON of the package `tokenizers`.
        folder: the folder with the weights; None for a description from a model folder (see `weights_folder`).
    """

    name: str
    sha256: str
    config: dict[str, Any]
    pooling: str
    pad: int
    lower: bool
    width: int
    limit: int
    tokenizer: str
    folder: Path | None = field(default=None, compare=False)

    @property
    def vocabulary(self) -> int:
        """The number of token ids."""
        return int(self.config["vocab_size"])

    def parser(self, most: int) -> Any:
        """Return a tokenizer of the package `tokenizers` that truncates texts to `most` tokens."""
        from tokenizers import Tokenizer  # noqa: PLC0415  # an optional extra

        parser = Tokenizer.from_str(self.tokenizer)
        parser.no_padding()
        parser.enable_truncation(most)
        return parser

    def __deepcopy__(self, memo: dict[int, Any]) -> PretrainedText:
        """Return itself: a copy of the towers shares the description, which never changes."""
        return self

    def weights_folder(self) -> Path:
        """Return the folder with the pretrained weights; for a stored description, find it and check the checksum.

        The folder is searched for only on this machine; nothing is downloaded.

        Raises:
            InputError: the weights are missing or different.
        """
        if self.folder is not None:
            return self.folder
        folder = _modules(self.name, _folder(self.name, download=False))[1]
        found = _checksum(_weight_files(self.name, folder))
        if found != self.sha256:
            raise InputError(
                f"text model {self.name!r}: {folder} has different weights (checksum {found[:12]}..., the adapter was "
                f"trained on {self.sha256[:12]}...); put the original model there"
            )
        own = _json(folder / "config.json")
        for name in _SIZES:
            if own.get(name) != self.config.get(name) and name in own:
                raise InputError(f"text model {self.name!r}: {name} differs from config.json in {folder}; train again")
        return folder

    def state(self) -> dict[str, Any]:
        """Return the description as JSON values, for `restore`."""
        return {
            **{name: getattr(self, name) for name in ("name", "sha256", "config", "pooling", "pad", "lower", "width")},
            "limit": self.limit,
            "tokenizer": self.tokenizer,
        }

    @classmethod
    def restore(cls, state: Mapping[str, Any]) -> PretrainedText:
        """Restore a description, which may come from an untrusted file.

        Raises:
            ValueError: the state is not a description, or describes a model beyond the limits.
        """
        config = state["config"]
        if not isinstance(config, dict) or config.get("model_type") not in KINDS:
            raise ValueError(f"text encoder: its kind is not one of {', '.join(KINDS)}")
        _require_bounded(config)
        numbers = {name: state[name] for name in ("pad", "width", "limit")}
        numbers["vocab_size"] = config.get("vocab_size")
        for name, number in numbers.items():
            if type(number) is not int or not 0 <= number <= MOST_NUMBER:
                raise ValueError(f"text encoder: {name} is {number!r:.40}, expected an integer in 0 .. {MOST_NUMBER:,}")
        texts = {name: state[name] for name in ("name", "sha256", "pooling", "tokenizer")}
        for name, text in texts.items():
            if not isinstance(text, str):
                raise ValueError(f"text encoder: {name} is not text")  # noqa: TRY004  # like any error in a file
        if texts["pooling"] not in POOLINGS or config["vocab_size"] < 1 or state["lower"] not in (True, False):
            raise ValueError(
                f"text encoder: pooling {texts['pooling']!r:.40}, lower {state['lower']!r:.40} or vocab_size "
                f"{config['vocab_size']:,} is invalid; poolings are {', '.join(POOLINGS)}"
            )
        return cls(
            texts["name"],
            texts["sha256"],
            _without_code(config),
            texts["pooling"],
            numbers["pad"],
            bool(state["lower"]),
            numbers["width"],
            numbers["limit"],
            texts["tokenizer"],
        )

    @classmethod
    def read(cls, name: str) -> PretrainedText:
        """Read the description of a model, by name or folder, in the format of sentence-transformers or transformers.

        Raises:
            InputError: a package is missing, or the model is missing, damaged or of a kind that cannot be trained here.
        """
        try:
            from transformers import AutoConfig, AutoTokenizer  # noqa: PLC0415  # slow to import, and an extra
        except ModuleNotFoundError as error:
            raise InputError(
                f"text model {name!r}: needs the package {error.name!r}; run {NEEDS}, or use model: words"
            ) from None
        folder = _folder(name, download=True)
        pooling, path, settings = _modules(name, folder)
        files = _weight_files(name, path)
        kind = _json(path / "config.json").get("model_type")
        if kind not in KINDS:
            raise InputError(f"text model {name!r}: kind {kind}; expected one of {', '.join(KINDS)}; use train: frozen")
        try:
            with quiet():
                config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
                tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # the libraries raise many types of errors for a damaged file
            raise InputError(f"text model {name!r}: cannot be read ({_line(error)})") from None
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise InputError(f"text model {name!r}: needs a tokenizer.json (a fast tokenizer), which it does not have")
        pad = next(
            (one for one in (tokenizer.pad_token_id, getattr(config, "pad_token_id", None)) if one is not None), 0
        )
        if max(len(tokenizer), pad + 1) > config.vocab_size:
            raise InputError(
                f"text model {name!r}: its tokenizer has {len(tokenizer):,} tokens, but the model {config.vocab_size:,}"
            )
        limits = [settings.get("max_seq_length"), tokenizer.model_max_length, _positions(config)]
        return cls(
            name,
            _checksum(files),
            _without_code(json.loads(config.to_json_string(use_diff=False))),
            pooling,
            int(pad),
            bool(settings.get("do_lower_case", False)),
            int(config.hidden_size),
            min(int(one) for one in (*limits, 8192) if isinstance(one, int) and one > 0),
            backend.to_str(),
            path,
        )


@dataclass(frozen=True)
class TokenEncoder:
    """Encoder of text as tokens, for a text encoder in the towers.

    Attributes:
        declared: the settings.
        model: the description of the text encoder.
        note: summary of the fit.
    """

    declared: TextFeature
    model: PretrainedText
    note: str = ""
    form: ClassVar[Form] = "tokens"

    @cached_property
    def _parser(self) -> Any:
        return self.model.parser(self.most)

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenEncoder:
        """Return itself; see `PretrainedText`."""
        return self

    @classmethod
    def fit(cls, declared: TextFeature, column: pl.Series, place: ErrorLocation) -> TokenEncoder:
        """Read the model's description; the encoder is trained later, with the towers."""
        texts = as_text(column, place).drop_nulls()
        model = PretrainedText.read(declared.model)
        found = cls(declared, model)
        note = f"{model.width} wide, by {Path(declared.model).name}, {declared.train}"
        some = texts.sample(min(len(texts), SAMPLE), seed=0)
        cut = float(((found.encode(some, place) > 0).sum(1) == found.most).mean()) if len(some) else 0.0
        return replace(found, note=note + (f"; {cut:.0%} of the texts have {found.most} tokens or more" if cut else ""))

    @property
    def size(self) -> int:
        """The number of codes: a token's id plus 1, and 0 for padding."""
        return self.model.vocabulary + 1

    @property
    def most(self) -> int:
        """The maximum number of tokens of a text."""
        return min(self.declared.max_tokens, self.model.limit)

    def encode(self, column: pl.Series, place: ErrorLocation) -> NDArray[np.int32]:
        """Encode as in `FeatureEncoder`: token ids plus 1, int32 [rows, longest text], padded with 0.

        A row without text has only zeros.
        """
        texts = as_text(column, place)
        known = texts.drop_nulls()
        if not len(known):
            return np.zeros((len(texts), 1), dtype=np.int32)
        distinct = known.unique().sort()
        tokens = self._tokens([self.declared.prompt + text for text in distinct.to_list()])
        rows = np.zeros((len(texts), tokens.shape[1]), dtype=np.int32)
        rows[texts.is_not_null().to_numpy()] = tokens[distinct.search_sorted(known).to_numpy()]
        return rows

    def _tokens(self, texts: list[str]) -> NDArray[np.int32]:
        ids: list[list[int]] = []
        for start in range(0, len(texts), BLOCK):
            some = [text[: CHARACTERS * self.most] for text in texts[start : start + BLOCK]]
            some = [text.lower() for text in some] if self.model.lower else some
            ids += [one.ids for one in self._parser.encode_batch_fast(some)]
        rows = np.zeros((len(ids), max(1, *map(len, ids))), dtype=np.int32)
        for place, row in enumerate(ids):
            rows[place, : len(row)] = np.asarray(row, dtype=np.int32) + 1
        if rows.max() >= self.size:
            raise InputError(f"text model {self.model.name!r}: its tokenizer has tokens that the model does not know")
        return rows

    def state(self) -> dict[str, Any]:
        """See `FeatureEncoder`."""
        return {"model": self.model.state()}

    @classmethod
    def restore(cls, declared: TextFeature, state: dict[str, Any]) -> TokenEncoder:
        """Restore from the result of `state`.

        Raises:
            ValueError: the state is invalid, or its tokenizer is not readable.
            InputError: the package `tokenizers` is missing.
        """
        found = cls(declared, PretrainedText.restore(state["model"]))
        if found.most < 2:
            raise ValueError("text encoder: reads fewer than 2 tokens")
        try:
            _ = found._parser
        except ModuleNotFoundError as error:
            raise InputError(
                f"text model {declared.model!r:.80}: needs the package {error.name!r}; run {NEEDS}"
            ) from None
        except BaseException as error:  # a panic in the parser, which is written in Rust, is not an Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise ValueError(f"text encoder: the tokenizer is not readable ({error!s:.100})") from None
        return found


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers, which shows progress bars and reports unused weights of other tasks."""
    from transformers.utils import logging as reports  # noqa: PLC0415

    before, bars = reports.get_verbosity(), reports.is_progress_bar_enabled()
    reports.set_verbosity(logging.ERROR)
    reports.disable_progress_bar()
    try:
        yield
    finally:
        reports.set_verbosity(before)
        if bars:
            reports.enable_progress_bar()


def _folder(name: str, *, download: bool) -> Path:
    """Return the folder of a model: the named folder, or a copy of the named repository in the cache.

    Raises:
        InputError: no such folder or repository exists, or the package `huggingface_hub` is missing.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        from huggingface_hub import snapshot_download  # noqa: PLC0415

        found = snapshot_download(
            name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"], local_files_only=not download
        )
    except ModuleNotFoundError as error:
        raise InputError(f"text model {name!r}: needs the package {error.name!r}; run {NEEDS}") from None
    except (OSError, ValueError) as error:
        raise InputError(
            f"text model {name!r:.200}: no such folder, and no model with this name "
            f"{'can be downloaded' if download else 'is in the cache of this machine'} ({_line(error)}); give the "
            "folder of a model"
        ) from None
    return Path(found)


def _weight_files(name: str, folder: Path) -> list[Path]:
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise InputError(f"text model {name!r}: {folder} has no model.safetensors; other formats are not read")
    return files


def _checksum(files: list[Path]) -> str:
    """Return the checksum of one file, or of the checksums of several."""
    digests = [file_sha256(path) for path in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _modules(name: str, folder: Path) -> tuple[str, Path, dict[str, Any]]:
    """Read the layout of a sentence-transformers model: pooling, folder of the transformer, sentence-level settings.

    Raises:
        InputError: modules.json is damaged, the model has parts other than a transformer, a pooling and a
            normalisation, or the pooling is not supported.
    """
    try:
        listed = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        kinds = {str(one["type"]).rsplit(".", 1)[-1]: folder / str(one["path"]) for one in listed}
    except FileNotFoundError:  # a transformers model, whose token vectors are averaged
        return "mean", folder, {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"text model {name!r}: modules.json is not readable ({_line(error)})") from None
    for one in listed:
        if one["path"] != "" and not is_plain(one["path"]):
            raise InputError(
                f"text model {name!r}: modules.json: {one['path']!r:.80} is not the name of a folder in the model"
            )
    others = kinds.keys() - {"Transformer", "Pooling", "Normalize"}
    if others or "Transformer" not in kinds or len(kinds) != len(listed):
        raise InputError(
            f"text model {name!r}: has {', '.join(kinds)}; expected a Transformer, a Pooling and a Normalize; use "
            "train: frozen"
        )
    path = kinds["Transformer"]
    settings = _json(path / "sentence_bert_config.json")
    pooling = _json(kinds["Pooling"] / "config.json") if "Pooling" in kinds else {"pooling_mode": "mean"}
    modes = pooling.get("pooling_mode") or [mode for flag, mode in _FLAGS.items() if pooling.get(flag)]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise InputError(
            f"text model {name!r}: pooling {', '.join(map(str, modes))}; expected one of {', '.join(POOLINGS)}; use "
            "train: frozen"
        )
    if not pooling.get("include_prompt", True):
        raise InputError(f"text model {name!r}: its pooling leaves out the prompt (include_prompt); use train: frozen")
    return modes[0], path, settings


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _positions(config: Any) -> int | None:
    """Return how many token positions a model has; in RoBERTa the positions up to the padding id are not used."""
    most = getattr(config, "max_position_embeddings", None)
    if isinstance(most, int) and config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        return most - int(config.pad_token_id or 0) - 1
    return most if isinstance(most, int) else None


def _without_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out settings that name code, files or number formats."""
    return {
        name: value
        for name, value in config.items()
        if not name.startswith("_") and not name.endswith("implementation") and name not in _DROPPED
    }


def _require_bounded(config: Any, name: str = "config", depth: int = 0) -> int:
    """Check the numbers in a model's settings, so that the model is built in bounded time; return the number of values.

    Raises:
        ValueError: a number is too large, or there are too many values.
    """
    entries = 1
    if isinstance(config, dict | list):
        named = config.items() if isinstance(config, dict) else ((name, one) for one in config)
        for key, value in named:
            entries += _require_bounded(value, str(key), depth + 1) if depth < MOST_DEPTH else MOST_ENTRIES + 1
            if entries > MOST_ENTRIES:
                raise ValueError("text encoder: config has too many values")
    elif isinstance(config, int) and not isinstance(config, bool):
        most = MOST_LAYERS if "layer" in name else MOST_NUMBER
        if abs(config) > most:
            raise ValueError(f"text encoder: {name:.40} is {config:.3g}, expected at most {most:,}")
    return entries


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
