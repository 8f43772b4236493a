"""What a call of the pipeline returns beside images, and one picture of it.

Legend: B images of one call (prompts times `num_images_per_prompt`), H/W latent size, P base phrases, K targets,
N calls of the denoiser in a run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import PIL.Image
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from torch import Tensor


# The sibling as a module of the package that a custom pipeline is, or as a module on the path.
try:
    from . import pictures
except ImportError:
    import pictures as pictures


@dataclass
class SPFPortraitPipelineOutput(StableDiffusionPipelineOutput):
    """Output of a call with `compare` or `return_sfcm`; what was not asked for is None.

    Maps are float32 on the CPU, in [0, 1].

    Args:
        images: B images of the full prompts (of the prompts themselves without a target), as `output_type` says.
        nsfw_content_detected: B flags for `images`, or None without a safety checker.
        reference_images: the original model's B images of the base prompts from the same noise, like `images`.
        sfcm: (B, 1, H, W), high where the target responds; without a target, where the LoRA changes the picture, and
            None if there is no LoRA either.
        sfcm_per_step: (B, N, H, W), the same of each call of the denoiser.
        phrases: per image its base phrases; P is the longest's count.
        phrase_maps: (B, P, H, W), where the original model looks at them; zeros where an image has fewer phrases.
        phrase_distances: (B, P) float32 on the CPU, `1 - cos` of phrase and target, in [0, 2]; zeros likewise, and
            where a phrase was cut off. None without a target.
        targets: per image its K targets.
        target_maps: (B, K, H, W), where the portrait's own attention looks at the targets' words.
    """

    reference_images: list[PIL.Image.Image] | np.ndarray | Tensor | None = None
    sfcm: Tensor | None = None
    sfcm_per_step: Tensor | None = None
    phrases: list[tuple[str, ...]] | None = None
    phrase_maps: Tensor | None = None
    phrase_distances: Tensor | None = None
    targets: list[tuple[str, ...]] | None = None
    target_maps: Tensor | None = None


def visualize(output: SPFPortraitPipelineOutput, index: int = 0, columns: int = 4) -> PIL.Image.Image:
    """One picture of all that a call with `return_sfcm` or `compare` returned about an image.

    Args:
        output: of a call with any `output_type` but "latent".
        index: which image, in [0, B).
        columns: pictures a row.

    Returns:
        An RGB image: the original model's portrait, the portrait, the SFCM over it, and a heat map over the
        portrait for each target and over the original for each base phrase, with its words and its CLIP
        distance to the target.

    Raises:
        ValueError: latents, or an output without maps and references.
        IndexError: there is no such image; the message says how many there are.

    Source: [ours].
    """
    if not isinstance(output, SPFPortraitPipelineOutput):
        raise ValueError("Nothing to show beside the image: call with `return_sfcm=True` or `compare=True`.")
    if not 0 <= index < len(output.images):
        raise IndexError(f"There is no image {index}: the output has {len(output.images)}, counted from 0.")
    overlay = pictures.overlay_heat_map
    portrait, targets = _pil_image(output.images, index), (output.targets or {index: ()})[index]
    reference = portrait if output.reference_images is None else _pil_image(output.reference_images, index)
    shown = [] if output.reference_images is None else [("original model", reference)]
    shown.append((", ".join(targets) or "with the LoRA", portrait))
    if output.sfcm is not None:
        shown.append(("SFCM", overlay(portrait, output.sfcm[index, 0])))
    if output.phrases is not None:
        for text, heat_map in zip(targets, output.target_maps[index] if targets else ()):
            shown.append((f"{text} (target)", overlay(portrait, heat_map)))
        for i, text in enumerate(output.phrases[index]):
            distance = "" if not targets else f" ({output.phrase_distances[index, i]:.2f})"
            shown.append((f"{text}{distance}", overlay(reference, output.phrase_maps[index, i])))
    captions, drawn = zip(*shown)
    return pictures.captioned_pictures(drawn, captions, columns)


def _pil_image(images: list[PIL.Image.Image] | np.ndarray | Tensor, index: int) -> PIL.Image.Image:
    if isinstance(images, list):
        return images[index]
    if isinstance(images, Tensor):
        if images.shape[1] != 3:
            raise ValueError("Latents cannot be shown: call with another `output_type` than 'latent'.")
        images = VaeImageProcessor.pt_to_numpy(images)
    return VaeImageProcessor.numpy_to_pil(images[index])[0]
