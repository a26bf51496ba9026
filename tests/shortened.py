"""A script with attacks of few steps wherever it measures robustness: `python tests/shortened.py afa.py ...`. For runs
whose numbers are not the subject: however few the images, those steps take most of a small run's time.

Training is as it is.
"""

import runpy
import sys

sys.path[:0] = [__file__.rsplit("/", 2)[0]]
from common import pgd  # noqa: E402


def few(name, **limits):
    """Replace a function of common/pgd.py by itself with at most so much of some arguments."""
    whole = getattr(pgd, name)

    def limited(*args, **kwargs):
        return whole(*args, **kwargs | {k: min(kwargs[k], v) for k, v in limits.items() if k in kwargs})

    return name, limited


def shorten(replace):
    """Call replace(module, name, function) for all that the scripts measure robustness with."""
    for name, function in (few("survivors", steps=2, restarts=1, targets=1), few("masked_attack", steps=2),
                           few("universal", steps=2)):
        replace(pgd, name, function)
    likeliest_wrong, first = pgd.likeliest_wrong, pgd.pgd
    replace(pgd, "likeliest_wrong", lambda model, x, y, k, *rest: likeliest_wrong(model, x, y, 1, *rest))
    replace(pgd, "pgd10", lambda model, x, y, eps, norm="linf": first(
        model, x, y, eps=eps, step_size=eps, steps=2, norm=norm, random_start=False))


if __name__ == "__main__":
    shorten(setattr)
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
