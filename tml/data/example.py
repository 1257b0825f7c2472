"""tf.train.Example ↔ arrays, without TensorFlow: `ExampleDecoder` for blocks of records,
`encode_examples` for the way back.

An Example is a map from feature names to a list of one of three kinds:

    Example  { Features features = 1; }
    Features { map<string, Feature> feature = 1; }      entry: { key = 1; value = 2 }
    Feature  { oneof { BytesList bytes_list = 1; FloatList float_list = 2;
                       Int64List int64_list = 3 } }
    *List    { repeated … value = 1; }                  numbers packed or not

Decoding goes over all records of a block at once: one numpy step per entry of the maps, then each
feature of all records together. That takes the layout which every writer in use produces: fields in
order, no unknown ones, lists packed. A record in any other valid layout (unpacked lists, several
chunks, unknown fields, a map in parts) is first written anew in that layout, by `_canonical`; a map
entry given twice counts as the last one, as protocol buffers have it.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tml.data.parquet import DataError
from tml.data.tfrecord import PADDING, Block

Dtype = Literal["int64_list", "float_list", "bytes_list"]
VARIABLE = -1

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]
Words = NDArray[np.uint64]
Bools = NDArray[np.bool_]

_KINDS: dict[Dtype, int] = {"bytes_list": 1, "float_list": 2, "int64_list": 3}
_KIND_NAMES = {0: "no list", 1: "bytes_list", 2: "float_list", 3: "int64_list"}
_DTYPES: dict[Dtype, Any] = {"bytes_list": object, "float_list": np.float32, "int64_list": np.int64}
_LENGTH_DELIMITED = 2
_LIST_TAG = 0x0A  # field 1, length-delimited: in every message here
_VALUE_TAG = 0x12  # field 2, length-delimited


@dataclass(frozen=True)
class ExampleFeature:
    """One feature that is decoded."""

    name: str
    dtype: Dtype
    length: int
    """Values of each record; VARIABLE: any number."""
    default: Any = None
    """Value, or array of `length` values, where a record lacks the feature. Unset: that is an
    error. A feature of variable length that is absent is an empty list.
    """
    keep: int | None = None
    """Only the first so many values are decoded. Unset: all. Not for variable length."""

    @property
    def width(self) -> int:
        """Columns of the decoded array, where the length is not variable."""
        return self.length if self.keep is None else min(self.keep, self.length)


@dataclass(frozen=True)
class Lists:
    """Lists of values, one a record, end to end."""

    values: NDArray[Any]
    offsets: Ints
    """(n + 1,); list i is values[offsets[i]:offsets[i + 1]]."""

    def __len__(self) -> int:
        return len(self.offsets) - 1


Column = NDArray[Any] | Lists


@dataclass
class Decoded:
    """The records of a block that could be decoded."""

    columns: dict[str, Column]
    """Feature → (n, width) float32, int64 or object (bytes), or Lists of n."""
    numbers: Ints
    """(n,) number of each record in its file."""
    faults: list[str] = field(default_factory=list)
    """One message for each record that could not be decoded."""


class ExampleDecoder:
    """Decodes `features`; others are passed over."""

    def __init__(self, features: Sequence[ExampleFeature]) -> None:
        self.features = tuple(features)
        by_length: dict[int, list[tuple[bytes, int]]] = {}
        for index, feature in enumerate(self.features):
            name = feature.name.encode()
            by_length.setdefault(len(name), []).append((name, index))
        self._names = by_length
        self._scalars = [
            index
            for index, feature in enumerate(self.features)
            if feature.dtype == "int64_list" and feature.length == feature.width == 1
        ]

    def decode(self, block: Block) -> Decoded:
        """All records of `block`; those that cannot be decoded become `faults`."""
        spans, odd = self._find_spans(block)
        if odd.any():
            return self._decode_odd(block, spans, odd)
        return self._decode_spans(block, spans)

    def _decode_odd(self, block: Block, spans: "_Spans", odd: Bools) -> Decoded:
        """Some records are not in the usual layout: write these anew, decode the two sorts apart
        and put the rows together in order.
        """
        records, numbers, faults = [], [], []
        for index in np.flatnonzero(odd).tolist():
            number = int(block.numbers[index])
            try:
                records.append(_canonical(block.record(index)))
                numbers.append(number)
            except _MalformedError as error:
                faults.append(
                    f"{block.path}, record {number:,}: is not a tf.train.Example: {error}"
                )
        plain = ~odd
        usual = Block(
            block.buffer,
            block.starts[plain],
            block.lengths[plain],
            block.numbers[plain],
            block.path,
        )
        parts = [self._decode_spans(usual, spans.of_records(plain))]
        if records:
            made = Block.of(records, block.path)
            made = Block(made.buffer, made.starts, made.lengths, np.array(numbers), made.path)
            spans, still_odd = self._find_spans(made)
            assert not still_odd.any(), "records that were written anew have the usual layout"
            parts.append(self._decode_spans(made, spans))
        decoded = concatenate(parts)
        decoded = take(decoded, np.argsort(decoded.numbers, kind="stable"))
        decoded.faults += faults
        return decoded

    # Where the lists are

    def _find_spans(self, block: Block) -> tuple["_Spans", Bools]:
        """Where the lists of all features are, and which records are not in the usual layout."""
        words = _words(block.buffer)
        count = len(block)
        odd = np.zeros(count, dtype=bool)
        spans = _Spans.empty(count, len(self.features))
        if not count:
            return spans, odd
        record, start, stop = _walk_entries(words, block.starts, block.lengths, odd)
        # The key: its length is below 128 in `key_start − start == 2`, else it is longer.
        key_start, key_stop, tag = _delimited(words, start)
        good = (tag == _LIST_TAG) & (key_stop < stop)
        odd[record[~good]] = True
        which = np.full(len(record), -1)
        key_lengths = key_stop - key_start
        for length, names in self._names.items():
            found = np.flatnonzero(good & (key_lengths == length))
            if len(found):
                keys = _gather(block.buffer, key_start[found], length)
                for name, index in names:
                    which[found[keys == np.void(name)]] = index
        chosen = np.flatnonzero(which >= 0)
        record, stop, which = record[chosen], stop[chosen], which[chosen]
        # The value, in it the list, in it (for numbers) one packed chunk.
        value_start, value_stop, tag = _delimited(words, key_stop[chosen])
        odd[record[(tag != _VALUE_TAG) | (value_stop != stop)]] = True
        list_start, list_stop, tag = _delimited(words, np.minimum(value_start, stop))
        no_kind = value_start == stop
        kind = (tag >> 3).astype(np.int64)
        usual = (tag & 7 == _LENGTH_DELIMITED) & (kind >= 1) & (kind <= 3) & (list_stop == stop)
        odd[record[~(usual | no_kind)]] = True
        kind[no_kind] = 0
        data_start, data_stop, tag = _delimited(words, np.minimum(list_start, stop))
        no_values = no_kind | (list_start == stop)
        packed = (tag == _LIST_TAG) & (data_stop == stop)
        odd[record[~packed & ~no_values & (kind != _KINDS["bytes_list"])]] = True
        # Byte strings are taken apart one by one, from the list's beginning.
        data_start = np.where(kind == _KINDS["bytes_list"], list_start, data_start)
        # An assignment to one place several times keeps the last: an entry given twice.
        spans.start[record, which] = np.where(no_values, stop, data_start)
        spans.stop[record, which] = stop
        spans.kind[record, which] = kind
        return spans, odd

    # What is in them

    def _decode_spans(self, block: Block, spans: "_Spans") -> Decoded:
        faults = _Faults(block, self.features)
        columns = self._decode_scalars(block, spans)
        for index, feature in enumerate(self.features):
            if feature.name in columns:
                continue
            present = spans.kind[:, index] > 0
            wrong = present & (spans.kind[:, index] != _KINDS[feature.dtype])
            faults.add_kinds(index, wrong, spans.kind[:, index])
            if feature.length != VARIABLE and feature.default is None:
                faults.add_absent(index, ~present)
            rows = np.flatnonzero(present & ~wrong)
            start, stop = spans.start[rows, index], spans.stop[rows, index]
            values, counts, bad = _READERS[feature.dtype](block.buffer, start, stop, feature)
            if bad.any():
                faults.add_malformed(index, rows[bad])
            if feature.length == VARIABLE:
                columns[feature.name] = _spread_lists(values, counts, rows, len(block))
            else:
                short = (counts != feature.length) & ~bad
                faults.add_lengths(index, rows[short], counts[short])
                columns[feature.name] = _spread(values, rows, len(block), feature)
        decoded = Decoded(columns, block.numbers)
        if faults.any():
            decoded = take(decoded, np.flatnonzero(~faults.rows))
            decoded.faults = faults.messages()
        return decoded

    def _decode_scalars(self, block: Block, spans: "_Spans") -> dict[str, Column]:
        """Features of one whole number, all in one go. Those that are not as they should be in some
        record are left to the general way.
        """
        if not len(self._scalars) or not len(block):
            return {}
        starts = spans.start[:, self._scalars].T
        sizes = spans.stop[:, self._scalars].T - starts
        kinds = spans.kind[:, self._scalars].T
        usual = (kinds == _KINDS["int64_list"]) & (sizes > 0) & (sizes <= 10)
        # One value ends where the list ends: no byte before it ends a value.
        ends = block.buffer[np.where(usual, starts + sizes - 1, 0)] < 0x80
        safe = np.where(usual, starts, 0).ravel()
        word = _words(block.buffer)[safe].reshape(sizes.shape)
        inner = _FIRST_BYTES[np.where(usual, sizes, 1) - 1] & _MORE
        usual &= ends & (word & inner == inner)
        usual &= (sizes < 10) | (block.buffer[np.where(usual, starts + 8, 0)] >= 0x80)
        columns: dict[str, Column] = {}
        rows = np.flatnonzero(usual.all(axis=1))
        values = _varints(block.buffer, starts[rows].ravel(), sizes[rows].ravel())
        for row, column in zip(
            rows.tolist(), values.reshape(len(rows), len(block), 1), strict=True
        ):
            columns[self.features[self._scalars[row]].name] = column
        return columns


@dataclass
class _Spans:
    """Where the list of each feature of each record is: (records, features) each."""

    start: Ints
    stop: Ints
    kind: Ints
    """1 bytes, 2 float, 3 int64; 0 where there is no list, −1 where there is no entry."""

    @classmethod
    def empty(cls, records: int, features: int) -> "_Spans":
        zeros = np.zeros((2, records, features), dtype=np.int64)
        return cls(zeros[0], zeros[1], np.full((records, features), -1))

    def of_records(self, chosen: Bools) -> "_Spans":
        return _Spans(self.start[chosen], self.stop[chosen], self.kind[chosen])


def _walk_entries(words: Words, starts: Ints, lengths: Ints, odd: Bools) -> tuple[Ints, Ints, Ints]:
    """The entries of the maps of all records: (record, start, stop) of each. Records that are not
    one Features message are marked in `odd`.
    """
    ends = starts + lengths
    position, stop, tag = _delimited(words, starts)
    odd |= ((tag != _LIST_TAG) | (stop != ends)) & (lengths > 0)
    position = np.where(lengths > 0, position, ends)
    rows = np.flatnonzero(~odd & (position < ends))
    records, begins, stops = [rows[:0]], [rows[:0]], [rows[:0]]
    position, ends = position[rows], ends[rows]
    while len(rows):
        begin, position, tag = _delimited(words, position)
        bad = (tag != _LIST_TAG) | (position > ends)
        if bad.any():
            odd[rows[bad]] = True
        records.append(rows)
        begins.append(begin)
        stops.append(position)
        going = (position < ends) & ~bad
        if not going.all():
            rows, position, ends = rows[going], position[going], ends[going]
    record = np.concatenate(records)
    begin, stop = np.concatenate(begins), np.concatenate(stops)
    if odd.any():
        kept = ~odd[record]
        record, begin, stop = record[kept], begin[kept], stop[kept]
    return record, begin, stop


def _words(buffer: Bytes) -> Words:
    """The 8 bytes from each byte on, as one number."""
    return np.ndarray((len(buffer) - 7,), dtype="<u8", buffer=buffer.data, strides=(1,))


def _gather(buffer: Bytes, starts: Ints, length: int) -> NDArray[np.void]:
    """(n,) stretches of `length` bytes."""
    view: NDArray[np.void] = np.ndarray(
        (len(buffer) - length + 1,), dtype=f"V{length}", buffer=buffer.data, strides=(1,)
    )
    return view[starts]


def _delimited(words: Words, positions: Ints) -> tuple[Ints, Ints, Words]:
    """A length-delimited field at each position: start and stop of its content, and its tag of one
    byte. What is no such field has a stop far away.
    """
    word = words[positions]
    tag = word & np.uint64(0xFF)
    rest = word >> np.uint64(8)
    # The lowest byte without a continuation bit ends the varint: 5 bytes hold any length.
    end = ~rest & np.uint64(0x8080808080)
    end &= ~end + np.uint64(1)
    before_end = end - np.uint64(1)
    length = _seven_bits(rest & before_end).astype(np.int64)
    length[end == 0] = 1 << 40
    # The end bit is bit 7, 15, … of the varint, and so many bits lie before it.
    num_bytes = (np.bitwise_count(before_end).astype(np.int64) + 1) >> 3
    start = positions + 1 + num_bytes
    return start, start + length, tag


def _seven_bits(word: Words, num_bytes: int = 8) -> Words:
    """The low 7 bits of the first `num_bytes` of 8 bytes, pushed together."""
    word = word & np.uint64(0x7F7F7F7F7F7F7F7F)
    for bits, low, reach in _SQUEEZES:
        if num_bytes > reach:
            high = word & ~low
            high >>= bits
            word &= low
            word |= high
    return word


# Neighbours of 7 bits become one of 14, these one of 28, these one of 56. (bits to close, low
# halves, bytes that need no such step)
_SQUEEZES = (
    (np.uint64(1), np.uint64(0x007F007F007F007F), 1),
    (np.uint64(2), np.uint64(0x00003FFF00003FFF), 2),
    (np.uint64(4), np.uint64(0x000000000FFFFFFF), 4),
)
_FIRST_BYTES = np.array([(1 << (8 * min(size, 8))) - 1 for size in range(11)], dtype=np.uint64)
"""Mask of the first `size` bytes of 8."""
_MORE = np.uint64(0x8080808080808080)
"""The bits that say of each byte that its varint goes on."""


# Each reader: buffer, starts and stops of the lists → (values, number of values of each list, which
# lists are malformed). Values are (n, width), or end to end where the length is variable.


def _read_floats(
    buffer: Bytes, starts: Ints, stops: Ints, feature: ExampleFeature
) -> tuple[NDArray[Any], Ints, Bools]:
    sizes = stops - starts
    bad = sizes % 4 != 0
    counts = sizes // 4
    if feature.length == VARIABLE:
        good = ~bad
        data = _join(buffer, starts[good], stops[good])
        return data.view(np.float32), np.where(bad, 0, counts), bad
    # Lists of another length are reported by the caller; anything may be put into their rows.
    safe = np.where(counts == feature.length, starts, 0)
    if feature.width == 0 or not len(starts) or not (counts == feature.length).any():
        return np.zeros((len(starts), feature.width), np.float32), counts, bad
    values = _gather(buffer, safe, 4 * feature.width).view(np.float32)
    return values.reshape(len(starts), feature.width), counts, bad


def _read_ints(
    buffer: Bytes, starts: Ints, stops: Ints, feature: ExampleFeature
) -> tuple[NDArray[Any], Ints, Bools]:
    if feature.length == VARIABLE:
        return _decode_varints(buffer, starts, stops)
    counts = np.full(len(starts), feature.length)
    bad = np.zeros(len(starts), dtype=bool)
    values = np.zeros((len(starts), feature.width), dtype=np.int64)
    # As many bytes as values: each value has one.
    short = stops - starts == feature.length
    rows = np.flatnonzero(short)
    if len(rows) and feature.length:
        small = _gather(buffer, starts[rows], feature.length).view(np.uint8)
        small = small.reshape(len(rows), feature.length)
        if int(small.max()) >= 0x80:
            single = small.max(axis=1) < 0x80
            short[rows[~single]] = False
            rows, small = rows[single], small[single]
        values[rows] = small[:, : feature.width]
    rows = np.flatnonzero(~short)
    if len(rows):
        decoded, counts[rows], bad[rows] = _decode_varints(
            buffer, starts[rows], stops[rows], feature
        )
        values[rows] = decoded
    return values, counts, bad


def _decode_varints(
    buffer: Bytes, starts: Ints, stops: Ints, feature: ExampleFeature | None = None
) -> tuple[NDArray[Any], Ints, Bools]:
    """Packed varints. With a feature of fixed length, only its first columns are decoded: (n,
    width), zeros in lists of another length.
    """
    # A list that ends within a value would run into the next one: it is taken for empty.
    bad = (stops > starts) & (buffer[np.maximum(stops - 1, 0)] >= 0x80)
    stops = np.where(bad, starts, stops)
    data = np.concatenate([_join(buffer, starts, stops), np.zeros(PADDING, dtype=np.uint8)])
    bounds = np.concatenate([[0], np.cumsum(stops - starts)])
    last = np.flatnonzero(data[: bounds[-1]] < 0x80)  # last byte of each value
    first = np.empty_like(last)
    if len(last):
        first[0] = 0
        first[1:] = last[:-1] + 1
    sizes = last - first + 1
    index = np.searchsorted(last, bounds)  # values before each list
    counts = np.diff(index)
    if len(sizes) and int(sizes.max()) > 10:  # no number has so many bytes
        long = np.flatnonzero(sizes > 10)
        bad[np.searchsorted(bounds, last[long], side="right") - 1] = True
    if feature is None:
        if bad.any():
            kept = np.repeat(~bad, counts)
            first, sizes = first[kept], sizes[kept]
        return _varints(data, first, sizes), np.where(bad, 0, counts), bad
    good = (counts == feature.length) & ~bad
    values = np.zeros((len(starts), feature.width), dtype=np.int64)
    if good.any():
        if not good.all() or feature.width < feature.length:
            chosen = (index[:-1][good][:, None] + np.arange(feature.width)).ravel()
            first, sizes = first[chosen], sizes[chosen]
        decoded = _varints(data, first, sizes)
        values[good] = decoded.reshape(-1, feature.width)
    return values, counts, bad


def _varints(data: Bytes, first: Ints, sizes: Ints) -> Ints:
    """The varints of `sizes` bytes at `first`; `data` has PADDING bytes behind them."""
    if not len(first):
        return np.empty(0, dtype=np.int64)
    longest = int(sizes.max())
    if longest == 1:
        return data[first].astype(np.int64)
    word = _words(data)[first]
    word &= _FIRST_BYTES[sizes]
    value = _seven_bits(word, min(longest, 8))
    if longest > 8:
        long = np.flatnonzero(sizes > 8)
        ninth = data[first[long] + 8].astype(np.uint64) & np.uint64(0x7F)
        tenth = np.where(sizes[long] > 9, data[first[long] + 9], 0).astype(np.uint64)
        value[long] |= (ninth << np.uint64(56)) | (tenth << np.uint64(63))
    return value.view(np.int64)


def _read_bytes(
    buffer: Bytes, starts: Ints, stops: Ints, feature: ExampleFeature
) -> tuple[NDArray[Any], Ints, Bools]:
    lists: list[list[bytes]] = []
    bad = np.zeros(len(starts), dtype=bool)
    for row, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        try:
            lists.append(_strings(buffer[start:stop].tobytes()))
        except _MalformedError:
            bad[row] = True
            lists.append([])
    counts = np.array([len(values) for values in lists], dtype=np.int64)
    if feature.length == VARIABLE:
        return _objects([value for values in lists for value in values]), counts, bad
    table = np.empty((len(starts), feature.width), dtype=object)
    for row, values in enumerate(lists):
        if len(values) == feature.length:
            table[row] = values[: feature.width]
    return table, counts, bad


_READERS = {"float_list": _read_floats, "int64_list": _read_ints, "bytes_list": _read_bytes}


def _objects(values: list[bytes]) -> NDArray[Any]:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def _join(buffer: Bytes, starts: Ints, stops: Ints) -> Bytes:
    """Stretches of the buffer end to end."""
    if not len(starts):
        return np.empty(0, dtype=np.uint8)
    return np.concatenate(
        [buffer[a:b] for a, b in zip(starts.tolist(), stops.tolist(), strict=True)]
    )


def _spread(values: NDArray[Any], rows: Ints, count: int, feature: ExampleFeature) -> NDArray[Any]:
    """Values of some rows → of all, the others at the default."""
    if len(rows) == count:
        return values
    spread = np.zeros((count, feature.width), dtype=_DTYPES[feature.dtype])
    if feature.default is not None:
        default = np.broadcast_to(
            np.asarray(feature.default, dtype=spread.dtype), (feature.length,)
        )
        spread[:] = default[: feature.width]
    spread[rows] = values
    return spread


def _spread_lists(values: NDArray[Any], counts: Ints, rows: Ints, count: int) -> Lists:
    lengths = np.zeros(count, dtype=np.int64)
    lengths[rows] = counts
    return Lists(values, np.concatenate([[0], np.cumsum(lengths)]))


class _Faults:
    """What is wrong with the records of a block; of each record the first fault counts."""

    def __init__(self, block: Block, features: Sequence[ExampleFeature]) -> None:
        self.rows = np.zeros(len(block), dtype=bool)
        self._block, self._features = block, features
        self._found: dict[int, str] = {}

    def any(self) -> bool:
        return bool(self._found)

    def messages(self) -> list[str]:
        return [self._found[row] for row in sorted(self._found)]

    def add_kinds(self, index: int, wrong: Bools, kinds: Ints) -> None:
        for row in np.flatnonzero(wrong).tolist():
            dtype = self._features[index].dtype
            self._add(row, index, f"is a {_KIND_NAMES[int(kinds[row])]}, the schema says {dtype}")

    def add_absent(self, index: int, absent: Bools) -> None:
        for row in np.flatnonzero(absent).tolist():
            self._add(
                row,
                index,
                "is not there; take it out of the schema, or give it a default there",
            )

    def add_lengths(self, index: int, rows: Ints, counts: Ints) -> None:
        for row, count in zip(rows.tolist(), counts.tolist(), strict=True):
            length = self._features[index].length
            self._add(row, index, f"has {count:,} values, the schema says {length:,}")

    def add_malformed(self, index: int, rows: Ints) -> None:
        for row in rows.tolist():
            self._add(row, index, "cannot be decoded, its bytes make no list of numbers")

    def _add(self, row: int, index: int, what: str) -> None:
        self.rows[row] = True
        number = int(self._block.numbers[row])
        name = self._features[index].name
        self._found.setdefault(row, f"{self._block.path}, record {number:,}: feature {name} {what}")


def take(decoded: Decoded, rows: Ints) -> Decoded:
    """The given rows, in the given order."""
    columns = {name: take_rows(column, rows) for name, column in decoded.columns.items()}
    return Decoded(columns, decoded.numbers[rows], decoded.faults)


def take_rows(column: Column, rows: Ints) -> Column:
    """The given rows of a column."""
    if not isinstance(column, Lists):
        return column[rows]
    lengths = np.diff(column.offsets)[rows]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    shift = np.repeat(column.offsets[rows] - offsets[:-1], lengths)
    return Lists(column.values[np.arange(offsets[-1]) + shift], offsets)


def concatenate(parts: Sequence[Decoded]) -> Decoded:
    """The rows of all parts."""
    columns = {
        name: concatenate_rows([part.columns[name] for part in parts]) for name in parts[0].columns
    }
    numbers = np.concatenate([part.numbers for part in parts])
    return Decoded(columns, numbers, [fault for part in parts for fault in part.faults])


def concatenate_rows(parts: Sequence[Column]) -> Column:
    """The rows of all parts of one column."""
    if len(parts) == 1:
        return parts[0]
    if not isinstance(parts[0], Lists):
        return np.concatenate([part for part in parts if not isinstance(part, Lists)])
    lists = [part for part in parts if isinstance(part, Lists)]
    lengths = np.concatenate([np.diff(part.offsets) for part in lists])
    values = np.concatenate([part.values for part in lists])
    return Lists(values, np.concatenate([[0], np.cumsum(lengths)]))


# Any valid layout → the usual one


class _MalformedError(Exception):
    """Bytes that are no protocol buffer of the expected kind."""


def _fields(data: bytes) -> Iterator[tuple[int, int, Any]]:
    """The fields of a message: (number, wire type, content); bytes of a length-delimited one, the
    number of a varint, the raw bytes of fixed ones.
    """
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, position = _varint(data, position)
            yield number, wire, value
            continue
        if wire == _LENGTH_DELIMITED:
            size, position = _varint(data, position)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise _MalformedError(f"a field of wire type {wire} at byte {position}")
        if number == 0 or position + size > len(data):
            raise _MalformedError(f"a field of {size} bytes at byte {position} of {len(data)}")
        yield number, wire, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(data) or shift > 63:
            raise _MalformedError(f"no number at byte {position}")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _messages(data: bytes, wanted: int) -> Iterator[bytes]:
    """The contents of the length-delimited fields with one number; others are unknown fields."""
    for number, wire, content in _fields(data):
        if number == wanted and wire == _LENGTH_DELIMITED:
            yield content


def _strings(data: bytes) -> list[bytes]:
    return list(_messages(data, 1))


def _canonical(record: bytes) -> bytes:
    """The same Example in the usual layout."""
    entries: dict[bytes, bytes] = {}
    # Parts of a message that is given in parts are merged; for a map that is one after the other.
    for features in _messages(record, 1):
        for entry in _messages(features, 1):
            key = b""
            values = []
            for number, wire, content in _fields(entry):
                if (number, wire) == (1, _LENGTH_DELIMITED):
                    key = content
                elif (number, wire) == (2, _LENGTH_DELIMITED):
                    values.append(content)
            entries[key] = _canonical_list(b"".join(values))
    return _delimit(_LIST_TAG, b"".join(_entry(key, value) for key, value in entries.items()))


def _canonical_list(feature: bytes) -> bytes:
    """A Feature message: of several kinds the last counts, parts of one kind are merged."""
    kind = 0
    parts: list[bytes] = []
    for number, wire, content in _fields(feature):
        if number in (1, 2, 3) and wire == _LENGTH_DELIMITED:
            if number != kind:
                kind, parts = number, []
            parts.append(content)
    if kind == 0:
        return b""
    data = b"".join(parts)
    if kind == 1:
        values = b"".join(_delimit(_LIST_TAG, value) for value in _strings(data))
    else:
        packed = b"".join(_packed_chunks(data, kind))
        values = _delimit(_LIST_TAG, packed) if packed else b""
    return _delimit(kind << 3 | _LENGTH_DELIMITED, values)


def _packed_chunks(data: bytes, kind: int) -> Iterator[bytes]:
    for number, wire, content in _fields(data):
        if number != 1:
            continue
        if wire == _LENGTH_DELIMITED or (kind == 2 and wire == 5):
            yield content
        elif kind == 3 and wire == 0:
            yield _encode_varint(content)
        else:
            raise _MalformedError(f"a value of wire type {wire} in a {_KIND_NAMES[kind]}")


def _encode_varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _delimit(tag: int, content: bytes) -> bytes:
    return bytes((tag,)) + _encode_varint(len(content)) + content


def _entry(key: bytes, value: bytes) -> bytes:
    return _delimit(_LIST_TAG, _delimit(_LIST_TAG, key) + _delimit(_VALUE_TAG, value))


# Arrays → records


def encode_examples(columns: Mapping[str, Column]) -> list[bytes]:
    """n records in the usual layout from (n, width) arrays or Lists of n: floats become
    float_list, integers int64_list, bytes objects bytes_list. Entries are in order of their names.
    """
    encoded = [
        _encode_column(name.encode(), columns[name]) for name in sorted(columns, key=str.encode)
    ]
    return [_delimit(_LIST_TAG, b"".join(entries)) for entries in zip(*encoded, strict=True)]


def _encode_column(name: bytes, column: Column) -> list[bytes]:
    """The map entry of each record."""
    if isinstance(column, Lists):
        values, offsets = column.values, column.offsets
    else:
        values = column.reshape(-1)
        offsets = np.arange(len(column) + 1) * (column.size // max(len(column), 1))
    if values.dtype == object:
        kind = _KINDS["bytes_list"]
        payloads = [
            b"".join(_delimit(_LIST_TAG, value) for value in values[a:b])
            for a, b in itertools.pairwise(offsets.tolist())
        ]
    else:
        is_float = np.issubdtype(values.dtype, np.floating)
        kind = _KINDS["float_list" if is_float else "int64_list"]
        data, bounds = _pack_floats(values, offsets) if is_float else _pack_ints(values, offsets)
        payloads = [
            _delimit(_LIST_TAG, data[a:b]) if b > a else b""
            for a, b in itertools.pairwise(bounds.tolist())
        ]
    tag = kind << 3 | _LENGTH_DELIMITED
    return [_entry(name, _delimit(tag, payload)) for payload in payloads]


def _pack_floats(values: NDArray[Any], offsets: Ints) -> tuple[bytes, Ints]:
    return values.astype("<f4").tobytes(), offsets * 4


def _pack_ints(values: NDArray[Any], offsets: Ints) -> tuple[bytes, Ints]:
    """Varints of all values end to end, and the bounds of each list."""
    rest = values.astype(np.int64).view(np.uint64)
    sizes = np.ones(len(rest), dtype=np.int64)
    for count in range(1, 10):
        sizes += rest >= np.uint64(1 << (7 * count))
    ends = np.concatenate([[0], np.cumsum(sizes)])
    data = np.zeros(int(ends[-1]), dtype=np.uint8)
    for index in range(int(sizes.max(initial=1))):
        longer = np.flatnonzero(sizes > index)
        byte = (rest[longer] >> np.uint64(7 * index)).astype(np.uint8) & np.uint8(0x7F)
        more = (sizes[longer] > index + 1).astype(np.uint8) << np.uint8(7)
        data[ends[longer] + index] = byte | more
    return data.tobytes(), ends[offsets]


def check(decoded: Decoded) -> Decoded:
    """Raise the first of its faults as a DataError."""
    if decoded.faults:
        raise DataError(decoded.faults[0])
    return decoded
