"""A run's folder: what makes a long computation safe to kill at any moment.

A file is written whole or not at all (write_whole). A folder belongs to one identity, the hash of
its settings and its parents (Run.finished). One process at a time works in it (flock). What is
appended is cut back to the last checkpoint (Run.load_checkpoint). So the same command, run again,
goes on where that checkpoint was. Imports torch only to save and load tensors.
"""

import fcntl
import hashlib
import io
import json
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


class UserError(Exception):
    """What the user can put right, in one sentence: what was got, what was wanted, what to run."""


def main_exit(main: Callable[[], int | None]) -> int:
    """The exit code of main(): 2 after a UserError, printed as one line. Bugs keep a traceback."""
    try:
        return main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


REMEDY = {"read": "check the path; if a stage's file is gone or damaged, delete its folder and run "
                  "the stage again",
          "write": "free some space or choose another --out, then run the same command again"}


@contextmanager
def os_errors(verb: str, path: Path | str) -> Iterator[None]:
    """The system's refusal (full disk, no permission ...) or damaged JSON becomes a UserError."""
    try:
        yield
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot {verb} {path}: {reason}; {REMEDY[verb]}") from error


# ------------------------------------------------------------------------------ files

def save_json(path: Path, obj: Any, indent: int | None = None) -> None:
    write_whole(path, lambda file: file.write(json.dumps(obj, indent=indent).encode()))


def read_json(path: Path) -> Any:
    """What save_json wrote. UserError where that is gone or damaged."""
    with os_errors("read", path):
        return json.loads(path.read_bytes())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, up to the first line that a kill or a power cut left torn."""
    with os_errors("read", path):
        lines = path.read_bytes().split(b"\n")
    rows = []
    for line in lines[:-1]:  # what follows the last newline is empty, or torn
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def write_whole(path: Path | str, write: Callable[[BinaryIO], None]) -> None:
    """Calls write(file) so that path holds all of the new bytes or, at any kill, all of the old.

    UserError when the system refuses; the old file is then intact.
    """
    path = Path(path)
    # In the same folder: a rename is atomic only inside one filesystem. Not mkstemp, whose files
    # only their owner may read.
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    with os_errors("write", path):
        try:
            with open(temporary, "xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())  # the bytes reach the disk before the name does
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync(path.parent)  # a rename is a change of the folder


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_hash(path: Path | str) -> str:
    """16 hex digits of the SHA-256 of a file's bytes."""
    with os_errors("read", path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def json_hash(obj: Any) -> str:
    """16 hex digits of the SHA-256 of obj as canonical JSON: the order of keys does not matter."""
    text = json.dumps(obj, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def save_tensors(path: Path | str, obj: Any) -> None:
    """torch.save, whole or not at all. Equal states give equal bytes: file_hash names a state."""
    import torch

    # By way of memory: torch.save into a file reports a full disk as one of several exceptions, and
    # writes the file's name, here a random one, into the archive.
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    write_whole(path, lambda file: file.write(buffer.getbuffer()))


def load_tensors(path: Path | str) -> Any:
    """What save_tensors wrote, on the CPU. UserError if missing, truncated or foreign."""
    import torch

    with os_errors("read", path):
        file = open(path, "rb")
    with file:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except MemoryError:
            raise
        except Exception as error:  # a damaged file fails anywhere inside torch, with any type
            raise UserError(f"{path} is truncated or not one of this project's files: restore it, "
                            "or delete it and run the same command again") from error


# ------------------------------------------------------------------------------ a run's folder

class Run:
    """A folder with config.json, metrics.jsonl, resume.pt while unfinished, and `final` at the end.

    settings and parents (name -> hash) are its identity; about (versions, device, command) is only
    recorded. `if not run.finished:`, then `with run:` load_checkpoint, log and checkpoint, finish.
    """

    def __init__(self, folder: Path | str, settings: dict[str, Any], parents: dict[str, str],
                 final: str = "model.pt", about: dict[str, Any] = {}):
        self.folder, self.final, self.about = Path(folder), final, about
        self.settings = json.loads(json.dumps(settings))  # tuples become lists, as on the disk
        self.parents = dict(parents)
        self.identity = json_hash({"settings": self.settings, "parents": self.parents})

    def path(self, name: str) -> Path:
        return self.folder / name

    def _has(self, name: str) -> bool:
        with os_errors("read", self.folder):
            return self.path(name).exists()

    @property
    def finished(self) -> bool:
        """Whether `final` is there. UserError on another identity."""
        return self._mine() and self._has(self.final)

    def _mine(self) -> bool:
        """Whether the folder's config.json has this identity; False where nothing was begun."""
        if not self._has("config.json"):
            for name in (self.final, "resume.pt", "metrics.jsonl"):
                if self._has(name):
                    raise UserError(f"{self.folder} holds {name} but no config.json to say what "
                                    "made it: move it away, or choose another --out")
            return False
        path = self.path("config.json")
        with os_errors("read", path):
            content = path.read_bytes()
        try:
            config = json.loads(content)
            settings, parents = dict(config["settings"]), dict(config["parents"])
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} is damaged: restore it, or delete {self.folder} and run the "
                            "same command again") from error
        for name, before, now in differences(settings, self.settings):
            raise UserError(f"{self.folder} was made with {name} = {before}, and this command has "
                            f"{name} = {now}: choose another --out, or give the same setting")
        for name, before, now in differences(parents, self.parents):
            raise UserError(f"{name} has changed since {self.folder} was made from it (it was "
                            f"{before}, it is {now}): delete {self.folder}, or restore {name}")
        return True

    def __enter__(self) -> "Run":
        """Makes and locks the folder, checks its identity, and clears what a kill left behind."""
        with os_errors("write", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            # A file with a process id would outlive kill -9; a flock ends with its process. The
            # file stays, since removing it would race.
            self._lock = os.open(self.path(".lock"), os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with os_errors("write", self.folder):
                try:
                    fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise UserError(f"{self.folder} is in use by another process: wait for it to "
                                    "end, or choose another --out") from error
                for leftover in self.folder.glob(".*.tmp"):  # of a write_whole that was killed
                    leftover.unlink()
            if not self._mine():
                config = {"identity": self.identity, "settings": self.settings,
                          "parents": self.parents, "about": self.about}
                save_json(self.path("config.json"), config, indent=1)
            if not self._has(self.final) and not self._has("resume.pt"):
                with os_errors("write", self.folder):
                    self.path("metrics.jsonl").unlink(missing_ok=True)  # the run starts again
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)

    def load_checkpoint(self, parts: dict[str, Any], steps: int) -> int:
        """Puts the last checkpoint back into `parts`, each with state_dict and load_state_dict.

        Returns the step to go on from, 0 without a checkpoint. Drops the rows of metrics.jsonl from
        that step on, which will be logged again. UserError where the checkpoint does not fit.
        """
        if self._has(self.final):
            raise UserError(f"{self.folder} was finished by another process in the meantime: run "
                            "the same command again")
        path = self.path("resume.pt")
        if not self._has("resume.pt"):
            return 0
        state = load_tensors(path)
        if not isinstance(state, dict) or not isinstance(state.get("step"), int):
            raise UserError(f"{path} is no checkpoint of a run: restore it, or delete it and run "
                            "the same command again, from step 0")
        try:
            for name, part in parts.items():
                part.load_state_dict(state[name])
        except (KeyError, TypeError, RuntimeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} is a checkpoint of another configuration "
                            f"({str(error).splitlines()[0]}): delete {self.folder}") from None
        rows = [row for row in self.metrics() if row["step"] < state["step"]]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_whole(self.path("metrics.jsonl"), lambda file: file.write(text.encode()))
        if state["step"] < steps:
            print(f"  going on at step {state['step']} of {steps}")
        return state["step"]

    def log(self, row: dict[str, Any]) -> None:
        """Appends one line to metrics.jsonl. row["step"]: the step that it belongs to."""
        line, path = json.dumps(row) + "\n", self.path("metrics.jsonl")
        with os_errors("write", path), open(path, "ab") as file:
            file.write(line.encode())

    def metrics(self) -> list[dict[str, Any]]:
        """The rows logged so far."""
        return read_rows(self.path("metrics.jsonl")) if self._has("metrics.jsonl") else []

    def checkpoint(self, state: dict[str, Any]) -> None:
        """Replaces resume.pt. state is all that going on needs; state["step"], the next step."""
        self._save("resume.pt", state)

    def finish(self, obj: Any) -> None:
        """Writes `final`, which marks the run finished, and only then removes resume.pt.

        obj: a state for save_tensors, or a function write(file) for another format.
        """
        self._save(self.final, obj)
        with os_errors("write", self.folder):
            self.path("resume.pt").unlink(missing_ok=True)

    def _save(self, name: str, obj: Any) -> None:
        metrics = self.path("metrics.jsonl")
        if self._has("metrics.jsonl"):
            with os_errors("write", metrics):
                sync(metrics)  # no checkpoint on the disk before the rows that it says were logged
        (write_whole if callable(obj) else save_tensors)(self.path(name), obj)


def differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(name, old value, new value) wherever two dicts differ, as text."""
    for name in {**new, **old}:
        before, now = (json.dumps(d[name]) if name in d else "(absent)" for d in (old, new))
        if before != now:
            yield name, before, now
