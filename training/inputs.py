"""What a training run is made from, read and checked before any weights are loaded.

Legend: N training portraits, M drawn ones, B batch, R portraits of one process, H/W size in pixels.
Paper: arXiv 2504.00396; `[ours]` marks what it leaves open.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from transformers import AutoConfig, CLIPConfig, CLIPImageProcessorPil, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from families.find import check_model
from families.stable_diffusion import ModelFacts, StableDiffusion
from loras.files import DORA_ON_TOP, ReferenceLora, check_lora_fits, find_lora, find_on_hub, is_dora, read_lora
from loras.hub import LORA_WEIGHTS
from programs.loading import InputError, check_model_name, load_tokenizer, naming_flag
from prompts import (
    PromptPair,
    PromptTokens,
    TargetPrompt,
    compose_full_prompt,
    find_weights,
    has_phrase,
    keep_phrases,
    make_prompt_pair,
    said_targets,
    suggest_replacement,
    suggest_replacements,
    take_out,
    tokenize_prompt_pair,
)
from training.arguments import uses_enhancement
from training.caches import fingerprint
from training.checkpoints import check_checkpoint, find_checkpoints, latest_checkpoint, read_state
from training.data import (
    PortraitRow,
    bucketed_batch_indices,
    check_images,
    content_key,
    load_image,
    load_mask,
    load_rows,
    nearest_bucket,
    parse_aspect_ratio_buckets,
    preprocess_image,
    preprocess_mask,
    upright_size,
)


logger = logging.getLogger(__name__)

# What may be another when a run goes on, for it does not change what is computed; prompts, pictures and earlier LoRAs
# are compared by their content, batch and precision as accelerate has them.
FREE_ON_RESUME = frozenset(
    """
    train_data_dir dataset_name dataset_config_name cache_dir image_column base_prompt_column target_prompt_column
    caption_column caption_extension
    full_prompt_column base_phrases_column free_phrases_column free_phrases target_prompt max_train_samples
    dataloader_num_workers cache_latents cache_text_embeddings train_batch_size gradient_checkpointing allow_tf32
    stage2_steps output_dir logging_dir report_to checkpointing_steps checkpoints_total_limit resume_from_checkpoint
    validation_base_prompt validation_target_prompt num_validation_images validation_steps validation_inference_steps
    validation_guidance_scale mixed_precision push_to_hub hub_model_id hub_token hub_private_repo hub_license
    output_kohya_format dry_run enable_xformers_memory_efficient_attention reference_lora reference_lora_scale
    mask_column save_alignment
    """.split()
)


@dataclass(frozen=True)
class Sample:
    """One training portrait as a step takes it: which, mirrored or not, and where the crop lies in it."""

    index: int
    flip: bool = False
    centering: tuple[float, float] = (0.5, 0.5)


@dataclass(frozen=True)
class TrainingSet:
    """The training portraits in batches; what a batch holds is a pure function of its number.

    Attributes:
        rows: the N training portraits.
        keys: of their pictures' content.
        sizes: (H, W) of each bucket.
        buckets: which of them each portrait belongs to.
        batch_size: portraits a batch, over all processes.
        share: this process's part of a batch.
        seed, repeats, random_flip, center_crop, interpolation: the flags.
    """

    rows: Sequence[PortraitRow]
    keys: Sequence[str]
    sizes: Sequence[tuple[int, int]]
    buckets: tuple[int, ...]
    batch_size: int
    share: slice
    seed: int
    repeats: int
    random_flip: bool
    center_crop: bool
    interpolation: str

    def samples(self, micro_step: int) -> list[Sample]:
        """This process's R portraits of batch `micro_step`, all of one size."""
        count = len(self.rows)
        index = bucketed_batch_indices(micro_step, self.batch_size, self.buckets * self.repeats, self.seed)
        random = np.random.default_rng((self.seed, micro_step))
        flips = random.random(self.batch_size) < 0.5 if self.random_flip else [False] * self.batch_size
        centres = [(0.5, 0.5)] * self.batch_size if self.center_crop else random.random((self.batch_size, 2))
        samples = [
            Sample(i % count, bool(flip), (float(x), float(y))) for i, flip, (x, y) in zip(index, flips, centres)
        ]
        return samples[self.share]

    def pixels(self, sample: Sample) -> torch.Tensor:
        """(3, H, W) in [-1, 1]."""
        row, size = self.rows[sample.index], self.sizes[self.buckets[sample.index]]
        return preprocess_image(
            load_image(row), size, flip=sample.flip, centering=sample.centering, interpolation=self.interpolation
        )

    def mask(self, sample: Sample) -> torch.Tensor:
        """(1, H, W) in [0, 1]: where the target is in these pixels."""
        mask, size = load_mask(self.rows[sample.index]), self.sizes[self.buckets[sample.index]]
        return preprocess_mask(mask, size, flip=sample.flip, centering=sample.centering)

    def batch_masks(self, micro_step: int) -> torch.Tensor:
        """(R, 1, H, W): the masks of batch `micro_step`."""
        return torch.stack([self.mask(sample) for sample in self.samples(micro_step)])

    def batch_pixels(self, micro_step: int) -> torch.Tensor:
        """(R, 3, H, W): the pixels of batch `micro_step`."""
        return torch.stack([self.pixels(sample) for sample in self.samples(micro_step)])


@dataclass(frozen=True)
class Resume:
    """A checkpoint to go on from: its folder and what `checkpoints.read_state` read there."""

    folder: Path
    state: dict[str, Any]


@dataclass(frozen=True)
class Inputs:
    """What is known before a model is loaded, all checked.

    Attributes:
        family: of the base model.
        rows: the N training portraits.
        keys: of their pictures' content.
        sizes: (H, W) of each bucket, one without --aspect_ratio_buckets.
        buckets: which of them each pair of prompts belongs to, N + M.
        pairs: the portraits' prompts, then those of the M portraits that will be drawn for the alignment.
        tokens: the tokens of `pairs`.
        tokenizer: the diffusion model's.
        validation_pair: the prompts of the validation pictures.
        resume: where to go on, if anywhere.
        references: the earlier LoRAs that the new one is trained on top of.
        sfcm: of the alignment portraits, in their order, (1, H', W') in [0, 1], if --sfcm_dir gives them.
        unrelated_ids: (U, T) tokens of --unrelated_prompts.
        mask_keys: of the masks' content, with --preservation mask.
    """

    family: type[StableDiffusion]
    rows: list[PortraitRow]
    keys: list[str]
    sizes: tuple[tuple[int, int], ...]
    buckets: tuple[int, ...]
    pairs: list[PromptPair]
    tokens: list[PromptTokens]
    tokenizer: CLIPTokenizer
    validation_pair: PromptPair
    resume: Resume | None
    references: tuple[ReferenceLora, ...] = ()
    sfcm: list[torch.Tensor] | None = None
    unrelated_ids: torch.Tensor | None = None
    mask_keys: tuple[str, ...] = ()

    @property
    def data_fingerprint(self) -> str:
        """Of prompts, pictures and masks in their order, to tell whether a checkpoint belongs to them."""
        prompts = [
            (pair.base_prompt, pair.full_prompt, *pair.base_phrases, *filter(None, [pair.free_phrases]))
            for pair in self.pairs[: len(self.rows)]
        ]
        return fingerprint(*self.keys, *self.mask_keys, *prompts)


def check_inputs(args: argparse.Namespace) -> Inputs:
    """Read the data and everything about the models that needs no weights.

    Raises:
        ValueError, OSError: one line that names the flag, the file and its line, or the value.
    """
    references = find_references(args)
    resume = find_resume(args, references)
    family, facts = check_models(args)
    unet_config, multiple, (tokenizer,) = facts.denoiser_config, facts.side_multiple, facts.tokenizers
    check_references(references, unet_config, facts.text_config)
    if args.stage1_lora_path is not None:
        with naming_flag("stage1_lora_path", args.stage1_lora_path):
            stage1 = read_lora(find_lora(args.stage1_lora_path))
            check_lora_fits(stage1, {"unet": _unet_layers(unet_config)})
            if is_dora(stage1) and args.dual_path == "single_pass":
                raise ValueError(
                    "is a DoRA, which cannot be off in some rows of a batch: it needs --dual_path two_pass"
                )
            if is_dora(stage1) and references:
                raise ValueError(f"is a DoRA, which does not go with --reference_lora: {DORA_ON_TOP}")
    if args.lora_layers is not None:
        check_lora_layers(args.lora_layers, unet_config)
    if args.aspect_ratio_buckets is None:
        if args.resolution % multiple:
            raise ValueError(
                f"--resolution must be a multiple of {multiple} for {args.pretrained_model_name_or_path!r}, "
                f"got {args.resolution}"
            )
        sizes = ((args.resolution, args.resolution),)
    else:
        sizes = parse_aspect_ratio_buckets(args.aspect_ratio_buckets, multiple)

    rows = load_rows(
        train_data_dir=args.train_data_dir,
        dataset_name=args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        cache_dir=args.cache_dir,
        image_column=args.image_column,
        base_prompt_column=args.base_prompt_column,
        caption_column=args.caption_column,
        caption_extension=args.caption_extension,
        target_prompt_column=args.target_prompt_column,
        full_prompt_column=args.full_prompt_column,
        base_phrases_column=args.base_phrases_column,
        free_phrases_column=args.free_phrases_column,
        mask_column=args.mask_column,
        with_masks=args.preservation == "mask",
        target_prompt=args.target_prompt,
        max_train_samples=args.max_train_samples,
        seed=args.seed,
    )
    rows = [row if row.caption is None else base_row(row) for row in rows]
    pairs, tokens = [], []
    for row in rows:
        try:
            free = (*row.free_phrases, *_phrases_in(row.base_prompt, args.free_phrases))
            pairs.append(make_prompt_pair(row.base_prompt, row.target_prompt, row.full_prompt, row.base_phrases, free))
            tokens.append(family.locate(pairs[-1], facts.tokenizers))
        except ValueError as error:
            raise ValueError(f"{row.source}: {error}") from error
    for phrase in args.free_phrases or ():
        if not any(has_phrase(row.base_prompt, phrase) for row in rows):
            raise ValueError(f"--free_phrases: {phrase!r} is a phrase of no base prompt")
    _warn_of_words(rows, pairs)
    check_images(rows)
    buckets = [nearest_bucket(upright_size(row), sizes) for row in rows]
    if args.preservation == "prior" or (args.stage2_steps and args.alignment_source != "data"):
        drawn, drawn_buckets = alignment_pairs(args, pairs, buckets)
        missing = sorted(set(buckets) - set(drawn_buckets))
        if args.preservation == "prior" and missing:
            height, width = sizes[missing[0]]
            raise ValueError(
                f"--num_alignment_images {args.num_alignment_images} draws no portrait of {width}x{height} pixels; "
                "--preservation prior needs one of each size that the training portraits have"
            )
        pairs, buckets = pairs + drawn, buckets + drawn_buckets
        try:
            tokens += [family.locate(pair, facts.tokenizers) for pair in drawn]
        except ValueError as error:  # with what the prompts already had, each fits
            raise ValueError(f"--reference_target_prompt: {error}") from error
    inputs = Inputs(
        family=family,
        rows=rows,
        keys=[content_key(row) for row in rows],
        sizes=sizes,
        buckets=tuple(buckets),
        pairs=pairs,
        tokens=tokens,
        tokenizer=tokenizer,
        validation_pair=_validation_pair(args, pairs[0], tokenizer),
        resume=resume,
        references=references,
        sfcm=None if args.sfcm_dir is None else read_maps(Path(args.sfcm_dir), alignment_count(args, len(rows))),
        unrelated_ids=tokenize_unrelated(args.unrelated_prompts or [""], tokenizer),
        mask_keys=tuple(content_key(replace(row, image=row.mask)) for row in rows if row.mask is not None),
    )
    if resume is not None and resume.state["data"] != inputs.data_fingerprint:
        raise ValueError(
            f"--resume_from_checkpoint {resume.folder}: was trained on other prompts or pictures than those given now"
        )
    return inputs


# ------------------------------------------------------------------------------------------------------- models


def check_models(args: argparse.Namespace) -> tuple[type[StableDiffusion], ModelFacts]:
    """Read all of the models that needs no weights."""
    family, facts = check_model(
        args.pretrained_model_name_or_path,
        revision=args.revision,
        cache_dir=args.cache_dir,
        vae=args.pretrained_vae_model_name_or_path,
        tiny_vae=args.tiny_vae_model_name_or_path,
        prediction_type=args.prediction_type,
    )
    if args.sfcm_timesteps[1] > facts.num_train_timesteps:
        raise ValueError(
            f"--sfcm_timesteps: HIGH is {args.sfcm_timesteps[1]}, above the model's "
            f"{facts.num_train_timesteps} timesteps"
        )
    if not uses_enhancement(args):
        return family, facts
    with naming_flag("clip_model_name_or_path", args.clip_model_name_or_path):
        check_model_name(args.clip_model_name_or_path, kind=None)
        config = AutoConfig.from_pretrained(args.clip_model_name_or_path, cache_dir=args.cache_dir)
        if not isinstance(config, CLIPConfig):
            raise ValueError("not a CLIP model of texts and pictures")
        load_tokenizer(args.clip_model_name_or_path, cache_dir=args.cache_dir)
        CLIPImageProcessorPil.from_pretrained(args.clip_model_name_or_path, cache_dir=args.cache_dir)
    return family, facts


def _unet_layers(unet_config: dict) -> dict[str, torch.nn.Module]:
    """The UNet's linear and convolutional layers by name, without weights."""
    with init_empty_weights():
        return _layers(UNet2DConditionModel.from_config(unet_config))


def _layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)}


def find_references(args: argparse.Namespace) -> tuple[ReferenceLora, ...]:
    """The files of --reference_lora, each with its scale.

    Raises:
        InputError: one is not there, or twice.
    """
    references: list[ReferenceLora] = []
    if args.use_dora and args.reference_lora is not None:
        raise ValueError(f"--use_dora does not go with --reference_lora: {DORA_ON_TOP}")
    for name, scale in zip(args.reference_lora or (), args.reference_lora_scale or (), strict=True):
        with naming_flag("reference_lora", name):
            path = find_lora(name, args.cache_dir)
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            references.append(ReferenceLora(name, path, find_on_hub(name), sha256, scale))
            if any(references[-1].sha256 == earlier.sha256 for earlier in references[:-1]):
                raise ValueError("the same LoRA is given twice")
    return tuple(references)


def check_references(references: Sequence[ReferenceLora], unet_config: dict, text_config: CLIPTextConfig) -> None:
    """Compare the earlier LoRAs with the base model, of which no weights are loaded.

    Raises:
        InputError: one is no LoRA, or one of another model.
    """
    if not references:
        return
    with init_empty_weights():
        text_layers = _layers(CLIPTextModel(text_config))
    layers = {"unet": _unet_layers(unet_config), "text_encoder": text_layers}
    for reference in references:
        with naming_flag("reference_lora", reference.name):
            check_lora_fits(read_lora(reference.path), layers)


def check_lora_layers(layers: Sequence[str], unet_config: dict) -> None:
    """Whether each name ends the name of a layer of the UNet.

    Raises:
        ValueError: one of them does not.
    """
    names = list(_unet_layers(unet_config))
    for layer in layers:
        if not any(name == layer or name.endswith(f".{layer}") for name in names):
            raise ValueError(f"--lora_layers: no layer of the UNet has a name that ends in {layer!r}")


# ------------------------------------------------------------------------------------------------------ prompts


def base_row(row: PortraitRow) -> PortraitRow:
    """A caption's row with its base prompt: the caption without the targets that are added [ours].

    Raises:
        ValueError: nothing else is in the caption; the message begins with the row's source.
    """
    targets = [row.target_prompt] if isinstance(row.target_prompt, str) else row.target_prompt
    base_prompt = row.caption
    for target in targets:
        base_prompt = take_out(base_prompt, target) if isinstance(target, str) else base_prompt
    if not base_prompt:
        raise ValueError(f"{row.source}: the caption {row.caption!r} says nothing but the target")
    return replace(row, base_prompt=base_prompt)


def _warn_of_words(rows: Sequence[PortraitRow], pairs: Sequence[PromptPair]) -> None:
    """Say once what prompts cannot mean here, and which of their phrases may contradict the target."""
    weights = [(row, found) for row, pair in zip(rows, pairs) if (found := find_weights(pair.full_prompt)) is not None]
    if weights:
        logger.warning(
            "%s: %r is read as words (%d of %d rows): neither weights nor <lora:...> mean anything here",
            weights[0][0].source,
            weights[0][1],
            len(weights),
            len(rows),
        )
    said = Counter(text for pair in pairs for text in said_targets(pair))
    for target, count in said.items():
        logger.warning(
            "%d of %d rows: the base prompt says the target %r already, as a part of a longer phrase, which would be "
            "kept; leave that phrase out of it, or replace it",
            count,
            len(rows),
            target,
        )
    for (phrase, target), count in Counter(found for pair in pairs for found in suggest_replacements(pair)).items():
        logger.warning(
            "%d of %d rows: %r may contradict the target %r; the target_prompt %s puts the target in its place",
            count,
            len(rows),
            phrase,
            target,
            json.dumps([[phrase, target]], ensure_ascii=False),
        )


def _phrases_in(base_prompt: str, phrases: Iterable[str] | None) -> list[str]:
    """Those of the phrases that stand in a base prompt."""
    return [phrase for phrase in phrases or () if has_phrase(base_prompt, phrase)]


def alignment_pairs(
    args: argparse.Namespace, pairs: Sequence[PromptPair], buckets: Sequence[int]
) -> tuple[list[PromptPair], list[int]]:
    """Prompts of the portraits to be drawn: the data's in a random order, each with some phrases left out [ours].

    What the data never varies (one background for all) is drawn in many forms once its phrase is gone.

    Returns:
        M pairs and their buckets, those of one bucket together.
    """
    rng = np.random.default_rng(args.seed)
    # The same prompts in two sizes are drawn in both.
    different = list(dict.fromkeys(zip(pairs, buckets)))
    order = np.concatenate(
        [rng.permutation(len(different)) for _ in range(0, args.num_alignment_images, len(different))]
    )
    drawn = [
        (thin_out(different[i][0], args.alignment_phrase_dropout, rng), different[i][1])
        for i in order[: args.num_alignment_images]
    ]
    drawn.sort(key=lambda pair_and_bucket: pair_and_bucket[1])
    drawn_pairs = [pair for pair, _ in drawn]
    if args.reference_target_prompt is not None:
        drawn_pairs = ask_for_reference_targets(drawn_pairs, args.reference_target_prompt, args.seed)
    return drawn_pairs, [bucket for _, bucket in drawn]


def ask_for_reference_targets(pairs: Sequence[PromptPair], texts: Sequence[str], seed: int) -> list[PromptPair]:
    """Ask for what the earlier LoRAs were taught, so that it is there to be preserved [ours].

    Args:
        pairs: M pairs of the portraits to be drawn.
        texts: the earlier LoRAs' targets; each is asked for in the base prompts of half of the pairs, in a choice of
            its own. It takes the place of a phrase about the same noun ("brown hair"), or else is added.
        seed: seed of the choice.

    Returns:
        M pairs.

    Raises:
        ValueError: a text is the new target, or one of the two is a part of the other.
    """
    pairs = list(pairs)
    rng = np.random.default_rng((seed, 3))
    for text in texts:
        for target in dict.fromkeys(target.text for pair in pairs for target in pair.target_prompts):
            if has_phrase(target, text) or has_phrase(text, target):
                raise ValueError(f"--reference_target_prompt {text!r} overlaps with the new target {target!r}")
            if suggest_replacement([target], text) is not None:
                logger.warning("--reference_target_prompt %r may contradict the new target %r", text, target)
        for i in rng.permutation(len(pairs))[: (len(pairs) + 1) // 2]:
            pairs[i] = ask_for(pairs[i], text)
    return pairs


def ask_for(pair: PromptPair, text: str) -> PromptPair:
    """The pair with a text asked for in its base prompt, in the place of a phrase about the same noun or added."""
    if has_phrase(pair.base_prompt, text):
        return pair
    rival, _ = suggest_replacement(pair.base_phrases, text) or (None, None)
    base_prompt = compose_full_prompt(pair.base_prompt, [TargetPrompt(text, rival)])
    phrases = [*(phrase for phrase in pair.base_phrases if phrase != rival), text]
    free = [phrase for phrase in pair.free_phrases if phrase != rival]
    return make_prompt_pair(base_prompt, pair.target_prompts, base_phrases=phrases, free_phrases=free)


def thin_out(pair: PromptPair, dropout: float, rng: np.random.Generator) -> PromptPair:
    """The pair with each base phrase left out by chance; one that is protected at least, and a replaced one, stay."""
    keep = rng.random(len(pair.base_phrases)) >= dropout
    if keep.all():
        return pair
    protected = [i for i, phrase in enumerate(pair.base_phrases) if phrase not in pair.free_phrases]
    keep[protected[rng.integers(len(protected))]] |= not keep[protected].any()
    return keep_phrases(pair, keep)


def tokenize_unrelated(prompts: Sequence[str], tokenizer: CLIPTokenizer) -> torch.Tensor:
    """Tokens (U, T) of prompts that have nothing to do with the target.

    Raises:
        ValueError: one does not fit.
    """
    for prompt in prompts:
        count = len(tokenizer(prompt).input_ids)
        if count > tokenizer.model_max_length:
            raise ValueError(
                f"--unrelated_prompts: {prompt!r} has {count} tokens, more than {tokenizer.model_max_length}"
            )
    return torch.tensor(tokenizer(list(prompts), padding="max_length").input_ids)


def alignment_count(args: argparse.Namespace, count: int) -> int:
    """How many portraits stage 2 aligns on, of a training set of `count`."""
    drawn = 0 if args.alignment_source == "data" else args.num_alignment_images
    return drawn + (0 if args.alignment_source == "generated" else count)


def read_maps(folder: Path, count: int) -> list[torch.Tensor]:
    """The maps of --sfcm_dir, one for each of `count` alignment portraits.

    Returns:
        `count` of (1, H', W') float32 in [0, 1], as large as they are.

    Raises:
        ValueError, OSError: names the first that is missing or no picture.

    Source: [ours].
    """
    with naming_flag("sfcm_dir", str(folder)):
        maps = []
        for path in (folder / f"{i:05d}.png" for i in range(count)):
            if not path.is_file():
                raise ValueError(f"{path} does not exist; there must be one map for each of {count} portraits")
            # Read as a mask is: what Pillow cannot open is refused with the file's name.
            picture = load_image(PortraitRow(str(path), path, "", ""))
            maps.append(preprocess_mask(picture, (picture.height, picture.width)))
        return maps


def _validation_pair(args: argparse.Namespace, first: PromptPair, tokenizer: CLIPTokenizer) -> PromptPair:
    """The prompts of the validation pictures: what the flags give, the first portrait's for what they do not."""
    if args.validation_base_prompt is None and args.validation_target_prompt is None:
        return first
    base_prompt = first.base_prompt if args.validation_base_prompt is None else args.validation_base_prompt
    targets = list(first.target_prompts)
    if args.validation_target_prompt is not None:
        targets = [args.validation_target_prompt]
    try:
        free = _phrases_in(base_prompt, dict.fromkeys([*first.free_phrases, *(args.free_phrases or ())]))
        pair = make_prompt_pair(base_prompt, targets, free_phrases=free)
        tokenize_prompt_pair(pair, tokenizer)
    except ValueError as error:
        raise ValueError(f"--validation_base_prompt / --validation_target_prompt: {error}") from error
    return pair


def print_dry_run(inputs: Inputs, distances: Sequence[torch.Tensor]) -> None:
    """Print each different pair of prompts, its phrases, their token positions and CLIP distances to the target."""
    for reference in inputs.references:
        print(f"earlier LoRA   {reference.name}  (scale {reference.scale:g})")
    seen = set()
    for row, pair, tokens, row_distances in zip(inputs.rows, inputs.pairs, inputs.tokens, distances):
        if (pair, row.caption) in seen:
            continue
        seen.add((pair, row.caption))
        print(row.source)
        if row.caption is not None:
            taken = "" if row.caption == pair.base_prompt else "  (the target is taken out)"
            print(f"  caption      {_one_line(row.caption)}{taken}")
        print(f"  base prompt  {_one_line(pair.base_prompt)}\n  full prompt  {_one_line(pair.full_prompt)}")
        target = _one_line(pair.target_text)
        print(f"  target       {target}  (tokens {_ranges(tokens.target_positions)} of the full prompt)")
        rivals = dict(suggest_replacements(pair))
        for phrase, positions, distance in zip(pair.base_phrases, tokens.phrase_positions, row_distances.tolist()):
            kind = "free phrase" if phrase in pair.free_phrases else "phrase"
            rival = f"; may contradict the target {rivals[phrase]!r}" if phrase in rivals else ""
            where = f"tokens {_ranges(positions)}, CLIP distance {distance:.3f}{rival}"
            print(f"  {kind:11}  {_one_line(phrase)}  ({where})")
    if len(inputs.sizes) > 1:
        own = inputs.buckets[: len(inputs.rows)]
        for bucket, (height, width) in enumerate(inputs.sizes):
            print(f"{own.count(bucket)} portraits of {width}x{height} pixels")
    different = len({pair for pair, _ in seen})
    print(f"{len(inputs.rows)} portraits, {different} different pairs of prompts. Nothing was trained (--dry_run).")


def _one_line(text: str) -> str:
    """A text whose line breaks, which are spaces to the text encoder, do not break a table."""
    return " ".join(text.split())


def _ranges(positions: Sequence[int]) -> str:
    return ", ".join(map(str, positions)) or "none, cut off"


# ------------------------------------------------------------------------------------------------------- resume


def resume_record(
    args: argparse.Namespace, references: Sequence[ReferenceLora], global_batch_size: int, mixed_precision: str
) -> dict[str, Any]:
    """What must be the same when the run goes on: the flags that change what is computed, and what accelerate decides.

    Args:
        args: the flags.
        references: the earlier LoRAs.
        global_batch_size: portraits a batch over all processes.
        mixed_precision: the flag's, or that of accelerate's configuration.
    """
    flags = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(args).items()}
    record = {name: value for name, value in flags.items() if name not in FREE_ON_RESUME}
    if references:
        record["reference_lora (SHA-256, scale)"] = [[lora.sha256, lora.scale] for lora in references]
    return record | {
        "global_batch_size": global_batch_size,
        "mixed_precision": mixed_precision,
    }


def find_resume(args: argparse.Namespace, references: Sequence[ReferenceLora]) -> Resume | None:
    """The checkpoint that --resume_from_checkpoint names, checked and read; None to start anew.

    Raises:
        ValueError: there is none, it is damaged, or another run's; or one would be lost among those of this run.
    """
    asked, output_dir = args.resume_from_checkpoint, Path(args.output_dir)
    if asked is None:
        earlier = find_checkpoints(output_dir)
        if earlier and not args.dry_run:
            raise ValueError(
                f"--output_dir {output_dir} holds {earlier[-1].name} of an earlier run: give "
                "--resume_from_checkpoint latest to go on, or another folder to start anew"
            )
        check_unused(args)
        return None
    if asked == "latest":
        folder = latest_checkpoint(output_dir)
        if folder is None:
            check_unused(args)
            logger.warning("There is no whole checkpoint in %s: the run starts anew", output_dir)
            return None
    else:
        folder = Path(asked) if Path(asked).is_dir() else output_dir / asked
        if not folder.is_dir():
            raise ValueError(f"--resume_from_checkpoint {asked}: there is no such folder")
        try:
            check_checkpoint(folder)
        except ValueError as error:
            raise ValueError(f"--resume_from_checkpoint {asked}: {error}") from error
    state = read_state(folder)
    record = state["record"]
    # Batch and precision are compared once accelerate has said what they are.
    now = resume_record(args, references, record["global_batch_size"], record["mixed_precision"])
    check_record(folder, record, now)
    return Resume(folder, state)


def check_unused(args: argparse.Namespace) -> None:
    """A run that starts anew must not write over the LoRA of another.

    Raises:
        InputError: there is one.
    """
    lora = Path(args.output_dir) / LORA_WEIGHTS
    if lora.is_file() and not args.dry_run:
        raise InputError(
            f"--output_dir {args.output_dir} holds the {LORA_WEIGHTS} of an earlier run, which this one would write "
            "over: give another folder"
        )


def check_nothing_came(args: argparse.Namespace, resume: Resume | None) -> None:
    """Whether the output folder, once no other run can write into it, is as it was when the flags were checked.

    Raises:
        InputError: a run has come to its end, or written a checkpoint, in the meantime.
    """
    output_dir = Path(args.output_dir)
    if resume is None:
        check_unused(args)
    expected = None if resume is None or resume.folder.parent != output_dir else resume.folder
    if args.resume_from_checkpoint in (None, "latest") and latest_checkpoint(output_dir) != expected:
        raise InputError(f"--output_dir {output_dir}: another run has written checkpoints meanwhile; start again")


def check_record(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Compare what a run was trained with and what it is given now.

    Raises:
        InputError: names the first that differs.
    """
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            raise InputError(
                f"--resume_from_checkpoint {folder}: was trained with {name} {before.get(name)}, and now it is "
                f"{now.get(name)}"
            )
