"""Where a LoRA acts, from predictions alone: the region in which they differ, and a prediction kept to it.

Needs torch and nothing else, for it is at work in the pipelines and in ComfyUI. Any kind of prediction will do, of
noise, velocity or clean latents: each difference is stretched by itself, and the blend is linear.

Legend: B batch, C latent channels, H/W latent size, D differences.
Paper: arXiv 2504.00396. Source: [ours] where nothing else is said.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def stretch(maps: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Map [low, high] to [0, 1]; zeros where the two differ by no more than rounding."""
    span = high - low
    # An interpolated or blurred flat map is flat up to rounding, which must not be stretched to a map of its own.
    differs = span > 16 * torch.finfo(maps.dtype).eps * torch.maximum(low.abs(), high.abs())
    return torch.where(differs, (maps - low) / torch.where(differs, span, 1), 0)


def percentile_normalize(maps: Tensor, low: float = 0.05, high: float = 0.95) -> Tensor:
    """Stretch each map (..., H, W) so that its `low` and `high` quantiles become 0 and 1, and cut what lies beyond.

    A flat map becomes zeros. Less moved by single noisy pixels than extremes are.
    """
    flat = maps.flatten(-2).float()
    bounds = torch.quantile(flat, torch.tensor([low, high], device=maps.device), dim=-1)[..., None, None]
    return stretch(maps, *bounds.to(maps.dtype)).clamp(0, 1)


def blur(maps: Tensor, kernel_size: int = 3) -> Tensor:
    """Box blur that repeats the border. Maps are (B, N, H, W), `kernel_size` is odd."""
    margin = kernel_size // 2
    return F.avg_pool2d(F.pad(maps, (margin,) * 4, mode="replicate"), kernel_size, stride=1)


def noise_difference(response_pred: Tensor, reference_pred: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """Mean absolute difference of two predictions, (B, 1, H, W) float32, not normalised.

    Predictions are (B, C, H, W); `scale` is (B,), or one for all: what makes their difference one of predicted noise.
    Source: [paper].
    """
    difference = (response_pred.float() - reference_pred.float()).abs().mean(1, keepdim=True)
    return difference * torch.as_tensor(scale, device=difference.device).view(-1, 1, 1, 1)


def normalize_differences(differences: Tensor) -> Tensor:
    """Blurred and stretched differences (B, D, H, W) in [0, 1], each by itself."""
    return percentile_normalize(blur(differences))


def guidance_map(differences: Tensor) -> Tensor:
    """Where a prediction differs, (B, 1, H, W) in [0, 1]: the geometric mean of D `noise_difference`s (B, D, H, W), or
    of means of them, each blurred and stretched.
    """
    return normalize_differences(differences).prod(1, keepdim=True) ** (1 / differences.shape[1])


class RunningMap:
    """The guidance map of a run so far: that of the means of all its calls' normalised differences."""

    def __init__(self) -> None:
        self.calls = 0
        self._total: Tensor | float = 0.0

    def add(self, differences: Tensor) -> Tensor:
        """The map (B, 1, H, W) in [0, 1] with one more call's differences (B, D, H, W)."""
        self.calls += 1
        self._total = self._total + normalize_differences(differences)
        return self.map()

    def map(self) -> Tensor:
        """(B, 1, H, W) in [0, 1]. Raises ZeroDivisionError: there was no call yet."""
        return guidance_map(self._total / self.calls)


def keep_to_region(response: Tensor, reference: Tensor, opened: Tensor, strength: float) -> Tensor:
    """A prediction (B, C, H, W) kept to the reference's outside of a region, in its own dtype.

    It is `reference + m * (response - reference)` with the soft mask `m = 1 - strength * (1 - opened)`; `opened` is
    (B, 1, H, W), 1 where the response is free. At strength 0 it is the response, up to
    rounding.
    """
    mask = 1 - strength * (1 - opened)
    return (reference + mask * (response - reference).float()).to(response.dtype)
