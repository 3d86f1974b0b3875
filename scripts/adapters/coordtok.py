"""CoordTok, from a checkpoint of this project or the authors'; its planes stored in 8, 16 or 32 bits a value."""
from argparse import Namespace

from torch import nn

from models.triplane import stored
from training.load import load_coordtok


class Tokenizer(nn.Module):
    def __init__(self, checkpoint, plane_bits=16, **config):
        super().__init__()
        self.model, self.plane_bits = load_coordtok(checkpoint, Namespace(**config)), plane_bits
        self.num_frames, self.size = self.model.config.video_shape[:2]

    def forward(self, video):
        planes, bits = stored(self.model.encode(video), self.plane_bits)
        return self.model.render(planes).clamp(0, 1), bits
