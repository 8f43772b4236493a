"""The pipeline's call, as every family of models shares it.

Legend: B images of one call (prompts times `num_images_per_prompt`), P base phrases. Paper: arXiv 2504.00396.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils.torch_utils import is_compiled_module, randn_tensor
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor


# The siblings as modules of the package that a custom pipeline is, or as modules on the path.
try:
    from . import adapters, attention_processors, prompts, sfcm, spf_arguments, spf_observer, spf_output, wording
except ImportError:
    import adapters as adapters
    import attention_processors as attention_processors
    import prompts as prompts
    import sfcm as sfcm
    import spf_arguments as spf_arguments
    import spf_observer as spf_observer
    import spf_output as spf_output
    import wording as wording

Embeds = tuple[Tensor, ...]  # all tensors that a family makes of a prompt, (B, ...) each


@dataclass(frozen=True)
class _Texts:
    """The prompts of a call: `base` as given, `full` with the targets, and where what the maps are about stands."""

    base: list[str] | None
    full: list[str] | None
    targets: list[spf_arguments.Target]
    phrases: spf_observer.Phrases | None
    images: int


class SPFCall:
    """What a stock pipeline becomes with targets, references and maps; the class of a family derives from both.

    Components, loading, saving and all that is not named here are the stock pipeline's. The family's class has
    `__call__`, which hands its arguments to `_draw`, and three hooks:

    - `_encode(prompts, guided, stock)`: `Embeds` of the prompts, and of the negative prompts or None (without
      guidance), as the stock call encodes them,
    - `_stock_prompts(embeds, negatives)`: the keywords of the stock call that stand for them,
    - `_extra_rows(args, kwargs, rows, own, appended)`: the arguments of a call of the denoiser, with the rows that the
      `RowLayout` appends; `own` are the embeds of the conditional branch, `appended` those of each appended group.
    """

    visualize = staticmethod(spf_output.visualize)

    def _draw(self, prompt: str | list[str] | None, request: spf_arguments.Request, stock: dict[str, Any]) -> Any:
        """The call: `stock` are the arguments of the stock pipeline, by name."""
        request.check(stock["return_dict"])
        spf_arguments.check_generator(stock["generator"])
        if request.is_stock:
            spf_arguments.warn_of_weights(prompt)
            return super().__call__(prompt, **stock)
        texts = self._compose(prompt, request, stock)
        target_only = request.target_prompt is not None and sfcm.SFCM_MODES[request.sfcm_mode].target_only
        rows = spf_observer.RowLayout(
            texts.images,
            request.compare,
            request.adapter_in_unconditional,
            appended=(1 + target_only) * request.observed,
        )
        with ExitStack() as stack:
            active = stack.enter_context(self._adapters(request, texts.targets))
            guided = stock["guidance_scale"] > 1 and self.unet.config.time_cond_proj_dim is None
            encode = partial(self._encode, guided=guided, stock=stock)
            embeds, negatives = encode(texts.full[0] if isinstance(prompt, str) else texts.full)
            if request.splits_rows:
                with self._original_text_encoders():
                    originals, original_negatives = encode(prompt)
                appended = [originals][: rows.appended]
                if rows.appended > 1:
                    appended.append(encode(prompt)[0])
                if not request.adapter_in_unconditional:
                    negatives = original_negatives
                if request.compare:
                    stock = stock | self._twin_noise(texts.images, embeds[0].dtype, stock)
                    embeds = _join(embeds, originals)
                    negatives = _join(negatives, original_negatives) if guided else None
                observer = spf_observer.Observer(
                    rows, partial(self._extra_rows, rows=rows, own=embeds, appended=appended), self._to_epsilon
                )
                if request.sfcm_guidance > 0:
                    observer.guide = spf_observer.Guide(
                        request.sfcm_guidance, request.sfcm_guidance_exponent, texts.phrases
                    )
                looks = request.return_sfcm or (request.observed and texts.phrases.free.any())
                stack.enter_context(observer.watch(uncompiled(self.unet), with_attention=bool(looks)))
            stock = stock | self._stock_prompts(embeds, negatives) | {"num_images_per_prompt": 1}
            output = super().__call__(**stock)
        if not (request.compare or request.return_sfcm):
            return output

        flags, maps, has_target = output.get("nsfw_content_detected"), {}, bool(texts.targets)
        if request.return_sfcm:
            # With neither a target nor a LoRA both paths are the same, and their difference would be rounding.
            has_map, per_step = has_target or bool(active), request.return_sfcm == "per_step"
            maps = observer.maps(texts.phrases, request.sfcm_mode, has_target, has_map, per_step)
        return spf_output.SPFPortraitPipelineOutput(
            images=output.images[: texts.images],
            nsfw_content_detected=None if flags is None else flags[: texts.images],
            reference_images=output.images[texts.images :] if request.compare else None,
            **maps,
        )

    def _compose(
        self, prompt: str | list[str] | None, request: spf_arguments.Request, stock: dict[str, Any]
    ) -> _Texts:
        """Check what goes with the prompts, and compose the full ones."""
        self._check_stock_inputs(prompt, stock)
        one_prompt, embeds = isinstance(prompt, str), stock["prompt_embeds"]
        base = full = [prompt] if one_prompt else prompt
        if embeds is not None and (request.target_prompt is not None or request.return_sfcm):
            raise ValueError("`target_prompt` and `return_sfcm` need the text as `prompt`, not `prompt_embeds`.")
        if embeds is None:
            spf_arguments.check_prompts(base)
        per_prompt, count = stock["num_images_per_prompt"], len(base if embeds is None else embeds)
        if request.splits_rows:
            spf_arguments.check_rows(stock, per_prompt * count)

        def given(name: str) -> list[list[str] | None]:
            return spf_arguments.phrase_lists(name, getattr(request, name), count, one_prompt)

        targets, phrases = [], None
        if request.target_prompt is not None:
            targets = spf_arguments.list_targets(request.target_prompt)
            pairs = [
                prompts.make_prompt_pair(text, targets, base_phrases=own, free_phrases=free or ())
                for text, own, free in zip(base, given("base_phrases"), given("free_phrases"), strict=True)
            ]
            full = [pair.full_prompt for pair in pairs]
            for pair in pairs:
                spf_arguments.warn_of_contradictions(pair)
        spf_arguments.warn_of_weights(full)
        if targets:
            tokens = [prompts.tokenize_prompt_pair(pair, self.tokenizer) for pair in pairs]
            # A call without maps may come without a text encoder on the device.
            if request.observed:
                phrases = spf_observer.target_phrases(pairs, tokens, self._phrase_distances(pairs, tokens))
        elif request.return_sfcm:
            phrases = self._base_phrases(base, given("base_phrases"))
        if request.observed and any(
            self.maybe_convert_prompt(text, self.tokenizer) != text for text in [*full, *base]
        ):
            # The prompts as they are tokenized have to be those that are drawn, else the maps are of other words.
            raise ValueError("The SFCM does not work with textual inversions of several vectors.")
        return _Texts(base, full, targets, phrases and phrases.repeat(per_prompt), per_prompt * count)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Save the components as the stock pipeline, which this one is but for its call.

        A folder that named this class could be loaded with this code at hand alone. For a merged checkpoint call
        `fuse_lora()` and `unload_lora_weights()` before. Arguments as in the stock pipeline.

        Raises:
            `ValueError`: a LoRA is loaded, under which the weights would be saved by names that no loader knows.
        """
        if any(isinstance(module, BaseTunerLayer) for model in self._adapted_models() for module in model.modules()):
            raise ValueError(
                "A LoRA is loaded: call `unload_lora_weights()` before saving, and `fuse_lora()` before that to keep "
                "it in the weights."
            )
        stock = next(kind for kind in type(self).__mro__ if kind.__module__.startswith("diffusers."))
        _, options = self._get_signature_keys(self)
        # Not `from_pipe`, which would turn the models that both share into float32.
        twin = stock(**self.components, **{name: self.config[name] for name in options})
        twin.save_pretrained(save_directory, **kwargs)

    def _check_stock_inputs(self, prompt: Any, stock: dict[str, Any]) -> None:
        """What the stock call checks, before anything is encoded."""
        given, callback = stock | {"prompt": prompt}, stock["callback_on_step_end"]
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            given["callback_on_step_end_tensor_inputs"] = callback.tensor_inputs
        if not (given["height"] and given["width"]):
            given |= {"height": 8, "width": 8}  # the stock call takes its own size if one of the two is missing
        self.check_inputs(**{name: given.get(name) for name in inspect.signature(self.check_inputs).parameters})

    def _adapted_models(self) -> list[torch.nn.Module]:
        """The models that a LoRA can be in."""
        return [model for name in self._lora_loadable_modules if (model := getattr(self, name)) is not None]

    @contextmanager
    def _adapters(
        self, request: spf_arguments.Request, targets: Sequence[spf_arguments.Target]
    ) -> Iterator[list[str]]:
        """Inside, the adapters of a call are active, as strong as it says; gives their names in order."""
        models = self._adapted_models()
        layers = [module for model in models for module in model.modules() if isinstance(module, BaseTunerLayer)]
        switched_on = [layer.active_adapters for layer in layers if not layer.disable_adapters]
        active = list(dict.fromkeys(name for names in switched_on for name in names))
        with ExitStack() as stack:
            if isinstance(request.target_prompt, dict):
                active = list(request.target_prompt)
                known = list(dict.fromkeys(name for model in models for name in getattr(model, "peft_config", {})))
                unknown = [name for name in active if name not in known]
                if unknown:
                    raise ValueError(
                        f"`target_prompt` names the adapters {unknown}, but loaded are {known}: call "
                        "`load_lora_weights(…, adapter_name=…)` first."
                    )
                for model in models:
                    own = [name for name in active if name in getattr(model, "peft_config", {})]
                    stack.enter_context(adapters.active_adapters(model, own))
            if request.target_scale is not None:
                factors = spf_arguments.scale_factors(request.target_scale, active, targets)
                for model in models:
                    stack.enter_context(adapters.adapter_scales(model, factors))
            yield active

    @contextmanager
    def _original_text_encoders(self) -> Iterator[None]:
        """Inside, prompts are encoded without adapters."""
        with ExitStack() as stack:
            for model in self._adapted_models():
                if model is not self.unet:
                    stack.enter_context(adapters.original_rows(model, range))
            yield

    def _to_epsilon(self, timestep: Tensor) -> Tensor:
        """What makes a difference of two predictions at a timestep one of predicted noise."""
        # What has no table of signal, as flow matching and EDM, weighs each step's prediction as it is.
        alphas_cumprod = getattr(self.scheduler, "alphas_cumprod", None)
        prediction_type = self.scheduler.config.get("prediction_type", "epsilon")
        if alphas_cumprod is None or prediction_type == "flow_prediction":
            prediction_type = "epsilon"
        return sfcm.epsilon_scale(alphas_cumprod, timestep, prediction_type)

    def _twin_noise(self, count: int, dtype: torch.dtype, stock: dict[str, Any]) -> dict[str, Any]:
        """Latents and generators of a run of both halves, with equal noise in them, drawn as the stock call would."""
        latents, generator = stock["latents"], stock["generator"]
        if latents is None:
            sides = self.unet.config.sample_size
            sides = (sides, sides) if isinstance(sides, int) else sides
            if stock["height"] and stock["width"]:
                sides = (stock["height"] // self.vae_scale_factor, stock["width"] // self.vae_scale_factor)
            shape = (count, self.unet.config.in_channels, *sides)
            latents = randn_tensor(shape, generator, self._execution_device, dtype)
        return {"latents": torch.cat([latents, latents]), "generator": _pair_generators(generator, count)}

    def _base_phrases(self, base: Sequence[str], given: Sequence[list[str] | None]) -> spf_observer.Phrases:
        """Where the phrases of prompts without a target stand."""
        texts = [
            tuple(wording.split_phrases(text) if own is None else own) for text, own in zip(base, given, strict=True)
        ]
        if not all(texts):
            raise ValueError(f"There is no phrase in one of the prompts {list(base)}; give `base_phrases`.")
        positions = [prompts.locate_phrases(text, own, self.tokenizer) for text, own in zip(base, texts, strict=True)]
        return spf_observer.base_phrases(texts, positions, self.tokenizer.model_max_length)

    def _phrase_distances(
        self, pairs: Sequence[prompts.PromptPair], tokens: Sequence[prompts.PromptTokens]
    ) -> list[Tensor]:
        """Per prompt the (P,) float32 distances of its phrases to the target, by the original text encoder.

        A phrase that was cut off stands for nothing, as the target itself would: a prompt may name many of them.
        """
        rows = [
            [*(text if at else pair.target_text for text, at in zip(pair.base_phrases, row.phrase_positions))]
            + [pair.target_text]
            for pair, row in zip(pairs, tokens, strict=True)
        ]
        texts = list(dict.fromkeys(text for row in rows for text in row))
        inputs = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        with self._original_text_encoders():
            embeds = self.text_encoder(inputs.input_ids.to(self._execution_device)).pooler_output.float().cpu()
        embed_of = dict(zip(texts, embeds, strict=True))
        groups = [torch.stack([embed_of[text] for text in row])[None] for row in rows]
        return [sfcm.phrase_distances(group[:, :-1], group[:, -1])[0] for group in groups]


def uncompiled(model: torch.nn.Module) -> torch.nn.Module:
    """The model itself, with its layers under their own names, where `torch.compile` has wrapped it."""
    return model._orig_mod if is_compiled_module(model) else model


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
