"""Stable Diffusion with a target prompt: the portrait, the original model's own portrait beside it, and the SFCM.

Works as `custom_pipeline` of `DiffusionPipeline.from_pretrained` and as an import. Inference alone.

Legend: B images of one call (prompts times `num_images_per_prompt`), C latent channels, H/W latent size, S = h*w image
tokens of a layer, T text tokens, E size of a text embedding, P base phrases, K targets, N calls of the UNet in a run.
Paper: arXiv 2504.00396.
"""

from __future__ import annotations

import logging
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache, partial
from numbers import Real
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.utils import replace_example_docstring
from diffusers.utils.torch_utils import is_compiled_module, randn_tensor
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor


# As `custom_pipeline` this file and its siblings lie in a package; `import pipeline_spf_portrait` knows no package.
# The loader copies only the siblings named here, and would ask users to pip-install an "import x" without "as".
try:
    from .adapters import active_adapters, adapter_scales, original_rows
    from .attention_processors import CrossAttentionStore, capture_cross_attention, phrase_map_resolution
    from .pictures import captioned_pictures, overlay_heat_map
    from .prompts import (
        PromptPair,
        PromptTokens,
        find_weights,
        locate_phrases,
        make_prompt_pair,
        phrase_mask,
        split_phrases,
        suggest_replacements,
        tokenize_prompt_pair,
    )
    from .sfcm import (
        SFCM_MODES,
        clip_distances,
        epsilon_scale,
        free_regions,
        guidance_map,
        noise_difference,
        phrase_attention_maps,
    )
except ImportError:
    import adapters as _adapters
    import attention_processors as _attention
    import pictures as _pictures
    import prompts as _prompts
    import sfcm as _sfcm

    CrossAttentionStore, phrase_map_resolution = _attention.CrossAttentionStore, _attention.phrase_map_resolution
    active_adapters, adapter_scales = _adapters.active_adapters, _adapters.adapter_scales
    original_rows, capture_cross_attention = _adapters.original_rows, _attention.capture_cross_attention
    captioned_pictures, overlay_heat_map = _pictures.captioned_pictures, _pictures.overlay_heat_map
    PromptPair, PromptTokens, phrase_mask = _prompts.PromptPair, _prompts.PromptTokens, _prompts.phrase_mask
    make_prompt_pair = _prompts.make_prompt_pair
    locate_phrases, split_phrases = _prompts.locate_phrases, _prompts.split_phrases
    tokenize_prompt_pair, find_weights = _prompts.tokenize_prompt_pair, _prompts.find_weights
    suggest_replacements = _prompts.suggest_replacements
    SFCM_MODES, noise_difference, clip_distances = _sfcm.SFCM_MODES, _sfcm.noise_difference, _sfcm.clip_distances
    free_regions, guidance_map = _sfcm.free_regions, _sfcm.guidance_map
    epsilon_scale, phrase_attention_maps = _sfcm.epsilon_scale, _sfcm.phrase_attention_maps

logger = logging.getLogger(__name__)

Target = str | tuple[str, str]

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from diffusers import DiffusionPipeline

        >>> pipe = DiffusionPipeline.from_pretrained(
        ...     "stable-diffusion-v1-5/stable-diffusion-v1-5", dtype=torch.float16,
        ...     custom_pipeline="./pipeline_spf_portrait.py", trust_remote_code=True,
        ... ).to("cuda")
        >>> pipe.load_lora_weights("spf-portrait-lora")
        >>> output = pipe(
        ...     "a woman, a brown jacket, a curtain background", target_prompt="blonde hair",
        ...     compare=True, return_sfcm=True, generator=torch.Generator().manual_seed(0),
        ... )
        >>> output.images[0].save("portrait.png"), output.reference_images[0].save("original_model.png")
        >>> pipe.visualize(output).save("where.png")

        >>> # a phrase of the prompt replaced by the target
        >>> image = pipe("a woman in a T-shirt", target_prompt=("a T-shirt", "a red dress")).images[0]

        >>> # a LoRA of any trainer, kept to the region of its target
        >>> pipe.load_lora_weights("someone/a-plain-lora")
        >>> image = pipe(
        ...     "a woman, a brown jacket", target_prompt="blonde hair",
        ...     sfcm_guidance=1.0, adapter_in_unconditional=False, target_scale=0.75,
        ... ).images[0]
        ```
"""


@dataclass
class SPFPortraitPipelineOutput(StableDiffusionPipelineOutput):
    """Output of a call with `compare` or `return_sfcm`; what was not asked for is None.

    Maps are float32 on the CPU, in [0, 1].

    Args:
        images: B images of the full prompts (of the prompts themselves without a target), as `output_type` says.
        nsfw_content_detected: B flags for `images`, or None without a safety checker.
        reference_images: the original model's B images of the base prompts from the same noise, like `images`.
        sfcm: (B, 1, H, W), high where the target responds; without a target, where the LoRA changes the picture, and
            None if there is no LoRA either.
        sfcm_per_step: (B, N, H, W), the same of each call of the UNet.
        phrases: per image its base phrases; P is the longest's count.
        phrase_maps: (B, P, H, W), where the original model looks at them; zeros where an image has fewer phrases.
        phrase_distances: (B, P) float32 on the CPU, `1 - cos` of phrase and target, in [0, 2]; zeros likewise, and
            where a phrase was cut off. None without a target.
        targets: per image its K targets.
        target_maps: (B, K, H, W), where the portrait's own attention looks at the targets' words.
    """

    reference_images: list[PIL.Image.Image] | np.ndarray | Tensor | None = None
    sfcm: Tensor | None = None
    sfcm_per_step: Tensor | None = None
    phrases: list[tuple[str, ...]] | None = None
    phrase_maps: Tensor | None = None
    phrase_distances: Tensor | None = None
    targets: list[tuple[str, ...]] | None = None
    target_maps: Tensor | None = None


@dataclass
class _Phrases:
    """What the maps are about, B rows each; a shorter prompt's rows are padded.

    Attributes:
        texts, targets: per image its phrases and targets.
        weights: (B, P, T), each row averages over a phrase's tokens in the base prompt; `present` (B, P) bool.
        target_weights: (B, K, T), the same of the targets in the full prompt.
        free: (B, P) bool, the phrases that may change.
        distances: (B, P), zeros without a target.
    """

    texts: list[tuple[str, ...]]
    targets: list[tuple[str, ...]]
    weights: Tensor
    present: Tensor
    target_weights: Tensor
    free: Tensor
    distances: Tensor


@dataclass
class _Guide:
    """SFCM guidance of one run: keeps the response to the reference outside of where the target responds.

    Attributes:
        strength: s in [0, 1] of the soft mask `m = 1 - s * (1 - SFCM)`.
        exponent: of the SFCM.
        phrases: whose free ones open the mask, if there are any.
        total: sum over the calls of the normalised differences.
    """

    strength: float
    exponent: float
    phrases: _Phrases
    calls: int = 0
    total: Tensor | float = 0.0

    def blend(self, response: Tensor, reference: Tensor, difference: Tensor, attention: _Attention | None) -> Tensor:
        """`eps_ref + m * (eps_res - eps_ref)`, (B, C, H, W), with the running mean of differences (B, 1, H, W)."""
        self.calls += 1
        self.total = self.total + guidance_map(difference)
        sfcm = guidance_map(self.total / self.calls) ** self.exponent
        if attention is not None and self.phrases.free.any():
            maps = attention.reference_maps(self.phrases.weights, sfcm.shape[-2:])
            sfcm = free_regions(sfcm, maps, self.phrases.free.to(sfcm.device))
        mask = 1 - self.strength * (1 - sfcm)
        return (reference + mask * (response - reference).float()).to(response.dtype)


@dataclass
class _Attention:
    """Cross-attention of one call of the UNet, or the mean over several: (B, S, T) float32 at one (h, w)."""

    reference: Tensor
    response: Tensor
    resolution: tuple[int, int]

    def reference_maps(self, weights: Tensor, size: Sequence[int]) -> Tensor:
        """(B, P, H, W) in [0, 1] of the base prompts' phrases."""
        return phrase_attention_maps([self.reference], [self.resolution], weights.to(self.reference.device), size)

    def response_maps(self, weights: Tensor, size: Sequence[int]) -> Tensor:
        """(B, K, H, W) in [0, 1] of the targets."""
        return phrase_attention_maps([self.response], [self.resolution], weights.to(self.response.device), size)


@dataclass
class _Observer:
    """Appends rows to the UNet's batch that its caller does not see: the base prompts on the response's own latents.

    The first B of them are the Reference Path; with `base_embeds` of both text encoders, B more have the adapters on.

    Attributes:
        base_embeds: (B, T, E) of the base prompts by the original text encoder, then, where what the target's words
            change under the adapters is asked for, (B, T, E) by the text encoder with its adapters.
        branch_size: rows of the conditional branch; its first B are the response.
        to_epsilon: of a timestep, what makes a difference of predictions one of predicted noise.
        store: of `capture_cross_attention`, recording, where attention is wanted.
        guide: changes the response's predictions on their way out.
        differences, attention: of each call.

    Source: [paper] both predictions from the same `z_t`; [ours] in one batch.
    """

    base_embeds: list[Tensor]
    branch_size: int
    to_epsilon: Callable[[Tensor], Tensor]
    store: CrossAttentionStore | None = None
    guide: _Guide | None = None
    differences: list[Tensor] = field(default_factory=list)
    attention: list[_Attention] = field(default_factory=list)

    @property
    def count(self) -> int:
        return len(self.base_embeds[0])

    @property
    def extra(self) -> int:
        return self.count * len(self.base_embeds)

    @contextmanager
    def watch(self, unet: torch.nn.Module) -> Iterator[None]:
        """Inside, the UNet is called as the stock pipeline calls it, and this looks on."""
        with ExitStack() as stack:
            stack.callback(unet.register_forward_pre_hook(self._append_rows, with_kwargs=True).remove)
            stack.callback(unet.register_forward_hook(self._take_rows).remove)
            yield

    def _repeat(self, rows: Tensor) -> Tensor:
        """Rows of the whole batch, with the response's repeated at the end.

        They are counted from the end, as a callback may end classifier-free guidance, whose rows come first.
        """
        return torch.cat([rows, *[rows[-self.branch_size :][: self.count]] * len(self.base_embeds)])

    def _append_rows(self, unet: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        sample, *others = args
        kwargs["encoder_hidden_states"] = torch.cat([kwargs["encoder_hidden_states"], *self.base_embeds])
        if kwargs.get("timestep_cond") is not None:
            kwargs["timestep_cond"] = self._repeat(kwargs["timestep_cond"])
        if kwargs.get("added_cond_kwargs") is not None:
            images = kwargs["added_cond_kwargs"]["image_embeds"]
            kwargs["added_cond_kwargs"] = {"image_embeds": [self._repeat(embeds) for embeds in images]}
        return (self._repeat(sample), *others), kwargs

    def _take_rows(self, unet: torch.nn.Module, args: tuple, output: tuple) -> tuple:
        model_pred, extra = output[0][: -self.extra], output[0][-self.extra :]
        response = model_pred[-self.branch_size :][: self.count]
        reference, start = extra[: self.count], extra[-self.count :]
        difference = noise_difference(response, start, self.to_epsilon(args[1]))
        attention = None if self.store is None else self._take_attention(len(model_pred))
        self.differences.append(difference)
        if attention is not None:
            self.attention.append(attention)
        if self.guide is not None:
            response.copy_(self.guide.blend(response, reference, difference, attention))
        return (model_pred, *output[1:])

    def _take_attention(self, own_rows: int) -> _Attention:
        features = self.store.pop()
        resolution = phrase_map_resolution(features.resolutions)
        layers = list(features.at_resolution(resolution).attention_probs.values())
        first = own_rows - self.branch_size
        response, reference = (
            torch.stack([probs[start : start + self.count] for probs in layers]).mean(0) for start in (first, own_rows)
        )
        return _Attention(reference, response, resolution)


def _pair_generators(generator: torch.Generator | list[torch.Generator] | None, count: int) -> list[torch.Generator]:
    """Generators for `count` rows and their twins, each twin drawing the very same noise as its row."""
    if generator is None:
        # From the global generator, but not a copy of it: that would draw the next call's latents in advance.
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    generators = generator if isinstance(generator, list) else [generator] * count
    twins = {id(own): torch.Generator(own.device).set_state(own.get_state()) for own in generators}
    return [*generators, *(twins[id(own)] for own in generators)]


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _check_prompts(prompts: Any) -> None:
    if not isinstance(prompts, list) or not prompts or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f"`prompt` has to be a string or a list of strings but is {prompts!r}.")


def _check_generator(generator: Any) -> None:
    generators = generator if isinstance(generator, list) else [] if generator is None else [generator]
    if not all(isinstance(own, torch.Generator) for own in generators):
        raise ValueError(
            f"`generator` has to be a torch.Generator or a list of them but is {generator!r}; for a seed give "
            "torch.Generator().manual_seed(seed)."
        )


@lru_cache(maxsize=1024)
def _warn_once(message: str) -> None:
    logger.warning(message)


def _warn_of_weights(prompts: Any) -> None:
    """Say of weights and LoRAs that are written into a prompt that they are read as words."""
    for text in [prompts] if isinstance(prompts, str) else prompts if isinstance(prompts, list) else []:
        weights = find_weights(text)
        if weights is not None:
            _warn_once(f"{weights!r} in a prompt is read as words: neither weights nor <lora:...> mean anything here.")


def _warn_of_contradictions(pair: PromptPair) -> None:
    for phrase, target in suggest_replacements(pair):
        _warn_once(
            f"{phrase!r} in the prompt may contradict the target {target!r}, which then hardly shows: "
            f"target_prompt=({phrase!r}, {target!r}) puts the target in its place."
        )


def _check_rows(arguments: dict[str, Any], count: int) -> None:
    """Noise that is given has to be for all images."""
    for name in ("latents", "generator"):
        rows = arguments[name]
        if isinstance(rows, (list, Tensor)) and len(rows) != count:
            raise ValueError(f"`{name}` has {len(rows)} rows but {count} images are to be drawn.")


def _phrase_lists(name: str, given: Any, count: int, one_prompt: bool) -> list[list[str] | None]:
    """A list of phrases, or None, for each of the prompts."""
    rows = [given] if one_prompt else [None] * count if given is None else given
    lists = isinstance(rows, list) and all(isinstance(row, (list, tuple, type(None))) for row in rows)
    if not lists or len(rows) != count or not all(isinstance(text, str) for row in rows for text in row or ()):
        raise ValueError(f"`{name}` has to be a list of phrases for each of {count} prompts: {given!r}.")
    return rows


def _list_targets(target_prompt: Any) -> list[Target]:
    """The targets of any form of `target_prompt`."""
    targets = [target_prompt] if isinstance(target_prompt, (str, tuple)) else target_prompt
    targets = list(targets.values()) if isinstance(targets, dict) else targets
    if not isinstance(targets, list) or not all(
        isinstance(target, str) or (isinstance(target, tuple) and [type(text) for text in target] == [str, str])
        for target in targets
    ):
        raise ValueError(
            "`target_prompt` has to be a string, a pair (phrase, target), a list of these, or a dict by adapter "
            f"name, but is {target_prompt!r}."
        )
    return targets


def _scale_factors(target_scale: Any, active: list[str], targets: list[Target]) -> dict[str, float]:
    """The factor on each adapter's strength, by name.

    Raises:
        ValueError: no adapter is active, another form, or names or numbers that fit no adapter.
    """
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
    if not all(map(_is_number, factors.values())):
        raise ValueError(f"`target_scale` has to be finite numbers but is {target_scale!r}.")
    return factors


def _mask_rows(positions: Sequence[Sequence[Sequence[int]]], length: int) -> Tensor:
    """(rows, phrases, T) weights that average over each phrase's tokens, padded to the longest row with zeros."""
    longest = max(map(len, positions))
    return torch.tensor([phrase_mask([*row, *[()] * (longest - len(row))], length) for row in positions])


def _pad(rows: Sequence[Tensor], width: int) -> Tensor:
    return torch.stack([F.pad(row, (0, width - len(row))) for row in rows])


def _mean_attention(calls: list[_Attention]) -> _Attention:
    return _Attention(
        sum(call.reference for call in calls) / len(calls),
        sum(call.response for call in calls) / len(calls),
        calls[0].resolution,
    )


def _compute_sfcm(difference: Tensor, attention: _Attention, phrases: _Phrases, mode: str) -> Tensor:
    """(B, 1, H, W) float32 on the CPU."""
    maps = attention.reference_maps(phrases.weights, difference.shape[-2:]).cpu()
    protected = phrases.present & ~phrases.free
    sfcm = SFCM_MODES[mode].compute(difference.cpu(), maps, phrases.distances, protected)
    return free_regions(sfcm, maps, phrases.free)


def _compute_maps(
    observer: _Observer, phrases: _Phrases, mode: str, has_target: bool, has_map: bool, per_step: bool
) -> dict[str, Any]:
    """The map fields of the output, from what was seen in a run."""
    difference = sum(observer.differences) / len(observer.differences)
    attention, size = _mean_attention(observer.attention), difference.shape[-2:]
    maps = {"phrases": phrases.texts, "phrase_maps": attention.reference_maps(phrases.weights, size).cpu()}
    if has_map:
        maps["sfcm"] = _compute_sfcm(difference, attention, phrases, mode)
    if has_map and per_step:
        steps = zip(observer.differences, observer.attention, strict=True)
        maps["sfcm_per_step"] = torch.cat([_compute_sfcm(*step, phrases, mode) for step in steps], dim=1)
    if has_target:
        maps["phrase_distances"] = phrases.distances
        maps["targets"] = phrases.targets
        maps["target_maps"] = attention.response_maps(phrases.target_weights, size).cpu()
    return maps


def _uncompiled(model: torch.nn.Module) -> torch.nn.Module:
    """The model itself, with its layers under their own names, where `torch.compile` has wrapped it."""
    return model._orig_mod if is_compiled_module(model) else model


def _lora_layer(key: str) -> tuple[str, str] | None:
    """The layer that a LoRA's matrix belongs to and its side, "A" or "B"; None for other tensors.

    diffusers knows three names for one matrix: PEFT's, its own, and an older one, into which it turns kohya's format.
    """
    match = re.fullmatch(r"(.+?)(?:\.lora_(A|B)|(\.lora|\.lora_linear_layer|_lora)\.(down|up))\.weight", key)
    if match is None:
        return None
    path = match[1].replace(".processor.", ".").replace("text_encoder.text_model.", "text_encoder.")
    if match[3] == "_lora":
        path = path.replace(".self_attn.to_out", ".self_attn.out_proj").replace(".to_out", ".to_out.0")
        path = re.sub(r"\.self_attn\.to_(q|k|v)$", r".self_attn.\1_proj", path)
    return path, match[2] or {"down": "A", "up": "B"}[match[4]]


def _features(layer: torch.nn.Module | None) -> tuple[int, int] | None:
    """Inputs and outputs of a layer with weights, of which quantized ones do not tell them; None for other modules."""
    if getattr(layer, "weight", None) is None:
        return None
    for inputs, outputs in (("in_features", "out_features"), ("in_channels", "out_channels")):
        if hasattr(layer, inputs):
            return getattr(layer, inputs), getattr(layer, outputs)
    return None


def _check_lora_values(
    name: str, layers: dict[str, Tensor], alphas: dict[str, float] | None, metadata: dict[str, Any] | None
) -> None:
    """Raise a ValueError if a LoRA holds numbers that are none, or what the stock loader takes for something else."""
    embedding = next((key for key in layers if key.startswith("bundle_emb.")), None)
    if embedding is not None:
        raise ValueError(
            f"{name} holds a textual inversion beside its layers ({embedding!r}), and diffusers reads none of both: "
            "export_spf_portrait_lora.py writes the LoRA without it."
        )
    for key, tensor in layers.items():
        values = tensor.float()
        if not values.isfinite().all():
            kind = "NaN" if values.isnan().any() else "infinite"
            raise ValueError(f"{name}: its weights are not numbers ({kind}) in layer {key}")
    given = dict(alphas or {})
    for model in {key.partition(".")[0] for key in layers} if metadata else ():
        # PEFT would have numbers of its own.
        missing = [key for key in ("r", "lora_alpha", "target_modules") if metadata.get(f"{model}.{key}") is None]
        if missing:
            raise ValueError(f"{name}: its metadata tells no {' and no '.join(missing)} of the {model}'s layers.")
        given |= {f"{model} (all)": metadata[f"{model}.lora_alpha"], **(metadata.get(f"{model}.alpha_pattern") or {})}
    for key, alpha in given.items():
        if not _is_number(alpha):
            raise ValueError(f"{name}: its alpha is not a number ({alpha!r}) in layer {key}")


@contextmanager
def _without_false_alarms() -> Iterator[None]:
    """Inside, nothing is said of what is no fault in a LoRA that was checked: no part of it is for the text encoder,
    or there is an earlier one beside it."""

    def other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("No LoRA keys associated to")

    speaker = logging.getLogger("diffusers.loaders.lora_base")
    speaker.addFilter(other)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
            yield
    finally:
        speaker.removeFilter(other)


def _check_lora_fits(name: str, layers: dict[str, Tensor], models: dict[str, torch.nn.Module | None]) -> None:
    """Raise a ValueError if a LoRA's layers, by their names in diffusers' format, are not those of the models."""
    advice = "load it with a pipeline of the model it was trained on."
    modules = {
        f"{prefix}.{path}".replace(".base_layer", ""): module
        for prefix, model in models.items()
        if model is not None
        for path, module in _uncompiled(model).named_modules()
    }
    matrices = {place: value for key, value in layers.items() if (place := _lora_layer(key)) is not None}
    if not matrices:
        raise ValueError(f"{name} has no LoRA layer that is known here: {advice}")
    for path in dict.fromkeys(path for path, _ in matrices):
        features = _features(modules.get(path))
        if features is None:
            raise ValueError(f"{name} is for another architecture: there is no layer {path}; {advice}")
        down, up = (matrices.get((path, side)) for side in "AB")
        for matrix, side, other in zip((down, up), (1, 0), features):
            own = other if matrix is None else matrix.shape[side]
            if own != other:
                raise ValueError(
                    f"{name} is for another architecture: {path} has {own} features, not {other}; {advice}"
                )
        if down is None or up is None or down.shape[0] != up.shape[1]:
            raise ValueError(f"{name} is damaged: the two matrices of {path} do not belong together.")


@contextmanager
def _text_model_of_its_own(text_encoder: torch.nn.Module | None) -> Iterator[None]:
    """Inside, a text encoder has a `text_model`: the stock `clip_skip` takes the last norm from there.

    transformers 5 puts the norm on the text encoder itself.
    """
    if text_encoder is None or hasattr(text_encoder, "text_model"):
        yield
        return
    # Past Module's own bookkeeping, in which a module may not hold itself.
    object.__setattr__(text_encoder, "text_model", text_encoder)
    try:
        yield
    finally:
        object.__delattr__(text_encoder, "text_model")


def _pil_image(images: list[PIL.Image.Image] | np.ndarray | Tensor, index: int) -> PIL.Image.Image:
    if isinstance(images, list):
        return images[index]
    if isinstance(images, Tensor):
        if images.shape[1] != 3:
            raise ValueError("Latents cannot be shown: call with another `output_type` than 'latent'.")
        images = VaeImageProcessor.pt_to_numpy(images)
    return VaeImageProcessor.numpy_to_pil(images[index])[0]


class SPFPortraitPipeline(StableDiffusionPipeline):
    """Text-to-portrait generation with an SPF-Portrait LoRA (any LoRA, or none).

    Components, loading, saving and all that is not named below are [`StableDiffusionPipeline`]'s. A call that uses
    none of the arguments below is the stock call, to the bit.
    """

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] = None,
        sigmas: list[float] = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[[int, int], None] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (the stock default)
        target_prompt: Target | list[Target] | dict[str, Target] | None = None,
        base_phrases: list[str] | list[list[str]] | None = None,
        free_phrases: list[str] | list[list[str]] | None = None,
        target_scale: float | list[float] | dict[str, float] | None = None,
        compare: bool = False,
        return_sfcm: bool | str = False,
        sfcm_mode: str = "averaged_target",
        sfcm_guidance: float = 0.0,
        sfcm_guidance_exponent: float = 2.0,
        adapter_in_unconditional: bool = True,
        **kwargs,
    ) -> SPFPortraitPipelineOutput | StableDiffusionPipelineOutput | tuple:
        r"""
        Draw portraits.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                The prompt or prompts; the *base* prompt where there is a target.
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
                with `"per_step"` also that of each step. Adds one or two rows per image to the UNet's batch.
            sfcm_mode (`str`, defaults to `"averaged_target"`):
                How the map is computed, a key of `sfcm.SFCM_MODES`; for `sfcm_guidance` it decides which difference
                makes the map: `averaged_target` takes what the target's words change under the LoRA, every other the
                difference to the original model.
            sfcm_guidance (`float`, defaults to 0.0):
                s in [0, 1]. At each step the prediction is drawn towards the original model's outside the region of
                the target, `eps_ref + m * (eps_res - eps_ref)` with `m = 1 - s * (1 - SFCM^exponent)`, so that a LoRA
                of any trainer pollutes less. 0 changes nothing. Works best with `adapter_in_unconditional=False`.
            sfcm_guidance_exponent (`float`, defaults to 2.0):
                Larger draws the region tighter.
            adapter_in_unconditional (`bool`, defaults to `True`):
                Whether the LoRA is active in the negative branch of classifier-free guidance, as everywhere in
                diffusers. There it takes away part of its own effect: without it the response is stronger, and so is
                the pollution, at the same strength.
            the others:
                As in [`StableDiffusionPipeline`]. `target_prompt` and `return_sfcm` need prompts as text;
                `return_dict=False` goes with neither `compare` nor `return_sfcm`, and maps not with an IP-Adapter.

        Examples:

        Returns:
            [`SPFPortraitPipelineOutput`] with `compare` or `return_sfcm`; otherwise what
            [`StableDiffusionPipeline`] returns.

        Raises:
            `ValueError`: before the first step, for arguments that do not go together and for prompts that
            `prompts.py` rejects, such as a target that is cut off.

        Source: [paper] the two paths and the map; [ours] drawing them in one batch, and guidance with the map.
        """
        # 1. Check inputs
        if sfcm_mode not in sorted(SFCM_MODES):
            raise ValueError(f"`sfcm_mode` has to be one of {sorted(SFCM_MODES)} but is {sfcm_mode!r}.")
        if return_sfcm not in (False, True, "per_step"):
            raise ValueError(f"`return_sfcm` has to be False, True or 'per_step' but is {return_sfcm!r}.")
        if not (_is_number(sfcm_guidance) and 0 <= sfcm_guidance <= 1):
            raise ValueError(f"`sfcm_guidance` has to be in [0, 1] but is {sfcm_guidance!r}.")
        if not (_is_number(sfcm_guidance_exponent) and sfcm_guidance_exponent > 0):
            raise ValueError(f"`sfcm_guidance_exponent` has to be positive but is {sfcm_guidance_exponent!r}.")
        if target_prompt is None and (free_phrases is not None or sfcm_guidance > 0):
            raise ValueError("`free_phrases` and `sfcm_guidance` are about a target and need a `target_prompt`.")
        if base_phrases is not None and target_prompt is None and not return_sfcm:
            raise ValueError("`base_phrases` are for a `target_prompt` or for `return_sfcm`.")
        if free_phrases is not None and not (return_sfcm or sfcm_guidance > 0):
            raise ValueError("`free_phrases` change the map: give them with `return_sfcm` or `sfcm_guidance`.")
        if not return_dict and (compare or return_sfcm):
            raise ValueError("`compare` and `return_sfcm` need `return_dict=True`: a tuple cannot hold their results.")
        # fmt: off
        stock_arguments = {
            "height": height, "width": width, "num_inference_steps": num_inference_steps, "timesteps": timesteps,
            "sigmas": sigmas, "guidance_scale": guidance_scale, "negative_prompt": negative_prompt,
            "num_images_per_prompt": num_images_per_prompt, "eta": eta, "generator": generator, "latents": latents,
            "prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds,
            "ip_adapter_image": ip_adapter_image, "ip_adapter_image_embeds": ip_adapter_image_embeds,
            "output_type": output_type, "return_dict": return_dict, "cross_attention_kwargs": cross_attention_kwargs,
            "guidance_rescale": guidance_rescale, "clip_skip": clip_skip, "callback_on_step_end": callback_on_step_end,
            "callback_on_step_end_tensor_inputs": callback_on_step_end_tensor_inputs, **kwargs,
        }
        # fmt: on
        _check_generator(generator)
        observed = bool(return_sfcm) or sfcm_guidance > 0
        own_rows = compare or observed or not adapter_in_unconditional
        if target_prompt is None and target_scale is None and not own_rows:
            _warn_of_weights(prompt)
            return super().__call__(prompt, **stock_arguments)
        self._check_stock_inputs(prompt, stock_arguments)
        one_prompt = isinstance(prompt, str)
        base_prompts = [prompt] if one_prompt else prompt
        if prompt_embeds is not None and (target_prompt is not None or return_sfcm):
            raise ValueError("`target_prompt` and `return_sfcm` need the text as `prompt`, not `prompt_embeds`.")
        if prompt_embeds is None:
            _check_prompts(base_prompts)
        count = num_images_per_prompt * (len(base_prompts) if prompt_embeds is None else len(prompt_embeds))
        if own_rows:
            _check_rows(stock_arguments, count)

        # 2. Compose the full prompts
        prompts, pairs, targets = base_prompts, [], []
        if target_prompt is not None:
            targets = _list_targets(target_prompt)
            protected = _phrase_lists("base_phrases", base_phrases, len(base_prompts), one_prompt)
            free = _phrase_lists("free_phrases", free_phrases, len(base_prompts), one_prompt)
            pairs = [
                make_prompt_pair(text, targets, base_phrases=own, free_phrases=own_free or ())
                for text, own, own_free in zip(base_prompts, protected, free, strict=True)
            ]
            prompts = [pair.full_prompt for pair in pairs]
            for pair in pairs:
                _warn_of_contradictions(pair)
        _warn_of_weights(prompts)
        phrases = None
        if pairs:
            phrases = self._locate_target_phrases(pairs, num_images_per_prompt, observed)
        elif return_sfcm:
            given = _phrase_lists("base_phrases", base_phrases, len(base_prompts), one_prompt)
            phrases = self._locate_base_phrases(base_prompts, given, num_images_per_prompt)
        if observed and any(
            self.maybe_convert_prompt(text, self.tokenizer) != text for text in [*prompts, *base_prompts]
        ):
            # The prompts as they are tokenized have to be those that are drawn, else the maps are of other words.
            raise ValueError("The SFCM does not work with textual inversions of several vectors.")

        with ExitStack() as stack:
            # 3. The adapters of this call
            active = self._active_adapters()
            if isinstance(target_prompt, dict):
                active = self._known_adapters(list(target_prompt))
                for model in self._adapted_models():
                    own = [name for name in active if name in getattr(model, "peft_config", {})]
                    stack.enter_context(active_adapters(model, own))
            if target_scale is not None:
                factors = _scale_factors(target_scale, active, targets)
                for model in self._adapted_models():
                    stack.enter_context(adapter_scales(model, factors))

            # 4. Encode the prompts, with the adapters of the text encoder and without
            guided = guidance_scale > 1 and self.unet.config.time_cond_proj_dim is None
            encode = partial(self._encode, guided=guided, arguments=stock_arguments)
            embeds, negative_embeds = encode(prompts[0] if one_prompt else prompts)
            original_embeds, original_negative_embeds = embeds, negative_embeds
            if own_rows:
                with self._original_text_encoder():
                    original_embeds, original_negative_embeds = encode(prompt)
            if not adapter_in_unconditional:
                negative_embeds = original_negative_embeds

            # 5. Draw, with the original model's rows in the same batch
            branch_size = 2 * count if compare else count
            unet, observer = _uncompiled(self.unet), None
            if compare:
                stock_arguments |= self._twin_noise(count, embeds.dtype, stock_arguments)
                embeds = torch.cat([embeds, original_embeds])
                if guided:
                    negative_embeds = torch.cat([negative_embeds, original_negative_embeds])

                def prompts_of_both(unet: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
                    # diffusers' SDCFGCutoffCallback leaves one row, taking it for that of the only image.
                    if len(kwargs["encoder_hidden_states"]) < len(args[0]):
                        kwargs["encoder_hidden_states"] = embeds
                    return args, kwargs

                stack.callback(unet.register_forward_pre_hook(prompts_of_both, with_kwargs=True).remove)
            if observed:
                observer = _Observer([original_embeds], branch_size, self._to_epsilon)
                if pairs and SFCM_MODES[sfcm_mode].target_only:
                    observer.base_embeds.append(encode(prompt)[0])
                if sfcm_guidance > 0:
                    observer.guide = _Guide(sfcm_guidance, sfcm_guidance_exponent, phrases)
                if return_sfcm or phrases.free.any():
                    observer.store = stack.enter_context(capture_cross_attention(unet))
                    stack.enter_context(observer.store.record())
                stack.enter_context(observer.watch(unet))
            if own_rows:

                def rows_of_the_original(batch_size: int) -> list[int]:
                    own = batch_size - (0 if observer is None else observer.extra)
                    negatives = range(0 if adapter_in_unconditional else own - branch_size)
                    references = [i for i in range(own) if i % branch_size >= count and i not in negatives]
                    return [*negatives, *references, *(range(own, own + count) if observer else ())]

                stack.enter_context(original_rows(unet, rows_of_the_original))
            stock_arguments |= {"prompt_embeds": embeds, "negative_prompt_embeds": negative_embeds}
            output = super().__call__(**stock_arguments | {"negative_prompt": None, "num_images_per_prompt": 1})
        if not (compare or return_sfcm):
            return output

        # 6. Take the halves apart, compute the maps
        flags, maps = output.nsfw_content_detected, {}
        if return_sfcm:
            # With neither a target nor a LoRA both paths are the same, and their difference would be rounding.
            has_map = bool(pairs) or bool(active)
            maps = _compute_maps(observer, phrases, sfcm_mode, bool(pairs), has_map, return_sfcm == "per_step")
        return SPFPortraitPipelineOutput(
            images=output.images[:count],
            nsfw_content_detected=None if flags is None else flags[:count],
            reference_images=output.images[count:] if compare else None,
            **maps,
        )

    @staticmethod
    def visualize(output: SPFPortraitPipelineOutput, index: int = 0, columns: int = 4) -> PIL.Image.Image:
        """One picture of all that a call with `return_sfcm` or `compare` returned about an image.

        Args:
            output: of a call with any `output_type` but "latent".
            index: which image, in [0, B).
            columns: pictures a row.

        Returns:
            An RGB image: the original model's portrait, the portrait, the SFCM over it, and a heat map over the
            portrait for each target and over the original for each base phrase, with its words and its CLIP
            distance to the target.

        Raises:
            ValueError: latents, or an output without maps and references.
            IndexError: there is no such image; the message says how many there are.

        Source: [ours].
        """
        if not isinstance(output, SPFPortraitPipelineOutput):
            raise ValueError("Nothing to show beside the image: call with `return_sfcm=True` or `compare=True`.")
        if not 0 <= index < len(output.images):
            raise IndexError(f"There is no image {index}: the output has {len(output.images)}, counted from 0.")
        portrait, targets = _pil_image(output.images, index), (output.targets or {index: ()})[index]
        reference = portrait if output.reference_images is None else _pil_image(output.reference_images, index)
        shown = [] if output.reference_images is None else [("original model", reference)]
        shown.append((", ".join(targets) or "with the LoRA", portrait))
        if output.sfcm is not None:
            shown.append(("SFCM", overlay_heat_map(portrait, output.sfcm[index, 0])))
        if output.phrases is not None:
            for text, heat_map in zip(targets, output.target_maps[index] if targets else ()):
                shown.append((f"{text} (target)", overlay_heat_map(portrait, heat_map)))
            for i, text in enumerate(output.phrases[index]):
                distance = "" if not targets else f" ({output.phrase_distances[index, i]:.2f})"
                shown.append((f"{text}{distance}", overlay_heat_map(reference, output.phrase_maps[index, i])))
        captions, pictures = zip(*shown)
        return captioned_pictures(pictures, captions, columns)

    def encode_prompt(self, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
        """Encode prompts as [`StableDiffusionPipeline`] does, `clip_skip` included."""
        with _text_model_of_its_own(self.text_encoder):
            return super().encode_prompt(*args, **kwargs)

    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict: str | dict[str, Tensor], adapter_name: str | None = None, **kwargs
    ) -> None:
        """Load a LoRA as [`StableDiffusionPipeline`] does, in diffusers' or kohya's format, but none that fits not.

        Args:
            pretrained_model_name_or_path_or_dict (`str` or `dict`):
                A file, a folder, an id of the Hub, or a state dict.
            adapter_name (`str`, *optional*):
                Under which it is switched on and off.
            kwargs:
                As in [`StableDiffusionPipeline`].

        Raises:
            `ValueError`: it is for another architecture, damaged, or has numbers that are none; nothing was loaded.
        """
        given = pretrained_model_name_or_path_or_dict
        weights = dict(given) if isinstance(given, dict) else given
        layers, alphas, metadata = self.lora_state_dict(weights, return_lora_metadata=True, **kwargs)
        name = "The LoRA" if isinstance(given, dict) else f"The LoRA {given}"
        if kwargs.get("weight_name") is not None:
            name += f"/{kwargs['weight_name']}"
        _check_lora_values(name, layers, alphas, metadata)
        _check_lora_fits(name, layers, {"unet": self.unet, "text_encoder": self.text_encoder})
        with _without_false_alarms():
            super().load_lora_weights(given, adapter_name=adapter_name, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Save the components as a [`StableDiffusionPipeline`], which this one is but for its call.

        A folder that named this class could be loaded with this code at hand alone. For a merged checkpoint call
        `fuse_lora()` and `unload_lora_weights()` before. Arguments as in [`StableDiffusionPipeline`].

        Raises:
            `ValueError`: a LoRA is loaded, under which the weights would be saved by names that no loader knows.
        """
        if any(isinstance(module, BaseTunerLayer) for model in self._adapted_models() for module in model.modules()):
            raise ValueError(
                "A LoRA is loaded: call `unload_lora_weights()` before saving, and `fuse_lora()` before that to keep "
                "it in the weights."
            )
        # Not `from_pipe`, which would turn the models that both share into float32.
        stock = StableDiffusionPipeline(**self.components, requires_safety_checker=self.config.requires_safety_checker)
        stock.save_pretrained(save_directory, **kwargs)

    def _check_stock_inputs(self, prompt: Any, arguments: dict[str, Any]) -> None:
        """What the stock call checks, before anything is encoded."""
        callback, names = arguments["callback_on_step_end"], arguments["callback_on_step_end_tensor_inputs"]
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            names = callback.tensor_inputs
        size = (arguments["height"], arguments["width"])
        self.check_inputs(
            prompt,
            *(size if all(size) else (8, 8)),  # the stock call takes its own size if one of the two is missing
            arguments.get("callback_steps"),
            arguments["negative_prompt"],
            arguments["prompt_embeds"],
            arguments["negative_prompt_embeds"],
            arguments["ip_adapter_image"],
            arguments["ip_adapter_image_embeds"],
            names,
        )

    def _adapted_models(self) -> list[torch.nn.Module]:
        """The models that a LoRA can be in."""
        return [model for model in (self.unet, self.text_encoder) if model is not None]

    def _active_adapters(self) -> list[str]:
        """Names of the adapters that are switched on, in order."""
        layers = [m for model in self._adapted_models() for m in model.modules() if isinstance(m, BaseTunerLayer)]
        return list(dict.fromkeys(n for layer in layers if not layer.disable_adapters for n in layer.active_adapters))

    def _known_adapters(self, names: list[str]) -> list[str]:
        """The names, once it is sure that each is loaded."""
        known = list(dict.fromkeys(n for model in self._adapted_models() for n in getattr(model, "peft_config", {})))
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(
                f"`target_prompt` names the adapters {unknown}, but loaded are {known}: call "
                "`load_lora_weights(…, adapter_name=…)` first."
            )
        return names

    def _original_text_encoder(self) -> AbstractContextManager:
        """Inside, prompts are encoded without adapters."""
        return nullcontext() if self.text_encoder is None else original_rows(self.text_encoder, range)

    def _encode(
        self, prompts: str | list[str] | None, guided: bool, arguments: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, E) of the prompts, and of the negative prompts if the run is guided, as the stock call encodes."""
        embeds, negative_embeds = self.encode_prompt(
            prompts,
            self._execution_device,
            arguments["num_images_per_prompt"],
            guided,
            arguments["negative_prompt"],
            prompt_embeds=arguments["prompt_embeds"],
            negative_prompt_embeds=arguments["negative_prompt_embeds"],
            lora_scale=(arguments["cross_attention_kwargs"] or {}).get("scale"),
            clip_skip=arguments["clip_skip"],
        )
        return embeds, negative_embeds if guided else None

    def _to_epsilon(self, timestep: Tensor) -> Tensor:
        """What makes a difference of two predictions at a timestep one of predicted noise."""
        # What has no table of signal, as flow matching and EDM, weighs each step's prediction as it is.
        alphas_cumprod = getattr(self.scheduler, "alphas_cumprod", None)
        prediction_type = self.scheduler.config.get("prediction_type", "epsilon")
        if alphas_cumprod is None or prediction_type == "flow_prediction":
            prediction_type = "epsilon"
        return epsilon_scale(alphas_cumprod, timestep, prediction_type)

    def _twin_noise(self, count: int, dtype: torch.dtype, arguments: dict[str, Any]) -> dict[str, Any]:
        """Latents and generators of a run of both halves, with equal noise in them, drawn as the stock call would."""
        latents, generator = arguments["latents"], arguments["generator"]
        if latents is None:
            sides = self.unet.config.sample_size
            sides = (sides, sides) if self._is_unet_config_sample_size_int else sides
            if arguments["height"] and arguments["width"]:
                sides = (arguments["height"] // self.vae_scale_factor, arguments["width"] // self.vae_scale_factor)
            shape = (count, self.unet.config.in_channels, *sides)
            latents = randn_tensor(shape, generator, self._execution_device, dtype)
        return {"latents": torch.cat([latents, latents]), "generator": _pair_generators(generator, count)}

    def _locate_target_phrases(self, pairs: Sequence[PromptPair], images_per_prompt: int, observed: bool) -> _Phrases:
        """Where phrases and targets stand in the prompts, and how far they are from each other."""
        tokens = [tokenize_prompt_pair(pair, self.tokenizer) for pair in pairs]
        texts = [pair.base_phrases for pair in pairs]
        positions = [row.phrase_positions for row in tokens]
        width = max(map(len, texts))
        free = [torch.tensor([phrase in pair.free_phrases for phrase in pair.base_phrases]) for pair in pairs]
        # Only maps ask for the distances, and a call without maps may come without a text encoder on the device.
        distances = self._phrase_distances(pairs, tokens) if observed else [torch.zeros(len(row)) for row in texts]
        return self._phrase_rows(
            texts,
            [tuple(target.text for target in pair.target_prompts) for pair in pairs],
            positions,
            [row.each_target_positions for row in tokens],
            _pad(free, width),
            _pad(distances, width),
            images_per_prompt,
        )

    def _locate_base_phrases(
        self, prompts: Sequence[str], given: Sequence[list[str] | None], images_per_prompt: int
    ) -> _Phrases:
        """The same of prompts without a target."""
        texts = [tuple(split_phrases(text) if own is None else own) for text, own in zip(prompts, given, strict=True)]
        if not all(texts):
            raise ValueError(f"There is no phrase in one of the prompts {list(prompts)}; give `base_phrases`.")
        positions = [locate_phrases(text, own, self.tokenizer) for text, own in zip(prompts, texts, strict=True)]
        shape = (len(texts), max(map(len, texts)))
        none, nothing = torch.zeros(shape, dtype=torch.bool), [()] * len(texts)
        return self._phrase_rows(
            texts, nothing, positions, [((),)] * len(texts), none, torch.zeros(shape), images_per_prompt
        )

    def _phrase_rows(
        self,
        texts: Sequence[tuple[str, ...]],
        targets: Sequence[tuple[str, ...]],
        positions: Sequence[Sequence[Sequence[int]]],
        target_positions: Sequence[Sequence[Sequence[int]]],
        free: Tensor,
        distances: Tensor,
        images_per_prompt: int,
    ) -> _Phrases:
        """One row per image from one per prompt."""
        length = self.tokenizer.model_max_length
        weights = _mask_rows(positions, length)

        def repeat(rows: Tensor) -> Tensor:
            return rows.repeat_interleave(images_per_prompt, 0)

        return _Phrases(
            texts=[row for row in texts for _ in range(images_per_prompt)],
            targets=[row for row in targets for _ in range(images_per_prompt)],
            weights=repeat(weights),
            # A phrase that was cut off is nowhere in the image, like the padding of a shorter prompt.
            present=repeat(weights.any(-1)),
            target_weights=repeat(_mask_rows(target_positions, length)),
            free=repeat(free),
            distances=repeat(distances),
        )

    def _phrase_distances(self, pairs: Sequence[PromptPair], tokens: Sequence[PromptTokens]) -> list[Tensor]:
        """Per prompt the (P,) float32 distances of its phrases to the target, by the original text encoder."""
        with self._original_text_encoder():
            return clip_distances(self.text_encoder, self.tokenizer, pairs, tokens, self._execution_device)
