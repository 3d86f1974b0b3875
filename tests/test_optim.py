import pytest
import torch
from torch import nn

from training.optim import EMA, Precision, cosine_with_warmup


def test_schedule_at_its_corners():
    multiplier = [cosine_with_warmup(s, warmup=10, total=110, floor=0.01) for s in range(111)]
    assert multiplier[0] == pytest.approx(0.01)
    assert multiplier[5] == pytest.approx(0.01 + 0.99 * 0.5)
    assert multiplier[10] == pytest.approx(1.0)
    assert multiplier[60] == pytest.approx(0.01 + 0.99 * 0.5)
    assert multiplier[110] == pytest.approx(0.01)


def test_ema_follows_with_its_decay():
    model = nn.Linear(2, 2)
    ema = EMA(model, decay=0.9)
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    ema.update(model)
    assert torch.allclose(ema.model.weight, before + 0.1)
    assert torch.allclose(model.weight, before + 1), "the live model is not touched"


def test_precision():
    cpu = torch.device("cpu")
    assert Precision("auto", cpu).name == "fp32"
    with Precision("bf16", cpu).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert Precision("fp16", cpu).scaler.is_enabled()
    assert not Precision("bf16", cpu).scaler.is_enabled()
