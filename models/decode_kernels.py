"""Three Triton kernels for decoding one token on a GPU. A step of the generator is bound by the time to read weights
and cache, and to launch kernels; these read each value once and replace about sixteen kernels of a layer by four.

Triton comes with PyTorch on Linux. With TRITON_INTERPRET=1 the same code runs on CPU tensors, which is how it is tested
on machines without a GPU.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 64  # cached positions that a program reads at a time
MAX_SPLITS = 16


@triton.jit
def _rms_norm(x, weight, out, dim, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < dim
    value = tl.load(x + row * dim + column, mask=inside, other=0.0).to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(value * value) / dim + eps)
    kept = (value * scale).to(out.dtype.element_ty).to(tl.float32)  # rounds where the module does
    tl.store(out + row * dim + column, kept * tl.load(weight + column, mask=inside, other=0.0), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: (rows, dim) contiguous. Returns (rows, dim), what `RMSNorm` returns."""
    out = torch.empty_like(x)
    _rms_norm[(len(x),)](x, weight, out, x.shape[1], eps, BLOCK=triton.next_power_of_2(x.shape[1]))
    return out


@triton.jit
def _silu_times(x, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(x + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + row * 2 * width + width + column, mask=inside, other=0.0)
    gate = (gate * tl.sigmoid(gate)).to(value.dtype)  # rounds where the module does
    tl.store(out + row * width + column, gate * value, mask=inside)


def silu_times(x: Tensor) -> Tensor:
    """x: (rows, 2 width) contiguous, gates before values. Returns (rows, width): silu(gates) * values."""
    width = x.shape[1] // 2
    out = x.new_empty(len(x), width)
    _silu_times[(len(x), triton.cdiv(width, 1024))](x, out, width, BLOCK=1024)
    return out


@triton.jit
def _attend(
    qkv, keys, values, position, out, partial, kv_heads, stride_row, stride_head, scale,
    GROUP: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
):
    """One program a sequence, head of keys and values, and share of the cached positions. Each of TILE lanes keeps the
    running softmax of its positions; lanes are combined once, at the end."""
    row, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    heads = kv_heads * GROUP
    column = tl.arange(0, WIDTH)
    inside = column < HEAD
    place = tl.load(position)
    qkv += row * (heads + 2 * kv_heads) * HEAD
    cached = row * stride_row + head * stride_head
    key = tl.load(qkv + (heads + head) * HEAD + column, mask=inside, other=0.0)
    value = tl.load(qkv + (heads + kv_heads + head) * HEAD + column, mask=inside, other=0.0)
    if split == 0:
        tl.store(keys + cached + place * HEAD + column, key, mask=inside)
        tl.store(values + cached + place * HEAD + column, value, mask=inside)

    share = tl.cdiv(tl.cdiv(place, SPLITS), TILE) * TILE  # of the positions before this one
    start = split * share
    end = tl.minimum(start + share, place)
    lane = tl.arange(0, TILE)
    for g in tl.static_range(GROUP):
        query = tl.load(qkv + (head * GROUP + g) * HEAD + column, mask=inside, other=0.0).to(tl.float32) * scale
        largest = tl.full((TILE,), -1e30, tl.float32)
        total = tl.zeros((TILE,), tl.float32)
        mean = tl.zeros((TILE, WIDTH), tl.float32)
        for first in range(start, end, TILE):
            there = first + lane < end
            where = cached + (first + lane)[:, None] * HEAD + column[None]
            seen = there[:, None] & inside[None]
            k = tl.load(keys + where, mask=seen, other=0.0).to(tl.float32)
            v = tl.load(values + where, mask=seen, other=0.0).to(tl.float32)
            score = tl.where(there, tl.sum(k * query[None], axis=1), -1e30)
            new = tl.maximum(largest, score)
            kept, weight = tl.exp(largest - new), tl.where(there, tl.exp(score - new), 0.0)
            total = total * kept + weight
            mean = mean * kept[:, None] + v * weight[:, None]
            largest = new
        # The token itself, whose key and value are not read back, belongs to the first share.
        own = tl.where(split == 0, tl.sum(query * key.to(tl.float32)), -1e30)
        highest = tl.maximum(tl.max(largest), own)
        kept = tl.exp(largest - highest)
        own = tl.where(split == 0, tl.exp(own - highest), 0.0)
        total_all = tl.sum(total * kept) + own
        summed = tl.sum(mean * kept[:, None], axis=0) + value.to(tl.float32) * own
        query_head = row * heads + head * GROUP + g
        if SPLITS == 1:
            tl.store(out + query_head * HEAD + column, summed / total_all, mask=inside)
        else:
            at = (query_head * SPLITS + split) * (WIDTH + 2)
            tl.store(partial + at + column, summed)
            tl.store(partial + at + WIDTH, highest)
            tl.store(partial + at + WIDTH + 1, total_all)


@triton.jit
def _merge(partial, out, HEAD: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr):
    query_head = tl.program_id(0).to(tl.int64)
    column, split = tl.arange(0, WIDTH), tl.arange(0, SPLITS)
    at = (query_head * SPLITS + split) * (WIDTH + 2)
    highest = tl.load(partial + at + WIDTH)
    kept = tl.exp(highest - tl.max(highest))
    total = tl.sum(tl.load(partial + at + WIDTH + 1) * kept)
    summed = tl.sum(tl.load(partial + at[:, None] + column[None]) * kept[:, None], axis=0)
    tl.store(out + query_head * HEAD + column, summed / total, mask=column < HEAD)


def attend(qkv: Tensor, cache: Tensor, position: Tensor, splits: int) -> Tensor:
    """Write a token's keys and values into the cache and attend to all that is filled, itself included.

    qkv: (rows, (heads + 2 kv_heads) head_dim) contiguous. cache: (2, rows or more, kv_heads, positions, head_dim), of
    one layer. position: (1,) long on the device, so that one captured step serves all positions. splits: programs that
    share the positions of one head (1, 2, 4, ...; see `num_splits`). Returns (rows, heads head_dim).
    """
    keys, values = cache
    _, kv_heads, _, head_dim = keys.shape
    rows, heads = len(qkv), qkv.shape[1] // head_dim - 2 * kv_heads
    width = triton.next_power_of_2(head_dim)
    out = qkv.new_empty(rows, heads * head_dim)
    partial = qkv.new_empty(rows * heads * splits * (width + 2) if splits > 1 else 1, dtype=torch.float32)
    _attend[(rows, kv_heads, splits)](
        qkv, keys, values, position, out, partial, kv_heads, keys.stride(0), keys.stride(1), head_dim**-0.5,
        GROUP=heads // kv_heads, HEAD=head_dim, WIDTH=width, TILE=TILE, SPLITS=splits,
    )
    if splits > 1:
        _merge[(rows * heads,)](partial, out, HEAD=head_dim, WIDTH=width, SPLITS=splits)
    return out


def num_splits(programs: int, positions: int, processors: int) -> int:
    """How many programs share the positions of a head, so that at least four run on each of the GPU's processors while
    each reads two tiles of a full cache or more."""
    splits = 1
    while splits < MAX_SPLITS and programs * splits < 4 * processors and positions // (2 * splits) >= 2 * TILE:
        splits *= 2
    return splits
