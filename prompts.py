"""Base and target prompts: the full prompt, the positions of phrases in the token sequences, and their alignment.

Strings and a tokenizer in, indices out; no tensors. A *target* is added to the base prompt or replaces one of its
phrases.

Legend: P base phrases, T text tokens.
Paper: arXiv 2504.00396; what names no source is [ours].
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING


# Beside it as a module of a package, or of none.
try:
    from . import wording
except ImportError:
    import wording as wording

words_of = wording.words_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TargetPrompt:
    """One target attribute: `text` is added to the base prompt, or put in the place of its phrase `replaces`."""

    text: str
    replaces: str | None = None


@dataclass(frozen=True)
class PromptPair:
    """A base prompt, its targets, the full prompt of both, and the base prompt's phrases.

    No base phrase is replaced, and all are to be preserved but for those of them in `free_phrases`, which may change
    along with the target.
    """

    base_prompt: str
    target_prompts: tuple[TargetPrompt, ...]
    full_prompt: str
    base_phrases: tuple[str, ...]
    free_phrases: tuple[str, ...] = ()

    @property
    def target_text(self) -> str:
        """All target texts in one line, as CLIP's text encoder is to see them."""
        return ", ".join(target.text for target in self.target_prompts)

    @property
    def target_argument(self) -> tuple[str | tuple[str, str], ...]:
        """The targets as the pipeline takes them: what is added, and pairs of a phrase and what replaces it."""
        return tuple(t.text if t.replaces is None else (t.replaces, t.text) for t in self.target_prompts)


@dataclass(frozen=True)
class PromptTokens:
    """Token ids of a `PromptPair` and the positions in them that the losses and the SFCM ask for."""

    base_input_ids: list[int]  # T, padded
    full_input_ids: list[int]
    phrase_positions: tuple[tuple[int, ...], ...]  # of each phrase, in the base sequence; empty if it was cut off
    target_positions: tuple[int, ...]  # of all targets, in the full sequence
    each_target_positions: tuple[tuple[int, ...], ...]
    base_positions: tuple[int, ...]  # matched base tokens in the base sequence, ascending, without BOS and padding
    full_positions: tuple[int, ...]  # the same tokens in the full sequence, in the same order
    base_text: tuple[int, ...]  # all that hold words of the base prompt
    base_padding: tuple[int, ...]  # every position after the prompt's text: EOS and what pads it
    full_padding: tuple[int, ...]


def compose_full_prompt(base_prompt: str, target_prompts: Sequence[TargetPrompt]) -> str:
    """Write the full prompt: phrases replaced where they first stand, additions appended in order after a comma.

    Raises ValueError: a replaced phrase is not in the base prompt (or not as often as it is to be replaced).
    Source: [paper] base with the target added or a phrase replaced; [ours] the comma.
    """
    replacing = [target.text.strip() for target in target_prompts if target.replaces is not None]
    spans, text = wording.locate(base_prompt, _replaced(target_prompts)), base_prompt
    # From the back, so that the earlier spans stay valid.
    for (start, end), new in sorted(zip(spans, replacing), key=lambda pair: pair[0], reverse=True):
        text = text[:start] + new + text[end:]
    additions = [text.strip() for text in _added(target_prompts)]
    # CLIP reads ".," as one token of its own, hence no "jacket., blonde hair".
    return ", ".join([text.strip().rstrip(",;. "), *additions]) if additions else text


def suggest_replacements(pair: PromptPair) -> list[tuple[str, str]]:
    """`suggest_replacement` for each target of a pair that is added."""
    protected = [phrase for phrase in pair.base_phrases if phrase not in pair.free_phrases]
    return [
        found for text in _added(pair.target_prompts) if (found := wording.suggest_replacement(protected, text))
    ]


def said_targets(pair: PromptPair) -> list[str]:
    """The targets of a pair that are added to a base prompt which says them already."""
    return [text for text in _added(pair.target_prompts) if wording.has_phrase(pair.base_prompt, text)]


def make_prompt_pair(
    base_prompt: str, target_prompt: str | Sequence[str | tuple[str, str] | TargetPrompt],
    full_prompt: str | None = None, base_phrases: Sequence[str] | None = None, free_phrases: Sequence[str] = (),
) -> PromptPair:  # fmt: skip
    """Check the prompts, complete what was not given, and bind them together.

    Args:
        target_prompt: one addition, or several targets: a string is an addition, a pair (phrase, target) a
            replacement. `("a hat", "a scarf")` itself is two additions, `[("a hat", "a scarf")]` a replacement.
        full_prompt: composed if not given. If given, targets that are plain strings are looked up in it by
            `wording.infer_replaced`.
        base_phrases: phrases of the base prompt; `split_phrases(base_prompt)` if not given.
        free_phrases: phrases of the base prompt that may change along with the target, such as "a green background";
            they need not be among `base_phrases`.

    Returns: The pair. Phrases that overlap a replaced one are dropped: their region is where the target goes.

    Raises ValueError: a text is empty, or longer than `MAX_CHARACTERS`; a target is the base prompt, one of its
        phrases or what it replaces; a base, free or replaced phrase is not in the base prompt; a target is not in the
        full prompt; nothing is left to preserve.

    Source: [paper] the prompts; [ours] phrases that are free to change.
    """
    given = [target_prompt] if isinstance(target_prompt, str) else target_prompt
    targets = [TargetPrompt(target[1], target[0]) if isinstance(target, tuple) else target for target in given]
    texts = [target if isinstance(target, str) else target.text for target in targets]
    if not base_prompt.strip():
        raise ValueError(f"The base prompt is empty: {base_prompt!r}.")
    if not texts or not all(text.strip() for text in texts):
        raise ValueError(f"A target prompt is empty: {target_prompt!r}.")
    wording.check_length("base prompt", [base_prompt])
    wording.check_length("full prompt", [full_prompt or ""])
    wording.check_length("target prompt", texts)
    wording.check_length("list of base phrases", base_phrases or ())
    wording.check_length("list of free phrases", free_phrases)

    found = wording.split_phrases(base_prompt)
    phrases = found if base_phrases is None else [phrase.strip() for phrase in base_phrases]
    free = [phrase.strip() for phrase in free_phrases]
    if not all(free):
        raise ValueError(f"A free phrase is empty: {free_phrases!r}.")
    _check_targets(texts, base_prompt, free, [*phrases, *free, *found])
    known = {words_of(phrase) for phrase in phrases}
    phrases = [*phrases, *(phrase for phrase in free if words_of(phrase) not in known)]

    has_full = full_prompt is not None
    inferred = wording.infer_replaced(base_prompt, texts, full_prompt) if has_full else [None] * len(texts)
    target_prompts = tuple(
        TargetPrompt(target, replaces) if isinstance(target, str) else target
        for target, replaces in zip(targets, inferred, strict=True)
    )
    for target in target_prompts:
        if target.replaces is not None and words_of(target.replaces) == words_of(target.text):
            raise ValueError(f"The target prompt {target.text!r} replaces itself.")

    replaced = _replaced(target_prompts)
    kept_spans = wording.locate_kept(base_prompt, phrases, wording.locate(base_prompt, replaced))
    kept = tuple(phrase for phrase, span in zip(phrases, kept_spans) if span is not None)
    freed = {words_of(phrase) for phrase in free}
    kept_free = tuple(phrase for phrase in kept if words_of(phrase) in freed)
    if len(kept) == len(kept_free):
        raise ValueError(
            f"Nothing of the base prompt {base_prompt!r} is left to preserve; replaced: {replaced}, free: {free}."
        )
    full_prompt = full_prompt if has_full else compose_full_prompt(base_prompt, target_prompts)
    return PromptPair(base_prompt, target_prompts, full_prompt, kept, kept_free)


def _check_targets(texts: Sequence[str], base_prompt: str, free: Sequence[str], phrases: Sequence[str]) -> None:
    """Raise a ValueError if a target says nothing new."""
    for phrase in free:
        if words_of(phrase) in map(words_of, texts):
            raise ValueError(f"The free phrase {phrase!r} is the target prompt itself.")
    said = {words_of(phrase) for phrase in phrases}
    for text in texts:
        if words_of(text) == words_of(base_prompt):
            raise ValueError(f"The target prompt {text!r} is the base prompt itself.")
        if words_of(text) in said:
            raise ValueError(f"The target prompt {text!r} is already a phrase of the base prompt {base_prompt!r}.")


def without_target(prompt: str, base_phrases: Sequence[str] | None = None) -> PromptPair:
    """The pair of a prompt and itself; its phrases are split from it if not given, and looked for as it is tokenized.

    Raises ValueError: there is no phrase, or a text is longer than `MAX_CHARACTERS`.
    """
    wording.check_length("prompt", [prompt])
    wording.check_length("list of phrases", base_phrases or ())
    phrases = tuple(wording.split_phrases(prompt) if base_phrases is None else base_phrases)
    if not phrases:
        raise ValueError(f"There is no phrase in the prompt {prompt!r}; give `base_phrases`.")
    return PromptPair(prompt, (), prompt, phrases)


def keep_phrases(pair: PromptPair, stays: Sequence[bool]) -> PromptPair:
    """The pair of a prompt of those base phrases alone that stay, in their order, and of what a target replaces.

    One inside another (a free phrase may be) comes with it. Raises ValueError: nothing is left to preserve.
    """
    replaced_spans, spans = _base_spans(pair)
    kept = [phrase for phrase, keep in zip(pair.base_phrases, stays, strict=True) if keep]
    kept_spans = [span for span, keep in zip(spans, stays) if keep]
    words, end = [], 0
    # Of those that begin together the longest comes first, and what ends within what came before is there with it.
    placed = zip([*kept_spans, *replaced_spans], [*kept, *_replaced(pair.target_prompts)])
    for span, phrase in sorted(placed, key=lambda item: (item[0][0], -item[0][1])):
        if span[1] > end:
            words.append(phrase)
            end = span[1]
    free = [phrase for phrase in kept if phrase in pair.free_phrases]
    return make_prompt_pair(", ".join(words), pair.target_prompts, base_phrases=kept, free_phrases=free)


def change_words(pair: PromptPair, changes: Sequence[tuple[wording.Span, str]]) -> PromptPair:
    """The pair with words of its base prompt changed, and with them its phrases and what a target replaces.

    Each span of `changes` lies inside a phrase or outside of it. The full prompt is composed anew. Raises ValueError:
    as `make_prompt_pair`.
    """

    def changed(start: int, end: int) -> str:
        text, place = "", start
        for (first, last), new in sorted(changes):
            if start <= first and last <= end:
                text, place = text + pair.base_prompt[place:first] + new, last
        return text + pair.base_prompt[place:end]

    replaced_spans, spans = _base_spans(pair)
    replaced = iter(replaced_spans)
    targets = [
        target if target.replaces is None else replace(target, replaces=changed(*next(replaced)))
        for target in pair.target_prompts
    ]
    phrases = [changed(*span) for span in spans]
    free = [new for new, phrase in zip(phrases, pair.base_phrases) if phrase in pair.free_phrases]
    base_prompt = changed(0, len(pair.base_prompt))
    return make_prompt_pair(base_prompt, targets, base_phrases=phrases, free_phrases=free)


def tokenize_prompt_pair(
    pair: PromptPair, tokenizer: PreTrainedTokenizerBase, length: int | None = None, *, cuts_targets: bool = False
) -> PromptTokens:
    """Tokenize both prompts, find the phrases and targets in them, and align base with full tokens.

    A base token has a partner in the full sequence if it stands in the part of the prompt that both share; a target's
    tokens, and those it replaces, have none. What does not fit into T, the `length`, by default the tokenizer's
    `model_max_length`, is cut off with a warning.

    Raises ValueError: the tokenizer has no character offsets; a text is not in its prompt; a part of a target is cut
        off, unless `cuts_targets`.

    Source: [paper] base tokens and PAD; [ours] the alignment.
    """
    base_ids, base_offsets, base_end = _encode(pair.base_prompt, tokenizer, length)
    full_ids, full_offsets, full_end = _encode(pair.full_prompt, tokenizer, length)
    length = len(base_ids)
    texts = [target.text for target in pair.target_prompts]
    target_spans = wording.locate_targets(pair.base_prompt, texts, pair.full_prompt)
    for text, (_, end) in zip(texts, target_spans):
        if end > full_end and not cuts_targets:
            raise ValueError(
                f"The target prompt {text!r} does not fit into the {length} tokens of the text encoder; shorten the "
                f"full prompt {pair.full_prompt!r}."
            )
    replaced_spans, phrase_spans = _base_spans(pair)
    phrase_positions = tuple(_positions(base_offsets, [span]) for span in phrase_spans)

    if base_end < len(pair.base_prompt):
        lost = [phrase for phrase, positions in zip(pair.base_phrases, phrase_positions) if not positions]
        logger.warning(
            "The base prompt is too long for %d tokens; cut off: %r; phrases without any token: %s.",
            length, pair.base_prompt[base_end:], lost or "none",
        )  # fmt: skip
    if full_end < len(pair.full_prompt) and texts:
        logger.warning("The full prompt is too long for %d tokens; cut off: %r.", length, pair.full_prompt[full_end:])

    # A target may share words with the base ("a green hat" for "a green jacket"): different marks never match.
    target_positions = _positions(full_offsets, target_spans)
    base_marks = dict.fromkeys(_positions(base_offsets, replaced_spans), "replaced")
    full_marks = dict.fromkeys(target_positions, "target")
    base_order, full_order = sorted(base_offsets), sorted(full_offsets)
    matches = wording.align(
        [base_marks.get(position, base_ids[position]) for position in base_order],
        [full_marks.get(position, full_ids[position]) for position in full_order],
    )
    return PromptTokens(
        base_input_ids=base_ids, full_input_ids=full_ids, phrase_positions=phrase_positions,
        target_positions=target_positions,
        each_target_positions=tuple(_positions(full_offsets, [span]) for span in target_spans),
        base_positions=tuple(base_order[base] for base, _ in matches),
        full_positions=tuple(full_order[full] for _, full in matches), base_text=tuple(base_order),
        base_padding=tuple(range(base_order[-1] + 1, len(base_ids))),
        full_padding=tuple(range(full_order[-1] + 1, len(full_ids))),
    )  # fmt: skip


def locate_in_all(
    pair: PromptPair, tokenizers: Sequence[PreTrainedTokenizerBase], *, cuts_targets: bool = False
) -> PromptTokens:
    """`tokenize_prompt_pair` for a denoiser that is told each position of the text by several tokenizers at once.

    They may count words differently: where "!" is the padding of one, it is a token of its own there, and later words
    stand one further on. So a phrase or a target is wherever one tokenizer has it, a matched token or padding where
    all have it. The ids are the first tokenizer's.

    Raises ValueError: as `tokenize_prompt_pair` says of any of them, or they make sequences of different lengths.
    """
    first, *others = tokenizers
    texts = pair.base_prompt, pair.full_prompt
    tokens = tokenize_prompt_pair(pair, first, cuts_targets=cuts_targets)
    for other in others:
        if other.model_max_length != first.model_max_length:
            lengths = first.model_max_length, other.model_max_length
            raise ValueError(f"The text encoders' tokenizers have different lengths: {lengths[0]} and {lengths[1]}.")
        # What all count alike is not told, nor warned of, twice.
        if any(_encode(text, first)[1:] != _encode(text, other)[1:] for text in texts):
            tokens = _merge(tokens, tokenize_prompt_pair(pair, other, cuts_targets=cuts_targets))
    return tokens


def locate_in_two_parts(
    pair: PromptPair, tokenizers: Sequence[PreTrainedTokenizerBase], second: PreTrainedTokenizerBase | None,
    length: int,
) -> PromptTokens:  # fmt: skip
    """`tokenize_prompt_pair` for a denoiser that is told the text twice: by several tokenizers at once, as of
    `locate_in_all`, and behind these positions by a `second` one in `length` more, which hold nothing without it.

    What stands in both parts counts in both. A target has to be whole in the longer one, or in the only one.

    Raises ValueError: as `locate_in_all`.
    """
    first = locate_in_all(pair, tokenizers, cuts_targets=second is not None)
    start = len(first.base_input_ids)
    if second is None:
        nothing = tuple(range(start, start + length))
        return replace(
            first, base_input_ids=first.base_input_ids + [0] * length,
            full_input_ids=first.full_input_ids + [0] * length, base_padding=first.base_padding + nothing,
            full_padding=first.full_padding + nothing,
        )  # fmt: skip
    behind = tokenize_prompt_pair(pair, second, length)

    def shifted(positions: Sequence[int]) -> tuple[int, ...]:
        return tuple(start + position for position in positions)

    nested, ids = ("phrase_positions", "each_target_positions"), ("base_input_ids", "full_input_ids")
    changed = {}
    for name, own in vars(first).items():
        other = getattr(behind, name)
        if name in nested:
            changed[name] = tuple(mine + shifted(theirs) for mine, theirs in zip(own, other, strict=True))
        else:
            changed[name] = own + (other if name in ids else shifted(other))
    return PromptTokens(**changed)


def _merge(first: PromptTokens, second: PromptTokens) -> PromptTokens:
    def union(own: Sequence[int], other: Sequence[int]) -> tuple[int, ...]:
        return tuple(sorted({*own, *other}))

    def unions(name: str) -> tuple[tuple[int, ...], ...]:
        return tuple(map(union, getattr(first, name), getattr(second, name)))

    matches = {*zip(second.base_positions, second.full_positions)}
    both = [match for match in zip(first.base_positions, first.full_positions) if match in matches]
    return replace(
        first, phrase_positions=unions("phrase_positions"), each_target_positions=unions("each_target_positions"),
        target_positions=union(first.target_positions, second.target_positions),
        base_positions=tuple(base for base, _ in both), full_positions=tuple(full for _, full in both),
        base_text=union(first.base_text, second.base_text),
        base_padding=tuple(sorted({*first.base_padding} & {*second.base_padding})),
        full_padding=tuple(sorted({*first.full_padding} & {*second.full_padding})),
    )  # fmt: skip


def phrase_mask(positions: Sequence[Sequence[int]], length: int) -> list[list[float]]:
    """P rows of `length` floats that average attention maps over each phrase's token positions; zeros without any.

    Source: [paper] one map per phrase; [ours] the mean over its tokens.
    """
    return [[1 / len(row) if column in row else 0.0 for column in range(length)] for row in positions]


def _added(targets: Sequence[TargetPrompt]) -> list[str]:
    return [target.text for target in targets if target.replaces is None]


def _replaced(targets: Sequence[TargetPrompt]) -> list[str]:
    return [target.replaces for target in targets if target.replaces is not None]


def _base_spans(pair: PromptPair) -> tuple[list[wording.Span], list[wording.Span]]:
    """Of what is replaced in the base prompt, and of its phrases."""
    replaced = wording.locate(pair.base_prompt, _replaced(pair.target_prompts))
    return replaced, wording.locate(pair.base_prompt, pair.base_phrases, taken=replaced, share=True)


def _encode(
    text: str, tokenizer: PreTrainedTokenizerBase, length: int | None = None
) -> tuple[list[int], dict[int, wording.Span], int]:
    """Padded ids, the character span of each position that holds text, and the character where the text is cut."""
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} has no character offsets; use the fast tokenizer.")
    rows = tokenizer(
        text, padding="max_length", max_length=length, truncation=True, return_overflowing_tokens=True,
        return_offsets_mapping=True, return_special_tokens_mask=True,
    )  # fmt: skip
    # The pad id may be EOS's or that of "!", so what is text is told by the mask and never by the id.
    contents = [
        {i: tuple(span) for i, (span, special) in enumerate(zip(offsets, mask, strict=True)) if not special}
        for offsets, mask in zip(rows["offset_mapping"], rows["special_tokens_mask"], strict=True)
    ]
    cut = min(contents[1].values())[0] if len(contents) > 1 else len(text)
    return rows["input_ids"][0], contents[0], cut


def _positions(offsets: dict[int, wording.Span], spans: Sequence[wording.Span]) -> tuple[int, ...]:
    """Those whose characters share one with a span."""
    return tuple(
        i for i, (first, last) in offsets.items() if any(first < end and start < last for start, end in spans)
    )
