"""The mathematics: pure functions on arrays, on jax and numpy alone.

A *hyperschedule* gives every position a level at every step, a *noise schedule* turns the level's noise
fraction into the survival alpha of a token, and a *noising process* turns alpha into transition kernels.

Letters (suffixes of array names): B batch, L positions, T generation steps, N ordinary tokens,
V = N + 1 (the mask is token id N), P period of the tiled layout. tau levels, 0 clean to tau_max pure noise;
u = tau / tau_max noise fraction; alpha survival, sigma = -log alpha; x0 clean tokens, zt noised tokens.
"""
