"""What a call of the pipeline asks for beside the stock call: its checks, and what is said of prompts.

Strings, numbers and generators; no model.
"""

import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Real
from typing import Any

import torch
from torch import Tensor


# The siblings as modules of the package that a custom pipeline is, or as modules on the path.
try:
    from . import prompts, sfcm, wording
except ImportError:
    import prompts as prompts
    import sfcm as sfcm
    import wording as wording

logger = logging.getLogger(__name__)

Target = str | tuple[str, str]


# The arguments that every family has beside its stock call, and the rest of the documentation of `__call__`.
CALL_DOC = """\
            target_prompt (`str`, `tuple[str, str]`, or a `list` or `dict` of them, *optional*):
                The target attribute to add to each prompt; a pair (phrase, target) replaces that phrase of the
                prompt; a list has several. A dict has a target by adapter name: exactly those adapters are active in
                this call.
            base_phrases (`list[str]` or `list[list[str]]`, *optional*):
                The phrases of the prompt that the SFCM protects, one list per prompt for a list of prompts. Split
                from the prompt if not given.
            free_phrases (`list[str]` or `list[list[str]]`, *optional*):
                Phrases of the prompt that may change along with the target, such as `["a green background"]`. Their
                regions are opened in the SFCM, and for `sfcm_guidance`.
            target_scale (`float`, `list[float]` or `dict[str, float]`, *optional*):
                Strength of the LoRA in this call, as a factor on that of `set_adapters`: one for all active adapters,
                one per target where each has an adapter, or by adapter name.
            compare (`bool`, defaults to `False`):
                Also return `reference_images`: the base prompts drawn by the original model, without any LoRA, from
                the same noise. `callback_on_step_end` sees one batch of twice the size, the references last. With a
                scheduler that draws noise at each step, give one generator per image to get the images of a call
                without `compare`.
            return_sfcm (`bool` or `"per_step"`, defaults to `False`):
                Also return the Semantic-Aware Fine Control Map, averaged over the steps, and what it is made of;
                with `"per_step"` also that of each step. Adds one or two rows per image to the denoiser's batch.
            sfcm_mode (`str`, defaults to `"averaged_target"`):
                How the map is computed, a key of `sfcm.SFCM_MODES`; for `sfcm_guidance` it decides which difference
                makes the map: `averaged_target` takes what the target's words change under the LoRA, `averaged_both`
                the geometric mean of that and of the difference to the original model, every other the latter alone.
            sfcm_guidance (`float`, defaults to 0.0):
                s in [0, 1]. At each step the prediction is drawn towards the original model's outside the region of
                the target, `eps_ref + m * (eps_res - eps_ref)` with `m = 1 - s * (1 - SFCM^exponent)`, so that a LoRA
                of any trainer pollutes less. 0 changes nothing. Works best with `adapter_in_unconditional=False`.
            sfcm_guidance_exponent (`float`, defaults to 2.0):
                Larger draws the region tighter.
            sfcm_guidance_start (`float`, *optional*):
                The noise level above which the original model draws the base prompt alone, without the LoRA and the
                target, so that it decides layout and light. A ratio of deviations, noise over signal, `sqrt((1 -
                alpha_bar) / alpha_bar)` or, of flow matching, `sigma / (1 - sigma)`, which means the same at every
                schedule: in Stable Diffusion's own 14.6 at timestep 999, 5.1 at 800, 3.3 at 700 and 1.6 at 500; in
                Stable Diffusion 3 4.0 at 800, 2.3 at 700 and 1.0 at 500. `None` has the LoRA at all steps. It needs
                neither `sfcm_guidance` nor more rows. Maps, and that of `sfcm_guidance`, count the steps above it
                with what the LoRA would change there.
            adapter_in_unconditional (`bool`, defaults to `True`):
                Whether the LoRA is active in the negative branch of classifier-free guidance, as everywhere in
                diffusers. There it takes away part of its own effect: without it the response is stronger, and so is
                the pollution, at the same strength.

        `target_prompt` and `return_sfcm` need prompts as text; `return_dict=False` goes with neither `compare` nor
        `return_sfcm`, and maps not with an IP-Adapter.

        Returns:
            [`SPFPortraitPipelineOutput`] with `compare` or `return_sfcm`; otherwise what the stock pipeline returns.

        Raises:
            `ValueError`: before the first step, for arguments that do not go together and for prompts that
            `prompts.py` rejects, such as a target that is cut off; for `sfcm_guidance_start` with a scheduler whose
            timesteps do not tell the noise, as those of EDM and, but in Stable Diffusion 3, of flow matching.

        Source: [paper] the two paths and the map; [ours] drawing them in one batch, and guidance with the map.
"""


@dataclass(frozen=True)
class Request:
    """The arguments of a call that the stock call does not know, as its documentation says."""

    target_prompt: Target | list[Target] | dict[str, Target] | None
    base_phrases: list[str] | list[list[str]] | None
    free_phrases: list[str] | list[list[str]] | None
    target_scale: float | list[float] | dict[str, float] | None
    compare: bool
    return_sfcm: bool | str
    sfcm_mode: str
    sfcm_guidance: float
    sfcm_guidance_exponent: float
    sfcm_guidance_start: float | None
    adapter_in_unconditional: bool

    @property
    def observed(self) -> bool:
        """Whether rows of the original model are appended, and what becomes of them."""
        return bool(self.return_sfcm) or self.sfcm_guidance > 0

    @property
    def splits_rows(self) -> bool:
        """Whether the adapters are off in some rows of the batch."""
        gated = self.sfcm_guidance_start is not None
        return self.compare or self.observed or gated or not self.adapter_in_unconditional

    @property
    def is_stock(self) -> bool:
        """Whether nothing is asked for that the stock call does not do."""
        return self.target_prompt is None and self.target_scale is None and not self.splits_rows

    def check(self, return_dict: bool) -> None:
        """Raise a ValueError if the arguments do not go together."""
        modes, has_target = sorted(sfcm.SFCM_MODES), self.target_prompt is not None
        if self.sfcm_mode not in modes:
            raise ValueError(f"`sfcm_mode` has to be one of {modes} but is {self.sfcm_mode!r}.")
        if self.return_sfcm not in (False, True, "per_step"):
            raise ValueError(f"`return_sfcm` has to be False, True or 'per_step' but is {self.return_sfcm!r}.")
        if not (is_number(self.sfcm_guidance) and 0 <= self.sfcm_guidance <= 1):
            raise ValueError(f"`sfcm_guidance` has to be in [0, 1] but is {self.sfcm_guidance!r}.")
        if not (is_number(self.sfcm_guidance_exponent) and self.sfcm_guidance_exponent > 0):
            raise ValueError(f"`sfcm_guidance_exponent` has to be positive but is {self.sfcm_guidance_exponent!r}.")
        if self.sfcm_guidance_start is not None:
            if not (is_number(self.sfcm_guidance_start) and self.sfcm_guidance_start > 0):
                raise ValueError(f"`sfcm_guidance_start` has to be positive but is {self.sfcm_guidance_start!r}.")
            if not has_target:
                raise ValueError("`sfcm_guidance_start` is about a target and needs a `target_prompt`.")
        if not has_target and (self.free_phrases is not None or self.sfcm_guidance > 0):
            raise ValueError("`free_phrases` and `sfcm_guidance` are about a target and need a `target_prompt`.")
        if self.base_phrases is not None and not has_target and not self.return_sfcm:
            raise ValueError("`base_phrases` are for a `target_prompt` or for `return_sfcm`.")
        if self.free_phrases is not None and not self.observed:
            raise ValueError("`free_phrases` change the map: give them with `return_sfcm` or `sfcm_guidance`.")
        if not return_dict and (self.compare or self.return_sfcm):
            raise ValueError("`compare` and `return_sfcm` need `return_dict=True`: a tuple cannot hold their results.")


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, and no truth value."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_prompts(given: Any) -> None:
    """Raise a ValueError for anything but a list of strings."""
    if not isinstance(given, list) or not given or not all(isinstance(text, str) for text in given):
        raise ValueError(f"`prompt` has to be a string or a list of strings but is {given!r}.")


def check_generator(generator: Any) -> None:
    """Raise a ValueError for anything but generators, or none."""
    generators = generator if isinstance(generator, list) else [generator]
    if generator is not None and not all(isinstance(own, torch.Generator) for own in generators):
        raise ValueError(
            f"`generator` has to be a torch.Generator or a list of them but is {generator!r}; for a seed give "
            "torch.Generator().manual_seed(seed)."
        )


def check_rows(arguments: dict[str, Any], count: int) -> None:
    """Raise a ValueError if noise that is given is not for all images."""
    for name in ("latents", "generator"):
        rows = arguments[name]
        if isinstance(rows, (list, Tensor)) and len(rows) != count:
            raise ValueError(f"`{name}` has {len(rows)} rows but {count} images are to be drawn.")


def phrase_lists(name: str, given: Any, count: int, one_prompt: bool) -> list[list[str] | None]:
    """A list of phrases, or None, for each of the prompts; a ValueError for anything else."""
    rows = [given] if one_prompt else [None] * count if given is None else given
    lists = isinstance(rows, list) and all(isinstance(row, (list, tuple, type(None))) for row in rows)
    if not lists or len(rows) != count or not all(isinstance(text, str) for row in rows for text in row or ()):
        raise ValueError(f"`{name}` has to be a list of phrases for each of {count} prompts: {given!r}.")
    return rows


def list_targets(target_prompt: Any) -> list[Target]:
    """The targets of any form of `target_prompt`; a ValueError for another form."""
    targets = list(target_prompt.values()) if isinstance(target_prompt, dict) else target_prompt
    targets = targets if isinstance(targets, list) else [targets]
    pairs = [target for target in targets if not isinstance(target, str)]
    if not all(isinstance(pair, tuple) and [type(text) for text in pair] == [str, str] for pair in pairs):
        raise ValueError(
            "`target_prompt` has to be a string, a pair (phrase, target), a list of these, or a dict by adapter "
            f"name, but is {target_prompt!r}."
        )
    return targets


def scale_factors(target_scale: Any, active: list[str], targets: list[Target]) -> dict[str, float]:
    """The factor on each adapter's strength, by name; a ValueError for another form or what fits no adapter."""
    if not active:
        raise ValueError("`target_scale` is the strength of a LoRA, but none is loaded and active.")
    if isinstance(target_scale, list):
        if len(target_scale) != len(active) or len(active) != len(targets):
            raise ValueError(
                f"`target_scale` has {len(target_scale)} strengths for {len(targets)} targets and the active adapters "
                f"{active}: a list needs as many of each; a dict names adapters."
            )
        target_scale = dict(zip(active, target_scale, strict=True))
    factors = target_scale if isinstance(target_scale, dict) else dict.fromkeys(active, target_scale)
    unknown = [name for name in factors if name not in active]
    if unknown:
        raise ValueError(f"`target_scale` names {unknown}, but the active adapters are {active}.")
    if not all(map(is_number, factors.values())):
        raise ValueError(f"`target_scale` has to be finite numbers but is {target_scale!r}.")
    return factors


@lru_cache(maxsize=1024)
def _warn_once(message: str) -> None:
    logger.warning(message)


def warn_of_weights(*given: Any) -> None:
    """Say of weights and LoRAs that are written into prompts, a text or a list of them each, that they are words."""
    rows = [[texts] if isinstance(texts, str) else texts for texts in given if isinstance(texts, (str, list))]
    for weights in filter(None, map(wording.find_weights, itertools.chain(*rows))):
        _warn_once(f"{weights!r} in a prompt is read as words: neither weights nor <lora:...> mean anything here.")


def warn_of_targets(pairs: Sequence[prompts.PromptPair]) -> None:
    """Say of a phrase that it may be about the same thing as a target."""
    for phrase, target in itertools.chain(*map(prompts.suggest_replacements, pairs)):
        _warn_once(
            f"{phrase!r} in the prompt may contradict the target {target!r}, which then hardly shows: "
            f"target_prompt=({phrase!r}, {target!r}) puts the target in its place."
        )
