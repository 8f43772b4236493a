"""What a training run is made from, read and checked before any weights are loaded. [ours]

Legend: N training portraits, M drawn ones, H/W size in pixels.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from families.stable_diffusion import ModelFacts, StableDiffusion
from loras.loading import ReferenceLora
from programs.loading import naming, naming_flag
from programs.picture_files import content_key, load_picture, upright_size
from programs.single_file import SingleFile
from prompts import PromptPair, PromptTokens, make_prompt_pair, said_targets, suggest_replacements
from training.alignment_prompts import pairs_to_draw
from training.arguments import Flags
from training.caches import fingerprint
from training.data import PortraitRow, check_images, load_rows
from training.flag_rules import refuse
from training.flags import PictureFlags
from training.model_checks import check_loras, check_models, find_references
from training.pixels import nearest_bucket, parse_aspect_ratio_buckets, preprocess_mask
from training.resuming import Resume, find_resume
from wording import find_weights, has_phrase


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """What is known before a model is loaded, all checked.

    Attributes:
        base_file: the base model, if it is one file.
        rows: the N training portraits.
        sizes: (H, W) of each bucket, one without --aspect_ratio_buckets.
        buckets: which of them each pair of prompts belongs to, N + M.
        pairs, tokens: the portraits' prompts, then those of the M portraits that will be drawn for the alignment.
        validation_pair: the prompts of the validation pictures.
        resume: where to go on, if anywhere.
        references: the earlier LoRAs that the new one is trained on top of.
        sfcm: of the alignment portraits, in their order, (1, H', W') in [0, 1], if --sfcm_dir gives them.
        unrelated_ids: (U, T) tokens of --unrelated_prompts.
    """

    family: type[StableDiffusion]
    base_file: SingleFile | None
    rows: list[PortraitRow]
    sizes: tuple[tuple[int, int], ...]
    buckets: tuple[int, ...]
    pairs: list[PromptPair]
    tokens: list[PromptTokens]
    validation_pair: PromptPair
    resume: Resume | None
    references: tuple[ReferenceLora, ...] = ()
    sfcm: list[torch.Tensor] | None = None
    unrelated_ids: torch.Tensor | None = None

    @cached_property
    def keys(self) -> list[str]:
        """Of the portraits' content."""
        return [content_key(row.image, row.source) for row in self.rows]

    @cached_property
    def data_fingerprint(self) -> str:
        """Of prompts, pictures and masks in their order, to tell whether a checkpoint belongs to them."""
        prompts = [
            (pair.base_prompt, pair.full_prompt, *pair.base_phrases, *filter(None, [pair.free_phrases]))
            for pair in self.pairs[: len(self.rows)]
        ]
        masks = [content_key(row.mask, row.source) for row in self.rows if row.mask is not None]
        return fingerprint(*self.keys, *masks, *prompts)


def check_inputs(flags: Flags) -> Inputs:
    """Read the data and everything about the models that needs no weights.

    Raises ValueError, OSError: one line that names the flag, the file and its line, or the value.
    """
    references = find_references(flags.lora, flags.model.cache_dir)
    resume = find_resume(flags, references)
    family, facts = check_models(flags)
    locate = partial(family.locate, tokenizers=facts.tokenizers)
    check_loras(flags, references, family, facts)
    sizes = read_sizes(flags.pictures, facts, flags.model.pretrained_model_name_or_path)
    rows = load_rows(
        flags.data, flags.columns, cache_dir=flags.model.cache_dir, with_masks=flags.method.preservation == "mask",
        seed=flags.loop.seed,
    )  # fmt: skip
    pairs, tokens = read_pairs(rows, flags.data.free_phrases or (), locate)
    check_images(rows)
    buckets = [nearest_bucket(upright_size(row.image, row.source), sizes) for row in rows]
    drawn, drawn_buckets = pairs_to_draw(flags, pairs, buckets, sizes)
    with naming("--reference_target_prompt"):  # with what the prompts already had, each fits
        tokens += [locate(pair) for pair in drawn]
    maps, aligned = flags.alignment.sfcm_dir, len(drawn)
    if flags.alignment.alignment_source != "generated":
        aligned += len(rows)
    inputs = Inputs(
        family=family, base_file=facts.file, rows=rows, sizes=sizes, buckets=(*buckets, *drawn_buckets),
        pairs=pairs + drawn, tokens=tokens, validation_pair=validation_pair(flags, pairs[0], locate), resume=resume,
        references=references,
        sfcm=None if maps is None else read_maps(Path(maps), aligned),
        unrelated_ids=tokenize_unrelated(family, facts.tokenizers, flags.method.unrelated_prompts or [""]),
    )  # fmt: skip
    # Asked in any case: it is that of the masks as they are now.
    data = inputs.data_fingerprint
    if resume is not None and resume.state["data"] != data:
        raise ValueError(
            f"--resume_from_checkpoint {resume.folder}: was trained on other prompts or pictures than those given now"
        )
    return inputs


def read_sizes(pictures: PictureFlags, facts: ModelFacts, model: str) -> tuple[tuple[int, int], ...]:
    """The (H, W) of --resolution or --aspect_ratio_buckets, whose sides must be multiples of the model's."""
    multiple, side = facts.side_multiple, facts.side if pictures.resolution is None else pictures.resolution
    if pictures.aspect_ratio_buckets is not None:
        return parse_aspect_ratio_buckets(pictures.aspect_ratio_buckets, multiple)
    refuse(side is None, f"--resolution is needed: the configuration of {model!r} names no size")
    refuse(side % multiple, f"--resolution must be a multiple of {multiple} for {model!r}, got {side}")
    return ((side, side),)


def read_pairs(
    rows: Sequence[PortraitRow], free_phrases: Sequence[str], locate: Callable[[PromptPair], PromptTokens]
) -> tuple[list[PromptPair], list[PromptTokens]]:
    """The rows' prompts and their tokens; what they cannot mean is warned of.

    Raises ValueError: a row's prompts do not go together, or one of --free_phrases is in none.
    """
    pairs, tokens = [], []
    for row in rows:
        with naming(row.source):
            free = (*row.free_phrases, *_phrases_in(row.base_prompt, free_phrases))
            pairs.append(make_prompt_pair(row.base_prompt, row.target_prompt, row.full_prompt, row.base_phrases, free))
            tokens.append(locate(pairs[-1]))
    for phrase in free_phrases:
        found = any(has_phrase(row.base_prompt, phrase) for row in rows)
        refuse(not found, f"--free_phrases: {phrase!r} is a phrase of no base prompt")
    _warn_of_words(rows, pairs)
    return pairs, tokens


def tokenize_unrelated(
    family: type[StableDiffusion], tokenizers: Sequence[PreTrainedTokenizerBase | None], prompts: Sequence[str]
) -> torch.Tensor:
    """Tokens (U, T) of prompts that have nothing to do with the target; a ValueError if one does not fit."""
    for prompt in prompts:
        for tokenizer in filter(None, tokenizers):
            count, most = len(tokenizer(prompt).input_ids), tokenizer.model_max_length
            refuse(count > most, f"--unrelated_prompts: {prompt!r} has {count} tokens, more than {most}")
    return torch.tensor(family.tokenize(tokenizers, prompts))


def read_maps(folder: Path, count: int) -> list[torch.Tensor]:
    """The maps of --sfcm_dir for `count` alignment portraits, each (1, H', W') float32 in [0, 1], as large as it is.

    Raises InputError: names the first that is missing or no picture.
    """
    with naming_flag("sfcm_dir", str(folder)):
        maps = []
        for path in (folder / f"{i:05d}.png" for i in range(count)):
            missing = not path.is_file()
            refuse(missing, f"{path} does not exist; there must be one map for each of {count} portraits")
            picture = load_picture(path, str(path))
            maps.append(preprocess_mask(picture, picture.size[::-1]))
        return maps


def validation_pair(
    flags: Flags, first: PromptPair, locate: Callable[[PromptPair], PromptTokens]
) -> PromptPair:
    """The prompts of the validation pictures: what the flags give, the first portrait's for what they do not."""
    base_prompt, target = flags.output.validation_base_prompt, flags.output.validation_target_prompt
    if base_prompt is None and target is None:
        return first
    base_prompt = first.base_prompt if base_prompt is None else base_prompt
    targets = [*first.target_prompts] if target is None else [target]
    with naming("--validation_base_prompt / --validation_target_prompt"):
        free = _phrases_in(base_prompt, dict.fromkeys([*first.free_phrases, *(flags.data.free_phrases or ())]))
        pair = make_prompt_pair(base_prompt, targets, free_phrases=free)
        locate(pair)  # it fits
        return pair


def _warn_of_words(rows: Sequence[PortraitRow], pairs: Sequence[PromptPair]) -> None:
    """Say once what prompts cannot mean here, and which of their phrases may contradict the target."""
    weights = [(row, found) for row, pair in zip(rows, pairs) if (found := find_weights(pair.full_prompt)) is not None]
    if weights:
        logger.warning(
            "%s: %r is read as words (%d of %d rows): neither weights nor <lora:...> mean anything here",
            weights[0][0].source, weights[0][1], len(weights), len(rows),
        )  # fmt: skip
    for target, count in Counter(text for pair in pairs for text in said_targets(pair)).items():
        logger.warning(
            "%d of %d rows: the base prompt says the target %r already, as a part of a longer phrase, which would be "
            "kept; leave that phrase out of it, or replace it",
            count, len(rows), target,
        )  # fmt: skip
    for (phrase, target), count in Counter(found for pair in pairs for found in suggest_replacements(pair)).items():
        logger.warning(
            "%d of %d rows: %r may contradict the target %r; the target_prompt %s puts the target in its place",
            count, len(rows), phrase, target, json.dumps([[phrase, target]], ensure_ascii=False),
        )  # fmt: skip


def _phrases_in(base_prompt: str, phrases: Iterable[str]) -> list[str]:
    """Those of the phrases that stand in a base prompt."""
    return [phrase for phrase in phrases if has_phrase(base_prompt, phrase)]


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
