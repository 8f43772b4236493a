"""From the measures of each portrait to what the report says: the pollution index, flags, the checkpoint to keep.

Legend: P prompts, S seeds of each prompt, R resamples, K checkpoints.
Source: [ours].
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from evaluation.measures import MEASURES, Estimate, estimate_mean, interval, mean_of, resample_prompts, resampled_means


RESPONSES = ("truth_response", "clip_t_inside")  # the first that was measured counts
CLEAN_INDEX = 0.1  # pollution below this share of the reference LoRA's is near 0
CLEAN_CHANGE = 1.0  # and, without a reference, below one grey level of 255
SHOWN = ("label", "group", "direction", "about")  # what the document says of a measure


@dataclass(frozen=True)
class Changes:
    """What pollution is made of, (P, S) each: change outside with the full prompt, change with the base prompt."""

    outside: np.ndarray
    base: np.ndarray


def pollution_samples(
    changes: Changes, original: Changes, reference: Changes | None, resamples: np.ndarray
) -> tuple[float, np.ndarray]:
    """The pollution index and its (R,) resampled values: 0 for the original model and 1 for the reference LoRA.

    `(outside - outside of the original model) + base`, in grey levels, over the same of the reference, if there is
    one: what the original model moves outside the region when it is asked for the target is no LoRA's doing. A ratio
    of sums: were each term normalised alone, one in which the reference hardly moves would rule the index.
    """
    over_resamples = partial(resampled_means, resamples=resamples)

    def excess(own: Changes, mean: Callable[[np.ndarray], Any]) -> Any:
        return mean(own.outside) - mean(original.outside) + mean(own.base)

    value, samples = excess(changes, mean_of), excess(changes, over_resamples)
    if reference is None:
        return value, samples
    return value / excess(reference, mean_of), samples / excess(reference, over_resamples)


def estimate_pollution(
    changes: Changes, original: Changes, reference: Changes | None, resamples: np.ndarray
) -> Estimate:
    """The index of `pollution_samples` with its interval."""
    value, samples = pollution_samples(changes, original, reference, resamples)
    return Estimate(value, *interval(samples))


def can_be_reference(reference: Changes, original: Changes, resamples: np.ndarray) -> bool:
    """Whether a LoRA pollutes at all, by its interval: else nothing can be measured in units of it."""
    return _least(estimate_pollution(reference, original, None, resamples)) > 0


def _least(estimate: Estimate) -> float:
    return estimate.value if estimate.low is None else estimate.low


def flags_of(
    pollution: Estimate, normalised: bool, response: np.ndarray, original: np.ndarray, resamples: np.ndarray
) -> list[str]:
    """What is wrong with a LoRA that looks clean, or does nothing.

    "over-aligned": nothing moved, and the target is not there either. "no response": the target is not there. The
    target is there if the response, (P, S), is above the original model's by its interval.

    The index is in units of a reference LoRA (`normalised`) or in grey levels.
    Source: [paper] over-alignment; [ours] the rule.
    """
    if _least(estimate_mean(response - original, resamples)) > 0:
        return []
    near_zero = pollution.value < (CLEAN_INDEX if normalised else CLEAN_CHANGE)
    return ["over-aligned"] if near_zero else ["no response"]


def knee(pollution: Sequence[float], response: Sequence[float], origin: tuple[float, float]) -> int | None:
    """The index of the checkpoint to keep, of K: the most response for its pollution.

    Both are stretched to [0, 1] over the checkpoints and `origin`, the original model, and the largest response minus
    pollution is taken, the first of equals; None if none lies above the line from the least to the most of both.

    Source: Satopää et al., "Finding a Kneedle in a Haystack", ICDCS Workshops 2011; [ours] with the original model.
    """
    axes = []
    for values, start in zip((pollution, response), origin):
        points = np.array([start, *values], dtype=np.float64)
        span = points.max() - points.min()
        axes.append((points - points.min()) / span if span > 0 else np.zeros_like(points))
    heights = (axes[1] - axes[0])[1:]
    # Rounding alone lifts no point above the line, nor above its equals.
    return int(np.flatnonzero(heights > heights.max() - 1e-9)[0]) if heights.max() > 1e-9 else None


@dataclass(frozen=True)
class Judged:
    """A model and all that was measured of it."""

    name: str
    source: str
    role: str  # "original", "reference", "lora" or "checkpoint"
    values: Mapping[str, np.ndarray]  # by measure (P, S)
    whole: Mapping[str, float]  # by measure a number of the whole set

    @property
    def changes(self) -> Changes:
        return Changes(self.values["change_outside"], self.values["base_change"])


def summarise(judged: Sequence[Judged], missing: Mapping[str, str], resamples: int, seed: int) -> dict[str, Any]:
    """The document of `report.py`, but for prompts, seeds, region and settings.

    The original model comes first, and `missing` says by measure why it was not computed.
    """
    original = judged[0]
    index = resample_prompts(len(original.values["change"]), resamples, seed)
    unit, unit_name, why = None, "grey levels", "there is no --reference_lora"
    for own in judged:
        if own.role == "reference" and can_be_reference(own.changes, original.changes, index):
            unit, unit_name = own.changes, f"1 is {own.name}"
        elif own.role == "reference":
            why = f"{own.name} moves no more than the original model"
    note = f"Pollution: 0 is the original model, {unit_name}."
    if unit is None:
        note = f"Pollution is in grey levels of 255, since {why}."
    response = next((name for name in RESPONSES if name in original.values), None)
    entries = [_summarise_one(own, original, unit, response, index) for own in judged]
    keep, parts = None, []
    for entry in entries[1:]:
        own = [f"{entry['name']}: pollution {entry['measures']['pollution']['value']:.2f}"]
        if response is not None:
            own.append(f"response {entry['measures'][response]['value']:.2f}")
        parts.append(", ".join(own + entry["flags"]))
    verdict = "; ".join(parts) + "."
    if any(own.role == "checkpoint" for own in judged):
        keep, verdict = choose_checkpoint(judged, entries, unit, response, index)
    shown = [name for name in MEASURES if name in entries[0]["measures"] or name in missing]
    return {
        "verdict": verdict, "keep": keep, "pollution_unit": unit_name, "pollution_note": note,
        "response_measure": response,
        "measures": {name: {key: getattr(MEASURES[name], key) for key in SHOWN} for name in shown},
        "not_computed": {name: missing[name] for name in MEASURES if name in missing}, "loras": entries,
        "rank_correlations": correlate(entries[1:]),
    }  # fmt: skip


def _summarise_one(
    own: Judged, original: Judged, unit: Changes | None, response: str | None, index: np.ndarray
) -> dict[str, Any]:
    pollution = estimate_pollution(own.changes, original.changes, unit, index)
    found = {name: estimate_mean(values, index) for name, values in own.values.items()}
    found |= {name: Estimate(value, None, None) for name, value in own.whole.items()} | {"pollution": pollution}
    flags = []
    if response is not None and own is not original:
        flags = flags_of(pollution, unit is not None, own.values[response], original.values[response], index)
    measures = {name: asdict(found[name]) for name in MEASURES if name in found}
    return {"name": own.name, "source": own.source, "role": own.role, "flags": flags, "measures": measures}


def choose_checkpoint(
    judged: Sequence[Judged], entries: Sequence[Mapping[str, Any]], unit: Changes | None, response: str | None,
    index: np.ndarray,
) -> tuple[str | None, str]:  # fmt: skip
    """The checkpoint to keep, or None, and a line that says why.

    How often resampled prompts choose the same one tells how sure the choice is. Models and entries are in one order.
    """
    if response is None:
        return None, "No checkpoint is chosen: without CLIP there is no measure of the response."
    places = [i for i, own in enumerate(judged) if own.role in ("original", "checkpoint")]
    pollution, responses = (
        [entries[i]["measures"][name]["value"] for i in places] for name in ("pollution", response)
    )
    chosen = knee(pollution[1:], responses[1:], (pollution[0], responses[0]))
    if chosen is None:
        return None, "No checkpoint stands out: none gains more response than pollution."
    polluted = zip(*(pollution_samples(judged[i].changes, judged[0].changes, unit, index)[1] for i in places))
    responded = zip(*(resampled_means(judged[i].values[response], index) for i in places))
    again = [knee(p[1:], r[1:], (p[0], r[0])) for p, r in zip(polluted, responded)]
    share = f"; {again.count(chosen) / len(again):.0%} of the resamples choose it too" if again else ""
    name = judged[places[chosen + 1]].name
    return name, (
        f"Keep {name}: the most response for its pollution (response {responses[chosen + 1]:.2f}, pollution "
        f"{pollution[chosen + 1]:.2f}{share})."
    )


def correlate(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    """Spearman's rank correlation of each measure with the truth it stands for, over the LoRAs, NaN where either is
    constant. None without the truth, without torchmetrics, or for fewer than three LoRAs.
    """
    if len(entries) < 3 or "truth_kept" not in entries[0]["measures"]:
        return None
    try:
        spearman = importlib.import_module("torchmetrics.functional").spearman_corrcoef
    except ModuleNotFoundError:
        return None
    found = []
    for truth in MEASURES:
        for proxy in (name for name in entries[0]["measures"] if MEASURES[name].stands_for == truth):
            first, second = ([float(entry["measures"][n]["value"]) for entry in entries] for n in (proxy, truth))
            # torchmetrics makes 0 of a series that is constant.
            varies = len(set(first)) > 1 and len(set(second)) > 1
            value = float(spearman(torch.tensor(first), torch.tensor(second))) if varies else float("nan")
            found.append({"proxy": proxy, "truth": truth, "spearman": value, "loras": len(entries)})
    return found
