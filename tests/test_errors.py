"""Flags given in Python: a text or a number is rejected before anything is read, computed or replaced."""

import re

import numpy as np
import pytest
from pydantic import ValidationError

import twotower as tt
from twotower.config.run import Config
from twotower.data.loading.slates import Slates
from twotower.errors import InputError, counted, require_flags
from twotower.run.run_folder import train_run
from twotower.serving.batch import recommend_file
from twotower.serving.http.schemas import RecommendRequest


@pytest.mark.parametrize("wrong", ["no", "false", "", 0, 1, None, [], np.int64(1)])
def test_only_true_and_false_are_flags(wrong):
    with pytest.raises(InputError, match="exclude_seen: expected True or False, found"):
        require_flags(exclude_seen=wrong)
    require_flags(exclude_seen=True, force=np.bool_(False))


def test_commands_reject_other_values_before_they_touch_a_file(tmp_path):
    target = tmp_path / "out.csv"
    target.write_text("kept")
    with pytest.raises(InputError, match="force: expected True or False"):
        recommend_file(None, "missing.csv", target, force="no")
    with pytest.raises(InputError, match="replace: expected True or False"):
        train_run("missing.csv", tmp_path, Config(), replace="no")
    with pytest.raises(InputError, match="resume: expected True or False"):
        tt.fit(None, resume="no")
    assert target.read_text() == "kept"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.metric=AUC", "training.metric: expected Recall, NDCG, MRR or HR at K, such as NDCG@10, found 'AUC'"),
        ("training.metric='NDCG@10\\n'", "training.metric: expected Recall, NDCG, MRR or HR at K"),
        (
            "training.time_limit='2 hours'",
            "training.time_limit: expected DD:HH:MM:SS, such as 00:12:00:00, found '2 hours'",
        ),
        ("data.items=' '", "data.items: expected a path, found only blanks"),
    ],
)
def test_a_message_is_a_sentence_not_a_pattern(change, message):
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        Config.load(None, [change.replace("'NDCG@10\\n'", '"NDCG@10\\n"')])
    assert "pattern" not in str(caught.value) and "Value error" not in str(caught.value)


def test_a_blank_text_is_refused_in_words():
    for text, expected in ((" \n", "expected words, found only blanks"), ("", "at least 1 character")):
        with pytest.raises(ValidationError, match=expected):
            RecommendRequest(text=text)
    assert RecommendRequest.model_json_schema()["properties"]["text"]["anyOf"][0]["pattern"] == r"\S"


@pytest.mark.parametrize(
    ("sizes", "end"),
    [([3], "1 further item is cut"), ([4, 3], "3 further items are cut"), ([1], "0 further items are cut")],
)
def test_a_count_agrees_with_its_noun_and_verb(sizes, end):
    ends = np.cumsum(sizes)
    slates = Slates(np.arange(ends[-1]), ends - np.array(sizes), ends, length=2)
    assert f"; {end} (data.feedback.length)" in str(slates)
    assert (counted(1, "row is", "rows are"), counted(0, "row"), counted(1200, "query", "queries")) == (
        "1 row is",
        "0 rows",
        "1,200 queries",
    )
