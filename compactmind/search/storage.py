"""Where a study is kept: a storage that several workers may use at once, and whose hiccups cost nothing but time.

Optuna reads the state of a trial and writes the next one in one transaction. PostgreSQL and MySQL lock the row for that and a journal file
has one order of its lines; SQLite locks nothing before the first write, so two workers could both take the trial that waits. Here its
transactions take the lock when they begin: what has been read in one is still so when it writes.
"""

import time
from collections.abc import Callable
from typing import Any

import optuna
import sqlalchemy
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, get_storage
from optuna.storages.journal import JournalFileBackend

from compactmind.errors import CompactMindError

WAITS = (0.5, 1, 2, 4, 8, 15, 30, 60, 60, 60)
"""Seconds before a call that failed is made again, for the first time, the second ...: a database that restarts is back within minutes."""
OPENING_WAITS = (0.1, 0.3, 1)
"""The same while the storage is opened: somebody who gave a wrong address does not want to wait."""
LOCK_SECONDS = 60
"""So long one process waits for the lock of an SQLite file that another one has."""
HICCUPS = (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError, OSError)
"""What a storage raises that is away or busy; anything else is an answer."""


class PatientStorage:
    """A storage whose calls are made again, after growing waits, when it does not answer.

    Raises CompactMindError when it has not answered for about as many seconds as WAITS has in all.
    """

    def __init__(self, storage: BaseStorage, name: str):
        self.storage, self.name = storage, name

    def __getattr__(self, attribute: str) -> Any:
        found = getattr(self.storage, attribute)
        return self._patient(found) if callable(found) else found

    def _patient(self, call: Callable) -> Callable:
        def patient(*arguments, **options):
            begun = time.monotonic()
            for wait in (*WAITS, None):
                try:
                    return call(*arguments, **options)
                except HICCUPS as error:
                    if wait is None:
                        raise CompactMindError(
                            f"the study's storage {self.name} has not answered for {time.monotonic() - begun:.0f} s "
                            f"({first_line(error.__cause__ or error)}): what it has is kept; the same command goes on once it answers again"
                        ) from error
                    time.sleep(wait)

        return patient


def open_storage(place: str) -> PatientStorage:
    """Return the storage at an Optuna URL or, if it ends in .log, in a journal file. Raises CompactMindError if it cannot be reached."""
    for wait in (*OPENING_WAITS, None):
        try:
            return PatientStorage(_opened(place), without_password(place))
        except Exception as error:  # noqa: BLE001  every database driver has its own way to say "not there"
            if wait is None or not isinstance(error, HICCUPS):
                raise CompactMindError(
                    f"the study's storage {without_password(place)!r} cannot be opened: {first_line(error)}; for example "
                    "sqlite:///study.db, a journal file study.log, or postgresql://user:password@host/database"
                ) from None
            time.sleep(wait)  # two workers that make the tables of a new database: the second finds them a moment later


def _opened(place: str) -> BaseStorage:
    if place.endswith(".log"):
        return JournalStorage(JournalFileBackend(place))
    if not place.startswith("sqlite"):
        return get_storage(place)
    storage = RDBStorage(place, engine_kwargs={"connect_args": {"timeout": LOCK_SECONDS}})
    storage.engine.dispose()  # connections made before the listeners below were there
    sqlalchemy.event.listen(storage.engine, "connect", _leave_transactions_to_us)
    sqlalchemy.event.listen(storage.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    return get_storage(storage)


def _leave_transactions_to_us(connection, _) -> None:
    connection.isolation_level = None  # else Python's driver begins one of its own at the first write


def without_password(place: str) -> str:
    """Return a storage's address as it may be shown and written down."""
    try:
        return sqlalchemy.engine.make_url(place).render_as_string(hide_password=True)
    except sqlalchemy.exc.ArgumentError:
        return place  # the path of a journal file


def first_line(error: BaseException) -> str:
    """Return what an error says, on one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
