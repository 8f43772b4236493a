"""Tests of the trainer's command line as it is read: groups of flags, and what follows from others."""

import inspect
from dataclasses import fields

from training.arguments import flat, parse_args


MODEL = "--pretrained_model_name_or_path=x"


def test_every_flag_that_names_a_file_or_folder_knows_the_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    ends = ("_dir", "_path", "_lora", "dataset_name", "checkpoint")
    names = [name for name in flat(parse_args([MODEL])) if name.endswith(ends) and name != "dual_path"]
    (tmp_path / "stage1_lora_path").touch()
    changes = ["--stage1_steps=0", "--stage2_objective=paper", "--reference_lora", "hat", "~/reference_lora"]
    flags = flat(parse_args([*(f"--{name}=~/{name}" for name in names), *changes]))
    earlier = str(tmp_path / "reference_lora")
    assert flags["reference_lora"] == [earlier, "hat", earlier]
    assert len(names) == 13
    assert all(flags[name] == str(tmp_path / name) for name in names if name != "reference_lora")


def test_what_follows_from_other_flags():
    flags = parse_args([MODEL])
    assert flags.lora.lora_alpha == 16.0 and flags.lora.reference_lora_scale is None
    assert flags.sharing.output_kohya_format is False and flags.alignment.sfcm_timesteps == (600, 950)
    flags = parse_args([MODEL, "--preservation=dop", "--reference_lora", "a", "b", "--reference_lora_scale=2"])
    assert (flags.method.stage1_steps, flags.method.stage2_steps) == (1000, 0)
    assert flags.lora.reference_lora_scale == [2.0, 2.0]
    assert parse_args([MODEL, "--push_to_hub"]).sharing.output_kohya_format is True
    assert parse_args([MODEL, "--push_to_hub", "--use_dora"]).sharing.output_kohya_format is False


def test_a_flag_is_in_one_group_and_what_is_on_or_off_can_be_said_either_way():
    flags = parse_args([MODEL])
    names = [one.name for group in flags for one in fields(group)]
    assert len(names) == len({*names}) and all(len(fields(group)) <= 12 for group in flags)
    assert all(inspect.getdoc(group) for group in flags)
    said = [f"--no-{name}" for name, value in flat(flags).items() if isinstance(value, bool)]
    assert {value for value in flat(parse_args([MODEL, *said])).values() if isinstance(value, bool)} == {False}
