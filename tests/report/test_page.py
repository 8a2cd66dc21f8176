"""Tests of the report: its findings follow from the numbers, and nothing in the data can become markup."""

import json
import re
from html.parser import HTMLParser

import pytest

from support.sample_report import sample_document
from twotower.report import findings, render
from twotower.report.figures import (
    NARROW,
    WIDE,
    Curve,
    Point,
    labelled_points,
    small_multiples,
    text_width,
    ticks,
    wrapped,
)
from twotower.report.html import Html, h


@pytest.fixture(scope="module")
def ten(planted_split):
    return sample_document(planted_split)


class Reader(HTMLParser):
    """Collects elements, attributes and texts, and checks that every element is closed."""

    def __init__(self, page):
        super().__init__()
        self.open, self.elements, self.words = [], [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "br", "hr", "col"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_text_is_escaped_and_markup_is_not():
    nasty = '<script>alert("1")</script> & "quoted"'
    made = h("p", nasty, h("b", 3), [None, "x"], title=nasty, hidden=True, lang=None)
    assert made.count("<script") == 0 and "&lt;script&gt;" in made
    assert made.endswith("<b>3</b>x</p>") and " hidden>" in made and "lang" not in made
    assert isinstance(made, Html)
    (element,) = [one for one in Reader(made).elements if one[0] == "p"]
    assert element[1]["title"] == nasty


def test_no_title_becomes_markup(ten):
    nasty = '</text><script>x</script><img src="http://e.org/a">'
    document = json.loads(json.dumps(ten))
    document["examples"][0]["history"] = [nasty]
    document["examples"][0]["target"] = nasty
    document["data"]["account"][0]["note"] = nasty
    document["evaluation"]["notes"] = [nasty]
    old = document["models"][0]["name"]
    for model in document["models"]:
        model["name"] = nasty if model["name"] == old else model["name"]
    for tests in document["tests"]:
        tests["against"] = nasty
    document["examples"] = [
        {**one, "lists": [{"model": nasty, "rank": 1, "items": [nasty]}]} for one in document["examples"]
    ]
    reader = Reader(render(document))
    assert not {tag for tag, _ in reader.elements} & {"script", "img", "link", "iframe"}
    assert any(nasty in words for words in reader.words), "it is shown, as text"


def test_the_page_requests_nothing(ten):
    page = render(ten)
    reader = Reader(page)
    for _, attributes in reader.elements:
        assert not {"src", "srcset", "action"} & set(attributes)
        assert attributes.get("href", "#").startswith("#")
    assert "url(" not in page and "@import" not in page
    assert any("default-src 'none'" in (a.get("content") or "") for _, a in reader.elements)


def test_order_of_sections_and_omitted_sections(ten, planted_split):
    reader = Reader(render(ten))
    names = [attributes["id"] for tag, attributes in reader.elements if tag == "section"]
    assert " ".join(names) == (
        "overall differences popularity coverage slices learning audit calibration cost examples data settings"
    )
    alone = render(sample_document(planted_split, names=["expected-count"], seeds=1, kind="evaluation"))
    names = [attributes["id"] for tag, attributes in Reader(alone).elements if tag == "section"]
    assert "differences" not in names and "audit" not in names and "overall" in names
    assert "How good is this model" in alone


def test_the_dial_section_shows_every_measured_point(planted_split):
    document = sample_document(planted_split, names=["expected-count"], seeds=1, kind="evaluation")
    page = render(document)
    section = page[page.index('<section id="dial"') :].split("</section>")[0]
    for point in document["dial"]["points"]:
        row = f"<td>{point['popularity']:g}</td>"
        assert row in section or f">{point['popularity']:g}<" in section
        assert f"{point['recall']:.4f}" in section and f"{100 * point['coverage']:.1f} %" in section
    assert section.count("<figure") == 2 and "Recall@20 against coverage" in section
    document["dial"]["points"][0]["tail_recall"] = None  # a tail without targets
    section = render(document).split('<section id="dial"')[1].split("</section>")[0]
    assert section.count("<figure") == 1 and "–" in section
    del document["dial"]
    assert '<section id="dial"' not in render(document)


def test_every_figure_has_a_text_alternative_in_both_layouts(ten):
    reader = Reader(render(ten))
    figures = [attributes for tag, attributes in reader.elements if tag == "svg" and "role" in attributes]
    assert {attributes["class"] for attributes in figures} == {"wide", "narrow"} and len(figures) >= 12
    ids = [attributes["id"] for _, attributes in reader.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for attributes in figures:
        assert set(attributes["aria-labelledby"].split()) <= set(ids)
    assert ten["models"][3]["name"] in next(iter(re.findall(r"<desc[^>]*>(.*?)</desc>", render(ten))))


def test_the_same_document_gives_the_same_page(ten):
    assert render(ten) == render(json.loads(json.dumps(ten)))
    assert len(json.dumps(ten)) < 1_000_000


def test_every_point_is_named():
    """Place ten points close together: none may lose its name."""
    points = [Point(f"in-batch-logq-number-{n}", 50 + 0.4 * (n % 3), 0.15 + 0.0004 * n, "same") for n in range(10)]
    page = labelled_points("t", "d", points, x_axis="x", y_axis="y")
    for layout in page.split("<svg")[1:]:
        words = "".join(re.findall(r"<text[^>]*>([^<]*)</text>", layout))
        for point in points:
            assert point.name in words


def test_an_axis_of_shares_ends_at_one_hundred_percent():
    """Cover the whole of a small catalog at every setting: no tick above 100 %, and none cut off at the edge."""
    points = [Point(f"b = {n}", 100.0, 0.8 + 0.02 * n, "same") for n in range(3)]
    page = labelled_points("t", "d", points, x_axis="x", y_axis="y", most=(100.0, 1.0))
    for layout in page.split("<svg")[1:]:
        width = float(re.search(r'viewBox="0 0 (\S+)', layout)[1])
        shown = re.findall(r'<text x="([^"]*)"[^>]*text-anchor="middle"[^>]*>(\d+)</text>', layout)
        assert shown[-1][1] == "100" and all(float(number) <= 100 for _, number in shown)
        assert all(float(x) + text_width(number) / 2 <= width for x, number in shown)


def test_the_last_number_under_a_panel_is_not_cut_off():
    curves = [Curve(name, [(x, 0.1 * x, None, None) for x in (1.0, 2.0, 3.0)]) for name in ("one", "two")]
    page = small_multiples("t", curves, x_axis="x", y_axis="y", x_ticks=[(1.0, "10⁻³"), (3.0, "10⁻¹")])
    for layout in page.split("<svg")[1:]:
        width = float(re.search(r'viewBox="0 0 (\S+)', layout)[1])
        last = [float(x) for x in re.findall(r'<text x="([^"]*)"[^>]*>10⁻¹<', layout)]
        assert len(last) == 2 and max(last) + text_width("10⁻¹") / 2 <= width


def family(**verdicts):
    """Build a family of tests against `best` with the given verdicts."""
    contests = [
        {"name": name.replace("_", "-"), "difference": -0.02, "low": -0.03, "high": -0.01, "p_value": 0.001,
         "adjusted": 0.002, "effect_size": -0.1, "seed_error": 0.001, "num_queries": 100, "verdict": verdict}
        for name, verdict in verdicts.items()
    ]  # fmt: skip
    return {"about": "all", "metric": "NDCG@10", "slice": None, "against": "best", "contests": contests}


def document_of(seconds, **verdicts):
    """Build a comparison of `best` with others, by verdict; `seconds` of CPU time by name."""
    names = ["best", *(name.replace("_", "-") for name in verdicts)]
    value = {"mean": 0.2, "low": 0.19, "high": 0.21, "by_seed": [0.2, 0.2]}
    models = [
        {"name": name, "values": {"NDCG@10": value, "Recall@10": value}, "slices": {},
         "runs": [{"cpu_seconds": seconds.get(name, 100.0), "seconds": 10.0, "ended": 1000 * place, "history": []}]}
        for place, name in enumerate(names)
    ]  # fmt: skip
    return {
        "kind": "comparison", "metric": "NDCG@10", "tail_metric": "Recall@10", "seeds": [0, 1], "models": models,
        "tests": [family(**verdicts)], "baselines": [], "settings": {"training": {"metric": "NDCG@10"}},
        "data": {"split": {"account": {"lines": []}}}, "evaluation": {"notes": [], "slice_sizes": {}},
    }  # fmt: skip


def test_the_answer_names_objectives_that_do_not_differ_significantly():
    said = findings.answer(document_of({}, twin="not told apart", base="behind"))
    assert said[0].startswith("Use best or twin.") and "does not differ significantly from twin" in said[0]
    assert "base is 10.0 % lower" in said[1]
    clear = findings.answer(document_of({}, base="behind"))
    assert clear[0].startswith("Use best. ") and "significantly better than that of every other" in clear[0]
    many = findings.answer(document_of({}, **{f"o{n}": "not told apart" for n in range(5)}))
    assert many[0].startswith("No single objective is clearly best.")
    assert "does not decide" in many[1]


def beside(**verdicts):
    """Build the tests of baselines against `best`; a baseline that is ahead is better by 0.02."""
    tests = {**family(**verdicts), "about": "baselines"}
    for contest in tests["contests"]:
        contest["difference"] *= -1 if contest["verdict"] == "ahead" else 1
    return tests


def test_a_better_baseline_is_reported_first_with_settings_to_try():
    document = document_of({}, twin="not told apart", base="behind")
    document["tests"].append(beside(EASE="ahead", popularity="behind"))
    document["evaluation"]["advice"] = ["item_tower.dimension=256", "objective.temperature=0.1"]
    document["evaluation"]["command"] = "twotower tune DATA --out NEW_DIR"
    said = findings.answer(document)
    assert said[0] == (
        "No objective reaches the best baseline, EASE: the best objective, best, has an NDCG@10 of 0.2000, "
        "against 0.2200 (p = 0.002). Settings to try on this data: --set item_tower.dimension=256 --set "
        "objective.temperature=0.1. To search over these and other settings: twotower tune DATA --out NEW_DIR."
    )
    assert said[1].startswith("Use best or twin.")
    assert findings.verdicts(document) == {"best": "top", "twin": "same", "base": "behind"}
    alone = {**document, "kind": "evaluation", "models": document["models"][:1], "tests": document["tests"][1:]}
    assert findings.answer(alone)[0].startswith("best is below the best baseline, EASE: its NDCG@10 is 0.2000, against")
    assert findings.verdicts(alone) == {"best": "alone"}
    document["tests"][1] = beside(popularity="behind")
    assert findings.answer(document)[0].startswith("Use best or twin.")
    assert findings.verdicts(document)["best"] == "best"
    document["tests"][1] = beside(EASE="not told apart")
    document["tests"][1]["contests"][0]["difference"] = 0.001
    assert findings.verdicts(document)["best"] == "top", "not marked as best below a baseline, even within noise"
    assert findings.answer(document)[0].startswith("Use best or twin.")


def test_the_legend_marks_nothing_as_best_that_a_baseline_beats(planted_split):
    alone = render(sample_document(planted_split, names=["expected-count"], seeds=1, kind="evaluation"))
    assert ">this model</li>" in alone and "highest mean" not in alone and '<tr class="strong"' not in alone
    document = sample_document(planted_split)
    for contest in findings.family(document, "baselines")["contests"]:
        contest.update(difference=-0.1, verdict="behind")
    page = render(document)
    assert ">highest mean</li>" in page and "this model" not in page
    for contest in findings.family(document, "baselines")["contests"]:
        contest.update(difference=0.1, verdict="ahead")
    page = render(document)
    assert ">highest mean of the objectives, below a baseline</li>" in page and ">highest mean</li>" not in page
    assert '<tr class="strong"' not in page and "mark best" not in page.split('id="dial"')[0]


def test_the_answer_names_the_cheaper_of_equals():
    assert "twin takes the least CPU time" in findings.answer(document_of({"twin": 50.0}, twin="not told apart"))[0]
    assert "CPU time" not in findings.answer(document_of({"twin": 95.0}, twin="not told apart"))[0]


def test_the_answer_states_the_cost_of_a_better_tail():
    document = document_of({}, rare="behind")
    part = {"Recall@10": {"mean": 0.1, "low": 0.09, "high": 0.11, "by_seed": [0.1]}}
    for model in document["models"]:
        model["slices"] = {"tail": part, "head": part}
    ahead = {**family(rare="ahead"), "about": "tail", "metric": "Recall@10", "slice": "tail"}
    ahead["contests"][0]["difference"] = 0.05
    document["tests"].append(ahead)
    (said,) = [text for text in findings.answer(document) if text.startswith("In the tail")]
    assert "rare finds 15.0 % there" in said and "at the cost of 10.0 % of overall NDCG@10" in said


def test_cautions_about_seeds_epochs_and_concurrent_runs():
    document = document_of({}, base="behind")
    assert findings.cautions(document) == []
    document["seeds"] = [0]
    document["models"][0]["runs"][0]["history"] = [{"epoch": 0, "NDCG@10": 0.1}, {"epoch": 1, "NDCG@10": 0.2}]
    document["models"][1]["runs"][0]["ended"] = 4
    said = " ".join(findings.cautions(document))
    assert (
        "one seed" in said
        and "1 of 2 models reached its best value" in said
        and "Up to 2 runs were trained concurrently" in said
    )


def test_ticks_are_round_and_within_the_range():
    assert ticks(0.0, 1.0, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(0.1231, 0.1629, 4) == pytest.approx([0.13, 0.14, 0.15, 0.16])
    assert ticks(3.0, 3.0) == [3.0]
    for low, high in [(-42.0, 3.0), (0.0, 7e6), (1e-5, 2e-5)]:
        found = ticks(low, high, 6)
        assert 2 <= len(found) <= 7 and all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)


def test_names_are_wrapped_at_hyphens():
    assert "".join(wrapped("in-batch-logq-batch-probability", 120)) == "in-batch-logq-batch-probability"
    assert len(wrapped("in-batch-logq-batch-probability", 120)) > 1
    assert NARROW < WIDE
