"""What a step's switches cost in Python, on a UNet of Stable Diffusion 1.5's size: `python benchmarks/switch_cost.py`.

Adapters on and off, the dropout of the one in training, and the capture of cross-attention: with the layers found
once, as the training does, and found anew by each switch. Nothing is computed, and the UNet has no weights.

Source: [ours].
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import median

import torch
from peft import LoraConfig


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adapters import Adapters, active_adapters  # noqa: E402
from attention_processors import CrossAttentionCapture, capture_cross_attention  # noqa: E402
from benchmarks.random_stable_diffusion import make_unet  # noqa: E402


TARGETS = ["attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"]
Switch = Callable[[], AbstractContextManager[object]]


def make_adapted_unet() -> torch.nn.Module:
    """The UNet with the LoRA in training and the frozen one beside it."""
    with torch.device("meta"):
        unet = make_unet().requires_grad_(False)
        for name in ("default", "stage1"):
            unet.add_adapter(LoraConfig(r=16, target_modules=TARGETS, lora_dropout=0.1), name)
    unet.set_adapter("default")
    return unet.eval()


def milliseconds(switches: list[Switch], repeats: int = 50) -> float:
    """Median time to go into the contexts, one after the other, and out of them again."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for switch in switches:
            with switch():
                pass
        times.append(1000 * (time.perf_counter() - start))
    return median(times)


def main() -> None:
    """Print a line for each switch, and for the switches of a step."""
    unet = make_adapted_unet()
    adapters, capture = Adapters(unet), CrossAttentionCapture(unet)
    off, teacher, trained = (lambda name=name: adapters.only(name) for name in (None, "stage1", "default"))
    rows: dict[str, list[Switch]] = {
        "adapters off": [off],
        "one row each": [lambda: adapters.per_sample(["__base__", "default"])],
        "dropout": [lambda: adapters.dropout("default")],
        "capture": [capture.store],
        "a composed step (dropout, off, teacher)": [lambda: adapters.dropout("default"), off, teacher],
        "a paper step (dropout, capture, off, on)": [lambda: adapters.dropout("default"), capture.store, off, trained],
        "found anew: adapters off": [lambda: active_adapters(unet, None)],
        "found anew: capture": [lambda: capture_cross_attention(unet)],
    }
    print(f"{len(adapters.layers)} layers with adapters, {len(capture.layers)} of cross-attention")
    for name, switches in rows.items():
        print(f"{name:45} {milliseconds(switches):8.2f} ms")


if __name__ == "__main__":
    main()
