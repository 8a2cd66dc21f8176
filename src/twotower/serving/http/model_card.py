"""The model card: data, configuration, training, metrics and audit of a model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from twotower.serving.http.models import ServedModel

#: File with the audit, next to `metadata.json` or in the run folder: `twotower audit DIR --json > DIR/audit.json`.
AUDIT = "audit.json"

_LARGEST_AUDIT = 4 * 1024 * 1024
_FOLDERS = re.compile(r"(?<![\w.:/])/(?:[^\s/'\"]+/)+")


def card(model: ServedModel) -> dict[str, Any]:
    """Build the card of a model as JSON values, without folder names of this machine."""
    metadata, config = model.artifact.metadata, model.artifact.config
    data, split = metadata.get("data", {}), metadata.get("split", {})
    found = {
        "name": model.name,
        "version": model.version,
        "created": metadata.get("created"),
        "versions": metadata.get("versions", {}),
        "data": {
            "source": data.get("source"),
            "fingerprint": data.get("fingerprint"),
            "account": data.get("account", {}).get("lines", []),
        },
        "split": {
            "name": split.get("name"),
            "settings": split.get("settings", {}),
            "account": split.get("account", {}).get("lines", []),
        },
        "model": {
            "objective": config.objective.model_dump(mode="json", exclude_none=True),
            "query_tower": config.query_tower.model_dump(mode="json", exclude_none=True),
            "item_tower": config.item_tower.model_dump(mode="json", exclude_none=True),
            "temperature": model.search.dial.temperature,
            "num_queries": len(model.artifact.queries),
            "num_items": len(model.artifact.items),
        },
        "training": metadata.get("training", {}),
        "refit": metadata.get("refit"),
        "metrics": metadata.get("metrics"),
        "audit": read_audit(model.folder),
    }
    cleaned: dict[str, Any] = without_folders(found)
    return cleaned


def read_audit(folder: Path) -> Any:
    """Read the audit JSON in the model folder or the folder that contains it; None if it is missing or unreadable."""
    for path in (folder / AUDIT, folder.parent / AUDIT):
        try:
            if path.stat().st_size <= _LARGEST_AUDIT:
                return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
    return None


def without_folders(value: Any) -> Any:
    """Strip folders from file paths in all strings of a JSON value."""
    if isinstance(value, str):
        return _FOLDERS.sub("", value)
    if isinstance(value, dict):
        return {name: without_folders(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(one) for one in value]
    return value
