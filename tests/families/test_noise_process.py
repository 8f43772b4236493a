"""Tests of `families/noise_process.py` against diffusers' scheduler and values worked out by hand."""

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from families.noise_process import DDPM, MAX_NOISE_TO_SIGNAL, FlowMatching


BOTH = pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(**config) -> DDPM:
    return DDPM("DDPMScheduler", config)


def with_signals(*signals: float) -> DDPM:
    """A process whose share of signal is the given one at each timestep."""
    shares = torch.tensor((1.0, *signals))
    return make(trained_betas=(1 - shares[1:] / shares[:-1]).tolist())


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_original_sample_inverts_the_noising(prediction_type, dtype):
    process = make(beta_schedule="scaled_linear", prediction_type=prediction_type)
    latents, noise = random(4, 4, 8, 8), random(4, 4, 8, 8, seed=1)
    timesteps = torch.tensor([0, 10, 400, 800])
    noisy_latents, target = (method(latents, noise, timesteps) for method in (process.add_noise, process.target))
    predicted = process.original_sample(noisy_latents.to(dtype), target.to(dtype), timesteps)
    assert predicted.dtype == torch.float32
    torch.testing.assert_close(predicted, latents, atol=1e-4 if dtype == torch.float32 else 5e-2, rtol=0)


def test_original_sample_is_what_the_scheduler_predicts():
    noisy_latents, prediction = random(1, 4, 8, 8), random(1, 4, 8, 8, seed=1)
    expected = DDPMScheduler(clip_sample=False).step(prediction, 300, noisy_latents).pred_original_sample
    predicted = make(clip_sample=False).original_sample(noisy_latents, prediction, torch.tensor([300]))
    torch.testing.assert_close(predicted, expected)


@BOTH
def test_noise_and_target_are_the_schedulers_to_the_bit(prediction_type):
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", prediction_type=prediction_type)
    process, arguments = make(**scheduler.config), (random(2, 4, 4, 4), random(2, 4, 4, 4, seed=1))
    timesteps = torch.tensor([3, 700])
    assert torch.equal(process.add_noise(*arguments, timesteps), scheduler.add_noise(*arguments, timesteps))
    expected = scheduler.get_velocity(*arguments, timesteps) if prediction_type == "v_prediction" else arguments[1]
    assert torch.equal(process.target(*arguments, timesteps), expected)
    assert torch.equal(process.signal(timesteps), scheduler.alphas_cumprod[timesteps])
    assert process.prediction_type == prediction_type and process.num_train_timesteps == 1000


@pytest.mark.parametrize(
    ("prediction_type", "expected"), [("epsilon", [0.5 / 9, 0.5, 1.0]), ("v_prediction", [0.05, 0.25, 0.1])]
)
def test_min_snr_weights_by_hand(prediction_type, expected):
    """Signal to noise of 9, 1 and 1/9, of which .5 counts at most."""
    process = with_signals(0.9, 0.5, 0.1)
    process.prediction_type = prediction_type
    weights = process.min_snr_weights(torch.tensor([0, 1, 2]), 0.5)
    torch.testing.assert_close(weights, torch.tensor(expected))


def test_pure_noise_has_a_weight():
    process = make(rescale_betas_zero_snr=True)
    assert process.min_snr_weights(torch.tensor([999]), 5.0).item() == 1


def test_the_density_is_a_power_of_noise_to_signal():
    process = with_signals(0.9, 0.5, 0.1)
    torch.testing.assert_close(process.timestep_density(1.0), torch.tensor([1 / 9, 1.0, 9.0]))
    torch.testing.assert_close(process.timestep_density(0.5), torch.tensor([1 / 3, 1.0, 3.0]))
    assert torch.equal(process.timestep_density(0.0), torch.ones(3))


def test_a_schedule_that_ends_in_pure_noise_has_a_finite_density():
    density = make(rescale_betas_zero_snr=True).timestep_density(1.0)
    assert density[-1] == density.max() == MAX_NOISE_TO_SIGNAL


def test_differences_are_brought_to_noise():
    timesteps, process = torch.tensor([0, 2]), with_signals(0.9, 0.5, 0.1)
    assert torch.equal(process.epsilon_scale(timesteps), torch.ones(2))
    process.prediction_type = "v_prediction"
    torch.testing.assert_close(process.epsilon_scale(timesteps), torch.tensor([0.9, 0.1]).sqrt())


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "LCMScheduler"]
)
def test_every_schedule_with_betas_is_one(name):
    config = getattr(diffusers, name)(beta_schedule="scaled_linear").config
    expected = DDPMScheduler(beta_schedule="scaled_linear").alphas_cumprod
    assert torch.equal(DDPM(name, config).signal(torch.arange(1000)), expected)


@pytest.mark.parametrize(
    "name", ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", "FlowMatchHeunDiscreteScheduler", "Unheard"]
)
def test_a_schedule_without_betas_is_refused(name):
    with pytest.raises(ValueError, match=f"no training with the noise of a {name}"):
        DDPM(name, {})


@pytest.mark.parametrize("kind", ["sample", "flow_prediction"])
def test_another_prediction_is_refused(kind):
    with pytest.raises(ValueError, match=f"no training for prediction_type '{kind}'"):
        DDPM("UniPCMultistepScheduler", {"prediction_type": kind})


# ------------------------------------------------------------------------------------------------------ flow matching


def flow(shift: float = 3.0) -> FlowMatching:
    return FlowMatching("FlowMatchEulerDiscreteScheduler", FlowMatchEulerDiscreteScheduler(shift=shift).config)


def test_flow_is_noised_as_the_scheduler_does():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    latents, noise = random(3, 4, 8, 8), random(3, 4, 8, 8, seed=1)
    timesteps = scheduler.timesteps[[10, 400, 900]]
    expected = scheduler.scale_noise(latents, timesteps, noise)
    torch.testing.assert_close(flow().add_noise(latents, noise, timesteps), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flow_original_sample_inverts_the_noising(dtype):
    latents, noise, timesteps = random(3, 4, 8, 8), random(3, 4, 8, 8, seed=1), torch.tensor([1.0, 500.5, 990.0])
    noisy_latents, target = (method(latents, noise, timesteps) for method in (flow().add_noise, flow().target))
    predicted = flow().original_sample(noisy_latents, target.to(dtype), timesteps)
    assert predicted.dtype == torch.float32
    torch.testing.assert_close(predicted, latents, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=0)


def test_flow_differences_become_those_of_noise():
    """Of two velocities at the same noisy latents, by the noise that each of them says is in them."""
    process, noisy_latents, timesteps = flow(), random(2, 4, 8, 8), torch.tensor([300.0, 925.0])
    first, second = random(2, 4, 8, 8, seed=1), random(2, 4, 8, 8, seed=2)
    sigmas = (timesteps / 1000).view(-1, 1, 1, 1)

    def noise(velocity: torch.Tensor) -> torch.Tensor:
        return (noisy_latents - (1 - sigmas) * process.original_sample(noisy_latents, velocity, timesteps)) / sigmas

    scale = process.epsilon_scale(timesteps).view(-1, 1, 1, 1)
    torch.testing.assert_close(scale * (first - second), noise(first) - noise(second), atol=1e-5, rtol=1e-5)
    assert process.epsilon_scale(torch.tensor([1000.0])) > 0  # else a map of pure noise alone would be empty


def test_flow_timesteps_have_a_shifted_logit_normal_density():
    """Half of the noise's places lie below one half, and there the noise's share is shift / (1 + shift)."""
    process, generator = flow(shift=3.0), torch.Generator().manual_seed(0)
    drawn = process.draw_timesteps(20_000, 0.0, generator)
    assert drawn.median().item() == pytest.approx(750, abs=5) and 0 < drawn.min() and drawn.max() < 1000
    place = (drawn / 1000) / (3 - 2 * drawn / 1000)
    normal = torch.logit(place)
    assert normal.mean().item() == pytest.approx(0, abs=0.03) and normal.std().item() == pytest.approx(1, abs=0.03)
    again = process.draw_timesteps(20_000, 0.0, torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)


def test_flow_power_draws_higher_noise_up_to_the_bound():
    process = flow()
    plain, powered = process.timestep_density(0.0), process.timestep_density(1.5)
    ratios = (process.timesteps / (1000 - process.timesteps)) ** 2
    torch.testing.assert_close(powered / plain, ratios.clamp(max=MAX_NOISE_TO_SIGNAL) ** 1.5, rtol=1e-3, atol=0)


def test_flow_maps_are_made_at_the_noise_of_stable_diffusion():
    """Both ranges of timesteps have the same noise over signal, within a tenth."""
    table, process = make(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"), flow()
    for own, other in zip(process.map_timesteps, table.map_timesteps, strict=True):
        signal = table.signal(torch.tensor([other]))
        ratio = ((1 - signal) / signal).sqrt().item()
        assert own / (1000 - own) == pytest.approx(ratio, rel=0.1)
    twice = process.scaled(700, 2.0)
    assert twice / (1000 - twice) == pytest.approx(2 * 700 / 300, rel=0.01)
    assert process.between(700, 900, torch.tensor([0.25])).tolist() == [750.0]


def test_flow_signal_and_what_it_has_not():
    assert flow().signal(torch.tensor([0.0, 500.0, 1000.0])).tolist() == [1.0, 0.5, 0.0]
    with pytest.raises(ValueError, match="min-SNR"):
        flow().min_snr_weights(torch.tensor([500.0]), 5.0)


@pytest.mark.parametrize(
    ("name", "config", "line"),
    [
        ("EulerDiscreteScheduler", {}, "EulerDiscreteScheduler, which is not that of flow matching"),
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, "use_dynamic_shifting"),
    ],
)
def test_noise_that_is_not_of_flow_matching_is_refused(name, config, line):
    with pytest.raises(ValueError, match=line):
        FlowMatching(name, config)


def test_a_flow_is_no_table_of_betas():
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler, which has no betas"):
        DDPM("FlowMatchEulerDiscreteScheduler", {"shift": 3.0})
