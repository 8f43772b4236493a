"""Stable Diffusion with a target prompt: the portrait, the original model's own portrait beside it, and the SFCM.

Works as `custom_pipeline` of `DiffusionPipeline.from_pretrained` and as an import. Inference alone.

Legend: B images of one call (prompts times `num_images_per_prompt`), C latent channels, H/W latent size, S = h*w image
tokens of a layer, T text tokens, P base phrases.
Paper: arXiv 2504.00396.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.utils import replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor
from peft.tuners.tuners_utils import BaseTunerLayer


# As `custom_pipeline` this file and its siblings lie in a package; `import pipeline_spf_portrait` knows no package.
# The loader copies only the siblings named here, and would ask users to pip-install an "import x" without "as".
try:
    from .attention_processors import CrossAttentionStore, capture_cross_attention, phrase_map_resolution
    from .prompts import PromptPair, PromptTokens, make_prompt_pair, phrase_mask, tokenize_prompt_pair
    from .sfcm import SFCM_MODES, noise_difference, phrase_attention_maps, phrase_distances
except ImportError:
    import attention_processors as _attention
    import prompts as _prompts
    import sfcm as _sfcm

    CrossAttentionStore, phrase_map_resolution = _attention.CrossAttentionStore, _attention.phrase_map_resolution
    capture_cross_attention = _attention.capture_cross_attention
    PromptPair, PromptTokens, phrase_mask = _prompts.PromptPair, _prompts.PromptTokens, _prompts.phrase_mask
    make_prompt_pair, tokenize_prompt_pair = _prompts.make_prompt_pair, _prompts.tokenize_prompt_pair
    SFCM_MODES, noise_difference = _sfcm.SFCM_MODES, _sfcm.noise_difference
    phrase_attention_maps, phrase_distances = _sfcm.phrase_attention_maps, _sfcm.phrase_distances

# Evenly spaced RGB colours of the heat map; each is lighter than the one before, so it also reads in black and white.
HEAT_COLORS = ((20, 16, 60), (74, 40, 132), (176, 58, 118), (242, 128, 68), (255, 238, 150))

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from diffusers import DiffusionPipeline
        >>> from pipeline_spf_portrait import overlay_heat_map  # with this repository as working directory

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
        >>> overlay_heat_map(output.images[0], output.sfcm[0, 0]).save("sfcm.png")

        >>> # a phrase of the prompt replaced by the target
        >>> image = pipe("a woman in a T-shirt", target_prompt=[("a T-shirt", "a red dress")]).images[0]
        ```
"""


@dataclass
class SPFPortraitPipelineOutput(StableDiffusionPipelineOutput):
    """Output of a call with `compare` or `return_sfcm`; what was not asked for is None.

    Args:
        images: B images of the full prompts (of the prompts themselves without a target), as `output_type` says.
        nsfw_content_detected: B flags for `images`, or None without a safety checker.
        reference_images: the original model's B images of the base prompts from the same noise, like `images`.
        sfcm: (B, 1, H, W) float32 on the CPU, in [0, 1], high where the target responds.
        phrases: per image its base phrases; P is the longest's count.
        phrase_maps: (B, P, H, W) float32 on the CPU, in [0, 1]; zeros where an image has fewer phrases.
        phrase_distances: (B, P) float32 on the CPU, `1 - cos` of phrase and target, in [0, 2]; zeros likewise.
    """

    reference_images: list[PIL.Image.Image] | np.ndarray | torch.Tensor | None = None
    sfcm: torch.Tensor | None = None
    phrases: list[tuple[str, ...]] | None = None
    phrase_maps: torch.Tensor | None = None
    phrase_distances: torch.Tensor | None = None


@dataclass
class _ReferenceSums:
    """Sums over the UNet calls of one run: differences (B, 1, H, W), attention (B, S, T) at one (h, w)."""

    calls: int = 0
    difference: torch.Tensor | float = 0.0
    attention_probs: torch.Tensor | float = 0.0
    resolution: tuple[int, int] | None = None


def overlay_heat_map(
    image: PIL.Image.Image, heat_map: torch.Tensor | np.ndarray, opacity: float = 0.6
) -> PIL.Image.Image:
    """Lay a map over the greyed image, dark blue for 0 to pale yellow for 1.

    Args:
        image: any mode and size.
        heat_map: (h, w) in [0, 1], resized bilinearly to the image.
        opacity: share of the map's colour in the result, in [0, 1].

    Returns:
        An RGB image of the same size.

    Raises:
        ValueError: the map is not two-dimensional, or leaves [0, 1].

    Source: [ours].
    """
    values = np.asarray(heat_map.detach().float().cpu() if torch.is_tensor(heat_map) else heat_map, dtype=np.float32)
    if values.ndim != 2:
        raise ValueError(f"`heat_map` has to be (h, w) but has the shape {values.shape}.")
    if not (values.min() >= 0 and values.max() <= 1):
        raise ValueError(f"`heat_map` has to be in [0, 1] but reaches from {values.min()} to {values.max()}.")
    resized = np.asarray(PIL.Image.fromarray(values).resize(image.size, PIL.Image.Resampling.BILINEAR))
    channels = [np.interp(resized, np.linspace(0, 1, len(HEAT_COLORS)), channel) for channel in zip(*HEAT_COLORS)]
    grey = np.asarray(image.convert("RGB").convert("L"), dtype=np.float32)[..., None]
    blended = (1 - opacity) * grey + opacity * np.stack(channels, axis=-1)
    return PIL.Image.fromarray(blended.round().clip(0, 255).astype(np.uint8))


@contextmanager
def _original_rows(model: torch.nn.Module, rows: Callable[[int], Iterable[int]]) -> Iterator[None]:
    """Inside, the adapters of `model` leave some rows of each batch as the original model has them.

    Every row goes through the adapters that are active; then those that `rows` chooses from the size of the batch are
    taken from the layer below the adapter. Unlike per-sample adapter names this works with several active adapters,
    with DoRA and for a text encoder. A fused LoRA is a ValueError: the layer below is not the original then.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if any(layer.merged for layer in layers):
        raise ValueError(f"A LoRA is fused into the weights of {type(model).__name__}: call `unfuse_lora()` first.")

    def restore(layer: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        chosen = list(rows(len(output)))
        output[chosen] = layer.base_layer(args[0][chosen]).to(output.dtype)
        return output

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(restore).remove)
        yield


@contextmanager
def _observe_reference(
    unet: torch.nn.Module, store: CrossAttentionStore, prompt_embeds: torch.Tensor, branch_size: int
) -> Iterator[_ReferenceSums]:
    """Inside, the UNet also predicts for the base prompts, on the response's own latents, unseen by its caller.

    Args:
        unet: called as the stock pipeline calls it, and with its adapters kept out of the last B rows.
        store: of `capture_cross_attention`, recording.
        prompt_embeds: (B, T, E) of the base prompts by the original text encoder.
        branch_size: rows of the conditional branch, the last of the batch; its first B are the response.

    Returns:
        The sums, filled as the run goes on.

    Source: [paper] both predictions from the same `z_t`; [ours] in one batch.
    """
    count = len(prompt_embeds)
    sums = _ReferenceSums()

    def append_rows(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        sample, *others = args
        kwargs["encoder_hidden_states"] = torch.cat([kwargs["encoder_hidden_states"], prompt_embeds])
        if kwargs.get("timestep_cond") is not None:
            own = kwargs["timestep_cond"]
            kwargs["timestep_cond"] = torch.cat([own, own[-branch_size:][:count]])
        # Counted from the end, as a callback may end classifier-free guidance, whose rows come first, during the run.
        return (torch.cat([sample, sample[-branch_size:][:count]]), *others), kwargs

    def take_rows(module: torch.nn.Module, args: tuple, output: tuple) -> tuple:
        model_pred, reference_pred = output[0][:-count], output[0][-count:]
        features = store.pop().rows(len(model_pred), len(output[0]))
        sums.resolution = phrase_map_resolution(features.resolutions)
        layers = features.at_resolution(sums.resolution).attention_probs.values()
        sums.attention_probs = sums.attention_probs + sum(probs.float() for probs in layers)
        sums.difference = sums.difference + noise_difference(model_pred[-branch_size:][:count], reference_pred)
        sums.calls += 1
        return (model_pred, *output[1:])

    with ExitStack() as stack:
        stack.callback(unet.register_forward_pre_hook(append_rows, with_kwargs=True).remove)
        stack.callback(unet.register_forward_hook(take_rows).remove)
        yield sums


def _pair_generators(generator: torch.Generator | list[torch.Generator] | None, count: int) -> list[torch.Generator]:
    """Generators for `count` rows and their twins, each twin drawing the very same noise as its row."""
    if generator is None:
        # From the global generator, but not a copy of it: that would draw the next call's latents in advance.
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    generators = generator if isinstance(generator, list) else [generator] * count
    twins = {id(own): torch.Generator(own.device).set_state(own.get_state()) for own in generators}
    return [*generators, *(twins[id(own)] for own in generators)]


def _check_arguments(prompts: Any, arguments: dict[str, Any], own_rows: bool) -> None:
    """What a target, or a run with rows of the original model (`own_rows`), cannot go with."""
    if arguments["prompt_embeds"] is not None:
        raise ValueError("`target_prompt` and `compare` need the base prompt's text as `prompt`, not `prompt_embeds`.")
    if not isinstance(prompts, list) or not prompts or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f"`prompt` has to be a string or a list of strings but is {prompts!r}.")
    if own_rows and not arguments["return_dict"]:
        raise ValueError("`compare` and `return_sfcm` need `return_dict=True`: a tuple cannot hold their results.")
    if own_rows and not (arguments["ip_adapter_image"] is None and arguments["ip_adapter_image_embeds"] is None):
        raise ValueError("IP-Adapter images together with `compare` or `return_sfcm` are unsupported in this version.")
    count = len(prompts) * arguments["num_images_per_prompt"]
    for name in ("latents", "generator"):
        rows = arguments[name]
        if own_rows and isinstance(rows, (list, torch.Tensor)) and len(rows) != count:
            raise ValueError(f"`{name}` has {len(rows)} rows but {count} images are to be drawn.")


def _make_prompt_pairs(prompts: list[str], target_prompt: Any, given: Any) -> list[PromptPair]:
    """Bind each prompt to the target, which all share, and to its own phrases."""
    targets = [target_prompt] if isinstance(target_prompt, str) else target_prompt
    # A bare pair could be meant as two additions or as one replacement, so only lists hold several.
    if not isinstance(targets, list) or not all(
        isinstance(target, str) or (isinstance(target, tuple) and [type(text) for text in target] == [str, str])
        for target in targets
    ):
        raise ValueError(
            f"`target_prompt` has to be a string or a list of strings and pairs but is {target_prompt!r}."
        )
    phrases = [None] * len(prompts) if given is None else given
    lists = isinstance(phrases, list) and all(isinstance(row, (list, tuple, type(None))) for row in phrases)
    if not lists or len(phrases) != len(prompts):
        raise ValueError(f"`base_phrases` has to be a list of phrases for each of {len(prompts)} prompts: {given!r}.")
    return [make_prompt_pair(text, targets, base_phrases=row) for text, row in zip(prompts, phrases)]


def _compute_maps(
    sums: _ReferenceSums, tokens: list[PromptTokens], distances: list[torch.Tensor], images_per_prompt: int, mode: str
) -> dict[str, Any]:
    """The map fields of the output, from the sums of a run and the prompts' phrases."""
    difference = (sums.difference / sums.calls).cpu()
    probs = (sums.attention_probs / sums.calls).cpu()
    longest = max(map(len, distances))
    positions = [[*row.phrase_positions, *[()] * (longest - len(row.phrase_positions))] for row in tokens]
    weights = torch.tensor([phrase_mask(row, probs.shape[-1]) for row in positions])
    # A phrase that was cut off is nowhere in the image, like the padding of a shorter prompt.
    present = torch.tensor([[len(phrase) > 0 for phrase in row] for row in positions])
    padded = torch.stack([F.pad(row, (0, longest - len(row))) for row in distances])
    weights, present, padded = (x.repeat_interleave(images_per_prompt, 0) for x in (weights, present, padded))
    maps = phrase_attention_maps([probs], [sums.resolution], weights, tuple(difference.shape[-2:]))
    sfcm = SFCM_MODES[mode].compute(difference, maps, padded, present)
    return {"sfcm": sfcm, "phrase_maps": maps, "phrase_distances": padded}


class SPFPortraitPipeline(StableDiffusionPipeline):
    """Text-to-portrait generation with an SPF-Portrait LoRA (any LoRA, or none).

    Components, loading, saving and all that is not named below are [`StableDiffusionPipeline`]'s. Without
    `target_prompt`, `compare` and `return_sfcm` a call is the stock call, to the bit.
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
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[[int, int], None] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (the stock default)
        target_prompt: str | list[str | tuple[str, str]] | None = None,
        base_phrases: list[str] | list[list[str]] | None = None,
        compare: bool = False,
        return_sfcm: bool = False,
        sfcm_mode: str = "averaged",
        **kwargs,
    ) -> SPFPortraitPipelineOutput | StableDiffusionPipelineOutput | tuple:
        r"""
        Draw portraits.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                The prompt or prompts; the *base* prompt where there is a target.
            target_prompt (`str` or `list[str | tuple[str, str]]`, *optional*):
                The target attribute to add to each prompt, or several of them. A pair (phrase, target) in the list
                replaces that phrase of the prompt.
            base_phrases (`list[str]` or `list[list[str]]`, *optional*):
                The phrases of the prompt that the SFCM protects, one list per prompt for a list of prompts. Split
                from the prompt if not given.
            compare (`bool`, defaults to `False`):
                Also return `reference_images`: the base prompts drawn by the original model, without any LoRA, from
                the same noise. `callback_on_step_end` sees one batch of twice the size, the references last. With a
                scheduler that draws noise at each step, give one generator per image to get the images of a call
                without `compare`.
            return_sfcm (`bool`, defaults to `False`):
                Also return the Semantic-Aware Fine Control Map, averaged over the steps, and what it is made of. Adds
                one row per image to the UNet's batch.
            sfcm_mode (`str`, defaults to `"averaged"`):
                How the map is computed, a key of `sfcm.SFCM_MODES`.
            the others:
                As in [`StableDiffusionPipeline`]. `prompt_embeds` goes with none of the arguments above; IP-Adapter
                images and `return_dict=False` do not go with `compare` and `return_sfcm`.

        Examples:

        Returns:
            [`SPFPortraitPipelineOutput`] with `compare` or `return_sfcm`; otherwise what
            [`StableDiffusionPipeline`] returns.

        Raises:
            `ValueError`: before the first step, for arguments that do not go together and for prompts that
            `prompts.py` rejects, such as a target that is cut off.

        Source: [paper] the two paths and the map; [ours] drawing them in one batch.
        """
        # 1. Check inputs
        if sfcm_mode not in SFCM_MODES:
            raise ValueError(f"`sfcm_mode` has to be one of {sorted(SFCM_MODES)} but is {sfcm_mode!r}.")
        if target_prompt is None and (return_sfcm or base_phrases is not None):
            raise ValueError("`return_sfcm` and `base_phrases` are about a target and need a `target_prompt`.")
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
        if target_prompt is None and not compare:
            return super().__call__(prompt, **stock_arguments)
        one_prompt = isinstance(prompt, str)
        base_prompts = [prompt] if one_prompt else prompt
        if one_prompt and isinstance(negative_prompt, str):
            stock_arguments["negative_prompt"] = [negative_prompt]  # stock wants both of one type
        _check_arguments(base_prompts, stock_arguments, compare or return_sfcm)

        # 2. Compose the full prompts
        prompts, pairs, tokens = base_prompts, [], []
        if target_prompt is not None:
            phrases = [base_phrases] if one_prompt else base_phrases
            pairs = _make_prompt_pairs(base_prompts, target_prompt, phrases)
            tokens = [tokenize_prompt_pair(pair, self.tokenizer) for pair in pairs]
            prompts = [pair.full_prompt for pair in pairs]

        # 3. Draw, with the original model's rows in the same batch
        count = len(base_prompts) * num_images_per_prompt
        branch_size = 2 * count if compare else count
        observed_rows = count if return_sfcm else 0

        def original_rows(batch_size: int) -> list[int]:
            own = batch_size - observed_rows
            return [i for i in range(batch_size) if i >= own or i % branch_size >= count]

        with ExitStack() as stack:
            if return_sfcm:
                # The prompts as they are tokenized have to be those that are drawn, else the maps are of other words.
                if any(self.maybe_convert_prompt(text, self.tokenizer) != text for text in [*prompts, *base_prompts]):
                    raise ValueError("`return_sfcm` does not work with textual inversions of several vectors.")
                distances = self._phrase_distances(pairs)
                with _original_rows(self.text_encoder, range):
                    base_embeds, _ = self.encode_prompt(
                        base_prompts, self._execution_device, num_images_per_prompt, False, clip_skip=clip_skip
                    )
                store = stack.enter_context(capture_cross_attention(self.unet))
                sums = stack.enter_context(_observe_reference(self.unet, store, base_embeds, branch_size))
                stack.enter_context(store.record())
            if compare or return_sfcm:
                stack.enter_context(_original_rows(self.unet, original_rows))
            if compare:
                stack.enter_context(_original_rows(self.text_encoder, lambda size: range(size // 2, size)))
                prompts = [*prompts, *base_prompts]
                stock_arguments.update(self._double_arguments(count, stock_arguments))
            output = super().__call__(prompts, **stock_arguments)
        if not (compare or return_sfcm):
            return output

        # 4. Take the halves apart, compute the map
        flags, maps = output.nsfw_content_detected, {}
        if return_sfcm:
            maps = _compute_maps(sums, tokens, distances, num_images_per_prompt, sfcm_mode)
            maps["phrases"] = [pair.base_phrases for pair in pairs for _ in range(num_images_per_prompt)]
        return SPFPortraitPipelineOutput(
            images=output.images[:count],
            nsfw_content_detected=None if flags is None else flags[:count],
            reference_images=output.images[count:] if compare else None,
            **maps,
        )

    def _double_arguments(self, count: int, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a run of `count` images that differ in the run of both halves, with equal noise in them."""
        latents, generator = arguments["latents"], arguments["generator"]
        if latents is None:
            # Drawn as the stock call would, for `count` images.
            sides = self.unet.config.sample_size
            sides = (sides, sides) if self._is_unet_config_sample_size_int else sides
            if arguments["height"] and arguments["width"]:
                sides = (arguments["height"] // self.vae_scale_factor, arguments["width"] // self.vae_scale_factor)
            shape = (count, self.unet.config.in_channels, *sides)
            latents = randn_tensor(shape, generator, self._execution_device, self.text_encoder.dtype)
        doubled = {"latents": torch.cat([latents, latents]), "generator": _pair_generators(generator, count)}
        if isinstance(arguments["negative_prompt"], list):
            doubled["negative_prompt"] = arguments["negative_prompt"] * 2
        if arguments["negative_prompt_embeds"] is not None:
            doubled["negative_prompt_embeds"] = torch.cat([arguments["negative_prompt_embeds"]] * 2)
        return doubled

    def _phrase_distances(self, pairs: Sequence[PromptPair]) -> list[torch.Tensor]:
        """Per prompt the (P,) float32 distances of its phrases to the target, by the original text encoder."""
        texts = [text for pair in pairs for text in (*pair.base_phrases, pair.target_text)]
        inputs = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        with _original_rows(self.text_encoder, range):
            embeds = self.text_encoder(inputs.input_ids.to(self._execution_device)).pooler_output.float().cpu()
        groups = embeds.split([len(pair.base_phrases) + 1 for pair in pairs])
        return [phrase_distances(group[None, :-1], group[None, -1])[0] for group in groups]
