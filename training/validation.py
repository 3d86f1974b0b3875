"""Validation during training: of tokenizers on fixed clips, of generators on held-out codes, and samples with FVD. The
clips are shared by the processes."""
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from common import distributed
from common.console import print_main
from common.rng import Stream, generator
from data.clips import ClipDataset, ClipKey, Quarantine
from data.lists import VideoFile, check_classes, check_labels, list_csv, list_folder
from data.loader import make_loader
from data.video import write_video
from eval.fvd import fvd_scores
from eval.i3d import I3D
from eval.pictures import contact_sheet, outline
from eval.reconstruction import merge, reconstruct_rows, summary
from models.pretrained import WeightsError
from models.stlpips import perceptual_metric
from training.codes import Encode, Score, batches_from_video

Metric = TypeVar("Metric", bound=torch.nn.Module)


def validation_source(args: Namespace) -> str:
    """The folder or lists to validate on: --val_name or --val_csv if given; otherwise the training folder's name with
    _test for _train if there is such a folder, or the training lists with _val for _train; otherwise the training set,
    with a warning."""
    if args.video_name:
        trained, named = args.video_name, args.val_name
        sibling = args.video_name.replace("_train", "_test")
        source = named or (sibling if (Path(args.data_root) / sibling).is_dir() else trained)
    else:
        trained, named = args.csv_file, args.val_csv
        source = named or trained.replace("_train", "_val")
    if source == trained and not named:
        flag = "--val_name" if args.video_name else "--val_csv"
        print_main(f"validating on the training set, {trained}: give {flag} for other videos")
    return str(Path(args.data_root) / source) if args.video_name else source


def validation_files(args: Namespace) -> tuple[list[VideoFile], str]:
    """The videos to validate on, and their source (see `validation_source`)."""
    source = validation_source(args)
    return list_folder(source) if args.video_name else list_csv(source), source


def evenly_spaced(files: int, clips: int | None) -> list[int]:
    """`clips` indices spread evenly over `files` files; None: all indices."""
    clips = files if clips is None else min(clips, files)
    return [i * files // clips for i in range(clips)]


class Validation:
    """PSNR, SSIM, LPIPS or ST-LPIPS, and rFVD on one fixed clip each of `num_clips` files (None: all), with a contact
    sheet and an mp4.

    Short clips repeat their last frame, so that every clip has `num_frames` frames. A metric whose weights cannot be
    had is left out, with a message.
    """

    def __init__(
        self, files: Sequence[VideoFile], num_clips: int | None, num_frames: int, size: int, rule: str,
        device: torch.device, batch_size: int, num_workers: int, quarantine: Quarantine, perceptual: str,
        lpips_weights: str, timeout: float, fvd: bool = True,
    ):
        self.device = device
        keys = [ClipKey(position, index) for position, index in enumerate(evenly_spaced(len(files), num_clips))]
        mine = distributed.of_rank(keys)
        clips = ClipDataset(
            files, num_frames, size, rule=rule, resize="worker", short="repeat", quarantine=quarantine, damaged="skip",
            timeout=timeout,
        )
        batches = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
        self.loader = make_loader(clips, batches, min(num_workers, len(batches)), 2, pin_memory=device.type == "cuda")
        self.perceptual = self.available(perceptual, lambda: perceptual_metric(perceptual, weights=lpips_weights))
        self.i3d = self.available("rFVD", I3D.from_weights) if fvd and num_frames >= 10 else None

    def available(self, metric: str, build: Callable[[], Metric]) -> Metric | None:
        try:
            return build().to(self.device)
        except WeightsError as error:  # of a download; a given file that is wrong ends the run
            print_main(f"validation leaves {metric} out: {error}")
            return None

    def run(self, reconstruct: Callable[[Tensor, list[int]], Tensor], folder: Path) -> dict[str, float]:
        """Scores over the clips of all processes. Writes pictures of rank 0's first batch to `folder`.png and .mp4.

        reconstruct: as in `reconstruct_rows`.
        """
        rows, examples = reconstruct_rows(
            reconstruct, self.loader, self.device, self.i3d, perceptual=self.perceptual
        )
        if distributed.is_main() and examples:
            folder.parent.mkdir(parents=True, exist_ok=True)
            contact_sheet(folder.with_suffix(".png"), examples)
            pair = torch.cat([torch.cat(pair, dim=2) for pair in examples], dim=3)
            write_video(folder.with_suffix(".mp4"), pair)
        return summary(merge(distributed.gather(rows)), divisor="N-1")


def make_validation(args: Namespace, num_frames: int, size: int, rule: str, device: torch.device,
                    quarantine: Quarantine) -> Validation | None:
    """A Validation by the flags; None with --num_val 0."""
    if args.num_val == 0:
        return None
    return Validation(
        validation_files(args)[0], args.num_val, num_frames, size, rule, device, args.val_batch_size, args.num_workers,
        quarantine, args.perceptual, args.lpips_weights, args.decode_timeout, not args.no_fvd,
    )


class CodeStats:
    """How a codebook is used, and how well the prior predicts the codes, over all batches and processes."""

    def __init__(self, codebook_size: int, device: torch.device):
        self.counts = torch.zeros(codebook_size, dtype=torch.float64, device=device)
        self.accuracy: dict[str, Tensor] = {}

    def add(self, codes: Tensor, logs: dict[str, Tensor] | None = None) -> None:
        """codes: (B, N) long. logs: the model's, which hold the prior's accuracies (prior_top...) if it has a prior."""
        self.counts += codes.flatten().bincount(minlength=len(self.counts))
        for name, value in (logs or {}).items():
            if name.startswith("prior_top"):
                self.accuracy[name] = self.accuracy.get(name, 0) + value.double() * codes.numel()

    def summary(self) -> dict[str, float]:
        """code_use (the share of codes that occur), code_perplexity, and the prior's accuracies."""
        counts = distributed.all_sum(self.counts)
        share = counts / counts.sum()
        numbers = {"code_use": (share > 0).double().mean(), "code_perplexity": torch.special.entr(share).sum().exp()}
        # A process without clips has no accuracies, but must take part in their sums.
        names = sorted(set().union(*distributed.gather(list(self.accuracy))))
        for name in names:
            own = self.accuracy.get(name, torch.zeros_like(counts[0]))
            numbers[name] = distributed.all_sum(own) / counts.sum()
        return {name: value.item() for name, value in numbers.items()}


class HeldOut:
    """Codes of one fixed clip each of some held-out videos, encoded once and shared by the processes. Validation scores
    them, and samples of frame prediction continue them.

    clips: the videos; a damaged one is replaced, so that every key has a clip. keys: those of all processes. This
    process takes its share as SampleCheck does (`distributed.of_rank`), so that sample i can continue clip i.
    """

    def __init__(self, clips: ClipDataset, keys: list[ClipKey], encode: Encode, batch_size: int, num_workers: int,
                 device: torch.device):
        self.batch_size, self.device = batch_size, device
        mine = distributed.of_rank(keys)
        loader = make_loader(clips, [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)],
                             min(num_workers, len(mine)))
        batches = list(batches_from_video(loader, encode, False, device)) if mine else []
        none = [torch.empty(0)]  # of a process without clips
        self.codes = torch.cat([batch.codes.cpu() for batch in batches] or none)  # (n, N)
        self.conds = torch.cat([batch.cond.cpu() for batch in batches] or none)  # (n,) or (n, N)

    def cond(self, indices: Sequence[int]) -> Tensor:
        """The conditions of this process's clips at `indices`, which count the clips of all processes: (B,) labels, or
        (B, N) codes."""
        return self.conds[[index // distributed.world_size() for index in indices]].to(self.device)

    @torch.no_grad()
    def score(self, score: Score, labelled: bool) -> dict[str, float]:
        """Mean loss and accuracy over the clips of all processes. With `labelled` also loss_uncond and accuracy_uncond,
        with the labels hidden: the difference shows how much the labels help."""
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


def held_out_files(args: Namespace, files: Sequence[VideoFile], source: str,
                   num_classes: int | None) -> list[VideoFile]:
    """The videos to validate a generator on, which is trained on `files` of `source`. ValueError where its
    `num_classes` classes (None: it has none) are not theirs."""
    val_files, val_source = validation_files(args)
    if num_classes:
        check_labels(val_files, num_classes, val_source)
        if args.video_name:
            check_classes(files, val_files, source, val_source)
    return val_files


def held_out_keys(num_files: int, num_clips: int | None, seed: int) -> list[ClipKey]:
    """Keys of `num_clips` videos (None: all) in random order, so that the first few are of many classes."""
    order = generator(seed, 0, Stream.HELD_OUT).permutation(num_files)[:num_clips]
    return [ClipKey(position, int(index)) for position, index in enumerate(order)]


def make_held_out(
    args: Namespace, files: Sequence[VideoFile], clips: ClipDataset, encode: Encode, num_cond_frames: int,
    device: torch.device,
) -> tuple[HeldOut, "SampleCheck | None", list[str]]:
    """What the training of LARP's generator is validated by: the held-out codes, the samples (None where the flags ask
    for none), and the samples' captions. Sample i takes the label of held-out clip i, or continues its first frames.

    clips: of `files`, which are the videos to validate on.
    """
    keys = held_out_keys(len(files), args.num_val, args.seed)
    held_out = HeldOut(clips, keys, encode, args.val_batch_size, args.num_workers, device)
    keys = keys[: args.num_samples]
    given = f": {num_cond_frames} frames given" if num_cond_frames else ""
    captions, check = [caption(files[index]) + given for _, index, _ in keys if index is not None], None
    if keys:
        check = SampleCheck(clips, keys, args.sample_batch_size, args.num_workers, device, num_cond_frames,
                            not args.no_fvd)
    return held_out, check, captions


def caption(file: VideoFile) -> str:
    """A sample's caption on the contact sheet: the class of the clip whose label or first frames it has."""
    return Path(file.path).parent.name or f"class {file.label}"


# --- samples during training ---
class SampleCheck:
    """Samples during training: a contact sheet, an mp4, and the FVD of a few samples against as many fixed real clips.
    With so few clips the FVD shows progress, but is not a number to report.

    clips, keys: the real clips. num_given: sample i continues so many first frames of clip i, which stands above it in
    the pictures, where they are outlined; `clips` must then replace damaged ones.
    """

    def __init__(
        self, clips: ClipDataset, keys: list[ClipKey], batch_size: int, num_workers: int, device: torch.device,
        num_given: int = 0, fvd: bool = True,
    ):
        self.clips, self.num_samples, self.batch_size, self.num_workers = clips, len(keys), batch_size, num_workers
        self.num_given = num_given
        self.keys = distributed.of_rank(keys)
        self.real: Tensor | None = None
        self.i3d: I3D | None = None
        if fvd and clips.num_frames >= 10 and len(keys) > 1:
            try:
                self.i3d = I3D.from_weights().to(device)
            except OSError as error:
                print_main(f"FVD of samples is left out: {error}")

    @torch.inference_mode()
    def run(self, generate: Callable[[list[int]], Tensor], captions: list[str], folder: Path) -> dict[str, float]:
        """Write `folder`.png and `folder`.mp4. Returns {"fvd": ..., ...}, empty if I3D's weights cannot be had.

        generate: sample indices -> (B, 3, T, H, W) clips. captions: by sample index.
        """
        mine = distributed.of_rank(range(self.num_samples))
        fake = [torch.empty(0, 400)]
        shown: list[Tensor] = []
        for start in range(0, len(mine), self.batch_size):
            videos = generate(mine[start : start + self.batch_size]).clamp(0, 1)
            shown += list(videos[: 8 - len(shown)].cpu())
            if self.i3d is not None:
                fake.append(self.i3d(videos).cpu())
        if distributed.is_main():
            captions, rows = [captions[index] for index in mine[: len(shown)]], [shown]
            if self.num_given:
                frames = [self.clips[key]["frames"] for key in self.keys[: len(shown)]]
                rows = [[outline(video, self.num_given) for video in row]
                        for row in (self.clips.to_video({"frames": frames}, "cpu"), shown)]
            contact_sheet(folder.with_suffix(".png"), list(zip(*rows)), captions, ("real", "generated"), len(shown))
            write_video(folder.with_suffix(".mp4"), torch.cat([torch.cat(row, dim=3) for row in rows], dim=2))
        if self.i3d is None:
            return {}
        if self.real is None:
            device = next(self.i3d.parameters()).device
            batches = [self.keys[i : i + self.batch_size] for i in range(0, len(self.keys), self.batch_size)]
            real = (self.clips.to_video(batch, device)
                    for batch in make_loader(self.clips, batches, min(self.num_workers, len(batches)))
                    if len(batch["position"]))
            self.real = gather_rows([torch.empty(0, 400), *(self.i3d(video).cpu() for video in real)])
        return fvd_scores(self.real, gather_rows(fake))


def gather_rows(parts: list[Tensor]) -> Tensor:
    """The rows of all processes' tensors, in the order of the processes."""
    return torch.cat(distributed.gather(torch.cat(parts)))

