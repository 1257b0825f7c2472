"""TFRecord files: framing, both crcs, gzip; read in blocks of bounded memory (`TFRecordReader`),
written record by record (`TFRecordWriter`).

A record is framed as (all numbers little-endian)

    uint64 length | uint32 masked crc32c of those 8 bytes | data | uint32 masked crc32c of data

with masked(crc) = rotate_right(crc, 15) + 0xa282ead8. A file is such records end to end, as they
are or in one or several gzip members; which of the two is seen from its first bytes, not from its
name. Offsets in messages are of the uncompressed stream.
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Protocol, Self

import google_crc32c
import numpy as np
from isal import igzip_lib, isal_zlib
from numpy.typing import NDArray

from tml.data.parquet import DataError

PADDING = 16
"""Bytes behind the last record of a block that may be read, so that words can be loaded whole."""
MAX_RECORD_BYTES = (1 << 31) - 1
"""Protocol buffers end here; a length above it is nonsense."""
BLOCK_BYTES = 1 << 23
"""A block takes no further record once it is as large as this."""

BAD_RECORD = "bad record"
"""Kind of fault: one record cannot be used."""
REST_LOST = "rest of a file"
"""Kind of fault: nothing behind a place in a file can be read."""

OnFault = Callable[[str, str], None]
"""Called with the kind of a fault (BAD_RECORD, REST_LOST) and the message about it."""

_HEADER = struct.Struct("<QI")
_LENGTH = struct.Struct("<Q")
_CRC = struct.Struct("<I")
_CHUNK = 1 << 20
_DAMAGED: type[Exception] = igzip_lib.error  # type: ignore[assignment]  # its stub says instance
_GZIP_MAGIC = b"\x1f\x8b"
_IGNORE = "or set ignore_data_errors"


def masked_crc(data: bytes | NDArray[np.uint8]) -> int:
    """The masked crc32c of `data` as TFRecord files hold it."""
    crc: int = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def frame(data: bytes) -> bytes:
    """One record as it lies in a file."""
    length = _LENGTH.pack(len(data))
    return b"".join(
        (length, _CRC.pack(masked_crc(length)), data, _CRC.pack(masked_crc(data))),
    )


@dataclass(frozen=True)
class Block:
    """Some records of one file."""

    buffer: NDArray[np.uint8]
    """Holds the records and at least PADDING bytes more."""
    starts: NDArray[np.int64]
    """(n,) first byte of each record in `buffer`."""
    lengths: NDArray[np.int64]
    """(n,) bytes of each record."""
    numbers: NDArray[np.int64]
    """(n,) number of each record in its file, from 0."""
    path: str

    def __len__(self) -> int:
        return len(self.starts)

    def record(self, index: int) -> bytes:
        """The bytes of one record."""
        start = int(self.starts[index])
        return self.buffer[start : start + int(self.lengths[index])].tobytes()

    @classmethod
    def of(cls, records: list[bytes], path: str = "memory") -> Self:
        """A block of records that are in memory."""
        lengths = np.array([len(record) for record in records], dtype=np.int64)
        starts = np.cumsum(lengths) - lengths
        buffer = np.frombuffer(b"".join((*records, bytes(PADDING))), dtype=np.uint8)
        return cls(buffer, starts, lengths, np.arange(len(records)), path)


class TFRecordReader:
    """The records of one file, in blocks; memory is bounded by the block, not by the file.

    first: records before this number are passed over (a gzip file is inflated up to there).
    part, parts: of the others, those whose number modulo `parts` is `part`.
    on_fault: called for each fault; a record with a bad crc is then left out, and the file counts
    as ended where its framing or its compression breaks. Unset: faults raise DataError, after the
    whole records before them were read.
    buffer: of a reader that is closed, to be used again: fresh memory costs as much as decoding.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        first: int = 0,
        part: int = 0,
        parts: int = 1,
        on_fault: OnFault | None = None,
        buffer: NDArray[np.uint8] | None = None,
    ) -> None:
        self.path = str(path)
        self.next_record = 0
        """Number of the record that the next block begins with."""
        self._first, self._part, self._parts = first, part, parts
        self._on_fault = on_fault
        self._fault: str | None = None
        self._source: _Source | None = None
        self._finished = False
        self._buffer = np.empty(2 * _CHUNK, dtype=np.uint8) if buffer is None else buffer
        self._begin = self._end = 0  # what is read and not yet given out
        self._base = 0  # offset in the stream of buffer[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; there is nothing to read any more."""
        self._finished = True
        if self._source is not None:
            self._source.close()

    @property
    def buffer(self) -> NDArray[np.uint8]:
        """The memory that blocks lie in."""
        return self._buffer

    def read(self, max_records: int) -> Block | None:
        """The next records, `max_records` at most, perhaps none; None at the end of the file.

        The block's buffer is used again by the next call.
        """
        if self._fault is not None:
            self._end_with_fault(self._fault)
        if self._finished:
            return None
        if self._source is None:
            self._source = self._open()
        self._compact()
        starts: list[int] = []
        lengths: list[int] = []
        numbers: list[int] = []
        position = 0
        while len(starts) < max_records and position < BLOCK_BYTES:
            found = self._next_length(position)
            if found is None:
                break
            start = position + _HEADER.size
            if self._wants(self.next_record) and self._data_is_good(start, found):
                starts.append(start)
                lengths.append(found)
                numbers.append(self.next_record)
            position = start + found + _CRC.size
            self._begin = position
            self.next_record += 1
        if not starts and self._finished:
            if self._fault is not None:
                self._end_with_fault(self._fault)
            return None
        where = np.array((starts, lengths, numbers), dtype=np.int64)
        return Block(self._buffer, where[0], where[1], where[2], self.path)

    def _wants(self, number: int) -> bool:
        return number >= self._first and number % self._parts == self._part

    def _open(self) -> "_Source":
        try:
            file = open(self.path, "rb", buffering=0)  # noqa: SIM115  closed by close()
            head = file.read(_HEADER.size)
            file.seek(0)
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror or error}") from error
        # A plain file may begin like gzip: a length of 35,615 does. Its crc tells.
        if head.startswith(_GZIP_MAGIC) and not _is_header(head):
            return _Gzip(file)
        source = _Plain(file)
        if not head and self.path.endswith(".gz"):
            source.fault = "the file is empty; a gzip file of no records is not, so it is cut short"
        return source

    def _compact(self) -> None:
        """Move what is left to the front of the buffer."""
        left = self._end - self._begin
        self._buffer[:left] = self._buffer[self._begin : self._end].copy()
        self._base += self._begin
        self._begin, self._end = 0, left

    def _fill(self, position: int) -> bool:
        """Have the buffer hold all bytes before `position`; whether the file has so many."""
        assert self._source is not None
        while self._end < position:
            room = max(position - self._end, _CHUNK)
            # By steps: a nonsensical length must not cost memory that the file cannot fill.
            room = min(room, max(_CHUNK, self._end))
            if self._end + room + PADDING > len(self._buffer):
                larger = np.empty(
                    max(self._end + room + PADDING, len(self._buffer) * 3 // 2), dtype=np.uint8
                )
                larger[: self._end] = self._buffer[: self._end]
                self._buffer = larger
            try:
                count = self._source.read_into(self._buffer[self._end : self._end + room])
            except OSError as error:
                raise DataError(f"{self.path} cannot be read: {error}") from error
            if not count:
                return False
            self._end += count
        return True

    def _next_length(self, position: int) -> int | None:
        """Length of the record framed at `position`, which then lies in the buffer; None where the
        file ends, well or not.
        """
        assert self._source is not None
        if not self._fill(position + _HEADER.size):
            self._finish(position, "header")
            return None
        header = self._buffer[position : position + _HEADER.size].tobytes()
        length, crc = _HEADER.unpack(header)
        if masked_crc(header[: _LENGTH.size]) != crc:
            self._stop_at_bad_length(position, length)
            return None
        if length > MAX_RECORD_BYTES:
            self._stop(
                f"{self._where(position)} claims {length:,} bytes, more than any record may have "
                f"({MAX_RECORD_BYTES:,})"
            )
            return None
        if not self._fill(position + _HEADER.size + length + _CRC.size):
            self._finish(position, f"record of {length:,} bytes")
            return None
        return int(length)

    def _data_is_good(self, start: int, length: int) -> bool:
        stop = start + length
        (crc,) = _CRC.unpack(self._buffer[stop : stop + _CRC.size].tobytes())
        found = masked_crc(self._buffer[start:stop])
        if found == crc:
            return True
        message = (
            f"{self._where(start - _HEADER.size)}: the crc of its {length:,} bytes is "
            f"{found:#010x}, the file says {crc:#010x}: the record is damaged; write the file "
            f"again, {_IGNORE} to leave such records out"
        )
        if self._on_fault is None:
            raise DataError(message)
        self._on_fault(BAD_RECORD, message)
        return False

    def _where(self, position: int) -> str:
        return f"{self.path}, record {self.next_record:,} at byte {self._base + position:,}"

    def _finish(self, position: int, cut: str) -> None:
        """The source has ended: at `position`, or within what is called `cut`."""
        assert self._source is not None
        left = self._end - position
        if self._source.fault is not None:
            self._stop(f"{self._where(position)}: {self._source.fault}")
        elif left and self.next_record == 0 and left < _HEADER.size:
            self._stop(f"{self.path} is not a TFRecord file: it is {left} bytes long")
        elif left:
            self._stop(f"{self._where(position)}: the file ends {left:,} bytes into its {cut}")
        self._finished = True

    def _stop_at_bad_length(self, position: int, length: int) -> None:
        if self.next_record == 0:
            self._stop(
                f"{self.path} is not a TFRecord file (plain or GZIP): its first bytes are no "
                "record's length with its crc"
            )
        else:
            self._stop(
                f"{self._where(position)}: the crc of its length ({length:,}) is wrong, so it is "
                "not known where the next record begins"
            )

    def _stop(self, message: str) -> None:
        self._finished = True
        self._fault = (
            f"{message}; {self.next_record:,} whole records lie before it; write the file again, "
            f"{_IGNORE} to go on with the next file"
        )

    def _end_with_fault(self, message: str) -> None:
        self._fault = None
        self.close()
        if self._on_fault is None:
            raise DataError(message)
        self._on_fault(REST_LOST, message)


def read_blocks(
    path: str | Path, max_records: int = 256, on_fault: OnFault | None = None
) -> Iterator[Block]:
    """All records of a file in blocks; see `TFRecordReader.read`."""
    with TFRecordReader(path, on_fault=on_fault) as reader:
        while (block := reader.read(max_records)) is not None:
            if len(block):
                yield block


class TFRecordWriter:
    """Writes one file; the same records give the same bytes.

    level: of gzip, 0 (fast) to 3 (small), as ISA-L counts.
    """

    def __init__(
        self, path: str | Path, compression: Literal["gzip"] | None = "gzip", level: int = 1
    ) -> None:
        self._file = open(path, "wb")  # noqa: SIM115  closed by close()
        self._compressor: Any = None
        if compression == "gzip":
            self._compressor = isal_zlib.compressobj(level, wbits=31)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def write(self, record: bytes) -> None:
        """Append one record."""
        framed = frame(record)
        self._file.write(self._compressor.compress(framed) if self._compressor else framed)

    def close(self) -> None:
        """Write what is left and close the file."""
        if self._file.closed:
            return
        if self._compressor is not None:
            self._file.write(self._compressor.flush())
        self._file.close()


class _Source(Protocol):
    """The uncompressed bytes of a file."""

    fault: str | None
    """What ended the bytes early."""

    def read_into(self, room: NDArray[np.uint8]) -> int:
        """Put bytes into `room`, as many as come at once; 0 at the end."""

    def close(self) -> None:
        """Close the file."""


class _Plain:
    """A file as it is."""

    def __init__(self, file: Any) -> None:
        self.fault: str | None = None
        self._file = file
        self.close = file.close

    def read_into(self, room: NDArray[np.uint8]) -> int:
        return int(self._file.readinto(room))


class _Gzip:
    """The members of a gzip file, inflated."""

    def __init__(self, file: BinaryIO) -> None:
        self.fault: str | None = None
        self._file = file
        self._inflater = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
        self._input = b""
        self.close = file.close

    def read_into(self, room: NDArray[np.uint8]) -> int:
        while self.fault is None:
            if self._inflater.eof and not self._next_member():
                return 0
            if not self._input and self._inflater.needs_input:
                self._input = self._file.read(_CHUNK // 4)
                if not self._input:
                    self.fault = "the gzip file is cut short"
                    return 0
            given, self._input = self._input, b""
            try:
                data = self._inflater.decompress(given, len(room))
            except _DAMAGED as error:
                self.fault = f"the gzip file is damaged behind it ({error})"
                return 0
            if data:
                room[: len(data)] = np.frombuffer(data, dtype=np.uint8)
                return len(data)
        return 0

    def _next_member(self) -> bool:
        """Get ready for the member behind the one that ended; False at the end of the file."""
        # Between and behind members there may be zeros: tapes are padded with them.
        rest = self._inflater.unused_data.lstrip(b"\0")
        while len(rest) < len(_GZIP_MAGIC):
            more = self._file.read(_CHUNK // 4)
            if not more:
                break
            rest = (rest + more).lstrip(b"\0")
        if not rest:
            return False
        if not rest.startswith(_GZIP_MAGIC):
            self.fault = "bytes that are not gzip lie behind the gzip stream"
            return False
        self._inflater = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
        self._input = rest
        return True


def _is_header(head: bytes) -> bool:
    if len(head) < _HEADER.size:
        return False
    _, crc = _HEADER.unpack(head)
    return bool(masked_crc(head[: _LENGTH.size]) == crc)
