"""Bad input through the real command line: what was expected, what was found, what to do; the documented code."""

import gzip
import json
import shutil

import pyarrow.parquet as pq
import pytest


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def score(p2d, tiny_folder, few, tmp_path):
    """`p2d score-heads` with good inputs, to be spoilt one at a time."""

    def run(*extra, **changes):
        settings = {"model": tiny_folder, "target": few["target"], "pool": few["pool"], "out": tmp_path / "out"}
        settings |= {key.replace("_", "-"): value for key, value in changes.items()}
        words = [word for key, value in settings.items() if value is not None for word in (f"--{key}", value)]
        return p2d("score-heads", *words, *extra)

    return run


@pytest.fixture
def train(p2d, tiny_folder, few, tmp_path):
    def run(*extra, **changes):
        settings = {"model": tiny_folder, "data": few["target"], "scope": "lora", "out": tmp_path / "out"} | changes
        words = [word for key, value in settings.items() if value is not None for word in (f"--{key}", value)]
        return p2d("train", *words, "--max-steps", 1, *extra)

    return run


def refused(done, code, *words):
    assert done.code == code, done.said
    assert "Traceback" not in done.said
    for word in words:
        assert str(word) in done.said, f"{word!r} is not in: {done.said}"


# --- typing


def test_a_typo_in_a_command_gets_a_suggestion(p2d):
    refused(p2d("scroe-heads"), 2, "score-heads")


def test_a_typo_in_an_option_gets_a_suggestion(score):
    refused(score("--methd", "pad"), 2, "--method")


def test_a_typo_in_a_value_lists_the_values(score):
    refused(score(method="padd"), 2, "pad")


def test_a_value_out_of_range(score):
    refused(score(ratio="1.5"), 2, "--ratio", "less than or equal to 1", "1.5", "flag")


def test_a_value_that_is_no_number(score):
    refused(score(episodes="many"), 2, "--episodes", "integer")


def test_all_problems_are_shown_together(train):
    refused(train("--epochs", "-1", "--lr", "0"), 2, "--epochs", "--lr", "several settings")
    refused(train("--lr", "fast"), 2, "--lr: input should be a valid number", "or input should be 'probe'; got 'fast'")


def test_a_missing_option_is_named(p2d, tiny_folder):
    refused(p2d("train", "--model", tiny_folder), 2, "--out is required", "--data is required")


def test_a_misspelt_variable_gets_a_suggestion(score, monkeypatch):
    monkeypatch.setenv("P2D_EPISODE", "3")
    refused(score(), 2, "P2D_EPISODE", "P2D_EPISODES")


def test_a_variable_of_somebody_else_is_no_concern_of_ours(score, monkeypatch):
    monkeypatch.setenv("P2D_SCRATCH_DISK", "3")
    assert score("--dry-run").code == 0


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("[trian]\nepochs = 1\n", 2, ("trian", "did you mean 'train'")),
        ("[train]\nepoch = 1\n", 2, ("epoch", "did you mean 'epochs'")),
        ("[train.full]\nlearning = 1\n", 2, ("learning", "[train.full]")),
        ("[grid]\ndata = ['p2dd']\n", 2, ("grid", "p2dd")),
        ("[grid]\nheds = []\n", 2, ("heds", "heads")),
        ("[defaults]\nmodle = 'x'\n", 2, ("modle", "model")),
        ("[reference]\nepoch = 1\n", 2, ("epoch", "epochs")),
        ("not toml", 65, ("not valid TOML", "line 1")),
        ("name = 'x'\n", 2, ("out",)),
    ],
)
def test_bad_recipes(p2d, tmp_path, text, code, words):
    (tmp_path / "recipe.toml").write_text(text)
    refused(p2d("run", tmp_path / "recipe.toml"), code, *words)


def test_a_missing_recipe(p2d, tmp_path):
    refused(p2d("run", tmp_path / "none.toml"), 65, "no recipe at", "none.toml")
    (tmp_path / "recipe.toml").touch()
    refused(p2d("run", tmp_path / "recip.toml"), 65, "no recipe at", "did you mean recipe.toml?")
    refused(p2d("run", tmp_path), 65, "is a folder")
    refused(p2d("train", "--config", tmp_path / "none.toml"), 65, "no recipe")


# --- inputs


def test_a_missing_file_names_its_neighbours(score, tmp_path):
    (tmp_path / "target.jsonl").write_text("")
    refused(score(target=tmp_path / "targets.jsonl"), 65, "targets.jsonl", "target.jsonl")


def test_a_missing_model(score, tmp_path):
    refused(score(model=tmp_path / "nowhere"), 69, "nowhere")


def test_a_hub_model_without_a_network(score):
    refused(score(model="nobody/no-such-model"), 69, "nobody/no-such-model", "cache")


def test_a_folder_that_is_no_model(score, tmp_path):
    refused(score(model=tmp_path), 65, "config.json")


def test_an_adapter_given_as_the_model(p2d, pipeline, few, tmp_path):
    done = p2d("eval", "--model", pipeline / "adapter", "--data", few["test"], "--out", tmp_path / "e")
    refused(done, 65, "--adapter")


def test_pickled_weights_are_not_loaded(score, tiny_folder, tmp_path):
    (tmp_path / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused(score(model=tmp_path), 65, "pytorch_model.bin", "pickle", "safetensors")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "a", "completion": ', (":3", "JSON")),
        ('["a", "b"]', (":3",)),
        ('{"prompt": null, "completion": "b"}', (":3", "prompt")),
        ('{"prompt": 7, "completion": "b"}', (":3", "prompt")),
        ('{"prompt": "a", "completion": ""}', (":3", "completion")),
        ('{"prompt": "a"}', (":3", "completion")),
    ],
)
def test_an_unreadable_row_is_named_by_file_and_line(score, tmp_path, line, words):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' * 2 + line + "\n")
    refused(score(target=path), 65, "rows.jsonl", *words)


def test_bad_rows_can_be_skipped_and_are_counted(score, few, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(few["target"].read_text() + "{broken\n")
    done = score("--skip-bad-rows", "--episodes", 4, target=path)
    assert done.code == 0, done.said
    assert "1 bad rows left out" in done.said
    assert "rows.jsonl:13" in done.said


def test_bytes_that_are_not_utf8(score, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a", "completion": "\xff"}\n')
    refused(score(target=path), 65, "rows.jsonl:1", "UTF-8")


def test_an_empty_file(score, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("")
    refused(score(target=path), 65, "rows.jsonl")


def test_columns_that_nobody_knows_are_listed(score, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"source": "a", "sink": "b"}])
    refused(score(target=path), 65, "source", "sink", "--prompt-column")


def test_a_wrong_column_name(score, few):
    refused(score("--prompt-column", "promt"), 65, "promt", "prompt")


def test_columns_can_be_named(score, tmp_path):
    target, pool = (
        write_rows(tmp_path / f"{name}.jsonl", [{"source": f"{name} {n}", "sink": "b"} for n in range(8)])
        for name in ("target", "pool")
    )
    done = score("--prompt-column", "source", "--completion-column", "sink", target=target, pool=pool)
    assert done.code == 0, done.said


def test_truncation_takes_the_prompt_first_so_that_labels_are_left(train, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "w " * 50, "completion": "z"}])
    refused(train("--max-length", "1", data=path), 2, "--max-length 1 has no room", "raise it")
    done = train("--max-length", "8", data=path)
    assert done.code == 0, done.said
    assert "1 of 1 rows were longer than 8 tokens" in done.said


def test_labels_that_truncation_removed(train, monkeypatch):
    """A template may leave no label; then there is nothing to learn from, and p2d says so before training."""
    from p2d_cli.data.prompts import EncodedExample, PromptTemplate

    nothing = EncodedExample(input_ids=(1, 2, 3), prompt_length=3, truncated=2)
    monkeypatch.setattr(PromptTemplate, "encode_example", lambda *_, **__: nothing)
    refused(train("--max-length", "16"), 65, "--max-length 16", "all 12 rows", "raise --max-length")


def test_a_pool_smaller_than_an_episode(score, p2d, pipeline, tiny_folder, tmp_path):
    path = write_rows(tmp_path / "pool.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}])
    refused(score(pool=path, method="contrast"), 65, "pool", "demos")
    mine = ("mine-data", "--model", tiny_folder, "--heads", pipeline / "heads", "--pool", path)
    refused(p2d(*mine, "--out", tmp_path / "s"), 65, "demos")


def test_a_pool_too_small_to_tell_the_target_from(score, p2d, pipeline, tiny_folder, few, tmp_path):
    path = write_rows(tmp_path / "pool.jsonl", [{"prompt": "a", "completion": "b"}])
    mine = ("mine-data", "--model", tiny_folder, "--heads", pipeline / "heads", "--target", few["target"])
    refused(p2d(*mine, "--pool", path, "--out", tmp_path / "s"), 65, "at least 2 pool rows", "found 1")
    refused(score(pool=path, method="readout"), 65, "4 pool rows", "found 12 and 1")


def test_a_pool_of_target_rows_only(p2d, pipeline, tiny_folder, few, tmp_path):
    mine = ("mine-data", "--model", tiny_folder, "--heads", pipeline / "heads", "--target", few["target"])
    done = p2d(*mine, "--pool", few["target"], "--out", tmp_path / "s")
    refused(done, 65, "all 12 rows of the pool are target rows", "nothing to choose from")


def test_empty_completions_are_named(score, tmp_path):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": ""}]
    refused(score(target=write_rows(tmp_path / "t.jsonl", rows)), 65, "t.jsonl:2", "empty")


@pytest.mark.parametrize("affinity", ["readout", "attention"])
def test_numbers_that_are_none_are_no_scores(p2d, tiny_folder, few, tmp_path, affinity):
    """A model with a NaN among its weights is found out, and leaves nothing behind."""
    import torch
    from transformers import AutoModelForCausalLM

    broken = shutil.copytree(tiny_folder, tmp_path / "broken")
    model = AutoModelForCausalLM.from_pretrained(broken, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[3, 3] = torch.nan
    model.save_pretrained(broken)
    common = ("--model", broken, "--dtype", "float32")
    assert p2d("score-heads", *common, "--method", "uniform", "--out", tmp_path / "h").code == 0
    mine = ("mine-data", *common, "--heads", tmp_path / "h", "--pool", few["pool"], "--target", few["target"])
    refused(p2d(*mine, "--affinity", affinity, "--out", tmp_path / "s"), 70, "finite", "download it again")
    assert not (tmp_path / "s").exists()
    (tmp_path / "choices.json").write_text('["alpha", "bravo"]')
    evaluate = ("eval", *common, "--data", few["test"], "--choices", tmp_path / "choices.json")
    for metric in ("accuracy", "perplexity"):
        refused(p2d(*evaluate, "--metric", metric, "--out", tmp_path / "e"), 70, "finite", "download it again")
        assert not (tmp_path / "e").exists()
    refused(
        p2d("score-heads", *common, "--target", few["target"], "--pool", few["pool"], "--method", "readout",
            "--out", tmp_path / "r"), 70, "finite",
    )  # fmt: skip


def test_one_target_row(score, tmp_path):
    one = write_rows(tmp_path / "t.jsonl", [{"prompt": "a", "completion": "b"}])
    refused(score(target=one, method="contrast"), 65, "two different")
    refused(score(target=one, method="readout"), 65, "at least 2 target rows")


def test_what_a_method_needs_is_said(score, p2d, tiny_folder, few, tmp_path):
    refused(score(pool=None, method="contrast"), 2, "--pool", "pad")
    refused(score(target=None, pool=None, method="taylor"), 2, "--target")
    mine = ("mine-data", "--model", tiny_folder, "--pool", few["pool"], "--out", tmp_path / "s")
    refused(p2d(*mine), 2, "--heads", "score-heads")
    refused(p2d(*mine, "--method", "random", "--ratio", "0.5", "--count", "3"), 2, "--ratio and --count")
    refused(p2d(*mine, "--method", "random", "--count", "61"), 2, "61", "60")
    refused(p2d(*mine, "--method", "data-whisperer", "--layer", "9"), 2, "--layer 9", "0 to 3")


def test_heads_scope_needs_heads(train):
    refused(train(scope="heads"), 2, "--scope heads needs --heads")


def test_a_tracker_that_is_not_installed(train, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(train("--tracker", "trackio"), 69, "trackio", "pip install trackio")


def test_choices_for_accuracy(p2d, tiny_folder, few, tmp_path):
    evaluate = ("eval", "--model", tiny_folder, "--data", few["test"], "--limit", 2, "--metric", "accuracy")
    refused(p2d(*evaluate, "--out", tmp_path / "e"), 65, "choices")
    (tmp_path / "one.json").write_text('["only"]')
    refused(p2d(*evaluate, "--choices", tmp_path / "one.json", "--out", tmp_path / "e"), 65, "at least two")
    (tmp_path / "two.json").write_text('["alpha", "bravo"]')
    done = p2d(*evaluate, "--choices", tmp_path / "two.json", "--out", tmp_path / "two")
    assert (done.code, f"2 rows offer other choices than their answer, as {few['test'].name}:1" in done.said) == (
        0,
        True,
    )
    summary = json.loads((tmp_path / "two" / "manifest.json").read_text())["summary"]
    assert (summary["answers_not_offered"], summary["metrics"]["accuracy"]["value"]) == (2, 0.0)
    answers = [json.loads(line)["completion"] for line in few["test"].read_text().splitlines()[:2]]
    (tmp_path / "own.json").write_text(json.dumps([f" {answer} " for answer in answers] + ["other"]))
    done = p2d(*evaluate, "--choices", tmp_path / "own.json", "--out", tmp_path / "e")
    assert (done.code, "other choices" in done.said) == (0, False)
    table = pq.read_table(tmp_path / "e" / "predictions.parquet").to_pylist()
    assert [row["accuracy"] for row in table] == [row["choice"].strip() == row["reference"] for row in table]


def test_a_reference_without_a_number_is_named_before_the_model_is_asked(p2d, tiny_folder, tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "1"}\n{"prompt": "b", "completion": "none"}\n')
    monkeypatch.setattr("p2d_cli.modeling.loading.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    rows = ("--data", tmp_path / "rows.jsonl", "--metric", "number_match")
    refused(p2d("eval", "--model", tiny_folder, *rows, "--out", tmp_path / "e"), 65, "rows.jsonl:2", "number")
    pool = ("--pool", tmp_path / "rows.jsonl", "--target", tmp_path / "rows.jsonl", "--method", "data-whisperer")
    done = p2d(
        *("mine-data", "--model", tiny_folder, *pool, "--perf", "generate", "--perf-metric", "number_match"),
        *("--out", tmp_path / "s"),
    )
    refused(done, 65, "rows.jsonl:2", "number")


def test_an_unknown_device(score):
    refused(score(device="gpu9"), 2, "gpu9")


def test_a_device_that_is_not_there(score):
    import torch

    if torch.cuda.device_count() > 7:
        pytest.skip("this machine has eight accelerators")
    refused(score(device="cuda:7"), 69, "cuda:7")


# --- artifacts


def test_an_artifact_of_the_wrong_kind(p2d, pipeline, tiny_folder, few, tmp_path):
    mine = ("mine-data", "--model", tiny_folder, "--pool", few["pool"], "--out", tmp_path / "s")
    done = p2d(*mine, "--heads", pipeline / "subset")
    refused(done, 65, "expected an artifact of kind heads", "kind subset", "p2d score-heads")
    done = p2d(*mine[:3], "--pool", pipeline / "heads", "--method", "random", "--out", tmp_path / "s")
    refused(done, 65, "expected an artifact of kind subset")
    done = p2d("report-aer", pipeline / "adapter", "--reference", pipeline / "evaluation", "--out", tmp_path / "r")
    refused(done, 65, "expected an artifact of kind evaluation", "p2d eval")


def test_a_folder_that_is_no_artifact(p2d, tiny_folder, few, tmp_path):
    mine = ("mine-data", "--model", tiny_folder, "--pool", few["pool"], "--out", tmp_path / "s")
    refused(p2d(*mine, "--heads", few["pool"].parent), 65, "manifest.json")
    refused(p2d("inspect", tmp_path), 65, "manifest.json")
    refused(p2d("inspect", tmp_path / "none"), 65, "nothing at")
    refused(p2d("export", tmp_path, "--out", tmp_path / "x"), 65, "adapter_config.json")


def test_heads_of_another_model(p2d, pipeline, few, tmp_path):
    mine = ("mine-data", "--model", pipeline / "full", "--pool", few["pool"], "--heads", pipeline / "heads")
    done = p2d(*mine, "--out", tmp_path / "s")
    refused(done, 65, "another model", "it was made with", "--model is", pipeline / "full", "tiny-model")


def test_an_adapter_of_another_model(p2d, pipeline, few, tmp_path):
    evaluate = ("eval", "--model", pipeline / "full", "--adapter", pipeline / "adapter", "--data", few["test"])
    refused(p2d(*evaluate, "--out", tmp_path / "e"), 65, "another model")


def test_a_whole_model_given_as_the_adapter(p2d, pipeline, tiny_folder, few, tmp_path):
    evaluate = ("eval", "--model", tiny_folder, "--adapter", pipeline / "full", "--data", few["test"])
    refused(p2d(*evaluate, "--out", tmp_path / "e"), 65, "give it as --model")


@pytest.mark.parametrize(
    ("name", "file"),
    [("heads", "head_scores.safetensors"), ("subset", "subset.parquet"), ("adapter", "adapter_model.safetensors")],
)
def test_a_wrong_byte_is_refused_before_a_model_loads(p2d, copy_of, name, file):
    folder = copy_of(name)
    content = bytearray((folder / file).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / file).write_bytes(bytes(content))
    refused(p2d("inspect", folder), 65, file, "sha256")


def test_an_artifact_of_a_newer_p2d(p2d, copy_of, tiny_folder, few, tmp_path):
    folder = copy_of("heads")
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace("p2d.heads/1", "p2d.heads/2"))
    mine = ("mine-data", "--model", tiny_folder, "--pool", few["pool"], "--heads", folder, "--out", tmp_path / "s")
    refused(p2d(*mine), 65, "p2d.heads/2", "upgrade p2d")


# --- outputs


def test_foreign_files_are_not_overwritten(score, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("ten years")
    refused(score("--force"), 73, "did not write", "another --out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "ten years"


def test_an_output_that_is_an_input(p2d, pipeline, tiny_folder, few):
    before = (pipeline / "heads" / "manifest.json").read_bytes()
    mine = ("mine-data", "--model", tiny_folder, "--pool", few["pool"], "--heads", pipeline / "heads")
    refused(p2d(*mine, "--out", pipeline / "heads", "--force"), 73, "also an input")
    assert (pipeline / "heads" / "manifest.json").read_bytes() == before


def test_an_output_below_a_file(score, tmp_path):
    (tmp_path / "file").write_text("")
    refused(score(out=tmp_path / "file" / "heads"), 73, "cannot create")


@pytest.mark.parametrize("length", [240, 300])
@pytest.mark.parametrize("extra", [(), ("--dry-run",), ("--force",)])
def test_an_output_of_too_long_a_name(score, tmp_path, length, extra):
    refused(score(*extra, out=tmp_path / ("n" * length)), 73, "is too long", "choose a shorter name")
    assert list(tmp_path.iterdir()) == [], "nothing was begun"


@pytest.mark.parametrize("name", ["n" * 300, "n" * 300 + ".jsonl", "n/" * 3000])
def test_an_input_of_too_long_a_name(score, p2d, tmp_path, name):
    # From Python 3.14 on a path of any length may be asked whether it is there; reading it fails as before.
    refused(score(target=tmp_path / name), 65, "no such file or folder")
    refused(p2d("inspect", tmp_path / name), 65)
    refused(p2d("run", tmp_path / name), 65, "is too long")


def test_rows_under_the_longest_name_are_read(score, tmp_path):
    path = write_rows(tmp_path / ("n" * 249 + ".jsonl"), [{"prompt": letter, "completion": "b"} for letter in "abc"])
    refused(score("--dry-run", target=path), 0, "would run")


def test_rows_in_a_form_of_their_own(score, tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(gzip.compress(b'{"prompt": "a", "completion": "b"}\n'))
    refused(score(target=path), 65, "t.jsonl is gzip", "ends in .gz")
    refused(score(target="-"), 65, "standard input", "write them to a file")


def test_a_failure_leaves_nothing_half_made(score, tmp_path):
    path = write_rows(tmp_path / "t.jsonl", [{"prompt": "a", "completion": "b"}])
    assert score(target=path).code == 65
    assert [item.name for item in tmp_path.iterdir()] == ["t.jsonl"]


def test_ctrl_c_is_one_line_and_130(score, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("p2d_cli.stages.score_heads._compute", interrupt)
    done = score()
    refused(done, 130, "interrupted")
    assert len(done.err.strip().splitlines()) == 1


def test_a_defect_of_p2d_is_one_line_and_70(score, monkeypatch):
    def break_down(*_):
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("p2d_cli.stages.score_heads._compute", break_down)
    refused(score(), 70, "internal error: ZeroDivisionError: a defect", "P2D_DEBUG")


def test_a_full_disk(score, monkeypatch, tmp_path):
    def fill(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("p2d_cli.stages.score_heads.save_head_scores", fill)
    refused(score("--episodes", 4), 74, "No space left")
    assert not (tmp_path / "out").exists()


def test_errors_are_json_when_asked(score, tmp_path):
    done = score("--json", model=tmp_path / "nowhere")
    assert done.code == 69
    assert done.json["status"] == "error"
    assert done.json["exit_code"] == 69
    assert "nowhere" in done.json["message"]
    assert done.json["hint"]
