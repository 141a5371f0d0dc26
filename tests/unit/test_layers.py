"""The house keeps its layers: imports run downward, heavy libraries stay in their rooms."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import p2d_cli
from p2d_cli.pipeline import EXPORT, STAGES

ROOT = Path(p2d_cli.__file__).parent
MIDDLE = {"artifacts", "modeling", "data", "runtime", "reporting"}
ROOMS = ["cli", "stages", "recipes", "methods", "engine", MIDDLE, "core"]
"""From the top down: a room may import those below it."""
BASEMENT = {"errors", "config", "hub", "pipeline", "registry"}
FREE_OF_TORCH = {"torch", "transformers", "datasets", "peft", "accelerate", "sklearn"}
HEAVY = FREE_OF_TORCH | {"numpy", "pyarrow", "matplotlib", "jinja2", "rich", "lm_eval", "scipy"}
"""What a function may keep away from those that do not call it, by importing it, or a module that needs it, itself."""


def modules():
    return sorted(ROOT.rglob("*.py"))


def room_of(path):
    parts = path.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else path.stem


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield node.module


def below(room):
    """Return the rooms that a room may import."""
    level = next(level for level, rooms in enumerate(ROOMS) if room == rooms or room in rooms)
    return {name for rooms in ROOMS[level + 1 :] for name in ({rooms} if isinstance(rooms, str) else rooms)}


def module_name(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_at_once(path):
    """Return what a module imports as it is imported itself: at the top, and not for types alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.fixture(scope="module")
def graph():
    return {module_name(path): set(imported_at_once(path)) for path in modules()}


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_run_downward(path):
    room = room_of(path)
    if room in {"__main__", "__init__"}:
        return
    for name in imports_of(path):
        if not name.startswith("p2d_cli."):
            continue
        target = name.split(".")[1]
        if target in BASEMENT or target == room:
            continue
        assert room not in BASEMENT, f"{room} is torch-free and importable by all, so it may import only its like"
        assert target in below(room), f"{path} imports {name}: {room} may not know {target}"


def test_there_is_no_circle(graph):
    done, open_ = set(), []

    def visit(name):
        assert name not in open_, f"a circle of imports: {' -> '.join([*open_[open_.index(name) :], name])}"
        if name in done or name not in graph:
            return
        open_.append(name)
        for other in sorted(graph[name]):
            visit(other)
        done.add(open_.pop())

    for name in graph:
        visit(name)


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_functions_import_only_what_is_heavy(path, graph):
    """Anything else belongs at the top, where a reader looks for it."""
    if room_of(path) in {"cli", "__main__"}:  # which answers `--help` before it loads anything
        return

    def is_heavy(name, seen):
        if name.split(".")[0] in HEAVY or name not in graph:
            return True
        return any(
            is_heavy(other, seen | {name}) for other in graph[name] - seen if other.split(".")[0] in HEAVY | {"p2d_cli"}
        )

    at_once = set(imported_at_once(path))
    reached = set()

    def reach(name):
        for other in graph.get(name, ()):
            if other not in reached:
                reached.add(other)
                reach(other)

    reach(module_name(path))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for part in ast.walk(node):
            if not isinstance(part, ast.ImportFrom) or part.module in at_once:
                continue
            inside = {f"{part.module}.{alias.name}" for alias in part.names} & graph.keys()
            for module in inside or {part.module}:
                assert module not in reached, f"{path}:{part.lineno} {module} is imported anyway"
                assert is_heavy(module, set()), f"{path}:{part.lineno} {module} is light"


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_libraries_stay_in_their_rooms(path):
    room = room_of(path)
    tops = {imported.split(".")[0] for imported in imports_of(path)}
    if room != "cli":
        assert not tops & {"typer", "click", "rich"}, "only cli talks to the terminal"
    if room != "modeling":
        assert not tops & {"transformers", "peft"}
    if room != "data":
        assert "datasets" not in tops
    if room in BASEMENT:
        assert not tops & FREE_OF_TORCH
    if room == "core":
        assert not tops & {"os", "pathlib", "time", "logging", "random", "io", "tempfile"}, "core is pure"


def test_only_cli_prints_or_exits():
    for path in modules():
        if room_of(path) in {"cli", "__main__"}:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"print", "exit", "sys.exit", "quit"}, f"{path}:{node.lineno} calls {called}"


def test_every_torch_load_is_weights_only_and_nothing_is_unpickled():
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {"torch.load", "pickle.load", "pickle.loads"}:
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert keywords.get("weights_only") == "True", f"{path}:{node.lineno}"


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["run", "--help"], ["inspect", "--help"], ["compare", "--help"]]
    + [[stage.name, "--help"] for stage in (*STAGES, EXPORT)],
    ids=" ".join,
)
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys; from p2d_cli.cli.app import app\n"
        f"sys.argv = ['p2d', *{arguments!r}]\n"
        "try: app()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"heavy = {sorted(FREE_OF_TORCH | {'jinja2'})!r}\n"
        "loaded = [name for name in heavy if name in sys.modules]\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
