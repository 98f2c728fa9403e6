"""An S3 and a GCS on loopback, as long as somebody uses them, and what lies there.

Law: no credentials of this machine are found or needed: what the clients are told is made up.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path

BUCKET = "bucket"
#: What the clients would look for elsewhere: in files of the user, and at addresses of a cloud's machine.
_NOBODY = {
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "nothing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "nothing",
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # or gcsfs asks Google about each bucket
}


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """An S3 with one empty bucket; the environment in which clients find it."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it tells of every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield {**_NOBODY, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}
    finally:
        server.stop()


@contextmanager
def gcs_server() -> Iterator[dict[str, str]]:
    """A GCS with one empty bucket; the environment in which clients find it."""
    from gcp_storage_emulator import server as emulator

    handlers = tuple((address, {m: _with_generations(f) for m, f in by.items()}) for address, by in emulator.HANDLERS)
    server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
    plain, emulator.HANDLERS = emulator.HANDLERS, handlers
    server.start()
    try:
        server._api._httpd.handle_error = lambda *_: None  # tensorstore hangs up when it has what it wanted
        host, port = server._api._httpd.server_address
        url = f"http://{host}:{port}"
        yield {**_NOBODY, "STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url}
    finally:
        emulator.HANDLERS = plain
        server.stop()


def _with_generations(handler: Callable[..., object]) -> Callable[..., object]:
    """A handler of the emulator, with what it leaves out: preconditions, and the generation of what is downloaded."""

    def handle(request, response, storage):
        query = {name: values[0] for name, values in request.query.items()}
        now = _generation(request, query, storage)
        if query.get("ifGenerationMatch", now) != now:
            response.status = HTTPStatus.PRECONDITION_FAILED
        elif now and query.get("ifGenerationNotMatch") == now:
            response.status = HTTPStatus.NOT_MODIFIED
        else:
            handler(request, response, storage)
            if request.method == "GET" and now:
                response["x-goog-generation"] = now

    return handle


def _generation(request, query: dict[str, str], storage) -> str | None:
    """Of the object that is asked for; 0 if there is none, and nothing where no object is asked for."""
    from gcp_storage_emulator.exceptions import NotFound

    name = (request.params or {}).get("object_id") or query.get("name")
    if query.get("uploadType") == "multipart" and name is None:
        name = request.data["meta"]["name"]
    if name is None:
        return None
    try:
        return str(storage.get_file_obj(request.params["bucket_name"], name)["generation"])
    except NotFound:
        return "0"


def upload(folder: Path, address: str, leave_out: str = "") -> str:
    """Copy a folder, all but files of that name, object by object. Returns the address."""
    from etils import epath

    for file in folder.rglob("*"):
        if file.is_file() and file.name != leave_out:
            (epath.Path(address) / file.relative_to(folder)).write_bytes(file.read_bytes())
    return address


def download(address: str, folder: Path) -> Path:
    """Copy it back. Returns the folder."""
    for name, content in objects(address).items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return folder


def objects(address: str) -> dict[str, bytes]:
    """Every object below an address: name -> content."""
    from etils.epath import backend

    client = backend.fsspec_backend.fs(address)
    client.invalidate_cache()
    root = client._strip_protocol(address)
    return {name.removeprefix(f"{root}/"): client.cat_file(name) for name in client.find(address)}
