"""torch.compile for functions that several models share, with graphs of each model's own.

    one block for a teacher of width 4096 and a student of width 1024

    torch.compile(block)             the second width that comes makes widths variables, in the kernels of both
    compiled(block, of=model)        each has kernels for its own width; only rows of tokens vary in length

torch keeps what it has seen, and what it has compiled, by a function's code. A size that differs between two calls is from
then on a variable of the kernels. For the number of tokens that costs nothing; where widths and heads are variables too,
every index of a rotation is a division, and the kernels between a block's products take twice the time.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import cache
from types import CodeType, FunctionType
from typing import Any

import torch

from fstep.tree import check_type


def compiled(f: Callable[..., Any], *, of: Any) -> Callable[..., Any]:
    """Return ``f`` through torch.compile, in one graph, apart from what is compiled of another model.

    ``of`` is a value whose ``repr`` says which model it is: its options and sizes. Raises TypeError for what is no plain
    function and has no code of its own.
    """
    check_type("compiled", "f", f, FunctionType, "a function made by def or lambda")
    name = f"{f.__name__}_{zlib.crc32(repr(of).encode()):08x}"
    own = FunctionType(_named(f.__code__, name), f.__globals__, name, f.__defaults__, f.__closure__)
    own.__kwdefaults__ = f.__kwdefaults__
    return torch.compile(own, fullgraph=True)


@cache
def _named(code: CodeType, name: str) -> CodeType:
    """Return the same code under a name: one object for equal models, so that they share their graphs."""
    return code.replace(co_name=name)
