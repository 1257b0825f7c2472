"""The config that run.py's flags name: --config_yaml_path, laid over the graph of --graph."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from projects.twhin.config import TwhinConfig
from tml.config import ConfigError, load_config
from tml.machines import container

CONFIGS = Path(__file__).parent / "config"
GRAPH = "graph.yaml"
BROUGHT_BY_GRAPH = frozenset(
    ["model", "model.embeddings", "model.embeddings.tables", "model.relations", "train_data"]
    + ["train_data.data_root"]
)
"""Keys that a graph sets and a config may leave to it."""


def load_given(path: Path, graph: Path | None, overrides: Sequence[str]) -> TwhinConfig:
    """The config, laid over the graph's; raises ConfigError, which names the flag to mend."""
    if not path.exists():
        known = ", ".join(sorted(file.name for file in CONFIGS.glob("*.yaml")))
        raise ConfigError(
            f"--config_yaml_path: there is no {path}{container.outside(path)}; projects/twhin/"
            f"config has {known}"
        )
    if graph is not None and not graph.exists():
        raise ConfigError(
            f"--graph: there is no {graph}{container.outside(graph)}; prepare writes one "
            "(projects/twhin/prepare.py --output)"
        )
    if graph is not None and graph.is_dir():
        graph = graph / GRAPH
        if not graph.is_file():
            raise ConfigError(
                f"--graph: {graph.parent} has no {GRAPH}: it is no folder that prepare wrote"
            )
    try:
        return load_config(TwhinConfig, path, overrides, graph)
    except ConfigError as error:
        if graph is None and _lacks_graph(error):
            raise ConfigError(f"{error}; give the prepared graph with --graph") from error
        raise


def _lacks_graph(error: ConfigError) -> bool:
    """Whether what is missing is what a graph brings."""
    faults = error.__cause__.errors() if isinstance(error.__cause__, ValidationError) else []
    missing = {".".join(map(str, fault["loc"])) for fault in faults if fault["type"] == "missing"}
    return bool(missing & BROUGHT_BY_GRAPH)
