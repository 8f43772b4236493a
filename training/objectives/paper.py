"""The paper's alignment: attention and features of both paths agree outside of the SFCM.

Paper: arXiv 2504.00396; `[ours]` marks what it leaves open.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from training.arguments import Flags
from training.batches import send
from training.dual_path import dual_path
from training.losses import diffusion_loss, fine_grained_loss, text_consistent_loss
from training.objectives.objective import Objective, Parts
from training.prompt_table import FULL


class Paper(Objective):
    """`L_text` and `L_fine` outside the SFCM, and predictions kept for unchanged prompts [ours]."""

    def __init__(self, flags: Flags, parts: Parts) -> None:
        super().__init__(flags, parts)
        paper, self.map_layers = flags.paper, flags.paper.alignment_layers == "phrase_map"
        self.weights = {
            "text_consistent": paper.lambda_text, "fine_grained": paper.lambda_fine, "base_prompt": paper.lambda_base,
        }  # fmt: skip

    @contextmanager
    def losses(self, micro_step: int) -> Iterator[dict[str, torch.Tensor]]:
        models, table, method = self.models, self.table, self.method
        batch = self.batches.aligned(self.alignment, micro_step, stream=1, unchanged_share=method.base_prompt_share)
        layers = models.capture.phrase_map_layers(batch.latents.shape[-2:]) if self.map_layers else None
        with (
            models.capture.store(layers) as store,
            dual_path(
                models.adapters, models.predict, batch.noisy_latents, batch.timesteps,
                table.reference(batch.rows, batch.time_ids), table.response(batch.rows, batch.time_ids),
                mode=method.dual_path, store=store, respond=models.respond,
            ) as paths,
        ):  # fmt: skip
            reference, response = paths.reference, paths.response
            response_pred, reference_pred = paths.response_pred, paths.reference_pred
            sfcm = self.maps.of_batch(batch, self.alignment, response_pred.detach(), reference_pred, reference)
            resolutions = list(reference.resolutions.values())
            unchanged = send((batch.kinds != FULL).float(), models.device)
            to_epsilon = models.noise.epsilon_scale(batch.timesteps)
            base_error = diffusion_loss(response_pred, reference_pred) * to_epsilon**2
            yield {
                "text_consistent": text_consistent_loss(
                    list(response.attention_probs.values()), list(reference.attention_probs.values()), resolutions,
                    sfcm, *(places[send(batch.rows, models.device)] for places in table.positions),
                ).mean(),
                "fine_grained": fine_grained_loss(
                    list(response.queries.values()), list(reference.queries.values()), resolutions, sfcm
                ).mean(),
                "base_prompt": (base_error * unchanged).mean(),
            }  # fmt: skip
