"""Portraits drawn and judged with the toy model: a LoRA on and off, with guidance, and kept by all they depend on."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from toy_bases import write_random_lora

from benchmarks.parts import drawing, judging
from benchmarks.parts.drawing import DrawSettings, draw, draw_guided, load_originals
from benchmarks.parts.judging import Job, judge_images, judge_job
from loras import LORA_WEIGHTS
from pipeline_spf_portrait_xl import SPFPortraitXLPipeline
from toy_portraits.judge import base_prompts
from toy_portraits.world import SIZE, TARGETS


SETTINGS = DrawSettings(num_prompts=2, prompt_seed=3, num_inference_steps=2)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Of what several tests draw."""
    return tmp_path_factory.mktemp("cache")


def test_a_lora_is_judged_and_leaves_the_pipeline_as_it_was(tmp_path, cache):
    pipeline, judge = judging.tools("cpu", "sd")
    originals = load_originals(pipeline, "striped_shirt", SETTINGS, cache)
    assert originals.base_images.shape == originals.full_images.shape == (2, SIZE, SIZE, 3)
    original = judge_images(judge, originals, originals.full_images, originals.base_images)
    assert original["base_change"].max() == 0 and original["change"].max() > 0

    on = Job("striped_shirt", "plain", 0, 1.0, write_random_lora(tmp_path / "lora"))
    off = judge_job(replace(on, strength=0.0), SETTINGS, cache)
    on = judge_job(on, SETTINGS, cache)
    assert off["base_change"].max() < 0.05 and on["base_change"].min() > 0.5
    assert np.abs(off["change_outside"] - original["change_outside"]).max() < 0.05
    assert on["full_images"].shape == on["base_images"].shape == (2, SIZE, SIZE, 3)
    again = judge.compare(originals.base_images, on["full_images"], TARGETS["striped_shirt"])["change"]
    assert np.array_equal(again, on["change"]) and not getattr(pipeline.unet, "peft_config", None)

    # drawn anew, in another folder, the original model's portraits are the same as before the LoRA came and went
    again = load_originals(pipeline, "striped_shirt", SETTINGS, tmp_path / "other")
    assert np.array_equal(again.full_images, originals.full_images)


def test_portraits_are_cached_by_everything_they_depend_on(tmp_path, monkeypatch):
    """What is drawn is not looked at here."""
    drawn = []
    blank = np.zeros((2, SIZE, SIZE, 3), dtype=np.uint8)
    monkeypatch.setattr(drawing, "draw", lambda *given: drawn.append(1) or blank)
    job = Job("red_hat", "plain", 0, 1.0, write_random_lora(tmp_path / "lora"))

    def draws(job, settings=SETTINGS):
        drawn.clear()
        found = judge_job(job, settings, tmp_path)
        assert {*found} >= {"full_images", "base_images", "leak", "change_outside"}
        return len(drawn)

    assert draws(job) == 4 and draws(job) == 0  # the original model's portraits are two of them
    assert draws(replace(job, strength=0.5)) == 2
    assert draws(job, replace(SETTINGS, guidance_scale=2.0)) == 4
    write_random_lora(tmp_path / "lora", seed=1)
    assert draws(job) == 2


def test_a_guided_lora_is_judged_with_its_map_and_kept(tmp_path, cache, monkeypatch):
    pipeline, _ = judging.tools("cpu", "sd")
    job = Job("red_hat", "plain", 0, 1.0, write_random_lora(tmp_path / "lora"), "guided", quiet=True)
    guided = judge_job(job, SETTINGS, cache)
    unguided = judge_job(replace(job, sfcm_guidance=0.0), SETTINGS, cache)
    assert guided["maps"].shape == (2, SIZE // 4, SIZE // 4) and 0 <= guided["maps"].min() < guided["maps"].max() <= 1
    assert guided["change"].mean() < unguided["change"].mean() and not {"leak", "base_change"} & set(guided)
    assert not getattr(pipeline.unet, "peft_config", None)
    monkeypatch.setattr(drawing, "draw_guided", lambda *given, **options: pytest.fail("drawn again"))
    again = judge_job(job, SETTINGS, cache)
    assert all(np.array_equal(guided[name], again[name]) for name in guided)
    with pytest.raises(FileNotFoundError, match=LORA_WEIGHTS):
        judge_job(replace(job, lora_path=tmp_path), SETTINGS, cache)


def test_a_late_lora_is_off_in_the_first_steps(tmp_path, cache, monkeypatch):
    """The first of six steps, at timestep 831, is above the ratio, and the second, at 665, below."""
    pipeline, _ = judging.tools("cpu", "sd")
    settings = replace(SETTINGS, num_inference_steps=6)
    job = Job("red_hat", "plain", 0, 1.0, write_random_lora(tmp_path / "lora"), "late")
    late, as_it_is = judge_job(job, settings, cache), judge_job(replace(job, way="", strength=1.4), settings, cache)
    assert not {"maps", "base_images", "leak", "base_change"} & set(late)
    assert 0.5 < late["change"].mean() < as_it_is["change"].mean()
    originals = load_originals(pipeline, "red_hat", settings, cache)
    with drawing.loras_on(pipeline, [job.lora_path]):
        for i, prompt in enumerate(originals.prompts):
            goal = prompt.target_prompt
            goal = goal if prompt.replaced_phrase is None else (prompt.replaced_phrase, goal)
            noise = drawing.noise_of_prompts(settings)[i : i + 1]
            expected = pipeline(
                prompt.base_prompt, target_prompt=goal, sfcm_guidance_start=5.1, target_scale=1.4, latents=noise,
                num_inference_steps=6, guidance_scale=settings.guidance_scale, output_type="np",
            ).images  # fmt: skip
            assert np.abs(drawing.to_bytes(expected)[0].astype(int) - late["full_images"][i]).max() <= 1
    monkeypatch.setattr(drawing, "draw_guided", lambda *given, **options: pytest.fail("drawn again"))
    again = judge_job(job, settings, cache)
    assert all(np.array_equal(late[name], again[name]) for name in late)


def test_each_way_to_draw_is_kept_by_what_it_depends_on(tmp_path, monkeypatch):
    """The keys of guided portraits are those that judged caches already have."""
    keys, lora = [], write_random_lora(tmp_path / "lora")
    as_it_is = Job("red_hat", "plain", 0, 1.0, lora)
    monkeypatch.setattr(drawing, "load_originals", lambda *given: None)
    monkeypatch.setattr(drawing, "cached_arrays", lambda folder, key, make: keys.append(key) or {})
    quiet = replace(as_it_is, way="guided", quiet=True)
    for job in (as_it_is, quiet, replace(quiet, quiet=False, sfcm_guidance=0.5), replace(as_it_is, way="late")):
        judge_job(job, SETTINGS, tmp_path)
    drawn = asdict(SETTINGS)
    assert [key[:-1] for key in keys] == [
        ["portraits", "red_hat", 1.0, drawn],
        ["guided portraits", "red_hat", {"adapter_in_unconditional": False, "target_scale": 0.75}, 1.0, drawn],
        ["guided portraits", "red_hat", {}, 0.5, drawn],
        ["late portraits", "red_hat", 1.0, {"sfcm_guidance_start": 5.1, "target_scale": 1.4}, drawn],
    ]
    base, weights, probe, code = keys[1][-1]
    assert keys[0][-1] == [base, weights, probe] and keys[2][-1] == keys[3][-1] == [base, weights, probe, code]


def test_without_guidance_the_full_prompts_are_drawn_each_from_its_noise():
    pipeline, _ = judging.tools("cpu", "sd")
    settings = replace(SETTINGS, num_prompts=5, num_inference_steps=1, batch_size=2)
    prompts = base_prompts(TARGETS["striped_shirt"], settings.num_prompts, settings.prompt_seed)
    assert len({prompt.replaced_phrase for prompt in prompts}) > 1  # several calls, out of order
    images = draw_guided(pipeline, prompts, settings, sfcm_guidance=0.0)["full_images"]
    expected = draw(pipeline, [prompt.full_prompt for prompt in prompts], settings)
    assert np.abs(images.astype(int) - expected).max() <= 1
    guided = draw_guided(pipeline, prompts, settings, sfcm_guidance=1.0)["full_images"]
    base = draw(pipeline, [prompt.base_prompt for prompt in prompts], settings)
    assert np.abs(guided.astype(int) - base).mean() < 0.75 * np.abs(images.astype(int) - base).mean()


@pytest.mark.parametrize("way", ["", "guided", "late"])
def test_the_other_base_is_drawn_by_its_own_class_and_sampler(toy_xl, way, tmp_path):
    settings = replace(SETTINGS, base="sdxl", num_inference_steps=6)
    pipeline, _ = judging.tools("cpu", "sdxl")
    assert isinstance(pipeline, SPFPortraitXLPipeline) and type(pipeline.scheduler) is EulerDiscreteScheduler
    originals = load_originals(pipeline, "red_hat", settings, tmp_path)
    assert originals.base_images.shape == (2, SIZE, SIZE, 3)
    stock = StableDiffusionXLPipeline.from_pretrained(toy_xl)
    stock.vae.enable_slicing()  # a row of a batch is rounded otherwise than a picture alone
    options = {"latents": drawing.noise_of_prompts(settings), "num_inference_steps": 6, "guidance_scale": 4.0}
    prompts = [prompt.base_prompt for prompt in originals.prompts]
    assert np.array_equal(drawing.to_bytes(stock(prompts, output_type="np", **options).images), originals.base_images)

    lora = write_random_lora(tmp_path / "lora", base="sdxl")
    job = Job("red_hat", "plain", 0, 1.0, lora, way, quiet=way == "guided")
    found = judge_job(job, settings, tmp_path)
    assert found["change_outside"].max() > 0 and ("maps" in found) == (way == "guided")
    if way == "late":
        whole = judge_job(replace(job, way="", strength=1.4), settings, tmp_path)
        assert found["change"].mean() < whole["change"].mean()
    assert not getattr(pipeline.unet, "peft_config", None)


def test_a_prompts_noise_does_not_depend_on_how_many_are_drawn():
    few, many = (drawing.noise_of_prompts(replace(SETTINGS, num_prompts=count)) for count in (2, 5))
    assert torch.equal(few, many[:2]) and not torch.equal(many[0], many[1])
