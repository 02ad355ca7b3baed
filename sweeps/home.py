"""Where state lives: one folder, or a URL for each part of it.

Everything has a default below ``DP_SWEEPS_HOME`` (``~/.dp-sweeps``). The environment moves a part
to the real thing: ``DP_SWEEPS_DATABASE_URL`` to PostgreSQL, ``MLFLOW_TRACKING_URI`` to an MLflow
server, ``DP_SWEEPS_CHECKPOINTS_URL`` to an object store. Workers read the same environment, so a
password in a URL never travels through Ray.
"""

import dataclasses
import getpass
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import sqlalchemy
from sqlalchemy import exc

from sweeps.errors import HomeError

HOME_VARIABLE = "DP_SWEEPS_HOME"
DATABASE_VARIABLE = "DP_SWEEPS_DATABASE_URL"
MLFLOW_VARIABLE = "MLFLOW_TRACKING_URI"
EXPERIMENT_VARIABLE = "MLFLOW_EXPERIMENT_NAME"
CHECKPOINTS_VARIABLE = "DP_SWEEPS_CHECKPOINTS_URL"

_MAX_WHO = 256
_CHECKPOINTS_URL = re.compile(r"[a-z][a-z0-9+.-]*://[^\s?#\x00-\x1f\x7f]+")


@dataclasses.dataclass(frozen=True)
class Home:
    """The places of one installation's state. Nothing is created by looking.

    Attributes:
        path: The folder.
        database_url: SQLAlchemy URL of the one database.
        mlflow_uri: MLflow tracking URI.
        checkpoints_url: Where checkpoints are kept, as fsspec knows it and without a password;
            empty for the folder alone.
    """

    path: Path
    database_url: sqlalchemy.URL = dataclasses.field(repr=False)
    mlflow_uri: str = dataclasses.field(repr=False)
    checkpoints_url: str = ""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> "Home":
        """Reads the variables; unset or empty ones take their defaults.

        Raises:
            HomeError: If a URL cannot be read, the database's names one that lives in memory, or
                that of checkpoints has a password in it.
        """
        env = os.environ if environment is None else environment
        path = Path(env.get(HOME_VARIABLE) or Path.home() / ".dp-sweeps").expanduser().absolute()
        url = env.get(DATABASE_VARIABLE)
        return cls(
            path=path,
            database_url=(
                _database_url(url)
                if url
                else sqlalchemy.URL.create("sqlite", database=str(path / "ledger.db"))
            ),
            mlflow_uri=env.get(MLFLOW_VARIABLE) or f"sqlite:///{path / 'mlflow.db'}",
            checkpoints_url=_checkpoints_url(env.get(CHECKPOINTS_VARIABLE) or ""),
        )

    @property
    def ledger_witness(self) -> Path | None:
        """Where this machine remembers the end of a ledger that others keep; see `Ledger`.

        None for the file of a SQLite database: its ledger keeps one beside it.
        """
        if self.uses_sqlite:
            return None
        where = self.database_url.set(password=None, query={}).render_as_string()
        digest = hashlib.sha256(where.encode()).hexdigest()[:16]
        return self.path / f"ledger-witness-{digest}"

    @property
    def data_dir(self) -> Path:
        """Built-in data sets, prepared once."""
        return self.path / "data"

    @property
    def artifacts_dir(self) -> Path:
        """MLflow artifacts, where MLflow is the local default."""
        return self.path / "artifacts"

    @property
    def compilation_cache_dir(self) -> Path:
        """JAX's persistent compilation cache, shared by the workers of this machine."""
        return self.path / "cache" / "jax"

    def sweep_dir(self, sweep_id: str) -> Path:
        """A sweep's reports, checkpoints and Tune's own files."""
        return self.path / "sweeps" / sweep_id

    def checkpoint_dir(self, sweep_id: str, trial_id: str) -> Path:
        """A trial's checkpoints on this machine."""
        return self.sweep_dir(sweep_id) / "checkpoints" / trial_id

    def trial_log(self, sweep_id: str, trial_id: str) -> Path:
        """What a trial's workers said."""
        return self.sweep_dir(sweep_id) / "logs" / f"{trial_id}.log"

    def driver_log(self, sweep_id: str) -> Path:
        """What a sweep's drivers said, where they ran."""
        return self.sweep_dir(sweep_id) / "logs" / "driver.log"

    @property
    def secrets_dir(self) -> Path:
        """Roots of noise keys of trials that have not ended. Never copied, never shared."""
        return self.path / "secrets"

    @property
    def uses_sqlite(self) -> bool:
        """Whether the database is a file of this machine."""
        return self.database_url.get_backend_name() == "sqlite"

    @property
    def uses_local_mlflow(self) -> bool:
        """Whether MLflow's store is a file of this machine."""
        return self.mlflow_uri.startswith("sqlite:")

    def create(self) -> None:
        """Makes the folder, readable by its owner alone.

        Raises:
            HomeError: If it cannot be made.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise HomeError(
                f"{HOME_VARIABLE}={str(self.path)!r} cannot be made: {error.strerror}; allowed is "
                "a folder that you can write"
            ) from error


def who() -> str:
    """The person at the keyboard, for the journal."""
    try:
        name = getpass.getuser()
    except (LookupError, OSError, ImportError):  # a user id without a name, as in some containers
        name = f"uid {os.getuid()}"
    return "".join(c for c in name if c.isprintable())[:_MAX_WHO]


def _database_url(text: str) -> sqlalchemy.URL:
    try:
        url = sqlalchemy.make_url(text)
    except (exc.ArgumentError, ValueError):  # their messages may quote a password
        raise HomeError(
            f"{DATABASE_VARIABLE} cannot be read as a URL; allowed are sqlite:///FILE and "
            "postgresql+psycopg://USER:PASSWORD@HOST/DATABASE"
        ) from None
    if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
        raise HomeError(
            f"{DATABASE_VARIABLE} names a database in memory, which workers cannot share; allowed "
            "are a SQLite file and PostgreSQL"
        )
    return url


def _checkpoints_url(text: str) -> str:
    """The URL as it is kept: it stands before every checkpoint's name in the database."""
    if not text:
        return ""
    if not _CHECKPOINTS_URL.fullmatch(text) or "::" in text:
        raise HomeError(
            f"{CHECKPOINTS_VARIABLE} cannot be read as a URL; allowed are those that fsspec "
            "knows, as s3://BUCKET/FOLDER, gs://BUCKET/FOLDER or file:///FOLDER"
        )
    if "@" in urlsplit(text).netloc:
        raise HomeError(
            f"{CHECKPOINTS_VARIABLE} names a user or holds a password, which would stand in the "
            "database; allowed is a URL without, and credentials where its file system looks for "
            "them (AWS_ACCESS_KEY_ID and the like)"
        )
    return text.rstrip("/")
