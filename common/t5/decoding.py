"""Greedy and beam search with a T5: keys and values are kept, and finished sentences leave the batch.

Beam search ends and scores as transformers' does (``early_stopping`` False, ``length_penalty`` 1): a hypothesis is
worth its tokens' mean log-probability, and a sentence is done when its best open hypothesis is worth less than its
worst finished one.
"""

import torch
from torch.nn import functional as F

from common.t5.network import T5, additive, attend, split_heads

# Finished sentences leave the caches when so few others are left.
_SHARE_LEFT = 0.8
_NEVER = -1.0e9
# A matrix product of fewer multiplications goes a way of torch's that is up to six times slower, and softmax likewise.
_FEWEST = 400
_ENCODED = 64  # sentences


class _Decoder:
    """A T5's decoder, one token at a time, for sentences with ``beams`` hypotheses each.

    A sentence's keys and values stay where they were written, step by step, one slot for each hypothesis. Which of
    them a hypothesis sees is a matter of its ancestors, so that no cache is copied when hypotheses change places.
    """

    def __init__(self, network: T5, ids, mask, beams: int, limit: int):
        self.network, self.stack, self.beams, self.seen = network, network.decoder, beams, 0
        # In parts that are each as long as their longest: of sentences in order of length, little is padding.
        states = []
        for part, seen in zip(ids.split(_ENCODED), mask.split(_ENCODED), strict=True):
            longest = int(seen.sum(dim=1).max())
            encoded = network.encode(part[:, :longest], seen[:, :longest])[0]
            states.append(F.pad(encoded, (0, 0, 0, ids.shape[1] - longest)))
        states = torch.cat(states)
        self.layers = list(self.stack.layers())
        # So many keys are seen at least, those too many with an additive mask of minus infinity.
        self.least = -(-_FEWEST // (network.config.d_kv * beams))
        missing = max(0, self.least - ids.shape[1])
        self.source_mask = F.pad(additive(mask.bool())[:, None, None], (0, missing), value=-torch.inf)
        self.crossed, self.caches, self.readers = {}, {}, {}
        for i, layer in enumerate(self.layers):
            module = layer.module
            if layer.kind == "EncDecAttention":
                self.crossed[i] = [F.pad(split_heads(part(states), module.key_value_proj_dim), (0, 0, 0, missing))
                                   .contiguous() for part in (module.k, module.v)]
            elif layer.kind == "SelfAttention":
                self.readers[i] = torch.cat([module.q.weight, module.k.weight, module.v.weight])
                shape = len(ids), len(self.readers[i]) // (3 * module.key_value_proj_dim), max(32 * beams, self.least)
                self.caches[i] = [states.new_zeros(*shape, module.key_value_proj_dim) for _ in range(2)]
        # Of the last step's slots; a step before it sees the same distances, only fewer. None sees what comes later.
        self.bias = F.pad(self.stack.position_bias(limit, limit - 1).repeat_interleave(beams, dim=3),
                          (0, self.least), value=-torch.inf)
        self.slots = torch.arange(beams, device=states.device)
        self.ancestors = self.slots[:, None].expand(len(ids), beams, limit).clone()  # a hypothesis' slot at each step

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits (hypotheses, vocabulary) after one more token of each, (hypotheses,)."""
        stack, at, beams = self.stack, self.seen, self.beams
        self.seen, end = at + 1, (at + 1) * beams
        width = max(end, self.least)
        states = stack.embed_tokens(tokens)
        start = self.bias.shape[3] - self.least - end
        bias = self.bias[..., start:start + width]
        if beams > 1:
            seen = self.ancestors[:, :, :at + 1, None] == self.slots
            bias = bias + F.pad(additive(seen.flatten(2)), (0, width - end))[:, None]
        for i, layer in enumerate(self.layers):
            x, module = layer.layer_norm(states), layer.module
            if layer.kind == "DenseReluDense":
                states = states + module(x)
                continue
            if layer.kind == "SelfAttention":
                q, *new = (split_heads(y.unflatten(0, (-1, beams)), module.key_value_proj_dim)
                           for y in (x @ self.readers[i].T).chunk(3, dim=1))
                if width > self.caches[i][0].shape[2]:  # few sentences are that long
                    self.caches[i] = [torch.cat([cache, torch.zeros_like(cache)], dim=2) for cache in self.caches[i]]
                for cache, entries in zip(self.caches[i], new, strict=True):
                    cache[:, :, end - beams:end] = entries
                (keys, values), mask = (cache[:, :, :width] for cache in self.caches[i]), module.own(bias)
            else:
                q = split_heads(module.q(x).unflatten(0, (-1, beams)), module.key_value_proj_dim)
                (keys, values), mask = self.crossed[i], self.source_mask
            states = states + module.o(attend(q, keys, values, mask).flatten(0, 1))
        return self.network.head(stack.final_layer_norm(states))

    def keep(self, sentences: torch.Tensor) -> None:
        """Go on with these sentences alone."""
        self.source_mask, self.ancestors = self.source_mask[sentences], self.ancestors[sentences]
        self.crossed = {i: [x[sentences] for x in pair] for i, pair in self.crossed.items()}
        width = max(self.seen * self.beams, self.least)
        for pair in self.caches.values():
            for n, cache in enumerate(pair):
                pair[n] = cache[:len(sentences)]
                pair[n][:, :, :width] = cache[sentences, :, :width]

    def choose(self, origin: torch.Tensor) -> None:
        """Go on with these hypotheses of each sentence, (sentences, beams), which may repeat."""
        self.ancestors[:, :, :self.seen] = self.ancestors[:, :, :self.seen].gather(
            1, origin[:, :, None].expand(-1, -1, self.seen))


@torch.no_grad()
def decode(network: T5, input_ids: torch.Tensor, attention_mask: torch.Tensor, limit: int,
           beams: int = 1) -> list[list[int]]:
    """Return the token ids that a T5 makes of each sentence, without the start token, with the end token if it came.

    Args:
        input_ids, attention_mask: (batch, length), padding on the right.
        limit: most tokens of a translation, its end token included.
        beams: 1 is greedy.
    """
    decoder = _Decoder(network.eval(), input_ids, attention_mask, beams, limit)
    return (_greedy if beams == 1 else _beam_search)(decoder, network.config, len(input_ids), limit)


def _greedy(decoder: _Decoder, config, count: int, limit: int) -> list[list[int]]:
    tokens = torch.full((count,), config.decoder_start_token_id, device=decoder.source_mask.device)
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


def largest(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's k largest entries and their columns, as `torch.topk` does, in 0.6 of its time.

    Every 8 columns that lie an eighth of the row apart are a group: the k largest are in the k groups with the largest
    maximum, or in the few columns that are left over.
    """
    width = x.shape[1] // 8
    if width < k:
        return x.topk(k)
    groups = x[:, :8 * width].view(len(x), 8, width)
    best = groups.amax(dim=1).topk(k).indices
    members = groups.gather(2, best[:, None].expand(-1, 8, -1)).flatten(1)
    found, place = torch.cat([members, x[:, 8 * width:]], dim=1).topk(k)
    columns = place // k * width + best.gather(1, place % k)
    return found, columns.where(place < 8 * k, place + 8 * (width - k))


def _until(ids: list[int], end: int) -> list[int]:
    return ids[:ids.index(end) + 1] if end in ids else ids


def _beam_search(decoder: _Decoder, config, count: int, limit: int) -> list[list[int]]:
    beams, end, device = decoder.beams, config.eos_token_id, decoder.source_mask.device
    rows = torch.arange(count, device=device)
    tokens = torch.full((count * beams,), config.decoder_start_token_id, device=device)
    worth = torch.full((count, beams), _NEVER, device=device)  # sums of log-probabilities of open hypotheses
    worth[:, 0] = 0.0
    texts = torch.full((count, beams, limit), end, device=device)
    best, best_texts = torch.full((count, beams), _NEVER, device=device), texts.clone()  # finished ones
    result, closed = texts[:, 0].clone(), torch.zeros(count, dtype=torch.bool, device=device)
    for at in range(limit):
        logits = decoder.step(tokens)
        # A sentence's likeliest continuations are among each hypothesis' likeliest.
        top, ids = largest(logits.log_softmax(dim=-1), min(2 * beams, logits.shape[1]))
        top = top.unflatten(0, (-1, beams)) + worth[:, :, None]
        found, order = top.flatten(1).topk(min(2 * beams, top[0].numel()), dim=1)
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
        decoder.choose(origin)
        result[rows] = torch.where(closed[:, None], result[rows], best_texts[:, 0])
        closed = closed | (worth[:, 0] / (at + 1) <= best.min(dim=1).values)
        left = (~closed).nonzero()[:, 0]
        if not len(left):
            break
        if len(left) <= _SHARE_LEFT * len(rows):
            rows, closed, worth, texts, best, best_texts = (
                x[left] for x in (rows, closed, worth, texts, best, best_texts))
            tokens = tokens.view(-1, beams)[left].flatten()
            decoder.keep(left)
    return [_until(row, end) for row in result.tolist()]
