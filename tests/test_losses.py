import copy
import pickle
import urllib.error
import warnings
from importlib.metadata import version

import lpips
import pytest
import torch
import torchvision

from models.coordtok import CoordTokConfig
from models.losses import Perceptual, coordtok_loss, patch_loss
from models.planes import gather_patches
from models.released import WeightsError


@pytest.fixture(scope="module")
def perceptual():
    return Perceptual("alex", "random")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """The part of torchvision's alexnet that counts, with random weights: (path of its file, module)."""
    with torch.device("meta"):
        features = torchvision.models.alexnet(weights=None).features
    features.to_empty(device="cpu")
    for parameter in features.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    path = tmp_path_factory.mktemp("weights") / "alexnet.pth"
    torch.save({f"features.{name}": value for name, value in features.state_dict().items()}, path)
    return path, features


def clips():
    return torch.rand(2, 2, 3, 3, 48, 48).unbind()


def test_perceptual_is_lpips_frame_by_frame(perceptual):
    pred, target = clips()
    distances = perceptual.per_frame(pred, target, chunk=4)
    assert distances.shape == (2, 3)
    for b in range(2):
        theirs = perceptual.lpips(2 * pred[b].transpose(0, 1) - 1, 2 * target[b].transpose(0, 1) - 1)
        torch.testing.assert_close(distances[b], theirs.flatten())
    torch.testing.assert_close(perceptual(pred, target), distances.mean(dim=1))
    assert perceptual.per_frame(pred, pred).abs().max() == 0


def test_the_dropout_of_lpips_is_on_where_asked_for(perceptual):
    (pred, target), dropping = clips(), Perceptual("alex", "random", dropout=True)
    assert torch.equal(perceptual(pred, target), perceptual.train()(pred, target))
    assert not torch.equal(dropping(pred, target), dropping(pred, target))
    drawn = torch.stack([dropping(pred, target) for _ in range(30)]).mean(dim=0)
    torch.testing.assert_close(drawn, perceptual(pred, target), rtol=0.1, atol=0)


def test_perceptual_loads_torchvisions_file(backbone):
    path, features = backbone
    loaded, frames = Perceptual("alex", str(path)), torch.rand(1, 3, 64, 64)
    assert " alex, alexnet.pth (sha256 " in loaded.description
    torch.testing.assert_close(loaded.lpips.net(frames)[4], features[:12](frames), rtol=1e-4, atol=1e-4)


def test_random_vgg_saved_in_torchvisions_form_and_loaded_is_the_same(tmp_path):
    random = Perceptual("vgg", "random")
    assert random.description.endswith("vgg, RANDOM backbone")
    state = {"features." + name.split(".", 1)[1]: value for name, value in random.lpips.net.state_dict().items()}
    torch.save(state, tmp_path / "vgg16.pth")
    loaded, (pred, target) = Perceptual("vgg", str(tmp_path / "vgg16.pth")), torch.rand(2, 1, 3, 1, 32, 32)
    assert torch.equal(loaded(pred, target), random(pred, target)) and random(pred, target) > 0


def test_linear_layers_are_the_published_ones(perceptual):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    for kind in ("lin", "scaling_layer"):
        expected = {name: value for name, value in theirs.state_dict().items() if name.startswith(kind)}
        found = {name: value for name, value in perceptual.lpips.state_dict().items() if name.startswith(kind)}
        assert len(expected) >= 2 and expected.keys() == found.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_random_repeats_and_leaves_the_generator_alone(perceptual):
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = Perceptual("alex", "random")
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(3))
    assert all(map(torch.equal, again.state_dict().values(), perceptual.state_dict().values()))


def test_perceptual_is_frozen_and_survives_copies(perceptual):
    pred, target = clips()
    expected = perceptual(pred, target)
    assert not any(parameter.requires_grad for parameter in perceptual.parameters())
    for other in (copy.deepcopy(perceptual), pickle.loads(pickle.dumps(perceptual))):
        other.train()
        assert not any(module.training for module in other.modules())  # no dropout
        assert torch.equal(other(pred, target), expected)


def test_perceptual_gradients_are_finite(perceptual):
    """Also where the backbone is silent, as lpips's own normalisation is not: all its features 0."""
    silent = copy.deepcopy(perceptual)
    torch.nn.init.constant_(silent.lpips.net.slice5[-2].bias, -1000.0)
    pred, target = clips()
    gradient = torch.autograd.grad(silent(pred.requires_grad_(), target).sum(), pred)[0]
    assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_perceptual_under_autocast_returns_float32(perceptual):
    pred, target = clips()
    with torch.autocast("cpu", torch.bfloat16):
        low = perceptual(pred, target)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, perceptual(pred, target), rtol=0.02, atol=0)


def test_weights_that_cannot_be_had_are_one_line_errors(monkeypatch, tmp_path, backbone):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", offline)
    with pytest.raises(WeightsError, match="alexnet-owt.*no route.*--lpips_weights PATH.*random") as error:
        Perceptual("alex")
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="none.pth"):
        Perceptual("alex", str(tmp_path / "none.pth"))
    with pytest.raises(ValueError, match="tensors do not fit this model"):
        Perceptual("vgg", str(backbone[0]))  # alex's file for vgg
    with pytest.raises(ValueError, match="net is one of vgg, alex, got 'vgg16'"):
        Perceptual("vgg16", "random")


def test_auto_is_torchvisions_download(monkeypatch, backbone):
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda url, **_: torch.load(backbone[0]))
    automatic = Perceptual("alex")
    assert automatic.description == f"lpips {version('lpips')} alex, torchvision IMAGENET1K_V1"
    assert torch.equal(automatic.lpips.net.slice1[0].weight, backbone[1][0].weight)


def test_patch_loss_is_the_reference_case(reference):
    _, expected = reference.case("coordtok_tiny")
    loss = patch_loss(expected["patch_recon"], expected["patch_target"])
    assert loss.shape == (2,)
    torch.testing.assert_close(loss.sum(), expected["loss_sum"][0], rtol=0, atol=1e-5)


def test_coordtok_loss(perceptual):
    config = CoordTokConfig(video_shape=(4, 64, 64), enc_patch_size_t=4, dec_patch_size_t=2)
    pred, target = torch.rand(2, 2, 3, 4, 64, 64)
    second = torch.cartesian_prod(torch.tensor([1]), torch.arange(8), torch.arange(8))  # frames 2 and 3
    index = torch.stack([second[torch.randperm(64)] for _ in range(2)])
    patches = [gather_patches(2 * video - 1, index, 2, 8) for video in (pred, target)]
    mse = 4 * (pred - target)[:, :, 2:].square().mean(dim=(1, 2, 3, 4))  # [-1, 1] doubles differences

    loss, logs = coordtok_loss(*patches, index, config)
    torch.testing.assert_close(loss, mse)
    assert list(logs) == ["mse"] and logs["mse"].item() == pytest.approx(mse.mean().item())

    loss, logs = coordtok_loss(*patches, index, config, perceptual, lpips_scale=0.5)
    distances = perceptual.per_frame(pred[:, :, 2:], target[:, :, 2:])
    torch.testing.assert_close(loss, mse + 0.5 * distances.sum(dim=1))
    assert logs["lpips"].item() == pytest.approx(distances.mean().item(), rel=1e-4)


def test_losses_are_float32_and_detach_their_logs():
    config = CoordTokConfig()
    pred = torch.rand(1, 4, 192, dtype=torch.bfloat16, requires_grad=True)
    loss, logs = coordtok_loss(pred, torch.rand(1, 4, 192), torch.zeros(1, 4, 3, dtype=torch.long), config)
    assert loss.dtype == torch.float32 and loss.requires_grad and not logs["mse"].requires_grad
