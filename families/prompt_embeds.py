"""Prompts as a denoiser takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class PromptEmbeds:
    """Of B prompts: (B, T, E) `states` of T tokens, and (B, E') `pooled` where a family has them.

    `time_ids` (B, 6) float32 are of the pictures that the prompts are for: height and width of the original, top and
    left of its crop, height and width of what is drawn. Prompts of no picture have none.
    """

    states: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, rows: Tensor | slice) -> PromptEmbeds:
        return PromptEmbeds(*(None if values is None else values[rows] for values in self._values()))

    def to(self, device: torch.device) -> PromptEmbeds:
        """The same on a device, without waiting for what a GPU still has to do."""
        waits = torch.device(device).type != "cuda"
        moved = (None if values is None else values.to(device, non_blocking=not waits) for values in self._values())
        return PromptEmbeds(*moved)

    def of(self, time_ids: Tensor) -> PromptEmbeds:
        """The same prompts for pictures of these sizes and crops (B, 6)."""
        return replace(self, time_ids=time_ids)

    def _values(self) -> tuple[Tensor | None, ...]:
        return self.states, self.pooled, self.time_ids

    @staticmethod
    def cat(parts: Sequence[PromptEmbeds]) -> PromptEmbeds:
        """One after the other, all of one family."""
        columns = zip(*(part._values() for part in parts), strict=True)
        return PromptEmbeds(*(None if column[0] is None else torch.cat(column) for column in columns))

    def packed(self) -> Tensor:
        """One tensor a prompt, without `time_ids`: (B, T, E), or (B, T * E + E') with pooled ones."""
        return self.states if self.pooled is None else torch.cat([self.states.flatten(1), self.pooled], dim=1)

    @staticmethod
    def unpacked(packed: Tensor, length: int, pooled_dim: int) -> PromptEmbeds:
        """What was `packed`, of `length` tokens T and pooled embeddings of size E', 0 for none."""
        if pooled_dim == 0:
            return PromptEmbeds(packed)
        states, pooled = packed[:, :-pooled_dim], packed[:, -pooled_dim:]
        return PromptEmbeds(states.unflatten(1, (length, -1)), pooled)
