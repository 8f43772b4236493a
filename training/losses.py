"""The losses, per sample, so that the caller decides how to reduce: pure functions of tensors, whose reference side is
always detached.

Legend: B batch, C latent channels, H/W latent size, S = h*w image tokens of a layer, T text tokens, K matched tokens,
N heads, D head dim, E size of a CLIP embedding.
Paper: arXiv 2504.00396; what names no source is [ours].
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def diffusion_loss(model_pred: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of predictions (B, C, H, W) to a target of that shape: (B,) float32. Source: [paper]."""
    return (model_pred.float() - target.float().detach()).square().flatten(1).mean(1)


def masked_diffusion_loss(model_pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """The same inside a mask, (B, 1, H, W) in [0, 1]: the error's mean, weighed by it; 0 where the mask is 0 all over.

    Source: the masked training of kohya's sd-scripts and OneTrainer, with the weights' mean brought to 1.
    """
    error = (model_pred.float() - target.float().detach()).square().mean(1, keepdim=True)
    mask = mask.float()
    return (mask * error).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=torch.finfo(mask.dtype).tiny)


def preservation_weight(sfcm: Tensor, resolution: tuple[int, int]) -> Tensor:
    """`1 - SFCM`, (B, 1, H, W) in [0, 1], at a layer's resolution (h, w): (B, S) in [0, 1].

    Source: [paper] the map weighs the alignment; [ours] area interpolation.
    """
    return 1 - F.interpolate(sfcm.detach().float(), resolution, mode="area").flatten(1)


def _maps(probs: Tensor, positions: Tensor, padding: Tensor) -> Tensor:
    """The maps (B, S, K + 1) of tokens at `positions` (B, K), and the mean map of those where `padding` (B, T) is."""
    padding = padding.to(probs.dtype)
    mean = torch.einsum("bst,bt->bs", probs, padding) / padding.sum(1, keepdim=True).clamp(min=1)
    return torch.cat([probs.gather(2, positions[:, None].expand(-1, probs.shape[1], -1)), mean[..., None]], dim=2)


def text_consistent_loss(
    response_probs: Sequence[Tensor], reference_probs: Sequence[Tensor], resolutions: Sequence[tuple[int, int]],
    sfcm: Tensor, base_positions: Tensor, full_positions: Tensor, position_mask: Tensor, base_padding: Tensor,
    full_padding: Tensor,
) -> Tensor:  # fmt: skip
    """Keeps each base token's attention map, and the mean map of the padding, outside the SFCM.

    Args:
        response_probs, reference_probs: per layer (B, S, T), heads averaged; gradient flows through the first.
        resolutions: per layer (h, w) with h*w = S.
        sfcm: (B, 1, H, W) in [0, 1].
        base_positions, full_positions: (B, K) positions of the same tokens in the base and in the full prompt.
        position_mask: (B, K) bool, False where a shorter prompt is padded.
        base_padding, full_padding: (B, T) bool, the padding positions of both prompts.

    Returns: (B,) float32, averaged over layers.
    Source: [paper] L_text; [ours] the norm, tokens matched by alignment of the two sequences.
    """
    token_mask, total = F.pad(position_mask, (0, 1), value=True).float(), 0
    for response, reference, resolution in zip(response_probs, reference_probs, resolutions):
        response_maps = _maps(response.float(), full_positions, full_padding)
        reference_maps = _maps(reference.float().detach(), base_positions, base_padding)
        error = (response_maps - reference_maps).square() * token_mask[:, None]
        error = error.sum(2) / token_mask.sum(1, keepdim=True)
        total = total + (preservation_weight(sfcm, resolution) * error).mean(1)
    return total / len(resolutions)


def fine_grained_loss(
    response_queries: Sequence[Tensor], reference_queries: Sequence[Tensor], resolutions: Sequence[tuple[int, int]],
    sfcm: Tensor,
) -> Tensor:  # fmt: skip
    """Keeps the UNet's features, as the queries of its cross-attention, outside the SFCM.

    Queries are (B, N, S, D) per layer; the rest is as in `text_consistent_loss`. Each layer is relative to the mean
    square of its reference queries.
    Source: [paper] L_fine; [ours] the norm and the division.
    """
    total = 0
    for response, reference, resolution in zip(response_queries, reference_queries, resolutions):
        response, reference = response.float(), reference.float().detach()
        error = (response - reference).square().mean((1, 3))
        scale = reference.square().mean((1, 2, 3))
        total = total + (preservation_weight(sfcm, resolution) * error).mean(1) / scale
    return total / len(resolutions)


def representation_bias(image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
    """Difference vector between the modalities, `CLIP_image - CLIP_text` of unit vectors, (B, E). Source: [paper]."""
    return F.normalize(image_embeds.float(), dim=-1) - F.normalize(text_embeds.float(), dim=-1)


def enhancement_difference(predicted_embeds: Tensor, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
    """`1 - cos` between the representation biases of the predicted and of the training portrait, (B,) in [0, 2].

    Embeddings (B, E) of the decoded one-step prediction, which gradient flows through, of the training portraits, and
    of the target's text.
    Source: [paper] L_enh.
    """
    predicted_bias = representation_bias(predicted_embeds, text_embeds)
    return 1 - F.cosine_similarity(predicted_bias, representation_bias(image_embeds, text_embeds).detach(), dim=-1)


def enhancement_direct(predicted_embeds: Tensor, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
    """`1 - cos` of image and target text, the direct supervision that the paper argues against.

    Of the same arguments; the training portraits are not looked at. Source: [paper], ablation.
    """
    return 1 - F.cosine_similarity(predicted_embeds.float(), text_embeds.float(), dim=-1)


ENHANCEMENT_LOSSES = {"difference": enhancement_difference, "direct": enhancement_direct}


def compose_prediction(
    reference_pred: Tensor, teacher_full_pred: Tensor, teacher_base_pred: Tensor, sfcm: Tensor, gamma: float = 1.0,
    scale: float = 1.0, base_weight: float = 0.0,
) -> Tensor:  # fmt: skip
    """What the portrait's prediction should be: the teacher's change inside the map, the original model's elsewhere.

    `reference + SFCM^gamma * scale * ((full - reference) - base_weight * (base - reference))`. What the teacher moves
    with the base prompt, which asks for nothing, is pollution.

    Args:
        reference_pred: (B, C, H, W) of the original model with the base prompt.
        teacher_full_pred, teacher_base_pred: of the frozen stage-1 adapter with the full and the base prompt.
        sfcm: (B, 1, H, W) in [0, 1].
        gamma: above 0; larger narrows the map.

    Returns: (B, C, H, W) float32, detached.
    """
    reference_pred = reference_pred.float()
    change = teacher_full_pred.float() - reference_pred
    change = change - base_weight * (teacher_base_pred.float() - reference_pred)
    return (reference_pred + sfcm.float() ** gamma * scale * change).detach()
