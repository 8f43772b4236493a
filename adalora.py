"""AdaLoRA: a LoRA in the form of a singular value decomposition, whose ranks move to the layers that need them.

PEFT's layers and its RankAllocator do the work. PEFT's AdaLoraModel, which would regularise the loss and call the
allocator, is not there when diffusers puts the layers on a UNet; what it does around them is done here. What comes out
is an ordinary LoRA in which each layer has a rank of its own.

Legend: B (out, r) left singular vectors, E (r, 1) singular values, A (r, in) right singular vectors of a layer.
Source: [paper] AdaLoRA, arXiv 2303.10512; PEFT's form of it; [ours] the shares of the steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import AdaLoraConfig
from peft.tuners.adalora import AdaLoraLayer, RankAllocator
from torch import nn


ADAPTER = "default"
INITIAL_RANK = 1.5  # times the rank that is left of it on average
# Shares of the steps: at first no rank is taken away, and at last the ranks stay as they are.
WARM_UP, FINAL = 1 / 8, 1 / 2
MIN_STEPS = 8  # below it the warm-up is none
ORTHOGONAL_WEIGHT = 0.5
_AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def make_config(layers: Sequence[str], *, rank: int, alpha: float, dropout: float, total_steps: int) -> AdaLoraConfig:
    """The configuration of a run.

    Args:
        layers: ends of the names of the layers that get a LoRA.
        rank: what each layer has at the end on average, at least 1; it starts with 1.5 times as many, rounded up.
        alpha: the LoRA's change is scaled by `alpha / rank`, as that of a plain one.
        dropout: in front of the LoRA, in [0, 1).
        total_steps: updates of the run, at least `MIN_STEPS`.

    Returns:
        What `unet.add_adapter` takes.

    Source: [paper] the initial budget, 1.5 times the final one; [ours] the warm-up, an eighth of the steps, and the
        final part, one half of them. Ranks are allocated in each step between.
    """
    initial_rank = math.ceil(INITIAL_RANK * rank)
    return AdaLoraConfig(
        target_modules=list(layers),
        target_r=rank,
        init_r=initial_rank,
        lora_alpha=alpha * initial_rank / rank,  # PEFT divides by the initial rank
        lora_dropout=dropout,
        total_step=total_steps,
        tinit=int(WARM_UP * total_steps),
        tfinal=int(FINAL * total_steps),
        deltaT=1,
        orth_reg_weight=ORTHOGONAL_WEIGHT,
    )


def make_allocator(unet: nn.Module) -> RankAllocator:
    """PEFT's allocator for a UNet with an AdaLoRA adapter. Source: PEFT."""
    return RankAllocator(unet, unet.peft_config[ADAPTER], ADAPTER)


def orthogonal_loss(unet: nn.Module) -> torch.Tensor:
    """How far the singular vectors are from being orthonormal: the layers' mean of ||B'B - I|| and ||AA' - I||.

    Args:
        unet: with an AdaLoRA adapter.

    Returns:
        (), without its weight; gradient flows into A and B.

    Source: [paper] the regularizer; PEFT, which takes the norms without squares and their mean.
    """
    norms = []
    for _, layer in _layers(unet):
        for vectors in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER].T):
            products = vectors @ vectors.T
            norms.append(torch.linalg.matrix_norm(products - torch.eye(len(products), device=products.device)))
    return torch.stack(norms).mean()


def allocate_ranks(allocator: RankAllocator, unet: nn.Module, step: int, updated: bool = True) -> None:
    """Set the singular values to zero that matter least. Call it after the update, while the gradients are there.

    Args:
        allocator: of `make_allocator`; knows the steps' number and their shares.
        unet: that the allocator was made for.
        step: updates done, this one included; counts from 1.
        updated: False where an update was left out because its gradients were not finite.

    Raises:
        FloatingPointError: it is time to choose the ranks that stay, and no update has said which matter.

    Source: [paper] importance of singular values and budget; PEFT's allocator, called as PEFT's AdaLoraModel calls it.
    """
    config = allocator.peft_config
    last_allocation = config.total_step - config.tfinal
    if step < last_allocation and not updated:
        return  # the weights are as they were, and such gradients would spoil the averages for good
    if step > last_allocation:
        allocator.mask_using_rank_pattern(unet, config.rank_pattern)
        return
    if step == last_allocation and not allocator.exp_avg_ipt:
        raise FloatingPointError(
            f"the gradients of none of {step} steps were finite, so nothing tells which ranks matter; "
            "--mixed_precision bf16 instead of fp16, or more --stage1_steps, usually helps"
        )
    _, pattern = allocator.update_and_allocate(unet, step, force_mask=step == last_allocation)
    if pattern is not None:
        config.rank_pattern = pattern
    if step == last_allocation:
        allocator.reset_ipt()


@torch.no_grad()
def fold(unet: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The ordinary LoRA that an AdaLoRA adapter is now.

    Args:
        unet: with the adapter.

    Returns:
        By layer, its down (k, in) and up (out, k), of a convolution (k, in, h, w) and (out, k, 1, 1), whose product is
        what the layer adds: alpha is k, the singular values that are left, and in `up` are they and PEFT's scale.
        Layers of which none is left are not there.

    Source: [ours].
    """
    pattern, folded = unet.peft_config[ADAPTER].rank_pattern, {}
    for name, layer in _layers(unet):
        down, up, values = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER], layer.lora_E[ADAPTER]
        scale = layer.scaling[ADAPTER] / (layer.ranknum[ADAPTER] + 1e-5).float()  # as in the layer's forward
        up = up * (values.T * scale)
        if pattern is not None:
            kept = torch.tensor(pattern[f"{name}.lora_E.{ADAPTER}"], device=up.device)
            down, up = down[kept], up[:, kept]
        weight = layer.get_base_layer().weight
        down, up = down.unflatten(1, weight.shape[1:]), up[(..., *[None] * (weight.ndim - 2))]
        if len(down):
            folded[name] = (down.contiguous(), up.contiguous())
    return folded


def training_state(allocator: RankAllocator, unet: nn.Module) -> dict[str, Any]:
    """What a run needs to go on: the weights, the importance of each of them, and which ranks are left."""
    return {
        "weights": dict(_weights(unet)),
        "averages": {name: getattr(allocator, name) for name in _AVERAGES},
        "rank_pattern": allocator.peft_config.rank_pattern,
    }


@torch.no_grad()
def load_training_state(allocator: RankAllocator, unet: nn.Module, state: dict[str, Any]) -> None:
    """Put a state of `training_state` into an allocator and a UNet that were made anew with the same configuration."""
    for name, parameter in _weights(unet):
        parameter.copy_(state["weights"][name])
    device = parameter.device
    for name in _AVERAGES:
        setattr(allocator, name, {key: value.to(device) for key, value in state["averages"][name].items()})
    allocator.peft_config.rank_pattern = state["rank_pattern"]


def _layers(unet: nn.Module) -> Iterator[tuple[str, AdaLoraLayer]]:
    return ((name, layer) for name, layer in unet.named_modules() if isinstance(layer, AdaLoraLayer))


def _weights(unet: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A, B, E and the rank that the scale is divided by, of all layers."""
    for name, layer in _layers(unet):
        for kind in ("lora_A", "lora_B", "lora_E", "ranknum"):
            yield f"{name}.{kind}", getattr(layer, kind)[ADAPTER]
