"""FLOPs of the model by arithmetic, and the peaks of known accelerators: of computing and of their memory."""

from psyche_jax.config import AdapterSection
from psyche_jax.model.config import ModelConfig

# FLOP/s of one device, dense: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}; NVIDIA's data sheets.
BF16_PEAKS = {
    "v4": 275e12,
    "v5e": 197e12,
    "v5p": 459e12,
    "v6e": 918e12,
    "tpu7x": 2307e12 / 2,  # a chip is two devices
    "A100-40GB": 312e12,
    "A100-80GB": 312e12,
    "H100": 989e12,
    "H200": 989e12,
}
# Bytes/s from and to the memory of one device: the same pages and sheets.
HBM_BANDWIDTHS = {
    "v4": 1.228e12,
    "v5e": 0.819e12,
    "v5p": 2.765e12,
    "v6e": 1.640e12,
    "tpu7x": 7.380e12 / 2,
    "A100-40GB": 1.555e12,
    "A100-80GB": 2.039e12,
    "H100": 3.35e12,
    "H200": 4.8e12,
}
_BY_DEVICE_KIND = {  # how JAX names devices, or how these names begin
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5p": "v5p",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "NVIDIA A100-SXM4-40GB": "A100-40GB",
    "NVIDIA A100-SXM4-80GB": "A100-80GB",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H200": "H200",
}


def _known(device_kind: str) -> str | None:
    return next((name for kind, name in _BY_DEVICE_KIND.items() if device_kind.startswith(kind)), None)


def peak_flops(device_kind: str) -> float | None:
    """bfloat16 FLOP/s of a device as JAX names it; None if it is not known."""
    name = _known(device_kind)
    return None if name is None else BF16_PEAKS[name]


def memory_bandwidth(device_kind: str) -> float | None:
    """Bytes/s from and to the memory of a device as JAX names it; None if it is not known."""
    name = _known(device_kind)
    return None if name is None else HBM_BANDWIDTHS[name]


def peak_of_all_devices() -> float | None:
    """bfloat16 FLOP/s of all devices of this program together; None if they are not known."""
    import jax  # tables and arithmetic alone must not start it

    peak = peak_flops(jax.devices()[0].device_kind)
    return None if peak is None else peak * jax.device_count()


def layer_weights(model: ModelConfig) -> int:
    """Numbers in the matrices of one layer."""
    heads, kv_heads = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    return model.hidden_size * (2 * heads + 2 * kv_heads + 3 * model.intermediate_size)


def layers_flops(model: ModelConfig, rows: float, length: float, pairs: float | None = None) -> float:
    """Of all layers, forward, on `rows` sequences of `length`; `pairs` of query and key a row (default: length²)."""
    pairs = length * length if pairs is None else pairs
    attention = 4 * pairs * model.num_attention_heads * model.head_dim
    return model.num_hidden_layers * rows * (2 * length * layer_weights(model) + attention)


def head_flops(model: ModelConfig, positions: float) -> float:
    """Of the logits of so many positions."""
    return 2.0 * positions * model.vocab_size * model.hidden_size


def causal_flops(model: ModelConfig, rows: float, length: float, before: float = 0.0) -> float:
    """Of all layers, forward, on sequences that attend to themselves causally and to `before` tokens before them."""
    return layers_flops(model, rows, length, length * before + length * length / 2)


def update_passes(adapter: AdapterSection | None) -> int:
    """What forward and backward of an update take, in forward passes; a base that is frozen has no gradient."""
    return 3 if adapter is None else 2
