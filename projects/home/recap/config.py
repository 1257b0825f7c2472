"""The ranker's configuration: `RecapConfig`, the shape of the YAML files in `config/`.

The keys of the published local_prod.yaml are all here; what this program adds has a default. Tasks
of model, data and optimizer are paired by name; where they do not match, both lists are told.
"""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt
from pydantic import model_validator as validator

from projects.home.recap.data.config import RecapDataConfig
from projects.home.recap.data.planted import PlantedConfig
from projects.home.recap.model.config import ModelConfig
from projects.home.recap.optimizer import RecapOptimizerConfig
from tml import train
from tml.config import Config


class RuntimeConfig(Config):
    """How the program runs."""

    enable_amp: bool = False
    """Matrix products in bfloat16 (autocast); no gradient scaler, bfloat16 has the range of
    float32.
    """
    enable_tensorfloat32: bool = False
    """TensorFloat-32 products on NVIDIA GPUs."""
    enable_compile: bool = False
    """torch.compile; needs a C++ compiler, and takes a minute at the start."""
    wandb: dict[str, Any] | None = None
    """Read for the published YAML's sake; not used, and announced where set."""


class TrainingConfig(train.TrainingConfig):
    """How long training runs and what it leaves behind."""

    num_epochs: PositiveInt | None = None
    """Passes over the training rows. Unset: without end, num_train_steps then has to be set."""
    initial_checkpoint_parts: list[str] | None = Field(default=None, min_length=1)
    """What is taken from initial_checkpoint_dir: `inputs` (normalisation, embeddings), `backbone`,
    `towers`, or a task's name for its tower. Unset: all.
    """
    validate_every_n: PositiveInt | None = None
    """Steps between passes over validation_data. Unset: one at each checkpoint and at the end."""
    evaluated_by: Literal["trainer", "evaluator"] = "trainer"
    """Who passes over validation_data: the training processes, between steps, or a process of its
    own that follows the checkpoints (SPEC_TYPE=evaluator).
    """
    downsampling_correction: Literal["weights", "calibration"] = "weights"
    """How pos_ and neg_downsampling_rate of train_data are undone: by weights of the rows in
    the loss, or by calibrating the probabilities; once, never both.
    """

    @validator(mode="after")
    def _check_end(self) -> Self:
        if self.num_epochs is None and self.num_train_steps is None:
            raise ValueError("set num_train_steps or num_epochs: training would have no end")
        if self.initial_checkpoint_parts is not None and self.initial_checkpoint_dir is None:
            raise ValueError("initial_checkpoint_parts: set initial_checkpoint_dir, parts of what")
        return self


class CalibrationConfig(Config):
    """A monotone map from the model's probability to a calibrated one, fitted after training and
    stored with the model.
    """

    kind: Literal["isotonic", "platt"] = "platt"
    """isotonic: any monotone map (needs thousands of positives); platt: a logistic one."""
    partition: str
    """Partition of validation_data that it is fitted on."""
    folds: NonNegativeInt = 5
    """Cross-fitting: calibration is measured out of fold, on rows that it was not fitted on. Below
    2: it is not measured.
    """


class RecapConfig(Config):
    """The whole of a run."""

    runtime: RuntimeConfig = RuntimeConfig()
    training: TrainingConfig
    model: ModelConfig
    train_data: RecapDataConfig
    validation_data: dict[str, RecapDataConfig] = Field(default={})
    """Partitions by name."""
    optimizer: RecapOptimizerConfig
    which_metrics: str | list[str] | None = None
    """Names of the metrics that are computed (a list, or separated by commas). Unset: all."""
    group_by: str | None = None
    """Id feature whose values group rows for the AUC per user. Unset: meta__user_id or user_id,
    where the data has one.
    """
    calibration: CalibrationConfig | None = None
    planted: PlantedConfig | None = None
    """Rows that are generated where their folder is missing."""

    @validator(mode="after")
    def _check(self) -> Self:
        tasks = list(self.model.tasks)
        _refuse_missing("train_data.tasks", tasks, list(self.train_data.tasks))
        for name, partition in self.validation_data.items():
            where = f"validation_data.{name}"
            if Path(name).name != name:
                raise ValueError(f"{where}: a partition names a folder below save_dir; leave out /")
            wanted = partition.evaluation_tasks or tasks
            _refuse_missing(f"{where}.tasks", wanted, list(partition.tasks))
            for task in wanted:
                if task not in tasks:
                    raise ValueError(
                        f"{where}.evaluation_tasks: {task!r} is no task of the model; there are "
                        f"{', '.join(tasks)}"
                    )
        if self.planted is not None and self.train_data.feature_spec is None:
            raise ValueError("planted: set train_data.feature_spec, <folder>/spec.yaml")
        rates = self.optimizer.multi_task_learning_rates
        if rates is not None:
            named = list(rates.tower_learning_rates)
            where = "optimizer.multi_task_learning_rates.tower_learning_rates"
            _refuse_missing(where, tasks, named)
            if extra := sorted(set(named) - set(tasks)):
                raise ValueError(
                    f"{where}: no task of the model is called {', '.join(extra)}; there are "
                    f"{', '.join(tasks)}"
                )
        if self.calibration and self.calibration.partition not in self.validation_data:
            raise ValueError(
                f"calibration.partition: {self.calibration.partition!r} is not in validation_data; "
                f"there are {', '.join(self.validation_data) or 'none'}"
            )
        if self.calibration and self.training.evaluated_by == "evaluator":
            raise ValueError(
                "calibration is fitted and saved by the trainer; set training.evaluated_by: trainer"
            )
        return self

    def planted_folder(self) -> Path:
        """Where the planted rows are: the folder of their spec."""
        assert self.train_data.feature_spec is not None
        return Path(self.train_data.feature_spec).parent

    def metric_names(self) -> list[str] | None:
        """`which_metrics` as a list; None: all."""
        chosen = self.which_metrics
        return [name.strip() for name in chosen.split(",")] if isinstance(chosen, str) else chosen

    def sampling_ratios(self) -> dict[str, float]:
        """Task → neg_rate / pos_rate of the training data, where probabilities are to be
        calibrated for it.
        """
        if self.training.downsampling_correction != "calibration":
            return {}
        data = {task: self.train_data.task_data(task) for task in self.model.tasks}
        return {
            task: one.neg_downsampling_rate / one.pos_downsampling_rate
            for task, one in data.items()
        }


def _refuse_missing(where: str, wanted: list[str], given: list[str]) -> None:
    missing = [name for name in wanted if name not in given]
    if missing:
        raise ValueError(
            f"{where}: {', '.join(missing)} of the model is missing. Model: {', '.join(wanted)}. "
            f"{where}: {', '.join(given)}"
        )
