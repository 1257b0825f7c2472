"""The best step of a run: the number steps are compared by, best.json, and the rules of its
configuration.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from projects.twhin.best import (
    Goal,
    best_step,
    choose_step,
    describe,
    find_best,
    forget_marks,
    read_best,
    step_argument,
    write_best,
)
from projects.twhin.config import TwhinConfig
from projects.twhin.evaluation_config import DuringTrainingConfig, EvaluationConfig
from tml import checkpoint
from tml.checkpoint import CheckpointError

REPORT = {
    "link_prediction": {
        "mean": {"mrr": 0.3, "hits@1": 0.2},
        "relations": {"fav": {"mean": {"mrr": 0.5, "hits@1": 0.4}}},
    },
    "retrieval": {"mean": {"recall@20": 0.1}, "relations": {"fav": {"recall@20": 0.6}}},
}


@pytest.mark.parametrize(
    ("metric", "relation", "value"),
    [
        ("mrr", None, 0.3),
        ("hits@1", "fav", 0.4),
        ("recall@20", None, 0.1),
        ("recall@20", "fav", 0.6),
        ("mrr", "reply", None),
        ("recall@50", None, None),
    ],
)
def test_a_goal_finds_its_number_in_a_report(
    metric: str, relation: str | None, value: float | None
) -> None:
    assert Goal(metric, relation).value(REPORT) == value


def test_a_best_json_that_is_not_whole_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    complete(tmp_path, 1)
    write_best(tmp_path, describe(1, "validation", Goal(), 0.5))
    path = tmp_path / "evaluation" / "best.json"
    path.write_text(path.read_text()[:10])
    with pytest.raises(CheckpointError, match=r"best\.json is not whole.*remove it"):
        choose_step(tmp_path, None)


def mark(run: Path, step: int, mrr: float, recall: float, **more: str) -> None:
    folder = run / "evaluation" / "validation"
    folder.mkdir(parents=True, exist_ok=True)
    report = {
        **more,
        "link_prediction": {"mean": {"mrr": mrr}},
        "retrieval": {"mean": {}, "relations": {"fav": {"recall@20": recall}}},
    }
    (folder / f"{step}.json").write_text(json.dumps(report))


def test_the_best_step_is_the_first_of_the_largest_numbers_of_its_goal(tmp_path: Path) -> None:
    for step, mrr, recall in ((9, 0.1, 0.9), (10, 0.3, 0.1), (100, 0.3, 0.2)):
        mark(tmp_path, step, mrr, recall)
        complete(tmp_path, step)
    mark(tmp_path, 50, 0.9, 0.95)  # whose folder is gone
    mark(tmp_path, 60, 0.9, 0.95, measured_with="other edges")
    complete(tmp_path, 60)
    best = find_best(tmp_path, "validation", Goal())
    assert best == {"step": 10, "split": "validation", "metric": "mrr", "mrr": 0.3}
    best = find_best(tmp_path, "validation", Goal("recall@20", "fav"))
    assert best is not None
    assert (best["step"], best["relation"], best["recall@20"]) == (9, "fav", 0.9)
    assert find_best(tmp_path, "test", Goal()) is None
    best = find_best(tmp_path, "validation", Goal(), "other edges")
    assert best is not None
    assert (best["step"], best["measured_with"]) == (60, "other edges")


def test_a_best_step_that_is_trained_anew_gives_way_to_the_best_before_it(tmp_path: Path) -> None:
    for step, recall in ((5, 0.2), (10, 0.1), (15, 0.3)):
        mark(tmp_path, step, 0.0, recall)
        complete(tmp_path, step)
    best = find_best(tmp_path, "validation", Goal("recall@20", "fav"))
    assert best is not None
    write_best(tmp_path, best)
    assert best_step(tmp_path) == 15
    forget_marks(tmp_path, 10)
    assert best_step(tmp_path) == 5
    forget_marks(tmp_path, 4)
    assert read_best(tmp_path) is None
    with pytest.raises(CheckpointError, match=r"names no best step .* set evaluation"):
        best_step(tmp_path)


def complete(run: Path, step: int) -> None:
    (run / str(step)).mkdir(parents=True)
    (run / str(step) / checkpoint.COMPLETE).touch()


def test_programs_take_the_best_by_validation_and_say_so(tmp_path: Path) -> None:
    for step in (60, 85, 102):
        complete(tmp_path, step)
    (tmp_path / "110").mkdir()  # not complete
    assert choose_step(tmp_path, None) == (102, None)
    write_best(tmp_path, describe(102, "validation", Goal(), 0.5))
    assert choose_step(tmp_path, None) == (102, None)
    write_best(tmp_path, describe(85, "validation", Goal(), 0.5))
    line = "step 85, the best by validation (--step=102 is the newest)"
    assert choose_step(tmp_path, None) == (85, line)
    for text, step in (("best", 85), ("newest", 102), ("last", 102), ("60", 60)):
        assert choose_step(tmp_path, step_argument(text)) == (step, None)
    (tmp_path / "85" / checkpoint.COMPLETE).unlink()
    line = "step 102, the newest (the best by validation, 85, is gone)"
    assert choose_step(tmp_path, None) == (102, line)
    # By the edges that are reported on, no step is chosen unasked.
    write_best(tmp_path, describe(60, "test", Goal(), 0.5))
    line = "step 102, the newest (--step=60 is the best by test)"
    assert choose_step(tmp_path, None) == (102, line)
    assert choose_step(tmp_path, "best") == (60, None)


def test_a_step_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"--run: there is no folder .*nope"):
        choose_step(tmp_path / "nope", None)
    with pytest.raises(CheckpointError, match="has no step 17; none is complete"):
        choose_step(tmp_path, 17)
    for step in range(1, 15):
        complete(tmp_path, step)
    with pytest.raises(
        CheckpointError, match=r"no step 17; complete are 2 earlier ones, 3, .*, 14"
    ):
        choose_step(tmp_path, 17)
    for text in ("beste", "-3"):
        with pytest.raises(argparse.ArgumentTypeError, match="give a number, best or newest"):
            step_argument(text)


def evaluation(during: dict[str, Any], **more: Any) -> EvaluationConfig:
    return EvaluationConfig.model_validate({"during_training": during, **more})


@pytest.mark.parametrize(
    ("during", "more", "message"),
    [
        ({"metric": "hits@2"}, {}, "'hits@2' is none of mrr"),
        ({"metric": "mrr"}, {"link_prediction": False}, "mrr needs link_prediction"),
        ({"metric": "recall@20"}, {}, "recall@20 needs retrieval with 20 among its k"),
        ({"metric": "recall@20"}, {"retrieval": {"k": [10]}}, "with 20 among its k"),
        ({"every_n": 5, "every_n_epochs": 1}, {}, "at most one of every_n_epochs, every_n"),
        ({"relation": "a"}, {"relations": ["b"]}, "'a' is not among evaluation.relations, b"),
        ({}, {"sampled_candidates": 9, "retrieval": {}}, "says little about that among all"),
    ],
)
def test_what_cannot_be_gone_by_is_refused(
    during: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluation(during, **more)


def test_training_measures_the_kind_of_its_metric_alone() -> None:
    both = {"retrieval": {"k": [20]}, "max_edges": 100}
    found = evaluation({"metric": "ndcg@20", "max_edges": 7}, **both).for_training()
    assert (found.link_prediction, found.retrieval is None, found.max_edges) == (False, False, 7)
    found = evaluation({"metric": "hits@3"}, **both).for_training()
    assert (found.link_prediction, found.retrieval, found.max_edges) == (True, None, 100)


def test_an_interval_is_counted_in_edges() -> None:
    assert DuringTrainingConfig().interval(1000) == 1000
    assert DuringTrainingConfig(every_n_epochs=0.25).interval(1000) == 250
    assert DuringTrainingConfig(every_n_epochs=0.0001).interval(1000) == 1
    assert DuringTrainingConfig(every_n=3).interval(1000) is None


@pytest.mark.parametrize(
    ("during", "validation", "message"),
    [
        ({}, None, "validation_data, which is unset"),
        ({"relation": "x"}, {"data_root": "v"}, "unknown relation 'x'; there are fav"),
    ],
)
def test_rules_between_sections(
    during: dict[str, Any], validation: dict[str, Any] | None, message: str
) -> None:
    tree = {
        "model": {
            "embeddings": {"tables": [{"name": "u", "num_embeddings": 5, "embedding_dim": 4}]},
            "relations": [{"name": "fav", "lhs": "u", "rhs": "u"}],
        },
        "train_data": {"data_root": "t", "global_negatives": 1},
        "validation_data": validation,
        "evaluation": {"during_training": during},
    }
    with pytest.raises(ValueError, match=message):
        TwhinConfig.model_validate(tree)
