"""mine-data in two stages: what is read, by which heads, and how it is scored, against it written out row by row."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import first_rows, write_rows
from safetensors.numpy import load_file, save_file
from scipy import stats
from test_distributed import launch
from transformers import AutoModelForCausalLM, AutoTokenizer

from p2d_cli.artifacts.journal import Journal
from p2d_cli.artifacts.readings import load_readings
from p2d_cli.data.prompts import PromptTemplate
from p2d_cli.data.records import Message, Record
from p2d_cli.modeling.head_outputs import mean_head_outputs
from p2d_cli.modeling.layouts import model_layout

POOL, TARGET, SAMPLE, COUNT = 160, 12, 40, 10
READ_ON = 3 * COUNT
FLOOR_OF_FIRST = 0.002
SHAPE = (4, 8)


@pytest.fixture(scope="module")
def work(p2d, tiny_folder, rows, tmp_path_factory):
    """The folder of a pool, a target, a second target, and heads that keep what they read of the first."""
    folder = tmp_path_factory.mktemp("cascade")
    first_rows(rows["pool"], folder / "pool.jsonl", POOL)
    target = rows["target"].read_text().splitlines()
    for name, part in (("target", target[:TARGET]), ("second", target[TARGET : 2 * TARGET])):
        (folder / f"{name}.jsonl").write_text("\n".join(part) + "\n")
    done = p2d(
        *("score-heads", "--model", tiny_folder, "--dtype", "float32", "--background", SAMPLE),
        *(
            "--depth",
            "1,3",
            "--target",
            folder / "target.jsonl",
            "--pool",
            folder / "pool.jsonl",
            "--out",
            folder / "heads",
        ),
    )
    assert done.code == 0, done.said
    return folder


@pytest.fixture
def words(work, tiny_folder, tmp_path):
    """A command of mine-data, in many small batches; of repeated options the last one counts."""

    def make(out, *options):
        given = {
            "--model": tiny_folder,
            "--dtype": "float32",
            "--heads": work / "heads",
            "--target": work / "target.jsonl",
            "--pool": work / "pool.jsonl",
            "--background": SAMPLE,
            "--count": COUNT,
            "--token-budget": 200,
        }
        given |= dict(zip(options[::2], options[1::2], strict=True))
        flags = [word for flag, value in given.items() if value is not None for word in (flag, value)]
        return ("mine-data", *flags, "--out", tmp_path / out)

    return make


@pytest.fixture
def mine(p2d, words, tmp_path):
    """Run it, and return the folder."""

    def run(out, *options):
        done = p2d(*words(out, *options))
        assert done.code == 0, done.said
        return tmp_path / out

    return run


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def scores_of(folder):
    return pq.read_table(folder / "pool_scores.parquet")["score"].to_numpy().astype(float)


def chosen_in(folder):
    return pq.read_table(folder / "subset.parquet")["id"].to_pylist()


def rows_in(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def readers_in(heads):
    tensors = load_file(heads / "head_scores.safetensors")
    return tensors["reads_all"].astype(bool), tensors["reads_best"].astype(bool)


# --- a slow plain version


def records_in(path):
    return [
        Record(row["id"], (Message("user", row["prompt"]),), row["completion"], None, row, row["id"])
        for row in rows_in(path)
    ]


def read_alone(tiny_folder, path):
    """What every head puts out on each row's answer and prompt, read one at a time, `[n, L, H, 2, d]`."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    tokenizer, template = AutoTokenizer.from_pretrained(tiny_folder), PromptTemplate("plain")
    layout = model_layout(model)
    heads = {layer.layer: range(layer.heads.num_heads) for layer in layout}
    outputs = []
    for record in records_in(path):
        example = template.encode_example(tokenizer, record, 1024)
        ids = torch.tensor([example.input_ids])
        is_answer = (torch.arange(ids.shape[1]) >= example.answer_start).long()
        places = torch.stack([is_answer, 1 - is_answer])[None]
        outputs.append(mean_head_outputs(model, layout, heads, ids, torch.ones_like(ids), places)[0].numpy())
    return np.stack(outputs).reshape(len(outputs), *SHAPE, 2, -1).astype(float)


def prompt_share(target, background):
    """How much prompts count, by how far above the rows of the sample held-out target rows lie by their prompts."""
    even = np.ones(len(background))
    weigh = readout(target, background, even, share=1.0)
    below = [weigh(row) for row in background]
    above = held_out(target, background, even, share=1.0)
    area = stats.norm.cdf((np.mean(above) - np.mean(below)) / np.std(below) / np.sqrt(2))
    return 0.3 * max(2 * area - 1, 0) ** 2


def readout(target, background, weights, share):
    """Affinity of a row `[K, 2, d]` by discriminants that are fitted by solving, head by head and place by place."""
    directions, offsets = [], []
    many = weights.sum() ** 2 / (weights**2).sum()
    places = [(head, place) for head in range(target.shape[1]) for place in (0, 1)]
    for at in places:
        seen = background[:, *at]
        centre = np.average(seen, axis=0, weights=weights)
        covariance = np.cov(seen.T, aweights=weights, ddof=0)
        size = len(centre)
        shrinkage = min(0.4 * (np.sqrt(size / many) + np.sqrt(1 / len(target))), 0.9)
        shrunk = (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / size * np.eye(size)
        direction = np.linalg.solve(shrunk, target[:, *at].mean(axis=0) - centre)
        direction /= np.sqrt(direction @ covariance @ direction)
        directions.append(direction)
        offsets.append(direction @ centre)

    def affinity(row):
        values = [
            row[at] @ direction - offset for at, direction, offset in zip(places, directions, offsets, strict=True)
        ]
        return np.mean(np.array(values[::2]) * (1 - share) + np.array(values[1::2]) * share)

    return affinity


def held_out(target, background, weights, share):
    """Affinities of target rows that were left out, an eighth at a time."""
    found = np.empty(len(target))
    for fold in range(min(8, len(target))):
        others = [row for place, row in enumerate(target) if place % 8 != fold]
        weigh = readout(np.stack(others), background, weights, share)
        for place in range(fold, len(target), 8):
            found[place] = weigh(target[place])
    return found


def floor(values, level):
    """Student's bound of a new value."""
    spread = np.std(values, ddof=1) * np.sqrt(1 + 1 / len(values))
    return stats.t.ppf(level, len(values) - 1, loc=np.mean(values), scale=spread)


class Plain:
    """Both stages over rows `[n, L, H, 2, d]` that were read alone, with a sample of the pool, bool [n]."""

    def __init__(self, target, pool, readers, is_sample, most=READ_ON, fewest=0):
        first, deep = readers
        sample, even = pool[is_sample], np.ones(int(is_sample.sum()))
        share = prompt_share(target[:, first], sample[:, first])
        weigh = readout(target[:, first], sample[:, first], even, share)
        self.first = np.array([weigh(row[first]) for row in pool])
        kept_out = held_out(target[:, first], sample[:, first], even, share)
        above = (self.first >= floor(kept_out, FLOOR_OF_FIRST)).sum()
        limit = int(min(most, max(above, fewest, np.ceil(0.02 * len(pool)))))
        self.read_on = limit if fewest else int(min(limit, np.ceil(0.04 * len(pool))))
        ranks = np.argsort(np.argsort(-self.first, kind="stable"))
        self.is_best = ranks < self.read_on
        self.is_near = self.is_best & (self.first < np.median(kept_out)) & ~is_sample
        near = int(self.is_near.sum())
        share = 0.3 * near / (near + 50)
        self.prompt = prompt_share(target[:, deep], sample[:, deep])
        background = np.concatenate([sample, pool[self.is_near]])[:, deep]
        weights = np.array([(1 - share) / len(sample)] * len(sample) + [share / max(near, 1)] * near)
        weigh = readout(target[:, deep], background, weights, self.prompt)
        self.scores = np.array([weigh(row[deep]) for row in pool])
        deep_kept_out = held_out(target[:, deep], background, weights, self.prompt)
        self.floor = floor(deep_kept_out, 0.05)
        is_like_upper_half = self.scores >= np.median(deep_kept_out)
        self.rounds, last = 1, ranks >= int(self.read_on / 1.5)
        while self.read_on < limit and is_like_upper_half[self.is_best & last & ~is_sample].mean() >= 0.05:
            last, self.rounds = ~self.is_best, self.rounds + 1
            self.read_on = min(int(np.ceil(1.5 * self.read_on)), limit)
            self.is_best = ranks < self.read_on
        self.scores[~self.is_best] = np.nan


@pytest.fixture(scope="module")
def alone(work, tiny_folder):
    return {name: read_alone(tiny_folder, work / f"{name}.jsonl") for name in ("target", "second", "pool")}


@pytest.fixture(scope="module")
def is_sample(work):
    """Which rows scoring the heads has read; the sample, if it is to be as large."""
    read = {tuple(digest) for digest in load_readings(work / "heads").digests_n2.tolist()}
    found = np.array([record.digest in read for record in records_in(work / "pool.jsonl")])
    assert found.sum() == SAMPLE
    return found


@pytest.mark.parametrize(("refine", "count"), [(None, COUNT), (None, 25), (0.25, COUNT), (0.01, 3)])
def test_scores_are_those_of_a_slow_plain_version(mine, work, alone, is_sample, refine, count):
    out = mine("out", "--refine", refine, "--count", count, "--pick", "top")
    most = 3 * count if refine is None else max(int(np.ceil(refine * POOL)), count)
    plain = Plain(
        *(alone["target"], alone["pool"], readers_in(work / "heads"), is_sample),
        most=most,
        fewest=0 if refine is None else most,
    )
    assert plain.rounds > 1 or refine is not None
    summary = manifest_of(out)["summary"]
    assert summary["rows_read_on"] == plain.read_on == POOL - summary["rows_not_read_on"]
    assert summary["near_misses"] == plain.is_near.sum()
    assert 0 < summary["prompt_share"] == pytest.approx(plain.prompt, abs=1e-4)
    np.testing.assert_allclose(scores_of(out), plain.scores, atol=2e-4, rtol=1e-4)
    assert summary["floor_score"] == pytest.approx(plain.floor, abs=5e-4)
    kept = min(count, int((plain.scores >= plain.floor).sum()))
    assert summary["rows_selected"] == kept
    ids = [row["id"] for row in rows_in(work / "pool.jsonl")]
    order = np.lexsort((-plain.first, -np.nan_to_num(plain.scores, nan=-np.inf)))
    assert chosen_in(out) == [ids[place] for place in order[:kept]]
    ranks = pq.read_table(out / "pool_scores.parquet")["rank"].to_numpy()
    assert (np.argsort(ranks) == order).all()


def test_a_first_floor_reads_on_fewer_than_the_most(mine, work, alone, is_sample):
    """With few rows of the task in the pool the first heads leave the others out."""
    out = mine("out", "--count", 30)
    plain = Plain(alone["target"], alone["pool"], readers_in(work / "heads"), is_sample, most=90)
    assert manifest_of(out)["summary"]["rows_read_on"] == plain.read_on < 90


# --- what is not read again


def tokens_of(folder):
    return manifest_of(folder)["tokens"]


def test_target_and_sample_are_not_read_again(p2d, mine, work, tiny_folder, tmp_path):
    """Tokens are those of the other rows alone, each read by the first heads, and the best of them by the others."""
    known = mine("known", "--token-budget", 1)
    summary = manifest_of(known)["summary"]
    assert summary["rows_found_read"] == TARGET + SAMPLE
    tokenizer, template = AutoTokenizer.from_pretrained(tiny_folder), PromptTemplate("plain")

    def lengths(name):
        examples = (template.encode_example(tokenizer, record, 1024) for record in records_in(work / f"{name}.jsonl"))
        return np.array([len(example.input_ids) for example in examples])

    read = {tuple(digest) for digest in load_readings(work / "heads").digests_n2.tolist()}
    others = np.array([record.digest not in read for record in records_in(work / "pool.jsonl")])
    is_best = np.isfinite(scores_of(known))
    expected = lengths("pool")[others].sum() + lengths("pool")[others & is_best].sum()
    assert tokens_of(known) == expected
    (tmp_path / "chat.jinja").write_text(
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    for name, options in {
        "template": ("--chat-template", tmp_path / "chat.jinja"),
        "precision": ("--dtype", "bfloat16"),
        "length": ("--max-length", 100),
    }.items():
        again = mine(name, "--token-budget", 1, *options)
        summary = manifest_of(again)["summary"]
        assert summary["rows_found_read"] == 0
        assert summary["rows_background"] == SAMPLE
        if name != "template":
            sizes, best = lengths("pool"), np.isfinite(scores_of(again))
            is_known = sizes.sum() + lengths("target").sum()
            assert is_known <= tokens_of(again) <= is_known + sizes[best].sum()
        assert tokens_of(again) > tokens_of(known)


# --- one stage


@pytest.mark.parametrize("how", ["trained", "paper"])
def test_heads_that_are_trained_read_all_rows_in_one_stage(p2d, mine, work, tiny_folder, tmp_path, how):
    options = ("--depth", "trained") if how == "trained" else ("--preset", "paper", "--proxy-samples", 8)
    rows = ("--target", work / "target.jsonl", *(() if how == "paper" else ("--pool", work / "pool.jsonl")))
    heads = tmp_path / "heads"
    done = p2d("score-heads", "--model", tiny_folder, "--dtype", "float32", *rows, *options, "--out", heads)
    assert done.code == 0, done.said
    assert set(load_file(heads / "head_scores.safetensors")) == {"scores", "selected", "repeats", "exists"}
    assert not (heads / "readings.safetensors").exists()
    assert "heads_reading_all" not in manifest_of(heads)["summary"]
    one_stage(mine("out", "--heads", heads), readers=4)


def test_heads_of_an_earlier_version_still_mine(mine, tiny_folder):
    one_stage(mine("out", "--heads", tiny_folder.parent / "golden" / "v1" / "heads"), readers=4)


def one_stage(folder, readers):
    summary = manifest_of(folder)["summary"]
    assert np.isfinite(scores_of(folder)).all()
    assert "rows_read_on" not in summary
    assert "heads_read_first" not in summary
    assert (summary["heads_read"], summary["rows_found_read"]) == (readers, 0)


# --- the plan


@pytest.mark.parametrize("index", [False, True], ids=["pool", "index"])
def test_a_dry_run_counts_the_tokens_of_the_run(p2d, words, tmp_path, index):
    """With --refine it is known how many rows are read on, but not which: so of rows of one length."""
    pool = [{"id": f"r{n}", "prompt": f"{n:04} ABCD", "completion": "OK"} for n in range(1000, 1000 + POOL)]
    write_rows(tmp_path / "even.jsonl", pool)
    kept = ("--index", tmp_path / "index") if index else ()
    one_by_one = ("--token-budget", 1, "--floor-quantile", 0)
    line = words("out", "--pool", tmp_path / "even.jsonl", "--refine", 0.25, *one_by_one, *kept)
    planned = p2d(*line, "--dry-run", "--json")
    assert planned.code == 0, planned.said
    plan = planned.json["plan"]
    assert plan["exact"]
    assert not (tmp_path / "index").exists()
    done = p2d(*line, "--json")
    assert done.code == 0, done.said
    made = manifest_of(tmp_path / "out")
    work = {one["name"]: one["rows"] for one in plan["works"]}
    assert work["read target and background"] == SAMPLE
    assert made["summary"]["rows_read_on"] == 0.25 * POOL
    assert plan["tokens"] == pytest.approx(made["tokens"], rel=0.1)


# --- an index


def shards_in(index):
    return json.loads((index / "index.json").read_text())["shards"]


def test_an_index_changes_no_choice_and_serves_a_second_target(p2d, mine, work, tmp_path):
    index = tmp_path / "index"
    plain, first = mine("plain"), mine("first", "--index", index)
    assert chosen_in(first) == chosen_in(plain)
    np.testing.assert_allclose(scores_of(first), scores_of(plain), atol=0.02)
    assert tokens_of(first) == tokens_of(plain)  # what the index lacks of the sample is not read again for it
    [shard] = shards_in(index)
    assert shard["rows"] == POOL
    told = manifest_of(first)["summary"]["index"]
    assert (told["rows_found"], told["rows_added"], told["targets"]) == (0, POOL, 1)
    assert "index" not in manifest_of(first)["seconds"]

    others = ("--target", work / "second.jsonl")
    alone, second = mine("second-alone", *others), mine("second", *others, "--index", index)
    assert shards_in(index) == [shard]
    assert chosen_in(second) == chosen_in(alone)
    told = manifest_of(second)["summary"]["index"]
    assert (told["rows_found"], told["rows_added"], told["targets"]) == (POOL, 0, 2)
    assert told["tokens_shared"] == pytest.approx(shard["tokens"] / 2, abs=1)
    assert manifest_of(second)["seconds"]["index"] == pytest.approx(shard["seconds"] / 2, abs=1e-4)
    assert tokens_of(alone) - tokens_of(second) > 0.5 * shard["tokens"]


def test_hidden_states_have_an_index_of_their_own_in_it(mine, tmp_path):
    index = tmp_path / "index"
    states = ("--method", "rds", "--heads", None, "--index", index)
    mine("rds", *states)
    first = mine("first", "--index", index)
    assert chosen_in(first) == chosen_in(mine("plain"))
    again = mine("again", *states, "--count", COUNT + 1)
    assert manifest_of(again)["summary"]["index"]["rows_added"] == 0


def test_a_target_that_was_not_read_is_planned_beside_a_whole_index(p2d, mine, words, work, tmp_path):
    mine("first", "--index", tmp_path / "index")
    others = ("--target", work / "second.jsonl", "--index", tmp_path / "index", "--refine", 0.25)
    done = p2d(*words("second", *others), "--dry-run", "--json")
    assert done.code == 0, done.said
    rows = {one["name"]: one["rows"] for one in done.json["plan"]["works"]}
    assert rows["read target and background"] == TARGET
    assert set(rows) == {"read target and background", "read on"}


def test_rows_that_the_index_lacks_are_added_and_equal_rows_once(mine, work, tmp_path):
    index = tmp_path / "index"
    rows = rows_in(work / "pool.jsonl")
    more = [*rows, *(row | {"id": f"again-{row['id']}"} for row in rows[:5])]
    write_rows(tmp_path / "less.jsonl", rows[:-20])
    write_rows(tmp_path / "more.jsonl", more)
    mine("less", "--pool", tmp_path / "less.jsonl", "--index", index)
    grown = mine("more", "--pool", tmp_path / "more.jsonl", "--index", index)
    assert [shard["rows"] for shard in shards_in(index)] == [POOL - 20, 20]
    told = manifest_of(grown)["summary"]["index"]
    assert (told["rows_found"], told["rows_added"]) == (POOL - 20 + 5, 20)
    plain = mine("plain", "--pool", tmp_path / "more.jsonl")
    assert set(chosen_in(grown)) == set(chosen_in(plain))
    scores = scores_of(grown)
    np.testing.assert_allclose(scores[:5], scores[-5:], atol=1e-4)
    fresh = mine("fresh", "--pool", tmp_path / "more.jsonl", "--index", tmp_path / "fresh-index")
    assert [shard["rows"] for shard in shards_in(tmp_path / "fresh-index")] == [POOL]
    assert chosen_in(fresh) == chosen_in(grown)


def test_an_index_of_another_precision_is_refused(p2d, mine, words, tmp_path):
    mine("first", "--index", tmp_path / "index")
    done = p2d(*words("second", "--index", tmp_path / "index", "--dtype", "bfloat16"))
    assert (done.code, "precision: float32 there, bfloat16 here" in done.said) == (65, True), done.said


def test_an_index_of_another_model_is_refused(p2d, mine, words, work, tiny_folder, tmp_path):
    mine("first", "--index", tmp_path / "index")
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    done = p2d(
        *("score-heads", "--model", other, "--dtype", "float32", "--background", SAMPLE),
        *("--target", work / "target.jsonl", "--pool", work / "pool.jsonl", "--out", tmp_path / "heads"),
    )
    assert done.code == 0, done.said
    line = words("second", "--model", other, "--heads", tmp_path / "heads", "--index", tmp_path / "index")
    done = p2d(*line)
    assert (done.code, "was made otherwise: model:" in done.said) == (65, True), done.said


def test_a_dry_run_tells_the_bytes_of_an_index_and_makes_none(p2d, mine, words, tmp_path):
    index = tmp_path / "index"
    planned = p2d(*words("out", "--index", index), "--dry-run", "--json")
    assert planned.code == 0, planned.said
    assert not index.exists()
    mine("out", "--index", index)
    stored = [np.load(path) for path in index.glob("*.npy")]
    assert planned.json["plan"]["disk"]["index"] == sum(array.nbytes for array in stored)
    assert len(stored) == 2
    again = p2d(*words("again", "--index", index, "--refine", 0.5), "--dry-run", "--json")
    assert "index" not in again.json["plan"]["disk"]


def results(folder):
    """All numbers and texts, written out, since nan is not equal to itself."""
    return [repr(pq.read_table(folder / name).to_pydict()) for name in ("subset.parquet", "pool_scores.parquet")]


KILLED = """
import os, signal, sys
import p2d_cli.data.pool
from p2d_cli.artifacts.pool_index import PoolIndex
p2d_cli.data.pool.CHUNK_ROWS = 50
add = PoolIndex._write
def die(self, described):
    if len(described.shards) == 2: os.kill(os.getpid(), signal.SIGKILL)
    add(self, described)
PoolIndex._write = die
from p2d_cli.__main__ import main
main()
"""


def test_killed_while_it_writes_a_shard(p2d, mine, words, tmp_path, monkeypatch):
    """The shard whose files are there but that is not listed is read from the journal, and written over."""
    line = [str(word) for word in words("killed", "--index", tmp_path / "index")]
    done = subprocess.run([sys.executable, "-c", KILLED, *line], capture_output=True, check=False, env=dict(os.environ))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "index" / "00001.outputs.npy").exists()
    assert len(shards_in(tmp_path / "index")) == 1
    monkeypatch.setattr("p2d_cli.data.pool.CHUNK_ROWS", 50)
    killed, whole = mine("killed", "--index", tmp_path / "index"), mine("whole", "--index", tmp_path / "other")
    assert results(killed) == results(whole)
    assert [shard["rows"] for shard in shards_in(tmp_path / "index")] == [40] * 4


def test_an_interrupted_run_may_go_on_with_an_index_or_without(
    p2d, mine, words, work, is_sample, tmp_path, monkeypatch
):
    """Of an index that has the sample the same rows are read as without one, but of them other things are kept."""
    whole, add = mine("whole"), Journal.add
    sample = [row for row, is_in in zip(rows_in(work / "pool.jsonl"), is_sample, strict=True) if is_in]
    few = ("--pool", write_rows(tmp_path / "sample.jsonl", sample), "--count", 5, "--floor-quantile", 0)
    for number, (before, after) in enumerate(((False, True), (True, False))):
        kept = ("--index", tmp_path / f"index-{number}")
        mine(f"sample-{number}", *few, *kept)
        out, count = f"out-{number}", []

        def add_and_stop(self, *arguments, count=count, **costs):
            add(self, *arguments, **costs)
            count.append(1)
            if len(count) == 2:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Journal, "add", add_and_stop)
            assert p2d(*words(out, *(kept if before else ()))).code == 130
        found = mine(out, *(kept if after else ()))
        assert chosen_in(found) == chosen_in(whole)
        np.testing.assert_allclose(scores_of(found), scores_of(whole), atol=0.02)


@pytest.mark.parametrize("index", [None, "index"])
def test_interrupted_at_any_batch_it_goes_on(p2d, mine, words, tmp_path, monkeypatch, index):
    """Of several chunks, each a shard; what an interrupted run has added is its own, and not added again."""
    monkeypatch.setattr("p2d_cli.data.pool.CHUNK_ROWS", 50)
    kept = ("--index", tmp_path / index) if index else ()
    whole = mine("whole", *(("--index", tmp_path / "other") if index else ()))
    add, count = Journal.add, []

    def add_and_stop(self, *arguments, **costs):
        add(self, *arguments, **costs)
        count.append(1)
        if len(count) % 3 == 0:
            raise KeyboardInterrupt

    codes = []
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", add_and_stop)
        while not codes or codes[-1] != 0:
            codes.append(p2d(*words("resumed", *kept)).code)
            assert codes[-1] in {0, 130}
            assert len(codes) < 40
    assert len(codes) > 4
    assert results(tmp_path / "resumed") == results(whole)
    if index:
        shards = shards_in(tmp_path / index)
        assert [shard["rows"] for shard in shards] == [40] * 4
        assert len({shard["by"] for shard in shards}) == 1
        assert manifest_of(tmp_path / "resumed")["summary"]["index"]["targets"] == 1


# --- several processes


def test_two_ranks_share_the_work(mine, words, work, tmp_path):
    """With --refine, and with an index, which one of them writes; a second target takes it as it is."""
    refine, second = ("--refine", 0.25), ("--target", work / "second.jsonl")
    commands = {
        "plain": refine,
        "first": (*refine, "--index", tmp_path / "index"),
        "second": (*refine, *second, "--index", tmp_path / "index"),
    }
    done = launch(tmp_path / "ranks", 2, [(words(f"ranks-{name}", *more), None) for name, more in commands.items()])
    assert done.codes(0) == done.codes(1) == [0, 0, 0], done.err
    alone = {
        "plain": mine("plain", *refine),
        "first": mine("first", *refine, "--index", tmp_path / "own-index"),
        "second": mine("second", *refine, *second, "--index", tmp_path / "own-index"),
    }
    for name, folder in alone.items():
        shared = tmp_path / f"ranks-{name}"
        assert chosen_in(shared) == chosen_in(folder)
        np.testing.assert_allclose(scores_of(shared), scores_of(folder), atol=1e-4)
        assert tokens_of(shared) == tokens_of(folder)
    [one], [other] = shards_in(tmp_path / "index"), shards_in(tmp_path / "own-index")
    assert (one["rows"], one["tokens"]) == (other["rows"], other["tokens"])
    assert len(list((tmp_path / "index" / "users").iterdir())) == 2


def test_another_share_of_the_rows_read_on_is_that_of_mining_anew(mine):
    base, anew = mine("base", "--refine", 0.25), mine("anew", "--refine", 0.25, "--count", 4)
    found = mine(
        *("from", "--scores", base, "--count", 4),
        *(word for flag in ("--heads", "--target", "--background", "--token-budget") for word in (flag, None)),
    )
    assert (found / "subset.parquet").read_bytes() == (anew / "subset.parquet").read_bytes()
    ranks = [pq.read_table(folder / "pool_scores.parquet")["rank"].to_pylist() for folder in (found, anew)]
    assert len(set(ranks[0])) == len(ranks[1]) == POOL


# --- what users bring


def test_target_rows_that_repeat_count_once(p2d, work, mine, tiny_folder, tmp_path):
    """Else a row would be held out of a fit that its twin is part of, and the floor would lie too high."""
    rows = rows_in(work / "target.jsonl")
    twins = [row | {"prompt": row["prompt"] + " " * n} for row in rows for n in range(4)]
    write_rows(tmp_path / "repeated.jsonl", twins)
    once, repeated = mine("once"), mine("repeated", "--target", tmp_path / "repeated.jsonl")
    np.testing.assert_array_equal(scores_of(once), scores_of(repeated))
    assert manifest_of(once)["summary"]["floor_score"] == manifest_of(repeated)["summary"]["floor_score"]
    inputs = ("--model", tiny_folder, "--pool", work / "pool.jsonl", "--background", SAMPLE)
    write_rows(tmp_path / "equal.jsonl", rows[:1] * 6)
    done = p2d("score-heads", *inputs, "--target", tmp_path / "equal.jsonl", "--out", tmp_path / "equal")
    assert (done.code, "found 1 and 40" in done.said) == (65, True)
    write_rows(tmp_path / "two.jsonl", rows[:2] * 6)
    done = p2d("score-heads", *inputs, "--target", tmp_path / "two.jsonl", "--out", tmp_path / "two")
    assert (done.code, "2 target rows are few" in done.said) == (0, True)


@pytest.mark.parametrize("known", ["read here", "read with the heads"])
@pytest.mark.parametrize("place", ["no index", "new index", "filled index"])
def test_rows_that_were_cut_are_counted_once(p2d, mine, work, tiny_folder, tmp_path, place, known):
    rows = rows_in(work / "pool.jsonl")
    long = {**rows[7], "prompt": 30 * rows[7]["prompt"]}
    pool = write_rows(
        tmp_path / "pool.jsonl", [long | {"id": f"l{n}", "prompt": f"{n} {long['prompt']}"} for n in range(9)] + rows
    )
    options = ("--pool", pool, "--max-length", 64, "--floor-quantile", 0)
    if known == "read with the heads":  # nearly all rows are in the sample
        options += ("--heads", tmp_path / "heads", "--background", 150)
        scoring = ("score-heads", "--model", tiny_folder, "--dtype", "float32", "--max-length", 64, "--depth", "1,3")
        rows_given = ("--target", work / "target.jsonl", "--pool", pool, "--background", 150)
        assert p2d(*scoring, *rows_given, "--out", tmp_path / "heads").code == 0
    kept = () if place == "no index" else ("--index", tmp_path / "index")
    if place == "filled index":
        mine("first", *options, *kept, "--count", 20)
    assert manifest_of(mine("out", *options, *kept))["summary"]["truncated_rows"] == 9


def test_a_pool_that_shows_the_task_in_another_form_is_told(p2d, words, work, tmp_path):
    pool = [{**row, "prompt": row["prompt"] + " ."} for row in rows_in(work / "pool.jsonl")]
    done = p2d(*words("out", "--pool", write_rows(tmp_path / "pool.jsonl", pool)))
    assert (done.code, "shows it in another form" in done.said) == (65, True)


def test_settings_that_change_nothing_are_told(p2d, mine, words, work, tiny_folder, tmp_path):
    first = mine("first")
    line = ("mine-data", "--model", tiny_folder, "--pool", work / "pool.jsonl", "--scores", first, "--count", 5)
    line += (
        "--target",
        work / "second.jsonl",
        "--refine",
        0.5,
        "--index",
        tmp_path / "index",
        "--out",
        tmp_path / "again",
    )
    done = p2d(*line)
    assert done.code == 0
    for flag in ("--target", "--refine", "--index"):
        assert f"{flag} is of no use beside --scores" in done.said
    done = p2d(*words("lexical", "--method", "lexical", "--heads", None, "--index", tmp_path / "index"))
    assert (done.code, "--index is of no use with --method lexical" in done.said) == (0, True)


def test_more_than_were_read_on_keeps_those_above_the_floor(p2d, mine, work, tiny_folder, tmp_path):
    first = mine("first")
    there = int(np.isfinite(scores_of(first)).sum())
    line = (
        "mine-data",
        "--model",
        tiny_folder,
        "--pool",
        work / "pool.jsonl",
        "--scores",
        first,
        "--out",
        tmp_path / "more",
    )
    done = p2d(*line, "--count", there + 1)
    assert (done.code, "mine again without --scores" in done.said) == (0, True)
    floor = manifest_of(first)["summary"]["floor_score"]
    assert len(chosen_in(tmp_path / "more")) == (scores_of(first) >= floor).sum()


def test_an_index_that_may_only_be_read_serves_and_one_that_cannot_be_made_is_told(
    p2d, mine, words, tmp_path, monkeypatch
):
    kept = ("--index", tmp_path / "index")
    first = mine("first", *kept)
    monkeypatch.setattr("pathlib.Path.touch", refuse)
    again = mine("again", *kept)
    np.testing.assert_array_equal(scores_of(first), scores_of(again))
    assert manifest_of(again)["summary"]["index"]["rows_added"] == 0
    done = p2d(*words("other", "--index", tmp_path / "other-index"))
    assert (done.code, "choose another folder" in done.said) == (73, True)


def refuse(*_, **__):
    raise OSError(30, "Read-only file system")
