"""The SFCMs that lost, for the ablations: `python benchmarks/sfcm_modes.py` is the training script with them.

Arguments of every map are those of `sfcm.sfcm_paper`.
Source: [ours].
"""

from __future__ import annotations

import sys
from pathlib import Path

from torch import Tensor


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sfcm
from region_guidance import blur, guidance_map, percentile_normalize
from sfcm import SfcmMode, sfcm_averaged, taken_by_phrases
from training import flag_rules


def sfcm_noise(difference: Tensor, phrase_maps: Tensor, distances: Tensor, phrase_mask: Tensor) -> Tensor:
    """The noise difference alone, blurred and percentile-normalised."""
    return guidance_map(difference)


def sfcm_product(difference: Tensor, phrase_maps: Tensor, distances: Tensor, phrase_mask: Tensor) -> Tensor:
    """The difference times `prod_p (1 - D'_p * M_p)`."""
    weights = sfcm.relative_distances(distances, phrase_mask)[..., None, None]
    kept = (1 - weights * phrase_maps).prod(1, keepdim=True)
    return percentile_normalize(percentile_normalize(blur(difference)) * kept)


def sfcm_attention(difference: Tensor, phrase_maps: Tensor, distances: Tensor, phrase_mask: Tensor) -> Tensor:
    """What the phrases leave, without the noise difference."""
    return percentile_normalize(1 - taken_by_phrases(phrase_maps, distances, phrase_mask))


def sfcm_hard(difference: Tensor, phrase_maps: Tensor, distances: Tensor, phrase_mask: Tensor) -> Tensor:
    """`sfcm_averaged` cut at one half, 0 or 1."""
    return (sfcm_averaged(difference, phrase_maps, distances, phrase_mask) >= 0.5).to(difference.dtype)


LOST = {
    "averaged_noise": SfcmMode(sfcm_noise, averaged=True),
    "averaged_product": SfcmMode(sfcm_product, averaged=True),
    "averaged_target_hard": SfcmMode(sfcm_hard, averaged=True, differences=("words",)),
    "attention": SfcmMode(sfcm_attention, averaged=True),
    "noise": SfcmMode(sfcm_noise, averaged=False),
}


def register() -> None:
    """From now on the trainer and the pipeline of this process know them."""
    sfcm.SFCM_MODES.update(LOST)
    flag_rules.SFCM_MODES.extend(name for name in LOST if name not in flag_rules.SFCM_MODES)


if __name__ == "__main__":
    register()
    import train_spf_portrait_lora

    train_spf_portrait_lora.main()
