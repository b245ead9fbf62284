"""What all commands do alike: absl flags and nothing else, and errors that are for whoever typed the command.

    if __name__ == "__main__":
        CONFIG = define_config_flag()
        command_line.run(main)

An error that our own code raised in words is told in those words, on stderr, and the command ends with exit code 1. So
is a file that is not there or may not be touched. Any other error is a defect, ours or a library's, and keeps its
traceback. With --verbosity=1 (or --pdb) all do.
"""

import pathlib
import re
import sys
import traceback
from collections.abc import Callable

from absl import app, flags

_PACKAGES = tuple(pathlib.Path(__file__).parent.parent / name for name in ("configs", "data_pipelines", "nmm_jax"))
_IN_WORDS = (ValueError, OSError, RuntimeError, ImportError)  # and our own, which derive from these
_OF_FILES = (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def run(main: Callable[[list[str]], None], words: bool = False) -> None:
    """Parses the flags, calls main(argv) and ends the process.

    Args:
      words: whether the command takes arguments that are no flags; they are argv[1:].
    """

    def guarded(argv: list[str]) -> None:
        if len(argv) > 1 and not words:
            raise app.UsageError(f"unexpected argument {argv[1]!r}; all settings are flags")
        try:
            main(argv)
        except KeyboardInterrupt:
            print(f"{_name()}: interrupted", file=sys.stderr)
            sys.exit(_INTERRUPTED)
        except Exception as error:
            if isinstance(error, app.UsageError) or flags.FLAGS.verbosity > 0 or flags.FLAGS.pdb or not told(error):
                raise
            sys.exit(f"{_name()}: {error}")

    app.run(guarded)


def told(error: Exception) -> bool:
    """Whether the message is all that its reader needs."""
    if isinstance(error, _OF_FILES):
        return True
    if not isinstance(error, _IN_WORDS) or not str(error):
        return False
    file, line = _raised(error)
    return line.startswith("raise ") and any(pathlib.Path(file).is_relative_to(package) for package in _PACKAGES)


def _raised(error: Exception) -> tuple[str, str]:
    """The file and the line of source that raised it; a worker process sends them as text."""
    if type(error.__cause__).__name__ == "_RemoteTraceback":  # of concurrent.futures
        frames = re.findall(r'^  File "(.+)", line \d+, in .*\n +(.*)', str(error.__cause__), re.MULTILINE)
        return frames[-1] if frames else ("", "")
    last = traceback.extract_tb(error.__traceback__)[-1]
    return last.filename, last.line or ""


def _name() -> str:
    """`train` of python -m nmm_jax.train."""
    path = pathlib.Path(sys.argv[0])
    return path.parent.name if path.stem == "__main__" else path.stem
