"""Tests of `wording.py`."""

import pytest
from test_prompts import BASE

from wording import find_weights, infer_replaced, split_phrases, suggest_replacement, take_out


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (BASE, ["a woman", "a green jacket", "a purple background"]),
        (
            "A woman in a brown jacket, with a curtain background",
            ["A woman", "a brown jacket", "a curtain background"],
        ),
        ("a photo of a woman", ["a photo", "a woman"]),
        ("A man in front of a built-in shelf.", ["A man", "a built-in shelf"]),
        ("a close-up of a smiling woman; soft light", ["a close-up", "a smiling woman", "soft light"]),
        ("a standing man holding the cup and a book", ["a standing man", "the cup", "a book"]),
        ("a black and white photo of a man", ["a black and white photo", "a man"]),
        ("The woman has red hair. She is wearing a T-shirt.", ["The woman", "red hair", "a T-shirt"]),
        ("a woman IN a coat\nnext to a wall", ["a woman", "a coat", "a wall"]),
        ("an indoor bandstand, inner calm", ["an indoor bandstand", "inner calm"]),
        ("portrait", ["portrait"]),
        ("a red hat, a red hat", ["a red hat", "a red hat"]),
        ("a woman (red hair:1.2)", ["a woman", "red hair", "1.2"]),
        (" , . ", []),
    ],
)
def test_split_phrases(prompt, expected):
    assert split_phrases(prompt) == expected


@pytest.mark.parametrize(
    ("base", "target", "full", "replaces"),
    [
        (BASE, "blonde hair", f"{BASE}, blonde hair", None),
        (BASE, "blonde hair", "A woman with Blonde hair, a green jacket, a purple background", None),
        (BASE, "blonde hair", f"blonde hair, {BASE}", None),
        (BASE, "a suit", "a woman, a suit, a purple background", "a green jacket"),
        (BASE, "suit", "a woman, a green suit, a purple background", "jacket"),
        (BASE, "a green suit", "a woman, a green suit, a purple background", "a green jacket"),
        (BASE, "a wall", "a woman, a green jacket, a wall", "a purple background"),
        (BASE, "a man", "a man, a green jacket, a purple background", "a woman"),
        ("A Photo of a man", "watercolor", "a watercolor of a man", "Photo"),
        ("a woman with long hair", "hair", "a woman with long hair, hair", None),
        ("a hat, a hat", "a cap", "a hat, a cap", "a hat"),
        ("a hat, a hat", "a cap", "a cap, a hat", "a hat"),
    ],
)
def test_infer_replacement(base, target, full, replaces):
    assert infer_replaced(base, [target], full) == [replaces]


def test_infer_replacement_needs_the_target():
    with pytest.raises(ValueError, match="'blonde hair' is not in the full prompt"):
        infer_replaced(BASE, ["blonde hair"], BASE)


@pytest.mark.parametrize(
    ("base_phrases", "target", "phrase"),
    [
        (["a woman", "black hair", "a green jacket"], "blonde hair", "black hair"),
        (["a woman", "Black HAIR."], "blonde hair", "Black HAIR."),
        (["grey hair", "black hair"], "blonde hair", "grey hair"),
        (["a hat"], "a red hat", "a hat"),
        (["a blue hat"], "red hats", "a blue hat"),
        (["brown eyes"], "one blue eye", "brown eyes"),
        (["a blue hat"], "wearing a red hat with a feather", "a blue hat"),
        (["a feather"], "a red hat with a feather", None),
        (["a woman", "a green jacket"], "blonde hair", None),
        (["a woman with a hat"], "a red hat", None),
        (["a red hat"], "a hat", None),
        (["a T-shirt"], "a striped shirt", None),
        (["a hat rack", "a hatter"], "a red hat", None),
        (["a wine glass"], "round glasses", None),
        (["\U0001f642", "a man"], "\U0001f642", None),
        ([], "blonde hair", None),
    ],
)
def test_a_phrase_about_the_targets_noun_is_proposed_for_replacement(base_phrases, target, phrase):
    assert suggest_replacement(base_phrases, target) == (None if phrase is None else (phrase, target))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a man, (a blue jacket:1.2), a wall", "(a blue jacket:1.2)"),
        ("a man, [a hat : .5]", "[a hat : .5]"),
        ("a man, ((a pink background))", "((a pink background))"),
        ("a man, <lora:foo:0.8>", "<lora:foo:0.8>"),
        ("a man (smiling), 16:9, (16:9), at 7:30, a <hat>", None),
    ],
)
def test_weights_of_other_programs_are_found(text, found):
    assert find_weights(text) == found


@pytest.mark.parametrize(
    ("caption", "target", "base_prompt"),
    [
        ("a woman, blonde hair, a brown jacket", "blonde hair", "a woman, a brown jacket"),
        ("Blonde Hair, a woman.", "blonde hair", "a woman."),
        ("a woman, a brown jacket, blonde hair.", "blonde hair", "a woman, a brown jacket"),
        ("a woman, red hat, a wall, the red hat", "a red hat", "a woman, a wall"),
        ("a woman, blonde hair, a tie, blue eyes", "blonde hair, blue eyes", "a woman, a tie"),
        ("a woman, blue eyes", "blonde hair, blue eyes", "a woman, blue eyes"),
        ("a woman with blonde hair, long blonde hair", "blonde hair", "a woman with blonde hair, long blonde hair"),
        ("a woman, , a hat", "\U0001f642", "a woman, , a hat"),
        ("blonde hair", "blonde hair", ""),
    ],
)
def test_the_target_is_taken_out_of_a_caption_as_a_whole_phrase_alone(caption, target, base_prompt):
    assert take_out(caption, target) == base_prompt
