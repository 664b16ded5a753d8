"""Sources: which files they are, how rows make documents, and that pieces never overlap."""

import bz2
import gzip
import io
import json
import lzma
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsbert.base.errors import UserError
from dsbert.data.preparing import grouping as grouping_module
from dsbert.data.preparing import lines, pieces
from dsbert.data.preparing.grouping import Grouping
from dsbert.data.preparing.pieces import cut, read
from dsbert.data.preparing.sources import SourceFile, resolve

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": lambda data: _zstd(data),
}


def _zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def documents_of(name: str, grouping: str = "", column: str = "text") -> list[list[str]]:
    found = []
    for source in resolve([name], [grouping] if grouping else []):
        for file in source.files:
            for piece in cut(file, source.documents, column):
                found += list(read(piece))
    return found


TEXT = st.text(alphabet="ab \n\r\té", max_size=200)


def expected(text: str, kind: str, count: int) -> list[list[str]]:
    """By the definition, on the whole text at once."""
    rows = text.removesuffix("\n").split("\n") if text else []
    if kind == "rows":
        groups = [rows[at : at + count] for at in range(0, len(rows), count)]
    else:
        groups, group = [], []
        for row in [*rows, ""]:
            if row.strip():
                group.append(row)
            elif group:
                groups.append(group)
                group = []
    return [[line for row in group for raw in row.splitlines() if (line := raw.strip())] for group in groups]


@settings(max_examples=150, deadline=None)
@given(text=TEXT, step=st.integers(1, 50), count=st.integers(1, 4), kind=st.sampled_from(["blank-line", "rows"]))
def test_pieces_of_any_size_make_the_documents_of_the_whole(tmp_path_factory, text, step, count, kind):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(text.encode())
    grouping = Grouping(kind, count)
    file = SourceFile(str(path), "text")
    units = len(text.encode()) if kind == "blank-line" else text.count("\n") + 1
    if kind == "rows":
        step = -(-step // count) * count
    edges = list(range(0, units + 1, step))
    found = []
    for first, last in zip(edges, [*edges[1:], None], strict=True):
        found += list(read(pieces.Piece(file, str(grouping), "text", first, last, 1)))
    assert found == expected(text, kind, count)


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("grouping", ["blank-line", "row", "rows:7"])
def test_a_packed_file_is_cut_too(tmp_path, monkeypatch, suffix, grouping):
    monkeypatch.setattr(lines, "_BLOCK_BYTES", 512)
    monkeypatch.setattr(lines, "LOOKBACK_BYTES", 64)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1000)
    text = "\n\n".join("\n".join(f"sentence {n} of {d}" for n in range(d % 5 + 1)) for d in range(300)) + "\n"
    plain = tmp_path / "a.txt"
    plain.write_text(text)
    packed = tmp_path / f"a.txt{suffix}"
    packed.write_bytes(PACKERS[suffix](text.encode()))
    (source,) = resolve([str(packed)], [grouping])
    assert len(cut(source.files[0], grouping, "text")) > 2
    assert documents_of(str(packed), grouping) == documents_of(str(plain), grouping)
    # In any order, and each for itself.
    backwards = [list(read(piece)) for piece in reversed(cut(source.files[0], grouping, "text"))]
    assert list(chain.from_iterable(reversed(backwards))) == documents_of(str(plain), grouping)


@pytest.mark.parametrize("suffix", PACKERS)
def test_members_of_a_packed_file_are_read_or_complained_of(tmp_path, suffix):
    """None is taken for the end because it is damaged."""
    path = tmp_path / f"a.txt{suffix}"
    first, second = (PACKERS[suffix](f"{word} member\n\n".encode() * 9) for word in ("first", "second"))
    path.write_bytes(first + second)
    whole = documents_of(str(path))
    assert whole == [["first member"]] * 9 + [["second member"]] * 9
    if suffix in (".xz", ".bz2"):
        path.write_bytes(first + bytes(8) + second + bytes(4))
        assert documents_of(str(path)) == whole
    for at in (2, len(second) // 2):
        damaged = bytearray(second)
        damaged[at] ^= 1
        seen = at == 2 or suffix != ".zst"  # whose text has no checksum here
        for rest in (damaged, second[:at], b"no member") if seen else (second[:at],):
            path.write_bytes(first + rest)
            with pytest.raises(UserError, match=f"cannot read .*a.txt{suffix}: .*expected a whole file"):
                documents_of(str(path))


def test_a_packed_file_is_unpacked_once(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "_BLOCK_BYTES", 4096)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 10_000)
    opened = []
    real = lines.Lines._open
    monkeypatch.setattr(lines.Lines, "_open", lambda self: opened.append(1) or real(self))
    path = tmp_path / "a.txt.xz"
    path.write_bytes(lzma.compress("\n\n".join(f"document {n} " * 9 for n in range(3000)).encode()))
    assert len(documents_of(str(path))) == 3000
    assert len(opened) == 1


def write_parquet(path: Path, texts: list, column: str = "text", row_group_size: int = 10) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: texts, "id": list(range(len(texts)))}), path, row_group_size=row_group_size)


@pytest.mark.parametrize(("grouping", "count"), [("row", 1), ("rows:7", 7)])
def test_tables_are_cut_at_row_groups(tmp_path, monkeypatch, grouping, count):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 300)
    texts = [f"Row {number}.\nIts second line." if number % 9 else None for number in range(95)]
    write_parquet(tmp_path / "a.parquet", texts)
    (source,) = resolve([str(tmp_path / "a.parquet")], [grouping])
    assert len(cut(source.files[0], grouping, "text")) > 3
    rows = [[] if text is None else text.split("\n") for text in texts]
    groups = [list(chain(*rows[at : at + count])) for at in range(0, len(rows), count)]
    assert documents_of(str(tmp_path / "a.parquet"), grouping) == groups


def test_blank_rows_of_a_table_part_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 100)
    write_parquet(tmp_path / "wikitext" / "a.parquet", ["a", "b", "", "c", "", "", "d", "e", "f"] * 5, row_group_size=2)
    assert documents_of(str(tmp_path / "wikitext")) == [["a", "b"], ["c"], ["d", "e", "f", "a", "b"]] + [
        ["c"],
        ["d", "e", "f", "a", "b"],
    ] * 3 + [["c"], ["d", "e", "f"]]


def test_json_lines(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps({"body": f"Text {n}\nmore"}) + "\n" for n in range(3)).encode()))
    assert documents_of(str(path), column="body") == [[f"Text {n}", "more"] for n in range(3)]


def test_halves_of_characters_are_no_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "half \\ud800 of \\uDC00x"}\n{"text": "whole \\ud83d\\ude00"}\n')
    assert documents_of(str(path)) == [["half \ufffd of \ufffdx"], ["whole \U0001f600"]]


def test_a_json_array_is_told_from_lines(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"text": "one"}, {"text": "two"}]\n')
    with pytest.raises(UserError, match=r"expected one JSON object a line .* found at line 1: list: .* jq -c '\.\[\]'"):
        documents_of(str(path))


def test_a_long_blank_row_before_a_piece_is_seen(tmp_path, monkeypatch):
    """Rows of JSON are as long as their other columns."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 200_000)
    monkeypatch.setattr(lines, "_BLOCK_BYTES", 4096)
    path = tmp_path / "a.jsonl"
    rows = [[{"text": f"{n}", "more": "x" * 20_000}, {"text": "", "more": "x" * 100_000}] for n in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in chain(*rows)))
    assert documents_of(str(path), "blank-line") == [[f"{n}"] for n in range(30)]


@pytest.mark.parametrize("grouping", ["blank-line", "rows:1000000"])
def test_no_document_exceeds_what_memory_is_bounded_by(tmp_path, monkeypatch, grouping):
    monkeypatch.setattr(grouping_module, "MAX_DOCUMENT_CHARS", 1000)
    path = tmp_path / "a.txt"
    path.write_text("ten chars.\n" * 1000)
    assert [len(document) for document in documents_of(str(path), grouping)] == [100] * 10


@pytest.mark.parametrize("step", ["open", "read"])
def test_a_network_that_fails_is_one_line(tmp_path, monkeypatch, step):
    import fsspec

    class NetworkError(Exception):
        """As of httpx: no OSError."""

    class Remote(io.BytesIO):
        def read(self, *args):
            if self.tell() < 8:  # where the data are
                raise NetworkError("connection lost")
            return super().read(*args)

    def opened(*args):
        if step == "open":
            raise NetworkError("no route")
        return SimpleNamespace(open=lambda: Remote((tmp_path / "a.parquet").read_bytes()))

    write_parquet(tmp_path / "a.parquet", ["some text"] * 99)
    monkeypatch.setattr(fsspec, "open", opened)
    file = SourceFile("hf://datasets/some/set/a.parquet", "parquet", "known")
    with pytest.raises(UserError, match=r"cannot read hf://.*NetworkError: .* goes on where it stopped"):
        list(read(cut(file, "row", "text")[0]))


def hub(root: Path) -> None:
    """The hub's real layout: Wikipedia an article a row, BookCorpus a SENTENCE a row, several files each."""
    for part in range(2):
        articles = [f"Article {part}.{n}\n\nIt is about number {n}. It has a second sentence." for n in range(30)]
        write_parquet(root / f"wikimedia/wikipedia/20231101.en/train-{part:05d}-of-00002.parquet", articles)
        sentences = [f"sentence {n} of part {part} goes here ." for n in range(1100)]
        write_parquet(root / f"bookcorpus/bookcorpus/plain_text/train-{part:05d}-of-00002.parquet", sentences)
    for name, config in (("wikimedia/wikipedia", "20231101.en"), ("bookcorpus/bookcorpus", "plain_text")):
        files = f"  data_files:\n  - split: train\n    path: {config}/train-*\n"
        card = f"---\nconfigs:\n- config_name: {config}\n{files}---\n"
        (root / name / "README.md").write_text(card)


def test_the_papers_data_in_the_hubs_layout(tmp_path, monkeypatch):
    """By the very names of `wikibooks`, which `datasets` resolves to local folders here and to the hub elsewhere."""
    monkeypatch.chdir(tmp_path)
    hub(tmp_path)
    wiki, books = resolve(["wikibooks"])
    assert (wiki.documents, books.documents) == ("row", "rows:512")
    assert [Path(file.path).name for file in wiki.files] == [f"train-{n:05d}-of-00002.parquet" for n in range(2)]
    texts = [list(read(piece)) for file in books.files for piece in cut(file, books.documents, "text")]
    assert [len(document) for part in texts for document in part] == [512, 512, 76] * 2
    articles = [list(read(piece)) for file in wiki.files for piece in cut(file, wiki.documents, "text")]
    assert articles[0][0] == ["Article 0.0", "It is about number 0. It has a second sentence."]


def test_a_data_set_without_parquet_files_is_read_by_datasets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "some" / "set"
    folder.mkdir(parents=True)
    for part in range(2):
        rows = "".join(json.dumps({"text": f"Row {part}.{n}"}) + "\n" for n in range(3))
        (folder / f"train-{part}.jsonl").write_text(rows)
    (source,) = resolve(["some/set:default"])
    assert {file.kind for file in source.files} == {"shard"}
    found = [document for file in source.files for piece in cut(file, "row", "text") for document in read(piece)]
    assert found == [[f"Row {part}.{n}"] for part in range(2) for n in range(3)]


def test_defaults_and_their_refusals(tmp_path):
    (tmp_path / "bookcorpus.txt").write_text("one\ntwo\n")
    (tmp_path / "other.txt").write_text("one\ntwo\n")
    both = [str(tmp_path / "bookcorpus.txt"), str(tmp_path / "other.txt")]
    assert [source.documents for source in resolve(both)] == ["rows:512", "blank-line"]
    assert [source.documents for source in resolve(both, ["row"])] == ["row", "row"]
    assert [source.documents for source in resolve(both, ["row", "rows:3"])] == ["row", "rows:3"]
    for wrong in (["lines"], ["rows:0"], ["row"] * 3):
        with pytest.raises(UserError, match="--documents"):
            resolve(both, wrong)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such:config", "cannot open data set no/such:config"),
        ("wikipedia_without_a_slash", "neither a text file nor a known corpus"),
        ("missing/file.txt", "neither a text file"),
        ("file:///etc/hosts", "found the URL file:///etc/hosts: fetch it"),
        ("https://a.b/c.txt", "found the URL https://a.b/c.txt: fetch it"),
    ],
)
def test_unknown_sources_are_one_line(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        resolve([name])
    assert "\n" not in str(caught.value)


def test_folders_behind_links_count_and_hidden_ones_do_not(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for folder in (root / "b c", root / ".ipynb_checkpoints", root / "_tmp", elsewhere):
        folder.mkdir(parents=True)
        (folder / "x.txt").write_text("text")
    (root / "link").symlink_to(elsewhere)
    (root / "loop").symlink_to(root)
    (source,) = resolve([str(root)])
    assert [file.path for file in source.files] == [str(root / "b c" / "x.txt"), str(root / "link" / "x.txt")]
    assert sorted(source.left_out) == [
        (str(root / ".ipynb_checkpoints"), "hidden"),
        (str(root / "_tmp"), "hidden"),
        (f"{root / 'loop'}/", "folder read already"),
    ]


def test_a_folder_of_mixed_kinds_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.jsonl").write_text("{}")
    with pytest.raises(UserError, match="files of one kind"):
        resolve([str(tmp_path)])
