import io

import pytest
from matplotlib.collections import PolyCollection

from fr_jax.diagnostics.simulation.schedules import SCHEDULES
from fr_jax.diagnostics.simulation.timeline import Task, occupying, simulate
from fr_jax.diagnostics.simulation.times import StageTimes, balanced_shares, times_of_costs
from fr_jax.plotting.gantt import LOOKS, OTHER, gantt_figure


def timelines(K, share=0.0):
    times = times_of_costs([3 * s for s in balanced_shares(K)], transfers=0.02, synthesizers=0.1, update=0.05)
    made = {name: make(times, 2 * K + 2, 2 if name == "gpipe" else 1) for name, make in SCHEDULES.items()}
    return {name: simulate(occupying(schedule, share)) for name, schedule in made.items()}


def drawn(figure):
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=40)
    return file.getvalue()


def test_a_chart_a_timeline_with_the_bubble_in_its_title():
    figure = gantt_figure(timelines(4), title="four", seconds=6.0, unit="units", reference=3.0)
    assert figure.get_suptitle() == "four"
    assert len(figure.axes) == len(SCHEDULES)
    for axes in figure.axes:
        assert "bubble" in axes.get_title(loc="left") and "times as fast" in axes.get_title(loc="left")
        assert axes.get_xlim() == (0.0, 6.0)
        assert any(isinstance(one, PolyCollection) for one in axes.collections)
    numbers = {text.get_text() for text in figure.axes[1].texts}
    assert {"0", "1", "2"} <= numbers
    labels = {text.get_text() for text in figure.subfigs[0].legends[0].get_texts()}
    assert labels == {look.label for look in LOOKS}
    assert drawn(figure).startswith(b"\x89PNG")


def test_many_devices_have_no_numbers():
    figure = gantt_figure({"FR": timelines(32)["fr"]}, title="many")
    assert len(figure.axes[0].texts) == 0
    assert figure.get_figheight() < 5
    assert drawn(figure)


def test_transfers_that_occupy_devices_are_bars():
    figure = gantt_figure({"BP": timelines(2, share=0.5)["bp"]}, title="busy")
    assert LOOKS[-1].label in {text.get_text() for text in figure.subfigs[0].legends[0].get_texts()}
    assert len(figure.axes[0].lines) == 0


def test_every_kind_of_work_has_a_look():
    assert sorted(kind for look in LOOKS for kind in look.kinds) == sorted((*StageTimes._fields, "transfer"))


def test_kinds_of_ones_own_are_grey():
    tasks = [Task(kind, 0, 1.0, t, t) for t in range(4) for kind in ("last", "allreduce")]
    figure = gantt_figure({"mine": simulate(tasks)}, title="own kinds")
    assert OTHER.label in {text.get_text() for text in figure.subfigs[0].legends[0].get_texts()}
    assert drawn(figure)


def test_nothing_to_draw():
    with pytest.raises(ValueError, match="no timelines"):
        gantt_figure({}, title="")
