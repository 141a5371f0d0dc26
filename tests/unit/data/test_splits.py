"""Splits are found as `datasets` finds them, which is asked here itself; and train and test are never mixed."""

import gzip
import json
import re
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from p2d_cli.data.folders import find_splits
from p2d_cli.data.records import read_records
from p2d_cli.data.sources import locate, read_rows, scan_rows
from p2d_cli.engine.identity import digest_rows
from p2d_cli.errors import DataError

WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
WORD = st.sampled_from([*WORDS, "data", "rows", "part", "sft", "main"])
NAME = st.lists(WORD, min_size=1, max_size=3).flatmap(
    lambda words: st.sampled_from("-._ 0").map(lambda separator: separator.join(words))
)
SHARDED = st.builds("{}-0000{}-of-00002{}".format, WORD, st.integers(0, 1), st.sampled_from(["", "-a09b74b3ef9c3b56"]))
PATH = st.builds(
    lambda folders, name: "/".join([*folders, f"{name}.jsonl"]),
    st.lists(st.just("data") | NAME, max_size=2),
    NAME | SHARDED,
)


def rows_file(path, *numbers):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"n": number}) + "\n" for number in numbers))
    return path


def tree(folder, files):
    """Write files of one row each, numbered in the order in which they are given."""
    for number, name in enumerate(files):
        rows_file(folder / name, number)
    return folder


def numbers(spec, **options):
    return [row.fields["n"] for row in read_rows(locate(str(spec), **options))]


def splits_by_datasets(folder):
    from datasets.data_files import get_data_patterns, resolve_pattern

    found = {}
    for split, patterns in get_data_patterns(str(folder)).items():
        for pattern in patterns:
            try:
                found.setdefault(str(split), set()).update(resolve_pattern(pattern, str(folder)))
            except FileNotFoundError:
                continue
    return {
        split: {path.removeprefix(f"{folder.as_posix()}/") for path in paths} for split, paths in found.items() if paths
    }


def is_mixed(paths):
    named = [{WORDS[word] for word in re.split(r"[-._ 0-9]+", path.split("/")[-1]) if word in WORDS} for path in paths]
    return len(set().union(*named)) > 1


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=st.lists(PATH, min_size=1, max_size=5, unique=True))
def test_splits_are_those_of_datasets(tmp_path, files):
    folder = tmp_path / "rows"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        tree(folder, files)
    except OSError:  # a file and a folder of the same name
        assume(False)
    expected = splits_by_datasets(folder)
    # Where folders put files together whose own names tell them apart, p2d goes by these.
    assume(not any("/" in path and is_mixed(paths) for paths in expected.values() for path in paths))
    found = find_splits(folder)
    assert {name: {path.as_posix() for path in paths} for name, paths in found.splits.items()} == expected


LAYOUTS = {
    "hash": ["data/train-00000-of-00001-a09b74b3ef9c3b56.jsonl", "data/test-00000-of-00001-bdb3c4e5f6071829.jsonl"],
    "underscore": ["my_train.jsonl", "my_test.jsonl"],
    "prefix": ["gsm8k_train.jsonl", "gsm8k_test.jsonl"],
    "dash": ["train-clean.jsonl", "test-clean.jsonl"],
    "dot": ["train.v1.jsonl", "test.v1.jsonl"],
    "holdout": ["train_sft-00000-of-00001.jsonl", "test_sft-00000-of-00001.jsonl"],
    "number": ["train2.jsonl", "test2.jsonl"],
    "folders": ["train/a.jsonl", "test/a.jsonl"],
    "deep": ["data/my_train/part/a.jsonl", "data/my_test/part/a.jsonl"],
    "words": ["training.jsonl", "evaluation.jsonl"],
}


@pytest.mark.parametrize("files", LAYOUTS.values(), ids=LAYOUTS)
def test_train_and_test_are_never_read_together(tmp_path, files):
    import datasets

    folder = tree(tmp_path / "d", files)
    with pytest.raises(DataError, match="has several splits: test, train") as caught:
        locate(str(folder))
    assert "--split" in caught.value.hint
    for number, split in enumerate(("train", "test")):
        loaded = datasets.load_dataset(str(folder), split=split, cache_dir=str(tmp_path / "cache"))
        assert numbers(folder, split=split) == loaded["n"][:] == [number]
        assert numbers(f"{folder}/**/*.jsonl", split=split) == [number]
    with pytest.raises(DataError, match="several splits: test, train"):
        locate(f"{folder}/**/*.jsonl")
    for number, name in enumerate(files):
        assert numbers(folder / name) == numbers(folder / name, split="dev") == [number], "a file is read as it is"


@pytest.mark.parametrize(
    "files",
    [
        ["Train.jsonl", "Test.jsonl"],
        ["trainset.jsonl", "testset.jsonl"],
        ["gsm8ktrain.jsonl", "gsm8ktest.jsonl"],
        ["my-eval-suite/train.jsonl", "my-eval-suite/test.jsonl"],
        ["Train/rows.jsonl", "TEST/rows.jsonl"],
    ],
)
def test_names_that_datasets_would_mix_are_told_apart(tmp_path, files):
    tree(tmp_path, files)
    with pytest.raises(DataError, match="several splits: test, train"):
        locate(str(tmp_path))
    assert [numbers(tmp_path, split=split) for split in ("train", "test")] == [[0], [1]]


def test_only_both_words_together_split_names_without_a_border(tmp_path):
    tree(tmp_path, ["latest.jsonl", "oldest.jsonl"])
    assert numbers(tmp_path) == numbers(tmp_path, split="train") == [0, 1]


def test_one_split_needs_no_choice_and_other_files_are_asked_about(tmp_path):
    tree(tmp_path / "one", ["gsm8k_train.jsonl"])
    assert numbers(tmp_path / "one") == [0]
    tree(tmp_path / "more", ["gsm8k_train.jsonl", "extra.jsonl"])
    with pytest.raises(DataError, match="several splits: extra, train"):
        locate(str(tmp_path / "more"))
    assert numbers(tmp_path / "more", split="train") == [0]
    assert numbers(tmp_path / "more", split="extra") == [1]
    assert numbers(tmp_path / "more", split="gsm8k_train") == [0], "a file's own name, where it is no split"
    with pytest.raises(DataError, match="no split 'test'; found: extra, train"):
        locate(str(tmp_path / "more"), split="test")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["data/train-00000-of-00003.jsonl", "data/train-00002-of-00003.jsonl"],
            "2 of 3 .*data/train-00001-of-00003",
        ),
        (["train-00000-of-00002-abc.jsonl"], "1 of 2 shards are there: train-00001-of-00002 is missing"),
        (["a-2-of-3.jsonl", "a-3-of-3.jsonl"], "2 of 3 shards are there: a-1-of-3 is missing"),
        (["a-00000-of-00001-x.jsonl", "a-00000-of-00001-y.jsonl"], "a-00000-of-00001 is there twice"),
        (["a-00000-of-00001.jsonl", "a-00000-of-00002.jsonl", "a-00001-of-00002.jsonl"], "a-.: shards of 00001 and of"),
        (["train/0-of-2.jsonl"], "train/1-of-2 is missing"),
    ],
)
def test_a_shard_that_is_missing_or_there_twice_is_noticed(tmp_path, files, message):
    tree(tmp_path, files)
    with pytest.raises(DataError, match=message) as caught:
        locate(str(tmp_path))
    assert "glob" in caught.value.hint
    assert len(numbers(f"{tmp_path}/**/*.jsonl")) == len(files), "whoever names the files means them"


def test_shards_that_are_all_there(tmp_path):
    tree(tmp_path / "one", ["a-1-of-2.jsonl", "a-2-of-2.jsonl", "b-0-of-1.jsonl"])
    tree(tmp_path / "two", ["x/a-00000-of-00001.jsonl", "y/a-00000-of-00001.jsonl"])
    assert numbers(tmp_path / "one") == [0, 1, 2]
    assert numbers(tmp_path / "two") == [0, 1]


def test_metadata_and_hidden_files_are_no_rows(tmp_path):
    tree(tmp_path, ["data/train-00000-of-00001.jsonl", ".cache/a.jsonl", "_temporary/a.jsonl", "__pycache__/a.jsonl"])
    for name in ("dataset_infos.json", "dataset_info.json", "state.json", "config.json", "croissant.json"):
        (tmp_path / name).write_text('{"default": {"features": {}}}')
    for name in ("README.md", ".gitattributes", "LICENSE"):
        (tmp_path / name).write_text("text")
    (tmp_path / "heads").mkdir()
    rows_file(tmp_path / "heads" / "training_log.jsonl", 7)
    (tmp_path / "heads" / "manifest.json").write_text('{\n  "schema": "p2d.adapter/1"\n}')
    assert numbers(tmp_path) == numbers(tmp_path, split="train") == [0]


def test_files_of_several_folders_are_read_in_order_and_keep_their_names(tmp_path):
    tree(tmp_path, ["b/rows.jsonl", "a/rows.jsonl"])
    found = list(read_rows(locate(str(tmp_path))))
    assert [(row.where, row.fields["n"]) for row in found] == [("a/rows.jsonl:1", 1), ("b/rows.jsonl:1", 0)]
    (tmp_path / "b" / "rows.jsonl").write_text('{"n": 1}\noops\n')
    with pytest.raises(DataError, match=r"^b/rows\.jsonl:2: not valid JSON"):
        list(read_rows(locate(str(tmp_path))))


def test_files_that_change_places_are_other_rows(tmp_path):
    from p2d_cli.engine.identity import digest_rows

    digests = []
    for files in (["a/rows.jsonl", "b/rows.jsonl"], ["b/rows.jsonl", "a/rows.jsonl"]):
        digests.append(digest_rows(locate(str(tree(tmp_path, files)))))
    assert digests[0] != digests[1]


def test_deeper_files_of_another_format_are_no_rows(tmp_path):
    tree(tmp_path, ["rows.jsonl", "scripts/settings.json"])
    assert numbers(tmp_path) == [0]
    tree(tmp_path, ["rows.json"])
    with pytest.raises(DataError, match=r"several formats: rows\.json, rows\.jsonl"):
        locate(str(tmp_path))


def test_packed_and_unpacked_rows_are_not_read_twice(tmp_path):
    path = rows_file(tmp_path / "a.jsonl", 1)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(DataError, match=r"the same rows twice: a\.jsonl and a\.jsonl\.gz"):
        locate(str(tmp_path))


def test_packed_rows_among_others_are_not_left_out_in_silence(tmp_path):
    path = rows_file(tmp_path / "a.jsonl", 1)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.jsonl.zst").write_bytes(pa.compress(path.read_bytes(), "zstd", asbytes=True))
    for spec in (tmp_path, tmp_path / "sub", f"{tmp_path}/**/*"):
        with pytest.raises(DataError, match=r"b\.jsonl\.zst is zstd") as caught:
            locate(str(spec))
        assert "zstd -d" in caught.value.hint


def test_a_file_of_the_name_of_a_folder_is_not_left_out_in_silence(tmp_path):
    tree(tmp_path, ["train/a.jsonl", "train.jsonl"])
    with pytest.raises(DataError, match=r"several splits: train, train\.jsonl"):
        locate(str(tmp_path))
    assert numbers(tmp_path, split="train") == [0]
    assert numbers(tmp_path, split="train.jsonl") == [1]


def test_a_link_that_leads_back_is_no_trap(tmp_path):
    tree(tmp_path, ["sub/a.jsonl"])
    (tmp_path / "sub" / "up").symlink_to(tmp_path, target_is_directory=True)
    assert numbers(tmp_path) == [0]


# --- data set cards

CARD = """---
configs:
- config_name: main
  default: true
  data_files:
  - split: train
    path: first/*.jsonl
  - split: test
    path:
    - second/b.jsonl
    - "second/[!b].jsonl"
- config_name: other
  data_dir: third
- config_name: loose
  data_files: "**/a.jsonl"
---
# Title
"""


@pytest.mark.parametrize(
    ("config", "split"), [("main", "train"), ("main", "test"), ("other", "train"), ("loose", "train")]
)
def test_a_card_decides_as_it_does_for_datasets(tmp_path, config, split):
    import datasets

    folder = tree(
        tmp_path / "d", ["first/a.jsonl", "second/a.jsonl", "second/b.jsonl", "third/train.jsonl", "top.jsonl"]
    )
    (folder / "README.md").write_text(CARD)
    loaded = datasets.load_dataset(str(folder), config, split=split, cache_dir=str(tmp_path / "cache"))
    assert numbers(f"{folder}:{config}", split=split) == loaded["n"][:]
    if config == "main":
        assert numbers(folder, split=split) == loaded["n"][:]


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("configs:\n- config_name: a\n- config_name: b\n", "several configurations: a, b"),
        ("configs:\n- config_name: b\n", "no configuration 'a'; found: b"),
        ("configs:\n- data_files: x.jsonl\n", "each with config_name"),
        ("configs: [\n", "the YAML at its top cannot be read"),
        ("configs:\n- config_name: a\n  data_files: 7\n", "data_files: expected"),
        ("configs:\n- config_name: a\n  data_files: ../x.jsonl\n", r"outside of its folder: '\.\./x"),
        ("configs:\n- config_name: a\n  data_files: https://x/y.jsonl\n", "outside of its folder"),
        ("configs:\n- config_name: a\n  data_files: gone.jsonl\n", r"gone\.jsonl is missing"),
        ("configs:\n- config_name: a\n  data_files: gone*.jsonl\n", "no file of the split"),
        *(
            (f"configs:\n- config_name: a\n  data_files: a.csv\n  {option}\n", f"sets {option.split(':')[0]} for 'a'")
            for option in (
                *("skiprows: 3", "sep: ';'", 'sep: "\\t"', "delimiter: '|'", "quoting: 3", 'quotechar: "\'"'),
                *("escapechar: '\\'", "encoding: latin-1", "decimal: ','", "keep_default_na: false", "na_values: [x]"),
            )
        ),
    ],
)
def test_cards_that_cannot_be_followed(tmp_path, yaml, message):
    tree(tmp_path, ["a.jsonl"])
    (tmp_path / "README.md").write_text(f"---\n{yaml}---\n")
    with pytest.raises(DataError, match=message):
        locate(str(tmp_path) + (":a" if "no configuration" in message else ""))


@pytest.mark.parametrize(
    ("name", "option"),
    [("a.csv", "sep: ','"), ("a.tsv", 'delimiter: "\\t"'), ("a.csv", "encoding: utf-8"), ("a.csv", "quotechar: '\"'")],
)
def test_reader_options_that_change_nothing_are_followed(tmp_path, name, option):
    (tmp_path / name).write_text("n\n7\n")
    card = f"---\nconfigs:\n- config_name: a\n  data_files: {name}\n  {option}\n---\n"
    (tmp_path / "README.md").write_text(card)
    assert numbers(tmp_path) == ["7"]


def test_a_card_that_joins_splits_is_followed_and_told(tmp_path):
    import datasets

    folder = tree(tmp_path / "d", ["test.jsonl", "train.jsonl"])
    (folder / "README.md").write_text('---\nconfigs:\n- config_name: default\n  data_files: "*.jsonl"\n---\n')
    loaded = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert numbers(folder) == loaded["n"][:] == [0, 1]
    note = f"{folder}: its card joins files of several splits in train: test.jsonl, train.jsonl"
    assert locate(str(folder)).notes == (note,)


def test_a_card_that_is_a_dangling_link_is_not_passed_over(tmp_path):
    tree(tmp_path, ["a.jsonl"])
    (tmp_path / "README.md").symlink_to(tmp_path / "blobs" / "gone")
    with pytest.raises(DataError, match=r"README\.md is a link to a file that is not there"):
        locate(str(tmp_path))


def info(names, head=""):
    columns = f"  - name: text\n    dtype: string\n  - name: label\n    dtype:\n      class_label:\n        {names}\n"
    return f"{head}features:\n{columns}"


BY_NUMBER = "names:\n          '0': bad\n          '1': good"
BY_LIST = "names: [bad, good]"


@pytest.mark.parametrize(
    "yaml",
    [
        "dataset_info:\n  " + info(BY_NUMBER),
        "dataset_info:\n  " + info(BY_LIST) + "configs:\n- config_name: default\n  data_files: rows.*\n",
        "dataset_info:\n- " + info(BY_LIST, "config_name: default\n  "),
        "dataset_info:\n- "
        + info("names: [x, y]", "config_name: a\n  ")
        + "- "
        + info(BY_NUMBER, "config_name: b\n  ")
        + "configs:\n- config_name: a\n  data_files: rows.*\n- config_name: b\n  default: true\n  data_files: rows.*\n",
    ],
    ids=["numbered", "listed", "only-one", "of-configuration"],
)
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_the_labels_of_a_card_are_those_of_datasets(tmp_path, yaml, kind):
    import datasets

    folder = tmp_path / "d"
    folder.mkdir()
    rows = [{"text": "fine", "label": 1}, {"text": "dull", "label": 0}]
    if kind == "csv":
        (folder / "rows.csv").write_text("text,label\nfine,1\ndull,0\n")
    elif kind == "jsonl":
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    (folder / "README.md").write_text(f"---\n{yaml}---\n")
    loaded = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    names = loaded.features["label"].names
    records = read_records(locate(str(folder))).records
    assert (
        [record.answer.content for record in records]
        == [names[number] for number in loaded["label"]]
        == ["good", "bad"]
    )


def test_labels_of_a_card_count_in_what_identifies_rows(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\nfine,1\n")
    plain = digest_rows(locate(str(tmp_path)))
    digests = {plain}
    for names in (BY_LIST, "names: [good, bad]"):
        (tmp_path / "README.md").write_text("---\ndataset_info:\n  " + info(names) + "---\n")
        digests.add(digest_rows(locate(str(tmp_path))))
    assert len(digests) == 3
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert digest_rows(locate(str(tmp_path))) == plain


def test_labels_that_every_parquet_file_gives_itself_change_no_identity(tmp_path):
    import datasets

    kinds = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])})
    rows = datasets.Dataset.from_dict({"text": ["fine"], "label": [1]}, features=kinds)
    rows.to_parquet(tmp_path / "a.parquet")
    plain = digest_rows(locate(str(tmp_path)))
    (tmp_path / "README.md").write_text("---\ndataset_info:\n  " + info(BY_LIST) + "---\n")
    assert digest_rows(locate(str(tmp_path))) == plain
    pq.write_table(pa.Table.from_pylist([{"text": "dull", "label": 0}]), tmp_path / "b.parquet")
    assert [record.answer.content for record in read_records(locate(str(tmp_path))).records] == ["good", "bad"]


def test_labels_without_names_are_numbers(tmp_path):
    rows_file(tmp_path / "a.jsonl", 7)
    (tmp_path / "README.md").write_text("---\ndataset_info:\n  " + info("num_classes: 8") + "---\n")
    assert numbers(tmp_path) == [7]


def test_labels_that_are_written_out_stay_and_others_are_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\nfine,good\nodd,1.0\n")
    (tmp_path / "README.md").write_text("---\ndataset_info:\n  " + info(BY_LIST) + "---\n")
    first, second = scan_rows(locate(str(tmp_path)))
    assert first.fields["label"] == "good"
    assert second.problem.message == "rows.csv:3: column 'label' holds '1.0', which is none of the card's labels"


@pytest.mark.parametrize("names", ["names: [no, yes]", "names:\n          '0': bad\n          '2': good", "names: []"])
def test_labels_that_are_no_texts_are_refused(tmp_path, names):
    (tmp_path / "rows.csv").write_text("text,label\nfine,1\n")
    (tmp_path / "README.md").write_text("---\ndataset_info:\n  " + info(names) + "---\n")
    with pytest.raises(DataError, match="class_label of 'label': expected a text for each number"):
        locate(str(tmp_path))


def test_a_card_without_configurations_changes_nothing(tmp_path):
    tree(tmp_path, ["a.jsonl"])
    for text in ("no YAML, though configs: stands in it", "---\nlicense: mit\n---\n", "---\nconfigs: []\n---\n"):
        (tmp_path / "README.md").write_text(text)
        assert numbers(tmp_path) == [0]


def test_the_split_that_is_there_is_read_though_another_is_not(tmp_path):
    tree(tmp_path, ["a.jsonl"])
    places = (("train", "a"), ("test", "b"))
    entries = "".join(f"  - split: {split}\n    path: {name}.jsonl\n" for split, name in places)
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{entries}---\n")
    assert numbers(tmp_path, split="train") == [0]
    with pytest.raises(DataError, match=r"b\.jsonl is missing"):
        locate(str(tmp_path), split="test")


# --- saved data sets


def test_data_sets_saved_side_by_side_are_splits(tmp_path):
    import datasets

    for split, rows in {"train": [1, 2], "test": [3]}.items():
        datasets.Dataset.from_dict({"n": rows}).save_to_disk(tmp_path / "both" / split)
    assert numbers(tmp_path / "both", split="train") == [1, 2]
    with pytest.raises(DataError, match="several splits: test, train"):
        locate(str(tmp_path / "both"))


def test_a_saved_split_is_not_taken_for_another(tmp_path):
    import datasets

    rows = datasets.Dataset.from_dict({"n": [1]}, split=datasets.Split.TRAIN)
    rows.save_to_disk(tmp_path / "one")
    assert numbers(tmp_path / "one") == numbers(tmp_path / "one", split="train") == [1]
    with pytest.raises(DataError, match="no split 'test'; found: train"):
        locate(str(tmp_path / "one"), split="test")


def test_what_was_divided_goes_by_the_key_it_was_saved_under(tmp_path):
    import datasets

    rows = datasets.Dataset.from_dict({"n": list(range(8))}, split=datasets.Split.TRAIN)
    parts = rows.train_test_split(test_size=2, seed=0)
    parts.save_to_disk(tmp_path / "two")
    assert json.loads((tmp_path / "two" / "test" / "state.json").read_text())["_split"] == "train"
    assert numbers(tmp_path / "two", split="test") == parts["test"]["n"][:]


def test_an_artifact_has_no_configurations(tmp_path):
    tree(tmp_path, ["sub/rows.jsonl"])
    (tmp_path / "sub" / "manifest.json").write_text('{\n  "schema": "p2d.subset/1"\n}')
    with pytest.raises(DataError, match="is an artifact of p2d"):
        locate(f"{tmp_path}/sub:default")


# --- several files at once


def test_a_glob_is_read_as_a_folder_of_what_it_matches(tmp_path, monkeypatch):
    tree(tmp_path, ["x/b.jsonl", "x/a.jsonl", "y/z/c.jsonl", "x/notes.txt", "x/dataset_infos.json"])
    assert numbers(f"{tmp_path}/x/*.jsonl") == [1, 0]
    assert numbers(f"{tmp_path}/x/*") == [1, 0]
    assert numbers(f"{tmp_path}/**/*.jsonl") == [1, 0, 2]
    assert numbers(f"{tmp_path}/x/[ab].jsonl") == [1, 0]
    monkeypatch.chdir(tmp_path)
    assert [row.where for row in read_rows(locate("?/**/*.jsonl"))] == ["x/a.jsonl:1", "x/b.jsonl:1", "y/z/c.jsonl:1"]
    with pytest.raises(DataError, match=r"no file matches x/\*\.csv"):
        locate("x/*.csv")
    with pytest.raises(DataError, match="cannot tell the format"):
        locate("x/*.txt")
    with pytest.raises(DataError, match=r"only folders match \?"):
        locate("?")
    tree(tmp_path, ["_temporary/part.jsonl"])
    assert numbers("**/*.jsonl") == [1, 0, 2], "what is hidden has to be asked for"
    assert numbers("_t*/*.jsonl") == [0]
    rows_file(tmp_path / "x" / "c[1].jsonl", 9)
    assert numbers("x/c[1].jsonl") == [9], "a file of that very name wins"


@pytest.mark.parametrize(
    ("files", "pattern", "known"),
    [
        (["math/rows.jsonl", "dev-tools/rows.jsonl"], "*/rows.jsonl", "math/rows, validation"),
        (["2023/a.jsonl", "2024-train/a.jsonl"], "*/a.jsonl", "2023/a, train"),
        (["b/a.jsonl", "contest-eval/a.jsonl"], "**/*.jsonl", "b/a, test"),
        (["a.parquet", "sub/b.jsonl"], "**/*", "sub/b, train"),
    ],
)
def test_a_glob_leaves_no_file_out_in_silence(tmp_path, files, pattern, known):
    tree(tmp_path, files)
    with pytest.raises(DataError, match=f"has several splits: {known}$"):
        locate(f"{tmp_path}/{pattern}")
    left, right = known.split(", ")
    assert {name for split in (left, right) for name in locate(f"{tmp_path}/{pattern}", split=split).files} == {
        tmp_path / name for name in files
    }


@pytest.mark.parametrize("left_out", [["math/rows.jsonl"], [f"{number}/rows.jsonl" for number in range(10, 24)]])
def test_a_folder_says_what_it_leaves_out_as_datasets_does(tmp_path, left_out):
    import datasets

    folder = tree(tmp_path / "d", ["dev-tools/rows.jsonl", *left_out])
    loaded = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert numbers(folder) == loaded["validation"]["n"][:] == [0]
    [note] = locate(str(folder)).notes
    assert note.startswith(f"{folder}: left out {len(left_out)} file")
    assert ("12 more" not in note and " and 2 more" in note) == (len(left_out) > 12)


@pytest.mark.parametrize(
    ("name", "other"), [("train_test_split.jsonl", "test.jsonl"), ("val_test/rows.jsonl", "test-a/b.jsonl")]
)
def test_a_file_of_two_splits_is_refused(tmp_path, name, other):
    tree(tmp_path, [name, other])
    for spec in (tmp_path, f"{tmp_path}/**/*.jsonl"):
        for split in (None, "test"):
            with pytest.raises(DataError, match=f"the name of {name} stands for several splits: test, "):
                locate(str(spec), split=split)
    assert numbers(tmp_path / name) == [0]


def test_a_file_of_two_splits_does_not_disturb_a_third(tmp_path):
    tree(tmp_path, ["train.jsonl", "val_test.jsonl"])
    assert numbers(tmp_path, split="train") == [0]


def test_a_dangling_link_is_not_passed_over(tmp_path):
    tree(tmp_path, ["a.jsonl"])
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone")
    for spec in (tmp_path, f"{tmp_path}/*.jsonl"):
        with pytest.raises(DataError, match=r"b\.jsonl is a link to .*gone, which is not there"):
            locate(str(spec))


@pytest.mark.parametrize("names", [("train.txt", "test.txt"), ("train/1.xml",), ("test.zip",)])
def test_splits_in_a_format_that_is_not_read_are_named(tmp_path, names):
    tree(tmp_path, ["labels.jsonl", *names])
    for spec in (tmp_path, f"{tmp_path}/**/*"):
        with pytest.raises(DataError, match=f"format that p2d does not read: .*{re.escape(names[0])}"):
            locate(str(spec))
    assert numbers(tmp_path, split="labels") == numbers(tmp_path / "labels.jsonl") == [0]


def test_programs_and_notes_beside_rows_do_not_disturb(tmp_path):
    tree(tmp_path, ["a.jsonl", "train.py", "eval.md", "notes.txt"])
    assert numbers(tmp_path) == [0]
    tree(tmp_path / "d", ["train.jsonl", "train.txt"])
    assert numbers(tmp_path / "d") == [0]


@pytest.mark.parametrize("name", ["train_part_0_of_2.jsonl", "part-0_of_2.jsonl", "train 0 of 2.jsonl", "0of2.jsonl"])
def test_a_shard_by_any_separator_is_missed(tmp_path, name):
    tree(tmp_path, [name])
    missing = name.replace("0", "1", 1).removesuffix(".jsonl")
    with pytest.raises(DataError, match=f"1 of 2 shards are there: {missing} is missing"):
        locate(str(tmp_path))
    tree(tmp_path, [name, f"{missing}.jsonl"])
    assert numbers(tmp_path) == [0, 1]


def test_commas_and_standard_input_get_a_clear_answer(tmp_path):
    tree(tmp_path, ["a.jsonl", "b.jsonl", "c,d.jsonl"])
    with pytest.raises(DataError, match="no such file") as caught:
        locate(f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl")
    assert "glob in quotes" in caught.value.hint
    assert numbers(f"{tmp_path}/c,d.jsonl") == [2]
    with pytest.raises(DataError, match="standard input") as caught:
        locate("-")
    assert "write them to a file" in caught.value.hint


def test_parquet_beside_metadata_is_one_format(tmp_path):
    for name in ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"n": [len(name)]}), tmp_path / name)
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert numbers(tmp_path, split="test") == [len("data/test-00000-of-00001.parquet")]
    assert numbers(f"{tmp_path}/data/*.parquet", split="train") == [len("data/train-00000-of-00001.parquet")]
