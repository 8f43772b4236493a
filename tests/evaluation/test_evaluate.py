"""The evaluation as a user runs it: on the toy base model, from flags to the files of the report."""

import csv
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from hub_server import HubServer
from PIL import Image
from safetensors import safe_open
from test_report import check_page, read_page

import evaluate_spf_portrait as script
from evaluation.drawing import open_portraits
from evaluation.judges import load_judges
from evaluation.measures import Compared, Portraits, measure, pixel_change
from evaluation.report import PICTURE_HEADERS, prepare_folder
from loras.writing import save_kohya_lora
from pipeline_spf_portrait import SPFPortraitPipeline
from prompts import make_prompt_pair
from toy_portraits.recipe import BASE_MODEL, LORA


ROOT = Path(__file__).resolve().parents[2]
LORA_FILE = LORA / "pytorch_lora_weights.safetensors"
PROMPTS = ["a woman, a green jacket, a purple background", "a man, a white jacket"]
SHORT = ["--num_inference_steps", 2, "--num_resamples", 50, "--device", "cpu"]


def evaluate(*flags):
    script.main([str(flag) for flag in flags])


def save_scaled(folder, strength):
    """The toy world's LoRA at another strength."""
    with safe_open(LORA_FILE, "pt") as file:
        metadata = file.metadata()
    weights = safetensors.torch.load_file(LORA_FILE)
    folder.mkdir(parents=True)
    scaled = {key: w * strength if "lora_B" in key or ".up." in key else w for key, w in weights.items()}
    safetensors.torch.save_file(scaled, folder / LORA_FILE.name, metadata)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A LoRA and the same in kohya's format at the same strength, judged on two prompts with two seeds."""
    folder = tmp_path_factory.mktemp("report")
    kohya = folder / "kohya.safetensors"
    save_kohya_lora(LORA_FILE, kohya)
    evaluate(
        "--toy", "blonde_hair", "--lora", LORA, "--lora", kohya, "--base_prompts", *PROMPTS, "--num_seeds", 2,
        "--seed", 5, "--batch_size", 1, "--region", "sfcm", "--num_pictures", 3, *SHORT,
        "--output_dir", folder / "out",
    )  # fmt: skip
    return folder / "out"


def test_the_report_is_written_from_one_document(report):
    document = json.loads((report / "metrics.json").read_text())
    page = read_page(report / "report.html")
    check_page(page, document)
    # The plot, and for each LoRA three rows of pictures.
    assert len(page.addresses) == 1 + 2 * 3 * len(PICTURE_HEADERS)
    assert [lora["name"] for lora in document["loras"]] == ["original model", "blonde_hair", "kohya"]
    assert document["settings"]["region"] == "sfcm" and document["seeds"] == [5, 6]
    assert [prompt["full"] for prompt in document["prompts"]] == [f"{text}, blonde hair" for text in PROMPTS]
    with (report / "portraits.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 3 * 4 and lines[5]["portrait"] == "p000-s6"
    own = [float(line["change"]) for line in lines if line["lora"] == "kohya"]
    assert document["loras"][2]["measures"]["change"]["value"] == pytest.approx(np.mean(own))


def test_the_numbers_are_those_of_the_pictures_and_kohyas_format_draws_the_same(report):
    def read(model, kind):
        names = [f"p{prompt:03d}-s{seed}" for prompt in range(2) for seed in (5, 6)]
        return np.stack([np.asarray(Image.open(report / "pictures" / model / f"{n}-{kind}.png")) for n in names])

    document = json.loads((report / "metrics.json").read_text())
    original, own, kohya = (lora["measures"] for lora in document["loras"])
    base = read("00-original_model", "base")
    assert own["change"]["value"] == pytest.approx(pixel_change(base, read("01-blonde_hair", "full")).mean())
    assert own["base_change"]["value"] == pytest.approx(pixel_change(base, read("01-blonde_hair", "base")).mean())
    assert original["base_change"]["value"] == 0 and original["pollution"]["value"] == 0
    assert own["pollution"]["value"] > 0.5
    for name in own:
        assert kohya[name]["value"] == pytest.approx(own[name]["value"], abs=0.02), name


def test_the_portraits_are_those_that_compare_draws(report):
    pipeline = SPFPortraitPipeline.from_pretrained(BASE_MODEL, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(LORA)
    output = pipeline(
        PROMPTS[1], target_prompt="blonde hair", compare=True, return_sfcm=True, num_inference_steps=2,
        guidance_scale=5.0, generator=[torch.Generator().manual_seed(6)],
    )  # fmt: skip
    for picture, name in ((output.reference_images[0], "00-original_model/p001-s6-base"),
                          (output.images[0], "01-blonde_hair/p001-s6-full")):  # fmt: skip
        written = np.asarray(Image.open(report / "pictures" / f"{name}.png"), dtype=int)
        assert np.abs(written - np.asarray(picture)).max() <= 1


@pytest.mark.slow
def test_a_run_of_checkpoints_is_judged_by_a_program_of_its_own(tmp_path):
    """Three strengths of one LoRA as the checkpoints of a run, with masks, a reference and prompts from the data.

    Of the network it asks nothing, since it is the toy world's, and it says what it does.
    """
    for step, strength in ((10, 0.0), (20, 0.6), (30, 1.6)):
        save_scaled(tmp_path / "run" / f"checkpoint-{step}", strength)
    masks = tmp_path / "masks"
    masks.mkdir()
    upper = np.zeros((64, 64), dtype=np.uint8)
    upper[:32] = 255
    for prompt in range(4):
        Image.fromarray(upper).save(masks / f"p{prompt:03d}-s0.png")
    command = [
        sys.executable, str(ROOT / "evaluate_spf_portrait.py"), "--toy", "blonde_hair", "--checkpoints",
        str(tmp_path / "run"), "--reference_lora", str(LORA), "--prompts_file",
        str(BASE_MODEL.parent / "blonde_hair" / "metadata.jsonl"), "--max_prompts", "4", "--num_seeds", "1",
        "--region_masks", str(masks), "--num_inference_steps", "8", "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip
    with HubServer("user", "token") as hub:
        variables = hub.environment(tmp_path / "home")
        variables.pop("HF_HUB_DISABLE_TELEMETRY")
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert hub.requests == []
    document = json.loads((tmp_path / "out" / "metrics.json").read_text())
    check_page(read_page(tmp_path / "out" / "report.html"), document)
    _, reference, first, middle, last = (lora["measures"]["pollution"]["value"] for lora in document["loras"])
    assert reference == 1 and abs(first) < 1e-3 and 0 < middle < last
    # The one of no strength changes nothing, and so its target is not there.
    assert document["loras"][2]["flags"] == ["over-aligned"]
    assert document["keep"] in ("checkpoint-20", "checkpoint-30") and document["keep"] in document["verdict"]
    assert document["region"].endswith("--region_masks.")
    said = done.stdout.splitlines()
    assert said[-2:] == [document["verdict"], str(tmp_path / "out" / "report.html")]
    missing = [line for line in said if line.startswith("not measured: ")]
    assert sum("facebook/dinov2-base" in line for line in missing) == 1
    assert sum("jonathandinu/face-parsing" in line for line in missing) == 1
    names = [lora["name"] for lora in document["loras"]]
    for phase in ("drawing", "measuring"):
        lines = [f"{phase} {i} of 5: {name}" for i, name in enumerate(names, start=1)]
        assert [line for line in said if line.startswith(phase)] == lines
        assert done.stderr.count(f"{phase}: 100%") >= 5 and "4/4" in done.stderr


def test_loras_of_alike_names_have_folders_of_their_own(tmp_path):
    """And none takes the original model's. They are compared with the toy world's truth, too."""
    names = ("original model", "my lora", "my_lora", "m" * 200)
    for strength, name in enumerate(names):
        save_scaled(tmp_path / name, strength)
    evaluate(
        *TOY, *(word for name in names for word in ("--lora", tmp_path / name)), "--max_prompts", 1, "--num_seeds", 1,
        *SHORT, "--output_dir", tmp_path / "out",
    )  # fmt: skip
    document = json.loads((tmp_path / "out" / "metrics.json").read_text())
    if importlib.util.find_spec("torchmetrics"):
        proxies = [row["proxy"] for row in document["rank_correlations"]]
        assert set(proxies) >= {"pollution", "clip_t", "leak", "ssim"}
        assert "Do the measures order the LoRAs" in (tmp_path / "out" / "report.html").read_text()
    assert document["settings"]["region"] == "probe"
    loras = document["loras"]
    assert [lora["name"] for lora in loras] == ["original model", "original model (2)", *names[1:]]
    pictures = [
        np.asarray(Image.open(tmp_path / "out" / lora["pictures"] / "p000-s0-full.png"), dtype=int) for lora in loras
    ]
    base = np.asarray(Image.open(tmp_path / "out" / loras[0]["pictures"] / "p000-s0-base.png"), dtype=int)
    change = [np.abs(picture - base).mean() for picture in pictures]
    assert [lora["measures"]["change"]["value"] for lora in loras] == pytest.approx(change)
    # A LoRA of strength 0 draws as the original model, and every other one differs from all.
    assert np.abs(pictures[0] - pictures[1]).max() <= 1 and len({round(value, 3) for value in change[1:]}) == 4


def test_what_was_measured_is_kept_when_a_later_lora_fails(report, tmp_path, monkeypatch, capsys):
    command = [
        *TOY, "--lora", LORA, "--lora", report.parent / "kohya.safetensors", "--base_prompts", *PROMPTS,
        "--num_seeds", 2, "--seed", 5, *SHORT, "--output_dir", tmp_path / "out",
    ]  # fmt: skip
    monkeypatch.setattr(
        script, "draw_portraits", lambda *args: shutil.copytree(report / "pictures" / args[3].name, args[3])
    )
    real, count = script.measure, [0]

    def measure(*args):
        count[0] += 1
        if count[0] == 3:
            raise OSError("the disk is gone")
        return real(*args)

    monkeypatch.setattr(script, "measure", measure)
    with pytest.raises(SystemExit, match="the disk is gone"):
        evaluate(*command)
    for table in ("metrics.csv", "portraits.csv"):
        with (tmp_path / "out" / table).open() as file:
            assert {line["lora"] for line in csv.DictReader(file)} == {"original model", "blonde_hair"}
    assert not (tmp_path / "out" / "report.html").exists()
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.endswith(".part")]
    # They are not overwritten by another evaluation, whatever it is of.
    kept = (tmp_path / "out" / "metrics.csv").read_bytes()
    capsys.readouterr()
    with pytest.raises(SystemExit, match="--output_dir .*out: holds metrics.csv of an earlier evaluation"):
        evaluate(*command)
    assert "drawing" not in capsys.readouterr().out and (tmp_path / "out" / "metrics.csv").read_bytes() == kept


def test_what_was_drawn_and_never_measured_is_replaced(tmp_path):
    unfinished = tmp_path / "pictures" / "07-other"
    unfinished.mkdir(parents=True)
    own, foreign = unfinished / "p011-s3-full.png", unfinished / "holiday.png"
    for path in (own, foreign):
        path.write_bytes(b"")
    prepare_folder(tmp_path)
    assert not own.exists() and foreign.exists()


def test_help_shows_defaults_and_the_models_that_judge(capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    shown = capsys.readouterr().out
    assert "(default: 25)" in shown and "facebook/dinov2-base" in shown


def test_a_tilde_is_the_home_folder_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    paths = (
        "pretrained_model_name_or_path", "lora", "checkpoints", "reference_lora", "prompts_file", "region_masks",
        "clip_model_name_or_path", "dino_model_name_or_path", "segmenter_model_name_or_path", "output_dir",
    )  # fmt: skip
    args = script.parse_args([*(f"--{name}=~/it" for name in paths), "--target_prompt", "~/it"])
    found = {name: getattr(args, name) for name in paths} | {"lora": args.lora[0]}
    assert {name: str(value) for name, value in found.items()} == dict.fromkeys(paths, "/home/someone/it")
    assert args.target_prompt == ["~/it"]


def test_portraits_are_measured_alike_one_by_one_and_all_at_once(report, models):
    given = {"clip_model_name_or_path": BASE_MODEL / "clip", "dino_model_name_or_path": models / "dino"}
    given |= {"segmenter_model_name_or_path": models / "segmenter", "face_model_name": None}
    judges = load_judges(SimpleNamespace(**{k: v and str(v) for k, v in given.items()}), "cpu", ask_network=False)
    names = [f"p{prompt:03d}-s{seed}" for prompt in range(2) for seed in (5, 6)]
    pairs = [make_prompt_pair(prompt, ["blonde hair"]) for prompt in PROMPTS for _ in (5, 6)]
    region = np.random.default_rng(0).random((4, 64, 64))
    original, adapted = (
        open_portraits(report / "pictures" / name, names) for name in ("00-original_model", "01-blonde_hair")
    )

    def part(chosen):
        before, after = (Portraits(own.base[chosen], own.full[chosen]) for own in (original, adapted))
        return Compared(before, after, region[chosen], pairs[chosen])

    whole, of_set = measure([part(slice(4))], judges)
    single, of_singles = measure((part(slice(i, i + 1)) for i in range(4)), judges)
    assert set(single) == set(whole) and {"ssim", "seg_cons", "dino", "clip_i", "change_outside"} <= set(whole)
    for name, values in whole.items():
        # A label at the border of two may fall to either.
        tolerance = 2 / 64**2 if name == "seg_cons" else 1e-5
        assert values.shape == (4,) and np.abs(single[name] - values).max() < tolerance, name
    assert of_singles.keys() == of_set.keys() and of_singles == pytest.approx(of_set, rel=1e-4)


PEAK = """
import json, re, sys

import evaluate_spf_portrait as script

runs = [script.parse_args(flags) for flags in json.loads(sys.argv[1])]
judges = script.load_judges(runs[0], "cpu")
for args in runs:
    pairs, models = script.read_prompts(args), [script.ORIGINAL, *script.find_loras(args)]
    folders = script.picture_folders(args.output_dir, models)
    document = script.measure_all(args, pairs, models, folders, judges)
    script.report(args, pairs, folders, document)
    print(*document["loras"][0]["measures"])
    # Not of `getrusage`, whose peak begins with that of the process it was started from.
    print(int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) // 1024)
"""


def noise_to_measure(folder, count, models):
    """So many pictures of 512 pixels of the original model and of a LoRA, as if drawn, and the flags that measure
    them; all of noise, since what there is to see costs no memory."""
    rng = np.random.default_rng(0)
    for model in ("00-original_model", "01-blonde_hair"):
        (folder / "pictures" / model).mkdir(parents=True)
        for seed in range(count):
            for kind in ("base", "full"):
                noise = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).resize((512, 512))
                noise.save(folder / "pictures" / model / f"p000-s{seed}-{kind}.png")
            np.save(folder / "pictures" / model / f"p000-s{seed}-sfcm.npy", rng.random((64, 64), dtype=np.float32))
    given = {
        "pretrained_model_name_or_path": BASE_MODEL, "lora": LORA, "base_prompts": "a man", "target_prompt": "a hat",
        "clip_model_name_or_path": BASE_MODEL / "clip", "dino_model_name_or_path": models / "dino",
        "segmenter_model_name_or_path": models / "segmenter", "num_seeds": count, "num_pictures": 2,
        "output_dir": folder,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in given.items()]


@pytest.mark.slow
def test_the_memory_of_measuring_does_not_grow_with_the_number_of_portraits(tmp_path, models):
    flags = [noise_to_measure(tmp_path / str(count), count, models) for count in (8, 24)]
    command = [sys.executable, "-c", PEAK, json.dumps(flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, few, _, many = [line for line in done.stdout.splitlines() if not line.startswith("measuring")]
    print(f"peak: {few} MiB with 8 portraits, {many} MiB with 24")
    measured = {"change_outside", "ssim", "clip_t_inside", "direction", "leak", "dino", "seg_cons"}
    assert measured <= set(first.split())
    # The libraries alone take some 550; a single portrait in float64 is 6, and torchmetrics' SSIM took 1300 for each.
    assert int(many) < int(few) + 40 and int(many) < 1024


TOY = ("--toy", "blonde_hair")
MODEL = ("--pretrained_model_name_or_path", BASE_MODEL)
ASKED = ("--base_prompts", "a man", "--target_prompt", "a hat")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((*TOY,), "nothing to evaluate: give --lora, --checkpoints or --reference_lora"),
        (("--lora", LORA), "--pretrained_model_name_or_path is missing"),
        ((*MODEL, "--lora", LORA), "no prompts: give --base_prompts or --prompts_file"),
        ((*MODEL, "--lora", LORA, "--base_prompts", "a man"), "--base_prompts needs --target_prompt"),
        ((*TOY, "--lora", LORA, "--base_prompts", "a", "--prompts_file", "b"), "not both"),
        ((*TOY, "--lora", LORA, "--resolution", 128), "--toy has portraits of 64 pixels"),
        ((*MODEL, "--lora", LORA, *ASKED, "--resolution", 100), "--resolution must be a multiple of 8, not 100"),
        ((*MODEL, "--lora", LORA, *ASKED, "--resolution", -8), "--resolution must be at least 1, not -8"),
        ((*TOY, "--lora", LORA, "--num_seeds", 0), "--num_seeds must be at least 1, not 0"),
        ((*TOY, "--lora", LORA, "--seed", -1), "--seed must be at least 0, not -1"),
        ((*TOY, "--lora", LORA, "--lora_scale", "nan"), "--lora_scale must be a finite number, not nan"),
        ((*TOY, "--lora", LORA, "--region", "masks"), "--region masks and --region_masks belong together"),
        ((*TOY, "--lora", LORA, "--region", "sfcm", "--region_masks", "m"), "belong together"),
        (
            (*MODEL, "--lora", LORA, "--base_prompts", "a man", "--target_prompt", "a hat", "--region", "probe"),
            "--region probe needs --toy",
        ),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, message, capsys, tmp_path):
    with pytest.raises(SystemExit):
        evaluate(*flags, "--output_dir", tmp_path / "out")
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--lora", "no/such/thing"), "--lora no/such/thing: "),
        (("--checkpoints", "none"), "--checkpoints none: no such folder"),
        (("--checkpoints", LORA), "holds no checkpoint-<step>"),
        (("--lora", LORA, "--prompts_file", "none.jsonl"), "--prompts_file none.jsonl: "),
        (("--lora", LORA, "--base_prompts", "a man, blonde hair"), "the target 'blonde hair' is in the base prompt"),
        (("--lora", LORA, "--region_masks", "none"), "--region_masks none: no such folder"),
        (("--lora", LORA, "--device", "warp"), "--device warp: "),
        (("--lora", LORA, "--pretrained_model_name_or_path", "none"), "--pretrained_model_name_or_path none: "),
        (("--lora", LORA, "--dino_model_name_or_path", "none"), "--dino_model_name_or_path none: "),
    ],
)
def test_mistakes_end_in_one_line_before_anything_is_drawn(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as found:
        evaluate(*TOY, *flags, "--output_dir", tmp_path / "out")
    assert str(found.value).startswith("evaluate_spf_portrait.py: error: ") and message in str(found.value)
    assert "\n" not in str(found.value) and "drawing" not in capsys.readouterr().out
    assert not (tmp_path / "out" / "report.html").exists()
