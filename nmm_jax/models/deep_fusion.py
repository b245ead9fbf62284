"""Deep fusion: weights of their own for image positions, at the FLOPs of one set.

    positions    BOS boi p0 p1 p2 eoi  a  dog           (CogVLM: boi goes with the patches, eoi with the text)
    modality      0   1   1  1  1  0   0   0
    sorted       [boi p0 p1 p2] [BOS eoi a dog]         two groups of the one dispatch (models/dispatch.py)
    products      x @ images'    x @ text's             put back in place; attention is over all positions together

Which products and norms differ is chosen (`model.deep.modules`): query, key and value, attention's output and the
feed-forward layer is CogVLM's visual expert (Wang et al., arXiv 2311.03079), these and the norms is
Mixture-of-Transformers (Liang et al., arXiv 2411.04996). Tokens are sorted once for all layers, on the device that has
them. Where the text's weights are frozen, only the images' rows are multiplied for weight gradients.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from nmm_jax.models.dispatch import Order, from_groups, sort_by_group, to_groups
from nmm_jax.models.grouped_matmul import grouped_matmul
from nmm_jax.models.spec import Spec
from nmm_jax.parallel.gathered import gather, sum_of_shares
from nmm_jax.parallel.mesh import BATCH_AXES
from nmm_jax.parallel.sharding import Axes, Constrain, spec

TEXT, IMAGE, PADDING = 0, 1, -1

Pair = tuple[Array, Array]  # of matrices: the text's, the images'
Product = Callable[[Array, Pair], Array]  # (rows [C,D], matrices [D,M]) -> [C,M]


def modalities(model: Spec, batch: dict[str, Array]) -> Int[Array, "B S"]:
    """0 text, 1 image, -1 padding: which weights a position meets.

    Delimiters are the positions right before and right behind an image's own, known from `image_index`; so the end of
    an image is the text's although another image follows at once (the rule of CogVLM's Hugging Face code, an image's
    position if the next is one as well, sends it to the images').
    """
    index, positions = batch["image_index"], model.image_positions
    image = index >= 0
    if model.image_delimiters and model.delimiter_weights != "text":
        boi, eoi = delimiters(index, positions)
        image |= boi | eoi if model.delimiter_weights == "image" else boi
    return jnp.where(batch["segment_ids"] > 0, jnp.where(image, IMAGE, TEXT), PADDING)


def delimiters(index: Int[Array, "B S"], positions: int) -> tuple[Bool[Array, "B S"], Bool[Array, "B S"]]:
    """Where images begin and end: the positions before a first patch, and those behind a last one."""
    outside = jnp.full_like(index[:, :1], -1)
    following = jnp.concatenate([index[:, 1:], outside], axis=1)
    previous = jnp.concatenate([outside, index[:, :-1]], axis=1)
    boi = (index < 0) & (following >= 0) & (following % positions == 0)
    eoi = (index < 0) & (previous >= 0) & (previous % positions == positions - 1)
    return boi, eoi


class ByModality:
    """A batch sorted by modality, once for all layers; its products are then with the weights of their modality.

    Every device sorts the rows it has.
    """

    def __init__(self, modality: Int[Array, "B S"], constrain: Constrain):
        self.constrain = constrain
        self.is_image = (modality == IMAGE)[..., None]
        sort = _sort
        if constrain.mesh is not None and constrain.mesh.size > 1:
            sort = jax.shard_map(_sort, mesh=constrain.mesh, in_specs=_ROWS, out_specs=_ORDER, check_vma=False)
        self.order = sort(jnp.where(modality == PADDING, 2, jnp.where(modality == IMAGE, 0, 1)))

    def select(self, text: Float[Array, "... D"], image: Float[Array, "... D"]) -> Float[Array, "B S D"]:
        """Each position its modality's."""
        return jnp.where(self.is_image, image, text)

    def products(self, x: Float[Array, "B S D"], weights: Sequence[Pair]) -> tuple[Float[Array, "B S M"], ...]:
        """x with each of several pairs (text's, images') of matrices [D, M], D cut over fsdp and M over tensor."""

        def compute(rows: Array, product: Product, *matrices: Pair) -> tuple[Array, ...]:
            return tuple(product(rows, w) for w in matrices)

        return self._apply(compute, x, None, weights, [_IN] * len(weights), [False] * len(weights))

    def residual_product(self, x: Float[Array, "B S M"], weights: Pair) -> Float[Array, "B S D"]:
        """x, its last axis cut over tensor, with a pair of matrices [M, D], M cut over tensor and D over fsdp."""

        def compute(rows: Array, product: Product, matrix: Pair) -> tuple[Array, ...]:
            return (product(rows, matrix),)

        return self._apply(compute, x, "tensor", [weights], [_OUT], [True])[0]

    def feed_forward(
        self, x: Float[Array, "B S D"], weights: Sequence[Pair], activation: Callable[[Array], Array]
    ) -> Float[Array, "B S D"]:
        """A feed-forward layer with the pairs of gate (of SwiGLU only), up and down."""

        def compute(rows: Array, product: Product, *matrices: Pair) -> tuple[Array, ...]:
            *gate, up, down = matrices
            inner = checkpoint_name(product(rows, up), "ffn_up")
            if gate:
                inner = activation(checkpoint_name(product(rows, gate[0]), "ffn_gate")) * inner
            else:
                inner = activation(inner)
            return (product(inner, down),)

        return self._apply(compute, x, None, weights, [_IN] * (len(weights) - 1) + [_OUT], [True])[0]

    def _apply(
        self,
        compute: Callable[..., tuple[Array, ...]],
        x: Float[Array, "B S D"],
        x_axis: str | None,
        weights: Sequence[Pair],
        axes: Sequence[Axes],
        partial_sums: Sequence[bool],
    ) -> tuple[Float[Array, "B S M"], ...]:
        """Rows of x, sorted, through `compute` and put back; 0 at padding.

        Args:
          compute: (rows [C,D], product, *pairs of matrices) -> arrays [C,M].
          x_axis: of the mesh, that the last axis of x is cut over.
          axes: of each pair of matrices, logical.
          partial_sums: which results are a tensor shard's share of a sum; the others are cut over tensor.
        """
        mesh, platform = self.constrain.mesh, self.constrain.platform
        cast = [(text.astype(x.dtype), image.astype(x.dtype)) for text, image in weights]
        if mesh is None or mesh.size == 1:
            return _compute(platform, compute, x, self.order, cast)

        def body(x: Array, order: Order, shards: Sequence[Pair]) -> tuple[Array, ...]:
            pairs = [
                (gather(text, of_pair, mesh), gather(image, of_pair, mesh))
                for (text, image), of_pair in zip(shards, axes, strict=True)
            ]
            found = _compute(platform, compute, x, order, pairs)
            return tuple(y[None] if part else y for y, part in zip(found, partial_sums, strict=True))

        found = jax.shard_map(
            body,
            mesh=mesh,
            in_specs=(PartitionSpec(BATCH_AXES, None, x_axis), _ORDER, [(spec(of_pair),) * 2 for of_pair in axes]),
            out_specs=tuple(_PARTS if part else _CUT for part in partial_sums),
            check_vma=False,
        )(x, self.order, cast)
        return tuple(sum_of_shares(y) if part else y for y, part in zip(found, partial_sums, strict=True))


_ROWS = PartitionSpec(BATCH_AXES)
_ORDER: Any = Order(*[_ROWS] * 3)  # type: ignore[arg-type]
_CUT, _PARTS = PartitionSpec(BATCH_AXES, None, "tensor"), PartitionSpec("tensor", BATCH_AXES)
_IN, _OUT = ("embed", "mlp"), ("mlp", "embed")  # of matrices, logical axes


def _sort(groups: Int[Array, "b S"]) -> Order:
    order = sort_by_group(groups.reshape(-1, 1), 2)
    return order._replace(sizes=order.sizes[None])  # [1,2]: a device's row of what all of them have


def _compute(platform: str, compute: Callable, x: Array, order: Order, pairs: Sequence[Pair]) -> tuple[Array, ...]:
    order = order._replace(sizes=order.sizes[0])

    def product(rows: Array, pair: Pair) -> Array:
        return _product(platform, rows, *pair, order.sizes)

    rows = to_groups(x.reshape(-1, x.shape[-1]), order)
    return tuple(from_groups(y, order).reshape(*x.shape[:2], -1) for y in compute(rows, product, *pairs))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(
    platform: str,
    rows: Float[Array, "C D"],
    text: Float[Array, "D M"],
    image: Float[Array, "D M"],
    sizes: Int[Array, "2"],
) -> Float[Array, "C M"]:
    return grouped_matmul(rows, jnp.stack([image, text]), sizes, platform=platform)


def _forward(platform, rows, text, image, sizes):
    values = rows.value, text.value, image.value, sizes.value
    # Whether the text's matrix is trained decides what is computed, so it has to be part of the structure: () or None.
    return _product(platform, *values), (values, () if text.perturbed else None)


def _backward(platform, saved, dy):
    (rows, text, image, sizes), text_is_trained = saved
    if isinstance(dy, SymbolicZero):
        dy = jnp.zeros(dy.shape, dy.dtype)
    product = partial(grouped_matmul, platform=platform)
    both = jnp.stack([image, text])
    (d_rows,) = jax.vjp(lambda rows: product(rows, both, sizes), rows)[1](dy)
    if text_is_trained is None:  # the images' rows come first: the others are then of no group
        (d_image,) = jax.vjp(lambda w: product(rows, w[None], sizes[:1]), image)[1](dy)
        return d_rows, None, d_image, None
    (d_both,) = jax.vjp(lambda w: product(rows, w, sizes), both)[1](dy)
    return d_rows, d_both[1], d_both[0], None


_product.defvjp(_forward, _backward, symbolic_zeros=True)


def with_copies(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a deep model, the images' weights now the text's; what only images have stays as it is."""

    def copies(image: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
        return {k: copies(v, text[k]) if isinstance(v, dict) else text.get(k, v) for k, v in image.items()}

    def of_block(block: dict[str, Any]) -> dict[str, Any]:
        return block | {"image": copies(block["image"], block)} if "image" in block else block

    layers = params["layers"]
    if "block_0" in layers:
        layers = {name: of_block(block) for name, block in layers.items()}
    params = params | {"layers": of_block(layers)}
    if "image_final_norm" in params:
        params["image_final_norm"] = params["final_norm"]
    return params
