"""Tests of `prompts.py`, with a real CLIP tokenizer whose vocabulary is bytes and a handful of merges."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import CLIPTokenizer

from prompts import (
    PromptPair,
    TargetPrompt,
    compose_full_prompt,
    keep_phrases,
    locate_in_all,
    make_prompt_pair,
    phrase_mask,
    said_targets,
    suggest_replacements,
    tokenize_prompt_pair,
    without_target,
)
from wording import MAX_CHARACTERS


BASE = "a woman, a green jacket, a purple background"
# "red", "hair", "green" and "woman" become one token each; every other word is spelled byte by byte.
MERGES = (
    "r e|re d</w>|h a|i r</w>|ha ir</w>|g re|e n</w>|gre en</w>|w o|m a|n</w> x|ma n</w>|wo man</w>|a c|ac k|e t</w>"
).split("|")


def write_vocabulary(folder: Path) -> Path:
    """Write vocab.json and merges.txt: CLIP's byte alphabet, the same with "</w>", the merges, BOS and EOS."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    tokens = letters + [letter + "</w>" for letter in letters] + [merge.replace(" ", "") for merge in MERGES]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def make_tokenizer(tmp_path):
    def make(model_max_length: int = 77, **kwargs) -> CLIPTokenizer:
        folder = write_vocabulary(tmp_path / "tokenizer")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=model_max_length, **kwargs)

    return make


def spell(tokenizer, input_ids, positions) -> str:
    """The text of some positions, words joined by spaces."""
    return "".join(tokenizer.convert_ids_to_tokens([input_ids[i] for i in positions])).replace("</w>", " ").strip()


def check_invariants(tokens, length: int) -> None:
    assert len(tokens.base_input_ids) == len(tokens.full_input_ids) == length
    assert len(tokens.base_positions) == len(tokens.full_positions)
    for base, full in zip(tokens.base_positions, tokens.full_positions, strict=True):
        assert tokens.base_input_ids[base] == tokens.full_input_ids[full]
    for positions in (tokens.base_positions, tokens.full_positions, *tokens.phrase_positions):
        assert list(positions) == sorted(set(positions))
        assert 0 not in positions
    assert not set(tokens.target_positions) & set(tokens.full_positions)
    assert not set(tokens.full_padding) & {*tokens.full_positions, *tokens.target_positions}
    assert not set(tokens.base_padding) & set(tokens.base_positions)
    for padding in (tokens.base_padding, tokens.full_padding):
        assert list(padding) == list(range(padding[0], length))


# ------------------------------------------------------------------------------------------------ full prompt


@pytest.mark.parametrize(
    ("base", "targets", "expected"),
    [
        (BASE, [TargetPrompt("blonde hair")], f"{BASE}, blonde hair"),
        (BASE, [TargetPrompt("blonde hair"), TargetPrompt("a hat")], f"{BASE}, blonde hair, a hat"),
        ("A woman in a park. ", [TargetPrompt(" blonde hair ")], "A woman in a park, blonde hair"),
        (BASE, [TargetPrompt("a suit", "A Green  jacket")], "a woman, a suit, a purple background"),
        (
            BASE,
            [
                TargetPrompt("a hat"),
                TargetPrompt("a long red wall", "a purple background"),
                TargetPrompt("x", "jacket"),
            ],
            "a woman, a green x, a long red wall, a hat",
        ),
        ("a hat, a hat.", [TargetPrompt("a cap", "a hat")], "a cap, a hat."),
        ("a hat, a hat", [TargetPrompt("a cap", "a hat"), TargetPrompt("a fez", "a hat")], "a cap, a fez"),
        ("a T-shirt, a shirt", [TargetPrompt("vest", "shirt")], "a T-shirt, a vest"),
    ],
)
def test_compose_full_prompt(base, targets, expected):
    assert compose_full_prompt(base, targets) == expected


@pytest.mark.parametrize("replaces", ["a scarf", "jack", "", "a green jacket, a purple background x"])
def test_compose_rejects_a_missing_phrase(replaces):
    with pytest.raises(ValueError, match="is not in the base prompt"):
        compose_full_prompt(BASE, [TargetPrompt("a suit", replaces)])


def test_compose_rejects_one_phrase_replaced_twice():
    with pytest.raises(ValueError, match=r"'green jacket'.*taken already"):
        compose_full_prompt(BASE, [TargetPrompt("a suit", "a green jacket"), TargetPrompt("x", "green jacket")])


# ------------------------------------------------------------------------------------------------------- pair


def test_pair_of_an_addition():
    pair = make_prompt_pair(BASE, "blonde hair")
    assert pair == PromptPair(
        BASE,
        (TargetPrompt("blonde hair"),),
        f"{BASE}, blonde hair",
        ("a woman", "a green jacket", "a purple background"),
    )
    assert pair.target_text == "blonde hair"


def test_pair_of_mixed_targets_drops_what_is_replaced():
    pair = make_prompt_pair(BASE, ["a hat", ("a green jacket", "a suit"), TargetPrompt("a wall", "background")])
    assert pair.full_prompt == "a woman, a suit, a purple a wall, a hat"
    # "a purple background" lost its noun, so its region is the target's.
    assert pair.base_phrases == ("a woman",)
    assert pair.target_text == "a hat, a suit, a wall"


def test_a_tuple_of_strings_is_two_additions():
    assert make_prompt_pair(BASE, ("a hat", "a scarf")).full_prompt == f"{BASE}, a hat, a scarf"


def test_pair_with_a_given_full_prompt():
    full = "a woman wearing a suit, a purple background, with a hat"
    pair = make_prompt_pair(BASE, ["a hat", "a suit"], full)
    assert pair.target_prompts == (TargetPrompt("a hat"), TargetPrompt("a suit", "a green jacket"))
    assert pair.full_prompt == full
    assert pair.base_phrases == ("a woman", "a purple background")


def test_neighbouring_targets_replace_a_phrase_once():
    pair = make_prompt_pair(BASE, ["a hat", "a suit"], "a woman, a suit, a hat, a purple background")
    assert pair.target_prompts == (TargetPrompt("a hat"), TargetPrompt("a suit", "a green jacket"))


def test_given_phrases_are_kept_as_they_are():
    pair = make_prompt_pair(BASE, "a hat", base_phrases=["Woman", "jacket", "green jacket"])
    assert pair.base_phrases == ("Woman", "jacket", "green jacket")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("  ", "a hat"), "base prompt is empty"),
        ((BASE, " "), "target prompt is empty"),
        ((BASE, []), r"target prompt is empty: \[\]"),
        ((BASE, ["a hat", ""]), "target prompt is empty"),
        ((BASE, BASE.upper() + "."), "is the base prompt itself"),
        ((BASE, "A Green  jacket"), "'A Green  jacket' is already a phrase"),
        ((BASE, [("a woman", "a green jacket")]), "'a green jacket' is already a phrase"),
        ((BASE, "green", None, ["green"]), "'green' is already a phrase"),
        ((BASE, "a hat", None, ["a scarf"]), "'a scarf' is not in the base prompt"),
        ((BASE, "a hat", None, ["wom"]), "'wom' is not in the base prompt"),
        ((BASE, "a hat", None, []), "left to preserve"),
        ((BASE, [("a scarf", "a hat")]), "'a scarf' is not in the base prompt"),
        ((BASE, [("green", "Green")]), "'Green' replaces itself"),
        (("a woman", [("a woman", "a man")]), r"left to preserve; replaced: \['a woman'\]"),
        (("a woman", "a man", "a man"), "left to preserve"),
        ((BASE, "a hat", BASE), "'a hat' is not in the full prompt"),
        ((BASE, [TargetPrompt("a hat")], BASE), "'a hat' is not in the full prompt"),
    ],
)
def test_pair_checks(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        make_prompt_pair(*arguments)
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("pad_token", ["<|endoftext|>", "!"])
@pytest.mark.parametrize("length", [77, 60, 128])
def test_addition(make_tokenizer, pad_token, length):
    tokenizer = make_tokenizer(length, pad_token=pad_token)
    tokens = tokenize_prompt_pair(make_prompt_pair(BASE, "red hair"), tokenizer)
    check_invariants(tokens, length)
    spelled = [spell(tokenizer, tokens.base_input_ids, positions) for positions in tokens.phrase_positions]
    assert spelled == ["a woman", "a green jacket", "a purple background"]
    assert spell(tokenizer, tokens.full_input_ids, tokens.target_positions) == "red hair"
    content = len(tokenizer(BASE)["input_ids"]) - 2
    assert tokens.base_positions == tokens.full_positions == tuple(range(1, content + 1))
    assert tokens.base_padding == tuple(range(content + 1, length))
    # The added comma, "red" and "hair".
    assert tokens.full_padding == tuple(range(content + 4, length))
    padded = tokenizer(BASE, padding="max_length", truncation=True)["input_ids"]
    assert tokens.base_input_ids == padded
    assert padded[-1] == tokenizer.pad_token_id


@pytest.mark.parametrize("pad_token", ["<|endoftext|>", "!"])
def test_padding_is_told_by_length(make_tokenizer, pad_token):
    """An exclamation mark in the prompt has the id that pads in SD2, and is still text."""
    tokenizer = make_tokenizer(40, pad_token=pad_token)
    tokens = tokenize_prompt_pair(make_prompt_pair("red !! hair", "green"), tokenizer)
    check_invariants(tokens, 40)
    assert tokens.base_positions == (1, 2, 3, 4)
    assert tokens.base_padding == tuple(range(5, 40))


def test_replacement_by_a_longer_phrase(make_tokenizer):
    tokenizer = make_tokenizer()
    pair = make_prompt_pair(BASE, [("a green jacket", "a green striped sweater")])
    tokens = tokenize_prompt_pair(pair, tokenizer)
    check_invariants(tokens, 77)
    assert spell(tokenizer, tokens.full_input_ids, tokens.target_positions) == "a green striped sweater"
    assert spell(tokenizer, tokens.base_input_ids, tokens.base_positions) == "a woman , , a purple background"
    # Before the target the index is the same, after it the two sequences are shifted against each other.
    shifts = [full - base for base, full in zip(tokens.base_positions, tokens.full_positions, strict=True)]
    assert shifts[0] == 0
    assert shifts[-1] == len(tokens.target_positions) - len(
        tokenizer("a green jacket", add_special_tokens=False).input_ids
    )
    assert set(shifts) == {0, shifts[-1]}


def test_replacement_at_the_front_and_an_addition(make_tokenizer):
    tokenizer = make_tokenizer()
    pair = make_prompt_pair(BASE, [("a woman", "a boy"), "red hair"])
    tokens = tokenize_prompt_pair(pair, tokenizer)
    check_invariants(tokens, 77)
    assert spell(tokenizer, tokens.full_input_ids, tokens.target_positions) == "a boy red hair"
    assert spell(tokenizer, tokens.full_input_ids, tokens.full_positions) == ", a green jacket , a purple background"


def test_target_in_the_middle_of_a_given_full_prompt(make_tokenizer):
    tokenizer = make_tokenizer()
    pair = make_prompt_pair(BASE, "red hair", "A woman with red hair, a green jacket, a purple background")
    tokens = tokenize_prompt_pair(pair, tokenizer)
    check_invariants(tokens, 77)
    assert spell(tokenizer, tokens.full_input_ids, tokens.target_positions) == "red hair"
    assert spell(tokenizer, tokens.full_input_ids, tokens.full_positions) == (
        "a woman , a green jacket , a purple background"
    )


def test_repeated_words_belong_to_their_own_phrase(make_tokenizer):
    tokenizer = make_tokenizer()
    tokens = tokenize_prompt_pair(make_prompt_pair("red hair, red hair, green hair, red", "woman"), tokenizer)
    # red hair , red hair , green hair , red
    assert tokens.phrase_positions == ((1, 2), (4, 5), (7, 8), (10,))


def test_a_phrase_does_not_settle_inside_a_longer_one(make_tokenizer):
    pair = make_prompt_pair("red hair green, red hair", "woman", base_phrases=["red hair", "red hair green"])
    assert tokenize_prompt_pair(pair, make_tokenizer()).phrase_positions == ((5, 6), (1, 2, 3))


def test_nested_phrases_share_tokens_if_they_must(make_tokenizer):
    pair = make_prompt_pair("red hair, green", "woman", base_phrases=["red hair", "hair"])
    assert tokenize_prompt_pair(pair, make_tokenizer()).phrase_positions == ((1, 2), (2,))


def test_a_preserved_phrase_is_not_looked_for_where_it_was_replaced(make_tokenizer):
    pair = make_prompt_pair("red hair, woman, red hair", [("red hair", "green")])
    tokens = tokenize_prompt_pair(pair, make_tokenizer())
    assert pair.base_phrases == ("woman", "red hair")
    assert tokens.phrase_positions == ((4,), (6, 7))
    assert (tokens.base_positions, tokens.full_positions) == ((3, 4, 5, 6, 7), (2, 3, 4, 5, 6))
    assert tokens.target_positions == (1,)


def test_replacing_the_first_of_two_equal_phrases(make_tokenizer):
    tokenizer = make_tokenizer()
    pair = make_prompt_pair("red hair, red hair", "green", "green, red hair")
    tokens = tokenize_prompt_pair(pair, tokenizer)
    assert (tokens.base_positions, tokens.full_positions) == ((3, 4, 5), (2, 3, 4))
    assert tokens.phrase_positions == ((4, 5),)


def test_a_rewritten_full_prompt(make_tokenizer):
    """A full prompt that is no plain edit of the base: what is common is matched, in order."""
    tokenizer = make_tokenizer()
    full = "Portrait of a woman with red hair; the green jacket before a wall"
    tokens = tokenize_prompt_pair(make_prompt_pair(BASE, [TargetPrompt("red hair")], full), tokenizer)
    check_invariants(tokens, 77)
    assert spell(tokenizer, tokens.full_input_ids, tokens.target_positions) == "red hair"
    assert "woman" in spell(tokenizer, tokens.full_input_ids, tokens.full_positions)
    assert "green jacket" in spell(tokenizer, tokens.full_input_ids, tokens.full_positions)


def test_target_words_that_the_base_has_too(make_tokenizer):
    """The target "hair" is the appended one, and no target token is matched."""
    tokens = tokenize_prompt_pair(make_prompt_pair("woman, red hair", ["hair", "green hair"]), make_tokenizer())
    # woman , red hair , hair , green hair
    assert tokens.target_positions == (6, 8, 9)
    assert tokens.full_positions == tokens.base_positions == (1, 2, 3, 4)


def test_case_accents_and_white_space(make_tokenizer):
    tokenizer = make_tokenizer()
    pair = make_prompt_pair("A  WOMAN,\n a café", "Red hair", base_phrases=["a woman", "A CAFÉ"])
    tokens = tokenize_prompt_pair(pair, tokenizer)
    check_invariants(tokens, 77)
    assert tokens.phrase_positions[0] == (1, 2)
    # a, c, a, f, and two bytes for the accented letter.
    assert tokens.phrase_positions[1] == tuple(range(4, 10))
    assert tokenizer.decode([tokens.base_input_ids[i] for i in tokens.phrase_positions[1]]) == "a café"


def test_hyphens_and_apostrophes(make_tokenizer):
    tokenizer = make_tokenizer()
    pair = make_prompt_pair(
        "a woman's t-shirt, red hair", [("t-shirt", "green dress")], base_phrases=["a woman's", "hair"]
    )
    tokens = tokenize_prompt_pair(pair, tokenizer)
    check_invariants(tokens, 77)
    assert spell(tokenizer, tokens.base_input_ids, tokens.phrase_positions[0]) == "a woman 's"
    assert spell(tokenizer, tokens.full_input_ids, tokens.target_positions) == "green dress"


# ------------------------------------------------------------------------------------------------- truncation


def test_cut_phrases_are_named(make_tokenizer, caplog):
    tokenizer = make_tokenizer(6)
    pair = make_prompt_pair("red hair, green hair, woman", [("red hair", "green")])
    with caplog.at_level(logging.WARNING, logger="prompts"):
        tokens = tokenize_prompt_pair(pair, tokenizer)
    check_invariants(tokens, 6)
    # BOS red hair , green EOS: half of "green hair" is left, nothing of "woman".
    assert tokens.phrase_positions == ((4,), ())
    assert tokens.target_positions == (1,)
    assert (tokens.base_positions, tokens.full_positions) == ((3, 4), (2, 3))
    assert tokens.base_padding == tokens.full_padding == (5,)
    base_warning, full_warning = [record.getMessage() for record in caplog.records]
    assert "6 tokens; cut off: 'hair, woman'; phrases without any token: ['woman']" in base_warning
    assert "cut off: ', woman'" in full_warning


def test_no_warning_when_everything_fits(make_tokenizer, caplog):
    # BOS red hair , green EOS
    tokenize_prompt_pair(make_prompt_pair("red hair", "green"), make_tokenizer(6))
    assert not caplog.records


@pytest.mark.parametrize("target", ["green woman", "green wxyz", ["green", "hair woman"]])
def test_a_cut_target_is_an_error(make_tokenizer, target):
    with pytest.raises(ValueError, match="does not fit into the 6 tokens"):
        tokenize_prompt_pair(make_prompt_pair("red hair", target), make_tokenizer(6))


def test_a_tokenizer_without_offsets_is_refused():
    with pytest.raises(ValueError, match="use the fast tokenizer"):
        tokenize_prompt_pair(make_prompt_pair(BASE, "a hat"), SimpleNamespace(is_fast=False))


# ------------------------------------------------------------------------------------------------------- mask


def test_phrase_mask():
    assert phrase_mask([(1, 3), (), (0,)], 4) == [[0, 0.5, 0, 0.5], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert phrase_mask([], 4) == []


def test_the_targets_as_the_pipeline_takes_them():
    pair = make_prompt_pair("a woman, a hat", ["red hair", ("a hat", "a crown")])
    assert pair.target_argument == ("red hair", ("a hat", "a crown"))


# ------------------------------------------------------------------------------------------------------ free phrases


def test_free_phrases_are_marked_among_the_base_phrases():
    pair = make_prompt_pair(BASE, "red hair", free_phrases=["A Purple Background"])
    assert pair.base_phrases == ("a woman", "a green jacket", "a purple background")
    assert pair.free_phrases == ("a purple background",)


def test_a_free_phrase_that_was_not_given_as_a_phrase_joins_them():
    pair = make_prompt_pair(BASE, "red hair", base_phrases=["a woman"], free_phrases=["green jacket"])
    assert pair.base_phrases == ("a woman", "green jacket")
    assert pair.free_phrases == ("green jacket",)


def test_a_free_phrase_that_is_replaced_is_dropped_with_it():
    pair = make_prompt_pair(BASE, [("a green jacket", "a red coat")], free_phrases=["a green jacket"])
    assert pair.base_phrases == ("a woman", "a purple background")
    assert pair.free_phrases == ()


@pytest.mark.parametrize(
    ("free_phrases", "message"),
    [
        (["a blue sky"], "'a blue sky' is not in the base prompt"),
        (["a woman", " "], "A free phrase is empty"),
        (["a woman", "a green jacket", "a purple background"], "is left to preserve"),
    ],
)
def test_free_phrases_that_cannot_be(free_phrases, message):
    with pytest.raises(ValueError, match=message):
        make_prompt_pair(BASE, "red hair", free_phrases=free_phrases)


@pytest.mark.parametrize(
    ("phrases", "kept"),
    [
        (None, ("a man", "a hat")),
        (["a man", "a hat"], ("a man", "a hat")),
        (["a hat"], ("a hat",)),
        (["a hat", "a man", "a hat"], ("a man", "a hat")),
    ],
)
def test_the_copy_of_a_replaced_phrase_stays_protected(phrases, kept, make_tokenizer):
    pair = make_prompt_pair("a hat, a man, a hat", [("a hat", "a red coat")], base_phrases=phrases)
    assert pair.base_phrases == kept
    tokenizer = make_tokenizer()
    tokens = tokenize_prompt_pair(pair, tokenizer)
    places = dict(zip(kept, tokens.phrase_positions))
    of_the_man = tokenize_prompt_pair(without_target(pair.base_prompt, ["a man"]), tokenizer).phrase_positions
    assert min(places["a hat"]) > max(of_the_man[0])
    assert spell(tokenizer, tokens.full_input_ids, tokens.target_positions) == "a red coat"


def test_a_copy_within_another_phrase_is_not_taken_for_a_phrase_of_its_own():
    pair = make_prompt_pair("a man, a hat, a hat in a box", [("a hat in a box", "a crown")])
    assert pair.base_phrases == ("a man", "a hat")


@pytest.mark.parametrize(
    ("stays", "prompt", "phrases"),
    [
        ([True, False, False], "a hat, a man", ("a man",)),
        ([False, False, True], "a hat, a hat", ("a hat",)),
        ([True, False, True], "a hat, a man, a hat", ("a man", "a hat")),
    ],
)
def test_a_prompt_of_fewer_phrases_keeps_their_order_and_every_copy(stays, prompt, phrases):
    pair = make_prompt_pair("a hat, a man, a wall, a hat", [("a hat", "a red coat")])
    assert pair.base_phrases == ("a man", "a wall", "a hat")
    shorter = keep_phrases(pair, stays)
    assert (shorter.base_prompt, shorter.base_phrases) == (prompt, phrases)
    assert shorter.full_prompt == prompt.replace("a hat", "a red coat", 1)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"base_prompt": "a hat, " * 600}, "base prompt"),
        ({"target_prompt": "red " * 1001}, "target prompt"),
        ({"target_prompt": ["red hair"] * 501}, "target prompt"),
        ({"full_prompt": "a woman, red hair" + " " * MAX_CHARACTERS}, "full prompt"),
        ({"base_phrases": ["a woman"] * 600}, "list of base phrases"),
        ({"free_phrases": ["a woman"] * 600}, "list of free phrases"),
    ],
)
def test_a_text_far_beyond_the_text_encoder_is_refused(arguments, name):
    with pytest.raises(ValueError, match=f"^The {name} has [0-9]+ characters, more than {MAX_CHARACTERS}; shorten it"):
        make_prompt_pair(**{"base_prompt": BASE, "target_prompt": "red hair"} | arguments)


def test_the_longest_prompt_of_equal_phrases_is_read():
    count = MAX_CHARACTERS // len("a hat, ")
    prompt = ", ".join(["a hat"] * count)
    assert make_prompt_pair(prompt, "red hair").base_phrases == ("a hat",) * count
    with pytest.raises(ValueError, match="^The prompt has"):
        without_target(f"{prompt}, {prompt}", ["a hat"])


@pytest.mark.parametrize(
    ("base_prompt", "target", "said"),
    [
        ("a woman, long blonde hair, a jacket", "blonde hair", ["blonde hair"]),
        ("a woman, a jacket", "blonde hair", []),
        ("a woman, long blonde hair", [("long blonde hair", "blonde hair")], []),
        ("a woman, blond hairpins", "blonde hair", []),
    ],
)
def test_a_target_inside_a_longer_phrase_is_found(base_prompt, target, said):
    assert said_targets(make_prompt_pair(base_prompt, target)) == said


def test_a_phrase_that_may_change_contradicts_nothing():
    pair = make_prompt_pair("a woman, black hair", "blonde hair", free_phrases=["black hair"])
    assert suggest_replacements(pair) == []
    assert suggest_replacements(make_prompt_pair("a woman, black hair", "blonde hair")) == [
        ("black hair", "blonde hair")
    ]


# ------------------------------------------------------------------------------------------------ several tokenizers


@pytest.fixture
def two_tokenizers(tmp_path):
    """As in Stable Diffusion XL, where "!!" is a token of the first; the second pads with "!", a token of its own."""
    folder = write_vocabulary(tmp_path / "tokenizer")
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    vocabulary["!!</w>"] = len(vocabulary)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    with (folder / "merges.txt").open("a", encoding="utf-8") as merges:
        merges.write("! !</w>\n")
    make = CLIPTokenizer.from_pretrained
    return make(folder, model_max_length=77), make(folder, model_max_length=77, pad_token="!")


def test_what_tokenizers_count_alike_is_where_each_has_it(two_tokenizers):
    pair = make_prompt_pair("a woman, a green jacket!", "red hair")
    assert locate_in_all(pair, two_tokenizers) == tokenize_prompt_pair(pair, two_tokenizers[0])
    assert locate_in_all(pair, two_tokenizers[:1]) == tokenize_prompt_pair(pair, two_tokenizers[0])


def test_where_tokenizers_differ_a_phrase_is_wherever_one_has_it(two_tokenizers):
    pair = make_prompt_pair("a woman!! a green jacket", "red hair")
    first, second = (tokenize_prompt_pair(pair, tokenizer) for tokenizer in two_tokenizers)
    assert first.phrase_positions[0] == second.phrase_positions[0]
    assert [place + 1 for place in first.phrase_positions[1]] == list(second.phrase_positions[1])
    both = locate_in_all(pair, two_tokenizers)
    for name in ("phrase_positions", "each_target_positions"):
        expected = [tuple(sorted({*own, *other})) for own, other in zip(getattr(first, name), getattr(second, name))]
        assert list(getattr(both, name)) == expected
    assert both.target_positions == both.each_target_positions[0]
    # Matches and padding are those of both.
    matches = [set(zip(own.base_positions, own.full_positions)) for own in (first, second, both)]
    assert matches[2] == matches[0] & matches[1] and matches[2]
    assert not set(both.full_positions) & set(both.target_positions)
    assert both.base_padding == second.base_padding and both.full_padding == second.full_padding


def test_a_target_has_to_fit_into_the_tokens_of_each(two_tokenizers):
    # The last token that fits is the target's in the first tokenizer, and does not fit in the second.
    length = len(two_tokenizers[0]("a woman!! a hat, red hair").input_ids)
    for tokenizer in two_tokenizers:
        tokenizer.model_max_length = length
    pair = make_prompt_pair("a woman!! a hat", "red hair")
    tokenize_prompt_pair(pair, two_tokenizers[0])
    with pytest.raises(ValueError, match="does not fit"):
        locate_in_all(pair, two_tokenizers)
    two_tokenizers[1].model_max_length = length + 1
    with pytest.raises(ValueError, match=f"different lengths: {length} and {length + 1}"):
        locate_in_all(pair, two_tokenizers)
