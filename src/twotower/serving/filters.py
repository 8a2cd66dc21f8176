"""Item filters: allow and deny lists of ids, and conditions on the item table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.data.schema.vocabulary import Vocabulary
from twotower.errors import InputError
from twotower.serving.conditions import Mask, condition_mask
from twotower.serving.queries import codes_of, id_list


def allowed_items(
    items: Vocabulary,
    table: pl.DataFrame | None,
    *,
    condition: str | None = None,
    allow: Sequence[Any] | None = None,
    deny: Sequence[Any] | None = None,
) -> Mask | None:
    """Return the items that pass a condition, an allow list and a deny list.

    Args:
        items: the item vocabulary.
        table: one row for each item code, or None.
        condition: a condition on the columns of the table, such as `country = 'FR' and price < 20`; an item for which
            it is unknown (NULL) does not pass. See `condition_mask`.
        allow: the only ids that may be returned; ids that are not in the catalog are ignored.
        deny: ids that must not be returned; unknown ids are ignored.

    Returns:
        bool [N], or None if every item passes.

    Raises:
        InputError: the condition is invalid (see `condition_mask`) or there is no item table; a list is not a list of
            ids; no id of the allow list is in the catalog.
    """
    mask: Mask | None = None
    if condition is not None:
        mask = condition_mask(condition, table, len(items))
    if allow is not None:
        codes = _known(items, allow, "allow")
        if not len(codes):
            raise InputError("allow: none of its ids is in the catalog; expected at least one known item id")
        listed_items = np.zeros(len(items), dtype=np.bool_)
        listed_items[codes] = True
        mask = listed_items if mask is None else mask & listed_items
    if deny is not None and len(codes := _known(items, deny, "deny")):
        mask = np.ones(len(items), dtype=np.bool_) if mask is None else mask.copy()
        mask[codes] = False
    return mask


def _known(items: Vocabulary, ids: Sequence[Any], name: str) -> NDArray[np.int64]:
    codes = codes_of(items, id_list(ids, name))  # an id of a different type must not make the other ids fail
    return codes[codes >= 0]
