"""The log of the test window, against loops over the rows as they are in the file."""

import numpy as np
import polars as pl
import pytest

from twotower.config.run import Config, ExposureConfig
from twotower.data import Interactions, by_time, exposure_log, leave_last_out, with_events
from twotower.data.splits.exposure import PRIOR_ROWS
from twotower.errors import InputError


def impressions(seed=0, rows=3000):
    """Make rows of what was shown, with a rating of 1 for a click, in time order."""
    rng = np.random.default_rng(seed)
    return pl.DataFrame(
        {
            "user_id": rng.integers(0, 60, rows),
            "item_id": rng.integers(0, 25, rows),
            "timestamp": 1_700_000_000 + np.arange(rows) * 60,
            "rating": (rng.random(rows) < 0.3).astype(float),
            "p": rng.uniform(0.01, 1, rows).round(4),
            "place": rng.integers(1, 4, rows),
            "watched": rng.exponential(size=rows).round(3),
        }
    )


def read(frame, **options):
    options = {"positive_label": 1.0, "context": ["p", "place", "watched"], **options}
    return Interactions.from_frame(frame, **options)


def test_rows_below_the_label_keep_their_context(tmp_path):
    frame = impressions()
    path = tmp_path / "log.csv"
    frame.write_csv(path)
    saved = tmp_path / "saved"
    read(frame).save(saved)
    for data in (
        read(frame),
        Interactions.read(path, positive_label=1.0, context=["p", "place"]),
        Interactions.open(saved),
    ):
        below = data.negatives
        wanted = {
            (u, i, t): p
            for u, i, t, r, p in frame.select("user_id", "item_id", "timestamp", "rating", "p").rows()
            if r < 1
        }
        ids = zip(
            data.queries.decode(below.query_codes()), data.items.decode(below.item_codes), below.timestamps, strict=True
        )
        assert len(below) == len(wanted) == len(below.context)
        for (query, item, time), p in zip(ids, below.context["p"], strict=True):
            assert wanted[query, item, time // 1_000_000] == p


@pytest.mark.parametrize("reward", [None, "watched"])
def test_the_log_has_every_row_of_the_window(reward):
    frame, settings = (
        impressions(),
        ExposureConfig(propensity="p", position="place", examination=[1.0, 0.5, 0.25], reward=reward),
    )
    split = by_time(read(frame), 0.1, 0.2)
    log = exposure_log(split, settings, [2])
    first, second = (cut // 1_000_000 for cut in split.settings["cuts"])
    early = {u for u, t, r in frame.select("user_id", "timestamp", "rating").rows() if t < first and r >= 1}
    look = [1.0, 0.5, 0.25]
    wanted, seen, sums, looks = {}, {}, np.zeros(25), np.zeros(25)
    for user, item, time, rating, p, place, watched in frame.rows():
        got = watched if reward else rating
        if time < first:
            sums[item] += got
            looks[item] += look[place - 1]
        if time < second and rating >= 1:
            seen.setdefault(user, []).append(item)
        if time >= second and user in early:
            wanted.setdefault(user, []).append((item, got, p, look[place - 1]))
    asked = log.asked
    assert split.data.queries.decode(asked.queries).to_list() == sorted(wanted)
    assert any(all(not rating for _, rating, *_ in rows) for rows in wanted.values()) or reward, (
        "a query without a click"
    )
    for row, user in enumerate(sorted(wanted)):
        part = slice(asked.target_offsets[row], asked.target_offsets[row + 1])
        items = split.data.items.decode(asked.target_items[part]).to_list()
        found = list(zip(items, log.rewards[part], log.propensities[part], log.examination[part], strict=True))
        assert found == wanted[user]
        history = asked.history_items[asked.history_offsets[row] : asked.history_offsets[row + 1]]
        assert split.data.items.decode(history).to_list() == seen[user]
        assert set(log.owners[part].tolist()) == {row}
    mean = sums.sum() / looks.sum()
    assert log.item_rewards == pytest.approx((sums + PRIOR_ROWS * mean) / (looks + PRIOR_ROWS))


def test_without_a_propensity_it_is_the_items_share_of_the_querys_rows():
    split = by_time(read(impressions()), 0.1, 0.2)
    log = exposure_log(split, ExposureConfig(position="place", examination=1.0), [2])
    items, owners = log.asked.target_items, log.owners
    for row in range(len(items)):
        own = items[owners == owners[row]]
        assert log.propensities[row] == pytest.approx(np.mean(own == items[row]))
    assert "the share of an item in its query's rows" in log.remark


def test_what_cannot_be_estimated_is_rejected_before_training():
    settings = ExposureConfig(propensity="p")
    frame = impressions()
    split = by_time(read(frame), 0.1, 0.2)
    assert exposure_log(split, None, [10]) is None
    typed = with_events(read(frame.with_columns(event=pl.lit("view")), context=["p", "event"]), "event")
    cases = [
        (leave_last_out(read(frame)), settings, "the split leave_last_out has no window"),
        (by_time(read(frame, positive_label=None), 0.1, 0.2), settings, "every row has the reward 1.*positive_label"),
        (by_time(read(frame, context=None), 0.1, 0.2), settings, r"column 'p' was not read.*context=\['p'\]"),
        (by_time(read(frame.with_columns(p=pl.col("p") * 2)), 0.1, 0.2), settings, r"such as 1\.\d+ in .*\(0, 1\]"),
        (by_time(read(frame.with_columns(p=pl.lit(0.0))), 0.1, 0.2), settings, r"such as 0 in .*\(0, 1\]"),
        (by_time(read(frame.with_columns(p=pl.lit(None, pl.Float64))), 0.1, 0.2), settings, "has None; expected"),
        (by_time(typed, 0.1, 0.2), settings, "with data.events a shown item may have rewards of several event types"),
        (split, ExposureConfig(position="watched", examination=1.0), "expected whole numbers"),
        (split, ExposureConfig(position="place", examination=[1.0, 0.5]), "position 10; expected .* from 1 to 2"),
    ]  # fmt: skip
    for made, wrong, message in cases:
        with pytest.raises(InputError, match=message) as error:
            exposure_log(made, wrong, [10])
        assert "\n" not in str(error.value)


def test_settings_that_describe_no_policy_are_rejected():
    for text, message in (
        ("{reward: r}", "expected a column: propensity, or position with examination"),
        ("{position: place}", "position and examination are needed together"),
        ("{propensity: p, examination: 1.0}", "position and examination are needed together"),
    ):
        with pytest.raises(InputError, match=message):
            Config.load(None, [f"evaluation.exposure={text}"])
