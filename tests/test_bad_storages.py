"""Storages that cannot be used for a study are refused by what is wrong with them, and the lock of a journal ends with its process."""

import sqlite3
import subprocess
import sys

import filelock
import helpers
import optuna
import pytest
from test_workers import DESCRIBED, posix

from compactmind.errors import CompactMindError
from compactmind.search import storage as storage_module
from compactmind.search.engine import open_study


def test_a_database_of_another_optuna_names_both_versions_and_the_command(tmp_path):
    place = f"sqlite:///{tmp_path / 'study.db'}"
    open_study("x", place, DESCRIBED)
    with sqlite3.connect(tmp_path / "study.db") as database:
        database.execute("UPDATE version_info SET library_version = '2.10.0'")
        database.execute("UPDATE alembic_version SET version_num = 'v2.6.0.a'")
    wanted = f"made by Optuna 2.10.0 and this is {optuna.__version__}: `optuna storage upgrade --storage {place}`"
    with pytest.raises(CompactMindError) as error:
        open_study("x", place, DESCRIBED)
    assert wanted in str(error.value) and "\n" not in str(error.value)
    with sqlite3.connect(tmp_path / "study.db") as database:
        database.execute("UPDATE alembic_version SET version_num = 'v99.0.0.a'")
    with pytest.raises(CompactMindError, match=f"is of a newer Optuna than this one, {optuna.__version__}"):
        open_study("x", place, DESCRIBED)


def test_a_study_of_another_space_is_refused_by_what_differs(tmp_path):
    orders = [f"prune > {number}" for number in range(30)]
    described = {"space": {"orders": orders, "choices": {"prune": {"sparsity": [0.1, 0.2], "round_to": [8]}}}}
    changed = {"space": {"orders": [*orders[1:], "new"], "choices": {"prune": {"sparsity": [0.1, 0.3], "round_to": [8]}}}}
    place = f"sqlite:///{tmp_path / 'study.db'}"
    open_study("x", place, described).ask()
    with pytest.raises(CompactMindError) as error:
        open_study("x", place, changed)
    said = str(error.value)
    assert "space.choices.prune.sparsity: [0.1, 0.2] there, [0.1, 0.3] here" in said and "round_to" not in said
    assert "space.orders: 30 there, 30 here; among those only there ['prune > 0'], only here ['new']" in said
    assert "choose another --study_name" in said and "\n" not in said


def test_a_driver_that_is_not_installed_is_named_with_its_command(monkeypatch):
    for driver in ("psycopg", "pg8000"):
        monkeypatch.setitem(sys.modules, driver, None)
    with pytest.raises(CompactMindError, match="pip install -r requirements-postgres.txt") as error:
        open_study("x", "postgresql://me:secret@127.0.0.1:1/none", DESCRIBED)
    assert "\n" not in str(error.value) and "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("installed", "wanted"), [("pg8000", "postgresql+pg8000"), ("psycopg", "postgresql"), ("both", "postgresql"), ("none", "postgresql")]
)
def test_an_address_that_names_no_driver_gets_the_one_that_is_there(monkeypatch, installed, wanted):
    monkeypatch.setattr(storage_module, "find_spec", lambda name: installed in (name, "both") or None)
    assert storage_module._with_driver("postgresql://me:secret@here/db?x=1") == f"{wanted}://me:secret@here/db?x=1"
    assert storage_module._with_driver("postgresql+psycopg2://me@here/db") == "postgresql+psycopg2://me@here/db"


HOLDER = """
import sys
sys.path.insert(0, {repository!r})
from compactmind.search.storage import LockOfProcess
lock = LockOfProcess("folder/study.log")
lock.acquire()
print("has it", flush=True)
sys.stdin.read()
"""


@posix
def test_the_lock_of_a_journal_ends_with_its_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    code = HOLDER.format(repository=str(helpers.REPOSITORY))
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "has it\n"
        lock = storage_module.LockOfProcess("folder/study.log")
        with pytest.raises(filelock.Timeout):
            lock.lock.acquire(timeout=0.05)
        holder.kill()
    assert lock.acquire()
    lock.release()
