import dataclasses
import json
import pathlib
import re
import shlex

import pytest

from fr_jax.experiments import cifar, mnist
from fr_jax.experiments._cli import command_line, harness
from fr_jax.experiments._cli.checks import check, default_workdir, differences, resolve
from fr_jax.experiments._cli.settings import PRESETS, TrainSettings, as_json, belongs
from fr_jax.experiments._fields import SettingsError
from fr_jax.experiments._methods import METHODS
from fr_jax.experiments._models import MODEL_CARDS
from fr_jax.models import MODELS

ROOT = pathlib.Path(__file__).parents[3]


def parse(arguments: list[str], program: command_line.Program = cifar.CIFAR) -> TrainSettings:
    return command_line.parse(program.name, program.defaults, arguments)


def words(settings: TrainSettings, program: command_line.Program) -> list[str]:
    """What a shell makes of the command, without the program."""
    line = harness.command(program.name, program.defaults, settings)
    assert line.startswith(program.call)
    return shlex.split(line.removeprefix(program.call))


def test_no_flags_are_the_defaults():
    assert parse([]) == TrainSettings()
    check(TrainSettings())


def test_flags_of_the_contract():
    flags = (
        "K method model dataset data-dir epochs steps batch-size microbatches optimizer learning-rate schedule warmup "
        "milestones momentum nesterov weight-decay clip seed dtype balance cuts data-parallel batch-stats devices "
        "workdir resume eval-every checkpoint-every preset profile"
    )
    names = {field.name for field in dataclasses.fields(TrainSettings)}
    assert {flag.replace("-", "_") for flag in flags.split()} <= names


def test_help_names_every_flag_and_model(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "python -m fr_jax.experiments.cifar" in text
    for field in dataclasses.fields(TrainSettings):
        assert f"--{field.name.replace('_', '-')}" in text
    assert "resnet8, 20, 32, 56, 110, 164" in text


@pytest.mark.parametrize("arguments", [["--no-such-flag", "1"], ["--K", "four"], ["--epochs"], ["surplus"]])
def test_malformed_flags_exit_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(arguments)
    assert stop.value.code == 2
    assert "Traceback" not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("dataset", "examples", "steps_per_epoch", "epochs", "batch_size"),
    [
        ("digits", 1433, 22, 15, 64),
        ("mnist", 60_000, 468, 5, 128),
        ("cifar10", 50_000, 390, 1, 128),
        ("cifar100", 50_000, 390, 1, 128),
        ("synthetic", 10_000, 78, 1, 128),
    ],
)
def test_defaults_by_data_set(dataset, examples, steps_per_epoch, epochs, batch_size):
    resolved = resolve(TrainSettings(), dataset, examples)
    assert (resolved.dataset, resolved.batch_size) == (dataset, batch_size)
    assert (resolved.steps, resolved.epochs) == (epochs * steps_per_epoch, None)
    assert resolved.milestones == (epochs / 2, epochs * 3 / 4)
    assert (resolved.eval_every, resolved.checkpoint_every) == (steps_per_epoch, min(steps_per_epoch, 200))
    assert resolved.workdir == pathlib.Path(f"runs/{dataset}-resnet20-fr-K4-seed0")


@pytest.mark.parametrize(
    ("settings", "rate"),
    [
        (TrainSettings(), 0.05),
        (TrainSettings(K=1), 0.1),  # nothing is stale
        (TrainSettings(method="bp"), 0.1),
        (TrainSettings(method="bp", learning_rate=0.3), 0.3),
        (TrainSettings(learning_rate=0.0), 0.0),
        (TrainSettings(method="gpipe"), 0.1),
        (TrainSettings(method="2bw"), 0.05),
        (TrainSettings(optimizer="nadam"), 0.001),
        (TrainSettings(method="ddg", model="mlp"), 0.01),  # without batch normalisation
    ],
)
def test_default_learning_rate(settings, rate):
    assert resolve(settings, "digits", 1433).learning_rate == rate


def test_what_is_given_wins_over_defaults():
    given = TrainSettings(
        steps=7, batch_size=8, milestones=(2.0,), eval_every=3, checkpoint_every=2, workdir=pathlib.Path("x")
    )
    resolved = resolve(given, "digits", 1433)
    expected = dataclasses.replace(given, dataset="digits", learning_rate=0.05, **METHODS["fr"].defaults)
    assert dataclasses.asdict(resolved) == dataclasses.asdict(expected)


def test_default_workdir_names_the_run():
    settings = TrainSettings(K=2, method="bp", model="mlp", seed=3)
    assert str(default_workdir(settings, "cifar10")) == "runs/cifar10-mlp-bp-K2-seed3"


def test_the_papers_recipe():
    settings = parse(["--preset", "paper", "--K", "4"])
    check(settings)
    resolved = resolve(settings, "cifar10", 50_000)
    assert (resolved.model, resolved.dataset, resolved.K, resolved.method) == ("resnet164", "cifar10", 4, "fr")
    assert (resolved.steps, resolved.batch_size, resolved.milestones) == (300 * 390, 128, (150.0, 225.0))
    assert (resolved.learning_rate, resolved.momentum, resolved.weight_decay) == (0.01, 0.9, 5e-4)


def test_the_bubble_free_recipe():
    settings = parse(["--preset", "bubble-free"])
    check(settings)
    resolved = resolve(settings, "cifar10", 50_000)
    assert (resolved.model, resolved.dataset, resolved.K, resolved.method) == ("resnet20", "cifar10", 4, "ddg")
    assert (resolved.microbatches, resolved.weight_prediction) == (4, 1.0)
    assert (resolved.steps, resolved.batch_size, resolved.milestones) == (12 * 390, 128, (6.0, 9.0))
    assert (resolved.learning_rate, resolved.warmup, resolved.momentum) == (0.1, 391, 0.9)
    with pytest.raises(SettingsError, match=r"--preset bubble-free sets --weight-prediction, .* drop --preset"):
        check(parse(["--preset", "bubble-free", "--method", "bp"]))


def test_flags_win_over_a_preset():
    settings = parse(["--learning-rate", "0.2", "--preset=paper", "--model", "resnet20", "--milestones", "1", "2"])
    assert (settings.learning_rate, settings.model, settings.milestones) == (0.2, "resnet20", (1.0, 2.0))
    assert settings.epochs == 300


def test_steps_replace_the_epochs_of_a_preset():
    settings = parse(["--preset", "paper", "--steps", "5"])
    check(settings)
    assert (settings.steps, settings.epochs) == (5, None)
    with pytest.raises(SettingsError, match="one length"):
        check(parse(["--preset", "paper", "--steps", "5", "--epochs", "2"]))


def test_presets_are_made_of_valid_settings():
    for values in PRESETS.values():
        check(TrainSettings(**values))


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--K", "2", "--method", "bp", "--model", "mlp", "--dataset", "digits", "--epochs", "3"],
        ["--steps", "9", "--batch-size", "32", "--learning-rate", "1e-3", "--milestones", "0.5", "2"],
        ["--milestones"],
        ["--cuts", "1", "3", "5", "--nesterov", "--resume", "--seed", "7"],
        ["--K", "1", "--cuts"],
        ["--data-dir", "a folder/with 'quotes'", "--workdir=-x", "--profile", "--tensorboard", "--overwrite"],
        ["--preset", "paper"],
        ["--preset", "paper", "--model", "resnet20", "--K", "8", "--steps", "10"],
        ["--preset", "blockprop", "--h-steps", "8", "--cache"],
        ["--method", "dni", "--label-conditioning", "--depth", "3", "--model", "mlp"],
    ],
)
@pytest.mark.parametrize("program", [cifar.CIFAR, mnist.MNIST])
def test_command_and_parse_are_inverse(arguments, program):
    settings = parse(arguments, program)
    assert parse(words(settings, program), program) == dataclasses.replace(settings, preset=None)


def test_as_json_is_json():
    settings = TrainSettings(data_dir=pathlib.Path("a"), cuts=(1, 2, 3))
    assert as_json(settings) == json.loads(json.dumps(as_json(settings)))
    assert (as_json(settings)["data_dir"], as_json(settings)["cuts"]) == ("a", [1, 2, 3])


def config(**changes: object) -> dict[str, object]:
    return as_json(resolve(TrainSettings(**changes), "digits", 1433)) | {"resolved_cuts": [2, 4, 6]}


def test_no_differences_in_what_does_not_change_the_mathematics():
    saved = config(milestones=(1.0,))
    now = config(
        milestones=(1.0,),
        epochs=40,
        eval_every=1,
        checkpoint_every=1,
        log_every=1,
        devices=2,
        workdir=pathlib.Path("elsewhere"),
        data_dir=pathlib.Path("there"),
        resume=True,
        profile=True,
        balance="uniform",
    )
    assert differences(saved, now) == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"learning_rate": 0.1}, "--learning-rate is 0.1 and was 0.05"),
        ({"milestones": (1.0, 2.0)}, "--milestones is 1.0 2.0 and was 7.5 11.25"),
        ({"milestones": ()}, "--milestones is none and was 7.5 11.25"),
        ({"weight_decay": 0.0}, "--weight-decay is 0.0 and was 0.0005"),
        ({"momentum": 0.0}, "--momentum is 0.0 and was 0.9"),
        ({"nesterov": True}, "--nesterov is True and was False"),
        ({"seed": 1}, "--seed is 1 and was 0"),
        ({"dtype": "bfloat16"}, "--dtype is bfloat16 and was float32"),
        ({"data_parallel": 2}, "--data-parallel is 2 and was 1"),
        ({"batch_stats": "both"}, "--batch-stats is both and was play"),
        ({"method": "bp"}, "--method is bp and was fr"),
        ({"model": "mlp"}, "--model is mlp and was resnet20"),
        ({"K": 2}, "--K is 2 and was 4"),
    ],
)
def test_differences_name_the_setting_and_both_values(change, text):
    found = differences(config(), config(**change))
    assert any(line.startswith(text) for line in found), found


def test_differences_in_cuts_and_how_to_train_longer():
    assert differences(config(), config() | {"resolved_cuts": [1, 4, 6]}) == ["--cuts is 1 4 6 and was 2 4 6"]
    (line,) = differences(config(), config(epochs=30))
    assert "to train for longer, add --milestones 7.5 11.25" in line


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            {"method": "frr"},
            rf"--method frr is unknown; it can be {', '.join(METHODS)}. Did you mean fr\\?",
        ),
        ({"model": "resnet2"}, rf"--model resnet2 is unknown; it can be {', '.join(MODELS)}"),
        (
            {"optimizer": "adam"},
            r"--optimizer adam .* sgd, adamw, nadam, muon. Did you mean adamw\?",
        ),
        ({"schedule": "linear"}, "--schedule linear is unknown; it can be steps, cosine, constant"),
        (
            {"schedule": "cosine", "milestones": (1.0, 2.0)},
            "--milestones 1.0 2.0 is a setting of --schedule steps, not ",
        ),
        ({"optimizer": "adamw", "momentum": 0.5}, "--momentum 0.5 is a setting of --optimizer sgd, not of adamw. Drop"),
        ({"optimizer": "muon", "nesterov": True}, "--nesterov is a setting of --optimizer sgd, not of muon. Drop"),
        ({"clip": 0.0}, "--clip 0.0 is out of range; it must be above 0"),
        ({"warmup": -1}, "--warmup -1 is out of range; it must be at least 0"),
        (
            {"preset": "papr"},
            r"--preset papr is unknown; it can be paper, blockprop, bubble-free, lm, gpt2. Did you mean paper\?",
        ),
        ({"dtype": "float16"}, "--dtype float16 is unknown; it can be float32, bfloat16"),
        ({"balance": "params"}, "--balance params is unknown; it can be flops, time, uniform"),
        ({"batch_stats": "none"}, "--batch-stats none is unknown; it can be play, replay, both"),
        ({"K": 0}, "--K 0 is out of range; it must be at least 1"),
        ({"steps": 0}, "--steps 0"),
        ({"epochs": -3}, "--epochs -3"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"data_parallel": 0}, "--data-parallel 0"),
        ({"shard_params": True}, "--shard-params splits the weights of a stage over its --data-parallel devices"),
        ({"devices": 0}, "--devices 0"),
        ({"eval_every": 0}, "--eval-every 0"),
        ({"checkpoint_every": 0}, "--checkpoint-every 0"),
        ({"log_every": 0}, "--log-every 0"),
        ({"learning_rate": -0.1}, "--learning-rate -0.1 is out of range; it must be at least 0"),
        ({"learning_rate": float("nan")}, "--learning-rate nan"),
        ({"weight_decay": -1e-4}, "--weight-decay -0.0001"),
        ({"momentum": -0.9}, "--momentum -0.9"),
        ({"seed": -1}, "--seed -1"),
        ({"seed": 2**32}, "--seed 4294967296 is out of range; it must be at least 0 and at most 4294967295"),
        ({"milestones": (1.0, -2.0)}, "--milestones 1.0 -2.0"),
        ({"steps": 3, "epochs": 3}, "--steps and --epochs were both given.* Drop one"),
        ({"resume": True, "overwrite": True}, "--resume and --overwrite"),
        ({"gradient_shrinking": 0.0}, "--gradient-shrinking 0.0 is out of range; it must be above 0 and at most 1"),
        ({"gradient_shrinking": 1.5}, "--gradient-shrinking 1.5"),
        ({"weight_prediction": -1.0}, "--weight-prediction -1.0"),
        ({"accumulate": 0}, "--accumulate 0"),
        ({"method": "gpipe", "microbatches": 0}, "--microbatches 0 is out of range; it must be at least 1"),
        ({"method": "2bw", "K": 9}, "--microbatches 8 .* the --K 9 stages of 2bw, .* Use --microbatches 9"),
        ({"batch_size": 100, "microbatches": 8}, "a mini-batch of 100 cannot be split into 8 equal parts, .* Try 96"),
        ({"dataset": "digits", "microbatches": 8, "data_parallel": 3}, "mini-batch of 64 .* 24 equal parts, .* Try 48"),
        ({"replay_weights": "old"}, "--replay-weights old is unknown; it can be current, stashed"),
        ({"method": "gpipe", "pipeline_schedule": "1f2b"}, "--pipeline-schedule 1f2b is unknown; it can be"),
        ({"prediction_momentum": 0.9}, "--prediction-momentum 0.9 .* is off. Add --weight-prediction 1"),
        ({"prediction_momentum": 1.1}, "--prediction-momentum 1.1 is out of range; .* at most 1"),
        ({"discrepancy_decay": 0.5, "weight_prediction": 1.0}, "--weight-prediction 1.0 and --discrepancy-decay 0.5"),
        ({"discrepancy_decay": 0.5, "replay_weights": "stashed"}, "--discrepancy-decay 0.5 and --replay-weights stash"),
        ({"rescheduling": -1}, "--rescheduling -1 is out of range; it must be at least 0"),
        ({"late_b1": 0.95}, "--late-b1 0.95 is a setting of --optimizer nadam, not of sgd. Drop"),
        ({"spike_compensation": True, "optimizer": "adamw"}, "--spike-compensation is a setting of --optimizer sgd"),
        ({"spike_compensation": True, "nesterov": True}, ".* --nesterov is a form of it"),
        ({"spike_compensation": True, "momentum": 0.0}, ".* --momentum 0 leaves it nothing"),
        (
            {"model": "mlp", "dropout_rate": 1.0},
            "--dropout-rate 1.0 is out of range; it must be at least 0 and below 1",
        ),
        ({"method": "blockprop", "h_every": 2}, "--h-every 2 needs the gluing variables .* Add --cache"),
        ({"K": 3, "cuts": (1,)}, "--cuts 1 make 2 stages, and --K is 3; K stages need K-1 = 2 cuts"),
        ({"K": 1, "cuts": (1,)}, r"K-1 = 0 cuts"),
    ],
)
def test_check_says_what_is_valid(change, complaint):
    with pytest.raises(SettingsError, match=complaint):
        check(TrainSettings(**change))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_stats", "play"),
        ("gradient_shrinking", 0.5),
        ("accumulate", 2),
        ("weight_prediction", 1.0),
        ("synthesizer_hidden", 8),
        ("synthesizer_learning_rate", 0.1),
        ("label_conditioning", True),
        ("penalty", 2.0),
        ("h_steps", 2),
        ("h_learning_rate", 0.1),
        ("cache", True),
        ("h_every", 1),
        ("microbatches", 8),
        ("replay_weights", "stashed"),
        ("pipeline_schedule", "1f1b"),
        ("rescheduling", 100),
        ("discrepancy_decay", 0.5),
        ("spike_compensation", True),
        ("prediction_momentum", 1.0),
        ("late_b1", 0.99),
        ("cg_steps", 1),
        ("z_steps", 9),
        ("free_steps", 9),
        ("beta", 2.0),
    ],
)
def test_a_setting_of_another_method_is_an_error(name, value, capsys):
    """Not ignored. Its help says whose it is."""
    having = [method for method, entry in METHODS.items() if name in entry.defaults]
    assert having
    for method in METHODS:
        settings = TrainSettings(**run_of(method), **{name: value})
        if method in having:
            check(settings)
            assert getattr(resolve(settings, "digits", 1433), name) == value
        else:
            with pytest.raises(SettingsError) as error:
                check(settings)
            text = f"--{name.replace('_', '-')}{'' if value is True else f' {value}'} is a setting of --method"
            assert text in str(error.value)
            assert f"{' and '.join(having)}, not of {method}. Drop the flag" in str(error.value)
    with pytest.raises(SystemExit):
        parse(["--help"])
    help_text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    shown = re.search(rf"--{name.replace('_', '-')}[ ,].*", help_text).group()
    assert set(shown[shown.index("[") + 1 : shown.index("]")].split(", ")) == set(having)


def run_of(method):
    """What a run by a method cannot do without."""
    card = METHODS[method]
    return {"method": method} | ({"model": card.models[0]} if card.models else {}) | ({"K": 1} if card.whole else {})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model": "resnet20"}, "--method eqprop trains dense networks only, --model mlp, and not resnet20"),
        ({"K": 3}, "--method eqprop does not cut the network into --K 3. Use --K 1"),
        ({"dtype": "bfloat16"}, "--dtype bfloat16 means nothing to eqprop: it computes in float32. Drop the flag"),
        ({"dropout_rate": 0.1}, "--dropout-rate 0.1 means nothing to eqprop: its units have no dropout"),
    ],
)
def test_what_a_method_cannot_do_is_an_error(change, complaint):
    with pytest.raises(SettingsError, match=re.escape(complaint)):
        check(TrainSettings(**run_of("eqprop") | change))
    check(TrainSettings(**run_of("eqprop"), dropout_rate=0.0))


def test_a_method_of_all_examples_and_without_learning_rate():
    given = run_of("admm")
    resolved = resolve(TrainSettings(**given), "digits", 1433)
    assert (resolved.batch_size, resolved.steps, resolved.learning_rate, resolved.milestones) == (1433, 50, 0.0, ())
    assert (resolved.eval_every, resolved.checkpoint_every) == (1, 10)  # a state has outputs of every example
    names = {field.name for field in dataclasses.fields(TrainSettings)}
    config = {name: value for name, value in dataclasses.asdict(resolved).items() if name in names}
    again = resolve(TrainSettings(**config | {"epochs": None}), "digits", 1433)  # as --init-from reads it
    assert again.batch_size == 1433
    with pytest.raises(SettingsError, match="--batch-size 64 cannot be used: admm has all 1,433 training examples in"):
        resolve(TrainSettings(**given, batch_size=64), "digits", 1433)
    for change, text in (
        ({"learning_rate": 0.1}, "--learning-rate 0.1"),
        ({"schedule": "cosine"}, "--schedule cosine"),
        ({"milestones": (1.0,)}, "--milestones 1.0"),
        ({"optimizer": "muon"}, "--optimizer muon"),
        ({"clip": 1.0}, "--clip 1.0"),
    ):
        with pytest.raises(
            SettingsError, match=f"{text} means nothing to admm: it solves for its weights and takes no"
        ):
            check(TrainSettings(**given, **change))


def test_the_default_rate_of_a_method_that_is_not_back_propagation_for_one_stage():
    rates = [resolve(TrainSettings(method=method, K=1), "digits", 1433).learning_rate for method in ("dfa", "proxprop")]
    assert rates == [METHODS["bp"].learning_rate, METHODS["proxprop"].learning_rate]


def test_a_setting_of_another_model_is_an_error():
    for name in MODEL_CARDS["mlp"].defaults:
        with pytest.raises(SettingsError, match=r"is a setting of --model mlp and gpt, not of resnet20. Drop"):
            check(TrainSettings(**{name: 1 if name != "dropout_rate" else 0.1}))
    check(TrainSettings(model="mlp", depth=3, width=8, dropout_rate=0.1))


@pytest.mark.parametrize("method", METHODS)
def test_own_settings_are_filled_in_for_the_method_alone(method):
    resolved = resolve(TrainSettings(**run_of(method)), "digits", 1433)
    for owner, entry in METHODS.items():
        for name, default in entry.defaults.items():
            if owner == method:
                assert getattr(resolved, name) == default
            elif name not in METHODS[method].defaults:
                assert getattr(resolved, name) in (None, False)


def test_a_run_from_before_a_setting_existed_can_be_resumed():
    old = config()
    own = METHODS["fr"].defaults
    for name in (*(own.keys() - {"batch_stats"}), "pipeline_schedule", "depth", "cache"):
        del old[name]
    assert differences(old, config()) == []
    assert differences(old, config(accumulate=2)) == ["--accumulate is 2 and was 1"]
    assert differences(old, config(microbatches=4)) == ["--microbatches is 4 and was 1"]
    back = config(method="bp")
    assert differences(back | {"batch_stats": "play"}, back) == []  # written when every run had the setting


@pytest.mark.parametrize("path", sorted(ROOT.glob("experiments/**/config.json")), ids=lambda p: str(p.parent.name))
def test_runs_of_earlier_versions_can_be_resumed(path):
    saved = json.loads(path.read_text())
    names = {field.name for field in dataclasses.fields(TrainSettings)} - {"epochs"}
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in saved.items() if name in names}
    own = {name for name in values if not belongs(name, saved["method"], saved["model"])}  # once every run had them
    settings = TrainSettings(**{name: v for name, v in values.items() if name not in own} | {"overwrite": False})
    resolved = resolve(settings, saved["dataset"], saved["steps_per_epoch"] * saved["batch_size"])
    assert differences(saved, as_json(resolved) | {"resolved_cuts": saved["resolved_cuts"]}) == []


def test_tensorboard_must_be_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match="needs tensorboardX: pip install"):
        check(TrainSettings(tensorboard=True))
