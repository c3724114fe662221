"""`python -m bench.strided_head`: a model's head over the last column of a batch, on the CPU.

``generate`` keeps the last column of the prompt's states, which is a view with gaps. It prints the
time of the head over that view and over a copy in one piece, and how many logits differ.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from torch.nn.functional import linear

from bench.timing import seconds
from vlm_safeguard.utils.markdown import table

HEAD = ["Dtype", "View, s", "In one piece, s", "Logits that differ", "Largest difference"]


def measured(dtype: torch.dtype, rows: int, width: int, words: int) -> list[str]:
    """A row of the table, for ``rows`` states of ``width`` and a vocabulary of ``words``."""
    torch.manual_seed(0)
    view = torch.randn(rows, 64, width).to(dtype)[:, -1:]
    weight = (torch.randn(words, width) * 0.02).to(dtype)
    whole = view.contiguous()
    linear(whole, weight)  # the first call prepares what later ones share
    slow, fast = (seconds(partial(linear, states, weight)) for states in (view, whole))
    ours, theirs = linear(view, weight).float(), linear(whole, weight).float()
    share = float((ours != theirs).float().mean())
    most = float((ours - theirs).abs().max())
    name = str(dtype).removeprefix("torch.")
    return [name, f"{slow:.2f}", f"{fast:.2f}", f"{100 * share:.3f}%", f"{most:.1e}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--words", type=int, default=151_936)
    given = parser.parse_args()
    torch.set_num_threads(1)
    dtypes = (torch.float32, torch.bfloat16)
    print(table(HEAD, [measured(one, given.rows, given.width, given.words) for one in dtypes]))


if __name__ == "__main__":
    main()
