"""The response enhancement: a portrait's one-step prediction is pulled towards the target as CLIP sees it.

Legend: B batch, C channels, H/W latent size, H'/W' size in pixels, M forms of training portraits, E' size of a
projected CLIP embedding.
Paper: arXiv 2504.00396; `[ours]` marks what it leaves open.
"""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from families.noise_process import DDPM
from programs.console import phase_bar
from programs.loading import load_tokenizer, naming_flag
from training.batches import Batch, send
from training.flags import ModelFlags, PaperFlags
from training.losses import ENHANCEMENT_LOSSES
from training.models import Models
from training.portraits import TrainingPortraits
from training.prompt_table import embed_pixels


class Enhancement:
    """`L_enh` of a batch.

    Attributes:
        clip: in float32, on the device.
        decoder: of the latents, which may be a tiny one.
    """

    def __init__(
        self, models: Models, clip: CLIPModel, processor: CLIPImageProcessorPil,
        decoder: AutoencoderKL | AutoencoderTiny, target_embeds: torch.Tensor, flags: PaperFlags,
        steps: tuple[int, int],
    ) -> None:  # fmt: skip
        """`target_embeds` (N, E') are by pair of prompts; `steps` the first of its stage, and batches in each."""
        self.clip, self.decoder, self._processor, self._targets = clip, decoder, processor, target_embeds
        self._side = max(1, clip.config.vision_config.image_size // models.pipeline.vae_scale_factor)
        self._family, self._flags, (self._first_step, self._batches) = models.family, flags, steps
        self._image_embeds: torch.Tensor | None = None

    @property
    def weight(self) -> float:
        """In the mean over the steps it weighs as much as if each of them computed it."""
        return self._flags.lambda_enh * self._flags.enhancement_every

    def is_due(self, micro_step: int) -> bool:
        """Whether the step of this batch computes it: in stage 2 alone, every so manieth."""
        done = micro_step // self._batches - self._first_step
        return done >= 0 and done % self._flags.enhancement_every == 0

    @torch.no_grad()
    def embed(self, portraits: TrainingPortraits, shown: bool) -> None:
        """Embed each form of the training portraits once, (M, E'), where their latents are cached, too."""
        samples, embeds = portraits.samples, []
        with phase_bar("image embeddings", len(samples), "portrait", shown) as bar:
            for pixels in portraits.read(samples, portraits.training_set.pixels):
                embeds.append(self._see(pixels[None].to(self.clip.device)))
                bar.update()
        self._image_embeds = torch.cat(embeds)

    def _see(self, pixels: torch.Tensor) -> torch.Tensor:
        return embed_pixels(self.clip, self._processor, pixels)

    def loss(self, batch: Batch, model_pred: torch.Tensor, noise: DDPM) -> torch.Tensor:
        """Of the one-step prediction, weighed by alpha_bar_t [ours]: at high t the prediction is noise."""
        latents = noise.original_sample(batch.noisy_latents, model_pred, batch.timesteps)
        if batch.pixels is None:
            image_embeds = self._image_embeds[send(batch.index, latents.device)]
        else:
            with torch.no_grad():
                image_embeds = self._see(batch.pixels)
        compare = ENHANCEMENT_LOSSES[self._flags.enhancement_loss]
        losses = compare(self._see(self.decode(latents)), image_embeds, self._targets[batch.pairs])
        if self._flags.enhancement_weighting == "alpha_bar":
            losses = noise.signal(batch.timesteps) * losses
        return losses.mean()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H', W') of latents, with gradient, decoded no larger than CLIP looks at them [ours]."""
        decoder, side = self.decoder, self._side
        if min(latents.shape[-2:]) > side:
            latents = F.interpolate(latents, (side, side), mode="bilinear", antialias=True, align_corners=False)
        return self._family.to_pixels(decoder, latents)


def load_clip(
    name: str, cache_dir: str | None, device: torch.device
) -> tuple[CLIPModel, CLIPTokenizer, CLIPImageProcessorPil]:
    """The CLIP model of --clip_model_name_or_path in float32, its tokenizer and its image processor."""
    with naming_flag("clip_model_name_or_path", name):
        clip = CLIPModel.from_pretrained(name, cache_dir=cache_dir, dtype=torch.float32, use_safetensors=True)
    clip.requires_grad_(False)
    tokenizer = load_tokenizer(name, cache_dir=cache_dir)
    return clip.to(device).eval(), tokenizer, CLIPImageProcessorPil.from_pretrained(name, cache_dir=cache_dir)


def load_decoder(
    flags: ModelFlags, vae: AutoencoderKL, dtype: torch.dtype, device: torch.device
) -> AutoencoderKL | AutoencoderTiny:
    """What decodes for the enhancement loss: that of --tiny_vae_model_name_or_path, else the model's own."""
    name = flags.tiny_vae_model_name_or_path
    if name is None:
        return vae
    with naming_flag("tiny_vae_model_name_or_path", name):
        decoder = AutoencoderTiny.from_pretrained(name, cache_dir=flags.cache_dir, dtype=dtype, use_safetensors=True)
    decoder.requires_grad_(False)
    return decoder.to(device).eval()
