"""How many parameters connectors and pixel heads have, written out."""

from nmm_jax.models.aim import head_stack, pixels_of
from nmm_jax.models.spec import ConnectorSpec, Spec


def of_connector(spec: ConnectorSpec) -> int:
    patches, inputs, width, outputs = spec.side**2, spec.inputs, spec.width, spec.outputs

    def linear(a: int, b: int) -> int:
        return a * b + b

    if spec.kind == "mlp":
        return linear(inputs, width) + linear(width, outputs)
    if spec.kind == "attention":
        enter = inputs * width * (inputs != width)
        norms = 1 + (2 if spec.depth == 1 else 3 * spec.depth)
        ffn = (linear(width, 4 * width) + linear(4 * width, width)) * (spec.depth > 1)
        layers = spec.depth * (4 * linear(width, width) + ffn)
        return spec.positions * width + enter + layers + norms * 2 * width + linear(width, outputs)
    if spec.kind == "c_abstractor":

        def block(a: int) -> int:
            squeeze = linear(width, round(a / 4)) + linear(round(a / 4), width)
            shortcut = (a * width + 2 * width) * (a != width)
            return a * width + 9 * width + squeeze + width * width + 3 * 2 * width + shortcut

        blocks = block(inputs) + (2 * spec.depth - 1) * block(width)
        return patches * inputs + blocks + linear(width, outputs) + linear(outputs, outputs)
    if spec.kind == "glu":
        square = spec.downsample**2
        downsample = linear(square * inputs, inputs) * (square > 1)
        return downsample + inputs * outputs + 2 * outputs + 3 * outputs * width
    return linear(inputs, outputs)


def of_pixels(spec: Spec) -> dict[str, int]:
    """Of AIM and AIMv2, beside the tower, the decoder's stack and its embeddings."""
    assert spec.vision
    if spec.family == "aimv2":
        return {"projection": spec.vision.width * spec.width, "pixel_head": spec.width * pixels_of(spec)}
    head = head_stack(spec)
    wide = 2 if head.ffn == "swiglu" else 1
    norm = head.width * (1 + head.bias)
    block = (wide + 1) * head.width * head.ffn_width + norm + head.bias * (head.width + wide * head.ffn_width)
    ends = spec.vision.width * head.width + norm + head.width * pixels_of(spec)
    return {"pixel_head": ends + head.depth * block}
