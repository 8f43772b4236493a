"""Capturing the joint attention of Stable Diffusion 3: what an image token's query says to the text alone. [ours]

A captured layer keeps its own computation, to the bit. Beside it the softmax of its image queries over its text keys
is computed, which is the joint softmax over the text's columns, divided by what the image has of it; the joint one of
all tokens with all is never built.

Legend: B batch, H/W latent size, S image tokens of a layer, T text tokens, N heads, D head dim.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from torch import Tensor, nn


# The sibling as a module of the package that a custom pipeline is, or as a module on the path.
try:
    from . import attention_processors
except ImportError:
    import attention_processors as attention_processors

CrossAttentionStore = attention_processors.CrossAttentionStore
# By the beginning of a processor's name, what puts the stock one back.
_REMEDIES = {
    "SD3IPAdapter": "call pipeline.unload_ip_adapter()",
    "Fused": "call transformer.unfuse_qkv_projections()",
    "": "call transformer.set_attn_processor(JointAttnProcessor2_0())",
}


def text_attention(query: Tensor, key: Tensor) -> Tensor:
    """(B, S, T) float32, mean over heads: softmax of image queries (B, N, S, D) over text keys (B, N, T, D) alone.

    It is the joint attention of these rows, renormalised over the text.
    """
    scale, total = query.shape[-1] ** -0.5, 0
    # One head after the other: the scores of all at once would be by far the largest tensor of a forward.
    for own, others in zip(query.unbind(1), key.unbind(1)):
        total = total + (scale * own.float() @ others.float().mT).softmax(-1)
    return total / query.shape[1]


def phrase_map_blocks(count: int) -> range:
    """Of so many blocks those whose attention makes phrase maps: the middle third.

    All have one resolution. The first know little of the picture, and the last draw its details.
    """
    return range(count // 3, count - count // 3)


def find_joint_attention_layers(transformer: nn.Module) -> dict[str, Attention]:
    """The layers in which image and text attend to each other, by module name in forward order; not a DDP wrapper.

    SD3.5's second attention of a block, of the image alone, is none of them. Raises ValueError: there are none.
    """
    layers = {
        name: module
        for name, module in transformer.named_modules()
        if re.fullmatch(r"transformer_blocks\.\d+\.attn", name)
        and isinstance(module, Attention)
        and getattr(module, "add_k_proj", None) is not None
    }
    if not layers:
        kind = type(transformer).__name__
        raise ValueError(f"{kind} has no joint attention layer (no module named 'transformer_blocks.*.attn')")
    return layers


class _Overheard:
    """A layer as its processor sees it, which remembers the image's queries and the text's keys."""

    def __init__(self, layer: Attention) -> None:
        self._layer = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def to_q(self, hidden_states: Tensor) -> Tensor:
        self.query = self._layer.to_q(hidden_states)
        return self.query

    def add_k_proj(self, encoder_hidden_states: Tensor) -> Tensor:
        self.key = self._layer.add_k_proj(encoder_hidden_states)
        return self.key

    def scored(self) -> tuple[Tensor, Tensor]:
        """(B, N, S, D) queries and (B, N, T, D) keys as they enter the scores."""
        layer, found = self._layer, []
        for projected, norm in ((self.query, layer.norm_q), (self.key, layer.norm_added_k)):
            heads = projected.unflatten(-1, (layer.heads, -1)).transpose(1, 2)
            found.append(heads if norm is None else norm(heads))
        return tuple(found)


class _CapturingProcessor:
    """The stock processor, which also hands what the text is to the image to a store."""

    def __init__(self, stock: JointAttnProcessor2_0, name: str, store: CrossAttentionStore) -> None:
        self._stock, self._name, self._store = stock, name, store

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args,
        **kwargs,
    ) -> Tensor | tuple[Tensor, Tensor]:
        overheard = _Overheard(attn)
        output = self._stock(overheard, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)
        # With gradient always: gradient checkpointing compares the two runs of a layer, of which one is recorded.
        if self._store.listening or torch.is_grad_enabled():
            query, key = overheard.scored()
            self._store.add(self._name, text_attention(query, key), query)
        return output


class JointAttentionCapture:
    """The joint attention layers of a transformer, not a DDP wrapper, found once; capturing them is then switched
    without a walk. A ValueError if there are none.

    What is captured is `CrossAttentionFeatures`, with the attention of `text_attention`: (B, S, T), T the positions
    of CLIP's text and behind them those of T5's.
    """

    def __init__(self, transformer: nn.Module) -> None:
        self._transformer, self.layers = transformer, find_joint_attention_layers(transformer)

    def phrase_map_layers(self, latent_size: tuple[int, int]) -> list[str]:
        """The layers that phrase maps are made of, the same for latents of any (H, W)."""
        names = list(self.layers)
        return [names[i] for i in phrase_map_blocks(len(names))]

    @contextmanager
    def store(self, names: Collection[str] | None = None) -> Iterator[CrossAttentionStore]:
        """Inside, the layers of these names, by default those of phrase maps, hand over their attention to the text;
        what they compute stays the same, to the bit. The former processors come back on exit, also after an error.
        The store of the context is not recording yet.

        Raises ValueError: a layer's processor is not the stock one (IP-Adapter, fused, perturbed guidance), or it is
        captured already.
        """
        layers = {name: self.layers[name] for name in (self.phrase_map_layers((0, 0)) if names is None else names)}
        for name, layer in layers.items():
            kind = type(layer.processor).__name__
            if kind == _CapturingProcessor.__name__:
                raise ValueError(f"{name} is captured already: leave the other capture first")
            if type(layer.processor) is not JointAttnProcessor2_0:
                remedy = next(words for start, words in _REMEDIES.items() if kind.startswith(start))
                raise ValueError(f"{name} has a {kind}, whose attention cannot be captured: {remedy} first")
        store = CrossAttentionStore()
        with ExitStack() as stack:
            stack.callback(self._transformer.register_forward_pre_hook(store.begin_forward, with_kwargs=True).remove)
            stack.callback(self._transformer.register_forward_hook(store.end_forward, always_call=True).remove)
            for name, layer in layers.items():
                stack.callback(layer.set_processor, layer.processor)
                layer.set_processor(_CapturingProcessor(layer.processor, name, store))
            yield store


def capture_joint_attention(transformer: nn.Module) -> AbstractContextManager[CrossAttentionStore]:
    """`JointAttentionCapture.store` of the layers of phrase maps, for a transformer that is captured once."""
    return JointAttentionCapture(transformer).store()
