"""Where the findings and models of a study lie."""

import helpers
import pytest

from compactmind.manifest import add_to_manifest
from compactmind.search.places import findings_folder, findings_of, front_name, searched_name, trial_name


@pytest.mark.parametrize(
    ("study", "folder", "searched", "front", "trial"),
    [
        ("llama-bayesian", "", "llama_searched", "llama_front_3x_llama-bayesian", "llama_trial_7"),
        ("llama-bayesian-front", "llama-bayesian-front", "llama_searched", "llama_front_3x", "llama_trial_7_llama-bayesian-front"),
        ("narrow", "narrow", "llama_searched_narrow", "llama_front_3x_narrow", "llama_trial_7_narrow"),
    ],
)
def test_the_first_studies_have_short_names(tmp_path, study, folder, searched, front, trial):
    assert findings_folder(tmp_path, study) == tmp_path / folder
    assert (searched_name(study), front_name(study, 3.0), trial_name(study, 7)) == (searched, front, trial)


@pytest.mark.parametrize(
    ("config", "folder"),
    [
        ({"study": {"name": "llama-bayesian-front"}}, "llama-bayesian-front"), ({"study": {"name": "llama-bayesian"}}, ""),
        ({"study": None}, ""), ({}, ""), (None, ""),
    ],
)
def test_the_findings_are_those_of_the_search_that_the_model_is_from(tmp_path, config, folder):
    model = tmp_path / "models" / "llama"
    if config is not None:
        helpers.add_llama(tmp_path)
        add_to_manifest(model, {"stage": {"config": config}})
    assert findings_of(tmp_path, model) == tmp_path / folder
