"""README.md and docs/ against the code: commands, flags, links, Python, lines of data, and the figures they quote."""

import argparse
import ast
import importlib
import inspect
import json
import re
import shlex
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from diffusers import StableDiffusionPipeline
from packaging.specifiers import SpecifierSet
from PIL import Image
from test_house import FLOORS, ROOT
from torch.distributed.run import get_args_parser

import app
import draw_spf_portrait
import evaluate_spf_portrait
import export_spf_portrait_lora
from benchmarks import choose, preservation
from pipeline_spf_portrait import SPFPortraitPipeline, SPFPortraitPipelineOutput
from prompts import make_prompt_pair
from toy_portraits import demo
from training.arguments import flat, parse_args
from training.data import load_rows


README = ROOT / "README.md"
# The page of flags is generated, and has a test of its own.
PAGES = [README, *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "flags.md")]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "benchmarks").glob("*.md"))]
MODEL = ["--pretrained_model_name_or_path", "model"]
PROGRAMS = {
    "train_spf_portrait_lora.py": parse_args,
    "evaluate_spf_portrait.py": evaluate_spf_portrait.parse_args,
    "export_spf_portrait_lora.py": export_spf_portrait_lora.parse_args,
    "draw_spf_portrait.py": draw_spf_portrait.parse_args,
    "app.py": app.parse_args,
    "toy_portraits.demo": demo.main,
}


def doc(name):
    """The text of one page of docs/."""
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def name_of(page):
    return str(page.relative_to(ROOT))


def section(text, heading):
    """What stands below a heading of the second level."""
    return text.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def blocks(language, pages=PAGES):
    """The contents of the pages' fenced blocks of one language."""
    texts = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    return re.findall(rf"^```{language}\n(.*?)^```$", texts, re.MULTILINE | re.DOTALL)


def without_blocks(page):
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def prose_code(page):
    """A page's inline code, outside of fenced blocks."""
    return re.findall(r"`([^`\n]+)`", without_blocks(page))


def commands(pages=PAGES):
    """The words of each command in the pages' blocks."""
    lines = [line for block in blocks("bash", pages) for line in re.split(r"&&|\n", block.replace("\\\n", " "))]
    return [words for words in map(shlex.split, lines) if words]


def flags_in_help(parse, capsys):
    """Every flag that a program's --help lists."""
    with pytest.raises(SystemExit):
        parse(["--help"])
    listed = re.findall(r"^ +(--.*)$", capsys.readouterr().out, re.MULTILINE)
    return {flag for line in listed for flag in re.findall(r"--\w[\w-]*", line)}


# ------------------------------------------------------------------------------------------------------------ the page


def test_the_readme_is_one_page():
    text = README.read_bytes()
    assert len(text.splitlines()) <= 260 and len(text) <= 18432


def test_the_readme_leads_to_every_page_of_docs():
    table = section(README.read_text(encoding="utf-8"), "Where to read on")
    linked = set(re.findall(r"\]\(docs/([\w-]+\.md)\)", table))
    assert linked == {page.name for page in (ROOT / "docs").glob("*.md")}


def anchors(page):
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_its_links_are_relative_and_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)]+)\)", without_blocks(page)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert not path.startswith("/") and file.is_relative_to(ROOT) and file.is_file(), target
        assert not anchor or anchor in anchors(file), target


def test_every_file_they_name_exists():
    named = {
        word
        for page in PAGES
        for code in prose_code(page)
        for word in code.split()
        if re.fullmatch(r"[\w./-]+\.(py|md|txt|png|yaml)", word)
    }
    named |= {word for words in commands() for word, after in zip(words[1:], words, strict=False) if after == "-r"}
    # What the demo, the trainer and its user write is not in the repository.
    named -= {word for word in named if word.startswith(("runs/", "validation/", "0")) or word == "run.yaml"}
    assert {"prompts.py", "benchmarks/preservation.py", "requirements.txt"} & named
    assert [file for file in sorted(named) if not (ROOT / file).is_file()] == []


def test_the_drawn_house_is_the_one_whose_imports_are_walked():
    (drawing,) = [block for block in blocks("", [ROOT / "CONTRIBUTING.md"]) if block.startswith("floor")]
    drawn = [part.split() for part in re.split(r"floor \d", drawing)[:0:-1]]
    patterns = [[name.removesuffix("/").removesuffix(".py") for name in names] for names in drawn]

    def drawn_floor(name):
        (floor,) = [i for i, names in enumerate(patterns) if any(fnmatch(name, pattern) for pattern in names)]
        return floor

    # A drawn floor is one or several of those that are walked.
    floors = [{drawn_floor(name) for name in floor} for floor in FLOORS]
    assert all(len(floor) == 1 for floor in floors)
    assert (own := [*map(min, floors)]) == sorted(own) and set(own) == set(range(len(drawn)))


# ----------------------------------------------------------------------------------------------------------- the flags


def test_every_flag_named_in_the_prose_is_a_flag(capsys):
    named = {
        flag
        for page in [*PAGES, ROOT / "CONTRIBUTING.md"]
        for code in prose_code(page)
        for flag in re.findall(r"(?<![\w-])--\w[\w-]*", code)
    }
    assert len(named) > 40
    of_other_tools = {"--extra-index-url", "--help", "--fp32-text-enc"}
    of_benchmarks = {"--num_prompts", "--seeds", "--sweeps", "--runs", "--ablation_targets", "--minutes", "--rounds"}
    of_benchmarks |= {"--rows", "--stages", "--candidates", "--least_response", "--train_args", "--prompt_seed"}
    taken = set().union(*(flags_in_help(parse, capsys) for parse in PROGRAMS.values()))
    assert named - taken - of_other_tools - of_benchmarks == set()


def test_the_choices_table_agrees_with_the_defaults():
    flags = flat(parse_args([*MODEL, "--train_data_dir", "portraits"]))
    table = section(doc("method.md"), "What the paper leaves open and we chose")
    rows = re.findall(r"^\| .*? \| (`--.*?`) \| (`.*?`) \|$", table, re.MULTILINE)
    assert len(rows) >= 10
    for names, cells in rows:
        for name, cell in zip(names.split(", "), cells.split(", "), strict=True):
            default = flags[name.strip("`").removeprefix("--")]
            words = default if isinstance(default, tuple | list) else [default]
            assert cell.strip("`").split() == [str(word) for word in words], name


def test_the_map_table_lists_the_modes_that_are_no_benchmarks():
    rows = re.findall(r"^\| `(\w+)` \|", section(doc("method.md"), "The map"), re.MULTILINE)
    for mode in rows:
        flags = parse_args([*MODEL, "--train_data_dir", "portraits", "--sfcm_mode", mode])
        assert flags.alignment.sfcm_mode == mode
    assert len(rows) == 5


def test_the_ablations_and_presets_are_flags_the_trainer_takes():
    presets = re.findall(r"^\| \d+ GB \| `(--.*?)` \| [\d.]+ GiB \|", doc("training.md"), re.MULTILINE)
    ablations = re.findall(r"^\| [^|]+ \| `(--.*?)` \|", section(doc("results.md"), "What each choice is worth"), re.M)
    assert len(presets) == 9 and len(ablations) > 20
    for flags in [*presets, *ablations]:
        parse_args([*MODEL, "--train_data_dir", "portraits", "--mixed_precision", "bf16", *shlex.split(flags)])


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """The page's file of settings, as run.yaml of the current folder."""
    (block,) = blocks("yaml", [ROOT / "docs" / "training.md"])
    (tmp_path / "run.yaml").write_text(block, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return yaml.safe_load(block)


def test_the_file_of_settings_holds_flags(settings):
    flags = flat(parse_args(["run.yaml"]))
    assert {name: flags[name] for name in settings} == settings


# -------------------------------------------------------------------------------------------------------- the commands


def test_the_benchmarks_commands_are_ones_it_takes():
    lines = [code for page in PAGES for code in prose_code(page)] + [shlex.join(words) for words in commands()]
    program = re.compile(r"python benchmarks/(preservation|proxies|choose)\.py ")
    taken = [line for line in lines if program.match(line)]
    assert len(taken) == 9
    for command in taken:
        parse = choose.parse_args if program.match(command)[1] == "choose" else preservation.parse_args
        parse(shlex.split(program.sub("", command)))


@pytest.fixture
def demo_parser(monkeypatch):
    """The demo's parser, taken from it before it parses anything."""

    class FoundParser(Exception):
        pass

    def stop(parser, *args, **kwargs):
        raise FoundParser(parser)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(FoundParser) as found:
            demo.main([])
    return found.value.args[0]


def check_training(launched):
    """A training that a launcher starts."""
    assert launched.training_script == "train_spf_portrait_lora.py"
    parse_args(launched.training_script_args)


def test_every_command_is_one_its_program_takes(demo_parser, settings):
    launcher, seen = launch_command_parser(), set()
    for words in commands():
        program, rest = next(
            (" ".join(words[:n]), words[n:]) for n in (3, 2, 1) if n == 1 or " ".join(words[:n]) in KNOWN
        )
        seen.add(program)
        if program == "accelerate launch":
            launched = launcher.parse_args(rest)
            assert launched.config_file is None or (ROOT / launched.config_file).is_file()
            check_training(launched)
        elif program == "ACCELERATE_USE_CPU=true python -m":
            check_training(get_args_parser().parse_args(rest[1:]))
        elif program == "python -m toy_portraits.demo":
            demo_parser.parse_args(rest)
        elif program.startswith("python ") and program.endswith(".py") and "/" not in program:
            PROGRAMS[program.removeprefix("python ")](rest)
        else:
            assert program in KNOWN or program in OTHER_TOOLS, words
    assert KNOWN <= seen


KNOWN = {
    "accelerate launch", "python -m toy_portraits.demo", "python app.py", "python evaluate_spf_portrait.py",
    "python export_spf_portrait_lora.py", "python benchmarks/preservation.py", "python benchmarks/choose.py",
    "python benchmarks/random_stable_diffusion.py", "ACCELERATE_USE_CPU=true python -m",
}  # fmt: skip
OTHER_TOOLS = {"pip", "python", ".", "hf", "ln", "pytest"}


def test_the_configuration_file_is_one_accelerate_reads():
    (path,) = (ROOT / "accelerate_configs").iterdir()
    assert f"accelerate_configs/{path.name}" in doc("training.md")
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig) and config.distributed_type == DistributedType.MULTI_GPU
    assert config.num_processes == 2 and config.mixed_precision == "bf16" and not config.use_cpu


def test_the_ci_runs_the_readmes_test_command():
    install, test = next(block for block in blocks("bash", [README]) if "pytest" in block).strip().split(" && ")
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert test in lines
    requirements = install.removeprefix("pip install ")
    assert any(line.startswith("pip install ") and line.endswith(requirements) for line in lines)


# ----------------------------------------------------------------------------------------------------- Python and data


def test_the_python_compiles_and_uses_what_there_is():
    codes, keywords, fields = blocks("python"), set(), set()
    assert len(codes) >= 6
    for code in codes:
        for node in ast.walk(compile(code, "page", "exec", ast.PyCF_ONLY_AST)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "pipe":
                keywords |= {keyword.arg for keyword in node.keywords}
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id == "pipe":
                    assert hasattr(SPFPortraitPipeline, node.attr)
                if node.value.id == "output":
                    fields.add(node.attr)
    assert {"target_prompt", "compare", "return_sfcm"} <= keywords
    assert keywords <= set(inspect.signature(SPFPortraitPipeline.__call__).parameters)
    assert "sfcm" in fields and fields <= set(SPFPortraitPipelineOutput.__dataclass_fields__)


def test_the_table_of_the_pipelines_arguments_is_complete():
    ours = set(inspect.signature(SPFPortraitPipeline.__call__).parameters)
    ours -= set(inspect.signature(StableDiffusionPipeline.__call__).parameters)
    assert set(re.findall(r"^\| `(\w+)` \|", doc("pipeline.md"), re.MULTILINE)) == ours


def pairs_of(block, folder, *words):
    """The prompts of the lines of a block, with little pictures, as the trainer reads them with these flags."""
    records = [json.loads(line) for line in block.splitlines()]
    for record in records:
        Image.new("RGB", (8, 8)).save(folder / record["file_name"])
    (folder / "metadata.jsonl").write_text(block, encoding="utf-8")
    flags = parse_args([*MODEL, *words, "--train_data_dir", str(folder)])
    rows = load_rows(flags.data, flags.columns)
    assert len(rows) == len(records)
    return [
        make_prompt_pair(row.base_prompt, row.target_prompt, row.full_prompt, row.base_phrases, row.free_phrases)
        for row in rows
    ]


def test_the_lines_of_data_make_the_full_prompts_it_says(tmp_path):
    lines, _ = blocks("json", [ROOT / "docs" / "data.md"])
    (full_prompts,) = blocks("text")
    pairs = pairs_of(lines, tmp_path)
    assert [pair.full_prompt for pair in pairs] == full_prompts.splitlines()
    assert pairs[1].target_prompts == pairs[2].target_prompts  # a full prompt and a pair say the same
    assert pairs[1].target_prompts[0].replaces.endswith("T-shirt")
    assert [len(pair.target_prompts) for pair in pairs] == [1, 1, 1, 2, 1, 1]
    assert pairs[4].base_phrases == ("an old man", "a rock and roll T-shirt")
    assert make_prompt_pair(pairs[4].base_prompt, "watercolor style").base_phrases != pairs[4].base_phrases
    assert [pair.free_phrases for pair in pairs] == [()] * 5 + [("a green background",)]
    (few,) = blocks("json", [README])
    pairs = pairs_of(few, tmp_path)
    assert [pair.full_prompt for pair in pairs] == [full_prompts.splitlines()[n] for n in (0, 2)]


def test_the_captions_alone_work_with_one_target_for_the_set(tmp_path):
    _, lines = blocks("json", [ROOT / "docs" / "data.md"])
    command = next(words for words in commands() if "--base_prompt_column" in words)
    pairs = pairs_of(lines, tmp_path, *command[3:])
    assert [pair.full_prompt for pair in pairs] == [
        "a woman, a brown jacket, a curtain background, blonde hair",
        "a man, a white shirt, blonde hair",
    ]


def test_the_head_of_a_space_names_the_page_and_a_gradio_that_is_allowed():
    (head,) = [yaml.safe_load(block.strip("-\n")) for block in blocks("yaml", [ROOT / "docs" / "pipeline.md"])]
    assert head["sdk"] == "gradio" and (ROOT / head["app_file"]).is_file()
    (line,) = [line for line in (ROOT / "requirements-app.txt").read_text().splitlines() if line.startswith("gradio")]
    assert head["sdk_version"] in SpecifierSet(line.removeprefix("gradio"))


# --------------------------------------------------------------------------------------------------------- the figures


class Table(NamedTuple):
    """A table of a page: the heading above it, the names of its columns, and its rows without stars."""

    heading: str
    columns: list[str]
    rows: list[list[str]]


def cells_of(line):
    return [cell.strip().rstrip(" ★☆") for cell in line.strip("|").split("|")]


def tables(path: Path) -> list[Table]:
    """All tables of a page. A first cell that is empty is that of the row above."""
    found, heading, before = [], "", ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("|") and not before.startswith("|"):
            found.append(Table(heading, cells_of(line), []))
        elif line.startswith("|") and not line.startswith("| ---"):
            cells, rows = cells_of(line), found[-1].rows
            rows.append([cells[0] or rows[-1][0], *cells[1:]] if rows else cells)
        before = line
    return found


def is_quoted(table, row, source, label_columns):
    """Whether a source's table has the row: its labels, and in all columns that both have the same cells.

    What is in brackets may be left out.
    """
    shared = [name for name in table.columns[label_columns:] if name and name in source.columns]
    labels = [re.sub(r"^plain LoRA$", "plain LoRA, strength 1", label) for label in row[:label_columns]]

    def equal(theirs, name):
        here, there = row[table.columns.index(name)], theirs[source.columns.index(name)]
        return here in (there, there.partition(" [")[0], re.sub(r" \[.*?\]", "", there))

    return len(shared) > 1 and any(
        theirs[:label_columns] == labels and all(equal(theirs, name) for name in shared) for theirs in source.rows
    )


# The tables that quote: page, heading, which one below it, the benchmark's page and heading, columns that name a row.
QUOTED = [
    ("README.md", "Results", 0, "RESULTS.md", "Mean over targets", 1),
    ("docs/results.md", "Every way to train", 0, "RESULTS.md", "Mean over targets", 1),
    ("docs/results.md", "Every way to train", 1, "RESULTS.md", "Mean over targets", 1),
    ("docs/results.md", "What the defaults are worth", 0, "RESULTS.md", '"blonde hair"', 1),
    ("docs/results.md", "The paper's step, made cheaper", 0, "RESULTS.md", '"blonde hair"', 1),
    ("docs/results.md", "As strong as the target asks for", 0, "PRESENCE.md", "Mean over targets", 1),
    ("docs/results.md", "On the toy SDXL", 0, "RESULTS_SDXL.md", "Mean over targets", 1),
    ("docs/results.md", "On the toy SDXL", 1, "RESULTS_SDXL.md", "Mean over targets", 1),
    ("docs/results.md", "On the toy SD3", 0, "RESULTS_3.md", "Mean over targets", 1),
    ("docs/results.md", "On the toy SD3", 1, "RESULTS_3.md", "Mean over targets", 1),
    ("docs/results.md", "On the toy SD3", 2, "MAP_QUALITY_3.md", "In short", 2),
    ("docs/results.md", "On the toy SD3", 3, "MAP_QUALITY_3.md", "In short", 2),
    ("docs/results.md", "On the toy SD3", 4, "MAP_QUALITY_3.md", "The pointing game", 1),
    ("docs/results.md", "Other ways to train", 0, "RESULTS_EARLIER.md", "Mean over targets", 1),
    ("docs/results.md", "What each choice is worth", 0, "RESULTS_EARLIER.md", '"blonde hair"', 1),
    ("docs/results.md", "What each choice is worth", 1, "RESULTS_EARLIER.md", '"blonde hair"', 1),
    ("docs/results.md", "Is the map right?", 0, "MAP_QUALITY.md", "In short", 2),
    ("docs/results.md", "Is the map right?", 1, "MAP_QUALITY.md", "In short", 2),
    ("docs/results.md", "Is the map right?", 2, "MAP_QUALITY.md", "The pointing game", 1),
    ("docs/results.md", "Three attributes in turn", 0, "CONTINUAL.md", "Three attributes, one after another", 2),
    ("docs/evaluation.md", "Can the measures be trusted?", 0, "PROXIES.md", "Mean over targets", 1),
]


@pytest.mark.parametrize(("page", "heading", "number", "source", "its_heading", "label_columns"), QUOTED)
def test_a_quoted_table_is_the_benchmarks(page, heading, number, source, its_heading, label_columns):
    table = [table for table in tables(ROOT / page) if table.heading == heading][number]
    sources = [table for table in tables(ROOT / "benchmarks" / source) if table.heading == its_heading]
    missing = [row for row in table.rows if not any(is_quoted(table, row, one, label_columns) for one in sources)]
    assert table.rows and sources and not missing
    assert page != "README.md" or len(table.rows) <= 8


def test_the_results_by_target_are_the_benchmarks():
    *_, table = [table for table in tables(ROOT / "docs" / "results.md") if table.heading == "Every way to train"]
    for column, target in enumerate(table.columns[1:], 1):
        source = next(one for one in tables(ROOT / "benchmarks" / "RESULTS.md") if one.heading == f'"{target}"')
        split = Table("", ["", "response", "excess pollution"], [])
        for row in table.rows:
            assert is_quoted(split, [row[0], *row[column].split(" / ")], source, 1), (target, row[0])


def test_every_table_of_results_is_checked():
    checked = sum(page == "docs/results.md" for page, *_ in QUOTED) + 1
    assert len(tables(ROOT / "docs" / "results.md")) == checked


def test_the_guided_shares_are_the_benchmarks_divided():
    (table,) = [one for one in tables(ROOT / "docs" / "pipeline.md") if one.heading == "Guide any LoRA"]
    sources = tables(ROOT / "benchmarks" / "SFCM_GUIDANCE.md")
    rows = ["plain LoRA, s = 0", "plain LoRA, s = 1", "plain LoRA, recommended, s = 1", "SPF-Portrait, s = 0"]
    rows.append("SPF-Portrait, s = 1")
    assert len(sources) == 3 and len(table.rows) == len(sources) * len(rows)

    def numbers(source, label):
        (row,) = [row for row in source.rows if row[0] == label]
        names = ("response", "excess pollution", "skin kept")
        return [float(row[source.columns.index(name)].split(" ± ")[0]) for name in names]

    for number, quoted in enumerate(table.rows):
        source, label = sources[number // len(rows)], rows[number % len(rows)]
        (response, excess, kept), plain = numbers(source, label), numbers(source, rows[0])
        shares = [response / plain[0], excess / plain[1], kept]
        # Both have been rounded to two places.
        assert [float(cell) for cell in quoted[1:]] == pytest.approx(shares, abs=0.012)
