"""What is measured on a layer's inputs, keys and values while calibration text runs through it."""

from __future__ import annotations

import torch

from quantkit.methods.gptq import accumulate_hessian, complete_hessian
from quantkit.methods.hadamard import rotate_hessian
from quantkit.ranks import Ranks

# Numbers looked at together on a CPU: the passes over them stay in the cache.
_ELEMENTS = 1 << 18


class InputStatistics:
    """Statistics of one input [tokens, K] of a layer, shared by all linears that read it.

    Args:
        products: what the inputs are rounded to in the Hessian's products, which are added up in float32.

    Attributes:
        absmax, mean_abs, rms: float32 [K]; rms after `combine`.
        hessian: float32 [K, K], 2 X^T X summed over tokens, or None if it is not needed; whole after `combine`.
        rows: up to `keep` of the tokens seen, spread evenly over all batches, float32.
    """

    def __init__(
        self,
        columns: int,
        *,
        hessian: bool,
        keep: int,
        batches: int,
        device: torch.device,
        products: torch.dtype = torch.float32,
    ) -> None:
        self.tokens = 0
        self._products = products
        self.absmax = torch.zeros(columns, device=device)
        self._abs = torch.zeros(columns, dtype=torch.float64, device=device)
        self._square = torch.zeros(columns, dtype=torch.float64, device=device)
        self.hessian = torch.zeros(columns, columns, device=device) if hessian else None
        self._rows: list[torch.Tensor] = []
        self._per_batch = -(-keep // max(batches, 1))

    def update(self, x: torch.Tensor) -> None:
        """Take in a batch [..., K]."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        self.tokens += x.shape[0]
        rows = max(1, _ELEMENTS // x.shape[1]) if x.device.type == "cpu" else max(1, len(x))
        for part in x.split(rows):
            magnitude = part.abs()
            self.absmax = torch.maximum(self.absmax, magnitude.amax(0))
            self._abs += magnitude.sum(0)
            if self.hessian is None:
                self._square += magnitude.square_().sum(0)
        if self.hessian is not None:
            accumulate_hessian(self.hessian, x, rounded=self._products == torch.bfloat16)
        if self._per_batch:
            step = max(1, x.shape[0] // self._per_batch)
            self._rows.append(x[::step][: self._per_batch].clone())

    @property
    def finite(self) -> bool:
        """Whether all that was seen here is: NaN and infinity stay in the maxima."""
        return bool(torch.isfinite(self.absmax).all())

    def combine(self, ranks: Ranks) -> None:
        """From here on, what all processes have seen."""
        ranks.largest(self.absmax)
        for sums in (self._abs, self._square if self.hessian is None else self.hessian):
            ranks.total(sums)
        if self.hessian is not None:
            complete_hessian(self.hessian)
            self._square = self.hessian.diagonal().double() / 2
        self._rows = [ranks.joined(self.rows)]
        count = torch.tensor([self.tokens])
        ranks.total(count)
        self.tokens = int(count)

    @property
    def mean_abs(self) -> torch.Tensor:
        return (self._abs / max(self.tokens, 1)).float()

    @property
    def rms(self) -> torch.Tensor:
        return (self._square / max(self.tokens, 1)).sqrt().float()

    @property
    def rows(self) -> torch.Tensor:
        return (
            torch.cat(self._rows) if self._rows else self.absmax.new_zeros(0, self.absmax.numel())
        )

    def hessian_after(
        self, factor: torch.Tensor | None, rotation: int | None
    ) -> torch.Tensor | None:
        """The Hessian of rotate(x / factor), by the same change of basis on both of its sides."""
        hessian = self.hessian
        if hessian is not None and factor is not None:
            hessian = (hessian / factor[:, None]).div_(factor)
        if hessian is not None and rotation:
            hessian = rotate_hessian(hessian, rotation)
        return hessian


class KeyStatistics:
    """Largest magnitudes of keys after RoPE, float32 [KV heads, head_dim].

    Attributes:
        absmax: per channel.
        pairs: of RoPE's pairs (i, i + head_dim / 2), equal on both members. RoPE only turns a pair, so this
            is the same before and after it.
        samples: queries and keys after RoPE, and values, of a few blocks: [1, heads, tokens, head_dim] each.
    """

    def __init__(self, keep: int = 2) -> None:
        self._keep = keep
        self.samples: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.absmax: torch.Tensor | None = None
        self.pairs: torch.Tensor | None = None

    def update(self, query: torch.Tensor, keys: torch.Tensor, value: torch.Tensor) -> None:
        """Take in a batch: queries after RoPE [batch, heads, tokens, head_dim], keys after it and values alike."""
        from quantkit.methods.fireq import pair_magnitude

        if len(self.samples) < self._keep:
            self.samples.append((query[:1].clone(), keys[:1].clone(), value[:1].clone()))
        keys = keys.detach().float()
        absmax = keys.abs().amax((0, 2))
        pairs = pair_magnitude(keys).amax(0)
        self.absmax = absmax if self.absmax is None else torch.maximum(self.absmax, absmax)
        self.pairs = pairs if self.pairs is None else torch.maximum(self.pairs, pairs)

    def combine(self, ranks: Ranks) -> None:
        """From here on, what all processes have seen."""
        if self.absmax is None or self.pairs is None:
            return  # no model whose attention can be watched
        ranks.largest(self.absmax)
        ranks.largest(self.pairs)
        joined = [ranks.joined(torch.cat(each)) for each in zip(*self.samples)]
        self.samples = list(zip(*(each[: self._keep].split(1) for each in joined)))
