#!/usr/bin/env python3
"""Writes digests of the ids that the tokenizers library gives for 10,000 texts, for every kind of tokenizer.

The texts come from a seeded sequence that runtime/model/src/tokenizer/digests.rs repeats: words of many
scripts, code, runs of white space, emoji, special tokens spelled out, bytes that are no UTF-8. Small
tokenizers of each kind are trained here and stored, because a run of another version may train others; with
--keep the stored ones are used. Those of real models come from the files in the folder of test models.
GGUF files are parsed here, and their tokenizers are built from the expressions that the published
tokenizer.json of each family has. The package tokenizers is needed, no other.
"""

import argparse
import hashlib
import json
import pathlib
import struct
import sys

import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors, trainers
from tokenizers import pre_tokenizers as pre

TEXTS, PER_DIGEST, SEED, MASK = 10_000, 1_000, 16, (1 << 64) - 1


class Texts:
    """The texts of a seeded sequence."""

    def __init__(self, fragments):
        self.state, self.fragments = SEED, fragments

    def below(self, count):
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return (z ^ (z >> 31)) % count

    def pick(self, name):
        entries = self.fragments[name]
        return entries[self.below(len(entries))]

    def many(self, most, make):
        return "".join(make() for _ in range(1 + self.below(most)))

    def code_point(self):
        first, last = self.pick("blocks")
        return chr(first + self.below(last - first + 1))

    def part(self):
        kind = self.below(10)
        if kind == 0:
            return (" " if self.below(2) == 1 else "") + self.pick("words")
        if kind == 1:
            return self.many(6, lambda: self.pick("spaces"))
        if kind == 2:
            return self.many(6, self.code_point)
        if kind == 3:
            return self.pick("emoji")
        if kind == 4:
            return self.pick("code")
        if kind == 5:
            return self.many(12, lambda: chr(48 + self.below(10)))
        if kind == 6:
            return self.pick("special")
        if kind == 7:
            return bytes(self.below(256) for _ in range(1 + self.below(5)))
        if kind == 8:
            return self.many(5, lambda: self.pick("punctuation"))
        return chr(97 + self.below(26)) + self.many(3, lambda: chr(0x300 + self.below(0x70)))

    def text(self):
        parts = [self.part() for _ in range(1 + self.below(8))]
        data = b"".join(part if isinstance(part, bytes) else part.encode() for part in parts)
        return data.decode("utf-8", "replace")


def digests(tokenizer, texts, special):
    """One digest for every thousand texts."""
    found = []
    for first in range(0, len(texts), PER_DIGEST):
        digest = hashlib.sha256()
        for encoded in tokenizer.encode_batch(texts[first : first + PER_DIGEST], add_special_tokens=special):
            ids = encoded.ids
            digest.update(struct.pack(f"<{1 + len(ids)}I", len(ids), *ids))
        found.append(digest.hexdigest())
    return found


CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# The expressions of the published tokenizers, by the name that GGUF files have for them.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
MARK = r"[^\r\n\p{L}\p{N}]?"
TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT4O = rf"{MARK}{UPPER}*{LOWER}+{ENDING}|{MARK}{UPPER}+{LOWER}*{ENDING}|\p{{N}}{{1,3}}|{TAIL}"
TEKKEN = rf"{MARK}{UPPER}*{LOWER}+|{MARK}{UPPER}+{LOWER}*|\p{{N}}|{TAIL}"
# Letters with two cases, as the expression of DeepSeek LLM lists them.
CASED_RANGES = """
41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A
38C 38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF
1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D
1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4
1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 212A-212D 212F-2134 2139 213C-213F
2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D A680-A69B A722-A76F
A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3
104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943
"""
CASED = "".join("-".join(chr(int(end, 16)) for end in entry.split("-")) for entry in CASED_RANGES.split())
DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)


def at(expression):
    return pre.Split(Regex(expression), "isolated")


def words():
    """The expression of GPT-2."""
    return pre.ByteLevel(add_prefix_space=False, use_regex=True)


def splits(name):
    """The steps that cut a text; those that end in bytes need no further one."""
    three = at("[0-9][0-9][0-9]")
    ideographs = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
    return {
        "default": lambda: [at(r"[\p{P}\$\+<=>\^~\|]+"), words(), at(r"\p{N}+"), three],
        "gpt-2": lambda: [words()],
        "mpt": lambda: [words()],
        "olmo": lambda: [words()],
        "smollm": lambda: [pre.Digits(individual_digits=True), words()],
        "starcoder": lambda: [pre.Digits(individual_digits=True), words()],
        "qwen2": lambda: [at(QWEN2)],
        "llama-bpe": lambda: [at(LLAMA3)],
        "llama3": lambda: [at(LLAMA3)],
        "dbrx": lambda: [at(LLAMA3)],
        "gpt-4o": lambda: [at(GPT4O)],
        "tekken": lambda: [at(TEKKEN)],
        "falcon": lambda: [at(r"[\p{P}\$\+<=>\^~\|`]+"), words(), three],
        "deepseek-llm": lambda: [
            at("[\r\n]"),
            at(rf"\s?[{CASED}]+"),
            at("\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"),
            at(r"\s+$"),
            at(ideographs),
            at(r"\p{N}+"),
        ],
        "deepseek-coder": lambda: [
            at("[\r\n]"),
            at(r"\s?\p{L}+"),
            at(r"\s?\p{P}+"),
            at(ideographs),
            at(r"\p{N}"),
        ],
        "deepseek-v3": lambda: [
            at(r"\p{N}{1,3}"),
            at("[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"),
            at(DEEPSEEK3),
        ],
    }[name]()


SPLITS = [
    "default",
    "deepseek-llm",
    "gpt-2",
    "mpt",
    "olmo",
    "smollm",
    "starcoder",
    "qwen2",
    "llama-bpe",
    "llama3",
    "dbrx",
    "gpt-4o",
    "tekken",
    "falcon",
    "deepseek-coder",
    "deepseek-v3",
]
KEEPS_TOKENS = ["llama-bpe", "llama3", "tekken"]


def cut_in(steps):
    ends = any(type(step).__name__ == "ByteLevel" for step in steps[-1:])
    bytes_only = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    # The bytes come last: a cut of GPT-2 that is followed by others has to keep characters.
    if ends:
        return pre.Sequence(steps)
    plain = [at(GPT2) if type(step).__name__ == "ByteLevel" else step for step in steps]
    return pre.Sequence([*plain, bytes_only])


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def byte_level(vocab, merges, specials, name):
    """A byte-level tokenizer whose file names this cut."""
    model = models.BPE(vocab=vocab, merges=merges, ignore_merges=name in KEEPS_TOKENS)
    made = Tokenizer(model)
    if name == "qwen2":
        made.normalizer = normalizers.NFC()
    made.pre_tokenizer = cut_in(splits(name))
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    return made


class Gguf:
    """The keys of a GGUF file."""

    KINDS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

    def __init__(self, path):
        self.keys = {}
        with path.open("rb") as self.file:
            magic, _, _, count = struct.unpack("<4sIQQ", self.file.read(24))
            if magic != b"GGUF":
                sys.exit(f"{path} is not a GGUF file")
            for _ in range(count):
                key = self.text()
                self.keys[key] = self.value(*struct.unpack("<I", self.file.read(4)))

    def text(self):
        (length,) = struct.unpack("<Q", self.file.read(8))
        return self.file.read(length).decode()

    def value(self, kind):
        if kind == 8:
            return self.text()
        if kind == 9:
            of, count = struct.unpack("<IQ", self.file.read(12))
            if of == 8:
                return [self.text() for _ in range(count)]
            form = f"<{count}{self.KINDS[of]}"
            return list(struct.unpack(form, self.file.read(struct.calcsize(form))))
        form = "<" + self.KINDS[kind]
        return struct.unpack(form, self.file.read(struct.calcsize(form)))[0]

    def tokenizer(self):
        get = lambda name: self.keys["tokenizer.ggml." + name]  # noqa: E731
        tokens, types = get("tokens"), get("token_type")
        specials = [token for token, kind in zip(tokens, types, strict=True) if kind in (3, 4) and token]
        vocab = {token: index for index, token in reversed(list(enumerate(tokens)))}
        if get("model") == "gpt2":
            merges = [tuple(merge.split(" ", 1)) for merge in get("merges")]
            return byte_level(vocab, merges, specials, get("pre"))
        return pieces(vocab, tokens, types, get("scores"), specials, self.keys)


def pieces(vocab, tokens, types, scores, specials, keys):
    """SentencePiece: a merge for every way to join two pieces to a third, the highest score first."""
    plain = {token for token, kind in zip(tokens, types, strict=True) if kind == 1}
    joins = []
    for token in plain:
        ways = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        ways = [(left, right) for left, right in ways if left in plain and right in plain]
        ways.sort(key=lambda way: (vocab[way[0]], vocab[way[1]]))
        joins += [(-scores[vocab[token]], vocab[token], *way) for way in ways]
    joins.sort(key=lambda join: (join[0], -len(join[2]), -len(join[3]), join[1]))
    unknown = tokens[keys["tokenizer.ggml.unknown_token_id"]]
    merges = [(left, right) for _, _, left, right in joins]
    made = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token=unknown)
    )
    steps = [normalizers.Replace(" ", "\u2581")]
    if keys.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend("\u2581"))
    made.normalizer = normalizers.Sequence(steps)
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    if keys.get("tokenizer.ggml.add_bos_token", True):
        begin = keys["tokenizer.ggml.bos_token_id"]
        made.post_processor = processors.TemplateProcessing(
            single=f"{tokens[begin]} $A", special_tokens=[(tokens[begin], begin)]
        )
    return made


def trained(texts):
    """Small tokenizers of each kind, by the names of their files."""
    byte = Tokenizer(models.BPE())
    byte.pre_tokenizer = words()
    byte.decoder = decoders.ByteLevel()
    byte.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=700, special_tokens=CONTROLS, initial_alphabet=pre.ByteLevel.alphabet()
        ),
    )
    space = "\u2581"
    spelled = [f"<0x{byte:02X}>" for byte in range(256)]
    piece = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    piece.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    piece.train_from_iterator(
        [text[:40] for text in texts],
        trainers.BpeTrainer(
            vocab_size=700, special_tokens=["<unk>", "<s>", "</s>", *spelled], limit_alphabet=120
        ),
    )
    piece = with_plain_bytes(piece)
    piece.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    word = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    word.normalizer = normalizers.BertNormalizer()
    word.pre_tokenizer = pre.BertPreTokenizer()
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    word.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=700, special_tokens=marks, limit_alphabet=200)
    )
    word.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(mark, word.token_to_id(mark)) for mark in ("[CLS]", "[SEP]")],
    )
    gram = Tokenizer(models.Unigram())
    gram.pre_tokenizer = pre.Metaspace()
    ends = ["<s>", "<pad>", "</s>", "<unk>"]
    gram.train_from_iterator(
        ["".join(c for c in text if c < "\u0250") for text in texts],
        trainers.UnigramTrainer(vocab_size=600, special_tokens=ends, unk_token="<unk>", max_piece_length=8),
    )
    gram.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[(end, gram.token_to_id(end)) for end in ("<s>", "</s>")],
    )
    return {"byte_level": byte, "pieces": piece, "word_piece": word, "unigram": gram}


def with_plain_bytes(made):
    """The same tokenizer, whose tokens for bytes are not found in texts."""
    content = json.loads(made.to_str())
    content["added_tokens"] = [
        token for token in content["added_tokens"] if not token["content"].startswith("<0x")
    ]
    return Tokenizer.from_str(json.dumps(content))


def models_of(folder):
    """The real tokenizers that are there, by the names of their files."""
    found = {}
    for path in sorted(folder.glob("*.gguf")):
        if "1.5B" not in path.name:
            found[path.name] = Gguf(path).tokenizer()
    for path in sorted(folder.glob("*/tokenizer.json")):
        made = Tokenizer.from_file(str(path))
        made.no_truncation()
        made.no_padding()
        found[f"{path.parent.name}/tokenizer.json"] = made
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=pathlib.Path, required=True, help="runtime/model/src/tokenizer/reference"
    )
    parser.add_argument("--models", type=pathlib.Path, required=True, help="the folder of the test models")
    parser.add_argument("--keep", action="store_true", help="use the trained tokenizers that are stored")
    arguments = parser.parse_args()
    source = Texts(json.loads((arguments.out / "fragments.json").read_text()))
    texts = [source.text() for _ in range(TEXTS)]
    if not arguments.keep:
        for name, made in trained(texts[:4000]).items():
            (arguments.out / f"{name}.json").write_text(made.to_str() + "\n")
    small = {
        name: Tokenizer.from_file(str(arguments.out / f"{name}.json"))
        for name in ["byte_level", "pieces", "word_piece", "unigram"]
    }
    written = {
        "made_with": {"tokenizers": tokenizers.__version__},
        "texts": hashlib.sha256("".join(texts).encode()).hexdigest(),
        "trained": {name: digests(made, texts, True) for name, made in small.items()},
    }
    bpe = json.loads(small["byte_level"].to_str())["model"]
    merges = [tuple(merge) for merge in bpe["merges"]]
    written["splits"] = {
        name: digests(byte_level(bpe["vocab"], merges, CONTROLS, name), texts, False) for name in SPLITS
    }
    written["models"] = {
        name: digests(made, texts, True) for name, made in models_of(arguments.models).items()
    }
    (arguments.out / "digests.json").write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
