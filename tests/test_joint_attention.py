"""Tests of `joint_attention.py`, with a tiny transformer of Stable Diffusion 3.5's kind."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_processor import JointAttnProcessor2_0, PAGJointAttnProcessor2_0
from sd3_world import T5_WIDTH, joint_lora, make_transformer
from tiny_unet import hook_count, make_unet
from torch import nn

from adapters import original_rows
from joint_attention import JointAttentionCapture, capture_joint_attention, phrase_map_blocks


TOKENS = 5
NAMES = [f"transformer_blocks.{i}.attn" for i in range(4)]
MIDDLE = NAMES[1:3]


def told(size=(8, 8), batch_size=2):
    generator = torch.Generator().manual_seed(3)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "hidden_states": randn(batch_size, 4, *size),
        "timestep": torch.arange(1, batch_size + 1) * 300.0,
        "encoder_hidden_states": randn(batch_size, TOKENS, T5_WIDTH),
        "pooled_projections": randn(batch_size, 18),
    }


def predict(transformer, **kwargs):
    return transformer(**{**told(), **kwargs}, return_dict=False)[0]


@pytest.fixture
def transformer():
    return make_transformer().requires_grad_(False)


@pytest.fixture
def adapted(transformer):
    torch.manual_seed(1)
    transformer.add_adapter(joint_lora(), "style")
    return transformer


def joint_probs(transformer, name, **kwargs):
    """(B, N, S+T, S+T) of the whole softmax in a layer, and its (B, N, S, D) queries, as SDPA is given them."""
    seen, compute = [], F.scaled_dot_product_attention
    layer = transformer.get_submodule(name)

    class Spy(JointAttnProcessor2_0):
        def __call__(self, *args, **kwargs):
            F.scaled_dot_product_attention = lambda *own, **others: seen.append(own) or compute(*own, **others)
            try:
                return super().__call__(*args, **kwargs)
            finally:
                F.scaled_dot_product_attention = compute

    before = layer.processor
    layer.set_processor(Spy())
    predict(transformer, **kwargs)
    layer.set_processor(before)
    ((query, key, _),) = seen
    return (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1), query[:, :, :-TOKENS]


@pytest.mark.parametrize("norm", ["rms_norm", None])
@pytest.mark.parametrize("size", [(8, 8), (12, 6)])
def test_it_is_the_joint_softmax_renormalised_over_the_text(norm, size):
    """With a LoRA on both projections, in every layer; the last one has no text of its own to give on."""
    own, (height, width) = make_transformer(qk_norm=norm), size
    torch.manual_seed(1)
    own.add_adapter(joint_lora())
    capture = JointAttentionCapture(own)
    with torch.no_grad(), capture.store(capture.layers) as store, store.record():
        predict(own, **told(size))
    features = store.pop()
    assert list(features.attention_probs) == NAMES
    assert set(features.resolutions.values()) == {(height // 2, width // 2)}
    with torch.no_grad():
        for name in NAMES:
            joint, queries = joint_probs(own, name, **told(size))
            of_text = joint[:, :, :-TOKENS, -TOKENS:]
            share = of_text.sum(-1, keepdim=True)
            assert share.min() < 0.5  # the image attends to itself, too
            expected = (of_text / share).mean(1)
            assert features.attention_probs[name].dtype == torch.float32
            torch.testing.assert_close(features.attention_probs[name], expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(features.queries[name], queries, rtol=0, atol=0)
            assert features.queries[name].shape == (2, 2, height * width // 4, 8)


def test_the_lora_counts(adapted):
    with torch.no_grad(), capture_joint_attention(adapted) as store, store.record():
        predict(adapted)
        with_lora = store.pop()
        adapted.disable_adapters()
        predict(adapted)
        without = store.pop()
        adapted.enable_adapters()
        with original_rows(adapted, lambda size: [1]):
            predict(adapted)
        rows = store.pop()
    for name in MIDDLE:
        probs = with_lora.attention_probs[name]
        assert (probs - without.attention_probs[name]).abs().max() > 1e-3
        torch.testing.assert_close(rows.attention_probs[name][:1], probs[:1])
        torch.testing.assert_close(rows.attention_probs[name][1:], without.attention_probs[name][1:])
        torch.testing.assert_close(rows.queries[name][1:], without.queries[name][1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gradient", [False, True])
def test_capture_changes_no_output(adapted, gradient):
    """To the bit, and the dropout of a LoRA in training draws what it draws without."""
    adapted.train()
    torch.manual_seed(1)
    adapted.add_adapter(joint_lora(lora_dropout=0.5), "dropping")
    adapted.set_adapter("dropping")

    def draw(**kwargs):
        torch.manual_seed(5)
        return predict(adapted, **kwargs)

    with torch.set_grad_enabled(gradient):
        expected, again = draw(), draw()
        assert torch.equal(expected, again)
        with JointAttentionCapture(adapted).store(NAMES) as store:
            assert torch.equal(draw(), expected)
            with store.record():
                assert torch.equal(draw(), expected)
                assert torch.equal(draw(joint_attention_kwargs={"scale": 1.0}), expected)
            assert len(store.pop().attention_probs) == 4
    assert torch.equal(draw(), expected)


def test_half_precision_keeps_its_output_and_sums_to_one(transformer):
    transformer.bfloat16()
    halves = {name: value.bfloat16() for name, value in told().items()}
    with torch.no_grad(), capture_joint_attention(transformer) as store, store.record():
        recorded = predict(transformer, **halves)
    with torch.no_grad():
        assert torch.equal(recorded, predict(transformer, **halves))
    for probs in store.pop().attention_probs.values():
        assert probs.dtype == torch.float32
        torch.testing.assert_close(probs.sum(-1), torch.ones(2, 16))


def test_it_costs_nothing_while_not_recording(transformer, monkeypatch):
    monkeypatch.setattr("joint_attention.text_attention", lambda *_: pytest.fail("it was computed"))
    with torch.no_grad(), capture_joint_attention(transformer) as store:
        predict(transformer)
        with pytest.raises(RuntimeError, match="no cross-attention was recorded"):
            store.pop()


def test_checkpointing_recomputes_without_storing(adapted):
    """With the gradients that there are without it, through what was captured, too; one layer is not recorded."""
    adapted.train()
    gradients = []
    weights = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    for checkpointing in (False, True):
        if checkpointing:
            adapted.enable_gradient_checkpointing()
        with capture_joint_attention(adapted) as store:
            with store.record():
                loss = predict(adapted).square().mean()
                features = store.pop()
            for name in MIDDLE:
                loss = loss + features.attention_probs[name].square().mean() + features.queries[name].square().mean()
            loss = loss + predict(adapted, timestep=torch.ones(2)).mean()
            loss.backward()
            with pytest.raises(RuntimeError, match="no cross-attention was recorded"):
                store.pop()
        gradients.append([weight.grad.clone() for weight in weights])
        adapted.zero_grad()
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-6)
    middle = adapted.get_submodule(MIDDLE[0])
    assert any(middle.add_k_proj.lora_A["style"].weight is weight for weight in weights)


@pytest.mark.parametrize("by_block", [False, True])
def test_a_compiled_transformer_is_captured(transformer, by_block):
    with torch.no_grad(), capture_joint_attention(transformer) as store, store.record():
        expected, features = predict(transformer), store.pop()
    for module in transformer.transformer_blocks if by_block else [transformer]:
        module.compile(backend="eager", fullgraph=by_block)
    with torch.no_grad():
        assert torch.allclose(predict(transformer), expected, atol=1e-6)
        with capture_joint_attention(transformer) as store, store.record():
            assert torch.allclose(predict(transformer), expected, atol=1e-6)
            found = store.pop()
        assert torch.allclose(predict(transformer), expected, atol=1e-6)
    assert found.resolutions == features.resolutions
    for name, probs in features.attention_probs.items():
        torch.testing.assert_close(found.attention_probs[name], probs)
        torch.testing.assert_close(found.queries[name], features.queries[name])


# -------------------------------------------------------------------------------------------------- finding layers


def test_layers_are_those_of_both_in_forward_order(transformer):
    capture = JointAttentionCapture(transformer)
    assert list(capture.layers) == NAMES
    assert all(layer is transformer.get_submodule(name) for name, layer in capture.layers.items())


def test_the_layers_of_phrase_maps_are_the_middle_third(transformer):
    assert [list(phrase_map_blocks(count)) for count in (1, 2, 3, 4, 5)] == [[0], [0, 1], [1], [1, 2], [1, 2, 3]]
    assert phrase_map_blocks(24) == range(8, 16) and phrase_map_blocks(38) == range(12, 26)
    capture = JointAttentionCapture(transformer)
    assert capture.phrase_map_layers((8, 8)) == capture.phrase_map_layers((64, 128)) == MIDDLE
    with torch.no_grad(), capture.store() as store, store.record():
        predict(transformer)
    assert list(store.pop().attention_probs) == MIDDLE
    with torch.no_grad(), capture.store(NAMES[3:]) as store, store.record():
        predict(transformer)
    assert list(store.pop().attention_probs) == NAMES[3:]


def test_a_model_without_joint_attention_is_refused():
    flux = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    for model in (nn.Linear(2, 2), make_unet(), flux):  # Flux has its text before the image
        with pytest.raises(ValueError, match=f"^{type(model).__name__} has no joint attention layer"):
            JointAttentionCapture(model)


# --------------------------------------------------------------------------------------------------------- capture


@pytest.mark.parametrize("fail", [False, True])
def test_processors_and_hooks_are_restored(transformer, fail):
    before, hooks = transformer.attn_processors, hook_count(transformer)
    try:
        with capture_joint_attention(transformer) as store, store.record():
            assert hook_count(transformer) > hooks
            predict(transformer)
            if fail:
                raise KeyError("from inside")
    except KeyError:
        assert fail
    after = transformer.attn_processors
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    assert hook_count(transformer) == hooks
    assert store.recording is False


def test_nothing_is_captured_outside_of_the_transformers_forward(transformer):
    """Also after a forward that failed half way."""
    with capture_joint_attention(transformer) as store, store.record():
        with pytest.raises(RuntimeError):
            predict(transformer, pooled_projections=torch.randn(2, 5))
        transformer.get_submodule(MIDDLE[0])(torch.randn(2, 16, 16), encoder_hidden_states=torch.randn(2, 3, 16))
        with pytest.raises(RuntimeError, match="no cross-attention was recorded"):
            store.pop()


def test_skipped_layers_are_not_recorded(transformer):
    with torch.no_grad(), capture_joint_attention(transformer) as store, store.record():
        predict(transformer, skip_layers=[1])
    assert list(store.pop().attention_probs) == MIDDLE[1:]


class SD3IPAdapterLike(JointAttnProcessor2_0):
    """A subclass that may compute something else."""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda own: own.fuse_qkv_projections(), "has a FusedJointAttn.*transformer.unfuse_qkv_projections"),
        (lambda own: own.set_attn_processor(SD3IPAdapterLike()), "pipeline.unload_ip_adapter"),
        (lambda own: own.set_attn_processor(PAGJointAttnProcessor2_0()), r"set_attn_processor\(JointAttnProcessor2_0"),
    ],
)
def test_other_processors_are_refused_and_left_alone(transformer, change, message):
    change(transformer)
    before, hooks = transformer.attn_processors, hook_count(transformer)
    with pytest.raises(ValueError, match=message):
        with capture_joint_attention(transformer):
            pass
    after = transformer.attn_processors
    assert all(after[name] is before[name] for name in before)
    assert hook_count(transformer) == hooks


def test_the_remedy_of_fused_projections_is_one(transformer):
    expected = predict(transformer)
    transformer.fuse_qkv_projections()
    transformer.unfuse_qkv_projections()
    with capture_joint_attention(transformer):
        torch.testing.assert_close(predict(transformer), expected)


def test_capturing_twice_is_refused(transformer):
    with capture_joint_attention(transformer):
        processors = transformer.attn_processors
        with pytest.raises(ValueError, match="captured already"):
            with capture_joint_attention(transformer):
                pass
        assert transformer.attn_processors == processors
    assert all(type(own) is JointAttnProcessor2_0 for own in transformer.attn_processors.values())
