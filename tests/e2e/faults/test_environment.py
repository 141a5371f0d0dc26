"""What a login node, a container or a batch queue has in store: odd folders, streams and variables.

Each command is cheap; the streams are real, in one process a test.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from p2d_cli.cli import streams
from p2d_cli.errors import SECRET_VARIABLES, P2DError, without_secrets


@pytest.fixture
def random_heads(p2d, tiny_folder, monkeypatch, tmp_path):
    """`p2d score-heads --method random`, in an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(*extra, model=tiny_folder):
        return p2d("score-heads", "--model", model, "--method", "random", *extra)

    return run


def write_rows(path, prompts=("a", "b", "c", "d")):
    lines = [json.dumps({"prompt": prompt, "completion": "x"}, ensure_ascii=False) + "\n" for prompt in prompts]
    path.write_text("".join(lines), encoding="utf-8")
    return path


# --- where the output goes


@pytest.mark.parametrize(
    "out", ["with space/heads", "größe/日本", "heads/", "../beside", "[red]/heads", "-- x", "a\nb"]
)
def test_folders_of_any_name(random_heads, p2d, out):
    done = random_heads(f"--out={out}", "--json")
    assert done.code == 0, done.said
    assert Path(out, "manifest.json").is_file()
    assert p2d("inspect", "--", out).code == 0
    assert random_heads(f"--out={out}", "--json").json["status"] == "up-to-date"


def test_a_home_that_the_shell_did_not_expand(random_heads, p2d, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert random_heads("--out=~/heads").code == 0
    assert (tmp_path / "heads" / "manifest.json").is_file()
    assert p2d("inspect", "~/heads").code == 0
    for name in ("out", "model"):
        words = {"out": ("--out", "~nobody-here/x"), "model": ("--out", "x", "--model", "~nobody-here/x")}[name]
        done = random_heads(*words)
        assert done.code == 2, done.said
        assert f"--{name}: the home folder of ~nobody-here is not known" in done.said
    assert p2d("inspect", "~nobody-here/x").code == 65


@pytest.mark.parametrize("name", ["out", "model"])
def test_a_variable_of_the_shell_that_is_not_set(random_heads, name):
    """`--out "$RUN"` without RUN is not the current folder."""
    words = {"out": ("--out", ""), "model": ("--out", "x", "--model", "")}[name]
    done = random_heads(*words)
    assert done.code == 2, done.said
    assert f"--{name}: the path is empty" in done.said


def test_a_name_that_is_too_long(random_heads, tmp_path):
    for name in ("x" * 300, "x" * 250, "x/" * 4000):
        done = random_heads("--out", tmp_path / name)
        assert done.code == 73, done.said
        assert "too long" in done.said
        assert "choose a shorter name" in done.said
    done = random_heads("--out", "heads", model="x" * 300)
    assert done.code == 65, done.said


def test_an_output_that_is_the_folder_of_an_input(random_heads, p2d, tiny_folder, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl")
    done = p2d("mine-data", "--model", tiny_folder, "--pool", rows, "--method", "random", "--out", tmp_path, "--force")
    assert done.code == 73, done.said
    assert rows.is_file()
    assert random_heads("--out", tmp_path / "runs" / "heads").code == 0
    done = random_heads("--out", tmp_path / "runs")
    assert done.code == 73, done.said
    assert "files that p2d did not write" in done.said


# --- what is given as rows


def mine(p2d, tiny_folder, pool, out, *extra):
    return p2d("mine-data", "--model", tiny_folder, "--pool", pool, "--method", "random", "--out", out, *extra)


def test_rows_that_are_no_file(p2d, tiny_folder, tmp_path):
    """A pipe can be read once, and rows are read twice: for their digest and for themselves."""
    os.mkfifo(tmp_path / "rows.jsonl")
    for pool in (tmp_path / "rows.jsonl", "/dev/zero", "/dev/null"):
        done = mine(p2d, tiny_folder, pool, tmp_path / "s")
        assert done.code == 65, done.said
        assert "a pipe or a device" in done.said
        assert "write them to a file" in done.said


def test_files_beside_the_rows_that_are_none(p2d, tiny_folder, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl")
    os.mkfifo(tmp_path / "fifo")
    evaluate = ("eval", "--model", tiny_folder, "--data", rows, "--metric", "accuracy", "--out", tmp_path / "e")
    for flag in ("--choices", "--chat-template"):
        for path in (tmp_path / "fifo", tmp_path):
            done = p2d(*evaluate, flag, path)
            assert done.code == 65, done.said
            assert f"{flag} {path} is no file" in done.said


def test_a_folder_where_a_recipe_is_expected(p2d, tmp_path):
    assert p2d("run", tmp_path).code == 65
    assert p2d("train", "--config", "~nobody-here/recipe.toml").code == 65


# --- settings that no artifact can hold


def test_numbers_beyond_all_bounds(random_heads, p2d, tiny_folder, tmp_path):
    for flag, value in (("--seed", 10**30), ("--episodes", 2**31), ("--temperature", "inf"), ("--ratio", "nan")):
        done = random_heads("--out", "x", flag, value)
        assert done.code == 2, done.said
        assert flag in done.said
    (tmp_path / "r.toml").write_text("[defaults]\nseed = 0x" + "f" * 5000 + '\n[train]\nsystem = "a\\u0000b"\n')
    done = p2d("train", "--config", tmp_path / "r.toml", "--model", "m", "--data", "d", "--out", "o")
    assert done.code == 2, done.said
    assert "got int that is too large to show" in done.said
    assert "--system: a NUL character" in done.said


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[train]\nfull = 3\n", "[train.full] must be a table"),
        ("[train]\nscope = []\n", "[train] scope must be one of"),
        ("[score-heads]\nmethod = '../x'\n", "[score-heads] method must be one of"),
        ("[mine-data]\nmethod = {}\n", "[mine-data] method must be one of"),
        ("[reference]\nscope = 1\n", "[reference] scope must be one of"),
        ("[defaults]\nseed = 'x'\n", "[defaults] seed"),
    ],
)
def test_recipes_of_the_wrong_shape(p2d, tmp_path, text, word):
    (tmp_path / "r.toml").write_text(f"out = 'runs'\n{text}")
    done = p2d("run", tmp_path / "r.toml", "--dry-run")
    assert done.code == 2, done.said
    assert word in done.said


def test_a_recipe_that_is_nested_too_deeply(p2d, tmp_path):
    (tmp_path / "r.toml").write_text("x = " + "[" * 100_000)
    done = p2d("run", tmp_path / "r.toml")
    assert done.code == 65, done.said
    assert "not valid TOML" in done.said


# --- the terminal


def test_texts_cannot_steer_the_terminal(p2d, tiny_folder, tmp_path):
    """A row, or the name of an artifact, may come from anywhere."""
    rows = write_rows(tmp_path / "rows.jsonl", ["\x1b]0;owned\x07", "\x9b31m", "plain\r"])
    out = tmp_path / "s"
    assert mine(p2d, tiny_folder, rows, out, "--ratio", 1).code == 0
    done = p2d("inspect", out)
    assert done.code == 0
    assert "\\x1b]0;owned" in done.out
    assert not {"\x1b", "\x9b", "\x07"} & set(done.out + done.err)
    done = p2d("inspect", tmp_path / "\x1b[31m")
    assert "\x1b" not in done.err
    assert streams.visible("a\tb\nc\x7f") == "a\tb\nc\\x7f"


@pytest.mark.parametrize(
    "variables", [{"COLUMNS": "20"}, {"TERM": "dumb"}, {"NO_COLOR": "1"}, {"COLUMNS": "x"}, {"COLUMNS": "1"}]
)
def test_any_terminal(p2d, tiny_folder, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    golden = tiny_folder.parent / "golden" / "v1"
    for kind in ("heads", "subset", "report"):
        assert p2d("inspect", golden / kind).code == 0
    assert p2d("compare", golden / "evaluation", golden / "evaluation").code == 0


# --- real streams

SCRIPT = """
import io, os, runpy, sys
def p2d(*words):
    from p2d_cli import __main__
    sys.argv = ["p2d", *words]
    try:
        __main__.main()
    except SystemExit as end:
        return end.code or 0
    return 0
"""


def python(code, **options):
    """Run Python code that may call `p2d(...)` in a process of its own."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHONIO"))}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT + code],
        env=environ | options.pop("env", {}),
        capture_output=True,
        timeout=300,
        **options,
    )


def test_a_locale_without_unicode(tiny_folder, tmp_path):
    """LANG=C and no UTF-8 mode: rows, paths and messages that ASCII does not hold."""
    folder = tmp_path / "größe"
    folder.mkdir()
    rows = write_rows(folder / "zeilen.jsonl", ["ä", "日本", "🙂", "d"])
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = python(
        f"folder = os.fsdecode({os.fsencode(folder)!r})\n"
        f"mine = ('mine-data', '-m', {str(tiny_folder)!r}, '--method', 'random', '--ratio', '1')\n"
        "codes = [\n"
        "    p2d(*mine, '--pool', folder + '/zeilen.jsonl', '--out', folder + '/s', '--json'),\n"
        "    p2d('inspect', folder + '/s'),\n"
        "    p2d(*mine, '--pool', folder + '/fehlt.jsonl', '--out', folder + '/t'),\n"
        "]\n"
        "print(codes, file=sys.stderr)\n",
        env=plain,
    )
    said = done.stderr.decode("ascii")
    # Without UTF-8 the system's names are no UTF-8 for Python either: a path is refused, or works.
    assert said.strip().splitlines()[-1] in {"[0, 0, 65]", "[2, 65, 2]"}, said
    assert "Traceback" not in said
    assert "internal error" not in said
    done.stdout.decode("ascii")
    assert rows.is_file()


def test_streams_that_are_closed_cut_off_or_full(tiny_folder, tmp_path):
    """`>&-`, `2>&-`, `| head -1` and a full disk, one after the other in one process."""
    golden = tiny_folder.parent / "golden" / "v1"
    done = python(
        "codes = []\n"
        "real = os.dup(2)\n"
        "def put(target, text):\n"
        "    os.dup2(target, 1)\n"
        "    sys.stdout = io.TextIOWrapper(io.FileIO(1, 'w', closefd=False), 'utf-8', write_through=False)\n"
        "    from p2d_cli.cli import render\n"
        "    codes.append((text, p2d('inspect', sys.path_of, *(['--json'] if text != 'pipe' else []))))\n"
        f"sys.path_of = {str(golden / 'subset')!r}\n"
        "read, write = os.pipe(); os.close(read)\n"
        "put(write, 'pipe'); put(write, 'json')\n"
        "put(os.open('/dev/full', os.O_WRONLY), 'full')\n"
        "os.dup2(os.open(os.devnull, os.O_WRONLY), 1)\n"
        "os.close(1); sys.stdout = None\n"
        "codes.append(('closed', p2d('inspect', sys.path_of, '--json'))); \n"
        "codes.append(('refused', p2d('inspect', sys.path_of + 'x')))\n"
        "os.close(2); sys.stderr = None\n"
        "codes.append(('deaf', p2d('inspect', sys.path_of + 'x', '--json')))\n"
        "os.write(real, repr(codes).encode())\n",
    )
    said = done.stderr.decode()
    for expected in ("('pipe', 0)", "('json', 0)", "('full', 74)", "('closed', 0)", "('refused', 65)", "('deaf', 65)"):
        assert expected in said, said
    assert "Traceback" not in said
    assert done.returncode == 0, said


def test_head_ends_the_pipe(tiny_folder):
    """As a shell does it: the process itself ends well, and says nothing."""
    golden = tiny_folder.parent / "golden" / "v1"
    words = [sys.executable, "-m", "p2d_cli", "inspect", golden / "adapter", "--json"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=120) == 0


def test_a_user_without_a_home(random_heads, monkeypatch, tmp_path):
    """As in a container whose user has no entry: nothing is remembered, and nothing fails."""
    from p2d_cli.artifacts import digests

    def homeless(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("P2D_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(digests, "REMEMBERED_BYTES", 1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "expanduser", lambda path: homeless(path) if str(path).startswith("~") else path)
        assert random_heads("--out", "heads").code == 0
    monkeypatch.setenv("HOME", "/proc/nowhere")
    assert random_heads("--out", "others").code == 0


# --- secrets


def test_messages_keep_secrets(monkeypatch):
    for variable in SECRET_VARIABLES:
        monkeypatch.setenv(variable, f"secret-of-{variable}")
        assert str(P2DError(f"refused: secret-of-{variable}!")) == "refused: ***!"
    problem = P2DError("no answer from https://user:pass@host/x", hint="see http://token@host:8/y and a@b")
    assert problem.message == "no answer from https://***@host/x"
    assert problem.hint == "see http://***@host:8/y and a@b"
    monkeypatch.setenv("HF_TOKEN", "")
    assert without_secrets("ab") == "ab"
