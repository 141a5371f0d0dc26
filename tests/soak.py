"""A recipe's grid, killed again and again at random moments, ends with the results of one that was left alone.

Not collected by pytest: it takes a quarter of an hour. From the top of the repository:
    python tests/soak.py --kills 50 --seed 0 --out OUT
It prints one JSON document; exit code 0 says that nothing differed.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).parent.parent / "fixtures"
ROWS = {"pool": 40, "target": 8, "test": 6}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
EXPECTED = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 75, signal.SIGINT: 130}
RECIPE = """\
[defaults]
model = "{model}"
dtype = "float32"
[score-heads]
method = "readout"
background = 16
target = "{target}"
pool = "{pool}"
[mine-data]
target = "{target}"
pool = "{pool}"
background = 8
ratio = 0.2
[train]
epochs = 1
batch_size = 4
checkpoint_minutes = 0
[eval]
data = "{test}"
max_new_tokens = 2
[grid]
heads = ["readout", "random", "all"]
data = ["p2d", "random", "loss", "lexical", "full"]
seed = [0, 1]
"""


def main() -> None:
    """Run the grid twice, once undisturbed, and compare."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--kills", type=int, default=50)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--longest", type=float, help="Seconds until the latest kill; measured if unset.")
    options.add_argument("--out", type=Path, required=True)
    given = options.parse_args()
    given.out.mkdir(parents=True)
    # A shell lets what runs in the background ignore Ctrl-C, and so would the processes started here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    recipe = write_recipe(given.out)
    without_pictures(given.out)
    started = time.monotonic()
    run(recipe, given.out / "undisturbed")
    alone = time.monotonic() - started
    stages = len(list((given.out / "undisturbed").rglob("manifest.json")))
    started = time.monotonic()
    run(recipe, given.out / "undisturbed")
    idle = time.monotonic() - started
    # So that the kills together leave time for the whole grid, half of the time being spent on starting.
    longest = given.longest or 2 * (idle + (alone - idle) / given.kills)
    kills = disturb(recipe, given.out, given.kills, longest, random.Random(given.seed))
    rounds = sorted(given.out.glob("disturbed-*"))
    differences = [text for folder in rounds for text in compare(given.out / "undisturbed", folder)]
    document = {
        "artifacts": stages,
        "undisturbed_seconds": round(alone, 1),
        "startup_seconds": round(idle, 1),
        "grids_finished": len(rounds),
        **summarise(kills),
        "differences": differences,
    }
    print(json.dumps(document, indent=2))
    sys.exit(1 if differences or document["unexpected"] else 0)


def write_recipe(folder: Path) -> Path:
    """Write the recipe and its rows."""
    for name, count in ROWS.items():
        lines = (FIXTURES / "data" / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")[:count]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    paths = {name: folder / f"{name}.jsonl" for name in ROWS} | {"model": FIXTURES / "tiny-model"}
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(**paths), encoding="utf-8")
    return recipe


def without_pictures(folder: Path) -> None:
    """Make matplotlib look as if it were not installed: pictures take half of the time of such small runs."""
    stand_in = folder / "without" / "matplotlib"
    stand_in.mkdir(parents=True)
    (stand_in / "__init__.py").write_text('raise ImportError("not in this test")\n', encoding="utf-8")
    paths = [str(stand_in.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)


def command(recipe: Path, out: Path) -> list[str]:
    """Return the one command that is started again and again."""
    return [sys.executable, "-m", "p2d_cli", "run", str(recipe), "--out", str(out)]


def run(recipe: Path, out: Path) -> None:
    """Run the recipe to its end."""
    subprocess.run(command(recipe, out), check=True, capture_output=True)


def disturb(recipe: Path, folder: Path, kills: int, longest: float, chance: random.Random) -> list[dict[str, Any]]:
    """Start, kill, start again; a grid that gets to its end is followed by another one."""
    told: list[dict[str, Any]] = []
    grid = 1
    while len(told) < kills:
        out = folder / f"disturbed-{grid}"
        number, delay = SIGNALS[len(told) % len(SIGNALS)], chance.uniform(0.3, longest)
        process = subprocess.Popen(command(recipe, out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            _, said = process.communicate(timeout=delay)
            assert process.returncode == 0, said
            grid += 1
            continue
        except subprocess.TimeoutExpired:
            process.send_signal(number)
        started = time.monotonic()
        _, said = process.communicate()
        told.append(
            {
                "signal": number,
                "delay": delay,
                "took": time.monotonic() - started,
                "code": process.returncode,
                "said": said,
                "artifacts": len(list(out.rglob("manifest.json"))) if out.exists() else 0,
            }
        )
        name, took = signal.Signals(number).name, told[-1]["took"]
        line = f"{len(told)}: {name} after {delay:.1f} s -> {process.returncode} in {took:.2f} s"
        print(line, *said.splitlines()[-1:], sep="; ", file=sys.stderr, flush=True)
    run(recipe, folder / f"disturbed-{grid}")
    return told


def summarise(kills: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what became of the kills."""
    codes = collections.Counter(f"{signal.Signals(kill['signal']).name} -> {kill['code']}" for kill in kills)
    lines = [kill for kill in kills if kill["signal"] != signal.SIGKILL]
    unexpected = [
        {"signal": signal.Signals(kill["signal"]).name, **{name: kill[name] for name in ("delay", "code", "said")}}
        for kill in kills
        if kill["code"] not in {EXPECTED[kill["signal"]], 0}
        or "Traceback" in kill["said"]
        or "Exception ignored" in kill["said"]
    ]
    took = {
        signal.Signals(number).name: {
            "median": round(statistics.median(times), 2),
            "longest": round(max(times), 2),
        }
        for number in SIGNALS
        if (times := [kill["took"] for kill in lines if kill["signal"] == number])
    }
    return {"kills": len(kills), "codes": dict(codes), "seconds_to_end": took, "unexpected": unexpected}


def compare(one: Path, other: Path) -> list[str]:
    """Return what differs between the results of two grids; seconds and what follows from them aside."""
    names = [{path.parent.relative_to(out).as_posix() for path in out.rglob("manifest.json")} for out in (one, other)]
    differences = [f"{other.name}: {name} is not in both" for name in sorted(names[0] ^ names[1])]
    for name in sorted(names[0] & names[1]):
        first, second = (json.loads((out / name / "manifest.json").read_bytes()) for out in (one, other))
        if what_it_says(first) != what_it_says(second):
            differences.append(f"{other.name}: {name} differs")
    leftovers = [path.name for path in other.rglob(".*") if path.name.startswith(".")]
    return differences + [f"{other.name}: {name} was left" for name in leftovers]


def what_it_says(manifest: dict[str, Any]) -> Any:
    """Return the digests of all that an artifact says (weights, scores, rows, predictions), and its figures."""
    if manifest["schema"].startswith("p2d.report"):
        # Rows are in the order of their cost, and equal names end in the folder of the cheapest.
        said = [
            [row[key] for key in ("path", "metrics", "head_share", "row_share")] for row in manifest["summary"]["rows"]
        ]
        return sorted((Path(path).name, *more) for path, *more in said)
    outputs = {name: output["sha256"] for name, output in manifest["outputs"].items() if output["content"]}
    return outputs, manifest["key"], manifest["tokens"], manifest["summary"]


if __name__ == "__main__":
    main()
