"""A LARP tokenizer, from whatever eval/eval_larp_tokenizer.py takes; the best codes."""
from torch import nn

from training.load import load_larp_tokenizer


class Tokenizer(nn.Module):
    def __init__(self, checkpoint, version="sd"):
        super().__init__()
        self.model = load_larp_tokenizer(checkpoint, version)
        self.num_frames, self.size = self.model.config.frame_num, self.model.config.input_size

    def forward(self, video):
        return self.model.decode(self.model.encode(video), self.num_frames).clamp(0, 1), self.model.config.bits
