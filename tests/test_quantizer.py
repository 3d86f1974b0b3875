import pytest
import torch
import torch.nn.functional as F

from models.configs import BottleneckArgs, RegularizerConfig, VQArgs
from models.quantizer import Bottleneck, GumbelMax, VectorQuantizer, uniform

NEAREST = {"stochastic": False, "l2_normalized": False}


def quantizer(dim=4, **options):
    return VectorQuantizer(dim, VQArgs(codebook_size=32, **options))


def test_deterministic_codes_are_the_largest_cosine():
    vq, z = quantizer(), torch.randn(2, 5, 4)
    out = vq(z, deterministic=True)
    cosine = F.cosine_similarity(z[:, :, None], vq.embedding.weight[None, None], dim=-1)
    assert torch.equal(out.codes, cosine.argmax(-1))
    assert torch.equal(out.vectors, vq.codebook()[out.codes])  # to the last bit, so that decoding codes is the same


def test_without_drawing_the_code_is_the_nearest():
    vq, z = quantizer(**NEAREST), torch.randn(2, 5, 4)
    assert torch.equal(vq(z).codes, torch.cdist(z, vq.embedding.weight).argmin(-1))


def test_losses_by_hand():
    vq = VectorQuantizer(2, VQArgs(codebook_size=2, commitment_loss_weight=0.25, codebook_loss_weight=2.0, **NEAREST))
    vq.embedding.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    out = vq(torch.tensor([[[2.0, 0.0], [0.0, 4.0]]]))
    assert out.codes.tolist() == [[0, 1]]
    assert out.logs["commitment"] == out.logs["codebook"] == pytest.approx((1 + 9) / 4)
    assert out.loss.item() == pytest.approx(2.25 * 2.5)


def test_gradient_passes_straight_through_to_z_alone():
    vq, z, weight = quantizer(**NEAREST), torch.randn(2, 5, 4, requires_grad=True), torch.randn(2, 5, 4)
    (vq(z).vectors * weight).sum().backward()
    torch.testing.assert_close(z.grad, weight)
    assert vq.embedding.weight.grad is None


@pytest.mark.parametrize("term", ["commitment", "codebook"])
def test_each_loss_term_trains_its_own_side(term):
    weights = {"commitment_loss_weight": 0.0, "codebook_loss_weight": 0.0, f"{term}_loss_weight": 1.0}
    vq, z = quantizer(**weights, **NEAREST), torch.randn(2, 5, 4, requires_grad=True)
    out = vq(z)
    out.loss.backward()
    pull = 2 * (z - out.vectors).detach() / z.numel()  # of the squared distance's mean
    z_grad, book_grad = z.grad, vq.embedding.weight.grad
    if term == "commitment":
        torch.testing.assert_close(z_grad, pull)
        assert not book_grad.any()
    else:
        assert not z_grad.any()
        torch.testing.assert_close(book_grad, torch.zeros(32, 4).index_add(0, out.codes.flatten(), -pull.flatten(0, 1)))


def test_draws_follow_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    noise = uniform((1, 40_000, 4), logits.device, torch.Generator().manual_seed(0))
    codes = GumbelMax()(logits, noise)
    share = torch.bincount(codes.flatten(), minlength=4) / codes.numel()
    assert (share - logits.softmax(-1)).abs().max() < 0.01  # four standard deviations


def test_temperature_fixed_and_annealed():
    vq, z = quantizer(stochastic_temperature=0.5), torch.randn(4, 50, 4)
    best = vq(z, deterministic=True).codes
    cold = vq(z, temperature=torch.tensor(1e-5)).codes
    assert (vq(z).codes != best).float().mean() > 0.2
    assert torch.equal(cold, best)
    p = (F.normalize(z, dim=-1) @ vq.codebook().T / 0.5).softmax(-1).gather(-1, best[..., None])
    hits = torch.stack([vq(z).codes == best for _ in range(50)]).float().mean()
    assert hits.item() == pytest.approx(p.mean().item(), abs=0.02)


def test_learned_temperature_has_a_gradient_and_changes_no_other():
    fixed, learned = quantizer(stochastic_temperature=0.3), quantizer(stochastic_temperature=-0.3)
    learned.embedding.weight.data = fixed.embedding.weight.data.clone()
    assert [name for name, _ in learned.named_parameters()] == ["stochastic_temperature_inv", "embedding.weight"]
    weight, grads = torch.randn(2, 5, 4), []
    for vq in (fixed, learned):
        z = torch.ones(2, 5, 4).cumsum(-1).requires_grad_()
        out = vq(z, generator=torch.Generator().manual_seed(1))
        ((out.vectors * weight).sum() + out.loss).backward()
        grads.append((z.grad, vq.embedding.weight.grad))
    assert torch.equal(out.vectors, learned.codebook()[out.codes])
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)
    assert learned.stochastic_temperature_inv.item() == pytest.approx(1 / 0.3)
    assert learned.stochastic_temperature_inv.grad.abs() > 0


def test_a_clips_draws_do_not_depend_on_its_batch():
    vq, z = quantizer(stochastic_temperature=1.0), torch.randn(3, 20, 4)
    seeded = [torch.Generator().manual_seed(seed) for seed in range(3)]
    together = vq(z, generator=seeded).codes
    alone = vq(z[1:2], generator=[torch.Generator().manual_seed(1)]).codes
    assert torch.equal(together[1:2], alone)
    with pytest.raises(ValueError, match="2 generators for 3 clips"):
        vq(z, generator=seeded[:2])


def test_entropy_term():
    """Vectors that each sit on a code of their own: no doubt about any (0), all K codes used alike (log K)."""
    vq = VectorQuantizer(4, VQArgs(codebook_size=4, entropy_loss_weight=0.5, stochastic=False))
    vq.embedding.weight.data = torch.eye(4)
    out = vq(torch.eye(4)[None])
    assert out.logs["entropy"].item() == pytest.approx(-torch.tensor(4.0).log().item(), abs=1e-5)
    assert out.loss.item() == pytest.approx(0.5 * out.logs["entropy"].item(), abs=1e-6)
    z = torch.zeros(1, 4, 4, requires_grad=True)  # wholly undecided vectors: log K less log K
    out = vq(z)
    assert out.logs["entropy"].item() == pytest.approx(0, abs=1e-5)
    out.loss.backward()
    assert z.grad.isfinite().all()


def test_codes_are_chosen_in_float32_under_autocast():
    vq, z = VectorQuantizer(8, VQArgs(codebook_size=2048)), torch.randn(2, 200, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = vq(z, deterministic=True)
    assert torch.equal(out.codes, vq(z, deterministic=True).codes)
    assert out.vectors.dtype == out.loss.dtype == torch.float32


def test_layer_norm_before_the_codes():
    args = BottleneckArgs(bottleneck_dim=4, norm="layer", regularizer=RegularizerConfig(args=VQArgs(**NEAREST)))
    neck, x = Bottleneck(args, 6, 8), torch.randn(2, 3, 6)
    z = F.layer_norm(neck.in_linear(x), (4,))
    assert torch.equal(neck(x).codes, torch.cdist(z, neck.regularizer.embedding.weight).argmin(-1))
    assert neck.expand(neck.lookup(neck(x).codes)).shape == (2, 3, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codebook_size": 1}, "--codebook_size"),
        ({"stochastic_temperature": 0.0}, "--stochastic_temperature"),
        ({"l2_normalized": False}, "--l2_normalized"),
        ({"entropy_loss_temperature": 0.0}, "--entropy_loss_temperature"),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=message):
        VQArgs(**options)
