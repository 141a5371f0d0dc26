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
ALLOWED = {
    "cli": {"stages", "core"} | MIDDLE,
    "stages": {"core"} | MIDDLE,
    **{room: {"core"} for room in MIDDLE},
    "core": set(),
}
BASEMENT = {"errors", "config", "recipe", "hub", "pipeline"}
FREE_OF_TORCH = {"torch", "transformers", "datasets", "peft", "accelerate", "sklearn"}


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
        assert room in ALLOWED, f"{room} is torch-free and importable by all, so it may import only its like"
        assert target in ALLOWED[room], f"{path} imports {name}: {room} may not know {target}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_libraries_stay_in_their_rooms(path):
    room, name = room_of(path), path.relative_to(ROOT).as_posix()
    tops = {imported.split(".")[0] for imported in imports_of(path)}
    if room != "cli":
        assert not tops & {"typer", "click", "rich"}, "only cli talks to the terminal"
    if room not in {"modeling"} and name != "stages/train.py":
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
