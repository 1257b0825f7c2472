"""A trained ranker in the forms that other programs run: a torch.export program, ONNX, ONNX with
int8 matrix products. Each takes named tensors of B rows and gives probabilities (B, T).

Every form is read back from its file as a `Scorer`, so what is compared is what was written. onnx,
onnxscript and onnxruntime are imported only where they are needed: training does without them.
"""

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind

from projects.home.recap.config import RecapConfig
from projects.home.recap.data.batch import Features
from projects.home.recap.model.config import (
    EmbeddingTableConfig,
    ModelConfig,
    SmallEmbeddingsConfig,
)
from projects.home.recap.model.embeddings import Table, large_tables, small_tables
from projects.home.recap.model.inference import InferenceModel, example_tensors
from projects.home.recap.model.model import RankingModel
from tml import checkpoint
from tml.config import ConfigError

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
"""What ONNX needs, of requirements/export.txt."""
OUTPUT = "probabilities"
BAGS = "bags."
EXAMPLE_ROWS = 3
"""Rows that are traced: sizes of 0 and 1 would be taken for constants."""
MAX_FOLDED_BYTES = 1 << 30
"""Constants of more are left to be computed by who runs the model."""
MAX_PROTOBUF_BYTES = 1_800_000_000
"""Weights beyond this go into a file of their own: a protobuf ends at 2 GiB."""

Arrays = dict[str, NDArray[Any]]
Scorer = Callable[[Arrays], NDArray[np.float32]]
"""Named arrays of B rows → probabilities (B, T)."""


def check_packages(formats: Sequence[str]) -> None:
    """Raises ConfigError where a format needs a package that is not installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    needing = [name for name in formats if name != "torch"]
    if needing and missing:
        raise ConfigError(
            f"--format {' '.join(needing)}: {', '.join(missing)} is not installed; install the "
            "pinned set with: python -m pip install --no-deps -r requirements/export.txt, or "
            "export with --format torch alone"
        )


def dense_model(folder: Path, config: RecapConfig, features: Features) -> RankingModel:
    """The model of a step folder on the CPU of this process alone, its large tables whole and among
    its parameters. Raises CheckpointError.
    """
    network = config.model.without_files()
    large = large_tables(network, features)
    model = RankingModel(_dense_config(network, features, large), features)
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    if large:
        assert model.small is not None
        keys = list(model.small.tables)[-len(large) :]
        for table, key in zip(large, keys, strict=True):
            weight = state.pop(f"model.small.tables.{key}.weight")
            state[f"tables.{table.name}.weight"] = weight
    checkpoint.load(folder, state)
    return model.eval()


def _dense_config(config: ModelConfig, features: Features, large: list[Table]) -> ModelConfig:
    """The same inputs in the same order, from small tables alone that start from no file."""
    taken = {name for table in large for name in table.features}
    small = config.small_embeddings
    tables = [_table_config(t, "") for t in (small_tables(small, features, taken) if small else [])]
    tables += [_table_config(t, "large.") for t in large]
    dense = SmallEmbeddingsConfig(tables=tables) if tables else None
    return config.model_copy(update={"small_embeddings": dense, "large_embeddings": None})


def _table_config(table: Table, prefix: str) -> EmbeddingTableConfig:
    return EmbeddingTableConfig(
        name=prefix + table.name,
        embedding_dim=table.dim,
        features=list(table.features),
        num_embeddings=table.num_rows,
        pooling="sum" if table.pooling == "sum" else "mean",
        hash_values=table.hashes,
    )


def export_program(
    model: RankingModel, features: Features
) -> tuple[ExportedProgram, dict[str, Tensor]]:
    """The model as a torch.export program, with any number of rows and any length of bags, and
    example inputs: those that the model looks at, in order.
    """
    inference = InferenceModel(model, features)
    tensors = example_tensors(features, EXAMPLE_ROWS)
    program = _trace(inference, tensors)
    used = _used(program, tensors)
    if len(used) < len(tensors):
        # Traced again, since a program asks for all that it was traced with.
        tensors = {name: tensors[name] for name in used}
        program = _trace(inference, tensors)
    _forget_source(program)
    return program, tensors


def _trace(inference: InferenceModel, tensors: dict[str, Tensor]) -> ExportedProgram:
    shapes = {
        name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} if name.startswith(BAGS) else {0: Dim.DYNAMIC}
        for name in tensors
    }
    with torch.no_grad():
        return torch.export.export(inference, (tensors,), dynamic_shapes=(shapes,), strict=False)


def _used(program: ExportedProgram, tensors: dict[str, Tensor]) -> list[str]:
    inputs = [
        one.arg.name
        for one in program.graph_signature.input_specs
        if one.kind == InputKind.USER_INPUT
    ]
    users = {node.name: node.users for node in program.graph.nodes if node.op == "placeholder"}
    return [name for name, node in zip(tensors, inputs, strict=True) if users[node]]


def _forget_source(program: ExportedProgram) -> None:
    """Files and lines of this machine are nobody else's business."""
    for node in program.graph.nodes:
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node"):
            node.meta.pop(key, None)


def save_program(program: ExportedProgram, path: Path) -> None:
    """Write the .pt2 file."""
    with _quiet():
        torch.export.save(program, path)


def save_onnx(program: ExportedProgram, tensors: dict[str, Tensor], path: Path) -> None:
    """Write the ONNX file; weights beyond MAX_PROTOBUF_BYTES beside it, in `<path>.data`."""
    import onnx
    from onnxscript import optimizer

    with _quiet():
        exported = torch.onnx.export(
            program,
            (tensors,),
            input_names=list(tensors),
            output_names=[OUTPUT],
            dynamo=True,
            verbose=False,
            external_data=False,
        )
        assert exported is not None
        # What the towers' first layers have together becomes one weight, which int8 needs.
        optimizer.optimize(
            exported.model,
            input_size_limit=MAX_FOLDED_BYTES,
            output_size_limit=MAX_FOLDED_BYTES,
        )
    num_bytes = sum(value.nbytes for value in program.state_dict.values())
    exported.save(str(path), external_data=num_bytes > MAX_PROTOBUF_BYTES)
    proto = onnx.load_model(str(path), load_external_data=False)
    _name_dimensions(proto.graph)
    # Shapes in between would contradict the weights that quantisation turns round; the rest names
    # files and classes of this machine.
    del proto.graph.value_info[:], proto.graph.metadata_props[:]
    for node in proto.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    onnx.save_model(proto, str(path))


def _name_dimensions(graph: Any) -> None:
    for one in (*graph.input, *graph.output):
        for number, dim in enumerate(one.type.tensor_type.shape.dim):
            if dim.dim_param:
                dim.dim_param = "batch" if number == 0 else f"length_{one.name}"
        del one.metadata_props[:]


def save_int8(onnx_path: Path, path: Path) -> None:
    """Write the ONNX file with its matrix products in int8: weights a scale a column, inputs a
    scale a batch (dynamic). Weights have 7 bits, so that sums of two products fit into the 16 bits
    of processors without VNNI, where 8 bits would overflow silently.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    external = onnx_path.with_name(f"{onnx_path.name}.data").exists()
    with _quiet():
        quantize_dynamic(
            onnx_path,
            path,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=external,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice that the exporters print for their own authors."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def open_program(path: Path) -> Scorer:
    """Read a .pt2 file back."""
    with _quiet():
        module = torch.export.load(path).module()

    def score(arrays: Arrays) -> NDArray[np.float32]:
        with torch.no_grad():
            found: Tensor = module({name: torch.from_numpy(a) for name, a in arrays.items()})
        return np.asarray(found.numpy())

    return score


def open_onnx(path: Path) -> Scorer:
    """Read an ONNX file back, for onnxruntime on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def score(arrays: Arrays) -> NDArray[np.float32]:
        (found,) = session.run([OUTPUT], arrays)
        return np.asarray(found)

    return score
