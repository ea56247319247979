"""A run's folder, which makes it safe to kill a long computation at any moment.

A file is written whole or not at all (write_whole). A folder belongs to one identity, the hash of
its settings and its parents (Run.finished). One process at a time works in it (flock). A log is cut
back to the last checkpoint (Run.load_checkpoint). So the same command, run again, goes on from that
checkpoint. This file imports torch only to save and load tensors.
"""

import fcntl
import hashlib
import http.client
import io
import json
import os
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from support import ranks


class UserError(Exception):
    """A mistake that the user can correct. Its sentence says what was got, wanted, and to be done.
    """


STOPPED = "\nstopped: run the same command again to go on"


def main_exit(main: Callable[[], int | None]) -> int:
    """The exit code of main(): 2 after a UserError, which is printed as one line; 130 after Ctrl-C;
    1 if nobody reads stdout any more, for example after `| head`. A bug keeps its traceback. If
    several ranks fail, the first one prints its error."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed before Python started
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="replace")  # a terminal may lack π
    try:
        code = main() or 0
        sys.stdout.flush()  # raises if the pipe is broken
        return code
    except (Exception, KeyboardInterrupt) as error:
        first, code = ranks.first_to_fail(), 1
        if isinstance(error, UserError):
            said, code = f"error: {error}", 2
        elif isinstance(error, KeyboardInterrupt):
            said, code = STOPPED, 130
        elif isinstance(error, BrokenPipeError):
            sys.stdout, said = open(os.devnull, "w"), ""  # Python flushes it once more at its end
        elif ranks.WORLD == 1:
            raise
        else:
            said = traceback.format_exc()
        if first and said:
            print(said, file=sys.stderr, flush=True)
        if not first:
            time.sleep(0.3)  # torchrun kills all ranks when one ends: let the first one print
        if ranks.WORLD > 1:
            sys.stdout.flush()
            os._exit(code)  # an ordinary end would wait for the other ranks
        return code


def interrupted(kind: type, error: BaseException, trace: Any) -> None:
    """For sys.excepthook: handles Ctrl-C before main() runs, while torch is imported."""
    if issubclass(kind, KeyboardInterrupt):
        print(STOPPED, file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = interrupted
RESTORE = "check the path, or restore the file; if a stage made it, delete that stage's " \
          "folder and run the same command again"


@contextmanager
def reading(path: Path | str, remedy: str = RESTORE) -> Iterator[None]:
    """For a block that only reads and parses a file. Any error in it comes from the file, and
    becomes a UserError that ends with the remedy."""
    try:
        if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
            raise UserError(f"{path} is a pipe or a device, which may never end; {remedy}")
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; {remedy}") from error
    except Exception as error:  # what a damaged file raises can have any type
        if out_of_memory(error):
            raise
        reason = ": ".join(filter(None, (type(error).__name__, first_line(error))))
        raise UserError(f"{path} is damaged or of another kind ({reason}); {remedy}") from error


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """An error while writing (full disk, no permission ...) becomes a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; free some space or "
                        "choose another folder, then run the same command again") from error


def out_of_memory(error: BaseException) -> bool:
    """Whether the error means that memory is full. On a CPU torch has no class for this error."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" \
        or "can't allocate memory" in str(error)


def first_line(error: object, width: int = 200) -> str:
    return (str(error).splitlines() or [""])[0][:width]


def first_ten(items: Sequence[Any]) -> str:
    """The first ten items as text, and how many more there are."""
    more = f" and {len(items) - 10:,} more" * (len(items) > 10)
    return ", ".join(map(str, items[:10])) + more


# ------------------------------------------------------------------------------ files

def save_json(path: Path, obj: Any, indent: int | None = None) -> None:
    write_whole(path, lambda file: file.write(json.dumps(obj, indent=indent).encode()))


def read_json(path: Path, remedy: str = RESTORE) -> Any:
    """What save_json wrote. UserError if the file is missing or damaged."""
    with reading(path, remedy):
        return json.loads(path.read_bytes())


def read_text(path: Path) -> str:
    """A file's content, read as UTF-8 whatever the terminal uses. UserError without the file."""
    with reading(path):
        return path.read_bytes().decode(errors="replace")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, up to the first line that a kill or a power cut damaged."""
    with reading(path):
        lines = path.read_bytes().split(b"\n")
    rows = []
    for line in lines[:-1]:  # the part after the last newline is empty or incomplete
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            break
        rows.append(row)
    return rows


def write_whole(path: Path | str, write: Callable[[BinaryIO], None]) -> None:
    """Calls write(file). After a kill at any moment, path holds the old content or the new content.

    UserError if the file cannot be written; the old file is then unchanged. Only rank 0 writes.
    """
    if ranks.RANK:
        return
    path = Path(path)
    # It is in the same folder because a rename is atomic only inside one file system. mkstemp is
    # not used because only the owner may read its files.
    temporary = path.parent / f".{path.name[:200]}.{uuid.uuid4().hex}.tmp"
    with writing(path):
        clear_temporaries(path.parent)
        try:
            with open(temporary, "xb") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # locked while it is written
                if not temporary.exists():  # another process removed it before it was locked
                    return write_whole(path, write)
                write(file)
                file.flush()
                os.fsync(file.fileno())  # the bytes reach the disk before the name does
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync(path.parent)  # a rename is a change of the folder


def clear_temporaries(folder: Path) -> None:
    """Removes the temporary files of a write_whole that was killed."""
    for leftover in folder.glob(f".*.{'[0-9a-f]' * 32}.tmp"):  # only names that write_whole gives
        with suppress(OSError), open(leftover) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError if it is written now
            leftover.unlink()


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fetch(url: str, path: Path, remedy: str, sha256: str | None = None) -> None:
    """Downloads url to path. The file appears only when it is whole and its SHA-256 is right."""
    from torch.hub import download_url_to_file

    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in path.parent.glob(f"{path.name}.*.partial"):
            if leftover.stat().st_mtime < time.time() - 3600:  # its download was killed
                leftover.unlink()
    try:
        download_url_to_file(url, str(path), sha256, sys.stderr.isatty())
    except (OSError, RuntimeError, http.client.HTTPException) as error:  # RuntimeError: wrong hash
        raise UserError(f"cannot download {url} to {path} ({first_line(error)}); try again, or "
                        f"{remedy}") from error


def file_hash(path: Path | str, remedy: str = RESTORE) -> str:
    """16 hex digits of the SHA-256 of a file's bytes."""
    with reading(path, remedy), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def bytes_hash(content: bytes | memoryview) -> str:
    """16 hex digits of the SHA-256 of these bytes."""
    return hashlib.sha256(content).hexdigest()[:16]


def json_hash(obj: Any) -> str:
    """16 hex digits of the SHA-256 of obj as JSON. The order of keys does not matter."""
    text = json.dumps(obj, sort_keys=True, separators=(",", ":"))
    return bytes_hash(text.encode())


def tensor_bytes(obj: Any) -> memoryview:
    """What torch.save writes. Equal states give equal bytes, so their hash identifies a state."""
    import torch

    # Not torch.save into the file: it would write the file's random temporary name into the
    # archive, and report a full disk by several types of exception.
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    return buffer.getbuffer()


def save_tensors(path: Path | str, obj: Any) -> None:
    """torch.save, whole or not at all."""
    content = tensor_bytes(obj)
    write_whole(path, lambda file: file.write(content))


def load_tensors(path: Path | str, remedy: str = RESTORE) -> Any:
    """What save_tensors wrote, on the CPU. UserError if the file is missing or damaged."""
    import torch

    with reading(path, remedy), open(path, "rb") as file:
        return torch.load(file, map_location="cpu", weights_only=True)


# ------------------------------------------------------------------------------ a run's folder

@contextmanager
def lock(folder: Path, name: str) -> Iterator[None]:
    """Makes the folder and holds the lock of this name in it. Rank 0 does so for all ranks.
    UserError if another process holds the lock."""
    if ranks.RANK:
        yield
        return
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / name, "ab")
    # A file with a process id would remain after kill -9; a flock ends with its process. The lock
    # file is never removed, because another process may be opening it.
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder} is in use by another process: wait for it to end, or choose "
                            "another --out") from error
        yield


class Run:
    """A folder with config.json, metrics.jsonl, resume.pt while unfinished, and `final` at the end.

    settings and parents (name -> hash) are its identity. about (versions, device, command) is only
    recorded. Use: `if not run.finished:`, then inside `with run:` call load_checkpoint, log,
    checkpoint and, at the end, finish. A folder without `final` and resume.pt holds nothing to
    lose, so its run begins again.
    """

    def __init__(self, folder: Path | str, settings: dict[str, Any], parents: dict[str, str],
                 final: str = "model.pt", about: dict[str, Any] = {}):
        self.folder, self.final, self.about = Path(folder), final, about
        self.settings = json.loads(json.dumps(settings))  # tuples become lists, as on the disk
        self.parents, self.files = dict(parents), {}  # files: name -> hash, of a finished run
        self.identity = json_hash({"settings": self.settings, "parents": self.parents})

    def path(self, name: str) -> Path:
        return self.folder / name

    def _has(self, name: str) -> bool:
        with reading(self.folder):
            return self.path(name).exists()

    @property
    def finished(self) -> bool:
        """Whether `final` exists. UserError if the folder has another identity, or if a file that
        the run made has changed since."""
        if not self._mine() or not self._has(self.final):
            return False
        for name in {self.final: "", **self.files}:
            now = file_hash(self.path(name))
            if now != self.files.setdefault(name, now):
                raise UserError(f"{self.path(name)} has changed since the run was finished: restore"
                                f" it, or delete {self.folder} and run the same command again")
        return True

    @property
    def hash(self) -> str:
        """The hash of all files of a finished run that later stages read."""
        return hash_of_files(self.files)

    def _mine(self) -> bool:
        """Whether the folder holds a result or checkpoint of this identity. UserError if it holds
        one of another identity."""
        made = [name for name in (self.final, "resume.pt") if self._has(name)]
        if not made:
            return False
        path = self.path("config.json")
        if not self._has("config.json"):
            raise UserError(f"{self.folder} holds {made[0]} but no config.json to say what "
                            "made it: move it away, or choose another --out")
        with reading(path, f"restore it, or delete {self.folder} and run the same command again"):
            config = json.loads(path.read_bytes())
            settings, parents = dict(config["settings"]), dict(config["parents"])
            self.files = dict(config.get("files", {}))
        for name, before, now in differences(settings, self.settings):
            raise UserError(f"{self.folder} was made with {name} = {before}, and this command has "
                            f"{name} = {now}: choose another --out, or give the same setting")
        for name, before, now in differences(parents, self.parents):
            raise UserError(f"{name} has changed since {self.folder} was made from it (it was "
                            f"{before}, it is {now}): delete {self.folder}, or restore {name}")
        return True

    def __enter__(self) -> "Run":
        """Locks the folder and checks its identity. Removes the files of an earlier attempt that
        ended before its first checkpoint."""
        with ExitStack() as stack:
            stack.enter_context(lock(self.folder, ".lock"))
            if not self._mine() and not ranks.RANK:
                with writing(self.folder):
                    for name in ("metrics.jsonl", "best.pt"):
                        self.path(name).unlink(missing_ok=True)
                self._save_config()
            self._lock = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def _save_config(self) -> None:
        config = {"identity": self.identity, "settings": self.settings, "parents": self.parents,
                  "about": self.about, "files": self.files}
        save_json(self.path("config.json"), config, indent=1)

    def load_checkpoint(self, parts: dict[str, Any], steps: int) -> int:
        """Loads the last checkpoint into `parts`, which have state_dict and load_state_dict.

        Returns the step to go on from, 0 without a checkpoint. Removes the rows of metrics.jsonl
        from that step on: they will be logged again. UserError if the checkpoint has other parts.
        """
        if self._has(self.final):
            raise UserError(f"{self.folder} was finished by another process in the meantime: run "
                            "the same command again")
        path = self.path("resume.pt")
        if not self._has("resume.pt"):
            return 0
        again = "delete it, and the same command begins again from step 0"
        with reading(path, again):
            state = load_tensors(path, again)
            step = int(state["step"])
            for name, part in parts.items():
                part.load_state_dict(state[name])
        rows = [row for row in self.metrics() if row["step"] < step]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_whole(self.path("metrics.jsonl"), lambda file: file.write(text.encode()))
        if step < steps:
            print(f"  going on at step {step} of {steps}")
        return step

    def log(self, row: dict[str, Any]) -> None:
        """Appends one line to metrics.jsonl. row["step"]: the step that it belongs to."""
        if ranks.RANK:
            return
        line, path = json.dumps(row) + "\n", self.path("metrics.jsonl")
        with writing(path), open(path, "ab") as file:
            file.write(line.encode())

    def metrics(self) -> list[dict[str, Any]]:
        """The rows logged so far."""
        return read_rows(self.path("metrics.jsonl")) if self._has("metrics.jsonl") else []

    def checkpoint(self, state: dict[str, Any]) -> None:
        """Replaces resume.pt. `state` holds all that is needed to go on from step state["step"]."""
        if not ranks.RANK:
            self._save("resume.pt", tensor_bytes(state))

    def finish(self, obj: Any) -> None:
        """Writes `final`, which marks the run finished, and only then removes resume.pt.

        obj: a state for torch.save, or the bytes of another format. Before that, config.json gets
        the hashes of the files that the run has made, so that later stages notice a changed file.
        """
        if ranks.RANK:
            ranks.wait()
            self._mine()  # reads the hashes that rank 0 wrote
            return
        content = obj if isinstance(obj, bytes) else tensor_bytes(obj)
        self.files = {path.name: file_hash(path) for path in sorted(self.folder.iterdir())
                      if path.suffix in (".json", ".jsonl", ".tiktoken")
                      and path.name not in ("config.json", self.final)}
        self.files[self.final] = bytes_hash(content)
        self._save_config()
        self._save(self.final, content)
        with writing(self.folder):
            self.path("resume.pt").unlink(missing_ok=True)
        ranks.wait()

    def _save(self, name: str, content: bytes | memoryview) -> None:
        metrics = self.path("metrics.jsonl")
        if self._has("metrics.jsonl"):
            with writing(metrics):
                sync(metrics)  # the rows reach the disk before the checkpoint that counts them
        write_whole(self.path(name), lambda file: file.write(content))


def hash_of_files(files: dict[str, str]) -> str:
    """The hash of a run from those of its files. Two files hold times and are left out, so that a
    run that is made again has the same hash."""
    return json_hash({name: x for name, x in files.items()
                      if name not in ("metrics.jsonl", "result.json")})


def differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(name, old value, new value) as text for each key in which two dicts differ."""
    for name in {**new, **old}:
        before, now = (json.dumps(d[name]) if name in d else "(absent)" for d in (old, new))
        if before != now:
            yield name, before, now
