"""A run as a folder for transformers: what is in it. What it computes: test_huggingface_torch.py."""

import ast
import json

import numpy as np
import pytest
import tokenizers as library

import hdlm_jax as hdlm
from hdlm_jax import config as configs
from hdlm_jax import lm
from hdlm_jax.__main__ import main
from hdlm_jax.data import byte_bpe, tokenizers
from hdlm_jax.interop import huggingface, tokenizer_json
from hdlm_jax.models import parts as builders
from hdlm_jax.training import weights_file
from tests.interop.vocabulary import small_vocabulary
from tests.models.tiny import random_params

TEXTS = [
    "the cat sat  on a mat\n\tand THEN the hen ran 1234.5",
    " \u2581 \u00e9 e\u0301 \ufb01 \u00a0 \U0001f600\x7f\r\n [MASK] <unk> <s> <0x41> <|endoftext|>",
    "",
    "\n\n  x",
]


@pytest.fixture(scope="module")
def exported(smoke_run, tmp_path_factory):
    """The smoke run as a folder for transformers."""
    folder = tmp_path_factory.mktemp("huggingface") / "out"
    assert main(["export", str(smoke_run), str(folder), "--format", "huggingface"]) == 0
    return folder


def test_the_files_of_the_folder(exported):
    assert sorted(path.name for path in exported.iterdir()) == [
        "README.md",
        "config.json",
        "configuration_hdlm.py",
        "generation_config.json",
        "generation_hdlm.py",
        "model.safetensors",
        "modeling_hdlm.py",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = json.loads((exported / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_hdlm.HDLMModel"
    assert config["hyperschedule"] == {"kind": "slide", "width": 8, "rate": "1"}
    assert (config["window_width"], config["mask_token_id"], config["bos_token_id"]) == (8, 257, 256)
    assert config["generates"] and config["learned_corrections"]
    sampler = json.loads((exported / "generation_config.json").read_text())
    assert {"sampler": "acs", "eta": 0.25, "max_length": 32, "temperature": 1.0}.items() <= sampler.items()


def test_the_weights_are_ours_with_the_mask_s_row_last(smoke_run, exported):
    ours = hdlm.load(smoke_run).params
    with weights_file.opened(exported / "model.safetensors") as file:
        tensor, names = file.get_tensor, set(file.keys())
        np.testing.assert_array_equal(tensor("vocab_embed.embedding"), ours["embedding"][:258])
        np.testing.assert_array_equal(tensor("blocks.0.attn_qkv.weight"), ours["blocks"]["qkv"]["kernel"][0].T)
        assert file.metadata() == {"format": "pt"}
    assert len(names) == 12


def test_the_programs_stand_alone(exported):
    """They import torch, transformers and each other, and nothing of ours."""
    allowed = {"torch", "transformers", "math", "fractions"}
    for name in huggingface.PROGRAMS:
        tree = ast.parse((exported / name).read_text())
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        absolute = {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
        absolute |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
        assert {module.split(".")[0] for module in absolute} <= allowed
        relative = {f"{node.module}.py" for node in nodes if isinstance(node, ast.ImportFrom) and node.level}
        assert relative <= set(huggingface.PROGRAMS)


def test_the_card_tells_the_bound_the_sampler_and_how_to_use_it(smoke_run, exported):
    card = (exported / "README.md").read_text()
    records = [json.loads(line) for line in (smoke_run / "metrics.jsonl").read_text().splitlines()]
    bound = [record["held_out/bits_per_byte"] for record in records if "held_out/bits_per_byte" in record][-1]
    assert f"| bits_per_byte | {bound:.4f} |" in card and "logged at step 6" in card
    assert "| eta | 0.25 |" in card and "slide: L=32, width 8, rate 1" in card
    assert 'AutoModel.from_pretrained(".", trust_remote_code=True)' in card and "model.generate(" in card


def experiment(num_tokens=5, **changes):
    small = {"data.length": 4, "model.hidden": 8, "model.blocks": 1, "model.heads": 2}
    given = {name.replace("__", "."): value for name, value in changes.items()}
    config = configs.override(configs.default(), small | given)
    made = builders.build(config, num_tokens, num_tokens - 1)
    return lm.LanguageModel(config, made, random_params(made.model), tokenizers.tokens_only(num_tokens), 0)


GAMMA = {"noising__kind": "gamma_hybrid", "noising__gamma": 0.1, "noise_schedule__eps": 1e-3}
SCORES = {"loss__kind": "score_entropy", "model__conditioning": 8}


@pytest.mark.parametrize(
    ("changes", "generates"),
    [
        ({"noising__epsilon": 0.1}, True),
        ({"noising__kind": "absorb", "loss__kind": "absorb_nelbo"}, True),
        ({"noising__kind": "absorb", "noise_schedule__eps": 1e-3} | SCORES, False),
        (GAMMA | SCORES, False),
        (GAMMA | {"loss__kind": "nelbo"}, False),
        ({"noising__kind": "uniform", "loss__kind": "nelbo"}, False),
        ({"noising__kind": "d3pm_nearest", "loss__kind": "nelbo"}, False),
    ],
    ids=str,
)
def test_every_network_is_exported_and_the_folder_says_whether_it_samples(tmp_path, changes, generates):
    experiment(**changes).export(tmp_path / "out", "huggingface")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["generates"] is generates
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("model.generate(" in card) is generates and ("refuses this model" in card) is not generates
    assert "## Held-out text\n\nNot measured.\n" in card
    assert not (tmp_path / "out" / "tokenizer.json").exists()  # a vocabulary without text


@pytest.mark.parametrize(
    ("loss", "allowed", "learned"),
    [("hybrid_cross_entropy", False, True), ("epsilon_nelbo", False, False), ("epsilon_nelbo", True, True)],
)
def test_corrections_that_were_not_trained_are_not_offered(loss, allowed, learned):
    model = experiment(noising__epsilon=0.1, loss__kind=loss, sampler__untrained_correction=allowed)
    assert huggingface.configuration(model.parts, model.config, 4)["learned_corrections"] is learned


@pytest.fixture(scope="module")
def vocabularies():
    """name -> our tokenizer."""
    words = "the cat sat on a mat and then the hen ran 0123456789 over hills and far away\nagain "
    model = tokenizers.train_sentencepiece([words * 3, words.upper(), "\u00e9\u4e2d " * 9], 400)
    return {
        "bytes": tokenizers.bytes_tokenizer(),
        "sentencepiece": tokenizers.sentencepiece(model),
        "byte_bpe": byte_bpe.from_json(small_vocabulary().encode()),
    }


@pytest.mark.parametrize("name", ["bytes", "sentencepiece", "byte_bpe"])
def test_tokenizer_json_gives_our_ids_and_our_text(vocabularies, name):
    ours = vocabularies[name]
    files = tokenizer_json.files(ours, 32)
    theirs = library.Tokenizer.from_str(files["tokenizer.json"].decode())
    theirs.encode_special_tokens = True  # as split_special_tokens asks of transformers
    assert theirs.get_vocab_size() == ours.num_tokens
    assert theirs.token_to_id(byte_bpe.END_OF_TEXT) == ours.end_of_text
    for text in TEXTS:
        ids = theirs.encode(text).ids
        assert ids == ours.encode(text).tolist(), text
        assert theirs.decode(ids) == text
    settings = json.loads(files["tokenizer_config.json"])
    assert settings["split_special_tokens"] and settings["model_max_length"] == 32
    assert ("tokenizer.model" in files) == (name == "sentencepiece")


def test_a_sentencepiece_model_that_is_no_bpe_comes_as_itself():
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on a mat and then the hen ran"] * 30),
        model_writer=model,
        vocab_size=290,
        model_type="unigram",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    assert set(tokenizer_json.files(tokenizers.sentencepiece(model.getvalue()), 32)) == {"tokenizer.model"}
