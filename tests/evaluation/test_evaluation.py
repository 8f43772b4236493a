"""The parts of an evaluation: prompts, LoRAs and masks, the models that judge, the summary, and the files written."""

import argparse
import csv
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from hub_server import HubServer
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessorPil,
)

from evaluation import judges as evaluation_models
from evaluation.inputs import find_loras, picture_name, read_masks, read_prompts
from evaluation.judges import Faces, add_pictures, frechet_distance, load_judges
from evaluation.report import PictureRow, format_number, response_plot, without_nan, write_csv, write_html, write_json
from evaluation.summary import Judged, correlate, summarise
from loras.files import save_kohya_lora
from programs.loading import InputError
from toy_portraits.recipe import BASE_MODEL, LORA
from training.data import load_rows
from training.flags import ColumnFlags, DataFlags


LORA_FILE = LORA / "pytorch_lora_weights.safetensors"
METADATA = BASE_MODEL.parent / "red_hat" / "metadata.jsonl"
BASE = "a woman, a green jacket"


def flags(**given):
    """The flags of the inputs, not set unless given."""
    names = ("base_prompts", "prompts_file", "target_prompt", "max_prompts", "lora", "checkpoints", "reference_lora")
    return argparse.Namespace(**dict.fromkeys(names) | given)


# ------------------------------------------------------------------------------------------------------------- prompts


def test_base_prompts_share_the_targets_of_the_flag():
    pairs = read_prompts(flags(base_prompts=[BASE, "a man", BASE], target_prompt=["a red hat", "glasses"]))
    assert [pair.full_prompt for pair in pairs] == [f"{BASE}, a red hat, glasses", "a man, a red hat, glasses"]
    assert len(read_prompts(flags(base_prompts=[BASE, "a man"], target_prompt=["a red hat"], max_prompts=1))) == 1


def test_the_training_data_are_prompts(tmp_path):
    pairs = read_prompts(flags(prompts_file=METADATA))
    assert len(pairs) == len(set(pairs)) > 10
    assert {pair.target_text for pair in pairs} == {"a red hat"}
    lines = [
        {"base_prompt": BASE, "target_prompt": [["a green jacket", "a striped shirt"]], "free_phrases": None},
        {"base_prompt": BASE, "target_prompt": "a coat", "full_prompt": "a woman, a coat"},
        {"base_prompt": "a man, a wall", "base_phrases": ["a man"]},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n\n".join(map(json.dumps, lines)), encoding="utf-8")
    pairs = read_prompts(flags(prompts_file=path, target_prompt=["a tie"]))
    assert [p.full_prompt for p in pairs] == ["a woman, a striped shirt", "a woman, a coat", "a man, a wall, a tie"]
    assert pairs[2].base_phrases == ("a man",)


@pytest.mark.parametrize(
    "form",
    [
        lambda text: b"\xef\xbb\xbf" + text.encode(),
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: b"\xef\xbb\xbf" + text.replace("\n", "\r\n\r\n").encode(),
    ],
    ids=["mark", "windows", "both"],
)
def test_a_prompts_file_is_read_as_the_trainer_reads_its_metadata(tmp_path, form):
    lines = [
        {"file_name": "a.png", "base_prompt": "a man, a \u2028hat\x85", "target_prompt": "a tie", "free_phrases": []},
        {"file_name": "b.png", "base_prompt": BASE, "target_prompt": "a tie", "free_phrases": ["a woman"]},
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path = tmp_path / "metadata.jsonl"
    path.write_bytes(form(text))
    for name in "ab":
        Image.new("RGB", (64, 64)).save(tmp_path / f"{name}.png")
    trained = load_rows(DataFlags(train_data_dir=tmp_path), ColumnFlags())
    judged = read_prompts(flags(prompts_file=path))
    assert [p.base_prompt for p in judged] == [row.base_prompt for row in trained] == [x["base_prompt"] for x in lines]
    assert [p.free_phrases for p in judged] == [row.free_phrases for row in trained] == [(), ("a woman",)]


def test_a_full_prompt_that_the_pipeline_composes_in_another_way_is_said_so(tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    line = {"base_prompt": "a woman in a coat", "target_prompt": "blonde", "full_prompt": "a blonde woman in a coat"}
    path.write_text(json.dumps(line), encoding="utf-8")
    assert read_prompts(flags(prompts_file=path))[0].full_prompt == "a woman in a coat, blonde"
    assert "'a blonde woman in a coat' is drawn as 'a woman in a coat, blonde'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--prompts_file .*: holds no prompts"),
        ("\n \n", "holds no prompts"),
        ("{", "line 1 is not JSON: "),
        ("[1]", r"line 1 must be a JSON object with columns, got \[1\]"),
        ('\n{"target_prompt": "a hat"}', "line 2: 'base_prompt' must be a text, got None"),
        ('{"base_prompt": "a man"}', "line 1: the base prompt 'a man' has no target: give --target_prompt"),
        ('{"base_prompt": "a man", "target_prompt": 3}', "'target_prompt' must be a text"),
        ('{"base_prompt": "a man, a hat", "target_prompt": "a hat"}', "the target 'a hat' is in the base prompt"),
        ('{"base_prompt": "a man in a red hat", "target_prompt": ["a red hat"]}', "'a red hat' is in the base prompt"),
        ('{"base_prompt": "a man", "target_prompt": [["a shirt", "a coat"]]}', "'a shirt' is not in the base prompt"),
        ('{"base_prompt": "a man", "target_prompt": "a hat", "base_phrases": "a man"}', "must be a list of phrases"),
    ],
)
def test_bad_prompts_are_one_line_that_names_the_place(tmp_path, text, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message) as found:
        read_prompts(flags(prompts_file=path))
    assert "\n" not in str(found.value) and str(found.value).startswith(f"--prompts_file {path}")


def test_a_missing_prompts_file_and_a_target_that_is_there_already_are_named():
    with pytest.raises(InputError, match="--prompts_file none.jsonl: .*No such file"):
        read_prompts(flags(prompts_file=Path("none.jsonl")))
    with pytest.raises(InputError, match="--base_prompts: the target 'a green jacket' is in the base prompt"):
        read_prompts(flags(base_prompts=[BASE], target_prompt=["a green jacket"]))


# --------------------------------------------------------------------------------------------------------------- LoRAs


@pytest.fixture
def run_folder(tmp_path):
    """The output folder of a training, with two checkpoints and a final LoRA that is the last one's."""
    run = tmp_path / "run"
    for step in (20, 100):
        folder = run / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        folder.joinpath(LORA_FILE.name).write_bytes(LORA_FILE.read_bytes())
    run.joinpath(LORA_FILE.name).write_bytes(LORA_FILE.read_bytes())
    return run


def test_loras_have_names_and_the_reference_comes_first(tmp_path):
    kohya = tmp_path / "hair.safetensors"
    save_kohya_lora(LORA_FILE, kohya)
    other = tmp_path / "blonde_hair"
    other.mkdir()
    other.joinpath("x.safetensors").write_bytes(kohya.read_bytes())
    found = find_loras(flags(reference_lora=str(LORA), lora=[str(kohya), str(LORA_FILE), str(other)]))
    assert [(lora.name, lora.role) for lora in found] == [
        ("blonde_hair", "reference"), ("hair", "lora"), ("blonde_hair (2)", "lora"),
    ]  # fmt: skip
    assert [lora.path for lora in found] == [LORA_FILE, kohya, other / "x.safetensors"]
    assert [lora.name for lora in find_loras(flags(lora=[str(LORA_FILE)]))] == ["blonde_hair"]


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["original model"], ["original model (2)"]),
        (["a (2)", "a", "b/a"], ["a (2)", "a", "a (3)"]),
        (["a", "b/a", "a (2)", "c/a"], ["a", "a (2)", "a (2) (2)", "a (3)"]),
    ],
)
def test_no_lora_has_the_name_of_another_or_of_the_original_model(tmp_path, given, names):
    for name in given:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        folder.joinpath(LORA_FILE.name).write_bytes(LORA_FILE.read_bytes())
    found = find_loras(flags(lora=[str(tmp_path / name) for name in given]))
    assert [lora.name for lora in found] == names


def test_checkpoints_are_in_the_order_of_their_steps_and_the_final_lora_last(run_folder):
    names = ["checkpoint-20", "checkpoint-100"]
    found = find_loras(flags(checkpoints=run_folder))
    assert [lora.name for lora in found] == names and {lora.role for lora in found} == {"checkpoint"}
    save_kohya_lora(LORA_FILE, run_folder / LORA_FILE.name)
    assert [lora.name for lora in find_loras(flags(checkpoints=run_folder))] == [*names, "final"]


def test_what_is_no_lora_or_no_run_is_one_line(tmp_path, run_folder):
    with pytest.raises(InputError, match="--lora no/such/thing: "):
        find_loras(flags(lora=["no/such/thing"]))
    with pytest.raises(InputError, match=f"--reference_lora {tmp_path}: the folder has no pytorch_lora_weights"):
        find_loras(flags(reference_lora=str(tmp_path)))
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"no LoRA")
    with pytest.raises(InputError, match=f"--lora {damaged}: no safetensors file"):
        find_loras(flags(lora=[str(damaged)]))
    with pytest.raises(InputError, match="--checkpoints none: no such folder"):
        find_loras(flags(checkpoints=Path("none")))
    with pytest.raises(InputError, match="--checkpoints .*: holds no checkpoint-<step>"):
        find_loras(flags(checkpoints=LORA))
    broken = run_folder / "checkpoint-20" / LORA_FILE.name
    broken.write_bytes(b"no LoRA")
    with pytest.raises(InputError, match=f"--checkpoints {broken}: no safetensors file"):
        find_loras(flags(checkpoints=run_folder))
    broken.unlink()
    with pytest.raises(InputError, match="checkpoint-20 has no pytorch_lora_weights.safetensors"):
        find_loras(flags(checkpoints=run_folder))


# --------------------------------------------------------------------------------------------------------------- masks


def test_masks_are_read_in_the_portraits_size(tmp_path):
    half = np.zeros((4, 4), dtype=np.uint8)
    half[:, 2:] = 255
    for name in (picture_name(0, 7), picture_name(12, 7)):
        Image.fromarray(half).save(tmp_path / f"{name}.png")
    masks = read_masks(tmp_path, ["p000-s7", "p012-s7"], (4, 4))
    assert masks.shape == (2, 4, 4) and (masks == half / 255).all()
    assert read_masks(tmp_path, ["p000-s7"], (16, 8))[0, :, [0, -1]].tolist() == [[0] * 16, [1] * 16]


def test_a_mask_that_is_missing_or_no_picture_is_named(tmp_path):
    with pytest.raises(InputError, match="--region_masks none: no such folder"):
        read_masks(Path("none"), [], (4, 4))
    with pytest.raises(InputError, match="p000-s0.png is missing"):
        read_masks(tmp_path, ["p000-s0"], (4, 4))
    (tmp_path / "p000-s0.png").write_text("no picture")
    with pytest.raises(InputError, match="p000-s0.png cannot be read"):
        read_masks(tmp_path, ["p000-s0"], (4, 4))


# -------------------------------------------------------------------------------------------------------------- models


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders with a tiny DINOv2 and a tiny SegFormer of random weights."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    dino = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(dino).save_pretrained(folder / "dino")
    processor = BitImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor.save_pretrained(folder / "dino")
    segmenter = SegformerConfig(
        depths=[1] * 4, hidden_sizes=[8, 8, 8, 8], num_attention_heads=[1] * 4, decoder_hidden_size=8, num_labels=5,
        sr_ratios=[1] * 4,
    )  # fmt: skip
    SegformerForSemanticSegmentation(segmenter).save_pretrained(folder / "segmenter")
    SegformerImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "segmenter")
    return folder


def named(**given):
    names = ("clip_model_name_or_path", "dino_model_name_or_path", "segmenter_model_name_or_path", "face_model_name")
    return argparse.Namespace(**dict.fromkeys(names) | given)


@pytest.fixture(scope="module")
def portraits():
    """20 toy portraits, more than one batch."""
    files = sorted(METADATA.parent.glob("*.png"))[:20]
    return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])


def test_models_that_are_named_judge_as_the_library_does(models, portraits):
    judges = load_judges(
        named(
            clip_model_name_or_path=str(BASE_MODEL / "clip"),
            dino_model_name_or_path=str(models / "dino"),
            segmenter_model_name_or_path=str(models / "segmenter"),
        ),
        "cpu",
    )
    pixels = BitImageProcessorPil.from_pretrained(models / "dino")(list(portraits), return_tensors="pt")
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(models / "dino")(**pixels).last_hidden_state[:, 0].numpy()
    assert np.abs(judges.dino.images(portraits) - expected).max() < 1e-5
    labels = judges.segmenter.labels(portraits)
    assert labels.shape == portraits.shape[:3] and 1 < len(np.unique(labels)) <= 5
    assert (labels[17] == judges.segmenter.labels(portraits[17:18])[0]).mean() > 0.999
    images, texts = judges.clip.images(portraits), judges.clip.texts(["a red hat", "a man"])
    assert images.shape[1] == texts.shape[1] and len(images) == 20
    # The toy CLIP finds the hat of this training set nearer than the man or woman under it.
    assert ((images @ texts[0]) > (images @ texts[1])).mean() > 0.8
    assert not set(judges.missing) & {"clip_i", "dino", "seg_cons"}


def test_a_model_that_is_named_and_not_there_is_an_error(tmp_path):
    for flag in ("clip_model_name_or_path", "dino_model_name_or_path", "segmenter_model_name_or_path"):
        with pytest.raises(InputError, match=f"--{flag} {tmp_path}: ") as found:
            load_judges(named(**{flag: str(tmp_path)}), "cpu", ask_network=False)
        assert "\n" not in str(found.value)
    with pytest.raises(InputError, match="--face_model_name buffalo_l: No module named 'insightface'"):
        load_judges(named(clip_model_name_or_path=str(BASE_MODEL / "clip"), face_model_name="buffalo_l"), "cpu")


def test_what_is_only_a_default_and_not_there_is_not_computed(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    judges = load_judges(named(), "cpu")
    assert (judges.clip, judges.dino, judges.segmenter, judges.face) == (None,) * 4
    assert judges.lpips is None and judges.inception is None
    needed = {"clip_i", "clip_t", "clip_t_inside", "direction", "leak", "dino", "fd_dino", "seg_cons", "identity"}
    assert needed <= set(judges.missing) and "ssim" not in judges.missing
    assert judges.missing["dino"].startswith("facebook/dinov2-base cannot be loaded (not on this machine, and the Hub")
    assert judges.missing["dino"].endswith("see --dino_model_name_or_path")
    assert "non-commercial" in judges.missing["identity"]
    assert judges.missing["lpips"] == "torchmetrics is not installed (requirements-eval.txt)"


def test_what_torch_would_download_is_not_asked_for_where_the_network_is_not(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    judges = load_judges(named(), "cpu", ask_network=False)
    for name in ("lpips", "fid"):
        assert judges.missing[name].endswith("is not on this machine, and the network is not asked for it")
    (tmp_path / "checkpoints").mkdir()
    for weights in evaluation_models.TORCH_WEIGHTS.values():
        (tmp_path / "checkpoints" / weights).touch()
    judges = load_judges(named(), "cpu", ask_network=False)
    assert "torchvision" in judges.missing["lpips"] and "fidelity" in judges.missing["fid"]


ASKS = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
import argparse
from evaluation.judges import load_judges
names = ("clip_model_name_or_path", "dino_model_name_or_path", "segmenter_model_name_or_path", "face_model_name")
for ask in (False, True):
    start = time.monotonic()
    judges = load_judges(argparse.Namespace(**dict.fromkeys(names)), "cpu", ask)
    print(json.dumps([time.monotonic() - start, judges.missing]))
"""


def judges_elsewhere(endpoint, home):
    """Seconds and missing measures of a process that knows this Hub: first without asking it, then asking."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    variables = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", ASKS, str(BASE_MODEL.parents[1])], env=kept | variables, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Retrying" not in done.stderr and "Traceback" not in done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()[-2:]]


def test_each_default_that_a_hub_does_not_have_costs_it_one_question(tmp_path):
    with HubServer("user", "token") as hub:
        (_, unasked), (_, asked) = judges_elsewhere(hub.url, tmp_path)
    assert [request.path for request in hub.requests if request.method == "HEAD"] == [
        f"/{name}/resolve/main/config.json"
        for name in ("openai/clip-vit-large-patch14", "facebook/dinov2-base", "jonathandinu/face-parsing")
    ]
    assert "(not on this machine, and not given out by the Hub: 401 Client Error)" in asked["dino"]
    assert "(not on this machine, and the network is not asked for it)" in unasked["seg_cons"]


def test_a_hub_that_does_not_answer_is_waited_for_once_and_not_asked_for_what_is_here(tmp_path, models):
    """Who connects to this place is let in and hears nothing, as behind many a firewall."""
    cached = tmp_path / "hub" / "models--facebook--dinov2-base"
    shutil.copytree(models / "dino", cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        (without, _), (seconds, missing) = judges_elsewhere(f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path)
    assert without < evaluation_models.TIMEOUT <= seconds < 2 * evaluation_models.TIMEOUT
    assert "dino" not in missing
    for name in ("clip_i", "seg_cons"):
        assert "the Hub does not answer" in missing[name] and "\n" not in missing[name]


def test_torchmetrics_brings_what_needs_no_torchvision():
    pytest.importorskip("torchmetrics")
    judges = load_judges(named(), "cpu")
    assert "torchvision" in judges.missing["lpips"] and "fidelity" in judges.missing["fid"]
    assert judges.torchmetrics and "dinov2-base" in judges.missing["fd_dino"]


def test_the_frechet_distance_of_sets_with_one_spread_is_the_squared_distance_of_their_means():
    pytest.importorskip("torchmetrics")
    first = np.random.default_rng(0).normal(size=(50, 3))
    assert frechet_distance(first, first + np.array([1.0, 2, 0])) == pytest.approx(5, abs=1e-6)
    # Twice as wide around the same mean in each of three directions of variance v: v * (2 - 1)^2.
    centred = first - first.mean(0)
    assert frechet_distance(centred, 2 * centred) == pytest.approx(centred.var(0, ddof=1).sum(), rel=1e-6)


class MeanColor(torch.nn.Module):
    """Features as simple as they can be, in the place of Inception's."""

    num_features = 3

    def forward(self, pictures):
        return pictures.double().mean((2, 3))


def test_inceptions_distance_is_of_all_pictures(portraits):
    fid = pytest.importorskip("torchmetrics.image.fid").FrechetInceptionDistance
    darker = (portraits // 2).astype(np.uint8)
    distance = fid(feature=MeanColor())
    for start in range(0, len(portraits), 7):
        add_pictures(distance, portraits[start : start + 7], darker[start : start + 7])
    features = (pictures.astype(np.float64).mean((1, 2)) for pictures in (portraits, darker))
    assert float(distance.compute()) == pytest.approx(frechet_distance(*features), rel=1e-6)


def test_lpips_and_fid_are_used_where_their_packages_are(monkeypatch, portraits):
    """With stand-ins of the two classes, which want torchvision, torch-fidelity and weights from the network."""
    fid = pytest.importorskip("torchmetrics.image.fid").FrechetInceptionDistance

    class Lpips(torch.nn.Module):
        def __init__(self, net_type, normalize, reduction):
            super().__init__()
            assert net_type == "alex" and normalize
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, first, second):
            assert first.shape[1] == 3 and 0 <= first.min() and first.max() <= 1
            return self.weight * (first - second).abs().mean()

    lpip, module = ModuleType("torchmetrics.image.lpip"), ModuleType("torchmetrics.image.fid")
    lpip.LearnedPerceptualImagePatchSimilarity = Lpips
    module.FrechetInceptionDistance = lambda features: fid(feature=MeanColor())
    monkeypatch.setitem(sys.modules, lpip.__name__, lpip)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    judges = load_judges(named(), "cpu")
    assert not {"lpips", "fid"} & set(judges.missing)
    dark, light = (np.full((2, 8, 8, 3), value, dtype=np.uint8) for value in (0, 51))
    assert judges.lpips(dark, light) == pytest.approx([0.2, 0.2])
    # Each call begins anew.
    for _ in range(2):
        distance = judges.inception()
        add_pictures(distance, dark, light)
        assert float(distance.compute()) == pytest.approx(3 * 51**2, rel=1e-3)


def test_the_largest_face_of_a_picture_counts(monkeypatch):
    """With a stand-in of insightface, whose weights cannot be had here."""

    class FaceAnalysis:
        def __init__(self, name, allowed_modules):
            assert name == "buffalo_l" and "recognition" in allowed_modules

        def prepare(self, ctx_id):
            assert ctx_id == -1

        def get(self, picture):
            assert picture[0, 0].tolist() == [3, 2, 1]  # BGR
            sizes = {0: [], 1: [(2, (1, 0)), (5, (0, 1))]}[int(picture[1, 1, 0])]
            return [SimpleNamespace(bbox=np.array([0, 0, s, s]), normed_embedding=np.array(e)) for s, e in sizes]

    app = ModuleType("insightface.app")
    app.FaceAnalysis = FaceAnalysis
    monkeypatch.setitem(sys.modules, "insightface", ModuleType("insightface"))
    monkeypatch.setitem(sys.modules, "insightface.app", app)
    pictures = np.zeros((2, 2, 2, 3), dtype=np.uint8)
    pictures[:, 0, 0] = (1, 2, 3)
    pictures[1, 1, 1] = 1
    found = Faces("buffalo_l", "cpu").images(pictures)
    assert np.isnan(found[0]).all() and found[1].tolist() == [0, 1]
    assert np.isnan(Faces("buffalo_l", "cpu").images(pictures[:1])).all()
    clip = {"clip_model_name_or_path": str(BASE_MODEL / "clip")}
    judges = load_judges(named(**clip, face_model_name="buffalo_l"), "cpu", ask_network=False)
    assert isinstance(judges.face, Faces)


# ------------------------------------------------------------------------------------------------------------- summary


def judged(name, role, outside, base, response, **values):
    """A model whose three prompts and two seeds are all alike but for a little."""
    wobble = np.array([[0.0, 0.02], [-0.01, 0.01], [0.0, -0.02]])
    own = {"change": outside, "change_outside": outside, "base_change": base, "clip_t_inside": response, **values}
    return Judged(name, f"/loras/{name}", role, {key: value + wobble for key, value in own.items()}, {})


ORIGINAL = judged("original model", "original", 1, 0, 0.2)
PLAIN = judged("plain", "reference", 9, 8, 0.8)


def test_the_summary_is_in_units_of_the_reference():
    good = judged("good", "lora", 5, 3, 0.8)
    document = summarise([ORIGINAL, PLAIN, good], {"dino": "no network"}, 200, 0)
    by_name = {lora["name"]: lora for lora in document["loras"]}
    values = [lora["measures"]["pollution"]["value"] for lora in document["loras"]]
    assert values == pytest.approx([0, 1, 7 / 16])
    pollution = by_name["good"]["measures"]["pollution"]
    assert pollution["low"] <= pollution["value"] <= pollution["high"] and pollution["high"] - pollution["low"] < 0.05
    assert document["pollution_unit"] == "1 is plain" and document["not_computed"] == {"dino": "no network"}
    assert document["verdict"] == "plain: pollution 1.00, response 0.80; good: pollution 0.44, response 0.80."
    assert document["keep"] is None and document["rank_correlations"] is None
    # Rows are in the order of the report, and what is missing has one, too.
    assert list(document["measures"]) == [
        "change", "change_outside", "dino", "clip_t_inside", "pollution", "base_change",
    ]  # fmt: skip


def test_without_a_reference_that_pollutes_the_unit_is_grey_levels():
    alone = summarise([ORIGINAL, judged("lora", "lora", 5, 3, 0.8)], {}, 100, 0)
    assert alone["loras"][1]["measures"]["pollution"]["value"] == pytest.approx(7)
    assert "no --reference_lora" in alone["pollution_note"]
    clean = judged("clean", "reference", 1, 0, 0.8)
    found = summarise([ORIGINAL, clean, judged("lora", "lora", 5, 3, 0.8)], {}, 100, 0)
    assert found["loras"][2]["measures"]["pollution"]["value"] == pytest.approx(7)
    assert "clean moves no more than the original model" in found["pollution_note"]


def test_an_over_aligned_lora_is_flagged_in_verdict_and_entry():
    document = summarise([ORIGINAL, PLAIN, judged("timid", "lora", 1.1, 0.1, 0.2)], {}, 100, 0)
    assert document["loras"][2]["flags"] == ["over-aligned"] and document["loras"][0]["flags"] == []
    assert document["verdict"].endswith("timid: pollution 0.01, response 0.20, over-aligned.")


def test_the_checkpoint_to_keep_is_named_with_how_sure_that_is():
    run = [
        judged("checkpoint-10", "checkpoint", 1.5, 0.5, 0.3),
        judged("checkpoint-20", "checkpoint", 3, 1, 0.75),
        judged("checkpoint-30", "checkpoint", 9, 7, 0.8),
    ]
    document = summarise([ORIGINAL, PLAIN, *run], {}, 100, 0)
    assert document["keep"] == "checkpoint-20"
    assert document["verdict"].startswith("Keep checkpoint-20: the most response for its pollution")
    assert "100% of the resamples choose it too" in document["verdict"]
    flat = summarise([ORIGINAL, judged("checkpoint-10", "checkpoint", 3, 1, 0.2)], {}, 100, 0)
    assert flat["keep"] is None and flat["verdict"].startswith("No checkpoint stands out")
    for own in (ORIGINAL, run[0]):
        own = Judged(own.name, own.source, own.role, dict(own.values), {})
        own.values.pop("clip_t_inside")
        run.append(own)
    blind = summarise(run[-2:], {}, 100, 0)
    assert blind["keep"] is None and "without CLIP" in blind["verdict"] and blind["response_measure"] is None


def test_ranks_are_correlated_with_the_truth_over_three_loras():
    pytest.importorskip("torchmetrics")
    truth = [("a", 0.9, 1, 0.5), ("b", 0.8, 4, 0.5), ("c", 0.6, 3, 0.5)]
    entries = [
        {"measures": {n: {"value": v} for n, v in (("truth_kept", k), ("change_outside", c), ("dino", d))}}
        for _, k, c, d in truth
    ]
    found = {row["proxy"]: row for row in correlate(entries)}
    # Ranks 3 2 1 against 1 3 2: 1 - 6 * (4 + 1 + 1) / (3 * 8).
    assert found["change_outside"]["spearman"] == pytest.approx(-0.5, abs=1e-6)
    assert found["change_outside"]["loras"] == 3
    assert np.isnan(found["dino"]["spearman"])
    assert correlate(entries[:2]) is None


# -------------------------------------------------------------------------------------------------------------- report


class Page(HTMLParser):
    """Cells with numbers by LoRA and measure, all addresses, and whether every element is closed."""

    VOID = {"meta", "img", "br"}

    def __init__(self):
        super().__init__()
        self.cells, self.addresses, self.open, self.lora, self.cell = {}, [], [], None, None

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.addresses += [attrs[name] for name in ("src", "href", "action", "data", "srcset") if name in attrs]
        assert tag not in ("script", "link", "iframe", "object")
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.lora = attrs.get("data-lora")
        if tag == "td" and "data-measure" in attrs:
            self.cell = (self.lora, attrs["data-measure"])
            self.cells.setdefault(self.cell, []).append([float(attrs["data-value"]), ""])

    def handle_data(self, data):
        if self.cell is not None:
            self.cells[self.cell][-1][1] += f" {data}"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "td":
            self.cell = None


def read_page(path):
    """The page, with all that would be loaded from elsewhere refused."""
    text = path.read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.open == [] and page.addresses and all(a.startswith("data:image/") for a in page.addresses)
    style = text.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style
    return page


def check_page(page, document):
    """Every number of metrics.json stands in the page, as a value and as text."""
    expected = {
        (lora["name"], name): estimate
        for lora in document["loras"]
        for name, estimate in lora["measures"].items()
        if estimate["value"] is not None
    }
    assert set(page.cells) == set(expected)
    for key, estimate in expected.items():
        for value, text in page.cells[key]:
            numbers = [number for number in estimate.values() if number is not None]
            assert value == estimate["value"]
            assert re.findall(r"-?\d+\.\d+", text) == [format_number(number) for number in numbers]


@pytest.fixture
def document():
    run = [judged(f"checkpoint-{i}", "checkpoint", 1 + i, i / 2, 0.2 + 0.15 * i**0.5) for i in (1, 2, 3)]
    document = summarise([ORIGINAL, PLAIN, *run], {"dino": "no <network> & no file"}, 100, 0)
    prompt = {"prompt": "p000", "base": "<b>a man</b>", "target": "a hat", "full": "<b>a man</b>, a hat"}
    settings = {"pretrained_model_name_or_path": "x", "num_inference_steps": 5, "guidance_scale": 5.0}
    settings |= {"num_resamples": 100, "device": None}
    return document | {"prompts": [prompt], "seeds": [0, 1], "region": "The region.", "settings": settings}


def test_the_page_holds_the_numbers_of_the_tables_and_loads_nothing(tmp_path, document):
    picture = Image.new("RGB", (64, 64), "red")
    rows = [("plain", [PictureRow("p000-s0: <b>a man</b>", [picture] * 4)])]
    document["loras"][1]["measures"]["identity"] = {"value": float("nan"), "low": None, "high": None}
    document["measures"]["identity"] = document["measures"]["dino"]
    write_json(tmp_path / "metrics.json", document)
    write_csv(tmp_path / "metrics.csv", document)
    write_html(tmp_path / "report.html", document, rows, response_plot(document))
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written == json.loads(json.dumps(without_nan(document)))
    page = read_page(tmp_path / "report.html")
    check_page(page, written)
    assert len(page.addresses) == 5
    text = (tmp_path / "report.html").read_text()
    assert "<b>a man" not in text and "no &lt;network&gt; &amp; no file" in text
    with (tmp_path / "metrics.csv").open() as file:
        lines = {(line["lora"], line["measure"]): line for line in csv.DictReader(file)}
    assert len(lines) == 5 * 7
    assert lines["plain", "dino"]["reason"] == "no <network> & no file" and lines["plain", "dino"]["value"] == ""
    assert lines["plain", "identity"]["value"] == ""
    for lora in written["loras"]:
        assert float(lines[lora["name"], "change"]["low"]) == lora["measures"]["change"]["low"]


def test_large_pictures_are_made_small_in_the_page(tmp_path, document):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (512, 512, 3), dtype=np.uint8))
    write_html(tmp_path / "report.html", document, [("plain", [PictureRow("", [noise] * 4)])], None)
    page = read_page(tmp_path / "report.html")
    assert all(address.startswith("data:image/jpeg") for address in page.addresses) and len(page.addresses) == 4
    assert (tmp_path / "report.html").stat().st_size < 4 * 80_000


def test_the_plot_marks_the_checkpoint_to_keep(document):
    ringed = np.asarray(response_plot(document))
    assert document["keep"] is not None
    plain = np.asarray(response_plot(document | {"keep": None}))
    changed = np.argwhere((ringed != plain).any(-1))
    assert len(changed) and (np.ptp(changed, axis=0) <= 24).all()
    assert response_plot(document | {"response_measure": None}) is None


def test_numbers_have_three_decimals_and_no_negative_zero():
    assert [format_number(value) for value in (None, 0.12349, -0.0001, 17.0)] == ["–", "0.123", "0.000", "17.000"]
