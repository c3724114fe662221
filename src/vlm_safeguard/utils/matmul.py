"""How precisely torch multiplies matrices of float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

MatmulPrecision = Literal["highest", "high", "medium"]


@contextmanager
def float32_products(precision: MatmulPrecision) -> Iterator[None]:
    """Multiply with this precision inside the ``with`` block; "highest" leaves torch as it is.

    Raises:
        RuntimeError: the process has set a precision in another way, which torch does not mix.
    """
    if precision == "highest":
        yield
        return
    import torch  # late: the command line is quick to tell its options

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
