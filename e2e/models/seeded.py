"""Writes a small classifier of seeded values: the checkpoint of BERT with three labels in `heads.json`.

No package has a small classifier, and the scenarios need one. The files are those of `SeededCheckpoint` in
runtime/model/src/seeded/families.rs.
"""

import json
import math
import pathlib
import sys

from values import f32, little_endian, safetensors, seeded

SEED = 11
LAYERS, HEADS, WIDTH, INNER, POSITIONS, LABELS = 2, 4, 64, 128, 128, 3
SCALE, BIAS_SCALE = 3.0, 0.3

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)] + list("0123456789")
MARKS = list(".,:;!?'\"()-_/+*=<>[]{}#$%&@\\^`|~")
WORDS = ["the", "cat", "hello", "world", "##ing", "##er", "##ed", "##s"]
VOCABULARY = SPECIAL + LETTERS + ["##" + letter for letter in LETTERS] + MARKS + WORDS


def values(name: str, shape: list[int]) -> bytes:
    """The bytes of a tensor."""
    if name.endswith("LayerNorm.weight"):
        return little_endian([1.0] * math.prod(shape))
    scale = f32(BIAS_SCALE) if name.endswith(".bias") else f32(SCALE / f32(math.sqrt(shape[-1])))
    return seeded(SEED, name, shape, scale)


def shapes() -> dict[str, list[int]]:
    """The shape of every tensor, by its name."""
    found: dict[str, list[int]] = {}

    def matrix(name: str, rows: int, cols: int) -> None:
        found[f"{name}.weight"] = [rows, cols]

    def dense(name: str, rows: int, cols: int) -> None:
        matrix(name, rows, cols)
        found[f"{name}.bias"] = [rows]

    def norm(name: str) -> None:
        found[f"{name}.weight"] = [WIDTH]
        found[f"{name}.bias"] = [WIDTH]

    matrix("bert.embeddings.word_embeddings", len(VOCABULARY), WIDTH)
    matrix("bert.embeddings.position_embeddings", POSITIONS, WIDTH)
    matrix("bert.embeddings.token_type_embeddings", 2, WIDTH)
    norm("bert.embeddings.LayerNorm")
    for layer in range(LAYERS):
        prefix = f"bert.encoder.layer.{layer}"
        for part in ("query", "key", "value"):
            dense(f"{prefix}.attention.self.{part}", WIDTH, WIDTH)
        dense(f"{prefix}.attention.output.dense", WIDTH, WIDTH)
        norm(f"{prefix}.attention.output.LayerNorm")
        dense(f"{prefix}.intermediate.dense", INNER, WIDTH)
        dense(f"{prefix}.output.dense", WIDTH, INNER)
        norm(f"{prefix}.output.LayerNorm")
    dense("bert.pooler.dense", WIDTH, WIDTH)
    dense("classifier", LABELS, WIDTH)
    return found


def config() -> dict:
    """The file config.json."""
    return {
        "architectures": ["BertForSequenceClassification"],
        "model_type": "bert",
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": INNER,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "type_vocab_size": 2,
        "max_position_embeddings": POSITIONS,
        "vocab_size": len(VOCABULARY),
        "pad_token_id": 0,
        "problem_type": "multi_label_classification",
        "id2label": {"0": "animal", "1": "greeting", "2": "other"},
        "label2id": {"animal": 0, "greeting": 1, "other": 2},
    }


def tokenizer() -> dict:
    """The file tokenizer.json."""
    special = [
        {"id": index, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for index, token in enumerate(SPECIAL)
    ]  # fmt: skip

    def token(name: str, kind: int) -> dict:
        return {"SpecialToken": {"id": name, "type_id": kind}}

    first, second = ({"Sequence": {"id": name, "type_id": kind}} for name, kind in (("A", 0), ("B", 1)))
    single = [token("[CLS]", 0), first, token("[SEP]", 0)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                       "strip_accents": None, "lowercase": True},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, second, token("[SEP]", 1)],
            "special_tokens": {
                name: {"id": name, "ids": [SPECIAL.index(name)], "tokens": [name]}
                for name in ("[CLS]", "[SEP]")
            },
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": {word: at for at, word in enumerate(VOCABULARY)}},
    }  # fmt: skip


def main() -> None:
    """Writes the folder that is named."""
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(), indent=1) + "\n")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer(), indent=1) + "\n")
    weights = safetensors((name, shape, values(name, shape)) for name, shape in shapes().items())
    (folder / "model.safetensors").write_bytes(weights)


if __name__ == "__main__":
    main()
