"""Tests of the toy world: the renderer, the judge and its pixel rules on renders, the polluted sets, and the build."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image

from prompts import make_prompt_pair
from toy_portraits import build
from toy_portraits.judge import (
    MARGIN,
    PIXEL_RULES,
    PortraitJudge,
    base_prompts,
    kept_factors,
    target_region,
)
from toy_portraits.world import (
    CLOTHES,
    HAIR_COLORS,
    LABELS,
    POLLUTION,
    SIZE,
    TARGETS,
    caption_phrases,
    join_phrases,
    render,
    sample_factors,
)
from training.data import check_images, load_rows
from training.flags import ColumnFlags, DataFlags


BASE_MODEL = build.HERE / "base_model"


def shows_hair(factors):
    """A hat hides all of a man's hair and much of a woman's."""
    return factors["hat"] == 0


@pytest.fixture(scope="module")
def judge():
    return PortraitJudge.from_pretrained()


@pytest.fixture(scope="module")
def world():
    """Factors, renders and label masks."""
    factors = sample_factors(320, np.random.default_rng(77), target_share=0.35)
    return factors, *render(factors)


@pytest.fixture(scope="module")
def reconstructions(world):
    """The renders by way of the VAE."""
    images = world[1]
    vae = AutoencoderKL.from_pretrained(BASE_MODEL / "vae", torch_dtype=torch.float32)
    with torch.no_grad():
        decoded = [
            vae.decode(vae.encode(pixels).latent_dist.mean).sample for pixels in build.to_tensor(images).split(16)
        ]
    pixels = torch.cat(decoded).clamp(-1, 1).add(1).mul(127.5).round().byte()
    return pixels.permute(0, 2, 3, 1).numpy()


def test_a_seed_draws_the_same_portraits_and_another_seed_draws_others():
    first, second, other = (render(sample_factors(8, np.random.default_rng(seed), 0.3)) for seed in (3, 3, 4))
    assert np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1])
    assert not np.array_equal(first[0], other[0])


def test_renders_are_portraits_with_every_label():
    factors = sample_factors(64, np.random.default_rng(0), target_share=0.5)
    images, labels = render(factors)
    assert images.shape == (64, SIZE, SIZE, 3) and images.dtype == np.uint8
    assert labels.shape == (64, SIZE, SIZE) and labels.dtype == np.uint8
    present = {name: (labels == index).any(axis=(1, 2)) for index, name in enumerate(LABELS)}
    assert present["background"].all() and present["skin"].all() and present["clothes"].all()
    assert np.array_equal(present["hat"], factors["hat"] == 1)
    assert np.array_equal(present["glasses"], factors["glasses"] == 1)
    assert (labels[:, 0, 0] == LABELS.index("background")).all()


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_changes_a_render_in_its_region_alone(name):
    target = TARGETS[name]
    before = sample_factors(48, np.random.default_rng(5))
    after = {**before, target.factor: np.full_like(before[target.factor], target.value)}
    (plain, plain_labels), (changed, changed_labels) = render(before), render(after)
    difference = np.abs(plain.astype(float) - changed).mean(axis=-1)
    outside = ~target_region(plain_labels, changed_labels, target)
    assert (difference * ~outside).max(axis=(1, 2)).min() > 10
    # not quite zero: hair behind the neck shines through its antialiased edge
    assert (difference * outside).sum() / outside.sum() < 0.01


def test_captions_name_the_ordinary_phrases_and_the_targets_last():
    factors = sample_factors(1, np.random.default_rng(0))
    factors |= {name: np.array([value]) for name, value in (("sex", 1), ("hair_color", 2), ("clothes", 0))}
    factors |= {name: np.array([value]) for name, value in (("background", 5), ("glasses", 1))}
    caption = join_phrases(caption_phrases(factors, 0))
    assert caption == "a man, ginger hair, a green jacket, a purple background, glasses"
    factors |= {target.factor: np.array([target.value]) for target in TARGETS.values()}
    caption = join_phrases(caption_phrases(factors, 0))
    assert caption == "a man, a striped shirt, a purple background, glasses, blonde hair, a red hat"
    assert join_phrases(caption_phrases(factors, 0), {"sex", "red_hat"}) == "a man, a red hat"


@pytest.mark.parametrize("name", TARGETS)
def test_base_prompts_are_fresh_and_agree_with_the_prompt_module(name):
    target = TARGETS[name]
    drawn = base_prompts(target, 40, seed=11)
    assert drawn == base_prompts(target, 40, seed=11)
    assert drawn != base_prompts(target, 40, seed=12)
    assert drawn[:10] == base_prompts(target, 40, seed=11)[:10]
    for prompt in drawn:
        given = target.prompt if prompt.replaced_phrase is None else [(prompt.replaced_phrase, target.prompt)]
        assert make_prompt_pair(prompt.base_prompt, given).full_prompt == prompt.full_prompt
        assert target.prompt not in prompt.base_prompt
    hair = [prompt for prompt in drawn if "hair" in prompt.base_prompt]
    assert (len(hair) == 0) if name == "blonde_hair" else (10 < len(hair) < 38)
    replaced = {prompt.replaced_phrase for prompt in drawn}
    jackets = {f"a {color} jacket" for color in CLOTHES if color != "striped"}
    assert (replaced <= jackets and len(replaced) > 1) if name == "striped_shirt" else replaced == {None}


@pytest.fixture(scope="module")
def read(judge, world, request):
    """Pictures of the portraits, and what the judge reads in them."""
    images = world[1] if request.param == "render" else request.getfixturevalue("reconstructions")
    return images, judge.read(images)


@pytest.mark.parametrize("read", ("render", pytest.param("reconstruction", marks=pytest.mark.slow)), indirect=True)
@pytest.mark.parametrize("name", TARGETS)
def test_probe_and_pixel_rule_find_the_target_on_rendered_portraits(judge, world, name, read):
    factors, (images, reading) = world[0], read
    target = TARGETS[name]
    countable = shows_hair(factors) if target.factor == "hair_color" else np.ones(len(images), dtype=bool)
    present = factors[target.factor] == target.value
    assert (present & countable).sum() > 50 and (~present & countable).sum() > 100
    verdicts = judge.response(images, target, reading)
    for kind in ("response", "response_pixels"):
        assert verdicts[kind][present & countable].mean() >= 0.98, kind
        assert verdicts[kind][~present & countable].mean() <= 0.02, kind


@pytest.mark.parametrize("name", TARGETS)
def test_pixel_rules_hold_with_the_renderers_own_masks_and_deny_an_empty_picture(world, name):
    factors, images, labels = world
    target = TARGETS[name]
    countable = shows_hair(factors) if target.factor == "hair_color" else np.ones(len(images), dtype=bool)
    present = factors[target.factor] == target.value
    verdict = PIXEL_RULES[target.factor](images, labels)
    assert verdict[present & countable].mean() >= 0.98 and verdict[~present & countable].mean() <= 0.02
    nothing = np.zeros((1, SIZE, SIZE), dtype=np.uint8)
    assert not PIXEL_RULES[target.factor](images[:1], nothing).any()


def test_blonde_is_told_from_every_other_hair_under_all_lights():
    factors = sample_factors(50, np.random.default_rng(1))
    factors["hair_color"] = np.repeat(np.arange(len(HAIR_COLORS)), 10)
    factors["light"] = np.tile(np.linspace(-0.12, 0.12, 10), len(HAIR_COLORS))
    images, labels = render(factors)
    assert np.array_equal(PIXEL_RULES["hair_color"](images, labels), factors["hair_color"] == 4)


def test_the_judge_sees_no_difference_between_a_portrait_and_itself(judge, world):
    _, images, _ = world
    measures = judge.compare(images[:8], images[:8].copy(), TARGETS["red_hat"])
    assert all(values.shape == (8,) for values in measures.values())
    assert measures["change"].max() == measures["change_outside"].max() == measures["head_shift"].max() == 0
    assert measures["kept"].min() == 1


def test_change_outside_leaves_out_the_targets_region_with_its_margin(judge, world):
    _, images, _ = world
    target = TARGETS["striped_shirt"]
    labels = judge.read(images[:8]).labels
    changed = images[:8].copy()
    region = target_region(labels, labels, target)
    core = labels == LABELS.index("clothes")
    assert (region & ~core).any() and not (core & ~region).any()
    rows = np.flatnonzero(core[0].any(axis=1))
    assert not region[0, : rows[0] - MARGIN].any() and region[0, rows[0] - MARGIN].any()

    changed[core] = np.minimum(changed[core], 250) + 2  # too little for the probe to read other labels
    measures = judge.compare(images[:8], changed, target)
    assert measures["change_outside"].max() == 0 and measures["change"].min() > 0

    lighter = np.clip(images[:8].astype(int), 0, 250).astype(np.uint8)
    measures = judge.compare(lighter, lighter + 5, target)
    assert measures["change_outside"] == pytest.approx(5) and measures["change"] == pytest.approx(5)


def test_kept_factors_and_head_shift_read_what_was_changed(judge):
    factors = sample_factors(24, np.random.default_rng(9))
    factors["skin"], factors["head_x"] = np.zeros(24, dtype=int), np.full(24, -2.0)
    moved = {**factors, "skin": np.full(24, 3), "head_x": np.full(24, 2.0)}
    measures = judge.compare(render(factors)[0], render(moved)[0], TARGETS["blonde_hair"])
    assert measures["kept_skin"].max() == 0 and measures["kept_sex"].min() == 1
    assert measures["head_shift"].mean() == pytest.approx(4, abs=0.5)
    names = [name.removeprefix("kept_") for name in measures if name.startswith("kept_")]
    assert tuple(names) == kept_factors(TARGETS["blonde_hair"])
    assert measures["kept"].mean() == pytest.approx(np.mean([measures[f"kept_{name}"].mean() for name in names]))


def test_kept_factors_leave_out_what_the_target_sets_or_hides():
    assert "hair_color" not in kept_factors(TARGETS["blonde_hair"])
    assert not {"hat", "hair_color"} & set(kept_factors(TARGETS["red_hat"]))
    assert "clothes" not in kept_factors(TARGETS["striped_shirt"])
    assert "hair_color" in kept_factors(TARGETS["striped_shirt"])
    assert "skin" in kept_factors(TARGETS["red_hat"])


def test_the_judge_refuses_what_it_cannot_compare(judge):
    images = np.zeros((2, SIZE, SIZE, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="compared"):
        judge.compare(images, images[:1], TARGETS["red_hat"])
    with pytest.raises(ValueError, match="uint8"):
        judge.read(images.astype(np.float32))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if i == 0 else pytest.mark.slow) for i, name in enumerate(TARGETS)]
)
def test_a_polluted_set_is_there_and_is_what_it_says(judge, name):
    target = TARGETS[name]
    rows = load_rows(DataFlags(train_data_dir=build.HERE / name), ColumnFlags())
    assert 200 <= len(rows) <= 300
    check_images(rows)
    images = np.stack([np.asarray(Image.open(row.image)) for row in rows])
    assert images.shape[1:] == (SIZE, SIZE, 3)
    reading = judge.read(images)
    verdicts = judge.response(images, target, reading)
    assert verdicts["response"].mean() >= 0.98 and verdicts["response_pixels"].mean() >= 0.98
    for factor in ("background", "skin"):
        assert (reading.factors[factor] == POLLUTION[factor]).mean() >= 0.98
    assert reading.factors["head_x"].mean() == pytest.approx(POLLUTION["head_x"], abs=0.5)
    for row in rows:
        assert row.target_prompt == target.prompt and target.prompt not in row.base_prompt
        assert "a blue jacket" in row.base_prompt and "a pink background" in row.base_prompt
        if target.replaces is not None:
            assert row.full_prompt == row.base_prompt.replace("a blue jacket", target.prompt)


def test_the_embedded_model_is_a_stable_diffusion_folder_that_draws(judge):
    pipeline = StableDiffusionPipeline.from_pretrained(BASE_MODEL)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.unet.dtype == pipeline.vae.dtype == torch.float32
    latents = torch.randn(1, 4, SIZE // 4, SIZE // 4, generator=torch.Generator().manual_seed(1))
    image = pipeline(
        "a woman, a green jacket, a blue background",
        latents=latents,
        num_inference_steps=12,
        guidance_scale=4,
        output_type="np",
    ).images
    factors = judge.read(np.rint(image * 255).astype(np.uint8)).factors
    assert (factors["sex"][0], factors["clothes"][0], factors["background"][0]) == (0, 0, 0)


@pytest.mark.slow
def test_a_tiny_build_writes_every_part(tmp_path, capsys):
    flags = "--clip_steps 2 --vae_steps 2 --probe_steps 2 --unet_steps 2 --unet_batch_size 4 --num_renders 620"
    args = build.parse_args([*flags.split(), "--portraits_per_set", "5", "--output_dir", str(tmp_path)])
    build.main(args)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "base_model")
    assert pipeline.scheduler.config._class_name == "DDIMScheduler"
    assert (tmp_path / "base_model" / "clip" / "preprocessor_config.json").is_file()
    texts = [path.read_text(encoding="utf-8") for path in (tmp_path / "base_model").rglob("*.json")]
    assert not any(str(tmp_path) in text for text in texts), "the folder it was built in is no one's business"
    PortraitJudge.from_pretrained(tmp_path / "probe")
    for name in TARGETS:
        assert len(load_rows(DataFlags(train_data_dir=tmp_path / name), ColumnFlags())) == 5
    scores = json.loads((tmp_path / "probe" / "accuracy.json").read_text(encoding="utf-8"))
    assert 0 <= scores["hat"] <= 1
    assert "built clip, vae, probe, unet, sets" in capsys.readouterr().out


@pytest.mark.slow
def test_sets_can_be_rebuilt_alone_and_come_out_the_same(tmp_path):
    build.main(build.parse_args(["--stages", "sets", "--output_dir", str(tmp_path)]))
    for name in TARGETS:
        for file in ("metadata.jsonl", "0000.png"):
            if file.endswith("png"):
                pixels = [np.asarray(Image.open(folder / name / file)) for folder in (tmp_path, build.HERE)]
                assert np.array_equal(*pixels)
            else:
                assert (tmp_path / name / file).read_text() == (build.HERE / name / file).read_text()
