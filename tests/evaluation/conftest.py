"""What the tests of the evaluation share: tiny judges."""

import pytest
import torch
from transformers import (
    BitImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessorPil,
)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders with a tiny DINOv2 and a tiny SegFormer of random weights."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    dino = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(dino).save_pretrained(folder / "dino")
    processor = BitImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor.save_pretrained(folder / "dino")
    segmenter = SegformerConfig(
        depths=[1] * 4, hidden_sizes=[8, 8, 8, 8], num_attention_heads=[1] * 4, decoder_hidden_size=8, num_labels=5,
        sr_ratios=[1] * 4,
    )  # fmt: skip
    SegformerForSemanticSegmentation(segmenter).save_pretrained(folder / "segmenter")
    SegformerImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "segmenter")
    return folder
