"""tml.data.example: tf.train.Example ↔ arrays."""

import json
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tml.data import example
from tml.data.example import VARIABLE, ExampleDecoder, ExampleFeature, Lists, encode_examples
from tml.data.tfrecord import Block, read_blocks

FIXTURES = Path(__file__).parents[1] / "fixtures" / "tfrecord"


def delimited(number: int, content: bytes) -> bytes:
    assert len(content) < 128
    return bytes((number << 3 | 2, len(content))) + content


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    encoded = b""
    while value >= 128:
        encoded += bytes((value & 127 | 128,))
        value >>= 7
    return encoded + bytes((value,))


def record(*entries: bytes) -> bytes:
    return delimited(1, b"".join(delimited(1, entry) for entry in entries))


def entry(name: str, feature: bytes) -> bytes:
    return delimited(1, name.encode()) + delimited(2, feature)


def ints(*content: bytes) -> bytes:
    return delimited(3, b"".join(content))


def floats(*content: bytes) -> bytes:
    return delimited(2, b"".join(content))


def packed(*values: int) -> bytes:
    return delimited(1, b"".join(map(varint, values)))


A = ExampleFeature("a", "int64_list", 3)


def decode(records: list[bytes], *features: ExampleFeature) -> example.Decoded:
    return ExampleDecoder(features).decode(Block.of(records, "file"))


def column(records: list[bytes], feature: ExampleFeature) -> Any:
    decoded = decode(records, feature)
    assert decoded.faults == []
    values = decoded.columns[feature.name]
    if isinstance(values, Lists):
        return [
            values.values[a:b].tolist()
            for a, b in zip(values.offsets[:-1], values.offsets[1:], strict=True)
        ]
    return values.tolist()


@pytest.mark.parametrize("name", ["plain", "gzip"])
def test_files_that_tensorflow_wrote_decode_to_what_tensorflow_reads(name: str) -> None:
    expected = json.loads((FIXTURES / "expected.json").read_text())
    features = [
        ExampleFeature(e["feature_name"], e["dtype"], e["length"], e.get("default"))
        for e in expected["schema"]
    ]
    (block,) = read_blocks(FIXTURES / f"{name}.tfrecord")
    decoded = ExampleDecoder(features).decode(block)
    assert decoded.faults == []
    for feature in features:
        wanted = expected["columns"][feature.name]
        if feature.dtype == "bytes_list":
            wanted = [[value.encode() for value in row] for row in wanted]
        found = decoded.columns[feature.name]
        if isinstance(found, Lists):
            bounds = zip(found.offsets[:-1], found.offsets[1:], strict=True)
            assert [found.values[a:b].tolist() for a, b in bounds] == wanted
        else:
            kinds = {"float_list": np.float32, "int64_list": np.int64, "bytes_list": object}
            np.testing.assert_array_equal(found, np.array(wanted, dtype=kinds[feature.dtype]))
            assert found.dtype == kinds[feature.dtype]


def test_packed_and_unpacked_lists_and_several_chunks_are_one_list() -> None:
    # −1 takes ten bytes, 300 two, 5 one.
    unpacked = b"".join(b"\x08" + varint(value) for value in (-1, 300, 5))
    mixed = packed(-1) + b"\x08" + varint(300) + packed() + packed(5)
    for content in (packed(-1, 300, 5), unpacked, mixed):
        assert column([record(entry("a", ints(content)))], A) == [[-1, 300, 5]]
    numbers = [struct.pack("<f", value) for value in (1.5, -2.0, np.inf)]
    feature = ExampleFeature("f", "float_list", 3)
    for content in (
        delimited(1, b"".join(numbers)),
        b"".join(b"\x0d" + number for number in numbers),
        b"\x0d" + numbers[0] + delimited(1, numbers[1] + numbers[2]),
    ):
        assert column([record(entry("f", floats(content)))], feature) == [[1.5, -2.0, np.inf]]


def test_records_of_all_layouts_stay_in_order() -> None:
    usual = [record(entry("a", ints(packed(i, i, 200)))) for i in range(4)]
    odd = record(entry("a", ints(packed(9), packed(8, 7))))
    records = [usual[0], odd, usual[1], odd, usual[2]]
    decoded = decode(records, A)
    assert decoded.numbers.tolist() == [0, 1, 2, 3, 4]
    assert column(records, A) == [[0, 0, 200], [9, 8, 7], [1, 1, 200], [9, 8, 7], [2, 2, 200]]


def test_entries_come_in_any_order_and_unknown_fields_are_passed_over() -> None:
    a, b = entry("a", ints(packed(1, 2, 3))), entry("b", floats())
    value_first = delimited(2, ints(packed(1, 2, 3))) + delimited(1, b"a")
    unknown = delimited(9, b"?") + b"\x41" + bytes(8) + b"\x3d" + bytes(4) + b"\x38\x96\x01"
    records = [
        record(a, b),
        record(b, a),
        record(value_first),
        record(a + unknown),
        record(a) + unknown,
        unknown + record(b) + record(a),  # a Features message in two parts
    ]
    assert column(records, A) == [[1, 2, 3]] * 6


def test_an_entry_given_twice_counts_as_the_last() -> None:
    first, last = entry("a", ints(packed(1, 2, 3))), entry("a", ints(packed(4, 5, 6)))
    assert column([record(first, last)], A) == [[4, 5, 6]]
    assert column([record(first, last) + delimited(9, b"")], A) == [[4, 5, 6]]
    one = ExampleFeature("a", "int64_list", 1)
    twice = record(entry("a", ints(packed(1))), entry("a", ints(packed(2))))
    assert column([twice], one) == [[2]]


def test_of_two_kinds_the_last_counts() -> None:
    both = floats(delimited(1, struct.pack("<f", 1))) + ints(packed(1, 2, 3))
    assert column([record(entry("a", both))], A) == [[1, 2, 3]]


def test_whole_numbers_of_every_size_survive() -> None:
    values = [0, 127, 128, -1, -(1 << 63), (1 << 63) - 1]
    values += [(1 << bits) + delta for bits in range(7, 63, 7) for delta in (-1, 0)]
    table = np.array([values, values[::-1]], dtype=np.int64)
    feature = ExampleFeature("a", "int64_list", len(values))
    assert column(encode_examples({"a": table}), feature) == table.tolist()
    singles = encode_examples({"a": np.array(values)[:, None]})
    assert column(singles, ExampleFeature("a", "int64_list", 1)) == [[v] for v in values]


def test_only_the_first_columns_are_kept_where_so_asked() -> None:
    records = encode_examples({"a": np.array([[1, 2, 3], [400, 5, 6]])})
    assert column(records, ExampleFeature("a", "int64_list", 3, keep=2)) == [[1, 2], [400, 5]]
    records = encode_examples({"f": np.array([[1, 2, 3]], dtype=np.float32)})
    assert column(records, ExampleFeature("f", "float_list", 3, keep=1)) == [[1.0]]


def test_absent_features_take_the_default_or_are_empty_lists() -> None:
    here = record(entry("a", ints(packed(1, 2, 3))))
    nowhere = [record(entry("b", ints())), b"", record(entry("a", b""))]
    feature = ExampleFeature("a", "int64_list", 3, default=7)
    # An entry whose list has no kind is no list: TensorFlow takes the default too.
    records = [here, *nowhere[:2]]
    assert column(records, feature) == [[1, 2, 3], [7, 7, 7], [7, 7, 7]]
    lists = ExampleFeature("a", "int64_list", VARIABLE)
    assert column([here, *nowhere], lists) == [[1, 2, 3], [], [], []]


def test_two_small_numbers_are_not_taken_for_one_of_two_bytes() -> None:
    one = ExampleFeature("a", "int64_list", 1)
    records = [record(entry("a", ints(packed(*values)))) for values in ((300,), (1, 2), (7,))]
    decoded = decode(records, one)
    assert decoded.faults == ["file, record 1: feature a has 2 values, the schema says 1"]
    assert np.asarray(decoded.columns["a"]).tolist() == [[300], [7]]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (record(entry("b", ints(packed(1)))), "feature a is not there"),
        (record(entry("a", ints(packed(1, 2)))), "feature a has 2 values, the schema says 3"),
        (record(entry("a", ints(packed(1, 2, 300, 4)))), "has 4 values, the schema says 3"),
        (record(entry("a", ints())), "feature a has 0 values, the schema says 3"),
        (record(entry("a", floats())), "feature a is a float_list, the schema says int64_list"),
        (record(entry("a", ints(delimited(1, b"\x01\x80\x80")))), "feature a cannot be decoded"),
        (record(entry("a", ints(delimited(1, b"\x80" * 11 + b"\x01\x01\x01")))), "cannot be deco"),
        (b"\x0a\x7f", "is not a tf.train.Example"),
        (b"no protocol buffer", "is not a tf.train.Example"),
    ],
)
def test_a_bad_record_is_named_and_the_others_are_decoded(bad: bytes, words: str) -> None:
    good = record(entry("a", ints(packed(1, 2, 3))))
    decoded = decode([good, bad, good], A)
    (fault,) = decoded.faults
    assert fault.startswith("file, record 1: ")
    assert words in fault
    assert decoded.numbers.tolist() == [0, 2]
    assert np.asarray(decoded.columns["a"]).tolist() == [[1, 2, 3]] * 2


def test_bad_lists_of_variable_length_do_not_shift_the_others() -> None:
    feature = ExampleFeature("a", "int64_list", VARIABLE)
    records = [
        record(entry("a", ints(delimited(1, content))))
        for content in (b"\x01\x02", b"\x05\x80", b"\x03", b"\x80" * 11 + b"\x01", b"\x04")
    ]
    decoded = decode(records, feature)
    assert len(decoded.faults) == 2
    lists = decoded.columns["a"]
    assert isinstance(lists, Lists)
    assert (lists.values.tolist(), lists.offsets.tolist()) == ([1, 2, 3, 4], [0, 2, 3, 4])


def test_a_list_that_ends_within_a_number_does_not_reach_into_the_next_record() -> None:
    feature = ExampleFeature("a", "int64_list", 2)
    contents = (b"\x01\x02\x80", b"\x03\x90\x01", b"\x80", b"\x05\x06")
    decoded = decode([record(entry("a", ints(delimited(1, c)))) for c in contents], feature)
    assert len(decoded.faults) == 2
    assert np.asarray(decoded.columns["a"]).tolist() == [[3, 144], [5, 6]]


def test_nan_and_infinity_are_legal() -> None:
    values = np.array([[np.nan, np.inf]], dtype=np.float32)
    found = decode(encode_examples({"f": values}), ExampleFeature("f", "float_list", 2))
    np.testing.assert_array_equal(found.columns["f"], values)


def test_random_damage_is_a_fault_or_decodes_as_the_slow_way_does() -> None:
    rng, dice = np.random.default_rng(1), random.Random(1)
    offsets = np.array([0, 1, 1, 4, 9])
    records = encode_examples(
        {
            "one": rng.integers(-3, 1 << 40, (4, 1)),
            "some": rng.integers(0, 300, (4, 5)),
            "list": Lists(rng.integers(0, 300, 9), offsets),
            "f": rng.standard_normal((4, 2)).astype(np.float32),
            "x" * 130: rng.integers(0, 2, (4, 1)),
        }
    )
    features = (
        ExampleFeature("one", "int64_list", 1),
        ExampleFeature("some", "int64_list", 5, default=0),
        ExampleFeature("list", "int64_list", VARIABLE),
        ExampleFeature("f", "float_list", 2),
        ExampleFeature("x" * 130, "int64_list", 1),
    )
    num_good = 0
    for _ in range(300):
        damaged = [bytearray(r) for r in records]
        for one in damaged:
            one[dice.randrange(len(one))] = dice.choice([0, 1, 0x0A, 0x12, 0x1A, 0x80, 0xFF])
        block = Block.of([bytes(one) for one in damaged])
        decoded = ExampleDecoder(features).decode(block)
        assert len(decoded.faults) + len(decoded.numbers) == 4
        num_good += len(decoded.numbers)
        for row, number in enumerate(decoded.numbers.tolist()):
            try:
                anew = example._canonical(block.record(number))
            except example._MalformedError:
                continue  # damage within a feature that nobody asks for
            slow = ExampleDecoder(features).decode(Block.of([anew]))
            for name, values in slow.columns.items():
                fast = example.take_rows(decoded.columns[name], np.array([row]))
                if isinstance(values, Lists):
                    assert isinstance(fast, Lists)
                    values, fast = values.values, fast.values
                assert not isinstance(fast, Lists)
                assert fast.tobytes() == values.tobytes()
    assert 100 < num_good < 1500
