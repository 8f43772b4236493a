"""The losses of stage 2, per sample, so that the caller decides how to reduce.

Pure functions of tensors; the reference side is always detached.

Legend: B batch, C latent channels, H/W latent size, S = h*w image tokens of a layer, T text tokens, K matched tokens,
N heads, D head dim, E size of a CLIP embedding.
Paper: arXiv 2504.00396.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def diffusion_loss(model_pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of a noise (or velocity) prediction.

    Args:
        model_pred: (B, C, H, W), gradient flows.
        target: (B, C, H, W).

    Returns:
        (B,) float32.

    Source: [paper] L_diffusion.
    """
    return (model_pred.float() - target.float().detach()).square().flatten(1).mean(1)


def masked_diffusion_loss(model_pred: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The same inside a mask: the error's mean, weighed by the mask.

    Args:
        model_pred: (B, C, H, W), gradient flows.
        target: (B, C, H, W).
        mask: (B, 1, H, W) in [0, 1]; one that is 0 all over makes the loss 0.

    Returns:
        (B,) float32.

    Source: the masked training of kohya's sd-scripts and OneTrainer, with the weights' mean brought to 1.
    """
    error = (model_pred.float() - target.float().detach()).square().mean(1, keepdim=True)
    mask = mask.float()
    return (mask * error).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=torch.finfo(mask.dtype).tiny)


def preservation_weight(sfcm: torch.Tensor, resolution: tuple[int, int]) -> torch.Tensor:
    """`1 - SFCM` at a layer's resolution.

    Args:
        sfcm: (B, 1, H, W) in [0, 1].
        resolution: (h, w) of the layer.

    Returns:
        (B, S) in [0, 1].

    Source: [paper] the map weighs the alignment; [ours] area interpolation.
    """
    return 1 - F.interpolate(sfcm.detach().float(), resolution, mode="area").flatten(1)


def _select_tokens(probs: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return probs.gather(2, positions[:, None].expand(-1, probs.shape[1], -1))


def _masked_mean(probs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    mask = mask.to(probs.dtype)
    return torch.einsum("bst,bt->bs", probs, mask) / mask.sum(1, keepdim=True).clamp(min=1)


def text_consistent_loss(
    response_probs: Sequence[torch.Tensor],
    reference_probs: Sequence[torch.Tensor],
    resolutions: Sequence[tuple[int, int]],
    sfcm: torch.Tensor,
    base_positions: torch.Tensor,
    full_positions: torch.Tensor,
    position_mask: torch.Tensor,
    base_padding: torch.Tensor,
    full_padding: torch.Tensor,
) -> torch.Tensor:
    """Keeps each base token's attention map, and the mean map of the padding, outside the SFCM.

    Args:
        response_probs: per layer (B, S, T), heads averaged, gradient flows.
        reference_probs: per layer (B, S, T), detached here.
        resolutions: per layer (h, w) with h*w = S.
        sfcm: (B, 1, H, W) in [0, 1].
        base_positions: (B, K) positions of the matched tokens in the base prompt.
        full_positions: (B, K) positions of the same tokens in the full prompt.
        position_mask: (B, K) bool, False where a shorter prompt is padded.
        base_padding: (B, T) bool, the padding positions of the base prompt.
        full_padding: (B, T) bool, those of the full prompt.

    Returns:
        (B,) float32, averaged over layers.

    Source: [paper] L_text; [ours] the norm, tokens matched by alignment of the two sequences.
    """
    token_mask = F.pad(position_mask, (0, 1), value=True).float()
    total = 0
    for response, reference, resolution in zip(response_probs, reference_probs, resolutions):
        response, reference = response.float(), reference.float().detach()
        response_maps = torch.cat(
            [_select_tokens(response, full_positions), _masked_mean(response, full_padding)[..., None]], dim=2
        )
        reference_maps = torch.cat(
            [_select_tokens(reference, base_positions), _masked_mean(reference, base_padding)[..., None]], dim=2
        )
        error = (response_maps - reference_maps).square() * token_mask[:, None]
        error = error.sum(2) / token_mask.sum(1, keepdim=True)
        total = total + (preservation_weight(sfcm, resolution) * error).mean(1)
    return total / len(resolutions)


def fine_grained_loss(
    response_queries: Sequence[torch.Tensor],
    reference_queries: Sequence[torch.Tensor],
    resolutions: Sequence[tuple[int, int]],
    sfcm: torch.Tensor,
) -> torch.Tensor:
    """Keeps the UNet's features, as the queries of its cross-attention, outside the SFCM.

    Args:
        response_queries: per layer (B, N, S, D), gradient flows.
        reference_queries: per layer (B, N, S, D), detached here.
        resolutions: per layer (h, w) with h*w = S.
        sfcm: (B, 1, H, W) in [0, 1].

    Returns:
        (B,) float32, averaged over layers; each layer is relative to the mean square of its reference queries.

    Source: [paper] L_fine; [ours] the norm and the division.
    """
    total = 0
    for response, reference, resolution in zip(response_queries, reference_queries, resolutions):
        response, reference = response.float(), reference.float().detach()
        error = (response - reference).square().mean((1, 3))
        scale = reference.square().mean((1, 2, 3))
        total = total + (preservation_weight(sfcm, resolution) * error).mean(1) / scale
    return total / len(resolutions)


def representation_bias(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
    """Difference vector between the modalities, `CLIP_image - CLIP_text` of unit vectors, (B, E). Source: [paper]."""
    return F.normalize(image_embeds.float(), dim=-1) - F.normalize(text_embeds.float(), dim=-1)


def enhancement_difference(
    predicted_embeds: torch.Tensor, image_embeds: torch.Tensor, text_embeds: torch.Tensor
) -> torch.Tensor:
    """`1 - cos` between the representation biases of the predicted and of the training portrait.

    Args:
        predicted_embeds: (B, E) CLIP image embeddings of the decoded one-step prediction, gradient flows.
        image_embeds: (B, E) those of the training portraits.
        text_embeds: (B, E) CLIP text embeddings of the target.

    Returns:
        (B,) in [0, 2].

    Source: [paper] L_enh.
    """
    predicted_bias = representation_bias(predicted_embeds, text_embeds)
    return 1 - F.cosine_similarity(predicted_bias, representation_bias(image_embeds, text_embeds).detach(), dim=-1)


def enhancement_direct(
    predicted_embeds: torch.Tensor, image_embeds: torch.Tensor, text_embeds: torch.Tensor
) -> torch.Tensor:
    """`1 - cos` of image and target text, the direct supervision that the paper argues against.

    Arguments as in `enhancement_difference`; the training portraits are not looked at. Source: [paper], ablation.
    """
    return 1 - F.cosine_similarity(predicted_embeds.float(), text_embeds.float(), dim=-1)


ENHANCEMENT_LOSSES = {"difference": enhancement_difference, "direct": enhancement_direct}


def compose_prediction(
    reference_pred: torch.Tensor,
    teacher_full_pred: torch.Tensor,
    teacher_base_pred: torch.Tensor,
    sfcm: torch.Tensor,
    gamma: float = 1.0,
    scale: float = 1.0,
    base_weight: float = 0.0,
) -> torch.Tensor:
    """What the portrait's prediction should be: the teacher's change inside the map, the original model's elsewhere.

    `reference + SFCM^gamma * scale * ((full - reference) - base_weight * (base - reference))`. What the teacher moves
    with the base prompt, which asks for nothing, is pollution.

    Args:
        reference_pred: (B, C, H, W) of the original model with the base prompt.
        teacher_full_pred: (B, C, H, W) of the frozen stage-1 adapter with the full prompt.
        teacher_base_pred: (B, C, H, W) of that adapter with the base prompt.
        sfcm: (B, 1, H, W) in [0, 1].
        gamma: exponent of the map, above 0; larger narrows it.
        scale: factor on the change.
        base_weight: weight of the base prompt's change, in [0, 1].

    Returns:
        (B, C, H, W) float32, detached.

    Source: [ours].
    """
    reference_pred = reference_pred.float()
    change = teacher_full_pred.float() - reference_pred
    change = change - base_weight * (teacher_base_pred.float() - reference_pred)
    return (reference_pred + sfcm.float() ** gamma * scale * change).detach()
