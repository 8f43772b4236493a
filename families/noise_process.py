"""How latents are noised, and what a prediction of the denoiser means. [ours]

Legend: B batch, C latent channels, H/W latent size.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from sfcm import epsilon_scale


# Stable Diffusion's own schedule ends at a ratio of 214.
MAX_NOISE_TO_SIGNAL = 256.0


class DDPM:
    """Noise by a table of betas; the denoiser predicts it ("epsilon") or the velocity ("v_prediction").

    Made of the name and the configuration of a scheduler of diffusers, of which only the betas and the prediction type
    count. All timesteps are (B,).

    Raises ValueError: the scheduler has no betas, as those of flow matching, or the prediction is another.
    Source: Ho et al., "Denoising Diffusion Probabilistic Models", arXiv 2006.11239.
    """

    def __init__(self, scheduler_class: str, config: Mapping[str, Any]) -> None:
        kind = getattr(diffusers, scheduler_class, None)
        if kind is None or "beta_start" not in inspect.signature(kind).parameters:
            raise ValueError(f"no training with the noise of a {scheduler_class}, which has no betas")
        self._scheduler = DDPMScheduler.from_config(config)
        self.prediction_type: str = self._scheduler.config.prediction_type
        self.num_train_timesteps: int = self._scheduler.config.num_train_timesteps
        # The betas stay on the CPU; the scheduler moves its own products of them to the device.
        self._signal = (1 - self._scheduler.betas).cumprod(0)
        self.add_noise = self._scheduler.add_noise  # to latents (B, C, H, W)
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"no training for prediction_type {self.prediction_type!r}")

    def scaled(self, timestep: int, factor: float) -> int:
        """The timestep with `factor` times the noise over signal of another, of deviations; the end if none has it."""
        ratios = ((1 - self._signal) / self._signal).sqrt()
        ratio = ratios[min(timestep, len(ratios) - 1)] * factor
        return min(int(torch.searchsorted(ratios, ratio)), len(ratios))

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser should predict of the noised latents, (B, C, H, W)."""
        if self.prediction_type == "v_prediction":
            return self._scheduler.get_velocity(latents, noise, timesteps)
        return noise

    def signal(self, timesteps: Tensor) -> Tensor:
        """The share of the clean latents in the variance, (B,): alpha_bar, float32 in [0, 1]."""
        on_cpu = timesteps.device.type == "cpu"  # where nothing is to wait for a GPU
        signal = self._signal if on_cpu else self._scheduler.alphas_cumprod.to(timesteps.device)
        return signal[timesteps].float()

    def original_sample(self, noisy_latents: Tensor, prediction: Tensor, timesteps: Tensor) -> Tensor:
        """One-step prediction of the clean latents, (B, C, H, W) float32; gradient flows through `prediction`.

        Source: [paper] the response path's portrait x0_hat.
        """
        signal = self.signal(timesteps).view(-1, 1, 1, 1)
        noisy_latents, prediction = noisy_latents.float(), prediction.float()
        if self.prediction_type == "epsilon":
            return (noisy_latents - (1 - signal).sqrt() * prediction) / signal.sqrt()
        return signal.sqrt() * noisy_latents - (1 - signal).sqrt() * prediction

    def epsilon_scale(self, timesteps: Tensor) -> Tensor:
        """Factors (B,) that make a difference of two predictions one of predicted noise."""
        return epsilon_scale(self._scheduler.alphas_cumprod, timesteps, self.prediction_type)

    def timestep_density(self, power: float) -> Tensor:
        """Weights of all timesteps, (noise/signal)^power of the variances, on the CPU, where timesteps are drawn.

        Where a head is, and how large, is decided at high timesteps, where errors of the predicted noise are small
        numbers and move the portrait most. A schedule that ends in pure noise has no signal there, and without a bound
        its last timesteps would be nearly all that is drawn.
        """
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
