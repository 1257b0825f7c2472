"""Who may import whom: each group of modules sees those before it, and never one after it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
LAYERS = (
    ("machines", "logs", "layout", "verbs"),
    ("config",),
    ("docker",),
    (
        "batch",
        "distributed",
        "losses",
        "metrics",
        "memory",
        "binary_metrics",
        "calibration",
        "dense_optimizer",
        "optimizers",
        "data",
        "native",
    ),
    ("embeddings", "checkpoint", "row_tables", "early_stopping"),
    ("evaluate", "train", "rendezvous", "torchrun", "run_folder"),
    ("program", "follow"),
    ("tensorboard",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
TENSORS = {"torch", "torchrec", "fbgemm_gpu", "numpy"}


def imports(file: Path) -> Iterator[str]:
    """Dotted names that `file` imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            # `from tml import train` names the module in the alias.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def python_files(folder: str) -> list[Path]:
    """Every module below `folder`."""
    return sorted((REPOSITORY / folder).rglob("*.py"))


@pytest.mark.parametrize("file", python_files("tml"), ids=lambda f: str(f.relative_to(REPOSITORY)))
def test_the_library_imports_only_what_is_below_it(file: Path) -> None:
    own = file.relative_to(REPOSITORY / "tml").with_suffix("").parts[0]
    for name in imports(file):
        root, _, rest = name.partition(".")
        assert root != "projects", f"{file} imports {name}"
        if own != "__init__":
            assert own in LEVEL, f"tml/{own} has no place in LAYERS: give it one"
            if root == "tml" and rest.partition(".")[0] in LEVEL:
                assert LEVEL[rest.partition(".")[0]] <= LEVEL[own], f"{file} imports {name}"
            if LEVEL[own] <= LEVEL["docker"] and own != "logs":
                assert root not in TENSORS, f"{file} imports {name}"


@pytest.mark.parametrize(
    "file", python_files("projects"), ids=lambda f: str(f.relative_to(REPOSITORY))
)
def test_a_project_imports_no_other_project(file: Path) -> None:
    scripts = {script.parents[1] for script in (REPOSITORY / "projects").rglob("run_in_docker.sh")}
    homes = ["projects." + ".".join(s.relative_to(REPOSITORY / "projects").parts) for s in scripts]
    own = [home for home in homes if str(file).startswith(str(REPOSITORY / home.replace(".", "/")))]
    for name in imports(file):
        if name.startswith("projects."):
            assert any(f"{name}.".startswith(f"{home}.") for home in own), f"{file} imports {name}"


@pytest.mark.parametrize(
    "module", ["tml.docker.__main__", "tml.docker.image", "tml.machines.is_venv"]
)
def test_the_launcher_loads_no_tensors(module: str) -> None:
    heavy = TENSORS | {"pydantic"}
    program = f"import sys, {module}; print(*({heavy!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_environment_names_are_known_in_one_file() -> None:
    for file in python_files("tml"):
        if file.name != "environment.py":
            text = file.read_text()
            assert "os.getenv" not in text, file
            assert "os.environ[" not in text, file
            assert "os.environ.get(" not in text, file
