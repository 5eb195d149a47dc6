"""The default corpus: what is in it, what is left out, that nothing is imported, that the split stays."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from hdlm_jax.data import corpora
from hdlm_jax.data.python_docs import python_docs
from hdlm_jax.errors import UserError


@pytest.fixture(scope="module")
def documents() -> dict[str, str]:
    return python_docs()


def library(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return root


def test_holds_the_docstrings_and_the_topics(documents):
    assert "Encode a file using" not in documents["json"].split("\n")[0]
    assert documents["json"].startswith("JSON (JavaScript Object Notation)")
    assert "Serialize ``obj`` to a JSON formatted ``str``." in documents["json"]
    assert documents["topics.assert"].startswith('The "assert" statement')
    assert "def dumps" not in documents["json"]


def test_is_about_as_large_as_promised(documents):
    assert 400 < len(documents) < 800
    assert 1.6e6 < sum(len(text.encode()) for text in documents.values()) < 2.4e6


def test_leaves_out_what_distributions_leave_out(documents):
    tops = {name.split(".")[0] for name in documents} - {"topics"}
    assert tops <= set(sys.stdlib_module_names)
    for name in ("test", "idlelib", "tkinter", "lib2to3", "distutils", "turtledemo", "ensurepip"):
        assert name not in tops
    assert not [name for name in documents if {"test", "tests", "site-packages"} & set(name.split("."))]


def test_is_sorted_by_name(documents):
    assert list(documents) == sorted(documents)


def test_reads_without_importing_or_running_anything():
    program = (
        "import sys; sys.path.insert(0, '.')\n"
        "from hdlm_jax.data import corpora\n"
        "before = set(sys.modules)\n"
        "corpora.load()\n"
        "print(*(set(sys.modules) - before))\n"
        "print([m for m in ('this', 'antigravity', 'turtle', 'sqlite3') if m in sys.modules])"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    new, forbidden = done.stdout.split("\n")[:2]
    assert (done.returncode, forbidden) == (0, "[]"), done.stderr
    assert all(name.startswith(("encodings", "_")) for name in new.split()), new


def test_takes_a_small_library_apart(tmp_path):
    root = library(
        tmp_path,
        {
            "json/__init__.py": '"""Top.\n\n  Indented.\n  """\nif 1:\n class A:\n  "Of A."\n  def f(): "Of f."\n',
            "this.py": "raise SystemExit\n",
            "abc.py": "def f():\n  '''With \\d.'''\n",
            "email/test/test_x.py": "'A test.'\n",
            "site-packages/json.py": "'Foreign.'\n",
            "sitecustomize.py": "'Not of the library.'\n",
            "idlelib/run.py": "'A program.'\n",
            "pydoc_data/topics.py": "# generated\ntopics = {'b': 'Topic b.', 'a': 'Topic a.'}\n",
            "lib-dynload/string.py": "'No.'\n",
        },
    )
    assert python_docs(root) == {
        "abc": "With \\d.",
        "json": "Top.\n\nIndented.\n\nOf A.\n\nOf f.",
        "topics.a": "Topic a.",
        "topics.b": "Topic b.",
    }


def test_an_interpreter_without_sources_is_refused(tmp_path):
    with pytest.raises(UserError, match="data.source: got 'python_docs', but .* holds no library sources"):
        python_docs(tmp_path)


def test_the_split_depends_on_the_name_of_a_document_alone(monkeypatch, documents):
    monkeypatch.setattr(corpora, "python_docs", lambda: documents)
    corpus = corpora.load()
    expected = [text for name, text in documents.items() if hashlib.sha256(name.encode()).digest()[0] < 12]
    held_out = list(corpus.held_out)
    assert set(expected) <= set(held_out)  # 12/256 lies below 0.05
    assert len(corpus.train) + len(held_out) == len(documents)
    assert set(held_out).isdisjoint(corpus.train)
    assert documents["logging"] in held_out
    assert documents["typing"] in list(corpus.train)
    size = sum(len(text) for text in documents.values())
    assert 0.03 < sum(len(text) for text in held_out) / size < 0.08


def test_a_separate_held_out_file_leaves_all_documents_for_training(monkeypatch, documents, tmp_path):
    monkeypatch.setattr(corpora, "python_docs", lambda: documents)
    (tmp_path / "v.txt").write_text("Held out.")
    corpus = corpora.load("python_docs", held_out_path=str(tmp_path / "v.txt"))
    assert (len(corpus.train), list(corpus.held_out)) == (len(documents), ["Held out."])


def test_the_digest_is_that_of_the_documents_and_the_split(monkeypatch, documents):
    monkeypatch.setattr(corpora, "python_docs", lambda: documents)
    digest = corpora.load().sha256
    assert corpora.load().sha256 == digest
    assert corpora.load(held_out=0.2).sha256 != digest
    changed = {**documents, "json": documents["json"] + "."}
    monkeypatch.setattr(corpora, "python_docs", lambda: changed)
    assert corpora.load().sha256 != digest
