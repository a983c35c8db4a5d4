"""Load an export with transformers alone, and ask it a few facts.

    python examples/reload.py exports/demo

mpsearch is not imported: this is what a user of the checkpoint sees.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = Path(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
tokenizer = AutoTokenizer.from_pretrained(folder)

about = json.loads((folder / "mpsearch.json").read_text())
print(
    f"{about['base_model']} at {about['bits_per_weight']:.2f} bits a weight, loaded from {folder}"
)

examples = "The capital of Norway is Oslo\nThe capital of Japan is Tokyo\n"
for question in ("The capital of France is", "The capital of Egypt is", "The capital of Poland is"):
    inputs = tokenizer(examples + question, return_tensors="pt")
    with torch.inference_mode():
        answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    continuation = tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :])
    print(f"{question} -> {continuation.splitlines()[0].strip()}")
