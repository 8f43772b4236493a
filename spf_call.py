"""The pipeline's call, as every family of models shares it, and what it returns.

Legend: B images of one call (prompts times `num_images_per_prompt`), H/W latent size, P base phrases, K targets,
N calls of the denoiser in a run.
Paper: arXiv 2504.00396; what names no source is [ours].
"""

import inspect
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import PreTrainedTokenizerBase


# The siblings as modules of the package that a custom pipeline is, or as modules on the path.
try:
    from . import attention_processors, pictures, prompts, sfcm, spf_arguments, spf_lora, spf_observer
except ImportError:
    import attention_processors as attention_processors
    import pictures as pictures
    import prompts as prompts
    import sfcm as sfcm
    import spf_arguments as spf_arguments
    import spf_lora as spf_lora
    import spf_observer as spf_observer

# The files of the pipelines, and whose denoisers they are for.
FIRST, XL, THIRD = "pipeline_spf_portrait.py", "pipeline_spf_portrait_xl.py", "pipeline_spf_portrait_3.py"
FAMILIES = {FIRST: "Stable Diffusion 1.x or 2.x", XL: "Stable Diffusion XL", THIRD: "Stable Diffusion 3"}
Embeds = tuple[Tensor, ...]  # all tensors that a family makes of a prompt, (B, ...) each
# Those of them that a family has.
_OTHER_PROMPTS = ("prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3")


@dataclass
class SPFPortraitPipelineOutput(StableDiffusionPipelineOutput):
    """Output of a call with `compare` or `return_sfcm`; what was not asked for is None. Maps are float32 on the CPU,
    in [0, 1].

    Args:
        images: B images of the full prompts (of the prompts themselves without a target), as `output_type` says.
        nsfw_content_detected: B flags for `images`, or None without a safety checker.
        reference_images: the original model's B images of the base prompts from the same noise, like `images`.
        sfcm: (B, 1, H, W), high where the target responds; without a target, where the LoRA changes the picture, and
            None if there is no LoRA either.
        sfcm_per_step: (B, N, H, W), the same of each call of the denoiser.
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


class SPFCall(spf_lora.LoraPipeline):
    """What a stock pipeline becomes with targets, references and maps; the class of a family derives from both.

    Components, loading, saving and all that is not named here are the stock pipeline's. The family's class has
    `__call__`, which hands all its arguments to `_draw`, and three hooks:

    - `_encode(prompts, guided, stock)`: `Embeds` of the prompts, and of the negative prompts or None (without
      guidance), as the stock call encodes them,
    - `_stock_prompts(embeds, negatives)`: the keywords of the stock call that stand for them,
    - `_extra_rows(args, kwargs, rows, own, appended, closed, stock)`: the arguments of a call of the denoiser, with
      the rows that the `RowLayout` appends; `own` are the embeds of all rows before these, `appended` those of each
      appended group. While the gate is `closed`, `own` stand in place of what the call itself has.

    Beside these a family says how its attention is captured and where a prompt stands in the denoiser's text.
    """

    _tokenizers = ("tokenizer",)  # names; all of them count the denoiser's text tokens
    _clip = ("text_encoder", "tokenizer")  # names of what measures the distances of phrases and targets
    # Of a denoiser, a context whose store records its attention to the text.
    _capture = staticmethod(attention_processors.capture_cross_attention)

    def _draw(self, **stock) -> Any:
        request = spf_arguments.Request(**{own.name: stock.pop(own.name) for own in fields(spf_arguments.Request)})
        prompt = stock.pop("prompt")
        request.check(stock["return_dict"])
        closed_at = self._gate(request.sfcm_guidance_start)
        spf_arguments.check_generator(stock["generator"])
        spf_arguments.warn_of_weights(*(stock.get(name) for name in _OTHER_PROMPTS))
        if request.is_stock:
            spf_arguments.warn_of_weights(prompt)
            return super().__call__(prompt, **stock)
        texts, targets, phrases, images = self._compose(prompt, request, stock)
        starts = sfcm.SFCM_MODES[request.sfcm_mode].differences if request.target_prompt is not None else ("paths",)
        rows = spf_observer.RowLayout(
            images, request.compare, request.adapter_in_unconditional,
            appended=(1 + ("words" in starts)) * request.observed,
        )  # fmt: skip
        with ExitStack() as stack:
            active = stack.enter_context(self._adapters(request, targets))
            # A denoiser that is told the scale itself has no negative rows.
            guided = stock["guidance_scale"] > 1 and self._denoiser.config.get("time_cond_proj_dim") is None
            encode = partial(self._encode, guided=guided, stock=stock)
            embeds, negatives = encode(texts[0] if isinstance(prompt, str) else texts)
            if request.splits_rows:
                with self._original_text_encoders():
                    originals, original_negatives = encode(prompt)
                others = [encode(prompt)[0]] if rows.appended > 1 else []
                appended, swapped = ([first, *others][: rows.appended] for first in (originals, embeds))
                if not request.adapter_in_unconditional:
                    negatives = original_negatives
                if request.compare:
                    stock = stock | self._twin_noise(images, embeds[0].dtype, stock)
                    embeds, originals = _join(embeds, originals), _join(originals, originals)
                    if guided:
                        negatives = _join(negatives, original_negatives)
                        original_negatives = _join(original_negatives, original_negatives)
                told = (negatives, embeds, appended), (original_negatives, originals, swapped)

                def extend(args: tuple, kwargs: dict[str, Any], closed: bool) -> tuple[tuple, dict[str, Any]]:
                    before, own, groups = told[closed]
                    own = _join(before, own) if guided else own
                    return self._extra_rows(args, kwargs, rows, own, groups, closed, stock)

                guidance = request.sfcm_guidance, request.sfcm_guidance_exponent
                observer = spf_observer.Observer(rows, phrases, extend, self._to_epsilon, guidance, closed_at, starts)
                looks = request.return_sfcm or (request.observed and phrases.free.any())
                stack.enter_context(
                    observer.watch(spf_lora.uncompiled(self._denoiser), self._capture if looks else None)
                )
            stock = stock | self._stock_prompts(embeds, negatives) | {"num_images_per_prompt": 1}
            output = super().__call__(**stock)
        if not (request.compare or request.return_sfcm):
            return output

        flags, maps = output.get("nsfw_content_detected"), {}
        if request.return_sfcm:
            # With neither a target nor a LoRA both paths are the same, and their difference would be rounding.
            maps = observer.maps(request.sfcm_mode, bool(targets or active), request.return_sfcm == "per_step")
        return SPFPortraitPipelineOutput(
            images=output.images[:images], nsfw_content_detected=None if flags is None else flags[:images],
            reference_images=output.images[images:] if request.compare else None, **maps,
        )  # fmt: skip

    def _compose(
        self, prompt: str | list[str] | None, request: spf_arguments.Request, stock: dict[str, Any]
    ) -> tuple[list[str] | None, list[spf_arguments.Target], spf_observer.Phrases | None, int]:
        """The full prompts, their targets, where all that the maps are about stands, and B; all of it checked."""
        self._check_stock_inputs(prompt, stock)
        one_prompt, embeds = isinstance(prompt, str), stock["prompt_embeds"]
        base = full = [prompt] if one_prompt else prompt
        if embeds is None:
            spf_arguments.check_prompts(base)
        elif request.target_prompt is not None or request.return_sfcm:
            raise ValueError("`target_prompt` and `return_sfcm` need the text as `prompt`, not `prompt_embeds`.")
        per_prompt, count = stock["num_images_per_prompt"], len(base if embeds is None else embeds)
        if request.splits_rows:
            spf_arguments.check_rows(stock, per_prompt * count)

        base_phrases, free_phrases = (
            spf_arguments.phrase_lists(name, getattr(request, name), count, one_prompt)
            for name in ("base_phrases", "free_phrases")
        )
        targets, pairs, phrases = [], [], None
        if request.target_prompt is not None:
            targets = spf_arguments.list_targets(request.target_prompt)
            pairs = [
                prompts.make_prompt_pair(text, targets, base_phrases=own, free_phrases=free or ())
                for text, own, free in zip(base, base_phrases, free_phrases, strict=True)
            ]
            full = [pair.full_prompt for pair in pairs]
        elif request.return_sfcm:
            pairs = [prompts.without_target(text, own) for text, own in zip(base, base_phrases, strict=True)]
        spf_arguments.warn_of_weights(full)
        spf_arguments.warn_of_targets(pairs)
        tokens = [self._locate(pair, stock) for pair in pairs]
        # A call without maps may come without a text encoder on the device.
        if request.observed:
            rows = zip(pairs, tokens, self._phrase_distances(pairs, tokens), strict=True)
            phrases = spf_observer.phrases_of(row for row in rows for _ in range(per_prompt))
            self._check_inversions([*full, *base])
        return full, targets, phrases, per_prompt * count

    def _text_tokenizers(self) -> list[PreTrainedTokenizerBase]:
        return [own for name in self._tokenizers if (own := getattr(self, name)) is not None]

    def _locate(self, pair: prompts.PromptPair, stock: dict[str, Any]) -> prompts.PromptTokens:
        """Where a pair's phrases and targets stand in the text that the denoiser is told."""
        return prompts.locate_in_all(pair, self._text_tokenizers())

    def _check_inversions(self, texts: Sequence[str]) -> None:
        """The prompts as they are tokenized have to be those that are drawn, else the maps are of other words."""
        convert = getattr(self, "maybe_convert_prompt", None)  # not every family has textual inversions
        if convert and any(convert(*own) != own[0] for own in itertools.product(texts, self._text_tokenizers())):
            raise ValueError("The SFCM does not work with textual inversions of several vectors.")

    @staticmethod
    def visualize(output: SPFPortraitPipelineOutput, index: int = 0, columns: int = 4) -> PIL.Image.Image:
        """One RGB picture of all that a call with `return_sfcm` or `compare` returned about an image.

        The original model's portrait, the portrait, the SFCM over it, and a heat map over the portrait for each target
        and over the original for each base phrase, with its words and its CLIP distance to the target, `columns` a
        row.

        Raises:
            ValueError: latents, or an output without maps and references.
            IndexError: there is no such image in [0, B); the message says how many there are.
        """
        if not isinstance(output, SPFPortraitPipelineOutput):
            raise ValueError("Nothing to show beside the image: call with `return_sfcm=True` or `compare=True`.")
        if not 0 <= index < len(output.images):
            raise IndexError(f"There is no image {index}: the output has {len(output.images)}, counted from 0.")
        overlay = pictures.overlay_heat_map
        portrait, targets = _pil_image(output.images, index), (output.targets or {index: ()})[index]
        reference = portrait if output.reference_images is None else _pil_image(output.reference_images, index)
        shown = [] if output.reference_images is None else [("original model", reference)]
        shown.append((", ".join(targets) or "with the LoRA", portrait))
        if output.sfcm is not None:
            shown.append(("SFCM", overlay(portrait, output.sfcm[index, 0])))
        if output.phrases is not None:
            for text, heat_map in zip(targets, output.target_maps[index] if targets else ()):
                shown.append((f"{text} (target)", overlay(portrait, heat_map)))
            for i, text in enumerate(output.phrases[index]):
                distance = "" if not targets else f" ({output.phrase_distances[index, i]:.2f})"
                shown.append((f"{text}{distance}", overlay(reference, output.phrase_maps[index, i])))
        captions, drawn = zip(*shown)
        return pictures.captioned_pictures(drawn, captions, columns)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Save the components as the stock pipeline, which this one is but for its call, with its arguments.

        A folder that named this class could be loaded with this code at hand alone. For a merged checkpoint call
        `fuse_lora()` and `unload_lora_weights()` before.

        Raises `ValueError`: a LoRA is loaded, under which the weights would be saved by names that no loader knows.
        """
        if self._adapted_layers():
            raise ValueError(
                "A LoRA is loaded: call `unload_lora_weights()` before saving, and `fuse_lora()` before that to keep "
                "it in the weights."
            )
        stock = next(kind for kind in type(self).__mro__ if kind.__module__.startswith("diffusers."))
        _, options = self._get_signature_keys(self)
        # Not `from_pipe`, which would turn the models that both share into float32.
        twin = stock(**self.components, **{name: self.config[name] for name in options if name in self.config})
        twin.save_pretrained(save_directory, **kwargs)

    def _check_stock_inputs(self, prompt: Any, stock: dict[str, Any]) -> None:
        """What the stock call checks, before anything is encoded."""
        given, callback = stock | {"prompt": prompt}, stock["callback_on_step_end"]
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            given["callback_on_step_end_tensor_inputs"] = callback.tensor_inputs
        if not (given["height"] and given["width"]):
            given |= {"height": 8, "width": 8}  # the stock call takes its own size if one of the two is missing
        self.check_inputs(**{name: given.get(name) for name in inspect.signature(self.check_inputs).parameters})

    def _to_epsilon(self, timestep: Tensor) -> Tensor:
        """What makes a difference of two predictions at a timestep one of predicted noise."""
        # What has no table of signal, as flow matching and EDM, weighs each step's prediction as it is.
        alphas_cumprod = getattr(self.scheduler, "alphas_cumprod", None)
        prediction_type = self.scheduler.config.get("prediction_type", "epsilon")
        if alphas_cumprod is None or prediction_type == "flow_prediction":
            prediction_type = "epsilon"
        return sfcm.epsilon_scale(alphas_cumprod, timestep, prediction_type)

    def _gate(self, start: float | None) -> Callable[[Tensor], bool]:
        """Whether a timestep has a noise ratio above `start`; no one has for None.

        Raises ValueError: the scheduler's timesteps are no places in a table of noise.
        """
        if start is None:
            return lambda timestep: False
        signal, config = getattr(self.scheduler, "alphas_cumprod", None), self.scheduler.config
        flow = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
        if signal is None or flow or config.get("timestep_type", "discrete") != "discrete":
            raise ValueError(
                "`sfcm_guidance_start` is a noise ratio, and the timesteps of this "
                f"{type(self.scheduler).__name__} are no places in a table of noise: use another scheduler, such as "
                "DDIM, PNDM or Euler with discrete timesteps."
            )
        # Pure noise has the least signal that diffusers gives it; a timestep may lie between two integers.
        signal = signal.cpu().clamp(min=2**-24)
        ratios = ((1 - signal) / signal).sqrt()
        return lambda timestep: bool(ratios[round(float(timestep))] > start)

    def _twin_noise(self, count: int, dtype: torch.dtype, stock: dict[str, Any]) -> dict[str, Any]:
        """Latents and generators of a run of both halves, with equal noise in them, drawn as the stock call would."""
        latents, generator, denoiser = stock["latents"], stock["generator"], self._denoiser.config
        if latents is None:
            sides = [denoiser.sample_size] * 2 if isinstance(denoiser.sample_size, int) else denoiser.sample_size
            if stock["height"] and stock["width"]:
                sides = [stock[side] // self.vae_scale_factor for side in ("height", "width")]
            latents = randn_tensor((count, denoiser.in_channels, *sides), generator, self._execution_device, dtype)
        return {"latents": torch.cat([latents, latents]), "generator": _pair_generators(generator, count)}

    def _phrase_distances(
        self, pairs: Sequence[prompts.PromptPair], tokens: Sequence[prompts.PromptTokens]
    ) -> list[Tensor]:
        """Per prompt the (P,) float32 distances of its phrases to the target, by the original model, or zeros."""
        if not pairs[0].target_prompts:
            return [torch.zeros(len(pair.base_phrases)) for pair in pairs]
        with self._original_text_encoders():
            clip = (getattr(self, name) for name in self._clip)
            return sfcm.clip_distances(*clip, pairs, tokens, self._execution_device)


def check_family(denoiser: torch.nn.Module | None, own: str) -> None:
    """Raise a ValueError, which names the right file, if a denoiser is not that of the file `own`'s family; a pipeline
    that only encodes prompts may have none.
    """
    if denoiser is None or (found := _file_of(denoiser.config)) == own:
        return
    if found is None:
        raise ValueError(f"A {type(spf_lora.uncompiled(denoiser)).__name__} is no model of {FAMILIES[own]}.")
    kind = "transformer" if found == THIRD else "UNet"
    raise ValueError(f"The {kind} is of {FAMILIES[found]}: use {found} instead of {own}.")


def _file_of(config: Mapping[str, Any]) -> str | None:
    """The file of the pipeline that a denoiser with this configuration is for; None if there is none."""
    if "caption_projection_dim" in config and "pos_embed_max_size" in config:
        return THIRD
    if "cross_attention_dim" not in config:
        return None
    # Only Stable Diffusion XL's UNet is told pooled embeddings and sizes.
    return XL if config.get("addition_embed_type") == "text_time" else FIRST


def _join(first: Embeds, second: Embeds) -> Embeds:
    return tuple(torch.cat(both) for both in zip(first, second, strict=True))


def _pair_generators(generator: torch.Generator | list[torch.Generator] | None, count: int) -> list[torch.Generator]:
    """Generators for `count` rows and their twins, each twin drawing the very same noise as its row."""
    if generator is None:
        # From the global generator, but not a copy of it: that would draw the next call's latents in advance.
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    generators = generator if isinstance(generator, list) else [generator] * count
    twins = {id(own): torch.Generator(own.device).set_state(own.get_state()) for own in generators}
    return [*generators, *(twins[id(own)] for own in generators)]


def _pil_image(images: list[PIL.Image.Image] | np.ndarray | Tensor, index: int) -> PIL.Image.Image:
    if isinstance(images, list):
        return images[index]
    if isinstance(images, Tensor):
        if images.shape[1] != 3:
            raise ValueError("Latents cannot be shown: call with another `output_type` than 'latent'.")
        images = VaeImageProcessor.pt_to_numpy(images)
    return VaeImageProcessor.numpy_to_pil(images[index])[0]
