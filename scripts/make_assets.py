"""The pictures of README.md and docs/, made from a run of the quickstart.

    python scripts/make_assets.py results/quickstart

writes assets/reconstructions.gif and .png (test clips: input, CoordTok, LARP), assets/samples.gif (both generators,
given frames outlined), and the diagrams of both systems as SVG, which need no run: --diagrams draws these alone.
"""
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # runs as a script from any folder
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from einops import rearrange  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402
from torch import Tensor  # noqa: E402

from common.cli import one_line_errors  # noqa: E402
from common.errors import ArgumentParser  # noqa: E402
from common.files import atomic_write  # noqa: E402
from data.lists import list_folder  # noqa: E402
from data.video import probe, read_frames, to_bytes, to_video  # noqa: E402
from eval.pictures import contact_sheet, outline  # noqa: E402
from eval.report import read_record  # noqa: E402
from models.coordtok import CoordTok  # noqa: E402
from models.larp_tokenizer import LARPTokenizer  # noqa: E402

SHOWN = 128  # pixels: height and width of a clip in a picture
BAR = 18  # pixels: height of a line of text
FRAMES_PER_SECOND = 10


# --- clips ---
def enlarged(video: Tensor) -> Tensor:
    """(3, T, H, W) to (3, T, SHOWN, SHOWN), in [0, 1]."""
    frames = rearrange(video.float(), "c t h w -> t c h w")
    frames = F.interpolate(frames, (SHOWN, SHOWN), mode="bilinear", align_corners=False)
    return rearrange(frames, "t c h w -> c t h w").clamp(0, 1)


def write_gif(path: Path, rows: Sequence[Sequence[Tensor]], titles: Sequence[str]) -> None:
    """An animated grid. rows: of videos (3, T, h, w) in [0, 1], all of one length. titles: above the columns."""
    grid = torch.cat([torch.cat([enlarged(video) for video in row], dim=3) for row in rows], dim=2)
    pictures = []
    for frame in to_bytes(rearrange(grid, "c t h w -> t h w c")).numpy():
        picture = Image.new("RGB", (frame.shape[1], frame.shape[0] + BAR), "white")
        picture.paste(Image.fromarray(frame), (0, BAR))
        draw = ImageDraw.Draw(picture)
        for i, title in enumerate(titles):
            draw.text((i * SHOWN + 4, 3), title, fill="black")
        pictures.append(picture.quantize(128, dither=Image.Dither.NONE))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        pictures[0].save(file, format="GIF", save_all=True, append_images=pictures[1:], loop=0,
                         duration=1000 // FRAMES_PER_SECOND, optimize=True)


@torch.inference_mode()
def reconstructions(run: Path, videos: Path, num_clips: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(input, CoordTok's, LARP's) of the first 16 frames of videos evenly spaced over a folder."""
    coordtok = CoordTok.from_pretrained(run / "coordtok_second").eval()
    larp = LARPTokenizer.from_pretrained(run / "larp_tokenizer").eval()
    files = list_folder(videos)
    found = []
    for file in files[:: max(1, len(files) // num_clips)][:num_clips]:
        frames = read_frames(file.path, range(coordtok.config.video_shape[0]))[None]
        fine = to_video(frames, coordtok.config.video_shape[1], "coordtok", "cpu")
        coarse = to_video(frames[:, : larp.config.frame_num], larp.config.input_size, "larp", "cpu")
        found.append((fine[0], coordtok.render(coordtok.encode(fine))[0], larp.decode(larp.encode(coarse))[0]))
    return found


def sampled(folder: Path, num_clips: int) -> list[Tensor]:
    """The first clips of an output folder of sample.py, given frames outlined."""
    given = read_record(folder / "report.json")["record"]["num_cond_frames"]
    videos = []
    for path in sorted((folder / "sampled_videos").glob("*.mp4"))[:num_clips]:
        frames = read_frames(str(path), range(probe(str(path)).num_frames))
        videos.append(outline(rearrange(frames, "t h w c -> c t h w") / 255, given))
    if len(videos) < num_clips:
        raise FileNotFoundError(f"{folder / 'sampled_videos'} holds {len(videos)} videos, expected {num_clips}: run "
                                "scripts/quickstart.sh to its end")
    return videos


# --- diagrams ---
GREEN, BLUE, ORANGE, GREY = "#eaf6ec #5c9a68", "#eef3fb #5b7db1", "#fdf3e4 #c08a3e", "#f4f4f6 #8a8f98"
TEXT = 'font-family="Inter, Helvetica, Arial, sans-serif" fill="#1c2733"'


def box(x: int, y: int, width: int, height: int, title: str, lines: Sequence[str] = (), colours: str = BLUE) -> str:
    """A rounded box with a title and small lines below it, centred."""
    fill, stroke = colours.split()
    middle, top = x + width / 2, y + height / 2 - 8 * len(lines) + 5
    texts = [f'<text x="{middle}" y="{top}" text-anchor="middle" font-size="15" font-weight="600" {TEXT}>'
             f"{escape(title)}</text>"]
    texts += [f'<text x="{middle}" y="{top + 17 * i}" text-anchor="middle" font-size="12" {TEXT}>{escape(line)}</text>'
              for i, line in enumerate(lines, 1)]
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{fill}" stroke="{stroke}"/>' \
        + "".join(texts)


def arrow(*points: tuple[int, int], dashed: bool = False) -> str:
    path = " L".join(f"{x} {y}" for x, y in points)
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<path d="M{path}" fill="none" stroke="#44525f" stroke-width="1.5"{dash} marker-end="url(#head)"/>'


def note(x: int, y: int, text: str) -> str:
    return f'<text x="{x}" y="{y}" font-size="12" {TEXT}>{escape(text)}</text>'


def write_svg(path: Path, height: int, title: str, parts: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "w") as file:
        file.write(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 980 {height}" role="img">\n<title>{escape(title)}'
            '</title>\n<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
            'orient="auto"><path d="M0 0 L10 5 L0 10 z" fill="#44525f"/></marker></defs>\n'
            f'<rect width="980" height="{height}" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
        )


def draw_diagrams(folder: Path) -> None:
    write_svg(folder / "coordtok.svg", 320, "CoordTok encodes a clip into three planes and decodes patches from "
              "coordinates; SiT makes planes from noise", [
        box(10, 70, 130, 80, "clip", ("128 x 128 x 128", "frames, h, w"), GREY), arrow((140, 110), (179, 110)),
        box(180, 70, 160, 80, "encoder", ("tubelets, ViT,", "plane queries")), arrow((340, 110), (389, 110)),
        box(390, 20, 150, 52, "plane xy", ("16 x 16 x 8",), GREEN),
        box(390, 84, 150, 52, "plane yt", ("32 x 16 x 8, (t, w)",), GREEN),
        box(390, 148, 150, 52, "plane xt", ("32 x 16 x 8, (t, h)",), GREEN), arrow((540, 110), (589, 110)),
        box(590, 10, 170, 36, "coordinates", (), GREY), arrow((675, 46), (675, 69)),
        box(590, 70, 170, 80, "decoder", ("ViT over the patches", "at given (t, h, w)")), arrow((760, 110), (819, 110)),
        box(820, 70, 150, 80, "patches", ("all, or chosen frames",), GREY),
        box(180, 245, 160, 60, "Gaussian noise", ("three planes, label",), GREY), arrow((340, 275), (389, 275)),
        box(390, 245, 150, 60, "SiT", ("noise to planes",), ORANGE), arrow((465, 245), (465, 202)),
        note(560, 272, "generation: SiT makes the planes,"), note(560, 289, "the decoder renders the clip"),
    ])
    write_svg(folder / "larp.svg", 275, "LARP encodes a clip into 1,024 discrete codes; the generator draws codes from "
              "a class or from given frames", [
        box(10, 20, 120, 80, "clip", ("16 x 128 x 128",), GREY), arrow((130, 60), (169, 60)),
        box(170, 20, 150, 80, "encoder", ("patches and 1,024", "learned queries")), arrow((320, 60), (359, 60)),
        box(360, 20, 140, 80, "quantiser", ("8,192 codes,", "drawn at random")), arrow((500, 60), (539, 60)),
        box(540, 20, 120, 80, "1,024 codes", ("13 bits each",), GREEN), arrow((660, 60), (699, 60)),
        box(700, 20, 130, 80, "decoder", ("codes and", "patch queries")), arrow((830, 60), (869, 60)),
        box(870, 20, 100, 80, "clip", (), GREY),
        box(540, 150, 120, 50, "AR prior", ("training only",), ORANGE), arrow((600, 100), (600, 149), dashed=True),
        box(850, 150, 120, 50, "discriminator", ("training only",), ORANGE), arrow((910, 100), (910, 149), dashed=True),
        box(10, 205, 140, 60, "class, or codes", ("of 5 given frames",), GREY), arrow((150, 235), (199, 235)),
        box(200, 205, 180, 60, "generator", ("LLaMA-like, 632M",), ORANGE),
        arrow((380, 235), (470, 235), (470, 125), (565, 125), (565, 102)),
        note(480, 240, "generation: codes, one after the other"),
    ])


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("run", type=Path, nargs="?", default=Path("results/quickstart"), help="Folder of the quickstart")
    add("--videos", type=Path, default=Path("data/cache/demo/UCF-101_test"), help="Folder of test videos")
    add("--output", type=Path, default=ROOT / "assets", help="Folder of the pictures")
    add("--num_clips", type=int, default=3, help="Rows of the grid of reconstructions")
    add("--diagrams", action="store_true", help="Only draw the diagrams")
    args = parser.parse_args()
    names = ("sit_samples", "larp_ar_samples", "larp_ar_fp_samples")
    parts = [name for name in ("coordtok_second", "larp_tokenizer", *names) if not (args.run / name).is_dir()]
    if parts and not args.diagrams:
        raise FileNotFoundError(f"{args.run} is no run of the quickstart, for lack of {', '.join(parts)}: give the "
                                "folder of one (scripts/quickstart.sh makes it), or --diagrams")
    draw_diagrams(args.output)
    if args.diagrams:
        return
    clips = reconstructions(args.run, args.videos, args.num_clips)
    titles = ("input", "CoordTok", "LARP")
    write_gif(args.output / "reconstructions.gif", clips, titles)
    contact_sheet(args.output / "reconstructions.png", [[enlarged(video) for video in clip] for clip in clips],
                  [""] * len(clips), titles, num_frames=6)
    columns = [sampled(args.run / name, args.num_clips) for name in names]
    write_gif(args.output / "samples.gif", list(zip(*columns)), ("SiT", "LARP, by class", "LARP, 5 given frames"))
    print(f"pictures: {args.output}")


if __name__ == "__main__":
    with one_line_errors():
        main()
