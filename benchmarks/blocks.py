"""Blocks with other weights beside their originals: their outputs and errors by a forward pass; SparseGPT's update."""

import math
from dataclasses import dataclass


@dataclass
class Candidate:
    """A block's weights by their name in the block, zero outside ``masks``; ``heads`` (kept,) if physically fewer."""

    block: str
    weights: dict
    masks: dict
    heads: object = None

    def weight(self, sublayer, part: str = ""):
        """Return the weight of the block itself, or of a part of an attention, masked; the original's if not tuned."""
        import torch

        name = f"{part}.weight".lstrip(".")
        if name not in self.weights:
            return sublayer.network.get_parameter(f"{self.block}.{name}")
        w = self.weights[name]
        return torch.where(self.masks[name], w, 0.0) if name in self.masks else w

    def output(self, sublayer, stream):
        """Return the output (batch, length, out) for what the block receives in the original."""
        from common.t5.network import attend, split_heads

        if self.block != sublayer.name:
            x = sublayer.inner(stream) if self.block == sublayer.out else sublayer.inputs(stream)[0][0]
            return x @ self.weight(sublayer).T
        groups, bias = [x for x, _ in sublayer.inputs(stream)], sublayer.bias(stream)
        if self.heads is not None and bias.shape[1] > 1:  # their slice of the position bias that the layers share
            bias = bias[:, self.heads]
        q, k, v = (split_heads(groups[at] @ self.weight(sublayer, part).T, sublayer.module.key_value_proj_dim)
                   for part, at in (("q", 0), ("k", -1), ("v", -1)))
        return attend(q, k, v, bias) @ self.weight(sublayer, "o").T


def from_variant(variant, heads: int | None = None) -> Candidate:
    """Return a variant as a candidate; with ``heads``, the original's number, removed ones physically gone."""
    weights, masks = ({name.removeprefix(f"{variant.block}."): tensor for name, tensor in tensors.items()}
                      for tensors in (variant.weights, variant.masks))
    if heads is None or "q.weight" not in weights:
        return Candidate(variant.block, weights, masks)
    rows = masks["q.weight"].any(dim=1)
    weights = {name: w[:, rows] if name == "o.weight" else w[rows] for name, w in weights.items()}
    return Candidate(variant.block, weights, {"o.weight": masks["o.weight"][:, rows]},
                     rows.view(heads, -1).any(dim=1).nonzero().flatten())


def in_parallel(network, candidates, batch):
    """Walk through the original, each candidate beside its block; yield (candidate, its output, the original's, valid).

    ``valid`` (batch, length) says which tokens are no padding.
    """
    from common.t5.walk import walk

    of = {}
    for candidate in candidates:
        of.setdefault(candidate.block, []).append(candidate)
    for sublayer in walk(network, [[batch]], "cpu"):
        stream = sublayer.splits[0][0]
        for block in sublayer.blocks(of):
            target = Candidate(block, {}, {}).output(sublayer, stream)
            for candidate in of[block]:
                yield candidate, candidate.output(sublayer, stream), target, stream.valid


def judge(network, candidates, valid) -> dict:
    """Return E|y - y'|² / E|y|² on the validation text: the mean over all candidates, and over those of either kind."""
    import torch

    from common.t5.modules import kind_of

    sums = {id(c): torch.zeros(2, dtype=torch.float64) for c in candidates}
    with torch.no_grad():
        for batch in valid.fixed():
            for c, output, target, at in in_parallel(network, candidates, batch):
                sums[id(c)] += torch.stack([(output - target)[at].square().sum(), target[at].square().sum()])

    def mean(*kinds):
        chosen = [float(sums[id(c)][0] / sums[id(c)][1]) for c in candidates if kind_of(c.block) in kinds]
        value = sum(chosen) / len(chosen)
        return value if math.isfinite(value) else 1e9  # it diverged; JSON has no infinity

    return {"error": mean("attention", "linear"), "attention_error": mean("attention"), "linear_error": mean("linear")}


def sparse_gpt(gram, target, mask, damping: float, block: int = 128):
    """Return the weights (rows, in) that SparseGPT's update leaves, zero outside the mask.

    Frantar & Alistarh (2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot"), Algorithm 1
    with a given mask: columns from left to right; removing a weight moves those to its right by the optimal brain
    surgeon's update, with H = 2(G + λI) and H⁻¹ = UᵀU from one Cholesky factor; later blocks of columns at once.
    """
    import torch

    h = 2 * (gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype))
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    w, kept = target.double().T.contiguous(), mask.T.contiguous()  # (in, rows): a column is contiguous
    for begin in range(0, len(w), block):
        end = min(begin + block, len(w))
        errors = torch.zeros_like(w[begin:end])
        for j in range(begin, end):
            errors[j - begin] = torch.where(kept[j], 0.0, w[j]) / u[j, j]
            w[j:end] -= torch.outer(u[j, j:end], errors[j - begin])
        w[end:] -= u[begin:end, end:].T @ errors
    return torch.where(kept, w, 0.0).T
