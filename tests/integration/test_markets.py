"""Two planted markets: the rule of eligible items from the file to the answer, and the how-to as a reader runs it."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from support.command_line import command
from support.markets import COLUMNS, DAY, EPOCH, ITEMS, USERS, allowed, frame, item_table, markets
from support.service_models import client, drawn
from twotower import run
from twotower.config.run import Config, EligibilityConfig
from twotower.data import Interactions, by_time, with_eligibility
from twotower.errors import InputError
from twotower.evaluation import evaluate
from twotower.index.approximate import index as approximate
from twotower.serving import Retriever, SavedModel, build_stored_index, save_changes
from twotower.serving.batch import recommend_file

HOW_TO = Path(__file__).parents[2] / "docs" / "how-to" / "markets.md"
SMALL = ["item_tower.dimension=16", "training.max_epochs=3", "training.recent_prior=false", "training.start=random"]


def fitted(data, *changes, directory=None, **more):
    split = by_time(data, 0.1, 0.2, cold="keep")
    return run.fit(split, Config.load(None, [*SMALL, *changes]), progress=False, directory=directory, **more)


@pytest.fixture(scope="module")
def model():
    return fitted(markets(), "training.question=next")


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return model.save(tmp_path_factory.mktemp("markets") / "model")


def eligible(items, group, at):
    """Say which items, given by id, are eligible in a group at a date, bool [n]."""
    seconds = int(datetime.fromisoformat(at).replace(tzinfo=UTC).timestamp())
    return allowed(item_table(), items, [group] * len(items), [seconds] * len(items))


class Bare:
    """A model that knows no market: it ranks the whole catalog, and what is not eligible takes places of its lists."""

    def __init__(self, model):
        self.model = model

    def rank(self, holdout, k, exclude_seen):
        return self.model.rank(replace(holdout, eligibility=None), k, exclude_seen)


def test_the_model_without_the_rule_is_measurably_worse_and_shows_what_cannot_be_sold():
    model = fitted(markets(travels=True), "training.question=next")
    # The same rows, so that the rule in training and in ranking is the only difference.
    free = fitted(replace(model.split.data, eligibility=None), "training.question=next")
    test = model.split.test
    wanted = evaluate(model, test, train=model.split.train, ks=(5,), baselines=False)["model"]
    bare_test = replace(test, eligibility=None)
    found = evaluate(Bare(free), bare_test, train=model.split.train, ks=(5,), baselines=False)["model"]
    difference = wanted.per_query["Recall@5"] - found.per_query["Recall@5"]
    error = difference.std() / np.sqrt(len(difference))
    assert difference.mean() > 3 * error > 0, (wanted.values["Recall@5"], found.values["Recall@5"])
    ranked = Bare(free).rank(test, 5, True)
    blocked = test.eligible.blocked_of_rows(torch.from_numpy(ranked)).float().mean()
    assert blocked > 0.1, "the planted markets differ"
    assert not test.eligible.blocked_of_rows(torch.from_numpy(model.rank(test, 5, True))).any()


@pytest.mark.parametrize(
    "changes",
    [
        ("training.question=next",),
        ("training.question=horizon", "training.horizon=9"),
        ("training.question=set", "objective.sources=[{in_batch: {}}, {uniform: {size: 20}}]"),
        ("training.question=next", "objective.frequency=grouped"),
        ("training.question=next", "objective.sources=[{mined: {size: 4}}, {uniform: {size: 8, per_row: true}}]"),
        ("training.question=next", "query_tower.history.sequence={kind: gru}"),
        ("training.question=next", "objective.name=negative-sampling"),
        ("training.question=next", "objective.name=bpr", "objective.frequency=grouped"),
    ],
    ids=["rows", "horizon", "set", "grouped", "mined per row", "sequences", "binary", "pairwise within groups"],
)
def test_no_candidate_of_a_training_run_is_ineligible(changes, monkeypatch):
    from twotower.objectives.base import Objective

    plain, seen = Objective.draw, [0, 0, 0]

    def counted(self, request, **options):
        drawn = plain(self, request, **options)
        own = request.rows if request.rows is not None else slice(0, len(request.positives))
        rows = markets().eligibility.rows(request.groups[own].numpy(), request.times[own].numpy())
        every = drawn.items.expand(len(drawn.positives), -1)
        wrong = rows.blocked_of_rows(every) & ~drawn.mask
        seen[0] += int(wrong.sum())
        seen[1] += int((~drawn.mask).sum())
        if drawn.row_items is not None:
            seen[0] += int((rows.blocked_of_rows(drawn.row_items) & ~drawn.row_mask).sum())
            seen[1] += int((~drawn.row_mask).sum())
        seen[2] += int(rows.blocked_of_rows(drawn.positives[:, None]).sum())
        return drawn

    monkeypatch.setattr(Objective, "draw", counted)
    found = fitted(markets(), *changes, "training.max_epochs=1")
    assert seen[1] > 1000 and seen[0] == seen[2] == 0, seen
    assert found.fit.epochs == 1


def test_small_groups_are_trained():
    rows = frame().with_columns(
        pl.when(pl.col("user_id") == 1).then(pl.lit("AT")).otherwise(pl.col("market")).alias("market")
    )
    data = Interactions.from_frame(rows, items=item_table(), catalog="table", columns={"group": "market"})
    data = with_eligibility(data, **COLUMNS)
    names = data.group_names.ids.to_list()
    few = int((np.asarray(data.groups) == names.index("AT")).sum())
    assert 0 < few < 20
    settings = Config.load(None, [*SMALL, "objective.frequency=grouped", "training.question=next"])
    batches = list(run.make_batches(settings.resolved(len(data)), data))
    small = [batch for batch in batches if batch.group == names.index("AT")]
    assert sum(len(batch) for batch in small) == few


@pytest.mark.parametrize("kind", ["exact", "hnsw", "int8", "binary"])
def test_answers_have_only_what_is_eligible_with_every_index(folder, kind, tmp_path, monkeypatch):
    path = folder
    if kind != "exact":
        path = tmp_path / "model"
        shutil.copytree(folder, path)
        build_stored_index(path, kind, k=10)
        # Otherwise a catalog of this size is searched exactly.
        monkeypatch.setattr(approximate, "NARROW_ITEMS", 0)
        monkeypatch.setattr(approximate, "NARROW_SHARE", 10**9)
    retriever = Retriever.load(path)
    assert retriever.index.kind == kind
    for group in ("FR", "DE", "AT"):
        for at in ("2024-01-05", "2024-03-20", "2024-06-01"):
            for k in (5, ITEMS):
                found = retriever.recommend(list(range(40)), k=k, group=group, time=at, exclude_seen=False)
                fits = eligible(np.arange(ITEMS), group, at)
                assert len(found) == 40 * min(k, fits.sum())
                assert set(found["item"].unique().to_list()) <= set(np.flatnonzero(fits).tolist())
            near = retriever.similar([25], k=ITEMS, group=group, time=at)
            assert set(near["item"].to_list()) == set(np.flatnonzero(fits).tolist()) - {25}


def test_coarse_codes_of_a_large_catalog_keep_to_the_rule(tmp_path, monkeypatch):
    count = 1_200
    offered = [["FR"] if j % 3 == 0 else ["DE"] if j % 3 == 1 else None for j in range(count)]
    rows = pl.DataFrame({"user_id": np.arange(count) % 50, "item_id": np.arange(count), "market": ["FR", "DE"] * 600})
    rows = rows.filter(pl.Series([o is None or m in o for o, m in zip(offered, rows["market"], strict=True)]))
    table = pl.DataFrame({"item_id": range(count), "markets": offered})
    data = Interactions.from_frame(rows, items=table, catalog="table", columns={"group": "market"})
    names = {"groups": ["DE", "FR"], "account": data.account.to_dict()}
    path = drawn(data, tmp_path / "model", changes=["data.eligibility={item_groups: markets}"], data=names)
    build_stored_index(path, "ivfpq", k=10)
    monkeypatch.setattr(approximate, "NARROW_ITEMS", 0)
    monkeypatch.setattr(approximate, "NARROW_SHARE", 10**9)
    retriever = Retriever.load(path)
    for group in ("FR", "DE"):
        found = retriever.recommend(list(range(50)), k=50, group=group)["item"].to_list()
        assert len(found) == 50 * 50
        assert all(offered[item] is None or group in offered[item] for item in found)


def test_a_group_for_each_query_of_a_call(model):
    retriever = model.retriever
    groups = ["FR", "DE", "AT"] * 8
    mixed = retriever.recommend(list(range(24)), k=9, group=groups, time="2024-03-20")
    for place, group in enumerate(groups):
        alone = retriever.recommend([place], k=9, group=group, time="2024-03-20")
        assert mixed.filter(pl.col("query") == place)["item"].to_list() == alone["item"].to_list()
    filtered = retriever.recommend([3], k=ITEMS, group="FR", time="2024-03-20", filter="item_id > 15")
    assert all(item > 15 for item in filtered["item"]) and eligible(filtered["item"], "FR", "2024-03-20").all()


def test_every_wrong_request_is_one_line(model):
    retriever = model.retriever
    for options, words in (
        ({}, "group: expected the group of the request, one of 'AT', 'DE', 'FR'"),
        ({"group": "US"}, "group: 'US' is not a group of this model; expected one of 'AT', 'DE', 'FR'"),
        ({"group": ["FR"] * 3}, "group: expected one group, or one for each query, 2; found 3"),
        ({"group": "FR", "time": "soon"}, "time: 'soon'; expected a date, ISO text or unix time"),
        ({"group": ("FR", ["DE"])}, "group: expected text or an integer, found list"),
        ({"group": "FR", "time": "20240320"}, "expected a date such as 2024-05-31, ISO text or unix time"),
        ({"group": "FR", "time": float("nan")}, "time: nan; expected a date such as"),
        ({"group": "FR", "time": [1]}, "time: expected a date, ISO text or unix time, found list"),
    ):
        with pytest.raises(InputError, match=re.escape(words)) as raised:
            retriever.recommend([1, 2], **options)
        assert "\n" not in str(raised.value)
    with pytest.raises(InputError, match="group: expected the group of the request"):
        retriever.similar([3])


def test_the_service_and_its_page_take_the_group_and_the_time(folder):
    with client(folder) as service:
        summary = service.get("/models").json()["models"][0]
        assert summary["groups"] == ["AT", "DE", "FR"] and summary["has_intervals"] is True
        at = "2024-03-20"
        for group in ("FR", "DE"):
            body = {"query_id": 5, "k": ITEMS, "group": group, "time": at, "exclude_seen": False}
            answer = service.post("/recommend", json=body)
            fits = set(np.flatnonzero(eligible(np.arange(ITEMS), group, at)).tolist())
            assert {one["item"] for one in answer.json()["items"]} == fits
            near = service.post("/similar", json={"item": 25, "k": ITEMS, "group": group, "time": EPOCH + 79 * DAY})
            assert {one["item"] for one in near.json()["items"]} == fits - {25}
        now = service.post("/recommend", json={"query_id": 5, "k": ITEMS, "group": "DE", "exclude_seen": False})
        assert not {50, 51, 52, 53, 54} & {one["item"] for one in now.json()["items"]}, "no longer available today"
        for body, pointer in (
            ({"query_id": 5}, "#/group"),
            ({"query_id": 5, "group": "US"}, "#/group"),
            ({"query_id": 5, "group": "FR", "time": "soon"}, "#/time"),
        ):
            refused = service.post("/recommend", json=body)
            assert refused.status_code == 422, refused.text
            assert refused.json()["errors"][0]["pointer"] == pointer
        assert service.post("/similar", json={"item": 25}).status_code == 422
        held = service.get("/page/held-out", params={"query_id": "5", "group": "FR", "time": at})
        assert held.status_code == 200
        for one in held.json()["items"]:
            assert (one["rank"] is None) >= (not eligible([one["item"]], "FR", at)[0])
        assert service.get("/page/held-out", params={"query_id": "5"}).status_code == 422


def test_a_file_of_requests_has_the_group_of_each_row(folder, tmp_path):
    retriever = Retriever.load(folder)
    groups = ["FR", "DE", "DE", "FR"] * 5
    pl.DataFrame({"user_id": range(20), "market": groups}).write_csv(tmp_path / "in.csv")
    recommend_file(retriever, tmp_path / "in.csv", tmp_path / "out.csv", k=30, time="2024-03-20", block=6)
    found = pl.read_csv(tmp_path / "out.csv")
    assert found["query"].n_unique() == 20
    for query, item in found.select("query", "item").iter_rows():
        assert eligible([item], groups[query], "2024-03-20")[0]
    for query in (0, 7):
        alone = retriever.recommend([query], k=30, group=groups[query], time="2024-03-20")
        assert found.filter(pl.col("query") == query)["item"].to_list() == alone["item"].to_list()
    pl.DataFrame({"user_id": [1, 2], "market": ["FR", "US"]}).write_csv(tmp_path / "wrong.csv")
    with pytest.raises(InputError, match=r"column 'market', row 2: 'US' is not a group of this model"):
        recommend_file(retriever, tmp_path / "wrong.csv", tmp_path / "wrong-out.csv")
    pl.DataFrame({"user_id": [1, 2]}).write_csv(tmp_path / "none.csv")
    with pytest.raises(InputError, match="expected a column 'group' with the group of each request, or --group"):
        recommend_file(retriever, tmp_path / "none.csv", tmp_path / "none-out.csv")
    recommend_file(retriever, tmp_path / "none.csv", tmp_path / "given.csv", group="DE", time="2024-03-20", k=5)
    assert eligible(pl.read_csv(tmp_path / "given.csv")["item"], "DE", "2024-03-20").all()


def test_items_that_join_later_bring_their_columns(folder):
    retriever = Retriever.load(folder)
    width = retriever.artifact.item_embeddings.shape[1]
    vector = retriever.artifact.item_embeddings[25].tolist()
    retriever.catalog.add([{"item_id": 900, "markets": ["DE"], "since": datetime(2024, 3, 1, tzinfo=UTC),
                            "until": None, "embedding": vector}])  # fmt: skip
    assert width == len(vector)

    def offered(group, at):
        return 900 in retriever.recommend([5], k=ITEMS + 1, group=group, time=at)["item"].to_list()

    assert offered("DE", "2024-03-02") and not offered("DE", "2024-02-20") and not offered("FR", "2024-03-02")
    before = retriever.rank(by_time(markets(), 0.1, 0.2).test, 10, True)
    assert np.array_equal(before, Retriever.load(folder).rank(by_time(markets(), 0.1, 0.2).test, 10, True))


def test_the_saved_model_has_the_rule_and_the_split_must_have_it(model, folder):
    loaded = Retriever.load(folder).artifact
    assert loaded.config.data.eligibility.model_dump(exclude_none=True) == COLUMNS
    for name in ("member", "start", "end"):
        assert np.array_equal(getattr(loaded.eligibility, name), getattr(markets().eligibility, name))
    plain = Interactions.from_frame(frame(), items=item_table(), catalog="table", columns={"group": "market"})
    with pytest.raises(
        InputError, match=r"the split was made without this rule; read the data with twotower\.data\.with_eligibility"
    ):
        run.fit(by_time(plain), model.artifact.config, progress=False)


def test_a_continued_model_keeps_the_rule(tmp_path):
    cut = EPOCH + 70 * DAY
    tables = {"items": item_table(), "catalog": "table", "columns": {"group": "market"}}
    old = with_eligibility(Interactions.from_frame(frame().filter(pl.col("timestamp") < cut), **tables), **COLUMNS)
    first = fitted(old, "training.question=next", "training.max_epochs=1", directory=tmp_path / "run")
    new = with_eligibility(Interactions.from_frame(frame(), **tables), **COLUMNS)
    split = run.continue_with(first, new)
    assert split.train.eligibility is not None and split.account.count("rows no longer eligible") == 0
    assert not split.test.eligible.blocked_of_rows(
        torch.from_numpy(split.test.target_items[split.test.target_offsets[:-1]][:, None].astype(np.int64))
    ).any()
    second = run.fit(split, warm_start=first, progress=False)
    assert second.artifact.config.data.eligibility.model_dump(exclude_none=True) == COLUMNS
    evaluate(second, split.test, train=split.train, ks=(5,), baselines=("popularity",))
    found = second.retriever.recommend([5], k=ITEMS, group="DE", time="2024-03-20", exclude_seen=False)
    assert eligible(found["item"], "DE", "2024-03-20").all()


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """Make a folder with the files that the how-to uses, and the settings that it shows."""
    path = tmp_path_factory.mktemp("how-to")
    frame().write_parquet(path / "purchases.parquet")
    item_table().write_parquet(path / "products.parquet")
    pl.DataFrame({"user_id": range(9), "market": ["FR", "DE", "AT"] * 3}).write_csv(path / "requests.csv")
    (block,) = re.findall(r"```yaml\n(.*?)```", HOW_TO.read_text(encoding="utf-8"), re.DOTALL)
    assert len(block.splitlines()) <= 10
    (path / "markets.yaml").write_text(block, encoding="utf-8")
    return path


def test_the_how_to_works_as_written(reader, monkeypatch, capsys):
    text = HOW_TO.read_text(encoding="utf-8")
    (shell,) = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    for line in shell.splitlines():
        assert command(reader, monkeypatch, *shlex.split(line)[1:]) == 0, f"{line}\n{capsys.readouterr()}"
    results = json.loads((reader / "my-model" / "results.json").read_text(encoding="utf-8"))
    assert any("only eligible items are ranked" in note for note in results["notes"])
    today = datetime.now(UTC).strftime("%Y-%m-%d")
    answers, groups = pl.read_csv(reader / "answers.csv"), ["FR", "DE", "AT"] * 3
    assert answers["query"].n_unique() == 9
    assert all(eligible([item], groups[query], today)[0] for query, item in answers.select("query", "item").iter_rows())
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(block, "markets.md", "exec"), {})
    assert command(reader, monkeypatch, "audit", "my-model") == 2
    assert "trained under data.eligibility" in " ".join(capsys.readouterr().err.split())
    assert USERS > 9


def test_what_is_sold_out_is_left_out_of_answers_until_the_catalog_says_otherwise(folder, tmp_path):
    saved = SavedModel.load(folder)
    ids = saved.items.ids
    left = pl.DataFrame({"item_id": ids, "left": pl.Series(np.arange(len(ids)) % 2)})
    data = saved.config.data.model_copy(update={"eligibility": EligibilityConfig(item_groups="markets", stock="left")})
    stocked = replace(
        saved,
        config=saved.config.model_copy(update={"data": data}),
        item_table=saved.item_table.with_columns(left["left"]),
        metadata={name: value for name, value in saved.metadata.items() if name != "config"},
    )
    stocked.save(tmp_path / "stocked")
    retriever = Retriever.load(tmp_path / "stocked")
    everything = {"k": ITEMS, "exclude_seen": False, "group": "FR"}
    answers = set(retriever.recommend([3], **everything)["item"])
    in_france = set(Retriever.load(folder).recommend([3], time="2030-01-01", **everything)["item"])
    assert answers and all(item % 2 for item in answers) and not in_france <= answers
    neighbours = retriever.similar([21], k=ITEMS, group="FR")["item"]
    assert len(neighbours) and all(item % 2 for item in neighbours)
    retriever.catalog.update([{"item_id": 22, "left": 1}, {"item_id": 23, "left": 0}])
    assert set(retriever.recommend([3], **everything)["item"]) == answers - {23} | {22}
    save_changes(retriever.catalog, tmp_path / "stocked")
    with client(tmp_path / "stocked") as service:
        shown = service.post("/recommend", json={"query_id": 3, "k": ITEMS, "exclude_seen": False, "group": "FR"})
        assert {row["item"] for row in shown.json()["items"]} == answers - {23} | {22}
