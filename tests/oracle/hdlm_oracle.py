"""Independent float64 oracle (numpy/scipy only) for discrete-diffusion language models (HDLM, arXiv 2504.06416).

CONVENTIONS
  N ordinary tokens 0..N-1, mask token m = N, K = N+1 states (K = N for the mask-free uniform chain).
  Row convention: T[i, j] = P(noisier = j | cleaner = i); Q[i, j] (i != j) = forward rate i -> j; rows of Q sum to 0,
  q_sigma(.|x) = row x of expm(sigma Q).  (SEDD writes the transpose.)
  "time" t of a chain is sigma for Absorb / Uniform / Gamma / Epsilon, and t in [0,1] for GIDD; rates are per unit of it.
  z arrays may have any batch shape [...]; results are [..., K]; p (x0-probabilities) is [..., N].
  Every chain here except the D3PM spectral one has marginals of the form q_t(z|x) = a_t 1[z=x] + b_t[z]
  and transitions T_{t|s}(i->j) = a 1[i=j] + c[j] for ordinary i, plus one special mask row: everything is O(N).
  M1 ("posterior mean"): network gives p_theta(x|z_t);  M2 ("plug-in"/GIDD): network gives the cavity xbar,
  p_theta(z_s|z_t) = q(z_s|z_t, xbar).  M2 == M1 with p(x|z_t) ∝ xbar(x) q_t(z_t|x)  (`cavity_to_posterior`).
"""

import numpy as np
from scipy.linalg import expm
from scipy.special import xlogy, softmax

ZERO_PLUS = 5e-324  # the time 0+ of the epsilon chain (after the atom at t=0, before any masking)


def onehot(i, K):
    return np.eye(K)[np.asarray(i)]


def kl(p, q):  # KL over the last axis, 0 log 0 = 0
    return (xlogy(p, p) - xlogy(p, q)).sum(-1)


# ------------------------------------------------------------------ 0. generators (brute force side)
def Q_absorb(N):
    Q = -np.eye(N + 1)
    Q[:, N] += 1.0
    return Q  # mask row is 0


def Q_uniform(N, with_mask=True):
    Q = np.full((N, N), 1.0 / N) - np.eye(N)
    if with_mask:
        R = np.zeros((N + 1, N + 1))
        R[:N, :N] = Q
        return R
    return Q


def Q_gamma(N, gamma):
    return (1 - gamma) * Q_absorb(N) + gamma * Q_uniform(N)


# ------------------------------------------------------------------ 1. closed-form chains
class Absorb:
    """q_sigma(z|x) = e^-s 1[z=x] + (1-e^-s) 1[z=m]."""

    def __init__(self, N):
        self.N, self.K, self.mask = N, N + 1, N

    def marg(self, t):
        b = np.zeros(self.K)
        b[self.N] = -np.expm1(-t)
        return np.exp(-t), b

    def step(self, s, t):
        a, c = self.marg(np.inf if np.isinf(t) else t - s)
        return a, c, onehot(self.N, self.K)

    def rate(self, t):
        return onehot(self.N, self.K), np.zeros(self.K)


class Uniform:
    """q_sigma(z|x) = e^-s 1[z=x] + (1-e^-s)/N, K = N, no mask."""

    def __init__(self, N):
        self.N, self.K, self.mask = N, N, None

    def marg(self, t):
        return np.exp(-t), np.full(self.N, -np.expm1(-t) / self.N)

    def step(self, s, t):
        a, c = self.marg(np.inf if np.isinf(t) else t - s)
        return a, c, None

    def rate(self, t):
        return np.full(self.N, 1.0 / self.N), None


class Gamma:
    """exp(sigma Q_gamma): A = e^{-(1-g)s}, a = e^{-s}; a 1[z=x] + (A-a)/N 1[z<N] + (1-A) 1[z=m]; mask absorbing."""

    def __init__(self, N, gamma):
        self.N, self.K, self.mask, self.g = N, N + 1, N, gamma

    def clocks(self, t):  # (absorbing clock, uniform clock), safe at t = inf
        return tuple(0.0 if c == 0 else c * t for c in (1 - self.g, self.g))

    def marg(self, t):
        ab, un = self.clocks(t)
        b = np.empty(self.K)
        b[: self.N] = np.exp(-ab) * -np.expm1(-un) / self.N
        b[self.N] = -np.expm1(-ab)
        return np.exp(-t), b

    def step(self, s, t):
        a, c = self.marg(t - s)
        return a, c, onehot(self.N, self.K)

    def rate(self, t):
        rho = np.full(self.K, self.g / self.N)
        rho[self.N] = 1 - self.g
        return rho, np.zeros(self.K)


class Epsilon:
    """epsilon-hybrid: alpha[(1-eps) 1[z=x] + eps/N] + (1-alpha) 1[z=m], alpha = e^-sigma, for sigma > 0; 1[z=x] at 0.
    Its ONLY Markov chain (homogeneous in x): at t=0 the kernel (1-eps) I + eps U (the atom), for 0<s<t pure absorb."""

    def __init__(self, N, eps):
        self.N, self.K, self.mask, self.eps = N, N + 1, N, eps

    def marg(self, t):
        b = np.zeros(self.K)
        if t == 0:
            return 1.0, b
        b[: self.N] = np.exp(-t) * self.eps / self.N
        b[self.N] = -np.expm1(-t) if t > ZERO_PLUS else 0.0
        return np.exp(-t) * (1 - self.eps), b

    def step(self, s, t):
        if s == 0:
            a, c = self.marg(t)
        else:
            d = np.inf if np.isinf(t) else t - s
            a, c = np.exp(-d), np.zeros(self.K)
            c[self.N] = -np.expm1(-d)
        return a, c, onehot(self.N, self.K)

    def rate(self, t):
        return onehot(self.N, self.K), np.zeros(self.K)


class GIDD:
    """q_t(z|x) = alpha(t) 1[z=x] + bpi(t)[z], bpi = beta_t pi_t (K-vector), sum(bpi) = 1 - alpha.
    Chain: T_{t|s} = (al_t/al_s) I + 1 c^T, c = bpi_t - (al_t/al_s) bpi_s (must be >= 0), mask treated like any state."""

    def __init__(self, N, alpha, bpi, dalpha, dbpi):
        self.N, self.K, self.mask = N, N + 1, N
        self.al, self.bp, self.dal, self.dbp = alpha, bpi, dalpha, dbpi

    def marg(self, t):
        return self.al(t), self.bp(t)

    def step(self, s, t):
        a = self.al(t) / self.al(s)
        c = self.bp(t) - a * self.bp(s)
        return a, c, a * onehot(self.N, self.K) + c

    def rate(self, t):  # rho_t(z) = (beta pi)'(z) - (alpha'/alpha) (beta pi)(z)
        r = self.dbp(t) - self.dal(t) / self.al(t) * self.bp(t)
        return r, r


def gidd_hybrid(N, p_u, shape=1.0):
    """GIDD mask+uniform mixing: C=1+N c, c=B t^{g/2}(1-t)^{g/2}, B=2^g p_u/(N(1-p_u)); alpha=(1-t)/C,
    beta pi = (t e_m + c 1_ordinary)/C."""
    B, h = 2**shape * p_u / (N * (1 - p_u)), shape / 2
    c = lambda t: B * t**h * (1 - t) ** h
    dc = lambda t: B * h * (t ** (h - 1) * (1 - t) ** h - t**h * (1 - t) ** (h - 1))
    C = lambda t: 1 + N * c(t)

    def num(t):
        v = np.full(N + 1, c(t))
        v[N] = t
        return v

    def dnum(t):
        v = np.full(N + 1, dc(t))
        v[N] = 1.0
        return v

    return GIDD(
        N,
        lambda t: (1 - t) / C(t),
        lambda t: num(t) / C(t),
        lambda t: -1 / C(t) - (1 - t) * N * dc(t) / C(t) ** 2,
        lambda t: dnum(t) / C(t) - num(t) * N * dc(t) / C(t) ** 2,
    )


def gamma_as_gidd(N, g):
    """The OTHER chain with the gamma-hybrid marginals (GIDD type: the mask can be re-noised to ordinary tokens)."""
    G = Gamma(N, g)

    def dbp(t):
        v = np.full(N + 1, (np.exp(-t) - (1 - g) * np.exp(-(1 - g) * t)) / N)
        v[N] = (1 - g) * np.exp(-(1 - g) * t)
        return v

    return GIDD(N, lambda t: np.exp(-t), lambda t: G.marg(t)[1], lambda t: -np.exp(-t), dbp)


def marginal_table(ch, t):
    """[N, K]: q_t(z|x)."""
    a, b = ch.marg(t)
    return a * np.eye(ch.N, ch.K) + b


def transition_matrix(ch, s, t):
    """[K, K] row-stochastic T_{t|s}."""
    a, c, mrow = ch.step(s, t)
    T = a * np.eye(ch.K) + c
    if ch.mask is not None:
        T[ch.mask] = mrow
    return T


# ---- D3PM structured (symmetric) chains: spectral
def band_rate(N, v, cyclic=False):
    """D3PM banded uniform: rate 1/(2v) to each token at distance 1..v (fewer at the ends if not cyclic)."""
    i = np.arange(N)
    d = np.abs(i[:, None] - i)
    if cyclic:
        d = np.minimum(d, N - d)
    R = ((d > 0) & (d <= v)) / (2.0 * v)
    return R - np.diag(R.sum(1))


def knn_rate(emb, k):
    """D3PM nearest-neighbour: A = (G + G^T)/(2k), G = directed kNN graph in embedding space; R = A - diag(A 1)."""
    d = ((emb[:, None] - emb[None]) ** 2).sum(-1)
    np.fill_diagonal(d, np.inf)
    G = np.zeros(d.shape)
    np.put_along_axis(G, np.argsort(d, 1)[:, :k], 1.0, 1)
    A = (G + G.T) / (2 * k)
    return A - np.diag(A.sum(1))


def spectral_kernel(R, sigma):
    """exp(sigma R) for symmetric R = V diag(lam) V^T."""
    lam, V = np.linalg.eigh(R)
    return (V * np.exp(sigma * lam)) @ V.T


def cyclic_band_kernel(N, v, sigma):
    """Circulant: T[i, j] = k[(j-i) mod N], k = ifft(exp(sigma lam)), lam_q = (1/v) sum_{d=1}^v cos(2 pi q d/N) - 1 (2v < N)."""
    q = np.arange(N)
    lam = np.cos(2 * np.pi * np.outer(q, np.arange(1, v + 1)) / N).sum(1) / v - 1
    k = np.fft.ifft(np.exp(sigma * lam)).real
    return k[(q[None] - q[:, None]) % N]


def path_kernel(N, sigma):
    """v=1, non-cyclic (nearest token index): DCT-II modes, lam_q = cos(pi q/N) - 1."""
    q, i = np.arange(N), np.arange(N)
    V = np.cos(np.pi * np.outer(i + 0.5, q) / N) * np.sqrt(np.where(q == 0, 1, 2) / N)
    return (V * np.exp(sigma * (np.cos(np.pi * q / N) - 1))) @ V.T


def d3pm_cumulative(R, betas):
    """Discrete D3PM: prod_t (I + beta_t R), commuting -> V prod(1 + beta lam) V^T."""
    lam, V = np.linalg.eigh(R)
    return (V * np.prod(1 + np.asarray(betas)[:, None] * lam, 0)) @ V.T


def matrix_posterior(Ts, Tts, zt, x):
    """Generic Bayes from matrices (any chain): [K]."""
    p = Ts[x] * Tts[:, zt]
    return p / p.sum()


def matrix_reverse_kernel(Ts, Tts, zt, p):
    """M1 for any chain, O(K N): lik[y] * sum_x w_x Ts[x, y], w_x = p_x / (Ts Tts)[x, zt]."""
    N = len(p)
    return Tts[:, zt] * ((p / (Ts @ Tts)[:N, zt]) @ Ts[:N])


# ------------------------------------------------------------------ 2. posteriors and reverse kernels, O(N)
def lik_column(ch, s, t, zt):
    """[..., K]: T_{t|s}(y -> z_t) as a function of y (SEDD's transp_transition)."""
    a, c, mrow = ch.step(s, t)
    out = a * onehot(zt, ch.K) + c[zt][..., None]
    if ch.mask is not None:
        out[..., ch.mask] = mrow[zt]
    return out


def evidence(ch, t, zt):
    """[..., N]: q_t(z_t|x) as a function of x."""
    a, b = ch.marg(t)
    return a * np.eye(ch.K, ch.N)[zt] + b[zt][..., None]


def posterior(ch, s, t, zt, x):
    """q(z_s|z_t,x), [..., K]."""
    zt, x = np.asarray(zt), np.asarray(x)
    a, b = ch.marg(s)
    num = (a * onehot(x, ch.K) + b) * lik_column(ch, s, t, zt)
    a, b = ch.marg(t)
    return num / (a * (zt == x) + b[zt])[..., None]


def restrict(ch, t, zt, p):
    """Zero p_theta(x|z_t) where q_t(z_t|x)=0 and renormalise (for absorb: carry-over unmasking)."""
    p = p * (evidence(ch, t, np.asarray(zt)) > 0)
    return p / p.sum(-1, keepdims=True)


def _w(ch, t, zt, p):
    e = evidence(ch, t, zt)
    if np.any((p > 0) & (e == 0)):
        raise ValueError("p_theta puts mass where q_t(z_t|x)=0: call restrict()")
    return np.divide(p, e, out=np.zeros_like(e), where=e > 0)


def reverse_kernel(ch, s, t, zt, p):
    """M1: sum_x p(x|z_t) q(z_s|z_t,x) = T(z_s->z_t) [a_s w_{z_s} + b_s[z_s] W], w_x = p_x/q_t(z_t|x), W = sum w."""
    zt = np.asarray(zt)
    w = _w(ch, t, zt, np.asarray(p, float))
    a, b = ch.marg(s)
    mix = b * w.sum(-1, keepdims=True)
    mix[..., : ch.N] += a * w
    return lik_column(ch, s, t, zt) * mix


def reverse_kernel_plugin(ch, s, t, zt, xbar):
    """M2 (GIDD): q(z_s|z_t, xbar) = T(z_s->z_t) q_s(z_s|xbar) / q_t(z_t|xbar)."""
    zt = np.asarray(zt)
    a, b = ch.marg(s)
    mix = np.broadcast_to(b, zt.shape + (ch.K,)).copy()
    mix[..., : ch.N] += a * xbar
    den = (evidence(ch, t, zt) * xbar).sum(-1, keepdims=True)
    return lik_column(ch, s, t, zt) * mix / den


def cavity_to_posterior(ch, t, zt, xbar):
    p = xbar * evidence(ch, t, np.asarray(zt))
    return p / p.sum(-1, keepdims=True)


# ------------------------------------------------------------------ 3. scores
def true_score(ch, t, zt, x):
    """r_y = q_t(y|x)/q_t(z_t|x), [..., K]."""
    zt, x = np.asarray(zt), np.asarray(x)
    a, b = ch.marg(t)
    q = a * onehot(x, ch.K) + b
    return q / np.take_along_axis(q, zt[..., None], -1)


def score_from_mean(ch, t, zt, p):
    """M1 score s_y = sum_x p(x|z_t) q_t(y|x)/q_t(z_t|x) = a w_y + b_y W  (s_{z_t} = 1)."""
    zt = np.asarray(zt)
    w = _w(ch, t, zt, np.asarray(p, float))
    a, b = ch.marg(t)
    s = b * w.sum(-1, keepdims=True)
    s[..., : ch.N] += a * w
    return s


def dse(ch, t, zt, r, s):
    """Exact denoising score entropy: sum_{y != z} Q_t(y->z) [s_y - r_y log s_y + r_y(log r_y - 1)], [...]."""
    zt = np.asarray(zt)
    rho, rho_m = ch.rate(t)
    Qyz = np.broadcast_to(rho[zt][..., None], zt.shape + (ch.K,)).copy()
    if ch.mask is not None:
        Qyz[..., ch.mask] = rho_m[zt]
    on = (Qyz > 0) & (onehot(zt, ch.K) == 0)
    r, s = np.where(on, r, 1.0), np.where(on, s, 1.0)
    return np.where(on, Qyz * (s - xlogy(r, s) + xlogy(r, r) - r), 0.0).sum(-1)


def gamma_scores_closed(N, g, sigma, z, x):
    """Explicit gamma-hybrid r_y with the two clocks (1-g)sigma and g sigma; scalar z, x; [K]."""
    kap = N / np.expm1(g * sigma)  # a/u
    e1 = np.expm1((1 - g) * sigma)
    r = np.empty(N + 1)
    if z == N:
        f = np.exp(-g * sigma)
        r[:N] = (1 - f) / N / e1
        r[x] += f / e1
        r[N] = 1.0
    elif z == x:
        r[:N] = 1 / (1 + kap)
        r[z] = 1.0
        r[N] = e1 / (np.exp(-g * sigma) + -np.expm1(-g * sigma) / N)
    else:
        r[:N] = 1.0
        r[x] = 1 + kap
        r[N] = e1 * N / -np.expm1(-g * sigma)
    return r


def gamma_score_entropy(log_s, g, sigma, z, x):
    """Exact O(N) gamma-hybrid DSE for log-scores log_s [..., K]; z, x, sigma [...]. Only the ordinary channels y != z enter.
    z = m : (1-g) [ sum_y s_y - (f/e1) log s_x - (h/e1) sum_y log s_y + C_m ],  f = e^{-g sigma}, h = (1-f)/N, e1 = e^{(1-g)sigma}-1
    z = x : (g/N) [ S - r L + (N-1) r (log r - 1) ],  r = E/(E+N), E = e^{g sigma}-1, S = sum_{y!=z} s_y, L = sum_{y!=z} log s_y
    else  : (g/N) [ S - L - (N/E) log s_x + R (log R - 1) - (N-2) ],  R = (E+N)/E
    """
    z, x = np.asarray(z), np.asarray(x)
    N = log_s.shape[-1] - 1
    sigma = np.broadcast_to(np.asarray(sigma, float), z.shape)
    ls = log_s[..., :N]
    lsx = np.take_along_axis(ls, x[..., None], -1)[..., 0]
    f, e1, E = np.exp(-g * sigma), np.expm1((1 - g) * sigma), np.expm1(g * sigma)
    h = -np.expm1(-g * sigma) / N
    if g == 1:
        mask_val = np.zeros(z.shape)  # the mask is unreachable
    else:
        rx, ro = (f + h) / e1, h / e1
        Km = rx * (np.log(rx) - 1) + (N - 1) * (xlogy(ro, ro) - ro)
        mask_val = (1 - g) * (np.exp(ls).sum(-1) - f / e1 * lsx - ro * ls.sum(-1) + Km)
    zi = np.minimum(z, N - 1)
    lsz = np.take_along_axis(ls, zi[..., None], -1)[..., 0]
    S, L = np.exp(ls).sum(-1) - np.exp(lsz), ls.sum(-1) - lsz
    if g == 0:
        ord_val = np.zeros_like(mask_val)
    else:
        r, R = E / (E + N), (E + N) / E
        same = S - r * L + (N - 1) * r * (np.log(r) - 1)
        diff = S - L - N / E * lsx + R * (np.log(R) - 1) - (N - 2)
        ord_val = g / N * np.where(z == x, same, diff)
    return np.where(z == N, mask_val, ord_val)


def absorb_score_entropy(log_s, sigma, z, x):
    """z=m: sum_y s_y - log s_x/E + (1/E)(log(1/E) - 1), E = e^sigma-1; 0 otherwise."""
    return gamma_score_entropy(log_s, 0.0, sigma, z, x)


def uniform_score_entropy(log_s, sigma, z, x):
    """Mask-free uniform: log_s [..., N]; the ordinary branch with g=1."""
    N = log_s.shape[-1]
    E = np.expm1(sigma)
    lsx, lsz = (np.take_along_axis(log_s, np.asarray(i)[..., None], -1)[..., 0] for i in (x, z))
    S, L = np.exp(log_s).sum(-1) - np.exp(lsz), log_s.sum(-1) - lsz
    r, R = E / (E + N), (E + N) / E
    return (
        np.where(z == x, S - r * L + (N - 1) * r * (np.log(r) - 1), S - L - N / E * lsx + R * (np.log(R) - 1) - (N - 2))
        / N
    )


def gamma_staggered(score, g, d):
    """Exact exp(-d Q) action on a score (row vector score @ expm(-d Q_gamma)), O(N): [..., K]."""
    score = np.asarray(score, float)
    N = score.shape[-1] - 1
    S = score[..., :N].sum(-1, keepdims=True)
    out = np.empty_like(score)
    out[..., :N] = np.exp(d) * score[..., :N] - np.exp(d) * -np.expm1(-g * d) / N * S
    out[..., N:] = score[..., N:] - np.expm1((1 - g) * d) * S
    return out


def gamma_transp_transition(z, N, g, d):
    """T_d(y -> z) over y, [..., K]."""
    return lik_column(Gamma(N, g), 0.0, d, np.asarray(z))


def gamma_analytic_step(score, z, g, d, forbid_mask=False):
    """SEDD analytic/Tweedie update, exact for gamma-hybrid; sums to 1 when score is a valid model score.
    forbid_mask: condition on z_s != m (last step)."""
    N = score.shape[-1] - 1
    p = gamma_staggered(score, g, d) * gamma_transp_transition(z, N, g, d)
    if forbid_mask:
        p = p.copy()
        p[..., N] = 0
        p = p / p.sum(-1, keepdims=True)
    return p


def gamma_mean_from_score(score, z, g, sigma):
    """Inverse of score_from_mean for Gamma: p(x|z) = [score @ exp(-sigma Q)]_x q_sigma(z|x), x ordinary."""
    N = score.shape[-1] - 1
    return gamma_staggered(score, g, sigma)[..., :N] * evidence(Gamma(N, g), sigma, np.asarray(z))


# ------------------------------------------------------------------ 4. continuous-time NELBO integrands, mean parameterisation
def absorb_nelbo_integrand(sigma, z, x, p):
    """MDLM per position, per unit sigma: 1[z=m] (-log p_x)/(e^sigma - 1)  (= -alpha'/(1-alpha) CE per unit t)."""
    N = p.shape[-1]
    px = np.take_along_axis(p, np.asarray(x)[..., None], -1)[..., 0]
    return np.where(np.asarray(z) == N, -np.log(px) / np.expm1(sigma), 0.0)


def _smooth_kl(x, p, e):
    """KL( (1-e) 1_x + e/N || (1-e) p + e/N ), O(N)."""
    N = p.shape[-1]
    px = np.take_along_axis(p, np.asarray(x)[..., None], -1)[..., 0]
    lp = np.log((1 - e) * p + e / N)
    lpx = np.log((1 - e) * px + e / N)
    return xlogy(1 - e + e / N, 1 - e + e / N) + (N - 1) * xlogy(e / N, e / N) - (1 - e) * lpx - e / N * lp.sum(-1)


def gamma_nelbo_integrand(g, sigma, z, x, p):
    """Exact gamma-hybrid NELBO integrand per unit sigma with M1 p = p_theta(x|z_t), O(N):
    z=m: (1-g)/(e^{(1-g)sigma}-1) * KL(x~ || p~), smoothing e = 1 - e^{-g sigma}
    z<N: (g/N) sum_{y!=z} [s_y - r_y log s_y + r_y(log r_y - 1)],  s_y = kap p_y + 1 - kap/(1+kap) p_z, kap = N/(e^{g sigma}-1)
    """
    z, x = np.asarray(z), np.asarray(x)
    N = p.shape[-1]
    if g == 0:
        return absorb_nelbo_integrand(sigma, z, x, p)
    m = 0.0 if g == 1 else (1 - g) / np.expm1((1 - g) * sigma) * _smooth_kl(x, p, -np.expm1(-g * sigma))
    kap = N / np.expm1(g * sigma)
    pz = np.take_along_axis(p, np.minimum(z, N - 1)[..., None], -1)
    s = kap * p + 1 - kap / (1 + kap) * pz
    notz = onehot(z, N + 1)[..., :N] == 0
    r = np.where((z == x)[..., None], 1 / (1 + kap), 1 + kap * onehot(x, N))
    o = g / N * np.where(notz, s - r * np.log(s) + r * (np.log(r) - 1), 0).sum(-1)
    return np.where(z == N, m, o)


def gamma_nelbo_integrand_cavity(g, sigma, z, x, xbar):
    """Same with M2 (network gives the cavity xbar): only s changes, s_y = (kap xbar_y + 1)/(kap xbar_z + 1), y != z, z < N.
    Stays integrable at sigma -> 0 for ANY network (M1 does not)."""
    z, x = np.asarray(z), np.asarray(x)
    N = xbar.shape[-1]
    if g == 0:
        return absorb_nelbo_integrand(sigma, z, x, xbar)
    m = 0.0 if g == 1 else (1 - g) / np.expm1((1 - g) * sigma) * _smooth_kl(x, xbar, -np.expm1(-g * sigma))
    kap = N / np.expm1(g * sigma)
    xz = np.take_along_axis(xbar, np.minimum(z, N - 1)[..., None], -1)
    s = (kap * xbar + 1) / (kap * xz + 1)
    notz = onehot(z, N + 1)[..., :N] == 0
    r = np.where((z == x)[..., None], 1 / (1 + kap), 1 + kap * onehot(x, N))
    o = g / N * np.where(notz, s - r * np.log(s) + r * (np.log(r) - 1), 0).sum(-1)
    return np.where(z == N, m, o)


def epsilon_nelbo_integrand(eps, sigma, z, x, p):
    """Exact epsilon-hybrid integrand per unit sigma (sigma>0): 1[z=m]/(e^sigma-1) KL(x~||p~), smoothing eps.
    (per unit t: -alpha'/(1-alpha)); unmasked tokens only enter the reconstruction term at 0+."""
    N = p.shape[-1]
    return np.where(np.asarray(z) == N, _smooth_kl(x, p, eps) / np.expm1(sigma), 0.0)


def gidd_nelbo_integrand(ch, t, z, x, xbar):
    """GIDD form (M2, GIDD chain): rho_t(z)/q_t(z|x) [KL(q_t(.|x)||q_t(.|xbar)) + q/qbar - log(q/qbar) - 1] at q=q_t(z|x)."""
    z, x = np.asarray(z), np.asarray(x)
    a, b = ch.marg(t)
    q = a * onehot(x, ch.K) + b
    qb = np.broadcast_to(b, q.shape).copy()
    qb[..., : ch.N] += a * xbar
    qz, qbz = (np.take_along_axis(v, z[..., None], -1)[..., 0] for v in (q, qb))
    return ch.rate(t)[0][z] / qz * (kl(q, qb) + qz / qbz - np.log(qz / qbz) - 1)


def prior_kl(ch, t, x, prior):
    """KL(q_T(.|x) || prior), x [...], prior [K]."""
    return kl(marginal_table(ch, t)[np.asarray(x)], prior)


def default_prior(ch, t):
    """prior = q_T averaged over a uniform x: b + a/N on ordinary tokens."""
    return marginal_table(ch, t).mean(0)


# ------------------------------------------------------------------ exact enumeration helpers (toy L, N)
def grid(ch, L):
    """list of L index arrays, each of shape (K,)*L."""
    return np.indices((ch.K,) * L)


def grid_marginal(ch, sig, x):
    """prod_i q_{sig_i}(z_i|x_i), shape (K,)*L."""
    out = np.ones(())
    for s, xi in zip(sig, x):
        out = out[..., None] * marginal_table(ch, s)[xi]
    return out


def bayes_denoiser(ch, P):
    """den(sig[L]) -> (K,)*L + (L, N): true posterior p(x_i | z) for data law P (N,)*L and per-position noise sig."""
    L = P.ndim

    def den(sig):
        M = [marginal_table(ch, s) for s in sig]
        out = np.zeros((ch.K,) * L + (L, ch.N))
        xs, zs = "abcd"[:L], "uvwx"[:L]
        for i in range(L):
            e = np.einsum(",".join([xs] + [a + b for a, b in zip(xs, zs)]) + "->" + zs + xs[i], P, *M)
            tot = e.sum(-1, keepdims=True)
            fall = evidence(ch, sig[i], grid(ch, L)[i]) > 0
            fall = fall / np.maximum(fall.sum(-1, keepdims=True), 1)
            out[..., i, :] = np.where(tot > 0, e / np.where(tot > 0, tot, 1), fall)
        return out

    return den


def random_denoiser(ch, L, rng, scale=1.0, cavity=False):
    """arbitrary smooth-in-noise network, restricted to the support. cavity=False: the table IS p(x|z) (M1);
    cavity=True: the table is xbar (M2) and p(x|z) ∝ xbar(x) q_t(z|x) is returned, so the same NELBO code applies."""
    W, V = rng.normal(size=(2,) + (ch.K,) * L + (L, ch.N)) * scale

    def den(sig):
        p = softmax(W + V * np.tanh(np.asarray(sig, float))[:, None], -1)
        for i in range(L):
            ev = evidence(ch, sig[i], grid(ch, L)[i])
            if not cavity:
                ev = ev > 0
            ev = np.where(ev.any(-1, keepdims=True), ev, 1.0)
            p[..., i, :] = p[..., i, :] * ev / (p[..., i, :] * ev).sum(-1, keepdims=True)
        return p

    return den


def ct_integrand(ch, t, x, den, fn=None):
    """E_{z~q_t(.|x)} sum_i DSE_i at the flat noise t (exact by enumeration). fn(t, z, x_i, p) overrides the generic DSE."""
    L = len(x)
    w = grid_marginal(ch, [t] * L, x)
    p = den([t] * L)
    g = grid(ch, L)
    tot = 0.0
    on = w > 0
    for i in range(L):
        z, pi = g[i][on], p[on][:, i]
        xi = np.full(z.shape, x[i])
        v = dse(ch, t, z, true_score(ch, t, z, xi), score_from_mean(ch, t, z, pi)) if fn is None else fn(t, z, xi, pi)
        tot += (w[on] * v).sum()
    return tot


def quad(f, t0, t1, n=120, power=3):
    v, w = np.polynomial.legendre.leggauss(n)
    v, w = (v + 1) / 2, w / 2
    return sum(wi * (t1 - t0) * power * vi ** (power - 1) * f(t0 + (t1 - t0) * vi**power) for vi, wi in zip(v, w))


def recon_term(ch, t, x, den):
    """E_{q_t(z|x)} sum_i -log p_theta(x_i|z) at per-position noise t[L]."""
    w = grid_marginal(ch, t, x)
    p = den(t)
    on = w > 0
    return sum((w[on] * -np.log(p[on][:, i, x[i]])).sum() for i in range(len(x)))


def ct_nelbo(ch, x, den, t1, t0=0.0, prior=None, n=120, power=3, fn=None):
    """prior KL + integral of E[DSE] over (t0, t1) + reconstruction at t0 (0 if the t0 marginal is the identity)."""
    prior = default_prior(ch, t1) if prior is None else prior
    r = recon_term(ch, [t0] * len(x), x, den) if t0 > 0 else 0.0
    d = quad(lambda t: ct_integrand(ch, t, x, den, fn), 0.0 if t0 == ZERO_PLUS else t0, t1, n, power)
    return sum(prior_kl(ch, t1, xi, prior) for xi in x) + d + r


# ------------------------------------------------------------------ 5. hyperschedules
def hs_flat(L, tau):
    """[tau+1, L]."""
    return np.repeat(np.arange(tau, -1, -1)[:, None], L, 1)


def hs_block(L, width, tau):
    """blocks of `width`, each annealed tau..0 in tau steps before the next starts."""
    rows = [np.full(L, tau)]
    for b in range(0, L, width):
        for l in range(tau - 1, -1, -1):
            r = rows[-1].copy()
            r[b : b + width] = l
            rows.append(r)
    return np.array(rows)


def hs_ar(L):
    """quenched AR: one level, one position per step."""
    return hs_block(L, 1, 1)


def hs_slope(L, tau, delay=1):
    """position i starts `delay`*i steps later; one level per step."""
    k = np.arange(tau + delay * (L - 1) + 1)[:, None]
    return np.clip(tau - k + delay * np.arange(L), 0, tau)


def check_hyperschedule(tau):
    assert (np.diff(tau, axis=0) <= 0).all() and (tau[-1] == 0).all(), "levels must be non-increasing and end at 0"


def hyper_nelbo(ch, level_t, tau, x, den, prior=None):
    """EXACT discrete NELBO of hyperschedule tau [T+1, L] (levels), level_t [tau_max+1] (level -> chain time), by enumeration:
       prior + sum_k sum_{i: tau[k+1,i] < tau[k,i]} E_{z_k~q(.|x)} KL(q(z_{k+1}^i|z_k^i,x^i) || p_theta(z_{k+1}^i|z_k)) + recon.
    Returns (total, dict(prior, diff [T, L], recon))."""
    check_hyperschedule(tau)
    T, L = tau.shape[0] - 1, tau.shape[1]
    level_t = np.asarray(level_t, float)
    g = grid(ch, L)
    diff = np.zeros((T, L))
    pk = 0.0
    for i in range(L):
        t = level_t[tau[0, i]]
        pk += prior_kl(ch, t, x[i], default_prior(ch, t) if prior is None else prior)
    for k in range(T):
        sig = level_t[tau[k]]
        w = grid_marginal(ch, sig, x)
        on = w > 0
        p = den(sig)
        for i in np.nonzero(tau[k + 1] < tau[k])[0]:
            s, t = level_t[tau[k + 1, i]], sig[i]
            z = g[i][on]
            diff[k, i] = (
                w[on] * kl(posterior(ch, s, t, z, np.full(z.shape, x[i])), reverse_kernel(ch, s, t, z, p[on][:, i]))
            ).sum()
    fin = level_t[tau[-1]]
    rec = recon_term(ch, fin, x, den) if (fin > 0).any() else 0.0
    return pk + diff.sum() + rec, dict(prior=pk, diff=diff, recon=rec)


def model_likelihood(ch, level_t, tau, den, prior=None):
    """exact p_theta(x), shape (N,)*L, of the generative chain (independent positions given z_k, unchanged ones copied)."""
    check_hyperschedule(tau)
    T, L = tau.shape[0] - 1, tau.shape[1]
    level_t = np.asarray(level_t, float)
    g = grid(ch, L)
    P = np.ones(())
    for i in range(L):
        t = level_t[tau[0, i]]
        P = P[..., None] * (default_prior(ch, t) if prior is None else prior)
    zs = "abcd"[:L]

    def push(P, kern):
        on = P > 0
        return np.einsum("Z," + ",".join("Z" + c for c in zs) + "->" + zs, P[on], *[k(on) for k in kern])

    for k in range(T):
        sig = level_t[tau[k]]
        p = den(sig)

        def mk(i):
            if tau[k + 1, i] == tau[k, i]:
                return lambda on: onehot(g[i][on], ch.K)
            return lambda on: reverse_kernel(ch, level_t[tau[k + 1, i]], sig[i], g[i][on], p[on][:, i])

        P = push(P, [mk(i) for i in range(L)])
    fin = level_t[tau[-1]]
    if (fin > 0).any():
        p = den(fin)
        P = push(P, [(lambda on, i=i: p[on][:, i]) for i in range(L)])
    return P[(slice(0, ch.N),) * L]


# ------------------------------------------------------------------ 6. sampler step tables, given x0-probs [..., N]
def ancestral_step(z, probs, p_transfer):
    """'original' absorb: mask -> token ~ probs w.p. p_transfer = 1 - s/t; tokens kept. [..., K]."""
    z = np.asarray(z)
    N = probs.shape[-1]
    un = np.concatenate([p_transfer * probs, np.full(probs.shape[:-1] + (1,), 1.0 - p_transfer)], -1)
    return np.where((z == N)[..., None], un, onehot(z, N + 1))


def acs_step(z, probs, p_transfer, eta):
    """ACS: as ancestral for masks; tokens resampled from probs w.p. eta (1 - p_transfer)."""
    z = np.asarray(z)
    N = probs.shape[-1]
    h = eta * (1 - p_transfer)
    corr = (1 - h) * onehot(z, N + 1)
    corr[..., :N] += h * probs
    return np.where((z == N)[..., None], ancestral_step(z, probs, p_transfer), corr)


def remdm_sigma(alpha_s, alpha_t, mode, eta=None, psi=None, z=None, N=None, base="cap"):
    """sigma_max = min(1, (1-al_s)/al_t); cap: min(eta, sigma_max); rescale: eta*sigma_max;
    conf: per-position softmax(-psi) over the UNMASKED positions (psi=inf at masks) times the base schedule."""
    smax = 1.0 if alpha_t <= 0 else min(1.0, (1 - alpha_s) / alpha_t)
    if mode == "max":
        return smax
    if mode == "cap":
        return min(eta, smax)
    if mode == "rescale":
        return eta * smax
    if mode == "conf":
        m = np.asarray(z) != N
        e = np.where(m, np.exp(-np.where(m, psi, 0.0)), 0.0)
        return e / np.maximum(e.sum(-1, keepdims=True), 1e-300) * remdm_sigma(alpha_s, alpha_t, base, eta)
    raise ValueError(mode)


def remdm_step(z, probs, alpha_s, alpha_t, sigma):
    """z!=m: (1-sg) 1_z + sg 1_m;  z=m: [(al_s-(1-sg)al_t) probs + (1-al_s-sg al_t) 1_m]/(1-al_t). sigma scalar or [...]."""
    z = np.asarray(z)
    N = probs.shape[-1]
    sg = np.broadcast_to(np.asarray(sigma, float), z.shape)[..., None]
    un = np.concatenate([(alpha_s - (1 - sg) * alpha_t) * probs, 1 - alpha_s - sg * alpha_t], -1) / (1 - alpha_t)
    keep = (1 - sg) * onehot(z, N + 1) + sg * onehot(N, N + 1)
    return np.where((z == N)[..., None], un, keep)


def gamma_ancestral_step(z, probs, N, g, sigma_s, sigma_t, forbid_mask=False):
    """gamma-hybrid step from x0-probs p_theta(x|z_t) (M1); equals gamma_analytic_step on score_from_mean."""
    p = reverse_kernel(Gamma(N, g), sigma_s, sigma_t, np.asarray(z), probs)
    if forbid_mask:
        p = p.copy()
        p[..., N] = 0
        p /= p.sum(-1, keepdims=True)
    return p


# ------------------------------------------------------------------ noise schedules
def loglinear(t, eps=5e-3):
    """sigma(t) = -log(1-(1-eps)t), sigma'(t)."""
    return -np.log1p(-(1 - eps) * t), (1 - eps) / (1 - (1 - eps) * t)


def geometric(t, smin=1e-3, smax=1.0):
    s = smin ** (1 - t) * smax**t
    return s, s * np.log(smax / smin)
