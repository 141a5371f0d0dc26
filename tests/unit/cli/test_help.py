"""The help of each command, and what the README says of flags."""

import re

import pytest

from p2d_cli.config import STAGE_CONFIGS, flag_name
from p2d_cli.errors import EXIT_CODES

COMMANDS = (*STAGE_CONFIGS, "run", "doctor", "inspect", "compare")
COMMON = (
    "--seed",
    "--device",
    "--dtype",
    "--max-length",
    "--json",
    "--dry-run",
    "--print-config",
    "--force",
    "--config",
)


@pytest.fixture
def shown(p2d, monkeypatch):
    """The help of a command, in lines long enough for every flag."""
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *words: " ".join(p2d(*words, "--help").out.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_a_help_and_is_listed(p2d, shown, command):
    assert p2d(command, "-h").code == 0
    assert command in shown()
    assert f"p2d {command}" in shown(command)


def test_the_help_names_every_exit_code(shown):
    for code, meaning in EXIT_CODES.items():
        assert f"{code} {meaning}" in shown()


@pytest.mark.parametrize("command", [*STAGE_CONFIGS, "run"])
def test_what_every_command_that_makes_something_takes(shown, command):
    text = shown(command)
    for flag in COMMON:
        assert flag in text, f"p2d {command} has no {flag}"


def test_every_flag_in_the_readme_exists(tiny_folder):
    text = (tiny_folder.parent.parent / "README.md").read_text(encoding="utf-8")
    others = re.compile(r"pip install|#SBATCH|srun|torchrun|pytest|benchmarks/|vLLM")
    prose = "\n".join(line for line in text.split("\n") if not others.search(line))
    known = {flag_name(name) for config in STAGE_CONFIGS.values() for name in config.model_fields}
    known |= {*COMMON, "--time", "--rows", "--confidence", "--quiet", "--verbose", "--version"}
    unknown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z](?![\w/-])", prose)) - known
    assert not unknown
