"""What both builders of toy base models share: batches, an optimizer with a schedule, a tokenizer, and CLIP.

Source: [ours].
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from .world import (
    BACKGROUNDS,
    CLOTHES,
    HAIR_COLORS,
    SEXES,
    SIZE,
    TARGETS,
    caption_phrases,
    join_phrases,
    render,
    sample_factors,
)


MAX_TOKENS = 32


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """(B, 64, 64, 3) uint8 to (B, 3, 64, 64) float in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def batches(count: int, size: int, steps: int, rng: np.random.Generator) -> Iterator[tuple[int, np.ndarray]]:
    """`steps` batches of indices, epoch after epoch, each epoch in a new order."""
    order = np.empty(0, dtype=int)
    for step in range(steps):
        if len(order) < size:
            order = np.concatenate([order, rng.permutation(count)])
        yield step, order[:size]
        order = order[size:]


class Training:
    """AdamW on a cosine schedule, with one line of loss and remaining time every so often.

    Args:
        stage: its name in the lines.
        model: whose parameters are trained.
        steps: of the schedule.
        warmup: steps of it in which the learning rate rises.
        clip: the largest norm of the gradient, if there is one.
        adamw: options of the optimizer.
    """

    def __init__(self, stage: str, model: torch.nn.Module, steps: int, warmup: int = 50, clip: float | None = 1.0,
                 **adamw: Any):  # fmt: skip
        def scale(step: int) -> float:
            return min((step + 1) / warmup, 0.5 * (1 + np.cos(np.pi * min(step / steps, 1.0))) + 0.01)

        self.stage, self.model, self.steps, self.clip = stage, model, steps, clip
        self.optimizer = torch.optim.AdamW(model.parameters(), **adamw)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, scale)
        self.start, self.mean = time.time(), None

    def update(self, step: int, loss: torch.Tensor, every: int = 50) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.schedule.step()
        self.mean = loss.item() if self.mean is None else 0.95 * self.mean + 0.05 * loss.item()
        if (step + 1) % every == 0 or step + 1 == self.steps:
            spent = time.time() - self.start
            left = spent / (step + 1) * (self.steps - step - 1)
            line = f"[{self.stage}] {step + 1}/{self.steps} loss {self.mean:.4f}"
            print(f"{line} {spent:.0f}s, {left:.0f}s left", flush=True)


def world_phrases() -> list[str]:
    """All that captions of the world are made of."""
    words = ["a photo of", "a portrait of", "with", "in", "wearing", "and", "jacket shirt", "hat", "hair"]
    words += ["background", "glasses"]
    return words + [*SEXES, *HAIR_COLORS, *CLOTHES, *BACKGROUNDS] + [target.prompt for target in TARGETS.values()]


def build_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """A real CLIP byte-pair tokenizer; each word of the world is one token, any other word is spelled in pieces."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit()])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2000, min_frequency=1, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(world_phrases(), trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(pair) for pair in merges]
    tokens = list(dict.fromkeys(tokens)) + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=MAX_TOKENS,
        pad_token=pad_token,
    )  # fmt: skip


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    return tokenizer(
        captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


def train_clip(
    stage: str, tokenizer: CLIPTokenizer, layers: dict[str, Any], seed: int, steps: int, count: int
) -> tuple[CLIPModel, dict[str, float]]:
    """CLIP, contrastively, on renders and random subsets of their phrases, so that single phrases embed well too.

    Returns:
        The model, and how often it names a factor of held-out renders from single phrases.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    text = {
        **layers,
        "max_position_embeddings": MAX_TOKENS,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**layers, "image_size": SIZE, "patch_size": 16}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))
    factors = sample_factors(count, rng, target_share=0.15)
    images, _ = render(factors)
    phrases = [caption_phrases(factors, i) for i in range(count)]
    processor = clip_processor()
    mean, std = torch.tensor(processor.image_mean).view(3, 1, 1), torch.tensor(processor.image_std).view(3, 1, 1)

    training = Training(stage, model, steps, lr=1e-3, weight_decay=0.01)
    for step, index in batches(count - 512, 192, steps, rng):
        captions = []
        for i in index:
            kept = {name for name in phrases[i] if rng.random() < (0.8 if rng.random() < 0.8 else 0.2)}
            captions.append(join_phrases(phrases[i], kept or {rng.choice(list(phrases[i]))}))
        ids = tokenize(tokenizer, captions)
        pixels = ((to_tensor(images[index]) + 1) / 2 - mean) / std
        loss = model(input_ids=ids, pixel_values=pixels, return_loss=True).loss
        training.update(step, loss)

    model.eval()
    scores = {}
    with torch.no_grad():
        held = np.arange(count - 512, count)
        pixels = ((to_tensor(images[held]) + 1) / 2 - mean) / std
        image_embeds = F.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        for name in ("sex", "hair_color", "clothes", "background"):
            choices = sorted({phrases[i][name] for i in held if name in phrases[i]})
            embeds = F.normalize(model.get_text_features(input_ids=tokenize(tokenizer, choices)).pooler_output, dim=-1)
            guess = (image_embeds @ embeds.T).argmax(1)
            right = [choices[g] == phrases[i][name] for g, i in zip(guess, held) if name in phrases[i]]
            scores[name] = float(np.mean(right))
    return model, scores


def clip_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
