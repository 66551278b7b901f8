"""The storage of a study: a hiccup costs nothing, and one that stays away ends the search in one line."""

import importlib
from types import SimpleNamespace

import made_up_search
import optuna
import pytest
from made_up_search import cost, fresh, run
from optuna.storages import RDBStorage
from optuna.trial import TrialState

import run_pipeline
from common import SearchConfig
from compactmind.command_line import shown_settings
from compactmind.devices import WORKER
from compactmind.errors import CompactMindError
from compactmind.search import storage as storage_module

space = made_up_search.space


def failing(monkeypatch, name, error, times):
    """Let a method of the database fail so many times; return the list of the moments when it did."""
    original, failed = getattr(RDBStorage, name), []

    def method(self, *arguments, **options):
        if len(failed) < times:
            failed.append(arguments)
            raise error
        return original(self, *arguments, **options)

    monkeypatch.setattr(RDBStorage, name, method)
    return failed


AWAY = optuna.exceptions.StorageInternalError("the database system is starting up\nand more")


@pytest.mark.parametrize(
    "name",
    ["_create_new_trial", "set_trial_user_attr", "set_trial_state_values", "_get_trials", "_set_trial_param", "get_trial"],
)
def test_a_hiccup_of_the_storage_costs_nothing(tmp_path, space, monkeypatch, name):
    study, evaluated = fresh(tmp_path), []
    monkeypatch.setattr(storage_module, "WAITS", (0, 0, 0))
    hiccups = []

    def evaluate(notes, steps):
        evaluated.append(steps)
        if len(evaluated) == 2:  # a result is about to be told
            hiccups.append(failing(monkeypatch, name, AWAY, 3))
        return [cost(steps)]

    trials = run(study, space, 4, evaluate)
    assert len(trials) == len(study.trials) == len(evaluated) == 4 and len(hiccups[0]) == 3
    assert [trial.value for trial in trials] == [cost(steps) for steps in evaluated]


def test_a_result_that_was_written_before_the_connection_broke_is_not_told_twice(tmp_path, space, monkeypatch):
    study, original, broken = fresh(tmp_path), RDBStorage.set_trial_state_values, []
    monkeypatch.setattr(storage_module, "WAITS", (0, 0))

    def done_but_not_answered(self, trial_id, state, values=None):
        result = original(self, trial_id, state, values)
        if state == TrialState.COMPLETE and not broken:
            broken.append(trial_id)
            raise AWAY
        return result

    monkeypatch.setattr(RDBStorage, "set_trial_state_values", done_but_not_answered)
    trials = run(study, space, 3)
    assert broken and len(study.trials) == 3 and all(trial.state == TrialState.COMPLETE for trial in trials)


def test_a_storage_that_stays_away_ends_the_search_in_one_line(tmp_path, space, monkeypatch):
    study = fresh(tmp_path)
    monkeypatch.setattr(storage_module, "WAITS", (0, 0))
    failing(monkeypatch, "set_trial_state_values", AWAY, 10**6)
    with pytest.raises(CompactMindError, match="has not answered for .*starting up.*the same command goes on") as error:
        run(study, space, 3)
    assert "\n" not in str(error.value)


def test_a_worker_that_starts_while_the_storage_is_away_waits_as_one_that_runs_does(tmp_path, monkeypatch):
    monkeypatch.setattr(storage_module, "WAITS", (0,) * 6)
    monkeypatch.setattr(storage_module, "OPENING_WAITS", (0,) * 2)
    original, place, away = storage_module._opened, f"sqlite:///{tmp_path / 'study.db'}", []

    def not_yet(place):
        if len(away) < 5:
            away.append(place)
            raise AWAY
        return original(place)

    monkeypatch.setattr(storage_module, "_opened", not_yet)
    with pytest.raises(CompactMindError, match="cannot be opened: the database system is starting up"):
        storage_module.open_storage(place)  # by hand: the address may be wrong
    assert len(away) == 3
    monkeypatch.setenv(WORKER, "1/2")  # whoever started it has opened that very storage
    away.clear()
    assert storage_module.open_storage(place).get_all_studies() == [] and len(away) == 5


def test_the_waits_of_the_storage_grow_and_last_for_minutes():
    assert list(storage_module.WAITS) == sorted(storage_module.WAITS) and 120 < sum(storage_module.WAITS) < 600


# ---------------------------------------------------------------------------------------------------------------- passwords
@pytest.mark.parametrize(
    ("place", "shown"),
    [
        ("postgresql://me:secret@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me:secret@host:port/db", "postgresql://me:***@host:port/db"),  # which no library reads
        ("postgresql://me:se@cret@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me:se?cr et@host/db", "postgresql://me:***@host/db"),
        ("postgresql://host/db?user=me&password=secret&x=a@b", "postgresql://host/db?user=me&password=***&x=a@b"),
        ("postgresql://me@host:5432/db?x=a@b", "postgresql://me@host:5432/db?x=a@b"),
        ("sqlite:///my study.db", "sqlite:///my study.db"),
        ("folder/study.log", "folder/study.log"),
    ],
)
def test_an_address_is_shown_without_its_password(place, shown):
    assert storage_module.without_password(place) == shown
    assert shown_settings(SearchConfig(storage=place))["storage"] == shown


def test_no_command_that_is_printed_has_the_password(tmp_path, capfd, monkeypatch):
    script, place = importlib.import_module("5_bayesian_search"), "postgresql://me:secret@host/db"
    command = script.replay_command(SearchConfig(storage=place), 3)
    assert command.endswith("--storage 'postgresql://me:***@host/db' --replay 3")
    (tmp_path / "llama").mkdir()
    monkeypatch.setattr(run_pipeline.subprocess, "run", lambda command: SimpleNamespace(returncode=int(f"--storage={place}" in command)))
    with pytest.raises(SystemExit) as error:
        only = run_pipeline.PipelineConfig(only=("5_bayesian_search.py",), models_dir=tmp_path)
        run_pipeline.run_all(only, {"5_bayesian_search": {"storage": place}})
    assert "failed (exit code 1)" in str(error.value) and "secret" not in capfd.readouterr().out + str(error.value)
