"""Settings: where they come from, what they refuse, and that flags, models and documents agree."""

import re

import pytest
from pydantic import BaseModel

from p2d_cli.cli.options import _INVOCATION_FLAGS
from p2d_cli.config import (
    INPUT_FIELDS,
    PRESETS,
    STAGE_CONFIGS,
    EvalConfig,
    MineDataConfig,
    ReportAerConfig,
    ScoreHeadsConfig,
    TrainConfig,
    resolve,
)
from p2d_cli.errors import EXIT_CODES, P2DError, UsageError
from p2d_cli.pipeline import STAGES, stage_named

NEEDED = {"model": "m", "data": "d", "out": "o"}


def test_precedence_is_flag_variable_recipe_default():
    resolved = resolve(
        TrainConfig,
        flags=NEEDED | {"epochs": 1.0},
        recipe={"epochs": 2, "lr": 0.1, "batch-size": 8},
        environ={"P2D_EPOCHS": "5", "P2D_LR": "0.2", "HOME": "/"},
    )
    config, origins = resolved.config, resolved.origins
    assert (config.epochs, origins["epochs"]) == (1.0, "flag")
    assert (config.lr, origins["lr"]) == (0.2, "variable")
    assert (config.batch_size, origins["batch_size"]) == (8, "recipe")
    assert (config.schedule, origins["schedule"]) == ("cosine", "default")
    assert resolved.provenance()["lr"] == {"value": 0.2, "origin": "variable"}


def test_a_preset_goes_over_defaults_and_under_everything_else():
    needed = {"model": "m", "pool": "p", "target": "t", "heads": "h", "out": "o", "preset": "paper"}
    resolved = resolve(MineDataConfig, flags=needed, recipe={"normalise": "per-head"}, environ={})
    assert resolved.config.resolved_affinity == "attention"
    assert resolved.origins["affinity"] == "preset"
    assert (resolved.config.normalise, resolved.origins["normalise"]) == ("per-head", "recipe")
    assert resolve(MineDataConfig, flags=needed | {"affinity": "readout"}, environ={}).config.affinity == "readout"
    heads = resolve(ScoreHeadsConfig, flags={"model": "m", "out": "o", "preset": "paper"}, environ={})
    assert heads.config.method == "pad"
    # A preset is a way to write settings: the same settings are the same artifact.
    spelt = {key: value for key, value in needed.items() if key != "preset"} | {"affinity": "attention"}
    assert resolve(MineDataConfig, flags=needed, environ={}).config.identity() == MineDataConfig(**spelt).identity()
    with pytest.raises(UsageError, match="--preset"):
        resolve(MineDataConfig, flags=needed | {"preset": "papre"}, environ={})


def test_every_preset_sets_what_its_stage_has():
    for stages in PRESETS.values():
        for stage, settings in stages.items():
            assert set(settings) <= set(STAGE_CONFIGS[stage].model_fields)


def test_the_affinity_follows_from_the_inputs():
    needed = {"model": "m", "pool": "p", "heads": "h", "out": "o"}
    assert MineDataConfig(**needed).resolved_affinity == "attention"
    assert MineDataConfig(**needed, target="t").resolved_affinity == "readout"
    with pytest.raises(UsageError, match="--affinity readout needs --target"):
        resolve(MineDataConfig, flags=needed | {"affinity": "readout"}, environ={})


def test_configs_are_frozen_and_refuse_unknown_fields():
    config = TrainConfig(**NEEDED)
    with pytest.raises(ValueError, match="frozen"):
        config.epochs = 9.0
    with pytest.raises(UsageError, match="unknown key 'epoch'"):
        resolve(TrainConfig, flags=NEEDED, recipe={"epoch": 1}, environ={})


def test_identity_holds_what_changes_the_result_and_no_inputs():
    config = TrainConfig(**NEEDED)
    identity = config.identity()
    assert "epochs" in identity
    assert not set(identity) & (INPUT_FIELDS | {"out", "device", "token_budget", "checkpointing", "tracker"})
    assert identity == TrainConfig(**(NEEDED | {"out": "elsewhere", "model": "moved", "device": "cuda"})).identity()
    assert identity != TrainConfig(**NEEDED, epochs=1.0).identity()


@pytest.mark.parametrize("value", ["q,k", ["q", "k"], ("q,k",), [" q ", "k"]])
def test_lists_may_be_written_with_commas(value):
    assert TrainConfig(**NEEDED, projections=value).projections == ("q", "k")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scope": "heads"}, "needs --heads"),
        ({"batch_size": 10, "accumulation": 4}, "not a multiple"),
        ({"projections": ""}, "--projections is empty"),
    ],
)
def test_settings_that_do_not_fit_together(changes, words):
    with pytest.raises(UsageError, match=words):
        resolve(TrainConfig, flags=NEEDED | changes, environ={})


def test_the_scope_follows_from_the_inputs():
    assert TrainConfig(**NEEDED).resolved_scope == "lora"
    assert TrainConfig(**NEEDED, heads="h").resolved_scope == "heads"
    assert TrainConfig(**NEEDED, heads="h", scope="full").resolved_scope == "full"


def test_an_evaluation_needs_a_metric():
    with pytest.raises(UsageError, match="--metric is empty"):
        resolve(EvalConfig, flags=NEEDED | {"metric": ()}, environ={})


@pytest.mark.parametrize("name", sorted(STAGE_CONFIGS))
def test_every_setting_is_described_and_every_stage_has_the_common_ones(name):
    fields = STAGE_CONFIGS[name].model_fields
    assert all(field.description for field in fields.values())
    assert {"out", "seed", "device", "dtype", "max_length"} <= set(fields)
    assert not set(fields) & set(_INVOCATION_FLAGS), "a setting may not hide one of the common flags"


def test_the_table_of_stages_names_real_modules_and_settings():
    for stage in STAGES:
        fields = STAGE_CONFIGS[stage.name].model_fields
        assert {name.rstrip("?") for name in stage.reads} <= set(fields)
        assert stage_named(stage.name) is stage
    with pytest.raises(KeyError):
        stage_named("score")


def test_every_error_has_a_documented_code():
    def below(kind):
        return [kind, *(found for child in kind.__subclasses__() for found in below(child))]

    assert {kind.exit_code for kind in below(P2DError)} <= set(EXIT_CODES)


def test_configs_have_no_field_that_pydantic_reserves():
    for config in {*STAGE_CONFIGS.values(), ScoreHeadsConfig, ReportAerConfig}:
        assert not set(config.model_fields) & set(dir(BaseModel))


# --- documents


@pytest.fixture(scope="module")
def readme(tiny_folder):
    return (tiny_folder.parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_readme_documents_every_exit_code(readme):
    table = dict(re.findall(r"^\| (\d+) \| (.+?) \|$", readme, flags=re.MULTILINE))
    assert {int(code): meaning for code, meaning in table.items()} == EXIT_CODES


def test_the_readme_uses_only_flags_and_commands_that_exist(readme, p2d):
    for command in set(re.findall(r"^(?:- run: )?p2d ([a-z-]+)(.*(?:\\\n.*)*)", readme, flags=re.MULTILINE)):
        name, rest = command
        flags = set(re.findall(r"(?<![\w-])(--[a-z-]+)", rest.split("#")[0]))
        shown = p2d(name, "--help").out
        wide = " ".join(shown.split())
        for flag in flags:
            assert flag[:15] in wide, f"p2d {name} has no {flag}"


def test_the_first_two_blocks_are_the_only_set_up(readme):
    blocks = re.findall(r"^```sh\n(.*?)^```$", readme, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    assert "p2d run fixtures/quickstart.toml" in blocks[0]
    assert "pytest" in blocks[1]
