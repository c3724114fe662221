"""The method: safety steering directions, gate scores, and steering where a gate is open.

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


def refusal_intent(logits: Tensor, openings: Tensor) -> Tensor:
    """How near the LLM itself is to a refusal: ``log sum_t p(t)`` over the tokens t that its
    refusals begin with.

    Args:
        logits: of the first token of the answer to the text alone, (B, vocabulary).
        openings: token ids, (k,).

    Returns:
        (B,), float32, at most 0.
    """
    wide = logits.float()
    return wide[:, openings].logsumexp(1) - wide.logsumexp(1)


def refusal_verdict(logits: Tensor, openings: Tensor) -> Tensor:
    """Whether the LLM itself would refuse, as far as the first token tells: 1 if its most probable
    token is one of ``openings``, else 0.

    Args and Returns: as in ``refusal_intent``.
    """
    return torch.isin(logits.argmax(1), openings).float()


def coordinates(states: Tensor, directions: Tensor) -> Tensor:
    """Coordinates ``c = h V^T`` of states (..., d) along V (m, d): (..., m), float32."""
    return states.float() @ directions.float().T


def set_coordinates(states: Tensor, directions: Tensor, target: Tensor) -> Tensor:
    """Project, then put other coordinates in: ``h - (h V^T) V + t V``.

    What the modes `restore` and `erase` do; they differ in ``target`` alone. `erase` sets zero: on
    its own that is the published way to jailbreak a model (it removes refusal), so it is a labelled
    ablation and never saved or served as a guard.

    Args:
        states: h, (B, T, d), or (B, d) for one column: a decoding step, which is two operations.
        directions: V, (m, d). target: t, (B, m).

    Returns:
        Of the shape and dtype of ``states``.
    """
    wide, rows = states.float(), directions.float()
    if wide.ndim == 2:
        change = torch.addmm(target, wide, rows.T, alpha=-1)
        return torch.addmm(wide, change, rows).to(states.dtype)
    change = target.unsqueeze(1) - coordinates(wide, rows)
    return (wide + change @ rows).to(states.dtype)


def restored(reference: Tensor, alpha: float) -> Tensor:
    """The coordinates that `restore` sets: ``(1 + alpha) t``.

    Args:
        reference: t, (B, m), the LLM's coordinates, of this request as text or of the anchors.
        alpha: dose beyond the LLM's own component; 0 puts back exactly what it would have.
    """
    return (1.0 + alpha) * reference.float()


def shift(states: Tensor, added: Tensor) -> Tensor:
    """What the mode `add` does: ``h + a`` for states (B, T, d) or (B, d) and ``added`` (B, d)."""
    return (states.float() + (added if states.ndim == 2 else added.unsqueeze(1))).to(states.dtype)


def pull(reference: Tensor, directions: Tensor, alpha: float) -> Tensor:
    """What `add` adds, the paper's alignment: ``alpha * c V``, (B, d).

    Args:
        reference: c, (B, m), the coordinates at q. directions: V, (m, d).
        alpha: dose; relative, because c carries the layer's own scale.
    """
    return alpha * (reference.float() @ directions.float())
