"""CUDA tensors without data, on a machine without a GPU. Inside `fake_cuda()` scripts run as on a GPU, tensors on the
CPU are real, and what the device would do is counted.

    with fake_cuda() as cuda:
        script.main()

It rests on parts of PyTorch that are not public: `unavailable` says where it cannot work.
"""
import contextlib
import ctypes
import functools
import linecache
import math
import os
import subprocess
import sys
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

ROOT = Path(__file__).parents[1]
aten = torch.ops.aten
# Operations whose outcome the host must know: the size of a result, or a value.
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique2, aten.unique_dim,
         aten.bincount, aten.repeat_interleave}
NO_KERNEL = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten.detach,
             aten._unsafe_view, aten._reshape_alias, aten.lift_fresh}
ROWS = {aten.embedding, aten.index, aten.index_select, aten.gather}  # which read some of what they are given


class FakeCuda(TorchDispatchMode):
    """While `counting`, by the line of the project that asks for it: `reads`, values or sizes that the host waits for;
    `blocking`, copies to the device that the host waits for, which are all but non-blocking ones from pinned memory;
    `mixed`, operations of CUDA tensors that are given a CPU tensor.

    Always: `live`, bytes of the tensors on the device, and `peak`, their most since it was last set; `kernels`, by
    operation, and `read_bytes`, of what they are given.
    """

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.counting = False
        self.reads, self.blocking, self.mixed, self.kernels = Counter(), Counter(), Counter(), Counter()
        self.live = self.peak = self.read_bytes = 0
        self.storages = {}
        self.pinned = weakref.WeakSet()  # storages

    def count(self, counter: Counter, what: str) -> None:
        if self.counting:
            counter[f"{what} {place()}"] += 1

    def waits(self) -> Counter:
        """All that a training step should not do."""
        return self.reads + self.blocking + self.mixed

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):  # half of all calls
            return args[0].fake_device
        packet, device = func.overloadpacket, kwargs.get("device")
        to_cuda = device is not None and torch.device(device).type == "cuda"
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        real = [x for x in tensors if not isinstance(x, FakeTensor)]
        if len(real) == len(tensors) and not to_cuda:
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled() and func.namespace == "aten" and func._can_decompose() and (
            not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "Meta")
        ):
            with self:  # what autograd would have taken apart arrives whole
                return func.decompose(*args, **kwargs)
        if packet in READS:
            self.count(self.reads, packet.__name__)
        if packet is aten._local_scalar_dense:
            dtype = args[0].dtype
            return False if dtype is torch.bool else 0.5 if dtype.is_floating_point else -1  # nothing is non-finite
        source = args[1] if packet is aten.copy_ else args[0] if packet is aten._to_copy else None
        if isinstance(source, FakeTensor) and (packet is aten._to_copy and device is not None and not to_cuda or real):
            self.count(self.reads, "copy to the CPU")
            return real[0] if real else torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        if source is not None and real:
            waits = not (kwargs.get("non_blocking") or args[2:3] == (True,))
            if waits or source.untyped_storage() not in self.pinned:
                self.count(self.blocking, "copy to the device")
        elif real:
            self.count(self.mixed, f"{packet.__name__} of a CPU tensor {tuple(real[0].shape)}")
        if kwargs.get("generator") is not None:
            kwargs = {**kwargs, "generator": None}
        if real:
            args, kwargs = tree_map_only(
                Tensor, lambda x: x if isinstance(x, FakeTensor) else self.fake.from_tensor(x), (args, kwargs)
            )
        with self.fake:
            if packet is aten.cudnn_grid_sampler:  # PyTorch has no rule for its shape
                out = args[0].new_empty(*args[0].shape[:2], *args[1].shape[1:3])
            elif packet is aten.cudnn_grid_sampler_backward:
                out = torch.empty_like(args[0]), torch.empty_like(args[1])
            else:
                out = func(*args, **kwargs)
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not view and packet not in NO_KERNEL:
            self.launch(packet.__name__, sum(map(size, tree_leaves(out) if packet in ROWS else tensors)))
        for tensor in tree_leaves(out):
            if isinstance(tensor, FakeTensor) and tensor.fake_device.type == "cuda":
                self.own(tensor.untyped_storage())
        return out

    def launch(self, name: str, read_bytes: int) -> None:
        self.kernels[name] += 1
        self.read_bytes += read_bytes

    def own(self, storage: torch.UntypedStorage) -> None:
        """Count a storage as live until it is freed. The allocator's blocks are multiples of 512 bytes."""
        key, size = storage._cdata, math.ceil(storage.nbytes() / 512) * 512
        if key in self.storages:
            return

        def free(_) -> None:
            self.live -= size
            del self.storages[key]

        self.storages[key] = weakref.ref(storage, free)
        self.live += size
        self.peak = max(self.peak, self.live)

    def pin(self, tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        self.pinned.add(copy.untyped_storage())
        return copy


def size(tensor: Tensor) -> int:
    """Bytes, each of an expanded dimension once."""
    lengths = (length if stride else 1 for length, stride in zip(tensor.shape, tensor.stride()))
    return math.prod(lengths) * tensor.element_size()


def place() -> str:
    """The innermost line of the project that is being run."""
    frame = sys._getframe(1)
    while frame:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path.name != "fake_cuda.py" and "site-packages" not in path.parts:
            return f"{path.relative_to(ROOT)}:{frame.f_lineno} {linecache.getline(str(path), frame.f_lineno).strip()}"
        frame = frame.f_back
    return "backward"


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """F.scaled_dot_product_attention, whose choice of a kernel asks the driver. Assumed: flash attention in half
    precision without a mask, else the memory-efficient kernel."""
    if not isinstance(query, FakeTensor):
        return REAL_ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = (x.to(dtype) for x in (query, key, value))
    if not query.dtype == key.dtype == value.dtype:
        raise RuntimeError(f"query, key and value differ: {query.dtype}, {key.dtype}, {value.dtype}")
    if query.dtype in (torch.float16, torch.bfloat16) and attn_mask is None:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    if attn_mask is not None:
        if attn_mask.dtype is torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
    needs_grad = torch.is_grad_enabled() and query.requires_grad
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, needs_grad, dropout_p, is_causal, scale=scale
    )[0]


REAL_ATTENTION = F.scaled_dot_product_attention


def apply(module: torch.nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> torch.nn.Module:
    """nn.Module._apply, which writes into the parameters that there are, and of real ones cannot make fake ones."""
    for child in module.children():
        child._apply(function)
    with torch.no_grad():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = torch.nn.Parameter(function(value.detach()), value.requires_grad)
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = function(value)
    return module


class FakeGenerator(torch.Generator):
    """A generator of a device that is not there. Its numbers are not used."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls)

    def __init__(self, device="cpu"):
        self.place = torch.device(device)

    @property
    def device(self) -> torch.device:
        return self.place


class Inline:
    """A ThreadPoolExecutor without a thread, since modes are of one thread: it runs what is asked for."""

    def __init__(self, _=1):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *args):
        return types.SimpleNamespace(result=lambda: function(*args))


@contextlib.contextmanager
def context_unasked() -> Iterator[None]:
    """Autograd asks CUDA's hooks whether a device has a context, which fails without a driver. Here they say no: entry
    4 of the virtual functions of at::CUDAHooksInterface, behind two words of type information, is replaced."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    hooks = library._ZN2at6detail12getCUDAHooksEv
    hooks.restype = ctypes.c_void_p
    pointer = ctypes.cast(hooks(), ctypes.POINTER(ctypes.c_void_p))
    released, word = pointer[0], ctypes.sizeof(ctypes.c_void_p)
    table = (ctypes.c_void_p * 130)()
    ctypes.memmove(table, released - 2 * word, ctypes.sizeof(table))
    answer = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_byte)(lambda hooks, device: False)
    table[2 + 4] = ctypes.cast(answer, ctypes.c_void_p).value
    pointer[0] = ctypes.addressof(table) + 2 * word
    try:
        yield
    finally:
        pointer[0] = released


@contextlib.contextmanager
def fake_cuda(project: bool = True) -> Iterator[FakeCuda]:
    """What is run inside finds one CUDA device. project: replace parts of this project too. `probe` does not, so that a
    part that has moved fails tests in place of skipping them."""
    torch._C._ensureCUDADeviceGuardSet()
    cuda = FakeCuda()
    replaced = {
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.is_bf16_supported": lambda *_, **__: True,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.set_device": lambda _: None,
        "torch.cuda.get_device_properties": lambda _: types.SimpleNamespace(multi_processor_count=132),
        "torch.cuda._lazy_init": lambda: None,
        "torch.cuda.is_current_stream_capturing": lambda: False,
        "torch.cuda.graph_pool_handle": lambda: None,
        "torch.cuda.synchronize": lambda *_: cuda.count(cuda.reads, "synchronize"),
        "torch.cuda.max_memory_allocated": lambda *_: cuda.peak,
        "torch.cuda.get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "torch.cuda.set_rng_state": lambda *_: None,
        "torch.accelerator.is_available": lambda: True,
        "torch.accelerator.current_accelerator": lambda *_, **__: torch.device("cuda"),
        "torch.accelerator.current_stream": lambda *_: types.SimpleNamespace(is_capturing=lambda: False),
        "torch._subclasses.fake_tensor.init_gpu_context": lambda *_: None,
        "torch.Generator": FakeGenerator,
        "torch.nn.Module._apply": apply,
        "torch.Tensor.pin_memory": lambda tensor, *_: cuda.pin(tensor),
        "torch.nn.functional.scaled_dot_product_attention": attention,
    }
    if project:
        replaced["common.distributed.ThreadPoolExecutor"] = Inline
    with contextlib.ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(mock.patch(name, value))
        stack.enter_context(context_unasked())
        yield stack.enter_context(cuda)


def probe() -> None:
    """A training step on fake tensors; what it depends on may as well crash the process as raise an error."""
    with fake_cuda(project=False) as cuda:
        cuda.counting = True
        layer = torch.nn.Linear(8, 8).to("cuda")
        optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
        x = torch.ones(4, 8, device="cuda")
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = layer(x).float().square().mean()
        loss.backward()
        optimizer.step()
        assert layer.weight.grad.shape == (8, 8) and layer.weight.grad.device.type == "cuda"
        assert cuda.peak >= 3 * 8 * 8 * 4 and not cuda.reads and sum(cuda.blocking.values()) == 2


@functools.cache
def unavailable() -> str:
    """Why fake CUDA cannot work here; empty where it can."""
    if torch.cuda.is_available():
        return "there is a GPU, which tests/test_gpu.py is for"
    command = [sys.executable, "-c", "import fake_cuda; fake_cuda.probe()"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT / "tests", env=environment, capture_output=True, text=True)
    reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return f"fake CUDA does not work with torch {torch.__version__}: {reason}" if done.returncode else ""
