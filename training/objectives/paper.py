"""The paper's alignment: attention and features of both paths agree outside of the SFCM.

Legend: B batch, K matched tokens, T text tokens.
Paper: arXiv 2504.00396; `[ours]` marks what it leaves open.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from attention_processors import phrase_map_resolution
from training.arguments import Flags
from training.batches import BatchDrawer, send
from training.dual_path import dual_path
from training.flags import MethodFlags, PaperFlags
from training.losses import diffusion_loss, fine_grained_loss, text_consistent_loss
from training.maps import MapMaker
from training.models import Models
from training.objectives.objective import Objective, Parts
from training.portraits import Portraits
from training.prompt_table import FULL, PromptTable


class Paper(Objective):
    """`L_text` and `L_fine` outside the SFCM, and predictions kept for unchanged prompts [ours]."""

    def __init__(
        self,
        models: Models,
        table: PromptTable,
        batches: BatchDrawer,
        alignment: Portraits,
        maps: MapMaker,
        method: MethodFlags,
        paper: PaperFlags,
    ) -> None:
        """Make it of a run's parts and the flags."""
        self.models, self.table, self.batches, self.alignment, self.maps = models, table, batches, alignment, maps
        self.method, self.layers = method, paper.alignment_layers
        self.weights = {
            "text_consistent": paper.lambda_text,
            "fine_grained": paper.lambda_fine,
            "base_prompt": paper.lambda_base,
        }

    @classmethod
    def make(cls, flags: Flags, parts: Parts) -> Paper:
        return cls(
            parts.models, parts.table, parts.batches, parts.alignment, parts.maps, flags.method, flags.paper
        )  # fmt: skip

    @contextmanager
    def losses(self, micro_step: int) -> Iterator[dict[str, torch.Tensor]]:
        models, table, method = self.models, self.table, self.method
        batch = self.batches.aligned(self.alignment, micro_step, stream=1, unchanged_share=method.base_prompt_share)
        with (
            models.capture.store() as store,
            dual_path(
                models.adapters,
                models.predict,
                batch.noisy_latents,
                batch.timesteps,
                models.reference_embeds(table, batch.rows),
                models.response_embeds(table, batch.rows),
                mode=method.dual_path,
                store=store,
                respond=models.respond,
            ) as paths,
        ):
            reference, response = paths.reference, paths.response
            response_pred, reference_pred = paths.response_pred, paths.reference_pred
            sfcm = self.maps.of_batch(batch, self.alignment, response_pred.detach(), reference_pred, reference)
            if self.layers == "phrase_map":
                resolution = phrase_map_resolution(reference.resolutions)
                reference, response = reference.at_resolution(resolution), response.at_resolution(resolution)
            resolutions = list(reference.resolutions.values())
            unchanged = send((batch.kinds != FULL).float(), models.device)
            to_epsilon = models.noise.epsilon_scale(batch.timesteps)
            base_error = diffusion_loss(response_pred, reference_pred) * to_epsilon**2
            yield {
                "text_consistent": text_consistent_loss(
                    list(response.attention_probs.values()),
                    list(reference.attention_probs.values()),
                    resolutions,
                    sfcm,
                    *table.positions.of(batch.rows),
                ).mean(),
                "fine_grained": fine_grained_loss(
                    list(response.queries.values()), list(reference.queries.values()), resolutions, sfcm
                ).mean(),
                "base_prompt": (base_error * unchanged).mean(),
            }
