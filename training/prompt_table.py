"""What the training asks about prompts and pictures, as tensors: text embeddings, token positions, CLIP distances.

Legend: N pairs of prompts, R = 3N rows of the table, U different prompts, T text tokens, P base phrases, K matched
tokens, E size of a text embedding, E' size of a projected CLIP embedding.
Paper: arXiv 2504.00396.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from torch.nn.utils.rnn import pad_sequence
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from families.prompt_embeds import PromptEmbeds
from families.stable_diffusion import StableDiffusion
from programs.console import phase_bar
from prompts import PromptPair, PromptTokens, phrase_mask
from training.caches import TensorCache, fingerprint, module_fingerprint


# What a row asks for: the target, or no change with the base prompt or with the empty prompt.
FULL, BASE, EMPTY = 0, 1, 2
NO_CACHE = TensorCache(None)


class TokenPositions(NamedTuple):
    """Which tokens of both prompts belong together, R rows."""

    base: torch.Tensor  # (R, K) tokens of the reference prompt
    full: torch.Tensor  # (R, K) the same words in the response prompt
    mask: torch.Tensor  # (R, K) bool, False where a row has fewer
    base_padding: torch.Tensor  # (R, T) bool
    full_padding: torch.Tensor  # (R, T) bool


@dataclass(frozen=True)
class PromptTable:
    """What the losses ask about prompts, R = 3N rows: row `kind * N + i` is portrait i asked for `kind`.

    FULL sets the base prompt against the full prompt; BASE and EMPTY set a prompt against itself.
    """

    encode: Callable[[torch.Tensor], PromptEmbeds]  # of tokens (B, T) on the device
    prompt_ids: torch.Tensor  # (U, T) tokens of the U different prompts, of each tokenizer one after another
    prompt_embeds: PromptEmbeds | None  # of all U, or None where each step encodes its own
    reference_rows: torch.Tensor  # (R,) rows of the two above, on the CPU
    response_rows: torch.Tensor  # (R,) likewise
    phrase_weights: torch.Tensor  # (N, P, T)
    phrase_mask: torch.Tensor  # (N, P) bool
    free_mask: torch.Tensor  # (N, P) bool, those of them that may change along with the target
    distances: torch.Tensor  # (N, P) CLIP distances
    positions: TokenPositions

    def reference(self, rows: torch.Tensor, time_ids: torch.Tensor) -> PromptEmbeds:
        """The reference prompts of rows (B,), given on the CPU, for portraits with `time_ids` (B, 6)."""
        return self._embeds(self.reference_rows[rows]).of(time_ids)

    def response(self, rows: torch.Tensor, time_ids: torch.Tensor) -> PromptEmbeds:
        """The response prompts of such rows."""
        return self._embeds(self.response_rows[rows]).of(time_ids)

    def drawn(self, pairs: torch.Tensor, rows: slice) -> dict[str, torch.Tensor]:
        """The arguments of a pipeline that draws the base prompts of some of the pairs (B,), with the empty prompt as
        the negative one.
        """
        chosen, count = pairs[rows], len(self.reference_rows) // 3
        embeds, empty = (self._embeds(self.reference_rows[kind * count + chosen]) for kind in (BASE, EMPTY))
        asked = {"prompt_embeds": embeds.states, "negative_prompt_embeds": empty.states}
        if embeds.pooled is not None:
            asked |= {"pooled_prompt_embeds": embeds.pooled, "negative_pooled_prompt_embeds": empty.pooled}
        return asked

    @torch.no_grad()
    def _embeds(self, prompts: torch.Tensor) -> PromptEmbeds:
        device = self.prompt_ids.device
        if self.prompt_embeds is not None:
            return self.prompt_embeds[prompts.to(self.prompt_embeds.states.device)].to(device)
        unique, places = prompts.unique(return_inverse=True)
        return self.encode(self.prompt_ids[unique.to(device)])[places.to(device)]


@torch.no_grad()
def make_prompt_table(
    family: type[StableDiffusion], pipeline: DiffusionPipeline, pairs: Sequence[PromptPair],
    pair_tokens: Sequence[PromptTokens], *, device: torch.device | None = None, encoded: bool = True,
    cache: TensorCache = NO_CACHE, shown: bool = True,
) -> PromptTable:  # fmt: skip
    """Lay out the token positions of N pairs of prompts, and encode each prompt once if it is to be `encoded`.

    Args:
        pipeline: the diffusion model.
        device: where the table lies, but for large embeddings; by default where the text encoder does.
        cache: where text embeddings are looked up and kept.
        shown: whether a bar shows it.

    Source: [paper] phrases, PAD and distances; [ours] the rows that ask for no change, and phrases that may change.
    """
    device, count = device or getattr(pipeline, family.text_encoders[0]).device, len(pairs)
    tokenizers = [getattr(pipeline, name) for name in family.tokenizers]
    length, tokenize = len(pair_tokens[0].base_input_ids), partial(family.tokenize, tokenizers)
    base, empty = tokenize([pair.base_prompt for pair in pairs]), tokenize([""]) * count
    reference, response = base + base + empty, tokenize([pair.full_prompt for pair in pairs]) + base + empty
    unique = {ids: row for row, ids in enumerate(dict.fromkeys(reference + response))}
    all_ids = torch.tensor(list(unique), device=device)

    # Set against itself, every token of a prompt's text matches.
    own = [tokens.base_text for tokens in pair_tokens] + [()] * count
    base_places = [tokens.base_positions for tokens in pair_tokens] + own
    full_places = [tokens.full_positions for tokens in pair_tokens] + own
    base_padding = [tokens.base_padding for tokens in pair_tokens]
    # The empty prompt has padding in the place of any text.
    empty_padding = [(*tokens.base_text, *tokens.base_padding) for tokens in pair_tokens]
    full_padding = [tokens.full_padding for tokens in pair_tokens]
    positions = TokenPositions(
        _padded(base_places),
        _padded(full_places),
        pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in base_places], batch_first=True),
        _row_mask(base_padding + base_padding + empty_padding, length),
        _row_mask(full_padding + base_padding + empty_padding, length),
    )
    distances = pad_sequence(family.distances(pipeline, pairs, pair_tokens), batch_first=True)
    weights, free = torch.zeros(*distances.shape, length), torch.zeros(distances.shape, dtype=torch.bool)
    for i, (pair, tokens) in enumerate(zip(pairs, pair_tokens, strict=True)):
        free[i, : len(pair.base_phrases)] = torch.tensor([phrase in pair.free_phrases for phrase in pair.base_phrases])
        weights[i, : len(tokens.phrase_positions)] = torch.tensor(phrase_mask(tokens.phrase_positions, length))
    return PromptTable(
        encode=partial(family.encode, pipeline),
        prompt_ids=all_ids,
        prompt_embeds=_encode_once(family, pipeline, all_ids, length, cache, shown) if encoded else None,
        reference_rows=torch.tensor([unique[ids] for ids in reference]),
        response_rows=torch.tensor([unique[ids] for ids in response]),
        phrase_weights=weights.to(device),
        # A phrase that was cut off is nowhere in the image, like the padding of a shorter prompt.
        phrase_mask=weights.any(-1).to(device),
        free_mask=(free & weights.any(-1)).to(device),
        distances=distances.to(device),
        positions=TokenPositions(*(values.to(device) for values in positions)),
    )


def _encode_once(
    family: type[StableDiffusion], pipeline: DiffusionPipeline, ids: torch.Tensor, length: int, cache: TensorCache,
    shown: bool,
) -> PromptEmbeds:  # fmt: skip
    """Text embeddings of the U prompts `ids`, from the cache as far as it has them; on the device of `ids`, or on the
    CPU where they are large.
    """

    def compute(missing: Sequence[int]) -> Iterator[torch.Tensor]:
        with phase_bar("prompts", len(missing), "prompt", shown) as bar:
            for chunk in ids[list(missing)].split(16 if family.large_text_encoders else 32):
                yield from family.encode(pipeline, chunk).packed()
                bar.update(len(chunk))

    # Only a file outlives the models that made it.
    names = () if cache.folder is None else family.text_encoders_of(pipeline)
    models = [module_fingerprint(getattr(pipeline, name)) for name in names]
    if (zeros := pipeline.config.get("force_zeros_for_empty_prompt")) is not None:
        models.append(zeros)
    keys = [fingerprint("text embedding", *models, tuple(row)) for row in ids.tolist()]
    packed = torch.stack(cache.get_or_compute(keys, compute)).to("cpu" if family.large_embeds else ids.device)
    return PromptEmbeds.unpacked(packed, length, family.pooled_dim(pipeline))


def _padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    return pad_sequence([torch.tensor([*row], dtype=torch.long) for row in rows], batch_first=True)


def _row_mask(rows: Sequence[Sequence[int]], length: int) -> torch.Tensor:
    """(R, length) bool, True at each row's positions."""
    return torch.tensor([[place in row for place in range(length)] for row in map(frozenset, rows)])


@torch.no_grad()
def embed_targets(clip: CLIPModel, tokenizer: CLIPTokenizer, pairs: Sequence[PromptPair]) -> torch.Tensor:
    """Projected CLIP text embeddings (N, E') float32 of the pairs' targets; CLIP loses its text tower by it."""
    texts, embeds = list(dict.fromkeys(pair.target_text for pair in pairs)), []
    for start in range(0, len(texts), 64):
        inputs = tokenizer(texts[start : start + 64], padding="max_length", truncation=True, return_tensors="pt")
        inputs = inputs.to(clip.device)
        features = clip.get_text_features(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask)
        embeds.append(features.pooler_output.float())
    del clip.text_model, clip.text_projection
    return torch.cat(embeds)[[texts.index(pair.target_text) for pair in pairs]]


def embed_pixels(clip: CLIPModel, processor: CLIPImageProcessorPil, pixels: torch.Tensor) -> torch.Tensor:
    """CLIP image embeddings (B, E') float32 of pictures (B, 3, H, W) in [-1, 1], with gradient, seen in CLIP's dtype.
    """
    side = clip.config.vision_config.image_size
    mean, std = (
        # Sent without waiting for what a GPU still has to do.
        torch.tensor(values).view(3, 1, 1).to(pixels.device, non_blocking=pixels.is_cuda)
        for values in (processor.image_mean, processor.image_std)
    )
    pixels = F.interpolate(pixels.float() / 2 + 0.5, (side, side), mode="bicubic", antialias=True, align_corners=False)
    return clip.get_image_features(pixel_values=((pixels - mean) / std).to(clip.dtype)).pooler_output.float()
