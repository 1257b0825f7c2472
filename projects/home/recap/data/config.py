"""What is read, and how it becomes rows: `RecapDataConfig`, the shape of train_data and of each
partition of validation_data.

The keys of the published YAML are all here. Those that steer TensorFlow's machinery and have no
meaning in this program are named once in a warning (`ignored_keys`).
"""

from typing import ClassVar, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic import model_validator as validator

from tml.config import Config


class TaskData(Config):
    """How the rows of one label were sampled before they were written."""

    pos_downsampling_rate: float = Field(default=1.0, gt=0, le=1)
    """Share of the positive rows that were kept."""
    neg_downsampling_rate: float = Field(default=1.0, gt=0, le=1)
    """Share of the negative rows that were kept."""


class SegDenseSchema(Config):
    """TFRecords of tf.train.Example, described by a JSON schema."""

    schema_path: str
    """JSON file `{"schema": [{"feature_name", "dtype", "length"}, …]}`."""
    features: list[str] | None = None
    """Names of the schema that are read. Unset: all that are needed."""
    renamed_features: dict[str, str] = Field(default={})
    """Name in the model → name in the records."""
    mask_mantissa_features: dict[str, NonNegativeInt] | None = None
    """Name → number of low bits of the mantissa (of 23) set to zero: coarser floats."""


class ExplicitDateInputs(Config):
    """Files by days: `<data_root>/<YYYY>/<MM>/<DD>/*` for `days` days up to end_date."""

    data_root: str
    """Folder above the years."""
    end_date: str
    """Last day, YYYY-MM-DD, included."""
    days: PositiveInt
    """Number of days."""
    num_missing_days_tolerated: NonNegativeInt = 0
    """Days without a file before it is an error."""


class ExplicitDatetimeInputs(Config):
    """Files by hours: `<data_root>/<YYYY>/<MM>/<DD>/<HH>/*` for `hours` hours up to
    end_datetime.
    """

    data_root: str
    """Folder above the years."""
    end_datetime: str
    """Last hour, "YYYY-MM-DD HH", included."""
    hours: PositiveInt
    """Number of hours."""
    num_missing_hours_tolerated: NonNegativeInt = 0
    """Hours without a file before it is an error."""


class TruncateAndSlice(Config):
    """Columns that are kept: the first so many, or those that a mask names."""

    continuous_feature_truncation: PositiveInt | None = None
    """Continuous columns kept, from the first. Unset: all."""
    binary_feature_truncation: PositiveInt | None = None
    """Binary columns kept, from the first. Unset: all."""
    continuous_feature_mask_path: str | None = None
    """.npy file of booleans, one a continuous column (after the truncation): true columns are
    kept.
    """
    binary_feature_mask_path: str | None = None
    """The same for binary columns."""


class DownCast(Config):
    """Values are rounded to a smaller type, as they would be when stored in it."""

    features: dict[str, Literal["bfloat16", "float16", "float32", "bool", "uint8", "int8"]]
    """Feature → type."""


class RectifyLabels(Config):
    """A label counts only if the engagement came within a window after the post was shown."""

    label_rectification_window_in_hours: PositiveFloat = 3.0
    """Length of the window in hours."""
    served_timestamp_field: str = "served_timestamp"
    """Feature with the time of serving, in ms."""
    impressed_timestamp_field: str = "impressed_timestamp"
    """Feature with the time of the impression, in ms; 0 where there is none: then serving
    counts.
    """
    label_to_engaged_timestamp_field: dict[str, str] = Field(min_length=1)
    """Label → feature with the time of the engagement, in ms; 0 where there is none."""


class ExtractFeaturesRow(Config):
    """One column of a tensor that becomes a feature of its own."""

    name: str
    """Name of the new feature."""
    source_tensor: str
    """Feature that holds it: continuous, binary, discrete or a vector."""
    index: NonNegativeInt
    """Column, before truncation."""


class ExtractFeatures(Config):
    """Columns that become features of their own, such as a position."""

    extract_feature_table: list[ExtractFeaturesRow] = Field(default=[])


class DownsampleNegatives(Config):
    """Of each batch_multiplier · batch rows, all with an engagement are kept and as many others as
    fill the batch; those others weigh as many more as were dropped.
    """

    batch_multiplier: PositiveInt
    """Rows read for each row kept."""
    engagements_list: list[str] = Field(min_length=1)
    """Labels; a row with one of them is kept."""


class Preprocess(Config):
    """What happens to rows between file and batch, in this order: rectify labels, drop negatives
    and re-weight, extract, truncate and slice, downcast.
    """

    truncate_and_slice: TruncateAndSlice | None = None
    downcast: DownCast | None = None
    rectify_labels: RectifyLabels | None = None
    extract_features: ExtractFeatures | None = None
    downsample_negatives: DownsampleNegatives | None = None


class VectorTable(Config):
    """Vectors of an exported table (TwHIN's), looked up by an id of the row."""

    name: str
    """Name of the vector among the model's inputs."""
    path: str
    """Parquet file with columns entity and vector, as projects/twhin/export.py writes."""
    by: str
    """Id feature of the row; its value, as text, is looked up among the entities. An id that is
    not there gets zeros.
    """


class RecapDataConfig(Config):
    """One set of rows."""

    exactly_one_of: ClassVar = (("seg_dense_schema", "feature_spec"),)
    at_most_one_of: ClassVar = (("inputs", "explicit_date_inputs", "explicit_datetime_inputs"),)

    inputs: str | None = None
    """Glob of the files."""
    explicit_date_inputs: ExplicitDateInputs | None = None
    explicit_datetime_inputs: ExplicitDatetimeInputs | None = None
    seg_dense_schema: SegDenseSchema | None = None
    """The files are TFRecords (GZIP or plain)."""
    feature_spec: str | None = None
    """The files are parquet; YAML file that says what their columns are (data/prepare.py writes
    one).
    """
    global_batch_size: PositiveInt = 128
    """Rows of an update over all processes, for each of training.gradient_accumulation."""
    tasks: dict[str, TaskData | None] = Field(min_length=1)
    """Labels that are read, and how they were sampled."""
    evaluation_tasks: list[str] | None = None
    """Tasks that are measured on this partition. Unset: all tasks of the model."""
    preprocess: Preprocess | None = None
    vector_tables: list[VectorTable] = Field(default=[])
    """Vectors looked up by id, beside those in the records."""
    num_files_to_keep: PositiveInt | None = None
    """Files read at most, the first by name. Unset: all."""
    ignore_data_errors: bool = False
    """Records that cannot be read are counted, named and left out, instead of ending the run."""
    examples_shuffle_buffer_size: NonNegativeInt = 1024
    """Rows held in memory and mixed; files are put in random order before. 0: no mixing."""
    interleave_num_parallel_calls: PositiveInt | None = None
    """Files read at the same time, their records mixed. Unset: 4."""
    map_num_parallel_calls: PositiveInt | None = None
    """Threads that inflate and decode. Unset: 1."""
    weight_column: str | None = None
    """Parquet: column with the weight of each row. Unset: 1."""

    dataset_service_compression: str | None = None
    cache: bool | None = None
    file_batch_size: int | None = None
    repeat_files: bool | None = None
    data_service_dispatcher: str | None = None

    @validator(mode="after")
    def _check(self) -> Self:
        if not (self.inputs or self.explicit_date_inputs or self.explicit_datetime_inputs):
            raise ValueError(
                "set one of inputs, explicit_date_inputs, explicit_datetime_inputs; none is set"
            )
        for name in self.evaluation_tasks or ():
            if name not in self.tasks:
                raise ValueError(
                    f"evaluation_tasks: {name!r} is not among the tasks: {', '.join(self.tasks)}"
                )
        return self

    def task_data(self, name: str) -> TaskData:
        """Sampling of one task; a task given as null was not sampled."""
        return self.tasks[name] or TaskData()

    def ignored_keys(self) -> list[str]:
        """Keys that are set and have no meaning in this program."""
        names = (
            "dataset_service_compression cache file_batch_size repeat_files data_service_dispatcher"
        )
        return [name for name in names.split() if name in self.model_fields_set]
