"""Tests of `attention_processors.py`, with a tiny UNet of two resolutions, LoRA adapters added through peft."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from attention_processors import (
    DUAL_PATH_MODES,
    CapturingAttnProcessor,
    CrossAttentionFeatures,
    CrossAttentionStore,
    active_adapters,
    adapters_per_sample,
    capture_cross_attention,
    dual_path,
    find_cross_attention_layers,
    phrase_map_resolution,
)


TARGETS = ["attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"]
TOKENS = 7
DOWN = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
MIDDLE = "mid_block.attentions.0.transformer_blocks.0.attn2"


def make_unet(**kwargs) -> UNet2DConditionModel:
    torch.manual_seed(0)
    config = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 12,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    unet = UNet2DConditionModel(**{**config, **kwargs})
    unet.requires_grad_(False)
    return unet


def add_lora(unet: UNet2DConditionModel, name: str = "default", seed: int = 1) -> None:
    """An adapter which changes the output: peft starts lora_B at zero."""
    torch.manual_seed(seed)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS), adapter_name=name)
    for parameter_name, parameter in unet.named_parameters():
        if f"lora_B.{name}." in parameter_name:
            nn.init.normal_(parameter, std=0.3)


@pytest.fixture
def unet():
    return make_unet()


@pytest.fixture
def lora_unet():
    unet = make_unet()
    add_lora(unet)
    return unet


@pytest.fixture
def two_adapters():
    """A frozen "stage1" and the trained "default", both active, as in composed alignment."""
    unet = make_unet()
    add_lora(unet, "stage1", seed=2)
    add_lora(unet, "default", seed=1)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(".default." in name)
    return unet


def inputs(size=(8, 8), batch_size=2) -> dict:
    generator = torch.Generator().manual_seed(3)
    return {
        "sample": torch.randn(batch_size, 4, *size, generator=generator),
        "timestep": torch.arange(1, batch_size + 1) * 100,
        "encoder_hidden_states": torch.randn(batch_size, TOKENS, 12, generator=generator),
    }


def predict(unet, **kwargs) -> torch.Tensor:
    return unet(**{**inputs(), **kwargs}, return_dict=False)[0]


def flags(unet) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in unet.named_parameters()}


def adapter_states(unet) -> list:
    return [(m.active_adapters, m.disable_adapters) for m in unet.modules() if isinstance(m, BaseTunerLayer)]


def hook_count(unet) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in unet.modules())


def encoder_mask() -> torch.Tensor:
    mask = torch.ones(2, TOKENS)
    mask[0, 5:] = 0
    mask[1, 2:] = 0
    return mask


# The processor


@pytest.mark.parametrize("stock", [AttnProcessor, AttnProcessor2_0])
@pytest.mark.parametrize("masked", [False, True])
def test_captured_forward_equals_stock(unet, stock, masked):
    unet.set_attn_processor(stock())
    mask = encoder_mask() if masked else None
    expected = predict(unet, encoder_attention_mask=mask)
    with capture_cross_attention(unet) as store:
        not_recording = predict(unet, encoder_attention_mask=mask)
        with store.record():
            recording = predict(unet, encoder_attention_mask=mask)
    torch.testing.assert_close(recording, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(recording, not_recording)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"norm_num_groups": 4, "residual_connection": True, "rescale_output_factor": 2.0},
        {"cross_attention_norm": "layer_norm"},
        {"cross_attention_norm": "group_norm", "cross_attention_norm_num_groups": 3},
        {"qk_norm": "layer_norm", "bias": True},
        {"upcast_attention": True, "upcast_softmax": True},
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_processor_keeps_every_part_of_the_stock_math(kwargs, masked):
    torch.manual_seed(0)
    attn = Attention(query_dim=32, cross_attention_dim=12, heads=4, dim_head=8, **kwargs)
    hidden_states, states = torch.randn(2, 9, 32), torch.randn(2, TOKENS, 12)
    mask = (1 - encoder_mask())[:, None] * -10000 if masked else None
    expected = attn(hidden_states, encoder_hidden_states=states, attention_mask=mask)
    attn.set_processor(CapturingAttnProcessor("layer", CrossAttentionStore()))
    actual = attn(hidden_states, encoder_hidden_states=states, attention_mask=mask)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_upcast_attention_takes_a_mask_in_half_precision():
    torch.manual_seed(0)
    attn = Attention(query_dim=32, cross_attention_dim=12, heads=4, dim_head=8, upcast_attention=True).bfloat16()
    hidden_states, states = torch.randn(2, 9, 32).bfloat16(), torch.randn(2, TOKENS, 12).bfloat16()
    mask = ((1 - encoder_mask())[:, None] * -10000).bfloat16()
    expected = attn(hidden_states, encoder_hidden_states=states, attention_mask=mask)
    attn.set_processor(CapturingAttnProcessor("layer", CrossAttentionStore()))
    actual = attn(hidden_states, encoder_hidden_states=states, attention_mask=mask)
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


def test_processor_takes_images_with_spatial_norm_and_no_text():
    torch.manual_seed(0)
    attn = Attention(query_dim=32, heads=4, dim_head=8, spatial_norm_dim=5, residual_connection=True)
    image, temb = torch.randn(2, 32, 3, 4), torch.randn(2, 5, 3, 4)
    expected = attn(image, temb=temb)
    attn.set_processor(CapturingAttnProcessor("layer", CrossAttentionStore()))
    actual = attn(image, temb=temb)
    assert actual.shape == image.shape
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_probs_and_queries_equal_a_hand_computation(lora_unet, masked):
    seen = {}
    attn = lora_unet.get_submodule(DOWN)
    hook = attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(hidden=args[0], states=kwargs["encoder_hidden_states"]),
        with_kwargs=True,
    )
    mask = encoder_mask() if masked else None
    with capture_cross_attention(lora_unet) as store, store.record():
        predict(lora_unet, encoder_attention_mask=mask)
    hook.remove()
    features = store.pop()

    query, key = attn.to_q(seen["hidden"]), attn.to_k(seen["states"])
    head_dim = query.shape[-1] // attn.heads
    probs, queries = [], []
    for head in range(attn.heads):
        part = slice(head * head_dim, (head + 1) * head_dim)
        scores = query[..., part] @ key[..., part].transpose(1, 2) / head_dim**0.5
        if masked:
            scores = scores.masked_fill(mask[:, None] == 0, float("-inf"))
        probs.append(scores.softmax(-1))
        queries.append(query[..., part])
    torch.testing.assert_close(features.attention_probs[DOWN], torch.stack(probs).mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(features.queries[DOWN], torch.stack(queries, 1), rtol=1e-5, atol=1e-6)
    for name, layer_probs in features.attention_probs.items():
        height, width = features.resolutions[name]
        assert layer_probs.shape == (2, height * width, TOKENS)
        torch.testing.assert_close(layer_probs.sum(-1), torch.ones(2, height * width))


# Finding layers, resolutions, features


def test_layers_are_found_in_forward_order(unet):
    layers = find_cross_attention_layers(unet)
    called = []
    hooks = [
        layer.register_forward_pre_hook(lambda module, args, name=name: called.append(name))
        for name, layer in layers.items()
    ]
    predict(unet)
    for hook in hooks:
        hook.remove()
    assert len(layers) == 7
    assert called == list(layers)


def test_a_model_without_cross_attention_is_refused():
    with pytest.raises(ValueError, match="no cross-attention"):
        find_cross_attention_layers(nn.Linear(2, 2))


@pytest.mark.parametrize(("size", "half"), [((8, 8), (4, 4)), ((4, 16), (2, 8)), ((7, 10), (4, 5)), ((2, 9), (1, 5))])
def test_resolutions_of_square_and_other_latents(unet, size, half):
    with capture_cross_attention(unet) as store, store.record():
        predict(unet, **inputs(size))
    resolutions = store.pop().resolutions
    assert list(resolutions) == list(find_cross_attention_layers(unet))
    coarse = ("down_blocks.1", "mid_block", "up_blocks.0")
    assert resolutions == {name: half if name.startswith(coarse) else size for name in resolutions}


def test_features_are_sliced_by_rows_and_resolution(unet):
    with capture_cross_attention(unet) as store, store.record():
        predict(unet)
    features = store.pop()
    second = features.rows(1, 2)
    assert second.resolutions == features.resolutions
    assert torch.equal(second.attention_probs[DOWN], features.attention_probs[DOWN][1:])
    assert torch.equal(second.queries[DOWN], features.queries[DOWN][1:])
    coarse = features.at_resolution((4, 4))
    assert set(coarse.resolutions.values()) == {(4, 4)} and len(coarse.resolutions) == 4
    assert coarse.attention_probs.keys() == coarse.queries.keys() == coarse.resolutions.keys()
    assert features.at_resolution((3, 3)) == CrossAttentionFeatures()


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(64, 64), (32, 32), (16, 16), (8, 8)], (16, 16)),
        ([(96, 64), (48, 32), (24, 16), (12, 8)], (24, 16)),
        ([(32, 32), (16, 16)], (16, 16)),
        ([(64, 64), (32, 32), (8, 8)], (32, 32)),
        ([(65, 64), (33, 32), (17, 16), (9, 8)], (17, 16)),
        ([(8, 8)], (8, 8)),
    ],
)
def test_phrase_map_resolution(sizes, expected):
    for order in (sizes, sizes[::-1]):
        assert phrase_map_resolution({f"layer{i}": size for i, size in enumerate(order)}) == expected


def test_phrase_map_resolution_needs_a_layer():
    with pytest.raises(ValueError, match="at least one layer"):
        phrase_map_resolution({})


# Capture


def test_only_the_named_layers_are_captured(unet):
    before = unet.attn_processors
    with capture_cross_attention(unet, [MIDDLE, DOWN]) as store, store.record():
        inside = unet.attn_processors
        predict(unet)
    changed = {name for name in before if inside[name] is not before[name]}
    assert changed == {f"{DOWN}.processor", f"{MIDDLE}.processor"}
    assert list(store.pop().queries) == [DOWN, MIDDLE]


@pytest.mark.parametrize("fail", [False, True])
def test_processors_and_hooks_are_restored(unet, fail):
    before, hooks = unet.attn_processors, hook_count(unet)
    try:
        with capture_cross_attention(unet) as store, store.record():
            assert hook_count(unet) > hooks
            predict(unet)
            if fail:
                raise KeyError("from inside")
    except KeyError:
        assert fail
    after = unet.attn_processors
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    assert hook_count(unet) == hooks
    assert store.recording is False


def test_nothing_is_captured_while_not_recording(unet):
    with capture_cross_attention(unet) as store:
        predict(unet)
        with pytest.raises(RuntimeError, match="no cross-attention was recorded"):
            store.pop()
        with store.record():
            predict(unet)
        store.pop()
        with pytest.raises(RuntimeError):
            store.pop()
    with store.record():
        predict(unet)
        with pytest.raises(RuntimeError):
            store.pop()


def test_nothing_is_captured_outside_of_the_unets_forward(unet):
    """Also after a forward that failed half way."""
    attn = unet.get_submodule(DOWN)
    with capture_cross_attention(unet) as store, store.record():
        with pytest.raises(RuntimeError):
            predict(unet, encoder_hidden_states=torch.randn(2, TOKENS, 5))
        attn(torch.randn(2, 64, 8), encoder_hidden_states=torch.randn(2, TOKENS, 12))
        with pytest.raises(RuntimeError, match="no cross-attention was recorded"):
            store.pop()


def test_a_recorded_forward_replaces_the_one_before(unet):
    other = torch.randn(2, 4, 4, 4)
    with capture_cross_attention(unet) as store, store.record():
        predict(unet)
        predict(unet, sample=other)
    assert store.pop().resolutions[DOWN] == (4, 4)


def test_recording_is_restored_to_what_it_was():
    store = CrossAttentionStore()
    with store.record():
        with store.record():
            pass
        assert store.recording
    assert not store.recording


@pytest.mark.parametrize("names", [["nowhere.attn2"], [DOWN, DOWN.replace("attn2", "attn1")], []])
def test_unknown_layer_names_are_refused(unet, names):
    with pytest.raises(ValueError, match="unknown cross-attention layers"):
        with capture_cross_attention(unet, names):
            pass


class IPAdapterLikeAttnProcessor(AttnProcessor2_0):
    """A subclass that may compute something else."""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda unet: unet.set_attention_slice("max"), "disable_attention_slicing"),
        (lambda unet: unet.fuse_qkv_projections(), "unfuse_qkv_projections"),
        (lambda unet: unet.set_attn_processor(IPAdapterLikeAttnProcessor()), "unload_ip_adapter"),
    ],
)
def test_other_processors_are_refused_and_left_alone(unet, change, message):
    change(unet)
    before, hooks = unet.attn_processors, hook_count(unet)
    with pytest.raises(ValueError, match=message):
        with capture_cross_attention(unet):
            pass
    after = unet.attn_processors
    assert all(after[name] is before[name] for name in before)
    assert hook_count(unet) == hooks


def test_other_processors_on_layers_that_are_not_captured_stay(unet):
    special = IPAdapterLikeAttnProcessor()
    unet.get_submodule(MIDDLE).set_processor(special)
    with capture_cross_attention(unet, [DOWN]):
        assert unet.get_submodule(MIDDLE).processor is special
    assert unet.get_submodule(MIDDLE).processor is special


def test_capturing_twice_is_refused(unet):
    with capture_cross_attention(unet, [DOWN]):
        with pytest.raises(ValueError, match="captured already"):
            with capture_cross_attention(unet):
                pass
        assert isinstance(unet.get_submodule(DOWN).processor, CapturingAttnProcessor)


def test_grouped_queries_are_refused(unet):
    parent = unet.get_submodule(DOWN.removesuffix(".attn2"))
    parent.attn2 = Attention(query_dim=8, cross_attention_dim=12, heads=4, kv_heads=2, dim_head=2)
    with pytest.raises(ValueError, match="groups its queries"):
        with capture_cross_attention(unet):
            pass


def test_checkpointing_recomputes_without_storing(lora_unet):
    """Even if the caller records during the backward."""
    lora_unet.train().enable_gradient_checkpointing()
    calls = []
    hook = lora_unet.get_submodule(DOWN).to_q.register_forward_hook(lambda *args: calls.append(1))
    with capture_cross_attention(lora_unet) as store, store.record():
        loss = predict(lora_unet).square().mean()
        features = store.pop()
        (loss + features.queries[DOWN].square().mean()).backward()
        with pytest.raises(RuntimeError, match="no cross-attention was recorded"):
            store.pop()
    hook.remove()
    assert len(calls) == 2


# Adapters


def test_adapters_off_is_the_original_model_to_the_bit():
    expected = predict(make_unet())
    unet = make_unet()
    add_lora(unet)
    assert not torch.allclose(predict(unet), expected, atol=1e-3)
    with active_adapters(unet, None):
        assert torch.equal(predict(unet), expected)


def test_active_adapters_without_any_adapter(unet):
    expected = predict(unet)
    with active_adapters(unet, None):
        assert torch.equal(predict(unet), expected)
    with pytest.raises(ValueError, match="unknown adapters"):
        with active_adapters(unet, "default"):
            pass


@pytest.mark.parametrize("names", [None, "default", "stage1", ["stage1", "default"]])
@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("disabled_before", [False, True])
def test_active_adapters_restores_state_and_flags(two_adapters, names, fail, disabled_before):
    if disabled_before:
        two_adapters.disable_adapters()
        for name, parameter in two_adapters.named_parameters():
            parameter.requires_grad_("lora_A.default" in name)
    state, before, output = adapter_states(two_adapters), flags(two_adapters), predict(two_adapters)
    assert any(before.values()) and not all(before.values())
    try:
        with active_adapters(two_adapters, names):
            assert flags(two_adapters) == before
            if names is not None:
                expected = [names] if isinstance(names, str) else names
                assert all(current == (expected, False) for current in adapter_states(two_adapters))
            if fail:
                raise KeyError("from inside")
    except KeyError:
        assert fail
    assert adapter_states(two_adapters) == state
    assert flags(two_adapters) == before
    assert torch.equal(predict(two_adapters), output)


def test_a_second_adapter_is_used_by_name(two_adapters):
    alone = make_unet()
    add_lora(alone, "stage1", seed=2)
    with active_adapters(two_adapters, "stage1"):
        teacher = predict(two_adapters)
        assert not teacher.requires_grad
    torch.testing.assert_close(teacher, predict(alone), rtol=0, atol=0)
    with active_adapters(two_adapters, "default"):
        assert not torch.allclose(predict(two_adapters), teacher, atol=1e-3)


def test_active_adapters_nest(two_adapters):
    with active_adapters(two_adapters, "stage1"):
        expected = predict(two_adapters)
        with active_adapters(two_adapters, None):
            assert not torch.allclose(predict(two_adapters), expected, atol=1e-3)
        assert torch.equal(predict(two_adapters), expected)


def test_unknown_and_merged_adapters_are_refused(two_adapters):
    for context in (active_adapters(two_adapters, "other"), adapters_per_sample(two_adapters, ["other", "default"])):
        with pytest.raises(ValueError, match="unknown adapters .*'other'.*stage1"):
            with context:
                pass
    two_adapters.fuse_lora()
    for context in (active_adapters(two_adapters, None), adapters_per_sample(two_adapters, ["stage1", "default"])):
        with pytest.raises(ValueError, match="unfuse_lora"):
            with context:
                pass


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("disabled_before", [False, True])
def test_adapters_per_sample(two_adapters, training, disabled_before):
    two_adapters.train(training)
    batch = inputs(batch_size=3)
    names = ["stage1", "__base__", "default"]
    expected = []
    for name in names:
        with active_adapters(two_adapters, None if name == "__base__" else name):
            expected.append(predict(two_adapters, **batch)[len(expected)])
    before = flags(two_adapters)
    if disabled_before:
        two_adapters.disable_adapters()
        for name, parameter in two_adapters.named_parameters():
            parameter.requires_grad_(before[name])
    state, hooks = adapter_states(two_adapters), hook_count(two_adapters)
    with adapters_per_sample(two_adapters, names):
        output = predict(two_adapters, **batch)
        assert flags(two_adapters) == before
    torch.testing.assert_close(output, torch.stack(expected), rtol=1e-5, atol=1e-5)
    assert (adapter_states(two_adapters), flags(two_adapters), hook_count(two_adapters)) == (state, before, hooks)


def test_adapters_per_sample_restores_after_an_error(two_adapters):
    state, before, hooks = adapter_states(two_adapters), flags(two_adapters), hook_count(two_adapters)
    with pytest.raises(ValueError, match="adapter_names"):
        with adapters_per_sample(two_adapters, ["default"] * 3):
            predict(two_adapters)
    assert (adapter_states(two_adapters), flags(two_adapters), hook_count(two_adapters)) == (state, before, hooks)


def test_adapters_per_sample_needs_an_adapter(unet):
    with pytest.raises(ValueError, match="no adapter"):
        with adapters_per_sample(unet, ["__base__"]):
            pass


# The two paths


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
        with dual_path(unet, *arguments, mode=mode, store=store, **kwargs) as paths:
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


@pytest.mark.parametrize("mode", DUAL_PATH_MODES)
def test_checkpointing_changes_no_gradient(lora_unet, mode):
    _, plain = run_dual_path(lora_unet, mode, checkpointing=False)
    _, checkpointed = run_dual_path(lora_unet, mode, checkpointing=True)
    assert_same_gradients(checkpointed, plain)


@pytest.mark.parametrize("mode", DUAL_PATH_MODES)
def test_the_paths_are_the_original_and_the_adapted_model(lora_unet, mode):
    paths, _ = run_dual_path(lora_unet, mode, checkpointing=False)
    base_states = torch.randn(2, TOKENS, 12, generator=torch.Generator().manual_seed(4))
    original = predict(make_unet(), encoder_hidden_states=base_states)
    torch.testing.assert_close(paths.reference_pred, original, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(paths.response_pred, predict(lora_unet), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", DUAL_PATH_MODES)
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


@pytest.mark.parametrize("mode", DUAL_PATH_MODES)
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
    _, gradients = run_dual_path(lora_unet, mode, checkpointing=True, response_unet=wrapper)
    assert wrapper.batches == batches
    _, expected = run_dual_path(lora_unet, mode, checkpointing=True)
    assert_same_gradients(gradients, expected)


@pytest.mark.parametrize("mode", DUAL_PATH_MODES)
def test_no_store_and_one_timestep_for_all_rows(lora_unet, mode):
    batch = inputs()
    states = batch["encoder_hidden_states"]
    with dual_path(lora_unet, batch["sample"], torch.tensor(50), states, states, mode=mode) as paths:
        assert paths.reference is None and paths.response is None
    expected = predict(lora_unet, timestep=torch.tensor([50, 50]))
    torch.testing.assert_close(paths.response_pred, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", DUAL_PATH_MODES)
def test_everything_is_restored_after_an_error_in_the_loss(two_adapters, mode):
    state, before, hooks = adapter_states(two_adapters), flags(two_adapters), hook_count(two_adapters)
    batch = inputs()
    states = batch["encoder_hidden_states"]
    with pytest.raises(KeyError):
        with dual_path(two_adapters, batch["sample"], batch["timestep"], states, states, mode=mode):
            raise KeyError("from the loss")
    assert (adapter_states(two_adapters), flags(two_adapters), hook_count(two_adapters)) == (state, before, hooks)


def test_unknown_mode_adapter_and_foreign_store_are_refused(lora_unet):
    batch = inputs()
    states = batch["encoder_hidden_states"]
    arguments = (lora_unet, batch["sample"], batch["timestep"], states, states)
    with pytest.raises(ValueError, match="mode must be one of"):
        with dual_path(*arguments, mode="three_pass"):
            pass
    for mode in DUAL_PATH_MODES:
        with pytest.raises(ValueError, match="unknown adapters"):
            with dual_path(*arguments, mode=mode, adapter_name="other"):
                pass
        with pytest.raises(RuntimeError, match="no cross-attention was recorded"):
            with dual_path(*arguments, mode=mode, store=CrossAttentionStore()):
                pass
