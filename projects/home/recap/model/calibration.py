"""From logits to the probabilities that are reported: undoing the sampling of the training data,
then a learned map. Both are buffers: saved, loaded and exported with the model.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

NUM_KNOTS = 256
"""Points of the learned map of a task."""


class Calibration(nn.Module):
    """Logits (B, T) → probabilities (B, T) float32."""

    log_ratios: Tensor
    learned: Tensor
    knots_x: Tensor
    knots_y: Tensor

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__()
        self._tasks = tuple(tasks)
        identity = torch.linspace(0, 1, NUM_KNOTS, dtype=torch.float64).expand(len(tasks), -1)
        self.register_buffer("log_ratios", torch.zeros(len(tasks)))
        self.register_buffer("learned", torch.zeros(len(tasks), dtype=torch.bool))
        self.register_buffer("knots_x", identity.float().clone())
        self.register_buffer("knots_y", identity.float().clone())

    def forward(self, logits: Tensor) -> Tensor:
        """σ(logit + log r) = p·r / (1 − p + r·p), then the learned map where there is one."""
        p = torch.sigmoid(logits.float() + self.log_ratios)
        return torch.where(self.learned, self._interpolate(p), p)

    def set_sampling_ratios(self, ratios: Mapping[str, float]) -> None:
        """Task → r = neg_rate / pos_rate of the data it was trained on; others count as 1."""
        for task, ratio in ratios.items():
            if not 0 < ratio < float("inf"):
                raise ValueError(f"sampling ratio of task {task!r}: {ratio} is not above 0")
        values = [ratios.get(task, 1.0) for task in self._tasks]
        if unknown := sorted(set(ratios) - set(self._tasks)):
            raise ValueError(_unknown(unknown[0], self._tasks))
        self.log_ratios.copy_(torch.tensor(values, dtype=torch.float64).log())

    def set_map(self, task: str, x: Tensor, y: Tensor) -> None:
        """The learned map of a task: a line through the points (x, y), constant outside; where two
        x are equal, the later y counts from there on. x: probabilities before, rising; y: after;
        (K,), 1 ≤ K ≤ NUM_KNOTS.
        """
        if task not in self._tasks:
            raise ValueError(_unknown(task, self._tasks))
        if x.shape != y.shape or x.dim() != 1 or not 1 <= len(x) <= NUM_KNOTS:
            raise ValueError(
                f"calibration of {task!r}: x {tuple(x.shape)} and y {tuple(y.shape)} must be "
                f"vectors of one length from 1 to {NUM_KNOTS}"
            )
        in_range = all(bool(((v >= 0) & (v <= 1)).all()) for v in (x, y))
        if not in_range or bool((x.diff() < 0).any()):
            raise ValueError(
                f"calibration of {task!r}: x and y must lie in 0 … 1, and x must not fall"
            )
        row = self._tasks.index(task)
        missing = NUM_KNOTS - len(x)
        for knots, values in ((self.knots_x, x), (self.knots_y, y)):
            knots[row].copy_(torch.cat([values, values[-1:].expand(missing)]))
        self.learned[row] = True

    def reset_maps(self) -> None:
        """No learned map for any task."""
        self.knots_x.copy_(torch.linspace(0, 1, NUM_KNOTS))
        self.knots_y.copy_(self.knots_x)
        self.learned.fill_(False)

    def _interpolate(self, p: Tensor) -> Tensor:
        transposed = p.mT.contiguous()  # (T, B): searchsorted wants the tasks first
        if torch.compiler.is_exporting():  # ONNX has no searchsorted
            right = (self.knots_x[:, None, :] <= transposed[:, :, None]).sum(2)
        else:
            right = torch.searchsorted(self.knots_x, transposed, right=True)
        left = (right - 1).clamp(min=0)
        right = right.clamp(max=NUM_KNOTS - 1)
        x0, x1 = self.knots_x.gather(1, left), self.knots_x.gather(1, right)
        y0, y1 = self.knots_y.gather(1, left), self.knots_y.gather(1, right)
        part = (transposed - x0) / (x1 - x0).clamp(min=1e-30)  # outside, y0 = y1
        return torch.lerp(y0, y1, part).mT


def _unknown(task: str, tasks: Sequence[str]) -> str:
    return f"{task!r} is no task of the model; there are {', '.join(tasks)}"
