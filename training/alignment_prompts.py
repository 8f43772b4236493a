"""The prompts of the M portraits that are drawn. [ours]"""

import logging
import re
from collections.abc import Sequence

import numpy as np

from prompts import PromptPair, TargetPrompt, change_words, compose_full_prompt, keep_phrases, make_prompt_pair
from training.arguments import Flags
from training.flag_rules import refuse
from wording import has_phrase, split_phrases, suggest_replacement, words_of


logger = logging.getLogger(__name__)

# English's basic colour terms, and what is said of things that have colours of their own.
COLORS = ("black", "white", "gray", "brown", "red", "orange", "yellow", "green", "blue", "purple", "pink")
HAIR_COLORS = ("black", "brown", "blonde", "ginger", "gray", "white")
PALETTES = {
    "hair": HAIR_COLORS, "beard": HAIR_COLORS, "eyes": ("brown", "blue", "green", "gray"), "skin": (), "lips": (),
}  # fmt: skip
SPELLINGS = {"grey": "gray", "blond": "blonde"}
_NAMES = "|".join({**dict.fromkeys(COLORS + HAIR_COLORS), **SPELLINGS})
_COLOR = re.compile(rf"\b(?:(?P<article>an?)\s+)?(?P<color>black and white|{_NAMES})\b", re.IGNORECASE)


def pairs_to_draw(
    flags: Flags, pairs: Sequence[PromptPair], buckets: Sequence[int], sizes: Sequence[tuple[int, int]]
) -> tuple[list[PromptPair], list[int]]:
    """The prompts of the portraits to be drawn and their buckets, if these flags draw any.

    They are the data's in a random order, each with some phrases left out and some colours changed: what the data
    never varies (one background for all) is drawn in many forms once its phrase is gone or says something else. Those
    of one bucket come together.

    Raises ValueError: too few are drawn for --preservation prior, or a --reference_target_prompt cannot be added.
    """
    alignment, method, seed = flags.alignment, flags.method, flags.loop.seed
    if method.preservation != "prior" and not (method.stage2_steps and alignment.alignment_source != "data"):
        return [], []
    rng, count = np.random.default_rng(seed), alignment.num_alignment_images
    # The same prompts in two sizes are drawn in both.
    different = list(dict.fromkeys(zip(pairs, buckets)))
    order = np.concatenate([rng.permutation(len(different)) for _ in range(0, count, len(different))])[:count]
    chosen = [different[i] for i in order]
    drawn = [(thin_out(pair, alignment.alignment_phrase_dropout, rng), bucket) for pair, bucket in chosen]
    # By a generator of its own, so that what is left out does not depend on it.
    colors, variation = np.random.default_rng((seed, 4)), alignment.alignment_color_variation
    drawn = [(vary_colors(pair, variation, colors), bucket) for pair, bucket in drawn]
    drawn.sort(key=lambda pair_and_bucket: pair_and_bucket[1])
    drawn_pairs, drawn_buckets = map(list, zip(*drawn))
    if flags.lora.reference_target_prompt is not None:
        drawn_pairs = ask_for_reference_targets(drawn_pairs, flags.lora.reference_target_prompt, seed)
    missing = sorted({*buckets} - {*drawn_buckets})
    if method.preservation == "prior" and missing:
        height, width = sizes[missing[0]]
        raise ValueError(
            f"--num_alignment_images {count} draws no portrait of {width}x{height} pixels; --preservation prior needs "
            "one of each size that the training portraits have"
        )
    return drawn_pairs, drawn_buckets


def ask_for_reference_targets(pairs: Sequence[PromptPair], texts: Sequence[str], seed: int) -> list[PromptPair]:
    """M pairs that ask for what the earlier LoRAs were taught, so that it is there to be preserved.

    Each target is asked for in the base prompts of half of the pairs, in a choice of its own. It takes the place of a
    phrase about the same noun ("brown hair"), or else is added.

    Raises ValueError: a text is the new target, or one of the two is a part of the other.
    """
    pairs = list(pairs)
    rng = np.random.default_rng((seed, 3))
    for text in texts:
        for target in dict.fromkeys(target.text for pair in pairs for target in pair.target_prompts):
            overlap = has_phrase(target, text) or has_phrase(text, target)
            refuse(overlap, f"--reference_target_prompt {text!r} overlaps with the new target {target!r}")
            if suggest_replacement([target], text) is not None:
                logger.warning("--reference_target_prompt %r may contradict the new target %r", text, target)
        for i in rng.permutation(len(pairs))[: (len(pairs) + 1) // 2]:
            pairs[i] = ask_for(pairs[i], text)
    return pairs


def ask_for(pair: PromptPair, text: str) -> PromptPair:
    """The pair with a text asked for in its base prompt."""
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


def vary_colors(pair: PromptPair, chance: float, rng: np.random.Generator) -> PromptPair:
    """The pair with each colour that its base prompt gives a thing made another by chance, none that a target names.

    Portraits of one set often share clothes and background, and a LoRA that was kept from moving these alone moves
    others. "Black and white", and the colours of skin and lips, stay; so does a pair with a full prompt of its own.
    """
    if pair.full_prompt != compose_full_prompt(pair.base_prompt, pair.target_prompts):
        return pair
    taken = {SPELLINGS.get(word, word) for target in pair.target_prompts for word in words_of(target.text)}
    changes: list[tuple[tuple[int, int], str]] = []
    for found in _COLOR.finditer(pair.base_prompt):
        color, (thing, *_) = found["color"].lower(), split_phrases(pair.base_prompt[found.start("color") :])
        noun = words_of(thing)[-1]
        others = [other for other in PALETTES.get(noun, COLORS) if other not in (*taken, SPELLINGS.get(color, color))]
        # "An orange" and "blue and white" name no thing.
        if color == "black and white" or thing.lower() == color or not others or rng.random() >= chance:
            continue
        new = str(rng.choice(others))
        changes.append((found.span("color"), new.capitalize() if found["color"][0].isupper() else new))
        if found["article"] is not None:
            changes.append((found.span("article"), found["article"][0] + "n" * (new[0] in "aeiou")))
    return change_words(pair, changes) if changes else pair
