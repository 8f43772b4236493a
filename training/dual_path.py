"""The two paths over one set of weights: adapters off with the base prompt, one adapter on with the full prompt.

Legend: B batch, C latent channels, H/W latent size.
Paper: arXiv 2504.00396.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters import BASE_ROW, Adapters
from attention_processors import CrossAttentionFeatures, CrossAttentionStore
from families.prompt_embeds import PromptEmbeds
from training.flags import DUAL_PATH_MODES


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
    response_embeds: PromptEmbeds, *, adapter_name: str = "default", mode: str = "two_pass",
    store: CrossAttentionStore | None = None, respond: Predict | None = None,
) -> Iterator[DualPathOutput]:  # fmt: skip
    """Run the Reference Path (adapters off) and the Response Path (one adapter on) on the same noisy latents.

    Compute the loss and call `backward` inside the context: gradient checkpointing runs layers again in the backward,
    and they must find the adapters as the forward found them.

    Args:
        adapters: of the denoiser, not of a DDP wrapper.
        predict: predicts (B, C, H, W) by the denoiser from noisy latents (B, C, H, W), timesteps (B,) and prompts.
        timesteps: (B,), or one for all rows.
        reference_embeds, response_embeds: B base prompts, and B full prompts.
        adapter_name: of the Response Path.
        mode: "two_pass" (reference first, without gradient) or "single_pass" (one batch of 2B rows; more memory).
        store: of a capture around this call, to record features in the forward.
        respond: predicts by the DDP wrapper, for the forward that has a gradient; default `predict`.

    Raises:
        ValueError: an unknown mode or adapter, or adapters merged into the weights.
        RuntimeError: a `store` that does not belong to the denoiser.

    Source: [paper] the two paths share weights, latents and timesteps; [ours] the batched pass.
    """
    if mode not in DUAL_PATH_MODES:
        raise ValueError(f"mode must be one of {DUAL_PATH_MODES}, got {mode!r}")

    def recorded(
        forward: Predict, latents: Tensor, steps: Tensor, embeds: PromptEmbeds
    ) -> tuple[Tensor, CrossAttentionFeatures | None]:
        with store.record() if store is not None else nullcontext():
            pred = forward(latents, steps, embeds)
        return pred, store.pop() if store is not None else None

    if mode == "two_pass":
        with adapters.only(None), torch.no_grad():
            reference_pred, reference = recorded(predict, noisy_latents, timesteps, reference_embeds)
        with adapters.only(adapter_name):
            response_pred, response = recorded(respond or predict, noisy_latents, timesteps, response_embeds)
            yield DualPathOutput(reference_pred, response_pred, reference, response)
        return

    batch_size = noisy_latents.shape[0]
    with adapters.per_sample([BASE_ROW] * batch_size + [adapter_name] * batch_size):
        pred, features = recorded(
            respond or predict, torch.cat([noisy_latents, noisy_latents]),
            timesteps.reshape(-1).expand(batch_size).repeat(2), PromptEmbeds.cat([reference_embeds, response_embeds]),
        )  # fmt: skip
        yield DualPathOutput(
            pred[:batch_size].detach(),
            pred[batch_size:],
            None if features is None else features.rows(0, batch_size).detach(),
            None if features is None else features.rows(batch_size, 2 * batch_size),
        )
