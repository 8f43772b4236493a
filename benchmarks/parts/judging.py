"""What LoRAs do to the original model's portraits, by the toy world's judge; what is judged once is kept.

Source: [ours].
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

import toy_portraits.judge
from benchmarks.parts import drawing
from benchmarks.parts.drawing import DrawSettings, Originals, Pipeline, file_digest
from benchmarks.parts.tables import ORIGINAL, Row
from loras import LORA_WEIGHTS
from toy_portraits.judge import PROBE_FOLDER, PortraitJudge
from toy_portraits.pipelines import family_of
from toy_portraits.world import TARGETS
from training.sharing import pipeline_code


# What the README recommends with guidance for a LoRA that was not trained to keep out of the empty branch.
QUIET = {"adapter_in_unconditional": False, "target_scale": 0.75}
# A late LoRA is off above this noise over signal, Stable Diffusion's own at timestep 800, and stronger where it is on.
LATE = {"sfcm_guidance_start": 5.1, "target_scale": 1.4}
PORTRAITS = ("full_images", "base_images", "maps")


@dataclass(frozen=True)
class Job:
    """A trained LoRA, how it is drawn with, and where the row it makes belongs."""

    target_name: str
    run_name: str
    seed: int
    strength: float  # of the LoRA
    lora_path: Path
    way: str = ""  # to draw: as it is, then base prompts are drawn, too; "guided" by the SFCM; or "late", by `LATE`
    sfcm_guidance: float = 1.0  # when guided
    quiet: bool = False  # whether `QUIET` goes with the guidance

    @property
    def options(self) -> dict[str, float | bool]:
        """What the call of the pipeline has beside the target."""
        guidance = {"sfcm_guidance": self.sfcm_guidance} | (QUIET if self.quiet else {})
        return {"": {}, "guided": guidance, "late": LATE}[self.way]

    def __str__(self) -> str:
        how = {"": "", "guided": f", guided {self.sfcm_guidance:g}", "late": ", late"}[self.way]
        return f"{self.target_name}, {self.run_name}, seed {self.seed}, strength {self.strength:g}{how}"


@lru_cache(maxsize=1)
def tools(device: str, base: str) -> tuple[Pipeline, PortraitJudge]:
    return drawing.load_pipeline(device, base), PortraitJudge.from_pretrained()


def judge_images(
    judge: PortraitJudge, originals: Originals, full_images: np.ndarray, base_images: np.ndarray | None
) -> dict[str, np.ndarray]:
    """All measures of a model's portraits from the same noise, (num_prompts,) each.

    `PortraitJudge.compare` of the full prompts' portraits, and of the base prompts', if there are any, `base_change`
    (whole picture), `base_kept`, `leak` and `leak_pixels` (the target unasked).
    """
    target = TARGETS[originals.target_name]
    measures = judge.compare(originals.base_images, full_images, target)
    if base_images is not None:
        alone = judge.compare(originals.base_images, base_images, target)
        measures |= {"base_change": alone["change"], "base_kept": alone["kept"]}
        measures |= {"leak": alone["response"], "leak_pixels": alone["response_pixels"]}
    return measures


def judge_job(job: Job, settings: DrawSettings, cache_dir: Path) -> dict[str, np.ndarray]:
    """Draw with a LoRA and judge, or read what was judged before with the same weights and settings.

    Guided and late are about a target, and the pipeline refuses them without one: then nothing is drawn of base
    prompts. Returns the measures of `judge_images`, and what was drawn, as many of `PORTRAITS` as there are.
    """
    weights = file_digest(job.lora_path / LORA_WEIGHTS)
    pipeline, judge = tools(settings.device, settings.base)
    originals = drawing.load_originals(pipeline, job.target_name, settings, cache_dir)

    def make() -> dict[str, np.ndarray]:
        with drawing.loras_on(pipeline, [job.lora_path], job.strength):
            if job.way:
                drawn = drawing.draw_guided(pipeline, originals.prompts, settings, **job.options)
            else:
                drawn = drawing.draw_both(pipeline, originals.prompts, settings)
        return judge_images(judge, originals, drawn["full_images"], drawn.get("base_images")) | drawn

    probe = file_digest(Path(toy_portraits.judge.__file__), PROBE_FOLDER / "probe.safetensors")
    key = ["portraits", job.target_name, job.strength, asdict(settings)]
    digests = [drawing.base_model_digest(settings.base), weights, probe]
    if job.way == "guided":
        key = ["guided portraits", job.target_name, QUIET if job.quiet else {}, job.sfcm_guidance, asdict(settings)]
    elif job.way == "late":
        key = ["late portraits", job.target_name, job.strength, LATE, asdict(settings)]
    if job.way:
        # Both are ours alone, and what they draw changes with their code.
        digests.append(file_digest(*pipeline_code(family_of(settings.base).hub).values()))
    return drawing.cached_arrays(cache_dir, [*key, digests], make)


def _measures_of_job(job: Job, settings: DrawSettings, cache_dir: Path) -> dict[str, np.ndarray]:
    """As `judge_job`, without the portraits, so that the rows of a benchmark fit into memory."""
    return {name: own for name, own in judge_job(job, settings, cache_dir).items() if name not in PORTRAITS}


def judge_all(
    args: argparse.Namespace, jobs: Sequence[Job]
) -> tuple[dict[str, Originals], dict[Job, dict[str, np.ndarray]]]:
    """Draw and judge every job in processes of one thread: the originals by target, and the measures by job."""
    kept = {"settings": drawing.draw_settings(args), "cache_dir": args.output_dir / "cache"}
    # Before the pool starts, so that its processes find the original model's portraits drawn.
    pipeline, _ = tools(args.device, args.base)
    names = dict.fromkeys(job.target_name for job in jobs)
    originals, results = {name: drawing.load_originals(pipeline, name, **kept) for name in names}, {}
    with drawing.worker_processes(args.workers) as pool:
        for job, found in zip(jobs, pool.map(partial(_measures_of_job, **kept), jobs)):
            results[job] = found
            print(f"judged {job} ({len(results)}/{len(jobs)})", flush=True)
    return originals, results


def make_rows(
    target_name: str,
    original: dict[str, np.ndarray],
    results: dict[Job, dict[str, np.ndarray]],
    label_of: Callable[[Job], str],
) -> list[Row]:
    """The rows of a target, the original model first; adds `excess`, the change beyond the original model's own.

    A row has those measures of the original model that all of its training seeds have.
    """
    groups: dict[str, dict[Job, dict[str, np.ndarray]]] = {}
    for job, measures in results.items():
        if job.target_name == target_name:
            groups.setdefault(label_of(job), {})[job] = measures
    rows = [Row(ORIGINAL, "original", 0.0, {name: values[None] for name, values in original.items()})]
    for label, found in groups.items():
        names = [name for name in original if all(name in measures for measures in found.values())]
        stacked = {name: np.stack([measures[name] for measures in found.values()]) for name in names}
        job, seeds = next(iter(found)), tuple(job.seed for job in found)
        rows.append(Row(label, job.run_name, job.strength, stacked, job.way, seeds))
    for row in rows:
        row.measures["excess"] = row.measures["change_outside"] - original["change_outside"]
    return rows


def judged_tables(
    args: argparse.Namespace, jobs: Sequence[Job], label_of: Callable[[Job], str]
) -> dict[str, list[Row]]:
    """By target the rows of what all jobs draw. The original model's say what naming the target moves by itself."""
    originals, results = judge_all(args, jobs)
    _, judge = tools(args.device, args.base)
    return {
        name: make_rows(name, judge_images(judge, own, own.full_images, own.base_images), results, label_of)
        for name, own in originals.items()
    }
