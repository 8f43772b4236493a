"""LoRA files written, each whole or not at all: kohya's format (ComfyUI, A1111), and diffusers'. [ours]"""

from collections.abc import Mapping
from pathlib import Path
from statistics import mode

import safetensors.torch
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionXLPipeline
from peft import LoraConfig

from lora_layers import SD3, SDXL, TEXT_ENCODERS, LoraLayer
from loras import LORA_WEIGHTS
from loras.kohya_names import in_text_model, kohya_names
from loras.reading import LoraFile, read_lora
from programs.loading import naming
from programs.writing import sort_header, whole


def check_kohya(lora: LoraFile) -> None:
    """Refuse a LoRA that nothing reads in kohya's format.

    ComfyUI reads one of Stable Diffusion 3 in diffusers' format, but takes the rank for each alpha.

    Raises ValueError: it is one; a line that says what to do.
    """
    if lora.family == SD3:
        strengths = {layer.alpha / layer.rank for group in lora.layers.values() for layer in group.values()}
        own = ", at strength {:g}".format(*strengths) if len(strengths) == 1 else ", with alphas that are its ranks"
        own = "" if strengths == {1.0} else own
        raise ValueError(f"{SD3} has no LoRA in kohya's format: ComfyUI reads diffusers' own file{own}")


def save_kohya_lora(lora: Path, path: Path) -> None:
    """Write a LoRA of diffusers' format in kohya's format, which ComfyUI and A1111 read.

    diffusers' own converter writes `alpha = rank` whatever the alpha, and does not find DoRA's magnitude in a UNet.
    Its loader takes one of the file's alphas for all layers: they are made equal here, and what a layer's own alpha
    differs is put into `lora_up`.

    No common reader treats a DoRA's magnitude as PEFT does: diffusers drops `dora_scale`, ComfyUI divides by the norm
    of the original weight alone, A1111 by that of columns.

    Raises ValueError: `read_lora` cannot read it, or it is for Stable Diffusion 3; one line that begins with its path.
    """
    with naming(str(lora)):
        content = read_lora(lora)
        check_kohya(content)
    layers, names = content.layers, kohya_names(content.layers, content.family)
    alpha = mode(layer.alpha for group in layers.values() for layer in group.values())
    state, ranks, widths = {}, set(), set()
    for model, group in layers.items():
        for name, layer in group.items():
            key = names[model, name]
            up = layer.up if layer.alpha == alpha else layer.up * (layer.alpha / alpha)
            state |= {f"{key}.lora_down.weight": layer.down, f"{key}.lora_up.weight": up}
            state[f"{key}.alpha"] = torch.tensor(alpha)
            if layer.magnitude is not None:
                # A plain vector would be taken for one number an input, and broadcast along the wrong side.
                state[f"{key}.dora_scale"] = layer.magnitude.reshape(-1, *[1] * (up.ndim - 1))
            ranks.add(layer.rank)
            if "attn2.to_k" in name:
                widths.add(layer.down.shape[1])
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(*ranks) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(alpha),
        # Without it, A1111 takes a LoRA with metadata for one of SD 1.x, and hides it from other models. The text
        # embeddings of SD 2.x have this width, and those of SD 1.x have 768.
        "ss_v2": str(1024 in widths),
    }
    if content.family == SDXL:  # what A1111 tells SDXL by
        metadata["ss_base_model_version"] = "sdxl_base_v1-0"
    with whole(path) as file:
        file.write_bytes(safetensors.torch.save(state, metadata))
        sort_header(file)


def save_diffusers_lora(lora: Path, folder: Path) -> Path:
    """Write a LoRA of kohya's format, or whose metadata is not whole, in diffusers', with each layer's rank and alpha.

    Raises ValueError: `read_lora` cannot read it; one line that begins with its path.
    """
    with naming(str(lora)):
        file = read_lora(lora)
        if file.is_dora:
            raise ValueError("a DoRA is read with whole metadata alone, which names ranks, alphas and layers")
    return write_diffusers_lora(folder, {model: _peft_state(model, group) for model, group in file.layers.items()})


def write_diffusers_lora(folder: Path, models: Mapping[str, tuple[dict[str, torch.Tensor], LoraConfig]]) -> Path:
    """Write a LoRA as diffusers does, the same in each process, into a folder that is made; returns the file.

    `models` are those of "unet" or "transformer", "text_encoder" and "text_encoder_2" with a LoRA: its tensors under
    PEFT's names, and its configuration.
    """
    options = {}
    for model, (state, config) in models.items():
        # A set has no order of its own.
        metadata = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
        options |= {f"{model}_lora_layers": state, f"{model}_lora_adapter_metadata": metadata}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LORA_WEIGHTS
    kind = StableDiffusion3Pipeline if "transformer" in models else StableDiffusionXLPipeline
    with whole(path) as file:
        kind.save_lora_weights(file.parent, **options)
        sort_header(file)
    return path


def _peft_state(model: str, group: Mapping[str, LoraLayer]) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """One model's layers as PEFT has them."""
    rank, alpha = mode(layer.rank for layer in group.values()), mode(layer.alpha for layer in group.values())
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={name: layer.rank for name, layer in group.items() if layer.rank != rank},
        alpha_pattern={name: layer.alpha for name, layer in group.items() if layer.alpha != alpha},
        target_modules=list(group),
    )
    # transformers 5 has the layers of a CLIPTextModelWithProjection, and not of a CLIPTextModel, in a `text_model`.
    # diffusers takes that away for the other, and the names above are patterns, which fit both.
    state = {
        f"{in_text_model(name) if model in TEXT_ENCODERS else name}.{key}.weight": tensor.contiguous()
        for name, layer in group.items()
        for key, tensor in (("lora_A", layer.down), ("lora_B", layer.up))
    }
    return state, config
