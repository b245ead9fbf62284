"""A run's lines in Weights & Biases as well, where `log.wandb` names a project. Only then the package is asked for.

Credentials and the server are the package's own business: `wandb login`, WANDB_API_KEY, WANDB_MODE=offline.
"""

import json
import secrets
from collections.abc import Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from configs import loading
from data_pipelines import paths
from nmm_jax.training.progress import say


class WandbBoard:
    """The same run there however often it is restarted: its id is kept in workdir/wandb.json.

    Lines after the restored step are sent again and, as they are the same to the bit, W&B's refusal of steps that it
    knows already loses nothing.
    """

    def __init__(self, workdir: epath.Path, config: ConfigDict):
        """Raises ImportError where the package is missing, and what wandb.init raises of credentials that are."""
        try:
            import wandb
        except ImportError as e:
            raise ImportError(
                f"log.wandb = {config.log.wandb!r} needs a package that is not installed: pip install wandb; or set "
                "log.wandb to ''"
            ) from e
        known = workdir / "wandb.json"
        if not known.exists():
            paths.write_text(known, json.dumps({"id": secrets.token_hex(4)}) + "\n")
        self._run = None
        try:
            self._run = wandb.init(
                project=config.log.wandb,
                id=json.loads(known.read_text())["id"],
                name=workdir.name,
                config=json.loads(loading.to_json(config)),
                resume="allow",
                dir=None if paths.is_remote(workdir) else str(workdir),
            )
        except wandb.errors.CommError as e:  # a network that is down is no reason to let a pod stand still
            say(f"Weights & Biases cannot be reached, the run goes on without: {e}")

    def write(self, values: Mapping[str, Any]) -> None:
        """In the background; a line that cannot be sent is sent later."""
        if self._run:
            self._run.log({name: x for name, x in values.items() if not isinstance(x, list)}, step=values["step"])

    def close(self) -> None:
        if self._run:
            self._run.finish()
