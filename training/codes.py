"""The codes of a frozen tokenizer as training data of a generator: batches from videos or from a cache."""
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.distributed import to_device
from common.rng import Stream, uniform_per_sample
from data.augment import draw_flips, flip_half
from data.clips import ClipDataset
from data.loader import GlobalBatchSampler, Loader
from models.larp_tokenizer import LARPTokenizer, LARPTokenizerConfig
from training.window_cache import WindowCache

Encode = Callable[[Tensor], Tensor]  # video (B, 3, T, H, W) in [0, 1] -> (B, kinds, N) long, see `encode_video`


# score(codes, cond, drop) -> the mean loss of the batch, and {"loss", "accuracy"}. codes, cond: as in CodeBatch; drop:
# (B,) bool, which labels are hidden.
Score = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]


class CodeBatch(NamedTuple):
    codes: Tensor  # (B, N) long
    cond: Tensor  # (B,) long labels, -1 for none; or (B, N) long, the codes of the given frames
    positions: list[int]  # the samples' numbers in the run; they seed all random draws
    paths: list[str]


def hold_last(video: Tensor, num_frames: int) -> Tensor:
    """The first `num_frames` frames of a video (B, 3, T, H, W), the last of them repeated up to length T."""
    held = video[:, :, num_frames - 1 : num_frames].expand(-1, -1, video.shape[2] - num_frames, -1, -1)
    return torch.cat([video[:, :, :num_frames], held], dim=2)


def encode_video(tokenizer: LARPTokenizer, video: Tensor, num_cond_frames: int = 0) -> Tensor:
    """Deterministic codes (B, kinds, N) long of a video (B, 3, T, H, W) in [0, 1].

    There is one kind: the codes of the clip. With `num_cond_frames` there is a second: the codes of the first frames,
    with the last of them repeated to a whole clip (`hold_last`).
    """
    if not num_cond_frames:
        return tokenizer.encode(video)[:, None]
    codes = tokenizer.encode(torch.cat([video, hold_last(video, num_cond_frames)]))
    return torch.stack(codes.chunk(2), dim=1)


def draw_drops(seed: int, positions: Sequence[int], probability: float) -> Tensor:
    """(B,) bool: which labels are hidden."""
    return uniform_per_sample(seed, positions, Stream.LABEL_DROP) < probability


class CodeCache(WindowCache):
    """A WindowCache of codes, as small integers. A row holds the codes of a window (see `encode_video`) and, with
    `flip`, those of its mirror image. Rows that cannot be decoded are -1."""

    def __init__(self, folder: Path, clips: ClipDataset, config: LARPTokenizerConfig, views: int, num_cond_frames: int,
                 flip: bool, key: dict):
        self.shape = (1 + flip, 1 + (num_cond_frames > 0), config.bottleneck_token_num)
        self.flip = flip
        key = {**key, "config": asdict(config), "num_cond_frames": num_cond_frames, "flip": flip}
        dtype = "int16" if config.bottleneck.args.regularizer.args.codebook_size <= 2**15 else "int32"
        super().__init__(folder, "codes", clips, views, key, int(np.prod(self.shape)), dtype, -1)

    def fill(self, encode: Encode, batch_size: int, num_workers: int, device: torch.device) -> None:
        def flat(batch: dict) -> Tensor:
            video = self.clips.to_video(batch, device)
            mirrored = [video, video.flip(-1)] if self.flip else [video]
            return torch.stack([encode(one) for one in mirrored], dim=1).flatten(1)

        self.fill_rows(flat, batch_size, num_workers)

    def read(self, rows: np.ndarray) -> Tensor:
        """(B, mirrors, kinds, N) long on the CPU; mirrors is 2 with `flip`, else 1."""
        return torch.from_numpy(self.rows.read(rows)).long().unflatten(1, self.shape)


def make_batch(codes: Tensor, labels: Tensor, positions: list[int], paths: list[str]) -> CodeBatch:
    """codes: (B, kinds, N), see `encode_video`."""
    return CodeBatch(codes[:, 0], codes[:, 1] if codes.shape[1] > 1 else labels, positions, paths)


def batches_from_cache(
    cache: CodeCache, sampler: GlobalBatchSampler, files: list[int], device: torch.device
) -> Iterator[CodeBatch]:
    """Micro-batches of cached codes. A sample takes one of its video's windows at random, mirrored or not.

    files: maps the sampler's indices to videos (see `WindowCache.good_files`).
    """
    for keys in sampler:
        rows, videos = cache.draw(keys, files, sampler.seed)
        positions, codes = [key.position for key in keys], cache.read(rows)
        flips = draw_flips(sampler.seed, positions).long() if cache.flip else torch.zeros(len(rows), dtype=torch.long)
        codes = to_device(codes[torch.arange(len(rows)), flips], device)  # (B, kinds, N)
        labels = to_device(torch.tensor([video.label for video in videos]), device)
        yield make_batch(codes, labels, positions, [video.path for video in videos])


def batches_from_video(loader: Loader, encode: Encode, flip: bool, device: torch.device) -> Iterator[CodeBatch]:
    """Micro-batches of the loader's clips, encoded as they are loaded. With `flip`, half of them are mirrored."""
    clips = loader.dataset
    for batch in loader:
        video = clips.to_video(batch, device)
        positions = batch["position"].tolist()
        if flip:
            video = flip_half(video, clips.seed, positions)
        yield make_batch(encode(video), batch["label"].to(device, non_blocking=True), positions, batch["path"])

