"""The shape of a model and what its family adds, read from and written as a Hugging Face `config.json`."""

import dataclasses
import difflib
import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from psyche_jax.config import AdapterSection
from psyche_jax.errors import UsageError, UserError

_LARGEST_SIZE = 2**31 - 1
_LARGEST_NUMBER = 1e38  # of float32


class Family(NamedTuple):
    """What a `model_type` says of the decoder layer, and what transformers takes where its `config.json` is silent.

    `qkv_bias`: query, key and value have biases whatever `attention_bias` says, which then means nothing;
    `qk_norm`: each head's query and key are normalized before RoPE.
    """

    architecture: str  # the class in transformers
    qkv_bias: bool = False
    qk_norm: bool = False
    head_dim: int | None = None  # None: width / heads
    max_position_embeddings: int = 32768


FAMILIES = {
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True, head_dim=128),
    "llama": Family("LlamaForCausalLM", max_position_embeddings=2048),
}
_SUPPORTED = f"supported are dense text models: {', '.join(map(repr, FAMILIES))}"


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE was stretched beyond the length that a model was first trained at; see `psyche_jax.model.rotary`.

    Field names are those of Hugging Face's `rope_scaling`; None is what a file does not say, and stays unsaid.
    """

    rope_type: Literal["yarn", "llama3"]
    factor: float
    original_max_position_embeddings: int
    # of YaRN:
    attention_factor: float | None = None  # of cosine and sine; None: 0.1 ln(factor) + 1
    beta_fast: float | None = None  # turns within the original length from which on nothing is stretched; None: 32
    beta_slow: float | None = None  # up to which all is; None: 1
    truncate: bool | None = None  # whether both are moved outwards to a whole pair of dimensions; None: they are
    # of Llama 3: turns up to which all is stretched, and from which on nothing is
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None

    def __post_init__(self) -> None:
        where = f"model config: {self.rope_type} of rope_scaling"
        if not 1 <= self.original_max_position_embeddings <= _LARGEST_SIZE:
            value = reprlib.repr(self.original_max_position_embeddings)
            raise UserError(
                f"{where}: original_max_position_embeddings is {value}; it must be from 1 to {_LARGEST_SIZE}"
            )
        if self.factor < 1:
            raise UserError(f"{where}: factor is {self.factor}; it must be at least 1")
        low, high = self.turns
        if low >= high:
            names = ("beta_slow", "beta_fast") if self.rope_type == "yarn" else ("low_freq_factor", "high_freq_factor")
            raise UserError(f"{where}: {names[0]} {low} must be less than {names[1]} {high}")

    @property
    def turns(self) -> tuple[float, float]:
        """Within the original length: up to how many turns all of a frequency is stretched; from which on nothing."""
        if self.rope_type == "yarn":
            return self.beta_slow or 1.0, self.beta_fast or 32.0
        return self.low_freq_factor or 1.0, self.high_freq_factor or 4.0


@dataclass(frozen=True)
class ModelConfig:
    """Everything the architecture needs; field names are those of Hugging Face's configs."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32768
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    model_type: str = "qwen2"
    attention_bias: bool = False  # biases of all four projections of attention; Qwen2 has no such setting
    rope_scaling: RopeScaling | None = None
    adapter: AdapterSection | None = None  # what is trained on top of the parameters, which then stay as they are
    int8: bool = False  # weights of the linear maps are int8, see `model/int8.py`; all other parameters are bfloat16

    def __post_init__(self) -> None:
        if self.model_type not in FAMILIES:
            raise UserError(f"model config: model_type is {_short(self.model_type)}; {_SUPPORTED}")
        sizes = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "head_dim",
            "max_position_embeddings",
        )
        for field in sizes:
            if not 1 <= getattr(self, field) <= _LARGEST_SIZE:
                value = reprlib.repr(getattr(self, field))
                raise UserError(f"model config: {field} is {value}; it must be from 1 to {_LARGEST_SIZE}")
        if self.num_key_value_heads < 1 or self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"model config: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.rope_scaling is not None and self.rope_theta <= 1:
            raise UserError(f"model config: rope_theta {self.rope_theta} cannot be stretched; it must be over 1")
        if self.head_dim % 2:
            raise UserError(f"model config: head_dim {self.head_dim} is odd; rotary embedding needs an even one")

    @property
    def architecture(self) -> str:
        """The class of transformers that the model is."""
        return FAMILIES[self.model_type].architecture

    @property
    def qkv_bias(self) -> bool:
        """Whether the projections to query, key and value have biases."""
        return FAMILIES[self.model_type].qkv_bias or self.attention_bias

    @property
    def o_bias(self) -> bool:
        """Whether the projection after attention has a bias."""
        return self.attention_bias

    @property
    def qk_norm(self) -> bool:
        """Whether each head's query and key are normalized, before RoPE."""
        return FAMILIES[self.model_type].qk_norm

    @property
    def max_positions(self) -> int:
        """How many positions there are: with YaRN also those that it adds, which many a folder does not count."""
        scaling = self.rope_scaling
        if scaling is None or scaling.rope_type != "yarn":
            return self.max_position_embeddings
        return max(self.max_position_embeddings, int(scaling.factor * scaling.original_max_position_embeddings))

    @property
    def num_parameters(self) -> int:
        """Number of parameters, the tied head counted once; adapters are not counted."""
        heads, kv_heads = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        attention = self.hidden_size * (2 * heads + 2 * kv_heads)
        attention += self.qkv_bias * (heads + 2 * kv_heads) + self.o_bias * self.hidden_size
        attention += self.qk_norm * 2 * self.head_dim
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        embeddings = (1 if self.tie_word_embeddings else 2) * self.vocab_size * self.hidden_size
        return self.num_hidden_layers * layer + embeddings + self.hidden_size


def model_config_from_hf(config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """Read a `config.json` (and `generation_config.json`) of one of `FAMILIES`.

    Values are where transformers reads them. Stop tokens are those that either file names; what the tokenizer adds
    to them, see `psyche_jax.train.checkpoints`.

    Raises:
      UserError: another architecture, a feature this port does not have, or a value that cannot be (named).
    """
    model_type = config.get("model_type")
    if model_type not in list(FAMILIES):  # a list compares what cannot be hashed too
        raise UserError(f"config.json: model_type is {_short(model_type)}; {_SUPPORTED}")
    family = FAMILIES[model_type]
    if config.get("use_sliding_window"):
        raise UserError("config.json: use_sliding_window is on; only full attention is supported")
    kinds = config.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise UserError(f"config.json: layer_types has {_short(kinds)}; only full attention is supported")
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"config.json: hidden_act {_short(config['hidden_act'])} is not supported; only 'silu' is")
    if config.get("is_causal", True) is not True:  # null is false in transformers
        raise UserError(f"config.json: is_causal is {_short(config['is_causal'])}; only causal attention is supported")
    for key in ("quantization_config", "transformers_weights"):
        if config.get(key):
            raise UserError(f"config.json: {key} is set; only plain weights in floating point are supported")
    if _boolean(config, "mlp_bias"):
        raise UserError("config.json: mlp_bias is on; only an MLP without biases is supported")
    hidden_size, heads = _whole(config, "hidden_size"), _whole(config, "num_attention_heads")
    files = {"generation_config.json": generation or {}, "config.json": config}
    ends = [(file, values.get("eos_token_id")) for file, values in files.items()]
    stops = [
        _token(file, "eos_token_id", one) for file, end in ends for one in (end if isinstance(end, list) else [end])
    ]
    padding = [_token(file, "pad_token_id", values.get("pad_token_id")) for file, values in files.items()]
    return ModelConfig(
        vocab_size=_whole(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_whole(config, "intermediate_size"),
        num_hidden_layers=_whole(config, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=_whole(config, "num_key_value_heads", heads),
        head_dim=_whole(config, "head_dim", family.head_dim or hidden_size // max(heads, 1)),
        rms_norm_eps=_number(config, "rms_norm_eps", 1e-6),
        rope_theta=_rope_theta(config),
        tie_word_embeddings=_boolean(config, "tie_word_embeddings"),
        max_position_embeddings=_whole(config, "max_position_embeddings", family.max_position_embeddings),
        bos_token_id=_token("config.json", "bos_token_id", config.get("bos_token_id")),
        pad_token_id=next((token for token in padding if token is not None), None),
        stop_token_ids=tuple(dict.fromkeys(token for token in stops if token is not None)),
        model_type=model_type,
        attention_bias=not family.qkv_bias and _boolean(config, "attention_bias"),
        rope_scaling=_rope_scaling(config),
    )


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is said of RoPE in one place: `rope_scaling`, or as transformers 5 writes it `rope_parameters`."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(key) or {}
    if not isinstance(rope, Mapping):
        raise _wrong_type(key, rope, "an object")
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise UserError(f"config.json: {key} differs between layers; only one set for all layers is supported")
    return rope


def _rope_theta(config: Mapping[str, Any]) -> float:
    """RoPE's base as transformers finds it: what `rope_scaling` says, else `rope_parameters`, else the top level."""
    rope = _rope(config)
    values = rope if rope.get("rope_theta") is not None else config
    if values.get("rope_theta") is None and "rope_theta" in {**rope, **config}:
        raise _wrong_type("rope_theta", None, "a number")
    return _number(values, "rope_theta", 10_000.0)


_ROPE_NUMBERS = {  # by type: those that must be there, and those that may
    "yarn": (("factor",), ("attention_factor", "beta_fast", "beta_slow")),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ()),
}


def _rope_scaling(config: Mapping[str, Any]) -> RopeScaling | None:
    """How RoPE is stretched, by the rules of transformers 5; what that passes over is passed over."""
    rope = _rope(config)
    kind: Any = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind not in list(_ROPE_NUMBERS):
        known = " and ".join(map(repr, _ROPE_NUMBERS))
        raise UserError(f"config.json: RoPE scaling {_short(kind)} is not supported; {known} are, and plain RoPE")
    for key in ("mscale", "mscale_all_dim", "partial_rotary_factor"):
        if (value := rope.get(key, config.get(key))) is not None:
            raise UserError(f"config.json: RoPE scaling with {key} {_short(value)} is not supported; remove it")
    length = "original_max_position_embeddings"
    values = {**rope, **({length: config[length]} if config.get(length) is not None else {})}
    required, optional = _ROPE_NUMBERS[kind]
    for key in (*required, length):
        if values.get(key) is None:
            raise UserError(f"config.json: RoPE scaling {kind!r} has no {key}; add it")
    return RopeScaling(
        kind,
        original_max_position_embeddings=_whole(values, length),
        truncate=_boolean(values, "truncate") if "truncate" in values else None,  # null is false too
        **{key: _number(values, key, 0.0) for key in (*required, *optional) if values.get(key) is not None},
    )


def _whole(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = values.get(key)
    if value is None and default is not None:
        return default
    if key not in values:
        raise UserError(f"config.json: the key {key!r} is missing")
    if not isinstance(value, int) or isinstance(value, bool):
        raise _wrong_type(key, value, "a whole number")
    return value


def _token(file: str, key: str, value: Any) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise UserError(f"{file}: a value has the wrong type ({key} is {_short(value)}, not a token id)")
    return value


def _number(values: Mapping[str, Any], key: str, default: float) -> float:
    value = values.get(key)
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise _wrong_type(key, value, "a number")
    if not 0 < value < _LARGEST_NUMBER:
        raise UserError(f"config.json: {key} is {_short(value)}; it must be positive and finite")
    return float(value)


def _boolean(values: Mapping[str, Any], key: str) -> bool:
    value = values.get(key)
    if value is not None and not isinstance(value, bool):
        raise _wrong_type(key, value, "true or false")
    return bool(value)


def _wrong_type(key: str, value: Any, expected: str) -> UserError:
    return UserError(f"config.json: a value has the wrong type ({key} is {_short(value)}, not {expected})")


def _short(value: Any) -> str:
    """`value` for a message, however large it is."""
    return reprlib.repr(value)


def read_hf_config(folder: Path) -> ModelConfig:
    """Read the config of the Hugging Face model folder `folder`.

    Raises:
      UserError: the folder or its `config.json` is missing or broken.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: not a Hugging Face model folder, it has no config.json")
    generation_file = folder / "generation_config.json"
    try:
        generation = _read_json(generation_file) if generation_file.is_file() else None
        return model_config_from_hf(_read_json(folder / "config.json"), generation)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def hf_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` of `config`, in the form in which such models are published."""
    family: dict[str, Any] = {} if config.model_type == "llama" else {"use_sliding_window": False}
    if not FAMILIES[config.model_type].qkv_bias:
        family["attention_bias"] = config.attention_bias
    if config.rope_scaling is not None:
        scaling = dataclasses.asdict(config.rope_scaling)
        family["rope_scaling"] = {key: value for key, value in scaling.items() if value is not None}
    return {
        "architectures": [config.architecture],
        "attention_dropout": 0.0,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": _one_or_all(config.stop_token_ids),
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": config.model_type,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "pad_token_id": config.pad_token_id,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": dtype,
        "transformers_version": "4.51.0",  # whose form this is; 4.57 warns of wrong tokens where none is named
        "use_cache": True,
        "vocab_size": config.vocab_size,
        **family,
    }


def hf_generation_config(config: ModelConfig) -> dict[str, Any]:
    """The `generation_config.json`: every stop id, and the paper's sampling (temperature 0.7, top-p 0.9)."""
    return {
        "bos_token_id": config.bos_token_id,
        "do_sample": True,
        "eos_token_id": list(config.stop_token_ids),
        "pad_token_id": config.pad_token_id,
        "temperature": 0.7,
        "top_p": 0.9,
    }


def _one_or_all(tokens: tuple[int, ...]) -> int | list[int] | None:
    return list(tokens) if len(tokens) > 1 else tokens[0] if tokens else None


def model_config_from_dict(values: Mapping[str, Any]) -> ModelConfig:
    """The inverse of `dataclasses.asdict`, after a trip through JSON."""
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    if unknown := set(values) - names:
        raise UserError(f"model config: unknown keys {sorted(unknown)}; it was written by another version")
    scaling, adapter = values.get("rope_scaling"), values.get("adapter")
    return ModelConfig(
        **{
            **values,
            "stop_token_ids": tuple(values["stop_token_ids"]),
            "rope_scaling": None if scaling is None else RopeScaling(**scaling),
            "adapter": None if adapter is None else AdapterSection(**{**adapter, "targets": tuple(adapter["targets"])}),
        }
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # numbers of 5,000 digits, objects within objects
        raise UserError(f"{path.name} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path.name} does not hold a JSON object")
    return value


def _qwen2(width: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=width // heads,
        tie_word_embeddings=tied,
        bos_token_id=151643,
        pad_token_id=151643,
        stop_token_ids=(151645, 151643),
    )


def _qwen3(width: int, inner: int, layers: int, heads: int, tied: bool) -> ModelConfig:
    qwen2 = _qwen2(width, inner, layers, heads, 8, 151936, tied)
    return dataclasses.replace(qwen2, model_type="qwen3", head_dim=128, max_position_embeddings=40960)


def _llama3(width: int, inner: int, layers: int, heads: int, factor: float, tied: bool) -> ModelConfig:
    return ModelConfig(
        vocab_size=128256,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=width // heads,
        rms_norm_eps=1e-5,
        rope_theta=5e5,
        tie_word_embeddings=tied,
        max_position_embeddings=131072,
        bos_token_id=128000,
        stop_token_ids=(128001, 128008, 128009),
        model_type="llama",
        rope_scaling=RopeScaling("llama3", factor, 8192, low_freq_factor=1.0, high_freq_factor=4.0),
    )


ARCHITECTURES: dict[str, ModelConfig] = {
    "Qwen2.5-0.5B": _qwen2(896, 4864, 24, 14, 2, 151936, True),
    "Qwen2.5-1.5B": _qwen2(1536, 8960, 28, 12, 2, 151936, True),
    "Qwen2.5-3B": _qwen2(2048, 11008, 36, 16, 2, 151936, True),
    "Qwen2.5-7B": _qwen2(3584, 18944, 28, 28, 4, 152064, False),
    "Qwen2.5-14B": _qwen2(5120, 13824, 48, 40, 8, 152064, False),
    "Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, True),
    "Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, True),
    "Qwen3-4B": _qwen3(2560, 9728, 36, 32, True),
    "Qwen3-8B": _qwen3(4096, 12288, 36, 32, False),
    "Qwen3-14B": _qwen3(5120, 17408, 40, 40, False),
    "Qwen3-32B": _qwen3(5120, 25600, 64, 64, False),
    "Llama-3.2-1B": _llama3(2048, 8192, 16, 32, 32.0, True),
    "Llama-3.2-3B": _llama3(3072, 8192, 28, 24, 32.0, True),
    "Llama-3.1-8B": _llama3(4096, 14336, 32, 32, 8.0, False),
}
SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
    "model_type",
    "attention_bias",
)


def published_architecture(name: str) -> ModelConfig:
    """The architecture called `name`; the suffix `-Instruct` may be left out.

    Raises:
      UsageError: there is none of that name.
    """
    known = ARCHITECTURES.get(name.removesuffix("-Instruct"))
    if known is None:
        nearest = difflib.get_close_matches(name, ARCHITECTURES, 1)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise UsageError(f"model.architecture: {name!r} is not known; {hint}known: {', '.join(ARCHITECTURES)}")
    return known


def check_architecture(name: str | None, config: ModelConfig, origin: str) -> None:
    """Raise UserError unless the model opened at `origin` has the shape of `name` (None: any will do).

    Raises:
      UsageError: naming the first size that differs.
    """
    if name is None:
        return
    expected = published_architecture(name)
    for field in SHAPE:
        if getattr(config, field) != getattr(expected, field):
            raise UsageError(
                f"model.architecture: {origin} is not {name}: its {field} is {getattr(config, field)}, "
                f"not {getattr(expected, field)}; correct model.path or model.architecture"
            )
