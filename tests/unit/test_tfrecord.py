"""tml.data.tfrecord: framing, gzip, faults."""

import gzip
import struct
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tml.data import tfrecord
from tml.data.parquet import DataError
from tml.data.tfrecord import BAD_RECORD, REST_LOST, TFRecordReader, TFRecordWriter, frame

FIXTURES = Path(__file__).parents[1] / "fixtures" / "tfrecord"
RECORDS = [b"", b"first", bytes(range(256)) * 20, b"x" * 3_000_000, b"last"]
PLAIN = b"".join(frame(record) for record in RECORDS)
OFFSETS = [sum(len(frame(r)) for r in RECORDS[:i]) for i in range(len(RECORDS))]


def read(path: Path, max_records: int = 2) -> list[bytes]:
    return [
        block.record(i)
        for block in tfrecord.read_blocks(path, max_records)
        for i in range(len(block))
    ]


def faults(path: Path) -> tuple[list[bytes], list[tuple[str, str]]]:
    """Records that can be read, and what is told of the others."""
    told: list[tuple[str, str]] = []
    blocks = tfrecord.read_blocks(path, 2, lambda kind, message: told.append((kind, message)))
    return [block.record(i) for block in blocks for i in range(len(block))], told


def written(folder: Path, data: bytes) -> Path:
    path = folder / "records"
    path.write_bytes(data)
    return path


def test_the_masked_crc_is_that_of_the_format() -> None:
    # crc32c("123456789") = 0xe3069283, the check value of the Castagnoli polynomial (RFC 3720).
    assert tfrecord.masked_crc(b"123456789") == (
        ((0xE3069283 >> 15 | 0xE3069283 << 17) + 0xA282EAD8) & 0xFFFFFFFF
    )


@pytest.mark.parametrize("compression", ["gzip", None])
def test_what_is_written_is_read_back(tmp_path: Path, compression: str | None) -> None:
    with TFRecordWriter(tmp_path / "records", compression) as writer:  # type: ignore[arg-type]
        for record in RECORDS:
            writer.write(record)
    assert read(tmp_path / "records") == RECORDS
    first = (tmp_path / "records").read_bytes()
    assert first.startswith(b"\x1f\x8b") == (compression == "gzip")


def test_files_that_tensorflow_wrote_are_read() -> None:
    plain = read(FIXTURES / "plain.tfrecord")
    assert len(plain) == 7
    assert read(FIXTURES / "gzip.tfrecord") == plain
    assert b"".join(map(frame, plain)) == (FIXTURES / "plain.tfrecord").read_bytes()
    assert read(FIXTURES / "empty.tfrecord") == []


def test_gzip_is_known_by_its_content_not_by_its_name(tmp_path: Path) -> None:
    # A record of 35,615 bytes begins like gzip: 1f 8b.
    record = bytes(0x8B1F)
    assert frame(record).startswith(b"\x1f\x8b")
    assert read(written(tmp_path, frame(record))) == [record]
    assert read(written(tmp_path, gzip.compress(frame(record)))) == [record]


def test_several_gzip_members_are_one_stream(tmp_path: Path) -> None:
    cut = OFFSETS[2] + 100
    members = [PLAIN[:cut], PLAIN[cut : cut + 1], b"", PLAIN[cut + 1 :]]
    data = bytes(600_000).join(gzip.compress(member) for member in members)
    assert read(written(tmp_path, data + bytes(7))) == RECORDS


def test_reading_begins_at_a_record_and_takes_a_share(tmp_path: Path) -> None:
    records = [b"%d" % number for number in range(20)]
    path = written(tmp_path, b"".join(map(frame, records)))
    with TFRecordReader(path, first=5, part=1, parts=3) as reader:
        block = reader.read(3)
        assert block is not None
        assert block.numbers.tolist() == [7, 10, 13]
        assert [block.record(i) for i in range(3)] == [b"7", b"10", b"13"]
        assert reader.next_record == 14


def test_memory_is_bounded_by_the_block(tmp_path: Path) -> None:
    path = written(tmp_path, gzip.compress(frame(bytes(100_000)) * 1000))  # 100 MB
    with TFRecordReader(path) as reader:
        count = 0
        while (block := reader.read(16)) is not None:
            count += len(block)
        assert count == 1000
        assert len(reader.buffer) < 1 << 23


def test_a_bad_data_crc_names_file_and_offset_and_costs_one_record(tmp_path: Path) -> None:
    data = bytearray(PLAIN)
    data[OFFSETS[2] + 12 + 9] ^= 1
    path = written(tmp_path, gzip.compress(bytes(data)))
    with pytest.raises(DataError, match=rf"record 2 at byte {OFFSETS[2]}: the crc of its 5,120"):
        read(path)
    records, [(kind, message)] = faults(path)
    assert records == RECORDS[:2] + RECORDS[3:]
    assert (kind, str(path) in message) == (BAD_RECORD, True)


def test_a_bad_length_crc_ends_the_file(tmp_path: Path) -> None:
    data = bytearray(PLAIN)
    data[OFFSETS[3]] ^= 1
    path = written(tmp_path, bytes(data))
    with pytest.raises(DataError, match=rf"record 3 at byte {OFFSETS[3]:,}: the crc of its length"):
        read(path)
    records, [(kind, message)] = faults(path)
    assert (records, kind) == (RECORDS[:3], REST_LOST)
    assert "3 whole records" in message


@pytest.mark.parametrize("compressed", [True, False])
def test_a_file_that_is_cut_short_gives_its_whole_records(tmp_path: Path, compressed: bool) -> None:
    data = gzip.compress(PLAIN, 0)[:-20] if compressed else PLAIN[:-2]
    path = written(tmp_path, data)
    words = "the gzip file is cut short" if compressed else "ends 18 bytes into its record of 4"
    with pytest.raises(DataError, match=words):
        read(path)
    records, [(kind, message)] = faults(path)
    assert (records, kind) == (RECORDS[:4], REST_LOST)
    assert f"{path}, record 4 at byte {OFFSETS[4]:,}" in message


def test_a_wrong_gzip_checksum_is_a_fault(tmp_path: Path) -> None:
    data = gzip.compress(PLAIN)
    path = written(tmp_path, data[:-8] + bytes(4) + data[-4:])
    with pytest.raises(DataError, match="damaged"):
        read(path)


def test_what_is_no_gzip_behind_gzip_is_a_fault(tmp_path: Path) -> None:
    path = written(tmp_path, gzip.compress(PLAIN) + b"more")
    records, [(kind, message)] = faults(path)
    assert (records, kind) == (RECORDS, REST_LOST)
    assert "not gzip" in message


def test_an_absurd_length_is_a_fault_even_with_a_good_crc(tmp_path: Path) -> None:
    length = struct.pack("<Q", 1 << 40)
    crc = struct.pack("<I", tfrecord.masked_crc(length))
    path = written(tmp_path, frame(b"good") + length + crc)
    with pytest.raises(DataError, match="record 1 at byte 20 claims 1,099,511,627,776 bytes"):
        read(path)


def test_a_length_that_the_file_cannot_fill_costs_no_memory(tmp_path: Path) -> None:
    length = struct.pack("<Q", 1 << 30)
    path = written(tmp_path, length + struct.pack("<I", tfrecord.masked_crc(length)) + b"short")
    with TFRecordReader(path) as reader:
        with pytest.raises(DataError, match="ends 17 bytes into its record of 1,073,741,824"):
            reader.read(1)
        assert len(reader.buffer) < 1 << 23


@pytest.mark.parametrize("data", [b"a text, and not a short one", b"hey"])
def test_another_file_is_named_as_such(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(DataError, match="is not a TFRecord file"):
        read(written(tmp_path, data))


def test_an_empty_file_has_no_records(tmp_path: Path) -> None:
    assert faults(written(tmp_path, b"")) == ([], [])
    assert faults(written(tmp_path, gzip.compress(b""))) == ([], [])


def test_a_gzip_file_of_no_byte_is_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "records.gz"
    path.touch()
    with pytest.raises(
        DataError, match=r"records.gz, record 0 at byte 0: the file is empty; a gzip"
    ):
        read(path)
    found, told = faults(path)
    assert found == []
    assert [kind for kind, _ in told] == [REST_LOST]


_DAMAGED = [
    frame(b"") + frame(b"one") + frame(bytes(range(256)) * 30) + frame(b"last"),
    gzip.compress(frame(b"") + frame(b"one") + frame(bytes(range(256)) * 30) + frame(b"last")),
    gzip.compress(frame(b"") + frame(b"one"))
    + gzip.compress(frame(bytes(range(256)) * 30) + frame(b"last")),
]


@settings(max_examples=150, deadline=2000)
@given(
    number=st.integers(0, 2),
    cut=st.one_of(st.none(), st.integers(0, 8000)),
    flips=st.lists(st.tuples(st.integers(0, 8000), st.integers(0, 7)), max_size=3),
    behind=st.binary(max_size=30),
)
def test_damage_is_told_or_does_no_harm(
    number: int, cut: int | None, flips: list[tuple[int, int]], behind: bytes
) -> None:
    whole = [b"", b"one", bytes(range(256)) * 30, b"last"]
    data = bytearray(_DAMAGED[number][:cut])
    for place, bit in flips:
        if data:
            data[place % len(data)] ^= 1 << bit
    with TemporaryDirectory() as folder:
        path = Path(folder) / "records.gz"
        path.write_bytes(bytes(data) + behind)
        left, told = faults(path)
        with TFRecordReader(path, on_fault=lambda *_: None) as reader:
            while reader.read(2) is not None:
                assert len(reader.buffer) < 1 << 22
        refused = False
        try:
            read(path)
        except DataError:
            refused = True
    rest = iter(whole)
    if not refused and not told:  # harmless: whole records, up to where a plain file was cut
        assert left == whole[: len(left)]
    assert refused == bool(told)
    assert all(record in rest for record in left)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent cannot be read: No such file"):
        read(tmp_path / "absent")
