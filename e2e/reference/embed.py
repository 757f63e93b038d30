"""Makes reference embeddings of a sentence-transformers checkpoint with transformers in float32 on the CPU.

Pooling and normalising are written out here, so that no line of the model's own pipeline is shared: the mean
of the last layer's rows of a text, padding left out, divided by its length. Texts run alone and in padded
batches; both must agree, else nothing is written.
"""

import argparse
import hashlib
import json
import os
import pathlib
import sys

os.environ["HF_HUB_OFFLINE"] = "1"  # everything comes from the folder that is named on the command line

import torch
import transformers
from texts import texts

MAX_TOKENS = 256
# Values are kept as integers in this unit: the cosine to what was rounded differs from 1 by less than 1e-6.
UNIT = 1e-4
BATCH = 16


class Reference:
    """One model and its tokenizer."""

    def __init__(self, folder: pathlib.Path):
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    def ids(self, text: str) -> list[int]:
        """Ids with the special tokens, cut at the longest text; nothing is padded."""
        return self.tokenizer(text, truncation=True, max_length=MAX_TOKENS, padding=False).input_ids

    @torch.inference_mode()
    def embed(self, rows: list[list[int]]) -> torch.Tensor:
        """Unit vectors of several texts."""
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).float()
        pooled = (hidden * weights).sum(1) / weights.sum(1)
        return pooled / pooled.norm(dim=1, keepdim=True)


def main() -> None:
    """Embeds all texts twice and writes the file."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--model", type=pathlib.Path, required=True, help="the checkpoint's folder")
    options.add_argument(
        "--given", type=pathlib.Path, help="an older file, whose texts must be among these and agree"
    )
    options.add_argument("--out", type=pathlib.Path, required=True, help="the JSON file to write")
    given = options.parse_args()
    torch.set_num_threads(1)

    reference = Reference(given.model)
    rows = [reference.ids(text) for text in texts()]
    alone = torch.cat([reference.embed([row]) for row in rows])
    batched = torch.cat([reference.embed(rows[at : at + BATCH]) for at in range(0, len(rows), BATCH)])
    worst = float((1 - (alone * batched).sum(1)).abs().max())
    if worst > 1e-5:
        sys.exit(f"alone and batched differ: cosine {1 - worst}")
    if given.given:
        for item in json.loads(given.given.read_text())["items"]:
            at = texts().index(item["text"])
            cosine = float(torch.dot(alone[at], torch.tensor(item["embedding"])))
            if rows[at] != item["input_ids"] or cosine < 0.999999:
                sys.exit(f"{item['text'][:40]!r} differs from the older file: cosine {cosine}")
    digest = hashlib.sha256((given.model / "model.safetensors").read_bytes()).hexdigest()
    made_with = (
        f"transformers {transformers.__version__}, torch {torch.__version__}, float32, model.safetensors "
        f"with sha256 {digest}; mean over the tokens, length one, at most {MAX_TOKENS} tokens; "
        f"values in units of {UNIT}; recipe: e2e/reference/embed.py"
    )
    items = [
        {"text": text, "ids": row, "embedding": [round(value / UNIT) for value in vector.tolist()]}
        for text, row, vector in zip(texts(), rows, alone, strict=True)
    ]
    lines = ",\n".join(json.dumps(item, ensure_ascii=False, separators=(",", ":")) for item in items)
    given.out.write_text(
        f'{{"made_with": {json.dumps(made_with)},\n"unit": {UNIT},\n"items": [\n{lines}\n]}}\n'
    )
    cut = sum(len(row) == MAX_TOKENS for row in rows)
    print(f"{len(items)} texts, {cut} at the longest, alone and batched within {worst:.1e}")


if __name__ == "__main__":
    main()
