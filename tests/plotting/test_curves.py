import math
import os
import subprocess
import sys

import numpy as np
import pytest

from fr_jax.plotting.curves import curve, figure, plot_curves, smoothed
from fr_jax.plotting.style import COLOURS

PNG = b"\x89PNG\r\n\x1a\n"


def made_up_rows(epochs: int = 4, rows_an_epoch: int = 30, scale: float = 1.0) -> list[dict]:
    rows = []
    for step in range(1, epochs * rows_an_epoch + 1):
        epoch, seconds = step / rows_an_epoch, 60.0 * step
        loss = scale * math.exp(-epoch / 3)
        rows.append({"step": step, "epoch": epoch, "train_loss": loss, "train_accuracy": 1 - loss, "seconds": seconds})
        if step % rows_an_epoch == 0:
            test = {"test_loss": loss + 0.1, "test_accuracy": 0.9 - loss / 2}
            rows.append({"step": step, "epoch": epoch, "seconds": seconds, **test})
    return rows


def lines_of(panel, colour):
    """Raw, smoothed, test, and perhaps the cross of a run that diverged."""
    return [line for line in panel.lines if line.get_color() == colour]


def test_the_file_is_a_png_and_alone(tmp_path):
    path = tmp_path / "curves.png"
    path.write_bytes(b"old")
    plot_curves({"FR, K = 4": made_up_rows()}, path, title="A title", data_source="made up")
    assert path.read_bytes().startswith(PNG)
    assert path.stat().st_size > 20_000
    assert os.listdir(tmp_path) == ["curves.png"]


def test_a_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "curves.png"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="no runs to plot"):
        plot_curves({}, path, title="", data_source="")
    assert path.read_bytes() == b"old"
    with pytest.raises(FileNotFoundError):
        plot_curves({"a": made_up_rows()}, tmp_path / "nowhere" / "c.png", title="", data_source="")


def test_what_the_panels_show():
    fast, slow = made_up_rows(scale=0.5), made_up_rows(scale=0.8)
    drawing = figure({"FR": fast, "BP": slow}, title="A title", data_source="real digits")
    assert [text.get_text() for text in drawing.texts] == ["A title", "Data: real digits"]
    long = figure({"FR": fast}, title="", data_source="a place " * 40).texts[-1].get_text()
    assert all(len(line) < 165 for line in long.splitlines()) and len(long.split()) == 81
    assert [text.get_text() for text in drawing.subfigs[0].legends[0].get_texts()] == ["FR", "BP", "training", "test"]
    panels = np.reshape(drawing.axes, (2, 2))
    assert [panel.get_ylabel() for panel in panels[:, 0]] == ["loss", "accuracy (%)"]
    assert [panel.get_xlabel() for panel in panels[1]] == ["epoch", "training time (h)"]
    epochs = [1, 2, 3, 4]
    for number, rows in enumerate((fast, slow)):
        test_rows = [row for row in rows if "test_loss" in row]
        expected = {
            (0, 0): (epochs, [row["test_loss"] for row in test_rows]),
            (1, 1): ([epoch / 2 for epoch in epochs], [100 * row["test_accuracy"] for row in test_rows]),
        }
        for place, (x, y) in expected.items():
            raw, mean, test = lines_of(panels[place], COLOURS[number])
            np.testing.assert_allclose(test.get_xdata(), x)
            np.testing.assert_allclose(test.get_ydata(), y)
            assert len(raw.get_xdata()) == len(mean.get_xdata()) == 120
            assert raw.get_alpha() < mean.get_alpha()
            assert test.get_linewidth() > mean.get_linewidth() > raw.get_linewidth()
    low, high = panels[1, 0].get_ylim()
    assert low < 100 * min(row["train_accuracy"] for row in slow if "train_accuracy" in row)
    assert high <= 102


def test_nothing_overlaps():
    drawing = figure({f"run {i}": made_up_rows() for i in range(7)}, title="A title", data_source="made up")
    drawing.draw_without_rendering()
    title, source = drawing.texts
    legend = drawing.subfigs[0].legends[0]
    boxes = [title.get_window_extent(), legend.get_window_extent(), drawing.axes[0].get_tightbbox()]
    boxes += [drawing.axes[2].get_tightbbox(), source.get_window_extent()]
    for above, below in zip(boxes, boxes[1:], strict=False):
        assert above.y0 > below.y1
    assert source.get_window_extent().y0 > 0
    assert title.get_window_extent().y1 < drawing.bbox.height


def test_a_run_that_diverged_is_marked_and_cut(tmp_path):
    rows = made_up_rows()[:70]
    rows += [{**rows[-1], "epoch": 2.5, "train_loss": bad} for bad in (None, float("nan"), float("inf"))]
    drawing = figure({"FR": rows, "BP": made_up_rows()}, title="", data_source="")
    labels = [text.get_text() for text in drawing.subfigs[0].legends[0].get_texts()]
    assert labels[:2] == ["FR (× diverged)", "BP"]
    crosses = [line for line in drawing.axes[0].lines if line.get_marker() == "X"]
    assert [line.get_color() for line in crosses] == [COLOURS[0]]
    np.testing.assert_allclose(crosses[0].get_xdata(), [68 / 30])
    assert np.isfinite(np.concatenate([line.get_ydata() for panel in drawing.axes for line in panel.lines])).all()


@pytest.mark.parametrize(
    "rows",
    [
        [],
        made_up_rows()[:1],
        made_up_rows()[:3],
        [{"step": 1, "epoch": 0.1, "train_loss": None, "train_accuracy": None, "seconds": 1.0}],
        [{"step": 9, "epoch": 1.0, "test_loss": 0.0, "test_accuracy": 1.0, "seconds": 0.0}],
    ],
    ids=["none", "one", "three", "diverged at once", "one test"],
)
def test_runs_with_hardly_any_rows(tmp_path, rows):
    plot_curves({"FR": rows}, tmp_path / "c.png", title="t", data_source="d")
    assert (tmp_path / "c.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(("smallest", "scale"), [(0.5, "linear"), (0.001, "log"), (0.0, "linear")])
def test_the_scale_of_the_loss(smallest, scale):
    rows = [{"step": i, "epoch": i, "seconds": i, "test_loss": y} for i, y in enumerate((2.0, 1.0, smallest))]
    panel = figure({"FR": rows}, title="", data_source="").axes[0]
    assert panel.get_yscale() == scale
    low, high = panel.get_ylim()
    assert low <= smallest
    assert high > 2.0


def test_curve_takes_finite_points_only():
    rows = [
        {"epoch": 1.0, "test_loss": 3.0},
        {"epoch": 1.5, "train_loss": 9.0},
        {"epoch": 2.0, "test_loss": None},
        {"epoch": None, "test_loss": 4.0},
        {"epoch": 3.0, "test_loss": 5.0},
    ]
    x, y, diverged = curve(rows, "test_loss", "epoch")
    assert (x.tolist(), y.tolist(), diverged) == ([1.0, 3.0], [3.0, 5.0], True)
    assert curve(rows, "train_loss", "epoch").diverged is False
    assert curve(rows, "train_loss", "seconds").x.shape == (0,)


def test_smoothed_is_a_windowed_mean():
    values = np.random.default_rng(0).normal(size=500)
    naive = [values[max(0, i - 10) : i + 11].mean() for i in range(500)]
    np.testing.assert_allclose(smoothed(values), naive, atol=1e-12)
    np.testing.assert_array_equal(smoothed(values[:40]), values[:40])
    assert smoothed(np.zeros(0)).shape == (0,)


def test_neither_pyplot_nor_an_early_import(program_env):
    program = (
        "import sys; from fr_jax.plotting import curves as plots; print('matplotlib' in sys.modules); "
        "plots.figure({'a': []}, title='', data_source=''); print('matplotlib.pyplot' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=program_env)
    assert shown.stdout.split() == ["False", "False"]
