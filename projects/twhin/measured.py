"""With what a run is measured: which edges, filtered by how many, among which candidates. Numbers
that were measured with something else are not comparable.

It is said in words, with a fingerprint of the edges themselves: files may be renamed and moved, as
they are between a container and its host.
"""

import hashlib

import numpy as np

from projects.twhin.config import TwhinConfig
from projects.twhin.data import COLUMNS
from projects.twhin.edges import Edges
from tml.data.parquet import ParquetRows


def measured_with(config: TwhinConfig, edges: Edges) -> str:
    """What `config.evaluation` measures on `edges`, those of a split: `2,000 of 5,000 edges
    (3f2a91c0), 544,230 known`.

    The known edges, those of all splits, leave other true entities out of a ranking; their number
    stands for them, since reading them all takes long. Raises DataError.
    """
    settings = config.evaluation
    count = f"{len(edges):,} edges"
    if settings.max_edges is not None and settings.max_edges < len(edges):
        count = f"{settings.max_edges:,} of {count}"
    parts = [f"{count} ({_fingerprint(edges)})", f"{_num_known(config):,} known"]
    if settings.relations is not None:
        parts.append(f"relations {' '.join(sorted(settings.relations))}")
    if settings.sampled_candidates is not None:
        seed = config.training.seed  # of their draw
        parts.append(f"{settings.sampled_candidates:,} sampled candidates of seed {seed}")
    return ", ".join(parts)


def _fingerprint(edges: Edges) -> str:
    found = hashlib.blake2b(digest_size=4)
    for column in (edges.lhs, edges.rel, edges.rhs):
        found.update(np.ascontiguousarray(column).data)
    return found.hexdigest()


def _num_known(config: TwhinConfig) -> int:
    splits = (config.train_data, config.validation_data, config.test_data)
    return sum(
        ParquetRows(data.data_root, COLUMNS, data.offset, data.limit).num_rows
        for data in splits
        if data is not None
    )
