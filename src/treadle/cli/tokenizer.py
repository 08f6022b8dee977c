"""`treadle tokenizer pull`: a model's tokenizer files, from a server to where transformers finds them.

It refuses to know tokenizers: the files come as a tar and are unpacked as they are.
Invariant: nothing is written outside the target directory, and a failed pull leaves no half directory under its name.
"""

from __future__ import annotations

import io
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import typer

from treadle.cli.common import stderr
from treadle.config import tinker_api_key
from treadle.errors import InvalidRequest, NotFound, ServerError, Unauthenticated

# A tokenizer is tens of megabytes; more than this is something else.
MAX_TOKENIZER_BYTES = 512 * 2**20
TIMEOUT_S = 60.0

app = typer.Typer(help="Work with tokenizers of a server's models.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Work with tokenizers of a server's models."""


@app.command(
    epilog="[bold]Example[/]\n\ntreadle tokenizer pull http://10.0.0.5:8000 treadle/tiny\n\n"
    "AutoTokenizer.from_pretrained('treadle/tiny') and the SDK's get_tokenizer() then find ./treadle/tiny"
)
def pull(
    url: Annotated[
        str, typer.Argument(metavar="URL", help="The server, for example http://10.0.0.5:8000. TINKER_API_KEY is sent.")
    ],
    name: Annotated[str, typer.Argument(metavar="NAME", help="The base model's name, as the server lists it.")],
    out: Annotated[Path, typer.Option(help="Directory under which NAME is written.")] = Path(),
) -> None:
    """Download a model's tokenizer and write it to ./NAME, where a remote client's transformers looks for it."""
    target = checked_target(out, name)
    payload = _download(f"{url.rstrip('/')}/api/v1/tokenizers/{quote(name)}")
    num_files = unpack(payload, target)
    stderr().print(f"{num_files} files written to {target}", highlight=False, soft_wrap=True)


def checked_target(out: Path, name: str) -> Path:
    """`out`/`name`, if that stays under `out`. Raises InvalidRequest otherwise."""
    if not name or any(part in ("", ".", "..") for part in name.split("/")) or "\\" in name:
        raise InvalidRequest(f"{name!r} cannot be a directory; give the model's name as the server lists it")
    return out / name


def unpack(payload: bytes, target: Path) -> int:
    """The number of files written to `target`, whose earlier files they replace. Members that leave it are refused."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".pull-") as scratch:
        files = Path(scratch) / "files"
        try:
            with tarfile.open(fileobj=io.BytesIO(payload)) as archive:
                archive.extractall(files, filter="data")
        except (tarfile.TarError, EOFError) as error:
            raise ServerError(f"the server's answer is not a tar file that can be unpacked safely: {error}") from error
        if not any(files.rglob("*")):
            raise ServerError("the server's answer holds no files")
        shutil.copytree(files, target, dirs_exist_ok=True)
        return sum(1 for path in files.rglob("*") if path.is_file())


def _download(url: str) -> bytes:
    # Imported here, as everything that `--help` does not need.
    import httpx

    headers = {"X-API-Key": tinker_api_key()}
    body = bytearray()
    try:
        with httpx.stream("GET", url, headers=headers, timeout=TIMEOUT_S, follow_redirects=True) as response:
            if response.status_code in (401, 403):
                raise Unauthenticated("the server does not accept this key; set TINKER_API_KEY to one that it knows")
            if response.status_code == 404:
                raise NotFound(f"the server has no tokenizer at {url}; is the model's name right?")
            if response.status_code != 200:
                raise ServerError(f"the server answered {response.status_code} for {url}")
            for chunk in response.iter_bytes():
                body += chunk
                if len(body) > MAX_TOKENIZER_BYTES:
                    raise ServerError(f"the answer is larger than {MAX_TOKENIZER_BYTES} bytes; this is no tokenizer")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServerError(f"cannot reach {url}: {error}") from error
    return bytes(body)
