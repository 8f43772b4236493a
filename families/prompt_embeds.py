"""Prompts as a denoiser takes them.

Legend: B prompts, T text tokens, E size of a text embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PromptEmbeds:
    """All that a denoiser is told about B prompts.

    Args:
        states: (B, T, E) of their tokens.
        pooled: (B, E') of the whole prompts, where the model family has them.
    """

    states: Tensor
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, rows: Tensor | slice) -> PromptEmbeds:
        """The prompts of these rows, in their order."""
        return PromptEmbeds(self.states[rows], None if self.pooled is None else self.pooled[rows])

    def to(self, *args: torch.device | torch.dtype | str) -> PromptEmbeds:
        """The same on another device or in another dtype."""
        return PromptEmbeds(self.states.to(*args), None if self.pooled is None else self.pooled.to(*args))

    @staticmethod
    def cat(parts: Sequence[PromptEmbeds]) -> PromptEmbeds:
        """One after the other, all of one family."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return PromptEmbeds(torch.cat([part.states for part in parts]), torch.cat(pooled) if pooled else None)
