"""Planted graphs: users and tweets in communities, with edge probabilities that are known.

    odds of an edge (u, r, t) = c_r · a_u · w_t · M[k_u, k_t] · G[r, s_t],    probability = odds /
    (1 + odds)

a_u and w_t, log-normal, are a user's activity and a tweet's popularity. M, the same for all
relations, is high for a user's own community and its neighbour. s_t is a tweet's style, and each
relation prefers two styles (G): what a translation on the left side can express, and neither an
identity nor a translation on the right side can. Edges are drawn independently and split at random.
It is a degree-corrected block model (arXiv 1008.3926) in odds, because min(1, ·) would tie the
likeliest edges.

Since the probabilities are known, so is the best possible ranking: given all other edges, the
likeliest place of a left-out edge goes by its odds. Its MRR under the very evaluation that models
get, and that of ranking by training degree alone, are kept in planted.json. The folder is otherwise
one that prepare.py writes.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from tml.config import Config, ConfigError
from tml.data.folders import FolderBusyError, new_folder

if TYPE_CHECKING:
    from torch import Tensor

    from projects.twhin.edges import Edges, Side
    from projects.twhin.prepare import Graph

PLANTED = "planted.json"
VERSION = 1  # of the generator: folders of another version are made again
USER, TWEET = "user", "tweet"

Floats = NDArray[np.float64]


class PlantedConfig(Config):
    """A planted graph; the defaults make about 450,000 edges within 3 s."""

    num_users: PositiveInt = 3000
    """Users: left-hand entities of all relations."""
    num_tweets: PositiveInt = 2000
    """Tweets: right-hand entities of all relations."""
    num_communities: PositiveInt = 20
    """Communities that users and tweets are put into at random, all alike."""
    num_styles: PositiveInt = 4
    """Styles that tweets are given at random; relation r prefers styles r and r + 1, counted
    round.
    """
    edges_per_user: dict[str, PositiveFloat] = Field(
        default={"fav": 60.0, "reply": 30.0, "retweet": 30.0, "magic_recs": 30.0}, min_length=1
    )
    """Relation → expected number of its edges for each user, on average over the users."""
    activity_spread: float = Field(default=1.2, ge=0)
    """Standard deviation of log a_u."""
    popularity_spread: float = Field(default=1.2, ge=0)
    """Standard deviation of log w_t."""
    own_affinity: PositiveFloat = 200.0
    """M of a user's own community; 1 for communities that are neither its own nor its neighbour."""
    neighbour_affinity: PositiveFloat = 5.0
    """M of the community after a user's own, counted round."""
    style_preference: PositiveFloat = 2.5
    """G of a relation's second style; of its first style it is the square, of all others 1."""
    valid_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of the edges in valid."""
    test_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Share of the edges in test."""
    seed: NonNegativeInt = 1
    """Decides all that is drawn."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.valid_fraction + self.test_fraction >= 1:
            raise ValueError(
                "valid_fraction and test_fraction leave nothing to train on; they must add up to "
                f"less than 1, not {self.valid_fraction + self.test_fraction}"
            )
        for name, number in self.edges_per_user.items():
            if number > self.num_tweets / 2:
                raise ValueError(
                    f"edges_per_user.{name}: {number} edges a user are more than half of the "
                    f"{self.num_tweets} tweets"
                )
        return self


def ensure(config: PlantedConfig, folder: Path) -> Path:
    """Generate the graph of `config` in `folder`, unless it is there already; a graph of another
    config is replaced.

    Raises ConfigError if the folder holds anything else.
    """
    while not is_made(config, folder):
        if folder.exists() and any(folder.iterdir()) and not (folder / PLANTED).exists():
            raise ConfigError(
                f"planted: {folder} holds something else than a planted graph; choose another "
                "folder in train_data.data_root, or unset planted to train on what is there"
            )
        try:
            generate(config, folder)
        except FolderBusyError:
            time.sleep(0.2)  # another process makes it
    return folder


def folder_of(data_root: str) -> Path:
    """The folder of the generated graph: data_root is <folder>/train/*.parquet."""
    return Path(data_root).parent.parent


def is_made(config: PlantedConfig, folder: Path) -> bool:
    """Whether `folder` holds the graph of this very config."""
    try:
        made = json.loads((folder / PLANTED).read_text())
    except (OSError, ValueError):
        return False
    return bool(
        made.get("version") == VERSION and made.get("spec") == config.model_dump(mode="json")
    )


def generate(config: PlantedConfig, folder: Path) -> dict[str, Any]:
    """Draw the graph and write it to `folder`, whole or not at all; returns what planted.json
    holds.
    """
    from projects.twhin import prepare

    truth = draw_truth(config)
    graph = draw_graph(config, truth)
    with new_folder(folder, prepare.COUNTS, overwrite=True) as partial:
        prepare.write_graph(partial, graph, config.seed)
        made = {
            "version": VERSION,
            "spec": config.model_dump(mode="json"),
            **measure(graph, truth),
        }
        (partial / PLANTED).write_text(json.dumps(made, indent=2) + "\n")
    return made


# Drawing


@dataclasses.dataclass(frozen=True)
class Truth:
    """The odds of all edges: scales[r] · affinity[u, t] · styles[r, t]."""

    scales: Floats  # (R,) c_r
    affinity: Floats  # (U, T) a_u · w_t · M[k_u, k_t]
    styles: Floats  # (R, T) G[r, s_t]

    def probabilities(self, relation: int) -> Floats:
        """Probability of each edge of one relation: (U, T)."""
        odds = self.affinity * (self.scales[relation] * self.styles[relation])
        result: Floats = odds / (1 + odds)
        return result


def draw_truth(config: PlantedConfig) -> Truth:
    """All that decides the probabilities."""
    random = np.random.default_rng([config.seed, 0])
    activity = np.exp(random.normal(0, config.activity_spread, config.num_users))
    popularity = np.exp(random.normal(0, config.popularity_spread, config.num_tweets))
    user_community = random.integers(0, config.num_communities, config.num_users)
    tweet_community = random.integers(0, config.num_communities, config.num_tweets)
    tweet_style = random.integers(0, config.num_styles, config.num_tweets)

    between = np.ones((config.num_communities, config.num_communities))
    own = np.arange(config.num_communities)
    between[own, (own + 1) % config.num_communities] = config.neighbour_affinity
    between[own, own] = config.own_affinity
    affinity = activity[:, None] * popularity * between[user_community][:, tweet_community]

    num_relations = len(config.edges_per_user)
    preference = np.ones((num_relations, config.num_styles))
    relations = np.arange(num_relations)
    preference[relations, (relations + 1) % config.num_styles] = config.style_preference
    preference[relations, relations % config.num_styles] = config.style_preference**2
    styles = preference[:, tweet_style]

    # Every tenth user by activity stands for all when the scales are sought.
    some = affinity[np.argsort(activity, kind="stable")[5::10]] if len(activity) > 100 else affinity
    scales = [
        _find_scale(some * style, number)
        for style, number in zip(styles, config.edges_per_user.values(), strict=True)
    ]
    return Truth(np.array(scales), affinity, styles)


def _find_scale(odds: Floats, edges_per_user: float) -> float:
    """c such that the probabilities of odds c · `odds` (users, T) add up to `edges_per_user` on
    average.
    """
    scale = edges_per_user * len(odds) / odds.sum()
    for _ in range(50):
        scaled = scale * odds
        missing = edges_per_user / (scaled / (1 + scaled)).sum(axis=1).mean()
        scale *= missing
        if abs(missing - 1) < 1e-3:
            break
    return float(scale)


def draw_graph(config: PlantedConfig, truth: Truth) -> "Graph":
    """Independent edges with the probabilities of `truth`, split at random, ids by training
    frequency.
    """
    import polars as pl

    from projects.twhin.prepare import Graph, Relation, order_by_frequency, split_at_random

    random = np.random.default_rng([config.seed, 1])
    parts = []
    for number in range(len(config.edges_per_user)):
        probabilities = truth.probabilities(number)
        lhs, rhs = (random.random(probabilities.shape) < probabilities).nonzero()
        parts.append({"lhs": lhs, "rel": np.full(len(lhs), number), "rhs": rhs})
    edges = {name: np.concatenate([part[name] for part in parts]) for name in ("lhs", "rel", "rhs")}
    held_out = config.valid_fraction + config.test_fraction
    fractions = (1 - held_out, config.valid_fraction, config.test_fraction)
    graph = Graph(
        relations=[Relation(name, USER, TWEET) for name in config.edges_per_user],
        vocabularies={
            USER: pl.Series("entity", [f"{USER}_{i}" for i in range(config.num_users)]),
            TWEET: pl.Series("entity", [f"{TWEET}_{i}" for i in range(config.num_tweets)]),
        },
        splits=split_at_random(edges, fractions, config.seed),
    )
    order_by_frequency(graph)
    return graph


# Measuring


def measure(graph: "Graph", truth: Truth) -> dict[str, Any]:
    """Link prediction on test by the truth ("optimum") and by training degree alone ("popularity"),
    as reports.
    """
    from projects.twhin.edges import Edges, join
    from projects.twhin.link_prediction import link_prediction, link_prediction_report

    splits = {
        name: Edges(columns["lhs"], columns["rel"], columns["rhs"])
        for name, columns in graph.splits.items()
    }
    known = join(list(splits.values()))
    reports = {}
    for name, scorer in (
        ("optimum", _TruthScorer(graph, truth)),
        ("popularity", _DegreeScorer(graph, splits["train"])),
    ):
        sums = link_prediction(scorer, graph.relations, splits["test"], known)
        reports[name] = link_prediction_report(graph.relations, sums)
    return reports


class _TruthScorer:
    """Scores are the log-odds. Ties are next to none: log a_u and log w_t are continuous."""

    def __init__(self, graph: "Graph", truth: Truth) -> None:
        import torch

        # Ids follow training frequency; the truth is in the order of drawing, which the names tell.
        users, tweets = (
            graph.vocabularies[kind].str.strip_prefix(f"{kind}_").cast(int).to_numpy()
            for kind in (USER, TWEET)
        )
        self._affinity = torch.from_numpy(np.log(truth.affinity[users][:, tweets]))
        self._styles = torch.from_numpy(np.log(truth.styles[:, tweets]))

    def score(self, relation: int, side: "Side", entities: "Tensor") -> "Tensor":
        if side == "rhs":
            return self._affinity[entities] + self._styles[relation]
        return self._affinity.T[entities]  # the style is the same for all heads


class _DegreeScorer:
    """Scores are the numbers of training edges of the relation, whoever asks."""

    def __init__(self, graph: "Graph", train: "Edges") -> None:
        import torch

        shape = {"lhs": len(graph.vocabularies[USER]), "rhs": len(graph.vocabularies[TWEET])}
        self._degrees = {
            (number, side): torch.from_numpy(
                np.bincount(getattr(train, side)[train.rel == number], minlength=size)
            ).double()
            for number in range(len(graph.relations))
            for side, size in shape.items()
        }

    def score(self, relation: int, side: "Side", entities: "Tensor") -> "Tensor":
        return self._degrees[relation, side.value].repeat(len(entities), 1)
