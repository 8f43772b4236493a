"""The two paths over one set of weights: adapters off with the base prompt, one adapter on with the full prompt.

Legend: B batch, C latent channels, H/W latent size. Paper: arXiv 2504.00396.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters import BASE_ROW, Adapters
from attention_processors import CrossAttentionFeatures, CrossAttentionStore
from families.prompt_embeds import PromptEmbeds


@dataclass
class DualPathOutput:
    """Both paths' predictions (B, C, H, W) and, with a store, their features; gradient flows through the response's
    alone.
    """

    reference_pred: Tensor
    response_pred: Tensor
    reference: CrossAttentionFeatures | None
    response: CrossAttentionFeatures | None


Predict = Callable[[Tensor, Tensor, PromptEmbeds], Tensor]


@contextmanager
def dual_path(
    adapters: Adapters, predict: Predict, noisy_latents: Tensor, timesteps: Tensor, reference_embeds: PromptEmbeds,
    response_embeds: PromptEmbeds, *, mode: str = "two_pass", store: CrossAttentionStore | None = None,
    respond: Predict | None = None,
) -> Iterator[DualPathOutput]:  # fmt: skip
    """Run the Reference Path (adapters off) and the Response Path ("default" on) on the same noisy latents.

    Compute the loss and call `backward` inside the context: gradient checkpointing runs layers again in the backward,
    and they must find the adapters as the forward found them.

    Args:
        adapters: of the denoiser, not of a DDP wrapper.
        predict: predicts (B, C, H, W) by the denoiser from noisy latents, timesteps (B,) and prompts.
        mode: "two_pass" (reference first, without gradient) or "single_pass" (one batch of 2B rows; more memory).
        store: of a capture around this call, to record features in the forward; a RuntimeError if it is another's.
        respond: predicts by the DDP wrapper, for the forward that has a gradient; default `predict`.

    Source: [paper] the two paths share weights, latents and timesteps; [ours] the batched pass.
    """

    def recorded(forward: Predict, *given: Tensor | PromptEmbeds) -> tuple[Tensor, CrossAttentionFeatures | None]:
        if store is None:
            return forward(*given), None
        with store.record():
            return forward(*given), store.pop()

    if mode == "two_pass":
        with adapters.only(None), torch.no_grad():
            reference_pred, reference = recorded(predict, noisy_latents, timesteps, reference_embeds)
        with adapters.only("default"):
            response_pred, response = recorded(respond or predict, noisy_latents, timesteps, response_embeds)
            yield DualPathOutput(reference_pred, response_pred, reference, response)
        return

    batch_size = len(noisy_latents)
    embeds = PromptEmbeds.cat([reference_embeds, response_embeds])
    with adapters.per_sample([BASE_ROW] * batch_size + ["default"] * batch_size):
        pred, features = recorded(
            respond or predict, torch.cat([noisy_latents, noisy_latents]), timesteps.repeat(2), embeds
        )
        yield DualPathOutput(
            pred[:batch_size].detach(),
            pred[batch_size:],
            None if features is None else features.rows(0, batch_size).detach(),
            None if features is None else features.rows(batch_size, 2 * batch_size),
        )
