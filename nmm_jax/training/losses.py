"""Cross-entropy over a large vocabulary without ever holding all its logits, and the sums that a loss is made of."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Up to this many logits are computed at once (256 MB in float32, over all devices): in one product, and autodiff
# keeps them for the backward pass, which saves computing them twice.
WHOLE_LOGITS = 1 << 26
CHUNK = 8_192  # columns of the unembedding in a chunk, at most, when the logits are more


def cross_entropy(
    hidden: Float[Array, "B S D"],
    unembedding: Float[Array, "D V"],
    targets: Int[Array, "B S"],
    chunks: int = 0,
) -> tuple[Float[Array, "B S"], Float[Array, "B S"]]:
    """-log softmax(hidden @ unembedding)[target], and the log of the softmax's normaliser, both float32.

    The product is of the type of `hidden`, accumulated in float32. With several chunks a scan goes over the
    vocabulary, forwards and (computing the logits again) backwards, so at most [B,S,V/chunks] logits exist.

    Args:
      chunks: pieces of the vocabulary; 0 chooses by size.
    """
    vocab = unembedding.shape[1]
    if chunks == 0:
        chunks = 1 if targets.size * vocab <= WHOLE_LOGITS else -(-vocab // CHUNK)
    if chunks == 1:
        logits = jnp.matmul(hidden, unembedding.astype(hidden.dtype), preferred_element_type=jnp.float32)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        return log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0], log_z
    return _chunked(chunks, hidden, unembedding, targets)


def _split(unembedding, chunks, dtype):
    """[D,V] -> [chunks, D, ceil(V/chunks)], chunk c holding columns c, c + chunks, c + 2 chunks, ...

    Strided, so that a vocabulary sharded in contiguous blocks over the tensor axis stays where it is: every device
    has its part of every chunk. Columns beyond V, if chunks do not divide it, are zero.
    """
    d, vocab = unembedding.shape
    padded = jnp.pad(unembedding.astype(dtype), ((0, 0), (0, -vocab % chunks)))
    return jnp.moveaxis(padded.reshape(d, -1, chunks), 2, 0)


def _chunk_logits(hidden, kernel, chunk, chunks, vocab):
    logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
    if vocab % chunks:
        column = jnp.arange(kernel.shape[1]) * chunks + chunk
        logits = jnp.where(column < vocab, logits, -jnp.inf)
    return logits


def _is_target(targets, chunk, chunks, columns):
    """Bool [B,S,columns]: where the target's logit is, if this chunk has it."""
    return (targets[..., None] // chunks == jnp.arange(columns)) & (targets[..., None] % chunks == chunk)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(chunks, hidden, unembedding, targets):
    return _chunked_forward(chunks, hidden, unembedding, targets)[0]


def _chunked_forward(chunks, hidden, unembedding, targets):
    vocab = unembedding.shape[1]
    kernels = _split(unembedding, chunks, hidden.dtype)

    def add_chunk(carry, inputs):
        log_z, target_logit = carry
        kernel, chunk = inputs
        logits = _chunk_logits(hidden, kernel, chunk, chunks, vocab)
        here = _is_target(targets, chunk, chunks, kernel.shape[1])
        log_z = jnp.logaddexp(log_z, jax.nn.logsumexp(logits, axis=-1))
        return (log_z, target_logit + jnp.where(here, logits, 0.0).sum(-1)), None

    start = (jnp.full(targets.shape, -jnp.inf), jnp.zeros(targets.shape))
    (log_z, target_logit), _ = jax.lax.scan(add_chunk, start, (kernels, jnp.arange(chunks)))
    return (log_z - target_logit, log_z), (hidden, unembedding, targets, log_z)


def _chunked_backward(chunks, saved, cotangents):
    hidden, unembedding, targets, log_z = saved
    d_ce, d_log_z = cotangents
    d, vocab = unembedding.shape
    kernels = _split(unembedding, chunks, hidden.dtype)

    def add_chunk(d_hidden, inputs):
        kernel, chunk = inputs
        logits = _chunk_logits(hidden, kernel, chunk, chunks, vocab)
        here = _is_target(targets, chunk, chunks, kernel.shape[1])
        probability = jnp.exp(logits - log_z[..., None])
        d_logits = (d_ce + d_log_z)[..., None] * probability - jnp.where(here, d_ce[..., None], 0.0)
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden += jnp.einsum("bsv,dv->bsd", d_logits, kernel, preferred_element_type=jnp.float32)
        return d_hidden, jnp.einsum("bsd,bsv->dv", hidden, d_logits, preferred_element_type=jnp.float32)

    start = jnp.zeros(hidden.shape, jnp.float32)
    d_hidden, d_kernels = jax.lax.scan(add_chunk, start, (kernels, jnp.arange(chunks)))
    d_unembedding = jnp.moveaxis(d_kernels, 0, 2).reshape(d, -1)[:, :vocab]
    return d_hidden.astype(hidden.dtype), d_unembedding.astype(unembedding.dtype), None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def masked_sums(
    losses: Float[Array, "B N"], mask: Float[Array, "B N"], source: Int[Array, "B #N"], num_sources: int
) -> dict[str, Array]:
    """Sums over a batch (or a microbatch of it) of mask * loss and of mask, in all and by source.

    A loss is a quotient of such sums over the whole global batch, never a mean of means.

    Returns:
      loss_sum, mask_sum: []; loss_sum_by_source, mask_sum_by_source: [num_sources].
    """
    loss = mask * losses
    of_source = source[..., None] == jnp.arange(num_sources)
    return {
        "loss_sum": loss.sum(),
        "mask_sum": mask.sum(),
        "loss_sum_by_source": jnp.where(of_source, loss[..., None], 0.0).sum((0, 1)),
        "mask_sum_by_source": jnp.where(of_source, mask[..., None], 0.0).sum((0, 1)),
    }
