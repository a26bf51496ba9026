"""A device that is not the CPU, for machines that have none: `with card():` the name "meta" stands for it.

Its tensors keep their values in host memory, where they are computed, so results are those of the CPU to the bit. What
a GPU would refuse raises: an operation on tensors of both devices, or with a generator of the other one. It takes no
CUDA branch (`device.type == "cuda"`), autocast does nothing, and a thread that a program starts would see ordinary meta
tensors: `card` runs in place what is given to one.
"""

import contextlib
from concurrent.futures import Future
from unittest import mock

import torch
import torch._dynamo  # before anything is patched
from torch.optim import optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.tensorboard import summary

from common import data

aten = torch.ops.aten
# What a GPU does with tensors of both: copies, and indices that are in host memory.
MIXED = {aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put.default, aten.index_put_.default,
         aten._index_put_impl_.default}  # fmt: skip


class OnCard(torch.Tensor):
    """A tensor of the device; its values are the tensor `inner`."""

    is_meta = False  # torch makes exceptions for tensors without values

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device="meta")  # fmt: skip

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def tolist(self):
        return self.inner.tolist()

    def __reduce_ex__(self, protocol):  # in a file there is no device
        return self.inner.__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        copy = self.detach().clone()
        return torch.nn.Parameter(copy, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copy

    def __repr__(self):
        return f"OnCard({self.inner!r})"


generators = {}  # those made while there is a card, and their devices, by the address of their state


def each(function, value):
    """`value` with function(tensor) in place of each tensor; torch's own tree_map takes most of a run's time."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)([each(function, v) for v in value])
    return {k: each(function, v) for k, v in value.items()} if isinstance(value, dict) else value


def run(func, args, kwargs):
    """One operation of torch, on the device if it is asked for, or if an argument is there."""
    ours, host = {}, []

    def unwrap(t):
        if isinstance(t, OnCard):
            ours[id(t.inner)] = t
            return t.inner
        host.append(t)
        return t

    def wrap(t):  # what an operation in place returns is its argument
        return ours[id(t)] if id(t) in ours else OnCard(t)

    args, kwargs = each(unwrap, args), each(unwrap, kwargs)
    if ours and func not in MIXED and any(t.ndim for t in host):
        raise RuntimeError(f"{func} was given tensors of the device and of the host")
    there = bool(ours)
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == "meta"
        kwargs["device"] = "cpu"
    given = kwargs.get("generator")
    if given is not None and there != (generators[given._cdata][1] == "meta"):
        raise RuntimeError(f"{func} was given a generator of another device")
    out = func(*args, **kwargs)
    return each(wrap, out) if there else out


class Factories(TorchDispatchMode):
    """Operations without a tensor among their arguments come here."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class InPlace:
    """A ThreadPoolExecutor without a thread."""

    def __init__(self, *_, **__):
        pass

    __enter__ = lambda self: self  # noqa: E731
    __exit__ = lambda *_: None  # noqa: E731

    def submit(self, function, *args):
        result = Future()
        result.set_result(function(*args))
        return result


@contextlib.contextmanager
def card():
    made = {name: getattr(torch, name) for name in ("tensor", "as_tensor", "Generator", "autocast")}
    make_np, read = summary.make_np, data.read

    def moved(name):  # they make their values on the host, out of sight of a dispatch mode
        return lambda *args, device=None, **kwargs: made[name](*args, **kwargs).to(device or "cpu")

    def generator(device="cpu"):
        new = made["Generator"]()
        generators[new._cdata] = new, torch.device(device).type
        return new

    replaced = [
        *((torch, name, moved(name)) for name in ("tensor", "as_tensor")),
        (torch, "Generator", generator),
        (torch, "autocast", lambda kind, *args, **kwargs: made["autocast"]("cpu", *args, **kwargs)),
        (optimizer, "_get_fused_kernels_supported_devices", lambda: ["cpu", "meta"]),
        (summary, "make_np", lambda x: make_np(x.cpu() if isinstance(x, torch.Tensor) else x)),
        (data, "read", lambda path, device: each(lambda t: t.to(device), read(path, "cpu"))),
        (data, "ThreadPoolExecutor", InPlace),
    ]  # fmt: skip
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrite)
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # a parameter moves with its type
        for what in replaced:
            stack.enter_context(mock.patch.object(*what))
        stack.callback(generators.clear)
        stack.enter_context(Factories())
        yield
