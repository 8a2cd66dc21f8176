"""Independent reference for the data package, in plain Python loops over tuples."""

from collections import defaultdict
from typing import Any

from twotower.data import Holdout, Interactions

Row = tuple[Any, Any, int]  # query id, item id, time in microseconds


def sequences(rows: list[Row]) -> dict[Any, list[tuple[Any, int]]]:
    """Map query id -> (item id, time), by time and then input order, without repeated (query, item, time)."""
    by_query: dict[Any, list[tuple[int, int, Any]]] = defaultdict(list)
    seen = set()
    for arrival, (query, item, time) in enumerate(rows):
        if (query, item, time) not in seen:
            seen.add((query, item, time))
            by_query[query].append((time, arrival, item))
    return {q: [(item, time) for time, _, item in sorted(found, key=lambda r: r[:2])] for q, found in by_query.items()}


def as_sequences(data: Interactions) -> dict[Any, list[tuple[Any, int]]]:
    """Convert interactions to the form of `sequences`."""
    found: dict[Any, list[tuple[Any, int]]] = {}
    for code, query in enumerate(data.queries.ids.to_list()):
        low, high = int(data.offsets[code]), int(data.offsets[code + 1])
        items = data.items.decode(data.item_codes[low:high]).to_list()
        times = [0] * len(items) if data.timestamps is None else data.timestamps[low:high].tolist()
        if items:
            found[query] = list(zip(items, times, strict=True))
    return found


def as_questions(data: Interactions, holdout: Holdout) -> dict[Any, tuple[list[Any], list[Any]]]:
    """Map query id -> (history, targets) of a holdout."""
    found = {}
    for e, query in enumerate(data.queries.decode(holdout.queries).to_list()):
        history = holdout.history_items[holdout.history_offsets[e] : holdout.history_offsets[e + 1]]
        targets = holdout.target_items[holdout.target_offsets[e] : holdout.target_offsets[e + 1]]
        found[query] = (data.items.decode(history).to_list(), data.items.decode(targets).to_list())
    return found


def distinct(values: list[Any]) -> list[Any]:
    """Remove repeats, keeping the first of each."""
    return list(dict.fromkeys(values))
