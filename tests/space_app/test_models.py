"""Which models there are is said by the configuration alone."""

import pytest

import querit
from space_app.limits import RefusedError
from space_app.models import MODELS, Models, configured
from tests.models_for_tests import folder_of


def test_models_come_from_the_command_then_the_environment_then_the_release(monkeypatch):
    monkeypatch.setenv(MODELS, "General=org/one@abc, Mine=my/folder ,org/three")
    assert configured() == {"General": "org/one@abc", "Mine": "my/folder", "three": "org/three"}
    assert configured(["a=b/c"]) == {"a": "b/c"}
    monkeypatch.delenv(MODELS)
    assert configured() == {"Nano": str(querit.RELEASED)}
    assert configured(["querit-reranker-nano"]) == {"querit-reranker-nano": str(querit.RELEASED)}  # as for every verb
    monkeypatch.setattr("querit.loading.RELEASED", querit.RELEASED / "gone")
    assert configured() == {"Nano": querit.HUB_ID}


@pytest.mark.parametrize("entries", [["a=b/b", "a=b/c"], ["=b"], ["a="], ["x/a", "y/a"]])
def test_what_names_nothing_or_twice_is_an_error(entries, monkeypatch):
    with pytest.raises(ValueError, match=r"^--model: .* is no NAME=SOURCE"):
        configured(entries)
    monkeypatch.setenv(MODELS, ",".join(entries))
    with pytest.raises(ValueError, match=f"^{MODELS}: "):
        configured()


@pytest.mark.parametrize("source", ["/nonexistent", "nonexistent", "a/b/c", "../up", "Mine=/nonexistent"])
def test_what_is_neither_folder_nor_repo_is_an_error_at_once(source, tmp_path):
    with pytest.raises(ValueError, match="There is no folder"):
        configured([source])
    with pytest.raises(ValueError, match=r"no config\.json"):
        configured([str(tmp_path)])


def test_who_takes_an_instruction_is_known_by_the_prompt(models):
    assert models.takes_instruction("Causal") and not models.takes_instruction("Tiny")


def test_a_model_is_loaded_once_and_a_folder_may_have_an_at(tmp_path):
    (tmp_path / "at@home").symlink_to(folder_of("bert"))
    models = Models({"tiny": str(tmp_path / "at@home")})
    models.warm_up().join()
    assert models.ranker("tiny") is models.ranker("tiny")


def test_one_that_cannot_be_loaded_is_refused_without_its_path(tmp_path, caplog):
    models = Models({"broken": str(tmp_path / "secret-place")})
    with pytest.raises(RefusedError, match="broken could not be loaded") as refusal:
        models.ranker("broken")
    assert "secret" not in str(refusal.value)
    models.warm_up().join()  # the page is there all the same
    assert "cannot be loaded" in caplog.text and "Traceback" not in caplog.text
