"""Peak throughput of accelerators: dense bfloat16, FLOP/s of one JAX device, as their makers state it."""

import jax

# By a substring of `device.device_kind`; the first that matches.
PEAK_FLOPS = (
    ("TPU v4", 275e12),  # cloud.google.com/tpu/docs/v4
    ("TPU v5 lite", 197e12),  # cloud.google.com/tpu/docs/v5e
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),  # cloud.google.com/tpu/docs/v5p
    ("TPU v6", 918e12),  # cloud.google.com/tpu/docs/v6e
    ("TPU7x", 2307e12 / 2),  # cloud.google.com/tpu/docs/tpu7x: 2307 a chip, and a chip is two devices
    ("A100", 312e12),  # nvidia.com, A100 data sheet
    ("H100 PCIe", 756e12),  # nvidia.com, H100 data sheet; the sheet's numbers are with sparsity, twice these
    ("H100", 989e12),
    ("H200", 989e12),  # nvidia.com, H200 data sheet
    ("B200", 2250e12),  # nvidia.com, DGX B200 data sheet
)


def peak_flops(device: jax.Device) -> float | None:
    """None where no peak is known (a CPU, an unlisted chip)."""
    return next((peak for name, peak in PEAK_FLOPS if name in device.device_kind), None)
