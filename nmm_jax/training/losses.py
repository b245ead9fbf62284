"""Cross-entropy over a large vocabulary without ever holding all its logits, and the sums that a loss is made of."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from nmm_jax.parallel.gathered import by_hand, gather, scatter
from nmm_jax.parallel.mesh import BATCH_AXES
from nmm_jax.parallel.sharding import ON_ONE_DEVICE, Constrain, spec

# Up to this many logits are computed at once (256 MB in float32, over all devices): in one product, and autodiff
# keeps them for the backward pass, which saves computing them twice.
WHOLE_LOGITS = 1 << 26
UNEMBEDDING = ("embed", "vocab")  # its logical axes
CHUNK = 8_192  # columns of the unembedding in a chunk, at most, when the logits are more


@jax.named_scope("loss")
def cross_entropy(
    hidden: Float[Array, "B S D"],
    unembedding: Float[Array, "D V"],
    targets: Int[Array, "B S"],
    chunks: int = 0,
    constrain: Constrain = ON_ONE_DEVICE,
) -> tuple[Float[Array, "B S"], Float[Array, "B S"]]:
    """-log softmax(hidden @ unembedding)[target], and the log of the softmax's normaliser, both float32.

    The product is of the type of `hidden`, accumulated in float32. With several chunks a scan goes over the
    vocabulary, forwards and (computing the logits again) backwards, so at most [B,S,V/chunks] logits exist, and of the
    unembedding one chunk is whole at a time.

    Args:
      unembedding: D cut over `fsdp`, V over `tensor`.
      chunks: pieces of the vocabulary; 0 chooses by size.
    """
    chunks = chunks or chunks_of(targets.size, unembedding.shape[1])
    mesh = constrain.mesh
    if mesh is None or not by_hand(mesh, len(hidden)):
        if chunks == 1 and constrain.platform == "cpu":  # all positions one axis: models/layers.product
            flat = _of_rows(1, None, hidden.reshape(-1, hidden.shape[-1]), unembedding, targets.reshape(-1))
            return flat[0].reshape(targets.shape), flat[1].reshape(targets.shape)
        return _of_rows(chunks, None, hidden, unembedding, targets)
    rows = PartitionSpec(BATCH_AXES)
    return jax.shard_map(
        partial(_of_rows, chunks, mesh),
        mesh=mesh,
        in_specs=(rows, spec(UNEMBEDDING), rows),
        out_specs=rows,
        check_vma=False,
    )(hidden, unembedding, targets)


def chunks_of(positions: int, vocab: int) -> int:
    """Into how many pieces the vocabulary is cut for so many positions, of all devices."""
    return 1 if positions * vocab <= WHOLE_LOGITS else -(-vocab // CHUNK)


def _of_rows(chunks, mesh, hidden, unembedding, targets):
    """On one device, for its rows; the unembedding is cut over `fsdp` and `tensor` of the mesh, or whole."""
    if chunks > 1 or _tensor(mesh) > 1:
        return _chunked(chunks, mesh, hidden, unembedding, targets)
    kernel = _whole(unembedding.astype(hidden.dtype), mesh)
    logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0], log_z


def _whole(kernel, mesh):
    return gather(kernel, UNEMBEDDING, mesh) if mesh else kernel


def _tensor(mesh):
    return mesh.shape["tensor"] if mesh else 1


def _own(targets, vocab, mesh):
    """Targets as columns of this device's part of the vocabulary; -1 is no column of it."""
    if _tensor(mesh) == 1:
        return targets
    own = targets - jax.lax.axis_index("tensor") * vocab
    return jnp.where((own >= 0) & (own < vocab), own, -1)


def _split(unembedding, chunks, dtype):
    """[D,V] -> [chunks, D, ceil(V/chunks)], chunk c holding columns c, c + chunks, c + 2 chunks, ...

    Strided, so that a vocabulary that the compiler has cut in contiguous blocks over `tensor` stays where it is: every
    device has its part of every chunk. Columns beyond V, if chunks do not divide it, are zero.
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


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(chunks, mesh, hidden, unembedding, targets):
    return _chunked_forward(chunks, mesh, hidden, unembedding, targets)[0]


def _chunked_forward(chunks, mesh, hidden, unembedding, targets):
    vocab = unembedding.shape[1]
    kernels = _split(unembedding, chunks, hidden.dtype)
    own = _own(targets, vocab, mesh)

    def add_chunk(carry, inputs):
        log_z, target_logit = carry
        kernel, chunk = inputs
        logits = _chunk_logits(hidden, _whole(kernel, mesh), chunk, chunks, vocab)
        here = _is_target(own, chunk, chunks, kernel.shape[1])
        log_z = jnp.logaddexp(log_z, jax.nn.logsumexp(logits, axis=-1))
        return (log_z, target_logit + jnp.where(here, logits, 0.0).sum(-1)), None

    start = (jnp.full(targets.shape, -jnp.inf), jnp.zeros(targets.shape))
    (log_z, target_logit), _ = jax.lax.scan(add_chunk, start, (kernels, jnp.arange(chunks)))
    if _tensor(mesh) > 1:
        most = jax.lax.pmax(log_z, "tensor")
        log_z = most + jnp.log(jax.lax.psum(jnp.exp(log_z - most), "tensor"))
        target_logit = jax.lax.psum(target_logit, "tensor")
    return (log_z - target_logit, log_z), (hidden, unembedding, targets, log_z)


def _chunked_backward(chunks, mesh, saved, cotangents):
    hidden, unembedding, targets, log_z = saved
    # Of a result that all devices of an axis have alike, shard_map hands each a part of the cotangent.
    d_ce, d_log_z = jax.lax.psum(cotangents, "tensor") if _tensor(mesh) > 1 else cotangents
    d, vocab = unembedding.shape
    kernels = _split(unembedding, chunks, hidden.dtype)
    own = _own(targets, vocab, mesh)

    def add_chunk(d_hidden, inputs):
        shard, chunk = inputs
        kernel = _whole(shard, mesh)
        logits = _chunk_logits(hidden, kernel, chunk, chunks, vocab)
        here = _is_target(own, chunk, chunks, kernel.shape[1])
        probability = jnp.exp(logits - log_z[..., None])
        d_logits = (d_ce + d_log_z)[..., None] * probability - jnp.where(here, d_ce[..., None], 0.0)
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden += jnp.einsum("bsv,dv->bsd", d_logits, kernel, preferred_element_type=jnp.float32)
        d_kernel = jnp.einsum("bsd,bsv->dv", hidden, d_logits, preferred_element_type=jnp.float32)
        return d_hidden, scatter(d_kernel, UNEMBEDDING, mesh) if mesh else d_kernel

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
