"""Files and folders that a killed process leaves whole or not at all."""

import hashlib
import os
import secrets
import shutil
from pathlib import Path


def hidden_name(path: Path) -> Path:
    """A name beside a path; readers ignore it, and no other process takes it."""
    return path.with_name(f".{path.name}.part-{os.getpid()}-{secrets.token_hex(4)}")


def sha256(content: bytes) -> str:
    """The checksum of some bytes, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def write_file(path: Path, content: bytes) -> str:
    """Write a new file to the disk, and return its checksum."""
    with open(path, "xb") as file:  # x: names that differ only in case are one file on some file systems
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return sha256(content)


def sync_folder(path: Path) -> None:
    """Bring the names in a folder to the disk."""
    if os.name != "nt":  # Windows cannot open folders
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def rename_to_free_name(part: Path, wanted: Path) -> Path:
    """Give a folder the wanted name, or where that is taken the name of its next version."""
    path, version = wanted, 0
    while os.path.lexists(path) or not _rename(part, path):
        version += 1
        path = wanted.with_name(f"{wanted.name}-v{version}")
    return path


def _rename(source: Path, target: Path) -> bool:
    try:
        os.rename(source, target)
    except OSError:  # another writer may have taken the name in between
        if not os.path.lexists(target):
            raise
        return False
    return True


def remove_folder(path: Path) -> None:
    """Delete a folder; a record first leaves its visible name, because deleting is many steps and renaming is one."""
    hidden = path if path.name.startswith(".") else hidden_name(path)
    if hidden != path:
        os.rename(path, hidden)
    try:
        sync_folder(path.parent)  # the new name reaches the disk before the first file is gone
    finally:
        shutil.rmtree(hidden)
