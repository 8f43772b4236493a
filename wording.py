"""The wording of prompts: the phrases of a text, where they stand in it, and what it says of a target. [ours]

Strings in, strings and spans out. Comparisons of texts ignore case and match whole words.
"""

import re
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher


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


def split_phrases(prompt: str) -> list[str]:
    """Split a prompt into its noun phrases, at punctuation and at words that join noun phrases, in its own spelling.

    "A woman in a brown jacket, with a curtain background" gives ["A woman", "a brown jacket", "a curtain background"].
    Lone articles and pronouns are left out. Where it errs, give the phrases to `make_prompt_pair`.
    """
    pieces = (piece.strip(' \t\n\r"“”') for piece in _JOINERS.split(prompt))
    return [piece for piece in pieces if piece.lower() not in _NO_PHRASE]


def suggest_replacement(base_phrases: Sequence[str], target: str) -> tuple[str, str] | None:
    """A base phrase that may contradict the target, and the target, as both are about one noun: "black hair", "blonde
    hair".

    Added beside such a phrase, a target seldom shows; put in its place, it does. It is a proposal: words do not tell
    that "black hair" and "long hair" can both be true.

    Returns: The first phrase with the last word of the target's first phrase, with or without a plural s; None if
        there is none. A phrase that says the target already is none ("a red hat" for "a hat"), nor is one of several
        parts ("a woman with a hat"), whose last word is not what it is about.
    """
    noun, said = _noun("".join(split_phrases(target)[:1])), {*words_of(target)} - _ARTICLES
    for phrase in base_phrases if noun else ():
        if len(split_phrases(phrase)) == 1 and _noun(phrase) == noun and not said <= {*words_of(phrase)}:
            return phrase, target
    return None


def has_phrase(text: str, phrase: str) -> bool:
    """Whether a phrase stands in a text, as whole words and in any case."""
    return bool(_occurrences(text, [phrase])[_pieces(phrase)])


def find_weights(text: str) -> str | None:
    """What others read as a weight or as a LoRA, "(a blue jacket:1.2)" or "<lora:name:0.8>"; None without it."""
    found = _WEIGHTS.search(text)
    return None if found is None else found.group()


def take_out(caption: str, target: str) -> str:
    """A caption without what it says between two commas and is the target; the caption itself if it does not say it.

    Case, a leading article and punctuation do not count.
    """
    parts = caption.split(",")
    wanted = {_bare(part) for part in target.split(",")} - {()}
    if not wanted or not wanted <= {_bare(part) for part in parts}:
        return caption
    return ",".join(part for part in parts if _bare(part) not in wanted).strip().rstrip(",")


def words_of(text: str) -> tuple[str, ...]:
    """A text's words in lower case, as texts are compared."""
    return tuple(word.lower() for word in _WORD.findall(text))


def _pieces(text: str) -> tuple[str, ...]:
    """Words and marks as they are compared: "T-shirt" is one, so that "shirt" is not in it."""
    return tuple(piece.casefold() for piece in _PIECE.findall(text))


def _bare(text: str) -> tuple[str, ...]:
    """The words of a phrase without a leading article."""
    words = words_of(text)
    return words[1:] if words and words[0] in _ARTICLES else words


def _noun(phrase: str) -> str | None:
    """The last word without a plural s, which "glass" and "glasses" do not share: these are two things."""
    words = words_of(phrase)
    return re.sub(r"(?<=[^s])s$", "", words[-1]) if words else None


def check_length(name: str, texts: Iterable[str]) -> None:
    """Raise a ValueError if texts are longer than `MAX_CHARACTERS` together."""
    count = sum(map(len, texts))
    if count > MAX_CHARACTERS:
        raise ValueError(f"The {name} has {count} characters, more than {MAX_CHARACTERS}; shorten it.")


def align(first: Sequence[str | int | None], second: Sequence[str | int | None]) -> list[tuple[int, int]]:
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


def _take(places: Iterable[Span], taken: set[int]) -> Span | None:
    """The first of places whose characters are free; they are taken then."""
    place = next((own for own in places if taken.isdisjoint(range(*own))), None)
    taken.update(range(*place) if place else ())
    return place


def _characters(spans: Iterable[Span]) -> set[int]:
    return {i for span in spans for i in range(*span)}


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


def locate(text: str, phrases: Sequence[str], taken: Sequence[Span] = (), share: bool = False) -> list[Span]:
    """One span per phrase, each the first that is not taken. With `share`, phrases may overlap if they must."""
    used, spans, found = _characters(taken), {}, _occurrences(text, phrases)
    left = {pieces: iter(places) for pieces, places in found.items()}
    for i in _by_length(phrases):
        pieces = _pieces(phrases[i])
        spans[i] = _take(left[pieces], used) or next(iter(found[pieces] if share else ()), None)
        if spans[i] is None:
            raise ValueError(f"The phrase {phrases[i]!r} is not in the base prompt {text!r} (or is taken already).")
        used.update(range(*spans[i]))
    return [spans[i] for i in range(len(phrases))]


def locate_kept(text: str, phrases: Sequence[str], replaced: Sequence[Span]) -> list[Span | None]:
    """The span of each phrase, None for those that are replaced.

    A phrase that stands twice may be named once: then the copy that nothing replaces is meant.
    """
    spans = locate(text, phrases, share=True)
    gone, used = _characters(replaced), _characters([*replaced, *spans])
    left = {pieces: iter(places) for pieces, places in _occurrences(text, phrases).items()}
    return [
        span if gone.isdisjoint(range(*span)) else _take(left[_pieces(phrase)], used)
        for phrase, span in zip(phrases, spans)
    ]


def locate_targets(base_prompt: str, texts: Sequence[str], full_prompt: str) -> list[Span]:
    """The span of each target in the full prompt: where most of its words are new, and the last of equals."""
    known = {full for _, full in align(words_of(base_prompt), words_of(full_prompt))}
    new = [word.span() for i, word in enumerate(_WORD.finditer(full_prompt)) if i not in known]
    starts, ends = [start for start, _ in new], [end for _, end in new]
    found, taken, spans = _occurrences(full_prompt, texts), set(), {}
    for i in _by_length(texts):
        free = [span for span in found[_pieces(texts[i])] if taken.isdisjoint(range(*span))]
        if not free:
            raise ValueError(f"The target prompt {texts[i]!r} is not in the full prompt {full_prompt!r}.")
        spans[i] = max(free, key=lambda span: (bisect_left(starts, span[1]) - bisect_right(ends, span[0]), span))
        taken.update(range(*spans[i]))
    return [spans[i] for i in range(len(texts))]


def infer_replaced(base_prompt: str, targets: Sequence[str], full_prompt: str) -> list[str | None]:
    """Tell from a given full prompt which part of the base prompt each target replaces, or None where it is added.

    It is what the base prompt has between the words that surround the target in the full prompt, in its own spelling.
    Neighbours share one gap, and the first of them gets it. Raises ValueError: a target is not in the full prompt.
    """
    spans = locate_targets(base_prompt, targets, full_prompt)
    base_words, full_words = list(_WORD.finditer(base_prompt)), list(_WORD.finditer(full_prompt))
    # None in the place of a target's words: it matches nothing, so no match reaches across a target.
    new = _characters(spans)
    marked = [word.group().lower() if new.isdisjoint(range(*word.span())) else None for word in full_words]
    matches = align(words_of(base_prompt), marked)
    replaced, claimed = {}, set()
    for i in sorted(range(len(targets)), key=lambda i: spans[i]):
        before = [base for base, full in matches if full_words[full].end() <= spans[i][0]]
        after = [base for base, full in matches if full_words[full].start() >= spans[i][1]]
        gap = (before[-1] + 1 if before else 0, after[0] if after else len(base_words))
        replaced[i] = None
        if gap[0] < gap[1] and gap not in claimed:
            replaced[i] = base_prompt[base_words[gap[0]].start() : base_words[gap[1] - 1].end()]
            claimed.add(gap)
    return [replaced[i] for i in range(len(targets))]
