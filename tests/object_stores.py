"""A bucket of each kind on this machine: Google's from tests/fake_gcs.py, Amazon's from moto.

with object_stores.gs() as bucket:     # or s3()
    os.environ |= bucket.environment
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

from etils import epath

from tests.fake_gcs import FakeGcs

NAME = "bucket"


@dataclasses.dataclass(frozen=True)
class Bucket:
    url: str
    environment: dict[str, str]
    names: Callable[[str], list[str]]  # of the objects under a folder, without its name
    remove: Callable[[str], None]  # one object

    def read(self, name: str) -> bytes:
        return (epath.Path(self.url) / name).read_bytes()


@contextlib.contextmanager
def gs() -> Iterator[Bucket]:
    with FakeGcs(NAME) as server:
        objects = server.buckets[NAME]

        def names(folder: str) -> list[str]:
            with server.lock:
                return [name.removeprefix(f"{folder}/") for name in objects if name.startswith(f"{folder}/")]

        # Without the last, gcsfs asks by gRPC for the kind of each bucket, where no emulator is looked for.
        environment = server.environment | {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
        yield Bucket(f"gs://{NAME}", environment, names, objects.pop)


@contextlib.contextmanager
def s3() -> Iterator[Bucket]:
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    client = boto3.client("s3", "us-east-1", None, True, None, environment["AWS_ENDPOINT_URL"], "key", "secret")
    client.create_bucket(Bucket=NAME)

    def names(folder: str) -> list[str]:
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=NAME, Prefix=f"{folder}/")
        return [found["Key"].removeprefix(f"{folder}/") for page in pages for found in page.get("Contents", ())]

    try:
        yield Bucket(f"s3://{NAME}", environment, names, lambda name: client.delete_object(Bucket=NAME, Key=name))
    finally:
        server.stop()


KINDS = {"gs": gs, "s3": s3}
