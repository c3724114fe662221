"""The method: safety steering directions, the gate, and what is done where the gate is open.

VLM-Guard (arXiv 2502.10486), section 3, with the readings that the paper leaves open as named
options. Everything here is a pure function of tensors, computed in float32 whatever the model's
dtype, and knows nothing of models, hooks or files.

Notation: ``d`` hidden size, ``N`` anchor pairs, ``m`` rank, ``h`` residual stream after a decoder
layer, ``q`` the last prompt token, ``V`` (m, d) orthonormal rows, ``v1`` the first of them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def safety_directions(harmful: Tensor, harmless: Tensor, rank: int) -> Tensor:
    """Safety Steering Direction of one layer: the top right singular vectors of the differences.

    ``A = harmful - harmless = U S W^T``; returns the first ``rank`` rows of ``W^T``. The
    differences are not centred: centring would remove the mean difference, which is the signal.
    A singular vector's sign is arbitrary, so each row ``v`` is turned until the mean of ``A v`` is
    positive: ``h @ v`` then grows with harm, which the gate (not the projection) relies on.

    Args:
        harmful: states at the last prompt token of the harmful anchors, (N, d).
        harmless: states of their harmless partners, same order, (N, d).
        rank: number of directions, 1 <= rank <= min(N, d).

    Returns:
        V, (rank, d), float32, orthonormal rows.

    Raises:
        ValueError: shapes differ, rank is out of range, or a state is not finite.
    """
    if harmful.shape != harmless.shape or harmful.ndim != 2:
        raise ValueError(
            f"anchor states must be two (N, d) tensors in pairs, got {tuple(harmful.shape)} "
            f"and {tuple(harmless.shape)}"
        )
    differences = harmful.float() - harmless.float()
    if not 1 <= rank <= min(differences.shape):
        raise ValueError(f"rank must be between 1 and {min(differences.shape)}, got {rank}")
    if not torch.isfinite(differences).all():
        raise ValueError("anchor states hold NaN or Inf: the model's weights may be damaged")
    _, _, rows = torch.linalg.svd(differences, full_matrices=False)
    directions = rows[:rank]
    return directions * _sign(directions @ differences.mean(0)).unsqueeze(1)


def _sign(values: Tensor) -> Tensor:
    """Sign of each value, with zero counted as positive (a row must never be zeroed)."""
    return torch.where(values < 0, -1.0, 1.0)


def gate_scores(states: Tensor, vectors: Tensor, thresholds: Tensor) -> Tensor:
    """Signed distance of states to each layer's threshold: ``s_l = h_l(q) . v_l - b_l``.

    Args:
        states: h_l(q), (B, n, d) for n gate layers.
        vectors: one direction per gate layer, (n, d).
        thresholds: b_l, (n,).

    Returns:
        (B, n), float32; positive means harmful.
    """
    return torch.linalg.vecdot(states.float(), vectors.float()) - thresholds.float()


def gate_open(scores: Tensor) -> Tensor:
    """The gate's decision, ``s > 0``, elementwise.

    Raises:
        ValueError: a score is NaN or Inf. A comparison would silently read NaN as harmless.
    """
    if not torch.isfinite(scores).all():
        raise ValueError("a gate score is NaN or Inf")
    return scores > 0


def dose_share(score: float, width: float) -> float:
    """The part of the dose that a gate gives, ``g = clamp(s / w, 0, 1)``; with width 0 the hard
    gate, 1 where ``s > 0`` and else 0."""
    if score <= 0:
        return 0.0
    return 1.0 if score >= width else score / width


def coordinates(states: Tensor, directions: Tensor) -> Tensor:
    """Coordinates ``c = h V^T`` of states (..., d) along V (m, d): (..., m), float32."""
    return states.float() @ directions.float().T


def erase(states: Tensor, directions: Tensor) -> Tensor:
    """Remove the component along V: ``h - (h V^T) V``.

    On its own this is the published way to jailbreak a model (it removes refusal). It is a step
    of ``restore`` and a labelled ablation, and is never saved or served as a guard.
    """
    wide = states.float()
    return (wide - coordinates(wide, directions) @ directions.float()).to(states.dtype)


def add(states: Tensor, directions: Tensor, reference: Tensor, alpha: float) -> Tensor:
    """The paper's alignment: ``h + alpha * c V`` with c the coordinates at q.

    Args:
        states: (B, T, d). directions: V, (m, d). reference: c, (B, m).
        alpha: dose; relative, because c carries the layer's own scale.
    """
    moved = states.float() + alpha * (reference.float() @ directions.float()).unsqueeze(1)
    return moved.to(states.dtype)


def restore(
    states: Tensor,
    directions: Tensor,
    reference: Tensor,
    alpha: float,
    share: Tensor | None = None,
) -> Tensor:
    """Project, then put the LLM's own component back: ``h - (h V^T) V + (1 + alpha) t V``.

    Args:
        states: (B, T, d). directions: V, (m, d).
        reference: t, (B, m), the LLM's coordinates, of this request as text or of the anchors.
        alpha: dose beyond the LLM's own component; 0 puts back exactly what it would have.
        share: g, (B, 1), how much of the way to go there: ``h + g (restored - h)``; None for all.
    """
    wide, rows = states.float(), directions.float()
    change = (1.0 + alpha) * reference.float().unsqueeze(1) - coordinates(wide, rows)
    if share is not None:
        change = share.unsqueeze(1) * change
    return (wide + change @ rows).to(states.dtype)


def steered_positions(
    columns: Tensor, last_prompt: Tensor, prompt_width: int, tokens: int | None, everywhere: bool
) -> Tensor:
    """Which columns of a forward call are steered.

    Columns are absolute places in the padded sequence, so the answer does not depend on how the
    sequence is cut into calls (cache, chunks, none at all).

    Args:
        columns: absolute columns of this call, (T,).
        last_prompt: column of q in each row, (B,); rows may be padded on either side.
        prompt_width: columns of the padded prompt; generated tokens follow from there.
        tokens: how many generated tokens are guarded, None for all. The first of them is
            produced at q itself, the n-th at column ``prompt_width + n - 2``.
        everywhere: also steer every prompt column (positions ``all``), padding included: nothing
            ever attends to it.

    Returns:
        Boolean mask (B, T).
    """
    at_q = columns[None, :] == last_prompt[:, None]
    generated = columns >= prompt_width
    if tokens is not None:
        generated = generated & (columns < prompt_width + tokens - 1)
    if everywhere:
        generated = generated | (columns < prompt_width)
    return at_q | generated[None, :]
