"""Tests of a run's models: which are loaded, where they lie, the layers and kinds of the LoRA, and its precision."""

import importlib.util
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models import attention_processor
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from test_train import LAYERS, SMOOTH, WEIGHTS, adapter_state, difference, prepared, train, watch, watch_runs

import train_spf_portrait_lora as script
from training.models import STAGE1_ADAPTER


def test_another_vae(world, tmp_path):
    torch.manual_seed(7)
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(world.model, subfolder="vae"))
    vae.save_pretrained(tmp_path / "vae")
    parts = prepared(world, pretrained_vae_model_name_or_path=tmp_path / "vae").parts
    used = parts.models.pipeline.vae.state_dict()
    assert all(torch.equal(used[name], value) for name, value in vae.state_dict().items())


def places(models, monkeypatch):
    """Seen in their `to`: on a machine without a GPU all places are one."""
    moves = []
    for name in ("vae", "text_encoder", "unet"):
        kind = type(getattr(models.pipeline, name))

        def to(self, place, name=name, own=kind.to):
            moves.append((name, str(place)))
            return own(self, "cpu")

        monkeypatch.setattr(kind, "to", to)
    models.device = torch.device("cuda:0")
    return moves


def test_models_that_no_step_uses_come_onto_the_device_to_work(world, monkeypatch):
    parts = prepared(world).parts
    assert parts.models._kept == {"unet"} and parts.enhancement is None
    moves = places(parts.models, monkeypatch)
    with parts.models.at_work("vae", "unet"):
        assert moves == [("vae", "cuda:0")]
    assert moves[1:] == [("vae", "cpu")]


def test_models_come_onto_the_device_one_after_another_to_draw(world, monkeypatch):
    models = prepared(world).parts.models
    moves = places(models, monkeypatch)
    with models.drawing():
        assert set(moves) == {("vae", "cpu"), ("text_encoder", "cpu")}
        # Until a model is called nothing of its own lies there, but the pipeline knows where it will.
        assert models.pipeline._execution_device == torch.device("cuda:0")
        moves.clear()
        models.device = torch.device("cpu")
        for name in ("text_encoder", "vae"):
            getattr(models.pipeline, name)._hf_hook.execution_device = torch.device("cpu", 0)
        options = {"num_inference_steps": 1, "output_type": "np", "height": 16, "width": 16}
        models.pipeline("a woman, a hat", **options)
        assert [*dict.fromkeys(moves)] == [("text_encoder", "cpu:0"), ("vae", "cpu:0")]
        # None but the UNet lies there while it predicts: seen as if the encoder's weights were on another device.
        encoder, away = models.pipeline.text_encoder, []
        monkeypatch.setattr(type(encoder), "parameters", lambda self: iter([torch.empty(0, device="meta")]))
        moves.clear()
        models.denoiser.register_forward_hook(lambda unet, args, output: away.extend(moves))
        embeds = torch.zeros(1, 77, models.denoiser.config.cross_attention_dim)
        models.denoiser(torch.zeros(1, 4, 8, 8), 1, embeds)
        assert ("text_encoder", "cpu") in away and ("vae", "cpu") not in away
        monkeypatch.undo()
        moves = places(models, monkeypatch)
        models.device = torch.device("cpu")
    assert {*moves} == {("text_encoder", "cpu"), ("vae", "cpu")} and not hasattr(models.pipeline.vae, "_hf_hook")


@pytest.mark.parametrize("flags", [{}, {"no-cache_latents": True}], ids=["lent", "kept"])
def test_pictures_are_decoded_without_autocast(world, flags):
    """As they are for users; CUDA's would have norms in float32, which takes memory."""
    models, seen = prepared(world, mixed_precision="bf16", **flags).parts.models, []
    models.pipeline.vae.decoder.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    models.denoiser.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    options = {"num_inference_steps": 1, "output_type": "np", "height": 16, "width": 16}
    with models.drawing(), torch.autocast("cpu", torch.bfloat16):
        models.pipeline("a woman, a hat", **options)
    assert seen == [True, False]


@pytest.mark.parametrize(
    "flags, kept",
    [
        ({"stage2_objective": "paper"}, {"unet", "vae"}),
        ({"stage2_objective": "paper", "enhancement_loss": "none"}, {"unet"}),
        ({"no-cache_text_embeddings": True}, {"unet", "text_encoder"}),
        ({"no-cache_latents": True}, {"unet", "vae"}),
    ],
    ids=["enhancement", "no enhancement", "prompts each step", "pictures each step"],
)
def test_what_a_step_uses_stays(world, flags, kept):
    parts = prepared(world, **flags).parts
    assert parts.models._kept == kept
    assert (parts.enhancement is None) == ("enhancement_loss" in flags or "stage2_objective" not in flags)


# --------------------------------------------------------------------------------------------------------------- LoRA


def test_lora_on_self_attention_too(world, trained):
    state = load_file(trained(lora_target="all") / WEIGHTS)
    layers = {name.split(".transformer_blocks.")[1].split(".")[1] for name in state}
    assert layers == {"attn1", "attn2"} and len(state) == 2 * LAYERS * 4 * 2


def test_lora_layers(world, tmp_path, trained):
    """Layers of both namings in one file, all of which the stock loader takes."""
    output = train(world, tmp_path / "output", lora_layers="proj_in,attn2.to_k,conv1", stage2_objective="both")
    names = {name.rsplit(".lora_", 1)[0] for name in load_file(output / WEIGHTS)}
    ends = Counter(name.split(".")[-1] for name in names)
    assert set(ends) == {"proj_in", "to_k", "conv1"} and all(".attn1." not in name for name in names)
    pipeline = StableDiffusionPipeline.from_pretrained(world.model, safety_checker=None)
    pipeline.load_lora_weights(output)
    loaded = [name for name, layer in pipeline.unet.named_modules() if isinstance(layer, BaseTunerLayer)]
    assert {f"unet.{name}" for name in loaded} == names


@pytest.mark.parametrize("objective", ["composed", pytest.param("both", marks=pytest.mark.slow)])
def test_dora(world, tmp_path, monkeypatch, objective):
    runs, states, step = watch_runs(monkeypatch), [], script.train_step
    latents = torch.randn(1, 4, 8, 8)

    def predict_and_step(engine, models, objectives):
        if engine.global_step == 2 and objective == "composed":
            call = (latents, torch.tensor([500]), runs[0].table.prompt_embeds.states[:1])
            with torch.no_grad():
                adapted = models.denoiser(*call).sample
                with models.adapters.only(None):
                    states.append((adapted, models.denoiser(*call).sample))
        return step(engine, models, objectives)

    monkeypatch.setattr(script, "train_step", predict_and_step)
    flags = {"use_dora": True, "stage2_objective": objective, "num_validation_images": 1}
    output = train(world, tmp_path / "output", **flags)
    state = load_file(output / WEIGHTS)
    magnitudes = [name for name in state if "lora_magnitude_vector" in name]
    assert len(magnitudes) * 3 == len(state)
    assert len(states) == (objective == "composed")
    for adapted, original in states:
        torch.testing.assert_close(adapted, original, rtol=1e-4, atol=1e-5)
    # Stage 1 starts at the norms of the weights, and so does stage 2 from zero.
    norms = {
        f"unet.{name}.lora_magnitude_vector": layer.get_base_layer().weight.norm(dim=1)
        for name, layer in runs[0].models.denoiser.named_modules()
        if isinstance(layer, BaseTunerLayer)
    }
    moved = max((state[name].flatten() - norms[name.removesuffix(".weight")]).abs().max() for name in magnitudes)
    assert 1e-3 < moved < 0.2
    pipeline = StableDiffusionPipeline.from_pretrained(world.model, safety_checker=None)
    pipeline.load_lora_weights(output)
    loaded = adapter_state(pipeline.unet, pipeline.get_active_adapters()[0])
    assert difference(loaded, state) == 0


def test_dropout_is_on_in_the_training_forward_alone(world, tmp_path, monkeypatch, trained):
    runs, modes = watch_runs(monkeypatch), []
    drawings, forward = watch(monkeypatch, script, "draw_validation"), UNet2DConditionModel.forward

    def note_and_forward(self, *args, **kwargs):
        layer = next(module for module in self.modules() if isinstance(module, BaseTunerLayer))
        modes.append((torch.is_grad_enabled(), {name: drop.training for name, drop in layer.lora_dropout.items()}))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", note_and_forward)
    steps = {"stage2_objective": "both", "stage1_steps": 1, "stage2_steps": 1}
    flags = {"lora_dropout": 0.5, "validation_steps": 1, **steps}
    output = train(world, tmp_path / "output", num_validation_images=1, **flags)
    assert {mode["default"] for grad, mode in modes if grad} == {True}
    assert not any(mode.get(STAGE1_ADAPTER) for _, mode in modes)
    drawn = [mode["default"] for grad, mode in modes if not grad]
    assert False in drawn and len(drawings) == 3
    assert not any(module.training for module in runs[0].models.denoiser.modules())
    assert difference(output, trained(**steps)) > 1e-4
    again = train(world, tmp_path / "again", **flags)
    assert difference(output, again) == 0


# ---------------------------------------------------------------------------------------------------------- precision


def test_tf32(world, tmp_path):
    before = torch.get_float32_matmul_precision()
    try:
        train(world, tmp_path / "output", dry_run=True)
        assert torch.get_float32_matmul_precision() == before == "highest"
        train(world, tmp_path / "other", dry_run=True, allow_tf32=True)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_xformers_in_self_attention(world, tmp_path, monkeypatch, trained):
    """xformers needs a GPU; torch's own attention stands in for its kernel, everything else is real."""
    calls = []

    def attend(query, key, value, attn_bias=None, op=None, scale=None):
        calls.append(query.shape)
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_bias, scale=scale)

    package = SimpleNamespace(ops=SimpleNamespace(memory_efficient_attention=attend))
    monkeypatch.setattr(attention_processor, "xformers", package, raising=False)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "xformers" or find_spec(name))
    runs = watch_runs(monkeypatch)
    flags = {"enable_xformers_memory_efficient_attention": True, "stage2_objective": "both", **SMOOTH}
    output = train(world, tmp_path / "output", num_validation_images=1, **flags)
    processors = runs[0].models.denoiser.attn_processors
    kinds = {(name.split(".")[-2], type(processor).__name__) for name, processor in processors.items()}
    assert kinds == {("attn1", "XFormersAttnProcessor"), ("attn2", "AttnProcessor2_0")} and calls
    assert difference(output, trained(stage2_objective="both", **SMOOTH)) < 1e-4


@pytest.mark.parametrize(
    "objective, flags",
    [
        ("composed", {}),
        ("both", {"num_validation_images": 1}),
        *(
            pytest.param(objective, flags, marks=pytest.mark.slow)
            for objective in ("composed", "both")
            for flags in ({"use_dora": True}, {"dual_path": "single_pass"})
        ),
    ],
    ids=str,
)
def test_bfloat16_keeps_lora_and_losses_in_float32(world, tmp_path, trained, monkeypatch, objective, flags):
    exact = load_file(trained(stage2_objective=objective) / WEIGHTS)
    runs, dtypes, backward = watch_runs(monkeypatch), set(), Accelerator.backward
    monkeypatch.setattr(Accelerator, "backward", lambda self, loss: dtypes.add(loss.dtype) or backward(self, loss))
    output = train(world, tmp_path / "output", mixed_precision="bf16", stage2_objective=objective, **flags)
    assert dtypes == {torch.float32}
    unet = runs[0].models.denoiser
    assert {p.dtype for p in unet.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for name, p in unet.named_parameters() if ".lora_" not in name} == {torch.bfloat16}
    state = load_file(output / WEIGHTS)
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert all(torch.isfinite(value).all() for value in state.values())
    if "use_dora" not in flags:
        # The same draws, rounded: Adam's sign may flip where the gradient is tiny, but most weights agree.
        moved = torch.cat([(state[name] - exact[name]).abs().flatten() for name in state])
        assert 0 < moved.median() < 0.004
