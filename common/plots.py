"""What the pictures share: names shown as they are written, a legend that fits, no raw warnings, atomic writing."""

import contextlib
import warnings
from pathlib import Path

from common.errors import UserError
from common.files.atomic import atomic_write
from common.runtime import say

LONGEST = 60  # characters of a name in the legend


def check_picture(path: Path | None) -> None:
    """Raise `UserError` unless ``path`` is None or has the name of a picture."""
    if path and path.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"{path}: the picture's name must end in .png, .pdf or .svg")


def shown(name: str) -> str:
    """Return a name as matplotlib must get it to show it: no formula, one line, not too long."""
    name = "".join(c if c.isprintable() else "?" for c in name)
    name = name if len(name) <= LONGEST else name[:LONGEST // 2] + "…" + name[1 - LONGEST // 2:]
    return name.replace("$", r"\$")


@contextlib.contextmanager
def picture(path: Path):
    """Give the axes of a new picture as the block's variable; write it to ``path`` when the block ends well."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            yield axes
            with atomic_write(path) as file:
                # Tight: the picture grows by a legend beside it, the axes do not shrink.
                figure.savefig(file, format=path.suffix[1:], dpi=150, bbox_inches="tight")
        if any("Glyph" in str(w.message) for w in found):
            say(f"{path}: the font lacks some characters of the names; they are drawn as boxes")
    finally:
        plt.close(figure)


def legend(axes, lines: list, names: list[str]) -> None:
    """Draw the legend: inside where a few names leave room, else to the right. Names may begin with '_'."""
    outside = len(names) > 6 or max(map(len, names)) > 30
    place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1)} if outside else {"loc": "best"}
    axes.legend(lines, names, fontsize="small", ncols=-(-len(names) // 24), **place)
