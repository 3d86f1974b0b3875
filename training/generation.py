"""Sampling: SiT's planes of given sample indices, the store that shards and resumed runs share, and the report."""
import argparse
import csv
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor

from data.clips import ClipDataset, ClipKey, make_loader
from data.video import to_video, write_video
from eval import fvd
from eval.i3d import I3D
from eval.pictures import contact_sheet
from eval.protocols import write_record
from eval.reconstruction import length
from models.coordtok import CoordTok
from models.interpolant import Interpolant, draw_noise, noise_stream, sample_generators
from models.planes import Planes
from models.released import read_sit_statistics
from models.sit import SIT_SIZES, SiT
from training import checkpoint, distributed
from training.arguments import Parser, check_carried
from training.latents import LatentStats
from training.log import say
from training.tokenizers import weights_sha256

# --- SiT ---

# Given where a checkpoint does not carry them: the authors' does not, ours does.
SIT_FLAGS = {"model": "SiT-L/2", "num_classes": 1, "class_dropout_prob": 0.0, "path_type": "Linear",
             "prediction": "velocity", "sample_eps": None}


def add_sit(parser: Parser) -> None:
    """Flags of a SiT to sample from."""
    group = parser.add_argument_group("SiT", "what follows --sit_log, our checkpoints carry")
    group.add_argument("--sit_model", "--sit_ckpt_path", dest="sit_model", metavar="CKPT",
                       help="checkpoint or folder of them, ours; or the authors' run folder or .pt file")
    group.add_argument("--first_model_ckpt", metavar="CKPT", help="the CoordTok that it was trained on")
    group.add_argument("--sit_ckpt_iter", type=int, default=600000, help="which checkpoint of the authors' run folder")
    group.add_argument("--sit_log", metavar="PATH", help="log.txt of the authors' run (default: beside the checkpoint)")
    kinds = {"model": str, "num_classes": int, "class_dropout_prob": float, "path_type": str, "prediction": str,
             "sample_eps": float}
    for name, default in SIT_FLAGS.items():
        group.add_argument(f"--{name}", type=kinds[name], default=argparse.SUPPRESS, help=f"(default: {default})")


class TrainedSiT(NamedTuple):
    model: SiT
    interpolant: Interpolant
    stats: LatentStats
    class_names: list[str]  # by label; empty where unknown


def load_sit(args: argparse.Namespace, tokenizer: CoordTok) -> TrainedSiT:
    """The averaged weights of args.sit_model on the CPU, in evaluation mode.

    Raises ValueError where it was trained on another tokenizer, or for planes of other sizes.
    """
    path = Path(args.sit_model)
    path = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if path.is_dir() and not list(path.glob("step_*.pt")):
        path = path / f"{args.sit_ckpt_iter:07d}.pt"
    given = {name: getattr(args, name) for name in SIT_FLAGS if hasattr(args, name)}
    if path.exists() and checkpoint.is_ours(path):
        state = checkpoint.load(path)
        if state.get("kind") != "sit":
            raise ValueError(f"{path} holds a {state.get('kind')} model, expected a sit checkpoint (--sit_model)")
        for name, value in given.items():
            check_carried(name, value, state["args"][name], path)
        sit, interpolant = SiT(**state["config"]), Interpolant(**state["interpolant"])
        sit.load_state_dict(state["ema"])
        stats, names = LatentStats.from_state_dict(state["statistics"]), state["classes"]
        if state["tokenizer"] != weights_sha256(tokenizer):
            raise ValueError(f"{path} was not trained on the tokenizer {args.first_model_ckpt}: --first_model_ckpt was "
                             f"{state['args']['first_model_ckpt']} then")
    else:
        flags = argparse.Namespace(**{**SIT_FLAGS, **given})
        config = tokenizer.config
        if flags.model not in SIT_SIZES:
            raise ValueError(f"--model is {flags.model}, expected one of {', '.join(SIT_SIZES)}")
        sit = SiT.from_released(
            path, **SIT_SIZES[flags.model], input_size=(config.latent_resolution_t, config.latent_resolution_xy),
            in_channels=config.latent_n_features, num_classes=flags.num_classes,
            class_dropout_prob=flags.class_dropout_prob,
        )
        interpolant = Interpolant(flags.path_type, flags.prediction, sample_eps=flags.sample_eps)
        beside = [path.with_name("log.txt"), path.parent.with_name("log.txt")]
        logs = [Path(args.sit_log)] if args.sit_log else [log for log in beside if log.is_file()] or beside
        stats, names = LatentStats.from_state_dict(read_sit_statistics(logs[0])), []
    config = tokenizer.config
    made = (config.latent_resolution_t, config.latent_resolution_xy), config.latent_n_features
    if (sit.config.input_size, sit.config.in_channels) != made or len(stats.mean.xy) != made[1]:
        raise ValueError(f"{path} has planes of {sit.config.input_size} with {sit.config.in_channels} channels, and "
                         f"statistics of {len(stats.mean.xy)}; the tokenizer {args.first_model_ckpt} has planes of "
                         f"{made[0]} with {made[1]}: they belong to different runs")
    return TrainedSiT(sit.eval().requires_grad_(False), interpolant, stats, names)


def sample_labels(indices: Sequence[int], num_classes: int, seed: int) -> list[int]:
    """A class for each sample, uniform, from (seed, index) alone."""
    return [int(np.random.default_rng((seed, index, 0, 5)).integers(num_classes)) for index in indices]


def guided(sit: SiT, cfg_scale: float, guidance_interval: tuple[float, float]) -> Callable[..., Planes]:
    """The model that samplers call: with guidance, unless its scale is 1."""
    return sit if cfg_scale == 1 else partial(sit.forward_with_cfg, cfg_scale=cfg_scale, interval=guidance_interval)


def sample_planes(
    trained: TrainedSiT, indices: Sequence[int], seed: int, labels: Tensor, mode: str = "SDE", cfg_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0), start: Planes | None = None, **sampler,
) -> Planes:
    """Planes of a tokenizer for samples `indices`: functions of (seed, index, label), whatever else is in the batch.

    labels: (B,) long, on the model's device. mode: "ODE" or "SDE". start: noise to start from instead of that of the
    indices. sampler: further arguments of Interpolant.sample_ode or sample_sde.
    """
    sit, interpolant, stats = trained[:3]
    generators = sample_generators(seed, indices, labels.device)
    noise = draw_noise(generators, sit.plane_shapes)
    if mode == "ODE":
        sample = interpolant.sample_ode
    else:
        sample = partial(interpolant.sample_sde, step_noise=noise_stream(generators))
    model = guided(sit, cfg_scale, guidance_interval)
    return stats.restore(sample(model, noise if start is None else start, y=labels, **sampler))


# --- samples during training ---

class SampleCheck:
    """Samples during training: a contact sheet, an mp4, and the FVD of a few samples against as many fixed real clips.

    clips, keys: the real ones. Too few for a number to report; good for its course.
    """

    def __init__(
        self, clips: ClipDataset, keys: list[ClipKey], batch_size: int, num_workers: int, device: torch.device
    ):
        self.clips, self.num_samples, self.batch_size, self.num_workers = clips, len(keys), batch_size, num_workers
        self.keys = keys[distributed.rank() :: distributed.world_size()]
        self.real = self.i3d = None
        if clips.num_frames >= 10 and len(keys) > 1:
            try:
                self.i3d = I3D.from_weights().to(device)
            except OSError as error:
                say(f"samples go without FVD: {error}")

    @torch.inference_mode()
    def run(self, generate: Callable[[list[int]], Tensor], captions: list[str], folder: Path) -> dict[str, float]:
        """Writes folder.png and folder.mp4 and returns {"fvd": ..., ...} where I3D is to be had.

        generate: sample indices -> (B, 3, T, H, W) clips. captions: by index.
        """
        mine = list(range(self.num_samples))[distributed.rank() :: distributed.world_size()]
        fake, shown = [torch.empty(0, 400)], []
        for start in range(0, len(mine), self.batch_size):
            videos = generate(mine[start : start + self.batch_size]).clamp(0, 1)
            shown += list(videos[: 8 - len(shown)].cpu())
            if self.i3d is not None:
                fake.append(self.i3d(videos).cpu())
        if distributed.is_main():
            captions = [captions[index] for index in mine[: len(shown)]]
            contact_sheet(folder.with_suffix(".png"), [(video,) for video in shown], captions, num_clips=len(shown))
            write_video(folder.with_suffix(".mp4"), torch.cat(shown, dim=3))
        if self.i3d is None:
            return {}
        if self.real is None:
            device = next(self.i3d.parameters()).device
            batches = [self.keys[i : i + self.batch_size] for i in range(0, len(self.keys), self.batch_size)]
            videos = (to_video(batch["frames"], self.clips.size, self.clips.rule, device)
                      for batch in make_loader(self.clips, batches, min(self.num_workers, len(batches)))
                      if len(batch["position"]))
            self.real = gather_rows([torch.empty(0, 400), *(self.i3d(video).cpu() for video in videos)])
        return fvd.report(self.real, gather_rows(fake))


def gather_rows(parts: list[Tensor]) -> Tensor:
    """The rows of all processes' tensors, in the order of the processes."""
    return torch.cat(distributed.gather(torch.cat(parts)))


# --- real clips beside the samples ---

def real_clips(clips: ClipDataset, total: int) -> list[int]:
    """The video of real clip 0, 1, ..., which stand beside samples 0, 1, ...: drawn without replacement from the seed,
    those too short left out, as `python -m eval.fvd` draws them. Up to `total` of them.

    clips: with damaged="skip", so that nothing takes a damaged one's place.
    """
    order = np.random.default_rng(clips.seed).permutation(len(clips.files)).tolist()
    chosen = []
    with ThreadPoolExecutor(8) as pool:  # decoding runs outside the interpreter lock
        for start in range(0, len(order), 256):
            part = order[start : start + 256]
            lengths = pool.map(lambda video: length(clips.files[video], clips.quarantine), part)
            chosen += [video for video, frames in zip(part, lengths) if frames >= clips.num_frames]
            if len(chosen) >= total:
                break
    if not chosen:
        raise ValueError(f"none of {len(clips.files)} videos has {clips.num_frames} frames: choose another --data_root "
                         "or --video_name, or go without with --no_fvd")
    return chosen[:total]


def real_batches(
    clips: ClipDataset, chosen: list[int], batches: list[list[int]], num_workers: int, device: torch.device
) -> Iterator[tuple[list[int], Tensor | None]]:
    """For each batch of sample indices: the places in it that have a real clip, and those clips (n, 3, T, H, W), first
    frames uniform over the videos. chosen: see `real_clips`."""
    videos = [[chosen[i] for i in batch if i < len(chosen)] for batch in batches]
    keys = [[ClipKey(video, video) for video in part] for part in videos]
    for part, batch in zip(videos, make_loader(clips, keys, min(num_workers, len(keys)))):
        places = [part.index(position) for position in batch["position"].tolist()]
        yield places, to_video(batch["frames"], clips.size, clips.rule, device) if places else None


# --- the samples' folder ---

NUM_PREVIEWS = 16  # samples on the contact sheet


class SampleStore:
    """The folder of one set of samples 0 .. total - 1, filled by any number of shards in any order.

    A batch is kept as one file of chunks/, written whole after its videos: values by name, a row a sample, `index` (n,)
    among them. So a killed shard goes on after its last whole batch, and the shard that finishes last reports. All
    shards must agree on `settings` (plain JSON values), which settings.json holds.
    """

    def __init__(self, folder: str | Path, settings: dict, total: int):
        self.folder, self.total = Path(folder), total
        self.settings = json.loads(json.dumps({**settings, "num_samples_total": total}))
        self.run = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:8]
        self.videos, self.chunks = self.folder / "sampled_videos", self.folder / "chunks"
        self.report = self.folder / "report.json"
        self.chunks.mkdir(parents=True, exist_ok=True)
        self.videos.mkdir(exist_ok=True)
        self.lock = FileLock(self.folder / ".lock")

    def open(self, indices: Sequence[int], replace: bool) -> list[int]:
        """Those of `indices` that are still to be made. With `replace`, all of them, and whatever other settings made
        is dropped. ValueError where the folder holds samples of other settings."""
        path = self.folder / "settings.json"
        with self.lock:
            there = json.loads(path.read_text()) if path.exists() else self.settings
            if there != self.settings and not replace:
                raise ValueError(f"{self.folder} holds samples of other settings: {differences(there, self.settings)}; "
                                 "choose another --output_dir, or --replace them")
            write_whole(path, json.dumps(self.settings, indent=1))
            if replace:
                for chunk in self.chunks.iterdir():
                    if there != self.settings or set(chunk_indices(chunk)) & set(indices):
                        chunk.unlink()
                self.report.unlink(missing_ok=True)
            done = self.done()
        return [index for index in indices if index not in done]

    def done(self) -> dict[int, Path]:
        """{index: its chunk}. ValueError for chunks of other settings, and where two hold the same sample."""
        found = {}
        for path in sorted(self.chunks.glob("*.npz")):
            if path.name.split(".")[1] != self.run:
                raise ValueError(f"{path} is of a run with other settings: take it away")
            for index in chunk_indices(path):
                if index in found or not 0 <= index < self.total:
                    also = f"in {found[index]} too" if index in found else f"not one of 0 to {self.total - 1}"
                    raise ValueError(f"{path} holds sample {index}, which is {also}: take one away, and run again")
                found[index] = path
        return found

    def add(self, index: list[int], videos: Tensor, formats: Sequence[str], **values: Tensor) -> None:
        """Keep one batch. videos: (B, 3, T, H, W) in [0, 1]. formats: of "mp4" and "png" (a folder of frames, without
        loss). values: (B, ...) each."""
        for i, video in zip(index, videos.cpu()):
            if "mp4" in formats:
                write_video(self.videos / f"{i:06d}.mp4", video)
            if "png" in formats:
                write_frames(self.videos / f"{i:06d}", video)
            if i < NUM_PREVIEWS:
                frames = torch.linspace(0, video.shape[1] - 1, min(8, video.shape[1])).round().long()
                np.save(self.chunks / f"preview_{i:02d}.npy", to_bytes(video[:, frames]))
        path = self.chunks / f"{index[0]:07d}-{index[-1]:07d}.{self.run}.npz"
        partial_path = path.with_suffix(f".{os.getpid()}")
        with open(partial_path, "wb") as file:
            np.savez(file, index=np.array(index), **{name: value.cpu().numpy() for name, value in values.items()})
        os.replace(partial_path, path)

    def previews(self) -> list[Tensor]:
        """A few frames (3, 8, H, W) in [0, 1] of each of the first samples."""
        paths = (self.chunks / f"preview_{i:02d}.npy" for i in range(min(NUM_PREVIEWS, self.total)))
        return [torch.from_numpy(np.load(path)) / 255 for path in paths]

    def collect(self) -> dict[str, np.ndarray]:
        """All rows, in the order of their indices."""
        chunks = [dict(np.load(path)) for path in sorted(set(self.done().values()))]
        rows = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
        order = rows["index"].argsort()
        return {name: values[order] for name, values in rows.items()}

    def finish(self, make_report: Callable[[dict[str, np.ndarray]], tuple[dict, dict, dict | None]],
               table: Path) -> tuple[dict, dict] | None:
        """Report where no sample is missing and nobody has done so; else say what is missing, and return None.

        make_report: rows -> (record, results, row of the table or None). report.json is written last, so that a report
        that was killed is made again. Returns (record, results).
        """
        with self.lock:
            done = self.done()
            if missing := [index for index in range(self.total) if index not in done]:
                say(f"{len(done)} of {self.total} samples are in {self.folder}; no report while some are missing: "
                    f"{ranges(missing)}")
                return None
            if self.report.exists():
                say(f"all {self.total} samples are in {self.folder}, and reported in {self.report}")
                return None
            record, results, row = make_report(self.collect())
            if row is not None:
                append_report(table, {**row, "report": str(self.report)})
            write_record(self.report, record, results)
        return record, results


def chunk_indices(path: Path) -> list[int]:
    """The samples in a chunk; none in other files."""
    if path.suffix != ".npz":
        return []
    with np.load(path) as chunk:
        return chunk["index"].tolist()


def to_bytes(video: Tensor) -> np.ndarray:
    """Float in [0, 1] to uint8, rounded."""
    return video.clamp(0, 1).mul(255).round().to(torch.uint8).cpu().numpy()


def write_frames(folder: Path, video: Tensor) -> None:
    """folder/000.png, ... of a video (3, T, H, W)."""
    folder.mkdir(exist_ok=True)
    for i, frame in enumerate(to_bytes(video).transpose(1, 2, 3, 0)):
        Image.fromarray(frame).save(folder / f"{i:03d}.png")


def append_report(path: Path, row: dict) -> None:
    """Add a row to a csv table, safe under concurrent writers, unless it is there. Rows are sorted by num_samples down,
    fvd up; columns of all rows are kept, in the order in which they came."""
    path.parent.mkdir(parents=True, exist_ok=True)
    row = {name: "" if value is None else str(value) for name, value in row.items()}
    with FileLock(path.with_name(f".{path.name}.lock")):
        rows = []
        if path.exists():
            with open(path, newline="") as file:
                rows = list(csv.DictReader(file))
        names = list(dict.fromkeys(name for each in (*rows, row) for name in each))
        rows = [{name: each.get(name, "") for name in names} for each in (*rows, row)]
        rows = [each for i, each in enumerate(rows) if each not in rows[:i]]
        rows.sort(key=lambda each: (-int(each["num_samples"]), float(each["fvd"])))
        partial_path = path.with_name(f".{path.name}.{os.getpid()}")
        with open(partial_path, "w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(partial_path, path)


def write_whole(path: Path, text: str) -> None:
    partial_path = path.with_name(f".{path.name}.{os.getpid()}")
    partial_path.write_text(text + "\n")
    os.replace(partial_path, path)


def differences(there: dict, here: dict) -> str:
    """What two sets of settings do not have in common, as text; empty where they are equal."""
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    return ", ".join(f"{name} {there.get(name)} there, {here.get(name)} here" for name in names)


def ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers as text: "3 to 5, 9"."""
    runs = groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    spans = [[number for _, number in run] for _, run in runs]
    return ", ".join(f"{span[0]} to {span[-1]}" if len(span) > 1 else str(span[0]) for span in spans)
