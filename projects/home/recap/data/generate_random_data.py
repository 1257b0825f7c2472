"""Random GZIP TFRecords of the schema of a config, to try the program on.

    python projects/home/recap/data/generate_random_data.py --config_path CONFIG.yaml
        [--n_examples N] [--n_files K] [--seed S] [--output_dir FOLDER]

Files part-00000-of-0000K.tfrecord.gz go into the folder of the glob `train_data.inputs`, or into
--output_dir. The same arguments make the same bytes.

Floats are normal, features of one width N(0, 1); whole numbers are 0 or 1 where the feature is
`binary`, else spread over 2^20 values, ids over 2^40. Labels can be learned: each is 1 with the
probability sigmoid(bias + Σ_j w_j x_j) over the first 8 continuous values, w_j drawn for each label
from N(0, 1), the bias so that about one row in four is positive. Without continuous values labels
are 1 in one row of four.
"""

import argparse
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from projects.home.recap.data.config import RecapDataConfig
from projects.home.recap.data.segdense import BINARY, CONTINUOUS, SchemaEntry, read_schema
from tml.config import ConfigError, build_config, read_yaml
from tml.data.example import VARIABLE, Column, Lists, encode_examples
from tml.data.parquet import DataError
from tml.data.tfrecord import TFRecordWriter

DEFAULT_EXAMPLES = 1024
DEFAULT_FILES = 8
BLOCK_EXAMPLES = 128
NUM_SIGNALS = 8
"""Continuous values that labels depend on."""
BIAS = -1.8
MAX_LIST = 6
"""Lists of variable length have up to so many values."""

Floats = NDArray[np.float64]


class RandomExamples:
    """Examples of one schema; which ones depends on the seed and on the number of the block."""

    def __init__(self, config: RecapDataConfig, seed: int) -> None:
        assert config.seg_dense_schema is not None
        names = config.seg_dense_schema.renamed_features
        self._schema = read_schema(config.seg_dense_schema.schema_path)
        self._binary = names.get(BINARY, BINARY)
        self._continuous = names.get(CONTINUOUS, CONTINUOUS)
        self._labels = [names.get(task, task) for task in config.tasks]
        for label in self._labels:
            if label not in self._schema:
                path = config.seg_dense_schema.schema_path
                raise ConfigError(f"tasks: {path} has no feature {label!r}")
        self._seed = seed
        rule = np.random.default_rng([seed, 0])
        self._rule = {label: rule.standard_normal(NUM_SIGNALS) for label in self._labels}

    def block(self, number: int, count: int) -> list[bytes]:
        """`count` records."""
        rng = np.random.default_rng([self._seed, 1, number])
        columns: dict[str, Column] = {}
        signals = np.zeros((count, 0))
        for name, entry in self._schema.items():
            if name not in self._labels:
                columns[name] = self._draw(entry, count, rng)
        if self._continuous in columns:
            values = columns[self._continuous]
            assert isinstance(values, np.ndarray)
            signals = values[:, :NUM_SIGNALS].astype(np.float64)
        for label in self._labels:
            labels = self._draw_labels(self._rule[label][: signals.shape[1]], signals, rng)
            is_float = self._schema[label].dtype == "float_list"
            columns[label] = labels.astype(np.float32 if is_float else np.int64)[:, None]
        return encode_examples(columns)

    def _draw_labels(self, rule: Floats, signals: Floats, rng: np.random.Generator) -> Floats:
        odds = np.exp(BIAS + signals @ rule)
        probability = odds / (1 + odds) if signals.shape[1] else np.full(len(signals), 0.25)
        return np.asarray(rng.random(len(signals)) < probability, dtype=np.float64)

    def _draw(self, entry: SchemaEntry, count: int, rng: np.random.Generator) -> Column:
        lengths = np.full(count, entry.length)
        if entry.length == VARIABLE:
            lengths = rng.integers(0, MAX_LIST + 1, count)
        values = self._draw_values(entry, int(lengths.sum()), rng)
        if entry.length == VARIABLE:
            return Lists(values, np.concatenate([[0], np.cumsum(lengths)]))
        return values.reshape(count, entry.length)

    def _draw_values(
        self, entry: SchemaEntry, size: int, rng: np.random.Generator
    ) -> NDArray[np.float32] | NDArray[np.int64] | NDArray[np.object_]:
        if entry.dtype == "float_list":
            return rng.standard_normal(size, dtype=np.float32)
        limit = entry.num_values or (1 << 40 if entry.length == 1 else 1 << 20)
        numbers = rng.integers(0, 2 if entry.feature_name == self._binary else limit, size)
        if entry.dtype == "int64_list":
            return numbers
        return np.array([b"%x" % number for number in numbers.tolist()] + [None], object)[:-1]


def generate(
    config: RecapDataConfig, folder: Path, num_examples: int, num_files: int, seed: int
) -> list[Path]:
    """Write exactly `num_examples` over `num_files` files (fewer where there are fewer examples)
    into `folder`; files get their names when all of them are whole.
    """
    examples = RandomExamples(config, seed)
    num_files = max(1, min(num_files, num_examples))
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".making"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        made = []
        with _progress() as progress:
            task = progress.add_task("random examples", total=num_examples)
            for number in range(num_files):
                path = temporary / f"part-{number:05d}-of-{num_files:05d}.tfrecord.gz"
                with TFRecordWriter(path) as writer:
                    for block, count in _blocks(num_examples, num_files, number):
                        for record in examples.block(block, count):
                            writer.write(record)
                        progress.advance(task, count)
                made.append(path)
        return [path.rename(folder / path.name) for path in made]
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _blocks(num_examples: int, num_files: int, file: int) -> Iterator[tuple[int, int]]:
    """Number and size of each block of one file; no other file has blocks of these numbers."""
    count = num_examples // num_files + (file < num_examples % num_files)
    for index, start in enumerate(range(0, count, BLOCK_EXAMPLES)):
        yield index * num_files + file, min(BLOCK_EXAMPLES, count - start)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True))


def _folder_of(inputs: str | None) -> Path:
    """The folder of a glob whose folder has no wildcard."""
    if inputs is None:
        raise ConfigError("train_data.inputs is not set; say --output_dir")
    folder = Path(inputs).parent
    if re.search(r"[*?\[]", str(folder)):
        raise ConfigError(
            f"train_data.inputs: {inputs} names no single folder; say which with --output_dir"
        )
    return folder


def read_data_config(path: str) -> RecapDataConfig:
    """The key train_data of a YAML file; other keys are not looked at."""
    tree = read_yaml(path)
    if not isinstance(tree.get("train_data"), dict):
        raise ConfigError(f"config {path}: train_data is missing")
    config = build_config(RecapDataConfig, tree["train_data"], f"{path}, train_data")
    if config.seg_dense_schema is None:
        raise ConfigError(
            f"config {path}: train_data.seg_dense_schema is not set; random data is made for "
            "TFRecords alone"
        )
    return config


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Make random TFRecords of a config's schema.")
    parser.add_argument("--config_path", required=True, help="YAML file with the key train_data")
    parser.add_argument(
        "--n_examples",
        type=_positive,
        default=DEFAULT_EXAMPLES,
        help="examples in all (default: %(default)s, 8 batches of the published configuration, "
        "27 MB)",
    )
    parser.add_argument(
        "--n_files", type=_positive, default=DEFAULT_FILES, help="files (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1, help="decides all values (default: 1)")
    parser.add_argument(
        "--output_dir", type=Path, help="folder (default: that of train_data.inputs)"
    )
    arguments = parser.parse_args(argv)
    try:
        config = read_data_config(arguments.config_path)
        folder = arguments.output_dir or _folder_of(config.inputs)
        files = generate(
            config, folder, arguments.n_examples, arguments.n_files, abs(arguments.seed)
        )
    except (ConfigError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    megabytes = sum(path.stat().st_size for path in files) / 1e6
    print(f"{arguments.n_examples:,} examples, {len(files)} files, {megabytes:.1f} MB in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
