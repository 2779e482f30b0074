from __future__ import annotations

import pytest
import torch

from svb.train.heads import Dropout


@pytest.mark.parametrize("probability", [0.1, 0.25, 0.5, 0.9, 0.999])
def test_drops_its_share_and_keeps_the_mean(probability: float) -> None:
    torch.manual_seed(0)
    dropped = Dropout(probability)(torch.full((1000, 997), 3.0))
    share = float((dropped == 0).double().mean())
    assert share == pytest.approx(min(255, round(256 * probability)) / 256, abs=0.002)
    assert float(dropped.double().mean()) == pytest.approx(3.0, rel=0.05)
    assert len(dropped[dropped != 0].unique()) == 1


def test_every_byte_of_a_word_is_drawn() -> None:
    """The highest byte of a signed word would be drawn from half its range if words were positive."""
    torch.manual_seed(0)
    dropped = Dropout(0.5)(torch.ones(80_000)).view(-1, 8)
    shares = (dropped == 0).double().mean(dim=0)
    torch.testing.assert_close(shares, torch.full((8,), 0.5, dtype=torch.float64), atol=0.02, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_is_dropped_has_no_gradient_and_the_seed_decides(dtype: torch.dtype) -> None:
    values = torch.ones(100, requires_grad=True, dtype=dtype)
    torch.manual_seed(3)
    first = Dropout(0.5)(values)
    first.sum().backward()
    assert values.grad is not None and first.dtype == dtype
    assert torch.equal(values.grad, first.detach())
    torch.manual_seed(3)
    assert torch.equal(Dropout(0.5)(values), first)
    assert not torch.equal(Dropout(0.5)(values), first)
    # Nothing is dropped outside training, or at zero.
    assert Dropout(0.5).eval()(values) is Dropout(0.0)(values) is values
