"""What a step learns: each objective is one forward with its losses, a file of its own and an entry here. [ours]

A new one also has its name where `of_stage` says when it is asked for.
"""

from training.arguments import Flags
from training.flags import WITH_KEPT_ROWS, MethodFlags
from training.objectives.composed import Composed
from training.objectives.diffusion import Diffusion
from training.objectives.kept_rows import KeepingRows
from training.objectives.objective import Objective, Parts
from training.objectives.paper import Paper


OBJECTIVES: dict[str, type[Objective]] = {
    "diffusion": Diffusion, "kept_rows": KeepingRows, "paper": Paper, "composed": Composed,
}  # fmt: skip


def of_stage(stage: int, method: MethodFlags) -> tuple[str, ...]:
    """Which objectives a stage has, in the order of their backwards.

    The diffusion loss comes last: under DDP only the last backward is reduced, and the paper's alignment leaves some
    LoRA weights without a gradient.
    """
    if stage == 1:
        return ("kept_rows",) if method.preservation in WITH_KEPT_ROWS else ("diffusion",)
    return {"paper": ("paper", "diffusion"), "composed": ("composed",), "both": ("paper", "composed", "diffusion")}[
        method.stage2_objective
    ]


def make_objectives(stage: int, flags: Flags, parts: Parts) -> list[Objective]:
    """The objectives of a stage, not prepared yet."""
    return [OBJECTIVES[name](flags, parts) for name in of_stage(stage, flags.method)]
