"""Which projects the checkout holds, and the script in each that a container runs.

A project is a folder below projects/ with script/run_in_docker.sh or scripts/run_in_docker.sh (both
names are in use). It is called by its path below projects/ or by the last part of that: home/recap,
recap.
"""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tml.docker.errors import UsageError

ENTRY_SCRIPTS = ("scripts/run_in_docker.sh", "script/run_in_docker.sh")


@dataclass(frozen=True, kw_only=True)
class Project:
    """`path` is below projects/ (home/recap), `script` below the checkout."""

    path: str
    script: str

    @property
    def name(self) -> str:
        """The last part of the path, by which people call it."""
        return PurePosixPath(self.path).name


def find_projects(base: Path) -> list[Project]:
    """The projects of the checkout at `base`, by path."""
    found: dict[str, Project] = {}
    for pattern in ("*", "*/*"):
        for entry in ENTRY_SCRIPTS:
            for script in (base / "projects").glob(f"{pattern}/{entry}"):
                path = script.parents[1].relative_to(base / "projects").as_posix()
                found.setdefault(
                    path, Project(path=path, script=script.relative_to(base).as_posix())
                )
    return [found[path] for path in sorted(found)]


def find_project(base: Path, called: str) -> Project:
    """The project that `called` names."""
    projects = find_projects(base)
    wanted = called.removeprefix("projects/").strip("/")
    matches = [p for p in projects if p.path == wanted] or [p for p in projects if p.name == wanted]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UsageError(
            f"project {called!r} is ambiguous: {', '.join(p.path for p in matches)}; "
            "give the whole path"
        )
    there = ", ".join(p.path for p in projects) or "none"
    raise UsageError(
        f"project {called!r} not found below {base / 'projects'}; there are: {there}. "
        f"A project is a folder there that has {' or '.join(reversed(ENTRY_SCRIPTS))}"
    )
