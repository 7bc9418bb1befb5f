"""Writes a Llama of two layers into a folder: its settings, and a tokenizer trained on the standard library's
sources. vLLM makes up the weights (``--load-format dummy``), so nothing is downloaded.

Runs in the engine's venv: ``tiny_model.py FOLDER``.
"""

import json
import sys
import sysconfig
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL = ["<pad>", "<s>", "</s>", "<system>", "<user>", "<assistant>", "<end>"]
CONTEXT_TOKENS = 8192
CHAT_TEMPLATE = (
    "<s>{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,  # the least that vLLM's CPU attention takes
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": CONTEXT_TOKENS,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
TOKEN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tokenizer() -> Tokenizer:
    """Byte-level BPE of 2,048 tokens that puts ``<s>`` before a text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2048, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:150]
    made.train([str(source) for source in sources], trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    made = tokenizer()
    made.save(str(folder / "tokenizer.json"))
    about_tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": CONTEXT_TOKENS,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    model = {**LLAMA, **TOKEN_IDS, "vocab_size": made.get_vocab_size()}
    for name, content in (
        ("tokenizer_config.json", about_tokenizer),
        ("config.json", model),
        ("generation_config.json", TOKEN_IDS),
    ):
        (folder / name).write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
