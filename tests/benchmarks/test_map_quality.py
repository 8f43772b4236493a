"""Tests of the maps' benchmark: its measures on maps made by hand, its regions, and a run on the toy model."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from toy_bases import write_random_lora

from adapters import Adapters
from benchmarks.map_quality import (
    DEFAULT_MODE,
    FIFTHS,
    MODES,
    ORIGINAL,
    TARGET_WORDS,
    Inputs,
    Row,
    game_section,
    layer_groups,
    main,
    noise_samples,
    parse_args,
    predict,
)
from benchmarks.parts import judging
from benchmarks.parts.drawing import Picture, adapter_name, loras_on, prompt_pairs, save_pictures
from benchmarks.parts.regions import (
    area_under_curve,
    ceiling,
    kind_of,
    kind_regions,
    map_separation,
    phrase_games,
    pointing_game,
    region_shares,
    render_scenes,
    separation,
)
from families.noise_process import DDPM
from families.pipelines import denoiser_of
from toy_portraits.pipelines import family_of
from toy_portraits.recipe import BASES
from toy_portraits.world import LABELS, SIZE, TARGETS, render, sample_factors


def left_half(count: int = 1, size: int = 4) -> np.ndarray:
    """Regions (B, size, size): the left half."""
    region = np.zeros((count, size, size), dtype=bool)
    region[:, :, : size // 2] = True
    return region


# ------------------------------------------------------------------------------------------------------------ measures


def test_shares_are_exact_and_keep_the_area():
    region = np.zeros((1, 8, 8), dtype=bool)
    region[0, 0, 0] = region[0, 4:, 4:] = True
    shares = region_shares(region, (2, 2))
    assert np.array_equal(shares, [[[1 / 16, 0], [0, 1]]])
    assert shares.mean() == region.mean()


def test_auc_is_one_for_the_region_itself_one_half_for_nothing_and_zero_for_its_opposite():
    shares = left_half().astype(float)[0]
    assert area_under_curve(shares, shares) == 1
    assert area_under_curve(np.full((4, 4), 0.3), shares) == 0.5
    assert area_under_curve(1 - shares, shares) == 0
    # stretching a map does not change which pixels lie above which
    assert area_under_curve(np.exp(9 * shares) - 5, shares) == 1


def test_auc_equals_the_share_of_pairs_counted_one_by_one():
    rng = np.random.default_rng(0)
    values, inside = rng.integers(0, 4, (5, 5)).astype(float), rng.random((5, 5)) < 0.4
    pairs = [np.sign(a - b) / 2 + 0.5 for a in values[inside] for b in values[~inside]]
    assert area_under_curve(values, inside.astype(float)) == pytest.approx(np.mean(pairs))


def test_mixed_pixels_count_by_their_share():
    """A map pixel that is half inside stands for picture pixels of both kinds, between which it cannot tell."""
    picture = np.random.default_rng(1).random((1, 8, 8)) < 0.5
    values = np.random.default_rng(2).random((1, 4, 4))
    coarse = area_under_curve(values[0], region_shares(picture, (4, 4))[0])
    fine = area_under_curve(np.kron(values[0], np.ones((2, 2))), picture[0].astype(float))
    assert coarse == pytest.approx(fine)


def test_no_inside_or_no_outside_has_no_auc():
    for region in (np.zeros((1, 4, 4)), np.ones((1, 4, 4))):
        found = separation(np.eye(4)[None], region)
        assert np.isnan(found["auc"][0]) and np.isnan(found["inside"][0] + found["outside"][0])


def test_inside_and_outside_are_means_over_picture_pixels():
    shares = np.array([[[1.0, 0.5], [0.0, 0.0]]])
    found = separation(np.array([[[0.9, 0.6], [0.3, 0.0]]]), shares)
    assert found["inside"][0] == pytest.approx((0.9 + 0.3) / 1.5)
    assert found["outside"][0] == pytest.approx((0.3 + 0.3) / 2.5)


def test_pointing_hits_inside_and_misses_outside():
    maps = np.zeros((3, 4, 4))
    maps[0, 1, 0] = maps[1, 1, 3] = 1.0
    maps[2, 0, 0] = maps[2, 3, 3] = maps[2, 0, 3] = 1.0  # equal maxima share the hit
    game = pointing_game(maps, left_half(3, 8))
    assert game["hit"] == pytest.approx([1, 0, 1 / 3]) and game["chance"].tolist() == [0.5] * 3


def test_a_flat_map_points_as_well_as_chance():
    region = np.zeros((1, 8, 8), dtype=bool)
    region[0, :3, :5] = True
    for value in (0.0, 0.7):
        game = pointing_game(np.full((1, 4, 4), value), region)
        assert game["hit"][0] == pytest.approx(game["chance"][0]) == pytest.approx(15 / 64)
        assert game["auc"][0] == 0.5


def test_an_empty_region_is_left_out():
    region = left_half(2, 8)
    region[1] = False
    game = pointing_game(np.random.default_rng(0).random((2, 4, 4)), region)
    assert all(not np.isnan(values[0]) and np.isnan(values[1]) for values in game.values())


def test_phrases_of_several_targets_are_pooled():
    def row(target_name, hits):
        measures = dict.fromkeys(("hit", "chance", "auc"), np.array([hits]))
        return Row(target_name, (0, 200), ORIGINAL, "person", "8x8 (used)", measures)

    text = game_section([row("red_hat", [1.0, 0.0, float("nan")]), row("blonde_hair", [0.5])])
    assert "| person, 8x8 (used) | 3 | 0.50 ± 0.29 | 0.50 | 0.50 ± 0.29 |" in text


# ------------------------------------------------------------------------------------------------------------- regions


@pytest.mark.parametrize("target_name", TARGETS)
def test_the_regions_are_the_renderers(target_name):
    scenes, target = render_scenes(target_name, 12, 5), TARGETS[target_name]
    factors = sample_factors(12, np.random.default_rng(5 + list(TARGETS).index(target_name)))
    images, labels = render(factors)
    assert np.array_equal(images, scenes.images) and np.array_equal(labels, scenes.labels)
    _, changed = render({**factors, target.factor: np.full(12, target.value)})
    assert np.array_equal(changed == LABELS.index(target.labels[0]), scenes.drawn)
    # a map that is the region is perfect up to the latent pixels on its border
    assert 0.97 < ceiling(scenes, (16, 16)) < 1
    assert ceiling(scenes, (SIZE, SIZE)) == 1


@pytest.mark.parametrize("target_name", TARGETS)
def test_the_prompts_describe_the_portraits(target_name):
    scenes = render_scenes(target_name, 12, 5)
    again = render_scenes(target_name, 12, 5)
    assert np.array_equal(scenes.images, again.images) and scenes.prompts == again.prompts
    for i, pair in enumerate(prompt_pairs(scenes.prompts)):
        text = pair.base_prompt
        assert ("glasses" in text) == bool((scenes.labels[i] == LABELS.index("glasses")).any())
        assert pair.target_text == TARGETS[target_name].prompt
    others = [render_scenes(name, 12, 5) for name in TARGETS if name != target_name]
    assert not any(np.array_equal(other.images, scenes.images) for other in others)


def test_phrases_are_held_against_their_own_regions():
    scenes = render_scenes("red_hat", 12, 5)
    phrases = [pair.base_phrases for pair in prompt_pairs(scenes.prompts)]
    kinds = ["hair" if text.endswith("hair") else "other" for text in sum(phrases, ())]
    assert {"hair", "other"} == set(kinds)
    longest = max(map(len, phrases))
    maps = np.zeros((12, longest, 16, 16))
    for b, row in enumerate(phrases):
        for place, text in enumerate(row):
            maps[b, place] = region_shares(kind_regions(kind_of(text), scenes)[b : b + 1], (16, 16))[0]
    games = phrase_games(maps, phrases, scenes)
    assert set(games) == {"person", "hair", "clothes", "background", "glasses"}
    with_hair = [any(text.endswith("hair") for text in row) for row in phrases]
    assert (~np.isnan(games["hair"]["hit"])).tolist() == with_hair and 0 < sum(with_hair) < 12
    assert all(np.nanmin(game["auc"]) > 0.9 for game in games.values())
    assert np.nanmin(games["background"]["hit"]) == 1 and np.nanmean(games["person"]["chance"]) < 0.6


def test_a_phrase_of_another_world_is_refused():
    with pytest.raises(KeyError, match="curtain"):
        kind_of("a curtain")


# ---------------------------------------------------------------------------------------------------------------- maps


def test_noise_belongs_to_the_portrait_and_timesteps_cover_the_band():
    process = DDPM("DDPMScheduler", {})
    few, many = (noise_samples(count, (200, 400), (4, 16, 16), process) for count in (2, 5))
    for sample, ((noise, steps), (others, other_steps)) in enumerate(zip(few, many)):
        assert torch.equal(noise, others[:2]) and torch.equal(steps, other_steps[:2])
        assert (steps >= 200 + 50 * sample).all() and (steps < 250 + 50 * sample).all()
    assert not torch.equal(few[0][0], few[1][0])
    assert all((steps < 1000).all() for _, steps in noise_samples(64, (800, 1000), (1,), process))


@pytest.mark.parametrize("base", BASES)
def test_both_predictions_are_those_of_the_training(base, toy_bases, tmp_path):
    (pipeline, _), scenes, family = judging.tools("cpu", base), render_scenes("striped_shirt", 2, 5), family_of(base)
    folders = [write_random_lora(tmp_path / name, seed, base) for seed, name in enumerate(("first", "second"))]
    denoiser = denoiser_of(pipeline)
    first, second = map(adapter_name, folders)
    with loras_on(pipeline, folders):
        inputs, timesteps = Inputs.make(base, pipeline, scenes), torch.tensor([700, 300])
        table, latents = inputs.table, inputs.latents
        sizes = torch.tensor([[SIZE, SIZE, 0.0, 0.0, SIZE, SIZE]] * 2)
        base, full = (of(torch.arange(2), sizes) for of in (table.reference, table.response))
        reference, features = predict(family, denoiser, ORIGINAL, latents, timesteps, base)
        response, _ = predict(family, denoiser, second, latents, timesteps, full)
        assert not torch.allclose(predict(family, denoiser, first, latents, timesteps, full)[0], response)
        adapters, asked = Adapters(denoiser), partial(family.predict, denoiser, latents, timesteps)
        capture = family.capture(denoiser)
        with torch.no_grad(), capture.store(capture.layers) as store, store.record():
            with adapters.only(None):
                assert torch.equal(asked(base), reference)
            for name, probs in store.pop().attention_probs.items():
                assert torch.equal(features.attention_probs[name], probs)
            with adapters.only(second):
                assert torch.equal(asked(full), response)
    groups = layer_groups(capture, features.resolutions, latents.shape[-2:])
    used, *others = groups
    assert used.endswith("(used)") and set(groups[used]) == set(capture.phrase_map_layers((16, 16)))
    assert {name for own in groups.values() for name in own} == set(capture.layers)
    assert len(others) == (1 if family.denoiser == "unet" else len(capture.layers))
    assert not getattr(denoiser, "peft_config", None)


def test_several_maps_of_a_portrait_are_judged_one_by_one():
    scenes = render_scenes("red_hat", 2, 5)
    right = region_shares(scenes.drawn, (16, 16))
    both = map_separation(np.stack([right, 1 - right]), scenes)
    alone = map_separation(right[None], scenes)["auc"]
    assert both["auc"] == pytest.approx(np.full(2, 0.5)) and alone.min() > 0.95


def test_a_picture_has_its_captions_and_is_written(tmp_path):
    portrait, region = np.full((SIZE, SIZE, 3), 90, dtype=np.uint8), np.zeros((SIZE, SIZE), dtype=bool)
    region[10:20, 10:20] = True
    row = [Picture("plain", portrait), Picture("mapped", portrait, np.zeros((16, 16)), region)]
    save_pictures(tmp_path / "pictures.png", [row, row[:1]])
    assert (tmp_path / "pictures.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_a_run_writes_tables_numbers_and_a_picture(base, toy_bases, trained, tmp_path):
    few = ["--num_prompts", "3", "--num_inference_steps", "2", "--batch_size", "2", "--workers", "1"]
    few += ["--targets", "striped_shirt", "--runs", "composed", "stage1"]
    main(parse_args([*few, "--base", base, "--output_dir", str(tmp_path)]))
    folder = tmp_path / "map_quality"
    document = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    rows, used = document["rows"], "blocks 1-1" if base == "sd3" else "8x8"
    assert len(document["loras"]) == 2 and document["settings"]["prompt_seed"] == 70201
    for run_name in ("composed", "stage1", ORIGINAL):
        own = [row for row in rows if row["run"] == run_name]
        default = [row for row in own if (row["map"], row["detail"]) == (DEFAULT_MODE, "one noise")]
        assert [tuple(row["timesteps"]) for row in default] == [*FIFTHS, family_of(base).noise_process.map_timesteps]
        assert {row["map"] for row in own} >= {*MODES, TARGET_WORDS}
    generated = [row for row in rows if row["timesteps"] == [0, 0]]
    assert [(row["run"], row["map"]) for row in generated] == [("composed", "averaged"), ("stage1", "averaged")]
    for row in rows:
        assert 0 <= row["measures"]["auc"]["mean"] <= 1 and row["measures"]["auc"]["prompts"] <= 3
    text = (folder / "table.md").read_text(encoding="utf-8")
    assert "## In short" in text and "## The pointing game" in text and f"| person, {used} (used) |" in text
    assert "nan" not in text and (folder / "map_quality.png").is_file()
