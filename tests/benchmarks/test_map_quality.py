"""Tests of the maps' benchmark: its measures on maps made by hand, its regions, and a run on the toy model."""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from adapters import Adapters
from attention_processors import capture_cross_attention
from benchmarks.map_quality import (
    by_seed,
    encode,
    load_adapters,
    load_tools,
    main,
    noise_samples,
    outline,
    parse_args,
    predict,
    prompt_table,
)
from benchmarks.map_report import BANDS, DEFAULT_MODE, MODES, ORIGINAL, TRAINING_BAND, Row, game_rows, summarise
from benchmarks.parts.drawing import TILE
from benchmarks.parts.regions import (
    TARGET_WORDS,
    area_under_curve,
    ceiling,
    grow,
    kind_of,
    kind_regions,
    map_separation,
    mass_inside,
    phrase_games,
    pointing,
    pointing_game,
    prompt_pairs,
    ratio_error,
    region_shares,
    render_scenes,
    separation,
)
from families.stable_diffusion import StableDiffusion
from toy_portraits.judge import MARGIN
from toy_portraits.world import LABELS, SIZE, TARGETS
from training.dual_path import dual_path


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
    maps = np.zeros((2, 4, 4))
    maps[0, 1, 0] = maps[1, 1, 3] = 1.0
    assert pointing(maps, left_half(2).astype(float)).tolist() == [1, 0]


def test_a_flat_map_points_as_well_as_chance():
    region = np.zeros((1, 8, 8), dtype=bool)
    region[0, :3, :5] = True
    for value in (0.0, 0.7):
        game = pointing_game(np.full((1, 4, 4), value), region)
        assert game["hit"][0] == pytest.approx(game["chance"][0]) == pytest.approx(15 / 64)
        assert game["mass"][0] == pytest.approx(15 / 64) and game["auc"][0] == 0.5
        assert game["hit_tolerant"][0] == pytest.approx(game["chance_tolerant"][0])


def test_equal_maxima_share_the_hit():
    maps = np.zeros((1, 4, 4))
    maps[0, 0, 0] = maps[0, 3, 3] = maps[0, 0, 3] = 1.0
    assert pointing(maps, left_half().astype(float))[0] == pytest.approx(1 / 3)


def test_the_tolerance_forgives_a_near_miss_alone():
    region = np.zeros((1, SIZE, SIZE), dtype=bool)
    region[0, :, :8] = True
    near, far = np.zeros((1, 16, 16)), np.zeros((1, 16, 16))
    near[0, 5, 2] = far[0, 5, 3] = 1.0
    assert [pointing_game(maps, region)["hit"][0] for maps in (near, far)] == [0, 0]
    assert [pointing_game(maps, region)["hit_tolerant"][0] for maps in (near, far)] == [1, 0]
    assert grow(region, 4)[0].mean() == 12 / SIZE == pointing_game(near, region)["chance_tolerant"][0]


def test_mass_inside():
    maps = np.array([[[3.0, 1.0], [0.0, 0.0]]])
    assert mass_inside(maps, np.array([[[1.0, 0.0], [1.0, 0.0]]]))[0] == 0.75


def test_an_empty_region_is_left_out():
    region = left_half(2, 8)
    region[1] = False
    game = pointing_game(np.random.default_rng(0).random((2, 4, 4)), region)
    assert all(not np.isnan(values[0]) and np.isnan(values[1]) for values in game.values())


def test_the_ratios_error_is_that_of_independent_portraits():
    rng = np.random.default_rng(0)
    inside, outside = 0.8 + 0.1 * rng.standard_normal(400), 0.2 + 0.02 * rng.standard_normal(400)
    expected = 4 * math.sqrt((0.1 / 0.8) ** 2 + (0.02 / 0.2) ** 2) / math.sqrt(400)
    assert ratio_error(inside, outside) == pytest.approx(expected, rel=0.15)
    assert math.isnan(ratio_error(inside[:1], outside[:1]))


def test_rows_average_seeds_and_leave_out_portraits_without_the_region():
    nan = float("nan")
    measures = {"inside": np.array([[0.2, 0.6, nan], [0.4, 0.8, nan]]), "outside": np.array([[0.1, 0.1, nan]] * 2)}
    row = Row("generated", "red_hat", None, "composed", "averaged", "all steps", measures)
    found = summarise(row)
    assert found["inside"]["mean"] == pytest.approx(0.5) and found["inside"]["portraits"] == 2
    assert found["inside"]["standard_error"] == pytest.approx(0.2)
    assert found["ratio"]["mean"] == pytest.approx(5)


def test_phrases_of_several_targets_are_pooled():
    def row(target_name, hits):
        measures = {"hit": np.array([hits])}
        return Row("without target", target_name, (0, 200), ORIGINAL, "person", "8x8 (used)", measures)

    (pooled,) = game_rows([row("red_hat", [1.0, 0.0]), row("blonde_hair", [1.0])], "composed", band=(0, 200))
    assert pooled.by_portrait("hit").tolist() == [1, 0, 1] and pooled.target_name == "all"


# ------------------------------------------------------------------------------------------------------------- regions


@pytest.mark.parametrize("target_name", TARGETS)
def test_the_regions_are_the_renderers(target_name):
    before, after = (render_scenes(target_name, 12, 5, with_target) for with_target in (False, True))
    target = TARGETS[target_name]
    assert np.array_equal(before.drawn, after.drawn) and np.array_equal(before.allowed, after.allowed)
    assert np.array_equal(after.labels == LABELS.index(target.labels[0]), after.drawn)
    # what the rendering changes lies in the region, but for its antialiased border
    changed = (before.images != after.images).any(-1)
    assert changed[grow(after.drawn, MARGIN)].sum() / changed.sum() > 0.99
    assert not (after.drawn & ~before.allowed).any()
    # a map that is the region is perfect up to the latent pixels on its border
    assert 0.97 < ceiling(before, (16, 16)) < 1
    assert ceiling(before, (SIZE, SIZE)) == 1


@pytest.mark.parametrize("target_name", TARGETS)
def test_the_prompts_describe_the_portraits(target_name):
    scenes = render_scenes(target_name, 12, 5, with_target=False)
    again = render_scenes(target_name, 12, 5, with_target=False)
    assert np.array_equal(scenes.images, again.images) and scenes.prompts == again.prompts
    for i, pair in enumerate(prompt_pairs(scenes.prompts)):
        text = pair.base_prompt
        assert ("glasses" in text) == bool((scenes.labels[i] == LABELS.index("glasses")).any())
        assert pair.target_text == TARGETS[target_name].prompt
    others = [render_scenes(name, 12, 5, with_target=False) for name in TARGETS if name != target_name]
    assert not any(np.array_equal(other.images, scenes.images) for other in others)


def test_phrases_are_held_against_their_own_regions():
    scenes = render_scenes("red_hat", 12, 5, with_target=False)
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
    few, many = (noise_samples(count, (200, 400), 4, 7, (4, 16, 16)) for count in (2, 5))
    for sample, ((noise, steps), (others, other_steps)) in enumerate(zip(few, many)):
        assert torch.equal(noise, others[:2]) and torch.equal(steps, other_steps[:2])
        assert (steps >= 200 + 50 * sample).all() and (steps < 250 + 50 * sample).all()
    assert not torch.equal(few[0][0], few[1][0])
    assert all((steps < 1000).all() for _, steps in noise_samples(64, BANDS[-1], 4, 7, (1,)))


def lora_arguments(write_lora, folder, *flags):
    """Arguments for random LoRAs on the embedded model, where the preservation benchmark would have put them."""
    for name, seed in (("composed-seed101", 0), ("stage1-seed101", 1)):
        write_lora(folder / "loras" / "runs" / "striped_shirt" / name, seed)
    given = ["--lora_dir", str(folder / "loras"), "--output_dir", str(folder / "out"), "--targets", "striped_shirt"]
    return parse_args([*given, "--runs", "composed", "stage1", *flags])


def test_both_predictions_are_those_of_the_dual_path(write_lora, tmp_path):
    tools, args = load_tools("cpu"), lora_arguments(write_lora, tmp_path)
    load_adapters(tools, args, "striped_shirt")
    scenes = render_scenes("striped_shirt", 2, 5, with_target=False)
    table, _ = prompt_table(tools, prompt_pairs(scenes.prompts))
    latents, unet = encode(tools, scenes.images), tools.pipeline.unet
    base, full = (table.prompt_embeds[rows[:2]] for rows in (table.reference_rows, table.response_rows))
    timesteps = torch.tensor([700, 300])
    reference, features = predict(unet, ORIGINAL, latents, timesteps, base)
    response, _ = predict(unet, "stage1-seed101", latents, timesteps, full)
    with (
        torch.no_grad(),
        capture_cross_attention(unet) as store,
        dual_path(
            Adapters(unet), partial(StableDiffusion.predict, unet), latents, timesteps, base, full,
            adapter_name="stage1-seed101", store=store,
        ) as paths,
    ):
        assert torch.equal(paths.reference_pred, reference) and torch.equal(paths.response_pred, response)
        for name, probs in paths.reference.attention_probs.items():
            assert torch.equal(features.attention_probs[name], probs)
    assert not torch.allclose(predict(unet, "composed-seed101", latents, timesteps, full)[0], response)
    # the next target's LoRAs take their place
    load_adapters(tools, args, "striped_shirt")
    assert list(unet.peft_config) == ["composed-seed101", "stage1-seed101"]


def test_a_missing_lora_is_named_before_anything_is_loaded(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_args(["--lora_dir", str(tmp_path), "--runs", "plain", "--targets", "red_hat", "--seeds", "7"])
    assert f"{tmp_path}/runs/red_hat/plain-seed7/pytorch_lora_weights.safetensors does not" in capsys.readouterr().err


def test_adapters_of_one_run_are_its_seeds():
    names = ["original", "composed-seed101", "composed-seed102", "plain-seed101"]
    assert by_seed(names) == {"original": names[:1], "composed": names[1:3], "plain": names[3:]}


def test_several_maps_of_a_portrait_are_judged_one_by_one():
    scenes = render_scenes("red_hat", 2, 5, with_target=False)
    right = region_shares(scenes.drawn, (16, 16))
    both = map_separation(np.stack([right, 1 - right]), scenes)
    alone = map_separation(right[None], scenes)["auc"]
    assert both["auc"] == pytest.approx(np.full(2, 0.5)) and alone.min() > 0.95


def test_an_outline_leaves_the_inside_alone():
    region = np.zeros((SIZE, SIZE), dtype=bool)
    region[10:20, 10:20] = True
    pixels = np.asarray(outline(Image.new("RGB", (2 * SIZE, 2 * SIZE), "red"), None, region))
    white = (pixels == 255).all(-1)
    assert white[20, 20:40].all() and not white[22:38, 22:38].any() and white.sum() == 4 * 19


@pytest.mark.slow
def test_a_run_writes_tables_numbers_and_a_picture(write_lora, tmp_path):
    few = ("--num_portraits", "3", "--num_prompts", "3", "--noise_samples", "2", "--num_inference_steps", "2")
    main(lora_arguments(write_lora, tmp_path, *few, "--batch_size", "2", "--workers", "1"))
    document = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    rows = document["rows"]
    assert len(document["loras"]) == 2 and document["settings"]["portrait_seed"] == 70101
    for portraits, bands in (("without target", (*BANDS, TRAINING_BAND)), ("with target", (TRAINING_BAND,))):
        for run_name in ("composed", "stage1", ORIGINAL):
            own = [row for row in rows if row["portraits"] == portraits and row["run"] == run_name]
            default = [row for row in own if (row["map"], row["detail"]) == (DEFAULT_MODE, "one noise")]
            assert [tuple(row["timesteps"]) for row in default] == list(bands)
            assert any(row["detail"] == "2 noises, phrases at 16x16" for row in own)
            assert {row["map"] for row in own} >= {*MODES, TARGET_WORDS}
    generated = [row for row in rows if row["portraits"] == "generated"]
    assert {row["run"] for row in generated} == {"composed", "stage1"}
    assert {"averaged", "person", "background"} <= {row["map"] for row in generated}
    for row in rows:
        assert 0 <= row["measures"]["auc"]["mean"] <= 1 and row["measures"]["auc"]["portraits"] <= 3
    text = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert (
        "## In short" in text
        and "## The pointing game" in text
        and '"a striped shirt", 8x8 (used)' in text
        and "nan" not in text
    )
    with Image.open(tmp_path / "out" / "map_quality.png") as picture:
        assert picture.width > 9 * TILE and picture.height > 2 * TILE
