"""A TorchScript pair of encoder and decoder on clips in [-1, 1], such as NVIDIA's Cosmos tokenizers."""
import math

import torch
from torch import nn


class Tokenizer(nn.Module):
    def __init__(self, encoder, decoder, num_frames, size, codebook=None, bits=16):
        """encoder, decoder: TorchScript files. codebook: size of a discrete one's (64,000 of Cosmos DV), whose encoder
        gives indices first; otherwise a value of the latent takes `bits`, those of its dtype."""
        super().__init__()
        self.num_frames, self.size, self.bits = num_frames, size, math.log2(codebook) if codebook else bits
        self.encoder, self.decoder = torch.jit.load(encoder, "cpu"), torch.jit.load(decoder, "cpu")

    def forward(self, video):
        found = self.encoder((2 * video - 1).to(next(self.encoder.parameters()).dtype))
        found = found if isinstance(found, torch.Tensor) else found[0]
        return ((self.decoder(found) + 1) / 2).clamp(0, 1), self.bits * found[0].numel()
