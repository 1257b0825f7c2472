"""The compiled kernels as functions of torch tensors: float32 and int64, contiguous, on a CPU.

What they compute is said in the C files. They run on the threads of torch's own OpenMP runtime and
hold no lock of Python. Results do not depend on the number of threads.
"""

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from tml.native.library import FUNCTIONS, load_library

KINDS = ("sgd", "adagrad", "rowwise_adagrad")
"""Optimizers in the order of their numbers in rows.c."""
ROWS_A_PART = 256
"""Of scores.c."""

_pointer, _count, _real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class _Crew(ctypes.Structure):
    _fields_ = (("team", _pointer), ("threads", _count))


class _Part(ctypes.Structure):
    _fields_ = (("count", _count), ("stride", _count), ("ids", _pointer), ("gradient", _pointer))


_ARGUMENTS = {
    "tml_update_rows": [ctypes.c_int, _pointer, _pointer, _count, _count, _pointer, _real, _real],
    "tml_hide": [_pointer, _count, _count, _pointer, _pointer, _count],
    "tml_softmax": [_pointer, _count, _count, _pointer, _pointer, _real, _pointer, _pointer],
    "tml_pairs": [_count, _count, *[_pointer] * 7],
    "tml_derive_pairs": [_count, _count, *[_pointer] * 10],
}


assert set(_ARGUMENTS) == set(FUNCTIONS)


class Kernels:
    """The functions of a library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for name, arguments in _ARGUMENTS.items():
            function = getattr(library, name)
            function.argtypes = [ctypes.POINTER(_Crew), *arguments]
            function.restype = ctypes.c_int if name == "tml_update_rows" else None
        self._team = _team_of_torch()

    def update_rows(
        self,
        kind: str,
        weight: Tensor,
        accumulator: Tensor | None,
        ids: Sequence[Tensor],
        gradients: Sequence[Tensor],
        rate: float,
        eps: float,
    ) -> None:
        """Change the rows `ids`, (n_i,) each, of weight (N, D) and of its accumulator by their
        gradients, (n_i, D) each, of which those of a row are summed first. Gradients may be views
        and are left as they are.
        """
        dim = weight.shape[1]
        ids = [one.contiguous() for one in ids]
        gradients = [one if one.stride(-1) == 1 else one.contiguous() for one in gradients]
        parts = (_Part * len(ids))(
            *(
                _Part(len(one), gradient.stride(0), one.data_ptr(), gradient.data_ptr())
                for one, gradient in zip(ids, gradients, strict=True)
            )
        )
        assert all(one.shape == (len(i), dim) for i, one in zip(ids, gradients, strict=True))
        assert all(_is_plain(one, torch.int64) for one in ids)
        assert all(one.dtype == torch.float32 for one in gradients)
        assert _is_plain(weight)
        assert accumulator is None or _is_plain(accumulator)
        held = None if accumulator is None else accumulator.data_ptr()
        failed = self._library.tml_update_rows(
            self._crew(),
            KINDS.index(kind),
            weight.data_ptr(),
            held,
            dim,
            len(parts),
            parts,
            rate,
            eps,
        )
        if failed:
            number = sum(map(len, ids))
            raise MemoryError(
                f"the gradients of {number:,} rows cannot be summed: no memory, or more than 2^31"
            )

    def hide(self, scores: Tensor, true_ids: Tensor, ids: Tensor, chunk_size: int) -> None:
        """scores (n, K) become −∞ where true_ids (n,) is that of the chunk's candidate, ids
        (chunks, K).
        """
        assert _is_plain(scores)
        assert all(_is_plain(one, torch.int64) for one in (true_ids, ids))
        assert true_ids.shape == scores.shape[:1]
        assert ids.shape == (-(-len(true_ids) // chunk_size), scores.shape[1])
        self._library.tml_hide(
            self._crew(), scores.data_ptr(), *scores.shape, true_ids.data_ptr(), ids.data_ptr(),
            chunk_size,
        )  # fmt: skip

    def softmax(
        self, scores: Tensor, positive: Tensor, share: Tensor, least: float
    ) -> tuple[Tensor, Tensor]:
        """log(e^p + Σ e^x_k) − p of each row (n,), and its derivative by p times share (n,); scores
        (n, K) become theirs. e^least is the smallest of the exponentials, of which the largest is
        1.
        """
        assert all(map(_is_plain, (scores, positive, share)))
        assert positive.shape == share.shape == scores.shape[:1]
        loss, d_positive = torch.empty_like(positive), torch.empty_like(positive)
        self._library.tml_softmax(
            self._crew(), scores.data_ptr(), *scores.shape, positive.data_ptr(), share.data_ptr(),
            least, loss.data_ptr(), d_positive.data_ptr(),
        )  # fmt: skip
        return loss, d_positive

    def pairs(
        self, lhs: Tensor, rhs: Tensor, offsets: Tensor, relation: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """lhs + b (n, D), ⟨lhs + b, rhs⟩ (n,) and ⟨lhs, rhs⟩ (n,) of lhs, rhs (n, D), where b are
        the rows `relation` (n,) of offsets (R, D).
        """
        assert all(map(_is_plain, (lhs, rhs, offsets)))
        assert _is_plain(relation, torch.int64)
        assert lhs.shape == rhs.shape == (len(relation), offsets.shape[1])
        moved = torch.empty_like(lhs)
        with_offset, without = lhs.new_empty(len(lhs)), lhs.new_empty(len(lhs))
        given = (lhs, rhs, offsets, relation, moved, with_offset, without)
        self._library.tml_pairs(self._crew(), *lhs.shape, *(one.data_ptr() for one in given))
        return moved, with_offset, without

    def derive_pairs(
        self,
        lhs: Tensor,
        rhs: Tensor,
        offsets: Tensor,
        relation: Tensor,
        d_with_offset: Tensor,
        d_without: Tensor,
        d_lhs: Tensor,
        d_rhs: Tensor,
    ) -> Tensor:
        """Backward of `pairs`: gradient of offsets (R, D). d_lhs (n, D), which is that of the moved
        rows from elsewhere, and d_rhs (n, D), that of rhs from elsewhere, become those of lhs and
        rhs. Equal relations should lie together.
        """
        plain = (lhs, rhs, offsets, d_with_offset, d_without, d_lhs, d_rhs)
        assert all(map(_is_plain, plain))
        assert _is_plain(relation, torch.int64)
        assert lhs.shape == rhs.shape == d_lhs.shape == d_rhs.shape
        assert len(relation) == len(lhs) == len(d_with_offset) == len(d_without)
        begins = torch.ones(len(lhs), dtype=torch.bool)
        torch.ne(relation[1:], relation[:-1], out=begins[1:])
        begins[::ROWS_A_PART] = True
        first_run = (begins.cumsum(0) - 1)[::ROWS_A_PART].contiguous()
        of_run = relation[begins]
        sums = lhs.new_empty(len(of_run), lhs.shape[1])
        given = (
            lhs, rhs, offsets, relation, d_with_offset, d_without, first_run, d_lhs, d_rhs, sums
        )  # fmt: skip
        self._library.tml_derive_pairs(self._crew(), *lhs.shape, *(one.data_ptr() for one in given))
        return torch.zeros_like(offsets).index_add_(0, of_run, sums)

    def _crew(self) -> _Crew:
        return _Crew(self._team, torch.get_num_threads())


@functools.cache
def load_kernels() -> Kernels | None:
    """The kernels; None where torch must do."""
    library = load_library()
    return None if library is None else Kernels(library)


def _is_plain(tensor: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    return tensor.dtype == dtype and tensor.is_contiguous() and tensor.device.type == "cpu"


def _team_of_torch() -> int | None:
    """Address of GOMP_parallel, by which an OpenMP runtime that torch has brought lends its
    threads; None: one thread.
    """
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, _pointer).value
    except AttributeError:
        return None
