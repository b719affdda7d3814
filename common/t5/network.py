"""A T5 (Raffel et al. 2020; with gated feed-forwards T5 v1.1, and mT5, Xue et al. 2021), as its configuration says.

Modules and weights have the names that they have in Hugging Face's files. Layers may differ in heads and hidden units,
and sub-layers may be missing: that is how `common.t5.shrink` leaves a pruned network.
"""

import itertools
import math
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from common.t5.config import Config

ATTENTIONS = ("SelfAttention", "EncDecAttention")
# All are one tensor in most files; `shared` is first.
TIED = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "gelu_new": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu,
               "swish": F.silu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "linear": lambda x: x}


class Linear(nn.Linear):
    """A matrix whose values come from a file: drawing them on the meta device imports torch's compiler for 4 s."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self):
        pass


class Embedding(nn.Embedding):
    """Likewise."""

    def reset_parameters(self):
        pass


class Dropout(nn.Dropout):
    """Sets entries to 0 with probability p and divides the others by 1 - p (Srivastava et al. 2014).

    On the CPU by 16 random bits an entry, p to the nearest 1/65,536: half of the time that torch's takes, 8 to 15 % of
    a training step.

    Attributes:
        rows: where other processes have the other rows of a batch: how many it has, and which are here. Drawn is for
            the whole batch, so that all processes together drop what one would.
    """

    rows: tuple[int, slice] | None = None

    def forward(self, x):
        if not self.training or not self.p or x.device.type != "cpu":
            return super().forward(x)
        shape = (self.rows[0], *x.shape[1:]) if self.rows else x.shape
        size = math.prod(shape)
        bits = torch.empty(-(-size // 4), dtype=torch.int64, device=x.device).random_(-(1 << 63), None)
        bits = bits.view(torch.int16)[:size].view(shape)
        bits = bits[self.rows[1]] if self.rows else bits
        keep = bits >= round(self.p * (1 << 16)) - (1 << 15)
        return x * (keep * (1 / (1 - self.p)))


class Norm(nn.Module):
    """Divides by the root mean square and multiplies by a weight (Zhang & Sennrich 2019)."""

    def __init__(self, config: Config):
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.empty(config.d_model)), config.layer_norm_epsilon

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon))


def split_heads(x: torch.Tensor, width: int) -> torch.Tensor:
    """Return (batch, length, heads × width) as (batch, heads, length, width)."""
    return x.unflatten(-1, (-1, width)).transpose(1, 2)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor,
           dropout: Dropout | None = None) -> torch.Tensor:
    """Return softmax(q kᵀ + bias) v head by head; T5 does not scale q kᵀ.

    On the CPU with sentences of some 15 tokens, plain matrix products train 15 to 20 % faster than torch's
    function (0.28 against 0.34 s a step of 2,048 tokens; 2 cores, 2026-11), of 1,024 with half of the heads 2 %;
    which has no fused path there for dropout or a learned bias.

    Args:
        q: (batch, heads, length, width); k, v: (batch, heads, source length, width).
        bias: broadcasts to (batch, heads, length, source length).
        dropout: of the attention weights; None: none.

    Returns:
        (batch, length, heads × width).
    """
    if q.device.type == "cpu":
        weights = (q @ k.transpose(2, 3) + bias).softmax(dim=-1)
        mixed = (dropout(weights) if dropout else weights) @ v
    else:
        # A half-precision type's least number may be larger; and minus infinity all along a row would give NaN.
        bias = bias.clamp(min=torch.finfo(q.dtype).min).to(q.dtype).expand(*q.shape[:3], k.shape[2])
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0,
                                               dropout_p=dropout.p if dropout and dropout.training else 0.0)
    return mixed.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Multi-head attention, of a sequence to itself or to another.

    Attributes:
        heads: which of the stack's heads these are, for their position bias; None: all of them, in order.
    """

    def __init__(self, config: Config, has_position_bias: bool):
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.q, self.k, self.v = (Linear(config.d_model, inner) for _ in range(3))
        self.o = Linear(inner, config.d_model)
        self.key_value_proj_dim = config.d_kv
        self.register_buffer("heads", None, persistent=False)
        self.dropout = Dropout(config.dropout_rate)
        if has_position_bias:
            self.relative_attention_bias = Embedding(config.relative_attention_num_buckets, config.num_heads)

    def forward(self, x, source, bias):
        q, k, v = (split_heads(part(y), self.key_value_proj_dim)
                   for part, y in ((self.q, x), (self.k, source), (self.v, source)))
        return self.o(attend(q, k, v, bias, self.dropout))

    def own(self, bias: torch.Tensor) -> torch.Tensor:
        """Return the position bias (…, heads, length, length) of these heads, out of that of all."""
        return bias if self.heads is None else bias.index_select(-3, self.heads)


class FeedForward(nn.Module):
    """wo act(wi x), or gated, wo (act(wi_0 x) · wi_1 x)."""

    def __init__(self, config: Config):
        super().__init__()
        for name in ("wi_0", "wi_1") if config.is_gated_act else ("wi",):
            setattr(self, name, Linear(config.d_model, config.d_ff))
        self.wo = Linear(config.d_ff, config.d_model)
        self.act, self.dropout = ACTIVATIONS[config.dense_act_fn], Dropout(config.dropout_rate)

    def forward(self, x):
        inner = self.act(self.wi(x)) if hasattr(self, "wi") else self.act(self.wi_0(x)) * self.wi_1(x)
        return self.wo(self.dropout(inner))


class Layer(nn.Module):
    """A sub-layer: what its module (``SelfAttention``, ``EncDecAttention``, ``DenseReluDense``) adds to the stream."""

    def __init__(self, config: Config, kind: str, has_position_bias: bool):
        super().__init__()
        self.kind = kind
        setattr(self, kind, Attention(config, has_position_bias) if kind in ATTENTIONS else FeedForward(config))
        self.layer_norm, self.dropout = Norm(config), Dropout(config.dropout_rate)

    @property
    def module(self) -> Attention | FeedForward:
        return getattr(self, self.kind)

    def forward(self, states, bias, source=None, source_bias=None):
        x = self.layer_norm(states)
        if self.kind == "SelfAttention":
            made = self.SelfAttention(x, x, self.SelfAttention.own(bias))
        elif self.kind == "EncDecAttention":
            made = self.EncDecAttention(x, source, source_bias)
        else:
            made = self.DenseReluDense(x)
        return states + self.dropout(made)


class Block(nn.Module):
    """The sub-layers of one depth."""

    def __init__(self, config: Config, kinds: tuple[str, ...], has_position_bias: bool):
        super().__init__()
        self.layer = nn.ModuleList(Layer(config, kind, has_position_bias and kind == "SelfAttention") for kind in kinds)


class Stack(nn.Module):
    """Encoder or decoder.

    Attributes:
        positions: the table of the position bias (buckets, heads), which all self-attentions share.
        recompute: in training a sub-layer's activations are not held but computed again for its backward pass (Chen
            et al. 2016, "Training Deep Nets with Sublinear Memory Cost").
    """

    recompute = False

    def __init__(self, config: Config, kinds: tuple[str, ...], depth: int):
        super().__init__()
        self.embed_tokens, self.config = Embedding(config.vocab_size, config.d_model), config
        self.block = nn.ModuleList(Block(config, kinds, has_position_bias=i == 0) for i in range(depth))
        self.final_layer_norm, self.dropout = Norm(config), Dropout(config.dropout_rate)
        self.causal, self.cut_positions = "EncDecAttention" in kinds, None

    @property
    def positions(self) -> nn.Embedding:
        own = self.cut_positions
        return self.block[0].layer[0].SelfAttention.relative_attention_bias if own is None else own

    def layers(self) -> Iterator[Layer]:
        """Yield the sub-layers in the order in which they run."""
        for block in self.block:
            yield from block.layer

    def position_bias(self, length: int, first: int = 0) -> torch.Tensor:
        """Return what is added to self-attention's scores, (1, heads, length - first, length), from row ``first`` on.

        By the distance between two tokens, in buckets that get wider with it (Raffel et al. 2020, section 2.1); in a
        decoder minus infinity for the tokens that come later.
        """
        device = self.positions.weight.device
        distance = torch.arange(length, device=device) - torch.arange(first, length, device=device)[:, None]
        bias = self.positions(buckets(distance, self.config, self.causal)).permute(2, 0, 1)[None]
        return bias + additive(distance <= 0) if self.causal else bias

    def forward(self, ids, mask=None, source=None, source_bias=None):
        """Return the states (batch, length, d_model) for token ids.

        Args:
            mask: additive, of tokens that do not count, (batch, 1, 1, length).
            source: the encoder's states (batch, source length, d_model); source_bias: their mask, additive.
        """
        return self.from_layer(0, self.dropout(self.embed_tokens(ids)), mask, source, source_bias)

    def from_layer(self, first: int, states, mask=None, source=None, source_bias=None):
        """As `forward`, from the states before sub-layer number ``first`` on."""
        bias = self.position_bias(states.shape[1])
        bias = bias if mask is None else bias + mask
        for layer in itertools.islice(self.layers(), first, None):
            given = states, bias, source, source_bias
            twice = self.recompute and self.training
            states = checkpoint(layer, *given, use_reentrant=False) if twice else layer(*given)
        return self.dropout(self.final_layer_norm(states))


class T5(nn.Module):
    """A T5 for conditional generation."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.shared = config, Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config, ("SelfAttention", "DenseReluDense"), config.num_layers)
        self.decoder = Stack(config, (*ATTENTIONS, "DenseReluDense"), config.num_decoder_layers)
        self.lm_head = Linear(config.d_model, config.vocab_size)
        for user in (self.encoder.embed_tokens, self.decoder.embed_tokens, self.lm_head):
            user.weight = self.shared.weight

    def encode(self, input_ids, attention_mask=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the encoder's states (batch, length, d_model) and their additive mask (batch, 1, 1, length)."""
        valid = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = additive(valid.bool())[:, None, None]
        return self.encoder(input_ids, mask), mask

    def head(self, states: torch.Tensor) -> torch.Tensor:
        """Return the logits (…, vocabulary) for the decoder's states (…, d_model)."""
        return self.lm_head(states * self.config.d_model ** -0.5 if self.config.scale_decoder_outputs else states)

    def forward(self, input_ids, decoder_input_ids, attention_mask=None, where=None) -> torch.Tensor:
        """Return the logits (batch, target length, vocabulary).

        Args:
            attention_mask: 1 for the source tokens that count, shaped as ``input_ids``; None: all.
            where: bool, shaped as ``decoder_input_ids``; with it logits (tokens, vocabulary) there alone are made.
        """
        return self.head(self.states(input_ids, decoder_input_ids, attention_mask, where))

    def states(self, input_ids, decoder_input_ids, attention_mask=None, where=None) -> torch.Tensor:
        """Return what `forward` makes logits of: the decoder's states, (batch, target length, d_model)."""
        states = self.decoder(decoder_input_ids, None, *self.encode(input_ids, attention_mask))
        return states if where is None else states[where]


def additive(allowed: torch.Tensor) -> torch.Tensor:
    """Return 0 where True, the least number there is where False."""
    return torch.where(allowed, 0.0, torch.finfo(torch.float32).min)


def buckets(distance: torch.Tensor, config: Config, causal: bool) -> torch.Tensor:
    """Return the bucket of each distance (key's place minus query's).

    Half of the buckets hold one distance each, the others logarithmically more, up to
    ``relative_attention_max_distance``; if later tokens can be seen, one half of all is for them.
    """
    count, offset = config.relative_attention_num_buckets, 0
    if causal:
        distance = (-distance).clamp(min=0)
    else:
        count //= 2
        offset, distance = (distance > 0) * count, distance.abs()
    exact = count // 2
    wide = exact + ((distance.clamp(min=1) / exact).log() / math.log(config.relative_attention_max_distance / exact)
                    * (count - exact)).long()
    return offset + torch.where(distance < exact, distance, wide.clamp(max=count - 1))


def build_network(config: dict, name: str = "model") -> T5:
    """Return a T5 in evaluation mode on the meta device (shapes, no memory).

    Raises:
        UserError: ``config`` describes no T5.
    """
    with torch.device("meta"):
        return T5(Config.read(config, name)).eval()


@torch.no_grad()
def initialize(network: T5) -> T5:
    """Return a network of the same configuration with random weights, drawn as T5 draws them (Mesh TensorFlow)."""
    made = T5(network.config).eval()
    c = network.config
    scale = {"shared": 1.0, "q": (c.d_model * c.d_kv) ** -0.5, "o": (c.num_heads * c.d_kv) ** -0.5,
             "wo": c.d_ff ** -0.5}
    for name, p in made.named_parameters():
        if p.ndim == 1:
            p.fill_(1.0)
        else:
            p.normal_(std=scale.get(name.split(".")[-2], c.d_model ** -0.5))
    return made


def sparsity(network: nn.Module) -> tuple[int, int]:
    """Return (parameters, zeros) of a network; a shared tensor counts once."""
    tensors = list(network.parameters())
    return sum(p.numel() for p in tensors), sum(p.numel() - int(p.count_nonzero()) for p in tensors)
