import json

import pytest
import torch
import torch.nn.functional as F

from models.prior import PRIOR_SIZES, Prior, PriorConfig

K, D, N = 12, 4, 7


def prior(**options) -> Prior:
    torch.manual_seed(0)
    return Prior(PriorConfig(name="gptc-XXS", **options), D, N).eval()


@pytest.fixture
def batch():
    """Straight-through vectors (2, 7, 4) as a leaf, their codes and the codebook."""
    codebook = F.normalize(torch.randn(K, D), dim=-1).requires_grad_()
    codes = torch.randint(K, (2, N))
    return codebook.detach()[codes].requires_grad_(), codes, codebook


def test_sizes(reference):
    counts = json.loads((reference.folder / "parameter_counts.json").read_text())
    with torch.device("meta"):
        published = [name for name in PRIOR_SIZES if name != "gptc-tiny"]  # ours, for demonstrations
        assert set(published) == {name for name in counts if name.startswith("gptc")}
        for name in published:
            model = Prior(PriorConfig(name=name), 16, 1024)
            assert sum(p.numel() for p in model.parameters()) == counts[name]


def test_initialisation():
    model = prior()
    assert model.pos_emb.std().item() == pytest.approx(0.02, rel=0.1)
    for name in ("head.weight", "blocks.3.attn.query.weight", "blocks.0.mlp.2.weight"):
        weight = model.get_parameter(name)
        assert weight.std().item() == pytest.approx((2 / sum(weight.shape)) ** 0.5, rel=0.1)  # Xavier's
    assert not model.blocks[2].attn.proj.bias.any()


def test_a_prediction_sees_only_codes_before_it(batch):
    model, vectors = prior(), batch[0].detach()
    changed = vectors.clone()
    changed[:, 4:] = torch.randn(2, N - 4, D)
    before, after = model(vectors), model(changed)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert (before[:, 4:] - after[:, 4:]).abs().max() > 1e-3
    torch.testing.assert_close(before.norm(dim=-1), torch.ones(2, N))


def test_dropout_is_off_in_evaluation_and_by_option(batch):
    model = prior()
    assert torch.equal(model(batch[0]), model(batch[0]))
    model.train()
    model.drop.eval()  # leaves the attention's and the residual dropouts
    assert not torch.equal(model(batch[0]), model(batch[0]))
    model = prior(no_dropout=True).train()
    assert torch.equal(model(batch[0]), model(batch[0]))


def test_sampling_ratio():
    config = PriorConfig()
    assert [config.sampling_ratio(step, 1000) for step in (0, 150, 300, 900)] == [0, 0.25, 0.5, 0.5]


def test_loss_trains_the_encoder_but_not_the_codebook(batch):
    vectors, codes, codebook = batch
    for model in (prior(use_mix_ss=False), prior(avg_loss_over_rounds=False)):  # the first round, and the second
        vectors.grad = None
        loss, logs = model.loss(vectors, codes, codebook)
        loss.backward()
        assert codebook.grad is None
        assert vectors.grad[:, :-1].abs().sum(-1).gt(0).all()
        assert not vectors.grad[:, -1].any()  # the last code is predicted, never seen
        assert not logs["prior_first_round"].requires_grad


def test_loss_is_the_cross_entropy_of_codes_from_the_second_on(batch):
    vectors, codes, codebook = batch
    model = prior(latent_ce_temperature=0.5)
    log_p = (2 * model(vectors[:, :-1]) @ codebook.T).log_softmax(-1)
    expected = -log_p.gather(-1, codes[:, 1:, None]).mean()
    loss, logs = model.loss(vectors, codes, codebook, ratio=0.0)  # at ratio 0 both rounds are the same
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logs["prior_first_round"], expected.detach())
    order = log_p.argsort(-1, descending=True)
    for k in (1, 5):
        assert logs[f"prior_top{k}"] == (order[..., :k] == codes[:, 1:, None]).any(-1).float().mean()


def inputs_of_rounds(model, *args, **kwargs) -> list[torch.Tensor]:
    seen, forward = [], model.forward

    def spy(vectors):
        seen.append(vectors)
        return forward(vectors)

    model.forward = spy
    model.loss(*args, **kwargs)
    return seen


def test_second_round_replaces_codes_at_the_given_ratio(batch):
    codebook = batch[2].detach()
    codes = torch.zeros(40, 100, dtype=torch.long)
    vectors = torch.full((40, 100, D), 9.0)  # none of the codes
    first, second = inputs_of_rounds(prior(), vectors, codes, codebook, ratio=0.3)
    assert torch.equal(first, vectors[:, :-1])
    replaced = (second != 9).all(-1)  # (40, 99)
    assert not replaced[:, 0].any()
    assert replaced[:, 1:].float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert (torch.cdist(second[replaced], codebook).min(-1).values < 1e-3).all()


def test_sampled_codes_come_from_the_position_before(batch):
    """A prior that knows its answer: sampled codes stand where the first round predicted them."""
    vectors, codes, codebook = batch
    model = prior(latent_ce_temperature=1e-3)
    choice = (model(vectors[:, :-1]) @ codebook.T).argmax(-1)  # (2, N-1), of codes 2 to N
    _, second = inputs_of_rounds(model, vectors, codes, codebook, ratio=1.0)
    torch.testing.assert_close(second[:, 1:], codebook[choice[:, :-1]])
    torch.testing.assert_close(second[:, 0], vectors[:, 0])


def test_no_gradient_through_sampled_codes(batch):
    vectors, codes, codebook = batch
    prior(avg_loss_over_rounds=False).loss(vectors, codes, codebook, ratio=1.0)[0].backward()
    assert vectors.grad[:, 0].any()  # the one vector that the second round still sees
    assert not vectors.grad[:, 1:].any() and codebook.grad is None


def test_rounds(batch):
    vectors, codes, codebook = batch

    def gradient(**options):
        model = prior(**options)
        loss, logs = model.loss(vectors, codes, codebook, 0.5, torch.Generator().manual_seed(3))
        return loss, logs["prior_first_round"], torch.autograd.grad(loss, model.head.weight)[0]

    both, first, both_grad = gradient()
    last, _, last_grad = gradient(avg_loss_over_rounds=False)
    torch.testing.assert_close(both, (first + last) / 2)
    only, _, only_grad = gradient(no_grad_before_last_round=True)
    torch.testing.assert_close(only, both)
    torch.testing.assert_close(only_grad, last_grad / 2)
    assert (both_grad - only_grad).abs().max() > 1e-6  # both rounds have a gradient
    single, first, _ = gradient(use_mix_ss=False)
    assert single == first
    assert len(inputs_of_rounds(prior(n_rounds=4), vectors, codes, codebook)) == 4


def test_randomness_comes_from_the_generator(batch):
    model = prior()
    losses = [model.loss(*batch, 0.5, torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "gptc-Q"}, "gptc-XXS"),
        ({"n_rounds": 0}, "--n_rounds"),
        ({"mix_ss_peak_steps_ratio": 0.0}, "--mix_ss_peak_steps_ratio"),
        ({"mix_ss_max_ratio": 1.5}, "--mix_ss_max_ratio"),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=message):
        PriorConfig(**options)
