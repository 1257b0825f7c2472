"""Best step and patience, by hand."""

from tml.early_stopping import Best


def taken(values: list[float], min_delta: float = 0.0) -> tuple[Best, list[int]]:
    """The state after measurements at steps 10, 20, …; `waited` after each."""
    best, waited = Best(), []
    for number, value in enumerate(values, start=1):
        best.note(10 * number, value, min_delta)
        waited.append(best.waited)
    return best, waited


def test_the_first_of_the_best_measurements_is_the_best_step() -> None:
    best, waited = taken([0.1, 0.3, 0.2, 0.3, 0.25])
    assert (best.step, best.value) == (20, 0.3)
    assert waited == [0, 0, 1, 2, 3]


def test_training_is_given_up_after_patience_measurements_without_improvement() -> None:
    best = Best()
    given_up = []
    for number, value in enumerate([0.1, 0.2, 0.2, 0.1, 0.3, 0.1, 0.1, 0.1]):
        best.note(number, value)
        given_up.append((best.is_given_up(2), best.is_given_up(3), best.is_given_up(None)))
    assert [two for two, _, _ in given_up] == [False, False, False, True, False, False, True, True]
    assert [three for _, three, _ in given_up].index(True) == 7
    assert not any(never for _, _, never in given_up)


def test_creeping_is_no_improvement_but_moves_the_best_step() -> None:
    # Each is above the one before by .004, less than min_delta; the fourth is above the first by
    # more than it, and counts.
    best, waited = taken([0.1, 0.104, 0.108, 0.112, 0.116], min_delta=0.01)
    assert waited == [0, 1, 2, 0, 1]
    assert best.reference == 0.112
    assert (best.step, best.value) == (50, 0.116)


def test_an_improvement_of_exactly_min_delta_is_none() -> None:
    _, waited = taken([0.25, 0.5], min_delta=0.25)
    assert waited == [0, 1]


def test_it_is_the_same_after_saving_and_loading() -> None:
    best, _ = taken([0.2, 0.1])
    loaded = Best.from_json(best.to_json())
    assert loaded == best
    assert loaded.note(30, 0.15) is False
    assert loaded.is_given_up(2)
