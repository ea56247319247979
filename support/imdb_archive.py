"""Reads Stanford's Large Movie Review Dataset from an archive, a folder, or a download.

Nothing is unpacked. Pipes, links inside an archive, and files that are too large for a review are
refused before they are read.
"""

import hashlib
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from support.runs import UserError, fetch, file_hash, reading
from support.tokenizer_files import MAX_CHARS

URL = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
SHA256 = "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe"
# the SHA-256 of a .tar.xz with the same reviews
RECOMPRESSED = "4a35065d8b3384e39f4a880d8dcfd2a12b4077bd62647bcc817273750807a2a2"
REVIEWS = "ed80e13dabafdb39"  # reviews_hash of both archives, and of the unpacked folder
REMEDY = f"set IMDB_PATH to a copy of {URL} or to its unpacked folder"
FOLDERS = {"test/pos": ("test", 1, 12_500), "test/neg": ("test", 0, 12_500),
           "train/pos": ("train", 1, 12_500), "train/neg": ("train", 0, 12_500),
           "train/unsup": ("unsup", None, 50_000)}  # split, label, number of reviews
NAME = re.compile(rf"(?:^|/)({'|'.join(FOLDERS)})/([0-9]{{1,5}})_[0-9]{{1,2}}\.txt$")
REVIEW, ARCHIVE = MAX_CHARS, 2**30  # largest size in bytes: of a review, a decompressed archive


def reviews_hash(path: Path) -> str:
    """A hash of what is at `path`: of a folder's reviews, or of an archive's bytes. The official
    reviews have the hash REVIEWS in a folder and in the two known archives."""
    with reading(path, REMEDY):
        if path.is_dir():
            digest = hashlib.sha256()
            for folder, number, content in reviews(path):
                digest.update(f"{folder}/{number} {len(content)}\n".encode() + content)
            return digest.hexdigest()[:16]
        digest = file_hash(path, REMEDY)
        return REVIEWS if digest in (SHA256[:16], RECOMPRESSED[:16]) else digest


def read_reviews(path: Path, folders: dict[str, tuple], progress: Callable[[str], object]
                 ) -> dict[str, list[bytes]]:
    """Every folder's reviews in the order of their IDs. UserError unless each folder has as many as
    the last item of its entry in `folders`; train/unsup may be empty."""
    found: dict[str, dict[int, bytes]] = {folder: {} for folder in folders}
    for folder, number, content in reviews(path):
        if number in found[folder]:
            raise UserError(f"{path} has two reviews named {folder}/{number}_RATING.txt, wanted "
                            f"one; {REMEDY}")
        found[folder][number] = content
    for folder, (*_, wanted) in folders.items():
        if len(found[folder]) != wanted and (found[folder] or folder != "train/unsup"):
            raise UserError(f"{path} has {len(found[folder]):,} reviews named {folder}/ID_RATING"
                            f".txt, wanted {wanted:,}: a wrong or incomplete copy; {REMEDY}")
    if not found["train/unsup"]:
        progress(f"{path} has no train/unsup: the language model learns from train alone")
    return {folder: [text for _, text in sorted(texts.items())] for folder, texts in found.items()}


def reviews(path: Path) -> Iterator[tuple[str, int, bytes]]:
    """(folder, ID, content) of every review. Those of a folder come in the order of their names.

    UserError for a review that cannot be read, is too large, or is not a regular file.
    """
    with reading(path, REMEDY):
        if path.is_dir():
            root = min((p.parents[1] for p in path.glob("**/test/pos")), default=path)
            for folder in filter(Path.is_dir, (root / name for name in FOLDERS)):
                for file in sorted(folder.iterdir()):
                    if match := NAME.search(file.as_posix()):
                        with reading(file, REMEDY):
                            check_size(file, file.stat().st_size, REVIEW)
                            yield match[1], int(match[2]), file.read_bytes()
            return
        with tarfile.open(path, "r|*", tarinfo=Header) as archive:
            for member in archive:
                check_size(f"{path}, decompressed,", member.offset_data, ARCHIVE)
                if match := NAME.search(member.name):
                    name = f"{match[0]} in {path}"
                    if not member.isfile():
                        raise UserError(f"{name} is a folder, a link or a device, wanted a file; "
                                        f"{REMEDY}")
                    check_size(name, member.size, REVIEW)
                    yield match[1], int(match[2]), archive.extractfile(member).read()


class Header(tarfile.TarInfo):
    """A member's header. Its size is checked before tarfile reads that many bytes."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> "Header":
        header = super().frombuf(buf, encoding, errors)
        check_size(repr(header.name), header.size, ARCHIVE if header.isfile() else REVIEW)
        return header


def check_size(name: object, size: int, most: int) -> None:
    if not 0 <= size <= most:
        raise UserError(f"{name} has {size:,} bytes, wanted at most {most:,}; {REMEDY}")


def download(cache: Path, progress: Callable[[str], object] = print) -> Path:
    """Stanford's archive in `cache`. The first call downloads it. UserError for another file."""
    archive = cache / "aclImdb_v1.tar.gz"
    again = "delete it, and the same command downloads it again"
    with reading(archive, again):
        if archive.exists():
            if reviews_hash(archive) != REVIEWS:
                raise UserError(f"{archive} is damaged: its SHA-256 is not {SHA256}; {again}")
            return archive
    progress(f"downloading {URL} (84 MB) to {archive}")
    fetch(URL, archive, REMEDY, SHA256)
    return archive
