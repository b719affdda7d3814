"""Time two networks side by side on the same translations, so that only their size makes a difference.

They translate in turns of a few steps, because a busy machine's speed changes by the second: one network's times for
200 sentences varied by 11 % from run to run (standard deviation; 2 shared cores, 2026-11), the quotient of two in turns
by 1 to 3 %. Python's collector of garbage waits meanwhile: its 0.1 s would count as one network's.
"""

import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from common.t5.decoding import decode
from common.t5.model import Model
from common.t5.modules import prunable
from common.t5.network import T5
from common.t5.shrink import shrink
from common.text.batches import Batches
from common.text.translation import limit, translate

TURN = 4  # steps


class _Replay:
    """Makes a network give known translations, in its own time; after every few steps, whoever waits has a turn."""

    def __init__(self, network: T5, known: list[torch.Tensor]):
        self.network, self.known, self.turn, self.other = network, known, threading.Semaphore(0), None
        self.missing = 0  # sentences of the batch that have not been encoded
        network.encode, network.head = self._encode, self._head

    def _encode(self, ids, mask):
        if not self.missing:  # a batch is encoded in parts
            self.ids, self.at = next(self.batches), 0
            self.rows, self.missing = torch.arange(len(self.ids), device=ids.device), len(self.ids)
        self.missing -= len(ids)
        return T5.encode(self.network, ids, mask)

    def _head(self, states):
        if len(states) < len(self.rows):  # finished sentences have left the batch
            ended = (self.ids[self.rows, :self.at] == self.network.config.eos_token_id).any(dim=1)
            self.rows = self.rows[~ended]
        logits = T5.head(self.network, states)
        logits.scatter_(1, self.ids[self.rows, self.at, None], torch.inf)
        self.at += 1
        if self.other and self.at % TURN == 0:
            self.turns.append(self.clock() - self.began)
            self.other.turn.release()
            self.turn.acquire()
            self.began = self.clock()
        return logits

    def run(self, model: Model, text: Batches, device) -> list[float]:
        """Translate the text; return the seconds of each of its turns."""
        # The time of a single thread is its own: that which other programs take away is none of it.
        alone = torch.device(device).type == "cpu" and torch.get_num_threads() == 1
        self.clock = time.thread_time if alone else time.perf_counter
        if self.other:
            self.turn.acquire()
        self.batches, self.missing, self.turns, self.began = iter(self.known), 0, [], self.clock()
        try:
            translate(replace(model, network=self.network), text, device)
            return [*self.turns, self.clock() - self.began]
        finally:
            if self.other:
                self.other.other = None
                self.other.turn.release()


def side_by_side(pair: tuple[T5, T5], known, model: Model, text: Batches, device) -> tuple[list[float], list[float]]:
    """Return the seconds that two networks take for translations of a text into what is ``known``, turn by turn.

    Args:
        known: of `translations`.
        model: whose tokenizer reads and writes the text.
    """
    a, b = (_Replay(network, known) for network in pair)
    a.other, b.other = b, a
    a.turn.release()
    collects = gc.isenabled()
    gc.disable()
    try:
        with ThreadPoolExecutor(2) as pool:
            runs = [pool.submit(replay.run, model, text, device) for replay in (a, b)]
        return runs[0].result(), runs[1].result()
    finally:
        if collects:
            gc.enable()


@torch.no_grad()
def translations(model: Model, text: Batches, device) -> list[torch.Tensor]:
    """Return the model's own translations of each batch, (batch, longest), ends of sentences after the end."""
    config, made = model.network.config, []
    for batch in text.fixed(device):
        ids = decode(model.network, batch["input_ids"], batch["attention_mask"], limit(batch))
        made.append(torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], batch_first=True,
                                                    padding_value=config.eos_token_id).to(device))
    return made


def full(config, sublayer: str) -> int:
    """Return how many heads or hidden units a sub-layer has before any pruning."""
    return config.d_ff if sublayer.endswith("DenseReluDense") else config.num_heads


@torch.no_grad()
def thinned(whole: T5, kept: dict[str, int]) -> T5:
    """Return a network whose sub-layers keep so many heads or units, none if not named; heads differ, as they will."""
    names = [name for name, what in prunable(whole).items() if what != "linear"]
    writers = [whole.get_parameter(f"{name}.{'wo' if name.endswith('DenseReluDense') else 'o'}.weight")
               for name in names]
    before = [w.clone() for w in writers]
    for i, (w, name) in enumerate(zip(writers, names, strict=True)):
        count = full(whole.config, name)
        gone = torch.arange(count).roll(i) >= kept.get(name, 0)
        w[:, gone.repeat_interleave(w.shape[1] // count)] = 0.0
    network = shrink(Model(whole, ""))
    for w, values in zip(writers, before, strict=True):
        w.copy_(values)
    return network
