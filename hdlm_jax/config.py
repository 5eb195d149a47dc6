"""The experiment: its default fields, overrides, validation, and JSON in and out.

An experiment file defines `get_config(arg="")` and returns `default()` with fields changed; the
argument after a colon (`x.py:smoke`) picks a variant. Each part of the package turns its own block
into its own dataclass or factory and checks the ranges there; here only names and types are held.
"""

import functools
import importlib.util
import json
import re
import traceback
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, config_dict

from hdlm_jax.errors import UserError, choose, require, unknown


def default() -> ConfigDict:
    """Every field of an experiment with its default, locked: unknown names are refused."""
    optional = config_dict.placeholder
    c = ConfigDict()
    c.seed = 0
    c.data = ConfigDict(
        {
            "source": "python_docs",  # 'python_docs' | 'text' | 'tfds'
            "path": "",  # text: files or globs, separated by commas
            "tfds_name": "",  # tfds: any data set with a text field, prepared as ArrayRecord
            "tfds_dir": "",  # tfds: its data_dir ('' = the TFDS default)
            "tfds_field": "text",
            "held_out": 0.05,  # share of the documents held out
            "held_out_path": "",  # text: separate held-out files, instead of a share
            # 'bytes' | 'sentencepiece' (trained on the corpus) | a .model file | a tokenizer.json | a folder
            "tokenizer": "bytes",
            "vocab_size": 2048,  # N of a sentencepiece model trained here
            "length": 128,  # L, tokens per window
            "prepared": "",  # a folder written by `hdlm prepare` ('' = prepare inside the run folder)
        }
    )
    c.model = ConfigDict(
        {
            "hidden": 256,  # D
            "blocks": 6,
            "heads": 4,  # H
            "mlp_ratio": 4,  # F / D
            "dropout": 0.1,
            "prediction": "aligned",  # 'aligned' (row i predicts token i) | 'shifted' (row i - 1 does)
            "visibility": "full",  # 'full' | 'prefix' (settled rows causal, window sees settled + itself)
            "context_group": 1,  # settled rows see whole groups of so many; 1: causal
            "inexact_context": False,  # allow groups that no cache holds exactly (generation then feeds all rows)
            "conditioning": 0,  # width of the noise-level embedding; 0 = the network does not see it
            "interpolation": 0.0,  # drift of the input embedding to the mask's, e^{-interpolation sigma}
            "rotary_base": 10_000.0,
            "vocabulary_multiple": 128,  # embedding and head rows are padded to a multiple of this
            "remat": "full",  # computed anew in the backward pass: 'none' | 'dots' (all but products) | 'full' (blocks)
            "attention": "auto",  # 'xla' | 'splash' (TPU) | 'cudnn' (GPU) | 'auto': splash on TPU where it can be
            "dtype": "float32",  # activations: 'float32' | 'bfloat16'
        }
    )
    c.hyperschedule = ConfigDict(
        {
            "kind": "flat",  # 'quenched' | 'flat' | 'block' | 'slide' | 'block_slide' | 'ar_diffusion'
            "steps": optional(int),  # flat, ar_diffusion: generation steps (training draws continuous times)
            "width": optional(int),  # block, slide, block_slide: window rows
            "rate": optional(str),  # tokens settled per call, '2' or '3/2'
            "block": optional(int),  # block_slide: tokens in which the slide restarts
        }
    )
    c.noise_schedule = ConfigDict(
        {
            "kind": "linear",  # 'linear' | 'cosine' | 'polynomial' | 'geometric' | 'clipped'
            "eps": optional(float),
            "w": optional(float),
            "smin": optional(float),
            "smax": optional(float),
            "base": optional(str),
        }
    )
    c.noising = ConfigDict(
        {
            "kind": "epsilon_hybrid",  # 'absorb' | 'uniform' | 'epsilon_hybrid' | 'gamma_hybrid' | 'gidd' |
            # 'd3pm_band' | 'd3pm_nearest'
            "epsilon": optional(float),  # [0, 1), share of shuffled tokens among the unmasked
            "gamma": optional(float),  # [0, 1), share of the uniform clock
            "uniform_share": optional(float),  # gidd: [0, 1), largest share of random tokens
            "width": optional(int),  # d3pm_band: the longest jump, in token ids
        }
    )
    c.loss = ConfigDict(
        {
            "kind": "hybrid_cross_entropy",  # or 'nelbo' (any process), 'epsilon_nelbo', 'acs_nelbo' (at
            # sampler.eta), 'absorb_nelbo', 'score_entropy', 'published_score_entropy'
            "reading": "cavity",  # nelbo: tokens are read as 'cavity' (from the other positions) | 'posterior'
            "token_weight": 1.0,  # lambda: weight of unmasked tokens (hybrid_cross_entropy)
            "inverse_survival": True,  # divide the token weights by 1 - p, as published for flat training
            "context_weight": 0.0,  # shifted, tiled: weight of next-token cross-entropy on the clean copy
            "settled_weight": 0.0,  # prefix, plain layout: weight of cross-entropy on the settled tokens
            "reconstruction_share": 0.1,  # bounds, continuous times: share of rows at 0+, where that is noise
            "noise_range": (0.0, 1.0),  # training only: draw noise fractions from this range
            "origin_share": 0.5,  # prefix training: share of rows whose text starts at a random origin
            "rows_per_chunk": 2048,  # rows whose logits exist at a time
            "variance": "auto",  # of draws: 'independent' | 'stratified' | 'antithetic' | 'counts'; 'auto': the best
        }
    )
    c.sampler = ConfigDict(
        {
            # 'ancestral' | 'analytic' | 'euler' | 'acs' | 'acs_published' | 'remdm_cap' | 'remdm_rescale' |
            # 'remdm_conf' | 'remdm_switch' | 'remdm_loop' | 'confidence' | 'margin' | 'entropy' | 'mask_predict' |
            # 'threshold' | 'factor' | 'first_hitting'; a dial that is not set has its sampler's default
            "kind": "acs",
            "eta": 0.25,  # in [0, 1]: acs, strength of the correction; remdm, most of a token's chance to be masked
            "t_switch": optional(float),  # remdm_switch: noise fraction from which on tokens are masked again (0.55)
            "t_on": optional(float),  # remdm_loop: noise fraction at which alpha comes to rest (0.55)
            "t_off": optional(float),  # remdm_loop: noise fraction at which it goes on (0.05)
            "alpha_on": optional(float),  # remdm_loop: alpha at rest (0.9)
            "rounding": optional(str),  # confidence ('up'), margin, entropy ('down'): of tokens per call: 'up' | 'down'
            "order_temperature": optional(float),  # confidence, margin, entropy: of the order; 0 takes the best (0)
            "threshold": optional(float),  # threshold: probability from which on tokens are committed, in (0, 1] (0.9)
            "factor": optional(float),  # factor: above 0; more commits more tokens a call (1)
            "steps": 128,  # flat: a model call each at most
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,  # 0 = off
            "repetition_penalty": 1.0,  # divides the probability of tokens that the text holds; 1 = off
            "guidance": 0.0,  # w of classifier-free guidance by what is given; full models; 0 = off
            "cache_dtype": "",  # of keys and values: 'float32' | 'bfloat16' | '' (that of the activations)
            "untrained_correction": False,  # allow acs for a run trained on epsilon_nelbo (it never saw tokens)
        }
    )
    c.optimizer = ConfigDict(
        {
            "learning_rate": 3e-4,
            "schedule": "cosine",  # 'cosine' | 'linear' | 'constant', after the warm-up
            "warmup": 100,  # steps
            "final_share": 0.1,  # learning rate at the end / peak
            "beta1": 0.9,
            "beta2": 0.95,
            "eps": 1e-8,
            "weight_decay": 0.1,  # matrices only
            "clip": 1.0,  # global gradient norm; 0 = off
            "ema": 0.9999,  # decay min(ema, (1 + n) / (10 + n)); 0 = off
        }
    )
    c.training = ConfigDict(
        {
            "initial": "",  # a run or exported folder whose weights a run starts from ('' = fresh ones)
            "steps": 1000,
            "batch": 32,  # texts per optimizer step, over all devices
            "accumulation": 1,  # passes per optimizer step
            "log_every": 20,  # steps
            "evaluate_every": 250,  # steps; 0 = only at the end
            "evaluate_batches": 8,  # held-out batches per evaluation
            "sample_every": 0,  # steps; 0 = only at the end
            "checkpoint_every": 250,  # steps
            "keep": 3,  # newest checkpoints kept, beside the best
            "on_save_error": "stop",  # a checkpoint or record that cannot be written: 'stop' | 'continue'
            "max_skipped": 10,  # steps in a row without a finite loss and gradient after which the run stops
        }
    )
    c.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})  # -1: the devices that are left
    c.lock()
    return c


def load(spec: str, overrides: dict[str, Any] | None = None) -> ConfigDict:
    """Reads an experiment file (`path.py` or `path.py:argument`) and applies dotted overrides.

    Raises:
      UserError: no such file, no `get_config`, an argument it does not know, an unknown field, a
        value of another type.
    """
    path, _, argument = spec.partition(":")
    file = Path(path)
    known = sorted(str(p) for p in Path("experiments").rglob("*.py"))
    require(bool(known) or file.is_file(), "--config", path, "an experiment file, as experiments/quickstart.py")
    if not file.is_file() or file.suffix != ".py":
        raise unknown("--config", path, known)
    config = _of_file(file, argument)
    return override(config, overrides or {})


def _of_file(file: Path, argument: str) -> ConfigDict:
    """What `get_config` of a file returns; whatever goes wrong in it is told with its line."""
    module_spec = importlib.util.spec_from_file_location(f"experiment_{file.stem}", file)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        require(hasattr(module, "get_config"), "--config", str(file), "a file that defines get_config(arg='')")
        config = module.get_config(argument) if argument else module.get_config()
    except UserError:
        raise
    except Exception as error:  # an experiment is a program: anything can go wrong in it
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename) == file.absolute()]
        line = getattr(error, "lineno", None) or (lines[-1] if lines else 1)
        raise UserError(f"--config: {file}, line {line}: {type(error).__name__}: {_reason(error)}") from error
    require(isinstance(config, ConfigDict), "--config", str(file), "a get_config that returns the experiment")
    return config


def _reason(error: BaseException) -> str:
    """What an error says, as one line, without the whole experiment that ml_collections prints for a wrong name."""
    text = error.args[0] if error.args else ""
    if isinstance(text, BaseException):
        return _reason(text)
    return " ".join(re.sub(r" Other fields present.*\n", " ", str(text), flags=re.DOTALL).split())


SIZES = {
    # seconds on any machine: for tests and first looks
    "smoke": {
        "data.length": 32,
        "model.hidden": 16,
        "model.blocks": 1,
        "model.heads": 2,
        "sampler.steps": 4,
        "training.steps": 4,
        "training.batch": 8,
        "training.log_every": 2,
        "training.evaluate_every": 4,
        "training.evaluate_batches": 1,
        "training.checkpoint_every": 4,
    },
    # the published models: 110M parameters beside the embedding, text of 1024 tokens
    "base": {
        "data.length": 1024,
        "data.tokenizer": "sentencepiece",
        "data.vocab_size": 50_000,
        "model.hidden": 768,
        "model.blocks": 12,
        "model.heads": 12,
        "model.dropout": 0.1,
        "model.dtype": "bfloat16",
        "sampler.steps": 1024,
        "optimizer.learning_rate": 3e-4,
        "optimizer.warmup": 2500,
        "optimizer.ema": 0.9999,
        "training.steps": 1_000_000,
        "training.batch": 512,
        "training.log_every": 100,
        "training.evaluate_every": 10_000,
        "training.checkpoint_every": 10_000,
    },
}


def sized(config: ConfigDict, argument: str) -> ConfigDict:
    """An experiment at the size its argument names: '' as it stands, or one of `SIZES`.

    >>> sized(default(), "smoke").model.hidden
    16
    """
    return override(config, choose("--config argument", argument, SIZES)) if argument else config


def override(config: ConfigDict, overrides: dict[str, Any]) -> ConfigDict:
    """Sets dotted fields, e.g. {"model.hidden": "128"}; strings are read as the field's type.

    'none' leaves a field that is None by default not given.

    >>> override(default(), {"model.hidden": "64"}).model.hidden
    64

    Raises:
      UserError: an unknown field, a value of another type.
    """
    for name, value in overrides.items():
        *heads, leaf = name.split(".")
        block = config
        for head in heads:
            if head not in block:
                raise unknown(name, head, block)
            block = block[head]
            require(isinstance(block, ConfigDict), name, leaf, f"nothing below {head!r}, which is a field")
        if leaf not in block:
            raise unknown(name, leaf, block)
        if isinstance(block[leaf], ConfigDict):
            raise UserError(f"{name}: is a block; allowed: one of its fields, as {name}.{next(iter(block[leaf]))}")
        try:
            block[leaf] = _convert(name, value, block.get_type(leaf), block[leaf])
        except TypeError as error:
            raise _wrong_type(name, value, block.get_type(leaf)) from error
    return config


WORDS = {int: "a whole number", float: "a number", tuple: "numbers separated by commas", str: "a text"}


def _wrong_type(name: str, value: Any, kind: type) -> UserError:
    return UserError(f"{name}: got {value!r}; allowed: {WORDS.get(kind, 'true or false')}")


def _convert(name: str, value: Any, kind: type, old: Any) -> Any:
    if name in _optional() and value in (None, "none"):
        return None
    require(value is not None, name, value, "a value")
    if isinstance(value, str) and kind is bool:
        words = {"true": True, "1": True, "false": False, "0": False}
        require(value.lower() in words, name, value, "true or false")
        return words[value.lower()]
    if isinstance(value, str) and kind is not str:
        try:
            value = tuple(float(v) for v in value.strip("()").split(",")) if kind is tuple else kind(value)
        except ValueError as error:
            raise _wrong_type(name, value, kind) from error
    if kind is tuple:
        right = isinstance(value, tuple) and len(value) == len(old)
        require(right, name, value, f"{len(old)} numbers separated by commas")
    return value


@functools.cache
def _optional() -> frozenset[str]:
    """The fields that need not be given."""
    return frozenset(name for name, value in _flat(default().to_dict()).items() if value is None)


def block_fields(block: ConfigDict) -> tuple[str, dict[str, Any]]:
    """A block with a `kind`: the kind and the fields that are set.

    >>> block_fields(override(default(), {"noising.epsilon": "0.01"}).noising)
    ('epsilon_hybrid', {'epsilon': 0.01})
    """
    fields = {k: v for k, v in block.items() if k != "kind" and v is not None}
    return block.kind, fields


def to_json(config: ConfigDict) -> str:
    """The experiment as indented JSON, keys sorted."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> ConfigDict:
    """Reads `to_json`'s output; unknown or missing fields are refused by name.

    But a dial of the sampler that is not there is newer than the file, and has its default.
    """
    config, tree = default(), json.loads(text)
    require(isinstance(tree, dict), "config.json", type(tree).__name__, "an object with the experiment's blocks")
    given, known = _flat(tree), _flat(config.to_dict())
    for name in given:
        if name not in known:
            raise unknown("config.json", name, known)
    newer = {name for name in known if name.startswith("sampler.")} if "sampler" in tree else set()
    missing = sorted(set(known) - set(given) - newer)
    require(not missing, "config.json", f"no {', '.join(missing)}", "every field of the default experiment")
    for name, value in given.items():
        override(config, {name: tuple(value) if isinstance(value, list) else value})
    return config


def differences(old: ConfigDict, new: ConfigDict) -> str:
    """The fields in which two experiments differ, a line each; empty when they are equal.

    >>> print(differences(default(), override(default(), {"model.hidden": "64"})))
      model.hidden: 256 in the run folder, 64 in this command
    """
    there, here = _flat(json.loads(to_json(old))), _flat(json.loads(to_json(new)))
    names = [name for name in there | here if there.get(name) != here.get(name)]
    return "\n".join(
        f"  {name}: {there.get(name)!r} in the run folder, {here.get(name)!r} in this command" for name in names
    )


def _flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    out = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{prefix}{name}.")
        else:
            out[prefix + name] = value
    return out
