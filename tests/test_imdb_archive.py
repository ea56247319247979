"""Laws of support/imdb_archive.py: an archive and a folder give the same reviews, and nothing else
is read. The refusals that a command prints are rows of test_mistakes.py."""

import hashlib
import os
import tarfile
from pathlib import Path

import pytest
from test_data_imdb import FEW, IMDB, tiny_reviews, write_archive

from support import imdb_archive
from support.imdb_archive import download, read_reviews, reviews_hash
from support.runs import UserError


def write_folder(path, names):
    for name, text in names.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text, encoding="utf-8")
    return path


def read(path):
    return read_reviews(path, FEW, lambda text: None)


@pytest.fixture
def tiny(tmp_path):
    return write_archive(tmp_path / "tiny.tar.gz", tiny_reviews())


# ------------------------------------------------------------------------------ the same reviews

def test_archives_of_all_kinds_and_folders_give_the_same_reviews(tiny, tmp_path):
    names = dict(reversed(tiny_reviews().items()))
    others = [write_archive(tmp_path / mode, names, mode) for mode in ("w:xz", "w:bz2", "w")]
    folder = write_folder(tmp_path / "folder" / "aclImdb", names)
    wanted = read(tiny)
    assert wanted["test/neg"][2].decode() == tiny_reviews()["test/neg/2_2.txt"]
    for other in (*others, folder, folder.parent):
        assert read(other) == wanted, other


def test_the_hash_of_a_folder_depends_on_its_reviews_only(tmp_path, monkeypatch):
    names = tiny_reviews()
    one = write_folder(tmp_path / "one" / "aclImdb", names)
    two = write_folder(tmp_path / "two", {**dict(reversed(names.items())), "README": "no review"})
    (tmp_path / "one" / "aclImdb" / "train" / "pos" / ".5_9.txt.swp").write_text("nor this")
    assert reviews_hash(one) == reviews_hash(one.parent) == reviews_hash(two)
    seen = {reviews_hash(one)}
    moved = {name.replace("test/neg/7_", "test/neg/99_"): text for name, text in names.items()}
    for i, other in enumerate((
            names | {"test/neg/7_2.txt": "of the same size!"}, moved,
            {name: text for name, text in names.items() if "unsup" not in name})):
        seen.add(reviews_hash(write_folder(tmp_path / f"other{i}", other)))
    assert len(seen) == 4, "other reviews have an equal hash"
    listed = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: reversed(list(listed(path))))
    assert reviews_hash(two) in seen, "the order of a directory listing may differ"


def test_the_hash_of_an_archive_is_of_its_bytes_unless_it_is_the_official_one(
        tiny, tmp_path, monkeypatch):
    plain = [write_archive(tmp_path / f"{x}.tar", tiny_reviews() | {"test/neg/7_2.txt": x}, "w")
             for x in "ab"]
    assert plain[0].stat().st_size == plain[1].stat().st_size
    assert len({reviews_hash(path) for path in (tiny, *plain)} | {imdb_archive.REVIEWS}) == 4
    monkeypatch.setattr(imdb_archive, "SHA256", hashlib.sha256(tiny.read_bytes()).hexdigest())
    assert reviews_hash(tiny) == imdb_archive.REVIEWS != reviews_hash(plain[0])


@pytest.mark.skipif(not Path(IMDB).is_file(), reason="IMDB_PATH is no archive")
def test_the_archive_at_imdb_path_is_official():
    assert reviews_hash(Path(IMDB)) == imdb_archive.REVIEWS


def test_links_to_reviews_and_folders_are_followed(tmp_path):
    names = tiny_reviews()
    folder, away = write_folder(tmp_path / "aclImdb", names), tmp_path / "other disk"
    wanted, name = reviews_hash(folder), folder / "train" / "unsup" / "9_2.txt"
    name.rename(tmp_path / "away.txt")
    name.symlink_to(tmp_path / "away.txt")
    (folder / "train").rename(away)
    (folder / "train").symlink_to(away)
    os.link(folder / "test" / "pos" / "1_7.txt", tmp_path / "hard")
    assert reviews_hash(folder) == wanted and len(read(folder)["train/unsup"]) == 40


# ------------------------------------------------------------------------------ incomplete archives

def test_without_unsup_the_rest_is_read_and_a_line_says_so(tmp_path):
    names = {name: text for name, text in tiny_reviews().items() if "unsup" not in name}
    folder = write_folder(tmp_path / "folder", names)
    (folder / "train" / "unsup").mkdir()
    for path in (write_archive(tmp_path / "few.tar.gz", names), folder):
        said = []
        found = read_reviews(path, FEW, said.append)
        assert found["train/unsup"] == [] and len(found["train/pos"]) == 40
        assert len(said) == 1 and "no train/unsup" in said[0]
    write_folder(folder, {"train/unsup/1_0.txt": "all but one are gone"})
    with pytest.raises(UserError, match="has 1 reviews named train/unsup.*wanted 40"):
        read(folder)


def test_reading_an_archive_writes_no_file(tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    evil = write_archive(tmp_path / "evil.tar.gz", tiny_reviews() | {"../../evil.txt": "evil"})
    before = set(tmp_path.rglob("*"))
    read(evil)
    assert set(tmp_path.rglob("*")) == before, "reading an archive wrote something"


@pytest.mark.parametrize("mode", ["w:gz", "w:xz"])
def test_an_archive_cut_short_anywhere_is_refused(tmp_path, mode):
    whole = write_archive(tmp_path / "whole", tiny_reviews(), mode).read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    for content in (*(whole[: int(share * len(whole))] for share in (0, 0.01, 0.3, 0.9)), damaged):
        (tmp_path / "cut.tar").write_bytes(content)
        with pytest.raises(UserError, match=r"cut\.tar.*IMDB_PATH"):
            read(tmp_path / "cut.tar")


def test_wrong_numbers_of_reviews_are_refused(tmp_path):
    names = tiny_reviews()
    twice = write_archive(tmp_path / "twice.tar.gz", names | {"train/neg/17_1.txt": "again"})
    with pytest.raises(UserError, match="two reviews named train/neg/17_RATING.txt"):
        read(twice)
    del names["train/neg/17_2.txt"]
    for name in ("x_2", "9" * 5000 + "_2", f"17_{10**400}"):  # not an ID, not a rating
        few = write_archive(tmp_path / "few.tar.gz", names | {f"train/neg/{name}.txt": "bad"})
        with pytest.raises(UserError, match="has 39 reviews named train/neg.*wanted 40"):
            read(few)


# ------------------------------------------------------------------------------ bad reviews

def member(name="aclImdb/test/pos/5_9.txt", size=0, **kwargs):
    info = tarfile.TarInfo(name)
    info.size = size
    for key, value in kwargs.items():
        setattr(info, key, value)
    return info


@pytest.mark.parametrize("info, words", [
    (member(size=10**15), "5_9.txt' has 1,000,000,000,000,000 bytes"),
    (member(size=500_001), "5_9.txt in .* has 500,001 bytes, wanted at most 500,000"),
    (member("aclImdb/README", 2**40), "README' has 1,099,511,627,776 bytes"),
    (member("././@PaxHeader", 2**33, type=tarfile.XHDTYPE), "PaxHeader' has 8,589,934,592 bytes"),
    (member("././@LongLink", 2**33, type=tarfile.GNUTYPE_LONGNAME), "LongLink' has 8,589,934,592"),
    (member(size=-512), "has -512 bytes"),
    (member(type=tarfile.SYMTYPE, linkname="/etc/passwd"), "5_9.txt in .* is a folder, a link"),
    (member(type=tarfile.LNKTYPE, linkname="aclImdb/test/pos/4_9.txt"), "is a folder, a link"),
    (member(type=tarfile.DIRTYPE), "is a folder, a link"),
    (member(type=tarfile.FIFOTYPE), "is a folder, a link")])
def test_a_bad_header_is_refused_before_its_content_is_read(tmp_path, info, words):
    (tmp_path / "bad.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(UserError, match=f"{words}.*set IMDB_PATH"):
        read(tmp_path / "bad.tar")


def test_an_archive_that_holds_too_much_is_refused_before_it_is_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(imdb_archive, "ARCHIVE", 2**20)  # a small limit, to be quick
    path = write_archive(tmp_path / "bomb.tar.gz", {f"zeros{i}": "0" * 2**19 for i in range(9)})
    assert path.stat().st_size < 20_000
    with pytest.raises(UserError, match="decompressed, has 1,0.* bytes, wanted at most 1,0"):
        read(path)


def test_a_sparse_review_counts_with_its_full_size(tmp_path):
    """A GNU sparse member is a header alone, from which tarfile would read a gigabyte of zeros."""
    info = member(type=tarfile.GNUTYPE_SPARSE)
    raw = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    raw[386:410] = b"%011o\0%011o\0" % (2**30, 0)
    raw[483:495] = b"%011o\0" % 2**30
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    (tmp_path / "sparse.tar").write_bytes(bytes(raw) + bytes(1024))
    with pytest.raises(UserError, match="5_9.txt in .* has 1,073,741,824 bytes"):
        read(tmp_path / "sparse.tar")


def broken_link(path):
    path.symlink_to("nowhere")


def endless_link(path):
    path.symlink_to(path.name)


def link_to_a_folder(path):
    path.symlink_to("..")


def large(path):
    with open(path, "wb") as file:
        file.truncate(10**12)  # sparse: it takes no space on the disk


@pytest.mark.parametrize("make, words", [
    (Path.mkdir, "Is a directory"), (os.mkfifo, "a pipe"), (link_to_a_folder, "Is a directory"),
    (broken_link, "cannot read .*No such file"), (endless_link, "cannot read .*symbolic links"),
    (lambda path: path.symlink_to("/dev/zero"), "a device"),
    (large, "has 1,000,000,000,000 bytes, wanted at most")])
def test_a_review_in_a_folder_that_is_no_text_is_named(tmp_path, make, words):
    folder = write_folder(tmp_path / "aclImdb", {"test/pos/0_9.txt": "good"})
    make(folder / "test" / "pos" / "5_9.txt")
    for work in (read, reviews_hash):
        with pytest.raises(UserError, match=f"{words}.*set IMDB_PATH") as caught:
            work(folder)
        assert "5_9.txt" in str(caught.value)


@pytest.mark.parametrize("make, words", [
    (lambda path: None, "cannot read .*No such file"), (os.mkfifo, "a pipe"),
    (endless_link, "cannot read .*symbolic links"),
    (lambda path: path.symlink_to("/dev/zero"), "a device")])
def test_a_path_that_is_no_archive_is_named(tmp_path, make, words):
    make(tmp_path / "aclImdb_v1.tar.gz")
    with pytest.raises(UserError, match=f"{words}.*set IMDB_PATH"):
        reviews_hash(tmp_path / "aclImdb_v1.tar.gz")
    with pytest.raises(UserError, match="cannot read .*name too long.*set IMDB_PATH"):
        reviews_hash(tmp_path / ("x" * 300))


# ------------------------------------------------------------------------------ the download

def test_a_download_counts_only_with_its_checksum(tiny, tmp_path, monkeypatch):
    """The URL is a file on this disk."""
    monkeypatch.setattr(imdb_archive, "URL", f"file://{tiny}")
    cache, said = tmp_path / "cache", []
    with pytest.raises(UserError, match='cannot download.*invalid hash.*"c40f74.*IMDB_PATH'):
        download(cache, said.append)
    assert list(cache.iterdir()) == [], "a wrong file was kept"
    monkeypatch.setattr(imdb_archive, "SHA256", hashlib.sha256(tiny.read_bytes()).hexdigest())
    killed, alive = (cache / f"aclImdb_v1.tar.gz.{x * 32}.partial" for x in "01")
    killed.write_text("of a download that was killed yesterday")
    os.utime(killed, (0, 0))
    alive.write_text("of another process")
    assert download(cache, said.append).read_bytes() == tiny.read_bytes()
    assert alive.exists() and len(list(cache.iterdir())) == 2 and len(said) == 2
    tiny.unlink()
    assert download(cache, said.append) == cache / "aclImdb_v1.tar.gz"
    assert len(said) == 2, "downloaded again"


def test_a_cached_download_is_checked_too(tmp_path):
    (tmp_path / "aclImdb_v1.tar.gz").write_text("<html>please log in</html>")
    with pytest.raises(UserError, match="is damaged.*delete it, and the same command downloads it"):
        download(tmp_path)
