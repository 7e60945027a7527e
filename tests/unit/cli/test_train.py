"""`evergreen train`: settings from a file and from options, and mistakes in them named before anything is read."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from evergreen.cli import cli
from evergreen.cli.train import training_config

FILE = """
model = "dcn_v2"
seed = 3
batch_size = 512
[hyperparameters]
hidden = [256]
dropout = 0.2
[encoder]
min_count = 5
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "settings.toml"
    path.write_text(FILE)
    return path


def test_without_a_file_settings_are_the_defaults() -> None:
    from evergreen.training.config import TrainingConfig

    assert training_config(None, [], {}) == TrainingConfig()


def test_set_wins_over_the_file_and_options_over_both(config_file: Path) -> None:
    config = training_config(
        config_file, ["hyperparameters.hidden=[64,32]", "encoder.min_count=3", "seed=4", "batch_size=64"], {"seed": 9}
    )
    assert (config.model, config.seed, config.batch_size, config.encoder.min_count) == ("dcn_v2", 9, 64, 3)
    assert config.hyperparameters == {"hidden": [64, 32], "dropout": 0.2}


@pytest.mark.parametrize(
    ("entry", "name", "value"),
    [
        ("max_epochs = 3", "max_epochs", 3),
        ("learning_rate=1e-4", "learning_rate", 1e-4),
        ("export_program=false", "export_program", False),
        ('click_loss="focal"', "click_loss", "focal"),
        ("click_loss=focal", "click_loss", "focal"),
    ],
)
def test_a_value_is_toml_or_a_bare_word(entry: str, name: str, value: object) -> None:
    assert getattr(training_config(None, [entry], {}), name) == value


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("learning_rat=0.1", r"--set learning_rat: there is no such setting; did you mean learning_rate"),
        ("min_count=3", r"--set min_count: there is no such setting; did you mean .*encoder\.min_count"),
        ("encoder.min_cuont=3", r"--set encoder\.min_cuont: .* did you mean encoder\.min_count"),
        ("encoder.fields.item_id.oov_bucket=3", r"did you mean encoder\.fields\.item_id\.oov_buckets"),
        ("zzz=1", r"--set zzz: there is no such setting; choose from model, seed, "),
        ("negative_rate=0", r"--set negative_rate=0: input should be greater than 0"),
        ("click_loss=hinge", r"--set click_loss='hinge': input should be 'cross_entropy' or 'focal'"),
        ("seed.first=1", r"--set seed=\{'first': 1\}: input should be a valid integer"),
        ("max_epochs", r"--set 'max_epochs': write KEY=VALUE"),
        (".seed=1", r"--set '\.seed=1': write KEY=VALUE"),
        ("hyperparameters.hidden=[64", r"--set 'hyperparameters.hidden=\[64': the value is not TOML"),
    ],
)
def test_a_wrong_setting_is_named_with_the_nearest_ones(entry: str, message: str) -> None:
    with pytest.raises(click.UsageError, match=message):
        training_config(None, [entry], {})


def test_a_wrong_setting_of_the_file_is_named_with_the_file(config_file: Path) -> None:
    config_file.write_text("batch_sise = 3")
    with pytest.raises(click.UsageError, match=r"--config .*settings\.toml: batch_sise: .* did you mean batch_size"):
        training_config(config_file, [], {})


def test_a_file_that_is_not_toml_is_named_with_the_place(config_file: Path) -> None:
    config_file.write_text("batch_size: 3")
    with pytest.raises(click.UsageError, match=r"settings\.toml: not TOML: .*line 1"):
        training_config(config_file, [], {})


def test_a_setting_within_a_number_is_refused(config_file: Path) -> None:
    with pytest.raises(click.UsageError, match="seed is not a table"):
        training_config(config_file, ["seed.first=1"], {})


def test_a_wrong_option_stops_the_command_before_the_training_set_is_read(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["train", str(tmp_path), "--out", str(tmp_path / "out"), "--set", "epochs=1"])
    assert result.exit_code == 2
    assert "--set epochs: there is no such setting; did you mean max_epochs" in result.output


def test_a_folder_that_is_no_training_set_is_named(tmp_path: Path) -> None:
    from evergreen.contracts.errors import ArtifactError

    with pytest.raises(ArtifactError, match=r"training_set\.json: no such file"):
        CliRunner().invoke(cli, ["train", str(tmp_path), "--out", str(tmp_path / "out")], catch_exceptions=False)
