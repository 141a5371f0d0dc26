"""Run p2d commands one after the other in a launched process: `launched.py COMMANDS.json`.

Each entry of the file is the command's words, and what is to befall it (see `FAULTS`). How each one ended is appended
to `COMMANDS.json.rank<N>`, one JSON line a command.
"""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

RANK = int(os.environ["RANK"])
UNTIL_THE_END = contextlib.ExitStack()
UNTIL_THE_NEXT = contextlib.ExitStack()


def last_rank():
    return int(os.environ["WORLD_SIZE"]) - 1 == RANK


def asked_to_stop_at(batch):
    """The batch queue's signal reaches one rank only."""
    from p2d_cli.runtime import signals

    calls = []

    def stop_requested():
        calls.append(1)
        return "SIGTERM" if last_rank() and len(calls) >= batch else None

    signals.stop_requested = stop_requested


def signalled_in(number, handler):
    """A fault: a real signal reaches one rank only, in the middle of an update."""

    def fault(update):
        from p2d_cli.modeling.completion_trainer import CompletionTrainer

        signal.signal(number, handler)  # which an earlier command left ignored when it was done
        plain = CompletionTrainer.training_step

        def step(self, *arguments, **more):
            if last_rank() and self.state.global_step == update - 1:
                os.kill(os.getpid(), number)
            return plain(self, *arguments, **more)

        CompletionTrainer.training_step = step
        UNTIL_THE_NEXT.callback(setattr, CompletionTrainer, "training_step", plain)

    return fault


def killed_at(batch):
    from p2d_cli.engine.reader import ModelReader

    plain, calls = ModelReader.pad, []

    def pad(self, *arguments):
        calls.append(1)
        if last_rank() and len(calls) == batch:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, *arguments)

    ModelReader.pad = pad


def out_of_numbers_at(batch):
    import torch

    from p2d_cli.modeling.completion_trainer import CompletionTrainer

    plain, calls = CompletionTrainer._completion_loss, []

    def loss(self, model, inputs):
        total, *rest = plain(self, model, inputs)
        calls.append(1)
        return total * torch.nan if last_rank() and len(calls) == batch else total, *rest

    CompletionTrainer._completion_loss = loss


def crashing_at(batch):
    """An error that no other rank hears of where the ranks exchange errors: inside of the backward pass."""
    from transformers import Trainer

    plain, calls = Trainer.training_step, []

    def step(self, *arguments, **more):
        calls.append(1)
        if last_rank() and len(calls) == batch:
            raise MemoryError("no room for gradients")
        return plain(self, *arguments, **more)

    Trainer.training_step = step


def methods_of_its_own(_):
    from own_methods import Easy, Loud

    from p2d_cli.registry import HEAD_METHODS, ROW_METHODS

    if Loud.name not in HEAD_METHODS:
        UNTIL_THE_END.enter_context(HEAD_METHODS.added(Loud))
        UNTIL_THE_END.enter_context(ROW_METHODS.added(Easy))


FAULTS = {
    "own": methods_of_its_own,
    "stop": asked_to_stop_at,
    "SIGINT": signalled_in(signal.SIGINT, signal.default_int_handler),
    "SIGTERM": signalled_in(signal.SIGTERM, signal.SIG_DFL),
    "kill": killed_at,
    "nan": out_of_numbers_at,
    "crash": crashing_at,
}


def shard_on_cpu():
    """Let accelerate shard on CPUs, which it does on accelerators only."""
    from accelerate import state

    state.PartialState._prepare_backend = lambda *_, **__: ("gloo", state.DistributedType.MULTI_GPU)


def main():
    path = Path(sys.argv[1])
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_cpu()
    from p2d_cli.__main__ import main
    from p2d_cli.runtime import signals

    stop_requested = signals.stop_requested
    for words, fault in json.loads(path.read_text()):
        signals.stop_requested = stop_requested
        if fault:
            FAULTS[fault[0]](fault[1])
        sys.argv = ["p2d", *words]
        started, code = time.monotonic(), 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        UNTIL_THE_NEXT.close()
        with path.with_name(f"{path.name}.rank{RANK}").open("a") as log:
            log.write(json.dumps({"command": words[0], "code": code, "seconds": time.monotonic() - started}) + "\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
