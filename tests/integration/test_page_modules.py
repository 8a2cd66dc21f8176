"""Imports among the JavaScript modules of the service's page: each imports only from layers below its own."""

import re
from pathlib import Path

import pytest

import twotower

#: Top to bottom. Modules of one layer do not import each other, so no view imports another view.
LAYERS = (
    {"page"},
    {
        "address",
        "atlas",
        "card",
        "context",
        "dial",
        "heldout",
        "lists",
        "refusals",
        "settings",
        "who",
        "words",
    },  # views
    {"answers", "history"},  # actions
    {"api", "combo", "map", "store"},
    {"items"},
    {"dom"},
)

_FROM = re.compile(r"""^\s*(?:import|export)\b[^;'"]*?\bfrom\s*["']([^"']+)["']""", re.MULTILINE)
_BARE = re.compile(r"""\bimport\s*\(?\s*["']([^"']+)["']""")
_ASSIGNED = re.compile(r"^.*\bstate(?:\.\w+|\[[^\]]+\])+\s*(?:[-+*/?&|]*=(?![=>])|\+\+|--).*$", re.MULTILINE)


@pytest.fixture(scope="module")
def sources():
    """The text of each module of the page, by name."""
    found = {path.stem: path.read_text(encoding="utf-8") for path in Path(twotower.__file__).parent.rglob("page/*.js")}
    assert "page" in found, "the page's folder was not found"
    return found


def imports(source: str) -> list[str]:
    """Names of the modules that a module imports."""
    return [Path(target).stem for target in (*_FROM.findall(source), *_BARE.findall(source))]


def violations(sources: dict[str, str]) -> list[str]:
    """List the imports that do not lead to a lower layer, and the differences between the modules and LAYERS."""
    layer_of = {name: layer for layer, names in enumerate(LAYERS) for name in names}
    found = [f"{name}: in LAYERS or in the folder, not in both" for name in sorted(layer_of.keys() ^ sources.keys())]
    for name, source in sources.items():
        upward = (target for target in imports(source) if layer_of.get(target, -1) <= layer_of.get(name, -1))
        found.extend(f"{name} imports {target}" for target in upward)
    return found


def test_modules_import_only_from_lower_layers(sources):
    assert violations(sources) == []
    assert sum(len(imports(source)) for source in sources.values()) > 40, "the import statements were not seen"


def test_only_the_store_writes_the_state(sources):
    written = {name: _ASSIGNED.findall(source) for name, source in sources.items()}
    assert {name: lines for name, lines in written.items() if lines} == {}
    assert _ASSIGNED.search("  state.found[letter] = [];") and not _ASSIGNED.search("if (state.k === 10) k = state.k;")


@pytest.mark.parametrize(
    ("name", "line", "expected"),
    [
        ("lists", 'import { attach } from "./who.js";', "lists imports who"),
        ("store", 'import * as answers from "./answers.js";', "store imports answers"),
        ("dom", 'import {\n  readable,\n  integer,\n} from "./items.js";', "dom imports items"),
        ("history", 'export { loadModels } from "./answers.js";', "history imports answers"),
        ("api", 'import "./page.js";', "api imports page"),
        ("map", 'const { addItem } = await import("./history.js");', "map imports history"),
        ("dial", 'import { html } from "https://example.org/lit.js";', "dial imports lit"),
    ],
)
def test_the_check_of_layers_can_fail(sources, name, line, expected):
    assert violations({**sources, name: f"{line}\n{sources[name]}"}) == [expected]


def test_the_check_of_layers_finds_an_unlisted_module(sources):
    assert violations({**sources, "extra": ""}) == ["extra: in LAYERS or in the folder, not in both"]


def test_terms_are_explained_next_to_where_they_are_used():
    """The dial at its slider, and the thirds of the catalog below the lists whose bars show them."""
    (path,) = Path(twotower.__file__).parent.rglob("page/index.html")
    results = path.read_text(encoding="utf-8").partition('id="results"')[2].partition("</section>\n\n")[0]
    dial = results[results.index('id="dial"') : results.index('id="context"')]
    lists = results[results.index('id="lists"') :]
    helps = [re.findall(r'<details class="help">\s*<summary>(.*?)</summary>', part) for part in (dial, lists)]
    assert helps == [["What the dial does"], ["What head, mid and tail mean"]]
    for word in ("head", "mid", "tail", "a third of all training interactions"):
        assert word in lists.partition("<summary>What head, mid and tail mean")[2]
