"""Hostile input through the real command line: never a traceback, always a documented exit code and a message.

The examples are few and the same in every run. `P2D_FUZZ_EXAMPLES=20000 python -m pytest tests/e2e/faults/test_fuzz.py`
draws as many new ones for each test.
"""

import io
import json
import math
import os
import shutil
import string
import sys
import traceback
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from p2d_cli.config import STAGE_CONFIGS, flag_name
from p2d_cli.errors import EXIT_CODES

LONG_RUN = int(os.environ.get("P2D_FUZZ_EXAMPLES", "0"))
NO_ARTIFACT = frozenset({"lm_eval_tasks", "lm_eval"})
"""Settings that a fuzzed value must not reach: they read whole folders, and hand over to lm-eval."""


def fuzz(examples):
    """Try so many examples, or those of a long run."""
    return settings(
        max_examples=LONG_RUN or examples,
        derandomize=not LONG_RUN,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


# --- driving


FOUND = {}


@pytest.fixture(autouse=True)
def _found():
    """A long run goes on after a failure, and lists each place that failed once, with the first command."""
    FOUND.clear()
    yield
    assert not FOUND, "\n".join(f"{place}\n    {first}" for place, first in FOUND.items())


def drive(monkeypatch, *words, environ=None):
    """Run `p2d`; a long run notes what fails, the others end."""
    try:
        return run_as_script(monkeypatch, words, environ or {})
    except Exception as problem:
        if not LONG_RUN:
            raise
        frames = [frame for frame in traceback.extract_tb(problem.__traceback__) if "/p2d_cli/" in frame.filename]
        own = [frame for frame in frames if not frame.filename.endswith(("commands.py", "__main__.py"))] or frames
        place = f"{Path(own[-1].filename).name}:{own[-1].lineno} {own[-1].name}" if own else ""
        FOUND.setdefault(
            f"{place} {type(problem).__name__}: {str(problem)[:200]!r}"
            if not own
            else f"{place} {type(problem).__name__}",
            f"{str(problem)[:300]!r} {words!r:.300}",
        )
        return None, "", ""


def run_as_script(monkeypatch, words, environ):
    """Run `p2d` as its console script does, on streams that encode; what escapes a command is raised, not reported."""
    from p2d_cli import __main__
    from p2d_cli.cli import terminal

    def reveal(problem):
        raise problem

    out, err = io.BytesIO(), io.BytesIO()
    code = 0
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["p2d", *map(str, words)])
        patch.setattr(sys, "stdout", io.TextIOWrapper(out, "utf-8", "strict", write_through=True))
        patch.setattr(sys, "stderr", io.TextIOWrapper(err, "utf-8", "backslashreplace", write_through=True))
        patch.setattr(terminal.out, "file", None)
        patch.setattr(terminal.err, "file", None)
        patch.setattr("p2d_cli.cli.commands._fail_internally", reveal)
        for name, value in environ.items():
            patch.setenv(name, value)
        try:
            __main__.main()
        except SystemExit as end:
            code = end.code or 0
        finally:
            # Kept open: a wrapper that is collected closes the bytes beneath it.
            texts = [stream.getvalue().decode("utf-8", "replace") for stream in (out, err)]
            sys.stdout.detach(), sys.stderr.detach()
    check(code, *texts)
    return code, *texts


def check(code, out, err):
    said = f"exit {code}: {out[-1000:]}{err[-2000:]}"
    assert code in EXIT_CODES, said
    assert "Traceback" not in err, said
    assert "internal error" not in out + err, said
    if code:
        assert err.strip().removeprefix("error:").strip(), said
    if code == 70:
        assert "finite" in err, said
    assert "\x1b" not in err, said


# --- values

HOSTILE_TEXTS = (
    *(
        "",
        " ",
        "\x00",
        "a\x00b",
        "\n",
        "\r\n",
        "\x1b[31m",
        "\u202e",
        "\ufeff",
        "é",
        "日本語",
        "🙂",
        "[bold]",
        "[/]",
        "{}",
        "%s",
    ),
    *(
        "~",
        "~nobody-here/x",
        "/",
        ".",
        "..",
        "../..",
        "/dev/null",
        "/dev/zero",
        "/proc/self/mem",
        "a/b",
        "a/b@c",
        "a" * 300,
        "x/" * 3000,
    ),
    *("nan", "inf", "-inf", "1e999", "-1", "0", "1e400", "0x10", "1_000", "9" * 50, "9" * 5000, "true", "None", "null"),
    *(
        "https://user:secret@host/x",
        "hf://x",
        "-",
        "--",
        "-h",
        "--out",
        "=",
        ",",
        ",,",
        "q,q",
        "*",
        "$HOME",
        "`id`",
        "; rm",
    ),
)
HOSTILE_NUMBERS = (
    0,
    -1,
    1,
    2**31,
    2**63,
    -(2**63) - 1,
    2**64,
    10**30,
    10**400,
    0.0,
    -0.0,
    1e-320,
    1e308,
    math.nan,
    math.inf,
    -math.inf,
)

texts = st.sampled_from(HOSTILE_TEXTS) | st.text(max_size=20)
scalars = st.sampled_from(HOSTILE_NUMBERS) | st.booleans() | st.none() | texts
lone_surrogates = st.sampled_from(["\ud800", "a\udcffb"])
json_values = st.recursive(
    scalars | lone_surrogates,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


BEYOND_PRINT = "an integer that Python reads in hexadecimal, and does not print in decimal"


def toml(value):
    """Write a value in TOML; what TOML cannot say becomes a text."""
    if value is BEYOND_PRINT:
        return "0x" + "f" * 5000
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml(str(key))} = {toml(item)}" for key, item in value.items()) + "}"
    text = "".join(
        letter if letter.isprintable() and letter not in '"\\' else f"\\U{ord(letter):08x}" for letter in str(value)
    )
    return f'"{text}"'


FIELDS = sorted({name for config in STAGE_CONFIGS.values() for name in config.model_fields} - NO_ARTIFACT)
TABLES = (
    "defaults",
    "score-heads",
    "mine-data",
    "train",
    "eval",
    "report-aer",
    "grid",
    "reference",
    "name",
    "out",
    "controls",
)
keys = st.sampled_from([*FIELDS, "heads", "data", "seed", "scope", "method", "full", "lora"]) | texts
toml_values = st.recursive(
    scalars | st.sampled_from(["random", "full", "lora", "heads", "pad", BEYOND_PRINT]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=6,
)
tables = st.dictionaries(keys, toml_values, max_size=4) | toml_values


@pytest.fixture
def recipe(tiny_folder, rows, tmp_path):
    """Sound tables of a recipe, over which fuzzed ones go."""
    return {
        "out": str(tmp_path / "runs"),
        "defaults": {"model": str(tiny_folder), "target": str(rows["target"]), "pool": str(rows["pool"])},
        "eval": {"data": str(rows["test"])},
    }


def merged(sound, spoilt):
    both = dict(sound)
    for key, value in spoilt.items():
        both[key] = {**sound[key], **value} if isinstance(value, dict) and isinstance(sound.get(key), dict) else value
    return both


@fuzz(10)
@given(
    spoilt=st.dictionaries(st.sampled_from(TABLES) | texts, tables, max_size=3),
    stage=st.sampled_from(sorted(STAGE_CONFIGS)),
    how=st.sampled_from(["--dry-run", "--print-config"]),
)
def test_recipes(monkeypatch, recipe, tmp_path, spoilt, stage, how):
    path = tmp_path / "recipe.toml"
    path.write_text(
        "\n".join(f"{toml(key)} = {toml(value)}" for key, value in merged(recipe, spoilt).items()), encoding="utf-8"
    )
    drive(monkeypatch, "run", path, how)
    drive(monkeypatch, stage, "--config", path, "--out", tmp_path / "stage", how)


@fuzz(15)
@given(data=st.data())
def test_recipes_with_spoilt_bytes(monkeypatch, tiny_folder, tmp_path, data):
    path = tmp_path / "recipe.toml"
    path.write_bytes(spoilt_bytes(data.draw, (tiny_folder.parent / "quickstart.toml").read_bytes()))
    drive(monkeypatch, "run", path, "--out", tmp_path / "runs", "--dry-run")


def spoilt_bytes(draw, content):
    """Cut, flip, insert or repeat bytes in a few places."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        position = draw(st.integers(0, len(content)))
        match draw(st.sampled_from(["flip", "insert", "drop", "cut", "repeat"])):
            case "flip":
                content[position : position + 1] = bytes([draw(st.integers(0, 255))])
            case "insert":
                content[position:position] = draw(
                    st.binary(max_size=8) | st.sampled_from([b"[" * 5000, b'"', b"\n", b"{", b"\xff"])
                )
            case "drop":
                del content[position : position + draw(st.integers(1, 64))]
            case "cut":
                del content[position:]
            case "repeat":
                content[position:position] = content[position : position + draw(st.integers(1, 64))]
    return bytes(content)


# --- command lines and variables

arguments = texts.filter(lambda text: "\x00" not in text) | st.sampled_from(["\udcff", *map(str, HOSTILE_NUMBERS[:-8])])


def flags_of(command):
    return [flag_name(name) for name in STAGE_CONFIGS[command].model_fields if name not in NO_ARTIFACT]


@fuzz(40)
@given(
    command=st.sampled_from(sorted(STAGE_CONFIGS)),
    picks=st.lists(st.tuples(st.integers(0, 99), arguments), max_size=4),
    extra=st.lists(arguments, max_size=2),
    how=st.lists(st.sampled_from(["--dry-run", "--print-config", "--json", "-q", "-v"]), max_size=3),
    golden_inputs=st.booleans(),
)
def test_command_lines(monkeypatch, tiny_folder, rows, tmp_path, command, picks, extra, how, golden_inputs):
    words = [command, *sound_flags(command, tiny_folder, rows, tmp_path)] if golden_inputs else [command]
    flags = flags_of(command)
    for pick, value in picks:
        words += [flags[pick % len(flags)], value]
    drive(monkeypatch, *words, *extra, *how, *([] if {"--dry-run", "--print-config"} & set(how) else ["--dry-run"]))


def sound_flags(command, tiny_folder, rows, tmp_path):
    golden = tiny_folder.parent / "golden" / "v1"
    given = {
        "model": tiny_folder, "target": rows["target"], "pool": rows["pool"], "data": rows["test"],
        "heads": golden / "heads", "adapter": golden / "adapter", "reference": golden / "evaluation",
    }  # fmt: skip
    known = STAGE_CONFIGS[command].model_fields
    words = [word for name, value in given.items() if name in known for word in (flag_name(name), value)]
    if command == "export":
        words = [golden / "adapter", "--model", tiny_folder]
    if command == "report-aer":
        words = [golden / "evaluation", *words]
    return [*words, "--out", tmp_path / "out"]


@fuzz(15)
@given(
    command=st.sampled_from(sorted(STAGE_CONFIGS)),
    variables=st.dictionaries(
        st.sampled_from([name.upper() for name in FIELDS] + ["EPOCH", "CACHE_DIR", "JSON", "X"])
        | st.text(string.ascii_uppercase + "_", min_size=1, max_size=8),
        arguments,
        max_size=3,
    ),
    how=st.sampled_from(["--dry-run", "--print-config"]),
)
def test_variables(monkeypatch, tiny_folder, rows, tmp_path, command, variables, how):
    environ = {f"P2D_{name}": value for name, value in variables.items() if name not in {"DEBUG", "LM_EVAL"}}
    drive(monkeypatch, command, *sound_flags(command, tiny_folder, rows, tmp_path), how, environ=environ)


# --- rows

columns = st.sampled_from(
    [
        "prompt",
        "completion",
        "messages",
        "instruction",
        "input",
        "output",
        "question",
        "answer",
        "id",
        "system",
        "choices",
        "score",
        "rank",
    ]
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system"]) | texts, "content": texts | scalars}
    ),
    max_size=3,
)
row_objects = st.dictionaries(
    columns | texts | lone_surrogates, json_values | messages, max_size=5
) | st.fixed_dictionaries(
    {"prompt": texts, "completion": texts}, optional={"id": scalars, "choices": st.lists(texts), "x": json_values}
)


@fuzz(20)
@given(
    items=st.lists(row_objects | json_values, max_size=4),
    suffix=st.sampled_from([".jsonl", ".json", ".jsonl.gz", ".csv", ".tsv", ".parquet", ".arrow"]),
    spoil=st.booleans(),
    skip=st.booleans(),
    method=st.sampled_from(["random", "full", "lexical"]),
    data=st.data(),
)
def test_rows(monkeypatch, tiny_folder, tmp_path, items, suffix, spoil, skip, method, data):
    path = tmp_path / f"rows{suffix}"
    content = written_rows(items, suffix)
    path.write_bytes(spoilt_bytes(data.draw, content) if spoil and content else content)
    out = tmp_path / "subset"
    shutil.rmtree(out, ignore_errors=True)
    words = ["mine-data", "--model", tiny_folder, "--pool", path, "--method", method, "--ratio", "0.5", "--out", out]
    code, *_ = drive(monkeypatch, *words, *(["--skip-bad-rows"] if skip else []))
    if code == 0:
        drive(monkeypatch, "inspect", out)


def written_rows(items, suffix):
    import gzip

    match suffix:
        case ".json":
            return json.dumps(items).encode()
        case ".csv" | ".tsv":
            lines = [item if isinstance(item, dict) else {"x": item} for item in items]
            names = list(dict.fromkeys(str(name) for line in lines for name in line))
            cells = [names, *([str(line.get(name, "")) for name in names] for line in lines)]
            mark = "," if suffix == ".csv" else "\t"
            return "\n".join(mark.join(map(json.dumps, line)) for line in cells).encode()
        case ".parquet" | ".arrow":
            return arrow_rows(items, suffix)
    content = "".join(json.dumps(item) + "\n" for item in items).encode()
    return gzip.compress(content) if suffix.endswith(".gz") else content


def arrow_rows(items, suffix):
    try:
        table = pa.Table.from_pylist([item for item in items if isinstance(item, dict)])
    except (pa.ArrowException, OverflowError, UnicodeEncodeError, TypeError):
        table = pa.table({"prompt": ["a"], "completion": ["b"]})
    sink = io.BytesIO()
    try:
        if suffix == ".parquet":
            pq.write_table(table, sink)
        else:
            with pa.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table)
    except pa.ArrowException:
        pass
    return sink.getvalue()


# --- artifacts


@pytest.fixture
def golden(tiny_folder):
    return tiny_folder.parent / "golden" / "v1"


def places(value, path=()):
    """Yield the path of every value within a JSON document."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def spoil_json(draw, document):
    """Delete, replace or rename a few values in place."""
    for _ in range(draw(st.integers(1, 3))):
        if not (found := list(places(document))):
            return
        path = draw(st.sampled_from(found))
        parent = document
        for key in path[:-1]:
            parent = parent[key]
        match draw(st.sampled_from(["delete", "replace", "replace", "wrap", "add"])):
            case "delete":
                del parent[path[-1]]
            case "replace":
                parent[path[-1]] = draw(json_values)
            case "wrap":
                parent[path[-1]] = [parent[path[-1]]]
            case "add" if isinstance(parent, dict):
                parent[draw(texts)] = draw(json_values)


def spoil_tensors(draw, path):
    tensors = load_file(path)
    name = draw(st.sampled_from(sorted(tensors)))
    match draw(st.sampled_from(["drop", "shape", "dtype", "nan", "empty"])):
        case "drop":
            del tensors[name]
        case "shape":
            tensors[name] = np.ascontiguousarray(tensors[name].reshape(-1)[: draw(st.integers(0, 9))])
        case "dtype":
            tensors[name] = tensors[name].astype(
                draw(st.sampled_from([np.float16, np.int8, np.uint64, np.bool_, np.float64]))
            )
        case "nan":
            tensors[name] = tensors[name].astype(np.float32) * draw(st.sampled_from([np.nan, np.inf, 0.0]))
        case "empty":
            tensors = {}
    with path.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    described = header.get("__metadata__") or {}
    if "p2d" in described and draw(st.booleans()):
        inner = json.loads(described["p2d"])
        spoil_json(draw, inner)
        described["p2d"] = json.dumps(inner)
    save_file(tensors, path, metadata=described)


def spoil_table(draw, path):
    table = pq.read_table(path)
    name = draw(st.sampled_from(table.column_names))
    place = table.column_names.index(name)
    match draw(st.sampled_from(["drop", "null", "text", "number", "list", "fewer", "struct", "twice"])):
        case "drop":
            table = table.drop_columns([name])
        case "null":
            table = table.set_column(place, name, pa.nulls(table.num_rows))
        case "text":
            table = table.set_column(
                place, name, pa.array([draw(texts.filter(lambda text: len(text) < 99))] * table.num_rows)
            )
        case "number":
            table = table.set_column(
                place, name, pa.array([draw(st.sampled_from([0.0, math.nan, math.inf, -1.0, 1e300]))] * table.num_rows)
            )
        case "list":
            table = table.set_column(place, name, pa.array([[1, 2]] * table.num_rows))
        case "fewer":
            table = table.slice(0, draw(st.integers(0, table.num_rows)))
        case "struct":
            table = table.set_column(place, name, pa.array([{"a": None}] * table.num_rows))
        case "twice":
            table = table.append_column(name, table[name])
    pq.write_table(table, path)


def spoil_artifact(draw, folder):
    """Spoil a payload file or the manifest, and make the digests fit again so that the deeper readers are reached."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    if draw(st.booleans()):
        payload = [folder / name for name in manifest["outputs"] if not name.endswith((".png", ".md", ".html"))]
        spoil_payload(draw, draw(st.sampled_from(payload)))
    for name, entry in manifest["outputs"].items():
        content = (folder / name).read_bytes()
        entry |= {"sha256": sha256(content).hexdigest(), "bytes": len(content)}
    if draw(st.booleans()):
        spoil_json(draw, manifest)
    text = json.dumps(manifest).encode()
    (folder / "manifest.json").write_bytes(spoilt_bytes(draw, text) if draw(st.integers(0, 9)) == 0 else text)


def spoil_payload(draw, path):
    if path.suffix == ".json" and path.stat().st_size < 20_000 and draw(st.booleans()):
        document = json.loads(path.read_bytes())
        spoil_json(draw, document)
        path.write_text(json.dumps(document))
    elif path.suffix == ".safetensors" and draw(st.booleans()):
        spoil_tensors(draw, path)
    elif path.suffix == ".parquet" and draw(st.booleans()):
        spoil_table(draw, path)
    else:
        path.write_bytes(spoilt_bytes(draw, path.read_bytes()))


def fresh_copy(source, target):
    shutil.rmtree(target, ignore_errors=True)
    return shutil.copytree(source, target)


@fuzz(40)
@given(
    kind=st.sampled_from(["heads", "subset", "adapter", "evaluation", "report", "model"]),
    how=st.sampled_from([[], ["--json"]]),
    data=st.data(),
)
def test_inspect(monkeypatch, golden, tmp_path, kind, how, data):
    folder = fresh_copy(golden / kind, tmp_path / kind)
    spoil_artifact(data.draw, folder)
    drive(monkeypatch, "inspect", folder, *how)


@fuzz(25)
@given(swapped=st.booleans(), how=st.sampled_from([[], ["--json"]]), data=st.data())
def test_compare(monkeypatch, golden, tmp_path, swapped, how, data):
    folder = fresh_copy(golden / "evaluation", tmp_path / "evaluation")
    spoil_artifact(data.draw, folder)
    pair = [folder, golden / "evaluation"]
    drive(monkeypatch, "compare", *(reversed(pair) if swapped else pair), *how)


@fuzz(15)
@given(swapped=st.booleans(), data=st.data())
def test_report_aer(monkeypatch, golden, tmp_path, swapped, data):
    folder = fresh_copy(golden / "evaluation", tmp_path / "evaluation")
    spoil_artifact(data.draw, folder)
    shutil.rmtree(tmp_path / "report", ignore_errors=True)
    monkeypatch.setattr("p2d_cli.stages.report_aer._draw", lambda *_: None)  # a picture takes longer than all the rest
    pair = [folder, golden / "evaluation"]
    first, second = reversed(pair) if swapped else pair
    drive(monkeypatch, "report-aer", first, "--reference", second, "--allow-mixed", "--out", tmp_path / "report")


@fuzz(15)
@given(
    kind=st.sampled_from(["heads", "subset", "adapter", "model", "evaluation"]),
    data=st.data(),
)
def test_inputs_of_stages(monkeypatch, golden, tiny_folder, rows, tmp_path, kind, data):
    folder = fresh_copy(golden / kind, tmp_path / kind)
    spoil_artifact(data.draw, folder)
    out = ("--out", tmp_path / "out", "--dry-run")
    base = ("--model", tiny_folder)
    commands = {
        "heads": [
            ("mine-data", *base, "--heads", folder, "--pool", rows["pool"]),
            ("train", *base, "--heads", folder, "--data", rows["pool"]),
        ],
        "subset": [("train", *base, "--data", folder), ("mine-data", *base, "--method", "random", "--pool", folder)],
        "adapter": [("eval", *base, "--adapter", folder, "--data", rows["test"]), ("export", folder, *base)],
        "model": [("eval", "--model", folder, "--data", rows["test"])],
        "evaluation": [("report-aer", folder, "--reference", golden / "evaluation")],
    }[kind]
    for words in commands:
        drive(monkeypatch, *words, *out)


@fuzz(3)
@given(data=st.data())
def test_export(monkeypatch, golden, tiny_folder, tmp_path, data):
    """With a model loaded: what the adapter's files say is not what PEFT and the model expect."""
    folder = fresh_copy(golden / "adapter", tmp_path / "adapter")
    spoil_artifact(data.draw, folder)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    drive(monkeypatch, "export", folder, "--model", tiny_folder, "--out", tmp_path / "out")
