"""Finding projects in a checkout."""

from pathlib import Path

import pytest

from tml.docker.checkout import find_project, find_projects
from tml.docker.errors import LauncherError


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A checkout with two projects of the two kinds of script folder, and one that is none."""
    for script in ("twhin/scripts/run_in_docker.sh", "home/recap/script/run_in_docker.sh"):
        file = tmp_path / "projects" / script
        file.parent.mkdir(parents=True)
        file.touch()
    (tmp_path / "projects" / "notes").mkdir()
    return tmp_path


@pytest.mark.parametrize("called", ["recap", "home/recap", "projects/home/recap/"])
def test_a_nested_project_is_called_by_its_path_or_its_last_part(base: Path, called: str) -> None:
    project = find_project(base, called)
    assert (project.path, project.name) == ("home/recap", "recap")
    assert project.script == "projects/home/recap/script/run_in_docker.sh"


def test_both_script_folders_count_and_others_do_not(base: Path) -> None:
    assert [project.path for project in find_projects(base)] == ["home/recap", "twhin"]


def test_a_project_that_is_not_there_names_those_that_are(base: Path) -> None:
    with pytest.raises(LauncherError, match=r"'notes' not found .* there are: home/recap, twhin"):
        find_project(base, "notes")


def test_an_ambiguous_name_asks_for_the_path(base: Path) -> None:
    other = base / "projects" / "away" / "recap" / "scripts"
    other.mkdir(parents=True)
    (other / "run_in_docker.sh").touch()
    with pytest.raises(LauncherError, match="away/recap, home/recap"):
        find_project(base, "recap")
    assert find_project(base, "away/recap").path == "away/recap"
