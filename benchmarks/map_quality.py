"""Is the map right? `python benchmarks/map_quality.py` holds maps against regions that are known.

Portraits are rendered, so that the region of a target and of each phrase is known to the pixel. They are noised at
timesteps of several bands, the denoiser predicts for base and full prompt with and without a LoRA, and every SFCM mode
makes its map. Where all layers have one resolution, phrases are looked for in each of them. A second part takes the
maps of the pipeline while it draws, and the regions from the probe. The LoRAs are those of
`benchmarks/preservation.py`.

Legend: B portraits, h/w map size (16x16), N noise samples, P base phrases, T text tokens, K training seeds.
Source: [ours].
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adapters import active_adapters
from attention_processors import CrossAttentionCapture, CrossAttentionFeatures
from benchmarks import sfcm_modes
from benchmarks.parts import drawing, judging, regions, tables
from benchmarks.parts.drawing import Picture, Pipeline, prompt_pairs
from benchmarks.parts.regions import KINDS, Scenes, map_separation, phrase_games
from benchmarks.parts.runs import RUNS, run_folder, train_all
from benchmarks.parts.tables import Summary, cell, markdown_table, number
from families.noise_process import NoiseProcess
from families.pipelines import denoiser_of
from families.prompt_embeds import PromptEmbeds
from families.stable_diffusion import StableDiffusion
from joint_attention import JointAttentionCapture
from loras import LORA_WEIGHTS
from prompts import phrase_mask
from region_guidance import noise_difference
from sfcm import SFCM_MODES, phrase_attention_maps
from toy_portraits.judge import PortraitJudge, base_prompts
from toy_portraits.learning import to_tensor
from toy_portraits.pipelines import family_of
from toy_portraits.world import SIZE, TARGETS
from training.pixels import whole_picture
from training.prompt_table import PromptTable, make_prompt_table


Band = tuple[int, int]  # lowest and highest timestep
Samples = Sequence[tuple[torch.Tensor, torch.Tensor]]
Capture = CrossAttentionCapture | JointAttentionCapture
# Maps (N, B, h, w) by adapter ("original": none), name and detail; and of phrases (B, P, h, w) by layers.
Maps = dict[tuple[str, str, str], np.ndarray]
PhraseMaps = dict[str, np.ndarray]

FIFTHS = ((0, 200), (200, 400), (400, 600), (600, 800), (800, 1000))
GENERATED = (0, 0)  # stands for all steps of a drawing
PORTRAIT_SEED = 70101  # of renders, their prompts and noise
PICTURED = 2  # portraits a target in the picture
NOISES = 4  # samples a band, as in the training
MANY, ONE = f"{NOISES} noises", "one noise"
MODES = {name: mode for name, mode in (SFCM_MODES | sfcm_modes.LOST).items() if name != "none"}
DEFAULT_MODE, TARGET_WORDS, ORIGINAL = "averaged_target", "target words", "original"
LABELS_OF_RUNS = {ORIGINAL: tables.ORIGINAL}
LABELS_OF_RUNS |= {name: RUNS[name].label for name in ("plain", "stage1", "composed", "paper")}


# ------------------------------------------------------------------------------------------------------------ the maps


@torch.no_grad()
def predict(
    family: type[StableDiffusion], denoiser: torch.nn.Module, adapter: str, latents: torch.Tensor,
    timesteps: torch.Tensor, embeds: PromptEmbeds,
) -> tuple[torch.Tensor, CrossAttentionFeatures]:  # fmt: skip
    """The denoiser's prediction and the attention of all its layers with one adapter on, or none ("original")."""
    names, capture = None if adapter == ORIGINAL else adapter, family.capture(denoiser)
    with active_adapters(denoiser, names), capture.store(capture.layers) as store, store.record():
        model_pred = family.predict(denoiser, latents, timesteps, embeds)
        return model_pred, store.pop()


def layer_groups(capture: Capture, resolutions: dict[str, tuple[int, int]], size: Sequence[int]) -> dict[str, list]:
    """The layers whose maps are looked at together, by what they are called: those of a resolution, or each where all
    have the same; the first group is what is used for latents of (h, w).
    """
    used, sizes = capture.phrase_map_layers(tuple(size)), sorted(set(resolutions.values()))
    if len(sizes) == 1:
        numbers = [int(name.split(".")[1]) for name in used]
        text = f"{min(numbers)}-{max(numbers)} (used)"
        return {f"blocks {text}": used} | {f"block {name.split('.')[1]}": [name] for name in resolutions}
    own = {f"{h}x{w}": [name for name, found in resolutions.items() if found == (h, w)] for h, w in sizes}
    (text,) = [text for text, names in own.items() if set(names) == set(used)]
    return {f"{text} (used)": own.pop(text)} | own


def noise_samples(count: int, band: Band, shape: Sequence[int], process: NoiseProcess) -> Samples:
    """Noise (B, *shape) and timesteps (B,) of each sample.

    A portrait's noise depends on its number alone, and each sample's timestep is from its own part of the band, as in
    the training.
    """
    generators = [torch.Generator().manual_seed(1000 * PORTRAIT_SEED + i) for i in range(count)]
    samples = []
    for sample in range(NOISES):
        noise = torch.stack([torch.randn(*shape, generator=own) for own in generators])
        offsets = torch.cat([torch.rand(1, generator=own) for own in generators])
        place = (sample + offsets) / NOISES
        samples.append((noise, process.between(*band, place)))
    return samples


@dataclass(frozen=True)
class Inputs:
    """What maps are made of: latents (B, C, h, w) of portraits, what the training knows of their prompts, and weights
    (B, 1, T) that average over each target's tokens."""

    family: type[StableDiffusion]
    pipeline: Pipeline
    latents: torch.Tensor
    table: PromptTable
    target_weights: torch.Tensor

    @classmethod
    @torch.no_grad()
    def make(cls, base: str, pipeline: Pipeline, scenes: Scenes) -> Inputs:
        family, pairs = family_of(base), prompt_pairs(scenes.prompts)
        latents = family.to_latents(pipeline.vae, to_tensor(scenes.images))
        tokenizers = [getattr(pipeline, name) for name in family.tokenizers]
        tokens = [family.locate(pair, tokenizers) for pair in pairs]
        table, length = make_prompt_table(family, pipeline, pairs, tokens), len(tokens[0].base_input_ids)
        weights = torch.tensor([phrase_mask([row.target_positions], length) for row in tokens], device=pipeline.device)
        return cls(family, pipeline, latents, table, weights)

    @property
    def process(self) -> NoiseProcess:
        scheduler = self.pipeline.scheduler
        return self.family.noise_process(type(scheduler).__name__, scheduler.config)

    def maps(self, band: Band, adapters: Sequence[str], batch_size: int) -> tuple[Maps, PhraseMaps]:
        """All maps of a band, so many portraits at a time."""
        count = len(self.latents)
        samples = noise_samples(count, band, self.latents.shape[1:], self.process)
        chunks = [slice(start, start + batch_size) for start in range(0, count, batch_size)]
        maps, phrases = zip(*(self._chunk(rows, samples, adapters) for rows in chunks))
        return (
            {key: np.concatenate([own[key] for own in maps], axis=1) for key in maps[0]},
            {key: np.concatenate([own[key] for own in phrases]) for key in phrases[0]},
        )

    def _chunk(self, rows: slice, samples: Samples, adapters: Sequence[str]) -> tuple[Maps, PhraseMaps]:
        process, table, latents = self.process, self.table, self.latents[rows]
        sizes = torch.tensor([whole_picture((SIZE, SIZE))] * len(latents), device=latents.device)
        asked = torch.arange(len(self.latents))[rows], sizes
        base, full = table.reference(*asked), table.response(*asked)
        predicted = partial(predict, self.family, denoiser_of(self.pipeline))
        references, responses = [], {name: [] for name in adapters}
        # By adapter, and what its response is held against, as in `SfcmMode`.
        differences = {(name, start): [] for name in adapters for start in ("paths", "words")}
        for noise, timesteps in samples:
            steps = timesteps[rows].to(latents.device)
            noisy = process.add_noise(latents, noise[rows].to(latents.device), steps)
            reference_pred, features = predicted(ORIGINAL, noisy, steps, base)
            references.append(features)
            for name in adapters:
                response_pred, features = predicted(name, noisy, steps, full)
                responses[name].append(features)
                start_pred = reference_pred if name == ORIGINAL else predicted(name, noisy, steps, base)[0]
                for start, own in (("paths", reference_pred), ("words", start_pred)):
                    scale = process.epsilon_scale(steps)
                    differences[name, start].append(noise_difference(response_pred, own, scale))

        resolutions = references[0].resolutions
        groups = layer_groups(self.family.capture(denoiser_of(self.pipeline)), resolutions, latents.shape[-2:])
        used = next(iter(groups))
        weights, distances, present = table.phrase_weights[rows], table.distances[rows], table.phrase_mask[rows]

        def attention(features: Sequence[CrossAttentionFeatures], of: torch.Tensor, group: str) -> torch.Tensor:
            layers = [one.attention_probs[name] for one in features for name in groups[group]]
            sizes = [resolutions[name] for name in groups[group]] * len(features)
            return phrase_attention_maps(layers, sizes, of, latents.shape[-2:])

        def sfcm(mode: str, name: str, phrases: torch.Tensor, chosen: slice) -> np.ndarray:
            taken = [torch.stack(differences[name, own][chosen]).mean(0) for own in MODES[mode].differences]
            return MODES[mode].compute(torch.cat(taken, 1), phrases, distances, present)[:, 0].cpu().numpy()

        phrases = {group: attention(references, weights, group) for group in groups}
        each = [(attention([own], weights, used), slice(i, i + 1)) for i, own in enumerate(references)]
        maps: Maps = {}
        for name in adapters:
            for mode in MODES:
                maps[name, mode, MANY] = sfcm(mode, name, phrases[used], slice(None))[None]
                maps[name, mode, ONE] = np.stack([sfcm(mode, name, *own) for own in each])
            words = attention(responses[name], self.target_weights[rows], used)
            maps[name, TARGET_WORDS, ""] = words.cpu().numpy().swapaxes(0, 1)
        return maps, {group: own.cpu().numpy() for group, own in phrases.items()}


def draw_scenes(
    pipeline: Pipeline, judge: PortraitJudge, target_name: str, args: argparse.Namespace
) -> tuple[Scenes, np.ndarray]:
    """Draw portraits with the LoRA that is on; the regions are the probe's, of these and the original's portraits.

    Returns them with their SFCMs (B, h, w) as the pipeline returns them, averaged over the denoising steps.
    """
    target, settings, found = TARGETS[target_name], drawing.draw_settings(args), {}
    prompts = base_prompts(target, args.num_prompts, args.prompt_seed)
    options = {"compare": True, "return_sfcm": True, "sfcm_mode": "averaged"}
    for chunk, drawn in drawing.draw_with_target(pipeline, prompts, settings, **options):
        found |= zip(chunk, zip(drawn.images, drawn.reference_images, drawn.sfcm[:, 0].numpy(), strict=True))
    images, references, maps = (np.stack(own) for own in zip(*(found[i] for i in range(len(prompts)))))
    images, references = drawing.to_bytes(images), drawing.to_bytes(references)
    labels, before = judge.read(images).labels, judge.read(references).labels
    own = regions.own_label(target)
    return Scenes(prompts, images, labels, (labels == own) | (before == own)), maps


# ----------------------------------------------------------------------------------------------------------- measuring


class Row(NamedTuple):
    """One map held against one region."""

    target_name: str
    band: Band
    run_name: str  # whose Response Path it is
    map_name: str  # an SFCM mode, `TARGET_WORDS`, or a kind of phrase
    detail: str  # the number of noise samples of an SFCM, the layers of a phrase's map
    measures: dict[str, np.ndarray]  # (K, B) each, NaN where a portrait has no such region or phrase


def lora_folders(args: argparse.Namespace, target_name: str) -> dict[Path, str]:
    """A target's LoRAs and the run of each."""
    return {run_folder(args.output_dir, target_name, run, seed): run for run in args.runs for seed in args.seeds}


def map_pictures(inputs: Inputs, scenes: Scenes, target_name: str, adapter: str) -> list[list[Picture]]:
    """Per portrait its pictures: the region, the default map of each band, the maps of words and phrases."""
    target, pairs = TARGETS[target_name].prompt, prompt_pairs(scenes.prompts)
    rows = [[Picture(f"{target}?", scenes.images[i], None, scenes.drawn[i])] for i in range(len(pairs))]
    columns = {band: (f"SFCM, t {band_text(band)}", DEFAULT_MODE, MANY) for band in FIFTHS}
    columns[inputs.process.map_timesteps] = f"words: {target}", TARGET_WORDS, ""
    for band, (caption, *key) in columns.items():
        maps, phrase_maps = inputs.maps(band, [adapter], len(pairs))
        for i, row in enumerate(rows):
            row.append(Picture(caption, scenes.images[i], maps[(adapter, *key)][0, i], scenes.drawn[i]))
    (used,) = [own for shown, own in phrase_maps.items() if shown.endswith("(used)")]
    for i, (row, pair) in enumerate(zip(rows, pairs, strict=True)):
        for place, phrase in enumerate(pair.base_phrases[:3]):
            region = regions.kind_regions(regions.kind_of(phrase), scenes)[i]
            row.append(Picture(phrase, scenes.images[i], used[i, place], region))
    return rows


def measure_target(target_name: str, args: argparse.Namespace) -> tuple[list[Row], list[list[Picture]]]:
    """All rows of a target, and its part of the picture."""
    pipeline, judge = judging.tools(args.device, args.base)
    folders = lora_folders(args, target_name)
    runs = {drawing.adapter_name(folder): run for folder, run in folders.items()}
    found: dict[tuple, list[dict[str, np.ndarray]]] = {}  # by what a row is, a training seed each
    scenes = regions.render_scenes(target_name, args.num_prompts, PORTRAIT_SEED)
    phrases = [pair.base_phrases for pair in prompt_pairs(scenes.prompts)]
    with drawing.loras_on(pipeline, list(folders)):
        denoiser_of(pipeline).requires_grad_(False)
        inputs = Inputs.make(args.base, pipeline, scenes)
        for band in (*FIFTHS, inputs.process.map_timesteps):
            maps, phrase_maps = inputs.maps(band, [ORIGINAL, *runs], args.batch_size)
            for (adapter, name, detail), own in maps.items():
                key = band, runs.get(adapter, ORIGINAL), name, detail
                found.setdefault(key, []).append(map_separation(own, scenes))
            for shown, own in phrase_maps.items():
                for kind, game in phrase_games(own, phrases, scenes).items():
                    found[band, ORIGINAL, kind, shown] = [game]
            print(f"{target_name}, t {band_text(band)}: measured", flush=True)
        for adapter, run in runs.items():
            denoiser_of(pipeline).set_adapters(adapter)
            drawn, maps = draw_scenes(pipeline, judge, target_name, args)
            found.setdefault((GENERATED, run, "averaged", ""), []).append(map_separation(maps[None], drawn))
            print(f"{target_name}, {adapter}: measured", flush=True)
        few = regions.render_scenes(target_name, PICTURED, PORTRAIT_SEED)
        pictures = map_pictures(Inputs.make(args.base, pipeline, few), few, target_name, next(iter(runs)))
    rows = [
        Row(target_name, *key, {name: np.stack([one[name] for one in own]) for name in own[0]})
        for key, own in found.items()
    ]
    return rows, pictures


# ------------------------------------------------------------------------------------------------------------- writing


def band_text(band: Band) -> str:
    return f"{band[0]}-{band[1]}" + ("" if band in FIFTHS else " (training's)")


def bands_of(args: argparse.Namespace) -> tuple[Band, ...]:
    """All bands; that of the training's timesteps comes last."""
    return (*FIFTHS, family_of(args.base).noise_process.map_timesteps)


def in_out(summary: Summary) -> str:
    return " / ".join(number(summary[name]["mean"]) for name in ("inside", "outside"))


def by_band_section(found: dict[tuple, Summary], args: argparse.Namespace) -> str:
    """The first LoRA's default map in each band."""
    lines = []
    for target in args.targets:
        own = [found[target, band, args.runs[0], DEFAULT_MODE, MANY] for band in bands_of(args)]
        lines.append([TARGETS[target].prompt, "inside / outside", *map(in_out, own)])
        lines.append(["", "AUC", *(cell(summary, "auc") for summary in own)])
    text = f"\n## In short\n\n`{DEFAULT_MODE}`, {MANY}, {LABELS_OF_RUNS[args.runs[0]]}, by timesteps:\n\n"
    return text + markdown_table(["", "", *map(band_text, bands_of(args))], lines)


def training_section(found: dict[tuple, Summary], args: argparse.Namespace) -> str:
    """The default map at the training's timesteps, and others."""
    others, lines = [(DEFAULT_MODE, ONE), ("averaged", MANY), ("averaged_noise", MANY), ("paper", ONE)], []
    for target in args.targets:
        for run in args.runs:
            keys = [(DEFAULT_MODE, MANY), *others, (TARGET_WORDS, "")]
            default, *rest = (found[(target, bands_of(args)[-1], run, *key)] for key in keys)
            rest.append(found[target, GENERATED, run, "averaged", ""])
            cells = [cell(default, name) for name in ("inside", "outside", "auc")]
            lines.append([TARGETS[target].prompt, LABELS_OF_RUNS[run], *cells, *(cell(own, "auc") for own in rest)])
    header = ["", "", "inside", "outside", "AUC", *(f"`{mode}`, {detail}" for mode, detail in others), TARGET_WORDS]
    header.append("`averaged`, while drawing")
    text = "\nAt the training's timesteps; from the second AUC on, those of other maps:\n\n"
    return text + markdown_table(header, lines)


def game_section(rows: Sequence[Row]) -> str:
    """The pointing game of each kind of base phrase, over the portraits of all targets."""
    games: dict[tuple[Band, str, str], list[dict[str, np.ndarray]]] = {}
    for row in rows:
        if row.map_name in KINDS:
            games.setdefault((row.band, row.map_name, row.detail), []).append(row.measures)
    text = "\n## The pointing game\n\nBase phrases in the Reference Path, over all targets and noises.\n"
    for band in dict.fromkeys(key[0] for key in games):
        lines = []
        for key in sorted((key for key in games if key[0] == band), key=lambda key: KINDS.index(key[1])):
            names, own = games[key][0], games[key]
            summary = tables.summarise({name: np.concatenate([one[name] for one in own], axis=1) for name in names})
            cells = [cell(summary, "hit"), number(summary["chance"]["mean"]), cell(summary, "auc")]
            lines.append([", ".join(key[1:]), str(summary["hit"]["prompts"]), *cells])
        table = markdown_table(["", "portraits", "hit", "chance", "AUC"], lines)
        text += f"\nTimesteps {band_text(band)}:\n\n{table}"
    return text


def write_tables(folder: Path, args: argparse.Namespace, rows: Sequence[Row], loras: dict[str, str]) -> None:
    """Write results.json, which names the LoRAs' digests, and table.md."""
    found = {row[:-1]: tables.summarise(row.measures) for row in rows}
    names = ("target", "timesteps", "run", "map", "detail", "measures")
    entries = [dict(zip(names, (*key, summary), strict=True)) for key, summary in found.items()]
    scenes = [regions.render_scenes(target, args.num_prompts, PORTRAIT_SEED) for target in args.targets]
    best = ", ".join(f"{regions.ceiling(own, (SIZE // 4, SIZE // 4)):.3f}" for own in scenes)
    text = f"""\
{args.num_prompts} rendered portraits a target (seed {PORTRAIT_SEED}), {NOISES} noise samples a band, and as many
generated ones: {tables.settings_text(args)}.
± is one standard error over portraits.

*Inside* and *outside*: the map's mean over picture pixels where the target is drawn (the hair, the hat, the clothes
of the rendering with the target; in generated portraits the probe's, of the original or the new one) and everywhere
else. *AUC*: how often a pixel inside has a larger value than one outside, .5 for a map that says nothing; that of a
perfect map of 16x16 latent pixels, which mix inside and outside at the border, is {best}. *Hit*: how often a map's
maximum lies in the region; *chance*: the region's share of the picture.
"""
    text += by_band_section(found, args) + training_section(found, args) + game_section(rows)
    model = drawing.base_model_digest(args.base)
    tables.write_results(folder, args, text, base_model=model, loras=loras, rows=entries)


def parse_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    defaults = {"num_prompts": 48, "prompt_seed": 70201, "batch_size": 32, "seeds": [101]}
    parser = drawing.make_parser(__doc__, **defaults)
    parser.add_argument(
        "--runs", nargs="+", choices=list(LABELS_OF_RUNS)[1:], default=["composed", "stage1", "plain"],
        help="Whose maps; the first one's are in the picture.",
    )  # fmt: skip
    return drawing.read_flags(parser, input_args)


def main(args: argparse.Namespace) -> None:
    train_all(args, [(target, run, seed) for target in args.targets for run in args.runs for seed in args.seeds])
    with drawing.worker_processes(args.workers) as pool:
        found = list(pool.map(measure_target, args.targets, [args] * len(args.targets)))
    folders = [folder for target in args.targets for folder in lora_folders(args, target)]
    loras = {drawing.adapter_name(folder): drawing.file_digest(folder / LORA_WEIGHTS) for folder in folders}
    folder = args.output_dir / "map_quality"
    write_tables(folder, args, [row for rows, _ in found for row in rows], loras)
    drawing.save_pictures(folder / "map_quality.png", [row for _, pictures in found for row in pictures])


if __name__ == "__main__":
    main(parse_args())
