"""The models of a training run, loaded as the flags say and from safetensors alone, and the LoRA on the UNet.

Source: [ours].
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import XFormersAttnProcessor
from peft import LoraConfig
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from families.stable_diffusion import StableDiffusion
from loras.files import ReferenceLora, find_lora, load_lora, merge_loras, read_lora
from programs.loading import cast_models, load_pipeline, load_tokenizer, naming_flag


def load_base_model(
    pipeline_class: type[StableDiffusionPipeline],
    args: argparse.Namespace,
    weight_dtype: torch.dtype,
    references: Sequence[ReferenceLora] = (),
) -> StableDiffusionPipeline:
    """The base model, with the VAE and the prediction type of the flags, and earlier LoRAs merged into its weights."""
    # Merged in half precision, small changes would be rounded away, and the sum be another than side by side.
    dtype = torch.float32 if references else weight_dtype
    parts, vae = {}, args.pretrained_vae_model_name_or_path
    if vae is not None:
        with naming_flag("pretrained_vae_model_name_or_path", vae):
            parts["vae"] = AutoencoderKL.from_pretrained(
                vae, dtype=dtype, cache_dir=args.cache_dir, use_safetensors=True
            )
    pipeline = load_pipeline(
        pipeline_class,
        args.pretrained_model_name_or_path,
        dtype,
        "pretrained_model_name_or_path",
        revision=args.revision,
        cache_dir=args.cache_dir,
        variant=args.variant,
        safety_checker=None,
        requires_safety_checker=False,
        **parts,
    )
    if references:
        with naming_flag("reference_lora", " ".join(reference.name for reference in references)):
            merge_loras(pipeline, [str(lora.path) for lora in references], [lora.scale for lora in references])
        cast_models(pipeline, weight_dtype)
    if args.prediction_type is not None:
        config = pipeline.scheduler.config
        pipeline.scheduler = type(pipeline.scheduler).from_config(config, prediction_type=args.prediction_type)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_text_part(family: type[StableDiffusion], args: argparse.Namespace) -> DiffusionPipeline:
    """The base model as far as it reads prompts, without denoiser and VAE."""
    return load_pipeline(
        family.pipeline_class,
        args.pretrained_model_name_or_path,
        torch.float32,
        "pretrained_model_name_or_path",
        revision=args.revision,
        cache_dir=args.cache_dir,
        variant=args.variant,
        safety_checker=None,
        requires_safety_checker=False,
        vae=None,
        **{family.denoiser: None},
    )


def load_clip(
    args: argparse.Namespace, device: torch.device
) -> tuple[CLIPModel, CLIPTokenizer, CLIPImageProcessorPil]:
    """The CLIP model of --clip_model_name_or_path in float32, its tokenizer and its image processor."""
    name = args.clip_model_name_or_path
    with naming_flag("clip_model_name_or_path", name):
        clip = CLIPModel.from_pretrained(name, cache_dir=args.cache_dir, dtype=torch.float32, use_safetensors=True)
    tokenizer = load_tokenizer(name, cache_dir=args.cache_dir)
    return clip.to(device).eval(), tokenizer, CLIPImageProcessorPil.from_pretrained(name, cache_dir=args.cache_dir)


def load_decoder(
    args: argparse.Namespace, pipeline: StableDiffusionPipeline, weight_dtype: torch.dtype, device: torch.device
) -> AutoencoderKL | AutoencoderTiny:
    """What decodes for the enhancement loss: the tiny VAE if there is one, else the model's own."""
    name = args.tiny_vae_model_name_or_path
    if name is None:
        return pipeline.vae
    with naming_flag("tiny_vae_model_name_or_path", name):
        decoder = AutoencoderTiny.from_pretrained(
            name, cache_dir=args.cache_dir, dtype=weight_dtype, use_safetensors=True
        )
    return decoder.to(device).eval()


@torch.no_grad()
def load_adapter(pipeline: StableDiffusionPipeline, path: str | Path) -> None:
    """Load the LoRA in a file or folder as the one in training, with the rank, alpha, layers and numbers it has."""
    unet = pipeline.unet
    load_lora(pipeline, str(path), "default")
    keep_in_float32(unet, "default")
    # PEFT has rounded it to the dtype of the layers it was added to.
    for name, layer in read_lora(find_lora(str(path)))["unet"].items():
        module = unet.get_submodule(name)
        module.lora_A["default"].weight.copy_(layer.down)
        module.lora_B["default"].weight.copy_(layer.up)
        if layer.magnitude is not None:
            magnitude = module.lora_magnitude_vector["default"].weight
            magnitude.copy_(layer.magnitude.view_as(magnitude))
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(".lora_" in name)


def keep_in_float32(unet: UNet2DConditionModel, adapter_name: str) -> None:
    """Bring an adapter to float32, which PEFT gives the dtype of the layers it is added to."""
    for name, parameter in unet.named_parameters():
        if ".lora_" in name and f".{adapter_name}" in name:
            # A copy: what was loaded may be a view into its file, which a checkpoint has to let go of.
            parameter.data = parameter.data.to(torch.float32, copy=True)


def use_xformers(unet: UNet2DConditionModel) -> None:
    """xformers in self-attention; cross-attention is captured, which its kernels cannot be."""
    processors = {
        name: XFormersAttnProcessor() if ".attn1." in name else processor
        for name, processor in unet.attn_processors.items()
    }
    unet.set_attn_processor(processors)


def lora_config(args: argparse.Namespace, unet: UNet2DConditionModel) -> LoraConfig:
    """LoRA on the projections of the cross-attention layers, of all attention layers, or on the layers named."""
    targets = args.lora_layers
    if targets is None:
        targets = StableDiffusion.lora_targets(unet, args.lora_target)
    return LoraConfig(
        r=args.rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        use_dora=args.use_dora,
        init_lora_weights="gaussian",
        target_modules=targets,
    )
