"""Standard fine-tuning: the diffusion loss on the training portraits with the full prompt.

Legend: B batch, C channels, H/W latent size.
Paper: arXiv 2504.00396; `[ours]` marks what it leaves open.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from training.arguments import Flags
from training.batches import Batch, BatchDrawer
from training.enhancement import Enhancement
from training.flags import MethodFlags
from training.losses import diffusion_loss, masked_diffusion_loss
from training.models import Models
from training.objectives.objective import Objective, Parts
from training.portraits import TrainingPortraits
from training.prompt_table import PromptTable


class Diffusion(Objective):
    """`L_diffusion`, and `L_enh` if asked for; with --preservation mask inside the masks alone."""

    def __init__(
        self,
        models: Models,
        table: PromptTable,
        batches: BatchDrawer,
        training: TrainingPortraits,
        method: MethodFlags,
        enhancement: Enhancement | None = None,
    ) -> None:
        """Make it.

        Args:
            models, table, batches, training: of the run.
            method: the flags.
            enhancement: `L_enh`, which looks at the same prediction.
        """
        self.models, self.table, self.batches, self.training = models, table, batches, training
        self.method, self.enhancement = method, enhancement
        self.weights = {"diffusion": 1.0}
        if enhancement is not None:
            self.weights["enhancement"] = enhancement.weight

    @classmethod
    def make(cls, flags: Flags, parts: Parts) -> Diffusion:
        return cls(parts.models, parts.table, parts.batches, parts.training, flags.method, parts.enhancement)

    @contextmanager
    def losses(self, micro_step: int) -> Iterator[dict[str, torch.Tensor]]:
        batch = self.batches.training(self.training, micro_step, self.method.noise_offset)
        embeds = self.models.response_embeds(self.table, batch.rows)
        model_pred = self.models.respond(batch.noisy_latents, batch.timesteps, embeds)
        yield self.of_prediction(batch, model_pred, micro_step)

    def of_prediction(self, batch: Batch, model_pred: torch.Tensor, micro_step: int) -> dict[str, torch.Tensor]:
        """The losses of predictions (B, C, H, W)."""
        noise = self.models.noise
        target = noise.target(batch.latents, batch.noise, batch.timesteps)
        if self.method.preservation == "mask":
            masks = self.training.training_set.batch_masks(micro_step).to(target.device)
            losses = masked_diffusion_loss(model_pred, target, F.interpolate(masks, target.shape[-2:], mode="area"))
        else:
            losses = diffusion_loss(model_pred, target)
        if self.method.snr_gamma is not None:
            losses = losses * noise.min_snr_weights(batch.timesteps, self.method.snr_gamma)
        parts = {"diffusion": losses.mean()}
        if self.enhancement is not None and self.enhancement.is_due(micro_step):
            parts["enhancement"] = self.enhancement.loss(batch, model_pred, noise)
        return parts
