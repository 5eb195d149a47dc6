"""The published training configs and our experiments, both ways.

A published config is nested: `model_type` ('epsilon_hybrid' or 'gamma_hybrid'), `type`, `tokenizer`, `model`,
`training`, `graph`, `noise`, `annealing` and more. Where it says nothing we take what the authors' code takes.
"""

import json
import re
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from hdlm_jax import config as configs
from hdlm_jax.errors import UserError, choose, one_of, require

NAMES = ("config.json", "config.yaml")
LEVELS_LEFT = 5e-3  # survival at u = 1 of their log-linear noise for gamma models
SHIFTED_METHODS = ("AR", "AR_BAD", "AR_SCRATCH")  # of annealing.sampling_method
_MISSING = object()
# What the network of each family has; a config that says otherwise is of a network that was not published.
SWITCHES = {
    "epsilon_hybrid": {"transformer_sigma_conditioning": False, "scale_by_sigma": False},
    "gamma_hybrid": {
        "transformer_sigma_conditioning": True,
        "use_timestep_embedding": True,
        "hybrid_sigma_embedding": True,
        "scale_by_sigma": True,
    },
}


class Published(NamedTuple):
    """A published config.

    Attributes:
      name: of its file, for messages.
      tree: what the file holds.
    """

    name: str
    tree: Mapping[str, Any]

    def get(self, path: str, default: Any = _MISSING) -> Any:
        """The value at a dotted path; a reference `${a.b}` is followed."""
        value = self.tree
        for part in path.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(value, str) and (reference := re.fullmatch(r"\$\{([\w.]+)\}", value)):
            return self.get(reference[1], default)
        if value is None:
            require(default is not _MISSING, f"{self.name}: {path}", None, "a value: it is needed")
            return default
        return value

    def number(self, path: str, kind: type, default: Any = _MISSING) -> Any:
        """The number at a path, which YAML may have left as a text ('1e-4')."""
        value = self.get(path, default)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = None
        good = number is not None and not isinstance(value, bool) and (kind is float or number.is_integer())
        require(good, f"{self.name}: {path}", value, "a whole number" if kind is int else "a number")
        return kind(number)

    def size(self, path: str, default: Any = _MISSING) -> int:
        """The positive whole number at a path."""
        value = self.number(path, int, default)
        require(value >= 1, f"{self.name}: {path}", value, "a positive whole number")
        return value

    def one_of(self, path: str, choices: Mapping[str, Any] | tuple, default: Any = _MISSING) -> str:
        """The word at a path, which must be one of some."""
        value = str(self.get(path, default))
        one_of(f"{self.name}: {path}", value, choices)
        return value

    @property
    def family(self) -> str:
        """'epsilon_hybrid' or 'gamma_hybrid'."""
        return self.one_of("model_type", SWITCHES)


def read(folder: Path) -> Published:
    """The config.json of a published folder, or else its config.yaml.

    Raises:
      UserError: there is none, or it holds no object.
    """
    path = next((folder / name for name in NAMES if (folder / name).is_file()), None)
    require(path is not None, "DIR", str(folder), f"a folder with {' or '.join(NAMES)} and model.safetensors")
    text = path.read_text(encoding="utf-8")
    try:
        tree = json.loads(text) if path.suffix == ".json" else _yaml(text)
    except ValueError as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    require(isinstance(tree, Mapping), str(path), type(tree).__name__, "an object with the training config")
    return Published(path.name, tree)


def _yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(error) from error


class Imported(NamedTuple):
    """An experiment made from a published config.

    Attributes:
      config: the experiment.
      num_tokens: N.
      notes: what of the published setting ours is not exactly.
    """

    config: ConfigDict
    num_tokens: int
    notes: tuple[str, ...]


def to_experiment(published: Published) -> Imported:
    """Our experiment for a published config.

    Raises:
      UserError: an unknown family, a value that is missing or out of range, a network that was not published.
    """
    family, p = published.family, published
    _check_switches(p)
    L = p.size("model.length")
    fields: dict[str, Any] = {
        "data.length": L,
        "model.hidden": p.size("model.hidden_size"),
        "model.blocks": p.size("model.n_blocks"),
        "model.heads": p.size("model.n_heads"),
        "model.mlp_ratio": 4,
        "model.dropout": p.number("model.dropout", float, 0.1),
        "model.prediction": _prediction(p),
        "noise_schedule.kind": "linear",
        "noising.kind": family,
        "sampler.kind": "ancestral",
    }
    order, notes = _hyperschedule(p, L, fields["model.prediction"] == "shifted")
    flat, grouped = order["hyperschedule.kind"] == "flat", "model.context_group" in order
    fields |= order | (_epsilon(p, flat) if family == "epsilon_hybrid" else _gamma(p, grouped))
    return Imported(configs.override(configs.default(), fields), p.size("tokenizer.tokens"), notes)


def _check_switches(p: Published) -> None:
    for name, value in SWITCHES[p.family].items():
        given = p.get(f"model.{name}", value)
        require(given == value, f"{p.name}: model.{name}", given, f"{value} for model_type {p.family!r}")
    kind = p.get("annealing.attention.block_type", "full")
    require(kind == "full", f"{p.name}: annealing.attention.block_type", kind, "'full': a window sees itself whole")


def _prediction(p: Published) -> str:
    if p.family == "gamma_hybrid":
        return "shifted" if p.get("annealing.sampling_method", "SAR") in SHIFTED_METHODS else "aligned"
    return p.one_of("type", ("aligned", "shifted"), "aligned")


def _epsilon(p: Published, flat: bool) -> dict[str, Any]:
    epsilon = p.number("training.epsilon", float)
    fields = {
        "noising.epsilon": epsilon,
        "loss.kind": "hybrid_cross_entropy",
        "loss.token_weight": p.number("training.lambda", float, 1.0),
        "loss.inverse_survival": flat,  # with a hyperschedule the authors leave the factors 1 / (1 - p) out
    }
    if p.one_of("training.loss_type", ("hybrid", "standard"), "hybrid") == "standard":
        return fields | {"noising.kind": "absorb", "noising.epsilon": None}
    return fields | ({"sampler.kind": "acs"} if epsilon > 0 else {})


def _gamma(p: Published, grouped: bool) -> dict[str, Any]:
    p.one_of("graph.type", ("QGamma", "hybrid"), "QGamma")
    gamma = p.number("graph.gamma", float)
    fields = {
        "model.conditioning": p.size("model.cond_dim"),
        "model.interpolation": gamma,
        "noising.gamma": gamma,
        "loss.kind": "published_score_entropy",
        # where settled rows stand beside active ones in training (models/parts.py)
        "loss.settled_weight": p.number("annealing.ce_loss_weight", float, 1.0) if grouped else 0.0,
        "sampler.kind": "analytic",
        "noise_schedule.eps": LEVELS_LEFT,
    }
    if p.one_of("noise.type", ("loglinear", "geometric"), "loglinear") == "loglinear":
        return fields
    ends = {"smin": p.number("noise.sigma_min", float), "smax": p.number("noise.sigma_max", float)}
    return (
        fields
        | {"noise_schedule.kind": "geometric", "noise_schedule.eps": None}
        | {f"noise_schedule.{name}": value for name, value in ends.items()}
    )


def _hyperschedule(p: Published, L: int, shifted: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The fields of the order of generation and of who sees whom, and what is not exact in them."""
    kind = p.one_of("annealing.type", ("None", "block", "simple", "simple_block", "hybrid"), "None")
    tau = p.size("annealing.eval_tau", p.get("annealing.tau", L))
    width = L if kind == "None" else min(p.size("annealing.width"), L)
    if kind in ("None", "block") and width == L:
        return {"model.visibility": "full", "hyperschedule.kind": "flat", "sampler.steps": tau}, ()
    fields: dict[str, Any] = {"model.visibility": "prefix", "hyperschedule.width": width, "hyperschedule.rate": "1"}
    notes = []
    if kind == "block":
        fields |= {"hyperschedule.kind": "block", "hyperschedule.rate": str(Fraction(width, tau))}
    elif kind == "simple":
        rate, exact = (width // tau, True) if width % tau == 0 else (1, False)
        fields |= {"hyperschedule.kind": "slide", "hyperschedule.rate": str(rate)}
        notes += [] if exact else [f"a line over {width} rows and {tau} levels becomes {width} levels, one per call"]
    else:
        inner = min(tau, width)
        fields |= {"hyperschedule.kind": "block_slide", "hyperschedule.block": width, "hyperschedule.width": inner}
        notes.append(f"the slide of {tau} levels inside each block of {width} rows becomes a window of {inner} rows")
    context = p.one_of("annealing.attention.context_type", ("causal", "block_causal", "full"), "causal")
    group = {"causal": 1, "block_causal": width + shifted, "full": L + shifted}[context]
    if group > 1:
        fields |= {"model.context_group": group, "model.inexact_context": True}
        notes.append(
            f"settled rows see whole groups of {group} rows ({context}), so a settled row changes while others settle:"
            " generation feeds all rows at every call, without a cache"
        )
    return fields, tuple(notes)


def of_experiment(config: ConfigDict, num_tokens: int) -> dict[str, Any]:
    """The published config of one of our experiments: what the authors' code needs to open its weights.

    Raises:
      UserError: a network, process or hyperschedule that their code does not have.
    """
    m, family = config.model, _family(config)
    gamma = family == "gamma_hybrid"
    same = m.mlp_ratio == 4 and m.rotary_base == 10_000
    require(same, "model.mlp_ratio, model.rotary_base", (m.mlp_ratio, m.rotary_base), "4 and 10000 in this format")
    drift = config.noising.gamma if gamma else 0.0
    fits = bool(m.conditioning) == gamma and m.interpolation == drift
    given = {"conditioning": m.conditioning, "interpolation": m.interpolation}
    require(fits, "model", given, f"a noise-level embedding with drift {drift} iff noising.kind is 'gamma_hybrid'")
    length, switches = config.data.length, SWITCHES[family]
    return {
        "model_type": family,
        "type": m.prediction,
        "tokenizer": {"tokens": num_tokens, "model": "gpt2"},
        "model": {
            "name": "gamma_hdlm" if gamma else "epsilon_hdlm",
            "type": "ddit",
            "hidden_size": m.hidden,
            "cond_dim": m.conditioning or 128,
            "length": length,
            "n_blocks": m.blocks,
            "n_heads": m.heads,
            "dropout": m.dropout,
            "post_process_logits": gamma,
            "use_timestep_embedding": gamma,
            "hybrid_sigma_embedding": gamma,
            **switches,
        },
        "training": {
            "ema": config.optimizer.ema,
            "loss_type": "hybrid",
            "epsilon": config.noising.epsilon or 0.0,
            "lambda": config.loss.token_weight,
        },
        "graph": {"type": "QGamma", "gamma": drift, "report_all": False, "expanded_sigma": True},
        "noise": _noise(config),
        "annealing": _annealing(config, length),
    }


def _family(config: ConfigDict) -> str:
    kinds = {"absorb": "epsilon_hybrid", "epsilon_hybrid": "epsilon_hybrid", "gamma_hybrid": "gamma_hybrid"}
    return choose("noising.kind (published format)", config.noising.kind, kinds)


def _noise(config: ConfigDict) -> dict[str, Any]:
    kind, fields = configs.block_fields(config.noise_schedule)
    if kind == "geometric":
        return {"type": "geometric", "sigma_min": fields["smin"], "sigma_max": fields["smax"]}
    theirs = LEVELS_LEFT if config.noising.kind == "gamma_hybrid" else 0.0
    linear = kind == "linear" and fields.get("eps", 0.0) == theirs
    require(linear, "noise_schedule", {"kind": kind, **fields}, f"'geometric', or 'linear' with eps {theirs}")
    return {"type": "loglinear", "sigma_min": 1e-4, "sigma_max": 10.0}


def _annealing(config: ConfigDict, length: int) -> dict[str, Any]:
    kind, fields = configs.block_fields(config.hyperschedule)
    known = {"flat": "block", "quenched": "block", "block": "block", "slide": "simple", "block_slide": "hybrid"}
    choose("hyperschedule.kind (published format)", kind, known)
    width = {"flat": length, "quenched": 1, "block_slide": fields.get("block")}.get(kind, fields.get("width"))
    rate = Fraction(fields.get("rate") or "1")
    line = kind not in ("slide", "block_slide") or (rate == 1 if kind == "block_slide" else rate >= 1)
    require(line, "hyperschedule.rate", str(rate), f"1{'' if kind == 'block_slide' else ' or more'} in this format")
    tau = {"flat": fields.get("steps", config.sampler.steps), "quenched": 1}.get(kind)
    tau = int(Fraction(fields["width"]) / rate) if tau is None else tau
    shifted = config.model.prediction == "shifted"
    return {
        "type": known[kind],
        "efficient": False,
        "width": width,
        "tau": tau,
        "eval_tau": tau,
        "sampling_method": "AR" if shifted else "SAR",
        "diffusion_loss_weight": 1.0,
        "ce_loss_weight": config.loss.settled_weight or 1.0,
        "sampling_eps": 1e-4,
        "attention": {"context_type": _context(config, width, length), "block_type": "full"},
        "match_inference": True,
    }


def _context(config: ConfigDict, width: int, length: int) -> str:
    """The name of what settled rows see of one another."""
    group, shifted = config.model.context_group, config.model.prediction == "shifted"
    if config.model.visibility == "full" or group == width + shifted > 1:
        return "block_causal"
    require(group == 1 or group >= length, "model.context_group", group, f"1, {width + shifted} or {length} and more")
    return "causal" if group == 1 else "full"
