"""Writes a LoRA adapter with random weights for the tiny model. Runs in the engine's venv: ``lora.py FOLDER
SEED``.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

RANK = 8
LAYERS, HIDDEN = 2, 64
ADAPTED = ("q_proj", "v_proj")


def write(folder: Path, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    made = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        for part in ADAPTED:
            name = f"base_model.model.model.layers.{layer}.self_attn.{part}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, HIDDEN, generator=made) * 0.05
            tensors[f"{name}.lora_B.weight"] = torch.randn(HIDDEN, RANK, generator=made) * 0.05
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": list(ADAPTED),
        "bias": "none",
        "base_model_name_or_path": "tiny",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=1))


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]))
