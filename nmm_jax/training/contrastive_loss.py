"""Contrastive losses over the global batch, whose B x B logits never exist at once.

    logits[i, j] = scale * <image_i, text_j> + bias

    softmax (CLIP, arXiv 2103.00020)     loss_i = (lse_j logits[i, j] + lse_j logits[j, i]) / 2 - logits[i, i]
    sigmoid (SigLIP, arXiv 2303.15343)   loss_i = softplus(-logits[i, i]) + sum over j != i of softplus(logits[i, j])

and the loss is their mean over pairs. A device keeps its own images, while texts go around the ring of all devices that
share the batch; sums over their columns go with them. After as many steps as there are devices they are home:

    step                      0      1      2      3
    device 0 has images  0    0      1      2      3     (texts of the device)
    device 1 has images  1    1      2      3      0
    ...

Each step goes through CHUNK texts at a time. So of B pairs on R devices a device holds B/R * CHUNK logits: memory grows
linearly with the batch. The backward pass goes around again and computes the logits anew; the gradients of texts travel
with them. A pair that is not valid (its image could not be decoded, the row is padding) is no one's negative either.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Key
from ml_collections import ConfigDict

from nmm_jax.models.contrastive import ContrastiveModel
from nmm_jax.parallel.mesh import BATCH_AXES
from nmm_jax.parallel.sharding import Constrain

CHUNK = 128  # texts whose logits exist at a time on a device

ByTerm = dict[str, Float[Array, "B 1"]]


class ContrastiveObjective:
    """Which text belongs to which image (training/objectives.py says what an objective is)."""

    terms = (("pairs", 1.0),)

    def __init__(self, model: ContrastiveModel, config: ConfigDict, mesh: Mesh):
        self._model, self._kind = model, config.model.contrastive.loss
        self._mesh, self._constrain = mesh, Constrain(mesh)

    def prepare(self, batch: dict[str, Array], key: Key[Array, ""]) -> dict[str, Array]:
        return batch

    def masks(self, batch: dict[str, Array]) -> ByTerm:
        return {"pairs": _valid(batch)[:, None].astype(jnp.float32)}

    def losses(
        self, params: Any, batch: dict[str, Array]
    ) -> tuple[ByTerm, ByTerm, Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Metrics: the scale, the bias of sigmoid, and how often an image's own text is the nearest of the batch."""
        image, text, scale, bias = self._model.embeddings(params, batch, constrain=self._constrain)
        valid = _valid(batch)
        losses, right = contrastive_losses(self._kind, image, text, scale, bias, valid, self._mesh)
        metrics = {"contrastive/accuracy": right.sum() / jnp.maximum(valid.sum(), 1), "contrastive/scale": scale}
        if self._kind == "sigmoid":
            metrics["contrastive/bias"] = bias
        return {"pairs": losses[:, None]}, {}, jnp.zeros(()), metrics


def _valid(batch: dict[str, Array]) -> Bool[Array, "B"]:
    """Which rows are pairs: they have an image and a text."""
    return batch["image_mask"][:, 0] & (batch["segment_ids"][:, 0] > 0)


def contrastive_losses(
    kind: str,
    image: Float[Array, "B E"],
    text: Float[Array, "B E"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    valid: Bool[Array, "B"],
    mesh: Mesh | None = None,
    chunk: int = CHUNK,
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """The loss of each pair (0 where it is not valid), and 1 where no other text is nearer to its image.

    Gradients go to image, text, scale and bias. All is computed in the type of `image`, products at the highest
    precision: a cosine to three digits times a scale of 100 would be a logit to one.

    Args:
      kind: softmax | sigmoid (model.contrastive.loss).
      mesh: over whose batch axes the rows are sharded; None: one device has them all.
    """
    return _losses((kind, mesh, chunk), image, text, scale, bias, valid)


Static = tuple[str, Mesh | None, int]  # kind, mesh, chunk


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(static: Static, image, text, scale, bias, valid):
    return _losses_forward(static, image, text, scale, bias, valid)[0]


def _losses_forward(static, image, text, scale, bias, valid):
    losses, right, rows, columns = _on_mesh(static, _forward, "bb..b", "bbbb")(image, text, scale, bias, valid)
    return (losses, right), (image, text, scale, bias, valid, rows, columns)


def _losses_backward(static, saved, cotangents):
    return *_on_mesh(static, _backward, "bb..bbbb", "bb..")(*saved, cotangents[0]), None


_losses.defvjp(_losses_forward, _losses_backward)


def _on_mesh(static: Static, compute: Callable[..., Any], inputs: str, outputs: str) -> Callable[..., Any]:
    """`compute` on each device with its rows; "b" is an array of rows, "." one that all devices have."""
    kind, mesh, chunk = static
    ring = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    local = partial(compute, kind, ring, chunk)
    if ring == 1:
        return local
    of = {"b": PartitionSpec(BATCH_AXES), ".": PartitionSpec()}
    arguments, results = (tuple(of[c] for c in letters) for letters in (inputs, outputs))
    return jax.shard_map(local, mesh=mesh, in_specs=arguments, out_specs=results, check_vma=False)


def _forward(kind, ring, chunk, image, text, scale, bias, valid):
    add = jnp.logaddexp if kind == "softmax" else jnp.add
    b, dtype = len(image), image.dtype
    nothing = -jnp.inf if kind == "softmax" else 0.0

    def visit(own, texts, columns, diagonal):
        rows, matched, nearest = own
        text, text_valid = texts
        logits = scale * _product(image, text.T) + bias
        of_pairs = valid[:, None] & text_valid
        if kind == "softmax":
            shown = jnp.where(of_pairs, logits, -jnp.inf)
            in_rows, in_columns = (jax.nn.logsumexp(shown, axis) for axis in (1, 0))
        else:
            terms = jnp.where(of_pairs, jax.nn.softplus(jnp.where(diagonal, -logits, logits)), 0)
            in_rows, in_columns = terms.sum(1), jnp.zeros_like(columns)
        matched = matched + jnp.where(diagonal, logits, 0).sum(1)
        nearest = jnp.maximum(nearest, jnp.where(of_pairs, logits, -jnp.inf).max(1))
        return (add(rows, in_rows), matched, nearest), add(columns, in_columns)

    own = jnp.full(b, nothing, dtype), jnp.zeros(b, dtype), jnp.full(b, -jnp.inf, dtype)
    columns = jnp.full(b, nothing, dtype)
    (rows, matched, nearest), columns = _around(ring, chunk, own, (text, valid), columns, visit)
    losses = (rows + columns) / 2 - matched if kind == "softmax" else rows
    right = valid & (matched >= nearest)
    return jnp.where(valid, losses, 0), right.astype(dtype), rows, columns


def _backward(kind, ring, chunk, image, text, scale, bias, valid, rows, columns, cotangent):
    def visit(own, texts, d_text, diagonal):
        d_image, d_scale, d_bias = own
        text, text_valid, text_columns, text_cotangent = texts
        cosines = _product(image, text.T)
        logits = scale * cosines + bias
        if kind == "softmax":
            shares = [
                jnp.exp(logits - rows[:, None]) * cotangent[:, None],
                jnp.exp(logits - text_columns) * text_cotangent,
            ]
            d_logits = sum(shares) / 2 - jnp.where(diagonal, cotangent[:, None], 0)
        else:
            d_logits = (jax.nn.sigmoid(logits) - diagonal) * cotangent[:, None]
        d_logits = jnp.where(valid[:, None] & text_valid, d_logits, 0)
        d_image = d_image + scale * _product(d_logits, text)
        d_text = d_text + scale * _product(d_logits.T, image)
        return (d_image, d_scale + (d_logits * cosines).sum(), d_bias + d_logits.sum()), d_text

    own = jnp.zeros_like(image), jnp.zeros_like(scale), jnp.zeros_like(bias)
    texts = text, valid, columns, cotangent
    (d_image, d_scale, d_bias), d_text = _around(ring, chunk, own, texts, jnp.zeros_like(text), visit)
    if ring > 1:
        d_scale, d_bias = jax.lax.psum((d_scale, d_bias), BATCH_AXES)
    return d_image, d_text, d_scale, d_bias


def _around(
    ring: int, chunk: int, own: Any, texts: Any, sums: Any, visit: Callable[..., tuple[Any, Any]]
) -> tuple[Any, Any]:
    """Every text of the global batch past this device's images, chunk by chunk.

    Args:
      ring: devices that the texts go around.
      own: what is summed here.
      texts: arrays [b, ...] that travel unchanged; the second is which of them are valid.
      sums: an array [b, ...] that travels with them.
      visit: (own, texts of a chunk, their sums, Bool [b, c] where image and text are of one pair) -> (own, their sums).

    Returns:
      own and sums, these at home again.
    """
    b = len(sums)
    chunks = -(-b // chunk)
    chunk = -(-b // chunks)
    places = jnp.arange(chunks * chunk).reshape(chunks, chunk)

    def cut(x: Array) -> Array:  # what pads the last chunk is 0, so it is not valid
        return jnp.pad(x, ((0, chunks * chunk - b),) + ((0, 0),) * (x.ndim - 1)).reshape(chunks, chunk, *x.shape[1:])

    def pass_on(tree: Any) -> Any:
        onward = [(device, (device - 1) % ring) for device in range(ring)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, BATCH_AXES, onward), tree) if ring > 1 else tree

    def step(carry: Any, at: Array) -> tuple[Any, None]:
        own, texts, sums = carry

        def through(own: Any, part: Any) -> tuple[Any, Any]:
            place, *part = part
            return visit(own, *part, (at == 0) & (jnp.arange(b)[:, None] == place))

        following = pass_on(texts)  # needs nothing of what is computed here, so it may travel meanwhile
        own, sums = jax.lax.scan(through, own, (places, texts, sums))
        return (own, following, pass_on(sums)), None

    start = own, jax.tree.map(cut, texts), cut(sums)
    (own, _, sums), _ = jax.lax.scan(step, start, jnp.arange(ring))
    return own, sums.reshape(-1, *sums.shape[2:])[:b]


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
