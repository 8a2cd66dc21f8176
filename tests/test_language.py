"""Phrases that we replace by plain English: looked for in docstrings, comments, messages and documentation."""

import ast
import io
import re
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[1]

#: The worst of the phrases, as regular expressions; CONTRIBUTING.md, "Words", has the terms of the field.
PHRASES = re.compile(
    r"\b((is|are|was|were) told|told of|tells? (of|what|how|whether|who)|(go|goes|going|gone|went) on (with|from)"
    r"|trainings|a training(?=[.,;:)]| (of|that|over|in|with|is|to|on|from|has|was|and)\b)"
    r"|anew|afresh|likewise|beforehand|meanwhile|whoever|somebody|anybody|wherever|besides|at hand|for good"
    r"|is there and|where there (is|are) none|stands(?! for\b)|what came of|fault of the program|give up)\b",
    re.IGNORECASE,
)

#: (end of the path, text around the phrase): names in the code.
ALLOWED: set[tuple[str, str]] = set()


def texts(path: Path) -> list[str]:
    """Return the comments and string constants of a Python file, or a whole page."""
    source = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return [source]
    strings = [n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [*strings, "\n".join(token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT)]


def found(path: Path) -> list[str]:
    """Return the phrases in a file, each with the words around it; a phrase may be broken over two lines."""
    name = path.relative_to(ROOT).as_posix()
    plain = [" ".join(text.split()) for text in texts(path)]
    return [
        f"{name}: ...{text[max(match.start() - 40, 0) : match.end() + 40]}..."
        for text in plain
        for match in PHRASES.finditer(text)
        if not any(name.endswith(end) and allowed in text for end, allowed in ALLOWED)
    ]


def test_no_phrase_that_we_replace():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *(ROOT / "docs").rglob("*.md")]
    sources = list((ROOT / "src").rglob("*.py"))
    assert len(sources) > 200 and len(pages) > 30, "the test looks at the wrong folder"
    assert [line for path in [*sources, *pages] for line in found(path)] == []


def test_phrases_are_found_in_strings_comments_and_pages(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    (tmp_path / "a.py").write_text(
        '"""Result of a training run."""\n# Who is\n# told.\nx = "a training. It goes on with b"\n'
    )
    (tmp_path / "b.md").write_text("A training run stands for one model.\nIt is\ndone anew.\n")
    assert len(found(tmp_path / "a.py")) == 3
    assert len(found(tmp_path / "b.md")) == 1
