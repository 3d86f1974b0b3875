"""Run by test_larp_ar.py with TRITON_INTERPRET=1: the fused kernels on CPU tensors against the modules."""
import torch

from models import decode_kernels
from models.decoding import KVCache, decode_fused, decode_one, decoding
from models.larp_ar import LARPGenerator


@torch.no_grad()
def compare(splits: int, **config) -> None:
    torch.manual_seed(0)
    decode_kernels.num_splits = lambda *_: splits
    size = {"n_layer": 1, "n_head": 4, "dim": 96, "multiple_of": 16, "num_classes": 7, "vocab_size": 50}
    model = LARPGenerator(**size, max_seq_len=150, **config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    caches = [KVCache(model.config, 3, torch.float32, torch.device("cpu")) for _ in range(2)]
    past = torch.randn_like(caches[0].buffer)
    for cache in caches:
        cache.buffer.copy_(past)
    caches[1].read_weights(model)
    with decoding(model):
        for position in (0, 64, 149):
            code = torch.randint(50, (2,))  # fewer than the cache has rows for
            for cache in caches:
                cache.buffer[:, :, :, :, position:] = torch.nan  # not to be read before it is written
            plain = decode_one(model, caches[0], code, position)
            fused = decode_fused(model, caches[1], code, torch.tensor([position]))
            torch.testing.assert_close(fused, plain, atol=1e-5, rtol=0)
            for cache in caches:
                cache.buffer.copy_(past)


compare(splits=1)
compare(splits=2, n_kv_head=2)
compare(splits=4, n_kv_head=1, use_fixed_pe=True)
