"""The page: a heading, the answer, and the sections in order. A section that has nothing to show is left out."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from twotower.analysis.report import background, dial, measured, story, trainings
from twotower.analysis.report.markup import Html, h, raw

Document = dict[str, Any]

#: The page itself forbids every request, should anything in it ever ask for one.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


@dataclass(frozen=True)
class Section:
    """One section of the report.

    Attributes:
        name: of its anchor.
        title: its heading.
        make: from the document to its content; None where there is nothing to show.
    """

    name: str
    title: str
    make: Callable[[Document], Html | None]


SECTIONS = (
    Section("overall", "Overall", measured.overall),
    Section("differences", "Who is told apart", measured.differences),
    Section("popularity", "By popularity", measured.deciles),
    Section("coverage", "Reach", measured.coverage),
    Section("dial", "The popularity dial", dial.dial),
    Section("slices", "Slices", measured.slices),
    Section("learning", "Learning curves", trainings.learning),
    Section("audit", "Bias and spread of the gradients", background.audit),
    Section("calibration", "Calibration", background.calibration),
    Section("cost", "Time and memory", trainings.cost),
    Section("examples", "Where they disagree", background.examples),
    Section("data", "The data", background.data),
    Section("settings", "Settings", background.settings),
)


def render(document: Document, sections: tuple[Section, ...] = SECTIONS) -> str:
    """The report as one page of HTML that opens offline.

    Args:
        document: as `results.json` has it.
        sections: in order.
    """
    made = [(section, section.make(document)) for section in sections]
    shown = [(section, content) for section, content in made if content is not None]
    title = story.question(document)
    answer = story.answer(document)
    cautions = story.cautions(document)
    page = h(
        "html",
        h(
            "head",
            h("meta", charset="utf-8"),
            h("meta", name="viewport", content="width=device-width, initial-scale=1"),
            h("meta", http_equiv="Content-Security-Policy", content=POLICY),
            h("meta", name="color-scheme", content="light dark"),
            h("title", f"{title} – {_name(document)}"),
            h("style", raw(files(__package__).joinpath("style.css").read_text(encoding="utf-8"))),
        ),
        h(
            "body",
            h(
                "header",
                h("p", _kicker(document), class_="kicker"),
                h("h1", title),
                h(
                    "div",
                    h("p", _named(answer[0], document), class_="lead"),
                    [h("p", _named(text, document)) for text in answer[1:]],
                    class_="answer",
                ),
                h("aside", h("h2", "Before you rely on it"), h("ul", [h("li", text) for text in cautions]))
                if cautions
                else None,
                _facts(document),
                h(
                    "nav",
                    [h("a", section.title, href=f"#{section.name}") for section, _ in shown],
                    aria_label="Sections",
                ),
            ),
            h(
                "main",
                [h("section", h("h2", section.title), content, id=section.name) for section, content in shown],
            ),
            h("footer", h("p", "Made by twotower ", document["versions"].get("twotower", ""), ". Needs no network.")),
        ),
        lang="en",
    )
    return f"<!doctype html>\n{page}\n"


def _named(text: str, document: Document) -> list[Html | str]:
    """Text with the names of models set apart."""
    names = sorted((entry["name"] for entry in document["models"]), key=len, reverse=True)
    parts = re.split(rf"(?<![\w-])({'|'.join(map(re.escape, names))})(?![\w-])", text)
    return [h("b", part, class_="name") if place % 2 else part for place, part in enumerate(parts)]


def _name(document: Document) -> str:
    source = str(document["data"]["source"] or "data")
    parts = [part for part in source.replace("\\", "/").split("/") if part]
    return "/".join(parts[-2:])


def _kicker(document: Document) -> str:
    what = "Comparison" if document["kind"] == "comparison" else "Evaluation"
    return f"{what} · {_name(document)} · split {document['data']['split']['name'].replace('_', '-')}"


def _facts(document: Document) -> Html:
    data, evaluation = document["data"], document["evaluation"]
    facts = [
        (f"{data['interactions']:,}", "interactions"),
        (f"{data['items']:,}", "items, all of them ranked"),
        (f"{evaluation['num_queries']:,}", "test queries"),
    ]
    if document["kind"] == "comparison":
        seeds = len(document["seeds"])
        facts.append((f"{len(document['models'])} × {seeds}", "objectives × seeds"))
    return h("dl", [h("div", h("dt", words), h("dd", number)) for number, words in facts], class_="facts")
