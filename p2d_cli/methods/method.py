"""What the methods of score-heads and of mine-data have in common."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterable
from typing import Any, ClassVar, Generic, Literal, TypeVar

from p2d_cli.engine.passes import Pass, Steps

Read = Literal["logits", "attention"]
"""What a method reads of a model: how likely it finds tokens; where its heads look, which takes few-shot episodes."""
TaskT = TypeVar("TaskT")


class Method(ABC, Generic[TaskT]):
    """One way of scoring. The class says what it is; an instance does one task.

    A dry run makes an instance too, and only counts its passes: they are made without what was read before, and only
    what a pass is given to do with its arrays may use that.
    """

    name: ClassVar[str]
    ranks: ClassVar[bool] = True
    """Whether its scores order all that is scored, so that another number can be chosen by them."""
    is_control: ClassVar[bool] = False
    """Whether it is what other methods have to beat; it reads no model."""

    def __init__(self, task: TaskT) -> None:
        self.task = task

    def passes(self) -> Iterable[Pass | Steps]:
        """Yield what the model is to do."""
        return ()

    @classmethod
    def describe(cls, summary: dict[str, Any]) -> list[str]:
        """Return lines about the figures that it left in an artifact's summary.

        There are none where the artifact was chosen anew by scores of an earlier one.
        """
        del summary
        return []
