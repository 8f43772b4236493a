"""LoRA files written, each whole or not at all: kohya's format, which ComfyUI and A1111 read, and diffusers'.

Source: [ours].
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig

from lora_layers import LoraLayer
from loras import LORA_WEIGHTS
from loras.reading import is_dora, read_lora
from programs.loading import naming
from programs.writing import whole


_SD2_TEXT_WIDTH = 1024  # of the text embeddings that a cross-attention layer reads; SD 1.x has 768


def save_kohya_lora(lora: Path, path: Path) -> None:
    """Write a LoRA of diffusers' format in kohya's format, which ComfyUI and A1111 read, whole or not at all.

    Both scale a layer by `alpha / rank`, and kohya's file holds an alpha for each layer. diffusers has a converter of
    its own; it writes `alpha = rank` whatever the alpha, and does not find DoRA's magnitude in a UNet. Its loader
    takes one of the file's alphas for all layers: they are made equal here, and what a layer's own alpha differs is
    put into `lora_up`.

    A DoRA's magnitude is written as (out, 1), one number for each output. No common reader treats it as PEFT does:
    diffusers drops `dora_scale`, ComfyUI divides by the norm of the original weight alone, A1111 by that of columns.

    Args:
        lora: a `.safetensors` file of diffusers' format.
        path: the file to write; its folder exists.

    Raises:
        ValueError: `read_lora` cannot read it; one line that begins with its path.

    Source: [ours].
    """
    with naming(str(lora)):
        layers = read_lora(lora)
    alpha = _most_common(layer.alpha for group in layers.values() for layer in group.values())
    state, ranks, widths = {}, set(), set()
    for model, group in layers.items():
        for name, layer in group.items():
            prefix = "lora_unet_" if model == "unet" else "lora_te_text_model_"
            key, up = f"{prefix}{name.replace('.', '_')}", layer.up
            if layer.alpha != alpha:
                up = up * (layer.alpha / alpha)
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
        # Without it, A1111 takes a LoRA with metadata for one of SD 1.x, and hides it from other models.
        "ss_v2": str(_SD2_TEXT_WIDTH in widths),
    }
    with whole(path) as file:
        file.write_bytes(safetensors.torch.save(state, metadata))
        sort_header(file)


def save_diffusers_lora(lora: Path, folder: Path) -> Path:
    """Write a LoRA in diffusers' format, each layer with its own rank and alpha.

    Args:
        lora: a `.safetensors` file of kohya's format, or one of diffusers' whose metadata is not whole.
        folder: where the file is written, under the name that diffusers looks for; it is made.

    Returns:
        The file.

    Raises:
        ValueError: `read_lora` cannot read it; one line that begins with its path.

    Source: [ours].
    """
    options = {}
    with naming(str(lora)):
        layers = read_lora(lora)
        if is_dora(layers):
            raise ValueError("a DoRA is read with whole metadata alone, which names ranks, alphas and layers")
    for model, group in layers.items():
        state, metadata = diffusers_state(group)
        options |= {f"{model}_lora_layers": state, f"{model}_lora_adapter_metadata": metadata}
    return write_diffusers_lora(folder, **options)


def write_diffusers_lora(folder: Path, prefix: str = ".saving-", **options: Any) -> Path:
    """Write a LoRA as diffusers does, with the metadata in order.

    Args:
        folder: where the file is written, under the name that diffusers looks for; it is made.
        prefix: of `whole`.
        options: arguments of diffusers' `save_lora_weights`.

    Returns:
        The file.

    Source: [ours].
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LORA_WEIGHTS
    with whole(path, prefix) as file:
        StableDiffusionPipeline.save_lora_weights(file.parent, **options)
        sort_header(file)
    return path


def diffusers_state(group: Mapping[str, LoraLayer]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """One model's layers as diffusers writes them.

    Args:
        group: the layers by name, none of a DoRA; each may have a rank and an alpha of its own.

    Returns:
        The tensors under PEFT's names, and the metadata that tells ranks and alphas.

    Source: [ours].
    """
    rank = _most_common(layer.rank for layer in group.values())
    alpha = _most_common(layer.alpha for layer in group.values())
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={name: layer.rank for name, layer in group.items() if layer.rank != rank},
        alpha_pattern={name: layer.alpha for name, layer in group.items() if layer.alpha != alpha},
        target_modules=list(group),
    )
    state = {
        f"{name}.{key}.weight": tensor.contiguous()
        for name, layer in group.items()
        for key, tensor in (("lora_A", layer.down), ("lora_B", layer.up))
    }
    return state, adapter_metadata(config)


def adapter_metadata(config: LoraConfig) -> dict[str, Any]:
    """A LoRA's configuration as its file holds it, the same in each process: a set has no order of its own.

    Source: [ours].
    """
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}


def sort_header(path: Path) -> None:
    """Rewrite a safetensors file with the metadata in order, which safetensors writes in an order of chance.

    Equal runs have equal files then, byte for byte.

    Args:
        path: a whole `.safetensors` file.

    Source: [ours]; the format as safetensors documents it: the header's length in 8 bytes, the header, the tensors.
    """
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors stay aligned
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def _most_common(values: Iterable[float]) -> float:
    return Counter(values).most_common(1)[0][0]
