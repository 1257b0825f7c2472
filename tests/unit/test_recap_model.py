"""The whole network: the published size, accumulation, parts, inference and export."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from projects.home.recap.data.batch import Bag, Features, RankingBatch, empty_batch
from projects.home.recap.model.config import ModelConfig
from projects.home.recap.model.describe import describe
from projects.home.recap.model.featurization import InputStatistics
from projects.home.recap.model.inference import InferenceModel, example_tensors, tensors_of
from projects.home.recap.model.model import RankingModel
from tml.config import ConfigError
from tml.data.parquet import DataError

REPOSITORY = Path(__file__).resolve().parents[2]
PUBLISHED = REPOSITORY / "projects/home/recap/config/local_prod.yaml"

FEATURES = Features(
    tasks=("a", "b", "c"),
    num_continuous=5,
    num_binary=3,
    num_discrete=2,
    vectors={"twhin": 4},
    categorical={"country": 6},
    bags={"topics": 7},
    ids=("position",),
)
MASK_NET = {
    "mask_net_config": {
        "mask_blocks": [{"output_size": 4, "aggregation_size": 3}] * 2,
        "mlp": {"layer_sizes": [6], "final_layer_activation": True},
    }
}
DLRM = {
    "dlrm_config": {"bottom_mlp": {"layer_sizes": [3]}, "top_mlp": {"layer_sizes": [6]}},
}


def tower(*, batch_norm: bool = False) -> dict[str, Any]:
    norm = {"affine": False} if batch_norm else None
    return {"mlp_config": {"layer_sizes": [5, 4, 1], "batch_norm": norm}}


def config(**changes: Any) -> ModelConfig:
    tree = {
        "tasks": {"a": tower(), "c": tower()},
        "featurization_config": {"double_norm_log_config": {}},
        "backbone": MASK_NET,
        **changes,
    }
    return ModelConfig.model_validate(tree)


SMALL = {
    "default_dim": 3,
    "tables": [
        {
            "name": "d",
            "embedding_dim": 3,
            "features": ["discrete.1"],
            "num_embeddings": 40,
            "hash_values": True,
        }
    ],
}
KINDS: dict[str, dict[str, Any]] = {
    "mask_net": {},
    "serial": {
        "backbone": {"mask_net_config": {**MASK_NET["mask_net_config"], "use_parallel": False}}
    },
    "mlp": {"backbone": {"mlp_config": {"layer_sizes": [6]}}},
    "dcn": {"backbone": {"dcn_config": {"parallel_mlp": {"layer_sizes": [6]}}}},
    "dlrm": {"backbone": DLRM, "small_embeddings": SMALL},
    "none": {"multi_task_type": "share_none"},
    "partial": {"multi_task_type": "share_partial", "small_embeddings": SMALL},
    "mmoe": {"mmoe_config": {"expert": {"layer_sizes": [4]}}},
    "ple": {"ple_config": {"expert": {"layer_sizes": [4]}}},
    "position": {"position_debias_config": {}},
    "towers of two kinds": {
        "tasks": {
            "a": tower(),
            "c": {"mask_net_config": {**MASK_NET["mask_net_config"], "mlp": {"layer_sizes": [1]}}},
        }
    },
}


def model(features: Features = FEATURES, **changes: Any) -> RankingModel:
    torch.manual_seed(0)
    return RankingModel(config(**changes), features)


def batch(rows: int = 24, seed: int = 1) -> RankingBatch:
    generator = torch.Generator().manual_seed(seed)

    def normal(width: int) -> Tensor:
        return torch.randn(rows, width, generator=generator) * 3

    lengths = torch.randint(0, 4, (rows,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    topics = torch.randint(0, 7, (int(offsets[-1]),), generator=generator)
    return RankingBatch(
        continuous=normal(5),
        binary=(normal(3) > 0).float(),
        discrete=torch.randint(-(2**62), 2**62, (rows, 2), generator=generator),
        labels=(normal(3) > 1).float(),
        weights=normal(3).abs(),
        vectors={"twhin": normal(4)},
        categorical={"country": torch.randint(0, 6, (rows,), generator=generator)},
        bags={"topics": Bag(topics, offsets)},
        ids={"position": torch.randint(0, 300, (rows,), generator=generator)},
    )


def published() -> tuple[ModelConfig, Features]:
    text = PUBLISHED.read_text().replace("${HOME}", "/").replace("${HERE}", "/")
    tree = yaml.safe_load(text)
    features = Features(
        tasks=tuple(tree["train_data"]["tasks"]),
        num_continuous=2117,
        num_binary=59,
        num_discrete=320,
        vectors={"user_embedding": 200, "user_eng_embedding": 200, "author_embedding": 200},
    )
    return ModelConfig.model_validate(tree["model"]), features


def test_the_published_configuration_has_48_115_108_parameters() -> None:
    found = describe(*published())
    assert found["input_width"] == 2776
    assert found["parameters"] == 48_115_108
    # Input batch norm and layer norms; four MaskBlocks and the MLP; ten towers.
    blocks = 4 * (3 * 2776 * 1024 + 1024 + 2776 + 1024 + 2 * 1024)
    towers = 10 * (2048 * 256 + 256 + 256 * 128 + 128 + 128 + 1)
    assert found["parameters_by_part"] == {
        "inputs": 2 * 2117 + 2 * (2117 + 59) + 3 * 2 * 200,
        "backbone": blocks + 4096 * 2048 + 2048,
        "towers": towers,
        "large_embeddings": 0,
    }
    assert found["flops_per_example"] == pytest.approx(289e6, rel=0.003)
    assert found["flops_forward"] * 3 == found["flops_per_example"]
    assert len(found["tasks"]) == 10


def test_large_tables_count_as_parameters_and_need_no_memory() -> None:
    table = {"name": "t", "embedding_dim": 64, "features": ["country"], "num_embeddings": 10**9}
    found = describe(config(large_embeddings={"tables": [table]}), FEATURES)
    assert found["parameters_by_part"]["large_embeddings"] == 64 * 10**9
    assert found["input_width"] == 5 + 3 + 4 + 64


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_network_trains(kind: str) -> None:
    module, rows = model(**KINDS[kind]), batch()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        loss = module.losses(module(rows), rows).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    learning = [p for p in module.parameters() if p.grad is not None]
    assert len(learning) == len(list(module.parameters()))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["mask_net", "partial"])
def test_micro_batches_equal_the_batch_that_they_make_up(kind: str, parts: int) -> None:
    """Right for 2 alone in the published version."""
    rows = batch(24)
    whole, split = model(**KINDS[kind]), model(**KINDS[kind])
    whole.losses(whole(rows), rows).sum().backward()
    statistics = split.input_statistics(rows)
    for part in rows.split(parts):
        split.losses(split(part, None, statistics), part).sum().backward()
    for (name, one), two in zip(whole.named_parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(two.grad, one.grad, rtol=1e-4, atol=1e-5, msg=name)
    for (name, first), second in zip(whole.named_buffers(), split.buffers(), strict=True):
        torch.testing.assert_close(second, first, msg=name)


def _statistics_of_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    rows = batch(24)
    mine = rows.slice(0, 7) if rank == 0 else rows.slice(7, 24)
    module = model()
    statistics = module.input_statistics(mine)
    torch.save((statistics, module.state_dict()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_compute_the_input_statistics_of_one(tmp_path: Path) -> None:
    spawn(_statistics_of_rank, args=(str(tmp_path),), nprocs=2)
    alone = model()
    expected = alone.input_statistics(batch(24))
    assert isinstance(expected, InputStatistics)
    for rank in range(2):
        found, state = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        torch.testing.assert_close(found.mean, expected.mean)
        torch.testing.assert_close(found.variance, expected.variance)
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(state[name], value, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_backbone_and_towers_share_no_parameter_and_are_all(kind: str) -> None:
    module = model(**KINDS[kind])
    groups = [module.backbone_parameters(), *map(module.tower_parameters, module.tasks)]
    names = [id(p) for group in groups for p in group]
    assert len(names) == len(set(names))
    assert set(names) == {id(p) for p in module.parameters()}
    assert all(groups[1:])


def test_a_backbone_of_ones_own_learns_at_the_rate_of_its_tower() -> None:
    module = model(**KINDS["none"])
    of_inputs = {id(p) for p in module.featurization.parameters()}
    assert {id(p) for p in module.backbone_parameters()} == of_inputs


def test_towers_of_one_product_are_what_they_are_one_by_one() -> None:
    module, rows = model(tasks={"a": tower(batch_norm=True), "c": tower(batch_norm=True)}), batch()
    module.eval()
    (shared, _) = module.sharing(module.inputs(rows))
    together = module.towers([shared, shared])
    for column, task in enumerate(module.tasks):
        torch.testing.assert_close(together[:, column], module.towers.of(task)(shared))


def test_a_tower_learns_from_its_own_task_alone() -> None:
    module, rows = model(), batch()
    module.losses(module(rows), rows)[1].backward()
    assert all(p.grad is None or not p.grad.any() for p in module.tower_parameters("a"))
    assert all(p.grad is not None and p.grad.any() for p in module.tower_parameters("c"))


def test_parameters_depend_on_the_seed_alone() -> None:
    one, two = model(**KINDS["partial"]), model(**KINDS["partial"])
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_scores_do_not_depend_on_the_position() -> None:
    module, rows = model(**KINDS["position"]), batch()
    assert module.input_width == model().input_width + 64
    moved = replace(rows, ids={"position": rows.ids["position"] + 7})
    with torch.no_grad():
        module.train()
        assert not torch.equal(module(rows), module(moved))
        module.eval()
        assert torch.equal(module(rows), module(moved))


def test_bad_features_give_finite_logits_and_gradients() -> None:
    module, rows = model(), batch()
    rows.continuous[0] = float("nan")
    rows.continuous[1, 2] = float("inf")
    rows.vectors["twhin"][2] = 1.0
    rows.binary[3, 1] = float("nan")
    logits = module(rows)
    module.losses(logits, rows).sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_a_row_that_is_constant_after_everything_is_no_nan() -> None:
    module = model()
    module.eval()
    rows = batch(2)
    constant = replace(
        rows,
        continuous=torch.zeros(2, 5),
        binary=torch.zeros(2, 3),
        vectors={"twhin": torch.full((2, 4), 0.3)},
    )
    logits = module(constant)
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


def test_one_row_trains_where_nothing_is_normalised_and_is_explained_where_something_is() -> None:
    featurization: dict[str, Any] = {"featurization_config": {"log1p_abs_config": {}}}
    assert model(**featurization)(batch(1)).shape == (1, 2)
    tasks = {"a": tower(batch_norm=True), "c": tower()}
    with pytest.raises(DataError, match=r"1 row.*batch norm.*global_batch_size"):
        model(**featurization, tasks=tasks)(batch(1))
    with pytest.raises(DataError, match=r"1 row.*batch norm.*global_batch_size"):
        model()(batch(1))
    module = model(tasks=tasks)
    module.eval()
    assert module(batch(1)).shape == (1, 2)


def test_a_batch_without_rows_gives_no_scores() -> None:
    module = model(**KINDS["partial"])
    module.eval()
    empty = empty_batch(FEATURES)
    assert module.probabilities(module(empty)).shape == (0, 2)


def test_a_tower_must_end_in_one_number() -> None:
    wrong = {"mlp_config": {"layer_sizes": [5]}}
    with pytest.raises(ConfigError, match=r"tasks\.a: the last width of a tower must be 1, not 5"):
        model(tasks={"a": wrong})


def test_data_without_inputs_is_refused() -> None:
    with pytest.raises(ConfigError, match="no feature that the model takes"):
        model(
            Features(tasks=("a", "c"), num_discrete=3),
            featurization_config={"log1p_abs_config": {}},
        )


def test_task_names_may_be_any_names() -> None:
    tasks = ("keys", "recap.engagement.is_replied", "type")
    module = model(replace(FEATURES, tasks=tasks), tasks=dict.fromkeys(tasks, tower()))
    assert module.tasks == tasks
    assert module(batch()).shape == (24, 3)
    names = [name for name, _ in module.named_parameters() if "is_replied" in name]
    assert names[0] == "towers.task_recap__engagement__is_replied.network.layers.0.weight"


@pytest.mark.parametrize("kind", ["mask_net", "partial"])
def test_bfloat16_multiplies_in_bfloat16_and_gives_float32_logits(kind: str) -> None:
    module, rows = model(**KINDS[kind]), batch()
    exact = module(rows)
    with torch.autocast("cpu", torch.bfloat16):
        assert module.inputs(rows).dtype == torch.bfloat16
        logits = module(rows)
        module.losses(logits, rows).sum().backward()
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, exact, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("kind", ["mask_net", "dlrm", "mmoe", "ple", "partial", "position"])
def test_the_exported_program_gives_the_models_probabilities(kind: str) -> None:
    module, rows = model(**KINDS[kind]), batch()
    module(rows)  # moves the running statistics
    module.set_sampling_ratios({"a": 0.2})
    module.set_calibration("c", torch.tensor([0.2, 0.8]), torch.tensor([0.1, 0.9]))
    inference = InferenceModel(module, FEATURES)
    with torch.no_grad():
        expected = module.probabilities(module(rows))
        torch.testing.assert_close(inference(tensors_of(rows, FEATURES)), expected)
        exported = torch.export.export(
            inference,
            (example_tensors(FEATURES, 3),),
            dynamic_shapes=({name: _dynamic(name) for name in inference.input_names},),
        ).module()
        for number in (1, 9, 24):
            part = rows.slice(0, number)
            found = exported(tensors_of(part, FEATURES))
            torch.testing.assert_close(found, expected[:number], rtol=1e-4, atol=1e-6)


def _dynamic(name: str) -> dict[int, Any]:
    free = {0: torch.export.Dim.DYNAMIC}
    return {**free, 1: torch.export.Dim.DYNAMIC} if name.startswith("bags.") else free


def test_a_model_with_large_tables_is_not_exported() -> None:
    table = {"name": "t", "embedding_dim": 3, "features": ["country"]}
    module = model(large_embeddings={"tables": [table]})
    with pytest.raises(ValueError, match="large_embeddings cannot be exported"):
        InferenceModel(module, FEATURES)
