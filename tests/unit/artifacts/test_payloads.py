"""Payloads open with the libraries that others would use, and survive a round trip."""

import datetime
import decimal
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors import safe_open
from safetensors.numpy import save_file

from p2d_cli.artifacts import subset
from p2d_cli.artifacts.adapter import save_merged_card, save_model_card, save_training_log
from p2d_cli.artifacts.evaluation import load_metrics, save_evaluation
from p2d_cli.artifacts.head_scores import HEAD_SCORES_NAME, HeadScores, load_head_scores, save_head_scores
from p2d_cli.artifacts.subset import (
    NamedPoolScores,
    load_extreme_rows,
    load_pool_scores,
    save_subset,
    save_subset_card,
)
from p2d_cli.core.aer import MetricValue
from p2d_cli.core.geometry import HeadGeometry, LayerHeads, ReadingHeads
from p2d_cli.core.subset_selection import rank_rows
from p2d_cli.errors import ArtifactError


def some_heads():
    rng = np.random.default_rng(0)
    scores = rng.random((3, 4)).astype(np.float32)
    return HeadScores(
        scores_LH=scores,
        selected_LH=scores > 0.7,
        repeats_RLH=np.stack([scores, scores / 2]),
        method="contrast",
        geometry=HeadGeometry.even(3, num_heads=4, num_groups=2, head_dim=8, hidden_size=32),
    )


def test_heads_round_trip_and_open_with_safetensors_alone(tmp_path):
    heads = some_heads()
    save_head_scores(tmp_path, heads)
    read = load_head_scores(tmp_path)
    assert np.array_equal(read.scores_LH, heads.scores_LH)
    assert np.array_equal(read.selected_LH, heads.selected_LH)
    assert np.array_equal(read.repeats_RLH, heads.repeats_RLH)
    assert (read.method, read.geometry) == (heads.method, heads.geometry)
    with safe_open(tmp_path / HEAD_SCORES_NAME, framework="numpy") as file:
        assert set(file.keys()) == {"scores", "selected", "repeats", "exists"}
        assert list(file.metadata()) == ["p2d"], "with two keys the bytes would vary"


def test_heads_that_a_layer_has_not_are_marked(tmp_path):
    geometry = HeadGeometry((LayerHeads(2, 1, 8), LayerHeads(), LayerHeads(4, 2, 16)), hidden_size=32)
    scores_LH = geometry.table(range(6))
    heads = HeadScores(scores_LH, scores_LH > 3, scores_LH[None], "readout", geometry)
    save_head_scores(tmp_path, heads)
    read = load_head_scores(tmp_path)
    assert read.geometry == geometry
    np.testing.assert_array_equal(read.scores_LH, scores_LH)
    with safe_open(tmp_path / HEAD_SCORES_NAME, framework="numpy") as file:
        np.testing.assert_array_equal(file.get_tensor("exists"), np.isfinite(scores_LH))
    save_head_scores(tmp_path, replace(heads, selected_LH=~geometry.exists_LH))
    with pytest.raises(ArtifactError, match="selects heads that the model has not"):
        load_head_scores(tmp_path)


READERS = ("reads_all", "reads_best")


@pytest.fixture
def reading_heads(tmp_path):
    """Heads of which others read rows than are trained, saved in `tmp_path`."""
    shallow, deep = np.zeros((2, 3, 4), dtype=np.bool_)
    shallow[0, ::2] = deep[0, 0] = deep[1, 3] = True
    heads = replace(some_heads(), reading=ReadingHeads(shallow, deep))
    save_head_scores(tmp_path, heads)
    return heads


def test_reading_heads_come_back_and_a_file_without_them_has_none(tmp_path, reading_heads):
    reading = load_head_scores(tmp_path).reading
    np.testing.assert_array_equal(reading.shallow_LH, reading_heads.reading.shallow_LH)
    np.testing.assert_array_equal(reading.deep_LH, reading_heads.reading.deep_LH)
    assert reading.depths == (1, 2)
    save_head_scores(tmp_path, some_heads())
    assert load_head_scores(tmp_path).reading is None


def resave(folder, **changed):
    """Save the file anew with other tensors, or without those that are None."""
    path = folder / HEAD_SCORES_NAME
    with safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()} | changed  # noqa: SIM118
        metadata = file.metadata()
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, metadata=metadata)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    "tensor",
    [None, np.ones((3, 4), dtype=np.uint8), np.ones((3, 5), dtype=np.bool_), np.zeros((3, 4), dtype=np.bool_)],
    ids=["missing", "numbers", "shape", "none"],
)
@pytest.mark.usefixtures("reading_heads")
def test_reading_heads_that_do_not_fit_are_refused(tmp_path, name, tensor):
    resave(tmp_path, **{name: tensor})
    with pytest.raises(ArtifactError, match="heads that read rows do not fit"):
        load_head_scores(tmp_path)


@pytest.mark.parametrize("name", READERS)
def test_reading_heads_that_the_model_has_not_are_refused(tmp_path, name):
    geometry = HeadGeometry((LayerHeads(2, 1, 8), LayerHeads(), LayerHeads(4, 2, 16)), hidden_size=32)
    scores_LH = geometry.table(range(6))
    there = geometry.exists_LH
    heads = HeadScores(scores_LH, scores_LH > 3, scores_LH[None], "readout", geometry, ReadingHeads(there, there))
    save_head_scores(tmp_path, heads)
    assert load_head_scores(tmp_path).reading.depths == (3, 3)
    resave(tmp_path, **{name: np.ones_like(there)})
    with pytest.raises(ArtifactError, match="heads that read rows do not fit"):
        load_head_scores(tmp_path)


def test_equal_heads_give_equal_bytes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_head_scores(tmp_path / name, some_heads())
    assert (tmp_path / "a" / HEAD_SCORES_NAME).read_bytes() == (tmp_path / "b" / HEAD_SCORES_NAME).read_bytes()


@pytest.mark.parametrize("content", [b"", b"junk", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
def test_damaged_heads_are_refused(tmp_path, content):
    (tmp_path / HEAD_SCORES_NAME).write_bytes(content)
    with pytest.raises(ArtifactError, match="cannot be read"):
        load_head_scores(tmp_path)


def read_rows_of(folder):
    """The chosen rows, best first, as they stand in the file."""
    return pq.read_table(folder / "subset.parquet").to_pylist()


def save_rows(folder, rows):
    """Save rows that stand in the pool in the order of their ranks, and one behind them that was not chosen."""
    return save_pool(folder, [*rows, {"never": "chosen"}], np.append(np.linspace(1, 0.5, len(rows)), np.nan), len(rows))


def save_pool(folder, rows, scores, count):
    pool = NamedPoolScores(
        ids=tuple(f"r{index}" for index in range(len(rows))),
        scores_N=scores,
        ranks_N=rank_rows(scores),
        draws_N=np.full(len(rows), 2),
    )
    save_subset(folder, zip(pool.ids, rows, strict=True), pool, count)
    return pool


def test_subset_keeps_rows_as_they_came(tmp_path):
    rows = [
        {"id": "r0", "prompt": "line\u2028separator 😀", "completion": "x", "meta": {"a": [1, 2]}},
        {"id": "r1", "prompt": "", "completion": "y", "meta": None},
    ]
    pool = save_rows(tmp_path, rows)
    read = pq.read_table(tmp_path / "subset.parquet").to_pylist()
    assert [{name: row[name] for name in ("id", "prompt", "completion", "meta")} for row in read] == rows
    assert [row["rank"] for row in read] == [0, 1]
    assert read == read_rows_of(tmp_path)
    scores = load_pool_scores(tmp_path)
    assert scores.ids == pool.ids
    assert np.array_equal(scores.scores_N, pool.scores_N, equal_nan=True)


def test_a_rows_own_score_column_is_kept_under_another_name(tmp_path):
    save_rows(tmp_path, [{"id": "mine", "score": "high", "rank": 9, "prompt": "p"}])
    (row,) = read_rows_of(tmp_path)
    assert row["source_score"] == "high"
    assert row["source_rank"] == 9
    assert row["source_id"] == "mine"
    assert row["id"] == "r0"


def test_columns_of_mixed_types_become_json(tmp_path):
    save_rows(tmp_path, [{"x": 1}, {"x": "one"}, {"x": [1]}])
    assert [json.loads(row["x"]) for row in read_rows_of(tmp_path)] == [1, "one", [1]]


def test_what_is_written_does_not_depend_on_the_parts(tmp_path, monkeypatch):
    """Rows go through files of neighbouring ranks, however few rows and characters these hold."""
    rng = np.random.default_rng(0)
    rows = [
        {"prompt": f"{n}\u2028😀\r\n", ("even" if n % 2 == 0 else "odd"): n, "meta": {f"k{n % 3}": [n, None]}}
        | ({"at": datetime.datetime(2024, 1, 2, 3, n, tzinfo=datetime.UTC), "raw": bytes([n])} if n % 4 else {})
        | ({"price": decimal.Decimal("1.50"), "id": n, "source_id": "x"} if n % 5 else {"mixed": n})
        for n in range(40)
    ]
    rows[7]["mixed"] = "text"
    scores = rng.integers(0, 9, 40) / 8
    scores[7] = 2
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        save_pool(tmp_path / name, rows, scores, 31)
        monkeypatch.setattr(subset, "PART_ROWS", 3)
        monkeypatch.setattr(subset, "WAITING_CHARACTERS", 200)
        monkeypatch.setattr(subset, "GROUP_ROWS", 6)
    whole, parts = (tmp_path / name for name in ("whole", "parts"))
    assert pq.read_table(whole / "subset.parquet").equals(pq.read_table(parts / "subset.parquet"))
    assert pq.read_table(whole / "pool_scores.parquet").equals(pq.read_table(parts / "pool_scores.parquet"))
    assert pq.ParquetFile(parts / "subset.parquet").num_row_groups == 11
    assert sorted(path.name for path in parts.iterdir()) == ["pool_scores.parquet", "subset.parquet"]
    in_order = [rows[int(row["id"][1:])] for row in read_rows_of(whole)]
    table = pq.read_table(whole / "subset.parquet")
    for name in ("prompt", "even", "at", "raw", "price"):
        assert table[name].to_pylist() == [row.get(name) for row in in_order]
        assert table[name].type == pa.array([row.get(name) for row in in_order]).type
    assert table["source_source_id"].to_pylist() == [row.get("id") for row in in_order]
    assert table["source_id"].to_pylist() == [row.get("source_id") for row in in_order]
    assert [json.loads(text) for text in table["mixed"].to_pylist()] == [row.get("mixed") for row in in_order]


def test_a_value_that_does_not_fit_its_column_after_all(tmp_path, monkeypatch):
    """Should Arrow ever infer a type that a later value does not have, the column becomes JSON, and nothing is lost."""
    monkeypatch.setattr(subset, "PART_ROWS", 1)
    monkeypatch.setattr("p2d_cli.artifacts.columns._type_of", lambda name, kinds: pa.int64())
    save_rows(tmp_path, [{"x": 1, "y": 1}, {"x": "one", "y": 2}])
    assert read_rows_of(tmp_path) == [
        {"id": "r0", "x": "1", "y": 1, "score": 1.0, "rank": 0},
        {"id": "r1", "x": '"one"', "y": 2, "score": 0.5, "rank": 1},
    ]


@pytest.mark.parametrize("values", [[2**70, 1], ["\ud800", "b"], [3, {"\ud800": "\ud800"}], [{}, {}], [[{}], []]])
def test_what_parquet_cannot_hold_becomes_json(tmp_path, values):
    save_rows(tmp_path, [{"x": value} for value in values])
    assert [json.loads(row["x"]) for row in read_rows_of(tmp_path)] == values


def test_unreadable_subsets_are_refused(tmp_path):
    (tmp_path / "subset.parquet").write_bytes(b"no")
    with pytest.raises(ArtifactError, match="cannot be read"):
        load_extreme_rows(tmp_path, 1)
    with pytest.raises(ArtifactError):
        load_pool_scores(tmp_path)


def test_evaluation_round_trip(tmp_path):
    metrics = {"exact_match": MetricValue(value=0.5, low=0.4, high=0.6, count=10)}
    save_evaluation(tmp_path, metrics, [{"id": "a", "prediction": "x"}, {"id": "b", "prediction": "y"}])
    assert load_metrics(tmp_path) == metrics
    assert pq.read_table(tmp_path / "predictions.parquet")["prediction"].to_pylist() == ["x", "y"]
    (tmp_path / "metrics.json").write_text("[1]")
    with pytest.raises(ArtifactError):
        load_metrics(tmp_path)


@pytest.mark.parametrize(("scope", "loads_with"), [("heads", "PeftModel"), ("full", "AutoModelForCausalLM")])
def test_model_card_says_how_to_load(tmp_path, scope, loads_with):
    save_model_card(tmp_path, "owner/base", "v1", scope=scope, figures={"Rows": 3})
    card = (tmp_path / "README.md").read_text()
    assert loads_with in card
    assert "| Rows | 3 |" in card
    assert "Base model: `owner/base@v1`" in card
    assert ('"owner/base", revision="v1")' in card) == (scope == "heads")


@pytest.mark.parametrize("base", ["owner/base", "/models/base", "/a folder: #1", "0.5", "-x", "yes", "Größe/ß"])
def test_the_header_of_a_card_names_the_base_model(tmp_path, base):
    for save in (
        lambda: save_model_card(tmp_path, base, None, scope="lora", figures={}, rank=16),
        lambda: save_merged_card(tmp_path, base, None, "runs/adapter", {}),
    ):
        save()
        header = (tmp_path / "README.md").read_text(encoding="utf-8").split("---\n")[1]
        assert yaml.safe_load(header)["base_model"] == base
    assert "base_model: owner/base\n" in header or base != "owner/base"


@pytest.mark.parametrize(
    ("rank", "text"),
    [(64, "`--max-lora-rank 64`"), (12, "`--max-lora-rank 16`"), (640, "vLLM serves adapters of up to 512: merge it")],
)
def test_a_card_says_how_the_adapter_is_served(tmp_path, rank, text):
    save_model_card(tmp_path, "owner/base", None, scope="heads", figures={}, rank=rank)
    card = (tmp_path / "README.md").read_text()
    assert f"All modules have rank {rank}" in card
    assert text in card
    assert "requires_grad_(False)" in card


def test_training_log_is_json_lines(tmp_path):
    save_training_log(tmp_path, [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    lines = (tmp_path / "training_log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


# --- cards


ODD_ROWS = [
    {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}],
        "nothing": None,
        "nested": {"a": [1, 2], "b": {"c": "x"}},
        "mixed": 1,
        "empty": [],
        "rank": "first",
    },
    {
        "messages": [],
        "nothing": None,
        "nested": {"a": [], "b": None},
        "mixed": "text",
        "empty": [],
        "rank": None,
    },
]


@pytest.mark.parametrize("rows", [ODD_ROWS, [{"prompt": "a", "completion": "b"}], [{"nothing": None}]])
def test_a_subset_opens_with_datasets_as_it_was_written(tmp_path, rows):
    import datasets

    folder = tmp_path / "subset"
    folder.mkdir()
    pool = save_rows(folder, rows)
    save_subset_card(folder, method="random", chosen=len(rows), total=len(rows) + 1)
    (folder / "manifest.json").write_text("{}")
    (folder / "scores.png").write_bytes(b"")
    opened = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert opened.to_list() == read_rows_of(folder)
    scores = datasets.load_dataset(str(folder), "pool_scores", split="train", cache_dir=str(tmp_path / "cache"))
    assert scores["id"][:] == list(pool.ids)
    assert scores["rank"][:] == pool.ranks_N.tolist()


def test_a_subset_without_its_manifest_is_read_by_its_card(tmp_path):
    from p2d_cli.data.sources import locate, read_rows

    save_rows(tmp_path, ODD_ROWS[:1])
    save_subset_card(tmp_path, method="random", chosen=1, total=2)
    assert [row.fields for row in read_rows(locate(str(tmp_path)))] == read_rows_of(tmp_path)


def test_an_evaluation_opens_with_datasets(tmp_path):
    import datasets

    metrics = {"exact_match": MetricValue(value=0.5, low=float("nan"), high=0.75, count=2)}
    rows = [
        {"id": "1", "prompt": "a", "reference": "b", "prediction": None, "lengths": [1, 2]},
        {"id": "2", "prompt": "a", "reference": "c", "prediction": None, "lengths": None},
    ]
    folder = tmp_path / "evaluation"
    folder.mkdir()
    save_evaluation(folder, metrics, rows)
    opened = datasets.load_dataset(str(folder), split="test", cache_dir=str(tmp_path / "cache"))
    assert opened.to_list() == rows
    assert "| exact_match | 0.5000 | nan to 0.7500 | 2 |" in (folder / "README.md").read_text()
    save_evaluation(folder, {}, [])
    assert "configs:" not in (folder / "README.md").read_text(), "there is no table to open"


def test_equal_results_have_equal_cards(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_subset_card(tmp_path / name, method="p2d", chosen=3, total=9)
    assert (tmp_path / "a" / "README.md").read_bytes() == (tmp_path / "b" / "README.md").read_bytes()
