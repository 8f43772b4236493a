"""Does a toy base model draw what a caption says? `python benchmarks/base_model.py`.

It draws the base prompts of all targets and the same with the target, without a LoRA, and the probe reads the
portraits: how often each captioned factor is as the caption says, and how often a target is there, asked for and
unasked. A model that is to be tuned follows its captions, and shows the targets now and then when asked.

Source: [ours].
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.parts import drawing, judging, tables
from benchmarks.parts.drawing import Originals
from benchmarks.parts.tables import Summary, cell
from toy_portraits.judge import PortraitJudge
from toy_portraits.recipe import BASES
from toy_portraits.world import BACKGROUNDS, CLOTHES, HAIR_COLORS, SEXES, TARGETS


# By factor its phrases and what the probe reads where the portrait is as the phrase says.
PHRASES = {
    "sex": {f"a {name}": i for i, name in enumerate(SEXES)},
    "hair_color": {f"{name} hair": i for i, name in enumerate(HAIR_COLORS)},
    "clothes": {f"a {name} jacket": i for i, name in enumerate(CLOTHES)},
    "background": {f"a {name} background": i for i, name in enumerate(BACKGROUNDS)},
    "glasses": {"glasses": 1},
}
HEADINGS = {
    **{name: name.replace("_", " ") for name in PHRASES},
    "no_glasses": "no glasses",
    "asked": "target, asked for",
    "unasked": "target, unasked",
}


def captioned(prompt: str) -> dict[str, int]:
    """The factors that a base prompt names, and the class of each."""
    phrases = prompt.split(", ")
    return {name: own[phrase] for name, own in PHRASES.items() for phrase in phrases if phrase in own}


def measure(judge: PortraitJudge, originals: Originals) -> dict[str, np.ndarray]:
    """By heading whether each portrait is as asked, (1, B); NaN where the prompt does not say."""
    read, target = judge.read(originals.base_images).factors, TARGETS[originals.target_name]
    asked = [captioned(prompt.base_prompt) for prompt in originals.prompts]

    def follows(name: str, wanted: list[int | None]) -> np.ndarray:
        pairs = zip(read[name], wanted, strict=True)
        return np.array([np.nan if own is None else float(found == own) for found, own in pairs])

    found = {name: follows(name, [own.get(name) for own in asked]) for name in PHRASES}
    found["no_glasses"] = follows("glasses", [None if "glasses" in own else 0 for own in asked])
    for name, images in (("asked", originals.full_images), ("unasked", originals.base_images)):
        found[name] = judge.response(images, target)["response"]
    return {name: values[None] for name, values in found.items()}


def table(summaries: dict[str, Summary]) -> str:
    """A row a target, and one of all their prompts; none has what no prompt names, as where hair is the target."""
    lines = []
    for name, own in summaries.items():
        said = {heading: values for heading, values in own.items() if values["prompts"]}
        lines.append([tables.title_of(name), *(cell(said, heading) for heading in HEADINGS)])
    return tables.markdown_table(["", *HEADINGS.values()], lines)


def main(input_args: Sequence[str] | None = None) -> None:
    args = drawing.read_flags(drawing.drawing_parser(__doc__, num_inference_steps=8), input_args)
    pipeline, judge = judging.tools(args.device, args.base)
    settings, found = drawing.draw_settings(args), {}
    for name in args.targets:
        found[name] = measure(judge, drawing.load_originals(pipeline, name, settings, args.output_dir / "cache"))
    captions = {name: np.concatenate([own[name] for own in found.values()], axis=1) for name in HEADINGS}
    summaries = {name: tables.summarise(own) for name, own in {**found, "all prompts": captions}.items()}
    base = BASES[args.base]
    text = f"""\
{base.title}, {args.num_prompts} base prompts a target (seed {args.prompt_seed}), {args.num_inference_steps} \
{base.sampler} steps, guidance scale
{args.guidance_scale:g}; the share of portraits in which the probe reads what the prompt says, ± one standard error.

"""
    document = {"base_model": drawing.base_model_digest(args.base), "targets": summaries}
    tables.write_results(args.output_dir / "base_model", args, text + table(summaries), **document)


if __name__ == "__main__":
    main()
