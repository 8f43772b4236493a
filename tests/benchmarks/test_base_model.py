"""The benchmark of a base model without a LoRA: what a caption names, and whether the portrait shows it."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import base_model
from benchmarks.parts.drawing import Originals
from toy_portraits.judge import base_prompts
from toy_portraits.recipe import BASES
from toy_portraits.world import TARGETS, caption_phrases, join_phrases, render, sample_factors


def test_a_caption_names_the_classes_of_its_factors():
    factors = sample_factors(30, np.random.default_rng(3))
    for i in range(30):
        named = base_model.captioned(join_phrases(caption_phrases(factors, i)))
        wanted = {name: int(factors[name][i]) for name in base_model.PHRASES}
        assert named == {name: value for name, value in wanted.items() if name != "glasses" or value}
    for target in TARGETS.values():
        prompts = base_prompts(target, 20, 1)
        assert all({"sex", "clothes", "background"} <= base_model.captioned(own.base_prompt).keys() for own in prompts)


def test_what_the_renderer_draws_is_as_its_caption_says_and_nothing_else(judge):
    factors = sample_factors(48, np.random.default_rng(4))
    captions = [join_phrases(caption_phrases(factors, i)) for i in range(48)]
    prompts = [replace(base_prompts(TARGETS["red_hat"], 1, 0)[0], base_prompt=caption) for caption in captions]
    drawn, hats = (render(factors | {"hat": np.full(48, worn)})[0] for worn in (0, 1))
    found = base_model.measure(judge, Originals("red_hat", prompts, drawn, hats))
    assert list(found) == list(base_model.HEADINGS)
    shares = {name: float(np.nanmean(values)) for name, values in found.items()}
    assert shares.pop("unasked") == 0 and min(shares.values()) > 0.95
    both = np.isnan(found["glasses"]) ^ np.isnan(found["no_glasses"])
    assert both.all() and np.isnan(found["glasses"]).any()

    changed = factors | {name: (factors[name] + 1) % 2 for name in ("sex", "glasses")}
    found = base_model.measure(judge, Originals("red_hat", prompts, render(changed)[0], drawn))
    shares = {name: float(np.nanmean(values)) for name, values in found.items()}
    assert max(shares[name] for name in ("sex", "glasses", "no_glasses", "asked")) < 0.05 and shares["clothes"] > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_every_base_is_measured(base, toy_bases, tmp_path, capsys):
    flags = ["--base", base, "--num_prompts", "4", "--targets", "red_hat", "blonde_hair", "--num_inference_steps", "2"]
    base_model.main([*flags, "--output_dir", str(tmp_path)])
    text = (tmp_path / "base_model" / "table.md").read_text(encoding="utf-8")
    assert text + "\n" == capsys.readouterr().out and text.startswith(f"{BASES[base].title}, 4 base prompts a target")
    assert "nan" not in text and '| "blonde hair" | ' in text
    assert re.findall(r"^\| (.+?) \| [\d.]", text, re.MULTILINE) == ['"a red hat"', '"blonde hair"', "all prompts"]
    document = json.loads((tmp_path / "base_model" / "results.json").read_text(encoding="utf-8"))
    assert document["targets"]["all prompts"]["sex"]["prompts"] == 8
    assert document["settings"]["base"] == base
