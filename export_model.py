#!/usr/bin/env python3
"""Write a model as a folder that other programs load: transformers, without code of ours, or CTranslate2.

Reads a model file. Heads, units and sub-layers that pruning left empty are left out, as far as the format allows.
What was written is loaded and translates some sentences; unless it does so as the model does, it is removed.

    python export_model.py -m finetuned_model.pth -o exported_model --format hf
"""

import sys
from pathlib import Path

from common import cli
from common.errors import UserError
from common.files.atomic import check_inputs, new_folder

# What the weights may be stored as; all but float32 change some translations.
TYPES = {"hf": ("float32", "float16", "bfloat16"),
         "ctranslate2": ("float32", "float16", "bfloat16", "int16", "int8", "int8_float32", "int8_float16",
                         "int8_bfloat16")}
SENTENCES = 64
# Share of translations that may differ: with float32, with other types. Of small models trained on Multi30K none of 64
# differs in float32, 1 in float16, 5 in bfloat16, 24 to 38 in int8; out of weights that are garbage all do.
TOLERANCE = 0.05, 0.75


def build_parser():
    p = cli.parser(__doc__)
    cli.add_model(p, "finetuned_model.pth", "model file to export")
    p.add_argument("-o", "--output", type=Path, default=Path("exported_model"), metavar="FOLDER",
                   help="folder to make; one that exists is never touched")
    p.add_argument("--format", choices=list(TYPES), default="hf",
                   help="hf: a folder for from_pretrained of transformers; ctranslate2: for CTranslate2 (pip install "
                        "ctranslate2), which translates faster")
    p.add_argument("--quantization", default="float32", metavar="TYPE",
                   help="type of the weights: float32, float16, bfloat16; with ctranslate2 also int16, int8, "
                        "int8_float32, int8_float16, int8_bfloat16")
    cli.add_data(p, limit=False)
    p.set_defaults(data="demo")
    cli.add_device(p)
    return p


def check(written: Path, loaded, args, device) -> str:
    """Say how many translations of the written folder differ from the model's, of validation sentences.

    Raises:
        UserError: more than `TOLERANCE`.
    """
    from common.export import folder
    from common.t5 import network
    from common.text.batches import Batches
    from common.text.corpus import DEMO, Corpus, read_pairs
    from common.text.translation import translate

    # The comparison needs no text that the model knows; that of the demo serves models of other languages too.
    pairs = read_pairs(Corpus(DEMO, "en", "de") if args.data == DEMO else cli.corpus(args, loaded), "val")[:SENTENCES]
    made = folder.translations(written, loaded, args.format, [source for source, _ in pairs], device)
    network.place(loaded.network, device)
    expected = translate(loaded, Batches(pairs, loaded), device, max_new_tokens=folder.CHECK_TOKENS).texts
    differ, exact = sum(a != b for a, b in zip(made, expected, strict=True)), args.quantization == "float32"
    said = f"{differ} of {len(pairs)} translations differ from those of {args.model} (greedy search)"
    if differ > TOLERANCE[not exact] * len(pairs):
        advice = "please report it" if exact else "choose another --quantization"
        raise UserError(f"{args.output}: is not made, because {said}; {advice}")
    return said


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    check_inputs(args.model)
    allowed = TYPES[args.format]
    if args.quantization not in allowed:
        raise UserError(f"--quantization {args.quantization}: with --format {args.format} it is {', '.join(allowed)}")
    with new_folder(args.output) as written:
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
        architecture, count = folder.write(written, loaded, args.format, args.quantization, args.output.name)
        said = check(written, loaded, args, device)
        size = sum(file.stat().st_size for file in written.iterdir())
    print(f"{args.output}: {architecture}, {args.quantization}, {size / 1e6:.1f} MB; {count:,} weights (the dense "
          f"model: {total:,})")
    if count > left:
        print(f"{count - left:,} of the weights are filling: in this format, layers must agree more than they do")
    if left == total:
        print("note: the model has no empty head, unit or sub-layer, so nothing could be left out")
    print(f"{said}; README.md in the folder says how to load it")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
