"""The LoRA for others: in kohya's format, with a model card, and on the Hub with the pipeline's code. [ours]"""

import ast
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loras import KOHYA_WEIGHTS, LORA_WEIGHTS
from loras.card import CardFacts, HubNames, write_model_card
from loras.hub import create_hub_repo, push_lora
from loras.writing import save_kohya_lora
from programs.loading import InputError
from training.arguments import Flags, flat, uses_presence
from training.flags import SharingFlags
from training.inputs import Inputs


logger = logging.getLogger(__name__)

# Flags that a model card is silent about: folders and files of this machine, and what concerns no one else.
UNPUBLISHED = frozenset(
    """
    pretrained_model_name_or_path base_config clip_model_name_or_path pretrained_vae_model_name_or_path
    tiny_vae_model_name_or_path train_data_dir dataset_name cache_dir stage1_lora_path output_dir logging_dir report_to
    resume_from_checkpoint checkpointing_steps checkpoints_total_limit dataloader_num_workers dry_run push_to_hub
    hub_model_id hub_token hub_private_repo hub_license output_kohya_format reference_lora reference_lora_scale
    sfcm_dir save_alignment
    """.split()
)
_ROOT = Path(__file__).resolve().parents[1]


def pipeline_code(names: HubNames) -> dict[str, Path]:
    """The files of a family's custom pipeline under the names that diffusers looks for in a repository.

    Beside the one with the pipeline's class, what it names in relative imports, all of which diffusers' loader copies,
    and nothing else.
    """
    main = _ROOT / names.pipeline_file
    nodes = ast.walk(ast.parse(main.read_text(encoding="utf-8")))
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 1]
    siblings = {node.module or alias.name for node in imports for alias in node.names}
    return {"pipeline.py": main, **{f"{name}.py": _ROOT / f"{name}.py" for name in sorted(siblings)}}


def published_settings(flags: Flags, inputs: Inputs, presence: str = "") -> dict[str, Any]:
    """The flags that a model card has, with the size of the pictures where it is the model's own, and what came of the
    `presence` that was asked for.
    """
    settings = {name: value for name, value in flat(flags).items() if name not in UNPUBLISHED}
    if flags.pictures.aspect_ratio_buckets is None:
        settings["resolution"] = inputs.sizes[0][0]
    if uses_presence(flags):
        settings["target_presence"] = f"{flags.lora.target_presence:g}, {presence}"
    return settings


def make_repository(sharing: SharingFlags, output_dir: Path) -> str:
    """The repository on the Hub, made before the training so that a wrong name or token is known now."""
    if sharing.hub_token is not None:
        logger.warning(
            "--hub_token: every user of this machine can see a flag while the run lasts; HF_TOKEN or `hf auth login` "
            "gives the token unseen"
        )
    name = sharing.hub_model_id or output_dir.resolve().name
    try:
        return create_hub_repo(name, sharing.hub_token, sharing.hub_private_repo)
    except ValueError as error:
        raise InputError(str(error)) from error


def share(
    flags: Flags, inputs: Inputs, pictures: Sequence[str], repo_id: str | None, is_dora: bool, presence: str = ""
) -> None:
    """The LoRA in kohya's format and a model card, which names no folder of this machine; all on the Hub, if asked.

    Args:
        pictures: their paths in --output_dir, with the prompts of `inputs.validation_pair`.
        repo_id: where to push, None for nowhere.
        is_dora: whether the LoRA has a magnitude.
        presence: what came of --target_presence, as `bring_to_presence` says it.

    Raises InputError: the Hub did not take it; one line that says what is safe and how to push again.
    """
    output_dir, base_model = Path(flags.output.output_dir), flags.model.pretrained_model_name_or_path
    sharing, pair, names = flags.sharing, inputs.validation_pair, inputs.family.hub
    has_kohya = sharing.output_kohya_format and inputs.family.has_kohya_names
    if has_kohya:
        save_kohya_lora(output_dir / LORA_WEIGHTS, output_dir / KOHYA_WEIGHTS)
    facts = CardFacts(
        base_model=f"path/to/{Path(base_model).resolve().name}" if Path(base_model).exists() else base_model,
        targets=tuple(dict.fromkeys(own.target_text for own in inputs.pairs[: len(inputs.rows)])),
        example_prompt=pair.full_prompt, base_prompt=pair.base_prompt, example_target=pair.target_argument,
        settings=published_settings(flags, inputs, presence),
        pictures=tuple(pictures), licence=sharing.hub_license or names.licence, repo_id=repo_id,
        has_kohya=has_kohya, is_dora=is_dora, earlier_loras=inputs.references,
    )  # fmt: skip
    write_model_card(output_dir, facts, names, inputs.base_file)
    if repo_id is not None:
        files = [*pictures, *([KOHYA_WEIGHTS] if has_kohya else [])]
        try:
            address = push_lora(output_dir, repo_id, sharing.hub_token, pipeline_code(names), files)
        except (OSError, ValueError) as error:
            raise InputError(str(error)) from error
        logger.info("The LoRA is on the Hub: %s", address)
