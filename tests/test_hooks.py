"""Hooks by themselves: they undo what is theirs in every order, and are inert afterwards."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from duet_vlm.utils.hooks import Hooks

ONE = torch.ones(1, dtype=torch.float64)  # products of many primes


class Twice(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def times(factor: int, plain: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x: factor * plain(x)


class Other:
    """Somebody else's wrapper: put on over what is there, taken off by putting back what was there (or deleting, if
    nothing was)."""

    def __init__(self, module: nn.Module, factor: int) -> None:
        self.module, self.was = module, vars(module).get("forward")
        self.mine = module.forward = times(factor, module.forward)

    def off(self) -> None:
        if self.was is None:
            del self.module.forward
        else:
            self.module.forward = self.was


def ours(module: nn.Module, factor: int) -> Hooks:
    hooks = Hooks()
    hooks.shadow(module, "forward", times(factor, module.forward))
    return hooks


def silently(hooks: Hooks) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hooks.undo()


def test_ours_alone() -> None:
    module = Twice()
    hooks = ours(module, 3)
    assert module(ONE) == 6
    silently(hooks)
    assert module(ONE) == 2 and "forward" not in vars(module)
    silently(hooks)  # harmless


def test_theirs_on_top_stays_and_passes_straight_through_ours() -> None:
    module = Twice()
    hooks = ours(module, 3)
    other = Other(module, 5)
    assert module(ONE) == 30
    with pytest.warns(
        UserWarning,
        match=r"left there: Twice\.forward \(<lambda> of test_hooks\.py\)\. What it calls of duet_vlm passes straight",
    ):
        hooks.undo()
    assert module.forward is other.mine and module(ONE) == 10
    other.off()
    assert module(ONE) == 2


def test_what_they_put_back_of_ours_goes_with_the_next_handle() -> None:
    module = Twice()
    hooks, other = ours(module, 3), Other(module, 5)
    with pytest.warns(UserWarning):
        hooks.undo()
    other.off()
    assert "forward" in vars(module)  # our wrapper, inert: nobody told us
    silently(ours(module, 3))
    assert "forward" not in vars(module)


@pytest.mark.parametrize("by", ["putting back", "setting the method"])
def test_theirs_below_ours_taken_off_first(by: str) -> None:
    """That takes ours off, too; nothing of theirs comes back."""
    module = Twice()
    other = Other(module, 5)
    hooks = ours(module, 3)
    assert module(ONE) == 30
    if by == "putting back":
        other.off()
    else:
        module.forward = Twice.forward.__get__(module)
    silently(hooks)
    assert module(ONE) == 2 and ("forward" in vars(module)) == (by == "setting the method")


def test_theirs_below_ours_taken_off_last() -> None:
    module = Twice()
    other = Other(module, 5)
    silently(ours(module, 3))
    assert module.forward is other.mine and module(ONE) == 10
    other.off()
    assert "forward" not in vars(module)


def test_two_handles_on_one_module_in_either_order() -> None:
    for first in (0, 1):
        module = Twice()
        both = [ours(module, 3), ours(module, 5)]
        assert module(ONE) == 30
        silently(both[first])
        assert module(ONE) == (10 if first == 0 else 6)
        silently(both[1 - first])
        assert module(ONE) == 2 and "forward" not in vars(module)


def test_several_of_theirs_are_named_in_one_warning() -> None:
    modules = [Twice() for _ in range(3)] + [nn.Identity()]
    hooks = Hooks()
    for module in modules:
        hooks.shadow(module, "forward", times(3, module.forward))
        Other(module, 5)
    with pytest.warns(UserWarning) as caught:
        hooks.undo()
    (warning,) = caught
    assert "Twice.forward (<lambda> of test_hooks.py) (3 times)" in str(warning.message) and "Identity.forward" in str(
        warning.message
    )


def test_held_objects_are_inert() -> None:
    module, seen = Twice(), []
    hooks = Hooks()
    hooks.shadow(module, "forward", times(3, module.forward))
    hooks.add(module.register_forward_pre_hook, lambda first, module, args: seen.append(first), "x")
    hooks.add(module.register_forward_hook, lambda module, args, output: 7 * output)
    (before,), (after,), wrapped = module._forward_pre_hooks.values(), module._forward_hooks.values(), module.forward
    assert module(ONE) == 42 and seen == ["x"]
    hooks.undo()
    assert before(module, (ONE,)) is None and after(module, (ONE,), ONE) is None and wrapped(ONE) == 2 and seen == ["x"]
    assert module(ONE) == 2 and not module._forward_pre_hooks and not module._forward_hooks


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"]
)
def test_copies_are_refused_while_attached_and_plain_afterwards(copied: Callable[[nn.Module], nn.Module]) -> None:
    module = Twice()
    hooks = ours(module, 3)
    with pytest.raises(TypeError, match=r"attached.*cannot be copied or pickled: detach\(\) first"):
        copied(module)
    other = Other(module, 5)
    with pytest.warns(UserWarning):
        hooks.undo()
    other.off()
    twin = copied(module)  # with our inert wrapper in it
    assert twin(ONE) == 2 and twin.forward.__self__ is twin


def test_what_cannot_be_called_before_is_left_as_it_is() -> None:
    """An attribute that the class does not have, such as a loss: there is nothing to pass to but what ours was made
    around."""
    module = Twice()
    hooks = Hooks()
    hooks.shadow(module, "loss", lambda x: x + 1)
    held = module.loss
    silently(hooks)
    assert "loss" not in vars(module) and held(1) == 2


@settings(deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(["theirs on", "theirs off", "ours on", "ours off"]), max_size=12))
def test_every_order(steps: list[str]) -> None:
    """Others come and go as a stack; whatever the order, a handle works on the calls that reach its wrapper until it
    goes, and not after."""
    module, others, handles = Twice(), [], []
    primes, product = iter((3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)), []
    for step in steps:
        if step == "theirs on":
            prime = next(primes)
            others.append((Other(module, prime), prime))
            product.append(prime)
        elif step == "ours on":
            prime = next(primes)
            handles.append((ours(module, prime), prime))
            product.append(prime)
        elif step == "ours off" and handles:
            hooks, prime = handles.pop(len(handles) // 2)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                hooks.undo()
            product = [factor for factor in product if factor != prime]
        elif step == "theirs off" and others:
            other, prime = others.pop()
            other.off()
            # what stood on top of it is off as well
            product = product[: product.index(prime)] if prime in product else product
        expected = 2
        for factor in product:
            expected *= factor
        assert module(ONE) == expected
    for hooks, _ in handles:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            hooks.undo()
    if not others:
        assert module(ONE) == 2
