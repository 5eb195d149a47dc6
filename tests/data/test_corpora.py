"""Local files: what a document is, how they are split, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdlm_jax.data import corpora
from hdlm_jax.errors import UserError

KEYS = st.lists(st.text(min_size=1), unique=True, max_size=40)


def write(folder: Path, **files: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.txt").write_bytes(text.encode())
    return str(folder / "*.txt")


def books(folder: Path, n: int = 30) -> str:
    return write(folder, **{f"book{i}": f"Book {i}.\n\nIts text is number {i}." for i in range(n)})


# ---- the split


@given(KEYS, st.floats(0, 1, exclude_max=True))
def test_split_is_a_partition_in_order(keys, fraction):
    train, held_out = corpora.split(keys, fraction)
    assert sorted(train + held_out) == list(range(len(keys)))
    assert train == sorted(train) and held_out == sorted(held_out)


@given(KEYS, st.integers(0, 39), st.floats(0.1, 0.9))
def test_split_of_a_document_does_not_depend_on_the_others(keys, at, fraction):
    held_out = {keys[i] for i in corpora.split(keys, fraction)[1]}
    without = keys[:at] + keys[at + 1 :]
    held_out_without = {without[i] for i in corpora.split(without, fraction)[1]}
    gone = set(keys) - set(without)
    if len(held_out) > 1 and len(held_out_without) > 1:  # nothing was held out for want of another
        assert held_out - gone == held_out_without


def test_split_holds_out_about_the_fraction():
    held_out = corpora.split([str(i) for i in range(10_000)], 0.05)[1]
    assert abs(len(held_out) - 500) < 4 * (10_000 * 0.05 * 0.95) ** 0.5


def test_split_holds_out_one_document_at_least():
    train, held_out = corpora.split(["a", "b", "c"], 1e-9)
    assert (len(train), len(held_out)) == (2, 1)
    assert corpora.split(["a", "b", "c"], 0) == ([0, 1, 2], [])
    assert corpora.split(["a"], 0.5) == ([0], [])


# ---- documents


def test_documents_are_read_when_asked_for():
    read = []
    documents = corpora.Documents(lambda i: read.append(i) or str(i), [5, 6, 7])
    assert (len(documents), read) == (3, [])
    assert (documents[1], documents[-1], read) == ("6", "7", [6, 7])
    assert list(documents[1:]) == ["6", "7"]
    with pytest.raises(IndexError):
        documents[3]


def test_a_file_is_a_document(tmp_path):
    corpus = corpora.load("text", books(tmp_path), held_out=0.2)
    texts = [*corpus.train, *corpus.held_out]
    assert sorted(texts) == sorted(f"Book {i}.\n\nIts text is number {i}." for i in range(30))
    assert 1 <= len(corpus.held_out) <= 12


def test_the_split_and_digest_are_the_same_in_another_folder(tmp_path):
    here = corpora.load("text", books(tmp_path / "a"))
    there = corpora.load("text", books(tmp_path / "elsewhere" / "b"))
    assert list(here.held_out) == list(there.held_out)
    assert list(here.train) == list(there.train)
    assert here.sha256 == there.sha256
    Path(tmp_path / "elsewhere" / "b" / "book3.txt").write_text("Changed.")
    assert corpora.load("text", str(tmp_path / "elsewhere" / "b" / "*.txt")).sha256 != here.sha256


def test_several_patterns_name_each_file_once(tmp_path):
    pattern = write(tmp_path, a="A.", b="B.", c="C.")
    both = f"{pattern}, {tmp_path}/a.txt ,{tmp_path}/**/c.txt"
    assert [Path(f).name for f in corpora.files_of(both, "data.path")] == ["a.txt", "b.txt", "c.txt"]


def test_a_file_with_a_comma_in_its_name(tmp_path):
    path = tmp_path / "one, two.txt"
    path.write_text("x")
    assert corpora.files_of(str(path), "data.path") == [str(path)]


def test_a_single_file_is_cut_between_paragraphs(tmp_path):
    text = "\ufeff" + "\n\n".join(f"Paragraph {i}:\nå line." for i in range(100)) + "\n"
    pattern = write(tmp_path, one=text)
    corpus = corpora.load("text", pattern, held_out=0.1)
    assert (len(corpus.train), len(corpus.held_out)) == (1, 1)
    assert corpus.train[0] + corpus.held_out[0] == text[1:]
    assert corpus.held_out[0].startswith("Paragraph 90:")
    assert corpora.load("text", pattern, held_out=0.3).sha256 != corpus.sha256


def test_a_single_file_without_paragraphs_is_cut_between_lines(tmp_path):
    corpus = corpora.load("text", write(tmp_path, one="\n".join(map(str, range(1000, 1100)))), held_out=0.1)
    assert corpus.held_out[0].split("\n")[0] in ("1089", "1090", "1091")


def test_windows_line_ends_are_kept(tmp_path):
    corpus = corpora.load("text", write(tmp_path, one="a\r\n\r\nb\r\n"), held_out=0.5)
    assert (corpus.train[0], corpus.held_out[0]) == ("a\r\n\r\n", "b\r\n")


def test_lines_of_jsonl_are_documents(tmp_path):
    texts = [f"Text {i},\nwith lines and é." for i in range(20)]
    lines = [json.dumps({"id": i, "text": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    (tmp_path / "x.jsonl").write_bytes("\n\n".join([*lines, '{"text": ""}']).encode())
    corpus = corpora.load("text", str(tmp_path / "x.jsonl"), held_out=0.3)
    assert sorted([*corpus.train, *corpus.held_out]) == sorted(texts)


def test_a_separate_held_out_file(tmp_path):
    pattern = books(tmp_path / "train", 3)
    other = write(tmp_path / "valid", v="Held out.")
    corpus = corpora.load("text", pattern, held_out=0, held_out_path=other)
    assert (len(corpus.train), list(corpus.held_out)) == (3, ["Held out."])


def test_read_text_drops_the_byte_order_mark(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert corpora.read_text(str(tmp_path / "x.txt"), "file") == "hello"


# ---- what is refused


def refused(match: str, *args, **kwargs) -> None:
    with pytest.raises(UserError, match=match):
        corpora.load(*args, **kwargs)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "it is empty"),
        (b" \n\n", "it is empty"),
        (b"\xef\xbb\xbf\n", "it is empty"),
        (b"abc\0def", "it holds a NUL at byte 3"),
        (b"abcd\xff\xfe", "it is not UTF-8 at byte 4"),
        ("é".encode("utf-16"), "it is not UTF-8 at byte 0"),
    ],
)
def test_files_that_are_not_text(tmp_path, content, why):
    path = tmp_path / "x.txt"
    path.write_bytes(content)
    refused(f"data.path: got '{path}', but {why}", "text", str(path))
    with pytest.raises(UserError, match=f"evaluate: got '{path}', but {why}"):
        corpora.read_text(str(path), "evaluate")


def test_missing_files(tmp_path):
    refused("data.path: got '/nowhere/x.txt', which names no file", "text", "/nowhere/x.txt")
    refused("names no file; it is a folder: say", "text", str(tmp_path))
    refused("data.path: got ''", "text", "")
    refused("data.held_out_path: got '/no", "text", write(tmp_path, a="A."), held_out_path="/no")
    with pytest.raises(UserError, match="file: cannot read '/nowhere': No such file"):
        corpora.read_text("/nowhere", "file")


def test_an_unknown_source_lists_the_choices():
    refused("data.source: got 'txt' .*'text'.*allowed: 'python_docs', 'text', 'tfds'", "txt")


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_a_fraction_out_of_range(fraction):
    refused("data.held_out: got", held_out=fraction)


def test_nothing_left_to_hold_out(tmp_path):
    refused("data.held_out: got 0; allowed: a fraction that leaves", "text", books(tmp_path, 3), held_out=0)
    refused("data.held_out: got 0;", "text", write(tmp_path / "a", one="a\n\nb\n\nc"), held_out=0)
    refused("data.held_out: got 0.5", "text", write(tmp_path / "b", one="a single line"), held_out=0.5)


@pytest.mark.parametrize("line", ["not json", "[1]", '{"txt": "x"}', '{"text": 3}', r'{"text": "\ud800"}'])
def test_a_bad_line_of_jsonl_is_named(tmp_path, line):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "good"}\n' + line)
    refused(f'data.path: {path}:2 is not a line of {{"text"', "text", str(path))


def test_a_jsonl_file_without_text(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": ""}\n')
    refused("which holds no text", "text", str(path))


def test_a_file_that_disappears_is_not_lost_on_the_way(tmp_path):
    corpus = corpora.load("text", books(tmp_path / "a", 4))
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(FileNotFoundError):
        list(corpus.train)
