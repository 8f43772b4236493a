"""How much of the target portraits show, as CLIP sees it, and how strong a LoRA must be for so much. [ours]

Legend: H'/W' size in pixels, E' size of a projected CLIP embedding.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPModel

from adapters import adapter_scales
from programs.console import phase_bar
from programs.loading import load_tokenizer, naming_flag
from training.alignment_prompts import vary_colors
from training.arguments import Flags
from training.inputs import Inputs
from training.models import Models
from training.portraits import draw_latents
from training.prompt_table import embed_pixels, embed_targets
from training.training_set import derive_seed


logger = get_logger(__name__)

# A LoRA is looked at with these strengths. Beyond, it has been trained for something else.
STRENGTHS = (0.5, 0.7, 1.0, 1.4, 2.0)
PROBES, PROBE_STEPS = 64, 10  # portraits that are drawn with each, and their denoising steps
# Differences of similarities below it are within what CLIP tells of any two sets of portraits.
LEAST_DIFFERENCE = 0.01


@dataclass(frozen=True)
class Found:
    """The strength that a presence asks for, and the presence at each that was tried."""

    strength: float
    tried: dict[float, float]

    @property
    def most(self) -> float:
        """The highest presence that was seen."""
        return max(self.tried.values())

    def __str__(self) -> str:
        return ", ".join(f"{presence:.2f} at {strength:g}" for strength, presence in sorted(self.tried.items()))


def find_strength(presence_at: Callable[[float], float], wanted: float) -> Found:
    """The least strength with a presence, on the line between the two of `STRENGTHS` that it lies between.

    They are tried from 1 on, upwards or downwards. Where none reaches it, the one that comes nearest is taken, since a
    LoRA that is stronger yet ruins portraits; where all do, the least.
    """
    place = STRENGTHS.index(1.0)
    tried = {1.0: presence_at(1.0)}
    rising = tried[1.0] < wanted
    while (tried[STRENGTHS[place]] < wanted) == rising:
        before, place = place, place + (1 if rising else -1)
        if not 0 <= place < len(STRENGTHS):
            return Found(max(tried, key=tried.get) if rising else STRENGTHS[0], tried)
        tried[STRENGTHS[place]] = presence_at(STRENGTHS[place])
    first, last = STRENGTHS[before], STRENGTHS[place]
    share = (wanted - tried[first]) / (tried[last] - tried[first])
    return Found(first + share * (last - first), tried)


class Presence:
    """Draws portraits with a LoRA, and says how much of the target they show: 0 is what the original model's portraits
    of the base prompts show from the same noise, 1 what those of stage 1 do.

    Both by the mean cosine similarity of CLIP's embeddings of portrait and target. Training portraits would be no
    measure of 1: they may be liked differently by CLIP for what is not the target, as photographs are.

    Attributes:
        original, stage1: these similarities, once they are measured.

    Raises InputError: weights are missing, damaged or a pickle.
    """

    def __init__(self, flags: Flags, inputs: Inputs, models: Models, accelerator: Accelerator) -> None:
        self._flags, self._models, self._accelerator = flags, models, accelerator
        name, where = flags.model.clip_model_name_or_path, {"cache_dir": flags.model.cache_dir}
        self._clip = load_clip(flags).requires_grad_(False).eval()
        # Whole prompts, as people write them: with phrases left out, as in the alignment, a target shows more easily.
        rows = [i for i in range(len(inputs.rows)) if inputs.buckets[i] == inputs.buckets[0]]
        rng, variation = np.random.default_rng((flags.loop.seed, 5)), flags.alignment.alignment_color_variation
        chosen = [rows[i * len(rows) // PROBES] for i in range(PROBES)]  # spread over the data, whatever its order
        self._targets = embed_targets(self._clip, load_tokenizer(name, **where), [inputs.pairs[i] for i in chosen])
        self._see = partial(embed_pixels, self._clip, CLIPImageProcessorPil.from_pretrained(name, **where))
        self._pairs = [vary_colors(inputs.pairs[i], variation, rng) for i in chosen]
        self._size = inputs.sizes[inputs.buckets[0]]
        self.original = self.stage1 = 0.0

    def measure_stage1(self) -> None:
        """See what 0 and 1 are, while the LoRA in training is still stage 1's."""
        with self._models.adapters.only(None):
            self.original = self._drawn([pair.base_prompt for pair in self._pairs])
        with self._models.adapters.only("default"):
            self.stage1 = self._drawn([pair.full_prompt for pair in self._pairs])
        if not self.can_tell:
            logger.warning(
                "--target_presence: CLIP hardly tells stage 1's portraits (%.3f) from the original model's (%.3f) by "
                "the target; the LoRA will stay as strong as it is", self.stage1, self.original,
            )  # fmt: skip

    def state(self) -> dict[str, float]:
        """What a checkpoint of stage 2 has to hold."""
        return {"original": self.original, "stage1": self.stage1}

    def restore(self, state: dict[str, float]) -> None:
        """What was measured before the run was interrupted."""
        self.original, self.stage1 = state["original"], state["stage1"]

    @property
    def can_tell(self) -> bool:
        """Whether CLIP tells stage 1's portraits from the original model's by the target."""
        return self.stage1 - self.original >= LEAST_DIFFERENCE

    def at(self, strength: float) -> float:
        """The presence in portraits of the full prompts, drawn with the LoRA in training so many times as strong."""
        with self._models.adapters.only("default"), adapter_scales(self._models.denoiser, {"default": strength}):
            similarity = self._drawn([pair.full_prompt for pair in self._pairs])
        return (similarity - self.original) / (self.stage1 - self.original)

    @torch.no_grad()
    def _drawn(self, prompts: Sequence[str]) -> float:
        """The mean similarity of portraits to their targets, drawn by the adapters that are active.

        Each process draws its share, as no other may wait too long for one that draws all.
        """
        models, alignment, loop, accelerator = self._models, self._flags.alignment, self._flags.loop, self._accelerator
        own = range(len(prompts))[accelerator.process_index :: accelerator.num_processes]
        height, width = self._size
        with (
            phase_bar("presence of the target", len(own), "portrait", accelerator.is_local_main_process) as bar,
            models.drawing(), accelerator.autocast(),
        ):  # fmt: skip
            latents = () if not own else draw_latents(
                models.pipeline, [prompts[i] for i in own],
                seeds=[derive_seed(loop.seed, f"presence portrait {i}") for i in own],
                num_inference_steps=PROBE_STEPS, guidance_scale=alignment.alignment_guidance_scale, height=height,
                width=width, batch_size=2 * loop.train_batch_size, advance=bar.update,
            )  # fmt: skip
        with models.at_work("vae"), lent(self._clip, models.device):
            portraits = (models.family.to_pixels(models.pipeline.vae, one[None].to(models.device)) for one in latents)
            seen = (self._similarity(one, self._targets[i]) for i, one in zip(own, portraits))
            return self._mean(seen, len(prompts))

    @torch.no_grad()
    def _similarity(self, pixels: Tensor, target: Tensor) -> float:
        """Of a picture (1, 3, H', W') in [-1, 1] and an embedded target (E')."""
        return float(F.cosine_similarity(self._see(pixels.clamp(-1, 1)), target[None].to(pixels.device)))

    def _mean(self, own: Iterable[float], count: int) -> float:
        """Over what all processes have, `count` numbers together."""
        total = torch.tensor(float(sum(own)), device=self._accelerator.device)
        return float(self._accelerator.reduce(total, "sum")) / count


@contextmanager
def lent(model: CLIPModel, device: torch.device) -> Iterator[None]:
    """Inside, a model that lies on the CPU lies on the device."""
    model.to(device)
    try:
        yield
    finally:
        model.to("cpu")


def load_clip(flags: Flags) -> CLIPModel:
    """The judge, in float32 on the CPU. Raises InputError: its weights are missing, damaged or a pickle."""
    name = flags.model.clip_model_name_or_path
    with naming_flag("clip_model_name_or_path", name):
        return CLIPModel.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, cache_dir=flags.model.cache_dir
        )


def bring_to_presence(models: Models, presence: Presence, wanted: float) -> str:
    """Make the LoRA in training as strong as --target_presence asks for, by its weights; what came of it, in a few
    words.

    Where CLIP does not see stage 1's target there is nothing to go by, and the LoRA stays. All processes call it.
    """
    if not presence.can_tell:
        return "not set, as CLIP does not tell the target"
    found = find_strength(presence.at, wanted)
    models.scale_lora(found.strength)
    logger.info(
        "--target_presence %g: the LoRA is now %.2f times as strong, seen were %s", wanted, found.strength, found
    )
    if found.most >= wanted:
        return f"by {found.strength:.2f} times the weights"
    logger.warning("--target_presence %g was not reached", wanted)
    return f"not reached: {found.most:.2f} by {found.strength:.2f} times the weights"
