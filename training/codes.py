"""A frozen tokenizer's codes as a generator's data: batches from videos or from a cache, and a held-out set."""
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from data.clips import ClipDataset, ClipKey, GlobalBatchSampler, VideoFile, class_names, make_loader
from data.video import to_video
from models.larp_tokenizer import LARPTokenizer, LARPTokenizerConfig
from training import distributed
from training.latents import WindowCache, to_device

Encode = Callable[[Tensor], Tensor]  # video (B, 3, T, H, W) in [0, 1] -> (B, kinds, N) long, see `encode_video`
# score(codes, cond, drop) -> the mean loss of the batch, and {"loss", "accuracy"}; cond and drop as in CodeBatch.
Score = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]


class CodeBatch(NamedTuple):
    codes: Tensor  # (B, N) long
    cond: Tensor  # (B,) long labels, -1 for none; or the codes (B, N) long of the frames given
    positions: list[int]  # in the run, which all draws for a sample come from
    paths: list[str]


def hold_last(video: Tensor, num_frames: int) -> Tensor:
    """The first `num_frames` frames of a video (B, 3, T, H, W), then the last of them up to T."""
    held = video[:, :, num_frames - 1 : num_frames].expand(-1, -1, video.shape[2] - num_frames, -1, -1)
    return torch.cat([video[:, :, :num_frames], held], dim=2)


def encode_video(tokenizer: LARPTokenizer, video: Tensor, num_cond_frames: int = 0) -> Tensor:
    """Deterministic codes (B, 1, N) long of a video (B, 3, T, H, W) in [0, 1]; with `num_cond_frames`, (B, 2, N): after
    them those of the frames given, the last one held."""
    if not num_cond_frames:
        return tokenizer.encode(video)[:, None]
    codes = tokenizer.encode(torch.cat([video, hold_last(video, num_cond_frames)]))
    return torch.stack(codes.chunk(2), dim=1)


def lots(seed: int, positions: Sequence[int], stream: int) -> Tensor:
    """(B,) float64 on the CPU, uniform in [0, 1): one for each sample, from (seed, position) alone."""
    return torch.tensor([np.random.default_rng((seed, position, 0, stream)).random() for position in positions])


def draw_flips(seed: int, positions: Sequence[int]) -> Tensor:
    """(B,) bool: which clips are mirrored."""
    return lots(seed, positions, 6) < 0.5


def flip_half(video: Tensor, seed: int, positions: Sequence[int]) -> Tensor:
    """The clips (B, 3, T, H, W) at these positions of the run, half of them mirrored."""
    flips = to_device(draw_flips(seed, positions), video.device)
    return torch.where(flips[:, None, None, None, None], video.flip(-1), video)


def draw_drops(seed: int, positions: Sequence[int], probability: float) -> Tensor:
    """(B,) bool: which labels are hidden."""
    return lots(seed, positions, 7) < probability


class CodeCache(WindowCache):
    """A WindowCache of codes, as small integers: of each window, and where `flip` of its mirror image, the codes and
    with `num_cond_frames` those of the frames given. Rows that cannot be decoded are -1."""

    def __init__(self, folder: Path, clips: ClipDataset, config: LARPTokenizerConfig, views: int, num_cond_frames: int,
                 flip: bool, key: dict):
        self.shape = (1 + flip, 1 + (num_cond_frames > 0), config.bottleneck_token_num)
        self.flip = flip
        key = {**key, "config": asdict(config), "num_cond_frames": num_cond_frames, "flip": flip}
        dtype = "int16" if config.bottleneck.args.regularizer.args.codebook_size <= 2**15 else "int32"
        super().__init__(folder, "codes", clips, views, key, int(np.prod(self.shape)), dtype, -1)

    def fill(self, encode: Encode, batch_size: int, num_workers: int, device: torch.device) -> None:
        def flat(batch: dict) -> Tensor:
            video = to_video(batch["frames"], self.clips.size, self.clips.rule, device)
            mirrored = [video, video.flip(-1)] if self.flip else [video]
            return torch.stack([encode(one) for one in mirrored], dim=1).flatten(1)

        super().fill(flat, batch_size, num_workers)

    def read(self, rows: np.ndarray) -> Tensor:
        """(B, 2 where mirrored else 1, kinds, N) long on the CPU."""
        return torch.from_numpy(self.rows.read(rows)).long().unflatten(1, self.shape)


def make_batch(codes: Tensor, labels: Tensor, positions: list[int], paths: list[str]) -> CodeBatch:
    """codes: (B, kinds, N), see `encode_video`."""
    return CodeBatch(codes[:, 0], codes[:, 1] if codes.shape[1] > 1 else labels, positions, paths)


def batches_from_cache(
    cache: CodeCache, sampler: GlobalBatchSampler, files: list[int], device: torch.device
) -> Iterator[CodeBatch]:
    """Micro-batches of cached codes; each sample draws one of its video's windows, and whether it is mirrored.

    files: the videos the sampler's indices count.
    """
    for keys in sampler:
        rows, videos = cache.draw(keys, files, sampler.seed)
        positions, codes = [key.position for key in keys], cache.read(rows)
        flips = draw_flips(sampler.seed, positions).long() if cache.flip else torch.zeros(len(rows), dtype=torch.long)
        codes = to_device(codes[torch.arange(len(rows)), flips], device)
        labels = to_device(torch.tensor([video.label for video in videos]), device)
        yield make_batch(codes, labels, positions, [video.path for video in videos])


def batches_from_video(loader: DataLoader, encode: Encode, flip: bool, device: torch.device) -> Iterator[CodeBatch]:
    """Micro-batches of the loader's clips, encoded as they come; with `flip`, half of them are mirrored."""
    clips = loader.dataset
    for batch in loader:
        video = to_video(batch["frames"], clips.size, clips.rule, device)
        positions = batch["position"].tolist()
        if flip:
            video = flip_half(video, clips.seed, positions)
        yield make_batch(encode(video), batch["label"].to(device, non_blocking=True), positions, batch["path"])


class HeldOut:
    """Codes of a fixed clip of some held-out videos, encoded once and split over the processes: what validation scores,
    and what samples continue.

    clips: the videos; a damaged one is replaced, so that every key has its clip. keys: of all processes; this one takes
    every world_size-th, as SampleCheck does with its samples, so that sample i can continue clip i.
    """

    def __init__(self, clips: ClipDataset, keys: list[ClipKey], encode: Encode, batch_size: int, num_workers: int,
                 device: torch.device):
        self.batch_size, self.device = batch_size, device
        mine = keys[distributed.rank() :: distributed.world_size()]
        loader = make_loader(clips, [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)],
                             min(num_workers, len(mine)))
        batches = list(batches_from_video(loader, encode, False, device)) if mine else []
        self.codes, self.conds = (torch.cat([part[i].cpu() for part in batches]) if mine else torch.empty(0)
                                  for i in range(2))  # (n, N), and (n,) or (n, N)

    def cond(self, indices: Sequence[int]) -> Tensor:
        """What the clips at these indices, all of this process, continue: (B,) labels, or (B, N) codes."""
        return self.conds[[index // distributed.world_size() for index in indices]].to(self.device)

    @torch.no_grad()
    def score(self, score: Score, labelled: bool) -> dict[str, float]:
        """Means over the clips of all processes: loss and accuracy, with `labelled` also those of hidden labels
        (loss_uncond, accuracy_uncond): the difference is what a label is worth."""
        sums = torch.zeros(5, dtype=torch.float64, device=self.device)
        for i in range(0, len(self.codes), self.batch_size):
            codes, cond = (values[i : i + self.batch_size].to(self.device) for values in (self.codes, self.conds))
            hidden = torch.zeros(len(codes), dtype=torch.bool, device=self.device)
            logs = [*score(codes, cond, hidden)[1].values()]
            logs += [*score(codes, cond, ~hidden)[1].values()] if labelled else logs
            sums += len(codes) * torch.stack([torch.ones_like(logs[0]), *logs]).double()
        count, *means = distributed.all_sum(sums).tolist()
        names = ("loss", "accuracy", "loss_uncond", "accuracy_uncond")[: 4 if labelled else 2]
        return {"clips": int(count), **{name: mean / count for name, mean in zip(names, means)}}


def held_out_keys(num_files: int, num_clips: int | None, seed: int) -> list[ClipKey]:
    """`num_clips` of the videos (None: all) in a random order, so that the first few are of all classes."""
    order = np.random.default_rng((seed, 0, 0, 8)).permutation(num_files)[:num_clips]
    return [ClipKey(position, int(index)) for position, index in enumerate(order)]


def caption(file: VideoFile) -> str:
    """A sample's line on the contact sheet: the class of the clip whose label it takes, or that it continues."""
    return Path(file.path).parent.name or f"class {file.label}"


def check_labels(files: Sequence[VideoFile], num_classes: int, source: str) -> None:
    """ValueError where a label is too large, or no video has one."""
    largest = max(file.label for file in files)
    if largest >= num_classes:
        raise ValueError(f"--num_classes is {num_classes}, but {source} has label {largest}: give {largest + 1}")
    if largest < 0:
        raise ValueError(f"no video of {source} has a label: give a folder of class folders, or one list whose name "
                         "starts with ucf; or train with --frame_prediction, which needs none")


def check_classes(files: Sequence[VideoFile], val_files: Sequence[VideoFile], source: str, val_source: str) -> None:
    """Labels of folders number the classes found in each: ValueError where those differ."""
    if differ := (set(class_names(files)) ^ set(class_names(val_files))) - {""}:
        raise ValueError(f"{source} and {val_source} have different classes: {', '.join(sorted(differ))} is in one "
                         "alone; give both the same, or --num_val 0")
