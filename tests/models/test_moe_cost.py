"""What a mixture of experts costs: FLOPs of the compiled gradient, against the dense layer that it replaces.

Counted in the program's text (compilation/products.py), which XLA's ragged_dot on CPU fails, times the experts.
"""

import json
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nmm_jax.compilation.products import flops, products_in
from nmm_jax.models import grouped_matmul
from nmm_jax.models.layers import FeedForward
from nmm_jax.models.moe import MoE
from nmm_jax.models.spec import Spec
from nmm_jax.parallel.sharding import Constrain
from tests.fake_batches import tiny_config

TOKENS, WIDTH, FFN = 65_536, 128, 1024
DENSE = 3 * 3 * 2 * TOKENS * WIDTH * FFN  # three products, and two gradients of each


def compiled_gradient(module, *inputs):
    """The text of the program for y, the gradients of all weights and that of x, given y's."""
    graph, params = nnx.split(nnx.eval_shape(module))
    x = jax.ShapeDtypeStruct((1, TOKENS, WIDTH), jnp.float32)

    def gradients(params, x, dy, *inputs):
        def forward(params, x):
            y = nnx.merge(graph, params)(x, *inputs, Constrain())
            return y[0] if isinstance(y, tuple) else y

        y, pull = jax.vjp(forward, params, x)
        return y, pull(dy)

    return jax.jit(gradients).lower(params, x, x, *inputs).compile().as_text()


def spec_of(experts):
    keys = {"model__width": WIDTH, "model__ffn_width": FFN, "model__moe__experts": experts}
    return Spec.from_config(tiny_config(**keys))


def even_sizes(experts):
    """Tokens of each expert where the router has no preference."""
    return np.random.default_rng(0).multinomial(TOKENS, np.full(experts, 1 / experts))


def trips_of(sizes):
    """How often the loops over a group's blocks run, on average: their number depends on the sizes of the groups.

    A group's last block may hold rows that are not its own.
    """
    blocks = dict(grouped_matmul.blocks_of(sizes, TOKENS))

    def trips(program, loop):
        (product,) = products_in(program, loop.attribute("body"))
        return Fraction(int(blocks[product.shapes[0][0]].sum()), len(sizes))

    return trips


def test_the_dense_layer_is_counted_exactly():
    module = lambda: FeedForward(spec_of(0), 0, rngs=nnx.Rngs(0))  # noqa: E731
    assert flops(compiled_gradient(module)) == DENSE


@pytest.mark.parametrize("experts", [8, 16, 64])
def test_one_expert_of_many_costs_what_the_dense_layer_does(experts):
    modality = jax.ShapeDtypeStruct((1, TOKENS), jnp.int32)
    text = compiled_gradient(lambda: MoE(spec_of(experts), 0, rngs=nnx.Rngs(0)), modality)
    sizes = even_sizes(experts)
    counted = int(flops(text, trips_of(sizes)))
    router = 3 * 2 * TOKENS * WIDTH * experts
    padding = counted - router - DENSE  # of the blocks' last rows
    shares = {"router": router / DENSE, "padding": padding / DENSE, "all": counted / DENSE}
    print(json.dumps({"experts": experts, "tokens": TOKENS, "of the dense layer": shares}))
    assert 0 <= padding and counted <= 1.1 * DENSE


def test_a_product_with_every_expert_would_be_seen():
    """XLA's own grouped product on CPU multiplies all rows with all matrices."""
    experts, rows = 8, 512
    shapes = (rows, WIDTH), (experts, WIDTH, FFN)
    x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    sizes = jax.ShapeDtypeStruct((experts,), jnp.int32)
    text = jax.jit(jax.lax.ragged_dot).lower(x, w, sizes).compile().as_text()
    assert flops(text) == experts * 2 * rows * WIDTH * FFN


def test_loops_are_multiplied_with_their_trips():
    def program(x, w):
        def outer(x, _):
            x = jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=5)[0]
            return jnp.tanh(x @ w), None

        return jax.lax.scan(outer, x, length=3)[0]

    x, w = jax.ShapeDtypeStruct((64, 32), jnp.float32), jax.ShapeDtypeStruct((32, 32), jnp.float32)
    assert flops(jax.jit(program).lower(x, w).compile().as_text()) == 3 * (5 + 1) * 2 * 64 * 32 * 32


def test_a_loop_of_unknown_length_is_refused():
    program = jax.jit(lambda n, x: jax.lax.fori_loop(0, n, lambda _, x: jnp.tanh(x @ x), x))
    text = program.lower(jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((8, 8), jnp.float32)).compile()
    with pytest.raises(ValueError, match="depends on data; give `trips`"):
        flops(text.as_text())
    assert flops(text.as_text(), lambda *_: 7) == 7 * 2 * 8**3
