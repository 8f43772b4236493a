"""Tests of `losses.py` against values worked out by hand, and of where gradients may flow."""

import pytest
import torch

from training.losses import (
    ENHANCEMENT_LOSSES,
    compose_prediction,
    diffusion_loss,
    enhancement_difference,
    enhancement_direct,
    fine_grained_loss,
    masked_diffusion_loss,
    preservation_weight,
    representation_bias,
    text_consistent_loss,
)


def random(*shape: int, seed: int = 0, requires_grad: bool = False) -> torch.Tensor:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return tensor.requires_grad_(requires_grad)


def indices(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


# ------------------------------------------------------------------------------------------ ---- diffusion, the weight


def test_masked_diffusion_loss_by_hand():
    model_pred = torch.tensor([[[[1.0, 2.0], [3.0, 5.0]], [[0.0, 0.0], [1.0, 0.0]]]], requires_grad=True)
    mask = torch.tensor([[[[1.0, 0.0], [0.5, 0.0]]]])
    loss = masked_diffusion_loss(model_pred, torch.zeros(1, 2, 2, 2), mask)
    # pixels 1 and 3 have the mean errors 1/2 and 10/2, weights 1 and 1/2
    torch.testing.assert_close(loss, torch.tensor([(0.5 + 0.5 * 5) / 1.5]))
    loss.sum().backward()
    assert (model_pred.grad[..., 1] == 0).all()
    whole = masked_diffusion_loss(model_pred, torch.zeros(1, 2, 2, 2), torch.ones(1, 1, 2, 2))
    torch.testing.assert_close(whole, diffusion_loss(model_pred, torch.zeros(1, 2, 2, 2)))
    assert masked_diffusion_loss(model_pred, torch.zeros(1, 2, 2, 2), torch.zeros(1, 1, 2, 2)).item() == 0


def test_diffusion_loss_by_hand():
    model_pred = torch.tensor([[[[1.0, 3.0]]], [[[0.0, 0.0]]]], requires_grad=True)
    target = torch.tensor([[[[0.0, 1.0]]], [[[2.0, 2.0]]]], requires_grad=True)
    loss = diffusion_loss(model_pred, target)
    assert loss.tolist() == [2.5, 4.0]
    loss.sum().backward()
    assert model_pred.grad is not None and target.grad is None


def test_preservation_weight_by_hand():
    sfcm = torch.zeros(1, 1, 4, 8, requires_grad=True)
    with torch.no_grad():
        sfcm[0, 0, :2, :2] = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
        sfcm[0, 0, 2:, 6:] = 1
    weight = preservation_weight(sfcm, (2, 4))
    assert weight.tolist() == [[0.25, 1, 1, 1, 1, 1, 1, 0]]
    assert not weight.requires_grad
    assert preservation_weight(sfcm, (4, 8)).shape == (1, 32)


# -------------------------------------------------------------------------------------------------- text-consistent


def text_inputs(**changes) -> dict:
    """Two samples, two layers of (2, 2) and (1, 2), six tokens; the full prompt has one token more in the middle."""
    inputs = {
        "response_probs": [random(2, 4, 6, seed=1).softmax(2), random(2, 2, 6, seed=2).softmax(2)],
        "reference_probs": [random(2, 4, 6, seed=3).softmax(2), random(2, 2, 6, seed=4).softmax(2)],
        "resolutions": [(2, 2), (1, 2)],
        "sfcm": torch.zeros(2, 1, 4, 4),
        "base_positions": indices([1, 2], [1, 2]),
        "full_positions": indices([1, 3], [1, 3]),
        "position_mask": torch.ones(2, 2, dtype=torch.bool),
        "base_padding": torch.tensor([[0, 0, 0, 1, 1, 1]] * 2).bool(),
        "full_padding": torch.tensor([[0, 0, 0, 0, 1, 1]] * 2).bool(),
    }
    return {**inputs, **changes}


def test_text_consistent_by_hand():
    response, reference = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)
    response[0, 0] = torch.tensor([0.0, 0.5, 0.1, 0.3])
    reference[0, 0] = torch.tensor([0.0, 0.2, 0.6, 0.2])
    response[0, 1] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    sfcm = torch.zeros(1, 1, 1, 2)
    sfcm[..., 0] = 0.25
    loss = text_consistent_loss(
        [response],
        [reference],
        [(1, 2)],
        sfcm,
        base_positions=indices([1]),
        full_positions=indices([2]),
        position_mask=torch.ones(1, 1, dtype=torch.bool),
        base_padding=torch.tensor([[False, False, True, True]]),
        full_padding=torch.tensor([[False, False, False, True]]),
    )
    # The token: (.1 - .2)^2, the padding: (.3 - (.6 + .2) / 2)^2, both at the first of two places, of weight .75.
    torch.testing.assert_close(loss, torch.tensor([0.75 * (0.01 + 0.01) / 2 / 2]))


def test_equal_maps_at_shifted_positions_cost_nothing():
    reference = random(1, 4, 6).softmax(2)
    # BOS, a, b, PAD x 3 becomes BOS, a, new, b, PAD x 2.
    response = torch.stack(
        [reference[..., 0], reference[..., 1], torch.full((1, 4), 0.9), reference[..., 2]]
        + [reference[..., 3:].mean(2)] * 2,
        dim=2,
    )
    inputs = text_inputs(
        response_probs=[response.expand(2, -1, -1)],
        reference_probs=[reference.expand(2, -1, -1)],
        resolutions=[(2, 2)],
    )
    torch.testing.assert_close(text_consistent_loss(**inputs), torch.zeros(2), atol=1e-12, rtol=0)
    # By equal index they would differ.
    inputs["full_positions"] = inputs["base_positions"]
    assert (text_consistent_loss(**inputs) > 1e-3).all()


def test_the_padding_alone_counts():
    shared = random(2, 4, 6, seed=1).softmax(2)
    same = text_inputs(
        response_probs=[shared], reference_probs=[shared], resolutions=[(2, 2)], full_positions=indices([1, 2], [1, 2])
    )
    same["full_padding"] = same["base_padding"]
    assert (text_consistent_loss(**same) == 0).all()
    same["full_padding"] = ~same["base_padding"]
    assert (text_consistent_loss(**same) > 0).all()


def test_text_consistent_is_the_mean_over_layers():
    inputs = text_inputs()
    layers = [
        text_consistent_loss(
            **{
                **inputs,
                **{key: inputs[key][i : i + 1] for key in ("response_probs", "reference_probs", "resolutions")},
            }
        )
        for i in range(2)
    ]
    torch.testing.assert_close(text_consistent_loss(**inputs), (layers[0] + layers[1]) / 2)


def test_a_shorter_prompt_may_be_padded():
    alone = text_consistent_loss(
        **text_inputs(
            base_positions=indices([1], [1]),
            full_positions=indices([3], [3]),
            position_mask=torch.ones(2, 1, dtype=torch.bool),
        )
    )
    padded = text_consistent_loss(
        **text_inputs(
            base_positions=indices([1, 2], [1, 5]),
            full_positions=indices([1, 3], [3, 0]),
            position_mask=torch.tensor([[True, True], [True, False]]),
        )
    )
    torch.testing.assert_close(padded[1], alone[1])
    torch.testing.assert_close(padded[0], text_consistent_loss(**text_inputs())[0])


def test_a_prompt_without_any_matched_token_keeps_its_padding():
    nothing = torch.zeros(2, 0, dtype=torch.long)
    loss = text_consistent_loss(
        **text_inputs(base_positions=nothing, full_positions=nothing, position_mask=nothing.bool())
    )
    assert loss.shape == (2,) and (loss > 0).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_nothing_is_kept_inside_the_map(seed):
    assert (text_consistent_loss(**text_inputs(sfcm=torch.ones(2, 1, 4, 4))) == 0).all()
    query = [random(2, 3, 4, 5, seed=seed)]
    assert (fine_grained_loss(query, [query[0] + 1], [(2, 2)], torch.ones(2, 1, 4, 4)) == 0).all()


def test_text_consistent_gradient_is_the_responses_alone():
    response = [random(2, 4, 6, seed=1, requires_grad=True), random(2, 2, 6, seed=2, requires_grad=True)]
    reference = [random(2, 4, 6, seed=3, requires_grad=True), random(2, 2, 6, seed=4, requires_grad=True)]
    sfcm = torch.full((2, 1, 4, 4), 0.5, requires_grad=True)
    inputs = text_inputs(response_probs=response, reference_probs=reference, sfcm=sfcm)
    text_consistent_loss(**inputs).sum().backward()
    for layer in response:
        # Matched tokens and padding; not BOS, nor the new token.
        assert (layer.grad.abs().sum((0, 1)) > 0).tolist() == [False, True, False, True, True, True]
    assert all(layer.grad is None for layer in reference) and sfcm.grad is None


# ------------------------------------------------------------------------------------------------------ fine-grained


def test_fine_grained_by_hand():
    reference = torch.full((1, 2, 2, 3), 2.0)
    response = reference.clone()
    response[:, :, 0] += 1  # the first of two places, half inside the map
    response[:, :, 1] += 2
    sfcm = torch.tensor([[[[0.5, 0.0]]]])
    # (.5 * 1 + 1 * 4) / 2, over the mean square of the reference, 4.
    torch.testing.assert_close(fine_grained_loss([response], [reference], [(1, 2)], sfcm), torch.tensor([2.25 / 4]))
    layers = fine_grained_loss([response, reference], [reference, reference], [(1, 2), (1, 2)], sfcm)
    torch.testing.assert_close(layers, torch.tensor([2.25 / 8]))


def test_fine_grained_does_not_depend_on_a_layers_scale():
    response, reference = random(2, 3, 4, 5, seed=1), random(2, 3, 4, 5, seed=2)
    sfcm = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    loss = fine_grained_loss([response, response], [reference, reference], [(2, 2)] * 2, sfcm)
    scaled = fine_grained_loss([response, 100 * response], [reference, 100 * reference], [(2, 2)] * 2, sfcm)
    torch.testing.assert_close(scaled, loss)


def test_fine_grained_is_per_sample():
    response, reference = random(2, 3, 4, 5, seed=1), random(2, 3, 4, 5, seed=2)
    response[1] = reference[1]
    loss = fine_grained_loss([response], [reference], [(2, 2)], torch.zeros(2, 1, 4, 4))
    assert loss[0] > 0 and loss[1] == 0


def test_fine_grained_gradient_is_the_responses_alone():
    response, reference = random(2, 3, 4, 5, seed=1, requires_grad=True), random(2, 3, 4, 5, requires_grad=True)
    sfcm = torch.zeros(2, 1, 2, 2)
    sfcm[..., 0, 0] = 1
    sfcm.requires_grad_()
    fine_grained_loss([response], [reference], [(2, 2)], sfcm).sum().backward()
    assert (response.grad.abs().sum((0, 1, 3)) > 0).tolist() == [False, True, True, True]
    assert reference.grad is None and sfcm.grad is None


def test_half_precision_losses_are_computed_in_full():
    response, reference = 300 + random(1, 1, 4, 2), 300 * torch.ones(1, 1, 4, 2)
    loss = fine_grained_loss([response.half()], [reference.half()], [(2, 2)], torch.zeros(1, 1, 2, 2))
    # 300 squared is beyond what half precision holds.
    assert loss.dtype == torch.float32 and 0 < loss < 1e-3


# ------------------------------------------------------------------------------------------------------- enhancement


def test_representation_bias_is_of_unit_vectors():
    bias = representation_bias(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 7.0]]))
    torch.testing.assert_close(bias, torch.tensor([[0.6, -0.2]]))


def test_enhancement_difference_by_hand():
    text = torch.tensor([[1.0, 0.0]])
    predicted, image = torch.tensor([[-5.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    # The biases (-2, 0) and (-1, 1) are 45 degrees apart.
    torch.testing.assert_close(enhancement_difference(predicted, image, text), torch.tensor([1 - 0.5**0.5]))


def test_enhancement_difference_is_zero_for_the_portrait_itself():
    image, text = random(3, 8), random(3, 8, seed=1)
    torch.testing.assert_close(enhancement_difference(2 * image, image, text), torch.zeros(3), atol=1e-6, rtol=0)
    assert (enhancement_difference(random(3, 8, seed=2), image, text) > 0.01).all()


def test_direct_enhancement_is_the_clip_score():
    text = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    predicted = torch.tensor([[2.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])
    torch.testing.assert_close(enhancement_direct(predicted, predicted, text), torch.tensor([0.0, 1.0, 2.0]))
    torch.testing.assert_close(
        enhancement_direct(predicted, random(3, 2), text), enhancement_direct(predicted, predicted, text)
    )


@pytest.mark.parametrize("name", ENHANCEMENT_LOSSES)
def test_enhancement_trains_the_prediction_alone(name):
    predicted, image = random(3, 8, requires_grad=True), random(3, 8, seed=1, requires_grad=True)
    loss = ENHANCEMENT_LOSSES[name](predicted, image, random(3, 8, seed=2))
    assert loss.shape == (3,) and loss.min() >= 0 and loss.max() <= 2
    loss.sum().backward()
    assert (predicted.grad.norm(dim=1) > 0).all() and image.grad is None


# -------------------------------------------------------------------------------------------------------- composition


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_composition_at_the_ends_of_the_map(gamma):
    reference, full, base = random(2, 4, 3, 5), random(2, 4, 3, 5, seed=1), random(2, 4, 3, 5, seed=2)
    nowhere, everywhere = torch.zeros(2, 1, 3, 5), torch.ones(2, 1, 3, 5)
    assert torch.equal(compose_prediction(reference, full, base, nowhere, gamma, 2, 0.5), reference)
    torch.testing.assert_close(compose_prediction(reference, full, base, everywhere, gamma), full)


def test_composition_by_hand():
    reference, full, base = (torch.full((1, 2, 1, 2), value) for value in (1.0, 9.0, 5.0))
    sfcm = torch.tensor([[[[0.5, 0.25]]]])
    assert compose_prediction(reference, full, base, sfcm)[0].tolist() == [[[5.0, 3.0]]] * 2
    assert compose_prediction(reference, full, base, sfcm, gamma=2)[0].tolist() == [[[3.0, 1.5]]] * 2
    assert compose_prediction(reference, full, base, sfcm, scale=3)[0].tolist() == [[[13.0, 7.0]]] * 2
    assert compose_prediction(reference, full, base, sfcm, base_weight=0.5)[0].tolist() == [[[4.0, 2.5]]] * 2
    # the change without the target is taken away before the scale
    assert compose_prediction(reference, full, base, sfcm, scale=3, base_weight=1)[0].tolist() == [[[7.0, 4.0]]] * 2


def test_the_composed_target_carries_no_gradient():
    composed = compose_prediction(
        *(random(1, 4, 2, 2, seed=seed, requires_grad=True).half() for seed in range(3)),
        torch.ones(1, 1, 2, 2, requires_grad=True),
        base_weight=0.5,
    )
    assert not composed.requires_grad and composed.dtype == torch.float32
