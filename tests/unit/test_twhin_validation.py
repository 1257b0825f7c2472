"""The line of a validation during training."""

import pytest

from projects.twhin.best import Goal
from projects.twhin.validation import _line
from tml.layout import fold

RECORD = {
    "step": 120_000,
    "best_step": 119_000,
    "seconds": 71.12,
    "recall@20": 0.18371,
    "ndcg@20": 0.15049,
    "recall@20 of long_view": 0.1,
}
LINKS = {**RECORD, "mrr": 0.36512, "hits@1": 0.27, "hits@10": 0.55408}


@pytest.mark.parametrize(
    ("record", "goal", "is_best", "expected"),
    [
        (
            LINKS,
            Goal("mrr"),
            True,
            "validation at step 120,000: mrr .3651  hits@10 .5541  71 s  best so far",
        ),
        (
            {**LINKS, "step": 7, "best_step": 3, "seconds": 0.26},
            Goal("hits@1"),
            False,
            "validation at step 7: hits@1 .2700  mrr .3651  hits@10 .5541  0.3 s  best at 3",
        ),
        (
            {**RECORD, "step": 12_000, "best_step": 11_000},
            Goal("recall@20"),
            False,
            "validation at step 12,000: recall@20 .1837  ndcg@20 .1505  71 s  best at 11,000",
        ),
    ],
)
def test_it_fits_into_80_columns(
    record: dict[str, float], goal: Goal, is_best: bool, expected: str
) -> None:
    line = _line(record, goal, is_best=is_best)
    assert line == expected
    assert len(line) <= 80


def test_one_of_a_relation_is_broken_between_its_numbers() -> None:
    line = _line(RECORD, Goal("recall@20", "long_view"), is_best=False)
    assert fold(line).splitlines() == [
        "validation at step 120,000: recall@20 of long_view .1000  recall@20 .1837",
        "  ndcg@20 .1505  71 s  best at 119,000",
    ]
