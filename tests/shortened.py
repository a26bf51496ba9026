"""A script with attacks of few steps wherever it measures robustness: `python tests/shortened.py afa.py ...`. For runs
whose numbers are not the subject: however few the images, those steps take most of a small run's time.

Training is as it is. afa.py is run whole too, and aalp.py's evaluation; what vfd_adv.py and abnn.py measure is tested
function by function.
"""

import runpy
import sys

sys.path[:0] = [__file__.rsplit("/", 2)[0]]
from common import pgd  # noqa: E402


def few(name, steps, **limits):
    """Name of a function of common/pgd.py, and itself with few steps (`steps`: its default), and so much of others."""
    whole = getattr(pgd, name)

    def limited(*args, **kwargs):
        kwargs = {"steps": steps} | kwargs
        return whole(*args, **kwargs | {k: min(kwargs[k], v) for k, v in dict(limits, steps=2).items() if k in kwargs})

    return name, limited


def shorten(replace):
    """Call replace(module, name, function) for what the scripts measure robustness with; the attacks of abnn.py that
    are plain PGD keep their steps."""
    for name, function in (few("survivors", 2, restarts=1, targets=1), few("masked_attack", 30), few("universal", 2)):
        replace(pgd, name, function)
    likeliest_wrong, whole = pgd.likeliest_wrong, pgd.pgd
    replace(pgd, "likeliest_wrong", lambda model, x, y, k, *rest: likeliest_wrong(model, x, y, 1, *rest))
    replace(pgd, "pgd10", lambda model, x, y, eps, norm="linf": whole(
        model, x, y, eps=eps, step_size=eps, steps=2, norm=norm, random_start=False))


if __name__ == "__main__":
    shorten(setattr)
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
