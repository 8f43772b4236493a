"""Capturing cross-attention. [ours]

A captured layer computes an explicit softmax, because its probabilities are wanted; every other layer keeps its own
processor.

Legend: B batch, H/W latent size, S = h*w image tokens of a layer, T text tokens, N heads, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn


# By the beginning of a processor's name, what puts the stock one back.
_REMEDIES = {
    "Sliced": "turn attention slicing off (pipeline.disable_attention_slicing())",
    "Fused": "call unet.unfuse_qkv_projections()",
    "IPAdapter": "call pipeline.unload_ip_adapter()",
    "XFormers": "call unet.disable_xformers_memory_efficient_attention()",
    "": "call unet.set_attn_processor(AttnProcessor2_0())",
}


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
        return self._changed(lambda values: values[start:stop])

    def detach(self) -> CrossAttentionFeatures:
        """The same features without gradient."""
        return self._changed(Tensor.detach)

    def _changed(self, change: Callable[[Tensor], Tensor]) -> CrossAttentionFeatures:
        probs, queries = (
            {name: change(values) for name, values in layers.items()}
            for layers in (self.attention_probs, self.queries)
        )
        return CrossAttentionFeatures(probs, queries, self.resolutions)

    def at_resolution(self, resolution: tuple[int, int]) -> CrossAttentionFeatures:
        """Only the layers of that (h, w); empty if there are none."""
        names = [name for name, size in self.resolutions.items() if size == tuple(resolution)]
        return CrossAttentionFeatures(*({name: values[name] for name in names} for values in vars(self).values()))


class CrossAttentionStore:
    """Keeps what the captured layers hand over while `recording` is on and the denoiser's forward runs.

    Gradient checkpointing recomputes layers in the backward, outside of the denoiser's forward, so that nothing is
    stored twice. Each recorded forward replaces what the one before left.
    """

    def __init__(self) -> None:
        self.recording = False
        self._latent_size: tuple[int, int] | None = None  # in a forward
        self._features = CrossAttentionFeatures()

    @contextmanager
    def record(self) -> Iterator[None]:
        """Recording is on inside, and afterwards as it was before."""
        before, self.recording = self.recording, True
        try:
            yield
        finally:
            self.recording = before

    @property
    def listening(self) -> bool:
        """Whether what a layer hands over now is kept."""
        return self.recording and self._latent_size is not None

    def pop(self) -> CrossAttentionFeatures:
        """Hand out the features of the last recorded forward, and forget them; a RuntimeError if there are none."""
        if not self._features.attention_probs:
            raise RuntimeError(
                "no cross-attention was recorded: run the UNet inside `capture_cross_attention` and `store.record()`"
            )
        features, self._features = self._features, CrossAttentionFeatures()
        return features

    def add(self, name: str, attention_probs: Tensor, query: Tensor) -> None:
        """Called by a layer with its (B, S, T) and (B, N, S, D)."""
        if not self.listening:
            return
        # Each level has half the sides of the one before, rounded up.
        (height, width), tokens = self._latent_size, query.shape[2]
        while height * width > tokens:
            height, width = math.ceil(height / 2), math.ceil(width / 2)
        if height * width != tokens:
            size = self._latent_size
            raise ValueError(f"{name} has {tokens} image tokens, which no halving of the latent size {size} gives")
        self._features.resolutions[name] = (height, width)
        self._features.attention_probs[name] = attention_probs
        self._features.queries[name] = query

    def begin_forward(self, denoiser: nn.Module, args: tuple, kwargs: dict) -> None:
        """A hook before each forward of the denoiser, a UNet or a transformer."""
        latents = args[0] if args else kwargs["sample" if "sample" in kwargs else "hidden_states"]
        self._latent_size = tuple(latents.shape[-2:])
        if self.recording:
            self._features = CrossAttentionFeatures()

    def end_forward(self, *_) -> None:
        """A hook after each forward of the denoiser, also after an error."""
        self._latent_size = None


def _watched_scores(layer: Attention, name: str, store: CrossAttentionStore) -> Callable[..., Tensor]:
    """A layer's `get_attention_scores`, which hands its probabilities and queries to a store.

    The math is the same whether or not the store records: gradient checkpointing compares the two runs of a layer.
    """
    compute = layer.get_attention_scores

    def get_attention_scores(query: Tensor, key: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is not None and layer.upcast_attention:
            attention_mask = attention_mask.float()
        probs = compute(query, key, attention_mask)
        mean = probs.unflatten(0, (-1, layer.heads)).mean(1, dtype=torch.float32)
        store.add(name, mean, query.unflatten(0, (-1, layer.heads)))
        return probs

    return get_attention_scores


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
    """
    sizes = sorted(set(resolutions.values()), key=math.prod, reverse=True)
    quarter = math.prod(sizes[0]) / 16
    return min(sizes, key=lambda size: abs(math.log(math.prod(size) / quarter)))


def _level_of_blocks(unet: nn.Module) -> dict[str, int]:
    """How often the latents' sides are halved in front of each block of a UNet, by the beginning of its layers' names.
    """
    levels, level = {}, 0
    for i, block in enumerate(unet.down_blocks):
        levels[f"down_blocks.{i}."] = level
        level += block.downsamplers is not None
    levels["mid_block."] = level
    for i, block in enumerate(unet.up_blocks):
        levels[f"up_blocks.{i}."] = level
        level -= block.upsamplers is not None
    return levels


class CrossAttentionCapture:
    """The cross-attention layers of a UNet, not a DDP wrapper, found once; capturing them is then switched without a
    walk. A ValueError if there are none.
    """

    def __init__(self, unet: nn.Module) -> None:
        self._unet, self.layers = unet, find_cross_attention_layers(unet)

    def phrase_map_layers(self, latent_size: tuple[int, int]) -> list[str]:
        """The layers that phrase maps are made of, for latents of (H, W), known without a forward."""
        levels, resolutions = _level_of_blocks(self._unet), {}
        for name in self.layers:
            height, width = latent_size
            for _ in range(next(level for start, level in levels.items() if name.startswith(start))):
                height, width = math.ceil(height / 2), math.ceil(width / 2)
            resolutions[name] = height, width
        chosen = phrase_map_resolution(resolutions)
        return [name for name, own in resolutions.items() if own == chosen]

    @contextmanager
    def store(self, names: Collection[str] | None = None) -> Iterator[CrossAttentionStore]:
        """Inside, the layers, or those of these names alone, have the stock processor with an explicit softmax, and
        hand over what it computes; the former processors come back on exit, also after an error. The store of the
        context is not recording yet.

        Raises ValueError: a layer's processor is not a stock one (sliced, fused, xformers, IP-Adapter, custom
        diffusion), or it is captured already.
        """
        layers = self.layers if names is None else {name: self.layers[name] for name in names}
        for name, layer in layers.items():
            if "get_attention_scores" in vars(layer):
                raise ValueError(f"{name} is captured already: leave the other capture first")
            if type(layer.processor) not in (AttnProcessor, AttnProcessor2_0):
                kind = type(layer.processor).__name__
                remedy = next(words for start, words in _REMEDIES.items() if kind.startswith(start))
                raise ValueError(f"{name} has a {kind}, whose attention cannot be captured: {remedy} first")
        store = CrossAttentionStore()
        with ExitStack() as stack:
            stack.callback(self._unet.register_forward_pre_hook(store.begin_forward, with_kwargs=True).remove)
            stack.callback(self._unet.register_forward_hook(store.end_forward, always_call=True).remove)
            for name, layer in layers.items():
                stack.callback(layer.set_processor, layer.processor)
                layer.set_processor(AttnProcessor())
                # Once, and not in each forward: what a forward sets and deletes cannot be compiled.
                layer.get_attention_scores = _watched_scores(layer, name, store)
                stack.callback(vars(layer).pop, "get_attention_scores")
            yield store


def capture_cross_attention(unet: nn.Module) -> AbstractContextManager[CrossAttentionStore]:
    """`CrossAttentionCapture.store`, for a UNet that is captured once."""
    return CrossAttentionCapture(unet).store()
