"""A video VAE of diffusers on clips in [-1, 1]: kind=AutoencoderKLWan, AutoencoderKLCogVideoX, ..."""
from torch import nn


class Tokenizer(nn.Module):
    def __init__(self, kind, weights, num_frames, size, **options):
        """weights: folder or hub id. options: of from_pretrained (subfolder=vae). Latents are stored as float16."""
        super().__init__()
        import diffusers  # not a requirement of this project: pip install diffusers

        self.num_frames, self.size = num_frames, size
        self.vae = getattr(diffusers, kind).from_pretrained(weights, **options)

    def forward(self, video):
        latent = self.vae.encode((2 * video - 1).to(self.vae.dtype)).latent_dist.mode().half()
        return ((self.vae.decode(latent.to(self.vae.dtype)).sample + 1) / 2).clamp(0, 1), 16 * latent[0].numel()
