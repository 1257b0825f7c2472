"""What a config says about a warm start: `WarmStartConfig`."""

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat
from pydantic import model_validator as validator

from tml.config import Config


class WarmStartConfig(Config):
    """An earlier run whose vectors a new run starts from, though its vocabulary may differ: rows
    are matched by entity through the vocabularies of both, relations by name and operator.
    """

    previous: str
    """Run folder (its best step by validation, or its newest), step folder, or folder of exported
    vectors. It is read at the start of a run alone; one that is taken up again needs it no more.
    """
    tables: list[str] | None = Field(default=None, min_length=1)
    """Tables that start so. Unset: all that both have."""
    new_rows: Literal["random", "neighbors"] = "random"
    """How rows of new entities start. random: as in a cold start; neighbors: in the direction in
    which their training edges with known entities ask for them, as long as the known rows are on
    average; random for those without such an edge.
    """
    pull: NonNegativeFloat = 0.0
    """λ of λ ‖θ − θ_previous‖², added to each edge's loss for those of its two entities that have a
    previous vector; with reciprocal relations once for each direction.
    """
    freeze: bool = False
    """Keep the rows of matched entities as they are, and their biases, so that only new rows and
    relations learn.
    """
    optimizer_state: bool | None = None
    """Carry over the accumulators of Adagrad, of matched rows and relations: they take up training
    at the step size at which they left it, and move far less. Unset: where there are some.
    """

    @validator(mode="after")
    def _check(self) -> Self:
        if self.freeze and self.pull:
            raise ValueError(
                "freeze: rows that stay as they are need no pull; leave one of them out"
            )
        return self
