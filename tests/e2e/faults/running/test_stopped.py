"""Being told to stop: by a batch queue with exit code 75, by Ctrl-C with 130; the same command goes on from there."""

import signal
import subprocess
import sys
import time

import pytest

from p2d_cli.artifacts.store import Draft
from p2d_cli.runtime import signals

from .conftest import SLOW, WORK, at_forward, leftovers, named, quickly, results, send  # noqa: TID252 - tests are no package

GO_ON, ANEW = signals.GO_ON, signals.BEGINS_ANEW
NO_UPDATE = "no update is kept yet, the same command begins the training anew"
QUEUE = {work: (signal.SIGTERM, signal.SIGUSR1)[number % 2] for number, work in enumerate(WORK)}
"""The signals take turns."""


def says_one_line(done, promise=GO_ON):
    lines = [line for line in done.err.splitlines() if "interrupted" in line or "stopped" in line]
    return len(lines) == 1 and promise in lines[0] and done.err.rstrip().endswith(lines[0])


def promise_of(work):
    """A draw of the proxy is kept as a whole or not at all."""
    return "the same command begins this one anew" if work == ("score-heads", "pad") else GO_ON


@pytest.mark.parametrize(
    "work", quickly(WORK, "pad", "taylor", "readout", "generate", "heads", "answers", "accuracy"), ids=named
)
def test_a_batch_queue_stops_it_and_it_goes_on(p2d, words, undisturbed, work, tmp_path):
    expected = undisturbed(p2d, words, work)
    line = words(work, tmp_path / "out")
    with at_forward(2, send(QUEUE[work])):
        done = p2d(*line)
    assert done.code == 75, done.said
    assert says_one_line(done, promise_of(work)), done.err
    assert not (tmp_path / "out").exists()
    again = p2d(*line)
    assert again.code == 0, again.said
    assert results(tmp_path / "out") == results(expected)
    assert not leftovers(tmp_path / "out")


def in_update(patch, update, act):
    """Do something in the middle of an update."""
    from p2d_cli.modeling.completion_trainer import CompletionTrainer

    step = CompletionTrainer.training_step

    def step_and_act(self, *args, **kwargs):
        loss = step(self, *args, **kwargs)
        if self.state.global_step == update - 1:
            act()
        return loss

    patch.setattr(CompletionTrainer, "training_step", step_and_act)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)], ids=["queue", "ctrl-c"])
@pytest.mark.parametrize(
    ("name", "update"),
    [
        ("held-out", 2),
        pytest.param("held-out", 3, marks=SLOW),
        pytest.param("lora", 1, marks=SLOW),
        ("lora", 5),
    ],
)
def test_a_stop_at_any_update_costs_none(p2d, words, undisturbed, name, update, number, code, tmp_path, monkeypatch):
    """Also at the end of an epoch, and where held-out rows are looked at."""
    work = ("train", name)
    # There, a checkpoint is written behind each update anyway.
    saves = ("--checkpoint-minutes", 0) if name == "lora" else ()
    expected = undisturbed(p2d, words, work, *saves)
    with monkeypatch.context() as patch:
        in_update(patch, update, send(number))
        done = p2d(*words(work, tmp_path / "out", *saves))
    assert done.code == code
    assert says_one_line(done)
    said = f"{'interrupted' if code == 130 else 'stopped'} after update {update} of 6, which is kept; {GO_ON}"
    assert said in done.said
    assert ("error:" in done.err) == (code == 75)
    again = p2d(*words(work, tmp_path / "out", *saves))
    assert f"going on from checkpoint-{update}" in again.said
    assert "not going on" not in again.said
    assert results(tmp_path / "out") == results(expected)


@pytest.mark.parametrize("saves", [(), ("--checkpoint-minutes", 0)], ids=["nothing-kept", "kept"])
def test_a_second_ctrl_c_does_not_wait_and_says_what_is_kept(p2d, words, undisturbed, saves, tmp_path, monkeypatch):
    work = ("train", "heads")
    expected = undisturbed(p2d, words, work, *saves)

    def twice():
        send(signal.SIGINT)()
        send(signal.SIGINT)()
        raise AssertionError("this is not reached")

    with monkeypatch.context() as patch:
        patch.setattr(signals, "SAME_SIGNAL_SECONDS", 0.0)
        in_update(patch, 4, twice)
        done = p2d(*words(work, tmp_path / "out", *saves), "--json")
    promise = f"update 3 is the last that is kept, {GO_ON} there" if saves else NO_UPDATE
    assert done.code == done.json["exit_code"] == 130
    assert done.json["message"] == f"interrupted; {promise}"
    again = p2d(*words(work, tmp_path / "out", *saves))
    assert ("going on from checkpoint-3" in again.said) == bool(saves)
    assert results(tmp_path / "out") == results(expected)


def test_a_stop_before_the_first_update_does_not_wait_for_one(p2d, words, small, tmp_path):
    """The look at held-out rows that comes first may take minutes, and there is nothing to keep yet."""
    reached = []
    with at_forward(2, send(signal.SIGINT)), at_forward(3, reached.append):
        done = p2d(*words(("train", "full"), tmp_path / "out", "--eval-data", small["target"]))
    assert done.code == 130
    assert done.err.rstrip().endswith("interrupted before the first update; run the same command again")
    assert not reached


def test_ctrl_c_in_a_draw_of_the_proxy_promises_no_more_than_finished_draws(p2d, words, tmp_path):
    work = ("score-heads", "pad")
    with at_forward(2, send(signal.SIGINT)):
        done = p2d(*words(work, tmp_path / "out"))
    assert done.code == 130
    assert says_one_line(done, promise_of(work))


def test_ctrl_c_where_nothing_is_kept_promises_nothing(p2d, words, tmp_path, monkeypatch):
    from p2d_cli.methods import words as counting

    count_words = counting.count_words

    def count_and_stop(*args):
        send(signal.SIGINT)()
        return count_words(*args)

    monkeypatch.setattr(counting, "count_words", count_and_stop)
    [stage, *line] = words(("mine-data", "loss"), tmp_path / "out")
    done = p2d(stage, *line, "--method", "lexical")
    assert done.code == 130
    assert done.err.rstrip().endswith(f"interrupted; {ANEW}")


@pytest.mark.parametrize(
    ("work", "number"),
    [(("train", "heads"), signal.SIGTERM), (("mine-data", "loss"), signal.SIGINT)],
    ids=["train-queue", "mine-data-ctrl-c"],
)
def test_an_artifact_that_is_being_written_is_completed(p2d, words, work, number, tmp_path, monkeypatch):
    describe = Draft.describe_outputs

    def described(self, *args):
        send(number)()
        return describe(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Draft, "describe_outputs", described)
        done = p2d(*words(work, tmp_path / "out"))
    assert done.code == (130 if number == signal.SIGINT else 75)
    assert says_one_line(done, signals.COMPLETE)
    assert not leftovers(tmp_path / "out")
    again = p2d(*words(work, tmp_path / "out"))
    assert again.code == 0
    assert "up to date" in again.said


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)], ids=["queue", "ctrl-c"])
def test_a_stop_in_the_last_update_loses_nothing(p2d, words, undisturbed, tmp_path, number, code):
    expected = undisturbed(p2d, words, ("train", "lora"))
    with at_forward(6, send(number)):
        done = p2d(*words(("train", "lora"), tmp_path / "out"))
    assert done.code == code
    assert says_one_line(done, signals.COMPLETE)
    assert results(tmp_path / "out") == results(expected), "there was nothing left to do but to write it"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 75), (signal.SIGINT, 130)], ids=["queue", "ctrl-c"])
def test_while_loading(p2d, words, number, code, tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    load = AutoTokenizer.from_pretrained

    def loaded(*args, **kwargs):
        send(number)()
        return load(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(AutoTokenizer, "from_pretrained", loaded)
        done = p2d(*words(("train", "heads"), tmp_path / "out"), "--json")
    assert done.code == code
    assert says_one_line(done, ANEW)
    assert done.json["exit_code"] == code
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("work", "promise"),
    [(("score-heads", "pad"), promise_of(("score-heads", "pad"))), (("eval", "answers"), ANEW)],
    ids=["pad", "answers"],
)
def test_ctrl_c_does_not_wait_for_the_batch(p2d, words, undisturbed, work, promise, tmp_path):
    expected = undisturbed(p2d, words, work)
    reached = []
    with at_forward(2, send(signal.SIGINT)), at_forward(3, reached.append):
        done = p2d(*words(work, tmp_path / "out"))
    assert done.code == 130
    assert says_one_line(done, promise)
    assert not reached
    assert p2d(*words(work, tmp_path / "out")).code == 0
    assert results(tmp_path / "out") == results(expected)


@pytest.fixture
def recipe(tiny_folder, small, tmp_path):
    """Return the command of a small recipe."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f"""\
[defaults]
model = "{tiny_folder}"
dtype = "float32"
[score-heads]
method = "random"
[mine-data]
method = "random"
pool = "{small["pool"]}"
[train]
batch_size = 4
epochs = 1
[eval]
data = "{small["test"]}"
max_new_tokens = 2
[grid]
heads = ["random"]
data = ["random"]
"""
    )
    return "run", recipe, "--out", tmp_path / "out"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)], ids=["queue", "ctrl-c"])
def test_a_recipe_stops_as_a_whole_and_goes_on(p2d, recipe, tmp_path, number, code):
    line = recipe
    with at_forward(3, send(number)):
        done = p2d(*line)
    assert done.code == code
    assert says_one_line(done)
    assert not (tmp_path / "out" / "report").exists()
    again = p2d(*line, "--json")
    assert again.code == 0
    assert "up-to-date" in {stage["status"] for stage in again.json["stages"]}
    assert (tmp_path / "out" / "report" / "aer.json").exists()


def test_a_recipe_that_is_redone_goes_on_without_force(p2d, recipe, monkeypatch):
    """With it, finished stages would be redone. An artifact that was there does not stand for a half-redone one."""
    assert p2d(*recipe).code == 0
    on = "run the same command without --force to go on"
    with monkeypatch.context() as patch:
        in_update(patch, 2, send(signal.SIGINT))
        done = p2d(*recipe, "--force")
    assert done.code == 130
    assert f"interrupted after update 2 of 4, which is kept; {on}" in done.err, done.err
    with monkeypatch.context() as patch:
        patch.setattr("p2d_cli.stages.report_aer._compute", send(signal.SIGINT))
        done = p2d(*recipe)
    assert "going on from checkpoint-2" in done.said
    assert done.err.rstrip().endswith(f"interrupted; finished stages are kept, {GO_ON}"), done.err


def test_a_recipe_that_has_changed_leaves_what_was_interrupted(p2d, recipe, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        in_update(patch, 2, send(signal.SIGINT))
        assert p2d(*recipe).code == 130
    [left] = tmp_path.glob("out/adapter/.*.unfinished-*")
    before = recipe[1].read_text()
    recipe[1].write_text(before.replace("epochs = 1", "epochs = 2"))
    done = p2d(*recipe)
    assert done.code == 0, done.said
    assert f"2 updates, stays in {left} until you remove it" in done.said
    recipe[1].write_text(before)
    assert "going on from checkpoint-2" in p2d(*recipe).said
    assert not left.exists()


def test_what_is_promised_depends_on_what_is_kept(p2d, words, tmp_path):
    """Nothing before the first batch is finished; once one is kept, that, also if the next run finishes no other."""
    line = words(("mine-data", "loss"), tmp_path / "out")
    for forward, promise in ((1, ANEW), (2, GO_ON), (1, GO_ON)):
        with at_forward(forward, send(signal.SIGINT)):
            done = p2d(*line)
        assert done.code == 130
        assert says_one_line(done, promise), done.err


def test_several_processes_only_take_note(p2d, words, undisturbed, tmp_path, monkeypatch):
    """They have to stop at the same batch, so none stops by itself."""
    with monkeypatch.context() as patch:
        patch.setattr(signals, "_together", lambda number: number in signals.STOP_SIGNALS)
        with at_forward(1, send(signal.SIGTERM)):
            done = p2d(*words(("eval", "perplexity"), tmp_path / "out"))
    assert done.code == 0
    assert signals.stop_requested() == "SIGTERM"
    assert results(tmp_path / "out") == results(undisturbed(p2d, words, ("eval", "perplexity")))


# --- a process of its own: where Python alone would be too late, or say too much

# Each goes on for hours unless it is ended.
STUCK = {
    "one long call": "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)",
    "swallowed": "\n    try: time.sleep(9999)\n    except BaseException: time.sleep(9999)",
    "a destructor": "\n    class Last:\n        def __del__(self): time.sleep(9999)\n    Last(); time.sleep(9999)",
    "saving": "\n    with signals.shielded(): time.sleep(9999)",
}
OWN_PROCESS = """\
import sys, time
from p2d_cli import __main__
from p2d_cli.runtime import signals
"""


def start(code, *words):
    """Start a command, changed by `code`, and wait until it says that it has begun."""
    argv = f"sys.argv = {['p2d', *map(str, words)]!r}\n"
    process = subprocess.Popen(
        [sys.executable, "-c", OWN_PROCESS + code + argv + "__main__.main()\n"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell lets what runs in the background ignore Ctrl-C, and p2d keeps to it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
    )
    assert "begun\n" in iter(process.stdout.readline, "")
    return process


def ends_in_one_line(process, number=signal.SIGINT, promise=signals.UNBEGUN):
    process.send_signal(number)
    _, said = process.communicate()
    code, what = (130, "interrupted") if number == signal.SIGINT else (75, f"stopped by {number.name}")
    assert process.returncode == code, said
    assert said == f"{what}; {promise}\n"


@pytest.mark.parametrize(
    ("where", "number"), [*((where, signal.SIGINT) for where in STUCK), ("swallowed", signal.SIGTERM)]
)
def test_a_signal_ends_what_does_not_listen(where, number):
    code = f"def inspect(_):\n    print('begun', flush=True); {STUCK[where]}\n"
    code = f"import p2d_cli.stages.inspection\n{code}p2d_cli.stages.inspection.inspect = inspect\n"
    ends_in_one_line(start(code, "inspect", "."), number, ANEW)


WAITING_IMPORT = """\
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            print('begun', flush=True); time.sleep(9999)
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize("module", ["typer", "p2d_cli.cli.commands", "pyarrow", "torch.nn", "transformers", "sklearn"])
def test_ctrl_c_while_importing(tiny_folder, small, tmp_path, module):
    """Whatever modules are half imported by then."""
    rows = ("--target", small["target"], "--pool", small["pool"])
    line = ("score-heads", "--model", tiny_folder, *rows, "--out", tmp_path / "out")
    promise = ANEW if module in {"torch.nn", "transformers", "sklearn"} else signals.UNBEGUN
    ends_in_one_line(start(WAITING_IMPORT.format(module=module), *line), promise=promise)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_is_done_stays_done(number):
    """A signal that comes while Python takes itself down no longer changes the exit code."""
    code = "def __del__(self, say=print, wait=time.sleep):\n    say('begun', flush=True)\n    wait(1)\n"
    process = start(code + "last = type('Last', (), {'__del__': __del__})()\n", "--version")
    process.send_signal(number)
    _, said = process.communicate()
    assert (process.returncode, said) == (0, "")


# Says so in the middle of an update, and takes its time for it.
LONG_UPDATE = """\
from p2d_cli.modeling.completion_trainer import CompletionTrainer
step = CompletionTrainer.training_step
def step_slowly(self, *args, **kwargs):
    if self.state.global_step == 1:
        print('begun', flush=True)
        {wait}
    return step(self, *args, **kwargs)
CompletionTrainer.training_step = step_slowly
"""
NOTICE = "finishing what has begun, to keep it; Ctrl-C again does not wait for it"


def test_ctrl_c_in_a_process_of_its_own_keeps_the_update_and_ends_with_the_same_bits(p2d, words, undisturbed, tmp_path):
    work = ("train", "held-out")
    line = words(work, tmp_path / "out")
    process = start(LONG_UPDATE.format(wait="time.sleep(2)"), *line)  # longer than what else waits for Ctrl-C
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130, said
    *_, last = said.splitlines()
    assert said.count(NOTICE) == 1
    assert last == f"interrupted after update 2 of 6, which is kept; {GO_ON}"
    again = p2d(*line)
    assert "going on from checkpoint-2" in again.said
    assert results(tmp_path / "out") == results(undisturbed(p2d, words, work))


@pytest.mark.parametrize(
    "wait", ["time.sleep(9999)", "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"], ids=["py", "c"]
)
def test_a_second_ctrl_c_ends_an_update_that_takes_for_ever(words, tmp_path, wait):
    process = start(LONG_UPDATE.format(wait=wait), *words(("train", "heads"), tmp_path / "out"))
    process.send_signal(signal.SIGINT)
    time.sleep(signals.SAME_SIGNAL_SECONDS + signals.PATIENCE_SECONDS[signal.SIGINT])
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130, said
    assert said.splitlines()[-1] == f"interrupted; {NO_UPDATE}"
