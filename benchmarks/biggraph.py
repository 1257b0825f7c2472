"""PyTorch-BigGraph 1.0.0 as a reference: an environment of its own, graphs in its format, training,
and the vectors that it learns.

It is installed from the package index beside torch, in a virtual environment below a work folder,
with setuptools before version 80, which its build needs. Nothing of it is imported here.
"""

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

INSTALL = (
    ("setuptools<80", "wheel", "numpy", "torch==2.13.0"),
    ("torchbiggraph==1.0.0", "--no-build-isolation"),
)
SETTINGS: dict[str, Any] = {
    "dimension": 128,
    "global_emb": False,
    "comparator": "dot",
    "loss_fn": "softmax",
    "lr": 0.1,
    "batch_size": 10_000,
    "num_batch_negs": 0,
    "num_uniform_negs": 100,
    "workers": 2,
    "eval_fraction": 0.0,
    "verbose": 1,
}
"""Those of the speed comparison; keys are PBG's."""
FB15K: dict[str, Any] = {
    "dimension": 400,
    "global_emb": False,
    "comparator": "dot",
    "num_epochs": 50,
    "num_uniform_negs": 1000,
    "loss_fn": "softmax",
    "lr": 0.1,
    "eval_fraction": 0.0,
    "workers": 2,
    "verbose": 1,
}
"""What PBG publishes for FB15k: ComplEx with a parameter a relation and direction; all that is not
named is its default.
"""
PROCESSED = re.compile(r"Processed (\d+) edges in ([\d.]+) s")
WRITE_GRAPH = """
import sys, h5py, numpy as np
edges, target = np.load(sys.argv[1]), sys.argv[2]
with h5py.File(target, "w") as file:
    file.attrs["format_version"] = 1
    for name in ("lhs", "rel", "rhs"):
        file[name] = edges[name]
"""
READ_VECTORS = """
import sys, h5py, numpy as np
found = {}
with h5py.File(sys.argv[1]) as file:
    found["embeddings"] = file["embeddings"][:]
with h5py.File(sys.argv[2]) as file:
    file["model"].visititems(
        lambda name, one: found.__setitem__(name.replace("/", "."), one[:])
        if hasattr(one, "shape") else None)
np.savez(sys.argv[3], **found)
"""


@dataclass(frozen=True)
class Epoch:
    """One pass over the edges, by PBG's own log: its workers at work, no loading, no saving."""

    edges: int
    seconds: float
    processor_s: float
    """Of all its processes, seen from outside."""


def environment(work: Path) -> Path:
    """The interpreter of PBG's environment, which is made where it is missing."""
    folder = work / "biggraph-1.0.0"
    python = folder / "bin/python"
    if not (folder / "COMPLETE").exists():
        subprocess.run(
            [sys.executable, "-m", "venv", "--clear", str(folder)], check=True, stdout=sys.stderr
        )
        for packages in INSTALL:
            command = [str(python), "-m", "pip", "install", "--quiet", *packages]
            subprocess.run(command, check=True, stdout=sys.stderr)
        (folder / "COMPLETE").touch()
    return python


def write_graph(python: Path, folder: Path, edges: Mapping[str, Any], num_nodes: int) -> None:
    """Edges lhs, rel, rhs (n,) of one type of nodes, as PBG reads them."""
    (folder / "edges").mkdir(parents=True)
    (folder / "entity_count_node_0.txt").write_text(f"{num_nodes}\n")
    np.savez(folder / "edges.npz", **edges)
    target = folder / "edges/edges_0_0.h5"
    command = [str(python), "-c", WRITE_GRAPH, str(folder / "edges.npz"), str(target)]
    subprocess.run(command, check=True)


def train(
    python: Path, folder: Path, settings: Mapping[str, Any], relations: Sequence[Mapping[str, str]]
) -> list[Epoch]:
    """Train on the graph in a folder from the start; vectors are in its folder `model`."""
    config = {
        "entity_path": str(folder),
        "edge_paths": [str(folder / "edges")],
        "checkpoint_path": str(folder / "model"),
        "entities": {"node": {"num_partitions": 1}},
        "relations": [{"lhs": "node", "rhs": "node", **relation} for relation in relations],
        **settings,
    }
    path = folder / "config.py"
    text = json.dumps(json.dumps(config))
    path.write_text(
        f"import json\n\n\ndef get_torchbiggraph_config():\n    return json.loads({text})\n"
    )
    for old in (folder / "model").glob("*"):
        old.unlink()
    command = [str(python.parent / "torchbiggraph_train"), str(path)]
    epochs, log, before = [], [], 0.0
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            log.append(line)
            if "Waiting for workers" in line:
                before = _processor_seconds(process.pid)
            if (found := PROCESSED.search(line)) is not None:
                used = _processor_seconds(process.pid) - before
                epochs.append(Epoch(int(found[1]), float(found[2]), used))
    if process.returncode or not epochs:
        raise RuntimeError("PyTorch-BigGraph failed:\n" + "".join(log[-30:]))
    return epochs


def _processor_seconds(pid: int) -> float:
    """Of a process and all below it."""
    parent = psutil.Process(pid)
    times = [one.cpu_times() for one in (parent, *parent.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def read_vectors(python: Path, folder: Path, version: int) -> dict[str, NDArray[np.float32]]:
    """What PBG had learned after so many epochs: "embeddings" (nodes, D), and the parameters of its
    operators by their names in its file.
    """
    target = folder / f"v{version}.npz"
    model = folder / "model"
    command = [str(python), "-c", READ_VECTORS]
    command += [
        str(model / f"embeddings_node_0.v{version}.h5"),
        str(model / f"model.v{version}.h5"),
    ]
    subprocess.run([*command, str(target)], check=True)
    with np.load(target) as found:
        return dict(found)
