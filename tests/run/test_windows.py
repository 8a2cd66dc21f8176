"""Rolling test windows: every window is what its own run would be, on rows before it alone."""

import json

import numpy as np
import pytest

import twotower as tt
from support.slow_reference import as_questions, as_sequences
from twotower import run
from twotower.comparison import compare_run, evaluate_folder
from twotower.config.run import Config
from twotower.data import by_time, rolling
from twotower.errors import InputError
from twotower.run import split_data, train_run

SMALL = ["training.batch_size=64", "training.max_epochs=1", "training.accelerator=cpu", "item_tower.dimension=16"]
WINDOWS = [*SMALL, "data.windows=3", "data.validation=0.1", "data.test=0.15"]


@pytest.fixture(scope="module")
def purchases(tmp_path_factory, interactions_csv):
    return interactions_csv(tmp_path_factory.mktemp("windows") / "purchases.csv")


@pytest.fixture(scope="module")
def trained(purchases):
    out = purchases.parent / "run"
    _, measured = train_run(purchases, out, Config.load(None, WINDOWS), progress=False, on_message=lambda message: None)
    return out, measured


@pytest.mark.parametrize("windows", [1, 2, 4])
def test_a_window_is_the_split_of_the_rows_before_its_end(planted_data, windows):
    splits = list(rolling(planted_data, 0.1, 0.15, windows=windows))
    times = np.sort(planted_data.timestamps)
    n = len(times)
    assert len(splits) == windows
    for number, split in enumerate(splits):
        later = (windows - 1 - number) * 0.15
        end = times[round(n * (1 - later))] if later else np.inf
        begin, validated = (times[round(n * (1 - later - share))] for share in (0.15, 0.25))
        assert split.settings["cuts"] == [validated, begin]
        assert split.train.timestamps.max() < validated <= split.validation.query_times.min()
        assert split.test.query_times.min() >= begin
        assert split.data.timestamps.max() < end
        if number:
            assert splits[number - 1].data.timestamps.max() < begin, "windows follow each other"
        rows = {
            query: {item for item, time in line if begin <= time < end}
            for query, line in as_sequences(planted_data).items()
        }
        for query, (history, targets) in as_questions(planted_data, split.test).items():
            assert set(targets) <= rows[query] and len(history) == sum(
                time < begin for _, time in as_sequences(planted_data)[query]
            )
    whole, last = by_time(planted_data, 0.1, 0.15), splits[-1]
    assert as_sequences(whole.train) == as_sequences(last.train)
    assert as_questions(planted_data, whole.test) == as_questions(planted_data, last.test)


def test_every_window_is_measured_as_its_own_run(planted_data, trained):
    _, measured = trained
    table = measured.windows
    assert table is not None and len(table.begins) == 3
    splits = list(rolling(planted_data, 0.1, 0.15, windows=3, histories=True))
    model = tt.fit(splits[0], Config.load(None, SMALL), progress=False)
    first = tt.evaluate(model, splits[0].test)
    for row in first.rows:
        for metric in ("NDCG@10", "Recall@20"):
            assert table.rows[row.name][metric].by_window[0] == pytest.approx(row.values[metric])
    for row in measured.rows:
        assert table.rows[row.name]["NDCG@10"].by_window[2] == pytest.approx(row.values["NDCG@10"])
    assert "window 3" in str(measured) and "3 test windows, from " in str(measured)


def test_evaluate_repeats_the_table(trained):
    out, measured = trained
    results = json.loads((out / "results.json").read_text())
    assert results["windows"]["rows"]["model"]["NDCG@10"]["by_window"]
    assert evaluate_folder(out).to_dict() == results == measured.to_dict()


def test_finished_windows_are_kept_when_a_run_is_resumed(purchases, trained):
    out, measured = trained
    written = (out / "windows" / "1" / "per_query.parquet").stat().st_mtime_ns
    (out / "windows" / "2" / "per_query.parquet").unlink()
    _, again = train_run(
        purchases, out, Config.load(None, WINDOWS), resume=True, progress=False, on_message=lambda message: None
    )
    assert (out / "windows" / "1" / "per_query.parquet").stat().st_mtime_ns == written
    assert again.to_dict() == measured.to_dict()


def test_windows_are_rejected_where_they_have_no_meaning(planted_data, purchases, trained, tmp_path):
    for change in ("data.split=random", "data.split=leave-last-out"):
        with pytest.raises(InputError, match=r"^data\.windows: 3: test windows are consecutive in time"):
            split_data(planted_data, Config.load(None, [*WINDOWS, change]).data)
    with pytest.raises(InputError, match="expected at least 1 window, and a sum below 1"):
        list(rolling(planted_data, 0.1, 0.4, windows=3))
    with pytest.raises(InputError, match=r"^data\.windows: objectives are compared on one window"):
        compare_run(purchases, tmp_path / "x", Config.load(None, WINDOWS), ["in-batch"])
    assert Config.load(None, [], base=run.settings_of(trained[0])).data.windows == 1
    with pytest.raises(InputError, match=r"^data\.windows: a continued model is tested"):
        run.continue_with(trained[0], planted_data, Config.load(None, WINDOWS))
