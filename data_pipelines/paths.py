"""Paths on a disk or in a bucket: gs://bucket/folder (Google Cloud Storage), s3://bucket/folder (Amazon S3, its kin).

etils.epath is used as pathlib would be and knows both; it reaches buckets through gcsfs and s3fs. Credentials, region
and endpoint are those that these libraries find by themselves (docs/pods.md lists the variables).

A bucket has no folders but the beginnings of its objects' names, no appending and no renaming; but an object appears
whole or not at all.
"""

import contextlib
import logging
import os
import pathlib
from collections.abc import Iterator

import fsspec
from etils import epath

# TensorFlow, where it happens to be installed, would be asked instead; it knows no s3://.
os.environ.setdefault("EPATH_USE_TF", "false")
# Others write into the same folders, TensorStore in this process and other machines: an old listing is no answer.
for _protocol in ("gcs", "gs", "s3"):
    fsspec.config.conf.setdefault(_protocol, {})["use_listings_cache"] = False
logging.getLogger("fsspec").setLevel(logging.WARNING)  # it tells of every file that it reads

_SCHEMES = ("gs://", "s3://")
_ADVICE = {
    "gs://": "log in with `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS to the key "
    "file of a service account; it needs roles/storage.objectUser and roles/storage.legacyBucketReader on the bucket",
    "s3://": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; AWS_DEFAULT_REGION; and, where the "
    "store is not Amazon's, AWS_ENDPOINT_URL",
}


class BucketError(RuntimeError):
    """A bucket could not be reached; the message names the path and what to set."""


def is_remote(path: str | os.PathLike) -> bool:
    """Whether it is in a bucket."""
    return os.fspath(path).startswith(_SCHEMES)


def absolute(path: str | os.PathLike) -> epath.Path:
    """The path, whatever folder a process is in; one in a bucket is always absolute."""
    return epath.Path(path) if is_remote(path) else epath.Path(pathlib.Path(path).absolute())


def reach(path: str | os.PathLike) -> epath.Path:
    """The absolute path of a folder that there may be or not yet; one in a bucket that can be listed.

    Raises:
      BucketError: there is no such bucket, or no right to list it.
    """
    folder = absolute(path)
    if is_remote(folder):
        with reaching(folder):
            scheme, bucket = _split(folder)
            if not bucket:
                raise BucketError(f"{path} names no bucket; expected {scheme}BUCKET/FOLDER")
            files = fsspec.filesystem(scheme[:-3])
            try:
                files.ls(str(folder))
            except FileNotFoundError:
                # The folder or the bucket? A right to list the folder may not be a right to list the bucket.
                with contextlib.suppress(PermissionError):
                    files.ls(bucket)
    return folder


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a file as a whole or not at all.

    Raises:
      BucketError: the bucket that it is in cannot be reached, or does not take it.
    """
    target = epath.Path(path)
    if is_remote(target):
        with reaching(target):
            target.write_text(text)
    else:
        temporary = target.with_name(target.name + ".tmp")
        temporary.write_text(text)
        temporary.replace(target)


@contextlib.contextmanager
def reaching(path: str | os.PathLike) -> Iterator[None]:
    """Turns the errors of what is done here with a path in a bucket into BucketError."""
    scheme, bucket = _split(path)
    try:
        yield
    except BucketError:
        raise
    except FileNotFoundError as e:
        raise BucketError(f"{path}: there is no bucket {scheme}{bucket}; make it, or correct the name") from e
    except ImportError as e:
        raise BucketError(f"{path} needs gcsfs or s3fs ({e}): pip install 'nmm_jax[cloud]'") from e
    except Exception as e:  # of botocore, aiohttp, google.auth, gcsfs: they have no class in common
        said = " ".join(str(e).split())[:300]
        raise BucketError(f"{path} cannot be reached ({type(e).__name__}: {said}); {_ADVICE[scheme]}") from e


def _split(path: str | os.PathLike) -> tuple[str, str]:
    """("gs://", "bucket") of gs://bucket/folder."""
    scheme, _, rest = os.fspath(path).partition("://")
    return f"{scheme}://", rest.split("/")[0]
