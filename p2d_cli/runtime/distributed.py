"""The processes that `torchrun`, `accelerate launch` or `srun` started for one command, and how they agree.

p2d starts no processes itself. Every process (rank) runs the same command; rank 0 decides, writes and speaks. What they
tell each other goes through a gloo group that is made when it is first needed, and never by a process that runs alone.
Its timeout is long, since one rank may wait for another that still tokenizes.

A rank that fails posts its error in the store that the group was made with, and closes its connections. The others find
them closed wherever they wait, look into the store, and end with the same error. A rank that was killed posts nothing:
the others then say that it is gone.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from p2d_cli import errors
from p2d_cli.errors import P2DError, PeerLostError, StoppedEarlyError, StorageError, UsageError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

JOIN_TIMEOUT = datetime.timedelta(minutes=30)
"""How long a rank waits for the others to begin; before that they digest their inputs."""
CONTROL_TIMEOUT = datetime.timedelta(hours=12)
"""How long a rank waits for what another one has to say, which may be reading a whole pool by itself."""
SECONDS_TO_LEARN = 5.0
"""How long a rank that fails waits until the others know why."""
_CLOSED = ("closed by peer", "reset by peer", "broken pipe", "gloo", "nccl", "connection refused", "socket")
"""What torch's errors of a lost connection say; they have no type of their own."""


# --- who this is


@dataclass(frozen=True)
class Place:
    """A process among those of its command."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Its number on its own machine."""


def place() -> Place:
    """Return which process this is, as its launcher says.

    `torchrun` and `accelerate launch` set RANK, WORLD_SIZE and LOCAL_RANK. Under `srun` SLURM's own variables count,
    but only where MASTER_ADDR and MASTER_PORT say where the processes meet: a batch script that is no parallel step
    has SLURM's variables too.
    """
    found = [_number(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    if found[0] is None and {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        found = [_number(name) for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")]
    rank_, size, local = found
    if rank_ is None or size is None:
        return Place()
    return Place(rank_, size, rank_ if local is None else local)


def _number(variable: str) -> int | None:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else None


def rank() -> int:
    """Return this process's global rank; 0 when it runs alone."""
    return place().rank


def world_size() -> int:
    """Return how many processes run this command."""
    return place().size


def is_main_process() -> bool:
    """Say whether this process is the one that decides, writes and speaks."""
    return rank() == 0


def adopt_launch() -> None:
    """Give this process the launcher's variables that torch and accelerate read, where `srun` calls them otherwise."""
    here = place()
    if here.size > 1:
        names = {"RANK": here.rank, "WORLD_SIZE": here.size, "LOCAL_RANK": here.local_rank}
        os.environ.update({name: str(value) for name, value in names.items()})


def own_device(name: str) -> str:
    """Return the device of this rank, where `name` (`auto` or `cuda`) leaves open which of several GPUs is meant."""
    here = place()
    if here.size == 1 or name not in {"auto", "cuda"}:
        return name
    import torch

    return f"cuda:{here.local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else name


# --- how they agree


def exchange(value: T) -> list[T]:
    """Tell the other ranks a value, and return what all ranks told, by rank.

    Args:
        value: anything that can be pickled.

    Raises:
        P2DError: another rank has failed, with that rank's error; or it is gone (`PeerLostError`).
    """
    if world_size() == 1:
        return [value]
    return _join().exchange(value)


def exchange_results(work: Callable[[], T]) -> list[T]:
    """Do each rank's work and return what all ranks got, by rank; if one of them failed, all raise its error.

    Raises:
        P2DError: the first rank's that failed.
    """
    if world_size() == 1:
        return [work()]
    problem: Exception | None = None
    result: Any = None
    try:
        result = work()
    except PeerLostError:
        raise
    except Exception as raised:  # noqa: BLE001 - it is raised again below, on all ranks
        problem = raised
    told = exchange((result, None if problem is None else _portable(problem)))
    _raise_first([found for _, found in told])
    return [value for value, _ in told]


def from_main(work: Callable[[], T]) -> T:
    """Do the work on rank 0 alone, and return on every rank what came out.

    Raises:
        P2DError: what the work raised.
    """
    if world_size() == 1:
        return work()
    found: Any = exchange_results(work if is_main_process() else lambda: None)[0]
    result: T = found
    return result


def raise_together(problem: P2DError | None) -> None:
    """Raise on every rank the error that one of them has, if one has.

    Raises:
        P2DError: the first rank's that has one.
    """
    if isinstance(problem, PeerLostError):
        raise problem
    _raise_first(exchange(problem))


def stop_together(name: str | None, promise: str) -> None:
    """End all ranks at the same place, if one of them was asked to stop.

    Args:
        name: the signal that asked this rank.
        promise: what the same command does next time.

    Raises:
        StoppedEarlyError: on all ranks.
    """
    raise_together(StoppedEarlyError(f"stopped by {name}; {promise}") if name else None)


def sum_tensors(tensors: Sequence[torch.Tensor]) -> None:
    """Add up each tensor over all ranks, in place; every rank ends with the same bits.

    Raises:
        P2DError: see `exchange`.
    """
    if world_size() == 1:
        return
    import torch.distributed as dist

    _join()
    with explained_losses():
        for tensor in tensors:
            dist.all_reduce(tensor)


@contextlib.contextmanager
def explained_losses() -> Iterator[None]:
    """Turn what torch raises in the body, when the connection to another rank is lost, into that rank's own error.

    Raises:
        P2DError: see `exchange`.
    """
    try:
        yield
    except RuntimeError as problem:
        if _group is None or not any(sign in str(problem).lower() for sign in _CLOSED):
            raise
        raise _group.explain() from problem


def end_together(problem: P2DError) -> bool:
    """Let the other ranks end with the error that ends this one.

    Returns:
        Whether this process is the one to say it: rank 0, or a rank that the others have not heard.
    """
    if world_size() == 1 or isinstance(problem, PeerLostError):
        return True
    if _group is not None and (_group.is_closed or problem is _group.heard):
        return is_main_process()
    try:
        return _join().post(problem) or is_main_process()
    except Exception:  # noqa: BLE001 - whatever keeps the others from hearing it, it must be said
        return True


def _raise_first(problems: Sequence[P2DError | None]) -> None:
    """Raise the error of the first rank that has one; all ranks have heard it."""
    for number, problem in enumerate(problems):
        if problem is not None:
            heard = _of_rank(problem, number)
            if _group is not None:
                _group.heard = heard
            raise heard


def _portable(problem: Exception) -> P2DError:
    """Return an error that another rank can raise."""
    if isinstance(problem, P2DError):
        return problem
    if isinstance(problem, OSError):
        return StorageError(str(problem))
    described = f"{type(problem).__name__}: {problem}" if str(problem) else type(problem).__name__
    return P2DError(f"internal error: {described}")


def _of_rank(problem: P2DError, number: int) -> P2DError:
    if number == 0:
        return problem
    return type(problem)(f"rank {number}: {problem.message}", hint=problem.hint)


class _Group:
    """The connections of this rank to the others.

    Invariant: once closed, because this rank or another one failed, nothing is sent any more.
    """

    def __init__(self, here: Place) -> None:
        import torch
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        if missing := sorted({"MASTER_ADDR", "MASTER_PORT"} - os.environ.keys()):
            raise UsageError(
                f"this is process {here.rank} of {here.size}, but {missing[0]} is not set: the processes cannot meet",
                hint="start them with torchrun or accelerate launch; to run alone, unset RANK and WORLD_SIZE",
            )
        adopt_launch()
        has_gpus = torch.cuda.is_available() and dist.is_nccl_available()
        if has_gpus:
            torch.cuda.set_device(here.local_rank % torch.cuda.device_count())
        self._here = here
        self._store, *_ = next(rendezvous("env://", timeout=JOIN_TIMEOUT))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if has_gpus else "gloo",
            store=PrefixStore("p2d", self._store),
            rank=here.rank,
            world_size=here.size,
            timeout=JOIN_TIMEOUT,
        )
        self._control: Any = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
        self.is_closed = False
        self.heard: P2DError | None = None
        """The error that all ranks raise, if they do."""

    def exchange(self, value: T) -> list[T]:
        import torch.distributed as dist

        if self.is_closed:
            raise RuntimeError("the ranks have ended, there is nobody to tell")
        told: list[Any] = [None] * self._here.size
        try:
            dist.all_gather_object(told, value, group=self._control)
        except RuntimeError as problem:
            raise self.explain() from problem
        return told

    def post(self, problem: P2DError) -> bool:
        """Tell the error to the others, and return whether this rank has to say it itself."""
        text = json.dumps([type(problem).__name__, problem.message, problem.hint])
        self._store.set(f"failed/{self._here.rank}", text)
        self.close()
        # The store may live in this process: it must outlast their reading. Rank 0 speaks; the others need its ear.
        waited_for = set(range(self._here.size)) - {self._here.rank} if self._here.rank == 0 else {0}
        return bool(self._wait_for(waited_for))

    def explain(self) -> P2DError:
        """Return why the connection to another rank was lost: its error if it posted one."""
        self.close()
        try:
            self._store.set(f"seen/{self._here.rank}", "1")
            if (posted := self._posted()) is not None:
                return posted
            missing = self._wait_for(set(range(self._here.size)))
            return self._posted() or _lost(sorted(missing))
        except Exception:  # noqa: BLE001 - torch has many names for a store that is gone
            return _lost([0])

    def close(self) -> None:
        """Close the connections, which wakes the ranks that wait for this one."""
        import torch.distributed as dist

        self.is_closed = True
        self._control = None
        if dist.is_initialized():
            dist.destroy_process_group()

    def _posted(self) -> P2DError | None:
        for number in range(self._here.size):
            if self._store.check([f"failed/{number}"]):
                kind, message, hint = json.loads(self._store.get(f"failed/{number}"))
                found: type[P2DError] = getattr(errors, kind, P2DError)
                return _of_rank(found(message, hint=hint), number)
        return None

    def _wait_for(self, others: set[int]) -> set[int]:
        """Wait until these ranks have noticed or posted a failure; return those that did not."""
        deadline = time.monotonic() + SECONDS_TO_LEARN
        while others and time.monotonic() < deadline:
            signs = {number: (f"seen/{number}", f"failed/{number}") for number in others}
            others = {number for number in others if not any(self._store.check([sign]) for sign in signs[number])}
            time.sleep(0.05)
        return others


def _lost(missing: Sequence[int]) -> PeerLostError:
    which = f"rank {missing[0]}" if len(missing) == 1 else "another rank"
    which += f" (not heard from: {', '.join(map(str, missing))})" if len(missing) > 1 else ""
    return PeerLostError(
        f"{which} of {world_size()} has ended without a word: it crashed, was killed, or its machine was lost",
        hint="look at its log and for the system's out-of-memory killer; the same command again resumes",
    )


_group: _Group | None = None


def _join() -> _Group:
    """Meet the other ranks, once."""
    global _group
    if _group is None:
        _group = _Group(place())
        atexit.register(_group.close)
    return _group
