"""Hidden states of many prompts, read one layer at a time.

All states of a large model do not fit into memory twice, and those that are recorded are mapped
from files, which costs nothing until they are read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StackedStates:
    """States (k, L, w) in parts that lie one after the other and are never put together as a whole.

    Attributes:
        parts: states (n, L, w), and the places among them of those that are meant, (m,). The m of
            all parts sum to k.
    """

    parts: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    def of(cls, *states: Tensor | StackedStates) -> StackedStates:
        """All of these states, one after the other."""
        found: list[tuple[Tensor, Tensor]] = []
        for one in states:
            if isinstance(one, Tensor):
                found.append((one, torch.arange(len(one))))
            else:
                found += one.parts
        return cls(tuple(found))

    def __len__(self) -> int:
        return sum(len(places) for _, places in self.parts)

    @property
    def width(self) -> int:
        """w, the same in all parts."""
        return self.parts[0][0].shape[2]

    def layer(self, n: int, view: slice = slice(None)) -> Tensor:
        """A copy (k, w) of the states at layer n, or of a slice of their dimensions."""
        return torch.cat([states[:, n, view][places] for states, places in self.parts])

    def chosen(self, mask: Tensor) -> StackedStates:
        """Those of the states where ``mask`` (k,) is true."""
        masks = mask.split([len(places) for _, places in self.parts])
        return StackedStates(
            tuple(
                (states, places[part])
                for (states, places), part in zip(self.parts, masks, strict=True)
            )
        )

    def narrowed(self, width: int) -> StackedStates:
        """The first ``width`` dimensions of all states."""
        return StackedStates(tuple((states[..., :width], places) for states, places in self.parts))
