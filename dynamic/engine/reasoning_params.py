"""How a model writes its reasoning, and how long it may be."""

from __future__ import annotations

from dataclasses import dataclass

from ...kernels.api.ranges import check_ranges


@dataclass(frozen=True, kw_only=True)
class ReasoningParams:
    """How a model writes its reasoning in front of an answer.

    Arguments:
        begin, end: texts around it.
        opened: the prompt has begun the block.
        budget: tokens after which the block is closed; None: never.
        close: what closes it then, ``end`` included; empty: ``end`` alone.
        after: stands between the block and an answer that must have a form.
        again: stands between one block and the next, where there may be several; None: one at most. An answer that must
            have a form then always follows a block.

    Raises:
        ValueError: naming the field that is wrong.
    """

    begin: str
    end: str
    opened: bool = False
    budget: int | None = None
    close: str = ""
    after: str = ""
    again: str | None = None

    def __post_init__(self) -> None:
        for name in ("begin", "end"):
            if not isinstance(text := getattr(self, name), str) or not text:
                raise ValueError(f"reasoning.{name} must be a text, not {text!r}")
        check_ranges(self, "budget", where="reasoning.", least=0)
        if self.close and not self.close.endswith(self.end):
            raise ValueError(f"reasoning.close={self.close!r} must end with {self.end!r}")
