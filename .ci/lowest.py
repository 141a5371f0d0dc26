"""Prints, as constraints for pip, the lowest versions that pyproject.toml allows of everything but torch.

Older wheels of torch bring gigabytes of CUDA libraries, so that its own floor is not checked.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
for requirement in [*project["dependencies"], *project["optional-dependencies"]["plot"]]:
    name, _, floor = requirement.partition(">=")
    if name != "torch":
        print(f"{name}=={floor}")
