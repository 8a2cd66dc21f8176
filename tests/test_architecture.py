"""The structure of the code: imports go one way without circles, and every name is used once and says what it is."""

import ast
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "twotower"

#: Top to bottom. A file imports only from rooms above its own, and within its room without a circle.
ROOMS = [
    "errors",
    "hashing",
    "config",
    "system",
    "distributed",
    "index",
    "data",
    "features",
    "negatives",
    "losses",
    "objectives",
    "towers",
    "ranking",
    "evaluation",
    "training",
    "serving",
    "incremental",
    "audit",
    "run",
    "report",
    "comparison",
    "study",
    "cli",
]

#: A served model needs no trainer installed.
FORBIDDEN = {
    "serving": {"training", "audit", "objectives", "run"},
    "evaluation": {"training", "serving", "audit", "objectives", "run"},
}

#: Nouns of the field that end like participles. A participle alone says a grammatical role and not a thing.
NOUNS = {
    "batching",
    "distributed",
    "embedding",
    "hashing",
    "loading",
    "mining",
    "packing",
    "parsing",
    "ranking",
    "serving",
    "tiled",
    "training",
    "tuning",
}


def modules() -> dict[str, Path]:
    """Return every module: dotted name below `twotower` -> file. A package has the name of its folder."""
    named = {}
    for path in SOURCE.rglob("*.py"):
        parts = list(path.relative_to(SOURCE).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        if parts and parts[-1] != "__main__":
            named[".".join(parts)] = path
    return named


@cache
def tree(path: Path) -> ast.Module:
    """Return the syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path: Path) -> set[str]:
    """Return the names below `twotower` that a file imports, anywhere in the file."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("twotower"):
            base = node.module.removeprefix("twotower").lstrip(".")
            found |= {f"{base}.{alias.name}".strip(".") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; name the room"
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("twotower.") for a in node.names if a.name.startswith("twotower.")}
    return found


def violations(edges: dict[str, set[str]]) -> list[str]:
    wrong = []
    for module, targets in edges.items():
        room = module.split(".")[0]
        for target in targets:
            other = target.split(".")[0]
            if other in ("__version__", room):
                continue
            if other not in ROOMS:
                wrong.append(f"{module} imports {target}: no such room")
            elif ROOMS.index(other) > ROOMS.index(room) or other in FORBIDDEN.get(room, set()):
                wrong.append(f"{module} imports {target}: not above it")
    return wrong


def circle(edges: dict[str, set[str]]) -> list[str] | None:
    """Return a circle of the graph, or None."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str] | None:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        for target in edges.get(node, ()):
            found = visit(target, [*path, node])
            if found:
                return found
        done.add(node)
        return None

    for node in edges:
        found = visit(node, [])
        if found:
            return found
    return None


def resolve(name: str, known: dict[str, Path]) -> str | None:
    """Return the module that an imported name lives in."""
    while name:
        if name in known:
            return name
        name = name.rpartition(".")[0]
    return None


def module_edges() -> dict[str, set[str]]:
    known = modules()
    return {
        module: {target for name in imports(path) if (target := resolve(name, known)) and target != module}
        for module, path in known.items()
    }


def folder_edges(edges: dict[str, set[str]], packages: set[str]) -> dict[str, set[str]]:
    """Return imports between folders; what a package re-exports does not count."""

    def folder(module: str) -> str:
        return module if module in packages else module.rpartition(".")[0]

    found: dict[str, set[str]] = defaultdict(set)
    for module, targets in edges.items():
        if module in packages:
            continue
        for target in targets:
            here, there = folder(module), folder(target)
            if here != there and there:
                found[here].add(there)
    return dict(found)


def public_classes() -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for module, path in modules().items():
        for node in tree(path).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(module)
    return found


def stem(name: str) -> str:
    """Return a word without its ending: `tiles`, `tiled` and `tiling` have the same stem."""
    for ending in ("ations", "ation", "ings", "ing", "ed", "ers", "er", "es", "s", "e"):
        if name.endswith(ending) and len(name) - len(ending) >= 3:
            return name[: -len(ending)]
    return name


def alike(names: list[str]) -> list[tuple[str, str]]:
    """Return pairs of file names of one folder that differ by an ending only."""
    return [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if a != b and stem(a) == stem(b)]


def is_participle(name: str) -> bool:
    irregular = {"given", "known", "past", "written", "told", "kept", "held", "drawn", "grown", "shown", "taken", "met"}
    bare = name.rpartition("_")[2]
    return bare == name and name not in NOUNS and (name in irregular or name.endswith(("ing", "ed")))


def test_there_are_23_rooms():
    folders = {path.name for path in SOURCE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    files = {path.stem for path in SOURCE.glob("*.py")} - {"__init__", "__main__"}
    assert folders | files == set(ROOMS) and len(ROOMS) == 23
    assert files == {"errors", "hashing"}, "the root of the package holds nothing else"


def test_every_import_goes_up():
    edges = {module: imports(path) for module, path in modules().items()}
    assert len(edges) > 20, "the test looks at the wrong folder"
    assert violations(edges) == []


def test_no_circle_of_modules_or_folders():
    edges = module_edges()
    packages = {module for module, path in modules().items() if path.name == "__init__.py"}
    assert circle({module: targets for module, targets in edges.items() if module not in packages}) is None
    assert circle(folder_edges(edges, packages)) is None


def test_no_two_public_classes_share_a_name():
    assert {name: where for name, where in public_classes().items() if len(where) > 1} == {}


def test_no_two_files_of_a_folder_differ_by_an_ending_only():
    folders: dict[str, list[str]] = defaultdict(list)
    for module in modules():
        folder, _, name = module.rpartition(".")
        folders[folder].append(name)
    assert {folder: pairs for folder, names in folders.items() if (pairs := alike(names))} == {}


def test_no_file_name_is_a_bare_participle():
    assert [module for module in modules() if is_participle(module.rpartition(".")[2])] == []


def test_every_module_says_what_it_is():
    for name, path in modules().items():
        assert ast.get_docstring(tree(path)), f"{name} has no docstring"


def test_tests_lie_in_the_folder_of_their_subject():
    tests = Path(__file__).parent
    folders = {path.parent.relative_to(tests).as_posix() for path in tests.rglob("test_*.py")}
    allowed = {".", "device", "integration", "integration/browser"}
    rooms = {path.parent.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("__init__.py")}
    assert folders - allowed <= rooms


def patterns(module: ast.Module) -> list[str]:
    """Return the calls of polars that would take a path as a pattern, so that data[1].csv would read data1.csv."""
    calls = [
        node
        for node in ast.walk(module)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and "_" in node.func.attr
    ]
    return [
        text
        for call in calls
        if re.fullmatch(r"pl\.(read|scan)_\w+", ast.unparse(call.func))
        and not (text := ast.unparse(call)).endswith("glob=False)")
        and "(BytesIO(" not in text
    ]


def test_no_path_is_a_pattern():
    assert {name: found for name, path in modules().items() if (found := patterns(tree(path)))} == {}
    assert patterns(ast.parse("pl.read_parquet_schema(path)"))
    assert patterns(ast.parse("pl.scan_csv(path, separator=';').collect()"))
    assert not patterns(ast.parse("pl.read_parquet(BytesIO(raw)); pl.scan_csv(path, glob=False).collect()"))


@pytest.mark.parametrize("names", [["tiles", "tiled"], ["building", "build"], ["measuring", "measured"]])
def test_endings_are_noticed(names):
    assert alike(names)
    assert is_participle("building") and is_participle("given") and not is_participle("ranking")


def test_the_checks_can_fail():
    assert violations({"negatives.pool": {"training.fit"}})
    assert violations({"serving.retriever": {"training.module"}})
    assert violations({"cli": {"utils.things"}})
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert circle(folder_edges({"a.x": {"b.y"}, "b.z": {"a.w"}}, set())) is not None
