"""Prompts as a denoiser takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PromptEmbeds:
    """Of B prompts: (B, T, E) `states` of T tokens, and (B, E') `pooled` where a family has them."""

    states: Tensor
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, rows: Tensor | slice) -> PromptEmbeds:
        return PromptEmbeds(self.states[rows], None if self.pooled is None else self.pooled[rows])

    @staticmethod
    def cat(parts: Sequence[PromptEmbeds]) -> PromptEmbeds:
        """One after the other, all of one family."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return PromptEmbeds(torch.cat([part.states for part in parts]), torch.cat(pooled) if pooled else None)
