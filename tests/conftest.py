"""What all tests share: the command line in this process, and the fixtures' paths."""

from __future__ import annotations

import base64
import contextlib
import functools
import gc
import io
import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings
from matplotlib.figure import Figure

# The same examples in every run: what fails here fails everywhere.
settings.register_profile("p2d", derandomize=True)
settings.load_profile("p2d")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests run side by side, one process a core; more threads than cores wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))  # for `composites`, beside this file
ROOT = Path(__file__).parent.parent
FIXTURES = ROOT / "fixtures"
_SAVEFIG = Figure.savefig


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)

    @property
    def said(self):
        """Everything it said, with the line breaks of panels undone."""
        return " ".join((self.out + " " + self.err).split())


def run_p2d(*arguments) -> Done:
    """Run the real command line in this process; a traceback of any kind fails the test."""
    from p2d_cli.cli import terminal
    from p2d_cli.cli.app import app

    words = [str(argument) for argument in arguments]
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    code = 0
    sys.argv = ["p2d", *words]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            terminal.out.file, terminal.err.file = out, err
            app(words)
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv = argv
    assert "Traceback" not in err.getvalue()
    freeze_libraries()
    return Done(code, out.getvalue(), err.getvalue())


@functools.cache
def _freeze() -> None:
    gc.collect()
    gc.freeze()


def freeze_libraries() -> None:
    """Leave what the libraries made when they were imported out of garbage collection, one of which ends each training:
    it takes 0.3 s as long as it looks at them."""
    if "transformers.trainer" in sys.modules:
        _freeze()


@pytest.fixture(scope="session")
def p2d():
    return run_p2d


@pytest.fixture(scope="session")
def tiny_folder():
    return FIXTURES / "tiny-model"


@pytest.fixture(scope="session")
def rows():
    """Paths of the fixture's pool, target and test rows."""
    return {name: FIXTURES / "data" / f"{name}.jsonl" for name in ("pool", "target", "test")}


BLANK_PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


@pytest.fixture(scope="session", autouse=True)
def _blank_pictures():
    """Compose pictures, but do not rasterise them, which takes longer than all else that a stage does with few rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda _figure, path, **_: Path(path).write_bytes(BLANK_PNG))
        yield


@contextlib.contextmanager
def _draw_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", _SAVEFIG)
        yield


@pytest.fixture(scope="session")
def drawing():
    """In the context that it makes they are rasterised all the same."""
    return _draw_pictures


@pytest.fixture
def pictures():
    """Rasterise them all the same."""
    with _draw_pictures():
        yield


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Keep remembered digests out of the user's home."""
    monkeypatch.setenv("P2D_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "p2d-cache"))
    for variable in [name for name in os.environ if name.startswith("P2D_") and name != "P2D_CACHE_DIR"]:
        monkeypatch.delenv(variable)


@pytest.fixture(autouse=True)
def _hears_signals():
    """A shell lets what it starts in the background ignore Ctrl-C, and a command that is done ignores all signals."""
    handlers = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGUSR1: signal.SIG_DFL,
    }
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def composite():
    """Factory `composite(family, folder, dtype, **text_settings)` of a saved model of text and images, see there."""
    import composites

    return lambda family, folder, dtype, **text: composites.save(family, folder, dtype, FIXTURES / "tiny-model", **text)


@pytest.fixture
def flash_kernel(monkeypatch):
    """The id of a kernel of the hub that is flash attention in plain torch; the rows of its calls are in the module."""
    import plain_flash
    from transformers import AttentionInterface, modeling_flash_attention_utils, modeling_utils
    from transformers.integrations import hub_kernels

    from p2d_cli.modeling import attention_kernels

    for module in (hub_kernels, modeling_utils, attention_kernels):
        monkeypatch.setattr(module, "is_kernels_available", lambda: True)
    monkeypatch.setattr(hub_kernels, "get_kernel", lambda *_, **__: plain_flash)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    plain_flash.ROWS_AT_ONCE.clear()
    name = "kernels-community/flash-attn"
    yield name
    AttentionInterface._global_mapping.pop(name, None)
