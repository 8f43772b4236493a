"""Build the second embedded default, a toy SDXL, from the first: `python -m toy_portraits.build_xl`.

The same world in the classes of SDXL: two text encoders on channels, pooled embeddings, and micro-conditioning that
means something, since every portrait is a photo of its own size from which its own part is cut. The VAE and the first
text encoder are those of `base_model`. Deterministic for a seed, a machine and a thread count.
Source: [ours].
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from .build import base_world_captions
from .learning import Training, batches, build_tokenizer, to_tensor, tokenize, train_clip
from .world import SIZE, render, sample_factors


HERE = Path(__file__).parent
STAGES = ("clip", "unet")
# Height and width of the portraits, and their share of the world: buckets are drawn as well as squares.
SHAPES = {(SIZE, SIZE): 0.8, (SIZE, 48): 0.1, (48, SIZE): 0.1}
MAX_EXCESS = 16  # pixels of a photo that its crop leaves out
SCALES = (0.5, 2.0)  # a photo's own size over the size that it is resized to; below 1 it is blurred
NAMED = {"red_hat": 0.1, "striped_shirt": 0.01}  # told by two text encoders, it learns a target from fewer captions
# Jackets that are not named keep the striped shirt, which hardly ever is, from being what "no clothes named" means.
CLOTHES_NAMED = 0.5


class Photos(NamedTuple):
    """Latents (N, 4, h/4, w/4), time_ids (N, 6) and rows of the prompt embeddings (N,) of portraits of one shape."""

    latents: torch.Tensor
    time_ids: torch.Tensor
    rows: torch.Tensor


def micro_conditioning(
    count: int, shape: tuple[int, int], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw of each of `count` photos how large it is and which part of it is shown.

    A photo is resized until it covers the shape and cropped along one side, as training sets are. Half of them are as
    large as they are shown, and half of them are not cropped.

    Returns:
        time_ids (count, 6) float32: original height and width, top and left of the crop in pixels of the resized
        photo, height and width of the shape. Then the crop's corner in the scene (count, 2), whose photo has the scene
        in its middle, and the scale (count,) of the original to the resized photo.
    """
    height, width = shape
    # A bucket shows less on one side, so that side is the one that is cropped.
    side = 0 if height < width else 1 if width < height else rng.integers(0, 2, count)
    cropped = rng.random(count) < 0.5
    excess = np.zeros((count, 2))
    excess[np.arange(count), side] = cropped * rng.integers(0, MAX_EXCESS + SIZE - min(shape) + 1, count)
    corner = np.rint(excess * rng.random((count, 1)))
    resized = np.array(shape) + excess
    scale = np.where(rng.random(count) < 0.5, np.exp(rng.uniform(*np.log(SCALES), count)), 1.0)
    original = np.rint(resized * scale[:, None])
    time_ids = np.concatenate([original, corner, np.broadcast_to(shape, (count, 2))], axis=1).astype(np.float32)
    return time_ids, corner - (resized - SIZE) / 2, scale


def blur(picture: torch.Tensor, scale: float) -> torch.Tensor:
    """What is left of a picture (3, h, w) that was stored at `scale` of its size and resized to it."""
    size = picture.shape[-2:]
    small = [max(1, round(side * scale)) for side in size]
    picture = F.interpolate(picture[None], small, mode="bilinear", antialias=True)
    return F.interpolate(picture, list(size), mode="bicubic").clamp(-1, 1)[0]


def draw_photos(factors: dict[str, np.ndarray], shape: tuple[int, int], rng: np.random.Generator,
                vae: AutoencoderKL) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Latents and time_ids of portraits of one shape, each photo with its size and crop."""
    time_ids, corner, scale = micro_conditioning(len(factors["sex"]), shape, rng)
    images, _ = render(factors, corner)
    pixels = to_tensor(images)[:, :, : shape[0], : shape[1]].contiguous()
    for i in np.flatnonzero(scale < 1):
        pixels[i] = blur(pixels[i], scale[i])
    with torch.no_grad():
        latents = torch.cat([vae.encode(p).latent_dist.mean for p in pixels.split(128)])
    return latents * vae.config.scaling_factor, torch.from_numpy(time_ids)


def encode(
    captions: list[str], encoders: list[torch.nn.Module], tokenizers: list[CLIPTokenizer]
) -> tuple[torch.Tensor, torch.Tensor]:
    """States (N, T, 160) before the last layer of both encoders on channels, and the second's projection (N, 64)."""
    states, pooled = [], []
    with torch.no_grad():
        for i in range(0, len(captions), 256):
            outputs = [
                encoder(tokenize(tokenizer, captions[i : i + 256]), output_hidden_states=True)
                for encoder, tokenizer in zip(encoders, tokenizers)
            ]
            states.append(torch.cat([output.hidden_states[-2] for output in outputs], dim=-1))
            pooled.append(outputs[1].text_embeds)
    return torch.cat(states), torch.cat(pooled)


def build_second_clip(base: Path, seed: int, steps: int, count: int) -> None:
    """A smaller CLIP whose tokenizer pads with "!", as SDXL's second does; only its text side is kept."""
    tokenizer = build_tokenizer(pad_token="!")
    layers = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
              "hidden_act": "gelu"}  # fmt: skip
    model, scores = train_clip("clip", tokenizer, layers, seed + 20, steps, count)
    print("[clip] zero-shot from single phrases:", scores, flush=True)
    config = model.config.text_config
    config.projection_dim = model.config.projection_dim
    text_encoder = CLIPTextModelWithProjection(config)
    text_encoder.text_model.load_state_dict(model.text_model.state_dict())
    text_encoder.text_projection.load_state_dict(model.text_projection.state_dict())
    text_encoder.save_pretrained(base / "text_encoder_2")
    tokenizer.save_pretrained(base / "tokenizer_2")


def build_unet(base: Path, first: Path, seed: int, steps: int, count: int, target_share: float,
               batch_size: int) -> None:  # fmt: skip
    """The diffusion model, as the exponential mean of its weights; "nothing asked" is zeros, as the folder says."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed + 23)
    clip = CLIPModel.from_pretrained(first / "clip")
    text_encoder = CLIPTextModel(clip.config.text_config)
    text_encoder.load_state_dict(clip.text_model.state_dict())
    encoders = [text_encoder.eval(), CLIPTextModelWithProjection.from_pretrained(base / "text_encoder_2").eval()]
    tokenizers = [CLIPTokenizer.from_pretrained(first / "clip"), CLIPTokenizer.from_pretrained(base / "tokenizer_2")]
    vae = AutoencoderKL.from_pretrained(first / "vae")
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                       timestep_spacing="leading", steps_offset=1)  # fmt: skip
    unet = new_unet(sum(encoder.config.hidden_size for encoder in encoders), encoders[1].config.projection_dim)
    unet = unet.to(memory_format=torch.channels_last)
    print(f"[unet] {sum(p.numel() for p in unet.parameters()) / 1e6:.2f}M parameters", flush=True)
    average = copy.deepcopy(unet).requires_grad_(False)

    worlds, captions = [], []
    for shape, share in SHAPES.items():
        factors = sample_factors(round(count * share), rng, target_share=target_share)
        worlds.append(draw_photos(factors, shape, rng, vae))
        captions.append(base_world_captions(factors, rng, NAMED, CLOTHES_NAMED))
    unique = sorted({caption for of_shape in captions for caption in of_shape})
    states, pooled = encode(unique, encoders, tokenizers)
    row = {caption: i for i, caption in enumerate(unique)}
    worlds = [Photos(*world, torch.tensor([row[c] for c in of_shape])) for world, of_shape in zip(worlds, captions)]

    training = Training("unet", unet, steps, warmup=100, lr=2e-3, weight_decay=0.01, betas=(0.9, 0.99))
    alphas = scheduler.alphas_cumprod
    snr = alphas / (1 - alphas)
    orders = [batches(len(world.rows), batch_size, steps, rng) for world in worlds]
    for step, choice in enumerate(rng.choice(len(worlds), steps, p=list(SHAPES.values()))):
        world, (_, index) = worlds[choice], next(orders[choice])
        clean = world.latents[index]
        noise = torch.randn_like(clean)
        # stratified timesteps: the same mean, less variance from batch to batch
        timesteps = (torch.arange(batch_size) + torch.rand(batch_size)) / batch_size * 1000
        timesteps = timesteps.long()[torch.randperm(batch_size)]
        alpha = alphas[timesteps].view(-1, 1, 1, 1)
        asked = (torch.rand(batch_size) >= 0.1).float()
        rows = world.rows[index]
        added = {"text_embeds": pooled[rows] * asked[:, None], "time_ids": world.time_ids[index]}
        model_pred = unet(alpha.sqrt() * clean + (1 - alpha).sqrt() * noise, timesteps,
                          states[rows] * asked[:, None, None], added_cond_kwargs=added).sample  # fmt: skip
        weight = snr[timesteps].clamp(max=5) / snr[timesteps]
        training.update(step, (weight * (model_pred - noise).square().mean((1, 2, 3))).mean())
        decay = min(0.998, (step + 1) / (step + 20))
        for mean, parameter in zip(average.parameters(), unet.parameters()):
            mean.lerp_(parameter.data, 1 - decay)
        if (step + 1) % 1000 == 0 or step + 1 == steps:
            save_pipeline(base, average, vae, encoders, tokenizers, scheduler)


def new_unet(cross_attention_dim: int, pooled_dim: int) -> UNet2DConditionModel:
    """A UNet of SDXL's kind: depths differ by level, linear projections, size and crop beside the pooled prompt."""
    addition_time_embed_dim = 16
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=(4, 4),
        transformer_layers_per_block=(1, 2),
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=addition_time_embed_dim,
        projection_class_embeddings_input_dim=pooled_dim + 6 * addition_time_embed_dim,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )


def save_pipeline(base: Path, unet, vae, encoders, tokenizers, scheduler) -> None:
    """Write the SDXL folder; UNet and VAE in float16, which halves them, and diffusers reads them as float32."""
    vae = copy.deepcopy(vae).half()
    vae.register_to_config(_name_or_path=None)  # the folder it was loaded from is of no use elsewhere
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=copy.deepcopy(unet).half(),
        scheduler=scheduler,
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipeline.save_pretrained(base, safe_serialization=True)


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=HERE, help="Where base_model/ is and base_model_xl/ goes.")
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=list(STAGES), help="What to build, in this order."
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of renders, initial weights and noise.")
    parser.add_argument("--clip_steps", type=int, default=1500)
    parser.add_argument("--unet_steps", type=int, default=4200)
    parser.add_argument("--unet_batch_size", type=int, default=32)
    parser.add_argument("--num_renders", type=int, default=20000, help="Portraits in the base world.")
    parser.add_argument(
        "--target_share", type=float, default=0.025, help="Share of the base world that shows each target."
    )
    return parser.parse_args(input_args)


def main(args: argparse.Namespace) -> None:
    first, base = args.output_dir / "base_model", args.output_dir / "base_model_xl"
    base.mkdir(parents=True, exist_ok=True)
    start = time.time()
    if "clip" in args.stages:
        build_second_clip(base, args.seed, args.clip_steps, min(args.num_renders, 12000))
    if "unet" in args.stages:
        build_unet(base, first, args.seed, args.unet_steps, args.num_renders, args.target_share, args.unet_batch_size)
    print(f"built {', '.join(args.stages)} in {(time.time() - start) / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main(parse_args())
