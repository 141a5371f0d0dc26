"""Which methods there are: one a file under `methods/heads` and `methods/rows`, a class with the file's `name`.

Choices, help texts, grids, controls, plans and reports take them from here, and nothing else lists them. A name is
known from its file alone; the file is imported once its method is used. Torch-free.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from p2d_cli.errors import UsageError


class Registry:
    """The methods of one stage.

    Args:
        package: where their files are; `data_whisperer.py` is the method `data-whisperer`.
    """

    def __init__(self, package: str) -> None:
        self._package = package
        self._classes: dict[str, Any] = {}

    def names(self) -> tuple[str, ...]:
        """Return the name of every method, in alphabetical order."""
        return tuple(sorted({*self._files, *self._classes}))

    def describe(self) -> str:
        """Return the names with what each file says of its method in its first line."""
        lines = (path.read_text(encoding="utf-8").split("\n", 1)[0] for path in self._files.values())
        return "; ".join(line.strip('"').rstrip(".") for line in lines) + "."

    @cached_property
    def _files(self) -> dict[str, Path]:
        folder = Path(__file__).parent.joinpath(*self._package.split(".")[1:])
        return {path.stem.replace("_", "-"): path for path in sorted(folder.glob("[!_]*.py"))}

    def __getitem__(self, name: str) -> Any:
        """Return a method's class.

        Raises:
            KeyError: there is none of this name.
        """
        if name not in self._classes:
            if name not in self.names():
                raise KeyError(name)
            module = importlib.import_module(f"{self._package}.{name.replace('-', '_')}")
            classes = [
                each for each in vars(module).values() if isinstance(each, type) and vars(each).get("name") == name
            ]
            assert classes, f"{module.__name__} has no class whose `name` is {name}"
            self._classes[name] = classes[0]
        return self._classes[name]

    def require(self, name: str, what: str) -> Any:
        """Return the class of a method that an artifact names.

        Raises:
            UsageError: this p2d has no such method.
        """
        if name not in self.names():
            raise UsageError(f"{what} names the method {name!r}, which this p2d does not have", hint="score anew")
        return self[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    @contextmanager
    def added(self, method: Any) -> Iterator[None]:
        """Know one method more inside the block."""
        assert method.name not in self.names(), f"there is a method {method.name} already"
        self._classes[method.name] = method
        try:
            yield
        finally:
            del self._classes[method.name]


HEAD_METHODS = Registry("p2d_cli.methods.heads")
ROW_METHODS = Registry("p2d_cli.methods.rows")
