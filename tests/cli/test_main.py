"""The command line end to end: files in, tables or JSON out, clear errors with the right exit code."""

import errno
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import get_type_hints

import polars as pl
import pytest
import typer

import twotower as tt
from support import command_line
from support.service_models import drawn
from twotower.cli import main as cli
from twotower.cli.options import PATHS
from twotower.config.run import Config
from twotower.errors import InputError

QUICK = [
    "--set",
    "training.max_epochs=3",
    "--set",
    "training.batch_size=64",
    "--set",
    "item_tower.dimension=16",
    "--set",
    "training.learning_rate=0.01",
    "--set",
    "objective.sources=[{in_batch: {}}, {uniform: {size: 20}}]",
    "--set",
    "data.split=leave-last-out",
]


def twotower(*words, cwd=None):
    """Run the command in its own process."""
    return subprocess.run(
        [sys.executable, "-m", "twotower", *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "COLUMNS": "200"},
    )


@pytest.fixture
def command(run_folder, monkeypatch, capsys):
    """Run the command in this process, which saves the imports: `command(words) -> (exit code, stdout, stderr)`."""
    monkeypatch.chdir(run_folder)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["twotower", *map(str, words)])
        cli._STATE["debug"] = False
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return run


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, interactions_csv):
    folder = tmp_path_factory.mktemp("cli")
    interactions_csv(folder / "purchases.csv")
    words, out, err = (
        ["purchases.csv", "--items", "products.csv", "--out", "run", *QUICK, "--json"],
        StringIO(),
        StringIO(),
    )
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setenv("COLUMNS", "200")
        assert command_line.command(folder, patch, "train", *words) == 0, err.getvalue()
    assert {row["name"] for row in json.loads(out.getvalue())["rows"]} >= {"model", "popularity"}
    assert "leak through time" in err.getvalue(), "the account of the split goes to stderr; stdout has only JSON"
    return folder


def test_train_writes_a_complete_run_folder(run_folder):
    run = run_folder / "run"
    assert {path.name for path in run.iterdir()} == {
        "config.yaml",
        "inputs.json",
        "model",
        "results.json",
        ".twotower-run",
        "checkpoints",
        "logs",
    }
    assert Config.load(run / "config.yaml").training.max_epochs == 3
    assert (run / "logs" / "metrics.csv").read_text().count("\n") > 3


def test_the_saved_config_reproduces_the_model(run_folder, command):
    code, _, err = command("train", "purchases.csv", "--config", "run/config.yaml", "--out", "again")
    assert code == 0, err
    weights = [(run_folder / run / "model" / "towers.safetensors").read_bytes() for run in ("run", "again")]
    assert weights[0] == weights[1]


@pytest.fixture(scope="module")
def parts(run_folder):
    """Write a ready-made split of the purchases: users of the test without training rows, too."""
    folder = run_folder / "parts"
    folder.mkdir()
    header, *rows = (run_folder / "purchases.csv").read_text().splitlines()
    chosen = {name: [row for place, row in enumerate(rows) if place % 10 in places]
              for name, places in (("train", range(7)), ("valid", (7, 8)), ("test", (9,)))}  # fmt: skip
    chosen["valid"].append("new in validation,4,1650000000")
    chosen["test"] += ["new in validation,6,1660000000", "new in test,8,1660000000"]
    for name, part in chosen.items():
        (folder / f"{name}.csv").write_text("\n".join([header, *part]) + "\n")
    return folder


def test_a_ready_made_split_is_trained_from_its_folder_or_from_named_files(run_folder, parts, command):
    settings = QUICK[:-2]
    code, out, err = command("train", "parts", "--out", "ready", *settings, "--json")
    assert code == 0, err
    assert "queries without training rows 2 kept; 1 of them have no history at all" in " ".join(err.split())
    folder = json.loads(out)
    code, out, err = command(
        "train", "parts/train.csv", "--validation", "parts/valid.csv", "--test", "parts/test.csv", "--out", "named",
        *settings, "--json",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out) == folder
    assert json.loads((run_folder / "named" / "inputs.json").read_text()).keys() == {
        f"parts/{name}.csv" for name in ("train", "valid", "test")
    }
    assert json.loads(command("evaluate", "named", "--json")[1]) == folder
    assert json.loads(command("evaluate", "ready", "--json")[1]) == folder
    code, _, err = command("train", "parts/train.csv", "--test", "parts/test.csv", "--out", "no-validation", *settings)
    assert code == 0, err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["train", "purchases.csv", "--validation", "parts/valid.csv"],
            "so the test must be a file too; pass --test FILE",
        ),
        (["train", "purchases.csv", "--test", "parts/none.csv"], "test file parts/none.csv: no such file"),
        (["train", "parts", "--set", "data.item_ids=codes"], "data.item_ids: a split from train and test files"),
        (["train", "parts", "--from", "run"], "parts: a ready-made split; with --from, DATA must be new interactions"),
        (["train", "purchases.csv", "--from", "run", "--set", "data.split=random"], "data.split=random: its"),
        (["train", "parts", "--set", "data.test=1.5"], "less than 1 or Input should be a valid string, found 1.5"),
    ],
)
def test_bad_splits_are_one_clear_error(run_folder, parts, command, words, message):
    code, out, err = command(*words, "--out", "x")
    assert code == 2, out + err
    assert message in " ".join(err.split())
    assert not (run_folder / "x" / "model").exists()


def test_a_folder_with_half_a_split_says_what_is_missing(run_folder, parts, command):
    for name in ("train", "valid", "validation"):
        (run_folder / "half").mkdir(exist_ok=True)
        (run_folder / "half" / f"{name}.csv").write_text((parts / "train.csv").read_text())
    assert "valid.csv and validation.csv could each be the validation" in command("train", "half", "--out", "x")[2]
    (run_folder / "half" / "validation.csv").unlink()
    assert "without a test file; add test.csv" in " ".join(command("train", "half", "--out", "x")[2].split())


def test_random_rows_are_trained_and_evaluated_again(run_folder, command):
    rows = sorted({tuple(row.split(",")[:2]) for row in (run_folder / "purchases.csv").read_text().split()[1:]})
    rows.sort(key=lambda row: (row[0], int(row[1])))
    (run_folder / "sorted.csv").write_text("user_id,item_id\n" + "".join(f"{user},{item}\n" for user, item in rows))
    code, out, err = command(
        "train",
        "sorted.csv",
        "--out",
        "random",
        *QUICK[:-1],
        "data.split=random",
        "--json",
    )
    assert code == 0, err
    assert "sorted by item id" in err and "shuffled, and their order is not used" in " ".join(err.split())
    assert json.loads(command("evaluate", "random", "--json")[1]) == json.loads(out)
    code, _, err = command("train", "sorted.csv", "--out", "x", *QUICK)
    assert code == 2 and "use data.split=random" in " ".join(err.split())


def test_evaluate_repeats_the_result(run_folder, command):
    code, out, err = command("evaluate", "run", "--json")
    assert code == 0, err
    assert json.loads(out) == json.loads((run_folder / "run" / "results.json").read_text())
    assert "item-kNN" in command("evaluate", "run")[1]


def test_the_dial_is_chosen_on_validation(command):
    validation, test = (json.loads(command("dial", "run", "--on", on, "--json")[1]) for on in ("validation", "test"))
    assert (validation["holdout"], test["holdout"]) == ("validation", "test")
    best = max(point["ndcg"] for point in validation["points"])
    assert best in [point["ndcg"] for point in validation["points"] if point["popularity"] == validation["best"]]
    assert "NDCG@20 is highest at" in command("dial", "run")[1]


def test_recommend_and_similar(command):
    found = json.loads(command("recommend", "run", "--query", "u001", "-k", 3, "--json")[1])
    assert [row["rank"] for row in found] == [1, 2, 3] and all("title" in row for row in found)
    table = command("recommend", "run", "--query", "u001", "--query", "u002")[1]
    assert "u001" in table and "u002" in table and "Item number" in table
    _, out, err = command("recommend", "run", "--history", "1, 3,999", "-k", 4, "--json")
    assert len(json.loads(out)) == 4 and "no such item: '999'; ignored. Ids look like" in " ".join(err.split())
    assert len(json.loads(command("similar", "run", "--item", "4", "-k", 2, "--json")[1])) == 2


@pytest.mark.parametrize("name", ["m_out[1]", "model*", "what?", "{a,b}", "~", "$HOME", "%41", "a#b", "a b"])
def test_folders_and_files_with_any_name(run_folder, command, name):
    """A name is never a pattern or an address: a model is found again, and so are its queries and answers."""
    shutil.copytree(run_folder / "run", run_folder / name)
    (run_folder / f"{name}.csv").write_text("query\nu001\nu002\n")
    assert command("recommend", name, "--query", "u001", "--json") == command(
        "recommend", "run", "--query", "u001", "--json"
    )
    code, _, err = command("recommend", name, "--input", f"{name}.csv", "--output", f"{name}.parquet", "-k", 2)
    assert code == 0, err
    with (run_folder / f"{name}.parquet").open("rb") as stream:
        assert pl.read_parquet(stream)["query"].to_list() == ["u001", "u001", "u002", "u002"]


def test_the_version_and_the_public_names(command):
    assert command("--version")[:2] == (0, f"twotower {tt.__version__}\n")
    assert set(tt.__all__) <= set(dir(tt)), "completion offers what is imported when first used"


def test_doctor_and_datasets(command):
    assert json.loads(command("doctor", "--json")[1])["versions"]["torch"]
    assert "cores" in command("doctor")[1]
    names = {row["name"] for row in json.loads(command("datasets", "--json")[1])}
    assert {"movielens-100k", "movielens-1m", "complete-journey"} <= names


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "nowhere.csv", "--out", "x"], "nowhere.csv"),
        (["train", "purchases.csv", "--out", "run"], "run: already contains a model"),
        (["train", "purchases.csv", "--out", "x", "--config", "no.yaml"], "no.yaml: no such configuration file"),
        (["train", "purchases.csv", "--out", "x", "--set", "training.max_epochs=0"], "field training.max_epochs"),
        (["train", "purchases.csv", "--out", "x", "--set", "training.speed=9"], "training.speed: no such setting"),
        (["train", "x", "--out", "x", "--set", "data.colums.query=u"], "mean data.columns? Expected one of items,"),
        (["train", "x", "--out", "x", "--set", "query_tower.history.lenght=9"], "mean query_tower.history.length?"),
        (
            ["train", "purchases.csv", "--out", "x", "--set", "training.batch_size=0"],
            "than 0 or Input should be 'auto', found 0",
        ),
        (
            ["train", "purchases.csv", "--out", "x", "--set", "training.table_placement={item: rowwise}"],
            "field training.table_placement.item: Input should be 'auto', 'replicated', 'row-wise' or",
        ),
        (["train", "purchases.csv", "--out", "x", "--set", "nonsense"], "expected section.key=value"),
        (["train", "--nonsense"], "--nonsense"),
        (["train", "purchases.csv", "--out", "x", "--set", "objective=magic"], "unknown objective 'magic'"),
        (["train", "purchases.csv", "--out", "x", "--set", "objective.sources=[{magic: {}}]"], "unknown source"),
        (["train", "purchases.csv", "--out", "x", "--set", "objective.sources=[{uniform: {sise: 2}}]"], "sise"),
        (["train", "purchases.csv", "--out", "x", "--resume"], "no checkpoint to resume from"),
        (["train", "purchases.csv", "--out", "purchases.csv"], "purchases.csv: is a file; choose a folder for --out"),
        (
            ["train", "purchases.csv", "--out", "run", "--resume", "--set", "training.learning_rate=0.5"],
            "training.learning_rate is 0.01, but 0.5 was requested, and --resume would not apply it",
        ),
        (["evaluate", "nowhere"], "nowhere: no such folder"),
        (["evaluate", "."], "no model in this folder"),
        (["recommend", "run", "--query", "nobody"], "query 'nobody'"),
        (["recommend", "run"], "expected --query, --text, --history, --features or --context; found none of them"),
        (["similar", "run", "--item", "999"], "item '999'"),
        # Bytes of the command line that are not UTF-8
        (["recommend", "run", "--query", "\udcff"], r"query '\udcff': unknown to this model"),
        (["recommend", "run", "--history", "\udcff"], "an id that is not valid Unicode"),
        (["similar", "run", "--item", "\udcff"], r"item '\udcff': unknown to this model"),
        (["recommend", "run", "--query", "u001", "--filter", "\udcff = 1"], r"filter '\udcff = 1'"),
        (["recommend", "run", "--query", "u001", "--allow", "\udcff"], "allow: none of its ids is in the catalog"),
        (
            ["recommend", "run", "--query", "u001", "--context", '{"a": "\udcff"}'],
            "this model does not use a request context",
        ),
        (["recommend", "\udcff", "--query", "1"], "no such folder"),
        (["recommend", "run", "--history", '"' + "x" * 200_000], "an id of more than 131,072 characters"),
        (["recommend", "run", "--query", "u001", "--context", "[" * 9000], "[[[: not valid JSON ("),
        (["train", "\udcff", "--out", "x"], "no such file, folder or data set"),
        (["train", "purchases.csv", "--out", "x", "--config", "\udcff"], "no configuration file or preset"),
        (["train", "purchases.csv", "--out", "x", "--set", "data.columns.query=\udcff"], "the value is not valid YAML"),
        (["datasets", "movielens-9"], "movielens-9"),
    ],
)
def test_bad_usage_is_one_clear_error(run_folder, command, words, message):
    code, out, err = command(*words)
    assert code == 2, out + err
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert not (run_folder / "x" / "model").exists()


def test_exit_codes_of_the_real_process(run_folder):
    assert twotower("evaluate", "nowhere", cwd=run_folder).returncode == 2
    assert "Traceback" in twotower("--debug", "evaluate", "nowhere", cwd=run_folder).stderr


def test_an_interrupted_run_is_not_overwritten(run_folder, command):
    (run_folder / "cut" / "checkpoints" / "last.ckpt").mkdir(parents=True)
    (run_folder / "cut" / "checkpoints" / "last.ckpt" / "state.json").touch()
    code, _, err = command("train", "purchases.csv", "--out", "cut")
    assert code == 2 and "pass --resume to continue it, or --force to start over" in " ".join(err.split())
    (run_folder / "mine" / "model").mkdir(parents=True)
    (run_folder / "mine" / "model" / "notes.txt").touch()
    code, _, err = command("train", "purchases.csv", "--out", "mine", "--force")
    assert code == 2 and "mine/model: exists and contains no model" in " ".join(err.split())
    (run_folder / "config.yaml").write_text("theme: mine\n")
    code, _, err = command("train", "purchases.csv", "--out", ".")
    (run_folder / "config.yaml").unlink()
    assert code == 2 and "config.yaml: exists and does not belong to a run" in " ".join(err.split())
    code, _, err = command("recommend", "cut", "--query", "u001")
    assert code == 2 and "resume with `twotower train DATA --out cut --resume`" in " ".join(err.split())


def test_validation_without_targets_is_refused_before_training(run_folder, command):
    rows = [f"q{query},i{(query + step) % 9}" for query in range(12) for step in (0, 1, 2, 0, 1)]
    (run_folder / "repeats.csv").write_text("\n".join(["query,item", *rows]) + "\n")
    words = ["train", "repeats.csv", "--out", "repeats", "--set", "data.split=leave-last-out"]
    code, _, err = command(*words)
    message = " ".join(err.split())
    assert code == 2 and "validation: no query has a target that can be ranked" in message
    assert "12 targets were already in the query's history" in message and "evaluation.exclude_seen=false" in message
    assert not (run_folder / "repeats").exists()


def test_a_single_process_command_is_refused_under_torchrun(command, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = command("similar", "run", "--item", "4")
    assert code == 2 and "torchrun: `twotower similar` runs in one process" in " ".join(err.split())
    code, _, err = command("evaluate", "run", "--qrels", "judged.tsv", "--queries", "queries.tsv")
    assert code == 2 and "torchrun: judged queries are evaluated in one process" in " ".join(err.split())
    code, _, err = command("recommend", "run", "--text", "words")
    assert code == 2 and "torchrun: the processes divide a file of queries" in " ".join(err.split())


def test_an_internal_error_exits_with_code_one(command, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("a wheel came off")

    monkeypatch.setattr("twotower.serving.Retriever.load", broken)
    code, _, err = command("similar", "run", "--item", "4")
    assert code == 1 and "a wheel came off" in err and "Traceback" not in err
    assert "(internal error; twotower --debug COMMAND ... prints the traceback)" in " ".join(err.split())
    with pytest.raises(RuntimeError, match="a wheel came off"):  # as the hint says: --debug before the command
        command("--debug", "similar", "run", "--item", "4")


def test_a_panic_of_polars_is_an_internal_error_too(command, monkeypatch):
    """PanicException is not an Exception, so it would pass most handlers."""

    def broken(*args, **kwargs):
        raise pl.exceptions.PanicException("assertion failed")

    monkeypatch.setattr("twotower.serving.Retriever.load", broken)
    code, _, err = command("similar", "run", "--item", "4")
    assert code == 1 and "PanicException: assertion failed (internal error" in " ".join(err.split())


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "twotower: not enough memory; lower training.batch_size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), "not enough memory (Default"),
        (OSError(errno.ENOSPC, "No space left on device"), "twotower: output: No space left on device"),
    ],
)
def test_what_the_machine_lacks_is_no_internal_error(command, monkeypatch, error, message):
    def broken(*args, **kwargs):
        raise error

    monkeypatch.setattr("twotower.serving.Retriever.load", broken)
    code, _, err = command("similar", "run", "--item", "4")
    assert code == 2 and message in " ".join(err.split()) and err.count("\n") == 1


@pytest.mark.parametrize("text", ["training: [1", "- a\n- b", "training:\n  seed: -1", "training:\n  precision: 8"])
def test_a_wrong_config_names_the_file(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match="c.yaml"):
        Config.load(path)


def test_overrides_and_round_trip(tmp_path):
    config = Config.load(None, ["objective=expected-count", "objective.unique=false", "evaluation.ks=[5]"])
    assert config.objective.name == "expected-count" and not config.objective.unique
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert Config.load(tmp_path / "c.yaml") == config


TITLES = ("Song [live] 17", "AC/DC [/b] 2", "[link=https://evil.example]x[/link]", "\x1b]0;owned\x07", "a\u202eb")


def test_titles_are_shown_as_text_in_every_command(planted_data, tmp_path, monkeypatch, capsys):
    """Brackets stay, nothing fails on `[/b]`, and no escape sequence reaches the terminal."""
    table = planted_data.item_table.with_columns(title=pl.Series([TITLES[j % 5] for j in range(100)]))
    folder = drawn(planted_data, tmp_path / "model", table=table)
    for words in (
        ["recommend", folder, "--query", "u001", "-k", "30"],
        ["recommend", folder, "--history", "1,2,3", "-k", "30"],
        ["similar", folder, "--item", "1", "-k", "30"],
        ["explain", folder, "--query", "u001", "--item", "1"],
        ["recommend", folder, "--query", "u001", "-k", "30", "--json"],
    ):
        monkeypatch.setattr(sys, "argv", ["twotower", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        assert not stop.value.code, err
        assert "\x1b" not in out and "\x07" not in out and "\u202e" not in out
        if words[0] != "explain":
            assert "[live]" in out and "[/b]" in out and "\\u202e" in out
    monkeypatch.setattr(sys, "argv", ["twotower", "recommend", str(folder), "--query", "[/b]\x1b[31m"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and "\x1b[31m" not in capsys.readouterr().err


def test_k_is_at_most_the_catalog(planted_data, tmp_path, monkeypatch, capsys):
    folder = drawn(planted_data, tmp_path / "model")
    for command in (["recommend", "--query", "u001", "--keep-seen"], ["similar", "--item", "1"]):
        monkeypatch.setattr(
            sys, "argv", ["twotower", command[0], str(folder), *command[1:], "-k", "1000000000", "--json"]
        )
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        assert not stop.value.code, err
        assert len(json.loads(out)) == (100 if command[0] == "recommend" else 99)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["recommend"], "--query, --text, --history, --features or --context"),
        (["explain", "--item", "1"], "--query, --history or --context"),
    ],
)
def test_a_request_without_a_query_names_all_inputs(tmp_path, monkeypatch, capsys, words, names):
    monkeypatch.setattr(sys, "argv", ["twotower", words[0], str(tmp_path), *words[1:]])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    text = capsys.readouterr().err
    assert stop.value.code == 2 and f"expected {names}; found none of them" in " ".join(text.split())


def test_a_path_that_the_system_rejects_is_no_internal_error(command):
    for words in (
        ("train", "x" * 300 + ".csv", "--out", "o"),
        ("evaluate", "y" * 300),
        ("recommend", "z" * 300, "--query", "1"),
    ):
        code, _, err = command(*words)
        assert code == 2 and "File name too long" in err and "internal error" not in err and err.count("\n") == 1


def test_no_path_may_be_blank(command):
    checked = set()
    for name, subcommand in typer.main.get_command(cli.app).commands.items():
        kinds = get_type_hints(subcommand.callback)
        for param in subcommand.params:
            if param.metavar not in PATHS:  # a new option with a path has one of these metavars
                assert "Path" not in str(kinds.get(param.name)), (name, param.name)
                continue
            words = [param.opts[0]] if param.param_type_name == "option" else []
            for blank in ("", " "):
                with pytest.raises(InputError, match="expected a path, found only blanks"):
                    subcommand.make_context(name, [*words, blank])
            checked.add(" ".join([name, *words]))
    assert checked >= {"train --out", "train", "train --items", "recommend --output", "serve", "serve --token-file"}
    code, _, err = command("train", "purchases.csv", "--out", "")
    assert (code, err) == (
        2,
        "twotower: --out: expected a path, found only blanks; write . for the current folder\n",
    )


@pytest.mark.parametrize(
    "words",
    [
        ("evaluate", "run", "--report", "."),
        ("audit", "run", "--per-query", "."),
        ("recommend", "run", "--input", "purchases.csv", "--output", "."),
        ("recommend", "run", "--input", "purchases.csv", "--output", ".", "--shards", "--force"),
        ("export", "run", "--out", "."),
        ("train", "purchases.csv", "--out", "next", "--set", "data.items=' '"),
        ("train", "purchases.csv", "--out", "next", "--set", "data.test=''"),
    ],
)
def test_a_folder_is_not_a_file_to_write(words, command, run_folder):
    before = sorted(run_folder.iterdir())
    code, _, err = command(*words)
    assert code == 2, err
    assert "twotower: " in err.splitlines()[-1]
    assert "internal" not in err
    assert sorted(run_folder.iterdir()) == before
