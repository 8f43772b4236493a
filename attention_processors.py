"""Capturing cross-attention.

A captured layer computes an explicit softmax, because its probabilities are wanted; every other layer keeps its own
processor.

Legend: B batch, C latent channels, H/W latent size, S = h*w image tokens of a layer, T text tokens, N heads, D head
dim, E size of a text embedding.
Paper: arXiv 2504.00396; what names no source is [ours].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn


@dataclass
class CrossAttentionFeatures:
    """What the captured layers saw in one forward, by layer name.

    Args:
        attention_probs: (B, S, T) float32 each, mean over heads, rows sum to 1; gradient flows if the forward had one.
        queries: (B, N, S, D) each, as they enter the scores; gradient flows likewise.
        resolutions: (h, w) each, with h*w = S.

    Source: [paper] A_l and Q_l.
    """

    attention_probs: dict[str, Tensor] = field(default_factory=dict)
    queries: dict[str, Tensor] = field(default_factory=dict)
    resolutions: dict[str, tuple[int, int]] = field(default_factory=dict)

    def rows(self, start: int, stop: int) -> CrossAttentionFeatures:
        """The features of the batch rows `start` to `stop`, exclusive."""
        return self._of(self.resolutions, lambda values: values[start:stop])

    def at_resolution(self, resolution: tuple[int, int]) -> CrossAttentionFeatures:
        """Only the layers of that (h, w); empty if there are none."""
        return self._of([name for name, size in self.resolutions.items() if size == tuple(resolution)])

    def detach(self) -> CrossAttentionFeatures:
        """The same features without gradient."""
        return self._of(self.resolutions, Tensor.detach)

    def _of(
        self, names: Collection[str], change: Callable[[Tensor], Tensor] = lambda values: values
    ) -> CrossAttentionFeatures:
        return CrossAttentionFeatures(
            {name: change(self.attention_probs[name]) for name in names},
            {name: change(self.queries[name]) for name in names},
            {name: self.resolutions[name] for name in names},
        )


class CrossAttentionStore:
    """Keeps what the capturing processors hand over while `recording` is on and the UNet's forward runs.

    Gradient checkpointing recomputes layers in the backward, outside of the UNet's forward, so that nothing is stored
    twice. Each recorded forward replaces what the one before left.
    """

    def __init__(self) -> None:
        self.recording = False
        self._latent_size: tuple[int, int] | None = None
        self._features = CrossAttentionFeatures()

    @contextmanager
    def record(self) -> Iterator[None]:
        """Recording is on inside, and afterwards as it was before."""
        before, self.recording = self.recording, True
        try:
            yield
        finally:
            self.recording = before

    def pop(self) -> CrossAttentionFeatures:
        """Hand out the features of the last recorded forward, and forget them; a RuntimeError if there are none."""
        if not self._features.attention_probs:
            raise RuntimeError(
                "no cross-attention was recorded: run the UNet inside `capture_cross_attention` and `store.record()`"
            )
        features, self._features = self._features, CrossAttentionFeatures()
        return features

    def begin_forward(self, latent_size: tuple[int, int]) -> None:
        """Called before each forward of the UNet with the (H, W) of its latents."""
        self._latent_size = latent_size
        if self.recording:
            self._features = CrossAttentionFeatures()

    def end_forward(self) -> None:
        """Called after each forward of the UNet, also after an error."""
        self._latent_size = None

    def add(self, name: str, attention_probs: Tensor, query: Tensor) -> None:
        """Called by a layer with its (B, S, T) and (B, N, S, D)."""
        if self.recording and self._latent_size is not None:
            self._features.resolutions[name] = _layer_resolution(name, self._latent_size, attention_probs.shape[1])
            self._features.attention_probs[name] = attention_probs
            self._features.queries[name] = query


def _layer_resolution(name: str, latent_size: tuple[int, int], tokens: int) -> tuple[int, int]:
    """The (h, w) with `tokens` tokens among the latent's sizes, each level half of the one before, rounded up."""
    height, width = latent_size
    while height * width > tokens:
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    if height * width != tokens:
        raise ValueError(f"{name} has {tokens} image tokens, which no halving of the latent size {latent_size} gives")
    return height, width


class CapturingAttnProcessor:
    """The stock attention, with an explicit softmax, which hands its probabilities and queries to a store.

    The math is the same whether or not the store records: gradient checkpointing compares the two runs of a layer.
    """

    def __init__(self, name: str, store: CrossAttentionStore) -> None:
        self.name = name
        self.store = store

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, temb: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        image_shape = hidden_states.shape if hidden_states.ndim == 4 else None
        if image_shape is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

        if encoder_hidden_states is None:
            encoder_hidden_states = hidden_states
        elif attn.norm_cross is not None:
            encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)
        batch_size, tokens, _ = encoder_hidden_states.shape

        query, key, value = (
            projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for projected in (
                attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states),
            )
        )  # fmt: skip
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)

        attention_mask = attn.prepare_attention_mask(attention_mask, tokens, batch_size)
        if attention_mask is not None and attn.upcast_attention:
            attention_mask = attention_mask.float()
        attention_probs = attn.get_attention_scores(query.flatten(0, 1), key.flatten(0, 1), attention_mask)
        hidden_states = torch.bmm(attention_probs, value.flatten(0, 1))
        hidden_states = attn.batch_to_head_dim(hidden_states)
        mean_probs = attention_probs.unflatten(0, (batch_size, attn.heads)).mean(1, dtype=torch.float32)
        self.store.add(self.name, mean_probs, query)

        hidden_states = attn.to_out[0](hidden_states)
        hidden_states = attn.to_out[1](hidden_states)
        if image_shape is not None:
            hidden_states = hidden_states.transpose(1, 2).reshape(image_shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor


def find_cross_attention_layers(unet: nn.Module) -> dict[str, Attention]:
    """The text cross-attention layers of a UNet, not a DDP wrapper, by module name in forward order: down, middle, up.

    Raises ValueError: the model has none.
    """
    layers = {
        name: module
        for name, module in unet.named_modules()
        if name.endswith(".attn2") and isinstance(module, Attention) and module.is_cross_attention
    }
    if not layers:
        raise ValueError(f"{type(unet).__name__} has no cross-attention layer (no module named '*.attn2')")
    # The UNet registers its up blocks before its middle block.
    order = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    return dict(sorted(layers.items(), key=lambda item: order.get(item[0].split(".")[0], len(order))))


def phrase_map_resolution(resolutions: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    """The one resolution at which phrase maps are averaged: a quarter of the latent side, 16x16 for SD1.5 at 64x64.

    The largest resolution (h, w) of the captured layers stands for the latent's. If no layer has a quarter of its
    side, the nearest one (in ratio, the larger of two equally near) is taken.

    Raises ValueError: there is no layer.
    """
    if not resolutions:
        raise ValueError("phrase_map_resolution needs at least one layer's resolution")
    sizes = sorted(set(resolutions.values()), key=math.prod, reverse=True)
    quarter = math.prod(sizes[0]) / 16
    return min(sizes, key=lambda size: abs(math.log(math.prod(size) / quarter)))


def _check_capturable(name: str, layer: Attention) -> None:
    processor = layer.processor
    kind = type(processor).__name__
    if isinstance(processor, CapturingAttnProcessor):
        raise ValueError(f"{name} is captured already: leave the other capture_cross_attention first")
    if type(processor) not in (AttnProcessor, AttnProcessor2_0):
        if kind.startswith("Sliced"):
            remedy = "turn attention slicing off (pipeline.disable_attention_slicing())"
        elif kind.startswith("Fused"):
            remedy = "call unet.unfuse_qkv_projections()"
        elif "IPAdapter" in kind:
            remedy = "call pipeline.unload_ip_adapter()"
        elif "XFormers" in kind and not kind.startswith("CustomDiffusion"):
            remedy = "call unet.disable_xformers_memory_efficient_attention()"
        else:
            remedy = "call unet.set_attn_processor(AttnProcessor2_0())"
        raise ValueError(f"{name} has a {kind}, whose attention cannot be captured: {remedy} first")
    if layer.inner_kv_dim != layer.inner_dim:
        raise ValueError(f"{name} groups its queries (fewer key heads than heads), which cannot be captured")


class CrossAttentionCapture:
    """The cross-attention layers of a UNet, not a DDP wrapper, found once; capturing them is then switched without a
    walk.

    `layer_names` are of `find_cross_attention_layers`, default all; a ValueError for an unknown one, or none at all.
    """

    def __init__(self, unet: nn.Module, layer_names: Sequence[str] | None = None) -> None:
        self._unet, self.layers = unet, find_cross_attention_layers(unet)
        if layer_names is None:
            return
        unknown = [name for name in layer_names if name not in self.layers]
        if unknown or not layer_names:
            raise ValueError(
                f"unknown cross-attention layers {unknown} in {list(layer_names)}; there are {list(self.layers)}"
            )
        self.layers = {name: layer for name, layer in self.layers.items() if name in layer_names}

    @contextmanager
    def store(self) -> Iterator[CrossAttentionStore]:
        """Capturing processors are installed inside; the former ones come back on exit, also after an error.

        The store of the context is not recording yet.

        Raises:
            ValueError: a layer's processor is not a stock one (sliced, fused, xformers, IP-Adapter, custom diffusion).
        """
        for name, layer in self.layers.items():
            _check_capturable(name, layer)
        store = CrossAttentionStore()

        def before_forward(module: nn.Module, args: tuple, kwargs: dict) -> None:
            sample = args[0] if args else kwargs["sample"]
            store.begin_forward(tuple(sample.shape[-2:]))

        with ExitStack() as stack:
            stack.callback(self._unet.register_forward_pre_hook(before_forward, with_kwargs=True).remove)
            stack.callback(self._unet.register_forward_hook(lambda *_: store.end_forward(), always_call=True).remove)
            for name, layer in self.layers.items():
                stack.callback(layer.set_processor, layer.processor)
                layer.set_processor(CapturingAttnProcessor(name, store))
            yield store


def capture_cross_attention(
    unet: nn.Module, layer_names: Sequence[str] | None = None
) -> AbstractContextManager[CrossAttentionStore]:
    """`CrossAttentionCapture.store`, for a UNet that is captured once."""
    return CrossAttentionCapture(unet, layer_names).store()
