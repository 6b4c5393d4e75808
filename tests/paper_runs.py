"""Short runs of paper_mnist.py for the tests: all experiments, of small and equal shapes."""

import contextlib

import example_runs
import paper_experiments
import paper_network
import pytest
from paper_network import Choice

ROOT = example_runs.ROOT
FULL = dict(paper_experiments.EXPERIMENTS)
SEEDS, CHUNK, RECORDS = 2, 10, 2
TOO_HIGH = "1e+38"
RATES = ("0.3", "1", TOO_HIGH)
BY_RATE = {(rate,): Choice(float(rate)) for rate in RATES}
REGULARIZED = {
    ("none", "0.3"): Choice(0.3),
    ("L2, L1", "0.3"): Choice(0.3, l2=0.01, l1=0.001),
    ("dropout", "0.3"): Choice(0.3, dropout=0.5),
}


@contextlib.contextmanager
def small():
    """Experiments that share few programs, which are quick to compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper_network, "SHORT", 0)
        for name, full in FULL.items():
            regularized = name == "regularize"
            options = {"activation": "sigmoid", "depth": 2 if regularized else 3}
            groups = tuple(
                group._replace(
                    architecture=group.architecture._replace(**options),
                    choices=REGULARIZED if regularized else BY_RATE,
                )
                for group in full.groups[:2]
            )
            short = full._replace(groups=groups, steps=RECORDS * CHUNK, records=RECORDS)
            patch.setitem(paper_experiments.EXPERIMENTS, name, short)
        yield
