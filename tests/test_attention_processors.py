"""Tests of `attention_processors.py`, with a tiny UNet of two resolutions."""

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from tiny_unet import DOWN, TOKENS, encoder_mask, hook_count, inputs, make_unet, predict
from torch import nn

from attention_processors import (
    CrossAttentionCapture,
    CrossAttentionFeatures,
    CrossAttentionStore,
    capture_cross_attention,
    find_cross_attention_layers,
    phrase_map_resolution,
)


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
    with capture_cross_attention(nn.ModuleDict({"block": nn.ModuleDict({"attn2": attn})})):
        actual = attn(hidden_states, encoder_hidden_states=states, attention_mask=mask)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_upcast_attention_takes_a_mask_in_half_precision():
    torch.manual_seed(0)
    attn = Attention(query_dim=32, cross_attention_dim=12, heads=4, dim_head=8, upcast_attention=True).bfloat16()
    hidden_states, states = torch.randn(2, 9, 32).bfloat16(), torch.randn(2, TOKENS, 12).bfloat16()
    mask = ((1 - encoder_mask())[:, None] * -10000).bfloat16()
    expected = attn(hidden_states, encoder_hidden_states=states, attention_mask=mask)
    with capture_cross_attention(nn.ModuleDict({"block": nn.ModuleDict({"attn2": attn})})):
        actual = attn(hidden_states, encoder_hidden_states=states, attention_mask=mask)
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


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


@pytest.mark.parametrize("by_block", [False, True])
def test_a_compiled_unet_is_captured(unet, by_block):
    with capture_cross_attention(unet) as store, store.record():
        expected, features = predict(unet), store.pop()
    plain = predict(unet)
    blocks = [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)]
    for module in blocks if by_block else [unet]:
        module.compile(backend="eager")
    assert torch.allclose(predict(unet), plain, atol=1e-6)
    with capture_cross_attention(unet) as store, store.record():
        assert torch.allclose(predict(unet), expected, atol=1e-6)
        found = store.pop()
    assert found.resolutions == features.resolutions
    for name, probs in features.attention_probs.items():
        torch.testing.assert_close(found.attention_probs[name], probs)
        torch.testing.assert_close(found.queries[name], features.queries[name])
    assert torch.allclose(predict(unet), plain, atol=1e-6)


# Finding layers, resolutions, features


def test_a_layer_of_no_level_is_named(unet):
    with capture_cross_attention(unet) as store, store.record():
        store.begin_forward(unet, (torch.empty(1, 4, 17, 17),), {})
        with pytest.raises(ValueError, match=r"^mid has 64 image tokens, which no halving of .*\(17, 17\) gives"):
            store.add("mid", torch.empty(1, 64, TOKENS), torch.empty(1, 2, 64, 8))


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


# Capture


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


THREE_LEVELS = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
FOUR_LEVELS = {
    "block_out_channels": (8, 8, 16, 16),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
}


@pytest.mark.parametrize("config", [{}, THREE_LEVELS, FOUR_LEVELS], ids=["two", "XL", "SD"])
@pytest.mark.parametrize("size", [(8, 8), (16, 24), (9, 14), (32, 8)])
def test_the_layers_of_phrase_maps_are_known_without_a_forward(config, size):
    """And captured alone, they see what they see among all; the others keep their processor."""
    own = make_unet(**config)
    capture = CrossAttentionCapture(own)
    latents, embeds = torch.randn(1, 4, *size), torch.randn(1, TOKENS, 12)

    def features(names):
        with torch.no_grad(), capture.store(names) as store, store.record():
            captured = {name for name, layer in capture.layers.items() if "get_attention_scores" in vars(layer)}
            own(latents, 3, embeds)
            return captured, store.pop()

    everything, seen = features(None)
    expected = seen.at_resolution(phrase_map_resolution(seen.resolutions))
    names = capture.phrase_map_layers(size)
    captured, alone = features(names)
    assert everything == set(capture.layers) and captured == set(names)
    assert names == list(expected.resolutions) and alone.resolutions == expected.resolutions
    for name in names:
        torch.testing.assert_close(alone.attention_probs[name], expected.attention_probs[name])
        torch.testing.assert_close(alone.queries[name], expected.queries[name], rtol=1e-4, atol=1e-5)


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


def test_capturing_twice_is_refused(unet):
    with capture_cross_attention(unet):
        with pytest.raises(ValueError, match="captured already"):
            with capture_cross_attention(unet):
                pass
        assert "get_attention_scores" in vars(unet.get_submodule(DOWN))
    assert "get_attention_scores" not in vars(unet.get_submodule(DOWN))


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
