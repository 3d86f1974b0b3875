"""Video codecs beside tokenizers: eval/codecs.py, and the table and plot of eval/rate_distortion.py."""
import re

import pytest
import torch

from eval import codecs
from eval.codecs import CODECS, Codec
from eval.metrics import psnr_clip
from eval.tokenizers import TokenizerError


@pytest.fixture(scope="module")
def video() -> torch.Tensor:
    """Two clips (2, 3, 8, 64, 64) of smooth pictures that move; the second has more detail."""
    torch.manual_seed(0)
    small = torch.rand(2, 3, 6, 6)
    small = torch.stack([small[0], small[1].roll(1, 0)])
    wide = torch.nn.functional.interpolate(small, (96, 96), mode="bicubic").clamp(0, 1)
    wide[1] = (wide[1] + 0.1 * torch.rand(3, 96, 96)).clamp(0, 1)
    return torch.stack([wide[:, :, t : t + 64, 2 * t : 2 * t + 64] for t in range(8)], dim=2)


@pytest.mark.parametrize("name", CODECS)
def test_a_stream_is_as_good_as_its_bits_allow(name, video):
    found = []
    for rate in (0.15, 0.6):
        codec = Codec(name, rate)
        output, bits = codec(video)
        pixels = 8 * 64 * 64
        assert output.shape == video.shape and output.dtype == torch.float32 and bits.shape == (2,)
        assert (bits <= rate * pixels).all()
        assert torch.equal(output * 255, (output * 255).round()), "8-bit pixels"
        frames = (video[1].permute(1, 2, 3, 0) * 255).round().byte().numpy()
        stream = codec.encode(frames)
        assert 8 * len(stream) == bits[1], "the bits are those of the stream"
        at = {quality: codec.encode_at(frames, quality) for quality in range(codec.encoder.quality[1] + 1)} \
            if name == "h264" and rate == 0.6 else {}
        fits = [quality for quality, candidate in at.items() if 8 * len(candidate) <= rate * pixels]
        assert not fits or stream == at[min(fits)], "the best quality that is within the rate"
        found.append(psnr_clip(video, output))
    assert (found[0] > 15).all() and (found[1] > found[0] + 1).all()


def test_what_is_too_large_gets_the_worst_quality(video):
    codec = Codec("h264", 1e-6)
    _, bits = codec(video[:1])
    frames = (video[0].permute(1, 2, 3, 0) * 255).round().byte().numpy()
    assert bits.item() == 8 * len(codec.encode_at(frames, 51)) > 0


def test_a_stream_holds_no_messages_and_no_container(video):
    """Parameter sets and slices alone: x264's text about itself is larger than a clip may be."""
    frames = (video[0].permute(1, 2, 3, 0) * 255).round().byte().numpy()
    stream = Codec("h264", 1.0).encode_at(frames, 30)
    units = [unit[0] & 31 for unit in re.split(rb"\x00\x00\x00?\x01", stream) if unit]
    assert set(units) <= {1, 5, 7, 8} and units.count(7) == units.count(5) == 1 and len(units) == 2 + 8
    stream = Codec("h265", 1.0).encode_at(frames, 30)
    units = [unit[0] >> 1 & 63 for unit in re.split(rb"\x00\x00\x00?\x01", stream) if unit]
    assert {32, 33, 34} <= set(units) <= {*range(22), 32, 33, 34}
    for name, words in (("h264", b"x264"), ("h265", b"x265"), ("av1", b"SVT")):
        assert words not in Codec(name, 1.0).encode_at(frames, 30)


def test_lost_frames_and_missing_encoders_are_errors(monkeypatch, video):
    codec = Codec("h264", 1.0)
    frames = (video[0].permute(1, 2, 3, 0) * 255).round().byte().numpy()
    stream = codec.encode_at(frames[:5], 30)
    with pytest.raises(OSError, match="codec:h264: ffmpeg decodes 5 of the 8 frames that it encoded"):
        codec.decode(stream, frames.shape)
    with pytest.raises(OSError, match="."):
        codec.encode_at(frames[:, :0], 30)
    monkeypatch.setitem(CODECS, "h264", CODECS["h264"]._replace(library="libx999"))
    with pytest.raises(TokenizerError, match="has no libx999, which codec:h264 needs"):
        codecs.Codec("h264", 1.0)
