"""A planted world: rows whose labels are drawn with probabilities that are known.

    logit of task t = bias_t + scale_t · z_t,    z_t = Σ_k m_tk · part_k + ½ · own_t

The parts are shared by the tasks, which mix them differently, as engagements do: a smooth function
of the continuous and binary features with products of pairs; two numbers whose effect depends on
the hidden group of the user and of the item; an affinity between those groups; the worth of the
tags in the bag. own_t is linear in the numbers. z_t is scaled to variance 1, so scale_t says how
strong the signal is, and the bias puts the rate of positives at `rate`.

Since the probabilities are known, so are the best possible AUC, log-loss and RCE on the rows of
validation: they are kept in planted.json. The true probability of a row is a column
`true_probability.<task>`, which is not a feature. The folder is otherwise one that prepare.py
writes: spec.yaml, train/*.parquet, validation/*.parquet.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from tml.config import Config, ConfigError
from tml.data.folders import FolderBusyError, new_folder

PLANTED = "planted.json"
VERSION = 1  # of the generator: folders of another version are made again
TRUE_PROBABILITY = "true_probability"
ROW_GROUP_ROWS = 1 << 16

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class PlantedTask(Config):
    """A label."""

    rate: float = Field(gt=0, lt=1)
    """Share of positive rows."""
    scale: PositiveFloat = 2.0
    """Standard deviation of the true logit."""


class PlantedConfig(Config):
    """A planted world; the defaults make 550,000 rows within some seconds."""

    num_rows: PositiveInt = 500_000
    """Rows to train on."""
    num_validation_rows: PositiveInt = 50_000
    """Rows to measure on."""
    num_users: PositiveInt = 300
    num_items: PositiveInt = 200
    num_groups: PositiveInt = 5
    """Hidden groups of users, and of items; a user's group has to be learned."""
    num_continuous: int = Field(default=10, ge=4)
    num_binary: int = Field(default=6, ge=2)
    num_tags: PositiveInt = 40
    """Values of the bag."""
    tasks: dict[str, PlantedTask] = Field(
        default={
            "click": PlantedTask(rate=0.3),
            "like": PlantedTask(rate=0.15),
            "reply": PlantedTask(rate=0.08),
        },
        min_length=1,
    )
    seed: NonNegativeInt = 1
    """Decides all that is drawn."""


def ensure(config: PlantedConfig, folder: Path) -> Path:
    """Generate the world of `config` in `folder`, unless it is there already; one of another config
    is replaced.

    Raises ConfigError if the folder holds anything else.
    """
    while not is_made(config, folder):
        if folder.exists() and any(folder.iterdir()) and not (folder / PLANTED).exists():
            raise ConfigError(
                f"planted: {folder} holds something else than planted rows; choose another folder "
                "in train_data.inputs, or unset planted to train on what is there"
            )
        try:
            generate(config, folder)
        except FolderBusyError:
            time.sleep(0.2)  # another process makes it
    return folder


def is_made(config: PlantedConfig, folder: Path) -> bool:
    """Whether `folder` holds the rows of this very config."""
    try:
        made = json.loads((folder / PLANTED).read_text())
    except (OSError, ValueError):
        return False
    return bool(
        made.get("version") == VERSION and made.get("config") == config.model_dump(mode="json")
    )


def generate(config: PlantedConfig, folder: Path) -> dict[str, Any]:
    """Draw the rows and write them to `folder`, whole or not at all; returns what planted.json
    holds.
    """
    rows = draw_rows(config)
    logits = true_logits(config, rows)
    random = np.random.default_rng([config.seed, 2])
    truth = {task: 1 / (1 + np.exp(-values)) for task, values in logits.items()}
    labels = {task: random.random(len(p)) < p for task, p in truth.items()}
    validation = slice(config.num_rows, None)
    made = {
        "version": VERSION,
        "config": config.model_dump(mode="json"),
        "best": {t: best_possible(truth[t][validation], labels[t][validation]) for t in truth},
    }
    table = to_table(rows, labels, truth)
    with new_folder(folder, PLANTED, overwrite=True) as partial:
        for name, part in (
            ("train", table.slice(0, config.num_rows)),
            ("validation", table.slice(config.num_rows)),
        ):
            (partial / name).mkdir()
            path = partial / name / "part-0.parquet"
            pq.write_table(part, path, row_group_size=ROW_GROUP_ROWS)
        (partial / "spec.yaml").write_text(yaml.safe_dump(to_spec(config), sort_keys=False))
        (partial / PLANTED).write_text(json.dumps(made, indent=2) + "\n")
    return made


# Drawing


@dataclass(frozen=True)
class Rows:
    """What the model sees, of n rows."""

    continuous: Floats  # (n, C), skewed as counts are, some NaN
    hidden: Floats  # (n, C) standard normal values behind them, 0 where they are NaN
    binary: Ints  # (n, D)
    users: Ints  # (n,) from 0
    items: Ints  # (n,) from 0
    tags: Ints  # (total,) from 0
    offsets: Ints  # (n + 1,)


def draw_rows(config: PlantedConfig) -> Rows:
    """Training rows, then those of validation."""
    random = np.random.default_rng([config.seed, 0])
    num_rows = config.num_rows + config.num_validation_rows
    hidden = random.normal(size=(num_rows, config.num_continuous))
    continuous = hidden.copy()
    continuous[:, ::2] = np.sign(hidden[:, ::2]) * np.expm1(np.abs(hidden[:, ::2]))
    absent = random.random(hidden.shape) < 0.02
    lengths = random.integers(0, 4, num_rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Rows(
        continuous=np.where(absent, np.nan, continuous),
        hidden=np.where(absent, 0.0, hidden),
        binary=(random.random((num_rows, config.num_binary)) < 0.3).astype(np.int64),
        # The square makes some users and items frequent, others rare.
        users=(random.random(num_rows) ** 2 * config.num_users).astype(np.int64),
        items=(random.random(num_rows) ** 2 * config.num_items).astype(np.int64),
        tags=random.integers(0, config.num_tags, offsets[-1]),
        offsets=offsets,
    )


def true_logits(config: PlantedConfig, rows: Rows) -> dict[str, Floats]:
    """Task → (n,) logit of each row."""
    random = np.random.default_rng([config.seed, 1])
    user_groups = random.integers(0, config.num_groups, config.num_users)[rows.users]
    item_groups = random.integers(0, config.num_groups, config.num_items)[rows.items]
    affinity = random.normal(size=(config.num_groups, config.num_groups))
    parts = (
        _unit(_of_numbers(rows, random)),
        0.4 * _unit(_of_groups_and_numbers(rows, user_groups, item_groups, random)),
        0.6 * _unit(affinity[user_groups, item_groups]),
        0.5 * _unit(_of_tags(rows, random.normal(size=config.num_tags))),
    )
    logits = {}
    for name, task in config.tasks.items():
        mixture = random.uniform(0.5, 1.5, len(parts))
        own = _unit(rows.hidden @ random.normal(size=rows.hidden.shape[1]))
        mixed = [weight * part for weight, part in zip(mixture, parts, strict=True)]
        logit = task.scale * _unit(np.sum([*mixed, 0.5 * own], axis=0))
        logits[name] = logit + _bias(logit, task.rate)
    return logits


def _of_numbers(rows: Rows, random: np.random.Generator) -> Floats:
    """A smooth function of all, products of pairs of some."""
    x, binary = rows.hidden, rows.binary
    linear = x @ random.normal(size=x.shape[1]) + binary @ random.normal(size=binary.shape[1])
    waves = np.tanh(x @ random.normal(size=(x.shape[1], 2))).sum(axis=1)
    pairs = x[:, 0] * x[:, 1] + x[:, 2] * binary[:, 0] - x[:, 3] * binary[:, 1]
    return np.asarray(linear + 0.7 * waves + 0.5 * pairs)


def _of_groups_and_numbers(
    rows: Rows, user_groups: Ints, item_groups: Ints, random: np.random.Generator
) -> Floats:
    """Two numbers whose effect depends on the group."""
    slopes = random.normal(size=(2, user_groups.max() + item_groups.max() + 2))
    of_user = slopes[0][user_groups] * rows.hidden[:, 0]
    return np.asarray(of_user + slopes[1][item_groups] * rows.hidden[:, 1])


def _of_tags(rows: Rows, worth: Floats) -> Floats:
    """Mean worth of the tags; 0 without any."""
    sums = np.concatenate([[0.0], np.cumsum(worth[rows.tags])])
    lengths = np.diff(rows.offsets)
    return np.asarray((sums[rows.offsets[1:]] - sums[rows.offsets[:-1]]) / np.maximum(lengths, 1))


def _unit(values: Floats) -> Floats:
    return np.asarray((values - values.mean()) / values.std())


def _bias(logit: Floats, rate: float) -> float:
    """The number to add so that the mean probability is `rate`, by bisection."""
    low, high = -50.0, 50.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        if (1 / (1 + np.exp(-(logit + middle)))).mean() < rate:
            low = middle
        else:
            high = middle
    return low


# Measuring and writing


def best_possible(probability: Floats, labels: NDArray[np.bool_]) -> dict[str, float]:
    """AUC, log-loss and RCE of the true probabilities on the labels that were drawn."""
    rate = labels.mean()
    reference = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    loss = -np.where(labels, np.log(probability), np.log1p(-probability)).mean()
    # The probabilities are continuous, so ties are next to none.
    ranks = np.empty(len(labels))
    ranks[np.argsort(probability)] = np.arange(1, len(labels) + 1)
    positives = int(labels.sum())
    above = ranks[labels].sum() - positives * (positives + 1) / 2
    return {
        "auc": float(above / (positives * (len(labels) - positives))),
        "log_loss": float(loss),
        "rce": float(100 * (reference - loss) / reference),
        "rate": float(rate),
    }


def to_table(
    rows: Rows, labels: dict[str, NDArray[np.bool_]], truth: dict[str, Floats]
) -> pa.Table:
    """Columns as to_spec names them, and the true probabilities. Row 0 of users, items and tags is
    the unknown value.
    """
    columns: dict[str, Any] = {
        f"number_{i}": rows.continuous[:, i].astype(np.float32)
        for i in range(rows.continuous.shape[1])
    }
    columns |= {f"flag_{i}": flags.astype(np.int8) for i, flags in enumerate(rows.binary.T)}
    columns |= {"user_id": rows.users + 1, "item_id": rows.items + 1}
    columns["tags"] = pa.ListArray.from_arrays(rows.offsets.astype(np.int32), rows.tags + 1)
    columns |= {f"label.{task}": values.astype(np.int8) for task, values in labels.items()}
    columns |= {f"{TRUE_PROBABILITY}.{task}": values for task, values in truth.items()}
    return pa.table(columns)


def to_spec(config: PlantedConfig) -> dict[str, Any]:
    """The feature spec (data/spec.py)."""
    return {
        "continuous": [f"number_{i}" for i in range(config.num_continuous)],
        "binary": [f"flag_{i}" for i in range(config.num_binary)],
        "categorical": {
            "user_id": {"num_values": config.num_users + 1},
            "item_id": {"num_values": config.num_items + 1},
        },
        "bags": {"tags": {"num_values": config.num_tags + 1}},
        "ids": ["user_id", "item_id"],
        "labels": {task: f"label.{task}" for task in config.tasks},
    }
