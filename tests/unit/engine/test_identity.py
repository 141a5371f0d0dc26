"""Identities: what leaves a key alone, and how older artifacts compare."""

import json

import pytest

from p2d_cli.artifacts.digests import digest_json
from p2d_cli.artifacts.manifest import SCHEMA_VERSIONS, artifact_key, read_manifest
from p2d_cli.config import (
    INPUT_FIELDS,
    STAGE_CONFIGS,
    MineDataConfig,
    ScoreHeadsConfig,
    TrainConfig,
    declared,
    field_name,
)
from p2d_cli.engine.identity import identity_differences, recorded_identity
from p2d_cli.pipeline import stage_named

NEEDED = {
    "score-heads": {"model": "m", "target": "t", "pool": "p", "method": "pad"},
    "mine-data": {"model": "m", "pool": "p", "heads": "h", "target": "t"},
    "train": {"model": "m", "data": "d", "eval_data": "e"},
    "eval": {"model": "m", "data": "d"},
    "report-aer": {"evaluations": ("e",), "reference": "r"},
    "export": {"adapter": "a"},
}
OTHER_VALUES = {
    "layers": "0-1",
    "depth": "3,15",
    "refine": 0.5,
    "pick": "cover",
    "selection": "spread",
    "affinity": "readout",
    "shortlist": 0.5,
    "floor_quantile": 0.1,
    "loss_on": "last",
    "eval_steps": 2,
    "patience": 2,
    "base_quantization": "4bit",
    "lm_eval": ["arc_easy"],
    "background": 20,
    "lora_targets": ["all-linear"],
    "lora_scaling": "rslora",
    "channels": 0.1,
}


def config(stage, **settings):
    return STAGE_CONFIGS[stage](out="o", **(NEEDED[stage] | settings))


def neutral_settings():
    for stage, model in STAGE_CONFIGS.items():
        for name, field in model.model_fields.items():
            if "neutral" in declared(field):
                yield pytest.param(stage, name, declared(field)["neutral"], id=f"{stage} {name}")


def old_identity(stage, config):
    """The settings of an identity as they were recorded before any was left out: all, and as they were given."""
    model = STAGE_CONFIGS[stage]
    names = {name for name, field in model.model_fields.items() if declared(field)["identity"]}
    return config.model_dump(mode="json", include=names - INPUT_FIELDS)


def rewrite(folder, stage, config):
    """Make the artifact in `folder` one that was written with all settings in its identity."""
    path = folder / "manifest.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields["identity"]["settings"] = old_identity(stage, config)
    fields["key"] = artifact_key(fields["identity"])
    del fields["digest"]
    path.write_text(json.dumps(fields | {"digest": digest_json(fields)}), encoding="utf-8")
    return fields["key"]


@pytest.mark.parametrize(("stage", "name", "neutral"), list(neutral_settings()))
def test_a_neutral_value_is_left_out_and_another_is_not(stage, name, neutral):
    beside = {
        "lm_eval": {"data": None},
        "depth": {"method": "readout"},
        "channels": {"heads": "h"},
        "lora_targets": {"projections": ["q"]},  # which are a LoRA's targets where these are not named
    }
    settings = beside.get(name, {})
    left_out = {} if name == "lm_eval" else settings
    assert name not in config(stage, **{name: neutral}, **left_out).identity()
    other = OTHER_VALUES.get(name, "other")
    assert config(stage, **{name: other}, **settings).identity()[name] == other


def test_a_setting_that_was_added_says_at_which_value_it_is_neutral(tiny_folder):
    """Otherwise adding it would make all finished work stale."""
    for stage, model in STAGE_CONFIGS.items():
        kind = stage_named(stage).writes
        assert SCHEMA_VERSIONS[kind] == 1
        recorded = read_manifest(tiny_folder.parent / "golden" / "v1" / kind).identity["settings"]
        first = set(map(field_name, recorded))
        added = {name for name, field in model.model_fields.items() if "neutral" in declared(field)}
        assert not added & first
        assert set(old_identity(stage, config(stage))) == added | first


def test_a_lora_on_projections_is_the_one_on_targets_of_these_names():
    """As version 0.1.0 called them."""

    def trained(**settings):
        return config("train", **settings).identity()

    assert trained(projections=["q", "v"]) == trained(lora_targets=["q", "v"]) != trained()
    assert trained(lora_targets=["attention"]) == trained(projections=["q", "k", "v", "o"])
    assert trained() == trained(lora_targets=["all-linear"]) == trained(lora_targets=["all-linear"], projections=["q"])
    full = trained(scope="full")
    assert full == trained(scope="full", lora_targets=["q"], lora_scaling="plain", lora_alpha=2, lora_rank=3)


def test_auto_is_the_artifact_of_what_it_stands_for():
    def heads(**settings):
        return ScoreHeadsConfig(model="m", out="o", target="t", **settings).identity()

    assert heads(pool="p") == heads(pool="p", method="readout") == heads(method="readout", selection="spread")
    assert heads() == heads(method="pad") == heads(pool="p", task_model="x") == heads(method="pad", selection="top")
    assert heads(pool="p") != heads(pool="p", method="contrast")

    def mined(**settings):
        return MineDataConfig(model="m", out="o", pool="p", heads="h", **settings).identity()

    assert mined() == mined(affinity="attention") == mined(target="t", affinity="attention")
    assert mined(target="t") == mined(target="t", affinity="readout") != mined()
    assert mined(target="t", method="loss") == mined(target="t", method="loss", affinity="attention")

    def trained(**settings):
        return TrainConfig(model="m", data="d", out="o", **settings).identity()

    assert trained() == trained(scope="lora") != trained(heads="h")
    assert trained(heads="h") == trained(heads="h", scope="heads")


@pytest.mark.parametrize("kind", sorted(SCHEMA_VERSIONS))
def test_what_was_recorded_compares_as_it_is_written_today(tiny_folder, kind):
    manifest = read_manifest(tiny_folder.parent / "golden" / "v1" / kind)
    recorded = recorded_identity(manifest)
    assert recorded["inputs"] == manifest.identity["inputs"]
    resolved = {"heads": {"method": "contrast"}, "adapter": {"scope": "heads"}}.get(kind, {})
    settings = {field_name(name): value for name, value in manifest.identity["settings"].items()}
    assert recorded["settings"] == settings | resolved


def test_a_setting_that_has_gone_differs(tiny_folder):
    manifest = read_manifest(tiny_folder.parent / "golden" / "v1" / "heads")
    entry = {"value": 3, "origin": "default"}
    of_run_only = manifest.model_copy(update={"config": manifest.config | {"threads": entry}})
    assert recorded_identity(of_run_only) == recorded_identity(manifest)
    identity = manifest.identity | {"settings": manifest.identity["settings"] | {"rounds": 3}}
    gone = of_run_only.model_copy(update={"identity": identity, "config": of_run_only.config | {"rounds": entry}})
    assert identity_differences(recorded_identity(gone), recorded_identity(manifest)) == ["setting rounds"]


def test_settings_that_are_refused_today_are_compared_as_they_were_recorded(tiny_folder):
    manifest = read_manifest(tiny_folder.parent / "golden" / "v1" / "heads")
    refused = manifest.model_copy(update={"config": manifest.config | {"ratio": {"value": 7, "origin": "flag"}}})
    assert recorded_identity(refused) == manifest.identity


def test_an_artifact_that_holds_all_settings_is_up_to_date(p2d, tiny_folder, tmp_path):
    words = ("score-heads", "--model", tiny_folder, "--out", tmp_path / "h", "--method", "random")
    assert p2d(*words).code == 0
    key = rewrite(tmp_path / "h", "score-heads", ScoreHeadsConfig(model="m", out="o", method="random"))
    for flags in ((), ("--selection", "top")):
        done = p2d(*words, *flags, "--json")
        assert (done.code, done.json["status"], done.json["key"]) == (0, "up-to-date", key)
    done = p2d(*words, "--selection", "spread", "--ratio", "0.2")
    assert done.code == 73
    assert (
        "it differs in setting ratio (0.1 there, 0.2 now), setting selection (top there, spread now) try:" in done.said
    )


def test_scores_that_are_there_name_the_method(p2d, tiny_folder, tmp_path):
    words = ("score-heads", "--model", tiny_folder)
    assert p2d(*words, "--out", tmp_path / "h", "--method", "random").code == 0
    again = (*words, "--scores", tmp_path / "h", "--ratio", "0.2", "--out", tmp_path / "again")
    assert p2d(*again).code == 0
    for flags in ((), ("--method", "random"), ("--selection", "top")):
        assert p2d(*again, *flags, "--json").json["status"] == "up-to-date"
    rewrite(tmp_path / "again", "score-heads", ScoreHeadsConfig(model="m", out="o", scores="s", ratio=0.2))
    assert p2d(*again, "--json").json["status"] == "up-to-date"
