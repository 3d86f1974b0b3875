"""Fast sampling from a decoder-only generator: one code after another, with a cache of keys and values.

On a CPU a step runs the model's own modules, with weights packed for few rows. On a GPU it runs fused kernels
(`decode_fused`) and is captured, with the draw of the next code, as one CUDA graph that serves all positions.
"""
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from models.larp_ar import LARPGenerator, LARPGeneratorConfig


class Linear(nn.Linear):
    """nn.Linear without bias. Between `start_decoding` and `stop_decoding`, on a CPU, a row of its result does not
    depend on the number of rows.

    BLAS chooses its kernel by row count, so rounding, and sometimes the sampled code, depends on the batch size.
    Multiples of eight rows have always given the same bits, for any number of threads, so rows are padded to one. In
    float32 the weight is also packed for oneDNN: for few rows MKL is less than half as fast.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)
        self.decoding = False
        self.packed: Tensor | None = None

    def start_decoding(self) -> None:
        weight = self.weight.detach()
        self.decoding = weight.device.type == "cpu"
        if self.decoding and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, 8)

    def stop_decoding(self) -> None:
        self.decoding, self.packed = False, None

    def forward(self, x: Tensor) -> Tensor:
        if not self.decoding:
            return F.linear(x, self.weight)
        num_rows = x.shape[:-1].numel()
        if num_rows % 8:
            rows = F.pad(x.flatten(0, -2), (0, 0, 0, -num_rows % 8))
            return self(rows)[:num_rows].unflatten(0, x.shape[:-1])
        if self.packed is None:
            return F.linear(x, self.weight)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


@contextmanager
def decoding(model: nn.Module) -> Iterator[None]:
    """`model` in evaluation mode, its linear layers ready to decode."""
    was_training = model.training
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    try:
        model.eval()
        for linear in linears:
            linear.start_decoding()  # at each call, as the weights may have changed since the last
        yield
    finally:
        for linear in linears:
            linear.stop_decoding()
        model.train(was_training)


class Window(NamedTuple):
    """Where in the cache a decoding pass writes, and which part it attends to."""

    position: Tensor  # (T,) long, of the tokens of this pass
    length: int  # how much of the cache is filled, this pass included
    rows: Tensor | None  # (B * n_head, length) int, on a CPU: where the values of each head of queries lie


def attend_one(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    """Attention of one query a head on a CPU. q: (B, H, 1, d); k: (B, H_kv, L, d); v: (B, H_kv, positions, d); rows:
    (B * H, L) int, those of v, flattened, that a query reads. Returns (B, H, 1, d).

    PyTorch's fused kernel splits the keys of a query over threads that the batch leaves idle, so the order of its sums
    depends on the batch; here it does not. Shared heads of keys are not copied, and an embedding bag (a weighted sum of
    rows) prefetches, so memory is read faster.
    """
    grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1]) * q.shape[-1] ** -0.5  # (B, H_kv, H / H_kv, d)
    scores = (k @ grouped.mT).mT.reshape(rows.shape)
    weight = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    return F.embedding_bag(rows, v.flatten(0, 2), mode="sum", per_sample_weights=weight).view(q.shape)


def value_rows(config: "LARPGeneratorConfig", num_sequences: int, length: int) -> Tensor:
    """`Window.rows` of sequences filled to `length`."""
    head = torch.arange(num_sequences * config.n_head) // (config.n_head // config.kv_heads)  # of keys and values
    return (head[:, None] * config.num_positions + torch.arange(length)).int()


@dataclass(frozen=True)
class Sampling:
    """How codes are drawn; see `LARPGenerator.generate`."""

    cfg_scale: float = 1.0
    num_guided: int = 0  # codes, from the first on, that are drawn with guidance
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    nll: bool = False  # whether the codes' negative log-likelihood is summed


class Draws:
    """The codes that a call of `generate` draws. Its tensors keep their addresses: captured steps read and write
    them."""

    def __init__(self, num_samples: int, num_codes: int, device: torch.device):
        self.uniform = torch.empty(num_samples, num_codes, dtype=torch.float64, device=device)
        self.codes = torch.empty(num_samples, num_codes, dtype=torch.long, device=device)
        self.nll = torch.empty(num_samples, device=device)
        self.last = torch.zeros(2 * num_samples, dtype=torch.long, device=device)  # codes; second half for guidance
        self.index = torch.zeros(1, dtype=torch.long, device=device)  # of the next code
        self.position = torch.zeros(1, dtype=torch.long, device=device)  # of the last code in the cache

    def start(self, uniform: Tensor, cls_token_num: int) -> None:
        self.uniform.copy_(uniform, non_blocking=True)
        self.nll.zero_()
        self.index.zero_()
        self.position.fill_(cls_token_num - 1)

    def add(self, logits: Tensor, sampling: Sampling) -> None:
        """Draw the next code of each clip. logits: (B, vocab_size) float32, or (2 B, vocab_size) with guidance, whose
        second half has no label."""
        num_samples = len(self.codes)
        scores = plain = logits[:num_samples]
        if len(logits) > num_samples:
            uncond = logits[num_samples:]
            scores = uncond + sampling.cfg_scale * (plain - uncond)
        probs = sampling_probs(scores, sampling.temperature, sampling.top_k, sampling.top_p)
        code = draw(probs, self.uniform.index_select(1, self.index)[:, 0])
        self.codes.index_copy_(1, self.index, code[:, None])
        if sampling.nll:
            self.nll += F.cross_entropy(plain, code, reduction="none")
        self.last.copy_(code.repeat(2))
        self.index += 1
        self.position += 1


class KVCache:
    """Keys and values of every layer for up to `rows` sequences, kept between calls; on a GPU also the captured steps
    and what they read."""

    def __init__(self, config: "LARPGeneratorConfig", rows: int, dtype: torch.dtype, device: torch.device):
        shape = (config.n_layer, 2, rows, config.kv_heads, config.num_positions, config.head_dim)
        self.buffer = torch.empty(shape, dtype=dtype, device=device)
        self.positions = torch.arange(config.num_positions, device=device)
        self.gates: list[Tensor] = []  # of each layer: w1 and w3 in one matrix
        self.draws: dict[int, Draws] = {}
        self.graphs: dict[tuple[int, bool, Sampling], torch.cuda.CUDAGraph] = {}
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.addresses: list[int] = []  # of the weights that the graphs read

    def fits(self, rows: int, dtype: torch.dtype, device: torch.device) -> bool:
        return rows <= self.buffer.shape[2] and (dtype, device) == (self.buffer.dtype, self.buffer.device)

    def read_weights(self, model: "LARPGenerator") -> None:
        """Join w1 and w3 of each layer, at each call, and drop the graphs if the weights have moved in memory."""
        if not self.gates:
            self.gates = [torch.empty_like(layer.feed_forward.w1.weight).repeat(2, 1) for layer in model.layers]
        for layer, gates in zip(model.layers, self.gates):
            torch.cat([layer.feed_forward.w1.weight, layer.feed_forward.w3.weight], out=gates)
        addresses = [tensor.data_ptr() for tensor in model.state_dict().values()]
        if self.addresses != addresses:
            self.addresses, self.graphs = addresses, {}


def cache_of(model: "LARPGenerator", rows: int) -> KVCache:
    """The cache of the model's last call where it is large enough, else a new one."""
    dtype, device = model.output.weight.dtype, model.output.weight.device
    if model.cache is None or not model.cache.fits(rows, dtype, device):
        model.cache = None  # before the new one is allocated
        model.cache = KVCache(model.config, rows, dtype, device)
    return model.cache


def generate(model: "LARPGenerator", cond: Tensor, sampling: Sampling, uniform: Tensor) -> Draws:
    """Draw clips, as `LARPGenerator.generate` says. uniform: (B, max_seq_len) float64 in [0, 1), on any device. The
    result's tensors are overwritten by the next call."""
    num_samples, num_codes = uniform.shape
    guided = sampling.num_guided > 0
    if guided:  # the second half of the batch has no label
        cond = torch.cat([cond, torch.full_like(cond, -1)])
    captured = cond.device.type == "cuda" and model.cuda_graphs and importlib.util.find_spec("triton") is not None
    # Tensors made in inference mode could not be written to outside of it by a later call.
    with (torch.inference_mode(False), torch.no_grad(), torch.cuda.device_of(cond),
          torch.autocast(cond.device.type, enabled=False), decoding(model)):
        cache = cache_of(model, len(cond))
        if num_samples not in cache.draws:
            cache.draws[num_samples] = Draws(num_samples, num_codes, cond.device)
        draws = cache.draws[num_samples]
        if captured:
            cache.read_weights(model)
            graphs = [capture(model, cache, draws, sampling, with_guidance) for with_guidance in (True, False)
                      if (0 if with_guidance else sampling.num_guided) < num_codes and (guided or not with_guidance)]
        draws.start(uniform, model.config.cls_token_num)
        draws.add(prefill(model, cache, cond), sampling)
        for i in range(1, num_codes):
            if captured:
                graphs[0 if i < sampling.num_guided else -1].replay()
            else:
                code = draws.last[: len(cond) if i < sampling.num_guided else num_samples]
                draws.add(decode_one(model, cache, code, model.config.cls_token_num + i - 1), sampling)
    return draws


def capture(
    model: "LARPGenerator", cache: KVCache, draws: Draws, sampling: Sampling, with_guidance: bool
) -> torch.cuda.CUDAGraph:
    """One decoding step and its draw as a CUDA graph, captured on the first use of a batch size and settings. Capturing
    overwrites `draws` and a cached position that is not yet written."""
    num_samples = len(draws.codes)
    key = num_samples, with_guidance, sampling
    if key not in cache.graphs:
        code = draws.last if with_guidance else draws.last[:num_samples]

        def step() -> None:
            draws.add(decode_fused(model, cache, code, draws.position), sampling)

        draws.start(draws.uniform, model.config.cls_token_num)
        stream = torch.cuda.Stream()  # libraries allocate in the first run, which must not be captured
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        cache.graphs[key] = graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=cache.pool, capture_error_mode="thread_local"):  # other threads pin memory
            step()
    return cache.graphs[key]


def _logits(model: "LARPGenerator", cache: KVCache, x: Tensor, position: Tensor, length: int) -> Tensor:
    """x: (B, T, dim) embedded tokens at `position` (T,). Returns logits (B, vocab_size) float32 after the last."""
    on_cpu = x.device.type == "cpu" and x.shape[1] == 1
    window = Window(position, length, value_rows(model.config, len(x), length) if on_cpu else None)
    x = x + model.abs_pe[:, position]
    for layer, keys_values in zip(model.layers, cache.buffer[:, :, : len(x)]):
        x = layer(x, keys_values, window)
    return model.output(model.norm(x[:, -1])).float()


def prefill(model: "LARPGenerator", cache: KVCache, cond: Tensor) -> Tensor:
    """Read the whole condition in one pass. Returns logits (B, vocab_size) float32 of the first code."""
    x = model.embed_condition(cond)
    return _logits(model, cache, x, cache.positions[: x.shape[1]], x.shape[1])


def decode_one(model: "LARPGenerator", cache: KVCache, code: Tensor, position: int) -> Tensor:
    """Read one code, (B,) long, at `position`. Returns logits (B, vocab_size) float32 of the next."""
    x = model.tok_embeddings(code)[:, None]
    return _logits(model, cache, x, cache.positions[position : position + 1], position + 1)


def decode_fused(model: "LARPGenerator", cache: KVCache, code: Tensor, position: Tensor) -> Tensor:
    """`decode_one` in eight kernels a layer, at a position, (1,) long, that only the device knows."""
    from models import decode_kernels as kernels  # needs Triton, which is not everywhere

    config = model.config
    processors = torch.cuda.get_device_properties(code.device).multi_processor_count if code.is_cuda else 1
    splits = kernels.num_splits(len(code) * config.kv_heads, config.num_positions, processors)
    x = model.tok_embeddings(code) + model.abs_pe[0].index_select(0, position)  # (B, dim)
    for layer, keys_values, gates in zip(model.layers, cache.buffer, cache.gates):
        attention, feed_forward = layer.attention, layer.feed_forward
        y = kernels.rms_norm(x, layer.attention_norm.weight, config.norm_eps)
        y = kernels.attend(F.linear(y, attention.wqkv.weight), keys_values, position, splits)
        x.addmm_(y, attention.wo.weight.T)
        y = kernels.rms_norm(x, layer.ffn_norm.weight, config.norm_eps)
        x.addmm_(kernels.silu_times(F.linear(y, gates)), feed_forward.w2.weight.T)
    return F.linear(kernels.rms_norm(x, model.norm.weight, config.norm_eps), model.output.weight).float()


def sampling_probs(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """The distribution that a code is drawn from: temperature, then top-k, then nucleus filtering (arXiv 1904.09751).

    logits: (B, vocab_size) float32.
    temperature: at least 1e-5, which is greedy except for near-ties.
    top_k: keep the k largest, and ties with the last of them; 0 keeps all.
    top_p: keep the largest up to the one at which their probability exceeds top_p; 1 keeps all.
    Returns probabilities (B, vocab_size) float32.
    """
    logits = logits / max(temperature, 1e-5)
    if top_k > 0:
        smallest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1:
        ordered, index = logits.sort(descending=True)
        before = F.pad(ordered.softmax(-1).cumsum(-1)[:, :-1], (1, 0))  # probability of all that is likelier
        logits = logits.masked_fill((before > top_p).scatter(1, index, before > top_p), -torch.inf)
    return logits.softmax(-1)


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """One code a row, by the inverse of the distribution function. probs: (B, vocab_size), need not sum to one.
    uniform: (B,) float64 in [0, 1). Returns (B,) long."""
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    code = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return code.clamp_(max=probs.shape[-1] - 1)


def uniform_numbers(seeds: Sequence | Tensor | None, num_samples: int, num_codes: int) -> Tensor:
    """(num_samples, num_codes) float64 in [0, 1) on the CPU: row i from seeds[i] alone, all of it before decoding."""
    if seeds is None:
        return torch.rand(num_samples, num_codes, dtype=torch.float64)
    if len(seeds) != num_samples:
        raise ValueError(f"{len(seeds)} seeds for {num_samples} clips; give one each")
    # NumPy's generator: PyTorch's uses only 32 bits of a seed, and takes no pairs.
    seeds = seeds.tolist() if isinstance(seeds, Tensor) else seeds
    return torch.from_numpy(np.stack([np.random.default_rng(seed).random(num_codes) for seed in seeds]))
