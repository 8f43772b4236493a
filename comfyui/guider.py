"""The guider: a LoRA's prediction, kept at each step to where the target's words change it.

Legend: B batch, C latent channels, H/W latent size, D differences. Predictions are ComfyUI's, of clean latents.
Source: [ours].
"""

import comfy.hooks
import comfy.samplers
import torch

from .region_guidance import RunningMap, keep_to_region, noise_difference


# What the prediction with LoRA and target is held against: that of the base prompt without the LoRA ("paths"), or with
# it ("words"), which leaves out what the LoRA changes whatever the prompt says.
COMPARED = {"words": ("words",), "paths": ("reference",), "both": ("reference", "words")}


class RegionGuider(comfy.samplers.CFGGuider):
    """Classifier-free guidance with a LoRA, whose conditional prediction is kept to a region.

    The rows with the LoRA carry its hooks, so that ComfyUI patches one copy of the weights. All else of a step is
    `CFGGuider`'s own, and of strength 0 the whole step.

    `region` is of the last run, None before it; a run of strength 0 leaves it without a call.
    """

    def __init__(self, model_patcher, strength: float, exponent: float, compared: str) -> None:
        super().__init__(model_patcher)
        self.strength, self.exponent, self.compared = strength, exponent, COMPARED[compared]
        self.region: RunningMap | None = None

    def set_rows(self, full: list, base: list, base_adapted: list, negative: list) -> None:
        """The conditionings: the full prompt's with the LoRA, the base prompt's without and with it, the negative."""
        rows = {"positive": full, "negative": negative}
        if self.strength > 0:
            rows |= {"reference": base} | ({"words": base_adapted} if "words" in self.compared else {})
        self.inner_set_conds(rows)

    def sample(self, noise: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """As `CFGGuider.sample`. Raises ValueError: the latents are not those of pictures, (B, C, H, W)."""
        if noise.ndim != 4:
            raise ValueError(f"The region is one of a picture, but the latents have the shape {[*noise.shape]}.")
        self.region = RunningMap()
        return super().sample(noise, *args, **kwargs)

    def predict_noise(self, x: torch.Tensor, timestep: torch.Tensor, model_options: dict | None = None, seed=None):
        model_options = model_options or {}
        if self.strength > 0:
            if "sampler_calc_cond_batch_function" in model_options:
                raise ValueError(
                    "Another node makes the predictions of this model itself (sampler_calc_cond_batch_function), and "
                    "the LoRA cannot be kept to its region beside it: take that node out."
                )
            model_options = model_options | {"sampler_calc_cond_batch_function": self._predictions}
        return super().predict_noise(x, timestep, model_options, seed)

    def _predictions(self, step: dict) -> list[torch.Tensor]:
        """The conditional prediction, kept to the region, and the negative one, (B, C, H, W) each."""
        positive, negative = step["conds"]
        rows = {name: conds for name, conds in self.conds.items() if name in ("reference", "words")}
        rows |= {"positive": positive, "negative": negative}
        # Rows of one group of hooks are predicted together. That of the weights as they are comes first, so that they
        # are patched once a step and not twice.
        patched = self.model_patcher.current_hooks
        names = sorted(rows, key=lambda name: _hooks(rows[name]) != patched)
        predictions = comfy.samplers.calc_cond_batch(
            step["model"], [rows[name] for name in names], step["input"], step["sigma"], step["model_options"]
        )
        found = dict(zip(names, predictions, strict=True))
        differences = torch.cat([noise_difference(found["positive"], found[name]) for name in self.compared], 1)
        opened = self.region.add(differences) ** self.exponent
        return [keep_to_region(found["positive"], found["reference"], opened, self.strength), found["negative"]]


def _hooks(conds: list | None) -> comfy.hooks.HookGroup | None:
    return conds[0].get("hooks") if conds else None
