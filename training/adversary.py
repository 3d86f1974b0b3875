"""The discriminator of a LARP tokenizer in training: its optimizer, its LeCam averages, and one update of it."""
from argparse import Namespace
from typing import NamedTuple

import torch
from torch import Tensor

from common import distributed
from models.discriminator import Discriminator
from models.gan import LeCam, discriminator_loss, r1_penalty
from models.larp_tokenizer import TokenizerOutput
from training.log import NonFiniteGuard
from training.optim import Precision, adam, update


class MicroBatch(NamedTuple):
    video: Tensor  # (B, 3, T, H, W) in [0, 1]
    positions: list[int]  # the clips' numbers in the run; they seed all random draws
    paths: list[str]


Round = tuple[TokenizerOutput, list[torch.Generator]]  # a micro-batch's reconstruction, and its clips' generators


def mean_logits(logits: Tensor) -> Tensor:
    """logits: (2 B,), real clips first, then reconstructions. Returns (2,) float32, the mean of each half."""
    return torch.stack([part.float().mean() for part in logits.chunk(2)])


def mean_of(values: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Each value's mean over the micro-batches, detached."""
    return {name: torch.stack([one[name].detach().float() for one in values]).mean(0) for name in values[0]}


class Adversary:
    """A discriminator and everything that trains it. `parts` is what a checkpoint saves."""

    def __init__(self, discriminator: Discriminator, args: Namespace, precision: Precision, device: torch.device):
        self.net, self.args, self.precision, self.device = discriminator, args, precision, device
        self.lecam = LeCam().to(device)
        self.optimizer = adam(discriminator.parameters(), args.disc_lr, betas=(0.5, 0.9))
        self.scaler = precision.make_scaler()
        self.parts = {"discriminator": discriminator, "lecam": self.lecam, "disc_optimizer": self.optimizer,
                      "disc_scaler": self.scaler}

    def wrap(self) -> None:
        """Put the discriminator in DDP if there are several processes. Call after compiling, before `update`."""
        self.model = distributed.wrap(self.net, self.device, static_graph=False)  # at times frozen

    def update(
        self, step: int, micros: list[MicroBatch], rounds: list[Round], guard: NonFiniteGuard
    ) -> dict[str, Tensor]:
        """One optimizer step on the micro-batches and their reconstructions. Returns the values to log."""
        args, num, values = self.args, len(micros), []
        pairs = [torch.cat([micro.video, output.video.detach().float()])
                 for micro, (output, _) in zip(micros, rounds)]
        if num > 1:  # LeCam needs the means over the whole batch before the first backward pass
            with torch.no_grad(), self.precision.autocast():
                whole = distributed.all_mean(torch.stack([mean_logits(self.net(pair)) for pair in pairs]).mean(0))
        for i, (micro, pair, (_, generators)) in enumerate(zip(micros, pairs, rounds), 1):
            noise = torch.stack([torch.randn(2, generator=one, device=self.device) for one in generators], 1)  # (2, B)
            with distributed.sync_gradients(self.model, i == num):
                with self.precision.autocast():
                    logits = self.model(pair)
                real, fake = logits.chunk(2)
                loss, logs = discriminator_loss(real, fake, args.disc_loss, noise)
                means = mean_logits(logits)
                means = distributed.all_mean(means) if num == 1 else whole + (means - means.detach())
                logs["lecam"] = self.lecam(*means)
                loss = loss + args.lecam_weight * logs["lecam"]
                if args.r1_weight > 0:
                    logs["r1"] = r1_penalty(self.net, micro.video)
                    loss = loss + args.r1_weight * logs["r1"]
                self.scaler.scale(loss / num).backward()
            guard.watch(step, loss, micro.paths)
            values.append({"disc": loss, **logs})
        self.lecam.update(*means)
        update(self.optimizer, self.scaler, args.clip_grad)
        return mean_of(values)
