"""Tests of `families/prompt_embeds.py`."""

import pytest
import torch

from families.prompt_embeds import PromptEmbeds


@pytest.mark.parametrize("has_pooled", [False, True])
def test_rows_and_parts_stay_together(has_pooled):
    states, pooled = torch.randn(3, 5, 2), torch.randn(3, 4)
    embeds = PromptEmbeds(states, pooled if has_pooled else None)
    rows = torch.tensor([2, 0])
    for values, name in ((states, "states"), *([(pooled, "pooled")] if has_pooled else [])):
        assert torch.equal(getattr(embeds[rows], name), values[rows])
        assert torch.equal(getattr(embeds[1:], name), values[1:])
        assert torch.equal(getattr(PromptEmbeds.cat([embeds, embeds[rows]]), name), torch.cat([values, values[rows]]))
    assert len(embeds) == 3 and len(embeds[rows]) == 2
    if not has_pooled:
        assert embeds[rows].pooled is PromptEmbeds.cat([embeds, embeds]).pooled is None
