"""Which measurements are made again, and which of two counts."""

import pytest
from benchmark_scripts import results

import disturbed  # isort: skip  # found from benchmark_scripts on
import speed  # isort: skip
from layers import Bnjax, Linen  # isort: skip


def row(layer, ratio, wide, shape="8x4"):
    """With quartiles that are `wide` apart."""
    names = dict.fromkeys(disturbed.GROUP, "same") | {"shape": shape, "layer": layer}
    if ratio is None:
        return names | {"ratio": "", "low": "", "high": ""}
    return names | {"ratio": str(ratio), "low": "1.0", "high": str(wide)}


def pair(ratio, wide, shape="8x4"):
    return [row("bnjax", 1.0, 1.0, shape), row("flax.linen", ratio, wide, shape)]


def test_the_steadier_counts_whatever_it_says():
    """Also where the first one was better for us."""
    asked = []

    def measure(group):
        asked.append(group)
        return pair(0.5, 1.1)

    rows = [*pair(2.0, 3.0), *pair(1.5, 1.2, "9x4")]
    found = disturbed.steadier(rows, measure)
    assert found == [*pair(0.5, 1.1), *pair(1.5, 1.2, "9x4")]
    assert [group[0] for group in asked] == ["8x4"]


def test_a_wider_one_does_not_count_and_there_is_an_end():
    asked = []
    found = disturbed.steadier(pair(2.0, 3.0), lambda group: asked.append(group) or pair(9.0, 4.0))
    assert found == pair(2.0, 3.0) and len(asked) == disturbed.TIMES


def test_layers_without_a_time_do_not_count():
    rows = [row("bnjax", 1.0, 1.0), row("haiku", None, 0), row("flax.linen", 2.0, 1.5)]
    assert disturbed.spread(rows) == 1.5
    assert disturbed.spread(rows[:2]) == 1.0


def test_a_layer_that_is_lost_is_an_error():
    with pytest.raises(ValueError, match="2 layers, then 1"):
        disturbed.steadier(pair(2.0, 3.0), lambda group: pair(1.0, 1.0)[:1])


def test_every_group_of_the_results_can_be_measured_again(monkeypatch):
    """With the layers that had a part in it."""

    def measured(case, kinds, works, settings):
        return [speed.labels(case, work, kind.name) for work in works for kind in kinds]

    monkeypatch.setattr(speed, "measured", measured)
    rows, _ = results.read("speed")
    for group, had in disturbed.grouped(rows).items():
        again = speed.again([Bnjax, Linen], None, group)
        assert set(disturbed.grouped(again)) == {group}
        assert {r["layer"] for r in again} <= {r["layer"] for r in had}
