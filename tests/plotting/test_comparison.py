import numpy as np
import pytest

from fr_jax.plotting.comparison import Line, comparison_figure, mean_over_runs, plot_comparison


def rows(loss: float, steps: int = 30, diverges: bool = False) -> list[dict[str, float]]:
    made = []
    for step in range(1, steps + 1):
        value = None if diverges and step == steps else loss / step
        made.append({"step": step, "epoch": step / 10, "seconds": 2.0 * step, "train_loss": value})
        if step % 10 == 0:
            made.append({"step": step, "epoch": step / 10, "seconds": 2.0 * step, "test_accuracy": 1 - loss / 100})
    return made


def test_mean_and_spread_over_the_seeds():
    error, diverged = mean_over_runs([rows(10.0), rows(20.0)], "test_accuracy", "epoch")
    np.testing.assert_allclose(error.x, [1, 2, 3])
    np.testing.assert_allclose(error.y, [15] * 3)
    np.testing.assert_allclose((error.low, error.high), ([10] * 3, [20] * 3))
    assert not diverged


def test_a_seed_that_diverged_leaves_the_others():
    loss, diverged = mean_over_runs([rows(1.0, steps=12), rows(3.0, diverges=True, steps=8)], "train_loss", "seconds")
    np.testing.assert_allclose(loss.x, 2.0 * np.arange(1, 13))
    np.testing.assert_allclose(loss.y[:7], [2 / step for step in range(1, 8)])
    np.testing.assert_allclose(loss.y[7:], [1 / step for step in range(8, 13)])
    assert diverged


def test_a_mean_ends_with_the_shortest_run_and_the_others_go_on_by_themselves():
    runs = [rows(1.0, steps=30), rows(3.0, steps=20), rows(5.0, steps=30)]
    error, _ = mean_over_runs(runs, "test_accuracy", "epoch")
    np.testing.assert_allclose(error.x, [1, 2])
    np.testing.assert_allclose(error.y, [3, 3])
    drawing = comparison_figure([Line("three", runs, 0, 0)], title="", data_source="")
    mean, *further = drawing.axes[2].get_lines()
    assert mean.get_xdata().tolist() == [1, 2]
    assert [line.get_xdata().tolist() for line in further] == [[2, 3], [2, 3]]
    np.testing.assert_allclose([line.get_ydata() for line in further], [[1, 1], [5, 5]])


def test_only_rows_of_the_same_step_are_averaged():
    """A run that was resumed has rows of its own."""
    odd = [row for row in rows(1.0) if row["step"] % 3 == 0 and "train_loss" in row]
    loss, _ = mean_over_runs([rows(3.0), odd], "train_loss", "epoch")
    np.testing.assert_allclose(loss.x, [0.1 * step for step in range(3, 31, 3)])
    np.testing.assert_allclose(loss.y, [2 / step for step in range(3, 31, 3)])


def test_one_row_is_drawn_as_a_point():
    drawing = comparison_figure([Line("one", [rows(1.0, steps=1)], 0, 0)], title="", data_source="")
    assert drawing.axes[0].get_lines()[0].get_marker() == "o"


def test_a_long_legend_stays_in_the_picture():
    lines = [Line(f"DNI, K = 4, synthesizer learning rate 0.00{n}", [rows(1.0)], n, 0) for n in range(9)]
    drawing = comparison_figure(lines, title="", data_source="")
    drawing.draw_without_rendering()
    box = drawing.subfigs[0].legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= drawing.bbox.x1


def test_figure_has_three_panels_and_a_legend_of_all():
    lines = [
        Line("back-propagation", [rows(3.0)], 0, 0),
        Line("features replay, K = 2", [rows(4.0), rows(5.0)], 1, 0),
        Line("features replay, K = 3", [rows(9.0, diverges=True)], 1, 1),
    ]
    drawing = comparison_figure(lines, title="a title", data_source="some data")
    assert [axes.get_xlabel() for axes in drawing.axes] == ["epoch", "training time, compilation included (s)", "epoch"]
    assert [axes.get_ylabel() for axes in drawing.axes] == ["training loss", "training loss", "test error (%)"]
    (legend,) = drawing.subfigs[0].legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["back-propagation", "features replay, K = 2", "features replay, K = 3 (× diverged)"]
    third, cross, second, first = drawing.axes[0].get_lines()  # the first line is drawn last, on top
    assert first.get_color() != second.get_color() == third.get_color()
    assert second.get_linestyle() != third.get_linestyle()
    assert cross.get_marker() == "X"
    assert len(drawing.axes[0].collections) == 1  # the band of the two seeds
    assert {text.get_text() for text in drawing.texts} >= {"Data: some data"}


def test_times_are_in_readable_units():
    hours = [{**row, "seconds": 3600.0 * row["seconds"]} for row in rows(1.0)]
    drawing = comparison_figure([Line("one", [hours], 0, 0)], title="", data_source="")
    assert drawing.axes[1].get_xlabel() == "training time, compilation included (h)"
    np.testing.assert_allclose(drawing.axes[1].get_lines()[0].get_xdata()[-1], 60)


def test_nothing_to_compare():
    with pytest.raises(ValueError, match="at least one line"):
        comparison_figure([], title="", data_source="")


def test_file_is_replaced_in_one_go(tmp_path):
    path = tmp_path / "comparison.png"
    path.write_bytes(b"old")
    plot_comparison([Line("one", [rows(1.0)], 0, 0)], path, title="t", data_source="d")
    assert path.read_bytes().startswith(b"\x89PNG") and [*tmp_path.iterdir()] == [path]
