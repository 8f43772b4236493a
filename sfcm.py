"""The Semantic-Aware Fine Control Map: where, and how strongly, the target may change a portrait.

Pure functions of tensors. Nothing here needs a gradient; callers run them under `torch.no_grad`.

Legend: B batch, C latent channels, H/W latent size, S = h*w image tokens of a layer, T text tokens, P base phrases.
Paper: arXiv 2504.00396.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


# The sibling as a module of the package that a custom pipeline is, or as a module on the path.
try:
    from . import region_guidance
except ImportError:
    import region_guidance as region_guidance

guidance_map, percentile_normalize = region_guidance.guidance_map, region_guidance.percentile_normalize


def min_max_normalize(maps: Tensor) -> Tensor:
    """Stretch each map (..., H, W) to [0, 1]; a flat map becomes zeros. Source: [paper]; [ours] per sample."""
    return region_guidance.stretch(maps, maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True))


def epsilon_scale(alphas_cumprod: Tensor | None, timesteps: Tensor, prediction_type: str) -> Tensor:
    """What a difference of two predictions is multiplied by to become one of predicted noise.

    Two predictions are of the same noisy latents, so a model that predicts noise and the same one expressed as
    velocity or as clean latents differ by this factor alone: 1; `sqrt(alpha_bar)`; `sqrt(alpha_bar / (1 -
    alpha_bar))`. It is float32 in the shape of `timesteps`, which may lie between two integers.

    Raises ValueError: `prediction_type` is not "epsilon", "v_prediction" or "sample".
    """
    if prediction_type == "epsilon":
        return torch.ones_like(timesteps, dtype=torch.float32)
    # Of pure noise the factor would be 0, and a map of that step alone be empty; diffusers has the same least signal.
    alpha_bar = alphas_cumprod.to(timesteps.device)[timesteps.round().long()].float().clamp(min=2**-24)
    if prediction_type == "v_prediction":
        return alpha_bar.sqrt()
    if prediction_type == "sample":
        return (alpha_bar / (1 - alpha_bar)).sqrt()
    raise ValueError(f"prediction_type must be 'epsilon', 'v_prediction' or 'sample', got {prediction_type!r}")


def phrase_attention_maps(
    attention_probs: Sequence[Tensor], resolutions: Sequence[tuple[int, int]], phrase_weights: Tensor,
    size: tuple[int, int],
) -> Tensor:  # fmt: skip
    """Where each base phrase is looked at, averaged over layers: (B, P, H, W) in [0, 1]; zeros for a padded phrase.

    Args:
        attention_probs: per layer (B, S, T), cross-attention probabilities of the Reference Path, heads averaged.
        resolutions: per layer (h, w) with h*w = S.
        phrase_weights: (B, P, T), each row averages over one phrase's tokens; a row of zeros pads a shorter prompt.
        size: (H, W) of the maps to return.

    Source: [paper]; [ours] the layers of one resolution are averaged.
    """
    total = 0
    for probs, (height, width) in zip(attention_probs, resolutions):
        maps = torch.einsum("bst,bpt->bps", probs.float(), phrase_weights.float()).unflatten(-1, (height, width))
        total = total + F.interpolate(maps, size, mode="bilinear", align_corners=False)
    return min_max_normalize(total)


@torch.no_grad()
def clip_distances(
    text_encoder: torch.nn.Module, tokenizer: Any, pairs: Sequence[Any], tokens: Sequence[Any], device: torch.device
) -> list[Tensor]:
    """CLIP distances `1 - cos` of each pair's phrases to its target, (P,) float32 in [0, 2] on the CPU each.

    By a diffusion model's own text encoder, as it was before any adapter, on `device`: in CLIP's common space with
    pictures where it has the projection to it, else before that. A phrase that was cut off stands for nothing, as the
    target itself would: a prompt may name many of them.

    Source: [paper] the distance; [ours] the model it is measured by.
    """
    rows = [
        [text if places else pair.target_text for text, places in zip(pair.base_phrases, own.phrase_positions)]
        + [pair.target_text]
        for pair, own in zip(pairs, tokens, strict=True)
    ]
    texts, embed_of = list(dict.fromkeys(text for row in rows for text in row)), {}
    for start in range(0, len(texts), 64):
        chunk = texts[start : start + 64]
        ids = tokenizer(chunk, padding="max_length", truncation=True, return_tensors="pt").input_ids
        output = text_encoder(ids.to(device))
        embeds = output["text_embeds" if "text_embeds" in output else "pooler_output"]
        embed_of |= zip(chunk, embeds.float().cpu(), strict=True)
    groups = [torch.stack([embed_of[text] for text in row]) for row in rows]
    return [1 - F.cosine_similarity(group[:-1], group[-1:]) for group in groups]


def relative_distances(distances: Tensor, phrase_mask: Tensor) -> Tensor:
    """Distances (B, P) stretched to [0, 1] over one prompt's phrases, so that the CLIP model's scale does not matter.

    Zeros where all are equally far, and where `phrase_mask` (B, P) is False for padding. Source: [ours].
    """
    low = distances.masked_fill(~phrase_mask, float("inf")).amin(1, keepdim=True)
    high = distances.masked_fill(~phrase_mask, float("-inf")).amax(1, keepdim=True)
    span = high - low
    return torch.where(phrase_mask & (span > 0), (distances - low) / torch.where(span > 0, span, 1), 0)


def sfcm_paper(difference: Tensor, phrase_maps: Tensor, distances: Tensor, phrase_mask: Tensor) -> Tensor:
    """The map as the paper's figure draws it: `clamp(N - sum_p D_p * M_p, min=0)`, normalised before and after.

    Args:
        difference: (B, 1, H, W) from `noise_difference`; for a mode with D differences (B, D, H, W).
        phrase_maps: (B, P, H, W) from `phrase_attention_maps`.
        distances: (B, P) from `clip_distances`.
        phrase_mask: (B, P) bool, False for padding.

    Returns: (B, 1, H, W) in [0, 1].
    Source: [paper]; [ours] min-max per sample.
    """
    taken = ((distances * phrase_mask)[..., None, None] * phrase_maps).sum(1, keepdim=True)
    return min_max_normalize((min_max_normalize(difference) - taken).clamp(min=0))


def sfcm_averaged(difference: Tensor, phrase_maps: Tensor, distances: Tensor, phrase_mask: Tensor) -> Tensor:
    """The default: the blurred, percentile-normalised difference, or the geometric mean of several, minus the phrases'
    mean relative distance times map.

    Meant for a `difference` (B, D, H, W) averaged over several noise samples at high timesteps. Source: [ours].
    """
    taken = taken_by_phrases(phrase_maps, distances, phrase_mask)
    return percentile_normalize((guidance_map(difference) - taken).clamp(min=0))


def taken_by_phrases(phrase_maps: Tensor, distances: Tensor, phrase_mask: Tensor) -> Tensor:
    """(B, 1, H, W): the mean over a prompt's phrases of relative distance times map."""
    weights = relative_distances(distances, phrase_mask)[..., None, None]
    count = phrase_mask.sum(1).clamp(min=1)[:, None, None, None]
    return (weights * phrase_maps).sum(1, keepdim=True) / count


def sfcm_none(difference: Tensor, *_) -> Tensor:
    """No region: everything is aligned (the paper's ablation). Source: [paper]."""
    return torch.zeros_like(difference)


def free_regions(sfcm: Tensor, phrase_maps: Tensor, free_mask: Tensor) -> Tensor:
    """Open a map (B, 1, H, W) in [0, 1] where phrases that are free to change are looked at: nowhere lower than their
    maps of (B, P, H, W) from `phrase_attention_maps`; `free_mask` is (B, P) bool. Source: [ours].
    """
    return torch.maximum(sfcm, (phrase_maps * free_mask[..., None, None]).amax(1, keepdim=True))


@dataclass(frozen=True)
class SfcmMode:
    """How a map is made."""

    compute: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # as `sfcm_paper`
    averaged: bool  # whether its difference is averaged over several noises of one portrait
    # What the response is held against, one difference each: "paths" is the original model's prediction for the base
    # prompt, "words" the adapter's own for it. The latter is what the target's words change *under the adapter*, and
    # leaves out what the adapter changes whatever the prompt: the pollution itself.
    differences: tuple[str, ...] = ("paths",)


# Another map is another entry.
SFCM_MODES = {
    "averaged_target": SfcmMode(sfcm_averaged, averaged=True, differences=("words",)),
    "averaged": SfcmMode(sfcm_averaged, averaged=True),
    "averaged_both": SfcmMode(sfcm_averaged, averaged=True, differences=("paths", "words")),
    "paper": SfcmMode(sfcm_paper, averaged=False),
    "none": SfcmMode(sfcm_none, averaged=False),
}
