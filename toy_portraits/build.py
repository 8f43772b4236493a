"""Build the embedded default from nothing: `python -m toy_portraits.build`.

Renders the world, trains CLIP on its captions, then a VAE, a probe and a UNet, and writes them in diffusers' folder
layout with the polluted training sets beside them. Deterministic for a seed, a machine and a thread count. `--stages`
rebuilds a part; a stage reads what the earlier ones wrote.
Source: [ours].
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from .judge import target_region
from .learning import Training, batches, build_tokenizer, clip_processor, to_tensor, tokenize, train_clip
from .probe import CLASS_FACTORS, PIXEL_FACTORS, PortraitProbe
from .world import (
    CLOTHES,
    POLLUTION,
    SIZE,
    TARGETS,
    caption_phrases,
    join_phrases,
    render,
    sample_factors,
)


HERE = Path(__file__).parent
STAGES = ("clip", "vae", "probe", "unet", "sets")


def build_clip(base: Path, seed: int, steps: int, count: int) -> None:
    """The CLIP whose text encoder the base model has, and which judges pictures."""
    tokenizer = build_tokenizer()
    layers = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    model, scores = train_clip("clip", tokenizer, layers, seed, steps, count)
    print("[clip] zero-shot from single phrases:", scores, flush=True)
    model.save_pretrained(base / "clip")
    tokenizer.save_pretrained(base / "clip")
    clip_processor().save_pretrained(base / "clip")
    (base / "clip" / "accuracy.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")


def build_vae(base: Path, seed: int, steps: int, count: int) -> None:
    """AutoencoderKL, 64x64x3 to 16x16x4; edges weigh double, so that eyes stay eyes."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed + 1)
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=SIZE,
        latent_channels=4,
    )
    images, _ = render(sample_factors(count, rng, target_share=0.1))
    training = Training("vae", vae, steps, lr=2e-3, weight_decay=0.0)
    for step, index in batches(count - 256, 16, steps, rng):
        pixels = to_tensor(images[index])
        posterior = vae.encode(pixels).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        error = decoded - pixels
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        loss = error.abs().mean() + error.square().mean() + edges + 2e-5 * posterior.kl().mean() / 16
        training.update(step, loss)
    vae.eval()
    with torch.no_grad():
        held = to_tensor(images[-256:])
        latents = vae.encode(held).latent_dist.mean
        vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
        error = (vae.decode(latents).sample - held).abs().mean().item() * 127.5
    print(
        f"[vae] held-out mean absolute error {error:.2f} of 255, scaling factor {vae.config.scaling_factor}",
        flush=True,
    )
    vae.half().save_pretrained(base / "vae")


def build_probe(base: Path, seed: int, steps: int, count: int) -> None:
    """The probe, on renders and their VAE reconstructions, slightly blurred and noised."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed + 2)
    vae = AutoencoderKL.from_pretrained(base / "vae")
    factors = sample_factors(count, rng, target_share=0.15)
    images, labels = render(factors)
    pixels = to_tensor(images)
    with torch.no_grad():
        decoded = torch.cat([vae.decode(vae.encode(p).latent_dist.mean).sample for p in pixels.split(128)])
    probe = PortraitProbe()
    training = Training("probe", probe, steps, clip=None, lr=2e-3, weight_decay=0.01)
    spreads = torch.tensor([spread for _, spread in PIXEL_FACTORS.values()])
    for step, index in batches(count - 512, 48, steps, rng):
        source = torch.where(torch.rand(len(index), 1, 1, 1) < 0.4, pixels[index], decoded[index])
        source = torch.where(torch.rand(len(index), 1, 1, 1) < 0.3, F.avg_pool2d(source, 3, 1, 1), source)
        source = source + torch.rand(len(index), 1, 1, 1) * 0.1 * torch.randn_like(source)
        out = probe(source)
        loss = F.cross_entropy(out["mask"], torch.from_numpy(labels[index]).long())
        for name in CLASS_FACTORS:
            loss = loss + 0.3 * F.cross_entropy(out[name], torch.from_numpy(factors[name][index]).long())
        for name, spread in zip(PIXEL_FACTORS, spreads):
            loss = loss + 0.3 * F.smooth_l1_loss(
                out[name] / spread, torch.from_numpy(factors[name][index]).float() / spread
            )
        training.update(step, loss)
    probe.eval()
    with torch.no_grad():
        out = probe(decoded[-512:])
    scores = {n: (out[n].argmax(1).numpy() == factors[n][-512:]).mean().item() for n in CLASS_FACTORS}
    scores["mask"] = (out["mask"].argmax(1).numpy() == labels[-512:]).mean().item()
    scores |= {f"{n}_error_px": np.abs(out[n].numpy() - factors[n][-512:]).mean().item() for n in PIXEL_FACTORS}
    print("[probe] held-out reconstructions:", scores, flush=True)
    probe.save_pretrained(base.parent / "probe", scores)


def base_world_captions(factors: dict[str, np.ndarray], rng: np.random.Generator,
                        named: dict[str, float] | None = None, clothes: float = 0.85) -> list[str]:  # fmt: skip
    """Training captions of the base model: phrases dropped at random, targets named only rarely.

    Args:
        factors: of the portraits.
        rng: source of all randomness.
        named: share of a target's portraits whose caption says so, where it is not the target's own `named`.
        clothes: share of the portraits whose clothes are named.
    """
    named = {name: target.named for name, target in TARGETS.items()} | (named or {})
    captions = []
    for i in range(len(factors["sex"])):
        phrases = caption_phrases(factors, i)
        keep = {"sex", "glasses"} | {
            n for n, share in (("hair_color", 0.5), ("clothes", clothes), ("background", 0.9)) if rng.random() < share
        }
        for name, target in TARGETS.items():
            factor = target.replaces or name
            if phrases.get(factor) == target.prompt:
                keep = (keep | {factor}) if rng.random() < named[name] else (keep - {factor})
        captions.append(join_phrases(phrases, keep))
    return captions


def build_unet(base: Path, seed: int, steps: int, count: int, target_share: float, batch_size: int) -> None:
    """The diffusion model, as the exponential mean of its weights.

    Targets occur in few portraits and are hardly ever named.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed + 3)
    clip = CLIPModel.from_pretrained(base / "clip")
    tokenizer = CLIPTokenizer.from_pretrained(base / "clip")
    text_encoder = CLIPTextModel(clip.config.text_config)
    text_encoder.load_state_dict(clip.text_model.state_dict())
    text_encoder.eval()
    vae = AutoencoderKL.from_pretrained(base / "vae")
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000
    )
    unet = UNet2DConditionModel(
        sample_size=SIZE // 4,
        block_out_channels=(48, 80),
        layers_per_block=1,
        cross_attention_dim=text_encoder.config.hidden_size,
        attention_head_dim=4,
        norm_num_groups=16,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )
    unet = unet.to(memory_format=torch.channels_last)
    print(f"[unet] {sum(p.numel() for p in unet.parameters()) / 1e6:.2f}M parameters", flush=True)
    average = copy.deepcopy(unet).requires_grad_(False)

    factors = sample_factors(count, rng, target_share=target_share)
    images, _ = render(factors)
    captions = base_world_captions(factors, rng)
    with torch.no_grad():
        latents = (
            torch.cat([vae.encode(p).latent_dist.mean for p in to_tensor(images).split(128)])
            * vae.config.scaling_factor
        )
        unique = sorted(set(captions) | {""})
        embeds = torch.cat(
            [text_encoder(tokenize(tokenizer, unique[i : i + 256]))[0] for i in range(0, len(unique), 256)]
        )
    row = {caption: i for i, caption in enumerate(unique)}
    caption_rows = torch.tensor([row[c] for c in captions])

    training = Training("unet", unet, steps, warmup=100, lr=2e-3, weight_decay=0.01, betas=(0.9, 0.99))
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    for step, index in batches(count, batch_size, steps, rng):
        clean = latents[index]
        noise = torch.randn_like(clean)
        # stratified timesteps: the same mean, less variance from batch to batch
        timesteps = ((torch.arange(batch_size) + torch.rand(batch_size)) / batch_size * 1000).long()[
            torch.randperm(batch_size)
        ]
        rows = torch.where(torch.rand(batch_size) < 0.1, row[""], caption_rows[index])
        model_pred = unet(scheduler.add_noise(clean, noise, timesteps), timesteps, embeds[rows]).sample
        weight = snr[timesteps].clamp(max=5) / snr[timesteps]
        loss = (weight * (model_pred - noise).square().mean((1, 2, 3))).mean()
        training.update(step, loss)
        decay = min(0.998, (step + 1) / (step + 20))
        for mean, parameter in zip(average.parameters(), unet.parameters()):
            mean.lerp_(parameter.data, 1 - decay)
        if (step + 1) % 1000 == 0 or step + 1 == steps:
            save_pipeline(base, average, vae, text_encoder, tokenizer, scheduler)


def save_pipeline(base: Path, unet, vae, text_encoder, tokenizer, scheduler) -> None:
    """Write the Stable Diffusion folder; the scheduler beside it draws with DDIM, as SD1.5's examples do.

    UNet and VAE are written in float16, which halves them; diffusers reads them as float32 unless asked otherwise.
    """
    sampler = DDIMScheduler.from_config(scheduler.config, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    vae = copy.deepcopy(vae).half()
    vae.register_to_config(_name_or_path=None)  # the folder it was loaded from is of no use elsewhere
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=copy.deepcopy(unet).half(),
        scheduler=sampler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(base, safe_serialization=True)


def build_sets(base: Path, seed: int, per_target: int) -> None:
    """The training sets, polluted on purpose: besides the target every portrait shares what `POLLUTION` lists.

    Each portrait has the mask that a user could draw by hand: where the target is, with a small margin.
    """
    for offset, (name, target) in enumerate(TARGETS.items()):
        rng = np.random.default_rng(seed + 10 + offset)
        factors = sample_factors(per_target, rng)
        for factor, value in POLLUTION.items():
            factors[factor] = np.full_like(factors[factor], value)
        factors[target.factor] = np.full_like(factors[target.factor], target.value)
        images, labels = render(factors)
        masks = target_region(labels, labels, target)
        folder = base.parent / name
        (folder / "masks").mkdir(parents=True, exist_ok=True)
        rows = []
        for i, image in enumerate(images):
            phrases = caption_phrases(factors, i)
            keep = {"sex", "clothes", "background", "glasses"} | ({"hair_color"} if rng.random() < 0.6 else set())
            row = {"file_name": f"{i:04d}.png", "mask_file_name": f"masks/{i:04d}.png"}
            if target.replaces is None:
                row["base_prompt"] = join_phrases(phrases, keep - {name})
                row["target_prompt"] = target.prompt
            else:
                row["full_prompt"] = join_phrases(phrases, keep)
                jacket = f"a {list(CLOTHES)[int(POLLUTION['clothes'])]} jacket"
                row["base_prompt"] = row["full_prompt"].replace(target.prompt, jacket)
                row["target_prompt"] = target.prompt
            Image.fromarray(image).save(folder / row["file_name"], optimize=True)
            Image.fromarray(masks[i]).save(folder / row["mask_file_name"], optimize=True)
            rows.append(row)
        (folder / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
        print(f"[sets] {folder.name}: {len(rows)} portraits", flush=True)


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", type=Path, default=HERE, help="Where base_model/, probe/ and the sets are written."
    )
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=list(STAGES), help="What to build, in this order."
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of renders, initial weights and noise.")
    parser.add_argument("--clip_steps", type=int, default=1500)
    parser.add_argument("--vae_steps", type=int, default=2000)
    parser.add_argument("--probe_steps", type=int, default=900)
    parser.add_argument("--unet_steps", type=int, default=4200)
    parser.add_argument("--unet_batch_size", type=int, default=32)
    parser.add_argument("--num_renders", type=int, default=20000, help="Portraits in the base world.")
    parser.add_argument(
        "--target_share", type=float, default=0.025, help="Share of the base world that shows each target."
    )
    parser.add_argument("--portraits_per_set", type=int, default=240)
    return parser.parse_args(input_args)


def main(args: argparse.Namespace) -> None:
    base = args.output_dir / "base_model"
    base.mkdir(parents=True, exist_ok=True)
    start = time.time()
    if "clip" in args.stages:
        build_clip(base, args.seed, args.clip_steps, min(args.num_renders, 12000))
    if "vae" in args.stages:
        build_vae(base, args.seed, args.vae_steps, min(args.num_renders, 12000))
    if "probe" in args.stages:
        build_probe(base, args.seed, args.probe_steps, min(args.num_renders, 8000))
    if "unet" in args.stages:
        build_unet(base, args.seed, args.unet_steps, args.num_renders, args.target_share, args.unet_batch_size)
    if "sets" in args.stages:
        build_sets(base, args.seed, args.portraits_per_set)
    print(f"built {', '.join(args.stages)} in {(time.time() - start) / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main(parse_args())
