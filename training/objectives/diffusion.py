"""Standard fine-tuning: the diffusion loss on the training portraits with the full prompt.

Legend: B batch, C channels, H/W latent size. Paper: arXiv 2504.00396.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from training.arguments import Flags
from training.batches import Batch
from training.losses import diffusion_loss, masked_diffusion_loss
from training.objectives.objective import Objective, Parts


class Diffusion(Objective):
    """`L_diffusion`, and `L_enh` if asked for; with --preservation mask inside the masks alone."""

    def __init__(self, flags: Flags, parts: Parts) -> None:
        super().__init__(flags, parts)
        self.weights, self.enhancement = {"diffusion": 1.0}, parts.enhancement
        if self.enhancement is not None:
            self.weights["enhancement"] = self.enhancement.weight

    @contextmanager
    def losses(self, micro_step: int) -> Iterator[dict[str, torch.Tensor]]:
        batch = self.batches.training(self.training, micro_step, self.method.noise_offset)
        embeds = self.table.response(batch.rows, batch.time_ids)
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
            parts["enhancement"] = self.enhancement.loss(batch, model_pred, noise, micro_step)
        return parts
