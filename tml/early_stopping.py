"""The best measurement of a run so far, and for how long none has been better: what decides which
checkpoint is kept and when further training is given up.
"""

from dataclasses import dataclass
from typing import Any, Self


@dataclass
class Best:
    """Measurements in the order of their steps, larger being better."""

    goal: str | None = None
    """What is measured, in words: measurements of another goal are not comparable."""
    step: int | None = None
    """The step of the best measurement, the first of equals."""
    value: float | None = None
    """The best measurement."""
    reference: float | None = None
    """The measurement that counted last as an improvement."""
    waited: int = 0
    """Measurements since then."""

    def note(self, step: int, value: float, min_delta: float = 0.0) -> bool:
        """Take the measurement of a step; whether it is the best so far.

        An improvement, which the waiting begins anew with, is one by more than min_delta over the
        last improvement: what creeps up by less is given up, though the best step moves with it.
        """
        if self.reference is None or value > self.reference + min_delta:
            self.reference, self.waited = value, 0
        else:
            self.waited += 1
        is_best = self.value is None or value > self.value
        if is_best:
            self.step, self.value = step, value
        return is_best

    def is_given_up(self, patience: int | None) -> bool:
        """Whether `patience` measurements have brought no improvement; never where None."""
        return patience is not None and self.waited >= patience

    def to_json(self) -> dict[str, Any]:
        """A JSON object for meta.json."""
        return dict(vars(self))

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        return cls(**tree)
