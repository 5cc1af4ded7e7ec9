"""An accelerator without one: tensors that hold host memory and claim ``cuda:0``, mix with host tensors as little as
CUDA's do, and write down each time the host waits for them, with the line of code.

``with Accelerator() as device: move(model); model(**on(inputs)); device.waits`` is a rehearsal. To PyTorch's own code
the tensors are "meta" tensors, the one foreign device that a build without CUDA lets through autograd; in Python they
say ``cuda:0``, and ``cuda`` in an argument is translated on its way down. Kernels run on the host memory.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

CUDA, HOST, BELOW = torch.device("cuda", 0), torch.device("cpu"), torch.device("meta", 0)

# operations whose result, or its size, the host has to know before it can go on
READS = {
    "aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::allclose", "aten::nonzero", "aten::nonzero_numpy", "aten::argwhere",
    "aten::masked_select", "aten::_unique", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::unique_dim_consecutive",
    "aten::bincount",
    # CUDA's solvers say there whether they converged
    "aten::_linalg_eigh", "aten::_linalg_svd", "aten::linalg_lstsq", "aten::_linalg_check_errors",
}  # fmt: skip
MASKS = (torch.bool, torch.uint8)
MOVES = {"aten::_to_copy", "aten::copy_", "aten::copy"}
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}
# take host tensors of 0 dims, as pointwise ones do
SCALARS = {"aten::masked_fill", "aten::masked_fill_", "aten::fill", "aten::fill_"} | INDEXED


@dataclass(frozen=True)
class Wait:
    """The host waited: why ("read", or "upload": a copy to the device that blocks), in which operation, and where it
    came from.

    ``line`` is the innermost one outside torch, ``ours`` that of the library, "" where none of it is on the stack."""

    why: str
    operation: str
    line: str
    ours: str

    @property
    def stock(self) -> bool:
        return "/transformers/" in self.line

    def __str__(self) -> str:
        return f"{self.why} by {self.operation} at {self.ours or self.line}" + (
            f" (in {self.line})" if self.ours and self.line != self.ours else ""
        )


class OnDevice(Tensor):
    """A tensor that is "on" the accelerator; ``held`` is its host memory."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=BELOW,
        )
        made.held = held.detach()
        return made

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = is_meta = property(lambda self: False)  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of Accelerator()")

    __torch_function__ = torch._C._disabled_torch_function_impl

    def get_device(self) -> int:
        return 0

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.held!r})"

    def __bool__(self) -> bool:
        return bool(self.item())

    def __format__(self, spec: str) -> str:
        return format(self.item() if self.ndim == 0 else repr(self), spec)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
        )

    __array__ = numpy  # type: ignore[assignment]


class Claims(TorchFunctionMode):
    """Translates ``cuda`` in the arguments of torch's functions; what is made of Python numbers is made on the host and
    carried up."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FROM_NUMBERS:
            return self._from_numbers(func, args, kwargs)
        if func is Tensor.cuda:
            return args[0].to(BELOW, non_blocking=kwargs.get("non_blocking", False))
        if func not in NAMES and (any(is_cuda(x) for x in args) or any(is_cuda(x) for x in kwargs.values())):
            args, kwargs = tuple(below(x) for x in args), {name: below(x) for name, x in kwargs.items()}
        return func(*args, **kwargs)

    @staticmethod
    def _from_numbers(func: Any, args: Any, kwargs: Any) -> Tensor:
        wanted = kwargs.pop("device", None)
        if func is Tensor.new_tensor:
            like, *args = args
            wanted, kwargs = like.device if wanted is None else wanted, {"dtype": like.dtype} | kwargs
        data, *args = args or (kwargs.pop("data"),)
        if isinstance(data, Tensor) and func is torch.as_tensor:
            dtype = kwargs.get("dtype") or (args[0] if args else data.dtype)
            return data.to(device=below(data.device if wanted is None else wanted), dtype=dtype)
        return torch.tensor(numbers(data), *args, device="cpu", **kwargs).to(below(wanted or "cpu"))


def numbers(data: Any) -> Any:
    """Nested lists with the device's numbers read, one by one."""
    if isinstance(data, OnDevice):
        return data.tolist()
    return [numbers(x) for x in data] if isinstance(data, list | tuple) else data


FROM_NUMBERS = (torch.tensor, torch.as_tensor, Tensor.new_tensor)
# they speak of a device and put nothing there
NAMES = (torch.device, torch.is_autocast_enabled, torch.get_autocast_dtype)


def is_cuda(x: Any) -> bool:
    return (isinstance(x, torch.device) and x.type == "cuda") or (isinstance(x, str) and x.split(":")[0] == "cuda")


def below(x: Any) -> Any:
    return BELOW if is_cuda(x) else x


class Accelerator(TorchDispatchMode):
    """The device, as long as the block lasts. ``waits`` are in their order; tensors may be mixed as on CUDA, anything
    else is a RuntimeError."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[Wait] = []
        self._around = ExitStack()

    def __enter__(self) -> Accelerator:
        self._around.enter_context(free_memory())
        self._around.enter_context(Claims())
        super().__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        self._around.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, given = func._schema.name, flat(args, kwargs)
        there, here = [x for x in given if isinstance(x, OnDevice)], [x for x in given if not isinstance(x, OnDevice)]
        wanted = kwargs.get("device")
        goes_up = bool(there) if wanted is None else torch.device(wanted) == BELOW
        if not there and not goes_up:
            return func(*args, **kwargs)
        if name in MOVES:
            return self._move(func, name, args, kwargs, goes_up)
        if there and here:
            check_mixed(func, name, args, here)
        if kwargs.get("generator") is not None and kwargs["generator"].device.type == "cpu":
            raise RuntimeError(f"{name}: expected a 'cuda' device type for generator but found 'cpu'")
        if torch.Tag.inplace_view in func.tags:
            raise NotImplementedError(f"{name} changes the shape of a tensor in place")
        if reads(name, args, kwargs):
            self._wait("read", name)
        if wanted is not None:
            kwargs = kwargs | {"device": HOST}
        if name == "aten::histc" and not args[0].is_floating_point():  # CUDA's kernel counts integers, too
            return up(func(args[0].held.float(), *args[1:], **kwargs).to(args[0].dtype))
        made = func(*down(args), **down(kwargs))
        if func._schema.is_mutable:
            return returned(func, args, kwargs, made)
        return tree_map_only(Tensor, up, made) if goes_up else made

    def _move(self, func: Any, name: str, args: Any, kwargs: Any, goes_up: bool) -> Any:
        """Copies between the host and the device, and on the device."""
        if name == "aten::_to_copy":
            came_up = isinstance(args[0], OnDevice)
            target = goes_up
        else:
            came_up, target = isinstance(args[1], OnDevice), isinstance(args[0], OnDevice)
        if came_up and not target:
            self._wait("read", name)
        free = kwargs.get("non_blocking", False) or (name == "aten::copy_" and len(args) > 2 and args[2])
        source = args[0] if name == "aten::_to_copy" else args[1]
        if (
            target
            and not came_up
            and not free
            and source.numel()
            and not (name != "aten::_to_copy" and source.ndim == 0)
        ):
            self._wait("upload", name)
        if "device" in kwargs:
            kwargs = kwargs | {"device": HOST}
        made = func(*down(args), **down(kwargs))
        if name == "aten::_to_copy" and made.data_ptr() == down(source).data_ptr() and made.numel():
            made = made.clone()
        return args[0] if name == "aten::copy_" else up(made) if target else made

    def _wait(self, why: str, operation: str) -> None:
        lines = stack()
        ours = next((line for line in lines if "/duet_vlm/" in line), "")
        self.waits.append(Wait(why, operation.removeprefix("aten::"), short(lines[0]), short(ours)))


def flat(args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors of a call."""
    found = []
    for x in (*args, *kwargs.values()):
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, list | tuple):
            found += [y for y in x if isinstance(y, Tensor)]
    return found


def down(tree: Any) -> Any:
    if isinstance(tree, OnDevice):
        return tree.held
    if isinstance(tree, list | tuple):
        return type(tree)(down(x) for x in tree)
    return {key: down(x) for key, x in tree.items()} if isinstance(tree, dict) else tree


def up(x: Tensor) -> OnDevice:
    return x if isinstance(x, OnDevice) else OnDevice(x)


def returned(func: Any, args: Any, kwargs: Any, made: Any) -> Any:
    """What an operation that writes to its arguments returns: the argument itself where it says so."""
    written = []
    for at, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(args[at] if at < len(args) else kwargs.get(argument.name))
    many = isinstance(made, tuple | list)
    results = list(made) if many else [made]
    out = [written.pop(0) if r.alias_info is not None and r.alias_info.is_write else tree_map_only(Tensor, up, x) for r, x in
           zip(func._schema.returns, results, strict=False)]  # fmt: skip
    return tuple(out) if many else out[0] if out else None


def reads(name: str, args: Any, kwargs: Any) -> bool:
    if name in INDEXED:
        return any(isinstance(x, OnDevice) and x.dtype in MASKS for x in args[1] if x is not None)
    if name == "aten::repeat_interleave":
        return kwargs.get("output_size") is None and len(args) < 3
    return name in READS


def check_mixed(func: Any, name: str, args: Any, here: list[Tensor]) -> None:
    """CUDA takes host tensors beside its own where they are numbers of a pointwise operation, and as indices of a
    tensor."""
    scalar = torch.Tag.pointwise in func.tags or name in SCALARS
    wrong = [x for x in here if not (scalar and x.ndim == 0)]
    if name in INDEXED and isinstance(args[0], OnDevice):
        wrong = [x for x in wrong if not any(x is index for index in args[1])]
    written = args and not isinstance(args[0], OnDevice) and func._schema.is_mutable
    if wrong or written:
        raise RuntimeError(
            f"{name}: expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu"
        )


def stack() -> list[str]:
    """Lines of code from the innermost out, without torch's and this file's."""
    frame: Any = sys._getframe(1)
    lines = []
    while frame is not None:
        file = frame.f_code.co_filename
        if file != __file__ and "/site-packages/torch/" not in file and not file.startswith("<"):
            lines.append(f"{file}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return lines


def short(line: str) -> str:
    for folder in ("/duet_vlm/", "/transformers/"):
        head, found, rest = line.rpartition(folder)
        if found:
            return (folder if folder == "/transformers/" else "") + rest
    return line.rpartition("/")[2]


@contextmanager
def free_memory() -> Iterator[None]:
    """What ``torch.cuda`` says of its memory where there is none; an old GPU, for which stock code has formulas instead
    of kernels."""
    answers = {
        "get_device_capability": (7, 0),
        "mem_get_info": (8 << 30, 16 << 30),
        "memory_reserved": 0,
        "memory_allocated": 0,
    }
    with ExitStack() as patches:
        for name, value in answers.items():
            patches.enter_context(mock.patch.object(torch.cuda, name, lambda device=None, value=value: value))
        yield


def move(module: nn.Module) -> nn.Module:
    """A model whose parameters and buffers are on the device; to be called inside of the block."""
    seen: dict[int, Tensor] = {}
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                key = id(weight)
                seen.setdefault(key, nn.Parameter(OnDevice(weight.data), weight.requires_grad))
                part._parameters[name] = seen[key]  # type: ignore[assignment]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = OnDevice(buffer)
    return module


def on(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs on the device."""
    return {name: OnDevice(x) if isinstance(x, Tensor) else x for name, x in inputs.items()}
