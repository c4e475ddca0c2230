"""Download of the data sets that are published without terms to accept: Amazon 2014 and MovieLens."""

import hashlib
import shutil
import tempfile
import urllib.request
import zipfile
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from userip.artifacts import fail
from userip.tables import movielens_file

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
    args.raw.mkdir(parents=True, exist_ok=True)
    if args.dataset not in ARCHIVES:
        for name in (f"reviews_{args.category}_5.json.gz", f"meta_{args.category}.json.gz"):
            _fetch(f"{args.download or AMAZON_2014}/{name}", args.raw / name)
        return
    md5, member = ARCHIVES[args.dataset]
    if movielens_file(args, member).exists():
        return
    path = args.raw / f"{args.dataset}.zip"
    _fetch(f"{args.download or MOVIELENS}/{path.name}", path)
    if (digest := hashlib.md5(path.read_bytes()).hexdigest()) != md5:
        path.unlink()
        fail(f"{path} had the digest {digest}, not {md5} as published, and was deleted: try another mirror")
    with tempfile.TemporaryDirectory(dir=args.raw) as folder, zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
        for entry in Path(folder).iterdir():  # a kill leaves all of it or nothing
            if (args.raw / entry.name).exists():
                shutil.copytree(entry, args.raw / entry.name, dirs_exist_ok=True)
            else:
                entry.rename(args.raw / entry.name)


def _fetch(url, path):
    """Download `url` as `path`; path.part is kept, and resumed next time, if the connection breaks off."""
    if path.exists():
        print(f"{path} is there already")
        return
    part = path.with_name(f"{path.name}.part")
    start = part.stat().st_size if part.exists() else 0
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
        with urllib.request.urlopen(request, timeout=30) as response:
            start *= response.status == 206  # 200: the server sends all of it
            size = start + int(response.headers.get("Content-Length") or 0)  # not every server says it
            with open(part, "ab" if start else "wb") as file, \
                    tqdm.wrapattr(response, "read", total=size, initial=start, desc=path.name) as source:
                shutil.copyfileobj(source, file)
        if (kept := part.stat().st_size) < size:
            raise OSError(f"the connection was closed early; {kept:,} of {size:,} bytes are kept")
    except (OSError, HTTPException, ValueError) as error:  # ValueError: not a URL
        fail(f"{url} cannot be fetched ({error}): try again or another mirror; to begin anew, delete {part}")
    part.replace(path)
