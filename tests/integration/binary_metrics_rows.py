"""Run by torchrun from test_binary_metrics_ranks.py: the metrics of rows that are dealt unevenly to
this job's processes; each process saves what it got.

torchrun … binary_metrics_rows.py OUTPUT_FOLDER
"""

import json
import sys
from pathlib import Path

import torch

from tml import binary_metrics, distributed

TASKS = ("like", "share", "report")
NUM_ROWS = 5000


def main(folder: Path) -> None:
    # Smaller than any process's part, so that it travels in several chunks.
    binary_metrics.CHUNK_ROWS = 300
    generator = torch.Generator().manual_seed(8)
    scores = (torch.rand(NUM_ROWS, 3, generator=generator) * 999).round() / 999
    labels = torch.rand(NUM_ROWS, 3, generator=generator) < scores
    # Of such different sizes that every order of addition rounds otherwise.
    weights = 10 ** (torch.rand(NUM_ROWS, 3, generator=generator) * 30 - 15)
    groups = torch.randint(-50, 50, (NUM_ROWS,), generator=generator)
    with distributed.join(60) as job:
        metrics = binary_metrics.BinaryMetrics(TASKS)
        # The last of several processes has nothing; the others have runs of different length.
        owners = max(1, job.world_size - 1)
        owner = (torch.linspace(0, 1, NUM_ROWS) ** 2 * owners).long().clamp(max=owners - 1)
        own_rows = (owner == job.rank).nonzero().squeeze(1)
        for rows in own_rows.split(170):
            metrics.update(
                scores[rows],
                labels[rows],
                weights[rows],
                groups[rows],
                {"odd": rows % 2 == 1, "none": rows < 0},
            )
        tree = metrics.compute().to_json()
    (folder / f"{job.rank}.json").write_text(json.dumps({"own": len(own_rows), "report": tree}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
