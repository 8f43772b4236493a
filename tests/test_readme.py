"""The README against the code: its flags and defaults, commands, paths, Python, and lines of data."""

import argparse
import ast
import inspect
import json
import re
import shlex

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from diffusers import StableDiffusionPipeline
from packaging.specifiers import SpecifierSet
from PIL import Image
from test_house import ROOT
from torch.distributed.run import get_args_parser

import app
import evaluate_spf_portrait
import export_spf_portrait_lora
from benchmarks import preservation
from pipeline_spf_portrait import SPFPortraitPipeline, SPFPortraitPipelineOutput
from prompts import make_prompt_pair
from toy_portraits import demo
from train_spf_portrait_lora import parse_args
from training.data import load_rows
from training.flags import ColumnFlags, DataFlags


README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    """The contents of the README's fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def prose_code():
    """The README's inline code, outside of fenced blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL))


def parser_of(function, monkeypatch):
    """The argument parser a function builds, taken from it before it parses anything."""

    class FoundParser(Exception):
        pass

    def stop(parser, *args, **kwargs):
        raise FoundParser(parser)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(FoundParser) as found:
            function([])
    return found.value.args[0]


@pytest.fixture
def actions(monkeypatch):
    """The trainer's flags by name, without --help."""
    parser = parser_of(parse_args, monkeypatch)
    return {action.option_strings[0]: action for action in parser._actions if action.dest != "help"}


@pytest.fixture
def flag_rows():
    """Default and meaning of each flag that the README's tables list, its own section alone."""
    section = README.split("## Every flag")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(--\w+)` \| (.*?) \| (.*?) \|$", section, re.MULTILINE)
    assert len({flag for flag, _, _ in rows}) == len(rows)
    return {flag: (default, meaning) for flag, default, meaning in rows}


def default_as_written(action):
    """The cell of a flag's default; numbers are compared by value, so they come back as numbers."""
    if action.required:
        return "required"
    if isinstance(action, argparse._StoreTrueAction | argparse.BooleanOptionalAction):
        return {True: "on", False: "off", None: "not set"}[action.default]
    return "not set" if action.default is None else action.default


def read_cell(cell, action):
    if not cell.startswith("`"):
        return cell
    convert = action.type or str
    return tuple(map(convert, cell.strip("`").split())) if action.nargs == 2 else convert(cell.strip("`"))


# Programs with a table of their own, by the section that it stands in.
PROGRAMS = {
    "In the browser": app.parse_args,
    "Other formats, and a checkpoint without a LoRA": export_spf_portrait_lora.parse_args,
    "Is my LoRA clean?": evaluate_spf_portrait.parse_args,
}


def table_of(heading):
    """The rows of a section's table of flags."""
    section = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    return {flag: cell for flag, cell in re.findall(r"^\| `(--\w+)` \| (.*?) \|", section, re.MULTILINE)}


@pytest.mark.parametrize("heading", PROGRAMS)
def test_the_tables_of_other_programs_are_their_flags_and_defaults(heading, monkeypatch):
    for name in ("SPF_BASE_MODEL", "SPF_LORA"):
        monkeypatch.delenv(name, raising=False)
    parser = parser_of(PROGRAMS[heading], monkeypatch)
    actions = {action.option_strings[0]: action for action in parser._actions if action.dest != "help"}
    written = {flag: read_cell(cell, actions[flag]) for flag, cell in table_of(heading).items()}
    assert written == {flag: default_as_written(action) for flag, action in actions.items()}


def test_the_tables_list_every_flag_and_no_other(actions, flag_rows):
    assert set(flag_rows) == set(actions)


def test_every_default_in_the_tables_is_the_scripts_own(actions, flag_rows):
    written = {flag: read_cell(cell, actions[flag]) for flag, (cell, _) in flag_rows.items()}
    assert written == {flag: default_as_written(action) for flag, action in actions.items()}


def test_the_choices_table_agrees_with_the_defaults(actions):
    section = README.split("What the paper leaves open")[1].split("\n## ")[0]
    rows = re.findall(r"^\| .*? \| (`--.*?`) \| (`.*?`) \|$", section, re.MULTILINE)
    assert len(rows) >= 10
    for flags, cells in rows:
        for flag, cell in zip(flags.split(", "), cells.split(", "), strict=True):
            action = actions[flag.strip("`")]
            assert read_cell(cell, action) == action.default, flag


def test_every_choice_of_a_flag_is_named_in_its_row(actions, flag_rows):
    # accelerate's version decides which trackers there are.
    for flag, action in ((flag, action) for flag, action in actions.items() if flag != "--report_to"):
        missing = [choice for choice in action.choices or () if f"`{choice}`" not in flag_rows[flag][1]]
        assert not missing, flag


def test_every_flag_named_in_the_prose_is_a_flag_of_the_trainer(actions):
    named = {flag for code in prose_code() for flag in re.findall(r"--\w[\w-]*", code)}
    assert len(named) > 40
    of_the_benchmark = {"--num_prompts", "--seeds", "--sweeps", "--runs", "--ablation_targets"}
    of_the_benchmark |= {"--steps", "--share_steps", "--no-cycles"}
    taken = {flag for action in actions.values() for flag in action.option_strings}
    of_other_programs = {flag for heading in PROGRAMS for flag in table_of(heading)}
    assert named - taken - of_other_programs == {"--extra-index-url"} | of_the_benchmark


def test_the_benchmarks_commands_are_ones_it_takes():
    lines = [*prose_code(), *(line for block in blocks("bash") for line in block.splitlines())]
    program = re.compile(r"python benchmarks/(preservation|proxies)\.py")
    commands = [line for line in lines if program.match(line)]
    assert len(commands) == 4
    for command in commands:
        preservation.parse_args(shlex.split(program.sub("", command)))


def presets():
    """The flags of each row of the table of GPUs."""
    return re.findall(r"^\| \d+ GB \| `(.*?)` \|(?: [\d.]+ GiB \|){3}$", README, re.MULTILINE)


def test_the_presets_are_flags_the_trainer_takes():
    assert len(presets()) == 4
    for flags in presets():
        parse_args(["--pretrained_model_name_or_path", "model", "--mixed_precision", "bf16", *shlex.split(flags)])


def test_every_command_is_one_its_program_takes(monkeypatch):
    programs = {"demo": 0, "launch": 0, "torchrun": 0, "export": 0, "app": 0, "evaluate": 0}
    launcher, demo_parser = launch_command_parser(), parser_of(demo.main, monkeypatch)
    for block in blocks("bash"):
        for command in re.split(r"&&|\n", block.replace("\\\n", " ")):
            words = shlex.split(command)
            if words[:3] == ["python", "-m", "toy_portraits.demo"]:
                demo_parser.parse_args(words[3:])
                programs["demo"] += 1
            elif words[:2] == ["accelerate", "launch"]:
                launched = launcher.parse_args(words[2:])
                assert (ROOT / launched.training_script).is_file()
                assert launched.config_file is None or (ROOT / launched.config_file).is_file()
                parse_args(launched.training_script_args)
                programs["launch"] += 1
            elif words[:2] == ["ACCELERATE_USE_CPU=true", "python"]:
                launched = get_args_parser().parse_args(words[4:])
                assert words[2:4] == ["-m", "torch.distributed.run"] and (ROOT / launched.training_script).is_file()
                parse_args(launched.training_script_args)
                programs["torchrun"] += 1
            elif words[:2] == ["python", "export_spf_portrait_lora.py"]:
                export_spf_portrait_lora.parse_args(words[2:])
                programs["export"] += 1
            elif words[:2] == ["python", "app.py"]:
                app.parse_args(words[2:])
                programs["app"] += 1
            elif words[:2] == ["python", "evaluate_spf_portrait.py"]:
                evaluate_spf_portrait.parse_args(words[2:])
                programs["evaluate"] += 1
    assert programs == {"demo": 3, "launch": 10, "torchrun": 1, "export": 3, "app": 3, "evaluate": 4}


def test_the_configuration_file_is_one_accelerate_reads():
    (path,) = (ROOT / "accelerate_configs").iterdir()
    assert f"accelerate_configs/{path.name}" in README
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig) and config.distributed_type == DistributedType.MULTI_GPU
    assert config.num_processes == 2 and config.mixed_precision == "bf16" and not config.use_cpu


def test_the_ci_runs_the_readmes_test_command():
    install, test = next(block for block in blocks("bash") if "pytest" in block).strip().split(" && ")
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert test in lines
    requirements = install.removeprefix("pip install ")
    assert any(line.startswith("pip install ") and line.endswith(requirements) for line in lines)


def test_every_file_it_names_exists():
    links = {target for target in re.findall(r"\]\(([^)]+)\)", README) if "://" not in target}
    sections = {target for target in links if target.startswith("#")}
    headings = re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    assert {"#stop-and-go-on", "#share-it"} <= sections
    assert sections <= {"#" + re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    named = {
        word for code in prose_code() for word in code.split() if re.fullmatch(r"[\w./-]+\.(py|md|txt|png|yaml)", word)
    }
    # What the demo, the trainer and its user write is not in the repository.
    written = {word for word in named if word.startswith(("runs/", "validation/", "0"))}
    files = {*links, *re.findall(r"-r (\S+)", README), *named} - written - sections
    assert {"assets/main_job.png", "LICENSE", "prompts.py", "benchmarks/preservation.py", "requirements.txt"} <= files
    assert [file for file in sorted(files) if not (ROOT / file).is_file()] == []


def test_its_python_compiles_and_uses_what_there_is():
    codes = blocks("python")
    assert len(codes) == 6
    keywords, fields = set(), set()
    for code in codes:
        for node in ast.walk(compile(code, "README.md", "exec", ast.PyCF_ONLY_AST)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "pipe":
                keywords |= {keyword.arg for keyword in node.keywords}
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "output":
                fields.add(node.attr)
    assert {"target_prompt", "compare", "return_sfcm"} <= keywords
    assert keywords <= set(inspect.signature(SPFPortraitPipeline.__call__).parameters)
    assert "sfcm" in fields and fields <= set(SPFPortraitPipelineOutput.__dataclass_fields__)


def test_the_table_of_the_pipelines_arguments_is_complete():
    section = README.split("## Use the LoRA")[1].split("\n## ")[0]
    ours = set(inspect.signature(SPFPortraitPipeline.__call__).parameters)
    ours -= set(inspect.signature(StableDiffusionPipeline.__call__).parameters)
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == ours


def rows_of(block, folder, **options):
    """The lines of a block as a training folder with little pictures, read by the trainer's own reader."""
    records = [json.loads(line) for line in block.splitlines()]
    for record in records:
        Image.new("RGB", (8, 8)).save(folder / record["file_name"])
    (folder / "metadata.jsonl").write_text(block, encoding="utf-8")
    rows = load_rows(DataFlags(train_data_dir=folder, **options), ColumnFlags())
    assert len(rows) == len(records)
    return rows


def test_its_lines_of_data_make_the_full_prompts_it_says(tmp_path):
    lines, _ = blocks("json")
    (full_prompts,) = blocks("text")
    pairs = [
        make_prompt_pair(row.base_prompt, row.target_prompt, row.full_prompt, row.base_phrases, row.free_phrases)
        for row in rows_of(lines, tmp_path)
    ]
    assert [pair.full_prompt for pair in pairs] == full_prompts.splitlines()
    assert pairs[1].target_prompts == pairs[2].target_prompts  # a full prompt and a pair say the same
    assert pairs[1].target_prompts[0].replaces.endswith("T-shirt")
    assert [len(pair.target_prompts) for pair in pairs] == [1, 1, 1, 2, 1, 1]
    assert pairs[4].base_phrases == ("an old man", "a rock and roll T-shirt")
    assert make_prompt_pair(pairs[4].base_prompt, "watercolor style").base_phrases != pairs[4].base_phrases
    assert [pair.free_phrases for pair in pairs] == [()] * 5 + [("a green background",)]


def test_its_captions_alone_work_with_one_target_for_the_set(tmp_path):
    _, lines = blocks("json")
    command = next(block for block in blocks("bash") if "--base_prompt_column" in block)
    options = parse_args(shlex.split(command.replace("\\\n", " "))[3:])
    rows = rows_of(lines, tmp_path, base_prompt_column=options.base_prompt_column, target_prompt=options.target_prompt)
    assert [make_prompt_pair(row.base_prompt, row.target_prompt).full_prompt for row in rows] == [
        "a woman, a brown jacket, a curtain background, blonde hair",
        "a man, a white shirt, blonde hair",
    ]


def test_the_head_of_a_space_names_the_page_and_a_gradio_that_is_allowed():
    (head,) = [yaml.safe_load(block.strip("-\n")) for block in blocks("yaml")]
    assert head["sdk"] == "gradio" and (ROOT / head["app_file"]).is_file()
    (line,) = [line for line in (ROOT / "requirements-app.txt").read_text().splitlines() if line.startswith("gradio")]
    assert head["sdk_version"] in SpecifierSet(line.removeprefix("gradio"))
