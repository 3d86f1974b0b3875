"""eval/reconstruct.py and eval/tokenizers.py: any tokenizer under the protocols, the adapters, and mistakes in them."""
import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from eval import eval_coordtok, eval_larp_tokenizer, evaluate, rate_distortion, reconstruct
from eval.evaluate import I3D
from eval.tokenizers import Checked, TokenizerError, load_tokenizer, parse_arguments
from models.configs import LARPTokenizerConfig
from models.pretrained import WeightsError
from models.triplane import Planes, stored
from tests.helpers import ROOT, known, mistake, run_here, tiny_larp

ADAPTERS = ROOT / "scripts" / "adapters"
DOC = ROOT / "docs" / "any_tokenizer.md"


class TinyI3D(nn.Module):
    """Stands for I3D: a fixed projection of every clip."""

    weights_sha256, seen = "tiny", 0

    def forward(self, video, resize):
        assert video.min() >= 0 and video.max() <= 1
        self.seen += len(video)
        pixels = nn.functional.adaptive_avg_pool3d(video, 8).flatten(1)
        return pixels @ torch.randn(pixels.shape[1], 400, generator=torch.Generator().manual_seed(0))


def perceptual_metric_out_of_reach(*_, **__):
    raise WeightsError("no network")


@pytest.fixture(autouse=True)
def i3d(monkeypatch) -> TinyI3D:
    """In place of I3D; LPIPS and ST-LPIPS are out of reach."""
    network = TinyI3D()
    monkeypatch.setattr(I3D, "from_weights", lambda *_, **__: network)
    monkeypatch.setattr(evaluate, "MIN_FRAMES", 1)
    monkeypatch.setattr(evaluate, "perceptual_metric", perceptual_metric_out_of_reach)
    return network


@pytest.fixture
def flags(data, tmp_path) -> list:
    """Of an evaluation of six tiny clips, without networks."""
    return ["--data_root", data, "--video_name", "UCF-101_train", "--num_frames", 10,
            "--size", 32, "--output_dir", tmp_path / "out"]


def report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def test_identity_loses_nothing(monkeypatch, flags, tmp_path):
    run_here(monkeypatch, reconstruct, "--tokenizer", ADAPTERS / "identity.py:identity", "--vmaf", *flags)
    results, record = report(tmp_path / "out")["results"], report(tmp_path / "out")["record"]
    assert results["clips"] == results["psnr_clip_infinite"] == results["psnr_frame_infinite"] == 6
    assert results["psnr_clip"] is None and "without error" in results["psnr_clip_note"]
    assert abs(results["rfvd"]) < 1e-6 and results["mse"] == 0 and results["ssim"] == 1
    assert results["bits_per_pixel"] == 24 and results["vmaf"] > 90
    assert record["model"].startswith("identity.py:identity ") and record["num_frames"] == 10
    assert record["sampler"] == {"arguments": {}, "num_frames": None, "size": None}


def test_real_clips_pass_the_extractor_once(monkeypatch, capsys, data, tmp_path, i3d):
    """Three tokenizers, three clips; then one table and one plot of them."""
    flags = ["--data_root", data, "--video_name", "UCF-101_train", "--num_frames", 10, "--size", 64, "--num_clips", 3,
             "--output_dir", tmp_path, "--motion", 0]
    run_here(monkeypatch, reconstruct, "--tokenizer", ADAPTERS / "identity.py:identity", "codec:h264", "--bpp", 0.5, 1,
             *flags)
    assert i3d.seen == 3 * (1 + 3)
    one, two = (report(tmp_path / name) for name in ("h264_0.5", "h264_1"))
    assert one["record"]["model"] == "codec:h264 0.5" and "libx264" in one["record"]["sampler"]["encoder"]
    assert 0.3 < one["results"]["bits_per_pixel"] <= 0.5 < two["results"]["bits_per_pixel"] <= 1
    for better, metric in ((1, "psnr_frame"), (1, "ssim"), (-1, "mse"), (-1, "rfvd")):
        assert better * two["results"][metric] > better * one["results"][metric], metric
    text = (tmp_path / "rate_distortion.md").read_text()
    assert f"| codec:h264 | {one['results']['bits_per_pixel']:.4f} | {one['results']['psnr_frame']:.2f} |" in text
    assert "| identity.py:identity | 24.0000 | inf | 1.0000 |" in text and text in capsys.readouterr().out
    assert 1000 < (tmp_path / "rate_distortion.png").stat().st_size < 150_000

    # Reports of several commands, under names of their own; and one that was measured differently.
    rate_distortion.main([f"A={tmp_path}/h264_0.5/report.json", f"{tmp_path}/h264_1/report.json", "--output",
                          str(tmp_path / "both")])
    assert re.findall(r"^\| (\S+) \| 0", (tmp_path / "both" / "rate_distortion.md").read_text(), re.M) == [
        "A", "codec:h264"]
    other = ["--tokenizer", "codec:h264", "--bitrates", 51.2, *flags, "--seed", 1, "--output_dir", tmp_path / "other"]
    run_here(monkeypatch, reconstruct, *other)
    assert report(tmp_path / "other")["record"]["model"] == "codec:h264 0.5"  # 51,200 / 25 / 64 / 64
    with pytest.raises(ValueError, match="were not measured alike .*seed differ"):
        rate_distortion.read_points([tmp_path / "h264_1" / "report.json", tmp_path / "other" / "report.json"])


def test_clips_too_short_for_i3d_are_said_before(monkeypatch, capsys, flags):
    monkeypatch.setattr(evaluate, "MIN_FRAMES", 10)
    line = ["--tokenizer", ADAPTERS / "identity.py:identity", *flags, "--num_frames", 8]
    assert "have 8 frames, but rFVD is measured by I3D, which needs 10 or more: leave rFVD out by --no_fvd" in mistake(
        monkeypatch, capsys, reconstruct, *line)


@pytest.mark.parametrize(("source", "error"), [
    ("", "is a folder, expected a report.json: give a file in it"), ("x.json", "no such file; expected a report.json"),
    ("A", "A has two reports of 0.5 bits per pixel: give each a name of its own"),
])
def test_what_is_compared_are_reports(tmp_path, source, error):
    path = tmp_path / "report.json"
    path.write_text('{"results": {"bits_per_pixel": 0.5}, "record": {"model": "m"}}')
    sources = [f"A={path}"] * 2 if source == "A" else [tmp_path / source]
    with pytest.raises((ValueError, OSError), match=error):
        rate_distortion.read_points(sources)


GOOD = "def f(video):\n    return video, 8\nf.num_frames, f.size = 10, 32\n"


@pytest.mark.parametrize(
    ("code", "name", "message"),
    [
        ("return video[:, :, 1:], 8", "f", "returns a video of shape (6, 3, 9, 32, 32); expected that of its input, "
         "(6, 3, 10, 32, 32)"),
        ("return 2 * video - 1, 8", "f", "; expected [0, 1]: scale or clamp it"),
        ("return 255 * video, 8", "f", "returns a video with values from 0 to 255; expected [0, 1]"),
        ("return (255 * video).byte(), 8", "f", "returns a video of torch.uint8; expected floating point in [0, 1]"),
        ("return video.to('meta'), 8", "f", "returns a video on meta; expected the device of its input, cpu"),
        ("return video.log() * 0, 8", "f", "returns a video with values that are not finite"),
        ("return video", "f", "returns a Tensor; expected (video, bits)"),
        ("return video.numpy(), 8", "f", "returns a tuple; expected (video, bits)"),
        ("return video, None", "f", "returns bits of type NoneType; expected one number above 0, or 6, one for each"),
        ("return video, [8, 8]", "f", "returns bits of shape (2,); expected one number above 0, or 6"),
        ("return video, 0", "f", "returns bits 0.0; expected one number above 0"),
        ("raise KeyError('weights')", "f", "fails on clips of shape (6, 3, 10, 32, 32): KeyError: 'weights' "
         "(VT_TRACEBACK=1 shows where)"),
        ("exit(3)", "f", "fails on clips of shape (6, 3, 10, 32, 32): SystemExit: 3"),
        (None, "g", "a.py has no g: --tokenizer takes FILE.py:NAME"),
        ("g = 7", "g", "a.py:g is of type int, expected a function or a class"),
        ("def g(): return 7", "g", "a.py:g made a value of type int, expected a callable video -> (video, bits)"),
        ("def g(video): return video, 8", "g", "is none itself: it declares no num_frames and no size: TypeError: g() "
         "missing 1 required positional argument: 'video'"),
        ("def g(): return lambda video: (video, 8)", "g", "its attribute num_frames is missing; expected a whole"),
        ("g = f\ng.size = '32'", "g", "a.py:g: its attribute size is 32; expected a whole number, or None"),
        ("def g(", "g", "a.py cannot be imported: SyntaxError: "),
        ("import no_such_package", "g", "a.py cannot be imported: ModuleNotFoundError: No module named 'no_such_"),
        ("raise SystemExit('usage')", "g", "a.py cannot be imported: SystemExit: usage"),
    ],
)
def test_wrong_adapters_get_one_line(monkeypatch, capsys, flags, tmp_path, code, name, message):
    inside = name == "f"
    (tmp_path / "a.py").write_text(GOOD.replace("return video, 8", code) if inside else f"{GOOD}{code or ''}\n")
    capsys.readouterr()
    error = mistake(monkeypatch, capsys, reconstruct, "--tokenizer", f"{tmp_path}/a.py:{name}", *flags)
    assert message in error, error
    assert not (tmp_path / "out" / "report.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.py:f"], "nowhere.py: no such file; --tokenizer takes FILE.py:NAME"),
        (["cosmos"], "--tokenizer cosmos is neither FILE.py:NAME nor codec:h264, codec:h265, codec:av1"),
        (["codec:vp9", "--bpp", 1], "--tokenizer codec:vp9 is none of codec:h264, codec:h265, codec:av1"),
        (["codec:h264"], "codec:h264 needs --bpp or --bitrates"),
        ([ADAPTERS / "identity.py:identity", "--bpp", 1], "--bpp and --bitrates are of codecs"),
        ([ADAPTERS / "identity.py:identity", "--tokenizer_args", "a=1"], "takes no --tokenizer_args: leave them out"),
        ([ADAPTERS / "larp.py:Tokenizer", "--tokenizer_args", "a=1"], "TypeError: "),
        ([ADAPTERS / "larp.py:Tokenizer", "--tokenizer_args", "a"], "--tokenizer_args a is not of the form key=value"),
        (["codec:h264", "--bpp", 1, "--tokenizer_args", "a=1"], "--tokenizer_args are for one FILE.py:NAME"),
        (["codec:h264", "codec:h264", "--bpp", 1], "--tokenizer has codec:h264 twice"),
        (["codec:h264", "--bpp", 1, "--size", 33], "takes frames of even height and width, got 33x33: change --size"),
    ],
)
def test_mistakes_on_the_command_line_get_one_line(monkeypatch, capsys, flags, words, message):
    error = mistake(monkeypatch, capsys, reconstruct, *flags, "--tokenizer", *words)
    assert message in error, error


def test_clips_are_those_that_the_tokenizer_takes(monkeypatch, capsys, flags, tmp_path):
    (tmp_path / "a.py").write_text(GOOD.replace("10, 32", "8, 32"))
    error = mistake(monkeypatch, capsys, reconstruct, "--tokenizer", f"{tmp_path}/a.py:f", *flags)
    assert error.startswith("error: --num_frames is 10, but a.py:f ") and "takes 8 alone: leave the flag out" in error


def test_what_a_tokenizer_does_to_its_input_changes_nothing():
    video = torch.rand(2, 3, 2, 8, 8)
    kept = video.clone()
    checked = Checked(lambda video, _: (video.mul_(0.5), torch.tensor([3, 4])), "half")
    output = checked(video, [5, 7])
    assert torch.equal(video, kept) and torch.equal(output, kept / 2)
    assert checked.bits == {5: 3.0, 7: 4.0}


def test_a_rare_overshoot_does_not_end_an_evaluation():
    shift = iter([0.0, 0.5])
    checked = Checked(lambda video, _: (video + next(shift), 1), "shifted")
    checked(torch.ones(1, 3, 1, 8, 8), [0])
    assert checked(torch.ones(1, 3, 1, 8, 8), [1]).max() == 1.5  # the metrics clamp it
    with pytest.raises(TokenizerError, match="values from 1.02 to 1.02"):
        Checked(lambda video, _: (video + 0.02, 1), "shifted")(torch.ones(1, 3, 1, 8, 8), [0])


def test_arguments_are_read_as_yaml():
    words = ["a=1", "b=0.5", "c=x/y.jit", "d=true", "e=", "f=a=b", "g=[1"]
    assert parse_arguments(words) == {"a": 1, "b": 0.5, "c": "x/y.jit", "d": True, "e": None, "f": "a=b", "g": "[1"}


# --- adapters ---

@pytest.mark.parametrize("path", sorted(ADAPTERS.glob("*.py")), ids=lambda path: path.stem)
def test_adapters_are_short(path):
    assert len(path.read_text().splitlines()) <= 20


class Halved(nn.Module):
    """Encoder of [-1, 1]: every second pixel, as indices or as a latent."""

    def __init__(self, discrete: bool):
        super().__init__()
        self.discrete, self.weight = discrete, nn.Parameter(torch.ones(1))

    def forward(self, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert video.min() < 0
        small = video[:, :, :, ::2, ::2] * self.weight
        return (((small + 1) * 127.5).round().long() if self.discrete else small), small


class Doubled(nn.Module):
    def __init__(self, discrete: bool):
        super().__init__()
        self.discrete = discrete

    def forward(self, code: torch.Tensor) -> torch.Tensor:
        code = code / 127.5 - 1 if self.discrete else code
        return 1.1 * code.repeat_interleave(2, -1).repeat_interleave(2, -2)  # overshoots


@pytest.mark.parametrize(("discrete", "bits"), [(True, 8), (False, 16)])
def test_torchscript_pair(tmp_path, discrete, bits):
    for name, module in (("encoder", Halved(discrete)), ("decoder", Doubled(discrete))):
        torch.jit.script(module).save(tmp_path / f"{name}.jit")
    arguments = {name: str(tmp_path / f"{name}.jit") for name in ("encoder", "decoder")}
    arguments |= {"num_frames": 4, "size": 16} | ({"codebook": 256} if discrete else {})
    tokenizer = load_tokenizer(f"{ADAPTERS}/cosmos.py:Tokenizer", arguments)
    video = torch.rand(2, 3, 1, 8, 8).repeat_interleave(2, -1).repeat_interleave(2, -2).expand(-1, -1, 4, -1, -1)
    checked = Checked(lambda video, _: tokenizer(video), "pair")
    output = checked(video, [0, 1])
    assert (output - (1.1 * (2 * video - 1) + 1).div(2).clamp(0, 1)).abs().max() < 0.003
    assert (tokenizer.num_frames, tokenizer.size, checked.bits[0]) == (4, 16, bits * 3 * 4 * 8 * 8)


def test_diffusers_vae(monkeypatch):
    """The interface of diffusers' video VAEs, on a stand-in: diffusers is not a requirement."""

    class VAE(nn.Module):
        dtype = torch.float32

        @classmethod
        def from_pretrained(cls, weights, subfolder):
            assert (weights, subfolder) == ("folder", "vae")
            return cls()

        def encode(self, video):
            latent = video[:, :, :, ::2, ::2]
            return types.SimpleNamespace(latent_dist=types.SimpleNamespace(mode=lambda: latent))

        def decode(self, latent):
            return types.SimpleNamespace(sample=latent.repeat_interleave(2, -1).repeat_interleave(2, -2))

    monkeypatch.setitem(sys.modules, "diffusers", types.SimpleNamespace(AutoencoderKLWan=VAE))
    arguments = {"kind": "AutoencoderKLWan", "weights": "folder", "num_frames": 4, "size": 16, "subfolder": "vae"}
    tokenizer = load_tokenizer(f"{ADAPTERS}/diffusers_vae.py:Tokenizer", arguments)
    video = torch.rand(2, 3, 4, 16, 16)
    output, bits = tokenizer(video)
    assert (output[..., ::2, ::2] - video[..., ::2, ::2]).abs().max() < 1e-3 and bits == 16 * 3 * 4 * 8 * 8


def test_both_of_ours_measure_as_their_scripts_do(monkeypatch, data, coordtok, tmp_path):
    tiny_larp(32, 8, 12).save_pretrained(tmp_path / "larp")
    common = ["--data_root", data, "--video_name", "UCF-101_train", "--protocol", "larp_rfvd", "--batch_size", 3,
              "--motion", 0, "--output_dir"]
    for name, script, own, checkpoint, arguments in (
        ("coordtok", eval_coordtok, ["--plane_bits", 8], coordtok / "checkpoints", ["plane_bits=8"]),
        ("larp", eval_larp_tokenizer, ["--det"], tmp_path / "larp", []),
    ):
        run_here(monkeypatch, script, "--tokenizer", checkpoint, *own, *common, tmp_path / "script")
        run_here(monkeypatch, reconstruct, "--tokenizer", ADAPTERS / f"{name}.py:Tokenizer", "--tokenizer_args",
                 f"checkpoint={checkpoint}", *arguments, *common, tmp_path / "adapter")
        script, adapter = report(tmp_path / "script"), report(tmp_path / "adapter")
        measured = known(adapter["results"])
        assert measured.items() <= known(script["results"]).items() and measured["rfvd"] > 1 and len(measured) > 10
        bits = 8 * 4 * (8 * 8 + 2 * 8 * 8) + 3 * 64 if name == "coordtok" else 12 * 6
        assert script["results"]["bits_per_pixel"] == bits / (8 * 32 * 32)


# --- bits of our own ---

def test_planes_in_fewer_bits():
    torch.manual_seed(0)
    planes = Planes(*(torch.randn(2, 6, 5, 3) * torch.tensor([1.0, 100.0])[:, None, None, None] for _ in range(3)))
    same, bits = stored(planes)
    assert same is planes and bits == 32 * 3 * 90
    half, bits = stored(planes, 16)
    assert torch.equal(half.yt, planes.yt.half().float()) and bits == 16 * 3 * 90
    eight, bits = stored(planes, 8)
    assert bits == 8 * 3 * 90 + 3 * 64
    for before, after in zip(planes, eight):
        for clip in range(2):  # each has a range of its own
            step = (before[clip].max() - before[clip].min()) / 255
            assert (before[clip] - after[clip]).abs().max() <= 0.501 * step and len(after[clip].unique()) <= 256
            assert torch.allclose(after[clip].aminmax().max, before[clip].max())
    constant, _ = stored(Planes(*[torch.full((1, 2, 2, 1), 3.0)] * 3), 8)
    assert torch.equal(constant.xy, torch.full((1, 2, 2, 1), 3.0))
    with pytest.raises(ValueError, match="8, 16 or 32 bits, got 4"):
        stored(planes, 4)


def test_the_published_larp_has_0_05_bits_a_pixel():
    config = LARPTokenizerConfig()
    assert config.bits == 1024 * 13
    assert config.bits / (16 * 128 * 128) == pytest.approx(0.0508, abs=1e-4)


# --- the page ---

def test_the_worked_example(monkeypatch, data, tmp_path):
    """The file and the command of docs/any_tokenizer.md, on tiny clips."""
    text = DOC.read_text()
    name, code = re.search(r"```python\n# (\w+\.py)\n(.*?)```", text, re.S).groups()
    (tmp_path / name).write_text(code)
    (command,) = re.findall(rf"python -m eval\.reconstruct (--tokenizer {name}.*)", text)
    words = command.replace("[DATA_ROOT]", str(data)).replace(f"{name}:", f"{tmp_path}/{name}:").split()
    run_here(monkeypatch, reconstruct, *words, "--num_frames", 10, "--size", 32, "--motion", 0, "--output_dir",
             tmp_path)
    results = report(tmp_path)["results"]
    assert 10 < results["psnr_clip"] < 40 and results["bits_per_pixel"] == pytest.approx(24 / 16)
    assert len(text.splitlines()) < 150
    for path in re.findall(r"scripts/adapters/\w+\.py", text):
        assert (ROOT / path).is_file()
    for path in ADAPTERS.glob("*.py"):
        assert f"scripts/adapters/{path.name}" in text
