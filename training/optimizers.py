"""The optimizers a LoRA can be trained with; those that are not torch's come from packages of their own.

Each is imported where it is made: the names are asked for while flags are read.

Source: [ours].
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import torch


OPTIMIZERS = ("adamw", "prodigy")


def check_optimizer(name: str, use_8bit_adam: bool) -> None:
    """A ValueError if an optimizer's package is not installed, or 8 bits were asked of one that has no such form."""
    if use_8bit_adam and name != "adamw":
        raise ValueError(f"--use_8bit_adam is a form of --optimizer adamw, not of {name}")
    package, flag = ("bitsandbytes", "--use_8bit_adam") if use_8bit_adam else ("prodigyopt", f"--optimizer {name}")
    if (use_8bit_adam or name == "prodigy") and importlib.util.find_spec(package) is None:
        raise ValueError(f"{flag} needs the package {package}: pip install {package}")


def make_optimizer(
    name: str,
    parameters: Sequence[torch.nn.Parameter],
    *,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    epsilon: float,
    use_8bit_adam: bool = False,
) -> torch.optim.Optimizer:
    """Build an optimizer, one of `OPTIMIZERS`, of a list of parameters, which is walked more than once.

    For Prodigy the learning rate is a factor on the rate it finds. An ImportError if its package is not installed.
    """
    options = {"lr": learning_rate, "betas": betas, "weight_decay": weight_decay, "eps": epsilon}
    if use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **options)
    if name == "prodigy":
        from prodigyopt import Prodigy

        # As its authors advise for diffusion models: bias correction, and no estimate of the rate in the warm-up.
        return Prodigy(parameters, **options, use_bias_correction=True, safeguard_warmup=True)
    from torch.optim import AdamW

    return AdamW(parameters, **options)
