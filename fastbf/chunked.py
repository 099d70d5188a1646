"""The torch backend's attention and classifier loss: the mathematics of reference.py in chunks that stay in cache.

Both are autograd Functions that keep no N × N weights (respectively no fp32 copy of the logits) for backward and
draw their dropout decisions again instead of storing them. Asked for a graph of the gradient (double backward),
they differentiate the reference.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd import Function

from fastbf import gemm, reference
from fastbf.dropout import Dropout, Site

# Bytes of scores, or of logits, worked on at a time. On CPU such a chunk stays in the outer caches (measured: 2 to
# 16 MiB are within 5% of each other, the whole matrix at N = 4096 takes 1.5 times as long); on a GPU it bounds
# memory while every launch still fills the machine.
_CHUNK_BYTES = {"cpu": 8 << 20}
_CHUNK_BYTES_ELSEWHERE = 256 << 20
_MIN_CLASSIFIER_ROWS = 512
# Scores of a head from which it is worked on by itself.
_LONE_GROUP = 1 << 16
# Up to this many bytes of logits are kept for backward; above, each chunk's logits are computed again.
KEEP_LOGITS_BYTES = 1 << 30


def _chunk_elements(device: torch.device, dtype: torch.dtype) -> int:
    return _CHUNK_BYTES.get(device.type, _CHUNK_BYTES_ELSEWHERE) // dtype.itemsize


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics are kept in fp32, or in fp64 for fp64 inputs (DESIGN section 5)."""
    return torch.promote_types(dtype, torch.float32)


def _no_autocast(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)


# ---------------------------------------------------------------------------------------------------- attention


def attention_mask(dropout: Dropout, q: Tensor, num_keys: int) -> Tensor:
    """The whole multiplier (…, H, N, M) of an attention call whose queries are q (N, …, H, D)."""
    groups = torch.arange(q[0, ..., 0].numel(), device=q.device).view(*q.shape[1:-1], 1)
    rows = torch.arange(q.shape[0], device=q.device)
    return dropout.multiplier(Site.ATTENTION, groups, rows, num_keys)


def elementwise_mask(dropout: Dropout, site: Site, x: Tensor) -> Tensor:
    """The multiplier for a tensor x (N, …, C) at one of the elementwise sites."""
    positions = torch.arange(x[0, ..., 0].numel(), device=x.device).view(x.shape[1:-1])
    rows = torch.arange(x.shape[0], device=x.device).view(-1, *[1] * (x.dim() - 2))
    return dropout.multiplier(site, positions, rows, x.shape[-1])


def _tiles(groups: int, rows: int, columns: int, elements: int) -> Iterator[tuple[slice, slice]]:
    """Cuts (groups, rows, columns) into pieces of up to ``elements``: several whole groups, or rows of one.

    Groups of some size are taken one by one: each is a matrix product large enough to be quickest by itself.
    """
    group_step = 1 if rows * columns >= _LONE_GROUP else max(1, elements // (rows * columns))
    row_step = rows if group_step > 1 else min(rows, max(1, elements // columns))
    for g in range(0, groups, group_step):
        for r in range(0, rows, row_step):
            yield slice(g, min(g + group_step, groups)), slice(r, min(r + row_step, rows))


def _batched(x: Tensor) -> Tensor:
    """(N, …, H, D) → (G, N, D) with G = positions · H, a view where the strides allow one."""
    x = reference.heads_first(x)
    return x.reshape(-1, *x.shape[-2:])


class _Attention(Function):
    """Saves q, k, v and the seed; nothing of size N × M."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, seed: Tensor, scale: float, p: float) -> Tensor:
        ctx.save_for_backward(q, k, v, seed)
        ctx.scale, ctx.p = scale, p
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        o = _batched(out)
        for tile in _AttentionTiles(q, k, v, seed, scale, p):
            o[tile.group, tile.row] = gemm.bmm(tile.weights().mul_(tile.mask()), tile.v)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, seed = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            mask = attention_mask(Dropout(ctx.p, seed, _compute_dtype(q.dtype)), q, k.shape[0])
            out = reference.attention(q, k, v, scale=ctx.scale, mask=mask).to(q.dtype)
            wanted = [t for t, need in zip((q, k, v), needs, strict=True) if need]
            grads = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
            return *(next(grads) if need else None for need in needs), None, None, None

        dq, dk, dv = (
            torch.zeros(t.shape, dtype=_compute_dtype(t.dtype), device=t.device) if need else None
            for t, need in zip((q, k, v), needs, strict=True)
        )
        g, gq, gk, gv = (None if t is None else _batched(t) for t in (grad, dq, dk, dv))
        for tile in _AttentionTiles(q, k, v, seed, ctx.scale, ctx.p):
            g_tile = g[tile.group, tile.row].to(gq.dtype if gq is not None else tile.q.dtype)
            weights, mask = tile.weights(), tile.mask()
            if needs[0] or needs[1]:
                d_weights = gemm.bmm(g_tile, tile.v.mT).mul_(mask)
                d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
                if needs[0]:
                    gq[tile.group, tile.row] = gemm.bmm(d_scores, tile.k).mul_(ctx.scale)
                if needs[1]:
                    gk[tile.group].add_(gemm.bmm(d_scores.mT, tile.q), alpha=ctx.scale)
            if needs[2]:
                gv[tile.group].add_(gemm.bmm(mask.mul_(weights).mT, g_tile))
        return *(None if d is None else d.to(q.dtype) for d in (dq, dk, dv)), None, None, None


class _AttentionTiles:
    """Walks the score matrix of one attention call piece by piece."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, seed: Tensor, scale: float, p: float) -> None:
        self.all_q, self.all_k, self.all_v = _batched(q), _batched(k), _batched(v)
        self.scale, self.dtype = scale, _compute_dtype(q.dtype)
        self.dropout = Dropout(p, seed, self.dtype)

    def __iter__(self) -> Iterator[_AttentionTiles]:
        groups, rows, _ = self.all_q.shape
        columns = self.all_k.shape[1]
        for group, row in _tiles(groups, rows, columns, _chunk_elements(self.all_q.device, self.dtype)):
            self.group, self.row = group, row
            self.q = self.all_q[group, row].to(self.dtype)
            if row.start == 0:
                self.k, self.v = (t[group].to(self.dtype).contiguous() for t in (self.all_k, self.all_v))
            yield self

    def weights(self) -> Tensor:
        """softmax(scale · q kᵀ) of this piece: (groups, rows, M)."""
        return torch.softmax(gemm.bmm(self.q * self.scale, self.k.mT), dim=-1)

    def mask(self) -> Tensor:
        device = self.q.device
        group = torch.arange(self.group.start, self.group.stop, device=device)[:, None]
        row = torch.arange(self.row.start, self.row.stop, device=device)
        return self.dropout.multiplier(Site.ATTENTION, group, row, self.k.shape[1])


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, p: float, seed: Tensor) -> Tensor:
    """drop(softmax(scale · q kᵀ)) v in chunks. q (N, …, H, D), k and v (M, …, H, D), one dtype → q's shape."""
    with _no_autocast(q):
        return _Attention.apply(q, k, v, seed, scale, p)


# ------------------------------------------------------------------------------------------------- classifier loss


class _Targets:
    """Rows r of the logits and the target row r mod N they belong to: a fork repeats the target without a copy."""

    def __init__(
        self,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        smoothing: float,
        num_classes: int,
        dtype: torch.dtype,
    ) -> None:
        self.target, self.ignore_index = target, ignore_index
        self.smoothing, self.num_classes = smoothing, num_classes
        self.weight = None if weight is None else weight.to(dtype)
        self.total_weight = num_classes if weight is None else self.weight.sum()

    def pieces(self, rows: range) -> Iterator[tuple[slice, Tensor]]:
        """Cuts a range of rows at the stream boundary: (the piece within the range, its targets)."""
        n, start = self.target.shape[0], rows.start
        while start < rows.stop:
            stop = min(rows.stop, (start // n + 1) * n)
            first = start % n
            yield slice(start - rows.start, stop - rows.start), self.target[first : first + stop - start]
            start = stop

    def distribution(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Class-weighted, smoothed probabilities: what multiplies -log p."""
        t = t.to(dtype)
        if self.smoothing:
            t = t * (1 - self.smoothing) + self.smoothing / self.num_classes
        return t if self.weight is None else t * self.weight

    def indices(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
        """For class indices: which rows count, the index (0 where ignored), and its class weight."""
        valid = t != self.ignore_index
        index = torch.where(valid, t, 0)
        return valid, index, 1.0 if self.weight is None else self.weight[index]

    def loss(self, log_p: Tensor, t: Tensor) -> Tensor:
        """Loss of every row. log_p (R, K) log-probabilities, t the rows' targets → (R,)."""
        if t.is_floating_point():
            return -(self.distribution(t, log_p.dtype) * log_p).sum(-1)
        valid, index, weight = self.indices(t)
        loss = -log_p.gather(1, index[:, None])[:, 0] * weight
        if self.smoothing:
            uniform = log_p.sum(-1) if self.weight is None else log_p @ self.weight
            loss = (1 - self.smoothing) * loss - self.smoothing / self.num_classes * uniform
        return torch.where(valid, loss, 0)

    def d_logits(self, logits: Tensor, t: Tensor, grad: Tensor, out: Tensor) -> None:
        """Writes into ``out`` (R, K) the gradient of Σ grad · loss by the logits: grad · (p · Σ t - t), row by row."""
        d = torch.softmax(logits, -1, out=out)
        if t.is_floating_point():
            t = self.distribution(t, logits.dtype)
            d.mul_(t.sum(-1, keepdim=True)).sub_(t).mul_(grad[:, None])
            return
        valid, index, weight = self.indices(t)
        grad = torch.where(valid, grad, 0)
        hit = grad * weight * (1 - self.smoothing)
        uniform = grad * (self.smoothing / self.num_classes)
        d.mul_((hit + uniform * self.total_weight)[:, None])
        if self.smoothing:
            d -= uniform[:, None] if self.weight is None else uniform[:, None] * self.weight
        d.scatter_add_(1, index[:, None], -hit[:, None])


class _LinearCrossEntropy(Function):
    """Per-row losses of a linear classifier. Saves the input, the weight, the target, and the product
    input · Wᵀ + b in its own dtype unless that passes ``KEEP_LOGITS_BYTES``."""

    @staticmethod
    def forward(ctx, x, linear_weight, linear_bias, logit_bias, target, weight, scale, ignore_index, smoothing, count):
        rows, num_classes = x.shape[0], linear_weight.shape[0]
        dtype = _compute_dtype(x.dtype)
        targets = _Targets(target, weight, ignore_index, smoothing, num_classes, dtype)
        keep = any(ctx.needs_input_grad) and rows * num_classes * x.dtype.itemsize <= KEEP_LOGITS_BYTES
        products = []
        loss = x.new_empty(rows, dtype=dtype)
        correct = torch.empty(rows if count else 0, dtype=torch.bool, device=x.device)
        for r in _row_chunks(x, num_classes):
            z = gemm.linear(x[r.start : r.stop], linear_weight, linear_bias)
            if keep:
                products.append(z)
            logits = reference.class_logits(z.to(dtype), scale, logit_bias)
            log_p = torch.log_softmax(logits, -1)
            for piece, t in targets.pieces(r):
                at = slice(r.start + piece.start, r.start + piece.stop)
                loss[at] = targets.loss(log_p[piece], t)
                if count:
                    correct[at] = reference.correct(logits[piece], t, ignore_index)[0]
        ctx.save_for_backward(x, linear_weight, linear_bias, logit_bias, target, weight, *products)
        ctx.options = (scale, ignore_index, smoothing)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx, grad, _):
        x, linear_weight, linear_bias, logit_bias, target, weight, *products = ctx.saved_tensors
        scale, ignore_index, smoothing = ctx.options
        needs = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            return _differentiable_backward(ctx, grad)
        num_classes = linear_weight.shape[0]
        targets = _Targets(target, weight, ignore_index, smoothing, num_classes, grad.dtype)
        dx = torch.empty_like(x) if needs[0] else None
        dw = db = None
        with _no_autocast(x):
            for i, r in enumerate(_row_chunks(x, num_classes)):
                rows = slice(r.start, r.stop)
                z = products[i] if products else gemm.linear(x[rows], linear_weight, linear_bias)
                logits = reference.class_logits(z.to(grad.dtype), scale, logit_bias)
                d = torch.empty_like(logits)
                for piece, t in targets.pieces(r):
                    targets.d_logits(logits[piece], t, grad[rows][piece], out=d[piece])
                if needs[2] or needs[3]:
                    db = d.sum(0) if db is None else db + d.sum(0)
                d = d.to(x.dtype) if scale == 1.0 else d.mul_(scale).to(x.dtype)
                if needs[0]:
                    dx[rows] = gemm.mm(d, linear_weight)
                if needs[1]:
                    dw = _accumulate(dw, d, x[rows], grad.dtype)
        return (
            dx,
            None if dw is None else dw.to(linear_weight.dtype),
            (db * scale).to(linear_bias.dtype) if needs[2] else None,
            db.to(logit_bias.dtype) if needs[3] else None,
            *[None] * 6,
        )


def _accumulate(total: Tensor | None, d: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """total + dᵀ x, where partial sums of half-precision products are kept in fp32."""
    part = gemm.mm(d.mT, x)
    return part if total is None else total.to(dtype).add_(part)


def _differentiable_backward(ctx, grad: Tensor):
    x, linear_weight, linear_bias, logit_bias, target, weight, *_ = ctx.saved_tensors
    scale, ignore_index, smoothing = ctx.options
    needs = ctx.needs_input_grad[:4]
    terms, _ = reference.linear_cross_entropy_terms(
        x,
        linear_weight,
        target if x.shape[0] == target.shape[0] else torch.cat([target, target]),
        linear_bias=linear_bias,
        weight=weight,
        logit_bias=logit_bias,
        scale=scale,
        ignore_index=ignore_index,
        label_smoothing=smoothing,
    )
    inputs = [t for t, need in zip((x, linear_weight, linear_bias, logit_bias), needs, strict=True) if need]
    grads = iter(torch.autograd.grad(terms.loss, inputs, grad.to(terms.loss.dtype), create_graph=True))
    return *(next(grads) if need else None for need in needs), *[None] * 6


def _row_chunks(x: Tensor, num_classes: int) -> Iterator[range]:
    elements = 2 * _chunk_elements(x.device, _compute_dtype(x.dtype))
    step = max(_MIN_CLASSIFIER_ROWS, elements // num_classes)
    for start in range(0, x.shape[0], step):
        yield range(start, min(start + step, x.shape[0]))


def linear_cross_entropy_rows(
    x: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    logit_bias: Tensor | None,
    scale: float,
    ignore_index: int,
    label_smoothing: float,
    count_correct: bool,
) -> tuple[Tensor, Tensor]:
    """Loss of every row of logits = scale · (x Wᵀ + b) + logit_bias, and whether its largest logit is right.

    x (M, C); target of N rows with M = N or 2N, the fork repeating it. Returns ((M,) in fp32 or fp64, (M,) bool, or
    an empty tensor unless ``count_correct``).
    """
    with _no_autocast(x):
        return _LinearCrossEntropy.apply(
            x, linear_weight, linear_bias, logit_bias, target, weight, scale, ignore_index, label_smoothing,
            count_correct,
        )  # fmt: skip
