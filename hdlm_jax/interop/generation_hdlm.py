# Exported modeling file: `hdlm export --format huggingface` puts a copy of it beside the weights.
"""Generation with an exported hdlm_jax model: hyperschedules, noise, and the steps from noise to text.

A hyperschedule gives every position a level at every step, from tau_max (pure noise) down to 0 (settled); alpha, the
survival of a token, is 1 at level 0. In a step from alpha_t to alpha_s a mask becomes a token with probability
pt = (alpha_s - alpha_t) / (1 - alpha_t). Adaptive correction (`acs`) draws an unmasked token again with probability
eta (1 - pt). In a position's last step every token is drawn from p(x | z), masked or not.

All rows are fed in every step in which some token is drawn: there is no cache.
"""

import math
from fractions import Fraction

import torch

KINDS = {
    "quenched": (),
    "flat": ("steps",),
    "block": ("width", "rate"),
    "slide": ("width", "rate"),
    "block_slide": ("block", "width", "rate"),
    "ar_diffusion": ("steps",),
}
SAMPLERS = ("ancestral", "analytic", "acs", "acs_published")


def generate(
    model,
    input_ids=None,
    attention_mask=None,
    *,
    max_length=None,
    num_return_sequences=1,
    hyperschedule=None,
    sampler=None,
    eta=None,
    temperature=None,
    top_k=None,
    top_p=None,
    generator=None,
    **fields,
):
    """Finished texts, int64 [B * num_return_sequences, max_length].

    Args:
      model: an `HDLMModel`.
      input_ids: [B, P] prompts, in which masks are filled in; None: one text without a prompt.
      attention_mask: [B, P], 0 at padding, on either side.
      max_length: tokens in all, prompt included; default and limit: the trained length.
      num_return_sequences: texts per prompt.
      hyperschedule: a kind, its `width`, `rate`, `block` or `steps` among the fields; default: the trained one.
      sampler: 'ancestral', 'acs' or 'acs_published'; defaults of this and of what follows: generation_config.json.
      eta: strength of the correction, in [0, 1].
      temperature, top_k, top_p: filters of the scores; temperature 0 is greedy.
      generator: a torch.Generator on the model's device.
      **fields: of the hyperschedule.
    """
    c = model.config
    if not c.generates:
        raise ValueError(
            f"generate: this file knows no way back for noising {c.noising['kind']!r} read as {c.reading!r};"
            " allowed: sample with hdlm_jax, or call the model itself"
        )

    def setting(name, given, off):
        value = getattr(model.generation_config, name, None) if given is None else given
        return off if value is None else value

    sampler = setting("sampler", sampler, "ancestral")
    rule = Rule(c, sampler, float(setting("eta", eta, 0.0)) if sampler.startswith("acs") else 0.0)
    filters = (
        float(setting("temperature", temperature, 1.0)),
        int(setting("top_k", top_k, 0)),
        float(setting("top_p", top_p, 1.0)),
    )
    _check(filters[0] >= 0, "temperature", filters[0], "a number >= 0 (0 is greedy)")
    _check(filters[1] >= 0, "top_k", filters[1], "a whole number >= 0 (0 is off)")
    _check(0 < filters[2] <= 1, "top_p", filters[2], "a number in (0, 1]")
    length = c.max_position_embeddings if max_length is None else max_length
    _check(1 <= length <= c.max_position_embeddings, "max_length", length, f"1 .. {c.max_position_embeddings}")
    kind = hyperschedule or c.hyperschedule["kind"]
    trained = c.hyperschedule if kind == c.hyperschedule["kind"] else {}
    fields = {name: value for name, value in {**trained, **fields}.items() if name != "kind"}
    levels = levels_of(kind, length, **fields)
    windows = windows_of(levels)
    _check_windows(c, windows)
    fresh = int(levels.max()) == 1 or (kind == "slide" and _rate(fields) >= 1)
    trailing = survival(c.noise_schedule, 1.0) > 0 or not fresh
    x, given = _start(model, input_ids, attention_mask, length, num_return_sequences, generator)
    return _run(model, x, given, levels, windows, rule, filters, trailing, generator)


class Rule:
    """When a token is drawn again, and from what.

    Attributes:
      mask: its id, N.
      alpha_max: survival of the least noise.
      eta: strength of the correction of unmasked tokens.
      odds: log of the factor by which p(x | z) exceeds the network's probability at x = z, at a token z.
      smoothing: share of uniform tokens mixed into what is drawn.
      exact_last: whether a position's last step draws from p(x | z).
    """

    def __init__(self, config, sampler, eta):
        kind, published = config.noising["kind"], sampler == "acs_published"
        _check(sampler in SAMPLERS, "sampler", sampler, ", ".join(map(repr, SAMPLERS)))
        fits = kind == "epsilon_hybrid" or not sampler.startswith("acs")
        _check(fits, "sampler", sampler, f"'ancestral' for noising {kind!r}")
        _check(0 <= eta <= 1, "eta", eta, "a number in [0, 1]")
        _check(eta == 0 or config.learned_corrections, "eta", eta, "0: this network was not trained to correct tokens")
        self.mask, self.alpha_max, self.eta = config.mask_token_id, config.alpha_max, eta
        self.clean = config.epsilon == 0  # an unmasked token is certain: drawing it again would give it back
        self.odds = 0.0 if published or self.clean else log_odds(config.num_tokens, config.epsilon, config.reading)
        self.smoothing = 0.0 if published else config.epsilon
        self.exact_last = not published

    def change(self, zt, alpha_t, alpha_s):
        """Probability that each position draws its token; 0 where it does not change."""
        before, after = (torch.where(a >= self.alpha_max, 1.0, a) for a in (alpha_t, alpha_s))
        transfer = torch.where(before < 1, (after - before) / (1 - before).clamp_min(1e-30), 1.0)
        token = torch.where(self.last(alpha_s), 1.0, self.eta * (1 - transfer))
        token = torch.zeros_like(token) if self.clean else token
        return torch.where(alpha_s > alpha_t, torch.where(zt == self.mask, transfer, token), 0.0)

    def last(self, alpha_s):
        """Where the step is the exact last one."""
        return (alpha_s >= 1) & self.exact_last

    def law(self, zt, scores, alpha_s):
        """Probabilities [n, N] of the tokens drawn at n positions, of scores [n, N]."""
        if self.odds:
            own = torch.arange(scores.shape[-1], device=zt.device) == zt[:, None]
            scores = torch.where(own, scores + self.odds, scores)
        p = scores.softmax(-1)
        smoothing = torch.where(self.last(alpha_s), 0.0, self.smoothing).to(p.dtype)[:, None]
        return (1 - smoothing) * p + smoothing / p.shape[-1]


def log_odds(num_tokens, epsilon, reading):
    """Where q(z | x) is proportional to (1 - epsilon) 1[x = z] + epsilon / N."""
    cavity = math.log1p((1 - epsilon) * num_tokens / epsilon)
    return {"posterior": 0.0, "cavity": cavity, "hybrid": cavity - math.log1p(num_tokens)}[reading]


def survival(schedule, u):
    """alpha at a noise fraction u in [0, 1], a float."""
    kind, eps = schedule["kind"], schedule.get("eps") or 0.0
    if kind == "clipped":
        return (1 - 2 * eps) * survival({**schedule, "kind": schedule["base"], "eps": 0.0}, u) + eps
    if kind == "linear":
        return (1 - u) + eps * u
    if kind == "cosine":
        return 2 * math.sin(math.pi / 4 * (1 - u)) ** 2
    if kind == "polynomial":
        return 1 - u ** schedule["w"]
    return math.exp(-(schedule["smin"] ** (1 - u)) * schedule["smax"] ** u)  # geometric


def survivals(config, tau_max):
    """alpha of the levels 0 .. tau_max, a list: exactly 1 at 0, at most alpha_max above."""
    above = [min(survival(config.noise_schedule, level / tau_max), config.alpha_max) for level in range(1, tau_max + 1)]
    return [1.0, *above]


def levels_of(kind, length, **fields):
    """Levels of a hyperschedule, integers [T + 1, L]."""
    _check(kind in KINDS, "hyperschedule", kind, ", ".join(KINDS))
    needed = KINDS[kind]
    fields = {name: value for name, value in fields.items() if value is not None}
    _check(set(fields) == set(needed), "hyperschedule", sorted(fields), f"{', '.join(needed) or 'no fields'} ({kind})")
    i = torch.arange(length)
    if kind == "ar_diffusion":
        return _line(length, int(fields["steps"]))
    if kind in ("quenched", "flat"):
        tau_max = 1 if kind == "quenched" else int(fields["steps"])
        starts = i if kind == "quenched" else 0 * i
    else:
        width, rate = int(fields["width"]), _rate(fields)
        span = int(fields.get("block", length))
        fits = 0 < rate <= width <= span <= length and (width / rate).denominator == 1
        _check(fits, "width, rate", (width, str(rate)), f"0 < rate <= width <= {span}, width / rate a whole number")
        tau_max = int(width / rate)
        if kind == "block":
            starts = i // width * tau_max
        else:
            inside = lambda j: j * rate.denominator // rate.numerator
            starts = i // span * (inside(span - 1) + tau_max) + inside(i % span)
    _check(tau_max >= 1, "steps", tau_max, "a positive integer")
    steps = torch.arange(int(starts[-1]) + tau_max + 1)
    return (starts[None] + tau_max - steps[:, None]).clamp(0, tau_max)


def _rate(fields):
    return Fraction(str(fields["rate"]))


def _line(length, steps):
    """AR-Diffusion: at each step a line through position 2 L at tau_max, rounded half to even."""
    _check(steps >= length, "steps", steps, f"{length}, the length, or more")
    tau_max, j = steps - length + 1, torch.arange(length)[None]
    ahead = (steps - torch.arange(steps + 1))[:, None]
    position, level = (length - 1 - ahead).clamp(0, length), (ahead - (length - 1)).clamp(0, tau_max)
    run = 2 * length - position
    height = tau_max * run - (2 * length - j) * (tau_max - level)
    floor, twice = height // run, height % run * 2
    return (floor + ((twice > run) | ((twice == run) & (floor % 2 == 1))).long()).clamp(0, tau_max)


def windows_of(levels):
    """(start, stop) of the smallest interval of active positions in every call, a list of T pairs."""
    active = (levels[:-1] > 0) & (levels[1:] < levels.max())
    first = active.int().argmax(1)
    stop = levels.shape[1] - active.flip(1).int().argmax(1)
    return list(zip(first.tolist(), stop.tolist(), strict=True))


def _check_windows(config, windows):
    if config.visibility == "full":
        return
    width = max(stop - start for start, stop in windows)
    allowed = f"at most {config.window_width}, the widest window of training"
    _check(width <= config.window_width, "hyperschedule", f"width {width}", allowed)
    whole = config.inexact_context or all(start % config.context_group == 0 for start, _ in windows)
    _check(whole, "hyperschedule", "other windows", f"windows that start at multiples of {config.context_group}")


def _start(model, input_ids, attention_mask, length, copies, generator):
    """What is given and noise elsewhere, int64 [B, L], and where it is given."""
    c, device = model.config, model.device
    prompts = torch.zeros(1, 0, dtype=torch.long) if input_ids is None else torch.as_tensor(input_ids)
    kept = torch.ones_like(prompts) if attention_mask is None else torch.as_tensor(attention_mask)
    prompts, kept = (x.to(device).repeat_interleave(copies, 0) for x in (prompts, kept.bool()))
    longest = int(kept.sum(1).max())
    _check(longest <= length, "input_ids", f"{longest} tokens", f"at most {length}")
    x = torch.full((len(prompts), length), c.mask_token_id, device=device)
    for row, prompt, keep in zip(x, prompts, kept, strict=True):
        row[: int(keep.sum())] = prompt[keep]
    given = x != c.mask_token_id
    unmasked = torch.rand(x.shape, device=device, generator=generator) < survival(c.noise_schedule, 1.0)
    tokens = torch.randint(c.num_tokens, x.shape, device=device, generator=generator)
    return torch.where(given, x, torch.where(unmasked, tokens, c.mask_token_id)), given


def _run(model, x, given, levels, windows, rule, filters, trailing, generator):
    c, device, L = model.config, x.device, x.shape[1]
    wide = torch.float32 if device.type == "mps" else torch.float64
    alphas = torch.tensor(survivals(c, int(levels.max())), device=device, dtype=wide)
    levels = levels.to(device)
    group = 1 if c.inexact_context else c.context_group
    origin = given.long().cumprod(1).sum(1) // group * group
    relative = torch.arange(L, device=device) - origin[:, None]
    fixed, place = given | (relative < 0), relative.clamp_min(0)
    for step, (start, stop) in enumerate(windows):
        alpha_t, alpha_s = (torch.where(fixed, 1.0, alphas[levels[step + k]][place]) for k in (0, 1))
        change = rule.change(x, alpha_t, alpha_s)
        drawn = torch.rand(x.shape, device=device, dtype=wide, generator=generator) < change
        if not drawn.any():
            continue
        bounds = (start + origin, (stop + origin).clamp_max(L))
        sigma = -alpha_t.log().clamp(-c.sigma_range[1], -c.sigma_range[0]).float()
        hidden = model.rows(x, sigma, *bounds, trailing=trailing)[drawn]
        new = []
        for z, rows, alpha in zip(*(part.split(1024) for part in (x[drawn], hidden, alpha_s[drawn])), strict=True):
            scores = filtered(model.output_layer(rows)[:, :-1].to(wide), *filters)
            new.append(torch.multinomial(rule.law(z, scores, alpha), 1, generator=generator)[:, 0])
        x[drawn] = torch.cat(new)
    return x


def filtered(scores, temperature=1.0, top_k=0, top_p=1.0):
    """Temperature (0 is greedy), then top-k, then top-p, on scores [n, N]."""
    if temperature == 0:
        best = torch.arange(scores.shape[-1], device=scores.device) == scores.argmax(-1, keepdim=True)
        scores = torch.where(best, 0.0, -math.inf)
    else:
        scores = scores / temperature
    if 0 < top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -math.inf)
    if top_p < 1:
        sorted_scores = scores.sort(-1, descending=True).values
        p = sorted_scores.softmax(-1)
        least = sorted_scores.masked_fill(p.cumsum(-1) - p >= top_p, math.inf).min(-1, keepdim=True).values
        scores = scores.masked_fill(scores < least, -math.inf)
    return scores


def _check(condition, field, given, allowed):
    if not condition:
        raise ValueError(f"{field}: got {given!r}; allowed: {allowed}")
