"""What the published Qwen2, Qwen2.5, QwQ and R1-Distill-Qwen folders say, as far as they differ in it; and others.

Sources: `config.json`, `generation_config.json`, `tokenizer_config.json` and `special_tokens_map.json` of
huggingface.co/Qwen/*, huggingface.co/deepseek-ai/DeepSeek-R1-Distill-Qwen-* and of copies of them there, where these
name the original. Templates are cut down to what decides how a conversation begins and ends: no tools.
"""

from typing import Any, NamedTuple

END_OF_TEXT, IM_START, IM_END = 151643, 151644, 151645

# hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads, vocab_size, tied
SIZES = {
    "0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "3B": (2048, 11008, 36, 16, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
    "14B": (5120, 13824, 48, 40, 8, 152064, False),
    "32B": (5120, 27648, 64, 40, 8, 152064, False),
    "72B": (8192, 29568, 80, 64, 8, 152064, False),
}
BILLIONS = {"0.5B": 0.49, "1.5B": 1.54, "3B": 3.09, "7B": 7.62, "14B": 14.77, "32B": 32.76, "72B": 72.71}

_CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n{SYSTEM}<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n{OPENED}' }}{% endif %}"
)
_QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
_REASONED = "Please reason step by step, and put your final answer within \\\\boxed{}."


def _chatml(system: str, opened: str = "") -> str:
    return _CHATML.replace("{SYSTEM}", system).replace("{OPENED}", opened)


TEMPLATES = {
    "qwen2": _chatml("You are a helpful assistant."),
    "qwen2.5": _chatml(_QWEN),
    "math": _chatml(_REASONED),
    "qwq": (
        "{% if messages[0]['role'] == 'system' %}{{ '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
        "{% endif %}{% for message in messages %}{% if message.role == 'user' %}"
        "{{ '<|im_start|>user\n' + message.content + '<|im_end|>' + '\n' }}{% elif message.role == 'assistant' %}"
        "{% set content = message.content.split('</think>')[-1].lstrip('\n') %}"
        "{{ '<|im_start|>assistant\n' + content + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    ),
    "r1": (
        "{% set ns = namespace(system='') %}{% for message in messages %}{% if message['role'] == 'system' %}"
        "{% set ns.system = message['content'] %}{% endif %}{% endfor %}{{ bos_token }}{{ ns.system }}"
        "{% for message in messages %}{% if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
        "{% elif message['role'] == 'assistant' %}{% set content = message['content'] %}"
        "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
        "{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
    ),
}
R1_TOKENS = ("<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜begin▁of▁sentence｜>")
R1_IDS = (151643, 151644, 151645, 151646)


class Folder(NamedTuple):
    """One published folder. `eos` is config.json's, `generation` the ids of generation_config.json."""

    size: str
    eos: int
    generation: int | tuple[int, ...]
    template: str
    places: int
    theta: float = 1_000_000.0
    epsilon: float = 1e-6
    more: dict[str, Any] | None = None

    def config(self) -> dict[str, Any]:
        """Its `config.json`."""
        width, inner, layers, heads, kv_heads, vocabulary, tied = SIZES[self.size]
        if self.template == "r1":
            tied = False
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": END_OF_TEXT,
            "eos_token_id": self.eos,
            "hidden_act": "silu",
            "hidden_size": width,
            "initializer_range": 0.02,
            "intermediate_size": inner,
            "max_position_embeddings": self.places,
            "max_window_layers": 21,
            "model_type": "qwen2",
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": kv_heads,
            "rms_norm_eps": self.epsilon,
            "rope_theta": self.theta,
            "sliding_window": 4096,
            "tie_word_embeddings": tied,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": vocabulary,
            **(self.more or {}),
        }

    def generation_config(self) -> dict[str, Any]:
        """Its `generation_config.json`."""
        if self.template == "r1":
            sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.95}
            return {"_from_model_config": True, "bos_token_id": 151646, "eos_token_id": self.generation, **sampling}
        if isinstance(self.generation, int):
            return {"bos_token_id": END_OF_TEXT, "do_sample": False, "eos_token_id": self.generation}
        return {"bos_token_id": END_OF_TEXT, "pad_token_id": END_OF_TEXT, "eos_token_id": list(self.generation)}

    def tokenizer_config(self) -> dict[str, Any]:
        """What decides in its `tokenizer_config.json`."""
        if self.template == "r1":

            def added(text: str) -> dict[str, Any]:
                flags = dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
                return {"__type": "AddedToken", "content": text, "normalized": True, **flags}

            bos, eos = added(R1_TOKENS[3]), added(R1_TOKENS[0])
            named = {"bos_token": bos, "eos_token": eos, "pad_token": eos, "unk_token": None}
            kind = {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, "add_eos_token": False}
            return {**kind, **named, "legacy": True, "sp_model_kwargs": {}, "chat_template": TEMPLATES["r1"]}
        eos = "<|endoftext|>" if self.eos == END_OF_TEXT else "<|im_end|>"
        named = {"bos_token": None, "eos_token": eos, "pad_token": "<|endoftext|>", "unk_token": None}
        kind = {"tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": False, "errors": "replace"}
        if self.template != "qwen2":
            kind["add_bos_token"] = False
        return {**kind, **named, "split_special_tokens": False, "chat_template": TEMPLATES[self.template]}


_BOTH = (IM_END, END_OF_TEXT)


def _base(size: str, template: str, places: int, **more: Any) -> Folder:
    return Folder(size, END_OF_TEXT, END_OF_TEXT, template, places, **more)


def _chat(size: str, template: str, places: int, **more: Any) -> Folder:
    return Folder(size, IM_END, _BOTH, template, places, **more)


def _r1(size: str, theta: float, epsilon: float) -> Folder:
    more = {"use_mrope": False} if theta == 10000 else None
    return Folder(size, END_OF_TEXT, END_OF_TEXT, "r1", 131072, theta, epsilon, more)


_LARGE = {"epsilon": 1e-5}
_SHORT = {"theta": 10000, "more": {"use_mrope": False}}
FOLDERS = {
    **{f"Qwen2-{size}": _base(size, "qwen2", 131072) for size in ("0.5B", "1.5B", "7B")},
    "Qwen2-72B": _base("72B", "qwen2", 131072, **_LARGE),
    **{f"Qwen2-{size}-Instruct": _chat(size, "qwen2", 32768) for size in ("0.5B", "1.5B", "7B", "72B")},
    **{f"Qwen2-Math-{size}-Instruct": _chat(size, "qwen2", 4096, **_SHORT) for size in ("1.5B", "7B")},
    **{f"Qwen2.5-{size}": _base(size, "qwen2.5", 32768) for size in ("0.5B", "3B")},
    **{f"Qwen2.5-{size}": _base(size, "qwen2.5", 131072) for size in ("1.5B", "7B")},
    **{f"Qwen2.5-{size}": _base(size, "qwen2.5", 131072, **_LARGE) for size in ("14B", "32B", "72B")},
    **{f"Qwen2.5-{size}-Instruct": _chat(size, "qwen2.5", 32768) for size in SIZES},
    **{f"Qwen2.5-Coder-{size}": _base(size, "qwen2.5", 32768) for size in ("0.5B", "1.5B", "3B", "7B")},
    **{f"Qwen2.5-Coder-{size}": _base(size, "qwen2.5", 32768, **_LARGE) for size in ("14B", "32B")},
    **{f"Qwen2.5-Coder-{size}-Instruct": _chat(size, "qwen2.5", 32768) for size in list(SIZES)[:-1]},
    **{f"Qwen2.5-Math-{size}": _base(size, "math", 4096, **_SHORT) for size in ("1.5B", "7B")},
    "Qwen2.5-Math-72B": _base("72B", "math", 4096, epsilon=1e-5, **_SHORT),
    **{f"Qwen2.5-Math-{size}-Instruct": _chat(size, "math", 4096, theta=10000.0) for size in ("1.5B", "7B", "72B")},
    "QwQ-32B-Preview": _chat("32B", "qwen2.5", 32768, **_LARGE, more={"sliding_window": None, "max_window_layers": 64}),
    "QwQ-32B": _chat("32B", "qwq", 131072, **_LARGE, more={"sliding_window": 32768, "max_window_layers": 64}),
    "DeepSeek-R1-Distill-Qwen-1.5B": _r1("1.5B", 10000, 1e-6),
    "DeepSeek-R1-Distill-Qwen-7B": _r1("7B", 10000, 1e-6),
    "DeepSeek-R1-Distill-Qwen-14B": _r1("14B", 1_000_000.0, 1e-5),
    "DeepSeek-R1-Distill-Qwen-32B": _r1("32B", 1_000_000.0, 1e-5),
}


def _other(architecture: str, sizes: tuple[int, ...], tied: bool, **more: Any) -> dict[str, Any]:
    width, inner, layers, heads, kv_heads, vocabulary, places = sizes
    return {
        "architectures": [architecture],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": 0.02,
        "intermediate_size": inner,
        "max_position_embeddings": places,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": vocabulary,
        **more,
    }


_QWEN3 = {
    **{"bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "model_type": "qwen3", "rms_norm_eps": 1e-6},
    **{"rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "use_sliding_window": False},
}
_LLAMA = {
    **{"bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "mlp_bias": False, "model_type": "llama"},
    **{"pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_theta": 500000.0},
}


_LLAMA_8B = (4096, 14336, 32, 32, 8, 128256)


def _llama3(factor: float) -> dict[str, Any]:
    limits = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"factor": factor, **limits, "rope_type": "llama3"}


# Of `config.json`s of other families, and the billions of parameters that their cards name.
OTHER_FAMILIES: dict[str, tuple[dict[str, Any], float]] = {
    "Qwen3-0.6B": (_other("Qwen3ForCausalLM", (1024, 3072, 28, 16, 8, 151936, 40960), True, **_QWEN3), 0.60),
    "Qwen3-4B-Instruct-2507": (
        _other("Qwen3ForCausalLM", (2560, 9728, 36, 32, 8, 151936, 262144), True, **{**_QWEN3, "rope_theta": 5000000}),
        4.02,
    ),
    "DeepSeek-R1-0528-Qwen3-8B": (
        _other(
            "Qwen3ForCausalLM",
            (4096, 12288, 36, 32, 8, 151936, 131072),
            False,
            **{
                **_QWEN3,
                "rope_scaling": {
                    **{"attn_factor": 0.8782488562869419, "factor": 4.0},
                    **{"original_max_position_embeddings": 32768, "rope_type": "yarn"},
                },
            },
        ),
        8.19,
    ),
    "Meta-Llama-3-8B-Instruct": (
        _other("LlamaForCausalLM", (*_LLAMA_8B, 8192), False, **_LLAMA, rope_scaling=None),
        8.03,
    ),
    "Llama-3.1-8B-Instruct": (
        _other("LlamaForCausalLM", (*_LLAMA_8B, 131072), False, **_LLAMA, rope_scaling=_llama3(8.0)),
        8.03,
    ),
    "Llama-3.2-1B": (
        _other(
            "LlamaForCausalLM",
            (2048, 8192, 16, 32, 8, 128256, 131072),
            True,
            **_LLAMA,
            head_dim=64,
            rope_scaling=_llama3(32.0),
        ),
        1.24,
    ),
    "SmolLM2-135M-Instruct": (
        _other(
            "LlamaForCausalLM",
            (576, 1536, 30, 9, 3, 49152, 8192),
            True,
            **{**_LLAMA, "bos_token_id": 1, "eos_token_id": 2, "rope_theta": 100000},
            rope_interleaved=False,
            rope_scaling=None,
        ),
        0.135,
    ),
}
