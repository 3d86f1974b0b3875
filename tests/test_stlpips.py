import copy
import hashlib
import io
import pickle
import re
import zipfile

import pytest
import torch
import torchvision.transforms.functional as TF

from models import stlpips
from models.losses import Perceptual
from models.released import WeightsError
from models.stlpips import STLPIPS, perceptual_metric


@pytest.fixture(scope="module")
def published():
    """{net: the published network}, from the cache or a download."""
    try:
        return {net: STLPIPS(net) for net in ("alex", "vgg")}
    except WeightsError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def random():
    return STLPIPS("alex", "random")


def published_state(metric: STLPIPS) -> dict[str, torch.Tensor]:
    """A network's tensors under the names of the published files."""
    state = metric.distance.state_dict()
    return {re.sub(r"^lins\.(\d)", r"lin\1", name): value.contiguous() for name, value in state.items()}


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_reference_case(published, reference, net):
    case, _ = reference.case("stlpips")
    a = (reference.noise("stlpips.a", (3, 3, 64, 80)).tanh() + 1) / 2
    b = (a + 0.1 * reference.noise("stlpips.b", (3, 3, 64, 80))).clamp(0, 1)
    metric = published[net]
    distances = metric.per_frame(a[:, :, None], b[:, :, None])
    torch.testing.assert_close(distances[:, 0], torch.tensor(case[net]["distance"]), rtol=0, atol=case["tolerance"])
    features = metric.distance.net(metric.distance.scaling_layer(2 * a - 1))
    assert [list(x.shape) for x in features] == case[net]["feature_shapes"]
    for x, mean in zip(features, case[net]["feature_means"]):
        assert x.mean().item() == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_grows_with_blur_and_noise(published, net):
    """On a picture with edges and texture, as a clip of two frames."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    picture = torch.stack([((x // 16 + y // 16) % 2), (x / 5).sin() / 2 + 0.5, ((x + y) / 7).cos() / 2 + 0.5])
    clip, noise = picture[None, :, None].repeat(1, 1, 2, 1, 1), torch.randn(1, 3, 2, 64, 64)
    blurred = [TF.gaussian_blur(picture, 13, [sigma])[None, :, None].expand_as(clip) for sigma in (0.5, 1.0, 2.0, 4.0)]
    noisy = [(clip + sigma * noise).clamp(0, 1) for sigma in (0.02, 0.05, 0.1, 0.2, 0.4)]
    for ladder in (blurred, noisy):
        distances = [0.0, *(published[net](step, clip).item() for step in ladder)]
        assert distances == sorted(distances) and distances[1] > 0
    assert published[net](clip, clip).item() == 0


def test_is_computed_frame_by_frame(random):
    pred, target = torch.rand(2, 2, 3, 3, 48, 40)
    distances = random.per_frame(pred, target, chunk=4)
    assert distances.shape == (2, 3) and (distances > 0).all()
    torch.testing.assert_close(distances[1, 2], random(pred[1:, :, 2:], target[1:, :, 2:])[0])
    torch.testing.assert_close(random(pred, target), distances.mean(dim=1))


def test_gradients_are_finite_also_in_bf16_and_where_features_are_silent(random):
    silent = copy.deepcopy(random)
    torch.nn.init.constant_(silent.distance.net[4][0].bias, -1000.0)
    for metric in (random, silent):
        for enabled in (False, True):
            pred, target = torch.rand(1, 3, 2, 32, 32, requires_grad=True), torch.rand(1, 3, 2, 32, 32)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                distance = metric(pred, target)
            assert distance.dtype == torch.float32
            gradient = torch.autograd.grad(distance.sum(), pred)[0]
            assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_autocast_moves_the_distance_little(random):
    pred, target = torch.rand(2, 1, 3, 1, 48, 48)
    with torch.autocast("cpu", torch.bfloat16):
        low = random(pred, target)
    torch.testing.assert_close(low, random(pred, target), rtol=0.02, atol=0)


def test_is_frozen_survives_copies_and_leaves_the_generator_alone(random):
    pred, target = torch.rand(2, 1, 3, 1, 32, 32)
    torch.manual_seed(1)
    again = STLPIPS("alex", "random")
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(3))
    assert not any(parameter.requires_grad for parameter in random.parameters())
    for other in (again, copy.deepcopy(random), pickle.loads(pickle.dumps(random))):
        assert not any(module.training for module in other.train().modules())  # no dropout
        assert torch.equal(other(pred, target), random(pred, target))


@pytest.fixture
def wheel(random, tmp_path, monkeypatch):
    """A wheel of two random networks under the published names, whose SHA-256 is expected."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for net in ("alex", "vgg"):
            tensors = io.BytesIO()
            torch.save(published_state(STLPIPS(net, "random")), tensors)
            file.writestr(stlpips.MEMBER.format(net), tensors.getvalue())
    monkeypatch.setattr(stlpips, "WHEEL_SHA256", hashlib.sha256(stream.getvalue()).hexdigest())
    path = tmp_path / stlpips.WHEEL.file
    path.write_bytes(stream.getvalue())
    return path


def test_weights_by_download_and_by_hand(wheel, random, tmp_path, monkeypatch):
    """From an index into the cache, then offline; the wheel, the cached file, or one network's file by path."""
    page = tmp_path / "simple" / "stlpips-pytorch"
    page.mkdir(parents=True)
    (page / "index.html").write_text(f'<a href="{wheel.as_uri()}#sha256=0">{wheel.name}</a>')
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "simple").as_uri())
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("VIDEO_TOKENIZERS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("VIDEO_TOKENIZERS_OFFLINE", raising=False)
    pred, target = torch.rand(2, 1, 3, 1, 32, 32)
    expected = random(pred, target)
    first = STLPIPS("alex")
    assert torch.equal(first(pred, target), expected)
    assert first.description == f"stlpips 0.0.2 alex, {wheel.name} (sha256 {stlpips.WHEEL_SHA256[:8]})"
    monkeypatch.setenv("VIDEO_TOKENIZERS_OFFLINE", "1")
    vgg = STLPIPS("vgg")
    assert torch.equal(vgg(pred, target), STLPIPS("vgg", "random")(pred, target))
    torch.save(published_state(random), tmp_path / "alex_shift_tolerant.pth")
    for path in (wheel, *(tmp_path / "cache").glob("*.safetensors"), tmp_path / "alex_shift_tolerant.pth"):
        assert torch.equal(STLPIPS("alex", str(path))(pred, target), expected)


def test_weights_that_cannot_be_had_are_one_line_errors(wheel, random, tmp_path, monkeypatch):
    monkeypatch.setenv("VIDEO_TOKENIZERS_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("VIDEO_TOKENIZERS_OFFLINE", "1")
    (tmp_path / "bad.safetensors").write_bytes(b"not weights")
    torch.save(published_state(random), tmp_path / "alex.pth")
    wheel.write_bytes(wheel.read_bytes() + b" ")
    for weights, message in [
        ("auto", "VIDEO_TOKENIZERS_OFFLINE is set; .*stlpips_pytorch-0.0.2.*--lpips_weights"),
        (tmp_path / "none.whl", "none.whl: no such file"),
        (tmp_path / "bad.safetensors", "bad.safetensors cannot be read"),
        (tmp_path / "alex.pth", "alex.pth: .* tensors do not fit this model"),
        (wheel, "has SHA-256 .* expected"),
    ]:
        with pytest.raises((OSError, ValueError), match=message) as error:
            STLPIPS("vgg", str(weights))
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="one of alex, vgg, got 'squeeze'"):
        STLPIPS("squeeze", "random")


def test_one_factory_for_both():
    lpips, other = perceptual_metric("lpips", "alex", "random"), perceptual_metric("stlpips", weights="random")
    assert isinstance(lpips, Perceptual) and lpips.name == "lpips"
    assert isinstance(other, STLPIPS) and other.name == "stlpips" and " alex, RANDOM" in other.description
    with pytest.raises(ValueError, match="one of lpips, stlpips, got 'psnr'.*--perceptual"):
        perceptual_metric("psnr")
