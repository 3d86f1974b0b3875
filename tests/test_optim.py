import pytest
import torch
from torch import nn

from training.optim import EMA, Precision, adam, cosine_with_warmup, groups_by_name, ramp, set_rates, update


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


def test_groups_have_rates_of_their_own():
    model = nn.ModuleDict({"prior": nn.Linear(2, 2), "encoder": nn.Linear(3, 3)})
    groups = groups_by_name(model, 0.1, {"prior.": 50, "decoder.": 2})
    assert [[p.numel() for p in group["params"]] for group in groups] == [[4, 2], [9, 3]]
    optimizer = adam(groups, 0.1, betas=(0.5, 0.9))
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([5, 0.1])
    for multiplier in (0.5, 0.25):
        set_rates(optimizer, rates, multiplier)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([5 * multiplier, 0.1 * multiplier])


def test_ramp_ends_where_it_should():
    assert [ramp(step, 4, 1.0, 3.0) for step in (0, 1, 4, 9)] == [1, 1.5, 3, 3]
    assert ramp(0, 0, 1.0, 3.0) == 3


def test_update_clips_and_clears():
    weight = nn.Parameter(torch.tensor([0.0, 0.0]))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = Precision("fp32", torch.device("cpu")).scaler
    for max_norm, expected in ((1.0, [-0.6, -0.8]), (0.0, [-3.6, -4.8])):
        weight.grad = torch.tensor([3.0, 4.0])
        update(optimizer, scaler, max_norm)
        torch.testing.assert_close(weight.detach(), torch.tensor(expected))
        assert weight.grad is None


def test_scalers_back_off_apart():
    precision = Precision("fp16", torch.device("cpu"))
    other, weight = precision.make_scaler(), nn.Parameter(torch.zeros(1))
    scale = other.get_scale()
    precision.scaler.scale(weight.sum() * torch.inf).backward()
    update(torch.optim.SGD([weight], lr=1.0), precision.scaler)
    assert weight.item() == 0, "the step is left out"
    assert precision.scaler.get_scale() == scale / 2 and other.get_scale() == scale
