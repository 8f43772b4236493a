"""The models that judge portraits: as the library has them, left out where they cannot be had, and asked for once."""

import argparse
import shutil
import socket
import sys
from types import ModuleType, SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from hub_server import HubServer
from PIL import Image
from transformers import BitImageProcessorPil, Dinov2Model

from evaluation import judges as judges_module
from evaluation.judges import Faces, Judges, frechet_distance, load_judges
from evaluation.measures import Compared, Portraits, measure
from programs.loading import InputError
from toy_portraits.recipe import BASE_MODEL


METADATA = BASE_MODEL.parent / "red_hat" / "metadata.jsonl"


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
    labels = judges.segmenter.images(portraits)
    assert labels.shape == portraits.shape[:3] and 1 < len(np.unique(labels)) <= 5
    assert (labels[17] == judges.segmenter.images(portraits[17:18])[0]).mean() > 0.999
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
    for weights in judges_module.TORCH_WEIGHTS.values():
        (tmp_path / "checkpoints" / weights).touch()
    judges = load_judges(named(), "cpu", ask_network=False)
    assert "torchvision" in judges.missing["lpips"] and "fidelity" in judges.missing["fid"]


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """Has this process know another Hub, and a cache that is empty."""
    constants, cache = huggingface_hub.constants, tmp_path / "hub"

    def know(endpoint):
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
        given = {"HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(cache), "ENDPOINT": endpoint}
        for name, value in (given | {"HUGGINGFACE_CO_URL_TEMPLATE": template}).items():
            monkeypatch.setattr(constants, name, value)
        return cache

    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    huggingface_hub.close_session()
    yield know
    huggingface_hub.close_session()


def test_each_default_that_a_hub_does_not_have_costs_it_one_question(elsewhere):
    with HubServer("user", "token") as hub:
        elsewhere(hub.url)
        unasked = load_judges(named(), "cpu", ask_network=False).missing
        assert hub.requests == []
        asked = load_judges(named(), "cpu").missing
    assert [(request.method, request.path) for request in hub.requests] == [
        ("HEAD", f"/{name}/resolve/main/config.json")
        for name in ("openai/clip-vit-large-patch14", "facebook/dinov2-base", "jonathandinu/face-parsing")
    ]
    assert "(not on this machine, and not given out by the Hub: 401 Client Error)" in asked["dino"]
    assert "(not on this machine, and the network is not asked for it)" in unasked["seg_cons"]


def test_a_hub_that_does_not_answer_is_waited_for_once_and_not_asked_for_what_is_here(elsewhere, models, monkeypatch):
    """Who connects to this place is let in and hears nothing, as behind many a firewall."""
    monkeypatch.setattr(judges_module, "TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        cached = elsewhere(f"http://127.0.0.1:{silent.getsockname()[1]}") / "models--facebook--dinov2-base"
        shutil.copytree(models / "dino", cached / "snapshots" / "abc")
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text("abc")
        silent.setblocking(False)
        load_judges(named(), "cpu", ask_network=False)
        with pytest.raises(BlockingIOError):
            silent.accept()
        missing = load_judges(named(), "cpu").missing
        silent.accept()[0].close()
        with pytest.raises(BlockingIOError):
            silent.accept()
    assert "dino" not in missing
    for name in ("clip_i", "seg_cons"):
        assert "the Hub does not answer" in missing[name] and "\n" not in missing[name]


def test_torchmetrics_brings_what_needs_no_torchvision():
    pytest.importorskip("torchmetrics")
    judges = load_judges(named(), "cpu")
    assert "torchvision" in judges.missing["lpips"] and "fidelity" in judges.missing["fid"]
    assert judges.frechet is frechet_distance and "dinov2-base" in judges.missing["fd_dino"]


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
    module.FrechetInceptionDistance = lambda feature: fid(feature=MeanColor() if feature == 2048 else feature)
    monkeypatch.setitem(sys.modules, lpip.__name__, lpip)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    judges = load_judges(named(), "cpu")
    assert not {"lpips", "fid"} & set(judges.missing)
    dark, light = (np.full((2, 8, 8, 3), value, dtype=np.uint8) for value in (0, 51))
    assert judges.lpips(dark, light) == pytest.approx([0.2, 0.2])
    # Inception's distance is of all pictures, part after part.
    darker = (portraits // 2).astype(np.uint8)
    region, asked = np.ones(portraits.shape[:3]), Judges(inception=judges.inception, frechet=judges.frechet)
    parts = [
        Compared(*(Portraits(own[i : i + 7], own[i : i + 7]) for own in (portraits, darker)), region[i : i + 7], [])
        for i in range(0, len(portraits), 7)
    ]
    features = [pictures.astype(np.float64).mean((1, 2)) for pictures in (portraits, darker)]
    assert measure(parts, asked)[1] == {"fid": pytest.approx(frechet_distance(*features), rel=1e-6)}
    one = Compared(*(Portraits(own[:1], own[:1]) for own in (portraits, darker)), region[:1], [])
    assert np.isnan(measure([one], asked)[1]["fid"])


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
