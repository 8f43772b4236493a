"""Tests of `adapters.py`, with a tiny UNet and its LoRA adapters."""

from copy import deepcopy

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_unet import TARGETS, adapter_states, add_lora, flags, hook_count, inputs, make_unet, predict

from adapters import Adapters, active_adapters


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
    adapters = Adapters(two_adapters)
    for context in (adapters.only("other"), adapters.per_sample(["other", "default"])):
        with pytest.raises(ValueError, match="unknown adapters .*'other'.*stage1"):
            with context:
                pass
    two_adapters.fuse_lora()
    for context in (adapters.only(None), adapters.per_sample(["stage1", "default"])):
        with pytest.raises(ValueError, match="unfuse_lora"):
            with context:
                pass


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("disabled_before", [False, True])
def test_per_sample(two_adapters, training, disabled_before):
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
    with Adapters(two_adapters).per_sample(names):
        output = predict(two_adapters, **batch)
        assert flags(two_adapters) == before
    torch.testing.assert_close(output, torch.stack(expected), rtol=1e-5, atol=1e-5)
    assert (adapter_states(two_adapters), flags(two_adapters), hook_count(two_adapters)) == (state, before, hooks)


def test_per_sample_restores_after_an_error(two_adapters):
    state, before, hooks = adapter_states(two_adapters), flags(two_adapters), hook_count(two_adapters)
    with pytest.raises(ValueError, match="adapter_names"):
        with Adapters(two_adapters).per_sample(["default"] * 3):
            predict(two_adapters)
    assert (adapter_states(two_adapters), flags(two_adapters), hook_count(two_adapters)) == (state, before, hooks)


def test_per_sample_needs_an_adapter(unet):
    with pytest.raises(ValueError, match="no adapter"):
        with Adapters(unet).per_sample(["__base__"]):
            pass


# What is found once


@pytest.mark.parametrize("names", [None, "default", "stage1", ["stage1", "default"]])
def test_the_state_is_the_one_that_peft_itself_would_set(two_adapters, names):
    """The switch writes what peft keeps to itself: every attribute of a layer is as its own switches leave it."""
    theirs = deepcopy(two_adapters)
    for layer in (module for module in theirs.modules() if isinstance(module, BaseTunerLayer)):
        if names is not None:
            layer.set_adapter(names)
        layer.enable_adapters(names is not None)
    with Adapters(two_adapters).only(names):
        for own, other in zip(two_adapters.modules(), theirs.modules(), strict=True):
            if isinstance(own, BaseTunerLayer):
                assert (own.active_adapters, own.disable_adapters) == (other.active_adapters, other.disable_adapters)
                assert vars(own).keys() == vars(other).keys()
        assert two_adapters.active_adapters() == theirs.active_adapters()
        assert torch.equal(predict(two_adapters), predict(theirs))


def test_what_peft_changes_inside_is_put_back(two_adapters):
    state, before = adapter_states(two_adapters), flags(two_adapters)
    with Adapters(two_adapters).only("default"):
        two_adapters.set_adapter("stage1")
        assert flags(two_adapters) != before
    assert (adapter_states(two_adapters), flags(two_adapters)) == (state, before)


def test_parameters_of_one_adapter_in_the_models_order(two_adapters):
    adapters = Adapters(two_adapters)
    trained = [parameter for parameter in two_adapters.parameters() if parameter.requires_grad]
    found = adapters.parameters("default")
    assert [id(parameter) for parameter in found] == [id(parameter) for parameter in trained]
    assert len(adapters.parameters("stage1")) == len(found) == 2 * len(adapters.layers)
    with pytest.raises(ValueError, match="unknown adapters"):
        adapters.parameters("other")


def test_a_dora_has_its_magnitudes_among_the_parameters(unet):
    unet.add_adapter(LoraConfig(r=2, target_modules=TARGETS, use_dora=True))
    adapters = Adapters(unet)
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    assert list(map(id, adapters.parameters("default"))) == list(map(id, trained))
    assert len(trained) == 3 * len(adapters.layers)


@pytest.mark.parametrize("fail", [False, True])
def test_dropout_is_on_for_one_adapter_alone(unet, fail):
    for name in ("stage1", "default"):
        unet.add_adapter(LoraConfig(r=2, target_modules=TARGETS, lora_dropout=0.5), adapter_name=name)
    unet.eval()

    def dropping() -> set[str]:
        return {name.rpartition(".")[2] for name, module in unet.named_modules() if module.training}

    adapters = Adapters(unet)
    try:
        with adapters.dropout("default"):
            assert dropping() == {"default"}
            if fail:
                raise KeyError("from inside")
    except KeyError:
        assert fail
    assert not dropping()


def test_an_adapter_that_came_later_is_noticed(two_adapters):
    adapters = Adapters(two_adapters)
    add_lora(two_adapters, "later")
    with pytest.raises(RuntimeError, match="made again"):
        with adapters.only(None):
            pass


def test_an_adapter_that_replaces_modules_is_refused(unet):
    unet.add_adapter(LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["conv_out"]))
    with pytest.raises(ValueError, match="modules_to_save"):
        with active_adapters(unet, None):
            pass
