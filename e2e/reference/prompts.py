"""Prompts whose greedy answers are kept as reference outputs.

Each one reaches a part of the tokenizer or of the forward pass that the others do not. A prompt is used as it
stands: special tokens spelled in it are recognised, no begin token is put in front, a final newline stays.
"""

LONG = """The lighthouse at the end of the northern pier was built by a family of masons who had never seen the sea. They
came down from the hills with two carts of pale stone, a drawing on oiled paper, and a letter from the harbour master
that promised them a house, a boat and one tenth of the light dues for twenty years. The first winter took the boat.
The second winter took the scaffold and half of the drawing. In the third spring the youngest daughter, who kept the
accounts, noticed that the tower leaned towards the town by the width of a hand, and that it leaned a little more on
every cold morning. She said nothing to the others. She bought a long cord and a lead weight, hung them from the
lamp room down to the cellar, and every evening for a year wrote down how far the weight stood from the middle of the
floor. When the harbour master at last came to see the work he had paid for, she laid the book in front of him. The
tower, she explained, did not lean at all. It was the pier that turned, slowly, as the tide filled and emptied the
old salt vaults beneath it, and the tower only showed what the ground was doing. He asked what would happen if nobody
did anything. She answered that within ten years the vaults would open, and that the pier, the light and the fish
market would go into the water together on some quiet night. He closed the book and asked how much it would cost to
fill the vaults with stone. The daughter had expected that question, and she"""

SYSTEM = "<|im_start|>system\nYou are a patient teacher who answers in one short sentence.<|im_end|>\n"


def user(text: str) -> str:
    """One user's turn in the model's chat format, ready for the answer."""
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


SMOLLM2 = [
    # Code with indentation: runs of blanks are single tokens.
    "fn largest(values: &[u32]) -> Option<u32> {\n    let mut best = None;\n    for value in values {\n",
    # Chat format with a system turn: special tokens inside the text.
    SYSTEM + user("Why does ice float on water?"),
    # Non-Latin scripts and emoji: several bytes a character, several tokens a character.
    "東京 means “eastern capital”, Москва is the capital of Россия, and 🦀🚀 stands for",
    # Numbers: every digit is a token of its own.
    "2, 4, 8, 16, 32, 64, 128, 256, 512, 1024,",
    # White space only at odd places: tabs, blank lines, runs of spaces, a newline at the end.
    "\tname\t  price\n\n\tbread\t   3.50\n\tmilk\t   1.20\n\n\n\tcheese   \t",
    # About three hundred tokens: more than one chunk of a chunked prefill.
    LONG,
    # Ends by itself within the limit: the end id is part of the greedy ids.
    user("What is the capital of France? Answer with one word."),
    # JSON: quotes and braces join into tokens.
    '{"name": "Ada Lovelace", "born": 1815, "fields": ["mathematics", "computing"], "known_for": "',
    # French: accents, elisions, a typographic apostrophe.
    "Il était une fois, dans un petit village près de la forêt, une vieille femme qui n’avait",
    # Punctuation and contractions: the pre-tokenizer's splitting rules.
    "\"Wait... what?!\" -- she'd said; they'll've gone (or haven't they?) & so: [1] {2} <3> #4 @5 *6* ~7~ --",
]

QWEN_SYSTEM = (
    "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
)

# Qwen2.5-Coder: a large vocabulary, biases, another splitting, another turning of heads.
QWEN2 = [
    # What it is made for: code in a chat, special tokens inside the text.
    QWEN_SYSTEM + user("Write a Python function that says whether a number is prime. Code only."),
    # Code that stops in the middle of a line; tabs.
    'package main\n\nimport "fmt"\n\nfunc main() {\n\tfor i := 0; i < 10; i++ {\n\t\tfmt.Println(',
    # Fill in the middle: special tokens that only this family has.
    "<|fim_prefix|>def add(a, b):\n    <|fim_suffix|>\n\nprint(add(1, 2))\n<|fim_middle|>",
    # Chinese, several characters in one token.
    "中国的首都是北京，日本的首都是",
    # Decomposed accents and Hangul, which the tokenizer composes, emoji, a joined family.
    "cafe\u0301 re\u0301sume\u0301 \u1112\u1161\u11ab\u1100\u1173\u11af 👩\u200d💻🦀 means",
    # Contractions in capitals, marks before words, line ends that stick to marks, blanks at line ends.
    "IT'S (they'LL) #include <stdio.h>;\r\n\r\n  x = y;  \n\n\t// It's",
    # Numbers: every digit is a token of its own.
    "SELECT id, total FROM orders WHERE total > 1000000 AND year IN (2023, 2024,",
    # A tool call in the model's own format: tokens that are special and have a text.
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\nThis call asks for',
    # About three hundred tokens: more than one chunk of a chunked prefill.
    LONG,
]

GEMMA3 = [
    "The capital of France is",
    # Indentation: runs of blanks are tokens of the file's own, which no merge makes.
    "fn largest(values: &[u32]) -> Option<u32> {\n    let mut best = None;\n    for value in values {\n",
    "東京 means “eastern capital”, Москва is the capital of Россия, and 🦀🚀 stands for",
    "2, 4, 8, 16, 32, 64, 128, 256, 512, 1024,",
    # Longer than the window of 512 tokens.
    LONG + " looked at the sea. " + LONG,
]

OF_ARCHITECTURE = {"llama": SMOLLM2, "qwen2": QWEN2, "gemma3_text": GEMMA3}
