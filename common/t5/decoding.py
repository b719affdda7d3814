"""Greedy and beam search with a T5: keys and values are kept, and finished sentences leave the batch.

Beam search ends and scores as transformers' does (``early_stopping`` False, ``length_penalty`` 1): a hypothesis is
worth its tokens' mean log-probability, and a sentence is done when its best open hypothesis is worth less than its
worst finished one.
"""

import torch

from common.t5.network import T5, split_heads

# Caches are copied without the finished sentences when so few are left.
_SHARE_LEFT = 0.8
_NEVER = -1.0e9


class _Decoder:
    """A T5's decoder, one token at a time, for sentences with ``beams`` hypotheses each."""

    def __init__(self, network: T5, ids, mask, beams: int, limit: int):
        self.network, self.stack, self.beams = network, network.decoder, beams
        states, self.mask = network.encode(ids, mask)
        self.layers = list(self.stack.layers())
        self.crossed, self.caches = {}, {}
        for i, layer in enumerate(self.layers):
            module = layer.module
            if layer.kind == "EncDecAttention":
                self.crossed[i] = [split_heads(part(states), module.key_value_proj_dim).contiguous()
                                   for part in (module.k, module.v)]
            elif layer.kind == "SelfAttention":
                shape = len(ids) * beams, module.q.out_features // module.key_value_proj_dim, limit
                self.caches[i] = [states.new_empty(*shape, module.key_value_proj_dim) for _ in range(2)]
        self.bias = self.stack.position_bias(limit)
        self.seen = 0

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits (hypotheses, vocabulary) after one more token of each, (hypotheses,)."""
        stack, at = self.stack, self.seen
        self.seen += 1
        states = stack.embed_tokens(tokens)
        bias = self.bias[:, :, at:at + 1, :at + 1]
        for i, layer in enumerate(self.layers):
            x, module = layer.layer_norm(states), layer.module
            if layer.kind == "DenseReluDense":
                states = states + module(x)
                continue
            width = module.key_value_proj_dim
            if layer.kind == "SelfAttention":
                q, *new = (part(x).unflatten(1, (-1, width))[:, :, None] for part in (module.q, module.k, module.v))
                for cache, entry in zip(self.caches[i], new, strict=True):
                    cache[:, :, at:at + 1] = entry
                keys, values = (cache[:, :, :at + 1] for cache in self.caches[i])
                mixed = (q @ keys.transpose(2, 3) + module.own(bias)).softmax(dim=-1) @ values
            else:
                q = split_heads(module.q(x).unflatten(0, (-1, self.beams)), width)  # a row for each hypothesis
                keys, values = self.crossed[i]
                mixed = ((q @ keys.transpose(2, 3) + self.mask).softmax(dim=-1) @ values).transpose(1, 2)
            states = states + module.o(mixed.reshape(len(x), -1))
        return self.network.head(stack.final_layer_norm(states))

    def keep(self, sentences: torch.Tensor) -> None:
        """Go on with these sentences alone."""
        self.mask = self.mask[sentences]
        self.crossed = {i: [x[sentences] for x in pair] for i, pair in self.crossed.items()}
        self.choose((sentences[:, None] * self.beams + torch.arange(self.beams, device=sentences.device)).flatten())

    def choose(self, hypotheses: torch.Tensor) -> None:
        """Go on with these hypotheses, which may repeat."""
        for pair in self.caches.values():
            for n, cache in enumerate(pair):
                pair[n] = cache.new_empty(len(hypotheses), *cache.shape[1:])
                pair[n][:, :, :self.seen] = cache[hypotheses, :, :self.seen]


@torch.no_grad()
def decode(network: T5, input_ids: torch.Tensor, attention_mask: torch.Tensor, limit: int,
           beams: int = 1) -> list[list[int]]:
    """Return the token ids that a T5 makes of each sentence, without the start token, with the end token if it came.

    Args:
        input_ids, attention_mask: (batch, length).
        limit: most tokens of a translation, its end token included.
        beams: 1 is greedy.
    """
    decoder = _Decoder(network.eval(), input_ids, attention_mask, beams, limit)
    return (_greedy if beams == 1 else _beam_search)(decoder, network.config, len(input_ids), limit)


def _greedy(decoder: _Decoder, config, count: int, limit: int) -> list[list[int]]:
    tokens = torch.full((count,), config.decoder_start_token_id, device=decoder.mask.device)
    made = tokens.new_full((count, limit), config.eos_token_id)
    rows = torch.arange(count, device=tokens.device)  # the sentence of each row
    for at in range(limit):
        tokens = decoder.step(tokens).argmax(dim=-1)
        made[rows, at] = tokens if not at else tokens.where(made[rows, at - 1] != config.eos_token_id,
                                                            config.eos_token_id)
        open_ = (made[rows, at] != config.eos_token_id).nonzero()[:, 0]
        if not len(open_):
            break
        if len(open_) <= _SHARE_LEFT * len(rows):
            rows, tokens = rows[open_], tokens[open_]
            decoder.keep(open_)
    return [_until(row, config.eos_token_id) for row in made.tolist()]


def _until(ids: list[int], end: int) -> list[int]:
    return ids[:ids.index(end) + 1] if end in ids else ids


def _beam_search(decoder: _Decoder, config, count: int, limit: int) -> list[list[int]]:
    beams, end, device = decoder.beams, config.eos_token_id, decoder.mask.device
    rows = torch.arange(count, device=device)
    tokens = torch.full((count * beams,), config.decoder_start_token_id, device=device)
    worth = torch.full((count, beams), _NEVER, device=device)  # sums of log-probabilities of open hypotheses
    worth[:, 0] = 0.0
    texts = torch.full((count, beams, limit), end, device=device)
    best, best_texts = torch.full((count, beams), _NEVER, device=device), texts.clone()  # finished ones
    result = texts[:, 0].clone()
    for at in range(limit):
        logits = decoder.step(tokens)
        # A sentence's likeliest continuations are among each hypothesis' likeliest.
        top, ids = logits.topk(min(2 * beams, logits.shape[1]), dim=-1)
        top = (top - logits.logsumexp(dim=-1, keepdim=True)).unflatten(0, (-1, beams)) + worth[:, :, None]
        found, order = top.flatten(1).topk(2 * beams, dim=1)
        origin = order // top.shape[2]
        ids = ids.view(len(rows), -1).gather(1, order)
        candidates = texts.gather(1, origin[:, :, None].expand(-1, -1, limit))
        candidates[:, :, at] = ids
        over = ids == end
        if at == limit - 1:
            over = torch.ones_like(over)
        # Finished are those that end within the first ``beams``.
        ended = torch.where(over, found / (at + 1), _NEVER)
        ended[:, beams:] = _NEVER
        best, order = torch.cat([best, ended], dim=1).topk(beams, dim=1)
        best_texts = torch.cat([best_texts, candidates], dim=1).gather(1, order[:, :, None].expand(-1, -1, limit))
        worth, order = torch.where(over, _NEVER, found).topk(beams, dim=1)
        texts = candidates.gather(1, order[:, :, None].expand(-1, -1, limit))
        tokens, origin = ids.gather(1, order).flatten(), origin.gather(1, order)
        decoder.choose((origin + torch.arange(len(rows), device=device)[:, None] * beams).flatten())
        done = worth[:, 0] / (at + 1) <= best.min(dim=1).values
        result[rows] = best_texts[:, 0]
        left = (~done).nonzero()[:, 0]
        if not len(left) or at == limit - 1:
            break
        if len(left) < len(rows):
            rows, worth, texts, best, best_texts = (x[left] for x in (rows, worth, texts, best, best_texts))
            tokens = tokens.view(-1, beams)[left].flatten()
            decoder.keep(left)
    return [_until(row, end) for row in result.tolist()]
