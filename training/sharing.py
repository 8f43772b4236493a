"""The LoRA for others: in kohya's format, with a model card, and on the Hub together with the pipeline's code.

Source: [ours].
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loras import KOHYA_WEIGHTS, LORA_WEIGHTS
from loras.card import CardFacts, write_model_card
from loras.hub import create_hub_repo, push_lora
from loras.loading import ReferenceLora
from loras.writing import save_kohya_lora
from programs.loading import InputError
from prompts import PromptPair


logger = logging.getLogger(__name__)

# Flags that a model card is silent about: folders and files of this machine, and what concerns no one else.
UNPUBLISHED = frozenset(
    """
    pretrained_model_name_or_path clip_model_name_or_path pretrained_vae_model_name_or_path
    tiny_vae_model_name_or_path train_data_dir dataset_name cache_dir stage1_lora_path output_dir logging_dir report_to
    resume_from_checkpoint checkpointing_steps checkpoints_total_limit dataloader_num_workers dry_run push_to_hub
    hub_model_id hub_token hub_private_repo hub_license output_kohya_format reference_lora reference_lora_scale
    sfcm_dir save_alignment
    """.split()
)
HERE = Path(__file__).resolve().parents[1]


def pipeline_code(main: Path) -> dict[str, Path]:
    """The files of a custom pipeline under the names that diffusers looks for in a repository.

    Args:
        main: the file with the pipeline's class; beside it lies what it names in relative imports, all of which
            diffusers' loader copies, and nothing else.

    Source: [ours].
    """
    siblings = re.findall(r"^\s*from \.(\w+) import", main.read_text(encoding="utf-8"), re.MULTILINE)
    return {"pipeline.py": main, **{f"{name}.py": main.with_name(f"{name}.py") for name in siblings}}


PIPELINE_CODE = pipeline_code(HERE / "pipeline_spf_portrait.py")


def make_repository(sharing: Any, output_dir: Path) -> str:
    """The repository on the Hub, made before the training so that a wrong name or token is known now.

    Args:
        sharing: flags: `hub_model_id`, `hub_token`, `hub_private_repo`.
        output_dir: gives its name to a repository that has none.
    """
    name = sharing.hub_model_id or output_dir.resolve().name
    if sharing.hub_token is not None:
        logger.warning(
            "--hub_token: every user of this machine can see a flag while the run lasts; HF_TOKEN or `hf auth login` "
            "gives the token unseen"
        )
    with _as_mistake():
        return create_hub_repo(name, sharing.hub_token, sharing.hub_private_repo)


@contextmanager
def _as_mistake() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise InputError(str(error)) from error


def share(output_dir: Path, facts: CardFacts, token: str | None) -> None:
    """The LoRA in kohya's format and the model card; both on the Hub with the pipeline, if that was asked for.

    Args:
        output_dir: where the LoRA lies.
        facts: of `card_facts`; where there is a repository, it is filled.
        token: of the Hub, as of `push_lora`.

    Raises:
        InputError: the Hub did not take it; one line that says what is safe and how to push again.
    """
    if facts.has_kohya:
        save_kohya_lora(output_dir / LORA_WEIGHTS, output_dir / KOHYA_WEIGHTS)
    write_model_card(output_dir, facts)
    if facts.repo_id is None:
        return
    files = [*facts.pictures, *([KOHYA_WEIGHTS] if facts.has_kohya else [])]
    with _as_mistake():
        logger.info("The LoRA is on the Hub: %s", push_lora(output_dir, facts.repo_id, token, PIPELINE_CODE, files))


def card_facts(
    flags: Mapping[str, Any],
    pairs: Sequence[PromptPair],
    validation_pair: PromptPair,
    pictures: Sequence[str],
    repo_id: str | None,
    is_dora: bool,
    references: Sequence[ReferenceLora] = (),
) -> CardFacts:
    """What the model card says; no folder of this machine is in it.

    Args:
        flags: all of them by name.
        pairs: the training portraits' prompts.
        validation_pair: the prompts of the pictures.
        pictures: their paths in --output_dir.
        repo_id: where to push, None for nowhere.
        is_dora: whether the LoRA has a magnitude.
        references: the earlier LoRAs it was trained on top of.
    """
    base_model = flags["pretrained_model_name_or_path"]
    return CardFacts(
        base_model=f"path/to/{Path(base_model).resolve().name}" if Path(base_model).is_dir() else base_model,
        targets=tuple(dict.fromkeys(pair.target_text for pair in pairs)),
        example_prompt=validation_pair.full_prompt,
        base_prompt=validation_pair.base_prompt,
        example_target=validation_pair.target_argument,
        settings={name: value for name, value in flags.items() if name not in UNPUBLISHED},
        pictures=tuple(pictures),
        licence=flags["hub_license"],
        repo_id=repo_id,
        has_kohya=flags["output_kohya_format"],
        is_dora=is_dora,
        earlier_loras=tuple(references),
    )
