"""Tests of the toy Stable Diffusion 3: how it is built, and the one in the repository."""

import filecmp
import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from families.find import check_model
from families.stable_diffusion_3 import StableDiffusion3
from pipeline_spf_portrait_3 import SPFPortrait3Pipeline
from toy_portraits import build_3
from toy_portraits.judge import PortraitJudge
from toy_portraits.learning import MAX_TOKENS, world_phrases
from toy_portraits.recipe import BASE_MODEL, BASES
from toy_portraits.world import SIZE


BASE, SECOND = BASES["sd3"].folder, BASES["sdxl"].folder


def test_every_word_of_the_world_is_one_token_and_any_other_is_spelled():
    tokenizer = build_3.build_t5_tokenizer()
    for phrase in world_phrases():
        ids = tokenizer(phrase).input_ids
        assert len(ids) == len(phrase.split()) + 1 and ids[-1] == tokenizer.eos_token_id
    tokens = tokenizer.tokenize("a teal hat")
    assert tokens == ["▁a", "▁", "t", "e", "a", "l", "▁hat"]
    assert tokenizer.unk_token_id not in tokenizer("A woman, 7 hats!").input_ids


def test_a_tiny_build_writes_every_part(tmp_path, capsys):
    for base in (BASE_MODEL, SECOND):
        shutil.copytree(base, tmp_path / base.name)
    flags = "--t5_steps 2 --transformer_steps 2 --transformer_batch_size 4 --num_renders 620".split()
    build_3.main(build_3.parse_args([*flags, "--output_dir", str(tmp_path)]))
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "base_model_3")
    assert {model.dtype for model in pipeline.components.values() if hasattr(model, "dtype")} == {torch.float32}
    assert type(pipeline.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    assert pipeline.scheduler.config.shift == build_3.SHIFT and pipeline.vae.config.shift_factor != 0
    assert pipeline.tokenizer_2.pad_token == "!" and pipeline.tokenizer_3.model_max_length == MAX_TOKENS
    texts = [path.read_text(encoding="utf-8") for path in (tmp_path / "base_model_3").rglob("*.json")]
    assert not any(str(tmp_path) in text for text in texts), "the folder it was built in is no one's business"
    assert "built t5, transformer" in capsys.readouterr().out


def test_the_embedded_one_is_a_stable_diffusion_3_and_costs_little():
    family, facts = check_model(str(BASE))
    assert family is StableDiffusion3 and facts.side == SIZE and facts.text_configs[2] is not None
    # git keeps files of equal content once.
    name = "vae/diffusion_pytorch_model.safetensors"
    assert filecmp.cmp(BASE_MODEL / name, BASE / name, shallow=False)
    assert sum(path.stat().st_size for path in BASE.rglob("*") if path.is_file()) <= 6 * 2**20


@pytest.mark.slow
@pytest.mark.parametrize("parts", [{}, {"text_encoder_3": None, "tokenizer_3": None}], ids=["with T5", "without T5"])
def test_the_embedded_one_follows_its_prompts(parts):
    """Without T5 it is told by both CLIPs alone, and has zeros in as many places as diffusers puts there."""
    pipeline, judge = SPFPortrait3Pipeline.from_pretrained(BASE, **parts), PortraitJudge.from_pretrained()
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["a woman, a green jacket, a purple background", "a man, a white jacket, an orange background"] * 8
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    images = pipeline(prompts, num_inference_steps=10, guidance_scale=4.0, generator=generators).images
    factors = judge.read(np.stack([np.asarray(image) for image in images])).factors
    for name, expected in (("sex", [0, 1]), ("clothes", [0, 3]), ("background", [5, 3])):
        assert (factors[name] == expected * 8).mean() >= 0.95, name
