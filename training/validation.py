"""Validation during training: a tokenizer on a fixed set of clips, split over the processes."""
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from data.clips import ClipDataset, ClipKey, Quarantine, VideoFile, make_loader
from data.video import write_video
from eval.i3d import I3D
from eval.pictures import contact_sheet
from eval.reconstruction import merge, reconstruct_rows, summary
from models.losses import Perceptual
from training import distributed
from training.log import say


def validation_source(args: Namespace) -> str:
    """The folder or lists to validate on: those named (val_name, val_csv); else the folder beside the one trained on
    with _test for _train in its name, or the lists with _val for _train; else, which is said, what is trained on."""
    if args.video_name:
        trained, named = args.video_name, args.val_name
        sibling = args.video_name.replace("_train", "_test")
        source = named or (sibling if (Path(args.data_root) / sibling).is_dir() else trained)
    else:
        trained, named = args.csv_file, args.val_csv
        source = named or trained.replace("_train", "_val")
    if source == trained and not named:
        flag = "--val_name" if args.video_name else "--val_csv"
        say(f"validation is on {trained}, what is trained on: give {flag} for other videos")
    return str(Path(args.data_root) / source) if args.video_name else source


def spread(files: int, clips: int | None) -> list[int]:
    """`clips` indices spread evenly over `files`; None: all of them."""
    clips = files if clips is None else min(clips, files)
    return [i * files // clips for i in range(clips)]


class Validation:
    """PSNR, SSIM, LPIPS and rFVD on a fixed clip of each of `num_clips` of the files (None: of all), with a contact
    sheet and an mp4.

    Short clips repeat their last frame, so that every clip has `num_frames`. A metric whose weights cannot be had is
    left out, and said so once.
    """

    def __init__(
        self, files: Sequence[VideoFile], num_clips: int | None, num_frames: int, size: int, rule: str,
        device: torch.device, batch_size: int, num_workers: int, quarantine: Quarantine, lpips_weights: str,
        timeout: float,
    ):
        self.size, self.rule, self.device = size, rule, device
        keys = [ClipKey(position, index) for position, index in enumerate(spread(len(files), num_clips))]
        mine = keys[distributed.rank() :: distributed.world_size()]
        clips = ClipDataset(
            files, num_frames, size, rule=rule, resize="worker", short="repeat", quarantine=quarantine, damaged="skip",
            timeout=timeout,
        )
        batches = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
        self.loader = make_loader(clips, batches, min(num_workers, len(batches)), 2, pin_memory=device.type == "cuda")
        self.perceptual = self.available("LPIPS", lambda: Perceptual(weights=lpips_weights))
        self.i3d = self.available("rFVD", I3D.from_weights) if num_frames >= 10 else None

    def available(self, metric: str, build: Callable[[], torch.nn.Module]) -> torch.nn.Module | None:
        try:
            return build().to(self.device)
        except (OSError, ValueError) as error:
            say(f"validation goes without {metric}: {error}")
            return None

    def run(self, reconstruct: Callable[[Tensor, list[int]], Tensor], folder: Path) -> dict[str, float]:
        """Scores over all processes; pictures of rank 0's first batch go to `folder`.png and .mp4.

        reconstruct: as `reconstruct_rows` takes it.
        """
        rows, examples = reconstruct_rows(
            reconstruct, self.loader, self.device, self.size, self.rule, self.i3d, perceptual=self.perceptual
        )
        if distributed.is_main() and examples:
            folder.parent.mkdir(parents=True, exist_ok=True)
            contact_sheet(folder.with_suffix(".png"), examples)
            pair = torch.cat([torch.cat(pair, dim=2) for pair in examples], dim=3)
            write_video(folder.with_suffix(".mp4"), pair)
        return summary(merge(distributed.gather(rows)), divisor="N-1")


class CodeStats:
    """How a codebook is used, and how well a prior predicts it, over all batches and processes."""

    def __init__(self, codebook_size: int, device: torch.device):
        self.counts = torch.zeros(codebook_size, dtype=torch.float64, device=device)
        self.accuracy = {}

    def add(self, codes: Tensor, logs: dict[str, Tensor] | None = None) -> None:
        """codes: (B, N) long. logs: of the model, with the prior's accuracies where it has a prior."""
        self.counts += codes.flatten().bincount(minlength=len(self.counts))
        for name, value in (logs or {}).items():
            if name.startswith("prior_top"):
                self.accuracy[name] = self.accuracy.get(name, 0) + value.double() * codes.numel()

    def summary(self) -> dict[str, float]:
        """code_use: the share of codes that occur at all; code_perplexity; the prior's accuracies."""
        counts = distributed.all_sum(self.counts)
        share = counts / counts.sum()
        numbers = {"code_use": (share > 0).double().mean(), "code_perplexity": torch.special.entr(share).sum().exp()}
        # By name: a process that had no clip has no accuracies of its own, but takes part in their sum.
        names = sorted(set().union(*distributed.gather(list(self.accuracy))))
        for name in names:
            own = self.accuracy.get(name, torch.zeros_like(counts[0]))
            numbers[name] = distributed.all_sum(own) / counts.sum()
        return {name: value.item() for name, value in numbers.items()}
