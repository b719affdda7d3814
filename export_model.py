#!/usr/bin/env python3
"""Write a model for other programs: transformers (no code of ours) or CTranslate2, or as a model file of other weights.

Reads a model file. In a folder for other programs, heads, units and sub-layers that pruning left empty are left out, as
far as the format allows. With --format pth --dtype float16 it is a model file of this toolkit of half the size, which
every stage reads. What was written is loaded and translates some sentences; unless it does so as the model does, it is
removed.

    python export_model.py -m finetuned_model.pth -o exported_model --format hf
    python export_model.py -m finetuned_model.pth -o half.pth --format pth --dtype float16
"""

import sys
from pathlib import Path

from common import cli
from common.errors import UserError
from common.files.atomic import check_inputs, new_folder

# What the weights may be stored as; all but float32 change some translations.
TYPES = {"hf": ("float32", "float16", "bfloat16"), "pth": ("float32", "float16", "bfloat16"),
         "ctranslate2": ("float32", "float16", "bfloat16", "int16", "int8", "int8_float32", "int8_float16",
                         "int8_bfloat16")}
SENTENCES = 64
# Share of translations that may differ: with float32, with other types. Of small models trained on Multi30K none of 64
# differs in float32, 1 in float16, 5 in bfloat16, 24 to 38 in int8; out of weights that are garbage all do.
TOLERANCE = 0.05, 0.75


def build_parser():
    p = cli.parser(__doc__)
    cli.add_model(p, "finetuned_model.pth", "model file to export")
    p.add_argument("-o", "--output", type=Path, metavar="NAME",
                   help="folder to make, with pth file; what exists is never touched (default: exported_model, with "
                        "pth exported_model.pth)")
    p.add_argument("--format", choices=list(TYPES), default="hf",
                   help="hf: a folder for from_pretrained of transformers; ctranslate2: for CTranslate2 (pip install "
                        "ctranslate2), which translates faster; pth: a model file of this toolkit")
    p.add_argument("--dtype", "--quantization", default="float32", metavar="TYPE",
                   help="type of the weights: float32, float16, bfloat16; with ctranslate2 also int16, int8, "
                        "int8_float32, int8_float16, int8_bfloat16")
    cli.add_data(p, limit=False)
    p.set_defaults(data="demo")
    cli.add_device(p)
    return p


def check(written: Path, loaded, args, device) -> str:
    """Say how many translations of what was written differ from the model's, of validation sentences.

    Raises:
        UserError: more than `TOLERANCE`.
    """
    from common.export import folder
    from common.t5 import model
    from common.text.batches import Batches
    from common.text.corpus import DEMO, Corpus, read_pairs
    from common.text.translation import translate

    # The comparison needs no text that the model knows; that of the demo serves models of other languages too.
    pairs = read_pairs(Corpus(DEMO, "en", "de") if args.data == DEMO else cli.corpus(args, loaded), "val")[:SENTENCES]

    def translated(one) -> list[str]:
        one.network.to(device)
        return translate(one, Batches(pairs, one), device, max_new_tokens=folder.CHECK_TOKENS).texts

    made = translated(model.load(written / args.output.name)) if args.format == "pth" else folder.translations(
        written, loaded, args.format, [source for source, _ in pairs], device)
    expected = translated(loaded)
    differ, exact = sum(a != b for a, b in zip(made, expected, strict=True)), args.dtype == "float32"
    said = f"{differ} of {len(pairs)} translations differ from those of {args.model} (greedy search)"
    if differ > TOLERANCE[not exact] * len(pairs):
        advice = "please report it" if exact else "choose another --dtype"
        raise UserError(f"{args.output}: is not made, because {said}; {advice}")
    return said


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    check_inputs(args.model)
    allowed, to_file = TYPES[args.format], args.format == "pth"
    if args.dtype not in allowed:
        raise UserError(f"--dtype {args.dtype}: with --format {args.format} it is {', '.join(allowed)}")
    args.output = args.output or Path("exported_model.pth" if to_file else "exported_model")
    with new_folder(args.output, single=to_file) as written:
        import torch

        from common import runtime
        from common.export import folder
        from common.files.provenance import provenance
        from common.t5 import model, network
        from common.t5.shrink import shrink

        if args.format == "ctranslate2":
            folder.import_ctranslate2()
        device = runtime.setup(args.device)
        loaded = model.load(args.model)
        total, left = network.sparsity(loaded.network)[0], network.sparsity(shrink(loaded))[0]
        inputs = {"model": (args.model, loaded.identity, loaded.provenance)}
        loaded.provenance = provenance("export_model.py", vars(args), inputs)
        if to_file:
            dtype = getattr(torch, args.dtype)
            model.save(written / args.output.name, model.rounded(loaded, dtype), dtype)
        else:
            architecture, count = folder.write(written, loaded, args.format, args.dtype, args.output.name)
        said = check(written, loaded, args, device)
        size = sum(file.stat().st_size for file in written.iterdir())
    if to_file:
        print(f"{args.output}: {args.dtype}, {size / 1e6:.1f} MB; {model.mask_report(loaded)}\n{said}")
        cli.next_step(("evaluate.py", "-m", args.output))
        return 0
    print(f"{args.output}: {architecture}, {args.dtype}, {size / 1e6:.1f} MB; {count:,} weights (the dense "
          f"model: {total:,})")
    if count > left:
        print(f"{count - left:,} of the weights are filling: in this format, layers must agree more than they do")
    if left == total:
        print("note: the model has no empty head, unit or sub-layer, so nothing could be left out")
    print(f"{said}; README.md in the folder says how to load it")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
