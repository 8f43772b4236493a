"""The models that judge portraits in an evaluation, from the libraries that have them. [ours]

A model that the user names has to load. One that is only a default, or a package that is not installed, is left out:
its measures are then "not computed", with the reason. What is on this machine is taken from there; for anything else
the network is asked once, without a library's retries.

Each judge has `images`, what it makes of pictures, (B, H, W, 3) uint8. E is the size of an embedding.
"""

import argparse
import importlib.util
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
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

from evaluation.measures import DEFAULT_MODELS, MEASURES
from programs.loading import load_tokenizer, naming_flag


BATCH = 16  # pictures judged at a time
TIMEOUT = 5  # seconds that the network has to answer
# What torch keeps of the weights that LPIPS and FID ask for.
TORCH_WEIGHTS = {"lpips": "alexnet-owt-7be5be79.pth", "inception": "weights-inception-2015-12-05-6726825d.pth"}


class _Model:
    """A model of transformers and its processor; `_read` makes of its inputs what is judged by."""

    classes: tuple[type, type]
    _read: Callable[..., torch.Tensor]

    def __init__(self, name: str, device: str) -> None:
        model = self.classes[0].from_pretrained(name, dtype=torch.float32, use_safetensors=True)
        self.model, self.processor = model.to(device).eval(), self.classes[1].from_pretrained(name)

    @torch.no_grad()
    def images(self, pictures: np.ndarray) -> np.ndarray:
        def read(part: np.ndarray) -> torch.Tensor:
            return self._read(self.processor(list(part), return_tensors="pt").to(self.model.device), part.shape[1:3])

        return _in_batches(pictures, read)


class Clip(_Model):
    """CLIP's embeddings of pictures and texts, (B, E)."""

    classes = CLIPModel, CLIPImageProcessorPil

    def __init__(self, name: str, device: str) -> None:
        super().__init__(name, device)
        self.tokenizer = load_tokenizer(name)

    def _read(self, inputs: Mapping[str, torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
        return self.model.get_image_features(**inputs).pooler_output

    @torch.no_grad()
    def texts(self, texts: list[str]) -> np.ndarray:
        """(B, E) float32; a text that is longer than CLIP's is cut off, and one that comes again is read once."""
        distinct = list(dict.fromkeys(texts))
        tokens = self.tokenizer(distinct, padding="max_length", truncation=True, return_tensors="pt")
        embeds = self.model.get_text_features(**tokens.to(self.model.device)).pooler_output.cpu().numpy()
        return embeds[[distinct.index(text) for text in texts]]


class Dino(_Model):
    """DINOv2's embeddings, (B, E), the class token after the last norm."""

    classes = Dinov2Model, BitImageProcessorPil

    def _read(self, inputs: Mapping[str, torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
        return self.model(**inputs).pooler_output


class FaceParser(_Model):
    """SegFormer's label of each pixel, (B, H, W) integers."""

    classes = SegformerForSemanticSegmentation, SegformerImageProcessorPil

    def _read(self, inputs: Mapping[str, torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
        return F.interpolate(self.model(**inputs).logits, size, mode="bilinear", align_corners=False).argmax(1)


class Faces:
    """insightface's embeddings of faces; its published weights are for non-commercial research alone."""

    def __init__(self, name: str, device: str) -> None:
        analysis = importlib.import_module("insightface.app").FaceAnalysis
        self.app = analysis(name=name, allowed_modules=["detection", "recognition"])
        self.app.prepare(ctx_id=0 if device.startswith("cuda") else -1)

    def images(self, pictures: np.ndarray) -> np.ndarray:
        """(B, E) of the largest face in each picture; NaN where there is none."""

        def area(face: Any) -> float:
            left, top, right, bottom = face.bbox
            return (right - left) * (bottom - top)

        faces = [self.app.get(np.ascontiguousarray(picture[..., ::-1])) for picture in pictures]
        largest = [max(found, key=area).normed_embedding if found else np.array([np.nan]) for found in faces]
        size = max(map(len, largest))
        return np.stack([face if len(face) == size else np.full(size, np.nan) for face in largest])


class Inception:
    """The features of which torchmetrics makes its FID, (B, E)."""

    def __init__(self, device: str) -> None:
        self.distance = importlib.import_module("torchmetrics.image.fid").FrechetInceptionDistance(2048).to(device)

    @torch.no_grad()
    def images(self, pictures: np.ndarray) -> np.ndarray:
        device = self.distance.device
        return _in_batches(pictures, lambda part: self.distance.inception(_channels_first(part, device)))


class Lpips:
    """torchmetrics' LPIPS of two sets of pictures, (B,)."""

    def __init__(self, device: str) -> None:
        make = importlib.import_module("torchmetrics.image.lpip").LearnedPerceptualImagePatchSimilarity
        self.measure, self.device = make("alex", normalize=True, reduction="mean").to(device), device

    @torch.no_grad()
    def __call__(self, original: np.ndarray, adapted: np.ndarray) -> np.ndarray:
        """One by one, since the class returns a mean."""
        first, second = (_channels_first(pictures, self.device).float() / 255 for pictures in (original, adapted))
        return np.array([float(self.measure(a[None], b[None])) for a, b in zip(first, second)])


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Fréchet distance of two sets of embeddings, (B, E) each with B of at least 2, by torchmetrics."""
    features = torch.nn.Identity()
    features.num_features = first.shape[1]
    distance = importlib.import_module("torchmetrics.image.fid").FrechetInceptionDistance(feature=features)
    distance.update(torch.from_numpy(first).double(), real=True)
    distance.update(torch.from_numpy(second).double(), real=False)
    return float(distance.compute())


def _in_batches(pictures: np.ndarray, read: Callable[[np.ndarray], torch.Tensor]) -> np.ndarray:
    parts = [read(pictures[start : start + BATCH]) for start in range(0, len(pictures), BATCH)]
    return torch.cat(parts).cpu().numpy()


def _channels_first(pictures: np.ndarray, device: str | torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).to(device)


@dataclass
class Judges:
    """What could be loaded, None where it could not; `Measure.asks` has their names."""

    clip: Clip | None = None
    dino: Dino | None = None
    segmenter: FaceParser | None = None
    face: Faces | None = None
    inception: Inception | None = None
    lpips: Lpips | None = None
    frechet: Callable[[np.ndarray, np.ndarray], float] | None = None
    probe: Any = None  # the toy world's `PortraitJudge`
    target: Any = None  # and its target
    missing: dict[str, str] = field(default_factory=dict)  # by measure the reason why it cannot be computed


def load_judges(args: argparse.Namespace, device: str, ask_network: bool = True) -> Judges:
    """Load the models of the flags, or their defaults where those can be had, but for the toy world's.

    Args:
        ask_network: whether a default that is not on this machine is looked for elsewhere. A model that is named is.

    Raises InputError: a model that the flags name cannot be loaded.
    """
    found, reasons = {}, {}
    hub = _Hub(None if ask_network else "not on this machine, and the network is not asked for it")
    for kind, load in (("clip", Clip), ("dino", Dino), ("segmenter", FaceParser)):
        flag, default = f"{kind}_model_name_or_path", DEFAULT_MODELS[kind]
        if (named := getattr(args, flag)) is not None:
            with naming_flag(flag, named):
                found[kind] = _Hub(None).load(load, named, device)
            continue
        try:
            found[kind] = hub.load(load, default, device)
        except (OSError, ValueError) as error:
            first = " ".join(str(error).split()).split(". ")[0]
            reasons[kind] = f"{default} cannot be loaded ({first}); see --{flag}"
    if args.face_model_name is None:
        reasons["face"] = "--face_model_name is not given (insightface; its weights are non-commercial)"
    else:
        with naming_flag("face_model_name", args.face_model_name):
            found["face"] = Faces(args.face_model_name, device)
    if importlib.util.find_spec("torchmetrics") is None:
        reason = "torchmetrics is not installed (requirements-eval.txt)"
        reasons |= dict.fromkeys(("lpips", "inception", "frechet"), reason)
    else:
        found["frechet"] = frechet_distance
        for kind, load in (("lpips", Lpips), ("inception", Inception)):
            try:
                found[kind] = _with_torch_weights(load, TORCH_WEIGHTS[kind], device, ask_network)
            except (ImportError, OSError) as error:
                reasons[kind] = " ".join(str(error).split())
    missing = {name: [reasons[judge] for judge in own.asks if judge in reasons] for name, own in MEASURES.items()}
    return Judges(**found, missing={name: why[0] for name, why in missing.items() if why})


class _Hub:
    """Loads models, and asks the Hub once for each, unless there is a reason for silence; libraries ask for each file.
    """

    def __init__(self, silence: str | None) -> None:
        self.silence = silence

    def load(self, kind: Callable[[str, str], Any], name: str, device: str) -> Any:
        """From a folder, or the Hub's cache as a folder; else from the Hub, an OSError or ValueError if not there."""
        if Path(name).exists():
            return kind(name, device)
        cached = try_to_load_from_cache(name, "config.json")
        if isinstance(cached, str):
            # A download that broke off leaves a part there.
            with suppress(OSError, ValueError):
                return kind(str(Path(cached).parent), device)
        if self.silence is not None:
            raise OSError(self.silence)
        try:
            get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=TIMEOUT)
        except HfHubHTTPError as error:
            raise OSError(f"not on this machine, and not given out by the Hub: {error}") from error
        except (HTTPError, OSError) as error:
            self.silence = f"not on this machine, and the Hub does not answer: {error or type(error).__name__}"
            raise OSError(self.silence) from error
        return kind(name, device)


def _with_torch_weights(load: Callable[[str], Any], weights: str, device: str, ask_network: bool) -> Any:
    """What torchmetrics makes with weights that torch keeps; an ImportError or OSError where it cannot be had.

    Only making it tells: it looks for packages of its own, and downloads weights without an end to its waiting.
    """
    if not (ask_network or (Path(torch.hub.get_dir()) / "checkpoints" / weights).is_file()):
        raise OSError(f"{weights} is not on this machine, and the network is not asked for it")
    former = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        return load(device)
    finally:
        socket.setdefaulttimeout(former)
