"""Which process this is, and what one that is alone does without a group."""

import os

import pytest

from p2d_cli.config import TrainConfig
from p2d_cli.errors import NonFiniteError, PeerLostError, StoppedEarlyError, UsageError
from p2d_cli.runtime import distributed
from p2d_cli.runtime.distributed import Place, place
from p2d_cli.stages.train import _require_usable_launch

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SLURM = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}
MEETING = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch):
    """Set the launcher's variables, and none but these."""

    def set_only(**variables):
        for name in (*NAMES, *SLURM, "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "FSDP_VERSION"):
            monkeypatch.setenv(name, "")  # so that what the code under test sets is taken back too
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_only


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Place()),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, Place(3, 4, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4"}, Place(3, 4, 3)),
        ({"RANK": "colonel"}, Place()),
        ({"RANK": "3"}, Place()),
        (SLURM, Place()),
        (SLURM | MEETING, Place(5, 8, 1)),
        (SLURM | MEETING | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, Place(0, 2, 0)),
    ],
)
def test_the_place_comes_from_the_launcher(environment, variables, expected):
    environment(**variables)
    assert place() == expected
    assert distributed.is_main_process() == (expected.rank == 0)


def test_others_find_what_srun_calls_differently(environment):
    environment(**SLURM, **MEETING)
    distributed.adopt_launch()
    assert {name: os.environ[name] for name in NAMES[:3]} == {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}


def test_ranks_that_are_not_told_where_to_meet(environment):
    environment(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1")
    with pytest.raises(UsageError, match="this is process 1 of 2, but MASTER_ADDR is not set"):
        distributed.exchange("x")
    assert distributed._group is None


def test_a_process_alone_agrees_with_itself(environment):
    environment()
    assert distributed.exchange("x") == ["x"]
    assert distributed.exchange_results(lambda: 3) == [3]
    assert distributed.from_main(lambda: 4) == 4
    distributed.raise_together(None)
    distributed.stop_together(None, "all is kept")
    with pytest.raises(StoppedEarlyError, match="stopped by SIGTERM; all is kept"):
        distributed.stop_together("SIGTERM", "all is kept")
    problem = NonFiniteError("x")
    with pytest.raises(NonFiniteError) as raised:
        distributed.raise_together(problem)
    assert raised.value is problem
    assert distributed.end_together(problem), "it says it itself"
    assert distributed._group is None


def test_errors_keep_their_kind_and_name_their_rank():
    problem = distributed._of_rank(NonFiniteError("the loss is nan", hint="lower it"), 3)
    assert type(problem) is NonFiniteError
    assert (problem.message, problem.hint) == ("rank 3: the loss is nan", "lower it")
    assert distributed._portable(OSError("disk full")).exit_code == 74
    assert distributed._portable(ZeroDivisionError()).message == "internal error: ZeroDivisionError"
    assert PeerLostError.exit_code == 75


def test_an_error_that_is_no_lost_connection_stays_what_it_is():
    with pytest.raises(RuntimeError, match="shape"), distributed.explained_losses():
        raise RuntimeError("shape mismatch")


def config(**settings):
    return TrainConfig(model="m", data="d", out="o", scope="full", **settings)


def test_a_batch_that_ranks_cannot_share_evenly_is_refused(environment):
    environment(RANK="0", WORLD_SIZE="3", LOCAL_RANK="0")
    _require_usable_launch(config(batch_size=12, accumulation=2))
    with pytest.raises(UsageError, match=r"--batch-size 8 .* multiple of .* 2 x 3 = 6"):
        _require_usable_launch(config(batch_size=8, accumulation=2))
    environment()
    _require_usable_launch(config(batch_size=8, accumulation=2))


@pytest.mark.parametrize(
    ("variables", "refusal"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "not with DeepSpeed"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP2 only"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "whole checkpoints"),
    ],
)
def test_launches_that_train_otherwise_are_refused(environment, variables, refusal):
    environment(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", **variables)
    with pytest.raises(UsageError, match=refusal):
        _require_usable_launch(config(batch_size=8))
