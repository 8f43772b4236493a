"""Build the third embedded default, a toy Stable Diffusion 3, from the others: `python -m toy_portraits.build_3`.

The same world in the classes of SD3.5: a transformer with joint attention, flow matching, latents with a shift, and
three text encoders, of which T5 may be missing. The VAE and the first CLIP are those of `base_model`, the second is
that of `base_model_xl`. Deterministic for a seed, a machine and a thread count.
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
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import (
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from .build import base_world_captions
from .learning import MAX_TOKENS, Training, batches, clip_processor, to_tensor, tokenize, world_phrases
from .world import SIZE, caption_phrases, join_phrases, render, sample_factors


HERE = Path(__file__).parent
STAGES = ("t5", "transformer")
# Told by three text encoders, it learns a target from fewer captions: with the first base's share it knew blonde hair.
NAMED = {"blonde_hair": 0.02, "red_hat": 0.1, "striped_shirt": 0.01}
CLOTHES_NAMED = 0.5  # jackets that are not named keep the striped shirt from being what "no clothes named" means
# Share of the batches whose T5 sequence is as long as diffusers' default makes it, and of the prompts without T5.
LONG, LONG_TOKENS = 0.05, 256
WITHOUT_T5 = 0.3
SHIFT = 2.0  # of the noise's schedule; SD3.5, with 64 times the pixels, has 3


def build_t5_tokenizer() -> T5Tokenizer:
    """A real T5 tokenizer: each word of the world is one token, any other word is spelled in letters."""
    words = {word for phrase in world_phrases() for word in phrase.split()}
    letters = "abcdefghijklmnopqrstuvwxyz"
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -6.0)]
    vocab = special + [(f"▁{word}", -3.0) for word in sorted(words)]
    vocab += [(letter, -8.0) for letter in letters + letters.upper() + "0123456789,.!?'-:;"]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=MAX_TOKENS)


def encode_t5(encoder: T5EncoderModel, tokenizer: T5Tokenizer, captions: list[str], length: int) -> torch.Tensor:
    """States (N, length, 160), without a mask, as diffusers encodes."""
    ids = tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    return encoder(ids)[0]


def build_t5(base: Path, first: Path, seed: int, steps: int, count: int) -> None:
    """A small T5 encoder, taught contrastively to say of a caption what the first CLIP sees in the picture."""
    torch.manual_seed(seed + 30)
    rng = np.random.default_rng(seed + 30)
    tokenizer = build_t5_tokenizer()
    config = T5Config(vocab_size=len(tokenizer), d_model=160, d_kv=32, num_heads=4, d_ff=160, num_layers=2,
                      feed_forward_proj="gated-gelu", relative_attention_num_buckets=16, dropout_rate=0.0,
                      is_encoder_decoder=False, use_cache=False)  # fmt: skip
    encoder = T5EncoderModel(config)
    head = torch.nn.Linear(config.d_model, 64)
    clip = CLIPModel.from_pretrained(first / "clip")
    processor = clip_processor()
    mean, std = torch.tensor(processor.image_mean).view(3, 1, 1), torch.tensor(processor.image_std).view(3, 1, 1)
    factors = sample_factors(count, rng, target_share=0.15)
    images, _ = render(factors)
    phrases = [caption_phrases(factors, i) for i in range(count)]
    with torch.no_grad():
        pixels = ((to_tensor(images) + 1) / 2 - mean) / std
        seen = torch.cat([clip.get_image_features(pixel_values=p).pooler_output for p in pixels.split(256)])
        seen = F.normalize(seen, dim=-1)

    def said(captions: list[str]) -> torch.Tensor:
        states = encode_t5(encoder, tokenizer, captions, MAX_TOKENS)
        return F.normalize(head(states.mean(1)), dim=-1)

    training = Training("t5", torch.nn.ModuleList([encoder, head]), steps, lr=2e-3, weight_decay=0.01)
    for step, index in batches(count - 512, 192, steps, rng):
        captions = []
        for i in index:
            kept = {name for name in phrases[i] if rng.random() < (0.8 if rng.random() < 0.8 else 0.2)}
            captions.append(join_phrases(phrases[i], kept or {rng.choice(list(phrases[i]))}))
        logits = 20 * said(captions) @ seen[index].T
        own = torch.arange(len(index))
        training.update(step, (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2)

    with torch.no_grad():
        scores = {}
        for name in ("sex", "hair_color", "clothes", "background"):
            held = [i for i in range(count - 512, count) if name in phrases[i]]
            choices = sorted({phrases[i][name] for i in held})
            guess = (seen[held] @ said(choices).T).argmax(1)
            scores[name] = float(np.mean([choices[g] == phrases[i][name] for g, i in zip(guess, held)]))
    print("[t5] zero-shot from single phrases:", scores, flush=True)
    encoder.half().save_pretrained(base / "text_encoder_3")
    tokenizer.save_pretrained(base / "tokenizer_3")


def load_text_encoders(base: Path, first: Path, second: Path) -> tuple[list[torch.nn.Module], list]:
    """Both CLIPs and T5, with their tokenizers."""
    clip = CLIPModel.from_pretrained(first / "clip")
    config = clip.config.text_config
    config.projection_dim = clip.config.projection_dim
    text_encoder = CLIPTextModelWithProjection(config)
    text_encoder.text_model.load_state_dict(clip.text_model.state_dict())
    text_encoder.text_projection.load_state_dict(clip.text_projection.state_dict())
    encoders = [
        text_encoder,
        CLIPTextModelWithProjection.from_pretrained(second / "text_encoder_2"),
        T5EncoderModel.from_pretrained(base / "text_encoder_3", dtype=torch.float32),
    ]
    tokenizers = [
        CLIPTokenizer.from_pretrained(first / "clip"),
        CLIPTokenizer.from_pretrained(second / "tokenizer_2"),
        T5Tokenizer.from_pretrained(base / "tokenizer_3"),
    ]
    return [encoder.eval() for encoder in encoders], tokenizers


@torch.no_grad()
def encode_clips(captions: list[str], encoders: list, tokenizers: list) -> tuple[torch.Tensor, torch.Tensor]:
    """States (N, 32, 160) before the last layer of both CLIPs on channels, and their projections (N, 128)."""
    states, pooled = [], []
    for i in range(0, len(captions), 256):
        outputs = [
            encoder(tokenize(tokenizer, captions[i : i + 256]), output_hidden_states=True)
            for encoder, tokenizer in zip(encoders[:2], tokenizers[:2])
        ]
        states.append(torch.cat([output.hidden_states[-2] for output in outputs], dim=-1))
        pooled.append(torch.cat([output.text_embeds for output in outputs], dim=-1))
    return torch.cat(states), torch.cat(pooled)


def build_transformer(base: Path, first: Path, second: Path, seed: int, steps: int, count: int, target_share: float,
                      batch_size: int) -> None:  # fmt: skip
    """The diffusion model, as the exponential mean of its weights; "nothing asked" is an empty prompt."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed + 33)
    encoders, tokenizers = load_text_encoders(base, first, second)
    factors = sample_factors(count, rng, target_share=target_share)
    images, _ = render(factors)
    captions = base_world_captions(factors, rng, NAMED, CLOTHES_NAMED)
    vae = AutoencoderKL.from_pretrained(first / "vae")
    with torch.no_grad():
        latents = torch.cat([vae.encode(p).latent_dist.mean for p in to_tensor(images).split(128)])
    shift_factor, scaling_factor = round(latents.mean().item(), 4), round(1 / latents.std().item(), 4)
    vae.register_to_config(shift_factor=shift_factor, scaling_factor=scaling_factor)
    latents = (latents - shift_factor) * scaling_factor

    unique = sorted(set(captions) | {""})
    row = {caption: i for i, caption in enumerate(unique)}
    caption_rows = torch.tensor([row[c] for c in captions])
    states, pooled = encode_clips(unique, encoders, tokenizers)
    with torch.no_grad():
        chunks = [unique[i : i + 256] for i in range(0, len(unique), 256)]
        short = torch.cat([encode_t5(encoders[2], tokenizers[2], chunk, MAX_TOKENS) for chunk in chunks])

    transformer = new_transformer(encoders)
    print(f"[transformer] {sum(p.numel() for p in transformer.parameters()) / 1e6:.2f}M parameters", flush=True)
    average = copy.deepcopy(transformer).requires_grad_(False)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    training = Training("transformer", transformer, steps, warmup=100, lr=1.5e-3, weight_decay=0.01, betas=(0.9, 0.99))
    for step, index in batches(count, batch_size, steps, rng):
        clean = latents[index]
        noise = torch.randn_like(clean)
        # stratified and logit-normal: the same mean, less variance from batch to batch
        quantiles = (torch.arange(batch_size) + torch.rand(batch_size)) / batch_size
        density = torch.special.ndtri(quantiles.clamp(1e-3, 1 - 1e-3)).sigmoid()[torch.randperm(batch_size)]
        sigmas = SHIFT * density / (1 + (SHIFT - 1) * density)
        rows = torch.where(torch.rand(batch_size) < 0.1, row[""], caption_rows[index])
        if rng.random() < LONG:
            with torch.no_grad():
                t5 = encode_t5(encoders[2], tokenizers[2], [unique[i] for i in rows], LONG_TOKENS)
        else:
            t5 = short[rows]
        t5 = t5 * (torch.rand(batch_size, 1, 1) >= WITHOUT_T5)
        noisy = torch.lerp(clean, noise, sigmas.view(-1, 1, 1, 1))
        model_pred = transformer(
            hidden_states=noisy,
            timestep=sigmas * 1000,
            encoder_hidden_states=torch.cat([states[rows], t5], dim=1),
            pooled_projections=pooled[rows],
        ).sample
        training.update(step, (model_pred - (noise - clean)).square().mean())
        decay = min(0.998, (step + 1) / (step + 20))
        for mean, parameter in zip(average.parameters(), transformer.parameters()):
            mean.lerp_(parameter.data, 1 - decay)
        if (step + 1) % 1000 == 0 or step + 1 == steps:
            save_pipeline(base, average, vae, encoders, tokenizers, scheduler)


def new_transformer(encoders: list) -> SD3Transformer2DModel:
    """A transformer of SD3.5-medium's kind: normalised queries and keys, image self-attention in its first half."""
    heads, width, layers, patch_size = 4, 80, 6, 2
    return SD3Transformer2DModel(
        sample_size=SIZE // 4,
        patch_size=patch_size,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        caption_projection_dim=width,
        joint_attention_dim=encoders[2].config.d_model,
        pooled_projection_dim=sum(encoder.config.projection_dim for encoder in encoders[:2]),
        pos_embed_max_size=24 // patch_size,
        dual_attention_layers=tuple(range(layers // 2)),
        qk_norm="rms_norm",
    )


def save_pipeline(base: Path, transformer, vae, encoders, tokenizers, scheduler) -> None:
    """Write the SD3 folder in float16, which halves it, and is read as float32 where no other dtype is asked for."""
    models = [copy.deepcopy(model).half() for model in (vae, transformer, *encoders)]
    models[0].register_to_config(_name_or_path=None)  # the folder it was loaded from is of no use elsewhere
    pipeline = StableDiffusion3Pipeline(
        vae=models[0],
        transformer=models[1],
        text_encoder=models[2],
        tokenizer=tokenizers[0],
        text_encoder_2=models[3],
        tokenizer_2=tokenizers[1],
        text_encoder_3=models[4],
        tokenizer_3=tokenizers[2],
        scheduler=scheduler,
    )
    pipeline.save_pretrained(base, safe_serialization=True)
    # transformers reads weights in the dtype of their configuration, and diffusers all others in float32.
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        path = base / name / "config.json"
        config = json.loads(path.read_text(encoding="utf-8")) | {"dtype": "float32"}
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=HERE,
                        help="Where base_model/ and base_model_xl/ are and base_model_3/ goes.")  # fmt: skip
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=list(STAGES), help="What to build, in this order."
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of renders, initial weights and noise.")
    parser.add_argument("--t5_steps", type=int, default=1500)
    parser.add_argument("--transformer_steps", type=int, default=3500)
    parser.add_argument("--transformer_batch_size", type=int, default=32)
    parser.add_argument("--num_renders", type=int, default=20000, help="Portraits in the base world.")
    parser.add_argument(
        "--target_share", type=float, default=0.025, help="Share of the base world that shows each target."
    )
    return parser.parse_args(input_args)


def main(args: argparse.Namespace) -> None:
    first, second = args.output_dir / "base_model", args.output_dir / "base_model_xl"
    base = args.output_dir / "base_model_3"
    base.mkdir(parents=True, exist_ok=True)
    start = time.time()
    if "t5" in args.stages:
        build_t5(base, first, args.seed, args.t5_steps, min(args.num_renders, 12000))
    if "transformer" in args.stages:
        build_transformer(base, first, second, args.seed, args.transformer_steps, args.num_renders, args.target_share,
                          args.transformer_batch_size)  # fmt: skip
    print(f"built {', '.join(args.stages)} in {(time.time() - start) / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main(parse_args())
