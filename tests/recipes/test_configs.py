"""Every YAML file of a recipe is one that its stage reads, key for key."""

from pathlib import Path

import pytest
from trl import RewardConfig, TrlParser

from recipes.base import BaseArguments
from recipes.calibrate import CalibrateArguments
from recipes.evaluate import EvaluateArguments
from recipes.score import ScoreArguments
from recipes.train import ScriptArguments

RECIPES = Path(__file__).parents[2] / "recipes"
STAGES = {
    "0_base": (BaseArguments,),
    "1_general_score": (ScoreArguments,),
    "1_general": (ScriptArguments, RewardConfig),
    "1_general_calibrate": (CalibrateArguments,),
    "6_evaluate": (EvaluateArguments,),
    "6_evaluate_losses": (EvaluateArguments,),
}
FILES = sorted(RECIPES.glob("*/*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_recipe_is_read_by_its_stage(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = TrlParser(STAGES[path.stem]).parse_args_and_config(["--config", str(path)], fail_with_unknown_args=True)
    assert len(values) == len(STAGES[path.stem])
    assert path.parent.name in (getattr(values[-1], "output_dir", None) or values[-1].output)


def test_calibration_uses_queries_that_training_left_out():
    nano = RECIPES / "querit-nano"
    script, _ = TrlParser(STAGES["1_general"]).parse_args_and_config(["--config", str(nano / "1_general.yaml")])
    (calibrate,) = TrlParser(CalibrateArguments).parse_args_and_config(
        ["--config", str(nano / "1_general_calibrate.yaml")]
    )
    assert calibrate.data == script.train_data
    assert calibrate.first_group >= script.max_groups
