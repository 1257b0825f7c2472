"""Compiled kernels: where the library comes from, and what it computes beside torch and by hand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tml.embeddings import TableSpec
from tml.native import build
from tml.native.kernels import KINDS, Kernels, load_kernels
from tml.optimizers import OptimizerConfig
from tml.row_tables import RowTables

REPOSITORY = Path(__file__).resolve().parents[2]
FIND = "from tml.native.library import load_library; print(load_library() is not None)"


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    found = load_kernels()
    assert found is not None, (
        "these tests need a C compiler, or an environment that has the kernels"
    )
    return found


# Where it comes from. Each in a process of its own, outside the environment that may hold it.


def find(cache: Path, path: str, **more: str) -> subprocess.Popen[str]:
    """A process that loads the library, where the environment holds none."""
    code = f"import logging, sys; logging.basicConfig(); sys.prefix = '/nowhere'; {FIND}"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={"PATH": path, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(REPOSITORY), **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_at_once_compile_once_and_both_have_it(tmp_path: Path) -> None:
    compiler = tmp_path / "bin" / "cc"
    compiler.parent.mkdir()
    compiler.write_text(f'#!/bin/sh\necho once >>{tmp_path}/calls\nexec {sys_cc()} "$@"\n')
    compiler.chmod(0o755)
    path = f"{compiler.parent}:{os.environ['PATH']}"
    both = [find(tmp_path / "cache", path) for _ in range(2)]
    assert [one.communicate() for one in both] == [("True\n", ""), ("True\n", "")]
    assert (tmp_path / "calls").read_text() == "once\n"
    kept = {one.name for one in (tmp_path / "cache" / "tml").iterdir()}
    assert kept == {".lock", build.library_name()}


def sys_cc() -> str:
    found = build.find_compiler()
    assert found is not None
    return found


def test_without_a_compiler_torch_does_the_work_and_one_line_says_so(tmp_path: Path) -> None:
    out, said = find(tmp_path, str(tmp_path)).communicate()
    assert out == "False\n"
    assert said == (
        "WARNING:tml.native.library:rows are updated by torch, which takes longer: "
        "no C compiler found (cc, gcc, clang)\n"
    )


def test_a_compiler_that_fails_leaves_nothing_and_says_its_status(tmp_path: Path) -> None:
    compiler = tmp_path / "bin" / "cc"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\necho the cause >&2\nexit 3\n")
    compiler.chmod(0o755)
    out, said = find(tmp_path / "cache", str(compiler.parent)).communicate()
    assert out == "False\n"
    assert said.endswith(f"takes longer: {compiler} failed with status 3\n")
    assert [one.name for one in (tmp_path / "cache" / "tml").iterdir()] == [".lock"]


def test_a_compiler_that_hangs_is_ended_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text(f"#!/bin/sh\nsleep 600 &\necho $! >{tmp_path}/child\nwait\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(build, "find_compiler", lambda: str(compiler))
    monkeypatch.setattr(build, "PATIENCE_S", 0.5)
    with pytest.raises(build.CompileError, match="had not ended after"):
        build.compile_into(tmp_path / "cache")
    state = Path(f"/proc/{(tmp_path / 'child').read_text().strip()}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("content", ["", "no library", "of another"])
def test_a_damaged_library_in_the_cache_is_made_anew(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tml" / build.library_name()
    path.parent.mkdir()
    if content == "of another":
        (tmp_path / "a.c").write_text("int a;\n")
        command = [sys_cc(), "-shared", "-fPIC", str(tmp_path / "a.c"), "-o", str(path)]
        subprocess.run(command, check=True)
    else:
        path.write_text(content)
    assert find(tmp_path, os.environ["PATH"]).communicate() == ("True\n", "")


def test_a_cache_that_cannot_be_written_and_a_switch_are_respected(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    out, said = find(tmp_path / "file", os.environ["PATH"]).communicate()
    assert (out, "cannot be written" in said) == ("False\n", True)
    out, said = find(tmp_path, os.environ["PATH"], TML_NATIVE="0").communicate()
    assert (out, said, list(tmp_path.glob("tml"))) == ("False\n", "", [])


def test_the_name_changes_with_what_the_library_is_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.c").write_text("int a;\n")
    monkeypatch.setattr(build, "HERE", tmp_path)
    names = [build.library_name()]
    (tmp_path / "b.h").write_text("int b;\n")
    names.append(build.library_name())
    monkeypatch.setattr(build, "FLAGS", ("-O2",))
    names.append(build.library_name())
    assert len(set(names)) == 3
    assert names[2] == build.library_name()


# What it computes.


def tables(kind: str, dim: int, kernels: Kernels | None) -> RowTables:
    optimizer = OptimizerConfig.model_validate({kind: {"lr": 0.25}})
    made = RowTables([TableSpec("a", 300, dim, "fp32", optimizer, 1.0)])
    table = made._tables["a"]
    table.weight.normal_(generator=torch.Generator().manual_seed(1))
    table.kernels = kernels
    return made


@pytest.mark.parametrize("dim", [4, 16, 23, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_updates_equal_those_of_torch(kernels: Kernels, kind: str, dim: int) -> None:
    own, other = tables(kind, dim, kernels), tables(kind, dim, None)
    generator = torch.Generator().manual_seed(2)
    for lengths, rows in (([0, 1], 300), ([200, 0, 300, 7], 300), ([2000], 5)):
        ids = [torch.randint(rows, (n,), generator=generator) for n in lengths]
        gradients = [torch.randn(n, dim, generator=generator) for n in lengths]
        for each in (own, other):
            each._tables["a"].update_rows(ids, [one.clone() for one in gradients])
    for name, tensor in own.state().items():
        torch.testing.assert_close(tensor, other.state()[name], rtol=2e-5, atol=2e-5)


def test_a_row_changes_as_by_hand(kernels: Kernels) -> None:
    weight, accumulator = torch.zeros(3, 2), torch.tensor([0.0, 4.0, 0.0])
    ids = [torch.tensor([1, 2]), torch.tensor([1])]
    gradients = [torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[3.0, 2.0]])]
    kernels.update_rows("rowwise_adagrad", weight, accumulator, ids, gradients, 0.5, 0.0)
    # (4, 2) together: 4 + (16 + 4) / 2 = 14
    torch.testing.assert_close(accumulator, torch.tensor([0.0, 14.0, 0.0]))
    expected = -0.5 * torch.tensor([4.0, 2.0]) / 14**0.5
    torch.testing.assert_close(weight[1], expected)
    assert weight[0].tolist() == [0.0, 0.0]


def test_gradients_may_be_views_and_stay_as_they_are(kernels: Kernels) -> None:
    weight = torch.zeros(4, 3)
    wide = torch.arange(24.0).view(4, 6)
    gradients = [wide[:, 2:5], torch.ones(1).expand(2, 3)]
    before = [one.clone() for one in gradients]
    ids = [torch.arange(8)[::2] // 2, torch.tensor([0, 0])]
    kernels.update_rows("sgd", weight, None, ids, gradients, 1.0, 0.0)
    expected = -wide[:, 2:5]
    expected[0] -= 2
    assert weight.equal(expected)
    assert all(one.equal(other) for one, other in zip(gradients, before, strict=True))


def test_the_number_of_threads_changes_no_bit(
    kernels: Kernels, request: pytest.FixtureRequest
) -> None:
    found: list[Tensor] = []
    before = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(before))
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(3)
        made = tables("rowwise_adagrad", 20, kernels)
        ids = [torch.randint(40, (900,), generator=generator) for _ in range(2)]
        gradients = [torch.randn(900, 20, generator=generator) for _ in range(2)]
        made._tables["a"].update_rows(ids, gradients)
        found.append(made.state()["tables.a.weight"])
    assert found[0].equal(found[1])
    assert found[0].equal(found[2])


@pytest.mark.parametrize("columns", [1, 15, 16, 37])
def test_the_softmax_is_that_of_torch(kernels: Kernels, columns: int) -> None:
    generator = torch.Generator().manual_seed(4)
    scores = 8 * torch.randn(300, columns, generator=generator)
    positive, share = torch.randn(300, generator=generator), torch.rand(300, generator=generator)
    scores[3] = -torch.inf  # no negative is left
    scores[4], positive[5] = 900.0, 900.0
    joined = torch.cat([positive.unsqueeze(1), scores], dim=1).requires_grad_()
    expected = -joined.log_softmax(dim=1)[:, 0]
    (expected * share).sum().backward()
    assert joined.grad is not None
    loss, d_positive = kernels.softmax(scores, positive, share, -64.0)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(d_positive, joined.grad[:, 0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scores, joined.grad[:, 1:], rtol=2e-5, atol=1e-6)


def test_what_is_not_a_number_stays_so(kernels: Kernels) -> None:
    scores = torch.zeros(2, 20)
    scores[0, 7] = torch.nan
    loss, _ = kernels.softmax(scores, torch.zeros(2), torch.ones(2), -64.0)
    assert loss.isnan().tolist() == [True, False]


def test_accidental_hits_are_hidden_in_their_chunk_alone(kernels: Kernels) -> None:
    scores = torch.zeros(5, 3)  # chunks of 2, 2 and 1
    ids = torch.tensor([[7, 8, 7], [1, 7, 2], [4, 5, 6]])
    kernels.hide(scores, torch.tensor([7, 9, 7, 1, 4]), ids, 2)
    hidden = scores.isinf().nonzero().tolist()
    assert hidden == [[0, 0], [0, 2], [2, 1], [3, 0], [4, 0]]


def test_pairs_and_their_gradients_are_those_of_autograd(kernels: Kernels) -> None:
    generator = torch.Generator().manual_seed(5)
    n, dim = 600, 19  # several parts of 256, and relations that go on from one to the next
    lhs, rhs = (torch.randn(n, dim, generator=generator) for _ in range(2))
    offsets = torch.randn(5, dim, generator=generator)
    relation = torch.randint(4, (n,), generator=generator).sort().values
    of_moved, of_rhs = (torch.randn(n, dim, generator=generator) for _ in range(2))
    of_pairs = [torch.randn(n, generator=generator) for _ in range(2)]
    leaves = [one.clone().requires_grad_() for one in (lhs, rhs, offsets)]
    moved = leaves[0] + leaves[2][relation]
    pairs = (moved * leaves[1]).sum(dim=1), (leaves[0] * leaves[1]).sum(dim=1)
    own = kernels.pairs(lhs, rhs, offsets, relation)
    for one, other in zip(own, (moved, *pairs), strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-5, atol=1e-5)
    total = (moved * of_moved).sum() + (leaves[1] * of_rhs).sum()
    (total + (pairs[0] * of_pairs[0]).sum() + (pairs[1] * of_pairs[1]).sum()).backward()
    d_offsets = kernels.derive_pairs(lhs, rhs, offsets, relation, *of_pairs, of_moved, of_rhs)
    for found, leaf in zip((of_moved, of_rhs, d_offsets), leaves, strict=True):
        torch.testing.assert_close(found, leaf.grad, rtol=1e-4, atol=1e-4)
