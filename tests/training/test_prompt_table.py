"""Tests of the prompt table, with a tiny random CLIP and text encoder and the tokenizer of `test_prompts.py`."""

import logging
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_prompts import write_vocabulary
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from families.stable_diffusion import StableDiffusion
from prompts import make_prompt_pair, tokenize_prompt_pair
from training.prompt_table import (
    BASE,
    EMPTY,
    FULL,
    embed_pixels,
    embed_targets,
    make_prompt_table,
)


SIDE = 16
PROCESSOR = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
PAIRS = [
    make_prompt_pair("a woman, a green hat", "red hair"),
    make_prompt_pair("a man", "red hair"),
    make_prompt_pair("a woman, a green hat, a red hat", [("a green hat", "a red scarf"), "red hair"]),
]


def text_arguments(tokenizer: CLIPTokenizer) -> dict:
    return {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        # The default spread of .02 makes all texts look the same.
        "initializer_factor": 8.0,
    }


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return CLIPTokenizer.from_pretrained(write_vocabulary(tmp_path_factory.mktemp("diffusion")), model_max_length=77)


@pytest.fixture(scope="module")
def clip_tokenizer(tmp_path_factory):
    """Not the diffusion model's: another length, so that a mix-up shows."""
    return CLIPTokenizer.from_pretrained(write_vocabulary(tmp_path_factory.mktemp("clip")), model_max_length=40)


@pytest.fixture(scope="module")
def clip(clip_tokenizer):
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=SIDE, patch_size=8
    )
    text = CLIPTextConfig(**text_arguments(clip_tokenizer))
    return (
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).eval().requires_grad_(False)
    )


@pytest.fixture(scope="module")
def text_encoder(tokenizer):
    torch.manual_seed(1)
    return CLIPTextModel(CLIPTextConfig(**text_arguments(tokenizer))).eval()


@pytest.fixture(scope="module")
def tokens(tokenizer):
    return [tokenize_prompt_pair(pair, tokenizer) for pair in PAIRS]


@pytest.fixture(scope="module")
def table(tokens, tokenizer, text_encoder):
    return make_table(PAIRS, tokens, tokenizer, text_encoder)


def make_table(pairs, tokens, tokenizer, text_encoder):
    pipeline = SimpleNamespace(tokenizer=tokenizer, text_encoder=text_encoder, config={})
    return make_prompt_table(StableDiffusion, pipeline, pairs, tokens)


def clip_text(clip, clip_tokenizer, text: str) -> torch.Tensor:
    """One text alone, without padding."""
    with torch.no_grad():
        return clip.get_text_features(**clip_tokenizer(text, return_tensors="pt")).pooler_output[0]


def encode(text_encoder, tokenizer, text: str) -> torch.Tensor:
    """A prompt as the stock pipeline encodes it."""
    with torch.no_grad():
        return text_encoder(tokenizer(text, padding="max_length", return_tensors="pt").input_ids)[0][0]


def matched(table, row: int) -> list[tuple[int, int]]:
    mask = table.positions.mask[row]
    return list(zip(table.positions.base[row][mask].tolist(), table.positions.full[row][mask].tolist()))


# ------------------------------------------------------------------------------------------------- distances, targets


def test_distances_by_hand(table, text_encoder, tokenizer):
    assert PAIRS[2].base_phrases == ("a woman", "a red hat") and PAIRS[2].target_text == "a red scarf, red hair"

    def pooled(text: str) -> torch.Tensor:
        with torch.no_grad():
            return text_encoder(**tokenizer(text, return_tensors="pt")).pooler_output[0]

    for i, pair in enumerate(PAIRS):
        for j, phrase in enumerate(pair.base_phrases):
            expected = 1 - F.cosine_similarity(pooled(phrase), pooled(pair.target_text), dim=0)
            assert table.distances[i, j] == pytest.approx(expected.item(), abs=1e-5) and expected > 0.01
    assert torch.isfinite(table.distances).all(), "padding must not be NaN: the maps multiply it by zero"
    assert table.distances.dtype == torch.float32 and not table.distances.requires_grad


def test_each_target_is_embedded_once_as_if_it_were_alone(clip, clip_tokenizer):
    """Also behind the 64 of one chunk, and one that is too long and cut off; the text tower is gone afterwards."""
    pairs = [make_prompt_pair("a man", f"a hat {i % 70}") for i in range(75)] + [make_prompt_pair("a man", "x" * 60)]
    own = deepcopy(clip)
    embeds = embed_targets(own, clip_tokenizer, pairs)
    assert embeds.shape == (76, 12) and embeds.dtype == torch.float32 and torch.isfinite(embeds).all()
    for i in (0, 63, 64, 69, 70):
        expected = clip_text(clip, clip_tokenizer, pairs[i].target_text)
        torch.testing.assert_close(embeds[i], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(embeds[70], embeds[0]) and F.cosine_similarity(embeds[0], embeds[75], dim=0) < 0.99
    assert not any(name.startswith("text_") for name, _ in own.named_parameters())
    pixels = noise_pixels(SIDE)
    assert torch.equal(embed_pixels(own, PROCESSOR, pixels), embed_pixels(clip, PROCESSOR, pixels))


# ------------------------------------------------------------------------------------------------------ prompt table


def test_every_kind_of_row_sets_the_right_prompts_against_each_other(table, text_encoder, tokenizer):
    reference, response = (table.prompt_embeds[rows].states for rows in (table.reference_rows, table.response_rows))
    for i, pair in enumerate(PAIRS):
        expected = {
            FULL: (pair.base_prompt, pair.full_prompt),
            BASE: (pair.base_prompt, pair.base_prompt),
            EMPTY: ("", ""),
        }
        for kind, prompts in expected.items():
            row = kind * len(PAIRS) + i
            for embeds, prompt in zip((reference[row], response[row]), prompts, strict=True):
                torch.testing.assert_close(embeds, encode(text_encoder, tokenizer, prompt), rtol=1e-4, atol=1e-5)
    assert not table.prompt_embeds.states.requires_grad


def test_each_different_prompt_is_encoded_once(table):
    prompts = {text for pair in PAIRS for text in (pair.base_prompt, pair.full_prompt)} | {""}
    assert len(table.prompt_embeds) == len(prompts) == 7


def test_more_prompts_than_one_chunk(tokenizer, text_encoder):
    pairs = [make_prompt_pair(f"a woman, hat {i}", "red hair") for i in range(20)]
    tokens = [tokenize_prompt_pair(pair, tokenizer) for pair in pairs]
    table = make_table(pairs, tokens, tokenizer, text_encoder)
    assert len(table.prompt_embeds) == 41
    for i, pair in enumerate(pairs):
        found = table.prompt_embeds.states[table.response_rows[i]]
        torch.testing.assert_close(found, encode(text_encoder, tokenizer, pair.full_prompt), rtol=1e-4, atol=1e-5)


def test_a_full_row_matches_the_tokens_of_both_prompts(table, tokens):
    for i, row in enumerate(tokens):
        assert matched(table, FULL * len(PAIRS) + i) == list(zip(row.base_positions, row.full_positions, strict=True))
        assert matched(table, i), "nothing matched: the comparison above would be empty"


def test_a_row_without_change_matches_each_token_with_itself(table, tokens):
    for i, row in enumerate(tokens):
        text = range(1, row.base_padding[0])
        assert matched(table, BASE * len(PAIRS) + i) == [(position, position) for position in text]
        assert matched(table, EMPTY * len(PAIRS) + i) == []


def test_every_position_is_bos_text_or_padding(table, tokens, tokenizer):
    length = tokenizer.model_max_length
    for kind in (FULL, BASE, EMPTY):
        for i, row in enumerate(tokens):
            index = kind * len(PAIRS) + i
            paddings = {
                FULL: (row.base_padding, row.full_padding),
                BASE: (row.base_padding, row.base_padding),
                EMPTY: (range(1, length), range(1, length)),
            }[kind]
            for mask, positions in zip(table.positions[3:], paddings, strict=True):
                mask = mask[index]
                assert mask.shape == (length,) and not mask[0]
                assert mask.nonzero().flatten().tolist() == list(positions)
    ids = torch.tensor([row.base_input_ids for row in tokens])
    assert (ids[table.positions.base_padding[: len(PAIRS)]] == tokenizer.eos_token_id).all()


def test_phrase_weights_average_over_each_phrase(table, tokens):
    assert table.phrase_weights.shape == (3, 2, 77)
    for i, row in enumerate(tokens):
        for j, positions in enumerate(row.phrase_positions):
            weights = table.phrase_weights[i, j]
            assert weights.nonzero().flatten().tolist() == list(positions)
            torch.testing.assert_close(weights[list(positions)], torch.full((len(positions),), 1 / len(positions)))
    assert table.phrase_weights[1, 1].sum() == 0
    assert table.phrase_mask.tolist() == [[True, True], [True, False], [True, True]]


def test_free_phrases_are_marked_where_they_are_in_the_image(tmp_path, text_encoder, table):
    tokenizer = CLIPTokenizer.from_pretrained(write_vocabulary(tmp_path / "short"), model_max_length=12)
    long = "a woman, a green hat, xx zzzzzz"
    pairs = [
        make_prompt_pair("a woman, a green hat", "red hair", free_phrases=["a green hat"]),
        make_prompt_pair("a man", "red hair"),
        make_prompt_pair(long, "red hair", f"red hair, {long}", ["a woman", "a green hat", "zzzzzz"], ["zzzzzz"]),
    ]
    tokens = [tokenize_prompt_pair(pair, tokenizer) for pair in pairs]
    assert tokens[2].phrase_positions[-1] == ()
    free = make_table(pairs, tokens, tokenizer, text_encoder).free_mask
    assert free[:, :2].tolist() == [[False, True], [False, False], [False, False]] and not free[:, 2:].any()
    assert not table.free_mask.any() and table.free_mask.shape == table.phrase_mask.shape


def test_a_phrase_that_was_cut_off_counts_like_padding(tmp_path, text_encoder, caplog):
    """It is nowhere in the image, so it may not dilute the mean over the phrases that are."""
    tokenizer = CLIPTokenizer.from_pretrained(write_vocabulary(tmp_path / "short"), model_max_length=12)
    base_prompt = "a woman, a green hat, xx zzzzzz"
    pair = make_prompt_pair(base_prompt, "red hair", f"red hair, {base_prompt}", ["a woman", "zzzzzz"])
    with caplog.at_level(logging.WARNING):
        tokens = tokenize_prompt_pair(pair, tokenizer)
    assert "zzzzzz" in caplog.text and tokens.phrase_positions[1] == ()
    table = make_table([pair], [tokens], tokenizer, text_encoder)
    assert table.phrase_mask.tolist() == [[True, False]] and table.distances[0, 1].abs() < 1e-6
    assert table.phrase_weights[0, 0].sum() == pytest.approx(1) and table.phrase_weights[0, 1].sum() == 0


def test_a_prompt_that_fills_every_token(tmp_path, text_encoder):
    tokenizer = CLIPTokenizer.from_pretrained(write_vocabulary(tmp_path / "short"), model_max_length=12)
    pair = make_prompt_pair("a woman, xxxxxxxxxxxx", "red hair", "red hair, a woman, xxxxxxxxxxxx")
    tokens = tokenize_prompt_pair(pair, tokenizer)
    table = make_table([pair], [tokens], tokenizer, text_encoder)
    assert table.positions.base_padding[0].nonzero().flatten().tolist() == [11]
    assert matched(table, 1) == [(position, position) for position in range(1, 11)]


# ----------------------------------------------------------------------------------------------------------- pictures


def noise_pixels(side: int, count: int = 2) -> torch.Tensor:
    """Pictures of whole grey levels, so that they are the same as uint8."""
    levels = torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(0))
    return levels.float() / 127.5 - 1


def by_processor(clip, pixels: torch.Tensor) -> torch.Tensor:
    arrays = ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    inputs = PROCESSOR([Image.fromarray(np.ascontiguousarray(array)) for array in arrays], return_tensors="pt")
    with torch.no_grad():
        return clip.get_image_features(**inputs).pooler_output


def test_pictures_of_clips_size_are_embedded_as_the_processor_does(clip):
    pixels = noise_pixels(SIDE)
    embeds = embed_pixels(clip, PROCESSOR, pixels)
    assert embeds.shape == (2, 12)
    torch.testing.assert_close(embeds, by_processor(clip, pixels), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", [8, 32, 40])
def test_other_sizes_are_resized_as_the_processor_does(clip, side):
    pixels = F.interpolate(noise_pixels(4), (side, side), mode="bilinear")
    embeds = embed_pixels(clip, PROCESSOR, pixels)
    # Pillow rounds to whole levels and cuts off the bicubic overshoot.
    assert F.cosine_similarity(embeds, by_processor(clip, pixels)).min() > 0.999
    assert F.cosine_similarity(embeds[:1], embeds[1:]).item() < 0.99


def test_half_precision_pictures_are_embedded_in_float32(clip):
    pixels = noise_pixels(SIDE)
    embeds = embed_pixels(clip, PROCESSOR, pixels.bfloat16())
    assert embeds.dtype == torch.float32
    torch.testing.assert_close(embeds, embed_pixels(clip, PROCESSOR, pixels), rtol=0.1, atol=0.1)


def test_gradient_reaches_every_pixel(clip):
    pixels = noise_pixels(2 * SIDE).requires_grad_()
    embed_pixels(clip, PROCESSOR, pixels).square().sum().backward()
    assert (pixels.grad.abs().sum(1) > 0).float().mean() > 0.99
