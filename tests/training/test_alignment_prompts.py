"""Tests of the prompts of alignment portraits: thinned out, and repeated where there are too few of them."""

from collections import Counter

import numpy as np
import pytest
import torch
from test_train import prepared, train, watch

import train_spf_portrait_lora as script
from prompts import make_prompt_pair
from training.alignment_prompts import COLORS, HAIR_COLORS, thin_out, vary_colors


PAIR = make_prompt_pair("a woman, a green hat, a red scarf, a tie", [("a green hat", "a crown"), "red hair"])


def test_drawn_portraits_leave_out_phrases_by_chance():
    random = np.random.default_rng(0)
    assert thin_out(PAIR, 0.0, random) == PAIR
    pairs = [thin_out(PAIR, 0.5, random) for _ in range(400)]
    for pair in pairs:
        phrases = pair.base_prompt.split(", ")
        assert phrases == [phrase for phrase in PAIR.base_prompt.split(", ") if phrase in phrases]
        assert "a green hat" in phrases and pair.target_prompts == PAIR.target_prompts
        assert pair.base_phrases == tuple(phrase for phrase in phrases if phrase != "a green hat")
        assert "a crown" in pair.full_prompt and "red hair" in pair.full_prompt
    counts = Counter(phrase for pair in pairs for phrase in pair.base_phrases)
    # One of three phrases always stays, so a phrase does a little more often than every second time.
    assert all(count / 400 == pytest.approx(0.5 + 1 / 24, abs=0.08) for count in counts.values()) and len(counts) == 3
    assert {len(thin_out(PAIR, 0.999, random).base_phrases) for _ in range(20)} == {1}


def test_thinned_out_prompts_are_those_the_losses_ask_about(world):
    run = prepared(world, alignment_phrase_dropout=0.9)
    pairs, models, table = run.inputs.pairs, run.parts.models, run.parts.table
    assert len(pairs) == 6 + 3 and any(len(pair.base_phrases) == 1 for pair in pairs[6:])
    rows = torch.arange(6, 9)
    sizes = torch.zeros(len(rows), 6)
    embeds = table.reference(rows, sizes), table.response(rows, sizes)
    for i, pair in enumerate(pairs[6:]):
        for found, prompt in zip(embeds, (pair.base_prompt, pair.full_prompt)):
            with torch.no_grad():
                ids = world.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
                expected = models.pipeline.text_encoder(ids)[0][0]
            torch.testing.assert_close(found.states[i], expected, rtol=1e-4, atol=1e-5)
        assert table.phrase_mask[6 + i].sum() == len(pair.base_phrases)


def test_more_alignment_portraits_than_prompts(world, tmp_path, monkeypatch):
    alignments = watch(monkeypatch, script, "prepare_alignment")
    inputs = watch(monkeypatch, script, "check_inputs")
    flags = {"num_alignment_images": 8, "max_train_samples": 3}
    flags |= {"alignment_phrase_dropout": 0, "alignment_color_variation": 0}
    train(world, tmp_path / "output", **flags, stage1_steps=1, stage2_steps=1)
    pairs = inputs[0].pairs
    assert alignments[0].pair_index.tolist() == list(range(3, 11))
    counts = Counter(pair.base_prompt for pair in pairs[3:])
    assert sorted(counts.values()) == [2, 3, 3] and set(pairs[3:]) == set(pairs[:3])
    distances = torch.pdist(torch.stack(alignments[0].latents).flatten(1))
    assert distances.min() > 0.1, "two portraits are the same"


COLORED = make_prompt_pair(
    "A Woman with Brown hair, a dark blue jacket, a black and white scarf, pink skin, an orange, a hat",
    [("blue jacket", "red dress"), "blond earrings"],
    base_phrases=["a woman with brown hair", "a black and white scarf", "pink skin", "an orange", "a hat"],
    free_phrases=["brown hair"],
)


def test_colors_of_drawn_portraits_are_others_by_chance():
    random = np.random.default_rng(0)
    assert vary_colors(COLORED, 0.0, random) is COLORED
    pairs = [vary_colors(COLORED, 0.5, random) for _ in range(300)]
    hair, jackets = Counter(), Counter()
    for pair in pairs:
        woman, jacket, *others = pair.base_prompt.split(", ")
        hair[woman.removeprefix("A Woman with ").removesuffix(" hair")] += 1
        jackets[jacket.removeprefix("a dark ").removesuffix(" jacket")] += 1
        assert others == COLORED.base_prompt.split(", ")[2:]
        assert pair.target_prompts[0].replaces == jacket.removeprefix("a dark ")
        assert pair.target_prompts[1] == COLORED.target_prompts[1]
        assert pair.full_prompt == pair.base_prompt.replace(jacket, "a dark red dress") + ", blond earrings"
        assert [phrase.lower() for phrase in pair.free_phrases] == [woman.removeprefix("A Woman with ").lower()]
        assert len(pair.base_phrases) == len(COLORED.base_phrases) and pair.base_phrases[0].lower() == woman.lower()
    # None that a target names, in whatever spelling.
    assert set(hair) == {color.capitalize() for color in HAIR_COLORS} - {"Blonde"}
    assert set(jackets) == {*COLORS} - {"red"}
    assert hair["Brown"] / 300 == pytest.approx(0.5, abs=0.1) == jackets["blue"] / 300
    # What is drawn is another portrait, not the same words again.
    assert all(vary_colors(COLORED, 1.0, random).base_prompt != COLORED.base_prompt for _ in range(20))


def test_a_changed_color_has_its_article():
    random, found = np.random.default_rng(0), set()
    for text in ("a blue jacket, a man", "An Orange jacket, a man"):
        pair = make_prompt_pair(text, "glasses")
        found |= {vary_colors(pair, 1.0, random).base_prompt.split(" jacket")[0] for _ in range(100)}
    assert {"an orange", "a red", "A Blue", "A Pink"} < found and not {"a orange", "An Blue"} & found


@pytest.mark.parametrize("text", ["a woman, 📸, blue", "A woman. ... Black hair | *", "a blue and white dress, ♥"])
def test_any_words_of_a_caption_can_be_drawn(text):
    pair = make_prompt_pair(text, "glasses")
    assert vary_colors(pair, 0.0, np.random.default_rng(0)) is pair
    drawn = vary_colors(pair, 1.0, np.random.default_rng(0))
    assert len(drawn.base_phrases) == len(pair.base_phrases)


def test_a_full_prompt_of_its_own_is_kept():
    full = "photo of a woman wearing a red hat, gray wall, a dress"
    pair = make_prompt_pair("a woman, gray wall, a dress", "red hat", full)
    assert vary_colors(pair, 1.0, np.random.default_rng(0)) is pair


def test_color_variation_changes_what_is_drawn_alone(world):
    plain, varied = (prepared(world, alignment_color_variation=chance).inputs.pairs for chance in (0.0, 1.0))
    assert plain[:6] == varied[:6] and plain[6:] != varied[6:]
    for own, other in zip(plain[6:], varied[6:]):
        assert len(own.base_phrases) == len(other.base_phrases), "the same phrases are left out"
