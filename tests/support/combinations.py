"""The list of combinations that are exact, approximate or rejected: the tests run it, docs/theory.md prints it.

`PYTHONPATH=src:tests python -m support.combinations` writes the table into the page.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from support.conformance import Cell

PAGE = Path(__file__).parents[2] / "docs" / "theory.md"
BEGIN, END = "<!-- combinations: begin -->", "<!-- combinations: end -->"


@dataclass(frozen=True)
class Combinations:
    """Combinations with one verdict: every choice of source, batches, masks and duplicates among those listed.

    Attributes:
        sources, batches, known, duplicates: lists of `Cell`'s values.
        frequency: `objective.frequency`.
        off: largest error of the partition sum on average; 0: none.
        why: the reason of an approximation.
        rejected: the beginning of the message of a rejection; None if it runs.
    """

    sources: tuple[str, ...]
    batches: tuple[str, ...]
    frequency: str = "counted"
    known: tuple[bool, ...] = (False, True)
    duplicates: tuple[str, ...] = ("kept", "unique")
    off: float = 0.0
    why: str = ""
    rejected: str | None = None

    def cells(self) -> Iterator[Cell]:
        """Yield every cell."""
        for sources in self.sources:
            for batches in self.batches:
                for known in self.known:
                    for duplicates in self.duplicates:
                        yield Cell(sources, self.frequency, batches, known, duplicates)


DRAWN = (
    "uniform",
    "uniform per row",
    "frequency",
    "frequency^0.75",
    "log-uniform",
    "head + frequency^0.75",
    "index stream",
)
OF_ROWS = ("in-batch", "memory", "in-batch + memory", "in-batch + uniform", "in-batch + memory + uniform")
ALWAYS = ("head + in-batch + uniform", "observed + in-batch + uniform", "mined + in-batch + uniform")
THREE = ("in-batch", "in-batch + uniform", "in-batch + memory + uniform")
QUESTIONS = ("horizon questions", "set questions")
REPEATS = ("horizon questions with repeats", "set questions with repeats")
KNOWN = (True,)
ESTIMATED = "frequencies are estimated"

LIST = (
    Combinations(("catalog",), ("rows", "rows on 2 ranks", "whole sequences", *QUESTIONS), duplicates=("kept",)),
    Combinations(DRAWN, ("rows",)),
    Combinations(("uniform", "uniform per row", "frequency"), ("rows",), duplicates=("unique by source",)),
    Combinations(
        ("uniform", "frequency^0.75"),
        ("rows on 2 ranks", "rows in blocks of 9", "whole sequences", "whole sequences in blocks of 9", *QUESTIONS),
        known=KNOWN,
    ),
    Combinations((*OF_ROWS, *ALWAYS, "in-batch + uniform per row"), ("rows",)),
    Combinations(("mined window + in-batch + uniform",), ("rows", "rows on 2 ranks", "rows in blocks of 9")),
    Combinations(
        ("mined window + in-batch + uniform",), ("eligible rows", "whole sequences"), known=KNOWN, duplicates=("kept",)
    ),
    Combinations(("in-batch", "memory", "in-batch + memory + uniform"), ("rows",), duplicates=("unique by source",)),
    Combinations(
        THREE,
        ("independent rows", "rows of a continued model", "rows on 2 ranks", "rows in blocks of 9"),
        known=KNOWN,
    ),
    Combinations(THREE, ("rows within groups",), "grouped"),
    Combinations(
        ("in-batch + memory + uniform",),
        (
            "rows within groups of a continued model",
            "rows within groups on 2 ranks",
            "rows within groups in blocks of 9",
        ),
        "grouped",
        known=KNOWN,
    ),
    Combinations(
        ("in-batch", "in-batch + uniform", "head + in-batch + uniform"),
        ("whole sequences", "whole sequences on 2 ranks"),
        known=KNOWN,
        duplicates=("kept", "unique", "unique by source"),
    ),
    Combinations(
        ("memory", "in-batch + memory + uniform"),
        ("whole sequences",),
        known=KNOWN,
        off=0.01,
        why="the windows that hold an item are counted in the current epoch, also for remembered rows",
    ),
    Combinations(
        THREE,
        (*QUESTIONS, "horizon questions of a continued model", *REPEATS),
        known=KNOWN,
        duplicates=("kept",),
    ),
    Combinations(
        THREE[:2],
        (*QUESTIONS, *REPEATS),
        known=KNOWN,
        duplicates=("unique",),
        off=0.01,
        why="the mean over cuts is taken inside the product; a batch has at most 1/50 of the questions",
    ),
    Combinations(
        THREE[2:],
        (*QUESTIONS, *REPEATS),
        known=KNOWN,
        duplicates=("unique",),
        off=0.04,
        why="the same; batch and memory have 1/12 of the questions here",
    ),
    Combinations(
        ("catalog", "in-batch", "in-batch + uniform", "uniform per row", "head + in-batch + uniform"),
        ("eligible rows", "eligible rows on 2 ranks"),
        known=KNOWN,
    ),
    Combinations(
        ("uniform", "frequency^0.75", "mined + in-batch + uniform", "in-batch + memory + uniform"),
        ("eligible rows", "eligible rows in blocks of 9"),
        known=KNOWN,
    ),
    Combinations(
        ("in-batch", "uniform", "uniform per row", "in-batch + memory + uniform", "head + frequency^0.75"),
        ("eligible rows within groups", "eligible rows within groups on 2 ranks"),
        "grouped",
        known=KNOWN,
    ),
    Combinations(
        ("catalog", "uniform", "in-batch + uniform"),
        ("eligible whole sequences", "eligible horizon questions", "eligible set questions"),
        known=KNOWN,
        duplicates=("kept",),
    ),
    Combinations(
        THREE,
        ("rows", "rows on 2 ranks", "rows in blocks of 9", "rows of a continued model"),
        "streaming",
        known=KNOWN,
        off=0.03,
        why=ESTIMATED,
    ),
    Combinations(THREE[1:], ("whole sequences", *QUESTIONS), "streaming", known=KNOWN, off=0.03, why=ESTIMATED),
    Combinations(THREE[1:], ("rows within groups",), "grouped-streaming", known=KNOWN, off=0.03, why=ESTIMATED),
    Combinations(
        ("in-batch", "in-batch + uniform", "head + in-batch + uniform"),
        ("rows of two events", "rows of two events on 2 ranks"),
        known=KNOWN,
    ),
    Combinations(("catalog",), ("whole sequences of two events",), known=KNOWN, duplicates=("kept",)),
    # With the 12 uniform candidates of the other pools, the 1/n of the estimate hides the gradient.
    Combinations(("in-batch + 100 uniform",), ("whole sequences of two events",), known=KNOWN),
    Combinations(
        ("in-batch",),
        ("horizon questions of two events",),
        known=KNOWN,
        rejected="training.question: horizon: the targets of a question may have several event types",
    ),
    Combinations(
        ("in-batch",),
        ("set questions of two events",),
        known=KNOWN,
        rejected="training.question: set: the targets of a question may have several event types",
    ),
    Combinations(
        ("in-batch", "memory", "in-batch + uniform"),
        ("whole sequences in blocks of 9", "set questions in blocks of 9"),
        known=KNOWN,
        rejected="objective.rows_per_draw: with in_batch or memory, the rows of whole sequences or questions",
    ),
    Combinations(
        ("in-batch + uniform", "uniform"),
        ("whole sequences",),
        "grouped",
        rejected="objective.frequency: grouped: a sequence may span several groups",
    ),
    Combinations(
        ("in-batch + uniform", "uniform"),
        ("horizon questions",),
        "grouped",
        rejected="training.question: horizon: a question may span several groups",
    ),
    Combinations(
        ("in-batch + uniform", "uniform"),
        ("set questions",),
        "grouped",
        rejected="training.question: set: a question may span several groups",
    ),
    Combinations(
        ("in-batch",), ("one row a batch",), rejected="training.batch_size: 1; a batch of one row has no other rows"
    ),
    Combinations(
        ("in-batch",), ("rows in blocks of 1",), rejected="objective.rows_per_draw: 1; a block of one row has no other"
    ),
    Combinations(
        ("in-batch",), ("one whole sequence a batch",), rejected="training.batch_size: 1; a batch has one sequence"
    ),
    Combinations(("in-batch twice",), ("rows",), rejected="sources: in_batch is listed twice"),
    Combinations(("memory twice",), ("rows",), rejected="sources: memory is listed twice"),
)


def table() -> str:
    """Format the list as a table of Markdown."""
    lines = ["| sources | frequency | batches | masks | duplicates | Ẑ |", "|---|---|---|---|---|---|"]
    masked = {(False, True): "own or known positives", (True,): "known positives", (False,): "own positive"}
    for one in LIST:
        if one.rejected is not None:
            verdict = f"rejected: `{one.rejected} ...`"
        else:
            verdict = f"within {one.off:.0%}: {one.why}" if one.off else "exact"
        choices = ", ".join(one.sources), one.frequency, ", ".join(one.batches), masked[one.known]
        lines.append(f"| {' | '.join([*choices, ', '.join(one.duplicates), verdict])} |")
    return "\n".join(lines)


def written(page: str) -> str:
    """Return the page with the table of this list."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
