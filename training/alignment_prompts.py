"""The prompts of the portraits that are drawn, and how many portraits stage 2 aligns on.

Legend: M drawn portraits.
Source: [ours].
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from prompts import PromptPair, TargetPrompt, compose_full_prompt, keep_phrases, make_prompt_pair
from training.flags import AlignmentFlags
from wording import has_phrase, suggest_replacement


logger = logging.getLogger(__name__)


def alignment_pairs(
    alignment: AlignmentFlags, pairs: Sequence[PromptPair], buckets: Sequence[int], seed: int
) -> tuple[list[PromptPair], list[int]]:
    """Prompts of the portraits to be drawn: the data's in a random order, each with some phrases left out.

    What the data never varies (one background for all) is drawn in many forms once its phrase is gone.

    Returns:
        M pairs and their buckets, those of one bucket together.
    """
    rng = np.random.default_rng(seed)
    # The same prompts in two sizes are drawn in both.
    different = list(dict.fromkeys(zip(pairs, buckets)))
    order = np.concatenate(
        [rng.permutation(len(different)) for _ in range(0, alignment.num_alignment_images, len(different))]
    )
    drawn = [
        (thin_out(different[i][0], alignment.alignment_phrase_dropout, rng), different[i][1])
        for i in order[: alignment.num_alignment_images]
    ]
    drawn.sort(key=lambda pair_and_bucket: pair_and_bucket[1])
    drawn_pairs = [pair for pair, _ in drawn]
    if alignment.reference_target_prompt is not None:
        drawn_pairs = ask_for_reference_targets(drawn_pairs, alignment.reference_target_prompt, seed)
    return drawn_pairs, [bucket for _, bucket in drawn]


def ask_for_reference_targets(pairs: Sequence[PromptPair], texts: Sequence[str], seed: int) -> list[PromptPair]:
    """Ask for what the earlier LoRAs were taught, so that it is there to be preserved.

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


def alignment_count(alignment: AlignmentFlags, count: int) -> int:
    """How many portraits stage 2 aligns on, of a training set of `count`."""
    drawn = 0 if alignment.alignment_source == "data" else alignment.num_alignment_images
    return drawn + (0 if alignment.alignment_source == "generated" else count)
