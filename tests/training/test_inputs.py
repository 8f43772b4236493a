"""Tests of what a run is made from: data of every kind, and wrong flags and rows, which end it with one line."""

import shutil

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from test_train import ROWS, WEIGHTS, copy_model, difference, forbidden, make_flags, train, write_data
from transformers import CLIPModel

from training.arguments import parse_args
from training.inputs import check_inputs


def changed_rows(**changes) -> list[dict]:
    return [{key: value for key, value in {**row, **changes}.items() if value is not None} for row in ROWS]


REPLACED = [
    {**row, "target_prompt": "a scarf", "full_prompt": row["base_prompt"].rsplit("a ", 1)[0] + "a scarf"}
    for row in ROWS
]


@pytest.mark.parametrize(
    "rows, flags, full_prompt, phrases",
    [
        (ROWS, {}, "a woman, a green hat, red hair", ("a woman", "a green hat")),
        (REPLACED, {}, "a woman, a scarf", ("a woman",)),
        (
            changed_rows(target_prompt=None),
            {"target_prompt": "a red scarf"},
            "a woman, a green hat, a red scarf",
            None,
        ),
        (changed_rows(target_prompt=["red hair", ["a woman", "a man"]])[:1], {}, "a man, a green hat, red hair", None),
        (changed_rows(base_phrases=["hat"]), {}, "a woman, a green hat, red hair", ("hat",)),
        (
            [{**row, "caption": row["base_prompt"], "base_prompt": "x"} for row in ROWS],
            {"base_prompt_column": "caption"},
            "a woman, a green hat, red hair",
            None,
        ),
    ],
    ids=["addition", "replacement", "one target", "several targets", "phrases", "column"],
)
def test_data_of_every_kind(world, tmp_path, rows, flags, full_prompt, phrases):
    data = write_data(tmp_path / "data", rows)
    inputs = check_inputs(parse_args(make_flags(world, tmp_path / "output", train_data_dir=data, **flags)))
    pair = inputs.pairs[0]
    assert pair.full_prompt == full_prompt and inputs.validation_pair == pair
    assert phrases is None or pair.base_phrases == phrases


def test_without_a_resolution_it_is_the_models_own_size(world, tmp_path):
    """8 x 8 latents of 2 x 2 pixels; a configuration without a size asks for the flag."""
    flags = {"resolution": None}
    assert check_inputs(parse_args(make_flags(world, tmp_path / "output", **flags))).sizes == ((16, 16),)
    model = copy_model(world, tmp_path, {"unet/config.json": {"sample_size": None}})
    with pytest.raises(ValueError, match="^--resolution is needed: the configuration of .* names no size$"):
        check_inputs(parse_args(make_flags(world, tmp_path / "output", **flags, pretrained_model_name_or_path=model)))


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(REPLACED, id="one"),
        pytest.param(
            changed_rows(target_prompt=["red hair", ["a woman", "a man"]])[:1], id="several", marks=pytest.mark.slow
        ),
    ],
)
def test_prompts_with_replacements_train(world, tmp_path, rows):
    data = write_data(tmp_path / "data", rows)
    flags = {"stage1_steps": 1, "stage2_steps": 1, "stage2_objective": "both", "num_validation_images": 1}
    output = train(world, tmp_path / "output", train_data_dir=data, **flags)
    assert (output / WEIGHTS).is_file()


def test_a_saved_dataset(world, trained, tmp_path):
    import datasets

    columns = {name: [row[name] for row in ROWS] for name in ("base_prompt", "target_prompt")}
    images = [str(world.data / row["file_name"]) for row in ROWS]
    dataset = datasets.Dataset.from_dict({"picture": images, **columns})
    dataset.cast_column("picture", datasets.Image()).save_to_disk(str(tmp_path / "saved"))
    output = train(
        world, tmp_path / "output", train_data_dir=None, dataset_name=tmp_path / "saved", image_column="picture"
    )
    assert difference(output, trained()) == 0


def test_max_train_samples(world, tmp_path):
    inputs = check_inputs(parse_args(make_flags(world, tmp_path / "output", max_train_samples=4)))
    assert len(inputs.rows) == 4 and len(inputs.pairs) == 4 + 3


def test_a_dry_run_prints_prompts_and_writes_nothing(world, tmp_path, capsys, monkeypatch):
    for large in (UNet2DConditionModel, AutoencoderKL, CLIPModel):
        monkeypatch.setattr(large, "from_pretrained", forbidden)
    monkeypatch.chdir(tmp_path)
    data = write_data(tmp_path / "data", [*ROWS[:2], {**ROWS[0], "file_name": "2.png"}, *REPLACED[3:4]])
    train(world, tmp_path / "output", train_data_dir=data, dry_run=True, report_to="tensorboard")
    printed = capsys.readouterr().out
    tokens = world.tokenizer.convert_ids_to_tokens(world.tokenizer("a woman, a green hat, red hair").input_ids)
    target = ", ".join(str(i) for i in range(tokens.index("red</w>"), len(tokens) - 1))
    assert f"{data / 'metadata.jsonl'}, line 1\n" in printed
    assert "base prompt  a woman, a green hat\n  full prompt  a woman, a green hat, red hair\n" in printed
    assert f"target       red hair  (tokens {target} of the full prompt)" in printed
    assert "phrase       a woman  (tokens 1, 2, CLIP distance " in printed
    assert "full prompt  a man, a scarf" in printed
    assert printed.count("base prompt") == 3 and "4 portraits, 3 different pairs of prompts." in printed
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


# test_command_line.py runs each of them through a command line, too.
WRONG_FLAGS = [
    ({"stage1_steps": 0, "stage2_steps": 0}, ["--stage1_steps and --stage2_steps", "0"]),
    ({"stage1_steps": -1}, ["--stage1_steps", "-1"]),
    ({"lambda_text": -0.5}, ["--lambda_text", "-0.5"]),
    ({"lambda_fine": -1}, ["--lambda_fine", "-1"]),
    ({"lambda_enh": -1}, ["--lambda_enh", "-1"]),
    ({"lambda_base": "nan"}, ["--lambda_base", "nan"]),
    ({"rank": 0}, ["--rank", "0"]),
    ({"lora_alpha": -4}, ["--lora_alpha", "-4"]),
    ({"learning_rate": 0}, ["--learning_rate", "0"]),
    ({"learning_rate": "inf"}, ["--learning_rate", "inf"]),
    ({"train_batch_size": 0}, ["--train_batch_size", "0"]),
    ({"base_prompt_share": 1}, ["--base_prompt_share", "1"]),
    ({"base_prompt_share": "nan"}, ["--base_prompt_share", "nan"]),
    ({"sfcm_timesteps": (900, 100)}, ["--sfcm_timesteps", "900", "100"]),
    ({"sfcm_timesteps": (900, 1001)}, ["--sfcm_timesteps", "1001", "1000"]),
    ({"sfcm_mode": "nonsense"}, ["--sfcm_mode", "nonsense", "averaged"]),
    ({"lr_scheduler": "piecewise_constant"}, ["--lr_scheduler", "piecewise_constant", "cosine"]),
    ({"adam_beta1": 1.0}, ["--adam_beta1", "1.0"]),
    ({"adam_beta2": -0.1}, ["--adam_beta2", "-0.1"]),
    ({"seed": -1}, ["--seed", "-1"]),
    ({"seed": 2**32}, ["--seed", str(2**32)]),
    ({"max_train_samples": 0}, ["--max_train_samples", "0"]),
    ({"report_to": "nonsense"}, ["--report_to", "nonsense"]),
    ({"stage1_lora_path": "somewhere"}, ["--stage1_lora_path", "somewhere"]),
    ({"stage1_lora_path": "."}, ["--stage1_lora_path", "--stage1_steps 0"]),
    ({"alignment_phrase_dropout": 1}, ["--alignment_phrase_dropout", "1"]),
    ({"teacher_scale": -1}, ["--teacher_scale", "-1"]),
    ({"teacher_base_weight": 1.5}, ["--teacher_base_weight", "1.5"]),
    ({"composed_timestep_power": -1}, ["--composed_timestep_power", "-1"]),
    ({"stage1_steps": 0}, ["--stage2_objective composed", "--stage1_steps", "--stage1_lora_path"]),
    ({"resolution": 18}, ["--resolution", "18", "4"]),
    ({"train_data_dir": "missing"}, ["--train_data_dir", "missing"]),
    ({"train_data_dir": None}, ["--train_data_dir", "--dataset_name"]),
    ({"dataset_name": "x"}, ["--train_data_dir", "--dataset_name"]),
    ({"base_prompt_column": "text"}, ["metadata.jsonl, line 1", "'text'", "--base_prompt_column"]),
    ({"target_prompt": " "}, ["--target_prompt"]),
    ({"free_phrases": ("a woman", " ")}, ["--free_phrases", "empty"]),
    ({"free_phrases": ("a woman", "a cat")}, ["--free_phrases", "'a cat'", "no base prompt"]),
    ({"free_phrases": "red hair"}, ["--free_phrases", "'red hair'"]),
    ({"free_phrases_column": "loose"}, ["--free_phrases_column", "'loose'"]),
    ({"pretrained_model_name_or_path": "missing"}, ["--pretrained_model_name_or_path", "missing"]),
    (
        {"clip_model_name_or_path": "missing", "stage2_objective": "paper"},
        ["--clip_model_name_or_path", "missing"],
    ),
    ({"validation_target_prompt": "a woman"}, ["--validation_target_prompt", "'a woman'"]),
    ({"validation_base_prompt": "", "validation_target_prompt": "a hat"}, ["--validation_base_prompt"]),
    *(
        ({name: 0}, [f"--{name}", "at least 1", "got 0"])
        for name in (
            "gradient_accumulation_steps", "num_alignment_images", "alignment_inference_steps", "sfcm_noise_samples",
            "validation_inference_steps", "resolution", "repeats", "enhancement_every", "checkpoints_total_limit",
            "lr_num_cycles",
        )
    ),
    *(
        ({name: -1}, [f"--{name}", "0 or more", "got -1"])
        for name in (
            "stage2_steps", "lr_warmup_steps", "num_validation_images", "validation_steps", "sfcm_refresh_steps",
            "adam_weight_decay", "alignment_guidance_scale", "validation_guidance_scale", "dataloader_num_workers",
            "noise_offset", "checkpointing_steps",
        )
    ),
    *(
        ({name: 0}, [f"--{name}", "above 0", "got 0"])
        for name in ("sfcm_gamma", "max_grad_norm", "adam_epsilon", "lr_power", "snr_gamma")
    ),
    ({"lora_dropout": 1}, ["--lora_dropout", "[0, 1)", "1.0"]),
    *(
        ({name: "polynomial", "learning_rate": 1e-7}, [f"--{name} polynomial", "--learning_rate", "1e-07"])
        for name in ("lr_scheduler", "stage2_lr_scheduler")
    ),
    ({"rank": "many"}, ["--rank", "'many'"]),
    ({"nonsense": 1}, ["--nonsense=1"]),
    ({"aspect_ratio_buckets": " "}, ["--aspect_ratio_buckets is empty"]),
    ({"aspect_ratio_buckets": "16x16"}, ["--aspect_ratio_buckets", "'16x16'"]),
    ({"aspect_ratio_buckets": "16,16;"}, ["--aspect_ratio_buckets", "''"]),
    ({"aspect_ratio_buckets": "16,16;18,16"}, ["--aspect_ratio_buckets", "'18,16'", "multiples of 4"]),
    ({"aspect_ratio_buckets": "16,16;16, 16"}, ["--aspect_ratio_buckets", "'16, 16'", "twice"]),
    ({"lora_layers": "attn2.to_k,,attn2.to_v"}, ["--lora_layers", "'attn2.to_k,,attn2.to_v'"]),
    ({"lora_layers": "attn2.to_k,attn7.to_v"}, ["--lora_layers", "'attn7.to_v'"]),
    ({"no-center_crop": True}, ["--no-center_crop", "--no-cache_latents"]),
    ({"preservation": "love"}, ["--preservation", "'love'", "mask"]),
    ({"preservation": "dop", "stage2_steps": -1}, ["--stage2_steps", "-1"]),
    ({"preservation": "dop", "stage1_lora_path": "."}, ["--preservation dop", "--stage1_lora_path"]),
    ({"preservation_weight": 2}, ["--preservation_weight", "--preservation prior, dop and cat"]),
    ({"preservation": "cat", "preservation_weight": -1}, ["--preservation_weight", "-1"]),
    ({"unrelated_prompts": "a dog"}, ["--unrelated_prompts", "--preservation cat"]),
    ({"preservation": "cat", "unrelated_prompts": "a dog " * 60}, ["--unrelated_prompts", "77"]),
    ({"preservation": "mask"}, ["line 1", "mask_file_name"]),
    ({"sfcm_dir": "missing"}, ["--sfcm_dir missing", "00000.png does not exist", "3 portraits"]),
    ({"sfcm_dir": ".", "sfcm_refresh_steps": 5}, ["--sfcm_refresh_steps", "--sfcm_dir"]),
    ({"sfcm_dir": ".", "stage2_steps": 0}, ["--sfcm_dir", "stage 2"]),
    ({"save_alignment": True, "preservation": "prior"}, ["--save_alignment", "stage 2"]),
    ({"use_dora": True, "dual_path": "single_pass"}, ["--use_dora", "--dual_path"]),
    ({"reference_lora": "missing"}, ["--reference_lora missing", "no such file or folder"]),
    ({"reference_lora": ".", "use_dora": True}, ["--use_dora", "--reference_lora"]),
    ({"reference_lora": ".", "reference_lora_scale": (1, 2)}, ["--reference_lora_scale", "2", "--reference_lora 1"]),
    ({"reference_target_prompt": "a hat"}, ["--reference_target_prompt", "--reference_lora"]),
    ({"tiny_vae_model_name_or_path": "missing"}, ["--tiny_vae_model_name_or_path", "enhancement loss"]),
    (
        {"tiny_vae_model_name_or_path": "missing", "stage2_objective": "paper"},
        ["--tiny_vae_model_name_or_path", "missing"],
    ),
    ({"pretrained_vae_model_name_or_path": "missing"}, ["--pretrained_vae_model_name_or_path", "missing"]),
    ({"use_8bit_adam": True, "optimizer": "prodigy"}, ["--use_8bit_adam", "--optimizer", "prodigy"]),
    (
        {"push_to_hub": True, "hub_token": "hf_SECRET", "report_to": "wandb"},
        ["--hub_token", "--report_to wandb", "hf auth login"],
    ),
    ({"hub_model_id": "spf"}, ["--hub_model_id", "--push_to_hub"]),
    ({"hub_token": "hf_SECRET"}, ["--hub_token", "--push_to_hub"]),
    ({"hub_private_repo": True}, ["--hub_private_repo", "--push_to_hub"]),
    ({"dataset_config_name": "en"}, ["--dataset_config_name", "'en'", "--dataset_name"]),
    ({"resume_from_checkpoint": "checkpoint-7"}, ["--resume_from_checkpoint", "checkpoint-7", "no such folder"]),
]  # fmt: skip


@pytest.mark.parametrize(
    "flags, parts",
    WRONG_FLAGS,
    ids=lambda value: " ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_a_wrong_flag_ends_the_program(refusal, flags, parts):
    message = refusal(**flags)
    for part in parts:
        assert part in message, message


# test_command_line.py runs each of them through a command line, too.
WRONG_ROWS = [
    ([], ["metadata.jsonl", "no rows"]),
    (changed_rows(target_prompt=None), ["line 1", "'target_prompt'", "--target_prompt"]),
    (changed_rows(base_prompt=None), ["line 1", "'base_prompt'"]),
    ([ROWS[0], {**ROWS[1], "target_prompt": ""}], ["line 2", "'target_prompt'", "''"]),
    ([ROWS[0], {**ROWS[1], "target_prompt": "a man, a red hat"}], ["line 2", "a man, a red hat"]),
    ([ROWS[0], {**ROWS[1], "target_prompt": "a red hat"}], ["line 2", "a red hat"]),
    ([*ROWS[:3], {**ROWS[3], "base_phrases": ["a cat"]}], ["line 4", "'a cat'"]),
    ([{**ROWS[0], "target_prompt": [["a cat", "a dog"]]}], ["line 1", "'a cat'"]),
    ([{**ROWS[0], "target_prompt": "x " * 80}], ["line 1", "77"]),
    ([{**ROWS[0], "base_prompt": "a hat", "target_prompt": [["a hat", "a scarf"]]}], ["line 1", "preserve"]),
    ([{**ROWS[0], "full_prompt": "a woman"}], ["line 1", "'red hair'"]),
    ([ROWS[0], {**ROWS[1], "free_phrases": ["a cat"]}], ["line 2", "'a cat'"]),
    ([{**ROWS[0], "free_phrases": "a green hat"}], ["line 1", "'free_phrases'", "a list"]),
    ([{**ROWS[0], "free_phrases": ["Red hair"]}], ["line 1", "'Red hair' is the target prompt itself"]),
    ([{**ROWS[0], "free_phrases": ["a green hat", "a woman"]}], ["line 1", "left to preserve"]),
    ([{**ROWS[0], "file_name": "7.png"}], ["line 1", "7.png"]),
    ([ROWS[0], "not JSON"], ["line 2", "JSON"]),
]


@pytest.mark.parametrize(
    "rows, parts",
    WRONG_ROWS,
    ids=[
        "no rows", "no target column", "no base column", "empty target", "target is base", "target is a phrase",
        "phrase not in prompt", "replaced not in prompt", "target too long", "nothing left", "target not in full",
        "free phrase not in prompt", "free phrases no list", "free phrase is target", "all free", "no image",
        "a text as row",
    ],
)  # fmt: skip
def test_a_wrong_row_ends_the_program(refusal, tmp_path, rows, parts):
    message = refusal(train_data_dir=write_data(tmp_path / "data", rows))
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize("below", ["", "more/output"])
def test_an_output_folder_that_is_a_file_ends_the_program(refusal, tmp_path, below):
    (tmp_path / "file").write_text("mine")
    message = refusal(output_dir=tmp_path / "file" / below)
    assert "--output_dir" in message and str(tmp_path / "file") in message


def test_an_empty_folder_ends_the_program(refusal, tmp_path):
    (tmp_path / "data").mkdir()
    message = refusal(train_data_dir=tmp_path / "data")
    assert str(tmp_path / "data") in message and "empty" in message


def test_a_broken_image_ends_the_program(refusal, tmp_path):
    data = write_data(tmp_path / "data")
    whole = (data / "3.png").read_bytes()
    (data / "3.png").write_bytes(whole[: len(whole) // 2])
    message = refusal(train_data_dir=data)
    assert "line 4" in message and "3.png" in message


@pytest.mark.parametrize("part", ["unet", "vae", "tokenizer", "scheduler"])
def test_a_model_with_a_part_missing_ends_the_program(refusal, world, tmp_path, part):
    model = copy_model(world, tmp_path, {})
    shutil.rmtree(model / part)
    message = refusal(pretrained_model_name_or_path=model)
    assert "--pretrained_model_name_or_path" in message and str(model) in message and part in message


def test_a_prediction_type_without_a_target_ends_the_program(refusal, world, tmp_path):
    model = copy_model(world, tmp_path, {"scheduler/scheduler_config.json": {"prediction_type": "sample"}})
    message = refusal(pretrained_model_name_or_path=model)
    assert "--pretrained_model_name_or_path" in message and "'sample'" in message


@pytest.mark.parametrize(
    "kind", ["missing", "empty folder", "not safetensors", "another width", "another model", "text"]
)
def test_a_wrong_earlier_lora_ends_the_program(refusal, trained, tmp_path, kind):
    path = tmp_path / "earlier" / WEIGHTS
    path.parent.mkdir()
    state = load_file(trained() / WEIGHTS)
    if kind == "not safetensors":
        path.write_bytes(b"nonsense" * 10)
    elif kind == "another width":
        save_file({name: torch.cat([value, value], 1).contiguous() for name, value in state.items()}, path)
    elif kind == "another model":
        save_file({name.replace("down_blocks.0", "down_blocks.7"): value for name, value in state.items()}, path)
    elif kind == "text":
        save_file({name.replace("unet.", "text_encoder."): value for name, value in state.items()}, path)
    message = refusal(stage1_steps=0, stage1_lora_path=path if kind == "missing" else path.parent)
    assert "--stage1_lora_path" in message and str(path.parent) in message
