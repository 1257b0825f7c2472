"""The model as other programs run it: tensors in, probabilities out; for torch.export and ONNX."""

from typing import Any

import torch
from torch import Tensor, nn

from projects.home.recap.data.batch import Bag, Features, RankingBatch
from projects.home.recap.model.embeddings import PADDING, PaddedBag
from projects.home.recap.model.model import RankingModel


class InferenceModel(nn.Module):
    """{name: tensor of B rows} → probabilities (B, T), columns in the order of `model.tasks`.

    Names: continuous (B, C) and binary (B, D) float32, discrete (B, E) int64, vector.<name> (B, n)
    float32, categorical.<name> (B,), ids.<name> (B,) and bags.<name> (B, L) int64, short lists
    filled with −1; those that the data does not have are left out. Exported, a value that is no row
    of its table counts as unknown (row 0).

    Raises ValueError for a model with large tables, whose rows live in other processes.
    """

    def __init__(self, model: RankingModel, features: Features) -> None:
        super().__init__()
        if model.has_large_tables:
            raise ValueError(
                "a model with large_embeddings cannot be exported: its tables are cut over the "
                "processes; train with small_embeddings, or look the rows up by predict.py"
            )
        self.model = model.eval()
        self._features = features

    @property
    def input_names(self) -> list[str]:
        """Names of the tensors that forward takes."""
        return list(example_tensors(self._features, 1))

    def forward(self, tensors: dict[str, Tensor]) -> Tensor:
        """See the class."""
        first = next(iter(tensors.values()))

        def named(kind: str) -> dict[str, Any]:
            start = f"{kind}."
            return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}

        nothing = torch.empty(first.shape[0], 0, device=first.device)
        batch = RankingBatch(
            continuous=tensors.get("continuous", nothing),
            binary=tensors.get("binary", nothing),
            discrete=tensors.get("discrete", nothing),
            labels=nothing,
            weights=nothing,
            vectors=named("vector"),
            categorical=named("categorical"),
            bags={name: PaddedBag(values) for name, values in named("bags").items()},  # type: ignore[misc]
            ids=named("ids"),
        )
        return self.model.probabilities(self.model(batch))


def example_tensors(features: Features, num_rows: int, bag_length: int = 4) -> dict[str, Tensor]:
    """Tensors of zeros of the shapes that InferenceModel takes."""
    tensors: dict[str, Tensor] = {}
    if features.num_continuous:
        tensors["continuous"] = torch.zeros(num_rows, features.num_continuous)
    if features.num_binary:
        tensors["binary"] = torch.zeros(num_rows, features.num_binary)
    if features.num_discrete:
        tensors["discrete"] = torch.zeros(num_rows, features.num_discrete, dtype=torch.int64)
    for name, width in features.vectors.items():
        tensors[f"vector.{name}"] = torch.zeros(num_rows, width)
    whole = torch.zeros(num_rows, dtype=torch.int64)
    tensors |= {f"categorical.{name}": whole.clone() for name in features.categorical}
    tensors |= {f"ids.{name}": whole.clone() for name in features.ids}
    for name in features.bags:
        tensors[f"bags.{name}"] = torch.zeros(num_rows, bag_length, dtype=torch.int64)
    return tensors


def tensors_of(batch: RankingBatch, features: Features) -> dict[str, Tensor]:
    """The tensors of a batch, as InferenceModel takes them."""
    tensors = {name: getattr(batch, name) for name in ("continuous", "binary", "discrete")}
    tensors |= {f"vector.{name}": values for name, values in batch.vectors.items()}
    tensors |= {f"categorical.{name}": values for name, values in batch.categorical.items()}
    tensors |= {f"ids.{name}": values for name, values in batch.ids.items()}
    tensors |= {f"bags.{name}": padded(bag) for name, bag in batch.bags.items()}
    return {name: tensors[name] for name in example_tensors(features, 1)}


def padded(bag: Bag) -> Tensor:
    """(B, L) int64 of the longest list, at least 1; PADDING after the end of the others."""
    lengths = bag.offsets.diff()
    longest = max(1, int(lengths.max())) if len(lengths) else 1
    out = torch.full((len(bag), longest), PADDING, dtype=torch.int64, device=bag.values.device)
    rows = torch.repeat_interleave(lengths)
    columns = torch.arange(len(bag.values), device=rows.device) - bag.offsets[rows]
    out[rows, columns] = bag.values
    return out
