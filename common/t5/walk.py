"""The one walk over a T5's layers: what every sub-layer receives and gives, for a whole text, layer by layer.

Held are the residual streams of the text before one sub-layer. Its batches are streamed through that sub-layer once,
whoever consumes the walk takes what it needs of them, then the streams advance. So one pass gives every statistic, and
memory is the text's streams and what one sub-layer's consumer keeps, whatever the model's depth. Two walks side by side
compare two networks. (As SparseGPT, Frantar & Alistarh 2023, goes through a decoder block by block.)
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from common.least_squares import Moments
from common.runtime import progress
from common.t5.loss import shift_right
from common.t5.network import ATTENTIONS, additive, attend, split_heads


@dataclass
class Stream:
    """One batch on its way through a stack."""

    states: torch.Tensor  # (batch, length, d_model), the residual stream before the next sub-layer
    valid: torch.Tensor  # bool (batch, length): the tokens that count
    mask: torch.Tensor | None  # additive, of source tokens that do not count: (batch, 1, 1, length)
    source: "Stream | None" = None  # the encoder's, at its end; what cross-attention reads
    _inner: torch.Tensor | None = None
    _output: torch.Tensor | None = None


class Sublayer:
    """One sub-layer of a network and the streams before it. Weights changed here count for what is asked later.

    Attributes:
        name: of its module, e.g. ``encoder.block.0.layer.1.DenseReluDense``.
        number: of the sub-layer in its stack, from 0.
        splits: the streams of each text.
        out: name of its module that writes into the residual stream, ``o`` or ``wo``.
    """

    def __init__(self, network, name: str, number: int, layer, splits: list[list[Stream]], positions: dict):
        self.number = number
        self.network, self.name, self.splits, self._norm = network, name, splits, layer.layer_norm
        self.module, self._positions = network.get_submodule(name), positions
        self.is_attention = name.endswith(ATTENTIONS)
        self.crossed = name.endswith("EncDecAttention")
        self.out = f"{name}.{'o' if self.is_attention else 'wo'}"
        self._out = self.module.o if self.is_attention else self.module.wo

    @property
    def readers(self) -> list[tuple[str, ...]]:
        """The linear modules that read the stream, by name, and as a second group those that read the source."""
        parts = [("q",), ("k", "v")] if self.crossed else [("q", "k", "v")] if self.is_attention else \
            [("wi_0", "wi_1") if hasattr(self.module, "wi_0") else ("wi",)]
        return [tuple(f"{self.name}.{part}" for part in group) for group in parts]

    def blocks(self, among) -> list[str]:
        """Return which tuning blocks of ``among`` lie in this sub-layer: itself, and of a feed-forward wi, wo."""
        names = [self.name] if self.is_attention else [self.name, *self.readers[0], self.out]
        return [name for name in names if name in among]

    @torch.no_grad()
    def inputs(self, stream: Stream) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return what each group of `readers` receives, (batch, length, d_model), and which tokens count."""
        own = self._norm(stream.states), stream.valid
        return [own, (stream.source.states, stream.source.valid)] if self.crossed else [own]

    @torch.no_grad()
    def bias(self, stream: Stream) -> torch.Tensor:
        """Return what an attention adds to its scores: its mask, in self-attention positions too."""
        if self.crossed:
            return stream.source.mask
        length = stream.states.shape[1]
        if length not in self._positions:
            self._positions[length] = self.network.get_submodule(self.name.split(".")[0]).position_bias(length)
        bias = self._positions[length]
        return bias if stream.mask is None else bias + stream.mask

    @torch.no_grad()
    def inner(self, stream: Stream, hold: bool = False) -> torch.Tensor:
        """Return what `out` receives, (batch, length, inner size), by the present weights of `readers`.

        Args:
            hold: keep it until the streams advance, because the weights of `out` change before that.
        """
        inner = self.mix(stream, lambda part: getattr(self.module, part).weight)
        if hold:
            stream._inner = inner
        else:
            stream._output = self._out(inner)
        return inner

    def mix(self, stream: Stream, weight) -> torch.Tensor:
        """Return what `out` would receive if each reader ``part`` had the weight ``weight(part)``; with gradients."""
        inputs = [x for x, _ in self.inputs(stream)]
        if self.is_attention:
            q, k, v = (split_heads(inputs[i] @ weight(part).T, self.module.key_value_proj_dim)
                       for part, i in (("q", 0), ("k", -1), ("v", -1)))
            return attend(q, k, v, self.bias(stream))
        if hasattr(self.module, "wi_0"):
            return self.module.act(inputs[0] @ weight("wi_0").T) * (inputs[0] @ weight("wi_1").T)
        return self.module.act(inputs[0] @ weight("wi").T)

    @torch.no_grad()
    def output(self, stream: Stream) -> torch.Tensor:
        """Return what `out` adds to the stream (batch, length, d_model)."""
        if stream._output is None:
            if stream._inner is None:
                self.inner(stream)  # which keeps the output, not what it is made of
            else:
                stream._output = self._out(stream._inner)
        return stream._output

    def moments(self, split: int, blocks: list[str]) -> dict[str, Moments]:
        """Return the moments of each block's input on one text, all processes' shares of it; shared where equal.

        Of a sub-layer that is a block, they are those of what `out` receives; of a feed-forward also, by its first
        reader's name, those of what it receives itself.
        """
        reading = [block for block in blocks if block not in (self.name, self.out)]
        if self.name in blocks and not self.is_attention:
            reading.append(self.readers[0][0])
        writing = [block for block in blocks if block in (self.name, self.out)]
        of_stream, of_inner = Moments(), Moments()
        for stream in self.splits[split]:
            if reading:
                of_stream.add(self.inputs(stream)[0][0][stream.valid])
            if writing:
                of_inner.add(self.inner(stream)[stream.valid])
        of_stream.add_up()
        of_inner.add_up()
        return dict.fromkeys(reading, of_stream) | dict.fromkeys(writing, of_inner)

    def advance(self) -> None:
        """Put all streams behind this sub-layer."""
        for stream in (s for split in self.splits for s in split):
            stream.states = stream.states + self.output(stream)
            stream._inner = stream._output = None


def walk(network, splits: list, device, what: str = "") -> Iterator[Sublayer]:
    """Yield every sub-layer of a T5 in execution order, with the streams of all texts before it.

    Asking for the next one advances the streams, by the weights as they are then. The network runs in evaluation mode,
    and ``lm_head`` not at all.

    Args:
        network: on ``device``; put into evaluation mode.
        splits: texts, each an iterable of batches (`common.text.batches.Batches.collate`).
        what: the work's name on a progress bar; without it there is none.
    """
    network.eval()
    sublayers = _walk(network, [[{key: t.to(device) for key, t in batch.items()} for batch in s] for s in splits])
    total = sum(len(block.layer) for stack in (network.encoder, network.decoder) for block in stack.block)
    return progress(sublayers, what, total) if what else sublayers


@torch.no_grad()
def _walk(network, splits: list[list[dict]]) -> Iterator[Sublayer]:
    sources = []
    for split in splits:
        valid = [batch["attention_mask"].bool() for batch in split]
        sources.append([Stream(network.encoder.embed_tokens(batch["input_ids"]), v, additive(v)[:, None, None])
                        for batch, v in zip(split, valid, strict=True)])
    yield from _walk_stack(network, "encoder", sources)
    targets = []
    for split, streams in zip(splits, sources, strict=True):
        targets.append([])
        for batch, source in zip(split, streams, strict=True):
            ids = shift_right(batch["labels"], network.config)
            targets[-1].append(Stream(network.decoder.embed_tokens(ids), batch["labels"] >= 0, None, source))
    yield from _walk_stack(network, "decoder", targets)


def _walk_stack(network, name: str, splits: list[list[Stream]]) -> Iterator[Sublayer]:
    stack, positions, number = network.get_submodule(name), {}, itertools.count()
    for i, block in enumerate(stack.block):
        for j, layer in enumerate(block.layer):
            sublayer = Sublayer(network, f"{name}.block.{i}.layer.{j}.{layer.kind}", next(number), layer, splits,
                                positions)
            yield sublayer
            sublayer.advance()
    for stream in (s for split in splits for s in split):
        stream.states = stack.final_layer_norm(stream.states)
