"""The models that judge portraits in an evaluation, from the libraries that have them.

A model that the user names has to load. One that is only a default, or a package that is not installed, is left out:
its measures are then "not computed", with the reason. What is on this machine is taken from there; for anything else
the network is asked once, without a library's retries.

Legend: B portraits, H/W picture size in pixels, E size of an embedding. Pictures are (B, H, W, 3) uint8.
Source: [ours].
"""

from __future__ import annotations

import argparse
import importlib.util
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Model,
    SegformerForSemanticSegmentation,
    SegformerImageProcessorPil,
)

from evaluation.measures import JUDGES
from programs.loading import InputError, load_tokenizer, naming_flag


BATCH = 16  # pictures judged at a time
TIMEOUT = 5  # seconds that the network has to answer
# What torch keeps of the weights that LPIPS and FID ask for.
TORCH_WEIGHTS = {"lpips": "alexnet-owt-7be5be79.pth", "fid": "weights-inception-2015-12-05-6726825d.pth"}


class Clip:
    """CLIP's embeddings of pictures and texts."""

    def __init__(self, name: str, device: str) -> None:
        self.model = CLIPModel.from_pretrained(name, dtype=torch.float32, use_safetensors=True).to(device).eval()
        self.tokenizer, self.processor = load_tokenizer(name), CLIPImageProcessorPil.from_pretrained(name)

    @torch.no_grad()
    def images(self, pictures: np.ndarray) -> np.ndarray:
        """(B, E) float32."""
        return _in_batches(pictures, lambda part: self.model.get_image_features(**self._pixels(part)).pooler_output)

    def _pixels(self, pictures: np.ndarray) -> Any:
        return self.processor(list(pictures), return_tensors="pt").to(self.model.device)

    @torch.no_grad()
    def texts(self, texts: list[str]) -> np.ndarray:
        """(B, E) float32; a text that is longer than CLIP's is cut off, and one that comes again is read once."""
        distinct = list(dict.fromkeys(texts))
        tokens = self.tokenizer(distinct, padding="max_length", truncation=True, return_tensors="pt")
        embeds = self.model.get_text_features(**tokens.to(self.model.device)).pooler_output.float().cpu().numpy()
        return embeds[[distinct.index(text) for text in texts]]


class Dino:
    """DINOv2's embeddings of pictures."""

    def __init__(self, name: str, device: str) -> None:
        self.model = Dinov2Model.from_pretrained(name, dtype=torch.float32, use_safetensors=True).to(device).eval()
        self.processor = BitImageProcessorPil.from_pretrained(name)

    @torch.no_grad()
    def images(self, pictures: np.ndarray) -> np.ndarray:
        """(B, E) float32, the class token after the last norm."""
        return _in_batches(pictures, lambda part: self.model(**self._pixels(part)).pooler_output)

    def _pixels(self, pictures: np.ndarray) -> Any:
        return self.processor(list(pictures), return_tensors="pt").to(self.model.device)


class FaceParser:
    """SegFormer's label of each pixel."""

    def __init__(self, name: str, device: str) -> None:
        kind = SegformerForSemanticSegmentation
        self.model = kind.from_pretrained(name, dtype=torch.float32, use_safetensors=True).to(device).eval()
        self.processor = SegformerImageProcessorPil.from_pretrained(name)

    @torch.no_grad()
    def labels(self, pictures: np.ndarray) -> np.ndarray:
        """(B, H, W) integers."""
        size = pictures.shape[1:3]

        def read(part: np.ndarray) -> torch.Tensor:
            logits = self.model(**self.processor(list(part), return_tensors="pt").to(self.model.device)).logits
            return F.interpolate(logits, size, mode="bilinear", align_corners=False).argmax(1)

        return _in_batches(pictures, read).astype(np.int64)


class Faces:
    """insightface's embeddings of faces; its published weights are for non-commercial research alone."""

    def __init__(self, name: str, device: str) -> None:
        analysis = importlib.import_module("insightface.app").FaceAnalysis
        self.app = analysis(name=name, allowed_modules=["detection", "recognition"])
        self.app.prepare(ctx_id=0 if device.startswith("cuda") else -1)

    def images(self, pictures: np.ndarray) -> np.ndarray:
        """(B, E) of the largest face in each picture; NaN where there is none."""
        found = [self._largest(self.app.get(np.ascontiguousarray(picture[..., ::-1]))) for picture in pictures]
        size = max((len(face) for face in found if face is not None), default=1)
        return np.stack([np.full(size, np.nan) if face is None else face for face in found])

    @staticmethod
    def _largest(faces: list[Any]) -> np.ndarray | None:
        """Of the faces in a picture; their boxes are (left, top, right, bottom)."""
        if not faces:
            return None
        area = [(face.bbox[2] - face.bbox[0]) * (face.bbox[3] - face.bbox[1]) for face in faces]
        return faces[int(np.argmax(area))].normed_embedding


def _in_batches(pictures: np.ndarray, read: Callable[[np.ndarray], torch.Tensor]) -> np.ndarray:
    parts = [read(pictures[start : start + BATCH]) for start in range(0, len(pictures), BATCH)]
    return torch.cat(parts).float().cpu().numpy()


@dataclass
class Judges:
    """What could be loaded; `missing` has a reason for each measure that cannot be computed.

    Attributes:
        clip, dino, segmenter, face: the models, or None.
        lpips: a function of original and adapted pictures that returns (B,) numbers, or None.
        inception: makes a Fréchet distance of Inception features, or None.
        torchmetrics: whether that package is installed.
        missing: by measure.
    """

    clip: Clip | None = None
    dino: Dino | None = None
    segmenter: FaceParser | None = None
    face: Faces | None = None
    lpips: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    inception: Callable[[], Any] | None = None
    torchmetrics: bool = True
    missing: dict[str, str] = field(default_factory=dict)


def load_judges(args: argparse.Namespace, device: str, ask_network: bool = True) -> Judges:
    """Load the models of the flags, or their defaults where those can be had.

    Args:
        args: `clip_model_name_or_path`, `dino_model_name_or_path`, `segmenter_model_name_or_path`, `face_model_name`;
            None is the default, and for faces none.
        device: where they judge.
        ask_network: whether a default that is not on this machine is looked for elsewhere. A model that is named is.

    Returns:
        The judges.

    Raises:
        InputError: a model that the flags name cannot be loaded.

    Source: [ours].
    """
    judges, hub = Judges(), _Hub(None if ask_network else "not on this machine, and the network is not asked for it")
    judges.clip = _load("clip", Clip, args.clip_model_name_or_path, judges, device, hub)
    judges.dino = _load("dino", Dino, args.dino_model_name_or_path, judges, device, hub)
    judges.segmenter = _load("segmenter", FaceParser, args.segmenter_model_name_or_path, judges, device, hub)
    if args.face_model_name is None:
        judges.missing["identity"] = "--face_model_name is not given (insightface; its weights are non-commercial)"
    else:
        judges.face = _load_faces(args.face_model_name, device)
    _load_torchmetrics(judges, device, ask_network)
    return judges


class _Hub:
    """Asks the Hub whether it has a model, once; the libraries would try for each of its files, six times.

    Args:
        silence: why the Hub is not asked; None until it is out of reach.
    """

    def __init__(self, silence: str | None) -> None:
        self.silence = silence

    def find(self, name: str) -> None:
        """An OSError or ValueError if the model cannot be had there."""
        if self.silence is not None:
            raise OSError(self.silence)
        try:
            get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=TIMEOUT)
        except HfHubHTTPError as error:
            raise OSError(f"not on this machine, and not given out by the Hub: {error}") from error
        except (HTTPError, OSError) as error:
            self.silence = f"not on this machine, and the Hub does not answer: {error or type(error).__name__}"
            raise OSError(self.silence) from error


def _load(kind: str, load: Callable, named: str | None, judges: Judges, device: str, hub: _Hub) -> Any:
    """The model that a flag names, or its default; None, and reasons, where the default cannot be loaded."""
    flag = f"{kind}_model_name_or_path"
    if named is not None:
        with naming_flag(flag, named):
            return _from_here_or_the_hub(load, named, device, _Hub(None))
    default = JUDGES[kind].default
    try:
        return _from_here_or_the_hub(load, default, device, hub)
    except (OSError, ValueError) as error:
        first = " ".join(str(error).split()).split(". ")[0]
        reason = f"{default} cannot be loaded ({first}); see --{flag}"
        judges.missing |= dict.fromkeys(JUDGES[kind].measures, reason)
        return None


def _from_here_or_the_hub(load: Callable, name: str, device: str, hub: _Hub) -> Any:
    """From a folder, or the Hub's cache as a folder, about which no library asks the Hub; else from there."""
    if Path(name).exists():
        return load(name, device)
    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        # A download that broke off leaves a part there.
        with suppress(OSError, ValueError):
            return load(str(Path(cached).parent), device)
    hub.find(name)
    return load(name, device)


def _load_faces(name: str, device: str) -> Faces:
    with naming_flag("face_model_name", name):
        try:
            return Faces(name, device)
        except ImportError as error:
            raise InputError(f"--face_model_name {name}: {error}") from error


def _load_torchmetrics(judges: Judges, device: str, ask_network: bool) -> None:
    """LPIPS and the Fréchet distances, as far as torchmetrics and what it asks for are installed."""
    if importlib.util.find_spec("torchmetrics") is None:
        reason = "torchmetrics is not installed (requirements-eval.txt)"
        judges.missing |= dict.fromkeys(("lpips", "fid", "fd_dino"), reason)
        judges.torchmetrics = False
        return
    lpips = _unless_missing("lpips", _make_lpips, judges, device, ask_network)
    judges.lpips = None if lpips is None else partial(_lpips, lpips)
    inception = _unless_missing("fid", _make_inception, judges, device, ask_network)
    judges.inception = None if inception is None else inception.clone


def _make_lpips() -> torch.nn.Module:
    module = importlib.import_module("torchmetrics.image.lpip")
    return module.LearnedPerceptualImagePatchSimilarity("alex", normalize=True, reduction="mean")


def _make_inception() -> torch.nn.Module:
    return importlib.import_module("torchmetrics.image.fid").FrechetInceptionDistance(2048)


def _unless_missing(measure: str, make: Callable, judges: Judges, device: str, ask_network: bool) -> Any:
    """What makes a measure; None, and the reason, where it cannot be had.

    Only making it tells: it looks for packages of its own, and downloads weights with a library that would wait for
    an answer as long as the system does.
    """
    weights, former = TORCH_WEIGHTS[measure], socket.getdefaulttimeout()
    if not (ask_network or (Path(torch.hub.get_dir()) / "checkpoints" / weights).is_file()):
        judges.missing[measure] = f"{weights} is not on this machine, and the network is not asked for it"
        return None
    socket.setdefaulttimeout(TIMEOUT)
    try:
        return make().to(device)
    except (ImportError, OSError) as error:
        judges.missing[measure] = " ".join(str(error).split())
        return None
    finally:
        socket.setdefaulttimeout(former)


def _channels_first(pictures: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2)


def _lpips(measure: torch.nn.Module, original: np.ndarray, adapted: np.ndarray) -> np.ndarray:
    """One by one, since the class returns a mean."""
    device = next(measure.parameters()).device
    first, second = (_channels_first(pictures).to(device).float() / 255 for pictures in (original, adapted))
    with torch.no_grad():
        return np.array([float(measure(a[None], b[None])) for a, b in zip(first, second)])


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Fréchet distance of two sets of embeddings, (B, E) each with B of at least 2, by torchmetrics."""
    features = torch.nn.Identity()
    features.num_features = first.shape[1]
    distance = importlib.import_module("torchmetrics.image.fid").FrechetInceptionDistance(feature=features)
    distance.update(torch.from_numpy(first).double(), real=True)
    distance.update(torch.from_numpy(second).double(), real=False)
    return float(distance.compute())


def add_pictures(distance: Any, first: np.ndarray, second: np.ndarray) -> None:
    """Count pictures of both sets into a Fréchet distance of `Judges.inception`."""
    for pictures, real in ((first, True), (second, False)):
        for start in range(0, len(pictures), BATCH):
            distance.update(_channels_first(pictures[start : start + BATCH]).to(distance.device), real=real)
