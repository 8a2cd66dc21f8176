"""Eligibility of interaction rows: keep the rows that satisfy the rule, and look up the group of each."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import ValidationError

from twotower.config.run import EligibilityConfig
from twotower.data.eligibility import Eligibility, as_group_ids, column_of, memberships
from twotower.data.interactions import Interactions
from twotower.data.schema.account import Account
from twotower.data.schema.vocabulary import Vocabulary, ids_of, listed, texts_of
from twotower.errors import InputError


def with_eligibility(data: Interactions, settings: EligibilityConfig | None = None, **columns: str) -> Interactions:
    """Attach an eligibility rule to interactions, and drop the rows that contradict it.

    A row whose item was not eligible in the row's group at the row's time contradicts the item table: an item
    that must not be offered cannot be a target. Such rows are dropped and counted in the account.

    Args:
        data: the interactions, with an item table.
        settings: the columns of the rule, as in `data.eligibility`; None if they are keyword arguments.
        columns: the columns of the rule as keyword arguments: `item_groups`, `query_group`, `available_from`,
            `available_until`, `stock`; at least one other than `query_group`.

    Raises:
        InputError: a column is missing or has the wrong type; the rows have no groups or no times and the rule needs
            them; or no row is left.
    """
    if settings is None:
        try:
            settings = EligibilityConfig(**columns)
        except ValidationError as error:
            raise InputError(f"data.eligibility: {error.errors()[0]['msg']}") from None
    names = groups = None
    if settings.item_groups is not None:
        names, groups = _groups_of(data, settings)
    rule = Eligibility.of_table(settings, data.item_table, data.num_items, names)
    times = None if rule.start is None or data.timestamps is None else np.asarray(data.timestamps)
    rule.rows(groups, times)  # rejects rows without a group or a time
    account = Account(list(data.account.lines))
    rule.report(account)
    if not rule.governs_rows:
        return replace(data, account=account, eligibility=rule)
    fits = rule.allows(np.asarray(data.item_codes), groups, times)
    account.add(
        "rows not eligible", int((~fits).sum()), "the item was not offered in the row's group or at its time; dropped"
    )
    if not fits.any():
        raise InputError(
            f"data.eligibility: none of the {len(data):,} rows has an item that was eligible in the row's group at its "
            f"time; compare the values of {listed(settings.columns)} with the groups and times of the rows"
        )
    if groups is not None:
        data = replace(data, groups=groups, group_names=names, known_fingerprint=None)
    if not fits.all():
        data = data.select(fits)
    below = data.negatives
    if below is not None and names is not None:
        # Drop the groups of observed negatives: they are codes of the old vocabulary, and nothing reads them.
        below = replace(below, groups=None, group_names=names)
    return replace(data, account=account, eligibility=rule, negatives=below)


def _groups_of(data: Interactions, settings: EligibilityConfig) -> tuple[Vocabulary, NDArray[np.int32]]:
    """Return one vocabulary of the groups of rows and items, and the group of each row."""
    if settings.query_group is not None:
        table = data.query_table
        if table is None:
            raise InputError("data.eligibility.query_group: the data has no query table; pass it with --queries FILE")
        column = column_of(table, settings.query_group, "query_group", "query table")
        owners = column.gather(data.query_codes())
        if owners.null_count():
            raise InputError(
                f"data.eligibility.query_group: {owners.null_count():,} rows have a query without a value in the "
                f"column {settings.query_group!r}; every query needs a group"
            )
        convert = ids_of if owners.dtype.is_integer() else texts_of
        rows = convert(owners, "data.eligibility.query_group")
        ids = rows.unique()
    elif data.groups is not None and data.group_names is not None:
        ids, rows = data.group_names.ids, None
    else:
        raise InputError(
            f"data.eligibility.item_groups: {settings.item_groups!r} needs the group of each row; name the column with "
            "data.columns.group, or with data.eligibility.query_group if it is in the query table"
        )
    if data.item_table is None:
        raise InputError("data.eligibility: the data has no item table; pass it with --items FILE (data.items)")
    offered = memberships(column_of(data.item_table, settings.item_groups or "", "item_groups"))[1]
    if offered.dtype != ids.dtype:
        offered = as_group_ids(offered, ids.dtype, settings.item_groups or "")
    names = Vocabulary(pl.concat([ids.alias("id"), offered.drop_nulls().alias("id")]).unique().sort())
    if rows is not None:
        return names, names.encode(rows).astype(np.int32)
    assert data.groups is not None
    return names, names.encode(ids)[np.asarray(data.groups)].astype(np.int32)
