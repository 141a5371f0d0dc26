"""The package never unpickles, evaluates text as code, runs a shell, or lets a checkpoint bring its own code."""

import ast
import inspect
import re
from pathlib import Path

import peft.utils.save_and_load
import pytest
import transformers.trainer
import transformers.utils.hub

import p2d_cli

ROOT = Path(p2d_cli.__file__).parent
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CODE = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "pty.spawn", "runpy.run_path"}


def calls():
    """Yield every call in the package with its place, its name and its keywords."""
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                yield f"{path.relative_to(ROOT)}:{node.lineno}", ast.unparse(node.func), keywords


def test_the_walk_finds_what_it_looks_for():
    """Else the tests below would pass on an empty package."""
    found = list(calls())
    assert len(found) > 2000
    assert any(keywords.get("trust_remote_code") == "False" for _, _, keywords in found)


def test_every_torch_load_is_of_weights_only():
    for where, name, keywords in calls():
        if name in {"torch.load", "torch.jit.load", "torch.package.PackageImporter"} or name.endswith(".torch_load"):
            assert keywords.get("weights_only") == "True", where
        assert keywords.get("weights_only", "True") == "True", where


def test_no_numpy_load_unpickles():
    for where, name, keywords in calls():
        if name in {"np.load", "numpy.load"}:
            assert keywords.get("allow_pickle", "False") == "False", where
        assert name not in {"np.fromregex", "pd.read_pickle", "pandas.read_pickle"}, where


def test_nothing_is_unpickled_and_no_text_becomes_code():
    for where, name, keywords in calls():
        assert name.split(".")[0] not in UNPICKLERS, where
        assert name.split(".")[-1] != "Unpickler", where
        assert name not in CODE, where
        assert keywords.get("shell", "False") == "False", where


def test_only_the_name_of_an_error_is_taken_from_pickle():
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & UNPICKLERS, path
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNPICKLERS:
                assert [alias.name for alias in node.names] == ["UnpicklingError"], path


def test_no_checkpoint_brings_its_code():
    for where, name, keywords in calls():
        assert keywords.get("trust_remote_code", "False") == "False", where
        if re.search(r"Auto\w+\.from_pretrained$|auto_model\.from_pretrained$", name):
            assert keywords.get("trust_remote_code") == "False", where
            assert keywords.get("local_files_only") == "True", where


def test_modules_are_imported_by_names_of_our_own_only():
    """`importlib.import_module` takes a stage's module from the pipeline's table, and a method's from its own file."""
    found = [where.rpartition(":")[0] for where, name, _ in calls() if name == "importlib.import_module"]
    assert sorted(found) == ["cli/commands.py", "registry.py", "stages/run.py"]


@pytest.mark.parametrize("module", [transformers.trainer, peft.utils.save_and_load], ids=lambda module: module.__name__)
def test_what_libraries_load_for_us_is_of_weights_only(module):
    """The loop's checkpoints and an adapter's weights; a version that loads otherwise must not come unnoticed."""
    loads = [
        node
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert loads
    for node in loads:
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert keywords.get("weights_only") in {"True", "weights_only"}, node.lineno
    default = inspect.signature(peft.utils.save_and_load.torch_load).parameters["weights_only"].default
    assert default is True
