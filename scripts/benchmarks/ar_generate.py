"""Codes per second of LARPGenerator.generate, beside plain eager decoding of the same model in the same run.

    python -m scripts.benchmarks.ar_generate --model llama-abs-S --batch 8 --threads 2
    python -m scripts.benchmarks.ar_generate --model llama-abs-LP --batch 1 8 64 --cfg_scale 1 1.25 --dtype bfloat16

The plain path is the usual one (gpt-fast's, as the released sampling code has it, not compiled): caches built at each
call, shared heads repeated, attention over the full length under a mask with the maths kernel, the host reading every
code. The bandwidth is that of what a step cannot but read, weights and filled cache; the limit is that of a plain sum.
"""
import argparse
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.decoding import sampling_probs
from models.larp_ar import SIZES, LARPGenerator
from scripts.benchmarks.common import add_record, alternate, kernels, record


@torch.no_grad()
def plain_generate(model: LARPGenerator, cond: torch.Tensor, cfg_scale: float, num_codes: int) -> torch.Tensor:
    """(B,) labels -> (B, num_codes) codes."""
    config, device, dtype = model.config, cond.device, model.output.weight.dtype
    if cfg_scale != 1:
        cond = torch.cat([cond, torch.full_like(cond, -1)])
    shape = (len(cond), config.kv_heads, config.num_positions, config.head_dim)
    caches = [torch.zeros(2, *shape, device=device, dtype=dtype) for _ in model.layers]
    causal = torch.ones(config.num_positions, config.num_positions, dtype=torch.bool, device=device).tril()
    codes = []
    x = model.embed_condition(cond)
    for i in range(num_codes):
        position = torch.tensor([i], device=device)
        x = x + model.abs_pe[:, position]
        for layer, cache in zip(model.layers, caches):
            attention = layer.attention
            qkv = attention.wqkv(layer.attention_norm(x)).unflatten(-1, (-1, config.head_dim)).transpose(1, 2)
            q, k, v = qkv.split([config.n_head, config.kv_heads, config.kv_heads], dim=1)
            cache[0][:, :, position] = k
            cache[1][:, :, position] = v
            k, v = (part.repeat_interleave(config.n_head // config.kv_heads, dim=1) for part in cache)
            with sdpa_kernel(SDPBackend.MATH):
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=causal[position][None, None])
            x = x + attention.wo(y.transpose(1, 2).flatten(2))
            x = x + layer.feed_forward(layer.ffn_norm(x))
        logits = model.output(model.norm(x))[:, -1].float()
        if cfg_scale != 1:
            plain, uncond = logits.chunk(2)
            logits = uncond + cfg_scale * (plain - uncond)
        code = torch.multinomial(sampling_probs(logits), 1)
        code.tolist()
        codes.append(code)
        x = model.tok_embeddings(code.repeat(len(cond) // len(code), 1))
    return torch.cat(codes, dim=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="llama-abs-S")
    parser.add_argument("--batch", type=int, nargs="+", default=[8])
    parser.add_argument("--cfg_scale", type=float, nargs="+", default=[1.0], help="1: no guidance")
    parser.add_argument("--codes", type=int, default=1024, help="codes of a clip")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--plain_codes", type=int, help="of the plain way, whose steps take equal time (default: all)")
    parser.add_argument("--profile", action="store_true", help="print the kernels of a call; GPU only")
    parser.add_argument("--repeats", type=int, default=1, help="timed runs of each, in turn; the median counts")
    add_record(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)

    model = LARPGenerator(**SIZES[args.model], max_seq_len=args.codes).eval().to(device, dtype)
    block = torch.ones(64 << 20, device=device)
    block.sum()
    limit = block.nbytes / alternate({"sum": block.sum}, 10, device)["sum"] / 1e9
    del block
    print(f"{args.model}, {args.codes} codes, {args.dtype}, {device}, {args.threads} threads; limit {limit:.0f} GB/s")
    plain_codes = args.plain_codes or args.codes
    weights = sum(parameter.nbytes for parameter in [*model.layers.parameters(), *model.output.parameters()])
    for batch in args.batch:
        for cfg_scale in args.cfg_scale:
            cond = torch.arange(batch, device=device) % model.config.num_classes
            rows = batch * (1 + (cfg_scale != 1))
            ways = {
                "ours": partial(model.generate, cond, cfg_scale),
                "plain": partial(plain_generate, model, cond, cfg_scale, plain_codes),
            }
            ours, plain = alternate(ways, args.repeats, device).values()  # the first round captures the graphs
            plain *= args.codes / plain_codes
            config = model.config
            kept = 2 * config.n_layer * config.kv_heads * config.head_dim * rows * dtype.itemsize  # of one position
            achieved = (weights + kept * config.num_positions / 2) * args.codes / ours / 1e9
            print(
                f"batch {batch:3d}, cfg_scale {cfg_scale}: {batch * args.codes / ours:8.0f} codes/s"
                f" ({ours / args.codes * 1e3:.2f} ms a step, {achieved:.1f} GB/s, {achieved / limit:.0%} of the limit),"
                f" plain {batch * args.codes / plain:8.0f} codes/s ({plain / args.codes * 1e3:.2f} ms),"
                f" ratio {plain / ours:.2f}",
                flush=True,
            )
            record(args.record, f"larp_ar sampling, batch {batch}", f"guidance {cfg_scale}", plain / ours)
            if args.profile:
                print(kernels(ways["ours"]), flush=True)


if __name__ == "__main__":
    main()
