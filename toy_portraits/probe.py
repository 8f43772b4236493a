"""The probe: a small network that reads factors and a label mask off a 64x64 portrait, drawn or generated.

It judges every toy experiment, so it is trained on renders and on their reconstructions by the toy VAE: generated
portraits show the VAE's traces too. Legend: B portraits, L label classes.
Source: [ours].
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .world import BACKGROUNDS, CLOTHES, EYE_COLORS, HAIR_COLORS, LABELS, SEXES, SKINS


CLASS_FACTORS = {
    "sex": len(SEXES),
    "skin": len(SKINS),
    "hair_color": len(HAIR_COLORS),
    "clothes": len(CLOTHES),
    "background": len(BACKGROUNDS),
    "glasses": 2,
    "hat": 2,
    "eye_color": len(EYE_COLORS),
}
# Geometric factors in pixels, with the mean and spread that bring them near unit scale.
PIXEL_FACTORS = {"head_x": (0.0, 3.0), "head_y": (0.0, 2.0), "face_width": (11.8, 1.0), "hair_length": (7.0, 7.0)}


class PortraitProbe(nn.Module):
    """Segmentation and factors from one convolutional trunk."""

    def __init__(self, width: int = 24):
        super().__init__()

        def conv(c_in: int, c_out: int, stride: int = 1) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)
            )

        self.stem = conv(3, width)
        self.down1 = nn.Sequential(conv(width, 2 * width, 2), conv(2 * width, 2 * width))
        self.down2 = nn.Sequential(conv(2 * width, 3 * width, 2), conv(3 * width, 3 * width))
        self.down3 = nn.Sequential(conv(3 * width, 4 * width, 2), conv(4 * width, 4 * width))
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        self.merge2 = conv(7 * width, 2 * width)
        self.merge1 = conv(4 * width, width)
        self.mask_head = nn.Conv2d(2 * width, len(LABELS), 3, 1, 1)
        self.class_heads = nn.ModuleDict({name: nn.Linear(4 * width * 16, n) for name, n in CLASS_FACTORS.items()})
        self.pixel_head = nn.Linear(4 * width * 16, len(PIXEL_FACTORS))

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Read portraits.

        Args:
            images: (B, 3, 64, 64), float in [-1, 1].

        Returns:
            Logits (B, classes) per discrete factor, "mask" logits (B, L, 64, 64), and each geometric factor (B,) in
            pixels.
        """
        x0 = self.stem(images)
        x1 = self.down1(x0)
        x2 = self.down2(x1)
        x3 = self.down3(x2)
        up2 = self.merge2(torch.cat([self.up(x3), x2], 1))
        up1 = self.merge1(torch.cat([self.up(up2), x1], 1))
        out = {"mask": self.mask_head(torch.cat([self.up(up1), x0], 1))}
        flat = nn.functional.adaptive_avg_pool2d(x3, 4).flatten(1)
        for name, head in self.class_heads.items():
            out[name] = head(flat)
        for (name, (mean, spread)), value in zip(PIXEL_FACTORS.items(), self.pixel_head(flat).unbind(1)):
            out[name] = value * spread + mean
        return out

    def save_pretrained(self, folder: str | Path, accuracy: dict[str, float]) -> None:
        """Write the weights and the held-out accuracy beside them."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, Path(folder) / "probe.safetensors")
        (Path(folder) / "accuracy.json").write_text(json.dumps(accuracy, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> PortraitProbe:
        """Load the probe in evaluation mode."""
        probe = cls()
        probe.load_state_dict(load_file(Path(folder) / "probe.safetensors"))
        return probe.eval().requires_grad_(False)
