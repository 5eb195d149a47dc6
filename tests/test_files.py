"""Files of this machine and of a bucket: whole or not at all, appended to, listed, renamed; what cannot be is told."""

import os
import re

import pytest

from hdlm_jax import files
from hdlm_jax.errors import UserError


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(params=["disk", "bucket"])
def folder(request, tmp_path):
    """An empty folder of either kind."""
    if request.param == "disk":
        return tmp_path / "folder"
    request.getfixturevalue("bucket").objects.clear()
    return files.place("gs://bucket/folder")


# ---- both kinds


def test_what_is_written_is_read(folder):
    files.write_whole(folder / "a" / "x.json", "\u00e9\n")
    files.write_whole(folder / "a" / "x.json", "\u00fc\n")
    files.write_whole(folder / "a" / "y", b"\xff")
    assert files.read_text(folder / "a" / "x.json") == "\u00fc\n"
    assert files.read_bytes(folder / "a" / "y") == b"\xff" and files.size(folder / "a" / "y") == 1
    assert files.names(folder) == ["a"] and files.names(folder / "a") == ["x.json", "y"]
    assert files.names(folder / "nothing") == []
    assert files.is_dir(folder / "a") and not files.is_file(folder / "a")
    assert files.is_file(folder / "a" / "y") and not files.is_dir(folder / "a" / "y")
    with pytest.raises(FileNotFoundError):
        files.read_bytes(folder / "b")


def test_lines_are_added_and_a_torn_one_is_ended(folder):
    files.append(folder / "log", "one")
    files.append(folder / "log", "two\n")
    assert files.read_text(folder / "log") == "one\ntwo\n"
    files.write_whole(folder / "log", "one\ntw")
    files.append(folder / "log", "three")
    assert files.read_text(folder / "log") == "one\ntw\nthree\n"


def test_folders_are_renamed_and_removed_with_all_that_is_in_them(folder):
    for name in ("a/x", "a/b/y", "other"):
        files.write_whole(folder / name, name)
    files.rename(folder / "a", folder / "c")
    assert files.names(folder) == ["c", "other"] and files.read_text(folder / "c" / "b" / "y") == "a/b/y"
    files.remove(folder / "c")
    files.remove(folder / "c")  # is not there
    files.remove(folder / "other")
    assert files.names(folder) == []


# ---- this machine


def test_a_file_is_written_whole_with_the_folders_on_the_way(tmp_path):
    path = tmp_path / "a" / "b" / "x.json"
    files.write_whole(path, "é\n")
    files.write_whole(path, "ü\n")
    assert path.read_text(encoding="utf-8") == "ü\n"
    assert contents(tmp_path).keys() == {"a/b/x.json"}


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    files.write_whole(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"x\.json: cannot be written \(No space left on device\)"):
        files.write_whole(path, "new")
    assert contents(tmp_path) == {"x.json": b"old"}


def test_what_is_no_file_is_not_replaced(tmp_path):
    """A folder, or a pipe in the place of a device: the null device of the machine, say."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(UserError, match="cannot be written .it is no plain file"):
            files.write_whole(tmp_path / name, "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "pipe"]
    assert (tmp_path / "pipe").is_fifo()


# ---- a bucket


def test_copies_to_a_bucket_end_with_the_file_that_makes_them_count(bucket, tmp_path):
    bucket.objects.clear()
    bucket.requests.clear()
    for name in ("a", "manifest.json", "z/b"):
        files.write_whole(tmp_path / "here" / name, name * 1000)
    target = files.place("gs://bucket/there")
    files.copy_folder(tmp_path / "here", target, last="manifest.json")
    newest = max(bucket.objects, key=lambda name: bucket.objects[name].generation)
    assert newest == "there/manifest.json" and bucket.names("there/") == ["a", "manifest.json", "z/b"]
    files.copy(target / "z" / "b", tmp_path / "back" / "b")
    assert (tmp_path / "back" / "b").read_text() == "z/b" * 1000


def test_a_bucket_that_refuses_is_told_and_keeps_what_it_has(bucket):
    path = files.place("gs://bucket/refused/x")
    files.write_whole(path, "old")
    bucket.refuse = re.compile("refused")
    try:
        for write in (files.write_whole, files.append):
            with pytest.raises(UserError, match="^gs://bucket/refused/x: cannot be written .*Forbidden"):
                write(path, "new")
    finally:
        bucket.refuse = None
    assert files.read_text(path) == "old"


def test_what_others_write_is_seen_at_once(bucket):
    folder = files.place("gs://bucket/shared")
    files.write_whole(folder / "a", "")
    assert files.names(folder) == ["a"]
    bucket.put("shared/b", b"", None)  # by another machine
    assert files.names(folder) == ["a", "b"] and files.is_file(folder / "b")
    bucket.remove("shared/a", None)
    assert files.names(folder) == ["b"] and not files.is_file(folder / "a")


@pytest.mark.parametrize("path", ["gs://", "gs://bucket", "gs://bucket/", "s3://bucket/x", "http://x/y"])
def test_what_is_no_place_is_refused(path):
    with pytest.raises(UserError, match="--workdir: got .*; allowed: a folder of this machine, or gs://BUCKET/FOLDER"):
        files.place(path, "--workdir")
