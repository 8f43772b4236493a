"""Composed alignment: stage 1's change inside the SFCM, the original model's prediction elsewhere [ours].

Legend: B batch, C channels, H/W latent size.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch

from adapters import BASE_ROW
from attention_processors import CrossAttentionFeatures
from families.prompt_embeds import PromptEmbeds
from training.arguments import Flags
from training.batches import Batch, send
from training.losses import compose_prediction, diffusion_loss
from training.models import STAGE1_ADAPTER
from training.objectives.objective import Objective, Parts
from training.prompt_table import FULL
from training.training_set import revisited_batch


# Batches whose composed targets are kept at a time: latents, a few megabytes for Stable Diffusion.
KEPT_TARGETS = 16


class Composed(Objective):
    """`L_composed`: the prediction that the original model and the frozen stage-1 adapter make up together."""

    def __init__(self, flags: Flags, parts: Parts) -> None:
        super().__init__(flags, parts)
        self.weights, self.flags = {"composed": 1.0}, flags.composed
        self.first_batch = flags.method.stage1_steps * flags.loop.gradient_accumulation_steps
        self._targets: dict[int, torch.Tensor] = {}  # (B, C, H, W) by the number of their batch

    def prepare(self, state: Mapping[str, torch.Tensor] | None = None) -> None:
        """Keep stage 1's LoRA as the teacher, and begin where --composed_init says."""
        self.models.add_teacher(self.models.lora() if state is None else state)
        if state is None and self.method.stage2_objective == "composed" and self.flags.composed_init == "zero":
            self.models.bring_to_zero()

    def state(self) -> dict[str, torch.Tensor]:
        return self.models.lora(STAGE1_ADAPTER)

    def maps_changed(self) -> None:
        self._targets = {}

    @contextmanager
    def losses(self, micro_step: int) -> Iterator[dict[str, torch.Tensor]]:
        noise, number = self.models.noise, self.number_of(micro_step)
        batch = self.batches.aligned(
            self.alignment, number, stream=2, unchanged_share=self.method.base_prompt_share,
            timestep_power=self.flags.composed_timestep_power,
        )  # fmt: skip
        response_embeds = self.table.response(batch.rows, batch.time_ids)
        target = self.target(batch, number, response_embeds)
        response_pred = self.models.respond(batch.noisy_latents, batch.timesteps, response_embeds)
        losses = diffusion_loss(response_pred, target) * noise.epsilon_scale(batch.timesteps) ** 2
        yield {"composed": losses.mean()}

    def number_of(self, micro_step: int) -> int:
        """The batch to learn from among those that can be drawn: each is met several times."""
        done, reuse = micro_step - self.first_batch, self.flags.composed_target_reuse
        return self.first_batch + revisited_batch(done, KEPT_TARGETS, reuse, self.batches.seed)

    @torch.no_grad()
    def target(self, batch: Batch, number: int, response_embeds: PromptEmbeds) -> torch.Tensor:
        """What the predictions (B, C, H, W) of a batch should be, made once and kept as long as its cycle lasts.

        All of it comes from frozen weights and the batch: what is not there, as in a run that goes on, is made again
        and is the same.
        """
        if number in self._targets:
            return self._targets[number]
        reference_pred, full_pred, base_pred, features = self.predictions(batch, response_embeds)
        sfcm, flags = self.maps.of_batch(batch, self.alignment, full_pred, reference_pred, features), self.flags
        strength = flags.sfcm_gamma, flags.teacher_scale, flags.teacher_base_weight
        target = compose_prediction(reference_pred, full_pred, base_pred, sfcm, *strength)
        if flags.composed_target_reuse > 1:
            cycle = number - (number - self.first_batch) % KEPT_TARGETS
            self._targets = {kept: value for kept, value in self._targets.items() if kept >= cycle} | {number: target}
        return target

    @torch.no_grad()
    def predictions(
        self, batch: Batch, response_embeds: PromptEmbeds
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, CrossAttentionFeatures | None]:
        """Predictions (B, C, H, W) of the original model, and of the stage-1 adapter with full and with base prompt;
        with them the original model's features, if the map asks for them.

        The teacher sees FULL rows alone, and with the base prompt only where that has a weight; elsewhere its
        predictions are the reference's, which the composition keeps.
        """
        models, count = self.models, len(batch.kinds)
        reference_embeds = self.table.reference(batch.rows, batch.time_ids)
        full = send((batch.kinds == FULL).nonzero().flatten(), models.device)
        asked = [response_embeds, reference_embeds] if self.flags.teacher_base_weight > 0 else [response_embeds]
        rows, embeds = full.repeat(len(asked)), PromptEmbeds.cat([embeds[full] for embeds in asked])
        with nullcontext() if self.maps.has_bank else models.capture.store() as store:
            recording = nullcontext() if store is None else store.record()
            if self.method.dual_path == "single_pass":
                together = torch.cat([torch.arange(count, device=models.device), rows])
                both = PromptEmbeds.cat([reference_embeds, embeds])
                with models.adapters.per_sample([BASE_ROW] * count + [STAGE1_ADAPTER] * len(rows)), recording:
                    preds = models.predict(batch.noisy_latents[together], batch.timesteps[together], both)
                reference_pred, preds = preds[:count], preds[count:]
            else:
                with models.adapters.only(None), recording:
                    reference_pred = models.predict(batch.noisy_latents, batch.timesteps, reference_embeds)
                preds = reference_pred[rows]
                if len(rows):
                    with models.adapters.only(STAGE1_ADAPTER):
                        preds = models.predict(batch.noisy_latents[rows], batch.timesteps[rows], embeds)
            features = None if store is None else store.pop().rows(0, count)
        preds = [reference_pred.index_copy(0, full, own) for own in preds.chunk(len(asked))]
        # Without a weight, what the teacher makes of the base prompt is nothing that counts.
        full_pred, base_pred = preds if len(asked) == 2 else (*preds, reference_pred)
        return reference_pred, full_pred, base_pred, features
