"""How the training script is run on the toy world: one set of flags for every target, demo and benchmark alike.

Source: [ours].
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


HERE = Path(__file__).resolve().parent
BASE_MODEL = HERE / "base_model"
CLIP = BASE_MODEL / "clip"  # judges, whatever the base


class ToyBase(NamedTuple):
    """A model that knows this world: its folder, what it is, and the sampler that lies beside it."""

    folder: Path
    title: str
    sampler: str


BASES = {
    "sd": ToyBase(BASE_MODEL, "toy Stable Diffusion", "DDIM"),
    "sdxl": ToyBase(HERE / "base_model_xl", "toy Stable Diffusion XL", "Euler"),
    "sd3": ToyBase(HERE / "base_model_3", "toy Stable Diffusion 3", "FlowMatchEuler"),
}
LORA = HERE / "loras" / "blonde_hair"  # what the flags below make of the training set blonde_hair
# A model this small takes a higher learning rate than Stable Diffusion; all else of the method is its default.
FLAGS = (
    "--resolution", "64", "--train_batch_size", "8", "--learning_rate", "2e-3", "--alignment_inference_steps", "15",
)  # fmt: skip


def training_flags(target: str, base: str = "sd") -> list[str]:
    """Flags that train one of `BASES` on one of `world.TARGETS`; steps, seed and output are the caller's."""
    paths = ["--pretrained_model_name_or_path", str(BASES[base].folder), "--clip_model_name_or_path", str(CLIP)]
    return [*paths, "--train_data_dir", str(HERE / target), *FLAGS]
