"""One network that predicts noise, and the same one expressed as velocity: maps, losses and pictures are the same."""

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler
from test_train import train, watch

import train_spf_portrait_lora as script
from families.noise_process import DDPM
from pipeline_spf_portrait import SPFPortraitPipeline
from sfcm import epsilon_scale
from training import models


def express_as_velocity(pipeline: SPFPortraitPipeline) -> SPFPortraitPipeline:
    """The pipeline, its UNet's noise turned into the velocity of the same clean latents."""
    unet, alphas_cumprod = pipeline.unet, DDPMScheduler.from_config(pipeline.scheduler.config).alphas_cumprod
    predict_noise = unet.forward

    def predict_velocity(sample, timestep, *args, **kwargs):
        noise, *others = predict_noise(sample, timestep, *args, **kwargs)
        alpha_bar = alphas_cumprod[timestep.reshape(-1)].view(-1, 1, 1, 1)
        return ((noise - (1 - alpha_bar).sqrt() * sample) / alpha_bar.sqrt(), *others)

    unet.forward = predict_velocity
    pipeline.scheduler = type(pipeline.scheduler).from_config(
        pipeline.scheduler.config, prediction_type="v_prediction"
    )
    return pipeline


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_scale_by_the_definitions(prediction_type):
    """Two answers for the same noisy latents, as each kind of model gives them."""
    alphas_cumprod, timesteps = torch.linspace(0.99, 0.05, 10), torch.tensor([2, 7])
    alpha_bar = alphas_cumprod[timesteps].view(-1, 1, 1, 1).double()
    noisy, first, second = torch.randn(3, 2, 4, 3, 3, dtype=torch.float64).unbind()

    def express(noise):
        clean = (noisy - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()
        velocity = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * clean
        return {"epsilon": noise, "sample": clean, "v_prediction": velocity}[prediction_type]

    scale = epsilon_scale(alphas_cumprod, timesteps, prediction_type).view(-1, 1, 1, 1)
    # Less clean latents mean more noise.
    sign = -1 if prediction_type == "sample" else 1
    torch.testing.assert_close(sign * scale * (express(first) - express(second)), first - second, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_pure_noise_has_a_factor_too(prediction_type):
    """Else the first map of a zero-terminal-SNR sampler would be empty, and guidance undo the target there."""
    scale = epsilon_scale(torch.tensor([0.9, 0.0]), torch.tensor([1]), prediction_type)
    assert 0 < scale.item() < 0.001


def test_a_scheduler_without_a_table_of_signal_weighs_all_steps_alike(world):
    pipeline = SPFPortraitPipeline.from_pretrained(world.model, safety_checker=None)
    pipeline.scheduler = EDMEulerScheduler(prediction_type="v_prediction")
    assert pipeline._to_epsilon(torch.tensor(0.3)) == 1


def test_an_unknown_prediction_type_is_refused():
    with pytest.raises(ValueError, match="'flow'"):
        epsilon_scale(torch.ones(3), torch.tensor([1]), "flow")


@pytest.fixture(scope="session")
def stage1(world, tmp_path_factory):
    """A LoRA to start from: its own diffusion loss weighs timesteps as the prediction type has it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return train(world, tmp_path_factory.mktemp("stage1") / "output", stage2_steps=0)


@pytest.mark.parametrize("objective", ["composed", pytest.param("paper", marks=pytest.mark.slow)])
def test_both_expressions_train_alike(world, stage1, tmp_path, monkeypatch, objective):
    flags = {"stage1_steps": 0, "stage1_lora_path": stage1, "stage2_steps": 1, "stage2_objective": objective}
    flags |= {"composed_init": "stage1", "enhancement_loss": "none", "train_batch_size": 4, "base_prompt_share": 0.5}
    clip, load, seen = torch.nn.utils.clip_grad_norm_, models.load_base_model, {}
    for kind in ("epsilon", "v_prediction"):
        with monkeypatch.context() as patch:
            if kind == "v_prediction":
                patch.setattr(models, "load_base_model", lambda *args: express_as_velocity(load(*args)))
            gradients = []

            def keep(parameters, *args, gradients=gradients):
                gradients += [parameter.grad.clone() for parameter in parameters]
                return clip(parameters, *args)

            patch.setattr(torch.nn.utils, "clip_grad_norm_", keep)
            alignments, losses = watch(patch, script, "prepare_alignment"), watch(patch, script, "train_step")
            AcceleratorState._reset_state(reset_partial_state=True)
            train(world, tmp_path / kind, **flags)
            seen[kind] = SimpleNamespace(maps=torch.stack(alignments[0].sfcm), gradients=gradients, losses=losses[0])
    first, second = seen["epsilon"], seen["v_prediction"]
    torch.testing.assert_close(first.maps, second.maps, rtol=0, atol=2e-3)
    assert first.maps.std() > 0.1
    names = {"composed": ["composed"], "paper": ["base_prompt", "text_consistent", "fine_grained"]}[objective]
    for name in names:
        assert first.losses[name] > 0 and math.isclose(first.losses[name], second.losses[name], rel_tol=0.01)
    if objective == "composed":
        error = sum((a - b).square().sum() for a, b in zip(first.gradients, second.gradients)).sqrt()
        error = error / sum(gradient.square().sum() for gradient in first.gradients).sqrt()
        print(f"\nmaps differ by {(first.maps - second.maps).abs().max():.1e} at most, the gradient by {error:.1e}")
        assert error < 0.01


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_both_expressions_draw_alike(world, stage1, guidance):
    outputs = []
    for express in (lambda pipeline: pipeline, express_as_velocity):
        pipeline = SPFPortraitPipeline.from_pretrained(world.model, safety_checker=None)
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        pipeline.load_lora_weights(stage1)
        pipeline = express(pipeline)
        pipeline.set_progress_bar_config(disable=True)
        outputs.append(
            pipeline(
                "a man, a green hat",
                target_prompt="red hair",
                num_inference_steps=4,
                return_sfcm=True,
                sfcm_guidance=guidance,
                height=16,
                width=16,
                generator=torch.Generator().manual_seed(0),
                output_type="pt",
            )
        )
    torch.testing.assert_close(outputs[0].sfcm, outputs[1].sfcm, rtol=0, atol=2e-3)
    torch.testing.assert_close(outputs[0].images, outputs[1].images, rtol=0, atol=2e-3)
    assert outputs[0].sfcm.std() > 0.1


def test_a_schedule_that_ends_in_pure_noise_draws_its_end_as_another_does():
    shares = []
    for rescaled in (False, True):
        scheduler = DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=rescaled
        )
        density = DDPM("DDPMScheduler", scheduler.config).timestep_density(0.5)
        shares.append((density[990:].sum() / density.sum()).item())
    print(f"\nshare of t >= 990: {shares[0]:.3f}, ending in pure noise {shares[1]:.3f}")
    assert shares[1] < 2 * shares[0]
