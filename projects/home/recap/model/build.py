"""From a config, or a step folder, to a model: what training, evaluation, prediction and export
share.
"""

from pathlib import Path
from typing import Any

import torch

from projects.home.recap.config import RecapConfig
from projects.home.recap.data.batch import Features
from projects.home.recap.data.dataset import describe_features
from projects.home.recap.model.embeddings import fill_pretrained, large_table_specs
from projects.home.recap.model.model import RankingModel
from tml import checkpoint
from tml.checkpoint import CheckpointError
from tml.config import load_config
from tml.distributed import Job
from tml.embeddings import Tables, build_tables


def build_model(
    config: RecapConfig, features: Features, job: Job
) -> tuple[RankingModel, Tables | None]:
    """The model on this process's device, with its large tables; initial values depend on
    training.seed alone.
    """
    seed = config.training.seed
    specs = large_table_specs(config.model, features)
    tables = build_tables(specs, job, seed) if specs else None
    if tables is not None:
        fill_pretrained(config.model, features, tables)
    torch.manual_seed(seed)
    model = RankingModel(config.model, features, tables).to(job.device)
    if ratios := config.sampling_ratios():
        model.set_sampling_ratios(ratios)
    return model, tables


def model_state(model: RankingModel, tables: Tables | None) -> dict[str, Any]:
    """Saved name → tensor of everything that predictions need, sharing memory with the model."""
    own = {f"model.{name}": value for name, value in model.state_dict().items()}
    large = tables.state() if tables is not None else {}
    weights = {name: value for name, value in large.items() if name.endswith(".weight")}
    return {**own, **weights}


def resolve_step(save_dir: Path, step: int | None = None) -> Path:
    """The step folder of a run: that of `step`, or the newest complete one. Raises
    CheckpointError.
    """
    if step is not None:
        checkpoint.load_meta(save_dir / str(step))
        return save_dir / str(step)
    steps = checkpoint.complete_steps(save_dir)
    if not steps:
        raise CheckpointError(
            f"{save_dir} has no complete step folder; give the save_dir of a run that has saved"
        )
    return save_dir / str(steps[-1])


def read_config(folder: Path, overrides: tuple[str, ...] = ()) -> RecapConfig:
    """The config of a step folder."""
    return load_config(RecapConfig, folder / checkpoint.CONFIG, overrides)


def load_model(folder: Path, config: RecapConfig, job: Job) -> tuple[RankingModel, Features]:
    """The model of a step folder, ready for predictions, and the features it was trained on."""
    features = describe_features(config.train_data)
    # All that files gave at the start is in the step folder; they may be gone.
    stored = config.model_copy(update={"model": config.model.without_files()})
    model, tables = build_model(stored, features, job)
    checkpoint.load_meta(folder)
    checkpoint.load(folder, model_state(model, tables))
    model.eval()
    return model, features
