"""Base and target prompts: the full prompt, the positions of phrases in the token sequences, and their alignment.

Strings and a tokenizer in, indices out; no tensors. A *target* is added to the base prompt or replaces one of its
phrases. Comparisons of texts ignore case and match whole words.

Legend: P base phrases, T text tokens (`tokenizer.model_max_length`). Paper: arXiv 2504.00396.
"""

from __future__ import annotations

import logging
import re
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Span = tuple[int, int]  # [start, end) in characters

# What a prompt may be long, and its phrases together: several times what the 77 tokens of a text encoder hold.
MAX_CHARACTERS = 4000

_WORD = re.compile(r"[\w'\u2019-]+")
_PIECE = re.compile(r"[\w-]+|[^\w\s]")
# "(blue:1.2)", "((blue))" and "<lora:name:0.8>" as A1111 reads them; "(16:9)" is a ratio.
_WEIGHTS = re.compile(
    r"<(?:lora|lyco|hypernet):[^<>]*>"
    r"|[(\[][^()\[\]]*[^()\[\]\d\s]\s*:\s*-?(?:\d+(?:\.\d*)?|\.\d+)\s*[)\]]"
    r"|\(\([^()]*\)\)|\[\[[^\[\]]*\]\]",
    re.IGNORECASE,
)
# Longer joiners come first, else "in front of" would leave "front" behind. "Black and white" is one colour.
_PREPOSITIONS = (
    "in front of|next to|close to|made of|out of|on top of|"
    "with|without|in|inside|into|on|onto|of|at|by|from|to|near|against|beside|behind|under|beneath|below|above|over|"
    "between|among|around|through|along|across|before|as|while|who|which|that|is|are|has|have|"
    "(?<!black )and|and(?! white)"
)
# After an article these describe the noun ("a standing woman"); elsewhere they lead to the next one.
_VERBS = "wearing|holding|carrying|sitting|seated|standing|leaning|looking|facing|lying|dressed|featuring"
_JOINERS = re.compile(
    rf"[,;:!?()\[\]]+|\.(?=\s|$)|(?<![\w-])(?:{_PREPOSITIONS}|(?<!\ba )(?<!\ban )(?<!\bthe )(?:{_VERBS}))(?![\w-])",
    re.IGNORECASE,
)
_ARTICLES = {"a", "an", "the"}
_NO_PHRASE = {"", *_ARTICLES, "she", "he", "it", "they", "there", "her", "his", "their", "its"}


@dataclass(frozen=True)
class TargetPrompt:
    """One target attribute: `text` is added to the base prompt, or put in the place of its phrase `replaces`."""

    text: str
    replaces: str | None = None


@dataclass(frozen=True)
class PromptPair:
    """A base prompt, its targets, the full prompt of both, and the base prompt's phrases.

    Args:
        base_phrases: none of them replaced; they are to be preserved, but for those in `free_phrases`.
        free_phrases: those of `base_phrases` that may change along with the target.
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
    """Token ids of a `PromptPair` and the positions in them that the losses and the SFCM ask for.

    Args:
        base_input_ids: T ids of the base prompt, padded.
        full_input_ids: T ids of the full prompt, padded.
        phrase_positions: per base phrase its positions in the base sequence; empty if it was cut off.
        target_positions: positions of all targets in the full sequence.
        each_target_positions: the same, target by target.
        base_positions: matched base tokens in the base sequence, ascending, without BOS and padding.
        full_positions: the same tokens in the full sequence; its i-th is the i-th of `base_positions`.
        base_padding: every position after the base prompt's text: EOS and what pads it.
        full_padding: the same of the full prompt.
    """

    base_input_ids: list[int]
    full_input_ids: list[int]
    phrase_positions: tuple[tuple[int, ...], ...]
    target_positions: tuple[int, ...]
    each_target_positions: tuple[tuple[int, ...], ...]
    base_positions: tuple[int, ...]
    full_positions: tuple[int, ...]
    base_padding: tuple[int, ...]
    full_padding: tuple[int, ...]


def compose_full_prompt(base_prompt: str, target_prompts: Sequence[TargetPrompt]) -> str:
    """Write the full prompt: phrases replaced in their places, additions appended in order after a comma.

    Args:
        base_prompt: the base prompt. If something is appended, its closing punctuation is dropped.
        target_prompts: the targets. Every `replaces` is looked up in the base prompt, the first unused occurrence.

    Returns:
        The full prompt.

    Raises:
        ValueError: a replaced phrase is not in the base prompt (or not as often as it is to be replaced).

    Source: [paper] base with the target added or a phrase replaced; [ours] the comma.
    """
    replacements = [target for target in target_prompts if target.replaces is not None]
    spans = _locate(base_prompt, [target.replaces for target in replacements])
    text = base_prompt
    # From the back, so that the earlier spans stay valid.
    for (start, end), target in sorted(zip(spans, replacements), key=lambda pair: pair[0], reverse=True):
        text = text[:start] + target.text.strip() + text[end:]
    additions = [target.text.strip() for target in target_prompts if target.replaces is None]
    # CLIP reads ".," as one token of its own, hence no "jacket., blonde hair".
    return ", ".join([text.strip().rstrip(",;. "), *additions]) if additions else text


def split_phrases(prompt: str) -> list[str]:
    """Split a prompt into its noun phrases, at punctuation and at words that join noun phrases.

    Args:
        prompt: "A woman in a brown jacket, with a curtain background".

    Returns:
        ["A woman", "a brown jacket", "a curtain background"], in order and in the prompt's own spelling. Lone
        articles and pronouns are left out.

    Source: [ours]; the paper names phrases and no parser. Where it errs, give the phrases to `make_prompt_pair`.
    """
    pieces = (piece.strip(' \t\n\r"“”') for piece in _JOINERS.split(prompt))
    return [piece for piece in pieces if piece.lower() not in _NO_PHRASE]


def infer_replacement(base_prompt: str, target_prompt: str, full_prompt: str) -> TargetPrompt:
    """Tell from a given full prompt whether the target was added to the base prompt or replaces a part of it.

    Args:
        base_prompt: the base prompt.
        target_prompt: the target's text.
        full_prompt: the full prompt, as a data set's column gives it.

    Returns:
        The target; `replaces` is what the base prompt has between the words that surround the target in the full
        prompt, in its own spelling, or None if nothing was left out.

    Raises:
        ValueError: the target is not in the full prompt.

    Source: [ours].
    """
    return _infer_targets(base_prompt, [target_prompt], full_prompt)[0]


def suggest_replacement(base_phrases: Sequence[str], target: str) -> tuple[str, str] | None:
    """A base phrase that may contradict the target, as both are about one noun: "black hair", "blonde hair".

    Added beside such a phrase, a target seldom shows; put in its place, it does. It is a proposal: words
    do not tell that "black hair" and "long hair" can both be true.

    Args:
        base_phrases: phrases that are not replaced already, such as `PromptPair.base_phrases`.
        target: the text that is added; of several phrases ("a red hat with a feather") the first is what it is about.

    Returns:
        (base phrase, target): of the phrases with the target's last word, in any case and with or without a plural s,
        the first. None if there is none. A phrase that says the target already is none ("a red hat" for "a hat"), nor
        is one of several parts ("a woman with a hat"), whose last word is not what it is about.

    Source: [ours].
    """
    parts = split_phrases(target)
    if not parts or not _words(parts[0]):
        return None
    noun, said = _noun(parts[0]), {*_words(target)} - _ARTICLES
    for phrase in base_phrases:
        if len(split_phrases(phrase)) == 1 and _noun(phrase) == noun and not said <= {*_words(phrase)}:
            return phrase, target
    return None


def suggest_replacements(pair: PromptPair) -> list[tuple[str, str]]:
    """`suggest_replacement` for each target of a pair that is added. Source: [ours]."""
    protected = [phrase for phrase in pair.base_phrases if phrase not in pair.free_phrases]
    added = [target.text for target in pair.target_prompts if target.replaces is None]
    return [found for text in added if (found := suggest_replacement(protected, text)) is not None]


def said_targets(pair: PromptPair) -> list[str]:
    """The targets of a pair that are added to a base prompt which says them already. Source: [ours]."""
    added = [target.text for target in pair.target_prompts if target.replaces is None]
    return [text for text in added if has_phrase(pair.base_prompt, text)]


def has_phrase(text: str, phrase: str) -> bool:
    """Whether a phrase stands in a text, as whole words and in any case. Source: [ours]."""
    return bool(_occurrences(text, [phrase])[_pieces(phrase)])


def find_weights(text: str) -> str | None:
    """What other programs read as a weight or as a LoRA, "(a blue jacket:1.2)" or "<lora:name:0.8>"; None without it.

    Here it is read as words. Source: [ours].
    """
    found = _WEIGHTS.search(text)
    return None if found is None else found.group()


def take_out(caption: str, target: str) -> str:
    """A caption without the target: what it says between two commas is left out where it is the target.

    Args:
        caption: "a woman, blonde hair, a brown jacket".
        target: "blonde hair"; case, a leading article and punctuation do not count.

    Returns:
        "a woman, a brown jacket"; the caption itself if it does not say the target, and "" if it says nothing else.

    Source: [ours].
    """
    parts = caption.split(",")
    wanted = {_bare(part) for part in target.split(",")} - {()}
    if not wanted or not wanted <= {_bare(part) for part in parts}:
        return caption
    return ",".join(part for part in parts if _bare(part) not in wanted).strip().rstrip(",")


def make_prompt_pair(
    base_prompt: str,
    target_prompt: str | Sequence[str | tuple[str, str] | TargetPrompt],
    full_prompt: str | None = None,
    base_phrases: Sequence[str] | None = None,
    free_phrases: Sequence[str] = (),
) -> PromptPair:
    """Check the prompts, complete what was not given, and bind them together.

    Args:
        base_prompt: the base prompt.
        target_prompt: one addition, or several targets: a string is an addition, a pair (phrase, target) a
            replacement. `("a hat", "a scarf")` itself is two additions, `[("a hat", "a scarf")]` a replacement.
        full_prompt: composed if not given. If given, targets that are plain strings are looked up in it by
            `infer_replacement`.
        base_phrases: phrases of the base prompt; `split_phrases(base_prompt)` if not given.
        free_phrases: phrases of the base prompt that may change along with the target, such as "a green background";
            they need not be among `base_phrases`.

    Returns:
        The pair. Phrases that overlap a replaced one are dropped: their region is where the target goes.

    Raises:
        ValueError: a text is empty, or longer than `MAX_CHARACTERS`; a target is the base prompt, one of its phrases
            or what it replaces; a base, free or replaced phrase is not in the base prompt; a target is not in the
            full prompt; nothing is left to preserve.

    Source: [paper] the prompts; [ours] the checks, and phrases that are free to change.
    """
    given = [target_prompt] if isinstance(target_prompt, str) else list(target_prompt)
    targets = [TargetPrompt(target[1], target[0]) if isinstance(target, tuple) else target for target in given]
    texts = [target if isinstance(target, str) else target.text for target in targets]
    if not base_prompt.strip():
        raise ValueError(f"The base prompt is empty: {base_prompt!r}.")
    if not texts or not all(text.strip() for text in texts):
        raise ValueError(f"A target prompt is empty: {target_prompt!r}.")
    _check_length("base prompt", [base_prompt])
    _check_length("full prompt", [full_prompt or ""])
    _check_length("target prompt", texts)
    _check_length("list of base phrases", base_phrases or ())
    _check_length("list of free phrases", free_phrases)

    phrases = split_phrases(base_prompt) if base_phrases is None else [phrase.strip() for phrase in base_phrases]
    free = [phrase.strip() for phrase in free_phrases]
    if not all(free):
        raise ValueError(f"A free phrase is empty: {free_phrases!r}.")
    for phrase in free:
        if _words(phrase) in map(_words, texts):
            raise ValueError(f"The free phrase {phrase!r} is the target prompt itself.")
    known = {tuple(_words(phrase)) for phrase in phrases}
    phrases += [phrase for phrase in free if tuple(_words(phrase)) not in known]
    said = known | {tuple(_words(phrase)) for phrase in [*free, *split_phrases(base_prompt)]}
    for text in texts:
        if _words(text) == _words(base_prompt):
            raise ValueError(f"The target prompt {text!r} is the base prompt itself.")
        if tuple(_words(text)) in said:
            raise ValueError(f"The target prompt {text!r} is already a phrase of the base prompt {base_prompt!r}.")

    inferred = [TargetPrompt(text) for text in texts]
    if full_prompt is not None:
        inferred = _infer_targets(base_prompt, texts, full_prompt)
    target_prompts = tuple(
        guess if isinstance(target, str) else target for target, guess in zip(targets, inferred, strict=True)
    )
    replaced = [target.replaces for target in target_prompts if target.replaces is not None]
    for target in target_prompts:
        if target.replaces is not None and _words(target.replaces) == _words(target.text):
            raise ValueError(f"The target prompt {target.text!r} replaces itself.")

    replaced_spans = _locate(base_prompt, replaced)
    kept_spans = _locate_kept(base_prompt, phrases, replaced_spans)
    kept = tuple(phrase for phrase, span in zip(phrases, kept_spans) if span is not None)
    freed = {tuple(_words(phrase)) for phrase in free}
    kept_free = tuple(phrase for phrase in kept if tuple(_words(phrase)) in freed)
    if len(kept) == len(kept_free):
        raise ValueError(
            f"Nothing of the base prompt {base_prompt!r} is left to preserve; replaced: {replaced}, free: {free}."
        )
    if full_prompt is None:
        full_prompt = compose_full_prompt(base_prompt, target_prompts)
    return PromptPair(base_prompt, target_prompts, full_prompt, kept, kept_free)


def keep_phrases(pair: PromptPair, stays: Sequence[bool]) -> PromptPair:
    """The pair of a prompt of some phrases alone.

    Args:
        pair: the pair.
        stays: for each base phrase whether it stays; what a target replaces does anyway.

    Returns:
        The phrases that stay, in the base prompt's order. One inside another (a free phrase may be) comes with it.

    Raises:
        ValueError: nothing of what stays is to be preserved.

    Source: [ours].
    """
    replaced = [target.replaces for target in pair.target_prompts if target.replaces is not None]
    replaced_spans = _locate(pair.base_prompt, replaced)
    spans = _locate(pair.base_prompt, pair.base_phrases, taken=replaced_spans, share=True)
    kept = [phrase for phrase, keep in zip(pair.base_phrases, stays, strict=True) if keep]
    kept_spans = [span for span, keep in zip(spans, stays) if keep]
    words, end = [], 0
    # Of those that begin together the longest comes first, and what ends within what came before is there with it.
    placed = zip([*kept_spans, *replaced_spans], [*kept, *replaced])
    for span, phrase in sorted(placed, key=lambda item: (item[0][0], -item[0][1])):
        if span[1] > end:
            words.append(phrase)
            end = span[1]
    free = [phrase for phrase in kept if phrase in pair.free_phrases]
    return make_prompt_pair(", ".join(words), pair.target_prompts, base_phrases=kept, free_phrases=free)


def tokenize_prompt_pair(pair: PromptPair, tokenizer: PreTrainedTokenizerBase) -> PromptTokens:
    """Tokenize both prompts, find the phrases and targets in them, and align base with full tokens.

    Args:
        pair: the prompts.
        tokenizer: a tokenizer with character offsets, such as `CLIPTokenizer`; its `model_max_length` is T.

    Returns:
        Ids and positions. A base token has a partner in the full sequence if it stands in the part of the prompt
        that both share; a target's tokens, and those it replaces, have none. What does not fit into T is cut off
        with a warning.

    Raises:
        ValueError: the tokenizer has no offsets; a text is not in its prompt; a part of a target is cut off.

    Source: [paper] base tokens and PAD; [ours] the alignment.
    """
    _check_offsets(tokenizer)
    base_ids, base_offsets, base_end = _encode(pair.base_prompt, tokenizer)
    full_ids, full_offsets, full_end = _encode(pair.full_prompt, tokenizer)

    texts = [target.text for target in pair.target_prompts]
    target_spans = _locate_targets(pair.base_prompt, texts, pair.full_prompt)
    for text, (_, end) in zip(texts, target_spans):
        if end > full_end:
            raise ValueError(
                f"The target prompt {text!r} does not fit into the {tokenizer.model_max_length} tokens of the text "
                f"encoder; shorten the full prompt {pair.full_prompt!r}."
            )
    replaced = [target.replaces for target in pair.target_prompts if target.replaces is not None]
    replaced_spans = _locate(pair.base_prompt, replaced)
    phrase_spans = _locate(pair.base_prompt, pair.base_phrases, taken=replaced_spans, share=True)
    phrase_positions = tuple(_positions(base_offsets, [span]) for span in phrase_spans)

    if base_end < len(pair.base_prompt):
        lost = [phrase for phrase, positions in zip(pair.base_phrases, phrase_positions) if not positions]
        logger.warning(
            "The base prompt is too long for %d tokens; cut off: %r; phrases without any token: %s.",
            tokenizer.model_max_length,
            pair.base_prompt[base_end:],
            lost or "none",
        )
    if full_end < len(pair.full_prompt):
        logger.warning(
            "The full prompt is too long for %d tokens; cut off: %r.",
            tokenizer.model_max_length,
            pair.full_prompt[full_end:],
        )

    # A target may share words with the base ("a green hat" for "a green jacket"): different marks never match.
    target_positions = _positions(full_offsets, target_spans)
    base_marks = dict.fromkeys(_positions(base_offsets, replaced_spans), "replaced")
    full_marks = dict.fromkeys(target_positions, "target")
    base_order, full_order = sorted(base_offsets), sorted(full_offsets)
    matches = _align(
        [base_marks.get(position, base_ids[position]) for position in base_order],
        [full_marks.get(position, full_ids[position]) for position in full_order],
    )
    return PromptTokens(
        base_input_ids=base_ids,
        full_input_ids=full_ids,
        phrase_positions=phrase_positions,
        target_positions=target_positions,
        each_target_positions=tuple(_positions(full_offsets, [span]) for span in target_spans),
        base_positions=tuple(base_order[base] for base, _ in matches),
        full_positions=tuple(full_order[full] for _, full in matches),
        base_padding=tuple(range(base_order[-1] + 1, len(base_ids))),
        full_padding=tuple(range(full_order[-1] + 1, len(full_ids))),
    )


def locate_phrases(
    prompt: str, phrases: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[int, ...], ...]:
    """Find the tokens of phrases in a prompt that has no target.

    Args:
        prompt: the prompt.
        phrases: P phrases of it, such as `split_phrases(prompt)`.
        tokenizer: a tokenizer with character offsets, such as `CLIPTokenizer`.

    Returns:
        Per phrase its positions in the token sequence; empty if it was cut off.

    Raises:
        ValueError: a phrase is not in the prompt, a text is longer than `MAX_CHARACTERS`, or the tokenizer has no
            offsets.

    Source: [ours].
    """
    _check_offsets(tokenizer)
    _check_length("prompt", [prompt])
    _check_length("list of phrases", phrases)
    _, offsets, _ = _encode(prompt, tokenizer)
    return tuple(_positions(offsets, [span]) for span in _locate(prompt, phrases, share=True))


def phrase_mask(positions: Sequence[Sequence[int]], length: int) -> list[list[float]]:
    """Rows that average attention maps over each phrase's tokens.

    Args:
        positions: per phrase its token positions, in [0, length).
        length: T.

    Returns:
        P rows of `length` floats in [0, 1]: a row sums to 1, or is all zeros for a phrase without tokens.

    Source: [paper] one map per phrase; [ours] the mean over its tokens.
    """
    return [[1 / len(row) if column in row else 0.0 for column in range(length)] for row in positions]


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


def _noun(phrase: str) -> str | None:
    """The last word without a plural s, which "glass" and "glasses" do not share: these are two things."""
    words = _words(phrase)
    return re.sub(r"(?<=[^s])s$", "", words[-1]) if words else None


def _align(first: Sequence[str | int | None], second: Sequence[str | int | None]) -> list[tuple[int, int]]:
    """Index pairs of equal items, ascending: the common start, the common end, and what difflib finds between."""
    limit = min(len(first), len(second))
    start = next((i for i in range(limit) if first[i] != second[i]), limit)
    # difflib alone takes the longest block, which for repeated words may be the wrong one ("a hat, a hat").
    end = next((i for i in range(limit - start) if first[-1 - i] != second[-1 - i]), limit - start)
    first_end, second_end = len(first) - end, len(second) - end
    matcher = SequenceMatcher(None, first[start:first_end], second[start:second_end], autojunk=False)
    middle = [
        (start + block.a + i, start + block.b + i)
        for block in matcher.get_matching_blocks()
        for i in range(block.size)
    ]
    return [*((i, i) for i in range(start)), *middle, *((first_end + i, second_end + i) for i in range(end))]


def _bare(text: str) -> tuple[str, ...]:
    """The words of a phrase without a leading article."""
    words = _words(text)
    return tuple(words[1:] if words and words[0] in _ARTICLES else words)


def _check_length(name: str, texts: Iterable[str]) -> None:
    count = sum(map(len, texts))
    if count > MAX_CHARACTERS:
        raise ValueError(f"The {name} has {count} characters, more than {MAX_CHARACTERS}; shorten it.")


def _overlaps(span: Span, others: Sequence[Span]) -> bool:
    return any(span[0] < end and start < span[1] for start, end in others)


class _Taken:
    """The characters of a text that are taken, so that it takes no search to tell whether a span is free."""

    def __init__(self, text: str, spans: Iterable[Span] = ()) -> None:
        self._marks = bytearray(len(text))
        for span in spans:
            self.add(span)

    def add(self, span: Span) -> None:
        self._marks[span[0] : span[1]] = b"\1" * (span[1] - span[0])

    def overlaps(self, span: Span) -> bool:
        return self._marks.find(1, *span) >= 0


def _pieces(text: str) -> tuple[str, ...]:
    """Words and marks as they are compared: "T-shirt" is one, so that "shirt" is not in it."""
    return tuple(piece.casefold() for piece in _PIECE.findall(text))


def _occurrences(text: str, phrases: Iterable[str]) -> dict[tuple[str, ...], list[Span]]:
    """Where phrases stand in a text as whole words, by their `_pieces`; one walk over the text for each length."""
    found: dict[tuple[str, ...], list[Span]] = {_pieces(phrase): [] for phrase in phrases}
    first_pieces = defaultdict(set)
    for pieces in filter(None, found):
        first_pieces[len(pieces)].add(pieces[0])
    spans = [match.span() for match in _PIECE.finditer(text)]
    words = [text[start:end].casefold() for start, end in spans]
    for length, firsts in first_pieces.items():
        for i in range(len(words) - length + 1):
            if words[i] in firsts and (pieces := tuple(words[i : i + length])) in found:
                found[pieces].append((spans[i][0], spans[i + length - 1][1]))
    return found


def _by_length(phrases: Sequence[str]) -> list[int]:
    """Longest first, so that "a hat" does not take the place of "a hat rack"."""
    return sorted(range(len(phrases)), key=lambda i: -len(phrases[i]))


def _locate(text: str, phrases: Sequence[str], taken: Sequence[Span] = (), share: bool = False) -> list[Span]:
    """One span per phrase, each the first that is not taken. With `share`, phrases may overlap if they must."""
    marks, spans = _Taken(text, taken), {}
    found = _occurrences(text, phrases)
    left = {pieces: iter(places) for pieces, places in found.items()}
    for i in _by_length(phrases):
        pieces = _pieces(phrases[i])
        span = next((place for place in left[pieces] if not marks.overlaps(place)), None)
        if span is None and share and found[pieces]:
            span = found[pieces][0]
        if span is None:
            raise ValueError(f"The phrase {phrases[i]!r} is not in the base prompt {text!r} (or is taken already).")
        spans[i] = span
        marks.add(span)
    return [spans[i] for i in range(len(phrases))]


def _locate_kept(text: str, phrases: Sequence[str], replaced: Sequence[Span]) -> list[Span | None]:
    """The span of each phrase, None for those that are replaced.

    A phrase that stands twice may be named once: then the copy that nothing replaces is meant.
    """
    spans: list[Span | None] = list(_locate(text, phrases, share=True))
    gone, marks = _Taken(text, replaced), _Taken(text, [*replaced, *spans])
    found = _occurrences(text, phrases)
    left = {pieces: iter(places) for pieces, places in found.items()}
    for i, phrase in enumerate(phrases):
        if gone.overlaps(spans[i]):
            spans[i] = next((place for place in left[_pieces(phrase)] if not marks.overlaps(place)), None)
            if spans[i] is not None:
                marks.add(spans[i])
    return spans


def _locate_targets(base_prompt: str, texts: Sequence[str], full_prompt: str) -> list[Span]:
    """The span of each target in the full prompt: where most of its words are new, and the last of equals."""
    words = list(_WORD.finditer(full_prompt))
    known = {full for _, full in _align(_words(base_prompt), _words(full_prompt))}
    new = [word.span() for i, word in enumerate(words) if i not in known]
    starts, ends = [start for start, _ in new], [end for _, end in new]
    found, marks = _occurrences(full_prompt, texts), _Taken(full_prompt)
    spans: dict[int, Span] = {}
    for i in _by_length(texts):
        free = [span for span in found[_pieces(texts[i])] if not marks.overlaps(span)]
        if not free:
            raise ValueError(f"The target prompt {texts[i]!r} is not in the full prompt {full_prompt!r}.")
        spans[i] = max(free, key=lambda span: (bisect_left(starts, span[1]) - bisect_right(ends, span[0]), span))
        marks.add(spans[i])
    return [spans[i] for i in range(len(texts))]


def _infer_targets(base_prompt: str, texts: Sequence[str], full_prompt: str) -> list[TargetPrompt]:
    """`infer_replacement` for several targets at once; neighbours share one gap, the first of them gets it."""
    spans = _locate_targets(base_prompt, texts, full_prompt)
    base_words = list(_WORD.finditer(base_prompt))
    full_words = list(_WORD.finditer(full_prompt))
    # None in the place of a target's words: it matches nothing, so no match reaches across a target.
    marked = [None if _overlaps(word.span(), spans) else word.group().lower() for word in full_words]
    matches = _align(_words(base_prompt), marked)
    targets, claimed = {}, set()
    for i in sorted(range(len(texts)), key=lambda i: spans[i]):
        before = [base for base, full in matches if full_words[full].end() <= spans[i][0]]
        after = [base for base, full in matches if full_words[full].start() >= spans[i][1]]
        gap = (before[-1] + 1 if before else 0, after[0] if after else len(base_words))
        replaces = None
        if gap[0] < gap[1] and gap not in claimed:
            replaces = base_prompt[base_words[gap[0]].start() : base_words[gap[1] - 1].end()]
            claimed.add(gap)
        targets[i] = TargetPrompt(texts[i], replaces)
    return [targets[i] for i in range(len(texts))]


def _check_offsets(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} has no character offsets; use the fast tokenizer.")


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], dict[int, Span], int]:
    """Padded ids, the character span of each position that holds text, and the character where the text is cut."""
    rows = tokenizer(
        text,
        padding="max_length",
        truncation=True,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
    # The pad id may be EOS's or that of "!", so what is text is told by the mask and never by the id.
    contents = [
        {i: tuple(span) for i, (span, special) in enumerate(zip(offsets, mask, strict=True)) if not special}
        for offsets, mask in zip(rows["offset_mapping"], rows["special_tokens_mask"], strict=True)
    ]
    cut = min(contents[1].values())[0] if len(contents) > 1 else len(text)
    return rows["input_ids"][0], contents[0], cut


def _positions(offsets: dict[int, Span], spans: Sequence[Span]) -> tuple[int, ...]:
    return tuple(position for position, offset in offsets.items() if _overlaps(offset, spans))
