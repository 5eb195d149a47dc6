"""What generation passed through: the tokens after its calls and how sure the network was of them."""

from dataclasses import dataclass

import numpy as np

from hdlm_jax.diffusion.hyperschedules import Hyperschedule

MAX_FRAMES = 256  # kept by `record=True`, besides the first; longer generations keep every so many calls


@dataclass(frozen=True)
class Trajectory:
    """Frames of a batch of B texts of L tokens; frame 0 is the noise before the first call.

    Attributes:
      steps: int32 [F], the generation step of each frame, 0 first and T last.
      tokens: int32 [F, B, L].
      confidence: float32 [F, B, L], the network's probability of the token that a position holds (of the likeliest
        one where it holds the mask), as of the last call whose window it was in; NaN before that and where given.
      given: bool [B, L], tokens that were there from the start.
      origins: int32 [B], where the hyperschedule begins in each text.
      hyperschedule: that ordered the calls.
      mask: the mask's id; None where every state is a token.
    """

    steps: np.ndarray
    tokens: np.ndarray
    confidence: np.ndarray
    given: np.ndarray
    origins: np.ndarray
    hyperschedule: Hyperschedule
    mask: int | None

    def levels(self) -> np.ndarray:
        """int32 [F, B, L], the level of every position in every frame; 0 where given."""
        position_L = np.arange(self.tokens.shape[2])
        relative_BxL = position_L[None, :] - self.origins[:, None]
        level_FxBxL = self.hyperschedule.level_of(relative_BxL[None], self.steps[:, None, None])
        return np.where(self.given, 0, level_FxBxL).astype(np.int32)

    def windows(self) -> np.ndarray:
        """int32 [F, B, 2], (start, stop) of the window of the call that follows each frame, empty after the last."""
        bounds_Fx2 = np.array([self.hyperschedule.window(int(step)) for step in self.steps])
        return np.minimum(bounds_Fx2[:, None, :] + self.origins[None, :, None], self.tokens.shape[2])

    def corrected(self) -> np.ndarray:
        """bool [F, B, L], whether the frame holds another token than the one before, where that held no mask."""
        before, after = self.tokens[:-1], self.tokens[1:]
        changed = (before != after) & (before != self.mask)
        return np.concatenate([np.zeros_like(changed[:1]), changed])
