"""A video file through a tokenizer: any length, size and frame rate, from file to file in constant memory.

    python scripts/tokenize_video.py encode VIDEO.mp4 --tokenizer X --out TOKENS.safetensors
    python scripts/tokenize_video.py decode TOKENS.safetensors --out VIDEO.mp4
    python scripts/tokenize_video.py decode TOKENS.safetensors --out FOLDER --frames 0 500 1000
    python scripts/tokenize_video.py compare VIDEO.mp4 --tokenizer X --out COMPARED.mp4

X is a CoordTok or a LARP tokenizer: hub id, exported folder, run's folder, folder of checkpoints, checkpoint, or an
authors' file. Clips of the trained length are encoded one after the other, each OVERLAP frames into the one before, and
fade into one another; audio is kept. `compare` writes input and reconstruction side by side, and a csv of each frame.
"""
import csv
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from any folder
from common.cli import Parser, check_carried, one_line_errors
from models.configs import CoordTokConfig
from training.flags import add_flags, config_flags


def parse_args():
    parser = Parser(__doc__)
    parser.add_argument("action", choices=["encode", "decode", "compare"])
    parser.add_argument("input", type=Path, help="Video file, or file of tokens")
    parser.add_argument("--out", type=Path, help="File to write, an mp4 of decode and compare; of chosen "
                        "frames a folder (default: beside the input, which is never overwritten)")
    parser.add_argument("--tokenizer", help="The tokenizer (decode's default: the one that encoded)")
    parser.add_argument("--version", default="sd", metavar="sd|ema_DECAY", help="Which weights of a LARP checkpoint")
    parser.add_argument("--fit", choices=["crop", "resize", "tile"],
                        help="How frames come to the tokenizer's size: the central square, the whole frame squeezed, "
                        "or tiles at full resolution (default: resize; decode takes it and --overlap from the file)")
    parser.add_argument("--overlap", type=int, help="Frames, and pixels of tiles, that fade into the next (default: an "
                        "eighth of a clip, and of a tile)")
    parser.add_argument("--frames", type=int, nargs="+", help="Decode these alone, to PNG files; CoordTok decodes only "
                        "their patches")
    parser.add_argument("--batch_size", type=int, default=8, help="Tiles at once")
    parser.add_argument("--half", action="store_true", help="Keep CoordTok's planes as float16, half the size")
    parser.add_argument("--crf", type=int, default=5, help="Quality of the mp4 written: 0 is lossless, 51 the worst")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="Where to compute")
    parser.add_argument("--precision", choices=["bf16", "fp16", "fp32"], default="fp32",
                        help="Autocast of the tokenizer")
    add_flags(parser, CoordTokConfig, everyday=False)
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # before the slow imports: --help and a mistake in a flag are answered at once

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from common import distributed
from common.console import Progress, print_main
from common.files import atomic_write
from data.stream import (
    StreamWriter,
    blend,
    extract_audio,
    fade,
    join_tiles,
    look,
    read_stream,
    starts,
    windows,
)
from data.tokens import TokenReader, TokenWriter
from data.video import resize_crop, resize_frames, to_bytes
from eval.metrics import psnr_frame, ssim_frame
from models.coordtok import CoordTok
from models.larp_tokenizer import LARPTokenizer
from models.pretrained import weights_sha256
from training.checkpoint import kind_of
from training.load import load_coordtok, load_larp_tokenizer
from training.optim import Precision

PLANES = ("xy", "yt", "xt")


class Codec:
    """A tokenizer with how frames of a video of `height` x `width` come to its size and back."""

    def __init__(self, tokenizer: CoordTok | LARPTokenizer, height: int, width: int, fit: str, overlap: int | None,
                 device: torch.device, precision: Precision, batch_size: int = 8, tile_overlap: int | None = None):
        self.tokenizer, self.fit, self.device = tokenizer, fit, device
        self.precision, self.batch_size = precision, batch_size
        self.is_coordtok = isinstance(tokenizer, CoordTok)
        config = tokenizer.config
        self.window, self.side = config.video_shape[:2] if self.is_coordtok else (config.frame_num, config.input_size)
        self.overlap = self.window // 8 if overlap is None else overlap
        if tile_overlap is None:
            tile_overlap = self.side // 8 if overlap is None else min(overlap, self.side // 2)
        self.tile_overlap = tile_overlap
        if not 0 <= self.overlap <= self.window // 2:
            raise ValueError(f"--overlap is {self.overlap}, expected at most half of a clip's {self.window} frames")
        self.size = (height, width)
        self.padded = tuple(max(size, self.side) for size in self.size)  # tiles need whole ones
        self.tops, self.lefts = ([0], [0]) if fit != "tile" else (
            starts(size, self.side, self.tile_overlap) for size in self.padded)

    @property
    def out_size(self) -> tuple[int, int]:
        return (self.side, self.side) if self.fit == "crop" else self.size

    @property
    def bits(self) -> float:
        """Of one code, or of one value of a plane."""
        if self.is_coordtok:
            return 32
        return (self.tokenizer.config.bottleneck.args.regularizer.args.codebook_size - 1).bit_length()

    def to_video(self, frames: Tensor) -> Tensor:
        """(T, H, W, 3) uint8 -> (tiles, 3, T, side, side) float in [0, 1], on the device."""
        frames = frames.to(self.device)
        rule = "coordtok" if self.is_coordtok else "larp"
        if self.fit == "tile":
            bottom, right = (padded - size for padded, size in zip(self.padded, self.size))
            video = rearrange(frames, "t h w c -> c t h w").float() / 255
            video = F.pad(video, (0, right, 0, bottom), mode="replicate")
            return torch.stack([video[..., top : top + self.side, left : left + self.side]
                                for top in self.tops for left in self.lefts])
        if frames.shape[1:3] != (self.side, self.side) or rule == "larp":
            square = (self.side, self.side)
            frames = resize_crop(frames, self.side, rule) if self.fit == "crop" else resize_frames(frames, square, rule)
        video = rearrange(frames, "t h w c -> 1 c t h w").contiguous()
        return video.float().div_(255) if video.dtype == torch.uint8 else video

    @torch.inference_mode()
    def encode(self, frames: Tensor) -> dict[str, Tensor]:
        """(T, H, W, 3) uint8, T up to `window` -> {"codes": (tiles, N)}, or {"xy": (tiles, R, R, C), ...}."""
        found = []
        for video in self.to_video(frames).split(self.batch_size):
            with self.precision.autocast():
                if self.is_coordtok:
                    found.append(dict(zip(PLANES, (plane.float() for plane in self.tokenizer.encode(video)))))
                else:
                    video = F.pad(video, (0, 0, 0, 0, 0, self.window - video.shape[2]), mode="replicate")
                    found.append({"codes": self.tokenizer.encode(video)})
        return {name: torch.cat([each[name] for each in found]) for name in found[0]}

    @torch.inference_mode()
    def decode(self, tokens: dict[str, Tensor], num_frames: int, chosen: list[int] | None = None) -> Tensor:
        """What `encode` gave for a clip of `num_frames` -> (3, T, H, W) float, of the video's size; chosen: of these
        frames alone."""
        tokens, clips = {name: values.to(self.device) for name, values in tokens.items()}, []
        for first in range(0, len(next(iter(tokens.values()))), self.batch_size):
            part = {name: values[first : first + self.batch_size] for name, values in tokens.items()}
            with self.precision.autocast():
                if self.is_coordtok:
                    whole = chosen is None and num_frames == self.window
                    frames = None if whole else list(range(num_frames)) if chosen is None else chosen
                    clip = self.tokenizer.render([part[name].float() for name in PLANES], frames)
                else:
                    clip = self.tokenizer.decode(part["codes"].long())[:, :, :num_frames]
                    clip = clip if chosen is None else clip[:, :, chosen]
            clips.append(clip.float())
        clip = torch.cat(clips)
        if self.fit == "tile":
            height, width = self.size
            return join_tiles(clip, self.tops, self.lefts, self.tile_overlap)[..., :height, :width]
        if self.fit == "resize" and self.size != (self.side, self.side):
            frames = F.interpolate(clip[0].transpose(0, 1), self.size, mode="bicubic", antialias=True)
            return frames.transpose(0, 1)
        return clip[0]


def load_tokenizer(args) -> CoordTok | LARPTokenizer:
    kind = kind_of(args.tokenizer)
    if kind == "coordtok":
        return load_coordtok(args.tokenizer, args)
    if kind != "larp_tokenizer":
        raise ValueError(f"{args.tokenizer} holds a {kind} model, expected a tokenizer (coordtok or larp_tokenizer)")
    return load_larp_tokenizer(args.tokenizer, args.version)


def peek(frames: Iterator[Tensor]) -> tuple[Tensor, Iterator[Tensor]]:
    """The first frame, and all of them with a progress bar's count."""
    first = next(frames)

    def all_frames() -> Iterator[Tensor]:
        yield first
        yield from frames

    return first, all_frames()


def to_frames(piece: Tensor) -> Tensor:
    """(3, T, H, W) float -> (T, H, W, 3) uint8 on the CPU."""
    return rearrange(to_bytes(piece), "c t h w -> t h w c").cpu()


def check_out(args) -> None:
    """Give --out its default, and look at it before the work. Raises ValueError, and OSError for a folder that cannot
    be written to."""
    name, frames = args.input.stem, args.action == "decode" and args.frames
    args.out = args.out or args.input.with_name(
        name if frames else f"{name}.safetensors" if args.action == "encode" else f"{name}_{args.action}d.mp4")
    out, table = args.out, args.out.with_suffix(".csv")
    if frames:
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out {out} is a file, expected a folder for the frames: give another name")
    elif out.is_dir():
        raise ValueError(f"--out {out} is a folder, expected a file: give a name in it")
    elif args.action != "encode" and out.suffix.lower() != ".mp4":
        raise ValueError(f"--out {out} is to be an mp4 file: give a name that ends in .mp4")
    for file in [out, table] if args.action == "compare" else [out]:
        if file.exists() and args.input.exists() and file.samefile(args.input):
            raise ValueError(f"{file} is the input, and would be overwritten: give --out another name")
    folder = out if frames else out.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"--out {out}: the folder {folder} cannot be written to ({error.strerror}): give another") \
            from error


def open_video(args, device: torch.device) -> tuple:
    """(info, frames, codec) of a video and the tokenizer."""
    if args.tokenizer is None:
        raise ValueError(f"{args.action} needs --tokenizer")
    tokenizer = load_tokenizer(args).to(device)
    args.fit = args.fit or "resize"
    info = look(args.input)
    first, frames = peek(read_stream(args.input, info))
    total = round(info.seconds * info.fps) or None
    codec = Codec(tokenizer, *first.shape[:2], args.fit, args.overlap, device, Precision(args.precision, device),
                  args.batch_size)
    return info, Progress(frames, args.action, total, unit="frame"), codec


def encode(args, device: torch.device) -> None:
    info, frames, codec = open_video(args, device)
    count = 0
    with TokenWriter() as writer, tempfile.NamedTemporaryFile(suffix=".mka") as audio:
        for start, clip in windows(frames, codec.window, codec.overlap):
            tokens = codec.encode(clip)
            for name, rows in tokens.items():
                kept = torch.float16 if args.half else torch.float32
                writer.append(name, rows.to(kept if codec.is_coordtok else torch.int32)[None])
            values = sum(rows.numel() for rows in tokens.values())
            count = start + len(clip)
        if extract_audio(args.input, info, audio.name):
            writer.append_file("audio", audio.name)
        source = Path(args.tokenizer)
        writer.finish(args.out, {
            "tokenizer": str(source.absolute() if source.exists() else args.tokenizer), "version": args.version,
            "tokenizer_sha256": weights_sha256(codec.tokenizer), "num_frames": count, "fps": str(info.fps),
            "size": codec.size, "fit": args.fit, "window": codec.window, "overlap": codec.overlap,
            "tile_overlap": codec.tile_overlap, "precision": args.precision,
            "audio_offset": info.offset, "sar": info.sar,
            "architecture": {name: getattr(args, name) for name, _ in config_flags(CoordTokConfig)
                             if hasattr(args, name)},
        })
    values *= len(starts(count, codec.window, codec.overlap))
    bits = codec.bits / (2 if args.half and codec.is_coordtok else 1)
    print_main(f"{args.out}: {count} frames of {codec.size[1]}x{codec.size[0]}, "
               f"{values * bits / (count * codec.size[0] * codec.size[1]):.5f} bits a pixel")


def open_tokens(args, device: torch.device) -> tuple[TokenReader, Codec]:
    reader = TokenReader(args.input)
    about = reader.metadata
    for name in ("fit", "overlap"):
        if (given := getattr(args, name)) is not None:
            check_carried(name, given, about[name], str(args.input))
    if args.tokenizer is None:
        args.tokenizer, args.version = about["tokenizer"], about["version"]
    for name, value in about["architecture"].items():
        if not hasattr(args, name):
            setattr(args, name, value)
    tokenizer = load_tokenizer(args).to(device)
    sha256 = weights_sha256(tokenizer)
    if sha256 != about["tokenizer_sha256"]:
        raise ValueError(f"{args.input} was encoded by a tokenizer of SHA-256 {about['tokenizer_sha256'][:12]}, and "
                         f"{args.tokenizer} has {sha256[:12]}: give --tokenizer, the one that encoded it")
    codec = Codec(tokenizer, *about["size"], about["fit"], about["overlap"], device, Precision(args.precision, device),
                  args.batch_size, about["tile_overlap"])
    return reader, codec


def tokens_of(reader: TokenReader, window: int) -> dict[str, Tensor]:
    return {name: reader.rows(name, window, 1)[0] for name in reader.header if name != "audio"}


def decoded(reader: TokenReader, codec: Codec) -> Iterator[tuple[int, Tensor]]:
    """(start, clip (3, T, H, W)) of every window."""
    count = reader.metadata["num_frames"]
    for i, start in enumerate(starts(count, codec.window, codec.overlap)):
        yield start, codec.decode(tokens_of(reader, i), min(codec.window, count))


def decode(args, device: torch.device) -> None:
    reader, codec = open_tokens(args, device)
    about = reader.metadata
    fps, count = Fraction(about["fps"]), about["num_frames"]
    if args.frames:
        decode_chosen(args, reader, codec)
        return
    with tempfile.NamedTemporaryFile(suffix=".mka") as audio, Progress(desc="decode", total=count, unit="frame") as bar:
        sound = audio.name if reader.copy_file("audio", audio.name) else None
        with StreamWriter(args.out, codec.out_size, fps, args.crf, sound, about.get("audio_offset", 0.0),
                          about.get("sar", "1/1")) as writer:
            for piece in blend(decoded(reader, codec), codec.overlap):
                writer.write(to_frames(piece))
                bar.update(piece.shape[1])
    print_main(f"{args.out}: {count} frames of {codec.out_size[1]}x{codec.out_size[0]}, {float(count / fps):.2f} s"
               + ", with audio" * bool(sound))


def decode_chosen(args, reader: TokenReader, codec: Codec) -> None:
    """Write the frames asked for as PNG files."""
    count = reader.metadata["num_frames"]
    if wrong := [frame for frame in args.frames if frame >= count]:
        raise ValueError(f"--frames {wrong[0]} is not in {args.input}, which has frames 0 to {count - 1}")
    for frame in args.frames:
        picture = to_frames(chosen_frame(reader, codec, frame)[:, None])[0]
        with atomic_write(args.out / f"frame_{frame:07d}.png") as file:
            Image.fromarray(picture.numpy()).save(file, format="PNG")
    print_main(f"{args.out}: {len(args.frames)} frames")


def chosen_frame(reader: TokenReader, codec: Codec, frame: int) -> Tensor:
    """(3, H, W) float: one frame, from the one or two windows that it is of."""
    count = reader.metadata["num_frames"]
    places, length = starts(count, codec.window, codec.overlap), min(codec.window, reader.metadata["num_frames"])
    # A window shows its frames up to the end of the one before, where it has faded in, and on to its own end.
    window = next(i for i, start in enumerate(places) if frame < start + length)
    own = codec.decode(tokens_of(reader, window), length, [frame - places[window]])[:, 0]
    if window + 1 == len(places):
        return own
    end = places[window] + length
    common = min(codec.overlap, end - places[window + 1])
    place = frame - (end - common)
    if place < 0:
        return own
    after = codec.decode(tokens_of(reader, window + 1), length, [frame - places[window + 1]])[:, 0]
    return own + fade(common)[place].to(own) * (after - own)


def compare(args, device: torch.device) -> None:
    info, frames, codec = open_video(args, device)
    out = args.out
    height, width = codec.out_size
    kept, values, count, rows = deque(), 0, 0, []

    def clips() -> Iterator[tuple[int, Tensor]]:
        nonlocal values, count
        for start, clip in windows(frames, codec.window, codec.overlap):
            tokens = codec.encode(clip)
            kept.extend(clip[count - start :])
            count = start + len(clip)
            values += sum(value.numel() for value in tokens.values())
            yield start, codec.decode(tokens, len(clip))

    with tempfile.NamedTemporaryFile(suffix=".mka") as audio:
        sound = audio.name if extract_audio(args.input, info, audio.name) else None
        with StreamWriter(out, (height, 2 * width), info.fps, args.crf, sound, info.offset, info.sar) as writer:
            for piece in blend(clips(), codec.overlap):
                for frame in piece.unbind(1):
                    shown = kept.popleft()
                    given = codec.to_video(shown[None])[0, :, 0] if args.fit == "crop" else shown.permute(2, 0, 1) / 255
                    pair = [x.float().cpu()[None, :, None] for x in (frame, given)]
                    row = {"frame": len(rows), "psnr": float(psnr_frame(*pair))}
                    if min(height, width) >= 7:
                        row["ssim"] = float(ssim_frame(*pair))
                    rows.append(row)
                    writer.write(to_frames(torch.cat([pair[1][0], pair[0][0]], dim=-1)))
    with atomic_write(out.with_suffix(".csv"), "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    means = ", ".join(f"{name} {sum(row[name] for row in rows) / count:.4g}" for name in list(rows[0])[1:])
    bits = values * codec.bits / (count * codec.size[0] * codec.size[1])
    print_main(f"{out}: {count} frames, {means}, {bits:.5f} bits a pixel; each frame: {out.with_suffix('.csv')}")


def main():
    args = parse_args()
    check_out(args)
    device = distributed.setup(args.device)
    {"encode": encode, "decode": decode, "compare": compare}[args.action](args, device)


if __name__ == "__main__":
    with one_line_errors():
        main()
