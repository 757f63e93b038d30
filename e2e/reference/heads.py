"""Makes reference outputs of small seeded encoders of every family, with and without a head.

The checkpoints are those of `SeededCheckpoint` in runtime/model/src/seeded: the same values from the same
seed, under the same names, put into the classes of transformers in float32. Only what they answer is stored.
A second part asks a real classifier, where its folder is given.
"""

import argparse
import json
import os
import pathlib

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is fetched

import numpy as np
import tokenizers
import torch
import transformers

SEED = 11
LAYERS, HEADS, HEAD_DIM, INNER, POSITIONS = 2, 4, 16, 128, 128
WIDTH = HEADS * HEAD_DIM
SCALE, BIAS_SCALE = 3.0, 0.3

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)] + list("0123456789")
MARKS = list(".,:;!?'\"()-_/+*=<>[]{}#$%&@\\^`|~")
WORDS = ["the", "cat", "hello", "world", "##ing", "##er", "##ed", "##s"]
VOCABULARY = SPECIAL + LETTERS + ["##" + letter for letter in LETTERS] + MARKS + WORDS

# Texts of whole words of the vocabulary, so that this file needs no tokenizer.
TEXTS = ["hello world", "", "the cat", "the cat . hello , world ! a b c", "x"]
# Of models whose answers depend on how far tokens are from each other.
LONG = "the cat . hello , world ! a b c " * 5
PAIRS = [("the cat", "hello world"), ("the cat", ""), ("hello", "the the the cat ?"), ("", "")]

# What models that label tokens are asked: pieces of words, capitals, accents, characters without a token.
TOKEN_TEXTS = [
    "the cat talking",
    "Hello world , hello WORLDS",
    "xyz 1234 the caf\u00e9",
    "\u65e5\u672c cats",
    "",
]
TOKEN_LABELS = {"0": "O", "1": "B-PER", "2": "I-PER", "3": "B-LOC", "4": "I-LOC"}
STRATEGIES = ["none", "simple", "first", "average", "max"]

FAMILIES = {
    "bert": ("BertConfig", "BertModel", "BertForSequenceClassification"),
    "roberta": ("RobertaConfig", "RobertaModel", "RobertaForSequenceClassification"),
    "distilbert": ("DistilBertConfig", "DistilBertModel", "DistilBertForSequenceClassification"),
    "electra": ("ElectraConfig", "ElectraModel", "ElectraForSequenceClassification"),
    "modernbert": ("ModernBertConfig", "ModernBertModel", "ModernBertForSequenceClassification"),
    "mpnet": ("MPNetConfig", "MPNetModel", "MPNetForSequenceClassification"),
    "nomic_bert": ("NomicBertConfig", "NomicBertModel"),
}
# Families that are also asked about LONG.
BY_DISTANCE = ("mpnet", "nomic_bert")


def fnv1a(text: str) -> int:
    """The 64-bit FNV-1a hash of a tensor's name."""
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = ((value ^ byte) * 0x100000001B3) & (2**64 - 1)
    return value


def elements(name: str, count: int) -> np.ndarray:
    """The first values of a tensor, before any scale: between -1 and 1."""
    with np.errstate(over="ignore"):
        steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = np.uint64(SEED ^ fnv1a(name)) + steps
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - np.float32(1)


def value(name: str, shape: torch.Size) -> torch.Tensor:
    """A whole tensor by the recipe of its name."""
    if name.endswith("norm.weight") or name.endswith("LayerNorm.weight"):
        return torch.ones(shape)
    flat = elements(name, int(np.prod(shape)))
    if name.endswith(".bias"):
        flat = flat * np.float32(BIAS_SCALE)
    else:
        flat = flat * (np.float32(SCALE) / np.sqrt(np.float32(shape[-1])))
    return torch.from_numpy(flat.astype(np.float32)).reshape(shape)


def config(family: str, labels: int, keys: dict) -> transformers.PretrainedConfig:
    """The configuration that `SeededCheckpoint` writes."""
    positions = POSITIONS + {"roberta": 1, "mpnet": 2}.get(family, 0)
    common = {"vocab_size": len(VOCABULARY), "max_position_embeddings": positions, "pad_token_id": 0, **keys}
    if labels:
        common["num_labels"] = labels
    if family == "distilbert":
        own = {"dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": INNER, "activation": "gelu"}
    elif family == "modernbert":
        # The first layer sees the whole text, the second three positions on either side.
        own = {
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "intermediate_size": INNER,
            "global_attn_every_n_layers": 2,
            "local_attention": 6,
        }
    else:
        own = {
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "intermediate_size": INNER,
            "hidden_act": "silu" if family == "nomic_bert" else "gelu",
            "layer_norm_eps": 1e-12,
        }
        if family != "mpnet":
            own["type_vocab_size"] = 1 if family == "roberta" else 2
        if family == "electra":
            own["embedding_size"] = WIDTH // 2
        if family == "nomic_bert":
            own["rope_parameters"] = {"rope_type": "default", "rope_theta": 1000.0}
    return getattr(transformers, FAMILIES[family][0])(**common, **own)


def model(family: str, labels: int, keys: dict) -> torch.nn.Module:
    """The model with seeded values: those of the file's names, which the classes of the library have."""
    name = keys.get("architectures", [FAMILIES[family][2 if labels else 1]])[0]
    made = getattr(transformers, name)(config(family, labels, keys)).eval()
    with torch.no_grad():
        for tensor_name, tensor in made.named_parameters():
            tensor.copy_(value(tensor_name, tensor.shape))
    return made


def ids_of(text: str) -> list[int]:
    """The ids of the words of a text."""
    return [VOCABULARY.index(word) for word in text.split()]


def single(text: str) -> tuple[list[int], list[int]]:
    """The ids of a text, and its token types."""
    ids = [VOCABULARY.index("[CLS]"), *ids_of(text), VOCABULARY.index("[SEP]")]
    return ids, [0] * len(ids)


def pair(first: str, second: str) -> tuple[list[int], list[int]]:
    """The ids of two texts, and their token types."""
    ids, types = single(first)
    rest = [*ids_of(second), VOCABULARY.index("[SEP]")]
    return ids + rest, types + [1] * len(rest)


@torch.inference_mode()
def run(made: torch.nn.Module, family: str, encoded: tuple[list[int], list[int]]) -> torch.Tensor:
    """The logits of one text, or the mean of its last rows divided by its length."""
    ids, types = (torch.tensor([row]) for row in encoded)
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family in ("bert", "electra", "nomic_bert"):
        arguments["token_type_ids"] = types
    answer = made(**arguments)
    if hasattr(answer, "logits"):
        return answer.logits[0]
    mean = answer.last_hidden_state[0].mean(0)
    return mean / mean.norm()


def rounded(tensor: torch.Tensor) -> list[float]:
    """The values as they are stored."""
    return [round(float(one), 6) for one in tensor]


def case(family: str, labels: int, keys: dict) -> dict:
    """What one seeded checkpoint answers."""
    made = model(family, labels, keys)
    made_case = {"family": family, "labels": labels, "keys": keys}
    if labels == 1 and not keys:
        made_case["pairs"] = [
            {
                "first": first,
                "second": second,
                "ids": pair(first, second)[0],
                "values": rounded(run(made, family, pair(first, second))),
            }
            for first, second in PAIRS
        ]
    else:
        made_case["texts"] = [
            {"text": text, "ids": single(text)[0], "values": rounded(run(made, family, single(text)))}
            for text in (TEXTS + [LONG] if family in BY_DISTANCE else TEXTS)
        ]
    return made_case


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """The tokenizer of `SeededEncoder`."""
    ids = {word: index for index, word in enumerate(VOCABULARY)}
    word_piece = tokenizers.models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100)
    own = tokenizers.Tokenizer(word_piece)
    own.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    own.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    own.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])]
    )
    own.add_special_tokens(SPECIAL)
    names = ["pad_token", "unk_token", "cls_token", "sep_token", "mask_token"]
    special = dict(zip(names, SPECIAL, strict=True))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=own, **special)


def token_case(family: str) -> dict:
    """What a seeded model that labels tokens answers: logits, and of BERT the entities of the pipeline."""
    name = FAMILIES[family][2].replace("ForSequenceClassification", "ForTokenClassification")
    keys = {"architectures": [name], "id2label": TOKEN_LABELS}
    made, own = model(family, len(TOKEN_LABELS), keys), tokenizer()
    texts = []
    for text in TOKEN_TEXTS:
        ids = own(text)["input_ids"]
        if family == "mpnet" and ids.count(1):
            # Its classes take the id 1 for padding, whatever the configuration says; here it is [UNK].
            continue
        logits = run(made, family, (ids, [0] * len(ids)))
        texts.append({"text": text, "ids": ids, "values": rounded(logits.flatten())})
        if family == "bert" and text:
            texts[-1]["entities"] = {word: entities(made, own, text, word) for word in STRATEGIES}
    return {"family": family, "labels": len(TOKEN_LABELS), "keys": keys, "texts": texts}


def entities(
    made: torch.nn.Module, own: transformers.PreTrainedTokenizerFast, text: str, strategy: str
) -> list[dict]:
    """The answer of the library's pipeline."""
    asked = transformers.pipeline(
        "token-classification", model=made, tokenizer=own, aggregation_strategy=strategy, device="cpu"
    )
    return [{**one, "score": round(float(one["score"]), 6)} for one in asked(text)]


# What a spam classifier is asked: clear cases of both kinds, and texts at the edges.
MAILS = [
    "Congratulations! You have WON a $1,000 gift card. Click http://win.example now, limited offer!!!",
    "Hi Anna, are we still on for the review on Thursday? I attached the minutes of the last meeting.",
    "The patch fixes the race in the scheduler; please rebase on master before you push.",
    "Lose 30 pounds in 30 days, guaranteed. No prescription needed. Order today and save 80%",
    "",
    "ok",
    "Прошу подтвердить получение документов до пятницы.",
    "cheap meds " * 300,
]


@torch.inference_mode()
def classified(folder: pathlib.Path) -> dict:
    """What a real classifier answers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    made = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    items = []
    for text in MAILS:
        encoded = tokenizer(text, truncation=True, max_length=512, return_tensors="pt")
        logits = made(**encoded).logits[0]
        items.append(
            {
                "text": text,
                "ids": encoded.input_ids[0].tolist(),
                "logits": rounded(logits),
                "scores": rounded(logits.softmax(0)),
            }
        )
    labels = [made.config.id2label[index] for index in range(made.config.num_labels)]
    return {"labels": labels, "items": items}


def main() -> None:
    """Writes the files."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--out", type=pathlib.Path, required=True, help="the JSON file to write")
    options.add_argument("--classifier", type=pathlib.Path, help="the folder of a spam classifier to ask")
    options.add_argument("--classifier-out", type=pathlib.Path, help="the JSON file with its answers")
    given = options.parse_args()
    torch.set_num_threads(1)
    heads = [(0, {}), (3, {"problem_type": "multi_label_classification"}), (1, {})]
    # Families without a class with a head embed only.
    cases = [
        case(family, labels, keys)
        for family, classes in FAMILIES.items()
        for labels, keys in (heads if len(classes) == 3 else heads[:1])
    ]
    mean = {"problem_type": "multi_label_classification", "classifier_pooling": "mean"}
    cases.append(case("modernbert", 3, mean))
    with_heads = [family for family, classes in FAMILIES.items() if len(classes) == 3]
    tokens = ",\n".join(json.dumps(token_case(family), separators=(",", ":")) for family in with_heads)
    made_with = (
        f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}, float32; "
        "recipe: e2e/reference/heads.py"
    )
    lines = ",\n".join(json.dumps(one, separators=(",", ":")) for one in cases)
    head = f'{{"made_with": {json.dumps(made_with)},\n"seed": {SEED},\n"cases": [\n'
    given.out.write_text(f'{head}{lines}\n],\n"tokens": [\n{tokens}\n]}}\n')
    print(f"{len(cases)} checkpoints, and {len(with_heads)} that label tokens")
    if given.classifier:
        answers = {"made_with": made_with, **classified(given.classifier)}
        text = json.dumps(answers, ensure_ascii=False, separators=(",", ":"))
        given.classifier_out.write_text(text.replace('{"text"', '\n{"text"') + "\n")


if __name__ == "__main__":
    main()
