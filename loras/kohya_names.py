"""What kohya's format calls layers: with "_" for every ".", and in SDXL's UNet after its original blocks. [ours]

Those are numbered through, and SDXL has two layers in each of diffusers' down blocks, and three in its up blocks.
"""

import re

from lora_layers import SDXL, Layers


_MODELS = {"unet": "unet", "te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2"}
_TEXT_PREFIXES = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
_KEY = re.compile(r"lora_(unet|te[12]?)_(\w+)\.(?:lora_(down|up)\.weight|(alpha|dora_scale))")
# What names that have "_" for every "." hold of names with a "_" of their own.
_COMPOUNDS = (
    "down_blocks|up_blocks|mid_block|transformer_blocks|time_emb_proj|time_embedding|add_embedding|linear_1|linear_2|"
    "conv_shortcut|conv_in|conv_out|proj_in|proj_out|to_q|to_k|to_v|to_out|text_model|self_attn|q_proj|k_proj|v_proj|"
    "out_proj|text_projection"
)
_PART = re.compile(rf"({_COMPOUNDS}|[^_]+)(?:_|$)")

_OUTSIDE = {
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding.linear_1": "time_embed_0",
    "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0",
    "add_embedding.linear_2": "label_emb_0_2",
}
_IN_RESNET = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}
_FROM_OUTSIDE = {original: layer for layer, original in _OUTSIDE.items()}
_FROM_RESNET = {original: layer for layer, original in _IN_RESNET.items()}
_MIDDLE = ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1")
_KINDS = ("resnets", "attentions")
_INPUT = re.compile(r"input_blocks_([1-9]\d*)_([01])_(\w+)")
_OUTPUT = re.compile(r"output_blocks_(\d+)_([0-2])_(\w+)")
_MIDDLE_BLOCK = re.compile(r"middle_block_([0-2])_(\w+)")
# Every layer of the published SDXL that a LoRA can be on; the numbers of a model with others would mean other blocks.
_PUBLISHED = re.compile(
    r"(?:down_blocks\.[0-2]\.resnets\.[01]|mid_block\.resnets\.[01]|up_blocks\.[0-2]\.resnets\.[0-2])"
    rf"\.(?:{'|'.join(_IN_RESNET)})|"
    r"(?:down_blocks\.[12]\.attentions\.[01]|mid_block\.attentions\.0|up_blocks\.[01]\.attentions\.[0-2])\..+|"
    r"(?:down_blocks\.[01]\.downsamplers|up_blocks\.[01]\.upsamplers)\.0\.conv|"
    rf"{'|'.join(map(re.escape, _OUTSIDE))}"
)


def parse_kohya_key(key: str) -> tuple[str, str, str] | None:
    """Model, layer as diffusers calls it, and "down", "up", "alpha" or "dora_scale"; None if it is none of a LoRA."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    prefix, name, side, other = match.groups()
    layer = _from_original(name) if prefix == "unet" else None
    if layer is None:
        layer = _with_dots(name).removeprefix("text_model.")
    return _MODELS[prefix], layer, side or other


def kohya_names(layers: Layers, family: str | None) -> dict[tuple[str, str], str]:
    """What each layer is called before ".lora_down.weight", by model and layer.

    The UNet of an SDXL with other blocks than the published ones keeps diffusers' names for them, which every reader
    knows; of `add_embedding` none of them is.
    """
    unet = layers.get("unet", ())
    is_original = family == SDXL and all(map(_PUBLISHED.fullmatch, unet))
    names = {}
    for model, group in layers.items():
        for layer in group:
            if model == "unet":
                original = is_original or layer.startswith("add_embedding")
                own = _to_original(layer) if original else layer.replace(".", "_")
                names[model, layer] = f"lora_unet_{own}"
            else:
                prefix = _TEXT_PREFIXES[model] if family == SDXL else "lora_te_"
                names[model, layer] = prefix + in_text_model(layer).replace(".", "_")
    return names


def in_text_model(layer: str) -> str:
    """A text encoder's layer with the part before its name that all have but SDXL's projection."""
    return layer if layer == "text_projection" else f"text_model.{layer}"


def _to_original(layer: str) -> str:
    """Of a layer that the published SDXL has."""
    if layer in _OUTSIDE:
        return _OUTSIDE[layer]
    block, *parts = layer.split(".")
    if block == "mid_block":
        start = f"middle_block_{_MIDDLE.index('.'.join((block, *parts[:2])))}"
        kind, *rest = parts[0], *parts[2:]
    else:
        level, kind, number, *rest = parts
        first = 3 * int(level)
        if kind == "downsamplers":
            return f"input_blocks_{first + 3}_0_op"
        if kind == "upsamplers":
            return f"output_blocks_{first + 2}_2_conv"
        place = first + int(number)
        start = f"input_blocks_{place + 1}" if block == "down_blocks" else f"output_blocks_{place}"
        start += f"_{_KINDS.index(kind)}"
    return f"{start}_{_IN_RESNET[rest[0]] if kind == 'resnets' else '_'.join(rest)}"


def _from_original(name: str) -> str | None:
    """The layer of diffusers' UNet; None for a name that is none of the original UNet."""
    if name in _FROM_OUTSIDE:
        return _FROM_OUTSIDE[name]
    if match := _MIDDLE_BLOCK.fullmatch(name):
        block, inner = _MIDDLE[int(match[1])], match[2]
    elif match := _INPUT.fullmatch(name):
        (level, number), inner = divmod(int(match[1]) - 1, 3), match[3]
        if inner == "op":
            return f"down_blocks.{level}.downsamplers.0.conv"
        block = f"down_blocks.{level}.{_KINDS[int(match[2])]}.{number}"
    elif match := _OUTPUT.fullmatch(name):
        (level, number), part, inner = divmod(int(match[1]), 3), int(match[2]), match[3]
        if inner == "conv":
            return f"up_blocks.{level}.upsamplers.0.conv"
        if part == len(_KINDS):
            return None
        block = f"up_blocks.{level}.{_KINDS[part]}.{number}"
    else:
        return None
    return f"{block}.{_FROM_RESNET.get(inner) or _with_dots(inner)}"


def _with_dots(name: str) -> str:
    return ".".join(_PART.findall(name))
