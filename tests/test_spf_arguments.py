"""Tests of `spf_arguments.py`, in calls of the pipeline."""

import pytest
import torch
from pipeline_world import BASE, OTHER, TARGET, draw, state


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_phrases": ["a woman"]}, "target_prompt"),
        ({"free_phrases": ["a woman"]}, "target_prompt"),
        ({"sfcm_guidance": 0.5}, "target_prompt"),
        ({"target_prompt": TARGET, "free_phrases": ["a woman"]}, "return_sfcm"),
        ({"target_prompt": TARGET, "free_phrases": ["a dog"], "return_sfcm": True}, "'a dog' is not in the base"),
        ({"target_prompt": TARGET, "free_phrases": "a woman", "return_sfcm": True}, "free_phrases"),
        ({"target_prompt": TARGET, "sfcm_guidance": 1.5}, r"sfcm_guidance.*\[0, 1\].*1.5"),
        ({"target_prompt": TARGET, "sfcm_guidance": float("nan")}, "sfcm_guidance"),
        ({"target_prompt": TARGET, "sfcm_guidance": 1.0, "sfcm_guidance_exponent": 0.0}, "exponent.*positive"),
        ({"sfcm_guidance_start": 5.0}, "`sfcm_guidance_start`.* `target_prompt`"),
        ({"target_prompt": TARGET, "sfcm_guidance_start": 0}, "`sfcm_guidance_start` has to be positive.* 0[.]$"),
        ({"target_prompt": TARGET, "sfcm_guidance_start": -1.0}, "`sfcm_guidance_start` .* -1.0"),
        ({"target_prompt": TARGET, "sfcm_guidance_start": float("inf")}, "`sfcm_guidance_start` .* inf"),
        ({"target_prompt": TARGET, "sfcm_guidance_start": float("nan")}, "`sfcm_guidance_start` .* nan"),
        ({"target_prompt": TARGET, "sfcm_guidance_start": True}, "`sfcm_guidance_start` .* True"),
        ({"target_prompt": TARGET, "sfcm_guidance_start": "late"}, "`sfcm_guidance_start` .* 'late'"),
        ({"target_prompt": TARGET, "return_sfcm": "all"}, "return_sfcm.*per_step"),
        ({"target_prompt": {"hair": TARGET}}, r"\['hair'\].*loaded are \['style'\]"),
        ({"target_prompt": {"style": 3}}, "a dict by adapter"),
        ({"target_prompt": TARGET, "target_scale": {"hair": 1.0}}, r"\['hair'\].*active.*\['style'\]"),
        ({"target_prompt": TARGET, "target_scale": [1.0, 0.5]}, "2 strengths for 1 targets"),
        ({"target_prompt": TARGET, "target_scale": "strong"}, "target_scale.*numbers.*'strong'"),
        ({"target_prompt": TARGET, "target_scale": float("nan")}, "target_scale.*numbers.*nan"),
        ({"target_prompt": TARGET, "sfcm_guidance": "strong"}, r"sfcm_guidance.*\[0, 1\].*'strong'"),
        ({"target_prompt": TARGET, "sfcm_guidance": 1.0, "sfcm_guidance_exponent": None}, "exponent.*positive.*None"),
        ({"target_prompt": TARGET, "sfcm_mode": ["paper"]}, "sfcm_mode.*averaged.*'paper'"),
        ({"return_sfcm": True, "prompt": "a"}, "no phrase"),
        ({"target_prompt": TARGET, "sfcm_mode": "best"}, "sfcm_mode.*averaged.*'best'"),
        ({"target_prompt": TARGET, "prompt": None, "prompt_embeds": torch.zeros(1, 77, 16)}, "prompt_embeds"),
        ({"return_sfcm": True, "prompt": None, "prompt_embeds": torch.zeros(1, 77, 16)}, "prompt_embeds"),
        ({"target_prompt": TARGET, "prompt": None}, "prompt"),
        (
            {"target_prompt": TARGET, "negative_prompt": "bad", "negative_prompt_embeds": torch.zeros(1, 77, 16)},
            "both",
        ),
        ({"compare": True, "prompt": None}, "prompt"),
        ({"target_prompt": TARGET, "prompt": []}, "`prompt` has to be"),
        ({"target_prompt": ""}, "empty"),
        ({"target_prompt": ("a hat", "a scarf")}, "'a hat' is not in the base prompt"),
        ({"target_prompt": ("a woman", "a man", "a boy")}, "a pair"),
        ({"target_prompt": [["a hat", "a scarf"]]}, "a pair"),
        ({"target_prompt": [("a hat", "a scarf", "a tie")]}, "a pair"),
        ({"target_prompt": [("a hat", "a scarf")]}, "'a hat' is not in the base prompt"),
        ({"target_prompt": "a woman"}, "already a phrase"),
        ({"target_prompt": "with very red hair " * 20}, "does not fit"),
        ({"target_prompt": TARGET, "prompt": "a hat, " * 3000}, "base prompt has 21000 characters, more than"),
        ({"return_sfcm": True, "prompt": "a hat, " * 3000}, "prompt has 21000 characters, more than"),
        ({"target_prompt": TARGET, "base_phrases": "a woman"}, "base_phrases"),
        ({"target_prompt": TARGET, "base_phrases": ["a dog"]}, "'a dog' is not in the base prompt"),
        ({"target_prompt": TARGET, "prompt": [BASE, OTHER], "base_phrases": ["a woman", "a man"]}, "2 prompts"),
        ({"target_prompt": TARGET, "prompt": [BASE, OTHER], "base_phrases": [["a woman"]]}, "2 prompts"),
        ({"target_prompt": TARGET, "compare": True, "return_dict": False}, "return_dict"),
        ({"target_prompt": TARGET, "return_sfcm": True, "return_dict": False}, "return_dict"),
        ({"target_prompt": TARGET, "compare": True, "latents": torch.zeros(2, 4, 8, 8)}, "latents.*2 rows but 1"),
        ({"target_prompt": TARGET, "compare": True, "seed": [1, 2]}, "generator.*2 rows but 1"),
        ({"target_prompt": TARGET, "compare": True, "return_sfcm": True, "height": 20, "width": 20}, "divisible by 8"),
    ],
)
def test_wrong_arguments_are_told_before_the_first_step(world, arguments, message):
    before = state(world.ours)
    alarm = world.ours.unet.register_forward_pre_hook(lambda *_: pytest.fail("a step was taken"))
    try:
        with pytest.raises(ValueError, match=message):
            draw(world.ours, **{"prompt": BASE, **arguments})
    finally:
        alarm.remove()
    assert state(world.ours) == before


@pytest.mark.parametrize("generator", [0, [torch.Generator(), 1]])
@pytest.mark.parametrize("arguments", [{}, {"target_prompt": TARGET, "compare": True}])
def test_a_seed_is_no_generator(world, generator, arguments):
    with pytest.raises(ValueError, match=r"^`generator` has to be a torch.Generator.*manual_seed\(seed\)"):
        world.ours(BASE, generator=generator, num_inference_steps=1, **arguments)


@pytest.mark.parametrize(
    ("prompt", "arguments", "words"),
    [
        ("a man, (a coat:1.2)", {}, ["'(a coat:1.2)' in a prompt is read as words"]),
        ("a man, <lora:a:1>", {"target_prompt": TARGET}, ["'<lora:a:1>' in a prompt is read as words"]),
        ("a man", {"negative_prompt": "[[a cap]]"}, ["'[[a cap]]' in a prompt is read as words"]),
        ("a man", {"target_prompt": "((a tie))"}, ["'((a tie))' in a prompt is read as words"]),
        ("a man, black hair", {"target_prompt": TARGET}, ["'black hair' in the prompt may contradict", repr(TARGET)]),
        ("a man, green hair", {"target_prompt": ("green hair", TARGET)}, None),
        ("a man, a hat", {"target_prompt": TARGET}, None),
    ],
)
def test_what_a_prompt_cannot_mean_is_said_once(world, caplog, prompt, arguments, words):
    for _ in range(2):
        draw(world.ours, prompt, **arguments)
    messages = [record.getMessage() for record in caplog.records if record.name == "spf_arguments"]
    assert len(messages) == (0 if words is None else 1)
    assert all(word in message for message in messages for word in words)


def test_a_strength_without_a_lora_is_refused(bare_world):
    with pytest.raises(ValueError, match="none is loaded"):
        draw(bare_world.ours, BASE, target_scale=0.5)
