"""The command line of the training script, read and checked before any library of models is imported. [ours]

A file of flags may come first, which those behind it win over.
"""

import argparse
import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import MISSING, Field, fields, replace
from types import UnionType
from typing import Any, NamedTuple, NoReturn, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser

from programs.console import FlagFormatter
from training import flags as groups
from training.flag_rules import refuse
from training.run_file import read_run_file


POLYNOMIAL_END = 1e-7  # of the learning rate, in diffusers
# Where losses can go that keeps no command line, and with it what was given as a flag.
PRIVATE_TRACKERS = ("tensorboard", "none")


class Flags(NamedTuple):
    """All flags in their groups, checked, with what follows from others filled in; and by name, as they were asked."""

    model: groups.ModelFlags
    data: groups.DataFlags
    columns: groups.ColumnFlags
    pictures: groups.PictureFlags
    lora: groups.LoraFlags
    method: groups.MethodFlags
    composed: groups.ComposedFlags
    paper: groups.PaperFlags
    alignment: groups.AlignmentFlags
    optimizer: groups.OptimizerFlags
    loop: groups.LoopFlags
    output: groups.OutputFlags
    sharing: groups.SharingFlags
    asked: dict[str, Any]


GROUPS = {name: kind for name, kind in get_type_hints(Flags).items() if name != "asked"}


class FlagParser(HfArgumentParser):
    """Flags as the fields of `Flags` say; one that is on or off has a form with --no- as well.

    `run_file` is the file of flags, if there is one, and `from_file` the flags whose value is the file's.
    """

    run_file: str | None = None
    from_file: Collection[str] = ()

    def __init__(self) -> None:
        super().__init__(
            GROUPS.values(),
            prog="train_spf_portrait_lora.py",
            description="Teach Stable Diffusion a portrait attribute as a LoRA, without moving anything else. A file "
            "may come first that holds flags by name, as OUTPUT_DIR/run.yaml of an earlier run does; flags behind it "
            "win over it.",
            usage="%(prog)s [run.yaml] [flags; --help lists them]",
            formatter_class=FlagFormatter,
        )

    @staticmethod
    def _parse_dataclass_field(parser: argparse.ArgumentParser, field: Field) -> None:
        kind = get_args(field.type)[0] if isinstance(field.type, UnionType) else field.type
        default = None if field.default is MISSING else field.default
        options = {"type": kind, "default": default} | field.metadata
        del options["rules"]
        if kind is bool:
            del options["type"]
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) in (list, tuple):
            nargs = "+" if get_origin(kind) is list else len(get_args(kind))
            options = {"nargs": nargs} | options | {"type": field.metadata.get("type", get_args(kind)[0])}
        parser.add_argument(f"--{field.name}", **options)

    def error(self, message: str) -> NoReturn:
        named = re.search(r"--(?:no-)?(\w+)", message)
        super().error(f"{self.run_file}: {message}" if named and named[1] in self.from_file else message)

    def parse(self, words: Sequence[str]) -> dict[str, Any]:
        """The value of each flag by name, in the order of the groups."""
        actions = {action.dest: action for action in self._actions if action.dest != "help"}

        def given(words: Sequence[str]) -> dict[str, Any]:
            values = vars(self.parse_args(words, argparse.Namespace(**dict.fromkeys(actions))))
            return {name: value for name, value in values.items() if value is not None}

        def said_in_file() -> dict[str, Any]:
            if self.run_file is None:
                return {}
            try:
                self.from_file = read_run_file(self.run_file, actions)
            except ValueError as error:
                self.error(str(error))
            return given([word for own in self.from_file.values() for word in own])

        if words and not words[0].startswith("-"):
            self.run_file, *words = words
        said, self.from_file = said_in_file(), ()
        typed = given(words)
        preset = (said | typed).get("preset")
        if preset is not None:
            for name, value in groups.PRESETS[preset].items():
                actions[name].default = value
            said = said_in_file()  # where what is no default by now counts as said
            if "preset" in typed:  # behind the file, it wins over all that the file says of the same
                said = {name: value for name, value in said.items() if name not in groups.PRESETS[preset]}
        self.from_file = said.keys() - typed.keys()
        # The flags say all of a preset, so that a run file, and a run that goes on, hold what they were.
        values = {name: action.default for name, action in actions.items()} | said | typed | {"preset": None}
        for one in (one for kind in GROUPS.values() for one in fields(kind) if one.default is MISSING):
            if values[one.name] is None:
                self.error(f"the following arguments are required: --{one.name}")
        return values


def parse_args(input_args: Sequence[str] | None = None) -> Flags:
    """Read and check the flags; a value that cannot work ends the program with a line that names it."""
    parser = FlagParser()
    values = parser.parse(sys.argv[1:] if input_args is None else input_args)
    if values["sfcm_timesteps"] is not None:
        values["sfcm_timesteps"] = tuple(values["sfcm_timesteps"])
    try:
        given = (kind(**{one.name: values[one.name] for one in fields(kind)}) for kind in GROUPS.values())
        flags = _derive(Flags(*given, asked=values))
        _check_method(flags)
        _check_others(flags)
    except ValueError as error:
        parser.error(str(error))
    return flags


def flat(flags: Flags) -> dict[str, Any]:
    """All flags by name."""
    return {name: value for group in flags[:-1] for name, value in vars(group).items()}


def _derive(flags: Flags) -> Flags:
    """Fill in what follows from other flags. Where there is nothing to align, all steps are one stage."""
    lora, method, sharing = flags.lora, flags.method, flags.sharing
    if lora.lora_alpha is None:
        lora = replace(lora, lora_alpha=float(lora.rank))
    scales = lora.reference_lora_scale if isinstance(lora.reference_lora_scale, list) else [lora.reference_lora_scale]
    if lora.reference_lora is None:
        scales = None
    elif len(scales) == 1:
        scales = scales * len(lora.reference_lora)
    if method.preservation != "spf":
        lost = lora.stage1_lora_path is not None
        refuse(lost, f"--preservation {method.preservation} has no second stage, which --stage1_lora_path is for")
        method = replace(method, stage1_steps=method.stage1_steps + method.stage2_steps, stage2_steps=0)
    if sharing.output_kohya_format is None:
        sharing = replace(sharing, output_kohya_format=sharing.push_to_hub and not lora.use_dora)
    return flags._replace(lora=replace(lora, reference_lora_scale=scales), method=method, sharing=sharing)


def _check_method(flags: Flags) -> None:
    """What the flags of stages, LoRA and alignment must be to each other."""
    lora, method, alignment = flags.lora, flags.method, flags.alignment
    has_stage1, aligns = lora.stage1_lora_path is not None, method.stage2_steps > 0
    both = has_stage1 and method.stage1_steps > 0
    refuse(both, "--stage1_lora_path takes stage 1's place, so it needs --stage1_steps 0")
    refuse(
        method.stage1_steps == 0 and not has_stage1 and method.stage2_objective != "paper",
        f"--stage2_objective {method.stage2_objective} needs a stage 1: give --stage1_steps or --stage1_lora_path",
    )
    for name in ("sfcm_dir", "save_alignment"):
        lost = getattr(alignment, name) and not aligns
        refuse(lost, f"--{name} is for the alignment of stage 2, and these flags have none")
    both = lora.use_dora and method.dual_path == "single_pass"
    refuse(both, "--use_dora needs --dual_path two_pass: DoRA cannot be off in some rows of a batch")
    lost = lora.target_presence > 0 and not uses_presence(flags)
    refuse(lost, "--target_presence is measured beside stage 1 and set after stage 2; these flags do not have both")
    if lora.reference_target_prompt is not None:
        refuse(lora.reference_lora is None, "--reference_target_prompt needs --reference_lora")
        refuse(
            method.preservation != "prior" and (not aligns or alignment.alignment_source == "data"),
            "--reference_target_prompt is for drawn portraits, and these flags draw none for the alignment",
        )
    lost = flags.paper.tiny_vae_model_name_or_path is not None and not uses_enhancement(method, flags.paper)
    refuse(lost, "--tiny_vae_model_name_or_path is for the enhancement loss, which these flags do not compute")


def _check_others(flags: Flags) -> None:
    """What the other flags must be to each other and to what is installed."""
    rate, tracker = flags.optimizer.learning_rate, flags.output.report_to
    for name in ("lr_scheduler", "stage2_lr_scheduler"):
        refuse(
            getattr(flags.loop, name) == "polynomial" and rate <= POLYNOMIAL_END,
            f"--{name} polynomial ends at {POLYNOMIAL_END:g}, so --learning_rate must be above it, got {rate:g}",
        )
    both = not flags.pictures.center_crop and flags.data.cache_latents
    refuse(both, "--no-center_crop takes another crop in each step, so it needs --no-cache_latents")
    refuse(
        flags.sharing.hub_token is not None and tracker not in PRIVATE_TRACKERS,
        f"--hub_token would be kept by --report_to {tracker} with the command line: log in with `hf auth login` "
        "instead",
    )
    from accelerate.tracking import get_available_trackers  # last, for it takes seconds

    known = ("all", "none", *(one.value for one in get_available_trackers()))
    refuse(tracker not in known, f"--report_to {tracker} needs the tracker's own package, which is not installed")


def uses_enhancement(method: groups.MethodFlags, paper: groups.PaperFlags) -> bool:
    """Whether any step computes the enhancement loss."""
    return method.stage2_steps > 0 and method.stage2_objective != "composed" and paper.enhancement_loss != "none"


def uses_presence(flags: Flags) -> bool:
    """Whether the LoRA's strength is set by how much of the target it shows beside stage 1."""
    has_stage1 = flags.method.stage1_steps > 0 or flags.lora.stage1_lora_path is not None
    return flags.method.stage2_steps > 0 and has_stage1 and flags.lora.target_presence > 0
