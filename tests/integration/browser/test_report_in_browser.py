"""Tests of the report in a real browser: wide and narrow, light and dark, and in print."""

import pytest

from support.browser_page import look
from support.sample_report import sample_document
from twotower.report import render

WIDTHS = (1280, 768, 390)


@pytest.fixture(scope="module")
def page_of(planted_split, tmp_path_factory):
    """Write three reports: of ten objectives, of two with one seed, and of one model."""
    folder = tmp_path_factory.mktemp("report")
    shapes = {
        "ten": {},
        "two": {"names": ["in-batch-logq-batch-probability", "mixed"], "seeds": 1},
        "one": {"names": ["expected-count"], "seeds": 1, "kind": "evaluation"},
    }
    for name, shape in shapes.items():
        (folder / f"{name}.html").write_text(render(sample_document(planted_split, **shape)), encoding="utf-8")
    return lambda name: (folder / f"{name}.html").as_uri()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("report", ["ten", "two", "one"])
def test_nothing_overlaps_is_cut_off_fails_or_is_requested(browser, page_of, report, width, scheme):
    wrong, labels = look(browser, page_of(report), width=width, scheme=scheme)
    assert wrong == []
    assert labels > 30, "the figures of this layout were not seen"


@pytest.mark.parametrize("report", ["ten", "one"])
def test_in_print(browser, page_of, report):
    wrong, labels = look(browser, page_of(report), width=688, media="print")  # A4 less its margins
    assert wrong == []
    assert labels > 30


def test_dark_and_light_differ_in_figures_too(browser, page_of):
    colours = []
    for scheme in ("light", "dark"):
        context = browser.new_context(color_scheme=scheme)
        page = context.new_page()
        page.goto(page_of("ten"))
        colours.append(page.evaluate("() => getComputedStyle(document.querySelector('figure svg text')).fill"))
        context.close()
    assert colours[0] != colours[1]


FIGURE = '<figure><svg width="200" height="50" viewBox="0 0 200 50">{}</svg></figure>'


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (FIGURE.format('<text x="10" y="20">one</text><text x="12" y="24">two</text>'), '"one" lies on "two"'),
        (FIGURE.format('<text x="150" y="20">a long label</text>'), "is cut off"),
        ('<p style="width: 2000px">wide</p>', "page is"),
        ('<img src="http://example.org/a.png">', "asks for http://example.org/a.png"),
        ("<script>console.error('no')</script>", "console: no"),
        ("<script>undefined.nothing</script>", "error:"),
    ],
)
def test_the_check_can_fail(browser, tmp_path, body, complaint):
    path = tmp_path / "bad.html"
    path.write_text(f"<!doctype html><body>{body}</body>")
    wrong, _ = look(browser, path.as_uri(), width=390)
    assert any(complaint in text for text in wrong), wrong


def test_the_page_blocks_its_own_requests(browser, page_of, tmp_path):
    from pathlib import Path
    from urllib.parse import unquote, urlsplit

    text = Path(unquote(urlsplit(page_of("ten")).path)).read_text(encoding="utf-8")
    path = tmp_path / "asks.html"
    path.write_text(text.replace("</main>", '<img src="http://example.org/a.png"></main>'), encoding="utf-8")
    wrong, _ = look(browser, path.as_uri(), width=1280)
    assert any("Content Security Policy" in said for said in wrong)
    assert not any(said.startswith("asks for") for said in wrong)
