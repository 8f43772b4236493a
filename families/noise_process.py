"""How latents are noised, and what a prediction of the denoiser means. [ours]

Legend: B batch, C latent channels, H/W latent size.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from sfcm import epsilon_scale


# Stable Diffusion's own schedule ends at a ratio of 214.
MAX_NOISE_TO_SIGNAL = 256.0
# Where the factor of a difference would be 0, so that a map of that step alone is not empty.
_LEAST_SCALE = 2.0**-12


class NoiseProcess(ABC):
    """What latents are noised by, and what is learned from them. All timesteps are (B,), as the denoiser takes them.

    Attributes:
        timesteps: all that can be drawn, on the CPU, ascending.
        num_train_timesteps: the end of their range.
        map_timesteps: lowest and highest of those that maps are made at, for latents of 64 x 64.
    """

    timesteps: Tensor
    num_train_timesteps: int
    map_timesteps: tuple[int, int]

    def draw_timesteps(self, count: int, power: float, generator: torch.Generator) -> Tensor:
        """Timesteps (count,) on the CPU, with `timestep_density`."""
        chosen = torch.multinomial(self.timestep_density(power), count, replacement=True, generator=generator)
        return self.timesteps[chosen]

    @abstractmethod
    def timestep_density(self, power: float) -> Tensor:
        """Weights of all `timesteps`: those of training, times (noise/signal)^power of the variances.

        Where a head is, and how large, is decided at high timesteps, where errors of the predicted noise are small
        numbers and move the portrait most. At pure noise there is no signal, and without a bound the last timesteps
        would be nearly all that is drawn.
        """

    @abstractmethod
    def between(self, low: int, high: int, place: Tensor) -> Tensor:
        """The timesteps at places (B,) in [0, 1) of a range."""

    @abstractmethod
    def scaled(self, timestep: int, factor: float) -> int:
        """The timestep with `factor` times the noise over signal of another, of deviations; the end if none has it."""

    @abstractmethod
    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noised latents (B, C, H, W)."""

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser should predict of the noised latents, (B, C, H, W)."""

    @abstractmethod
    def signal(self, timesteps: Tensor) -> Tensor:
        """The share of the clean latents in the variance, (B,) float32 in [0, 1]."""

    @abstractmethod
    def original_sample(self, noisy_latents: Tensor, prediction: Tensor, timesteps: Tensor) -> Tensor:
        """One-step prediction of the clean latents, (B, C, H, W) float32; gradient flows through `prediction`.

        Source: [paper] the response path's portrait x0_hat.
        """

    @abstractmethod
    def epsilon_scale(self, timesteps: Tensor) -> Tensor:
        """Factors (B,) that make a difference of two predictions one of predicted noise."""

    @abstractmethod
    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Weights (B,) float32 that keep the easy, nearly clean timesteps from ruling the diffusion loss."""


class DDPM(NoiseProcess):
    """Noise by a table of betas; the denoiser predicts it ("epsilon") or the velocity ("v_prediction").

    Made of the name and the configuration of a scheduler of diffusers, of which only the betas and the prediction type
    count. Timesteps are whole numbers.

    Raises ValueError: the scheduler has no betas, as those of flow matching, or the prediction is another.
    Source: Ho et al., "Denoising Diffusion Probabilistic Models", arXiv 2006.11239.
    """

    map_timesteps = (600, 950)

    def __init__(self, scheduler_class: str, config: Mapping[str, Any]) -> None:
        kind = getattr(diffusers, scheduler_class, None)
        if kind is None or "beta_start" not in inspect.signature(kind).parameters:
            raise ValueError(f"no training with the noise of a {scheduler_class}, which has no betas")
        self._scheduler = DDPMScheduler.from_config(config)
        self.prediction_type: str = self._scheduler.config.prediction_type
        self.num_train_timesteps: int = self._scheduler.config.num_train_timesteps
        # The betas stay on the CPU; the scheduler moves its own products of them to the device.
        self._signal = (1 - self._scheduler.betas).cumprod(0)
        self.timesteps = torch.arange(self.num_train_timesteps)
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"no training for prediction_type {self.prediction_type!r}")

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self._scheduler.add_noise(latents, noise, timesteps)

    def between(self, low: int, high: int, place: Tensor) -> Tensor:
        return (low + place * (high - low)).long()

    def scaled(self, timestep: int, factor: float) -> int:
        ratios = ((1 - self._signal) / self._signal).sqrt()
        ratio = ratios[min(timestep, len(ratios) - 1)] * factor
        return min(int(torch.searchsorted(ratios, ratio)), len(ratios))

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if self.prediction_type == "v_prediction":
            return self._scheduler.get_velocity(latents, noise, timesteps)
        return noise

    def signal(self, timesteps: Tensor) -> Tensor:
        """The share of the clean latents in the variance: alpha_bar, (B,) float32 in [0, 1]."""
        on_cpu = timesteps.device.type == "cpu"  # where nothing is to wait for a GPU
        signal = self._signal if on_cpu else self._scheduler.alphas_cumprod.to(timesteps.device)
        return signal[timesteps].float()

    def original_sample(self, noisy_latents: Tensor, prediction: Tensor, timesteps: Tensor) -> Tensor:
        signal = self.signal(timesteps).view(-1, 1, 1, 1)
        noisy_latents, prediction = noisy_latents.float(), prediction.float()
        if self.prediction_type == "epsilon":
            return (noisy_latents - (1 - signal).sqrt() * prediction) / signal.sqrt()
        return signal.sqrt() * noisy_latents - (1 - signal).sqrt() * prediction

    def epsilon_scale(self, timesteps: Tensor) -> Tensor:
        return epsilon_scale(self._scheduler.alphas_cumprod, timesteps, self.prediction_type)

    def timestep_density(self, power: float) -> Tensor:
        """As any process's; those of training are all alike."""
        return ((1 - self._signal) / self._signal).clamp(max=MAX_NOISE_TO_SIGNAL) ** power

    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Weights (B,) float32 that keep the easy, nearly clean timesteps from ruling the diffusion loss.

        For epsilon `min(snr, gamma) / snr`, for v `min(snr, gamma) / (snr + 1)`.
        Source: Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy", arXiv 2303.09556.
        """
        signal = self.signal(timesteps)
        snr = signal / (1 - signal)
        if self.prediction_type == "v_prediction":
            return snr.clamp(max=gamma) / (snr + 1)
        # Written so that a timestep of pure noise has the weight 1 and not 0 / 0.
        return (gamma / snr).clamp(max=1)


class FlowMatching(NoiseProcess):
    """Noise on a straight line to it, `(1 - sigma) * latents + sigma * noise`; the denoiser predicts the line's
    velocity, noise minus latents.

    A timestep is `1000 * sigma`, of which some lie closer together than others: as the scheduler's `shift` says. In
    training they have the logit-normal density that Stable Diffusion 3 was trained with.

    Made of the name and the configuration of a scheduler of diffusers.

    Raises ValueError: the scheduler is none of flow matching, or it shifts the noise by the size of a picture.
    Source: Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", arXiv 2403.03206;
    [ours] the bound, and maps at the noise ratios of Stable Diffusion's 600 and 950.
    """

    map_timesteps = (700, 920)

    def __init__(self, scheduler_class: str, config: Mapping[str, Any]) -> None:
        if scheduler_class not in ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"):
            raise ValueError(f"no training with the noise of a {scheduler_class}, which is not that of flow matching")
        if config.get("use_dynamic_shifting"):
            raise ValueError("no training with noise that depends on the size of a picture (use_dynamic_shifting)")
        self.num_train_timesteps = config.get("num_train_timesteps", 1000)
        shift, count = config.get("shift", 1.0), self.num_train_timesteps
        place = (torch.arange(count) + 0.5) / count
        self._sigmas = shift * place / (1 + (shift - 1) * place)
        # The density of the logistic function of a normally distributed number.
        self._density = torch.exp(-torch.logit(place) ** 2 / 2) / (place * (1 - place))
        self.timesteps = self._sigmas * count

    def sigmas(self, timesteps: Tensor) -> Tensor:
        """The share of the noise (B,) float32 in [0, 1]."""
        return timesteps.float() / self.num_train_timesteps

    def timestep_density(self, power: float) -> Tensor:
        ratios = (self._sigmas / (1 - self._sigmas)) ** 2
        return self._density * ratios.clamp(max=MAX_NOISE_TO_SIGNAL) ** power

    def between(self, low: int, high: int, place: Tensor) -> Tensor:
        return low + place * (high - low)

    def scaled(self, timestep: int, factor: float) -> int:
        noise = timestep * factor
        return round(self.num_train_timesteps * noise / (noise + self.num_train_timesteps - timestep))

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        sigmas = self._columns(timesteps)
        return (1 - sigmas) * latents + sigmas * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise - latents

    def signal(self, timesteps: Tensor) -> Tensor:
        sigmas = self.sigmas(timesteps)
        return (1 - sigmas) ** 2 / ((1 - sigmas) ** 2 + sigmas**2)

    def original_sample(self, noisy_latents: Tensor, prediction: Tensor, timesteps: Tensor) -> Tensor:
        return noisy_latents.float() - self._columns(timesteps) * prediction.float()

    def epsilon_scale(self, timesteps: Tensor) -> Tensor:
        """As any process's: noise is the noisy latents plus `1 - sigma` times the velocity."""
        return (1 - self.sigmas(timesteps)).clamp(min=_LEAST_SCALE)

    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """None: the density of the timesteps does that. Raises ValueError."""
        raise ValueError("min-SNR weights are for noise by a table of betas, and flow matching has none")

    def _columns(self, timesteps: Tensor) -> Tensor:
        return self.sigmas(timesteps).view(-1, 1, 1, 1)
