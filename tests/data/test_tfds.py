"""Any TFDS dataset in the ArrayRecord format, without TensorFlow."""

import sys

import pytest

from hdlm_jax.data import corpora, prepare
from hdlm_jax.errors import UserError

tfds = pytest.importorskip("tensorflow_datasets")


def build(folder, name="LocalText", splits=("train",), field="text", value=lambda i: f"Document {i}: é."):
    """Prepares a dataset of 20 texts a split, without leaving its class in TFDS's register."""

    def info(self):
        features = tfds.features.FeaturesDict({field: tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def generate(self, split):
        yield from ((f"{split}{i}", {field: value(i)}) for i in range(20))

    members = {
        "VERSION": tfds.core.Version("1.0.0"),
        "__doc__": "A few texts.",
        "__module__": "made_here",
        "_info": info,
        "_split_generators": lambda self, _: {split: self._generate_examples(split) for split in splits},
        "_generate_examples": generate,
    }
    with tfds.core.registered.skip_registration():
        builder = type(name, (tfds.core.GeneratorBasedBuilder,), members)
        builder(data_dir=folder, file_format="array_record").download_and_prepare()
    return str(folder)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tfds")
    build(folder)
    build(folder, "WithValidation", ("train", "validation", "test"))
    build(folder, "OtherField", field="body")
    build(folder, "OnlyTest", ("test",))
    return str(folder)


def test_one_split_is_divided_by_document(data_dir):
    corpus = corpora.load("tfds", tfds_name="local_text", tfds_dir=data_dir, held_out=0.2)
    expected = sorted(f"Document {i}: é." for i in range(20))
    assert sorted([*corpus.train, *corpus.held_out]) == expected
    assert 1 <= len(corpus.held_out) <= 9
    assert corpus.name == "tfds local_text/1.0.0"
    assert "tensorflow" not in sys.modules


def test_the_same_again_and_another_fraction(data_dir):
    first, second, other = (
        corpora.load("tfds", tfds_name="local_text", tfds_dir=data_dir, held_out=f) for f in (0.2, 0.2, 0.7)
    )
    assert (first.sha256, list(first.held_out)) == (second.sha256, list(second.held_out))
    assert first.sha256 != other.sha256


def test_its_own_validation_split_is_held_out(data_dir):
    corpus = corpora.load("tfds", tfds_name="with_validation", tfds_dir=data_dir)
    assert (len(corpus.train), len(corpus.held_out)) == (20, 20)


def test_a_separate_held_out_file_goes_first(data_dir, tmp_path):
    (tmp_path / "v.txt").write_text("Held out.")
    corpus = corpora.load("tfds", tfds_name="with_validation", tfds_dir=data_dir, held_out_path=str(tmp_path / "v.txt"))
    assert (len(corpus.train), list(corpus.held_out)) == (20, ["Held out."])


def test_is_prepared_like_any_other(data_dir, tmp_path):
    config = {"source": "tfds", "tfds_name": "other_field", "tfds_dir": data_dir, "tfds_field": "body"}
    opened = prepare.prepare({**config, "held_out": 0.2, "length": 8}, tmp_path / "out")
    assert opened.manifest["splits"]["train"]["documents"] + len(opened.held_out) > 20
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"tfds_name": ""}, "data.tfds_name: got ''"),
        ({"tfds_name": "no_such"}, "data.tfds_name: got 'no_such': Dataset no_such not found. Prepare it"),
        ({"tfds_name": "local_text:2.0.0"}, "got 'local_text:2.0.0': Dataset local_text not found"),
        ({"tfds_name": "bad name!"}, "data.tfds_name: got 'bad name!'"),
        ({"tfds_name": "local_text", "tfds_dir": "/nowhere"}, "data.tfds_name: got 'local_text'"),
        ({"tfds_name": "lm1b"}, r"is not prepared in .*download_and_prepare\(\)"),
        ({"tfds_name": "only_test"}, r"has no 'train' split but \['test'\]"),
        ({"tfds_name": "other_field"}, r"data.tfds_field: got 'text'; allowed: .*\['body'\]"),
    ],
)
def test_what_is_refused(data_dir, arguments, why):
    with pytest.raises(UserError, match=why):
        corpora.load("tfds", **{"tfds_dir": data_dir, **arguments})
    assert "tensorflow" not in sys.modules


def test_data_without_random_access_are_refused(data_dir, tmp_path):
    folder = build(tmp_path)
    info = tmp_path / "local_text" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match="format without random access. Prepare it once in the ArrayRecord"):
        corpora.load("tfds", tfds_name="local_text", tfds_dir=folder)
