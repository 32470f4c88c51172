"""Fake tensors: views of them are what torch's kernels make of real tensors, refusals what FakeTensorMode says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from tp_planner.frontend import fake_mode
from tp_planner.frontend.dispatch import WatchingMode, tensors_in, with_tensors_replaced
from tp_planner.frontend.fake_mode import FakeCpuMode

View = Callable[[torch.Tensor], torch.Tensor]

VIEWS: dict[str, tuple[tuple[int, ...], View]] = {
    "view": ((2, 3, 4), lambda x: x.view(6, 4)),
    "view with a free size": ((2, 3, 4), lambda x: x.view(-1, 2)),
    "view of dims that are not next to each other": ((2, 3, 4), lambda x: x.transpose(0, 1).view(3, 2, 2, 2)),
    "view with dims of size 1": ((2, 1, 4), lambda x: x.view(1, 2, 4, 1)),
    "view of nothing": ((2, 0, 4), lambda x: x.view(0, 8)),
    "as another type": ((2, 4), lambda x: x.view(torch.int16)),
    "reshape that is a view": ((2, 3, 4), lambda x: x.reshape(2, 12)),
    "permute": ((2, 3, 4), lambda x: x.permute(2, 0, 1)),
    "transpose": ((2, 3, 4), lambda x: x.transpose(-1, 0)),
    "t": ((2, 3), lambda x: x.t()),
    "unsqueeze": ((2, 3), lambda x: x.unsqueeze(-1)),
    "squeeze": ((2, 1, 3), lambda x: x.squeeze(1)),
    "expand": ((2, 1, 3), lambda x: x.expand(4, 2, 5, 3)),
    "slice": ((2, 8), lambda x: x[:, 2:7:2]),
    "select": ((2, 8), lambda x: x[:, 3]),
    "narrow": ((2, 8), lambda x: x.narrow(1, 2, 4)),
    "diagonal": ((4, 4), lambda x: x.diagonal(1)),
    "unfold": ((8,), lambda x: x.unfold(0, 3, 2)),
    "as_strided": ((8,), lambda x: x.as_strided((2, 3), (4, 1), 1)),
    "detach": ((2, 3), lambda x: x.detach()),
    "view_as": ((2, 3), lambda x: x.view_as(torch.empty(2, 3))),
    "split, which makes several": ((2, 8), lambda x: x.split(3, dim=1)[1]),
}


def described(view: torch.Tensor) -> tuple[Any, ...]:
    size = view.untyped_storage().nbytes()
    return tuple(view.shape), view.stride(), view.storage_offset(), view.dtype, view.device, size, view.requires_grad


@pytest.mark.parametrize("name", VIEWS)
def test_view_is_that_of_a_real_tensor(name: str) -> None:
    """Shape, strides, offset and storage are those that torch's own kernel gives a real tensor."""
    shape, view = VIEWS[name]
    expected = described(view(torch.empty(shape)))
    with FakeCpuMode():
        base = torch.empty(shape)
        found = view(base)
        assert isinstance(found, FakeTensor)
        assert described(found) == expected
        assert found.untyped_storage()._cdata == base.untyped_storage()._cdata


OPS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "with a whole number": lambda x: x.int() + 1,
    "with a real number": lambda x: x.int() + 1.0,
    "with a truth value": lambda x: x.bool() + True,
    "with a tensor": lambda x: x * x[:1],
    "of other strides": lambda x: x.t() * 2,
    "into another type": lambda x: x.to(torch.bfloat16),
    "product": lambda x: x @ x.t(),
    "of a list": lambda x: torch.cat([x, x], dim=1),
    "sum over a dim": lambda x: x.sum(1),
    "sum that keeps the dim": lambda x: x.sum(1, keepdim=True),
    "made like another": lambda x: torch.zeros_like(x.t()),
    "view without autograd": lambda x: torch.ops.aten._unsafe_view(x, (6,)),
    "beside a tensor with a value": lambda x: x.int() * torch.tensor(2.5),
}


@pytest.mark.parametrize("name", OPS)
def test_what_an_op_makes_is_remembered_by_all_that_it_depends_on(name: str) -> None:
    """What an op makes is like what it makes of real tensors, the first time and the second."""
    op = OPS[name]
    expected = described(op(torch.empty(2, 3)))
    for _ in range(2):
        with FakeCpuMode():
            found = op(torch.empty(2, 3))
        assert isinstance(found, FakeTensor)
        assert described(found) == expected


def test_numbers_that_are_equal_are_not_taken_for_each_other() -> None:
    """1, 1.0 and True are equal, and an op makes other types of them."""
    with FakeCpuMode():
        whole = torch.empty(3, dtype=torch.int32)
        types = [(whole * number).dtype for number in (1, 1.0, True, 1.0, 1)]
    assert types == [torch.int32, torch.float32, torch.int32, torch.float32, torch.int32]


def test_values_last_where_all_tensors_have_them() -> None:
    """A product of two tensors with values has one, also after such a product without was remembered."""
    with FakeCpuMode():
        assert not hasattr((torch.empty(()).int() * torch.tensor(4)).constant, "item")
        assert [(torch.tensor(3) * torch.tensor(each)).item() for each in (4, 5)] == [12, 15]


def test_collectives_are_remembered_by_the_size_of_their_group() -> None:
    gather = torch.ops._c10d_functional.all_gather_into_tensor
    with FakeCpuMode():
        part = torch.empty(2, 3)
        made = [gather(part, size, "a group") for size in (2, 4, 2, 4)]
    assert [tuple(each.shape) for each in made] == [(4, 3), (8, 3), (4, 3), (8, 3)]
    assert len({each.untyped_storage()._cdata for each in (part, *made)}) == 5


def test_a_gather_into_a_tensor_makes_no_other() -> None:
    with FakeCpuMode():
        part, out = torch.empty(2, 3), torch.empty(4, 3)
        assert torch.ops._c10d_functional.all_gather_into_tensor_out(part, 2, "a group", out=out) is out


def test_so_much_is_remembered_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: dict[Any, Any] = {}
    monkeypatch.setattr(fake_mode, "_ANSWERS", answers)
    monkeypatch.setattr(fake_mode, "MOST_ANSWERS", 3)
    with FakeCpuMode():
        sizes = [tuple((torch.empty(size) + 1).shape) for size in (1, 2, 3, 4, 5, 1)]
    assert sizes == [(1,), (2,), (3,), (4,), (5,), (1,)]
    assert len(answers) == 3


def test_what_ops_make_has_storages_of_its_own() -> None:
    with FakeCpuMode():
        base = torch.empty(5, 7)
        made = [base + 2 for _ in range(3)]
    assert len({each.untyped_storage()._cdata for each in (base, *made)}) == 4


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_fake_tensors_are_those_that_torch_makes(device: str) -> None:
    """Attributes, dispatch keys and storage are those of FakeTensor's constructor; another is one beside it."""
    meta = torch.empty_strided((2, 3), (1, 2), dtype=torch.bfloat16, device="meta").requires_grad_()
    mode = FakeCpuMode()
    expected = FakeTensor(mode, meta, torch.device(device))
    for _ in range(2):
        found = mode.fake(meta, torch.device(device))
        assert vars(found) == vars(expected)
        assert described(found) == described(expected)
        assert torch._C._dispatch_keys(found) == torch._C._dispatch_keys(expected)
        assert found.untyped_storage()._cdata == meta.untyped_storage()._cdata
    with mode, Names() as names:
        another = mode.another(found)
    assert (described(another)[:-1], another.requires_grad, names.names) == (described(found)[:-1], False, [])
    assert another.untyped_storage()._cdata != found.untyped_storage()._cdata


def test_view_has_a_gradient() -> None:
    with FakeCpuMode():
        base = torch.empty(2, 3, requires_grad=True)
        base.view(6).permute(0).sum().backward()
    assert isinstance(base.grad, FakeTensor)
    assert base.grad.shape == (2, 3)


REFUSED: dict[str, View] = {
    "sizes that do not fit": lambda x: x.view(5),
    "strides that do not fit": lambda x: x.t().view(6),
    "dims that do not exist": lambda x: x.permute(0, 2),
    "a slice of a dim that does not exist": lambda x: x.narrow(2, 0, 1),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_is_fake_tensor_modes(name: str) -> None:
    """A plan quotes why a layer fails on shards, whichever way the view was tried."""
    messages = []
    for mode in (FakeTensorMode(), FakeCpuMode()):
        with mode, pytest.raises((RuntimeError, ValueError, IndexError)) as refusal:
            REFUSED[name](torch.empty(2, 3))
        messages.append((refusal.type, str(refusal.value)))
    assert messages[0] == messages[1]


def test_values_of_constants_stay_known() -> None:
    """Views of a tensor whose value is known have that value."""
    with FakeCpuMode():
        assert torch.ops.aten.mul.Tensor(3, 4).view(1, 1)[0, 0].item() == 12


def test_tensors_of_the_meta_device_are_on_the_cpu() -> None:
    made_before = torch.ones(3, device="meta")
    with FakeCpuMode():
        found = torch.stack([made_before + torch.empty(3), torch.empty(3)])
    assert (found.device, tuple(found.shape)) == (torch.device("cpu"), (2, 3))


def test_torchs_devices_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch built for CUDA would take on eight devices where it finds none, and not be forked after a backward pass."""
    taken_on: list[bool] = []
    monkeypatch.setattr(torch._C, "_ensureCUDADeviceGuardSet", lambda: taken_on.append(True))
    with FakeTensorMode():
        pass
    assert taken_on == [True] * (not torch.cuda.is_available())
    with FakeCpuMode():
        torch.tensor([1.0]).add(torch.ones(1))
    assert len(taken_on) == (not torch.cuda.is_available())


# What watches ops


class Names(WatchingMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def watch(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        self.names.append(str(func))
        return func(*args, **kwargs)


def test_questions_for_devices_are_not_watched() -> None:
    with FakeCpuMode(), Names() as mode:
        x = torch.empty(2, 3)
        assert (x.device, x.is_cuda, x.is_meta) == (torch.device("cpu"), False, False)
        x.view(6)
    assert mode.names == ["aten.empty.memory_format", "aten.view.default"]


def test_tensors_among_arguments() -> None:
    """Tensors are found in order in whatever arguments nest, and can be replaced there."""
    a, b, c = (torch.empty(size) for size in (1, 2, 3))
    arguments = ((a, [b, None], 2, (3, "x")), {"other": c, "dim": (0, 1)})
    assert [len(each) for each in tensors_in(arguments)] == [1, 2, 3]
    assert with_tensors_replaced(arguments, len) == ((1, [2, None], 2, (3, "x")), {"other": 3, "dim": (0, 1)})
