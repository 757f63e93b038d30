#!/usr/bin/env python3
"""Makes reference outputs of small seeded decoders that read whole texts: one that embeds, two that rank.

The models are those of `SeededReader` in runtime/model/src/seeded: the weights of the seeded Qwen3 in
`families.py`, and a tokenizer of bytes with the words "yes" and "no". The recipe of the answers is that of
the cards of Qwen3-Embedding and Qwen3-Reranker: the last row of the text with an end token, and the softmax
over the logits of "no" and "yes" after the prompt. Only the answers are stored.
"""

import argparse
import json
import pathlib

import families
import numpy as np
import tokenizers
import torch
import transformers

MERGES = [["y", "e"], ["ye", "s"], ["n", "o"]]
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
END, LONGEST = 0, 512

TEXTS = ["hello world", "", "yes or no", "The cat sat on the mat. " * 12, "naïve 🦀", "word " * 150]
PAIRS = [
    ("the cat", "hello world"),
    ("what is a crab?", "A crab is an animal with ten legs."),
    ("", ""),
    ("long", "The cat sat on the mat. " * 40),
]

BEFORE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the "
    'Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
AFTER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


def byte_characters() -> list[str]:
    """The character that stands for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    characters, further = [], 0x100
    for byte in range(256):
        characters.append(chr(byte) if byte in printable else chr(further))
        further += byte not in printable
    return characters


def tokenizer() -> tokenizers.Tokenizer:
    """The tokenizer of the seeded models, without what it puts after a text."""
    words = [*CONTROL, *byte_characters(), *("".join(pair) for pair in MERGES)]
    vocabulary = {word: index for index, word in enumerate(words)}
    merges = [tuple(pair) for pair in MERGES]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    made.normalizer = tokenizers.normalizers.NFC()
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(CONTROL)
    return made


def filled(made: torch.nn.Module) -> torch.nn.Module:
    """The model with its seeded values."""
    with torch.no_grad():
        for name, target in made.named_parameters():
            if name == "score.weight":
                own = families.matrix("cls.output.weight", *target.shape)
            else:
                own = families.values(families.gguf_name(name, False), list(target.shape), False)
            target.copy_(torch.from_numpy(np.ascontiguousarray(own)))
    return made.eval()


def rounded(values: torch.Tensor) -> list[float]:
    """The values as they are stored."""
    return [float(f"{float(one):.7g}") for one in values]


@torch.inference_mode()
def embeddings(encoder: tokenizers.Tokenizer, config: transformers.Qwen3Config) -> list[dict]:
    """The last row of each text, divided by its length."""
    made = filled(transformers.Qwen3ForCausalLM(config)).model
    items = []
    for text in TEXTS:
        ids = [*encoder.encode(text, add_special_tokens=False).ids[: LONGEST - 1], END]
        row = made(torch.tensor([ids])).last_hidden_state[0, -1]
        items.append({"text": text, "ids": ids, "values": rounded(row / row.norm())})
    return items


def pair_ids(encoder: tokenizers.Tokenizer, query: str, document: str) -> list[int]:
    """The ids of a query and a document in the published prompt."""
    plain = [encoder.encode(text, add_special_tokens=False).ids for text in (BEFORE, AFTER)]
    body = f"<Instruct>: {INSTRUCTION}\n<Query>: {query}\n<Document>: {document}"
    room = LONGEST - sum(len(ids) for ids in plain)
    return plain[0] + encoder.encode(body, add_special_tokens=False).ids[:room] + plain[1]


@torch.inference_mode()
def scores(encoder: tokenizers.Tokenizer, config: transformers.Qwen3Config) -> list[dict]:
    """What the two models that rank answer."""
    by_words = filled(transformers.Qwen3ForCausalLM(config))
    by_projection = filled(transformers.Qwen3ForSequenceClassification(config))
    yes, no = encoder.token_to_id("yes"), encoder.token_to_id("no")
    items = []
    for query, document in PAIRS:
        ids = pair_ids(encoder, query, document)
        last = by_words(torch.tensor([ids])).logits[0, -1]
        score = torch.stack([last[no], last[yes]]).log_softmax(0)[1].exp()
        logit = by_projection(torch.tensor([ids])).logits[0]
        items.append(
            {
                "query": query,
                "document": document,
                "ids": ids,
                "score": rounded(score[None])[0],
                "projected": rounded(logit)[0],
            }
        )
    return items


def main() -> None:
    """Writes the file."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", type=pathlib.Path, required=True, help="the JSON file to write")
    given = options.parse_args()
    torch.set_num_threads(1)
    sizes = families.common(
        hidden_size=families.NARROW,
        head_dim=families.HEAD_DIM,
        max_position_embeddings=LONGEST,
        num_labels=1,
        pad_token_id=0,
    )
    config = transformers.Qwen3Config(**sizes, **families.rope())
    config._attn_implementation = "eager"
    encoder = tokenizer()
    made_with = (
        f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}, float32; "
        "recipe: e2e/reference/readers.py"
    )
    answers = {"made_with": made_with, "texts": embeddings(encoder, config), "pairs": scores(encoder, config)}
    text = json.dumps(answers, ensure_ascii=False, separators=(",", ":"))
    given.out.write_text(text.replace('{"text"', '\n{"text"').replace('{"query"', '\n{"query"') + "\n")
    print(f"{len(TEXTS)} texts, {len(PAIRS)} pairs")


if __name__ == "__main__":
    main()
