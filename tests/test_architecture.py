"""Tests of the import structure: a file imports only from rooms above its own, and there are no import cycles."""

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "twotower"

#: Top to bottom. A module may import from rooms above its own, and from its own folder without a cycle.
ROOMS = [
    "errors",
    "files",
    "machine",
    "process",
    "hashing",
    "ranks",
    "shared_files",
    "stored_rows",
    "team",
    "launch",
    "feature_config",
    "tower_config",
    "config_errors",
    "config",
    "schema",
    "ids",
    "data",
    "negatives",
    "losses",
    "towers",
    "index",
    "evaluation",
    "training",
    "planning",
    "measuring_rates",
    "serving",
    "named_objectives",
    "build",
    "continuing",
    "analysis",
    "doctor",
    "run",
    "comparison",
    "terminal",
    "cli_answers",
    "cli_data",
    "cli_export",
    "cli_items",
    "cli_plan",
    "cli_serve",
    "cli",
]

#: A served model must not need the trainer.
FORBIDDEN = {
    "serving": {"training", "analysis", "named_objectives", "build", "run"},
    "evaluation": {"training", "serving", "analysis", "named_objectives", "build", "run"},
}


def modules() -> dict[str, Path]:
    """Map each dotted module name below `twotower` to its file; an `__init__` has the name of its folder."""
    named = {}
    for path in SOURCE.rglob("*.py"):
        parts = list(path.relative_to(SOURCE).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        if parts:
            named[".".join(parts)] = path
    return named


def imports(path: Path) -> set[str]:
    """Return the names below `twotower` that a file imports, at any level of nesting."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
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
    """Find an import cycle among modules, or return None."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str] | None:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return None
        for target in edges.get(module, ()):
            found = visit(target, [*path, module])
            if found:
                return found
        done.add(module)
        return None

    for module in edges:
        found = visit(module, [])
        if found:
            return found
    return None


def resolve(name: str, known: dict[str, Path]) -> str | None:
    """Return the module that defines an imported name."""
    while name:
        if name in known:
            return name
        name = name.rpartition(".")[0]
    return None


def test_every_import_goes_up():
    edges = {module: imports(path) for module, path in modules().items()}
    assert len(edges) > 20, "the test reads the wrong folder"
    assert violations(edges) == []


def test_no_circle():
    known = modules()
    edges = {
        module: {target for name in imports(path) if (target := resolve(name, known)) and target != module}
        for module, path in known.items()
    }
    assert circle(edges) is None


def test_the_checks_can_fail():
    assert violations({"negatives.pool": {"training.fit"}})
    assert violations({"serving.retriever": {"training.model"}})
    assert violations({"cli": {"utils.things"}})
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]


def test_every_module_says_what_it_is():
    for name, path in modules().items():
        if name == "py":
            continue
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{name} has no docstring"
