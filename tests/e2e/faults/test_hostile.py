"""Files that want to run code, to reach outside of their folder, or to eat all memory: refused, and nothing ran."""

import gzip
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
import torch

from p2d_cli.artifacts import checkpoints
from p2d_cli.artifacts.checkpoints import seal_checkpoint
from p2d_cli.artifacts.manifest import read_manifest
from p2d_cli.engine import tuning as stage


class Bait:
    """An object whose unpickling makes a file."""

    def __init__(self, canary):
        self._canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self._canary,)


@pytest.fixture
def canary(tmp_path):
    """What hostile code would make; it must not be there at the end."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "hostile code ran"


def refused(done, code, *words):
    assert done.code == code, done.said
    for word in words:
        assert str(word) in done.said, f"{word!r} is not in: {done.said}"


def code_for(canary):
    return f"import os\nos.mkdir({str(canary)!r})\nclass Model: pass\nclass Config: pass\nclass Tokenizer: pass\n"


@pytest.fixture
def model(tiny_folder, tmp_path):
    """A copy of the model, to be spoilt."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


@pytest.fixture
def edit():
    def edit(path, **changes):
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


@pytest.fixture
def evaluate(p2d, model, few, tmp_path):
    def run(*extra, **changes):
        settings = {"model": model, "data": few["test"], "limit": 1, "max-new-tokens": 1, "out": tmp_path / "out"}
        settings = {name: value for name, value in (settings | changes).items() if value is not None}
        return p2d("eval", *(word for name, value in settings.items() for word in (f"--{name}", value)), *extra)

    return run


def test_the_bait_works(tmp_path):
    """Else none of these tests would say anything."""
    pickle.loads(pickle.dumps(Bait(tmp_path / "made")))
    assert (tmp_path / "made").is_dir()
    torch.save(Bait(tmp_path / "loaded"), tmp_path / "bait.pt")
    torch.load(tmp_path / "bait.pt", weights_only=False)
    assert (tmp_path / "loaded").is_dir()


# --- pickles


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt", "model.pkl"])
def test_a_model_in_a_pickle(evaluate, model, canary, name):
    (model / "model.safetensors").unlink()
    torch.save(Bait(canary), model / name)
    refused(evaluate(), 65, name, "a pickle file, which p2d does not load: it could run code", "safetensors")


def test_a_pickle_beside_the_weights_is_not_touched(evaluate, model, canary):
    torch.save(Bait(canary), model / "pytorch_model.bin")
    torch.save(Bait(canary), model / "training_args.bin")
    assert evaluate().code == 0


def test_an_adapter_in_a_pickle(evaluate, golden, canary, tmp_path):
    (tmp_path / "adapter").mkdir()
    shutil.copy(golden / "adapter" / "adapter_config.json", tmp_path / "adapter")
    torch.save(Bait(canary), tmp_path / "adapter" / "adapter_model.bin")
    refused(evaluate(adapter=tmp_path / "adapter"), 65, "adapter_model.bin", "a pickle file", "could run code")
    shutil.copy(golden / "adapter" / "adapter_model.safetensors", tmp_path / "adapter")
    assert evaluate(adapter=tmp_path / "adapter").code == 0


@pytest.mark.parametrize(
    "name", ["optimizer.pt", *(["scheduler.pt", "rng_state.pth"] if "P2D_SLOW" in os.environ else [])]
)
def test_a_checkpoint_with_a_bait_under_a_good_seal(p2d, short, canary, tmp_path, monkeypatch, name):
    """Whoever can write a checkpoint can seal it too: what protects is that only tensors are loaded."""
    command = [word for word in short["lora"] if word not in {"--max-steps", 1}]
    command += ["--epochs", 2, "--checkpoint-minutes", 0, "--out", tmp_path / "out"]

    def seal(folder, progress):
        checkpoints.seal_checkpoint(folder, progress)
        torch.save(Bait(canary), folder / name)
        torch.save(Bait(canary), folder / "training_args.bin")
        (folder / "p2d_seal.json").unlink()
        seal_checkpoint(folder, progress)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage, "seal_checkpoint", seal)
        assert p2d(*command).code == 130
    refused(p2d(*command), 65, "checkpoint-1", "could run code", "nothing was run", "to start anew, remove")
    assert p2d(*command, "--force").code == 0


# --- code


def test_a_model_that_brings_its_code(evaluate, model, canary, edit):
    (model / "modeling_x.py").write_text(code_for(canary))
    names = {"AutoModelForCausalLM": "modeling_x.Model", "AutoConfig": "modeling_x.Config"}
    edit(model / "config.json", auto_map=names)
    assert evaluate().code == 0, "transformers has the class itself, and the code is not needed"
    edit(model / "config.json", model_type="x", auto_map=names)
    refused(evaluate("--force"), 65, model, "needs code from its own checkpoint (auto_map), which p2d does not run")


def test_a_tokenizer_that_brings_its_code(evaluate, model, canary, edit):
    (model / "tokenization_x.py").write_text(code_for(canary))
    names = {"AutoTokenizer": ["tokenization_x.Tokenizer", "tokenization_x.Tokenizer"]}
    edit(model / "tokenizer_config.json", tokenizer_class="Tokenizer", auto_map=names)
    assert evaluate().code in {0, 65}, "the class of the tokenizer's own file, or refused"


def test_generation_that_brings_its_code(evaluate, model, canary, edit):
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(code_for(canary) + "def generate(*a, **k): pass\n")
    edit(model / "generation_config.json", custom_generate="custom_generate")
    assert evaluate().code == 0


def test_an_adapter_that_imports_a_module(evaluate, golden, canary, tmp_path, edit, monkeypatch):
    """PEFT would import what `megatron_core` names."""
    (tmp_path / "lure.py").write_text(code_for(canary))
    monkeypatch.syspath_prepend(tmp_path)
    adapter = shutil.copytree(golden / "adapter", tmp_path / "adapter")
    (adapter / "manifest.json").unlink()
    edit(adapter / "adapter_config.json", megatron_config={"a": 1}, megatron_core="lure")
    refused(evaluate(adapter=adapter), 65, "'lure'", "megatron_config", "does not run")


def test_an_adapter_hidden_in_a_model(evaluate, model, golden):
    """transformers would put it on the model unasked, and no digest would tell."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(golden / "adapter" / name, model)
    refused(evaluate(), 65, model, "both a model and an adapter")


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.mkdir('CANARY') }}",
        "{{ self.__init__.__globals__.__builtins__.__import__('os').mkdir('CANARY') }}",
        "{% for m in messages %}{{ m.append(1) }}{{ messages.append(m) }}{% endfor %}",
        "{% include 'CANARY' %}",
        "{{ 1 / 0 }}",
        "{{ range(10 ** 9) | list }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    ],
)
def test_a_chat_template_is_sandboxed(evaluate, tmp_path, canary, template):
    (tmp_path / "chat.jinja").write_text(template.replace("CANARY", str(canary)))
    done = evaluate(**{"template": "chat", "chat-template": tmp_path / "chat.jinja"})
    refused(done, 65, "template")


def test_a_chat_template_of_the_model_is_sandboxed(evaluate, model, canary, edit):
    edit(
        model / "tokenizer_config.json",
        chat_template=f"{{{{ lipsum.__globals__['os'].mkdir('{canary}') }}}}",
    )
    refused(evaluate(template="chat"), 65, "template")


# --- names that lead elsewhere


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "secret"
    path.write_text("nobody's business")
    return path


@pytest.mark.parametrize("name", ["../secret", "a/../../secret", "ABSOLUTE", "..\\secret", "."])
def test_a_manifest_that_names_files_elsewhere(p2d, golden, secret, tmp_path, name, tiny_folder, few):
    folder = shutil.copytree(golden / "heads", tmp_path / "heads")
    manifest = json.loads((folder / "manifest.json").read_text())
    name = str(secret) if name == "ABSOLUTE" else name
    manifest["outputs"][name] = manifest["outputs"]["head_scores.safetensors"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    mine = ("mine-data", "--model", tiny_folder, "--heads", folder, "--pool", few["pool"], "--out", tmp_path / "out")
    for command in (mine, ("inspect", folder)):
        refused(p2d(*command), 65, folder / "manifest.json", "leaves the folder")


def test_a_payload_that_is_a_link_elsewhere(p2d, golden, tmp_path):
    """Even to the same bytes, and to a file that is called like their digest."""
    for name in ("elsewhere", read_manifest(golden / "heads").outputs["head_scores.safetensors"].sha256):
        folder = shutil.copytree(golden / "heads", tmp_path / f"heads-{name}")
        (folder / "head_scores.safetensors").rename(tmp_path / name)
        (folder / "head_scores.safetensors").symlink_to(tmp_path / name)
        refused(p2d("inspect", folder), 65, folder / "head_scores.safetensors", "is a link to", tmp_path / name)
    # One that stays inside is only another name.
    folder = shutil.copytree(golden / "heads", tmp_path / "inside")
    (folder / "head_scores.safetensors").rename(folder / "x")
    (folder / "head_scores.safetensors").symlink_to("x")
    assert p2d("inspect", folder).code == 0


def test_an_artifact_in_a_hub_cache_is_made_of_links(p2d, golden, tmp_path):
    """They lead to the cache's own store, and what lies there is read."""
    folder, blobs = tmp_path / "models--a--b" / "snapshots" / ("c" * 40), tmp_path / "models--a--b" / "blobs"
    shutil.copytree(golden / "model", folder)
    blobs.mkdir()
    for name, output in read_manifest(folder).outputs.items():
        (folder / name).rename(blobs / output.sha256)
        (folder / name).symlink_to(f"../../blobs/{output.sha256}")
    assert p2d("inspect", folder).code == 0
    blob = blobs / read_manifest(folder).outputs["model.safetensors"].sha256
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(bytes(content))
    refused(p2d("inspect", folder), 65, "model.safetensors", "damaged")


@pytest.mark.parametrize("name", ["../model/model.safetensors", "ABSOLUTE", 7, None, "../../x.bin"])
def test_an_index_that_names_weights_elsewhere(evaluate, model, tiny_folder, name):
    name = str(tiny_folder / "model.safetensors") if name == "ABSOLUTE" else name
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"a": name}}))
    refused(evaluate(), 65, "model.safetensors.index.json")


@pytest.mark.parametrize("name", ["../secret.arrow", "/etc/passwd", 7, None])
def test_a_saved_data_set_that_names_files_elsewhere(evaluate, tmp_path, name):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    refused(evaluate(data=tmp_path / "rows"), 65, tmp_path / "rows", "as a part of it")
    (tmp_path / "rows" / "dataset_dict.json").write_text(json.dumps({"splits": [name]}))
    refused(evaluate(data=tmp_path / "rows"), 65, tmp_path / "rows", "as a part of it")


@pytest.mark.parametrize("name", ["rows.tar.gz", "rows.zip", "rows.jsonl.tgz"])
def test_archives_are_not_unpacked(evaluate, tmp_path, canary, name):
    path = tmp_path / name
    if name.endswith("zip"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"../{canary.name}", "x")
    else:
        with tarfile.open(path, "w:gz") as archive:
            member = tarfile.TarInfo(f"../{canary.name}")
            member.size = 1
            archive.addfile(member, io.BytesIO(b"x"))
    refused(
        evaluate(data=path), 65, name, "is a zip archive" if name.endswith("zip") else "is a tar archive", "unpack it"
    )


@pytest.mark.parametrize("text", ["[]", "7", '"x"', "[" * 100_000, "\x00"])
def test_a_config_that_is_none(evaluate, model, text):
    (model / "config.json").write_text(text)
    refused(evaluate(), 65, model / "config.json")


# --- bombs


def bomb(path, line, count):
    with gzip.open(path, "wb", compresslevel=6) as stream:
        for _ in range(count):
            stream.write(line)


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_a_compressed_bomb(evaluate, tmp_path, monkeypatch, ending):
    monkeypatch.setattr("p2d_cli.data.row_files._GZIP_BOMB_BYTES", 2**20)
    path = tmp_path / f"rows.{ending}.gz"
    bomb(path, b"\n" * 65536, 2**6)
    assert path.stat().st_size < 2**15
    refused(evaluate(data=path), 65, path, "expands to more than", "50 times its size", "gzip -dk")


def test_honest_compression_is_no_bomb(evaluate, few, tmp_path, monkeypatch):
    monkeypatch.setattr("p2d_cli.data.row_files._GZIP_BOMB_BYTES", 0)
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(few["test"].read_bytes()))
    assert evaluate(data=path).code == 0


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_a_line_without_end(evaluate, few, tmp_path, monkeypatch, ending):
    monkeypatch.setattr("p2d_cli.data.row_files._LONGEST_LINE", 4096)
    path = tmp_path / f"rows.{ending}"
    good = few["test"].read_text().splitlines()[0] if ending == "jsonl" else "prompt,completion\na,b"
    path.write_text(f"{good}\n{'x' * 100_000}\n{good}\n")
    number = 2 + good.count("\n")
    refused(evaluate(data=path, limit=None), 65, f"rows.{ending}:{number}", "a line of more than 4,096 bytes")
    if ending == "jsonl":
        done = evaluate("--skip-bad-rows", data=path, limit=None)
        assert done.code == 0, done.said
        assert "1 bad rows left out" in done.said


def test_a_cell_without_end(evaluate, tmp_path, monkeypatch):
    monkeypatch.setattr("p2d_cli.data.row_files._LONGEST_LINE", 4096)
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion\n"never closed,b\n' + "x,y\n" * 5000)
    refused(evaluate(data=path), 65, "rows.csv:2", "field limit")


def test_an_object_without_end_in_an_array(evaluate, tmp_path, monkeypatch):
    monkeypatch.setattr("p2d_cli.data.row_files._LONGEST_LINE", 4096)
    monkeypatch.setattr("p2d_cli.data.row_files._BLOCK", 1024)
    path, row = tmp_path / "rows.json", {"prompt": "x", "completion": "y"}
    path.write_text(json.dumps([row] * 200))
    assert evaluate(data=path).code == 0
    path.write_text("[" + json.dumps(row) + ",\n" + json.dumps(row | {"completion": "y" * 100_000}) + "]")
    refused(evaluate("--force", data=path, limit=None), 65, "rows.json:2: an object of more than 4,096 characters")


@pytest.mark.skipif("P2D_SLOW" not in os.environ, reason="writes and reads gigabytes; P2D_SLOW=1 runs it")
@pytest.mark.parametrize("kind", ["line", "bomb", "bomb-of-one-line", "document"])
def test_in_earnest_memory_stays_bounded(tmp_path, kind):
    path = tmp_path / {"line": "r.jsonl", "document": "r.json"}.get(kind, "r.jsonl.gz")
    if kind in {"line", "document"}:
        with path.open("wb") as stream:
            stream.write(b'[{"prompt": "' if kind == "document" else b'{"prompt": "')
            for _ in range(1200):
                stream.write(b"x" * 2**20)
    else:
        bomb(path, b'{"prompt": "a", "completion": "b"}\n' * 2000 if kind == "bomb" else b"x" * 65536, 12_000)
    code = (
        "import resource, sys\n"
        "from p2d_cli.data.sources import locate, scan_rows\n"
        "from p2d_cli.errors import DataError\n"
        "try:\n"
        "    problems = [row for row in scan_rows(locate(sys.argv[1])) if not hasattr(row, 'fields')]\n"
        "    print('bad row', problems[0].problem)\n"
        "except DataError as problem: print('refused', problem)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, 'MiB')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    print(kind, path.stat().st_size, done.stdout)
    assert int(done.stdout.split()[-2]) < 700
