"""Named evaluation protocols: the published ways of measuring.

A Fréchet video distance means nothing without the split, stride, resize, number of clips and extractor behind it. So
every number is printed and saved with a record of how it was made: the protocol, and the facts of the run that
`eval.report` adds.
"""
from dataclasses import dataclass
from typing import Any

NOT_OURS = "published, not reproduced here"


@dataclass(frozen=True)
class Protocol:
    """How a number is measured: everything that is fixed before a run."""

    name: str
    description: str
    metrics: tuple[str, ...]
    dataset: str | None  # None, here and below: the run decides
    split: str | None
    num_frames: int
    stride: int  # of the frames of a clip in its video
    clip_start: str  # which clips: how files and first frames are chosen
    short_videos: str  # what happens to videos shorter than a clip
    size: int  # height and width of the clips compared
    resize: str  # from a file's frames to `size`
    num_real: int | None
    num_generated: int | None
    whole_clip: bool = True  # one pass of the extractor for a clip; False: the clip is cut into chunks
    input_range: str = "[0, 1], clamped"
    pixels: str = "tensors"  # or "files": both sides were stored as 8-bit videos
    extractor: str = "I3D Kinetics-400, 400 logits averaged over time, float32"
    i3d_eps: float = 1e-3  # see eval.i3d.I3D
    i3d_resize: str = "square"
    divisor: str = "N-1"  # of the covariance
    num_cond_frames: int = 0  # frames of each clip given to the generator
    lpips: str = "none"  # LPIPS backbone
    stlpips: str = "none"  # ST-LPIPS network and weights
    anchors: tuple[str, ...] = ()  # published values, as text

    def __post_init__(self):
        if self.divisor not in ("N", "N-1"):
            raise ValueError(f"the covariance divisor is N or N-1, got {self.divisor!r}")
        if self.i3d_resize not in ("square", "short_side"):
            raise ValueError(f"--i3d_resize is square or short_side, got {self.i3d_resize!r}")


LARP_RESIZE = "shorter side to size, bilinear with antialias on float, centre crop"

COORDTOK_RESIZE = "shorter side to size, bicubic with antialias on 8-bit images, centre crop"

_LARP_16: dict[str, Any] = {
    "num_frames": 16,
    "stride": 1,
    "short_videos": "the last frame is repeated",
    "size": 128,
    "resize": LARP_RESIZE,
    "divisor": "N",
}

_STYLEGANV: dict[str, Any] = {
    "description": "2,048 real against 2,048 generated clips (StyleGAN-V, arXiv 2112.14683)",
    "metrics": ("fvd",),
    "dataset": "UCF-101",
    "split": "train",
    "stride": 1,
    "clip_start": "videos drawn without replacement, first frame uniform over the video, both from the seed",
    "short_videos": "discarded",
    "size": 128,
    "resize": COORDTOK_RESIZE,
    "num_real": 2048,
    "num_generated": 2048,
}

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="larp_rfvd",
            description="reconstruction against input, one clip per training video (LARP, arXiv 2410.21264)",
            metrics=("fvd", "mse", "psnr_clip", "lpips"),
            dataset="UCF-101",
            split="train",
            clip_start="one clip per video of the sorted list, first frame uniform over the video, from the seed",
            num_real=9537,
            num_generated=9537,
            lpips="vgg",
            anchors=(f"LARP-L-Long: rFVD 19.53, PSNR 28.70, LPIPS 0.0755 ({NOT_OURS})",),
            **_LARP_16,
        ),
        Protocol(
            name="larp_gfvd10k",
            description="10,000 class-conditional samples against as many real segments (LARP, arXiv 2410.21264)",
            metrics=("fvd",),
            dataset="UCF-101",
            split="train",
            clip_start="non-overlapping segments of all videos with paths sorted, n in number; of these "
            "random.Random(split_seed).sample(range(n), 10000); the generator gets the same segments' labels",
            num_real=10000,
            num_generated=10000,
            anchors=(
                f"LARP-L-Long: FVD 57 ({NOT_OURS})",
                f"EVATok: FVD 48 ({NOT_OURS})",
                f"W.A.L.T-L: FVD 46 ({NOT_OURS})",
            ),
            **_LARP_16,
        ),
        Protocol(
            name="larp_k600fp50k",
            description="frame prediction, 5 frames given and all 16 generated (LARP, arXiv 2410.21264); "
            "both sides resized from 128x128 to 64x64, bilinear with antialias",
            metrics=("fvd",),
            dataset="Kinetics-600",
            split="val",
            clip_start="non-overlapping segments of all videos with paths sorted, n in number; of these "
            "random.Random(split_seed).sample(range(n), 50000)",
            num_real=50000,
            num_generated=50000,
            num_cond_frames=5,
            anchors=(
                f"LARP-L-Long: FVD 5.1 ({NOT_OURS})",
                f"EVATok: FVD 4.0 ({NOT_OURS})",
                f"W.A.L.T-L: FVD 3.3 ({NOT_OURS})",
            ),
            **_LARP_16 | {"size": 64},
        ),
        Protocol(
            name="coordtok_rfvd10k_128f",
            description="reconstruction against input, 10,000 clips of 128 frames (CoordTok, arXiv 2411.14762); the "
            "paper's script is not released, so the choice of clips is this project's",
            metrics=("fvd", "psnr_frame", "ssim", "lpips"),
            dataset="UCF-101",
            split="train",
            num_frames=128,
            stride=1,
            clip_start="clip i, for i from 0, is of video i mod n of the sorted list of the n videos that are long "
            "enough; first frame uniform over the video, from the seed and i",
            short_videos="discarded",
            size=128,
            resize=COORDTOK_RESIZE,
            num_real=10000,
            num_generated=10000,
            i3d_resize="short_side",
            lpips="vgg",
            anchors=(
                f"CoordTok: rFVD 102.9, PSNR 28.6, SSIM 0.892, LPIPS 0.066 ({NOT_OURS})",
                f"OmniTok-CV, 8192 tokens: rFVD 49.5 ({NOT_OURS})",
            ),
        ),
        Protocol(name="styleganv_fvd2048_16f", num_frames=16, **_STYLEGANV),
        Protocol(
            name="styleganv_fvd2048_128f",
            num_frames=128,
            anchors=(f"CoordTok-SiT-L/2: FVD 369.3 ({NOT_OURS})",),
            **_STYLEGANV,
        ),
    )
}
