"""Capturing cross-attention, and the two paths over one set of UNet weights.

A captured layer computes an explicit softmax, because its probabilities are wanted; every other layer keeps its own
processor. The Reference Path is the UNet with its adapters off, the Response Path the same UNet with one adapter on.

Legend: B batch, C latent channels, H/W latent size, S = h*w image tokens of a layer, T text tokens, N heads,
D head dim, E size of a text embedding.
Paper: arXiv 2504.00396.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn


DUAL_PATH_MODES = ("two_pass", "single_pass")
BASE_ROW = "__base__"  # peft's name for "no adapter" in a batch of mixed adapters


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
        return CrossAttentionFeatures(
            {name: probs[start:stop] for name, probs in self.attention_probs.items()},
            {name: query[start:stop] for name, query in self.queries.items()},
            dict(self.resolutions),
        )

    def at_resolution(self, resolution: tuple[int, int]) -> CrossAttentionFeatures:
        """Only the layers of that (h, w); empty if there are none."""
        names = [name for name, size in self.resolutions.items() if size == tuple(resolution)]
        return CrossAttentionFeatures(
            {name: self.attention_probs[name] for name in names},
            {name: self.queries[name] for name in names},
            {name: self.resolutions[name] for name in names},
        )

    def detach(self) -> CrossAttentionFeatures:
        """The same features without gradient."""
        return CrossAttentionFeatures(
            {name: probs.detach() for name, probs in self.attention_probs.items()},
            {name: query.detach() for name, query in self.queries.items()},
            dict(self.resolutions),
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
        """Hand out the features of the last recorded forward, and forget them.

        Raises:
            RuntimeError: nothing was recorded since the last `pop`.
        """
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

    Args:
        name: of the layer, under which its features are stored.
        store: that receives them.

    Source: [ours].
    """

    def __init__(self, name: str, store: CrossAttentionStore) -> None:
        self.name = name
        self.store = store

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
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
                attn.to_q(hidden_states),
                attn.to_k(encoder_hidden_states),
                attn.to_v(encoder_hidden_states),
            )
        )
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
    """The UNet's text cross-attention layers.

    Args:
        unet: a `UNet2DConditionModel`, not a DDP wrapper.

    Returns:
        Layers by module name, in forward order: down, middle, up.

    Raises:
        ValueError: the model has none.

    Source: [ours].
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

    The largest resolution stands for the latent's. If no layer has a quarter of its side, the nearest one (in ratio,
    the larger of two equally near) is taken.

    Args:
        resolutions: (h, w) by layer name, as captured.

    Returns:
        One of them.

    Raises:
        ValueError: `resolutions` is empty.

    Source: [ours].
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


@contextmanager
def capture_cross_attention(
    unet: nn.Module, layer_names: Sequence[str] | None = None
) -> Iterator[CrossAttentionStore]:
    """Install capturing processors on cross-attention layers; the former ones come back on exit, also after an error.

    Args:
        unet: a `UNet2DConditionModel`, not a DDP wrapper.
        layer_names: names from `find_cross_attention_layers`, default all.

    Returns:
        A context with a `CrossAttentionStore`, which is not recording yet.

    Raises:
        ValueError: an unknown layer name, no layer at all, or a layer whose processor is not a stock one (sliced,
            fused, xformers, IP-Adapter, custom diffusion).

    Source: [ours].
    """
    layers = find_cross_attention_layers(unet)
    if layer_names is not None:
        unknown = [name for name in layer_names if name not in layers]
        if unknown or not layer_names:
            raise ValueError(
                f"unknown cross-attention layers {unknown} in {list(layer_names)}; there are {list(layers)}"
            )
        layers = {name: layer for name, layer in layers.items() if name in layer_names}
    for name, layer in layers.items():
        _check_capturable(name, layer)

    store = CrossAttentionStore()

    def before_forward(module: nn.Module, args: tuple, kwargs: dict) -> None:
        sample = args[0] if args else kwargs["sample"]
        store.begin_forward(tuple(sample.shape[-2:]))

    def after_forward(module: nn.Module, args: tuple, output: object) -> None:
        store.end_forward()

    processors = unet.attn_processors
    capturing = {f"{name}.processor": CapturingAttnProcessor(name, store) for name in layers}
    hooks = []
    try:
        hooks.append(unet.register_forward_pre_hook(before_forward, with_kwargs=True))
        hooks.append(unet.register_forward_hook(after_forward, always_call=True))
        unet.set_attn_processor({**processors, **capturing})
        yield store
    finally:
        for hook in hooks:
            hook.remove()
        unet.set_attn_processor(dict(processors))  # a copy, for it is emptied by the call


def _adapter_layers(unet: nn.Module, names: Sequence[str]) -> list[BaseTunerLayer]:
    """The layers that hold adapters, once it is sure that they hold the named ones and that none is merged."""
    layers = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
    known = list(getattr(unet, "peft_config", {}))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"unknown adapters {unknown}; the UNet has {known}")
    if any(layer.merged for layer in layers):
        raise ValueError(f"A LoRA is fused into the weights of {type(unet).__name__}: call `unfuse_lora()` first.")
    if any(isinstance(module, AuxiliaryTrainingWrapper) for module in unet.modules()):
        raise ValueError(
            f"An adapter of {type(unet).__name__} replaces whole modules (`modules_to_save`), which cannot be turned "
            "off for a part of a batch: use one without them."
        )
    return layers


@contextmanager
def _adapter_state(layers: Sequence[BaseTunerLayer], names: Sequence[str] | None) -> Iterator[None]:
    """Exactly `names` active inside (None: as they are, but switched on; empty: all off).

    peft's switches set requires_grad on what they activate and clear it elsewhere; here the flags stay as they were,
    inside too.
    """
    flags = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    states = [(layer, layer.active_adapters, layer.disable_adapters) for layer in layers]

    def restore_flags() -> None:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

    try:
        for layer, active, _ in states:
            layer.set_adapter(list(active if not names else names))
            layer.enable_adapters(names is None or len(names) > 0)
        restore_flags()
        yield
    finally:
        for layer, active, disabled in states:
            layer.set_adapter(list(active))
            layer.enable_adapters(not disabled)
        restore_flags()


@contextmanager
def active_adapters(unet: nn.Module, names: str | Sequence[str] | None) -> Iterator[None]:
    """Exactly these adapters active inside; state and requires_grad flags are as before on exit, also after an error.

    The flags do not change inside either: activating a frozen adapter leaves it frozen.

    Args:
        unet: with or without adapters, not a DDP wrapper.
        names: of the adapters; None switches all of them off.

    Raises:
        ValueError: an unknown adapter, or adapters merged into the weights.

    Source: [ours] the Reference Path is the UNet with all adapters off.
    """
    names = [names] if isinstance(names, str) else list(names or ())
    with _adapter_state(_adapter_layers(unet, names), names):
        yield


@contextmanager
def adapters_per_sample(unet: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Each batch row goes through its own adapter. Works in training; a backward under checkpointing must run inside.

    Args:
        unet: with LoRA adapters, not a DDP wrapper.
        names: one adapter name per batch row, "__base__" for none.

    Raises:
        ValueError: an unknown adapter, a UNet without adapters, or adapters merged into the weights; from the forward,
            a batch whose size is not `len(names)`.

    Source: [ours].
    """
    names = list(names)
    layers = _adapter_layers(unet, [name for name in names if name != BASE_ROW])
    if not layers:
        raise ValueError("the UNet has no adapter: adapters_per_sample has nothing to choose from")

    def pass_adapter_names(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, {**kwargs, "adapter_names": names}

    # A layer whose adapters are switched off ignores `adapter_names`.
    with _adapter_state(layers, None):
        hooks = []
        try:
            for layer in layers:
                hooks.append(layer.register_forward_pre_hook(pass_adapter_names, with_kwargs=True))
            yield
        finally:
            for hook in hooks:
                hook.remove()


@contextmanager
def original_rows(model: nn.Module, rows: Callable[[int], Iterable[int]]) -> Iterator[None]:
    """Inside, the adapters of `model` leave some rows of each batch as the original model has them.

    Every row goes through the adapters that are active; then the chosen rows are taken from the layer below. Unlike
    `adapters_per_sample` this works with several active adapters, with DoRA and for a text encoder; without gradient,
    and uncompiled.

    Args:
        model: with or without adapters.
        rows: chooses the rows from the size of a batch; asked once for each size.

    Raises:
        ValueError: an adapter is merged into the weights, so that the layer below is not the original, or replaces
            whole modules.

    Source: [ours].
    """
    layers = _adapter_layers(model, ())

    @cache
    def choose(batch_size: int, device: torch.device) -> Tensor:
        return torch.tensor(list(rows(batch_size)), dtype=torch.long, device=device)

    def restore(layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
        # Indices from a list would be copied to the device, and waited for, in each layer.
        chosen = choose(len(output), output.device)
        if len(chosen):
            output[chosen] = layer.base_layer(args[0][chosen]).to(output.dtype)
        return output

    with ExitStack() as stack:
        # A compiled graph knows nothing of the hooks, or, compiled here, would keep them for later calls.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for layer in layers:
            stack.callback(layer.register_forward_hook(restore).remove)
        yield


@contextmanager
def adapter_scales(model: nn.Module, factors: Mapping[str, float]) -> Iterator[None]:
    """Inside, the strength of each named adapter is multiplied by a factor.

    Args:
        model: with or without adapters; names it does not have are left to the caller.
        factors: by adapter name.

    Raises:
        ValueError: an adapter is merged into the weights, or of a kind that has no strength.

    Source: [ours].
    """
    layers = _adapter_layers(model, ())
    if not all(hasattr(layer, "scaling") for layer in layers):
        raise ValueError(f"An adapter of {type(model).__name__} is no LoRA and has no strength that could be scaled.")
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            layer.scaling.update({name: value * factors.get(name, 1.0) for name, value in layer.scaling.items()})
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)


@dataclass
class DualPathOutput:
    """Both paths' predictions and, with a store, their features.

    Args:
        reference_pred: (B, C, H, W), detached.
        response_pred: (B, C, H, W), gradient flows.
        reference: detached, None without a store.
        response: gradient flows, None without a store.
    """

    reference_pred: Tensor
    response_pred: Tensor
    reference: CrossAttentionFeatures | None
    response: CrossAttentionFeatures | None


@contextmanager
def dual_path(
    unet: nn.Module,
    noisy_latents: Tensor,
    timesteps: Tensor,
    reference_hidden_states: Tensor,
    response_hidden_states: Tensor,
    *,
    adapter_name: str = "default",
    mode: str = "two_pass",
    store: CrossAttentionStore | None = None,
    response_unet: nn.Module | None = None,
) -> Iterator[DualPathOutput]:
    """Run the Reference Path (adapters off) and the Response Path (one adapter on) on the same noisy latents.

    Compute the loss and call `backward` inside the context: gradient checkpointing runs layers again in the backward,
    and they must find the adapters as the forward found them.

    Args:
        unet: with the adapter, not a DDP wrapper.
        noisy_latents: (B, C, H, W).
        timesteps: (B,), or one for all rows.
        reference_hidden_states: (B, T, E) of the base prompts.
        response_hidden_states: (B, T, E) of the full prompts.
        adapter_name: of the Response Path.
        mode: "two_pass" (reference first, without gradient) or "single_pass" (one batch of 2B rows; more memory).
        store: of a `capture_cross_attention` around this call, to record features in the forward.
        response_unet: the DDP wrapper around `unet` for the forward that has a gradient, default `unet`.

    Returns:
        A context with a `DualPathOutput`.

    Raises:
        ValueError: an unknown mode or adapter, or adapters merged into the weights.
        RuntimeError: a `store` that does not belong to `unet`.

    Source: [paper] the two paths share weights, latents and timesteps; [ours] the batched pass.
    """
    if mode not in DUAL_PATH_MODES:
        raise ValueError(f"mode must be one of {DUAL_PATH_MODES}, got {mode!r}")
    response_unet = unet if response_unet is None else response_unet

    def predict(
        model: nn.Module, latents: Tensor, steps: Tensor, states: Tensor
    ) -> tuple[Tensor, CrossAttentionFeatures | None]:
        with store.record() if store is not None else nullcontext():
            pred = model(latents, steps, encoder_hidden_states=states, return_dict=False)[0]
        return pred, store.pop() if store is not None else None

    if mode == "two_pass":
        with active_adapters(unet, None), torch.no_grad():
            reference_pred, reference = predict(unet, noisy_latents, timesteps, reference_hidden_states)
        with active_adapters(unet, adapter_name):
            response_pred, response = predict(response_unet, noisy_latents, timesteps, response_hidden_states)
            yield DualPathOutput(reference_pred, response_pred, reference, response)
        return

    batch_size = noisy_latents.shape[0]
    with adapters_per_sample(unet, [BASE_ROW] * batch_size + [adapter_name] * batch_size):
        pred, features = predict(
            response_unet,
            torch.cat([noisy_latents, noisy_latents]),
            timesteps.reshape(-1).expand(batch_size).repeat(2),
            torch.cat([reference_hidden_states, response_hidden_states]),
        )
        yield DualPathOutput(
            pred[:batch_size].detach(),
            pred[batch_size:],
            None if features is None else features.rows(0, batch_size).detach(),
            None if features is None else features.rows(batch_size, 2 * batch_size),
        )
