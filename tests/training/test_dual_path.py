"""Tests of `training/dual_path.py`, with a tiny UNet and its LoRA adapters."""

from functools import partial

import pytest
import torch
from tiny_unet import TARGETS, TOKENS, adapter_states, add_lora, flags, hook_count, inputs, make_unet, predict
from torch import nn

from adapters import Adapters
from attention_processors import CrossAttentionStore, capture_cross_attention
from families.prompt_embeds import PromptEmbeds
from families.stable_diffusion import StableDiffusion
from training.dual_path import dual_path


MODES = ("two_pass", "single_pass")


def paths_of(unet, latents, timesteps, base_states, full_states) -> tuple:
    """The first arguments of `dual_path`."""
    embeds = (PromptEmbeds(base_states), PromptEmbeds(full_states))
    return (Adapters(unet), partial(StableDiffusion.predict, unet), latents, timesteps, *embeds)


def run_dual_path(unet, mode, checkpointing, **kwargs):
    """One stage-2-like step in train mode: predictions, features and the adapters' gradients."""
    if checkpointing:
        unet.enable_gradient_checkpointing()
    else:
        unet.disable_gradient_checkpointing()
    unet.train()
    unet.zero_grad(set_to_none=True)
    batch = inputs()
    base_states = torch.randn(2, TOKENS, 12, generator=torch.Generator().manual_seed(4))
    arguments = (batch["sample"], batch["timestep"], base_states, batch["encoder_hidden_states"])
    with capture_cross_attention(unet) as store:
        with dual_path(*paths_of(unet, *arguments), mode=mode, store=store, **kwargs) as paths:
            loss = (paths.response_pred - paths.reference_pred).square().mean()
            for layer, probs in paths.response.attention_probs.items():
                loss = loss + (probs - paths.reference.attention_probs[layer]).square().sum()
                loss = loss + (paths.response.queries[layer] - paths.reference.queries[layer]).square().mean()
            loss.backward()
        with pytest.raises(RuntimeError):
            store.pop()
    gradients = {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}
    return paths, gradients


def assert_same_gradients(actual, expected):
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_batched_pass_equals_two_passes(lora_unet, checkpointing):
    two, two_gradients = run_dual_path(lora_unet, "two_pass", checkpointing)
    one, one_gradients = run_dual_path(lora_unet, "single_pass", checkpointing)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(one.reference_pred, two.reference_pred, **close)
    torch.testing.assert_close(one.response_pred, two.response_pred, **close)
    for side in ("reference", "response"):
        single, double = getattr(one, side), getattr(two, side)
        assert single.resolutions == double.resolutions and len(single.resolutions) == 7
        torch.testing.assert_close(single.attention_probs, double.attention_probs, **close)
        torch.testing.assert_close(single.queries, double.queries, **close)
    assert len(two_gradients) == 7 * len(TARGETS) * 2
    assert all(gradient.abs().max() > 0 for gradient in two_gradients.values())
    assert_same_gradients(one_gradients, two_gradients)


@pytest.mark.parametrize("mode", MODES)
def test_checkpointing_changes_no_gradient(lora_unet, mode):
    _, plain = run_dual_path(lora_unet, mode, checkpointing=False)
    _, checkpointed = run_dual_path(lora_unet, mode, checkpointing=True)
    assert_same_gradients(checkpointed, plain)


@pytest.mark.parametrize("mode", MODES)
def test_the_paths_are_the_original_and_the_adapted_model(lora_unet, mode):
    paths, _ = run_dual_path(lora_unet, mode, checkpointing=False)
    base_states = torch.randn(2, TOKENS, 12, generator=torch.Generator().manual_seed(4))
    original = predict(make_unet(), encoder_hidden_states=base_states)
    torch.testing.assert_close(paths.reference_pred, original, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(paths.response_pred, predict(lora_unet), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_gradient_flows_through_the_response_only(lora_unet, mode):
    """Also when weights that both paths use are trained."""
    lora_unet.requires_grad_(True)
    paths, _ = run_dual_path(lora_unet, mode, checkpointing=False)
    assert not paths.reference_pred.requires_grad
    assert paths.response_pred.requires_grad
    for values in (paths.reference.attention_probs, paths.reference.queries):
        assert not any(value.requires_grad for value in values.values())
    for values in (paths.response.attention_probs, paths.response.queries):
        assert all(value.requires_grad for value in values.values())


@pytest.mark.parametrize("mode", MODES)
def test_only_the_trained_adapter_takes_part(two_adapters, mode):
    """Both adapters are active outside; the response uses one, and the frozen one gets no gradient."""
    two_adapters.set_adapter(["stage1", "default"])
    for name, parameter in two_adapters.named_parameters():
        parameter.requires_grad_(".default." in name)
    state, before, hooks = adapter_states(two_adapters), flags(two_adapters), hook_count(two_adapters)
    paths, gradients = run_dual_path(two_adapters, mode, checkpointing=True)
    assert gradients and all(".default." in name for name in gradients)
    assert (adapter_states(two_adapters), flags(two_adapters), hook_count(two_adapters)) == (state, before, hooks)

    alone = make_unet()
    add_lora(alone)
    expected, expected_gradients = run_dual_path(alone, mode, checkpointing=False)
    torch.testing.assert_close(paths.response_pred, expected.response_pred, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients, expected_gradients)


class Wrapper(nn.Module):
    """Forwards like DistributedDataParallel, and remembers what it ran."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.batches = []

    def forward(self, sample, *args, **kwargs):
        self.batches.append((len(sample), torch.is_grad_enabled()))
        return self.module(sample, *args, **kwargs)


@pytest.mark.parametrize(("mode", "batches"), [("two_pass", [(2, True)]), ("single_pass", [(4, True)])])
def test_the_pass_with_gradient_runs_on_the_wrapper(lora_unet, mode, batches):
    wrapper = Wrapper(lora_unet)
    _, gradients = run_dual_path(
        lora_unet, mode, checkpointing=True, respond=partial(StableDiffusion.predict, wrapper)
    )
    assert wrapper.batches == batches
    _, expected = run_dual_path(lora_unet, mode, checkpointing=True)
    assert_same_gradients(gradients, expected)


@pytest.mark.parametrize("mode", MODES)
def test_without_a_store_there_are_no_features(lora_unet, mode):
    batch = inputs()
    states = batch["encoder_hidden_states"]
    with dual_path(*paths_of(lora_unet, batch["sample"], batch["timestep"], states, states), mode=mode) as paths:
        assert paths.reference is None and paths.response is None
    torch.testing.assert_close(paths.response_pred, predict(lora_unet), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_everything_is_restored_after_an_error_in_the_loss(two_adapters, mode):
    state, before, hooks = adapter_states(two_adapters), flags(two_adapters), hook_count(two_adapters)
    batch = inputs()
    states = batch["encoder_hidden_states"]
    with pytest.raises(KeyError):
        with dual_path(*paths_of(two_adapters, batch["sample"], batch["timestep"], states, states), mode=mode):
            raise KeyError("from the loss")
    assert (adapter_states(two_adapters), flags(two_adapters), hook_count(two_adapters)) == (state, before, hooks)


@pytest.mark.parametrize("mode", MODES)
def test_a_foreign_store_is_refused(lora_unet, mode):
    batch = inputs()
    states = batch["encoder_hidden_states"]
    arguments = paths_of(lora_unet, batch["sample"], batch["timestep"], states, states)
    with pytest.raises(RuntimeError, match="no cross-attention was recorded"):
        with dual_path(*arguments, mode=mode, store=CrossAttentionStore()):
            pass
