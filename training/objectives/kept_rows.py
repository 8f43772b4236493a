"""Other trainers' ways to keep a portrait: rows beside the training portraits whose prediction is to stay.

Legend: B batch, C channels, H/W latent size, T text tokens, E size of a text embedding, U unrelated prompts.
Source: DreamBooth's prior preservation, arXiv 2208.12242; differential output preservation as in ai-toolkit;
contrastive adapter training, arXiv 2404.07554.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch

from families.prompt_embeds import PromptEmbeds
from training.arguments import Flags
from training.batches import Batch
from training.losses import diffusion_loss
from training.objectives.diffusion import Diffusion
from training.objectives.objective import Parts


class KeptRows(NamedTuple):
    """What the denoiser is given, and what it should answer: latents and target (B, C, H, W), embeds (B, T, E)."""

    noisy_latents: torch.Tensor
    timesteps: torch.Tensor
    embeds: PromptEmbeds
    target: torch.Tensor


class KeepingRows(Diffusion):
    """The diffusion loss and, from the same forward, one that keeps the predictions of rows without the target.

    `prior`: portraits of the original model with their base prompts, and their noise as the target. Else the same
    noised training portraits, and the original model's prediction as the target: `dop` with their base prompts, `cat`
    with unrelated ones.
    """

    def __init__(self, flags: Flags, parts: Parts) -> None:
        super().__init__(flags, parts)
        self.weights["preservation"] = flags.method.preservation_weight
        self.unrelated_ids, self.unrelated_embeds = parts.unrelated_ids, None

    @torch.no_grad()
    def prepare(self, state: Mapping[str, torch.Tensor] | None = None) -> None:
        models = self.models
        if self.method.preservation == "cat":
            with models.encoding():
                self.unrelated_embeds = models.family.encode(models.pipeline, self.unrelated_ids.to(models.device))

    @contextmanager
    def losses(self, micro_step: int) -> Iterator[dict[str, torch.Tensor]]:
        batch = self.batches.training(self.training, micro_step, self.method.noise_offset)
        kept, count = self.kept_rows(batch, micro_step), len(batch.index)
        preds = self.models.respond(
            torch.cat([batch.noisy_latents, kept.noisy_latents]),
            torch.cat([batch.timesteps, kept.timesteps]),
            PromptEmbeds.cat([self.table.response(batch.rows, batch.time_ids), kept.embeds]),
        )
        preserved = {"preservation": diffusion_loss(preds[count:], kept.target).mean()}
        yield self.of_prediction(batch, preds[:count], micro_step) | preserved

    def kept_rows(self, batch: Batch, micro_step: int) -> KeptRows:
        """The rows beside a batch of training portraits, none of which asks for the target."""
        models = self.models
        if self.method.preservation == "prior":
            # One forward has one size.
            own = self.training.training_set.buckets
            bucket = own[int(batch.index[0]) % len(own)]
            drawn = self.batches.aligned(self.alignment, micro_step, stream=1, bucket=bucket)
            target = models.noise.target(drawn.latents, drawn.noise, drawn.timesteps)
            embeds = self.table.reference(drawn.rows, drawn.time_ids)
            return KeptRows(drawn.noisy_latents, drawn.timesteps, embeds, target)
        if self.method.preservation == "dop":
            embeds = self.table.reference(batch.rows, batch.time_ids)
        else:
            embeds = self.unrelated_embeds[self.unrelated_choice(micro_step)].of(batch.time_ids)
        with torch.no_grad(), models.adapters.only(None):
            target = models.predict(batch.noisy_latents, batch.timesteps, embeds)
        return KeptRows(batch.noisy_latents, batch.timesteps, embeds, target)

    def unrelated_choice(self, micro_step: int) -> torch.Tensor:
        """Which of the unrelated prompts each of this process's rows has: (B,), a function of seed and step."""
        batches = self.batches
        generator = batches.generator(micro_step, stream=3)
        chosen = torch.randint(len(self.unrelated_embeds), (batches.size,), generator=generator)[batches.own]
        return chosen.to(batches.device)
