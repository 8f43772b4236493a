"""Tests of the family of Stable Diffusion 3 and 3.5: found by its files, its text in two parts, its pipelines."""

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from pipeline_world import make_components
from sd3_world import make_sd3_components, write_sd3
from transformers import CLIPTokenizer

from families.find import check_model, find_family
from families.pipelines import denoiser_of, load_drawing_pipeline
from families.stable_diffusion_3 import T5_TOKENS, StableDiffusion3, t5_length
from pipeline_spf_portrait_3 import SPFPortrait3Pipeline
from prompts import make_prompt_pair
from toy_portraits.recipe import BASE_MODEL


CLIP_TOKENS = 32
INDEX = {"_class_name": "StableDiffusion3Pipeline"}
INDEX |= {name: ["transformers", ""] for name in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")}
TRANSFORMER = {"_class_name": "SD3Transformer2DModel", "in_channels": 16, "out_channels": 16}


@pytest.fixture(scope="module")
def components():
    return make_sd3_components()


@pytest.fixture
def tokenizers(components):
    return [components[name] for name in StableDiffusion3.tokenizers]


def test_it_is_found_with_t5_and_without():
    for parts in ({}, {"text_encoder_3": [None, None]}, {"text_encoder_3": ["transformers", "T5EncoderModel"]}):
        assert find_family(INDEX | parts, TRANSFORMER) is StableDiffusion3


@pytest.mark.parametrize(
    ("index", "config", "line"),
    [
        ({"tokenizer_2": [None, None]}, {}, "a Stable Diffusion 3 without its tokenizer_2"),
        ({"text_encoder": [None, None]}, {}, "a Stable Diffusion 3 without its text_encoder"),
        ({}, {"in_channels": 33}, "it takes 33 channels and gives 16: no model for text to image"),
        ({}, {"_class_name": "FluxTransformer2DModel"}, "the FluxTransformer2DModel of a StableDiffusion3Pipeline"),
    ],
)
def test_what_is_none_is_refused(index, config, line):
    with pytest.raises(ValueError, match=line):
        find_family(INDEX | index, TRANSFORMER | config)


def test_what_is_known_without_weights(tmp_path):
    family, facts = check_model(str(write_sd3(tmp_path / "with")))
    assert family is StableDiffusion3 and facts.side == 16 and facts.side_multiple == 4
    assert facts.noise.num_train_timesteps == 1000 and facts.text_configs[2].d_model == 32
    _, facts = check_model(str(write_sd3(tmp_path / "without", with_t5=False)))
    assert facts.text_configs[2] is None and facts.tokenizers[2] is None


# ---------------------------------------------------------------------------------------------------------------- text


def test_a_phrase_counts_in_both_parts_of_the_text(tokenizers):
    """The text's words by the ids of each part; neither part's end or padding is a word."""
    pair = make_prompt_pair("a woman, a green hat", "red hair")
    tokens = StableDiffusion3.locate(pair, tokenizers)
    length = CLIP_TOKENS + T5_TOKENS
    assert len(tokens.base_input_ids) == len(tokens.full_input_ids) == length

    def words(ids, positions):
        parts = [[ids[i] for i in positions if (i < CLIP_TOKENS) == first] for first in (True, False)]
        return [tokenizer.decode(part).strip() for tokenizer, part in zip((tokenizers[0], tokenizers[2]), parts)]

    assert words(tokens.base_input_ids, tokens.phrase_positions[1]) == ["a green hat"] * 2
    assert words(tokens.full_input_ids, tokens.target_positions) == ["red hair"] * 2
    for base, full in zip(tokens.base_positions, tokens.full_positions, strict=True):
        assert tokens.base_input_ids[base] == tokens.full_input_ids[full]
    assert tokens.base_text == tokens.base_positions  # nothing of the base is replaced
    places = {*tokens.base_text, *tokens.base_padding, 0}  # and CLIP's BOS
    assert places == set(range(length)) and not set(tokens.base_text) & set(tokens.base_padding)


def test_without_t5_its_places_hold_nothing(tokenizers):
    pair = make_prompt_pair("a woman, a green hat", "red hair")
    both, alone = (StableDiffusion3.locate(pair, own) for own in (tokenizers, [*tokenizers[:2], None]))
    assert len(alone.base_input_ids) == CLIP_TOKENS + T5_TOKENS
    assert alone.target_positions == tuple(i for i in both.target_positions if i < CLIP_TOKENS)
    assert set(range(CLIP_TOKENS, CLIP_TOKENS + T5_TOKENS)) <= set(alone.base_padding)


def test_a_target_that_clip_cuts_off_has_to_be_whole_in_t5(tokenizers, caplog):
    pair = make_prompt_pair("a woman, " + ", ".join(["a green hat"] * 9), "red hair")
    tokens = StableDiffusion3.locate(pair, tokenizers)
    assert min(tokens.target_positions) > CLIP_TOKENS and "too long for 32 tokens" in caplog.text
    with pytest.raises(ValueError, match="'red hair' does not fit into the 32 tokens"):
        StableDiffusion3.locate(pair, [*tokenizers[:2], None])
    pair = make_prompt_pair("a woman, " + ", ".join(["a green hat"] * 90), "red hair")
    with pytest.raises(ValueError, match="'red hair' does not fit into the 256 tokens"):
        StableDiffusion3.locate(pair, tokenizers)


def test_tokens_of_all_tokenizers_stand_one_after_another(tokenizers):
    rows = StableDiffusion3.tokenize(tokenizers, ["a woman", ""])
    assert [len(row) for row in rows] == [2 * CLIP_TOKENS + T5_TOKENS] * 2
    assert [len(row) for row in StableDiffusion3.tokenize([*tokenizers[:2], None], [""])] == [2 * CLIP_TOKENS]
    assert t5_length(tokenizers[2]) == t5_length(None) == T5_TOKENS
    short = type("Tokenizer", (), {"model_max_length": 20})
    assert t5_length(short) == 20


# ----------------------------------------------------------------------------------------------------------- pipelines


@pytest.mark.parametrize("with_t5", [True, False])
def test_a_folder_is_drawn_by_its_class(tmp_path, with_t5):
    pipeline = load_drawing_pipeline(str(write_sd3(tmp_path / "model", with_t5)), torch.float32)
    assert type(pipeline) is SPFPortrait3Pipeline and pipeline.vae.use_slicing
    assert (pipeline.text_encoder_3 is not None) == with_t5
    count = 3 if with_t5 else 2
    assert StableDiffusion3.text_encoders_of(pipeline) == StableDiffusion3.text_encoders[:count]
    assert denoiser_of(pipeline) is pipeline.transformer


def test_the_denoiser_of_any_pipeline(components):
    assert denoiser_of(StableDiffusion3Pipeline(**components)) is components["transformer"]
    others = make_components(CLIPTokenizer.from_pretrained(BASE_MODEL / "tokenizer"))
    assert denoiser_of(StableDiffusionPipeline(**others)) is others["unet"]
