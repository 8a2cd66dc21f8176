"""Tests of the audit of a trained model, through the command line."""

import json
import sys
from dataclasses import replace

import polars as pl
import pytest
import torch
import yaml

from twotower import audit
from twotower.audit.pools import PoolPlan, at_equal_distinct, expected_distinct
from twotower.audit.suggest import candidate_plans
from twotower.cli import main as cli
from twotower.cli.console import console, messages
from twotower.config.run import Config
from twotower.errors import InputError
from twotower.objectives.build import build_pool
from twotower.run import audit_run

QUICK = (
    "training.max_epochs=2",
    "training.batch_size=64",
    "item_tower.dimension=8",
    "data.split=leave-last-out",
    "objective.sources=[{in_batch: {}}, {uniform: {size: 20}}]",
)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, interactions_csv):
    from twotower.run import train_run

    folder = tmp_path_factory.mktemp("audit")
    interactions_csv(folder / "purchases.csv")
    train_run(
        folder / "purchases.csv",
        folder / "run",
        Config.load(None, list(QUICK)),
        progress=False,
        on_message=lambda _: None,
    )
    return folder / "run"


@pytest.fixture
def command(monkeypatch, capsys):
    for shown in (console, messages):
        monkeypatch.setattr(shown, "width", 200)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["twotower", "audit", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return run


def test_the_audit_as_json(run_folder, command):
    others = "in-batch,in-batch-logq,full-softmax,bpr"
    code, out, err = command(run_folder, "--objectives", others, "--rows", 20, "--draws", 50, "--json")
    assert code == 0, err
    found = json.loads(out)
    by_name = {one["name"]: one for one in found["objectives"]}
    assert list(by_name) == ["expected-count", *others.split(",")]
    assert by_name["expected-count"]["own"] and not by_name["in-batch"]["own"]
    assert by_name["in-batch-logq"]["verdict"] == "biased" and by_name["in-batch-logq"]["overall"]["bias"] > 0.03
    assert by_name["full-softmax"]["verdict"] == "no bias found"
    assert by_name["full-softmax"]["overall"]["spread"] < 1e-6
    assert by_name["expected-count"]["overall"]["bias"] < 0.1
    assert by_name["bpr"]["overall"] is None and by_name["bpr"]["verdict"] == "another target"
    deciles = by_name["expected-count"]["deciles"]
    assert len(deciles) == 10 and sum(one["rows"] for one in deciles if one) == 20
    assert [one["source"] for one in found["appearances"]] == ["in-batch", "uniform, 20 draws", "all sources"]
    assert all(one["as_claimed"] for one in found["appearances"])
    assert 0 < found["masks"]["share"] < 0.5 and found["masks"]["is_right"] and found["conclusion"]


def test_the_audit_as_a_table(run_folder, command):
    code, out, err = command(run_folder, "--rows", 10, "--draws", 4)
    assert code == 0, err
    assert "expected-count (its own)" in out and "10 (tail)" in out and "as claimed" in out


@pytest.fixture(scope="module")
def refined_folder(run_folder):
    from twotower.run import train_run

    settings = [*QUICK[:-1], "training.question=next", "evaluation.baselines=false", "objective.name=refined-logq"]
    folder = run_folder.parent
    config = Config.load(None, settings)
    train_run(folder / "purchases.csv", folder / "refined", config, progress=False, on_message=lambda _: None)
    return folder / "refined"


@pytest.mark.slow
def test_the_refined_weight_of_every_row(refined_folder, command, tmp_path):
    file = tmp_path / "new" / "rows.parquet"
    words = ("--objectives", "in-batch", "--rows", 20, "--draws", 40)
    code, out, err = command(refined_folder, *words, "--per-query", file, "--json")
    assert code == 0, err
    own = json.loads(out)["objectives"][0]
    frame = pl.read_parquet(file)
    rows = frame.filter(pl.col("objective") == "refined-logq")
    assert len(rows) == 20 and rows["refined_weight"].null_count() == 0
    assert frame.filter(pl.col("objective") == "in-batch")["refined_weight"].null_count() == 20
    assert own["overall"]["weight"] == pytest.approx(rows["refined_weight"].mean())
    # The estimate of 1 - P(y | x), which is known exactly.
    assert (rows["refined_weight"] - (1 - rows["probability"])).abs().max() < 0.1
    assert set(rows["query"]) <= {f"u{number:03d}" for number in range(60)}
    code, out, err = command(refined_folder, "--rows", 4, "--draws", 2)
    assert code == 0 and "1 - P(y)" in out, err
    code, _, err = command(refined_folder, "--suggest", "--per-query", file)
    assert code == 2 and "--per-query cannot be combined with --suggest" in err


def test_the_refined_weight_of_every_test_query(refined_folder, run_folder):
    from twotower.comparison import evaluate_folder

    evaluate_folder(refined_folder, page=refined_folder / "report.html")
    frame = pl.read_parquet(refined_folder / "per_query.parquet")
    assert frame["refined_weight"].is_between(0, 1).all() and frame["refined_weight"].n_unique() > 10
    page = (refined_folder / "report.html").read_text()
    assert "Row weights of refined logQ" in page and f"{frame['refined_weight'].mean():.3f}" in page
    evaluate_folder(run_folder, page=run_folder / "report.html")
    assert "refined_weight" not in pl.read_parquet(run_folder / "per_query.parquet").columns
    assert "Row weights of refined logQ" not in (run_folder / "report.html").read_text()


def test_the_suggestion(run_folder, command):
    code, out, err = command(run_folder, "--suggest", "--rows", 6, "--draws", 2, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["pools"][0]["name"] == "present" and len(found["pools"]) > 10
    distinct = [one["distinct"] for one in found["pools"]]
    assert max(distinct) - min(distinct) < 0.15 * max(distinct)
    if found["best"] is None:
        assert "keep it" in found["conclusion"] and found["yaml"] is None
    else:
        assert found["best"]["gain"] - 1 > 2 * found["best"]["gain_error"]
        settings = Config.model_validate(yaml.safe_load(found["yaml"]))
        assert settings.objective.sources == found["best"]["sources"]


def test_nothing_is_suggested_if_nothing_is_better(run_folder):
    """Use the whole catalog as the present pool: no pool can have less spread."""
    subject = audit_run(run_folder, rows=6)
    objective = subject.config.objective.model_copy(update={"name": "full-softmax", "sources": [{"catalog": {}}]})
    config = subject.config.model_copy(update={"objective": objective})
    found = audit.suggest(replace(subject, config=config), draws=2)
    assert found.best is None and "keep it" in found.conclusion()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["DIR", "--objectives", "magic"], "unknown objective 'magic'"),
        (["DIR", "--objectives", "logistic-observed"], "positive_label"),
        (["DIR", "--suggest", "--objectives", "in-batch"], "--objectives cannot be combined with --suggest"),
        (["nowhere"], "nowhere: no such folder"),
        (["DIR", "--data", "movielens-9"], "movielens-9"),
    ],
)
def test_bad_usage_is_one_clear_error(run_folder, command, words, message):
    code, out, err = command(*(run_folder if word == "DIR" else word for word in words))
    assert code == 2, out + err
    assert message in " ".join(err.split()) and "Traceback" not in err


def test_other_data_is_refused(run_folder, tmp_path):
    (tmp_path / "other.csv").write_text("user_id,item_id,timestamp\n" + "a,1,1\na,2,2\na,3,3\n" * 3)
    with pytest.raises(InputError, match="not the data this model was trained on"):
        audit_run(run_folder, tmp_path / "other.csv")


def test_binary_objectives_get_no_suggestion(run_folder):
    subject = audit_run(run_folder, rows=4)
    objective = subject.config.objective.model_copy(update={"name": "bpr", "sources": None})
    config = subject.config.model_copy(update={"objective": objective})
    with pytest.raises(InputError, match="does not estimate the softmax"):
        audit.suggest(replace(subject, config=config))


def test_expected_distinct_equals_the_mean_of_draws(planted_split):
    train = planted_split.train
    plan = PoolPlan("mixed", [{"in_batch": {}}, {"head": {"size": 10}}, {"frequency": {"power": 0.5, "size": 30}}])
    counts = torch.from_numpy(train.item_counts())
    for unique in (True, False):
        pool = build_pool(PoolPlan(plan.name, plan.sources, unique).settings(), train)
        torch.manual_seed(0)
        rows = [torch.multinomial(counts.double(), 33, replacement=True) for _ in range(400)]
        # B - 1 = 32 other rows: the first row's own item is not a draw.
        seen = [len(torch.unique(pool.draw(row[1:]).items)) for row in rows]
        expected = expected_distinct(pool, 33)
        assert abs(sum(seen) / 400 - expected) < 0.5
    sized, batch_size = at_equal_distinct(plan, 40, train, batch_size=17)
    assert batch_size == 17
    assert abs(expected_distinct(build_pool(sized.settings(), train), 17) - 40) < 1.0
    assert at_equal_distinct(plan, 5, train, batch_size=17) is None
    assert at_equal_distinct(plan, 1e6, train, batch_size=17) is None


def test_suggested_frequencies_can_draw_items_never_seen():
    everywhere = candidate_plans(50, torch.tensor([3, 2, 1] * 50))
    somewhere = candidate_plans(50, torch.tensor([3, 2, 0] * 50))
    options = [
        [source["frequency"] for plan in plans for source in plan.sources if "frequency" in source]
        for plans in (everywhere, somewhere)
    ]
    assert options[0] and all("floor" not in one for one in options[0])
    assert options[1] and all(one["floor"] == 1.0 for one in options[1])
