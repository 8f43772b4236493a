"""The tables of `benchmarks/map_quality.py`.

Legend: B portraits, K training seeds.
Source: [ours].
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.parts import drawing, regions
from benchmarks.parts.regions import KINDS, TARGET_WORDS, TOLERANCE
from benchmarks.parts.tables import cell, markdown_table, mean_and_error, number, write_results
from benchmarks.preservation_runs import CONTROLS, METHODS, RUNS
from benchmarks.sfcm_modes import LOST
from sfcm import SFCM_MODES
from toy_portraits.world import SIZE, TARGETS


Band = tuple[int, int]

BANDS: tuple[Band, ...] = ((0, 200), (200, 400), (400, 600), (600, 800), (800, 1000))
TRAINING_BAND: Band = (600, 950)  # the trainer's default --sfcm_timesteps
MODES = tuple(name for name in SFCM_MODES | LOST if name != "none")
DEFAULT_MODE = "averaged_target"
ORIGINAL = "original"
LABELS_OF_RUNS = {ORIGINAL: "original model"} | {name: RUNS[name].label for name in (*CONTROLS, *METHODS)}


@dataclass(frozen=True)
class Row:
    """One map held against one region."""

    portraits: str  # "without target" or "with target" (rendered), or "generated"
    target_name: str
    band: Band | None  # lowest and highest timestep, or None for all steps of a drawing
    run_name: str  # whose Response Path it is
    map_name: str  # an SFCM mode, or a kind of phrase
    detail: str  # the number of noise samples of an SFCM, the resolution of a phrase's map
    measures: dict[str, np.ndarray]  # (K, B) each, NaN where a portrait has no such region or phrase

    def by_portrait(self, name: str) -> np.ndarray:
        """A measure's mean over training seeds, of the portraits that have it: the unit standard errors count."""
        values = self.measures[name].mean(axis=0)
        return values[~np.isnan(values)]


def select(rows: Iterable[Row], **wanted: object) -> list[Row]:
    """The rows whose attributes have these values."""
    return [row for row in rows if all(getattr(row, name) == value for name, value in wanted.items())]


def summarise(row: Row) -> dict[str, dict[str, float]]:
    """Per measure the mean over portraits, its standard error and their number; `ratio` is inside to outside."""
    own = {name: row.by_portrait(name) for name in row.measures}
    summary = {name: mean_and_error(values) | {"portraits": len(values)} for name, values in own.items()}
    if "inside" in own:
        inside, outside = own["inside"], own["outside"]
        ratio = float(inside.mean() / outside.mean()) if outside.mean() > 0 else float("nan")
        error = regions.ratio_error(inside, outside)
        summary["ratio"] = {"mean": ratio, "standard_error": error, "portraits": len(inside)}
    return summary


def separation_table(rows: Sequence[Row], first: str, name_of: Callable[[Row], str]) -> str:
    """Inside, outside, ratio and both AUCs, a row a map."""
    header = [first, "inside", "outside", "ratio", "AUC", "AUC, allowed region"]
    lines = []
    for row in rows:
        summary = summarise(row)
        lines.append([name_of(row), *(cell(summary, m) for m in ("inside", "outside", "ratio", "auc", "allowed_auc"))])
    return markdown_table(header, lines)


def band_text(band: Band | None) -> str:
    if band is None:
        return "all steps"
    return f"{band[0]}-{band[1]}" + (" (training's)" if band == TRAINING_BAND else "")


def auc_table(lines: dict[str, Sequence[Row]], bands: Sequence[Band]) -> str:
    """AUC, a column a band; `lines` holds each line's rows by its name."""
    cells = {name: {row.band: cell(summarise(row), "auc") for row in rows} for name, rows in lines.items()}
    return markdown_table(
        ["", *map(band_text, bands)], [[name, *(by[b] for b in bands)] for name, by in cells.items()]
    )


def pool(rows: Sequence[Row]) -> Row:
    """Rows of several targets as one, their portraits side by side."""
    names = rows[0].measures
    return replace(
        rows[0],
        target_name="all",
        measures={name: np.concatenate([row.measures[name] for row in rows], axis=1) for name in names},
    )


def game_table(rows: Sequence[Row], name_of: Callable[[Row], str]) -> str:
    """The pointing game, a row a phrase and resolution; the chance is the region's share of the picture."""
    tolerant = (f"hit, {TOLERANCE} px", f"chance, {TOLERANCE} px")
    header = ["", "portraits", "hit", "chance", *tolerant, "mass inside", "AUC"]
    names = ("hit", "chance", "hit_tolerant", "chance_tolerant", "mass", "auc")
    lines = []
    for row in rows:
        summary = summarise(row)
        cells = [cell(summary, n) if "chance" not in n else number(summary[n]["mean"]) for n in names]
        lines.append([name_of(row), str(summary["hit"]["portraits"]), *cells])
    return markdown_table(header, lines)


def game_rows(rows: Sequence[Row], run_name: str, **wanted: object) -> list[Row]:
    """The rows of each kind of base phrase, pooled over targets, and of each target's words with one run."""
    found = []
    for kind in KINDS:
        own = select(rows, map_name=kind, **wanted)
        for detail in dict.fromkeys(row.detail for row in own):
            found.append(pool(select(own, detail=detail)))
    return found + select(rows, map_name=TARGET_WORDS, run_name=run_name, **wanted)


def game_name(row: Row) -> str:
    what = f'"{TARGETS[row.target_name].prompt}"' if row.map_name == TARGET_WORDS else row.map_name
    return f"{what}, {row.detail}"


def explanation(args: argparse.Namespace) -> str:
    """What was measured, with which settings, and what the columns mean."""
    seeds = ", ".join(map(str, args.seeds))
    return f"""\
{args.num_portraits} rendered portraits a target (seed {args.portrait_seed}), {args.noise_samples} noise samples a
band, LoRAs of training seed {seeds} from `benchmarks/preservation.py`; {args.num_prompts} generated portraits a target
(seed {args.prompt_seed}), {args.num_inference_steps} DDIM steps, guidance scale {args.guidance_scale:g}.
± is one standard error over portraits.

*Inside* and *outside*: the map's mean over picture pixels where the target is drawn (the hair, the hat, the clothes
of the rendering with the target; in generated portraits the probe's, of the original or the new one) and everywhere
else; *ratio*: of the two means. *AUC*: how often a pixel inside has a larger value than one outside, .5 for a map
that says nothing. *Allowed region*: the same against the region in which the judge lets the target change a
portrait, which for the hat is all of the hair too, and everywhere has a margin of 2 pixels. *Hit*: how often a map's
maximum lies in the region; *chance*: the region's share of the picture. With {TOLERANCE} px: the region grown by
{TOLERANCE} pixels, as the pointing game is usually played with 15 of 224. *Mass inside*: the share of the map's sum
that lies in the region; a flat map's is the chance.
"""


def band_cell(row: Row) -> str:
    """Inside and outside of a map, without errors."""
    summary = summarise(row)
    return f"{summary['inside']['mean']:.2f} / {summary['outside']['mean']:.2f}"


def summary_section(rows: Sequence[Row], args: argparse.Namespace) -> str:
    """The README's two tables: the first run's map by band, and every run's at the training's timesteps."""
    bands, many = [*args.bands, TRAINING_BAND], f"{args.noise_samples} noises"
    rows = [row for row in rows if row.portraits == "without target"]
    default = select(rows, map_name=DEFAULT_MODE, detail=many)
    lines = []
    for name in args.targets:
        own = {row.band: row for row in select(default, target_name=name, run_name=args.runs[0])}
        lines.append([TARGETS[name].prompt, "inside / outside", *(band_cell(own[band]) for band in bands)])
        lines.append(["", "AUC", *(cell(summarise(own[band]), "auc") for band in bands)])
    parts = [f"\n## In short\n\n`{DEFAULT_MODE}`, {many}, {LABELS_OF_RUNS[args.runs[0]]}, by timesteps:\n\n"]
    parts += [markdown_table(["", "", *map(band_text, bands)], lines)]

    others = [(DEFAULT_MODE, "one noise"), ("averaged", many), ("averaged_noise", many), ("paper", "one noise")]
    lines = []
    for name in args.targets:
        for run_name in args.runs:
            own = select(rows, target_name=name, run_name=run_name, band=TRAINING_BAND)
            summary = summarise(select(own, map_name=DEFAULT_MODE, detail=many)[0])
            line = [TARGETS[name].prompt, LABELS_OF_RUNS[run_name]]
            line += [cell(summary, measure) for measure in ("inside", "outside", "ratio", "auc")]
            line += [cell(summarise(select(own, map_name=mode, detail=d)[0]), "auc") for mode, d in others]
            words = [row for row in select(own, map_name=TARGET_WORDS) if row.detail.endswith("(used)")]
            lines.append([*line, cell(summarise(words[0]), "auc")])
    header = ["", "", "inside", "outside", "ratio", "AUC", *(f"`{mode}`, {d}" for mode, d in others), TARGET_WORDS]
    parts += ["\nAt the training's timesteps; from the second AUC on, those of other maps:\n\n"]
    return "".join([*parts, markdown_table(header, lines)])


def default_name(row: Row) -> str:
    """The band, and which portraits if they are not those of the original model's kind."""
    return band_text(row.band) + (", portraits with target" if row.portraits == "with target" else "")


def target_section(target_name: str, rows: Sequence[Row], args: argparse.Namespace) -> str:
    """All tables of a target."""
    scenes = regions.render_scenes(target_name, args.num_portraits, args.portrait_seed, with_target=False)
    bands, many = [*args.bands, TRAINING_BAND], f"{args.noise_samples} noises"
    rows = select(rows, target_name=target_name)
    default = select(rows, map_name=DEFAULT_MODE, detail=many)
    parts = [
        f'\n## "{TARGETS[target_name].prompt}"\n\n',
        f"The target's region is {scenes.drawn.mean():.3f} of a picture. A perfect map of 16x16 latent pixels, which "
        f"mix inside and\noutside at the border, has AUC {regions.ceiling(scenes, (SIZE // 4, SIZE // 4)):.3f}.\n",
    ]
    for run_name in args.runs:
        parts += [f"\n`{DEFAULT_MODE}`, {many}, {LABELS_OF_RUNS[run_name]}:\n\n"]
        parts += [separation_table(select(default, run_name=run_name), "timesteps", default_name)]
    plain = select(default, portraits="without target")
    lines = {LABELS_OF_RUNS[name]: select(plain, run_name=name) for name in (*args.runs, ORIGINAL)}
    parts += [f"\nAUC of `{DEFAULT_MODE}`, {many}, portraits without target:\n\n", auc_table(lines, bands)]
    for run_name in args.runs:
        found = select(rows, run_name=run_name, portraits="without target")
        details = dict.fromkeys((row.map_name, row.detail) for row in found if row.map_name in MODES)
        lines = {f"`{m}`, {d}": select(found, map_name=m, detail=d) for m, d in sorted(details)}
        lines["target words' attention"] = [
            row for row in select(found, map_name=TARGET_WORDS) if row.detail.endswith("(used)")
        ]
        heading = f"\nAUC of every map, {LABELS_OF_RUNS[run_name]}, portraits without target:\n\n"
        parts += [heading, auc_table(lines, bands)]
    parts += ["\nGenerated portraits, the pipeline's map (`averaged`, over all steps):\n\n"]
    generated = select(rows, portraits="generated", map_name="averaged")
    parts += [separation_table(generated, "", lambda row: LABELS_OF_RUNS[row.run_name])]
    return "".join(parts)


def pointing_section(rows: Sequence[Row], args: argparse.Namespace) -> str:
    """The pointing game, of all targets."""
    run_name = args.runs[0]
    parts = [
        "\n## The pointing game\n\nBase phrases in the Reference Path, over all targets; the targets' words in the "
        f"Response Path of {LABELS_OF_RUNS[run_name]}.\nMaps of the layers of one resolution, averaged over "
        f"{args.noise_samples} noises; portraits without target.\n"
    ]
    for band in (*args.bands, TRAINING_BAND):
        found = game_rows(rows, run_name, portraits="without target", band=band)
        parts += [f"\nTimesteps {band_text(band)}:\n\n", game_table(found, game_name)]
    found = game_rows(select(rows, run_name=run_name), run_name, portraits="generated")
    parts += [f"\nPortraits generated with {LABELS_OF_RUNS[run_name]}, the probe's regions:\n\n"]
    return "".join([*parts, game_table(found, game_name)])


def write_tables(args: argparse.Namespace, rows: Sequence[Row], loras: dict[str, str]) -> None:
    """Write results.json, which names the LoRAs' digests, and table.md."""
    names = {"portraits": "portraits", "target": "target_name", "timesteps": "band", "run": "run_name",
             "map": "map_name", "detail": "detail"}  # fmt: skip
    entries = [{key: getattr(row, name) for key, name in names.items()} | {"measures": summarise(row)} for row in rows]
    parts = [explanation(args), summary_section(rows, args)]
    parts += [target_section(name, rows, args) for name in args.targets]
    text = "".join([*parts, pointing_section(rows, args)])
    write_results(args, text, base_model=drawing.base_model_digest(), loras=loras, rows=entries)
