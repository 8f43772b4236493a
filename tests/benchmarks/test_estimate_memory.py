"""Tests of the memory estimate: its counting on programs whose peak is known, and on a tiny UNet."""

import re

import pytest
import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from test_house import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import estimate_memory
from benchmarks.estimate_memory import (
    MODELS,
    PHASES,
    PRESETS,
    PRESETS_3,
    PRESETS_XL,
    diffusion_backward,
    parameter_bytes,
    step_peak,
    training,
)
from benchmarks.parts.counting import UPCAST, LiveBytes, like_cuda


KIB = 1024


def tensor(kib: int, **options) -> torch.Tensor:
    return torch.empty(kib * KIB // 4, **options)


def tiny_unet(**others) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        **others,
        block_out_channels=(32,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )


@pytest.mark.parametrize("fake", [True, False])
def test_the_peak_of_a_known_program_is_counted_exactly(fake):
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.no_grad(), LiveBytes() as counter:
        first = tensor(8)
        view = first[: KIB // 4].view(2, -1)
        second = first * 2
        assert counter.live == 16 * KIB  # a view has no bytes of its own
        del first
        assert counter.live == 16 * KIB  # and keeps its storage alive
        del view
        assert counter.live == 8 * KIB
        third = second.add_(1)
        assert counter.live == 8 * KIB
        del second, third
    assert (counter.live, counter.peak) == (0, 16 * KIB)


def test_what_autograd_alone_keeps_is_counted_until_the_backward():
    with FakeTensorMode():
        weight = tensor(4, requires_grad=True)
        with LiveBytes() as counter:
            counter.count(weight)
            loss = weight.exp().sum()  # exp keeps its result, which has no name here
            assert counter.live == 8 * KIB + 4
            torch.autograd.backward(loss)
            assert counter.live == 8 * KIB + 4  # the result is gone, the gradient is there
            del loss
            weight.grad = None
        assert counter.live == 4 * KIB


def test_a_modules_parameters_are_counted_before_anything_runs():
    module = torch.nn.Linear(16, 16)
    with LiveBytes(module) as counter:
        assert counter.live == (16 * 16 + 16) * 4


def test_attention_keeps_no_scores():
    with FakeTensorMode(), LiveBytes() as counter:
        query = torch.empty(1, 1, 64, 8, requires_grad=True)
        output = F.scaled_dot_product_attention(query, query, query)
        assert output.requires_grad and counter.peak == (2 * 64 * 8 + 64) * 4  # 64 x 64 scores would be more


def test_norms_and_softmax_are_float32_inside_and_under_autocast_alone():
    x, weight = torch.randn(2, 8, dtype=torch.bfloat16), torch.ones(8, dtype=torch.bfloat16)

    def dtypes() -> set[torch.dtype]:
        return {F.layer_norm(x, (8,), weight).dtype, F.group_norm(x, 2, weight).dtype, x.softmax(-1).dtype}

    with like_cuda():
        assert dtypes() == {torch.bfloat16}
        with torch.autocast("cpu", torch.bfloat16):
            assert dtypes() == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        assert dtypes() == {torch.bfloat16}


def test_torchs_functions_are_put_back_even_after_an_error():
    before = [getattr(owner, name) for owner, name in UPCAST]
    inherited = "softmax" not in vars(torch.Tensor)
    with pytest.raises(ZeroDivisionError), like_cuda():
        assert all(getattr(owner, name) is not own for (owner, name), own in zip(UPCAST, before, strict=True))
        raise ZeroDivisionError
    assert [getattr(owner, name) for owner, name in UPCAST] == before
    assert ("softmax" not in vars(torch.Tensor)) == inherited


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["", "--gradient_checkpointing"])
def test_a_step_of_a_tiny_unet_which_stays_as_it_was(checkpointing):
    peaks = {}
    for objective in ("composed", "both"):
        flags = f"--train_batch_size 2 --stage2_objective {objective} --enhancement_loss none {checkpointing}"
        with training(flags, MODELS["sd"]._replace(make_denoiser=tiny_unet, side=16)) as run:
            unet, loras = run.models.denoiser, run.models.adapters.names
            processors = {name: type(processor) for name, processor in unet.attn_processors.items()}
            peaks[objective], plain = step_peak(run), step_peak(run, [diffusion_backward])
        assert "forward" not in vars(unet) and loras == ["default", "stage1"]
        assert {name: type(processor) for name, processor in unet.attn_processors.items()} == processors
        assert all(parameter.grad is None for parameter in unet.parameters())
    assert parameter_bytes(unet) < plain <= peaks["composed"] <= 1.1 * plain
    assert peaks["both"] > 1.1 * plain


def tiny_3_transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        num_layers=3, num_attention_heads=2, attention_head_dim=8, caption_projection_dim=16, in_channels=16,
        out_channels=16, dual_attention_layers=(0,), qk_norm="rms_norm", pooled_projection_dim=2048,
    )  # fmt: skip


def tiny_xl_unet() -> UNet2DConditionModel:
    added = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 1280 + 6 * 8}
    return tiny_unet(addition_embed_type="text_time", **added)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_phase_counts_the_models_that_lie_on_the_device_in_it(name):
    make = {"sd": tiny_unet, "sdxl": tiny_xl_unet, "sd3": tiny_3_transformer}[name]
    with training("--train_batch_size 1", MODELS[name]._replace(make_denoiser=make, side=8)) as run:
        peaks = {phase: peak(run) for phase, peak in PHASES.items()}
        texts = [parameter_bytes(encoder) for encoder in run.text_encoders]
        vae, denoiser = map(parameter_bytes, (run.models.pipeline.vae, run.models.denoiser))
    assert len(texts) == {"sd": 1, "sdxl": 2, "sd3": 3}[name]
    prompts = max(texts) if name == "sd3" else sum(texts)
    assert prompts < peaks["prompts"] < 1.5 * prompts
    # One text encoder at a time, and none of them where there is a picture; T5, which is larger, without the denoiser.
    beside = 0 if name == "sd3" else denoiser
    assert beside + max(texts) < peaks["drawing"] < beside + 1.1 * max(texts)
    assert vae < peaks["portraits"] < denoiser + vae + min(texts) and denoiser + vae < peaks["decoding"]
    assert denoiser < peaks["mapping"] < vae > peaks["a step"] > denoiser


@pytest.mark.slow
def test_checkpointing_counts_less_and_all_parts_are_printed(capsys):
    printed = []
    for flag in ([], ["--gradient_checkpointing"]):
        estimate_memory.main(["--train_batch_size", "2", *flag])
        printed.append(dict(re.findall(r"([\w' ]+) ([\d.]+)", capsys.readouterr().out.split("\n- ")[1])))
    whole, small = ({name.strip(): float(value) for name, value in own.items()} for own in printed)
    assert whole.keys() >= {*PHASES, "unet", "text_encoder", "clip"}
    assert small["unet"] < small["a step"] < whole["a step"] <= 1.1 * whole["a step of a plain LoRA"]


def test_the_documented_presets_are_the_ones_estimated():
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) GB \| `(.*?)` \|(?: [\d.]+ GiB \|){3}$", page, re.MULTILINE)
    assert {int(card): flags for card, flags in rows} == PRESETS
    rows = re.findall(r"^\| (\d+) GB \| `(.*?)` \| [\d.]+ GiB \|(?: [\d.]+ \|){6}$", page, re.MULTILINE)
    assert [(int(card), flags) for card, flags in rows] == [*PRESETS_XL.items(), *PRESETS_3.items()]
    assert "`python benchmarks/estimate_memory.py`" in page


def test_what_is_counted_is_chosen_by_name(capsys, monkeypatch):
    monkeypatch.setattr(estimate_memory, "count", lambda model, flags: (2**30 * len(model.presets), flags))
    estimate_memory.main([])
    both = capsys.readouterr().out
    assert both.count("counted") == 3 and "| 12 | `" in both and "SDXL, 1024x1024:" in both
    assert f"`{PRESETS[16]}`" in both and all(f"`{flags}`" in both for flags in MODELS["sdxl"].presets.values())
    estimate_memory.main(["--model", "sdxl", "--rank", "8"])
    given = capsys.readouterr().out
    assert "| given | `--rank 8` | 3.0 GiB |" in given and "Stable Diffusion 1.5" not in given
    estimate_memory.main(["--rank", "8"])
    assert capsys.readouterr().out.startswith("Stable Diffusion 1.5, 512x512:")


def test_flags_whose_memory_is_not_counted_are_named(capsys):
    with pytest.raises(SystemExit):
        estimate_memory.main(["--preservation", "dop", "--rank", "8"])
    assert "error: --preservation is not counted; these are: " in capsys.readouterr().err
