"""Tests of the trainer's command line as it is read: groups of flags, and what follows from others."""

import inspect
import os
import re
from dataclasses import fields

import pytest
import yaml

from training.arguments import flat, parse_args
from training.flags_page import PAGE, page
from training.run_file import RUN_FILE, write_run_file


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
    assert flags.sharing.output_kohya_format is False and flags.alignment.sfcm_timesteps is None
    flags = parse_args([MODEL, "--preservation=dop", "--reference_lora", "a", "b", "--reference_lora_scale=2"])
    assert (flags.method.stage1_steps, flags.method.stage2_steps) == (1000, 0)
    assert flags.lora.reference_lora_scale == [2.0, 2.0]
    assert parse_args([MODEL, "--push_to_hub"]).sharing.output_kohya_format is True
    assert parse_args([MODEL, "--push_to_hub", "--use_dora"]).sharing.output_kohya_format is False


LETTER = {
    "stage2_objective": "paper", "sfcm_mode": "paper", "base_prompt_share": 0, "lambda_base": 0,
    "enhancement_weighting": "none",
}  # fmt: skip


def test_the_papers_preset_is_the_flags_it_stands_for(tmp_path):
    """A run file holds those, and neither it nor a run that goes on asks for the preset again."""
    given = parse_args([MODEL, "--preset=paper"])
    assert given == parse_args([MODEL, *(f"--{name}={value}" for name, value in LETTER.items())])
    assert LETTER.items() <= given.asked.items() and given.asked["preset"] is None
    assert parse_args([str(write_run_file(given.asked, tmp_path))]) == given


def test_a_preset_behind_a_run_file_wins_over_it(tmp_path):
    file = tmp_path / "run.yaml"
    write_run_file(parse_args([MODEL, "--stage1_steps=7"]).asked, tmp_path)
    flags = flat(parse_args([str(file), "--preset=paper", "--lambda_base=3"]))
    assert (LETTER | {"lambda_base": 3.0, "stage1_steps": 7}).items() <= flags.items()


@pytest.mark.parametrize("in_file", [False, True])
def test_what_is_given_beside_a_preset_wins(tmp_path, in_file):
    """Though it is the default, or another objective; and what a run file says, as what the command line does."""
    own = {"stage2_objective": "composed", "sfcm_mode": "averaged_target", "lambda_base": 10.0, "preset": "paper"}
    if in_file:
        (tmp_path / RUN_FILE).write_text(yaml.safe_dump(own))
        words = [str(tmp_path / RUN_FILE), MODEL]
    else:
        words = [MODEL, *(f"--{name}={value}" for name, value in own.items())]
    flags = parse_args(words)
    assert flags.method.stage2_objective == "composed" and flags.alignment.sfcm_mode == "averaged_target"
    assert flags.paper.lambda_base == 10.0
    assert flags.method.base_prompt_share == 0 and flags.paper.enhancement_weighting == "none"
    assert parse_args([str(write_run_file(flags.asked, tmp_path))]) == flags
    assert parse_args([*words, "--base_prompt_share=0.5"]).method.base_prompt_share == 0.5


def test_a_flag_is_in_one_group_and_what_is_on_or_off_can_be_said_either_way():
    flags = parse_args([MODEL])
    names = [one.name for group in flags[:-1] for one in fields(group)]
    assert len(names) == len({*names}) and all(len(fields(group)) <= 12 for group in flags[:-1])
    assert all(inspect.getdoc(group) for group in flags[:-1])
    said = [f"--no-{name}" for name, value in flat(flags).items() if isinstance(value, bool)]
    assert {value for value in flat(parse_args([MODEL, *said])).values() if isinstance(value, bool)} == {False}


def test_the_page_of_flags_is_current():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python -m training.flags_page`"
    rows = re.findall(r"^\| `--(\w+)` \| (.+?) \| .+ \|$", page(), re.MULTILINE)
    assert [name for name, _ in rows] == [*flat(parse_args([MODEL]))]
    defaults = {"center_crop": "on", "random_flip": "off", "rank": "`16`"}
    defaults |= {"pretrained_model_name_or_path": "required", "lora_alpha": "not given"}
    assert defaults.items() <= dict(rows).items()


# ---------------------------------------------------------------------------------------------------------- run files


SECRET = "hf_SECRETofTheTester"
UNUSUAL = """
    --rank 8 --lora_alpha 4.5 --lora_layers attn2.to_k,attn2.to_v --mixed_precision no --learning_rate 1e-05
    --free_phrases=-x --free_phrases a,b --unrelated_prompts true 1.5 --preservation cat --seed 3 --no-center_crop
    --no-cache_latents --random_flip --push_to_hub --no-output_kohya_format --report_to none --target_prompt null
    --reference_lora a b --reference_lora_scale 1 -0.5 --sfcm_timesteps 100 200 --hub_model_id 007 --output_dir ü
""".split()


@pytest.fixture
def written(tmp_path):
    def write(**values):
        file = tmp_path / "given.yaml"
        file.write_text(yaml.safe_dump(values), encoding="utf-8")
        return str(file)

    return write


@pytest.fixture
def error_of(capsys):
    def run(*words):
        with pytest.raises(SystemExit) as ended:
            parse_args(list(words))
        assert ended.value.code == 2
        return capsys.readouterr().err.splitlines()[-1].removeprefix("train_spf_portrait_lora.py: error: ")

    return run


@pytest.mark.parametrize("words", [[], UNUSUAL, ["--preservation=dop"]], ids=["defaults", "unusual", "one stage"])
def test_a_run_is_read_back_as_it_was_asked(tmp_path, words):
    flags = parse_args([MODEL, *words])
    file = write_run_file(flags.asked, tmp_path / "new" / "folder")
    assert file.name == RUN_FILE and os.listdir(file.parent) == [RUN_FILE]
    again = parse_args([str(file)])
    assert again == flags
    assert write_run_file(again.asked, tmp_path).read_text() == file.read_text()


def test_a_run_file_holds_every_flag_as_asked_but_no_secret(tmp_path):
    flags = parse_args([MODEL, "--push_to_hub", f"--hub_token={SECRET}"])
    file = write_run_file(flags.asked, tmp_path)
    assert SECRET not in file.read_text()
    kept = yaml.safe_load(file.read_text())
    assert {*kept} == {*flat(flags)} - {"hub_token"}
    assert kept["lora_alpha"] is kept["output_kohya_format"] is None and flags.lora.lora_alpha == 16


def test_the_command_line_wins_over_the_run_file(written):
    values = {"pretrained_model_name_or_path": "x", "rank": 8, "free_phrases": ["a"], "random_flip": True}
    file = written(**values, lora_layers=["attn2.to_k", "attn2.to_v"], reference_target_prompt=None)
    flags = parse_args([file])
    assert flags.lora.rank == flags.lora.lora_alpha == 8 and flags.lora.lora_layers == ["attn2.to_k", "attn2.to_v"]
    assert flags.data.free_phrases == ["a"] and flags.pictures.random_flip
    words = ["--rank=2", "--free_phrases", "b", "--no-random_flip", "--pretrained_model_name_or_path=y"]
    flags = parse_args([file, *words])
    assert flags.lora.rank == flags.lora.lora_alpha == 2 and flags.data.free_phrases == ["b"]
    assert not flags.pictures.random_flip and flags.model.pretrained_model_name_or_path == "y"
    assert parse_args([written(rank=4), MODEL]).lora.rank == 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rnak": 8}, "{file}: there is no flag --rnak"),
        ({"rank": 0}, "{file}: --rank must be at least 1, got 0"),
        ({"rank": "many"}, "{file}: argument --rank: invalid int value: 'many'"),
        ({"rank": [1, 2]}, "{file}: rank must be one value, got [1, 2]"),
        ({"rank": {"of": 8}}, "{file}: rank must be a text or a number, or a list of them, got {{'of': 8}}"),
        ({"random_flip": "no"}, "{file}: random_flip must be true or false, got 'no'"),
        ({"sfcm_timesteps": [1]}, "{file}: argument --sfcm_timesteps: expected 2 arguments"),
        ({"lora_target": "some"}, "{file}: argument --lora_target: invalid choice: 'some'"),
        ({"center_crop": False}, "{file}: --no-center_crop takes another crop in each step"),
        ({"unrelated_prompts": ["a"]}, "{file}: --unrelated_prompts needs --preservation cat"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_value_of_a_run_file_is_named_with_it(written, error_of, values, message):
    file = written(**values)
    assert error_of(file, MODEL).startswith(message.format(file=file))


def test_errors_of_what_is_no_run_file_or_not_of_it(tmp_path, written, error_of):
    file = written(rank=8)
    assert error_of(file) == "the following arguments are required: --pretrained_model_name_or_path"
    assert error_of(file, MODEL, "--rank=0") == "--rank must be at least 1, got 0"
    assert error_of(file, MODEL, "--rank=x") == "argument --rank: invalid int value: 'x'"
    assert error_of(str(tmp_path / "no.yaml"), MODEL) == f"{tmp_path / 'no.yaml'}: No such file or directory"
    other = tmp_path / "other.yaml"
    for text, message in (("a: [", "is no YAML: "), ("- rank", "must hold the flags by name"), ("", "must hold")):
        other.write_text(text)
        assert f"{other} {message}" in error_of(str(other), MODEL)
    other.write_bytes(b"rank: \xff")
    assert f"{other} is no YAML: " in error_of(str(other), MODEL)
    assert "unrecognized arguments: run.yaml" in error_of(MODEL, "run.yaml")
