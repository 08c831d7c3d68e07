"""Curves of runs that were made one by one."""

import json

import pytest

from fr_jax.experiments.curves import __main__ as curves
from fr_jax.plotting import comparison as comparison_plot


@pytest.fixture
def make_run(tmp_path):
    def make(name, method="fr", K=2, rows=3, **more):
        folder = tmp_path / name
        folder.mkdir()
        config = {"method": method, "K": K, "model": "mlp", "dataset": "digits", "data_source": "digits", **more}
        (folder / "config.json").write_text(json.dumps(config))
        lines = [
            {"step": i, "epoch": i / 10, "seconds": float(i), "train_loss": 2.0 / i} for i in range(1, rows + 1)
        ] + [{"step": rows, "epoch": rows / 10, "seconds": float(rows), "test_accuracy": 0.5, "test_loss": 1.0}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines[: None if rows else 0]))
        return str(folder)

    return make


def test_a_line_a_label_and_seeds_share_one(make_run, tmp_path, monkeypatch):
    drawn = {}
    plot = lambda lines, path, **text: drawn.update(lines=lines, path=path, **text)
    monkeypatch.setattr(curves, "plot_comparison", plot)
    runs = [make_run("a", "bp", 1), make_run("b"), make_run("c"), make_run("d", "bp", 1, data_parallel=2)]
    assert curves.main(["--runs", *runs, "--output", str(tmp_path / "new" / "x.png")]) == 0
    labels = [line.label for line in drawn["lines"]]
    assert labels == ["back-propagation", "features replay, K = 2", "back-propagation, 2 devices share a batch"]
    assert [len(line.runs) for line in drawn["lines"]] == [1, 2, 1]
    assert [(line.colour, line.stroke) for line in drawn["lines"]] == [(0, 0), (1, 0), (0, 1)]
    assert drawn["title"] == "mlp on digits" and drawn["data_source"] == "digits"


def test_time_may_be_steps_times_a_measured_step(make_run, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(curves, "plot_comparison", lambda lines, path, **text: drawn.update(lines=lines, **text))
    words = ["--runs", make_run("a", "bp", 1), make_run("b"), "--output", str(tmp_path / "x.png")]
    assert curves.main([*words, "--step-seconds", "0.5", "0"]) == 0
    first, second = (line.runs[0] for line in drawn["lines"])
    assert [row["seconds"] for row in first] == [0.5, 1.0, 1.5, 1.5]
    assert {row["seconds"] for row in second} == {None}
    assert drawn["time"] == "steps times the seconds of a step"
    assert curves.main([*words, "--step-seconds", "0.5"]) == 2
    assert curves.main([*words, "--step-seconds", "0.5", "-1"]) == 2


def test_writes_a_picture_and_no_other(make_run, tmp_path, capsys):
    words = ["--runs", make_run("a"), "--labels", "mine", "--output", str(tmp_path / "x.png")]
    assert curves.main(words) == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert curves.main(words) == 2
    assert "has x.png already. Add --overwrite" in capsys.readouterr().err
    assert curves.main([*words, "--overwrite"]) == 0
    assert comparison_plot.plot_comparison is curves.plot_comparison


def test_how_long_to_a_loss(make_run, tmp_path, capsys):
    words = ["--runs", make_run("a", "bp", 1, rows=9), make_run("b", rows=9), make_run("c", rows=3)]
    words += ["--losses", "0.3", "1.5", "--step-seconds", "60", "30", "30", "--output", str(tmp_path / "x.png")]
    assert curves.main(words) == 0
    said = capsys.readouterr().out
    said = " ".join(said.split())
    assert "(times as fast as back-propagation) | 0.3 | 1.5 |" in said
    assert "| back-propagation | 7.0 | 2.0 |" in said
    assert "| features replay, K = 2 | never | 1.0 (2.00) |" in said  # in the mean over its two runs
    header, *rows = (tmp_path / "x.csv").read_text().splitlines()
    assert header == "line,run,training_loss,step,epoch,seconds" and len(rows) == 6
    assert rows[0] == f"back-propagation,{tmp_path / 'a'},0.3,7,0.7,420.0"
    assert rows[2] == f'"features replay, K = 2",{tmp_path / "c"},0.3,,,'
    assert curves.main([*words, "--step-seconds", "60", "0", "0", "--overwrite"]) == 0
    assert "features replay" not in capsys.readouterr().out
    (tmp_path / "x.png").unlink()
    assert curves.main(words) == 2 and "has x.csv already" in capsys.readouterr().err


def test_what_cannot_be_drawn(make_run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    other = make_run("other")
    (tmp_path / "other" / "config.json").write_text("{}")
    (tmp_path / "file").touch()
    cases = [
        (["--runs", other], "holds no run"),
        (["--runs", make_run("c"), "--losses", "nan"], "--losses nan: give finite numbers"),
        (["--runs", make_run("d"), "--output", str(tmp_path)], "is a folder; it must be the name of a PNG file. Try"),
        (["--runs", make_run("e"), "--output", "x.pdf"], "--output x.pdf does not end in .png"),
        (["--runs", make_run("f"), "--output", str(tmp_path / "file" / "x.png")], "cannot be in a folder: "),
        ([], "--runs is missing"),
        (["--runs", make_run("a"), "--labels", "x", "y"], "2 --labels were given for 1 --runs"),
        (["--runs", str(tmp_path / "empty")], "holds no run"),
        (["--runs", make_run("b", rows=0)], "has no rows yet"),
    ]
    for words, said in cases:
        assert curves.main(["--output", str(tmp_path / "never.png"), *words]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "never.png").exists()
