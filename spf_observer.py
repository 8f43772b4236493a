"""What a call sees beside its own rows of the batch: the original model's prediction and attention, and their maps.

Legend: B images of one call, C latent channels, H/W latent size, S = h*w image tokens of a layer, T text tokens,
U those of them that are kept, P base phrases, K targets, N calls of the denoiser in a run.
Paper: arXiv 2504.00396.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence


# The siblings as modules of the package that a custom pipeline is, or as modules on the path.
try:
    from . import adapters, attention_processors, prompts, region_guidance, sfcm
except ImportError:
    import adapters as adapters
    import attention_processors as attention_processors
    import prompts as prompts
    import region_guidance as region_guidance
    import sfcm as sfcm

# Of a denoiser, a context with the store of its attention to the text.
Capture = Callable[[nn.Module], AbstractContextManager[attention_processors.CrossAttentionStore]]


@dataclass(frozen=True)
class RowLayout:
    """Which rows of the denoiser's batch are whose.

    A branch has B rows of the response and, beside references, B of these. The negative branch of classifier-free
    guidance comes first, the conditional one next, and appended rows last. Rows are counted from the end, for a
    callback may end guidance during the run.
    """

    images: int  # B
    compare: bool = False  # whether references are drawn too
    negative_adapters: bool = True  # whether the adapters are on in the negative branch
    # Groups of B rows that the caller does not see; the first is the Reference Path, on the response's own latents,
    # and in a second one the adapters are on.
    appended: int = 0

    @property
    def branch(self) -> int:
        """Rows of a branch."""
        return self.images * (1 + self.compare)

    def response(self, own: Tensor) -> Tensor:
        """The response's rows, a view, in the rows of the call itself."""
        return own[-self.branch :][: self.images]

    def append(self, own: Tensor) -> Tensor:
        """The rows of the call itself, and the response's again for each group that is appended."""
        return torch.cat([own, *[self.response(own)] * self.appended])

    def own(self, rows: Any) -> Any:
        """The rows of the call itself, in those of the whole batch."""
        return rows[: len(rows) - self.images * self.appended]

    def of_the_original(self, batch_size: int, closed: bool = False) -> list[int]:
        """The rows of a whole batch in which the adapters are off; with a closed gate, all of the call itself."""
        own = len(self.own(range(batch_size)))
        if closed:
            return list(range(own))
        negatives = range(0 if self.negative_adapters else own - self.branch)
        references = [i for i in range(own) if i % self.branch >= self.images and i not in negatives]
        return [*negatives, *references, *range(own, own + self.images * (self.appended > 0))]


@dataclass(frozen=True)
class Phrases:
    """What the maps are about, B rows each; a shorter prompt's rows are padded with zeros."""

    texts: list[tuple[str, ...]]
    targets: list[tuple[str, ...]]  # of each image, none without a target
    # Of T text tokens the U that stand for any phrase or target: no other's attention is kept, which of hundreds of
    # tokens and thousands of places would be by far the most.
    columns: Tensor
    weights: Tensor  # (B, P, U), each row averages over a phrase's tokens in the base prompt
    target_weights: Tensor  # (B, K, U), the same of the targets in the full prompt
    free: Tensor  # (B, P) bool, the phrases that may change
    distances: Tensor  # (B, P), zeros without a target

    @property
    def protected(self) -> Tensor:
        """(B, P) bool; a phrase that was cut off is nowhere in the image, like the padding of a shorter prompt."""
        return self.weights.any(-1) & ~self.free


def phrases_of(rows: Iterable[tuple[prompts.PromptPair, prompts.PromptTokens, Tensor]]) -> Phrases:
    """Where the phrases and targets of each image's prompts stand; with the (P,) distances of its phrases."""
    pairs, tokens, distances = zip(*rows)
    length = len(tokens[0].base_input_ids)

    def weights(positions: Iterable[Sequence[Sequence[int]]]) -> Tensor:
        masks = [torch.tensor(prompts.phrase_mask(own, length)).view(-1, length) for own in positions]
        return pad_sequence(masks, batch_first=True)

    base_weights = weights(own.phrase_positions for own in tokens)
    target_weights = weights(own.each_target_positions for own in tokens)
    columns = torch.cat([base_weights, target_weights], 1).any(0).any(0).nonzero().flatten()
    free = [torch.tensor([phrase in pair.free_phrases for phrase in pair.base_phrases]) for pair in pairs]
    return Phrases(
        texts=[pair.base_phrases for pair in pairs],
        targets=[tuple(target.text for target in pair.target_prompts) for pair in pairs],
        columns=columns,
        weights=base_weights[..., columns],
        target_weights=target_weights[..., columns],
        free=pad_sequence(free, batch_first=True),
        distances=pad_sequence(list(distances), batch_first=True),
    )


def _timestep(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The one timestep, (), of a call of the denoiser: a UNet is told it after the latents, a transformer by name and
    once for each row.
    """
    return (args[1] if len(args) > 1 else kwargs["timestep"]).reshape(-1)[0]


@dataclass(frozen=True)
class StepAttention:
    """Cross-attention of one call of the denoiser, or the mean over several: (B, S, U) float32 at one (h, w)."""

    reference: Tensor
    response: Tensor
    resolution: tuple[int, int]

    def reference_maps(self, weights: Tensor, size: Sequence[int]) -> Tensor:
        """(B, P, H, W) in [0, 1] of the base prompts' phrases."""
        return self._maps(self.reference, weights, size)

    def response_maps(self, weights: Tensor, size: Sequence[int]) -> Tensor:
        """(B, K, H, W) in [0, 1] of the targets."""
        return self._maps(self.response, weights, size)

    def _maps(self, probs: Tensor, weights: Tensor, size: Sequence[int]) -> Tensor:
        return sfcm.phrase_attention_maps([probs], [self.resolution], weights.to(probs.device), size)


@dataclass
class Observer:
    """Gives the denoiser rows that its caller does not see, and takes their predictions and attention.

    Above a noise level the gate is closed: the call's own rows are the original model's of the base prompts, which is
    the Reference Path, and the first appended group is the response that is only looked at.

    Source: [paper] both predictions from the same `z_t`; [ours] in one batch, and the gate.
    """

    rows: RowLayout
    phrases: Phrases | None  # None where no rows are appended
    # A call's arguments and keywords, and whether the gate is closed, to those with the appended rows.
    extend: Callable[[tuple, dict, bool], tuple[tuple, dict]]
    to_epsilon: Callable[[Tensor], Tensor]  # of a timestep, what makes a difference one of predicted noise
    guidance: tuple[float, float]  # strength and exponent
    closed_at: Callable[[Tensor], bool]  # whether the gate is closed, of a timestep
    starts: tuple[str, ...]  # what the response is held against, D, as in `sfcm.SfcmMode`
    differences: list[Tensor] = field(default_factory=list)  # (B, D, H, W) of each call, as the attention
    attention: list[StepAttention] = field(default_factory=list)
    _store: attention_processors.CrossAttentionStore | None = None
    _map: region_guidance.RunningMap = field(default_factory=region_guidance.RunningMap)
    _closed: bool = False  # of the call of the denoiser that is under way

    @contextmanager
    def watch(self, denoiser: nn.Module, capture: Capture | None) -> Iterator[None]:
        """Inside, the denoiser is called as the stock pipeline calls it, and this looks on; at its attention to the
        text, too, if it is told how to `capture` that.
        """
        with ExitStack() as stack:
            if capture is not None:
                self._store = stack.enter_context(capture(denoiser))
                stack.enter_context(self._store.record())
            stack.callback(denoiser.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
            if self.rows.appended:
                stack.callback(denoiser.register_forward_hook(self._take_rows, with_kwargs=True).remove)
            stack.enter_context(
                adapters.original_rows(denoiser, lambda size: self.rows.of_the_original(size, self._closed))
            )
            yield

    def _begin(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        self._closed = self.closed_at(_timestep(args, kwargs))
        return self.extend(args, kwargs, self._closed)

    def _paths(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The Response Path's rows of a whole batch and the Reference Path's, B each."""
        own = self.rows.own(rows)
        response, reference = self.rows.response(own), rows[len(own) :][: self.rows.images]
        return (reference, response) if self._closed else (response, reference)

    def _take_rows(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any], output: tuple) -> tuple:
        response, reference = self._paths(output[0])
        held = {"paths": reference, "words": output[0][-self.rows.images :]}
        scale = self.to_epsilon(_timestep(args, kwargs))
        each = [region_guidance.noise_difference(response, held[start], scale) for start in self.starts]
        self.differences.append(torch.cat(each, 1))
        if self._store is not None:
            self.attention.append(self._take_attention())
        if self.guidance[0] > 0:
            guided = self._guided(response, reference)
            if not self._closed:
                response.copy_(guided)
        return (self.rows.own(output[0]), *output[1:])

    def _take_attention(self) -> StepAttention:
        features = self._store.pop()
        resolution = attention_processors.phrase_map_resolution(features.resolutions)
        layers = features.at_resolution(resolution).attention_probs.values()
        columns = self.phrases.columns.to(self.differences[-1].device)
        paths = zip(*(self._paths(probs[..., columns]) for probs in layers))
        response, reference = (torch.stack(path).mean(0) for path in paths)
        return StepAttention(reference, response, resolution)

    def _guided(self, response: Tensor, reference: Tensor) -> Tensor:
        """The response (B, C, H, W) kept to the reference outside of where the target responds.

        The region is the running map to the power of the exponent, and open where phrases are free.
        """
        strength, exponent = self.guidance
        opened = self._map.add(self.differences[-1]) ** exponent
        if self.phrases.free.any():
            maps = self.attention[-1].reference_maps(self.phrases.weights, opened.shape[-2:])
            opened = sfcm.free_regions(opened, maps, self.phrases.free.to(opened.device))
        return region_guidance.keep_to_region(response, reference, opened, strength)

    def maps(self, mode: str, has_map: bool, per_step: bool) -> dict[str, Any]:
        """The map fields of the pipeline's output, from what was seen in a run.

        Raises ValueError: there was not one step.
        """
        if not self.differences:
            raise ValueError("`return_sfcm` is about the steps of a call, and `denoising_end` leaves none of them.")
        phrases, difference = self.phrases, sum(self.differences) / len(self.differences)
        sums = (sum(getattr(call, path) for call in self.attention) for path in ("reference", "response"))
        means = (total / len(self.attention) for total in sums)
        attention, size = StepAttention(*means, self.attention[0].resolution), difference.shape[-2:]
        maps = {"phrases": phrases.texts, "phrase_maps": attention.reference_maps(phrases.weights, size).cpu()}
        if has_map:
            maps["sfcm"] = self._compute_sfcm(difference, attention, mode)
        if has_map and per_step:
            steps = zip(self.differences, self.attention, strict=True)
            maps["sfcm_per_step"] = torch.cat([self._compute_sfcm(*step, mode) for step in steps], dim=1)
        if any(phrases.targets):
            maps["phrase_distances"] = phrases.distances
            maps["targets"] = phrases.targets
            maps["target_maps"] = attention.response_maps(phrases.target_weights, size).cpu()
        return maps

    def _compute_sfcm(self, difference: Tensor, attention: StepAttention, mode: str) -> Tensor:
        """(B, 1, H, W) float32 on the CPU."""
        phrases = self.phrases
        maps = attention.reference_maps(phrases.weights, difference.shape[-2:]).cpu()
        computed = sfcm.SFCM_MODES[mode].compute(difference.cpu(), maps, phrases.distances, phrases.protected)
        return sfcm.free_regions(computed, maps, phrases.free)
