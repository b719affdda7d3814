"""What a T5 takes, from shapes alone: operations, and the activations that the backward pass needs."""

from collections.abc import Iterator
from dataclasses import dataclass

from common.t5.config import Config


@dataclass(frozen=True)
class Shape:
    """The sizes that count.

    Attributes:
        layers: of every sub-layer that is left, by its module's name: its heads or hidden units.
    """

    d_model: int
    d_kv: int
    vocabulary: int
    gated: bool
    layers: dict[str, int]

    @classmethod
    def of(cls, network) -> "Shape":
        """Return that of a `common.t5.network.T5`, shrunk or not."""
        return cls._with(network.config, {
            f"{side}.block.{i}.layer.{j}.{layer.kind}": layer.module.wo.in_features if layer.kind == "DenseReluDense"
            else layer.module.o.in_features // network.config.d_kv
            for side in ("encoder", "decoder") for i, block in enumerate(getattr(network, side).block)
            for j, layer in enumerate(block.layer)})

    @classmethod
    def of_header(cls, header) -> "Shape":
        """Return that of a `common.t5.header.Header`'s network, shrunk."""
        return cls._with(header.config, {name: left for name, left in header.present.items() if left})

    @classmethod
    def _with(cls, config: Config, layers: dict[str, int]) -> "Shape":
        return cls(config.d_model, config.d_kv, config.vocab_size, config.is_gated_act, layers)

    def weights(self) -> int:
        """Return the weights of all sub-layers' matrices."""
        feed_forward = 3 if self.gated else 2
        return sum(self.d_model * left * (feed_forward if name.endswith("DenseReluDense") else 4 * self.d_kv)
                   for name, left in self.layers.items())

    def heads(self) -> int:
        """Return the most heads that an attention has."""
        return max((left for name, left in self.layers.items() if not name.endswith("DenseReluDense")), default=0)

    def operations(self, source: int, target: int) -> int:
        """Return the floating-point operations of a pair's forward pass; one backward pass takes twice as many."""
        total = 2 * target * self.d_model * self.vocabulary
        for own, keys, kind, left in self._lengths(source, target):
            if kind == "DenseReluDense":
                total += 2 * own * self.d_model * left * (3 if self.gated else 2)
            else:
                total += 4 * left * self.d_kv * (self.d_model * (own + keys) + own * keys)
        return total

    def squared_inputs(self) -> int:
        """Return the sum of the squared widths of all modules' inputs: the entries of their Gram matrices."""
        return sum(self.d_model ** 2 + (left * (1 if name.endswith("DenseReluDense") else self.d_kv)) ** 2
                   for name, left in self.layers.items())

    def _lengths(self, source: int, target: int) -> Iterator[tuple[int, int, str, int]]:
        for name, left in self.layers.items():
            own, kind = target if name.startswith("decoder") else source, name.rpartition(".")[2]
            yield own, own if kind == "SelfAttention" else source, kind, left

    def activations(self, sentences: int, source: int, target: int, recompute: bool = False,
                    teacher: bool = False) -> int:
        """Return the bytes that a training step holds for its backward pass, in float32, masks of dropout included.

        Of each sub-layer: the stream before it, what its norm makes, and the mask of its own dropout; of an attention
        queries, keys, values and what ``o`` reads, and the scores before and after dropout; of a feed-forward the
        hidden units likewise. At the end the logits, their probabilities and the gradients of both; with a teacher its
        own logits and the targets made of them.

        Args:
            sentences: of a batch, which is padded to ``source`` and ``target`` tokens.
            recompute: only the stream is held, and what one sub-layer needs while its backward pass runs.
            teacher: whether there is one.
        """
        held, largest = 0, 0
        for own, keys, kind, left in self._lengths(source, target):
            numbers = own * 4 * self.d_model
            if kind == "DenseReluDense":
                numbers += own * left * (5 if self.gated else 3)
            else:
                numbers += 2 * (own + keys) * left * self.d_kv + 3 * left * own * keys
            held, largest = held + (own * self.d_model if recompute else numbers), max(largest, numbers)
        logits = (6 if teacher else 4) * target * self.vocabulary
        return 4 * sentences * (held + (2 * largest if recompute else 0) + logits)
