"""The response enhancement: a portrait's one-step prediction is pulled towards the target as CLIP sees it.

Legend: B batch, C channels, H/W latent size, H'/W' size in pixels, M forms of training portraits, E' size of a
projected CLIP embedding.
Paper: arXiv 2504.00396; `[ours]` marks what it leaves open.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers import CLIPImageProcessorPil, CLIPModel

from families.noise_process import NoiseProcess
from programs.console import phase_bar
from programs.loading import load_tokenizer, naming_flag
from prompts import PromptPair
from training.arguments import Flags
from training.batches import Batch, send
from training.losses import ENHANCEMENT_LOSSES
from training.models import Models, weight_dtype
from training.portraits import TrainingPortraits
from training.prompt_table import embed_pixels, embed_targets
from training.training_set import derive_seed


# What a row's loss is multiplied by in its own backward, so that float16 holds the gradients of a portrait's pixels.
# They end before the gradient scaler's begin. A power of two changes no other number.
INNER_SCALE = 2.0**10


class _RowByRow(torch.autograd.Function):
    """The losses of rows, with their gradients computed along with them, each before the next row's forward."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, loss_of: Callable[[int, Tensor], Tensor]) -> Tensor:
        losses, gradients = [], []
        for i, row in enumerate(rows.detach().split(1)):
            with torch.enable_grad():
                loss = loss_of(i, row.requires_grad_())
            (gradient,) = torch.autograd.grad(loss, row, torch.full_like(loss, INNER_SCALE))
            losses.append(loss.detach())
            gradients.append(gradient / INNER_SCALE)
            del loss  # its graph with it
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, weights: Tensor) -> tuple[Tensor, None]:
        (gradients,) = ctx.saved_tensors
        return weights.view(-1, *[1] * (gradients.ndim - 1)) * gradients, None


def row_by_row(loss_of: Callable[[int, Tensor], Tensor], rows: Tensor) -> Tensor:
    """Losses (B,) of rows (B, ...) in float32, where `loss_of` takes a row's place and the row (1, ...), and has (1,).

    The numbers and gradients are those of all rows at once, and the graph of one row is in memory at a time: none when
    the backward of what the rows were made of begins.
    """
    return _RowByRow.apply(rows, loss_of)


class Enhancement:
    """`L_enh` of a batch: `clip` sees what `decoder`, the model's own VAE or a tiny one, makes of it.

    Of CLIP the vision tower stays, in the dtype of the frozen weights; the targets are embedded in float32 before.

    Raises InputError: weights are missing, damaged or a pickle.
    """

    def __init__(
        self, flags: Flags, models: Models, pairs: Sequence[PromptPair], accelerator: Accelerator
    ) -> None:
        where = {"cache_dir": flags.model.cache_dir}
        name, tiny_vae = flags.model.clip_model_name_or_path, flags.paper.tiny_vae_model_name_or_path
        with naming_flag("clip_model_name_or_path", name):
            self.clip = CLIPModel.from_pretrained(name, dtype=torch.float32, use_safetensors=True, **where)
        self.clip.requires_grad_(False).to(accelerator.device).eval()
        self._see = partial(embed_pixels, self.clip, CLIPImageProcessorPil.from_pretrained(name, **where))
        self._targets = embed_targets(self.clip, load_tokenizer(name, **where), pairs)
        self.clip.to(weight_dtype(accelerator))
        self.decoder: AutoencoderKL | AutoencoderTiny = models.pipeline.vae
        if tiny_vae is not None:
            with naming_flag("tiny_vae_model_name_or_path", tiny_vae):
                self.decoder = AutoencoderTiny.from_pretrained(
                    tiny_vae, dtype=weight_dtype(accelerator), use_safetensors=True, **where
                )
            self.decoder.requires_grad_(False).to(accelerator.device).eval()
        self._side = max(1, self.clip.config.vision_config.image_size // models.pipeline.vae_scale_factor)
        self._family, self._flags = models.family, flags.paper
        self._first_step, self._batches = flags.method.stage1_steps, flags.loop.gradient_accumulation_steps
        self._seed, self._num_processes = flags.loop.seed, accelerator.num_processes
        self._process_index = accelerator.process_index
        self._image_embeds: Tensor | None = None

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

    def drawn(self, timesteps: Tensor, micro_step: int, noise: NoiseProcess) -> Tensor:
        """Places (K,) of this process's rows that the batch's loss is computed of: with "drawn" each by a chance of
        alpha_bar_t, else all. `timesteps` (B,) and they lie on the CPU. Source: [ours].
        """
        if self._flags.enhancement_weighting != "drawn":
            return torch.arange(len(timesteps))
        generator = torch.Generator().manual_seed(derive_seed(self._seed, f"enhancement of batch {micro_step}"))
        first, count = self._process_index * len(timesteps), self._num_processes * len(timesteps)
        place = torch.rand(count, generator=generator)[first : first + len(timesteps)]
        return (place < noise.signal(timesteps)).nonzero().flatten()

    def loss(self, batch: Batch, model_pred: Tensor, noise: NoiseProcess, micro_step: int) -> Tensor:
        """Of the one-step prediction, with the weight alpha_bar_t or of rows drawn by it, which is the same on average
        [ours]: at high t the prediction is noise.

        The portraits are decoded and seen one after another, beside the denoiser's graph.
        """
        drawn = self.drawn(batch.cpu_timesteps, micro_step, noise)
        if not len(drawn):
            return torch.zeros((), device=model_pred.device)
        index, rows = batch.index[drawn], send(drawn, model_pred.device)
        timesteps = batch.timesteps[rows]
        latents = noise.original_sample(batch.noisy_latents[rows], model_pred[rows], timesteps)
        if batch.pixels is None:
            image_embeds = self._image_embeds[send(index, latents.device)]
        else:
            with torch.no_grad():
                image_embeds = self._see(batch.pixels[rows])
        compare = ENHANCEMENT_LOSSES[self._flags.enhancement_loss]
        given = list(zip(image_embeds.split(1), self._targets[batch.pairs[rows]].split(1), strict=True))
        losses = row_by_row(lambda i, row: compare(self._see(self.decode(row)), *given[i]), latents)
        if self._flags.enhancement_weighting == "alpha_bar":
            losses = noise.signal(timesteps) * losses
        return losses.sum() / len(batch.index)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (B, 3, H', W') of latents, with gradient, decoded no larger than CLIP looks at them [ours]."""
        side = self._side
        if min(latents.shape[-2:]) > side:
            latents = F.interpolate(latents, (side, side), mode="bilinear", antialias=True, align_corners=False)
        return self._family.to_pixels(self.decoder, latents)
