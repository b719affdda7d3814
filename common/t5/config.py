"""The configuration of a T5 or mT5, read out of a foreign file."""

from dataclasses import asdict, dataclass, field, fields

from common.errors import UserError, brief

ACTIVATIONS = ("relu", "gelu", "gelu_new", "silu", "swish", "tanh", "sigmoid", "linear")
# Of mT5, where its configuration leaves them out.
_MT5 = {"vocab_size": 250112, "d_ff": 1024, "num_layers": 8, "num_heads": 6, "feed_forward_proj": "gated-gelu",
        "decoder_start_token_id": 0}


def _within(default, low, high):
    return field(default=default, metadata={"range": (low, high)})


@dataclass
class Config:
    """What decides the function a T5 computes, by the names and with the defaults of Hugging Face's ``config.json``.

    The ranges lie far beyond any T5 there is, and are small enough for building one to take no time.
    """

    model_type: str = "t5"
    d_model: int = _within(512, 1, 1 << 16)
    d_kv: int = _within(64, 1, 1 << 16)  # width of a head
    d_ff: int = _within(2048, 1, 1 << 20)
    num_heads: int = _within(8, 1, 1 << 12)
    num_layers: int = _within(6, 1, 256)  # the encoder's
    num_decoder_layers: int | None = _within(None, 1, 256)  # as many as the encoder's
    vocab_size: int = _within(32128, 1, 1 << 24)
    feed_forward_proj: str = "relu"
    dense_act_fn: str | None = None  # with the next goes before the last; both follow from it if not given
    is_gated_act: bool | None = None
    relative_attention_num_buckets: int = _within(32, 4, 1 << 12)
    relative_attention_max_distance: int = _within(128, 3, 1 << 20)
    dropout_rate: float = _within(0.1, 0.0, 0.99)
    layer_norm_epsilon: float = _within(1e-6, 0.0, 1.0)
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool | None = None  # by 1 / √d_model before lm_head; if not given, the last, of mT5 never
    pad_token_id: int = _within(0, 0, 1 << 24)
    eos_token_id: int = _within(1, 0, 1 << 24)
    decoder_start_token_id: int | None = _within(None, 0, 1 << 24)

    @classmethod
    def read(cls, config: dict, name: str) -> "Config":
        """Return a configuration out of a foreign file; keys that are no field are not looked at.

        What several keys say of one thing is decided as in transformers 5, which gives ``scale_decoder_outputs`` the
        meaning that ``tie_word_embeddings`` used to have and ties by the weights alone.

        Raises:
            UserError: it describes no T5.
        """
        kind = config.get("model_type")
        if kind not in ("t5", "mt5"):
            raise UserError(f"{name}: is a {brief(kind)} model; this toolkit prunes the T5 family (t5, mt5)")
        given = (_MT5 if kind == "mt5" else {}) | {
            f.name: config[f.name] for f in fields(cls) if config.get(f.name) is not None}
        for f in fields(cls):
            value, (low, high) = given.get(f.name, f.default), f.metadata.get("range", (None, None))
            if value is None or low is None:
                continue
            kinds = (int, float) if isinstance(high, float) else (int,)
            if type(value) not in kinds or not low <= value <= high:
                raise UserError(f"{name}: its configuration has {f.name} = {brief(value)}, allowed is {low:,} to "
                                f"{high:,}")
        for key in ("is_gated_act", "tie_word_embeddings", "scale_decoder_outputs"):
            if type(given.get(key, True)) is not bool:
                raise UserError(f"{name}: its configuration has {key} = {brief(given[key])}, allowed is true or false")
        made = cls(**given)
        problem = made._complete()
        if problem:
            raise UserError(f"{name}: its configuration does not describe a T5: {problem}")
        return made

    def _complete(self) -> str | None:
        """Fill in what follows from other keys; return what is wrong with them."""
        parts = self.feed_forward_proj.split("-") if isinstance(self.feed_forward_proj, str) else []
        if len(parts) not in (1, 2) or len(parts) == 2 and parts[0] != "gated":
            return f"feed_forward_proj is {brief(self.feed_forward_proj)}, not an activation or gated-activation"
        if self.dense_act_fn is None:
            self.dense_act_fn = "gelu_new" if self.feed_forward_proj == "gated-gelu" else parts[-1]
        if self.is_gated_act is None:
            self.is_gated_act = len(parts) == 2
        if not isinstance(self.dense_act_fn, str) or self.dense_act_fn not in ACTIVATIONS:
            return f"its activation is {brief(self.dense_act_fn)}, known are {', '.join(ACTIVATIONS)}"
        if self.scale_decoder_outputs is None:
            self.scale_decoder_outputs = self.tie_word_embeddings
        self.tie_word_embeddings, self.scale_decoder_outputs = True, (self.scale_decoder_outputs and
                                                                      self.model_type == "t5")
        if self.num_decoder_layers is None:
            self.num_decoder_layers = self.num_layers
        for key in ("pad_token_id", "eos_token_id", "decoder_start_token_id"):
            if (getattr(self, key) or 0) >= self.vocab_size:
                return f"{key} is not below vocab_size"
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 2:
            return "relative_attention_max_distance is not above half of relative_attention_num_buckets"
        return None

    def to_dict(self) -> dict:
        """Return what `read` takes."""
        return {key: value for key, value in asdict(self).items() if value is not None}
