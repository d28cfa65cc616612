"""A CUDA device that is not there, so that `--device cuda` runs on a machine without a GPU.

    fake_cuda.install()                    before anything asks for a device
    with fake_cuda.watched() as waits:     Counter of (kind, operator, file:line): where the host
                                           waits for the device
    PYTHONPATH=tests python -m fake_cuda dpo.py --device cuda --steps 3
    PYTHONPATH=tests FAKE_CUDA=1 python …  it is there in each process (tests/sitecustomize.py)

Tensors say that they are on cuda:0 and lie in host memory, filled with NaN before they are written.
Every operator runs the CPU's kernel (fake_cuda.cpp). What CUDA refuses raises here too: operands on
two devices, operators that have no CUDA kernel, CPU generators, waiting inside a capture, a capture
on the default stream or in a pool that has ended. Autocast, GradScaler, fused AdamW and autograd's
device thread are torch's own. Nothing runs while a graph is captured; a replay launches what was
captured, on the same memory.
Not emulated: speed, rounding, streams that run beside each other, atomic adds, flash attention.
Nor torch.compile: modules run as they are.
It needs a C++ compiler. torch 2.6 to 2.13, whose headers, and torchgen, come with torch.
"""

import contextlib
import ctypes
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch

HERE = Path(__file__).parent
COMPILER = os.environ.get("CXX", "g++")
REPORT = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_char_p, ctypes.c_char_p)
library = watcher = None
done = 0  # how many launches the host knows to be done


# ---- the library


def build():
    """-> the path of the compiled library, made once for each version of torch and of its source"""
    source, root = HERE / "fake_cuda.cpp", Path(torch.__file__).parent
    key = hashlib.sha256(source.read_bytes() + torch.__version__.encode()).hexdigest()[:12]
    path = Path(os.environ.get("FAKE_CUDA_CACHE", tempfile.gettempdir())) / f"fake_cuda-{key}.so"
    if not path.exists():
        new = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12)
        command = [COMPILER, "-std=c++20" if new else "-std=c++17", "-shared", "-fPIC", "-O1", "-w"]
        command += [source, f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include"]
        command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
        command += ["-o", f"{path}.{os.getpid()}", f"-L{root}/lib", "-ltorch_cpu", "-lc10"]
        subprocess.run([str(x) for x in command], check=True)
        os.replace(f"{path}.{os.getpid()}", path)
    return path


def rules():
    """torch's table of operators -> the names of those that take a CPU number beside CUDA tensors,
    and of those that CUDA has no kernel for"""
    import torchgen

    table = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    loose, lacking = [], []
    for part in re.split(r"^- func: ", table.read_text(), flags=re.M)[1:]:
        name = f"aten::{part.partition('(')[0]}"
        kernels = re.search(r"^  dispatch:\n((?:    .*\n)+)", part, re.M)
        lines = re.sub(r"#.*", "", kernels[1]).splitlines() if kernels else []
        devices = {x.strip() for line in lines for x in line.partition(":")[0].split(",")}
        everywhere = any(x.startswith("Composite") for x in devices)
        if "device_check: NoCheck" in part:
            loose.append(name)
        if "CPU" in devices and "CUDA" not in devices and not everywhere:
            lacking += [name] * ("structured_delegate" not in part)
    return loose, lacking


def load():
    global library
    library = ctypes.CDLL(str(build()), mode=ctypes.RTLD_GLOBAL)
    library.fake_number.restype = library.fake_graph_size.restype = ctypes.c_int64
    library.fake_replay.restype = ctypes.c_char_p
    library.fake_capture_begin.restype = ctypes.c_void_p
    for f in (library.fake_graph_size, library.fake_replay, library.fake_graph_end):
        f.argtypes = [ctypes.c_void_p]
    library.report = REPORT(_wait)  # kept alive
    names = ["".join(f"{name}\n" for name in x).encode() for x in rules()]
    library.fake_begin(1, *names, library.report)


def install():
    """torch.cuda is available from now on, with one device."""
    if library:
        return
    import torch._dynamo  # it asks what torch._C has, and AdamW would import it later

    load()
    cuda, fixed = torch.cuda, lambda x: lambda *_, **__: x
    about = dict(name="fake", major=9, minor=0, total_memory=2**37, multi_processor_count=1)
    made = dict(
        is_available=fixed(True),
        is_initialized=fixed(True),
        _initialized=True,
        _lazy_init=fixed(None),
        init=fixed(None),
        empty_cache=lambda: _report("the cache is emptied", "empty_cache"),
        ipc_collect=fixed(None),
        device_count=fixed(1),
        current_device=fixed(0),
        set_device=fixed(None),
        _exchange_device=fixed(0),
        _maybe_exchange_device=fixed(0),
        is_bf16_supported=fixed(True),
        get_device_name=fixed("a CUDA device that is not there"),
        get_device_capability=fixed((9, 0)),
        get_device_properties=fixed(SimpleNamespace(**about)),
        synchronize=lambda *_: _report("synchronize", "torch.cuda.synchronize"),
        memory_allocated=lambda *_: library.fake_number(0),
        max_memory_allocated=lambda *_: library.fake_number(1),
        reset_peak_memory_stats=lambda *_: library.fake_reset_peak(),
        default_generators=(torch.Generator(),),
        get_rng_state=lambda *_: torch.zeros(16, dtype=torch.uint8),
        set_rng_state=fixed(None),
        manual_seed_all=fixed(None),
        manual_seed=fixed(None),
        CUDAGraph=Graph,
        graph_pool_handle=lambda: (0, next(Graph.handles)),
        Stream=Stream,
        Event=Event,
        stream=_on_stream,
        current_stream=lambda *_: Stream.current,
        set_sync_debug_mode=_set_debug_mode,
    )
    modules = [cuda, *(sys.modules[f"torch.cuda.{x}"] for x in ("memory", "graphs", "streams"))]
    for name, x in made.items():
        setattr(cuda, name, x)
        for module in modules:
            if hasattr(module, name):
                setattr(module, name, x)
    torch._C._cuda_getDeviceCount = fixed(1)
    torch._C._cuda_getDevice = torch._C._accelerator_getDeviceIndex
    torch._C._cuda_setDevice = fixed(None)
    torch.UntypedStorage.__new__ = _storage(torch.UntypedStorage.__new__)
    torch.nn.Module.compile = fixed(None)


def _storage(plain):
    """torch.load makes storages by their device, and a CPU build of torch does not know CUDA."""

    def new(cls, *args, device=None, **more):
        if device is not None and torch.device(device).type == "cuda":
            return torch.empty(*args, dtype=torch.uint8, device=device).untyped_storage()
        return plain(cls, *args, **more, **({} if device is None else {"device": device}))

    return new


# ---- what torch.cuda has


class Stream:
    current = None

    def wait_stream(self, other):
        pass

    def synchronize(self):
        _report("synchronize", "Stream.synchronize")


default = Stream.current = Stream()


@contextlib.contextmanager
def _on_stream(stream):
    before, Stream.current = Stream.current, stream
    try:
        yield
    finally:
        Stream.current = before


class Event:
    """A point in the queue. Who asks for one that is not known to be over waits for it."""

    def __init__(self, enable_timing=False):
        self.timed = enable_timing

    def record(self, stream=None):
        self.place, self.time = launches(), time.perf_counter()

    def query(self):
        return self.place <= done

    def synchronize(self):
        if not self.query():
            _report("synchronize", "Event.synchronize")

    def elapsed_time(self, later):
        if not (self.timed and later.timed and self.query() and later.query()):
            raise RuntimeError("both events must be timed, recorded and over")
        return 1000 * (later.time - self.time)


class Graph:
    """torch.cuda.CUDAGraph. A pool of memory ends with the last graph that was captured in it."""

    handles = iter(range(1, 2**31))
    begun, live = set(), Counter()  # pools: those in which there were graphs; how many there are
    handle = pool = None

    def capture_begin(self, pool=None, capture_error_mode="global"):
        if Stream.current is default:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream")
        self.pool = pool or (0, next(Graph.handles))
        if self.pool in Graph.begun and not Graph.live[self.pool]:
            raise RuntimeError("INTERNAL ASSERT FAILED: use_count > 0: the pool has ended")
        Graph.begun.add(self.pool)
        Graph.live[self.pool] += 1
        self.handle = library.fake_capture_begin()

    def capture_end(self):
        library.fake_capture_end()
        _note("captured", f"{len(self)} launches")

    def replay(self):
        said = library.fake_replay(self.handle)
        if said:
            raise RuntimeError(said.decode())

    def __len__(self):
        return library.fake_graph_size(self.handle)

    def __del__(self):
        if self.handle and library:
            Graph.live[self.pool] -= 1
            library.fake_graph_end(self.handle)


debug_mode = 0


def _set_debug_mode(mode):
    global debug_mode
    debug_mode = {"default": 0, "warn": 1, "error": 2}.get(mode, mode)


# ---- where the host waits


def launches():
    return library.fake_number(2)


def _wait(kind, name):
    """-> whether it is forbidden to wait"""
    global done
    done = launches()
    _note(kind.decode(), name.decode())
    if debug_mode == 1 and kind != b"synchronize":  # of which torch does not warn either
        file, _, line = place().partition(":")
        warnings.warn_explicit(
            f"called a synchronizing CUDA operation ({name.decode()})",
            UserWarning,
            file,
            int(line or 0),
        )
    return debug_mode == 2


def _report(kind, name):
    library.fake_arrive()
    if _wait(kind.encode(), name.encode()):
        raise RuntimeError(f"called a synchronizing CUDA operation ({name})")


def _note(kind, name):
    if watcher is not None:
        watcher[kind, name, place()] += 1


def place():
    """-> where the project's code is: file:line of the innermost frame that is not torch's"""
    frame, foreign = sys._getframe(1), (str(HERE), "<frozen", "<string")
    while frame:
        name = frame.f_code.co_filename
        if not (name.startswith(foreign) or "site-packages" in name or "contextlib" in name):
            return f"{Path(name).parent.name}/{Path(name).name}:{frame.f_lineno}"
        frame = frame.f_back
    return "autograd"


@contextlib.contextmanager
def watched():
    """-> Counter of (kind, operator, place) of every wait for the device inside"""
    global watcher
    before, watcher = watcher, Counter()
    try:
        yield watcher
    finally:
        watcher = before


def number(waits):
    """A Counter of waits -> how many there are"""
    return sum(n for (kind, *_), n in waits.items() if kind != "captured")


@contextlib.contextmanager
def watched_steps(Run):
    """-> a list with the waits of each step of the last stage that runs inside, those after the
    step's body too"""
    found, plain = [], Run.steps

    def steps(self, *args, **more):
        found.clear()
        iterator = plain(self, *args, **more)
        while True:
            with watched() as between:  # the end of a step, and the beginning of the next
                step = next(iterator, None)
            if found:
                found[-1].update(between)
            if step is None:
                return
            with watched() as waits:
                found.append(waits)
                yield step

    Run.steps = steps
    try:
        yield found
    finally:
        Run.steps = plain
