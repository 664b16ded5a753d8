"""Rows of JSON lines, CSV and parquet: the text that stands in them, or one line with file, row and column."""

import csv
import gzip
import io
import json
import lzma
import random
import re
import sys
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsbert.base.errors import UserError
from dsbert.data.preparing import lines, pieces
from dsbert.data.preparing.prepare import prepare
from tests.data.conftest import make_text
from tests.data.preparing.test_sources import documents_of

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

ROWS = [
    ["0", 'She said "no, never".\nThen she left.', "x"],
    ["1", "Ünïcödé; and\ttabs | bars, commas", ""],
    ["2", "", "y"],
]
TEXTS = [['She said "no, never".', "Then she left."], ["Ünïcödé; and\ttabs | bars, commas"], []]


def table(rows: list[list[str]], separator: str = ",", ends: str = "\r\n") -> str:
    """By Python's own writer."""
    sink = io.StringIO()
    csv.writer(sink, delimiter=separator, lineterminator=ends).writerows(rows)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("name", "separator"), [("a.csv", ","), ("a.CSV", ";"), ("a.csv", "\t"), ("a.TSV", "\t"), ("a.csv", "|")]
)
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_csv_by_any_separator(tmp_path, name, separator, ends, mark):
    path = tmp_path / name
    path.write_bytes((mark + table([["id", "text", "more"], *ROWS], separator, ends)).encode())
    assert documents_of(str(path)) == TEXTS
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert documents_of(str(packed)) == TEXTS
    assert documents_of(str(path), "rows:3") == [TEXTS[0] + TEXTS[1]]
    assert documents_of(str(path), "blank-line") == [TEXTS[0] + TEXTS[1]]


CELL = st.text(alphabet='ab,"\n é', max_size=12)


@settings(max_examples=60, deadline=None)
@given(cells=st.lists(st.tuples(CELL, CELL), max_size=20), step=st.integers(1, 60), order=st.randoms())
def test_csv_in_pieces_of_any_size_and_order(tmp_path_factory, cells, step, order):
    """A quoted value may hold line ends: which begins where is what all before it says."""
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    path.write_bytes(table([["id", "text"], *map(list, cells)]).encode())
    (source,) = pieces_of(path, step)
    numbers = list(range(len(source)))
    order.shuffle(numbers)
    found = {number: list(pieces.read(source[number])) for number in numbers}
    expected = [[line for raw in text.splitlines() if (line := raw.strip())] for _, text in cells]
    assert [document for number in sorted(found) for document in found[number]] == expected


def test_spaces_after_a_separator_hide_no_quotes(tmp_path):
    (tmp_path / "a.csv").write_text('id, text\n0, "one, two"\n1, three\n')
    assert documents_of(str(tmp_path / "a.csv")) == [["one, two"], ["three"]]


def pieces_of(path: Path, step: int) -> list[list[pieces.Piece]]:
    """Of a file, as if pieces were of `step` bytes."""
    from dsbert.data.preparing.sources import resolve

    before = pieces.PIECE_BYTES
    pieces.PIECE_BYTES = step
    try:
        return [pieces.cut(file, "row", "text") for source in resolve([str(path)]) for file in source.files]
    finally:
        pieces.PIECE_BYTES = before


BAD_TABLES = {
    "ragged": ("a.csv", "id,text\n0,one two\n1,one, two\n", "expected 2 columns .*a.csv, found 3 at line 3"),
    "short": ("a.csv", "id,text\n0,one two\n1\n", "found 1 at line 3"),
    "torn quote": ("a.csv", 'id,text\n0,"one two\n1,three\n', "found at line 3: unexpected end of data"),
    "stray quote": ("a.tsv", 'id\ttext\n0\t"one" two\n', "found at line 2: .*expected after"),
    "quotes that are characters": (
        "a.tsv",
        'id\ttext\n0\t"one two\n1\tthree four\n2\tfive six"\n',
        "ends at line 4, with line ends and tabs in quotes",
    ),
    "no column": ("a.csv", "id;body\n0;one\n", "expected a column 'text' .* found id, body: give --text-column"),
    "column twice": ("a.csv", "text,id,text\none,0,two\n", "expected a column 'text' .* found 2 of them"),
    "NUL": ("a.csv", "id,text\n0,one\0two\n", "is not UTF-8 text at byte 13"),
    "long": ("a.csv", 'id,text\n0,"' + "word \n" * 2_000_000, "found at line .*field larger than field limit"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_what_is_no_table_is_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    for _ in range(2):  # the second time as well, of a file that is still open
        with pytest.raises(UserError, match=message) as caught:
            documents_of(str(path))
        assert "\n" not in str(caught.value)


GOOD = json.dumps({"text": "plain words"})
BAD_LINES = {
    "number": ('{"text": 15}', "expected text in column 'text' of .*a.jsonl, found int at line 4000: make it text"),
    "no number": ('{"text": NaN}', "found float at line 4000"),
    "list": ('{"text": ["a", "b"]}', "found list at line 4000"),
    "object": ('{"text": {"en": "a"}}', "found dict at line 4000"),
    "truth": ('{"text": true}', "found bool at line 4000"),
    "deep": ("[" * 100_000, "found at line 4000: lists in lists, too deep"),
    "deep object": ('{"a":' * 100_000, "found at line 4000: lists in lists, too deep"),
    "huge": ('{"text": "a", "n": ' + "9" * 5000 + "}", "found at line 4000: Exceeds the limit"),
    "twice": ('{"text": "a", "text": "b"}', "found at line 4000: the column 'text' twice"),
    "twice, in disguise": ('{"text": "a", "te\\u0078t": "b"}', "found at line 4000: the column 'text' twice"),
    "torn": ('{"text": "a', "found at line 4000: Unterminated string"),
    "array": ('[{"text": "a"}]', r"found at line 4000: list: .* jq -c '\.\[\]'"),
    "other": ('{"body": "a"}', "expected a column 'text' .* found at line 4000: body: give --text-column"),
    "empty": ("{}", "found at line 4000: none: give --text-column"),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES)
@pytest.mark.parametrize("grouping", ["row", "blank-line", "rows:5"])
def test_what_is_no_row_of_text_is_named_with_its_line(tmp_path, monkeypatch, line, message, grouping):
    """Far into the file, in a piece of its own."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 10_000)
    monkeypatch.setattr(lines, "_BLOCK_BYTES", 4096)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(text + "\n" for text in [*[GOOD] * 3999, line, GOOD]))
    with pytest.raises(UserError, match=message) as caught:
        documents_of(str(path), grouping)
    assert "\n" not in str(caught.value)


def test_other_columns_may_hold_anything(tmp_path):
    path = tmp_path / "a.ndjson"
    path.write_text(
        '{"text": "one", "a": NaN, "b": [[{}]], "a": {"c": 1}}\n\n{"text": null}\n{"a": 1e999, "text": ""}\n'
    )
    assert documents_of(str(path)) == [["one"], [], []]


COLUMNS = {
    "categories": pa.array(["a", None, "b", "a"]).dictionary_encode(),
    "large": pa.array(["a", None, "b", "a"], pa.large_string()),
    "view": pa.array(["a", None, "b", "a"], pa.string_view()),
    "large categories": pa.array(["a", None, "b", "a"], pa.large_string()).dictionary_encode(),
}


@pytest.mark.parametrize("column", COLUMNS.values(), ids=COLUMNS)
def test_text_of_parquet_however_it_is_stored(tmp_path, column):
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet", row_group_size=3)
    assert documents_of(str(tmp_path / "a.parquet")) == [["a"], [], ["b"], ["a"]]


def test_bytes_that_are_no_text_are_named_with_their_row(tmp_path):
    column = pa.Array.from_buffers(pa.string(), 3001, pa.array([b"a"] * 3000 + [b"caf\xe9"]).buffers())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"UTF-8 text in column 'text' of .*a\.parquet, found other bytes in row 3000 "):
        documents_of(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("b.parquet", pa.table({})),
        ("b.parquet", pa.table({"text": pa.array([], pa.float64())})),
        ("b.parquet", pa.table({"text": pa.array([], pa.string())})),
        ("b.jsonl", b""),
        ("b.jsonl", b"\n \n"),
        ("b.jsonl.gz", gzip.compress(b"", mtime=0)),
        ("b.csv", b""),
        ("b.csv", b"\n\n"),
        ("b.csv", b"id,text\n"),
        ("b.csv.zst", zstd.compress(b"")),
    ],
)
def test_an_empty_shard_among_others_is_counted(tmp_path, name, content):
    suffix = name[1:].removesuffix(".gz").removesuffix(".zst")
    documents = make_text(20).strip().split("\n\n")
    folder = tmp_path / "shards"
    folder.mkdir()
    if isinstance(content, pa.Table):
        pq.write_table(content, folder / name)
        pq.write_table(pa.table({"text": documents}), folder / f"a{suffix}")
    else:
        (folder / name).write_bytes(content)
        rows = "".join(json.dumps({"text": text}) + "\n" for text in documents)
        (folder / f"a{suffix}").write_text(
            table([["text"], *([text] for text in documents)]) if suffix == ".csv" else rows
        )
    made = prepare([str(folder)], tmp_path / "data", 300)
    (reason,) = made["left_out"]
    assert (made["documents"], made["left_out"][reason]) == (20, {"files": 1, "names": [str(folder / name)]})
    with pytest.raises(UserError, match=r"is empty"):
        prepare([str(folder / name)], tmp_path / "none", 300)


def test_a_column_of_nothing_is_no_text(tmp_path):
    pq.write_table(pa.table({"text": pa.nulls(3)}), tmp_path / "a.parquet")
    assert documents_of(str(tmp_path / "a.parquet")) == [[], [], []]


@pytest.mark.parametrize(
    ("column", "found"),
    [
        ([1, 2], "int64"), ([0.5, None], "double"), ([["a"], ["b"]], "list<"), ([{"en": "a"}], "struct<en: string>"),
        ([b"a"], "binary"),
    ],
)  # fmt: skip
def test_other_columns_of_parquet_are_refused(tmp_path, column, found):
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(
        UserError, match=f"expected text in column 'text' of .*a.parquet, found {re.escape(found)}.* in all rows"
    ):
        documents_of(str(tmp_path / "a.parquet"))


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    made = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(made, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"expected one column 'text' in .*a\.parquet, found 2"):
        documents_of(str(tmp_path / "a.parquet"))


def a_zip() -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("a.txt", "some words")
    return sink.getvalue()


def a_parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": ["some words"]}), sink)
    return sink.getvalue()


PLAIN = make_text(20)
DISGUISED = {
    "gzip": (gzip.compress(PLAIN.encode()), "at byte 0, but gzip by its content"),
    "xz": (lzma.compress(PLAIN.encode()), "at byte 0, but xz"),
    "zstd": (zstd.compress(PLAIN.encode()), "at byte 0, but zstd"),
    "zip": (a_zip(), "at byte 0, but zip"),
    "parquet": (a_parquet(), "at byte 0, but parquet"),
    "PDF": (b"%PDF-1.7\nwords\n", "at byte 0, but PDF"),
    "UTF-16": (PLAIN.encode("utf-16"), "at byte 0, but UTF-16"),
    "UTF-16 without a mark": (PLAIN.encode("utf-16-le"), "at byte 1 "),
    "NUL": (b"some words\n\nsome\0words\n", "at byte 16 "),
    "late NUL": (b"some words\n" * 10_000 + b"\0", "at byte 110000 "),
    "latin-1": (b"some words\n\ncaf\xe9 \n", "at byte 15 "),
}


@pytest.mark.parametrize(("content", "message"), DISGUISED.values(), ids=DISGUISED)
def test_what_only_calls_itself_text_is_refused_with_the_place(tmp_path, content, message):
    for name, data in (("a.txt", content), ("a.txt.zst", zstd.compress(content))):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f"{name} is not UTF-8 text {message}") as caught:
            documents_of(str(tmp_path / name))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("window_log", [20, 28, 31])
def test_zstd_with_matches_from_far_back(tmp_path, window_log):
    """As of `zstd --long=31`, which other readers refuse."""
    text = make_text(200, seed=7)
    packer = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: window_log})
    path = tmp_path / "a.txt.ZST"
    path.write_bytes(packer.compress(text.encode()) + packer.flush())
    (tmp_path / "a.txt").write_text(text)
    assert documents_of(str(path)) == documents_of(str(tmp_path / "a.txt"))


def test_links_to_blobs_are_what_they_are_called(tmp_path):
    """As in the hub's cache: the name tells kind and packing, and the blob nothing."""
    documents = make_text(20).strip().split("\n\n")
    rows = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    blobs = {
        "x.jsonl.gz": gzip.compress(rows.encode()),
        "x.csv.xz": lzma.compress(table([["text"], *([text] for text in documents)]).encode()),
    }
    digests = set()
    for number, (name, content) in enumerate(blobs.items()):
        folder = tmp_path / f"snapshot{number}"
        folder.mkdir()
        (tmp_path / f"abc{number}").write_bytes(content)
        (folder / name).symlink_to(f"../abc{number}")
        for source in (folder, folder / name):
            digests.add(prepare([str(source)], tmp_path / f"data-{number}-{source.name}", 300)["digest"])
    assert len(digests) == 1


def test_every_kind_of_file_gives_the_same_data(tmp_path):
    documents = make_text(30, seed=random.Random(1).randrange(99)).strip().split("\n\n")
    rows = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    (tmp_path / "a.txt").write_text("\n\n".join(documents))
    (tmp_path / "a.NDJSON").write_text(rows)
    (tmp_path / "a.csv").write_text(table([["text", "n"], *([text, "1"] for text in documents)]))
    pq.write_table(pa.table({"text": documents}), tmp_path / "a.parquet")
    made = {prepare([str(path)], tmp_path / f"data-{path.suffix}", 300)["digest"] for path in tmp_path.glob("a.*")}
    assert len(made) == 1
