"""Download of the data sets that are published without terms to accept: Amazon 2014 and MovieLens."""

import hashlib
import urllib.error
import urllib.request
import zipfile
from email.utils import formatdate
from http.client import HTTPException

from tqdm import tqdm

from userip.artifacts import fail
from userip.tables import movielens_folder

AMAZON_2014 = "https://mcauleylab.ucsd.edu/public_datasets/data/amazon/categoryFiles"
MOVIELENS = "https://files.grouplens.org/datasets/movielens"
ARCHIVES = {  # data set -> MD5 of its archive, as published, and a file in it
    "ml-100k": ("0e33842e24a9c977be4e0107933c0723", "u.data"),
    "ml-1m": ("c4d9eecfca2ab87c1945afe126590906", "ratings.dat"),
}


def download(args):
    """Fetch the published files of args.dataset into args.raw, except those that are there already.

    args.download: the URL of a mirror's folder, or empty for the publisher's. Exit code 2 when a file does
    not arrive whole; the same command then resumes it.
    """
    try:
        args.raw.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--raw {args.raw} cannot be made: {error.strerror}")
    if args.dataset not in ARCHIVES:
        for name in (f"reviews_{args.category}_5.json.gz", f"meta_{args.category}.json.gz"):
            _fetch(f"{args.download or AMAZON_2014}/{name}", args.raw / name)
        return
    md5, member = ARCHIVES[args.dataset]
    if (movielens_folder(args, member) / member).exists():
        return
    path = args.raw / f"{args.dataset}.zip"
    _fetch(f"{args.download or MOVIELENS}/{path.name}", path, md5)
    try:
        with zipfile.ZipFile(path) as archive:
            archive.extractall(args.raw)
    except (OSError, zipfile.BadZipFile) as error:
        fail(f"{path} cannot be unpacked ({error}): delete it and download it again")


def _fetch(url, path, md5=None):
    """Download `url` as `path`; path.part is kept, and resumed next time, if the connection breaks off."""
    if path.exists():
        print(f"{path} is there already")
        return
    part = path.with_name(f"{path.name}.part")
    try:
        size = _fetch_rest(url, part)
    except (OSError, HTTPException, ValueError) as error:  # ValueError: not a URL
        fail(f"{url} cannot be fetched ({error}): what arrived is kept, try again or another mirror")
    if size is not None and part.stat().st_size < size:
        fail(f"{url}: the connection was closed early; {part.stat().st_size:,} of {size:,} bytes are kept in "
             f"{part}: the same command goes on from there")
    problem = None
    with open(part, "rb") as file:
        if md5 and (digest := hashlib.file_digest(file, "md5").hexdigest()) != md5:
            problem = f"has the digest {digest}, not {md5} as published"
        elif path.suffix == ".gz" and file.read(2) != b"\x1f\x8b":
            problem = "is no gzip file (a page of the mirror?)"
    if problem:
        part.unlink()
        fail(f"{url} {problem} and was deleted: try again, or another mirror")
    part.replace(path)


def _fetch_rest(url, part):
    """Append to `part` what it lacks of `url` -> bytes of the whole, None if the server does not say."""
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url)
    if start:
        request.add_header("Range", f"bytes={start}-")
        request.add_header("If-Unmodified-Since", formatdate(part.stat().st_mtime, usegmt=True))
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if start and error.code in (412, 416):  # the file has changed since, or is not longer than `part`
            part.unlink()
            return _fetch_rest(url, part)
        raise
    is_rest = response.status == 206  # 200: the server sends all of it
    start = start if is_rest else 0
    length = response.headers.get("Content-Length")
    size = start + int(length) if length else None
    with response, open(part, "ab" if is_rest else "wb") as file, \
            tqdm(total=size, initial=start, desc=part.stem, unit="B", unit_scale=True, mininterval=1) as bar:
        while piece := response.read(1 << 18):
            file.write(piece)
            bar.update(len(piece))
    return size
