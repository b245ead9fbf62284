"""Lets Orbax write arrays to s3://.

Orbax (0.12.8) knows two homes of arrays, files and gs://, and TensorStore, which it writes them with, has a driver for
S3 as well (google/orbax issues 359 and 872; pull request 2739). All that is missing is the sentence that tells
TensorStore where an array is; it is said here, in the one private function of Orbax that says it. What Orbax does with
paths by itself goes through epath, which knows S3, and that nothing is renamed there is one of its options
(checkpoints.py).

TensorStore finds credentials and region as Amazon's own tools do, but reads no AWS_ENDPOINT_URL: it is handed over.
"""

import functools
import os
from typing import Any

import orbax.checkpoint


@functools.cache
def teach() -> None:
    """From now on, in this process.

    Raises:
      RuntimeError: this Orbax says it elsewhere.
    """
    try:
        from orbax.checkpoint._src.serialization import tensorstore_utils

        original = tensorstore_utils.build_kvstore_tspec
    except (ImportError, AttributeError) as e:
        raise RuntimeError(
            f"Orbax {orbax.checkpoint.__version__} cannot be taught s3:// as 0.12.8 can ({e}); install that version "
            "(requirements.txt), or give a --workdir on gs:// or on a disk"
        ) from e

    @functools.wraps(original)
    def build_kvstore_tspec(directory: str, *args: Any, **kwargs: Any) -> Any:
        where = os.fspath(directory)
        if not where.startswith("s3://"):
            return original(directory, *args, **kwargs)
        return on_s3(original("gs://" + where.removeprefix("s3://"), *args, **kwargs))

    tensorstore_utils.build_kvstore_tspec = build_kvstore_tspec


def on_s3(spec: Any) -> Any:
    """A TensorStore spec of the same bucket and path on S3, however deep in it the store is named."""
    if isinstance(spec, list):
        return [on_s3(x) for x in spec]
    if not isinstance(spec, dict):
        return spec
    spec = {key: on_s3(x) for key, x in spec.items()}
    if str(spec.get("driver")).startswith("gcs"):
        spec["driver"] = "s3"
        if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
            spec["endpoint"] = endpoint
        if os.environ.get("AWS_ACCESS_KEY_ID"):  # first of all by default too, but then ~/.aws is missed at each array
            spec["aws_credentials"] = {"type": "environment"}
    return spec
