"""Tests of the toy Stable Diffusion XL: how it is built, and the one in the repository."""

import filecmp
import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from families.find import check_model
from families.stable_diffusion_xl import StableDiffusionXL
from pipeline_spf_portrait_xl import SPFPortraitXLPipeline
from toy_portraits import build_xl
from toy_portraits.judge import PortraitJudge
from toy_portraits.recipe import BASE_MODEL, BASES
from toy_portraits.world import SIZE, render, sample_factors
from training.pixels import micro_conditioning


BASE = BASES["sdxl"].folder


# -------------------------------------------------------------------------------------------------------------- photos


def test_a_corner_moves_the_scene():
    factors = sample_factors(3, np.random.default_rng(0))
    (whole, labels), (moved, moved_labels) = render(factors), render(factors, np.array([[0, 5], [4, 0], [0, -3]]))
    for i, (down, across) in enumerate([(0, 5), (4, 0), (0, -3)]):
        own = [slice(max(0, side), SIZE + min(0, side)) for side in (down, across)]
        other = [slice(max(0, -side), SIZE + min(0, -side)) for side in (down, across)]
        assert np.array_equal(whole[i][tuple(own)], moved[i][tuple(other)])
        assert np.array_equal(labels[i][tuple(own)], moved_labels[i][tuple(other)])


@pytest.mark.parametrize("shape", build_xl.SHAPES)
def test_size_and_crop_of_a_photo_are_those_that_the_trainer_says(shape):
    """What is said of a photo is what the trainer would say of it, cut where it was cut."""
    time_ids, corner, scale = build_xl.micro_conditioning(400, shape, np.random.default_rng(0))
    for ids, own, factor in zip(time_ids, corner, scale):
        height, width, top, left = ids[:4]
        resized = np.rint(np.array([height, width]) / factor)
        excess = resized - shape
        # Sizes are whole pixels, so a photo of half its size says what it was to two pixels.
        assert excess.min() <= 2 and (excess >= -2).all()
        centering = tuple(place / over if over > 0 else 0.5 for place, over in zip((left, top), excess[::-1]))
        said = micro_conditioning((width, height), shape, centering=centering)
        assert np.abs(np.array(said) - ids).max() <= 2
        # The scene is in the middle of the photo.
        assert np.abs(own - ((top, left) - (resized - SIZE) / 2)).max() <= 1
    assert (time_ids[:, 4:] == shape).all() and len(np.unique(time_ids[:, 0])) > 10
    assert (scale < 1).any() and (scale > 1).any() and (time_ids[:, 2:4] > 0).any()


def test_a_photo_of_half_its_size_is_blurred():
    picture = torch.rand(3, 64, 48)
    blurred = build_xl.blur(picture, 0.5)
    assert blurred.shape == picture.shape and blurred.diff(dim=-1).abs().mean() < picture.diff(dim=-1).abs().mean() / 2


# --------------------------------------------------------------------------------------------------------------- build


def test_a_tiny_build_writes_every_part(tmp_path, capsys):
    shutil.copytree(BASE_MODEL, tmp_path / "base_model")
    flags = "--clip_steps 2 --unet_steps 2 --unet_batch_size 4 --num_renders 620".split()
    build_xl.main(build_xl.parse_args([*flags, "--output_dir", str(tmp_path)]))
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path / "base_model_xl", add_watermarker=False)
    assert pipeline.scheduler.config._class_name == "EulerDiscreteScheduler"
    assert pipeline.config.force_zeros_for_empty_prompt and pipeline.tokenizer_2.pad_token == "!"
    texts = [path.read_text(encoding="utf-8") for path in (tmp_path / "base_model_xl").rglob("*.json")]
    assert not any(str(tmp_path) in text for text in texts), "the folder it was built in is no one's business"
    assert "built clip, unet" in capsys.readouterr().out


def test_the_embedded_one_is_an_sdxl_and_costs_little():
    family, facts = check_model(str(BASE))
    assert family is StableDiffusionXL and facts.side == SIZE
    shared = ["text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json"]
    # git keeps files of equal content once.
    assert all(filecmp.cmp(BASE_MODEL / name, BASE / name, shallow=False) for name in shared)
    own = sum(path.stat().st_size for path in BASE.rglob("*") if path.is_file())
    assert own - sum((BASE / name).stat().st_size for name in shared) < 4 * 2**20


@pytest.mark.slow
def test_the_embedded_one_follows_its_prompts_and_knows_of_sizes():
    pipeline, judge = SPFPortraitXLPipeline.from_pretrained(BASE), PortraitJudge.from_pretrained()
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["a woman, a green jacket, a purple background", "a man, a white jacket, an orange background"] * 8

    def draw(**sizes):
        generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
        images = pipeline(prompts, num_inference_steps=10, guidance_scale=4.0, generator=generators, **sizes).images
        return np.stack([np.asarray(image) for image in images])

    plain = draw()
    factors = judge.read(plain).factors
    for name, expected in (("sex", [0, 1]), ("clothes", [0, 3]), ("background", [5, 3])):
        assert (factors[name] == expected * 8).mean() >= 0.95, name
    # A photo that was half as large is drawn softer.
    sharp, soft = (np.abs(np.diff(own.astype(float), axis=2)).mean() for own in (plain, draw(original_size=(32, 32))))
    assert soft < 0.98 * sharp
