"""Hub ids where the hub does not answer: told within seconds, and what is cached works all the same."""

import os
import socket
import subprocess
import sys
import threading

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ASK = """
import sys, time
from p2d_cli.data import sources
from p2d_cli.errors import P2DError
from p2d_cli.modeling import model_files
sources._PROBE_SECONDS = model_files._PROBE_SECONDS = 1.0
take = {"rows": lambda spec: list(sources.read_rows(sources.locate(spec)))}
for name in ("model", "rows", "cached"):
    started = time.monotonic()
    try:
        print("found", take.get(name, model_files.locate_model)(f"somebody/{name}").revision)
    except P2DError as problem:
        print(problem.exit_code, problem.message.replace("\\n", " "), "TRY", problem.hint)
    print(int(time.monotonic() - started))
"""


@pytest.fixture
def silent_hub():
    """A server that takes connections and never answers."""
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen(64)
    taken = []

    def accept():
        while True:
            try:
                taken.append(server.accept())
            except OSError:
                return

    threading.Thread(target=accept, daemon=True).start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}"
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    for connection, _ in taken:
        connection.close()


@pytest.mark.parametrize("kind", ["silent", "refusing"] if "P2D_SLOW" in os.environ else ["silent"])
def test_without_an_answer_the_cache_is_all_there_is(silent_hub, tmp_path, tiny_folder, kind):
    """Told in seconds: the hub's own client would try again for minutes."""
    endpoint = silent_hub if kind == "silent" else "http://127.0.0.1:9"
    cached = tmp_path / "hub" / "models--somebody--cached"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(COMMIT)
    (cached / "snapshots").mkdir()
    (cached / "snapshots" / COMMIT).symlink_to(tiny_folder)
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub")}
    environment |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", ASK], capture_output=True, text=True, env=environment, check=True, timeout=240
    )
    model, model_seconds, rows, rows_seconds, found, found_seconds = done.stdout.splitlines()
    assert model.startswith("69 model somebody/model is neither a folder here nor in the local hub cache")
    assert f"{endpoint} does not answer" in model
    assert "hf download somebody/model" in model
    assert rows.startswith("69 data set somebody/rows is not available")
    assert "HF_HUB_OFFLINE=1" in rows
    assert found == f"found {COMMIT}"
    assert max(map(int, (model_seconds, rows_seconds, found_seconds))) < 30
