"""Demo data set: real photographs moved by a camera, with the file names, groups and splits of UCF-101.

    python data/demo.py --root data/cache/demo

writes ROOT/UCF-101/CLASS/v_CLASS_gGG_cCC.avi and ROOT/UCF-101/demo.json. The classes are camera motions; the photos
ship inside the scikit-image wheel, so nothing is downloaded. The same settings give the same pixels. Run again with
the same settings, it finds the set and does nothing.
"""
import argparse
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import lru_cache, partial
from itertools import product
from pathlib import Path

import cv2
import imageio_ffmpeg
import numpy as np
import skimage.data

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder, data/ included
from common.console import Progress  # noqa: E402
from common.errors import ArgumentParser, read_json  # noqa: E402

# Direction in which the camera moves: right, down (in view widths and heights), zoom in (log), clockwise turn
# (radians).
MOTIONS = {
    "PanLeft": (-1, 0, 0, 0),
    "PanRight": (1, 0, 0, 0),
    "RotateLeft": (0, 0, 0, -1),
    "RotateRight": (0, 0, 0, 1),
    "TiltDown": (0, 1, 0, 0),
    "TiltUp": (0, -1, 0, 0),
    "ZoomIn": (0, 0, 1, 0),
    "ZoomOut": (0, 0, -1, 0),
}
# With these four numbers no corner of a view leaves its photo.
REACH = np.array([0.43, 0.43, math.log(1.75), math.radians(60)])  # half of the longest path
ZOOM = 1.75  # at the middle of the path
CENTRE = 0.05  # largest distance of the path's middle from the photo's, in view widths and heights
MARGIN = 1.8  # least width and height of the scaled photo, in view widths and heights
PHOTOS = ("astronaut", "camera", "coffee")  # with strong contrast, so that motion is visible in small frames


@dataclass(frozen=True)
class DemoConfig:
    classes: tuple[str, ...] = tuple(MOTIONS)
    groups: tuple[int, ...] = tuple(range(1, 26))
    clips: int = 3  # videos of each class and group
    size: tuple[int, int] = (320, 240)  # width, height
    min_frames: int = 16
    max_frames: int = 20
    seed: int = 0

    def __post_init__(self):
        if unknown := sorted(set(self.classes) - set(MOTIONS)):
            raise ValueError(f"--classes has {', '.join(unknown)}; there are {', '.join(MOTIONS)}")
        if not all(1 <= group <= 25 for group in self.groups):
            raise ValueError(f"--groups is {self.groups}; they go from 1 to 25")
        if not 1 <= self.clips <= 99:
            raise ValueError(f"--clips is {self.clips}; expected 1 to 99")
        if any(side < 16 or side % 2 for side in self.size):
            raise ValueError(f"--size is {self.size[0]}x{self.size[1]}; mpeg4 needs even sides, here of 16 or more")
        if not 1 <= self.min_frames <= self.max_frames:
            raise ValueError(f"--min_frames {self.min_frames} --max_frames {self.max_frames}; expected 1 <= min <= max")


@lru_cache(maxsize=32)
def load_photo(name: str, size: tuple[int, int]) -> np.ndarray:
    """A photo of scikit-image, uint8 (H, W, 3) RGB, scaled to cover MARGIN times the view (width, height)."""
    photo = getattr(skimage.data, name)()
    photo = cv2.cvtColor(photo, cv2.COLOR_GRAY2RGB) if photo.ndim == 2 else photo
    scale = MARGIN * max(size[0] / photo.shape[1], size[1] / photo.shape[0])
    new_size = [math.ceil(side * scale) for side in photo.shape[1::-1]]
    return cv2.resize(photo, new_size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)


def render_clip(config: DemoConfig, action: str, group: int, clip: int) -> Iterator[np.ndarray]:
    """Frames of one video, uint8 (height, width, 3) RGB."""
    # Photo and crop have the same distribution in all classes and groups, so that only the motion shows the class. Test
    # clips show other crops and paths than training clips, but of the same few photos: generalisation is not measured.
    rng = np.random.default_rng([config.seed, group, clip, list(MOTIONS).index(action)])
    photo = load_photo(str(rng.choice(PHOTOS)), config.size)
    centre = rng.uniform(-CENTRE, CENTRE, 4) * (1, 1, 0, 0)
    num_frames = int(rng.integers(config.min_frames, config.max_frames, endpoint=True))
    way = rng.uniform(0.8, 1.0) * REACH * np.array(MOTIONS[action])

    width, height = config.size
    for position in np.linspace(-1, 1, num_frames):
        right, down, log_zoom, angle = centre + position * way
        zoom = ZOOM * math.exp(log_zoom)  # 1 to 3.06
        cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
        # Pixel (x, y) of the frame shows pixel view @ (x, y, 1) of the photo.
        x = photo.shape[1] / 2 + right * width - (cos * width - sin * height) / 2
        y = photo.shape[0] / 2 + down * height - (sin * width + cos * height) / 2
        view = np.array([[cos, -sin, x], [sin, cos, y]])
        yield cv2.warpAffine(photo, view, config.size, flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP,
                             borderMode=cv2.BORDER_REFLECT)


def write_clip(folder: Path, config: DemoConfig, action: str, group: int, clip: int) -> None:
    """Write one video as UCF-101's are: avi, XviD, 25 fps."""
    path = folder / action / f"v_{action}_g{group:02d}_c{clip:02d}.avi"
    # One thread and bitexact, so that the file does not depend on the number of cores.
    writer = imageio_ffmpeg.write_frames(
        str(path), config.size, fps=25, codec="mpeg4", quality=None, macro_block_size=2,
        output_params=["-vtag", "xvid", "-q:v", "3", "-threads", "1", "-bitexact"])
    writer.send(None)
    for frame in render_clip(config, action, group, clip):
        writer.send(frame)
    writer.close()


def make_demo(root: str | os.PathLike, config: DemoConfig | None = None, replace: bool = False) -> Path:
    """Make the demo data set unless it is there, and return its folder, ROOT/UCF-101.

    Raises FileExistsError if the folder holds anything else. `replace` replaces a demo set of other settings, but never
    a folder without demo.json, which may be the real UCF-101.
    """
    config = config or DemoConfig()
    folder, part = Path(root, "UCF-101"), Path(root, "UCF-101.part")
    settings = json.loads(json.dumps(asdict(config)))  # as read from the file: tuples become lists
    if folder.exists():
        manifest = folder / "demo.json"
        if not manifest.is_file():
            raise FileExistsError(f"{folder} is there and is no demo data set; name another --root")
        found = read_json(manifest, "the settings of a demo data set", f"delete {folder}, and it is made again")
        if found == settings and not replace:
            return folder
        if not replace:
            differs = [f"{key} {found.get(key)} there, {settings[key]} asked" for key in settings
                       if found.get(key) != settings[key]]
            raise FileExistsError(f"{folder} was made with other settings ({'; '.join(differs)}); add --replace to "
                                  "make it anew, or name another --root")

    shutil.rmtree(part, ignore_errors=True)
    for action in config.classes:
        (part / action).mkdir(parents=True)
    jobs = list(product(config.classes, config.groups, range(1, config.clips + 1)))
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # threads suffice: OpenCV and ffmpeg run outside the interpreter
        done = pool.map(partial(write_clip, part, config), *zip(*jobs))
        list(Progress(done, "demo videos", total=len(jobs)))
    (part / "demo.json").write_text(json.dumps(settings, indent=1) + "\n")
    # Renamed when complete, so that a folder UCF-101 is never half a set.
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    return folder


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder to hold UCF-101/")
    parser.add_argument("--classes", nargs="+", default=DemoConfig.classes, metavar="CLASS", help=", ".join(MOTIONS))
    parser.add_argument("--groups", type=int, nargs="+", default=DemoConfig.groups, help="of 1 to 25; 1 to 7 are test")
    parser.add_argument("--clips", type=int, default=DemoConfig.clips, help="videos of each class and group")
    parser.add_argument("--size", default="320x240", help="WIDTHxHEIGHT")
    parser.add_argument("--min_frames", type=int, default=DemoConfig.min_frames)
    parser.add_argument("--max_frames", type=int, default=DemoConfig.max_frames)
    parser.add_argument("--seed", type=int, default=DemoConfig.seed)
    parser.add_argument("--replace", action="store_true", help="make anew a demo set that has other settings")
    args = parser.parse_args()
    if not re.fullmatch(r"\d+x\d+", args.size):
        sys.exit(f"error: --size is {args.size}; expected WIDTHxHEIGHT, such as 320x240")
    try:
        args.size = tuple(int(side) for side in args.size.split("x"))
        args.classes, args.groups = tuple(args.classes), tuple(args.groups)
        config = DemoConfig(**{field.name: getattr(args, field.name) for field in fields(DemoConfig)})
        folder = make_demo(args.root, config, args.replace)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    num_videos = len(config.classes) * len(config.groups) * config.clips
    print(f"{folder}: {num_videos} videos of {len(config.classes)} classes")


if __name__ == "__main__":
    main()
