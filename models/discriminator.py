"""LARP's video discriminator (arXiv 2410.21264): a ViT on tubelets that judges a clip by its class token."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from models.configs import DiscriminatorConfig
from models.layers import Blocks, TubeletEmbedding, sincos_3d, vit_block


class Discriminator(nn.Module):
    pos_embed: Tensor

    def __init__(self, **config):
        super().__init__()
        self.config = c = DiscriminatorConfig(**config)
        tubelet = (c.temporal_patch_size, c.patch_size, c.patch_size)
        side = c.input_size // c.patch_size
        table = sincos_3d(c.hidden_size, c.frame_num // c.temporal_patch_size, side, side)
        self.register_buffer("pos_embed", table[None], persistent=False)  # (1, L, D), the class token has none
        self.cls_token = nn.Parameter(torch.empty(1, 1, c.hidden_size))
        self.x_embedder = nn.Sequential(OrderedDict(proj=TubeletEmbedding(c.in_channels, c.hidden_size, tubelet)))
        blocks = Blocks(vit_block(c.hidden_size, c.n_heads, qkv_bias=False, eps=1e-5) for _ in range(c.n_layers))
        self.transformer_encoder = nn.Sequential(OrderedDict(blocks=blocks))
        self.norm_final = nn.LayerNorm(c.hidden_size, eps=1e-6)
        self.fc = nn.Linear(c.hidden_size, 1)
        self.initialize()

    def initialize(self) -> None:
        xavier_linears(self)
        nn.init.xavier_uniform_(self.cls_token)

    def forward(self, video: Tensor) -> Tensor:
        """video: (B, 3, T, H, W) in [0, 1]; T may be less than the configured frames. Returns (B,) logits, high for
        real."""
        x = self.x_embedder(video)  # (B, L, D)
        x = x + self.pos_embed[:, : x.shape[1]]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, 1 + L, D)
        x = self.transformer_encoder(x)
        return self.fc(self.norm_final(x[:, 0])).squeeze(-1)  # (B,)


def xavier_linears(model: nn.Module) -> None:
    """Xavier-uniform linears and patch convolutions, the latter as the linear maps they are; biases 0."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv3d)):
            nn.init.xavier_uniform_(module.weight.flatten(1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
