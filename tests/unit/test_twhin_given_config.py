"""Flags of run.py that name no config or graph: each error names the flag and the remedy."""

from pathlib import Path

import pytest

from projects.twhin.given_config import CONFIGS, load_given
from tml.config import ConfigError
from tml.machines import container


def test_a_config_that_is_not_there_is_told_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--config_yaml_path: there is no .*x\.yaml.*gowalla\.y"):
        load_given(tmp_path / "x.yaml", None, [])


def test_a_graph_that_is_not_there_or_not_given_is_named(tmp_path: Path) -> None:
    config = CONFIGS / "user_item.yaml"
    with pytest.raises(ConfigError, match=r"relations: is missing(.|\n)*; give .* with --graph$"):
        load_given(config, None, [])
    with pytest.raises(ConfigError, match=r"--graph: there is no .*gone; prepare writes one"):
        load_given(config, tmp_path / "gone", [])
    with pytest.raises(ConfigError, match=r"--graph: .* has no graph\.yaml"):
        load_given(config, tmp_path, [])
    with pytest.raises(ConfigError, match="unknown key") as caught:  # nothing that a graph brings
        load_given(CONFIGS / "local.yaml", None, ["model.colour=red"])
    assert "--graph" not in str(caught.value)


def test_in_a_container_a_path_of_the_machine_around_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert container.outside(tmp_path / "gone") == ""
    mounts = {container.CHECKOUT, tmp_path / "mounted"}
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) in mounts)
    assert "~/tmp is /root/tmp" in container.outside(tmp_path / "gone")
    assert container.outside(tmp_path / "mounted" / "gone") == ""
