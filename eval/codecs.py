"""H.264, H.265 and AV1 as tokenizers, by the ffmpeg that imageio-ffmpeg bundles: what a clip looks like at a number of
bits that a video codec needs for it."""
import math
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import imageio_ffmpeg
import numpy as np
import torch
from torch import Tensor

from data.video import run_ffmpeg, to_bytes
from eval.tokenizers import TokenizerError

FPS = 25  # of --bitrates; a clip's frames carry no rate


class Encoder(NamedTuple):
    library: str
    options: tuple[str, ...]
    quality: tuple[int, int]  # range of -crf, best and worst
    halving: float  # steps of -crf that halve the stream, more or less
    stream: str  # ffmpeg's name of the elementary stream


# Each with its defaults, on one thread. The elementary stream is what a decoder needs and no more: x264's and x265's
# messages about themselves, as large as a whole clip at these rates, are left out.
CODECS = {
    "h264": Encoder("libx264", ("-preset", "slow", "-bsf:v", "filter_units=remove_types=6"), (0, 51), 9, "h264"),
    "h265": Encoder("libx265", ("-preset", "medium", "-x265-params", "log-level=error:info=0:pools=none:"
                                "frame-threads=1"), (0, 51), 8, "hevc"),
    "av1": Encoder("libsvtav1", ("-preset", "6", "-svtav1-params", "lp=1"), (1, 63), 14, "obu"),  # 0: its default
}
SCALE = ("-sws_flags", "bicubic+accurate_rnd+full_chroma_int+full_chroma_inp")


class Codec:
    """A codec at a rate: video (B, 3, T, H, W) float [0, 1] -> (video, bits (B,)), H and W even.

    Every clip is one group of pictures, from 8-bit RGB to yuv420p and back. It gets the best quality (-crf) whose
    elementary stream is within bits_per_pixel; where even the worst is larger, that one. `bits` is what the stream has.
    """

    num_frames = size = None

    def __init__(self, name: str, bits_per_pixel: float):
        if name not in CODECS:
            raise TokenizerError(f"--tokenizer codec:{name} is none of codec:{', codec:'.join(CODECS)}")
        self.name, self.encoder, self.bits_per_pixel = name, CODECS[name], bits_per_pixel
        listed = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-encoders"], capture_output=True,
                                text=True, stdin=subprocess.DEVNULL).stdout
        if not re.search(rf"\b{self.encoder.library}\b", listed):
            raise TokenizerError(f"the ffmpeg of imageio-ffmpeg {imageio_ffmpeg.__version__} has no "
                                 f"{self.encoder.library}, which codec:{name} needs: install another version of it")

    @property
    def settings(self) -> dict:
        """For the record."""
        encoder = self.encoder
        return {"bits_per_pixel": self.bits_per_pixel, "encoder": encoder.library, "options": " ".join(encoder.options),
                "rate": "largest quality (-crf) of each clip whose elementary stream is within the bits",
                "ffmpeg": imageio_ffmpeg.get_ffmpeg_version()}

    def __call__(self, video: Tensor) -> tuple[Tensor, Tensor]:
        height, width = video.shape[-2:]
        if height % 2 or width % 2:
            raise TokenizerError(f"codec:{self.name} takes frames of even height and width, got {height}x{width}: "
                                 "change --size")
        clips = to_bytes(video).permute(0, 2, 3, 4, 1).contiguous().cpu().numpy()  # (B, T, H, W, 3)
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # ffmpeg runs outside the interpreter
            streams = list(pool.map(self.encode, clips))
            decoded = np.stack(list(pool.map(lambda stream: self.decode(stream, clips.shape[1:]), streams)))
        output = torch.from_numpy(decoded).to(video.device).permute(0, 4, 1, 2, 3).float() / 255
        return output, torch.tensor([8 * len(stream) for stream in streams], dtype=torch.float64)

    def encode(self, frames: np.ndarray) -> bytes:
        """The elementary stream of frames (T, H, W, 3) uint8, within the codec's rate."""
        limit = max(math.floor(self.bits_per_pixel * frames[..., 0].size / 8), 1)  # bytes
        best, worst = self.encoder.quality
        quality, chosen = (best + worst) // 2, None
        while best <= worst:
            stream = self.encode_at(frames, quality)
            if len(stream) <= limit:
                chosen, worst = stream, quality - 1
            else:
                best = quality + 1
            quality += round(self.encoder.halving * math.log2(len(stream) / limit))  # a guess that saves encodings
            quality = min(max(quality, best), worst)
        return chosen or stream  # that of the worst quality was the last

    def encode_at(self, frames: np.ndarray, quality: int) -> bytes:
        num_frames, height, width, _ = frames.shape
        return run_ffmpeg(
            ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", FPS, "-i", "-", *SCALE,
             "-pix_fmt", "yuv420p", "-c:v", self.encoder.library, "-threads", 1, "-g", max(num_frames, 2),
             "-crf", quality, *self.encoder.options, "-f", self.encoder.stream, "-"], frames.tobytes(),
        )

    def decode(self, stream: bytes, shape: tuple[int, ...]) -> np.ndarray:
        """Frames of `shape` (T, H, W, 3), uint8, from an elementary stream."""
        pixels = run_ffmpeg(["-threads", 1, "-f", self.encoder.stream, "-i", "-", "-fps_mode", "passthrough", *SCALE,
                             "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], stream)
        if len(pixels) != math.prod(shape):
            raise OSError(f"codec:{self.name}: ffmpeg decodes {len(pixels) / math.prod(shape[1:]):g} of the {shape[0]} "
                          "frames that it encoded")
        return np.frombuffer(pixels, np.uint8).reshape(shape)
