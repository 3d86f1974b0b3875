"""Sampling: trained SiTs, their planes of given sample indices, and samples during training."""
import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.clips import ClipDataset, ClipKey, make_loader
from data.video import to_video, write_video
from eval import fvd
from eval.i3d import I3D
from eval.pictures import contact_sheet
from models.coordtok import CoordTok
from models.interpolant import Interpolant, draw_noise, noise_stream, sample_generators
from models.planes import Planes
from models.released import build, load_state, read_sit_statistics
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
                       help="checkpoint or folder of them, or its export, ours; or the authors' run folder or "
                       ".pt file")
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
    if path.is_dir() and not checkpoint.is_export(path) and not list(path.glob("step_*.pt")):
        path = path / f"{args.sit_ckpt_iter:07d}.pt"
    given = {name: getattr(args, name) for name in SIT_FLAGS if hasattr(args, name)}
    if path.exists() and checkpoint.is_ours(path):
        state = checkpoint.expect(checkpoint.load(path), "sit", f"--sit_model {path}")
        for name, value in given.items():
            check_carried(name, value, state["args"][name], path)
        sit, interpolant = build(SiT, state["config"], state.path), Interpolant(**state["interpolant"])
        load_state(sit, state["ema"], state.path)
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

    clips, keys: the real ones. Too few for a number to report; good for its course. continued: sample i continues clip
    i, which stands above it in the pictures; `clips` must then replace damaged ones.
    """

    def __init__(
        self, clips: ClipDataset, keys: list[ClipKey], batch_size: int, num_workers: int, device: torch.device,
        continued: bool = False,
    ):
        self.clips, self.num_samples, self.batch_size, self.num_workers = clips, len(keys), batch_size, num_workers
        self.continued = continued
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
            captions, rows = [captions[index] for index in mine[: len(shown)]], [shown]
            if self.continued:
                frames = [self.clips[key]["frames"] for key in self.keys[: len(shown)]]
                rows = [list(to_video(frames, self.clips.size, self.clips.rule, torch.device("cpu"))), shown]
            contact_sheet(folder.with_suffix(".png"), list(zip(*rows)), captions, ("real", "generated"), len(shown))
            write_video(folder.with_suffix(".mp4"), torch.cat([torch.cat(row, dim=3) for row in rows], dim=2))
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


def differences(there: dict, here: dict) -> str:
    """What two sets of settings do not have in common, as text; empty where they are equal."""
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    return ", ".join(f"{name} {there.get(name)} there, {here.get(name)} here" for name in names)
