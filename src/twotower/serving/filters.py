"""Item filters: the rule of the model, allow and deny lists of ids, and conditions on the item table."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from twotower.data.eligibility import Eligibility, times_of
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
        InputError: the condition is invalid (see `condition_mask`) or there is no item table; `allow` or `deny` is not
            a list of ids; no id of `allow` is in the catalog.
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


@dataclass(frozen=True)
class Offer:
    """The part of the catalog that can be offered to one request, given by its group and its time.

    Attributes:
        group: code of the group; None if the model has no groups.
        time: the last time, up to the time of the request, at which an item became available or unavailable, in
            microseconds since 1970, so that requests with the same items have equal offers; None if items have no
            availability intervals.
    """

    group: int | None
    time: int | None

    @classmethod
    def of(cls, rule: Eligibility | None, group: Any = None, moment: Any = None) -> Offer | None:
        """Check the group and the time of a request.

        Args:
            rule: the rule of the model, or None.
            group: id of the group; required if the model has groups.
            moment: a date, ISO text or unix time; None for now.

        Returns:
            The offer; None if the model has no rule.

        Raises:
            InputError: the group is missing or unknown, the time cannot be read, or a group or a time is given to a
                model without groups or availability intervals.
        """
        has_groups = rule is not None and rule.member is not None
        has_times = rule is not None and rule.start is not None
        if group is not None and not has_groups:
            raise InputError(
                "group: this model has no groups; leave it out, or train with data.eligibility.item_groups"
            )
        if moment is not None and not has_times:
            raise InputError(
                "time: the items of this model have no availability intervals; leave it out, or train with "
                "data.eligibility.available_from or available_until"
            )
        if rule is None:
            return None
        if has_groups and group is None:
            raise InputError(f"group: expected the group of the request, one of {rule.known_groups()}")
        return cls(rule.code(group) if has_groups else None, cls.moment(rule, moment) if has_times else None)

    @staticmethod
    def moment(rule: Eligibility, given: Any) -> int:
        """Convert a date, ISO text or unix time to the attribute `time`; None means now.

        Raises:
            InputError: it is not a time.
        """
        return rule.last_change(_microseconds(given))

    def mask(self, rule: Eligibility) -> Mask:
        """Return the items that may be offered, bool [N]."""
        return rule.mask(self.group, self.time)


def both(first: Mask | None, second: Mask | None) -> Mask | None:
    """Combine two masks of allowed items; None allows every item."""
    if first is None or second is None:
        return first if second is None else second
    return first & second


def _microseconds(moment: Any) -> int:
    if moment is None:
        return time.time_ns() // 1000
    if isinstance(moment, bool) or not isinstance(moment, str | int | float | date):
        raise InputError(f"time: expected a date, ISO text or unix time, found {type(moment).__name__}")
    if isinstance(moment, str) and _NUMBER.fullmatch(moment.strip()):
        moment = float(moment)
    is_number = isinstance(moment, int | float)
    # A date without dashes, such as 20240531, would be read as a unix time in the year 1970.
    if is_number and (not math.isfinite(moment) or _COMPACT[0] <= moment <= _COMPACT[1]):
        raise InputError(f"time: {moment!r}; expected a date such as 2024-05-31, ISO text or unix time")
    return int(times_of(pl.Series("time", [moment]), "time", 0)[0])


_COMPACT = (19_000_101, 99_991_231)
_NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?")


def _known(items: Vocabulary, ids: Sequence[Any], name: str) -> NDArray[np.int64]:
    codes = codes_of(items, id_list(ids, name))  # an id of a different type must not make the other ids fail
    return codes[codes >= 0]
