"""What is removed at a pruning rate: from weights, and for obs their inputs' second moments, to masks.

A mask is a bool tensor of the weight's shape, True where the weight is kept.
"""

import torch

from common.least_squares import solve_together
from common.pruning.configurations import check_removed, removed_count

OBS_TOLERANCE = 1e-2  # of fits that only say what goes next: composed models' losses are those of 3e-3
OBS_KEPT = 0.85  # with 0.67, 4 steps to 80 % instead of 10, a composed model's loss is higher by 0.014


def removed_of(rate: float, present: torch.Tensor) -> int:
    """Return how many entries are gone after a rate: those that were gone before, and the rate's of the rest.

    Args:
        present: bool, True for what is there; a model that was pruned before has less.
    """
    there = int(present.sum())
    return present.numel() - there + removed_count(rate, there)


def smallest_removed(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return a mask of ``scores``' shape without its ``count`` smallest entries; ties fall to the first ones."""
    order = torch.sort(scores.flatten(), stable=True).indices[:count]
    mask = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[order] = False
    return mask.view(scores.shape)


def magnitude_mask(weight: torch.Tensor, rate: float, present: torch.Tensor | None = None) -> torch.Tensor:
    """Remove single weights of least magnitude (l1-unstructured, as `torch.nn.utils.prune.l1_unstructured`).

    Args:
        present: bool, as ``weight``, False for weights that were removed before (default: all are there).
    """
    present = torch.ones_like(weight, dtype=torch.bool) if present is None else present
    return smallest_removed(torch.where(present, weight.abs(), -1.0), removed_of(rate, present))


def obs_masks(weight: torch.Tensor, rates, gram: torch.Tensor, present: torch.Tensor,
              inputs: torch.Tensor | None = None, outputs: torch.Tensor | None = None,
              damping: float = 1e-2) -> list[torch.Tensor]:
    """Remove, step by step, weights of least w² / [G⁻¹]ⱼⱼ; between two steps the others are re-fitted.

    The score is the error a weight alone would leave, its row's others re-fitted: Hassibi & Stork (1993, "Optimal
    Brain Surgeon"), with the inverse shared by the rows as in Frantar & Alistarh (2023, "SparseGPT"); ``damping`` is
    a fraction of G's mean diagonal, theirs too. Every step leaves `OBS_KEPT` of the weights, whatever the rates, so
    a rate's mask depends on no other rate, and all rates share the fits.

    Args:
        present: bool, as ``weight``, False for weights that were removed before.
        inputs: (in,) bool, False for inputs that are zero in the pruned model (those of removed heads or units): their
            weights are the first that a rate removes, and are removed at any rate; the others are re-fitted before the
            first step too. By default all are there.
        outputs: (out,) bool, False for outputs that nothing reads in the pruned model; removed as those.

    Returns:
        A mask for each of ``rates``, in their order.
    """
    inputs = torch.ones_like(present[0]) if inputs is None else inputs
    outputs = torch.ones_like(present[:, 0]) if outputs is None else outputs
    ridge = max(damping * float(gram.diagonal().mean()), 1e-30)
    a = (gram + ridge * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device))[inputs][:, inputs]
    inverse = torch.ones_like(gram[0])  # for inputs that are not there of no account
    inverse[inputs] = torch.cholesky_inverse(torch.linalg.cholesky(a)).diagonal()
    cross, mask = weight.double() @ gram, present & inputs & outputs[:, None]
    kept = int(mask.sum())
    fitted = weight.double() if inputs.all() else solve_together(gram, cross, weight, mask, OBS_TOLERANCE)
    masks, pending = {}, sorted(set(rates), reverse=True)
    while pending:
        scores = torch.where(mask, fitted.square() / inverse, -1.0)
        kept = int(OBS_KEPT * kept)
        while pending and weight.numel() - (removed := removed_of(pending[-1], present)) >= kept:
            masks[pending.pop()] = smallest_removed(scores, removed) & mask
        if pending:
            mask = smallest_removed(scores, weight.numel() - kept)
            fitted = solve_together(gram, cross, weight, mask, OBS_TOLERANCE)
    return [masks[rate] for rate in rates]


def head_pairs(o: torch.Tensor, gram: torch.Tensor, heads: int) -> torch.Tensor:
    """Return what every two heads of an attention have in common of its output, (heads, heads), as shares of E‖o·x‖².

    Without the heads R the output o·x loses E‖o_R x_R‖² = Σ_{h,h' ∈ R} ⟨o_hᵀ o_h', G_hh'⟩: the sum of their pairs.

    Args:
        o: (d_model, heads × d_kv).
        gram: E[x xᵀ] of o's input, (heads × d_kv, heads × d_kv), float64.
    """
    pairs = ((o.double().T @ o.double()) * gram).view(heads, -1, heads, gram.shape[0] // heads).sum(dim=(1, 3))
    return pairs / pairs.sum().clamp_min(1e-300)


def head_order(pairs: torch.Tensor) -> list[int]:
    """Return all heads, each next the one without which the output loses least, those before it being gone.

    Args:
        pairs: `head_pairs` of an attention; the sum of several finds the order that suits them together.
    """
    kept, order = torch.ones(len(pairs), dtype=torch.bool, device=pairs.device), []
    for _ in range(len(pairs)):
        # Removing h, too, loses its own part and what it shares with those gone already, counted twice.
        cost = pairs.diagonal() + 2 * pairs[:, ~kept].sum(dim=1)
        order.append(int(torch.where(kept, cost, torch.inf).argmin()))
        kept[order[-1]] = False
    return order


def head_scores(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    """Return each head's joint l1 norm of its q, k and v rows, shape (heads,)."""
    return sum(w.abs().reshape(heads, -1).double().sum(dim=1) for w in (q, k, v))


def unit_scores(weights: list[torch.Tensor]) -> torch.Tensor:
    """Return each hidden unit's joint l1 norm, shape (units,): of its rows of wi (wi_0, wi_1) and its column of wo.

    Args:
        weights: each (units, d_model), wo transposed.
    """
    return sum(w.abs().double().sum(dim=1) for w in weights)


def unit_order(wo: torch.Tensor, gram: torch.Tensor, present: torch.Tensor, number: int,
               damping: float = 1e-2) -> list[int]:
    """Return the first ``number`` hidden units to remove, each the one that costs least once wo is re-fitted.

    Removing unit j and re-fitting the others raises E‖wo·h − ŵo·h‖² by ‖ŵo_j‖² / [G⁻¹]ⱼⱼ; then wo and G⁻¹ are those of
    the rest (Hassibi & Stork 1993, "Optimal Brain Surgeon", for a column of wo in the place of a weight).

    Args:
        wo: (d_model, units).
        gram: G = E[h hᵀ] of the hidden units, (units, units), float64.
        present: (units,) bool, the units that are there.
        damping: a fraction of G's mean diagonal.
    """
    ridge = max(damping * float(gram.diagonal().mean()), 1e-30)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(
        gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)))
    fitted, kept, order = wo.double().clone(), present.to(gram.device).clone(), []
    for _ in range(number):
        cost = fitted.square().sum(dim=0) / inverse.diagonal().clamp_min(1e-300)
        j = int(torch.where(kept, cost, torch.inf).argmin())
        kept[j] = False
        order.append(j)
        row = inverse[j] / inverse[j, j]
        fitted -= fitted[:, j, None] * row
        inverse -= inverse[:, j, None] * row
        inverse[j, j] = 1.0
    return order


def structure_mask(scores: torch.Tensor, rate: float, present: torch.Tensor, what: str) -> torch.Tensor:
    """Remove the heads or units of lowest score among those ``present``; all are bool, shape (heads,) or (units,).

    Raises:
        UserError: a rate below 1 would remove all of ``what``.
    """
    check_removed(rate, int(present.sum()), what)
    return smallest_removed(torch.where(present, scores, -1.0), removed_of(rate, present))


def attention_masks(heads_kept: torch.Tensor, q: torch.Tensor, o_mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the weight masks of an attention whose heads ``heads_kept`` (heads,) remain.

    Args:
        q: any weight of q, k, v, shape (heads × d_kv, d_model).
        o_mask: mask of the out-projection by its own rate, shape (d_model, heads × d_kv). The columns that
            read a removed head multiply zeros, so they are removed too, if they are not yet.
    """
    inner = heads_kept.repeat_interleave(q.shape[0] // heads_kept.numel())
    rows = inner[:, None].expand(q.shape)
    return {"q": rows, "k": rows, "v": rows, "o": o_mask & inner[None, :]}
