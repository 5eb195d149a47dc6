"""Prepared data in a bucket: written with the manifest last, copied once to each machine."""

import numpy as np
import pytest

from hdlm_jax import files
from hdlm_jax.data import prepare
from hdlm_jax.errors import UserError

FOLDER = "gs://bucket/data"


@pytest.fixture
def block(bucket, small_text, tmp_path, monkeypatch):
    """The data block of a small text, an empty bucket and an empty cache."""
    bucket.objects.clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return {"source": "text", "path": str(small_text), "tokenizer": "bytes", "length": 32}


def test_data_in_a_bucket_are_those_of_a_folder(block, bucket, tmp_path):
    there, here = prepare.prepare(block, FOLDER), prepare.prepare(block, tmp_path / "here")
    assert bucket.names("data/") == sorted(path.name for path in (tmp_path / "here").iterdir())
    assert max(bucket.objects, key=lambda name: bucket.objects[name].generation) == "data/manifest.json"
    assert there.manifest == here.manifest and there.tokenizer.fingerprint == here.tokenizer.fingerprint
    for a, b in ((there.train, here.train), (there.held_out, here.held_out)):
        np.testing.assert_array_equal(np.stack([a[i] for i in range(len(a))]), np.stack([b[i] for i in range(len(b))]))


def test_they_are_copied_once(block, bucket):
    prepare.prepare(block, FOLDER)
    bucket.requests.clear()
    prepare.open_or_prepare({"length": 32, "prepared": FOLDER}, "nowhere")
    assert bucket.requests and not any("array_record" in path for _, path in bucket.requests)
    (copy,) = files.cache("data").iterdir()
    files.remove(copy)
    prepare.open_prepared(FOLDER)
    assert any("array_record" in path for _, path in bucket.requests)
    assert [path.name for path in files.cache("data").iterdir()] == [copy.name]  # nothing half-copied is left


def test_a_copy_that_is_cut_short_leaves_nothing_in_the_cache(block, bucket):
    prepare.prepare(block, FOLDER)
    (copy,) = files.cache("data").iterdir()
    files.remove(copy)
    (name,) = (name for name in bucket.objects if "/train-" in name)
    bucket.put(name, bucket.objects[name].data[:-1], None)
    with pytest.raises(UserError, match="data.prepared: got .*allowed: the .* bytes that were written"):
        prepare.open_prepared(FOLDER)


def test_without_a_manifest_there_are_no_data(block, bucket):
    prepare.prepare(block, FOLDER)
    bucket.remove("data/manifest.json", None)
    with pytest.raises(UserError, match="data.prepared: got 'gs://bucket/data'; allowed: a folder that `hdlm prepare`"):
        prepare.open_prepared(FOLDER)
    with pytest.raises(UserError, match="out: got 'gs://bucket/data'; allowed: a new or empty folder"):
        prepare.prepare(block, FOLDER)
