"""The interface of an objective. Source: [ours]."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from training.arguments import Flags
from training.batches import BatchDrawer
from training.enhancement import Enhancement
from training.maps import MapMaker
from training.models import Models
from training.portraits import Portraits, TrainingPortraits
from training.presence import Presence
from training.prompt_table import PromptTable


@dataclass(frozen=True)
class Parts:
    """What a run has that objectives are made of; each takes what it uses."""

    models: Models
    table: PromptTable
    batches: BatchDrawer
    training: TrainingPortraits
    maps: MapMaker
    alignment: Portraits | None  # that both paths are aligned on, or that `prior` keeps
    enhancement: Enhancement | None
    presence: Presence | None  # of the target, which the LoRA's strength is set by in the end
    unrelated_ids: torch.Tensor | None  # (U, T) tokens of the prompts that `cat` keeps


class Objective(ABC):
    """One forward of a step and its losses, which it weighs by name; made as the flags ask for it."""

    weights: dict[str, float]

    def __init__(self, flags: Flags, parts: Parts) -> None:
        self.models, self.table, self.batches, self.maps = parts.models, parts.table, parts.batches, parts.maps
        self.training, self.alignment, self.method = parts.training, parts.alignment, flags.method

    def prepare(self, state: Mapping[str, torch.Tensor] | None = None) -> None:  # noqa: B027 (most need nothing)
        """Make ready before the first step; `state` is what a checkpoint has, if the run goes on from there."""

    @abstractmethod
    def losses(self, micro_step: int) -> AbstractContextManager[dict[str, torch.Tensor]]:
        """The forward of batch `micro_step`: a context with its losses by name, scalars that gradient flows through.

        The backward runs inside it, since a recomputation under gradient checkpointing has to find hooks and
        processors as the forward saw them.
        """

    def maps_changed(self) -> None:  # noqa: B027 (most keep nothing that is made of maps)
        """Told when the alignment portraits have new maps."""

    def state(self) -> dict[str, torch.Tensor] | None:
        """What a checkpoint has to hold for `prepare`, if anything."""
        return None
