#!/usr/bin/env python3
"""Measure what else could shorten model-level fine-tuning, or make the bank better: mostly what did not pay.

Reads a model, a tuned bank, a configuration file, and Multi30K. Composes and recalibrates one configuration and trains
it for some steps in each way, without dropout: averaged weights, distillation from the dense model, other optimizers,
among them two that use the curvature which block level and recalibration have anyway. Then tunes the bank in random
compositions (`--solver joint` and variations of it). Prints validation losses and seconds a step; writes levers.json.

    python benchmarks/levers.py --model origin_model.pth --bank finetuned_modules.npy --configurations conf.json -n 7
"""

import argparse
import functools
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from common import bank, composition, configs, data, distillation, masking, models, recalibration, runtime, training
from common.reconstruction import gather

LR = 5e-4  # what the experiment chose; Muon's update is scaled to AdamW's, K-FAC's to the same root mean square
JOINT_LR = 1e-3


class Curvature(torch.optim.Optimizer):
    """Steps for linear weights in coordinates in which the loss's curvature is nearly diagonal; Adam for the rest.

    The coordinates are the eigenvectors of E[x xᵀ] and E[g gᵀ], taken from the original once. ``eigenbasis``: Adam in
    them (Vyas et al. 2024, "SOAP", with a basis that never changes). ``kfac``: momentum divided by the damped
    eigenvalues (Martens & Grosse 2015), scaled to unit root mean square.
    """

    def __init__(self, named, factors: dict, kind: str, lr: float, damping: float = 0.03):
        self.named, self.kind, self.steps = dict(named), kind, 0
        super().__init__(self.named.values(), {"lr": lr})
        self.bases = {}
        for name, (inputs, outputs) in factors.items():
            (a, qa), (s, qs) = (torch.linalg.eigh(m.double()) for m in (inputs, outputs))
            scales = [1 / (x.clamp_min(0) / x.mean() + damping) for x in (s, a)]
            self.bases[name] = qs.float(), qa.float(), (scales[0][:, None] * scales[1]).float()

    @torch.no_grad()
    def step(self):
        self.steps += 1
        for name, p in self.named.items():
            g, state = p.grad, self.state[p]
            qs, qa, scale = self.bases.get(name, (None,) * 3)
            if qs is not None:
                g = qs.T @ g @ qa
            for key in ("mean", "square"):
                state.setdefault(key, torch.zeros_like(g))
            state["square"].lerp_(g * g, 1e-3)
            state["mean"].lerp_(g * scale if scale is not None and self.kind == "kfac" else g, 0.1)
            u = state["mean"] / (1 - 0.9 ** self.steps)
            if qs is not None and self.kind == "kfac":
                u = u / u.square().mean().sqrt().clamp_min(1e-30)
            else:
                u = u / ((state["square"] / (1 - 0.999 ** self.steps)).sqrt() + 1e-8)
            p.add_(u if qs is None else qs @ u @ qa.T, alpha=-self.param_groups[0]["lr"])


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon for linear weights, AdamW for the rest."""

    def __init__(self, named, lr: float):
        linear = {n: p for n, p in named if p.ndim == 2 and "shared" not in n and "relative" not in n}
        super().__init__([p for _, p in named], {"lr": lr})
        self.parts = (torch.optim.Muon(linear.values(), lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
                      torch.optim.AdamW([p for n, p in named if n not in linear], lr=lr, weight_decay=0.01))

    def step(self):
        for part in self.parts:
            part.step()


class Bench:
    """The original, the text, and one composed and recalibrated model to start from."""

    def __init__(self, args):
        runtime.setup("cpu", 0, args.threads)
        self.args, self.bank = args, bank.load(args.bank)
        self.configurations = configs.read_configurations(args.configurations)
        model = models.load(args.model)
        options = data.DataOptions("multi30k", args.data_dir, "en", "de", "test_2016_flickr")
        pairs = data.read_pairs(options, "train")
        self.train = data.Batches(pairs, model, 2048)
        self.text, self.few = (data.Batches(data.sample(pairs, n, 0), model, 2048) for n in (1000, 125))
        self.valid = data.Batches(data.read_pairs(options, "val"), model, 8192)
        self.original = models.place(model.network, "cpu").eval()
        self.start = self.compose(args.number, "loss")

    def compose(self, n: int, metric: str | None = None) -> models.Model:
        """Return configuration ``n``, recalibrated with a metric unless that is None."""
        model = models.load(self.args.model)
        composition.compose(model, self.bank, self.configurations[n])
        models.place(model.network, "cpu")
        if metric:
            recalibration.recalibrate(self.original, model, self.text, "cpu", 1e-4,
                                      self.few if metric == "loss" else None, self.bank.keeps_hidden,
                                      log=lambda _: None)
        return model

    def loss(self, network) -> float:
        return training.evaluate(training.TranslationLoss(network), self.valid, "cpu")

    @functools.cached_property
    def factors(self) -> dict[str, tuple]:
        """Return {name of a weight, as trained under its mask: (E[x xᵀ], E[g gᵀ])} of the original."""
        outputs = recalibration.loss_metrics(self.original, self.text, "cpu")
        inputs = gather(self.original, self.text, list(outputs), "cpu")
        return {f"{name}.parametrizations.weight.original" if f"{name}.weight" in self.start.masks
                else f"{name}.weight": (inputs[name].matrix, outputs[name]) for name in outputs}

    def steps(self, optimizer, kind: str = "ce", average: float = 0.0) -> dict:
        """Train the start for some steps; return validation losses every ten and the seconds a step.

        Args:
            optimizer: makes one out of named parameters.
            kind: ``ce`` (translation loss), ``kl`` (to the dense model's distribution), ``both``, ``states`` (kl and
                all residual streams).
            average: decay of an average of the weights, which then is what is evaluated.
        """
        torch.manual_seed(0)
        model = models.load(self.args.model)
        network, before = models.place(model.network, "cpu"), self.start.network.state_dict()
        network.load_state_dict(before)
        training.set_dropout(network, 0.0)
        masking.enforce(network, self.start.masks)
        named, losses, seconds = list(network.named_parameters()), [], 0.0
        made, mean = optimizer(named), [p.detach().clone() for _, p in named]
        weights = [p for _, p in named]
        for n, examples in enumerate(self.train.epoch(0)[:self.args.steps]):
            began = time.perf_counter()
            network.train()
            loss = self.objective(network, self.train.collate(examples), kind)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            made.step()
            for p in weights:
                p.grad = None
            seconds += time.perf_counter() - began
            with torch.no_grad():
                torch._foreach_lerp_(mean, weights, 1 - min(average, (n + 1) / (n + 10)))
                if n % 10 == 9:
                    kept = [p.clone() for p in weights]
                    torch._foreach_copy_(weights, mean if average else kept)
                    losses.append(self.loss(network))
                    torch._foreach_copy_(weights, kept)
        return {"losses": losses, "seconds_a_step": seconds / self.args.steps}

    def objective(self, network, batch, kind: str):
        """Return the loss of a kind (see `steps`) on a batch, where ``network`` is called as T5 is."""
        labels, share = batch["labels"], {"ce": 0.0, "both": 0.5}.get(kind, 1.0)
        inputs = training.network_inputs(batch, self.original.config) | {"output_hidden_states": kind == "states"}
        out = network(**inputs)
        with torch.no_grad():
            dense = self.original(**inputs) if share else None
        loss, tokens = training.token_loss(out.logits, labels, aims=dense and dense.logits, share=share)
        loss = loss / tokens
        if kind == "states":
            for part, rows in (("decoder", labels >= 0), ("encoder", batch["attention_mask"].bool())):
                for mine, theirs in zip(out[f"{part}_hidden_states"], dense[f"{part}_hidden_states"], strict=True):
                    loss = loss + (mine - theirs)[rows].square().mean() / theirs[rows].square().mean()
        return loss

    def joint(self, kind: str) -> dict:
        """Tune the bank in random compositions; return the losses of five configurations before, midway and after.

        The learning rate falls linearly. In all kinds but the first, all variants of a block share a correction.

        Args:
            kind: one of `steps`, or ``both`` with a change: ``own`` (each variant's own weights are trained), ``two``
                (compositions a step), ``shared`` (what no configuration prunes is trained, too), ``harsh`` (draws the
                configuration trained in `steps`, and the one before it).
        """
        torch.manual_seed(0)
        original, n = models.place(models.load(self.args.model).network, "cpu"), self.args.number
        tuned = distillation.JointTranslation(original, self.bank, "cpu",
                                              self.configurations[n - 1:n + 1] if kind == "harsh" else None)
        tuned.weights.requires_grad_(kind == "own")
        tuned.corrections.requires_grad_(kind != "own")
        trained = list(tuned.weights if kind == "own" else tuned.corrections)
        if kind == "shared":
            pruned = {name for v in tuned.variants for name in v.weights}
            more = [p for name, p in original.named_parameters() if name not in pruned]
            trained += [p.requires_grad_() for p in more]
        optimizer = torch.optim.AdamW(trained, lr=JOINT_LR, weight_decay=0.01, fused=True)
        place = {v.key: i for i, v in enumerate(tuned.variants)}
        judged = [[place[key] for key in configs.required_variants(c).items()]
                  for c in self.configurations[:8:2] + self.configurations[7:8]]
        losses, seconds = [], 0.0

        def judge():
            tuned.eval()
            with torch.no_grad():
                sums = [[tuned.composed(chosen, batch) for batch in self.valid.fixed()] for chosen in judged]
            losses.append([float(sum(x for x, _ in s) / sum(n for _, n in s)) for s in sums])

        def composition_of(weights):
            return lambda **inputs: torch.func.functional_call(original, weights, (), inputs)

        judge()
        for n, examples in enumerate(self.train.epoch(0)[:self.args.joint_steps]):
            began = time.perf_counter()
            tuned.train()
            for group in optimizer.param_groups:
                group["lr"] = JOINT_LR * (1 - n / self.args.joint_steps)
            batch = self.train.collate(examples)
            loss = 0.0
            for _ in range(2 if kind == "two" else 1):
                weights = {name: w for i in tuned.draw() for name, w in tuned.masked(i).items()}
                loss = loss + self.objective(composition_of(weights), batch,
                                             kind if kind in ("ce", "kl", "states") else "both")
            loss = loss / (2 if kind == "two" else 1)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds += time.perf_counter() - began
            if (n + 1) % (self.args.joint_steps // 2) == 0:
                judge()
        return {"losses": losses, "seconds_a_step": seconds / self.args.joint_steps}


def main(argv=None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default in (("--model", "origin_model.pth"), ("--bank", "finetuned_modules.npy"),
                          ("--configurations", "conf.json"), ("--data-dir", "data/multi30k"),
                          ("--results", "docs/results")):
        p.add_argument(flag, type=Path, default=Path(default), metavar="PATH")
    p.add_argument("-n", "--number", type=int, default=7, metavar="NTH", help="the configuration that is trained")
    p.add_argument("--steps", type=int, default=40, metavar="N", help="steps of each way (default: 40)")
    p.add_argument("--joint-steps", type=int, default=200, metavar="N", help="steps of joint tuning (default: 200)")
    p.add_argument("--only", default="", metavar="NAME", help="the ways whose name begins so, into levers_NAME.json")
    p.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    args = p.parse_args(argv)
    b = Bench(args)

    def adamw(named, lr=LR):
        return torch.optim.AdamW([p for _, p in named], lr=lr, weight_decay=0.01, fused=True)

    ways = {"AdamW": lambda: b.steps(adamw), "AdamW, half the rate": lambda: b.steps(lambda n: adamw(n, LR / 2)),
            "AdamW, twice the rate": lambda: b.steps(lambda n: adamw(n, 2 * LR)),
            "average of the weights, 0.95": lambda: b.steps(adamw, average=0.95),
            "distillation, logits": lambda: b.steps(adamw, "kl"),
            "distillation, logits and translation loss": lambda: b.steps(adamw, "both"),
            "distillation, logits and residual streams": lambda: b.steps(adamw, "states"),
            "Muon": lambda: b.steps(lambda n: Muon(n, 2 * LR)),
            "Adam in fixed eigenbases": lambda: b.steps(lambda n: Curvature(n, b.factors, "eigenbasis", LR)),
            "K-FAC": lambda: b.steps(lambda n: Curvature(n, b.factors, "kfac", LR / 2))}
    ways |= {f"joint, {kind}": lambda kind=kind: b.joint(kind) for kind in (
        "ce", "both", "kl", "states", "own", "two", "shared", "harsh")}
    result = {"start": {m or "composed": b.loss(b.compose(args.number, m).network) for m in (None, "output", "loss")}}
    print(f"configuration {args.number}: {result['start']}", flush=True)
    path = args.results / (f"levers_{args.only}.json" if args.only else "levers.json")
    for name, way in ways.items():
        if not name.startswith(args.only):
            continue
        result[name] = way()
        print(f"{name}: {result[name]['seconds_a_step']:.2f} s a step", result[name]["losses"], flush=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
