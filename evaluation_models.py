"""The models that judge portraits in an evaluation, from the libraries that have them.

A model that the user names has to load. One that is only a default, or a package that is not installed, is left out:
its measures are then "not computed", with the reason.

Legend: B portraits, H/W picture size in pixels, E size of an embedding. Pictures are (B, H, W, 3) uint8.
Source: [ours].
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Model,
    SegformerForSemanticSegmentation,
    SegformerImageProcessorPil,
)

from checked_loading import InputError, load_tokenizer, naming_flag


CLIP, DINO, SEGMENTER = "openai/clip-vit-large-patch14", "facebook/dinov2-base", "jonathandinu/face-parsing"
BATCH = 16  # pictures judged at a time
# Which measures need which model.
MEASURES_OF = {
    "clip": ("clip_i", "clip_t", "clip_t_inside", "direction", "leak"),
    "dino": ("dino", "fd_dino"),
    "segmenter": ("seg_cons",),
    "face": ("identity",),
}


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
        """(B, E) float32; a text that is longer than CLIP's is cut off."""
        tokens = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        return self.model.get_text_features(**tokens.to(self.model.device)).pooler_output.float().cpu().numpy()


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
        pairwise: by measure, a function of original and adapted pictures that returns (B,) numbers.
        inception: makes a Fréchet distance of Inception features, or None.
        torchmetrics: whether that package is installed.
        missing: by measure.
    """

    clip: Clip | None = None
    dino: Dino | None = None
    segmenter: FaceParser | None = None
    face: Faces | None = None
    pairwise: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = field(default_factory=dict)
    inception: Callable[[], Any] | None = None
    torchmetrics: bool = True
    missing: dict[str, str] = field(default_factory=dict)


def load_judges(args: argparse.Namespace, device: str) -> Judges:
    """Load the models of the flags, or their defaults where those can be had.

    Args:
        args: `clip_model_name_or_path`, `dino_model_name_or_path`, `segmenter_model_name_or_path`, `face_model_name`;
            None is the default, and for faces none.
        device: where they judge.

    Returns:
        The judges.

    Raises:
        InputError: a model that the flags name cannot be loaded.

    Source: [ours].
    """
    judges = Judges()
    judges.clip = _load("clip", "clip_model_name_or_path", args.clip_model_name_or_path, CLIP, Clip, judges, device)
    judges.dino = _load("dino", "dino_model_name_or_path", args.dino_model_name_or_path, DINO, Dino, judges, device)
    judges.segmenter = _load(
        "segmenter", "segmenter_model_name_or_path", args.segmenter_model_name_or_path, SEGMENTER, FaceParser, judges,
        device,
    )  # fmt: skip
    if args.face_model_name is None:
        judges.missing["identity"] = "--face_model_name is not given (insightface; its weights are non-commercial)"
    else:
        judges.face = _load("face", "face_model_name", args.face_model_name, "", Faces, judges, device)
    _load_torchmetrics(judges, device)
    return judges


def _load(kind: str, flag: str, named: str | None, default: str, load: Callable, judges: Judges, device: str) -> Any:
    """The model that a flag names, or its default; None, and reasons, where the default cannot be loaded."""
    if named is not None:
        with naming_flag(flag, named):
            try:
                return load(named, device)
            except ImportError as error:
                raise InputError(f"--{flag} {named}: {error}") from error
    try:
        return load(default, device)
    except (OSError, ValueError) as error:
        first = " ".join(str(error).split()).split(". ")[0]
        judges.missing |= dict.fromkeys(MEASURES_OF[kind], f"{default} cannot be loaded ({first}); see --{flag}")
        return None


def _load_torchmetrics(judges: Judges, device: str) -> None:
    """SSIM, LPIPS and the Fréchet distances, as far as torchmetrics and what it asks for are installed."""
    try:
        functional = importlib.import_module("torchmetrics.functional.image")
    except ModuleNotFoundError:
        names = ("ssim", "lpips", "fid", "fd_dino")
        judges.missing |= {name: "torchmetrics is not installed (requirements-eval.txt)" for name in names}
        judges.torchmetrics = False
        return
    judges.pairwise["ssim"] = partial(_ssim, functional.structural_similarity_index_measure)
    # Both look for packages of their own and download weights, so only making them tells.
    try:
        lpips = importlib.import_module("torchmetrics.image.lpip").LearnedPerceptualImagePatchSimilarity
        judges.pairwise["lpips"] = partial(_lpips, lpips("alex", normalize=True, reduction="mean").to(device))
    except (ImportError, OSError) as error:
        judges.missing["lpips"] = " ".join(str(error).split())
    try:
        inception = importlib.import_module("torchmetrics.image.fid").FrechetInceptionDistance
        judges.inception = partial(inception(2048).to(device).clone)
    except (ImportError, OSError) as error:
        judges.missing["fid"] = " ".join(str(error).split())


def _channels_first(pictures: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2)


def _ssim(measure: Callable, original: np.ndarray, adapted: np.ndarray) -> np.ndarray:
    # In double, since variances are differences of large numbers here.
    pictures = (_channels_first(adapted).double(), _channels_first(original).double())
    # torchmetrics drops the batch's dimension of a single picture.
    return measure(*pictures, data_range=255.0, reduction="none").reshape(-1).numpy()


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


def inception_distance(make: Callable[[], Any], first: np.ndarray, second: np.ndarray) -> float:
    """Fréchet distance of the Inception features of two sets of pictures, of at least 2 each."""
    distance = make()
    for pictures, real in ((first, True), (second, False)):
        for start in range(0, len(pictures), BATCH):
            distance.update(_channels_first(pictures[start : start + BATCH]).to(distance.device), real=real)
    return float(distance.compute())
