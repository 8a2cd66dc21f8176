"""Interactions in two markets: items offered in one, both or every market, some of them only for a time."""

import functools
from datetime import UTC, datetime

import numpy as np
import polars as pl

from twotower.data import Interactions, with_eligibility

EPOCH, DAY = int(datetime(2024, 1, 1, tzinfo=UTC).timestamp()), 86_400
ITEMS, USERS, DAYS = 60, 240, 100
COLUMNS = {"item_groups": "markets", "available_from": "since", "available_until": "until"}
#: The same as settings.
RULE = "data.eligibility={item_groups: markets, available_from: since, available_until: until}"


@functools.cache
def item_table() -> pl.DataFrame:
    """Items 0-19 in FR, 20-39 in both markets, 40-58 in DE, 59 in every; 10-14 and 50-54 from or until some day."""
    offered = [["FR"]] * 20 + [["DE", "FR", "AT"] if j % 2 else ["DE", "FR"] for j in range(20)] + [["DE"]] * 19
    since, until = [None] * ITEMS, [None] * ITEMS
    for j in range(10, 15):
        since[j] = datetime.fromtimestamp(EPOCH + (10 + 20 * (j - 10)) * DAY, tz=UTC)
    for j in range(50, 55):
        until[j] = datetime.fromtimestamp(EPOCH + (60 + 8 * (j - 50)) * DAY, tz=UTC)
    return pl.DataFrame({"item_id": range(ITEMS), "markets": [*offered, None], "since": since, "until": until})


@functools.cache
def frame(travels: bool = False) -> pl.DataFrame:
    """Users of one market (one in ten of both), who buy what they like there; a tenth of the rows has any item.

    If all of them travel, each row is in a random market, so a history does not say in which one a request is, and few
    of them buy what is offered in both.
    """
    rng = np.random.default_rng(7)
    rows, table = [], item_table()
    for user in range(USERS):
        home = "FR" if user % 3 else "DE"
        days = np.sort(rng.integers(0, DAYS, int(rng.integers(6, 14))))
        for day in days.tolist():
            market = home if user % 10 and not travels else ("DE", "FR")[int(rng.integers(2))]
            seconds = EPOCH + day * DAY + int(rng.integers(0, DAY))
            fits = allowed(table, np.arange(ITEMS), np.full(ITEMS, market), np.full(ITEMS, seconds))
            weight = 1.0 / (1.0 + np.roll(np.arange(ITEMS), 7 * (user % 5))) * (fits | (rng.random() < 0.1))
            weight[20:40] *= 0.05 if travels else 1.0
            rows.append((user, int(rng.choice(ITEMS, p=weight / weight.sum())), market, seconds))
    return pl.DataFrame(rows, schema=["user_id", "item_id", "market", "timestamp"], orient="row")


def allowed(table, items, groups, seconds):
    """Say which items are eligible in groups at times, written out: bool [n]."""
    found = []
    for item, group, second in zip(items, groups, seconds, strict=True):
        offered, since, until = table.row(int(item))[1:4]
        at = datetime.fromtimestamp(int(second), tz=UTC)
        found.append(
            (offered is None or group in offered) and (since is None or since <= at) and (until is None or at < until)
        )
    return np.array(found)


@functools.cache
def markets(travels: bool = False) -> Interactions:
    """Return the interactions with their rule."""
    plain = Interactions.from_frame(frame(travels), items=item_table(), catalog="table", columns={"group": "market"})
    return with_eligibility(plain, **COLUMNS)
