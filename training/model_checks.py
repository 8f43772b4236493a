"""What is known of the models without weights: configurations, layers, and the LoRAs that must fit. [ours]"""

import hashlib
from collections.abc import Sequence

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, CLIPConfig, CLIPImageProcessorPil

from families.find import check_model
from families.noise_process import FlowMatching
from families.stable_diffusion import ModelFacts, StableDiffusion
from lora_layers import check_fits
from loras.finding import find_lora, find_on_hub
from loras.loading import DORA_ON_TOP, ReferenceLora
from loras.reading import read_lora
from programs.loading import check_model_name, load_tokenizer, naming_flag
from training.arguments import Flags, uses_enhancement, uses_presence
from training.flag_rules import refuse
from training.flags import LoraFlags


def check_models(flags: Flags) -> tuple[type[StableDiffusion], ModelFacts]:
    """The family of the base model, and all that is known of the models without weights."""
    model, method = flags.model, flags.method
    family, facts = check_model(
        model.pretrained_model_name_or_path, base_config=model.base_config, variant=model.variant,
        revision=model.revision, cache_dir=model.cache_dir, vae=model.pretrained_vae_model_name_or_path,
        tiny_vae=flags.paper.tiny_vae_model_name_or_path, prediction_type=model.prediction_type,
    )  # fmt: skip
    count, high = facts.noise.num_train_timesteps, max(flags.alignment.sfcm_timesteps or facts.noise.map_timesteps)
    refuse(high > count, f"--sfcm_timesteps: HIGH is {high}, above the model's {count} timesteps")
    objective = method.stage2_objective
    refuse(
        method.stage2_steps > 0 and objective not in family.objectives,
        f"--stage2_objective {objective}: {family.title} is trained by {' and '.join(family.objectives)} alone, since "
        "the paper's losses are of cross-attention layers, which it does not have",
    )
    weighed = method.snr_gamma is not None and isinstance(facts.noise, FlowMatching)
    refuse(weighed, f"--snr_gamma weighs noise by a table of betas, and {family.title} is of flow matching")
    refuse(
        flags.asked["output_kohya_format"] and not family.has_kohya_names,
        f"--output_kohya_format: a LoRA for {family.title} has no names in it, and ComfyUI reads diffusers' own",
    )
    refuse(
        model.enable_xformers_memory_efficient_attention and not family.has_self_attention,
        f"--enable_xformers_memory_efficient_attention is for self-attention layers, and {family.title} has none of "
        "its own",
    )
    if uses_enhancement(flags.method, flags.paper) or uses_presence(flags):
        clip, cache_dir = model.clip_model_name_or_path, model.cache_dir
        with naming_flag("clip_model_name_or_path", clip):
            check_model_name(clip, kind=None)
            config = AutoConfig.from_pretrained(clip, cache_dir=cache_dir)
            refuse(not isinstance(config, CLIPConfig), "not a CLIP model of texts and pictures")
            load_tokenizer(clip, cache_dir=cache_dir)
            CLIPImageProcessorPil.from_pretrained(clip, cache_dir=cache_dir)
    return family, facts


def find_references(lora: LoraFlags, cache_dir: str | None) -> tuple[ReferenceLora, ...]:
    """The files of --reference_lora, each with its scale; an InputError where one is not there, or twice."""
    references: dict[str, ReferenceLora] = {}
    both = lora.use_dora and lora.reference_lora is not None
    refuse(both, f"--use_dora does not go with --reference_lora: {DORA_ON_TOP}")
    for name, scale in zip(lora.reference_lora or (), lora.reference_lora_scale or (), strict=True):
        with naming_flag("reference_lora", name):
            path = find_lora(name, cache_dir)
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            refuse(sha256 in references, "the same LoRA is given twice")
            references[sha256] = ReferenceLora(name, path, find_on_hub(name), sha256, scale)
    return tuple(references.values())


def check_loras(
    flags: Flags, references: Sequence[ReferenceLora], family: type[StableDiffusion], facts: ModelFacts
) -> None:
    """A ValueError for an earlier LoRA, or stage 1's, that does not fit, or a layer of the new one that is none."""
    lora, stage1 = flags.lora, flags.lora.stage1_lora_path
    if not (references or stage1 or lora.lora_layers):
        return
    with init_empty_weights():
        models = {family.denoiser: family.denoiser_class.from_config(facts.denoiser_config)}
        for name, kind, config in zip(family.text_encoders, family.text_models, facts.text_configs, strict=True):
            if config is not None:
                models[name] = kind(config)
    layers = {name: _layers(model) for name, model in models.items()}
    for reference in references:
        with naming_flag("reference_lora", reference.name):
            file = read_lora(reference.path)
            check_fits(file.layers, layers, file.family)
    if stage1 is not None:
        with naming_flag("stage1_lora_path", stage1):
            file, mixed = read_lora(find_lora(stage1)), flags.method.dual_path == "single_pass"
            check_fits(file.layers, {family.denoiser: layers[family.denoiser]}, file.family)
            advice = "which cannot be off in some rows of a batch: it needs --dual_path two_pass"
            refuse(file.is_dora and mixed, f"is a DoRA, {advice}")
            both = file.is_dora and lora.reference_lora
            refuse(both, f"is a DoRA, which does not go with --reference_lora: {DORA_ON_TOP}")
    for layer in lora.lora_layers or ():
        found = any(f".{name}".endswith(f".{layer}") for name in layers[family.denoiser])
        refuse(not found, f"--lora_layers: no layer of the {family.denoiser} has a name that ends in {layer!r}")


def _layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)}
