"""Two hundred texts whose embeddings are kept as reference outputs.

The first five are the ones that the model's first check was made with. The others reach what sentences alone
do not: the tokenizer's cleaning and splitting, scripts that become unknown words or single characters, texts
that are cut, and lengths on both sides of the sizes that kernels work in.
"""

GIVEN = [
    "A cat sits on the mat.",
    "A kitten is resting on a rug.",
    "Quarterly revenue rose by ten percent.",
    "Zażółć gęślą jaźń — 日本語 😀",
    "the " * 300,
]

SENTENCES = [
    "How do I reset my password?",
    "The invoice is due at the end of the month.",
    "She walked home through the rain without an umbrella.",
    "Photosynthesis turns light into chemical energy.",
    "Our flight was cancelled because of fog.",
    "What time does the museum open on Sundays?",
    "The committee voted against the proposal.",
    "He plays the violin better than his teacher.",
    "Please restart the router and try again.",
    "Interest rates rose for the third time this year.",
    "The recipe needs two eggs and a pinch of salt.",
    "Whales are mammals, not fish.",
    "I would like a refund for my broken headphones.",
    "The treaty was signed in 1648.",
    "Memory safety bugs are a common cause of vulnerabilities.",
    "It isn't what you said; it's how you said it!",
    "Turn left after the bridge, then keep straight on.",
    "The patient complained of headache and nausea.",
    "A prime number has exactly two divisors.",
    "The novel's narrator can't be trusted.",
    "Why is the sky blue?",
    "They have been married for forty-three years.",
    "This film is a waste of time.",
    "This film is a delight from start to finish.",
    "The train to Edinburgh leaves from platform nine.",
    "Bees communicate by dancing.",
    "Sell the shares before the price falls.",
    "The server returned status 503 under load.",
    "Gravity bends light.",
    "Nobody expected the second earthquake.",
]

SCRIPTS = [
    "Die Würde des Menschen ist unantastbar.",
    "Où est la bibliothèque la plus proche ?",
    "¿Cuánto cuesta el billete de ida y vuelta?",
    "Świnoujście leży nad morzem.",
    "Příští stanice: Náměstí Míru.",
    "İstanbul'da hava bugün güzel.",
    "Москва — столица России.",
    "Η Αθήνα είναι η πρωτεύουσα της Ελλάδας.",
    "القاهرة عاصمة مصر.",
    "ירושלים היא עיר עתיקה.",
    "नई दिल्ली भारत की राजधानी है।",
    "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย",
    "東京は日本の首都です。",
    "北京是中华人民共和国的首都。",
    "서울은 대한민국의 수도이다.",
    "한글 자모",
    "ሰላም ለዓለም",
    "தமிழ் ஒரு பழமையான மொழி",
    "Tiếng Việt có nhiều dấu thanh.",
    "ქართული ანბანი",
    "English and 中文 and русский in one line",
    "cafe\u0301 and café are the same word",
    "ﬁne ligatures and ｆｕｌｌ　ｗｉｄｔｈ",
    "𝒎𝒂𝒕𝒉 𝔩𝔢𝔱𝔱𝔢𝔯𝔰",
    "ß ẞ ı İ ǅ ﬀ",
    "Zażółć gęślą jaźń",
    "æøå ÆØÅ þð ŁĐ",
    "٣٫١٤ and ３．１４",
    "„quotes“ «guillemets» ‘single’ “double” — dash… ellipsis",
    "a\u200bzero\u200cwidth\u200djoiners\ufeff",
]

SYMBOLS = [
    "🙂",
    "I ❤️ 🍕 and 🍣!!! 😂😂😂",
    "👩‍💻👨‍👩‍👧‍👦🏳️‍🌈🇨🇿",
    "→ ⇒ ∀x∈ℝ: x² ≥ 0 ∎",
    "€100 £20 ¥3000 ₿0.5",
    "½ ¼ ¾ ① Ⅷ ™ © ®",
    "♠♣♥♦ ♪♫ ☎ ✓ ✗",
    "!!!???...,,,;;;:::",
    "()[]{}<>/\\|",
    "@#$%^&*_+-=~`",
    "",
    " ",
    "\t\n\r\n   ",
    "\u00a0\u2003\u3000",
    "\x00\x01\x02control\x07characters\x7f",
    "\ufffd replacement",
    "a",
    "A",
    "I",
    ".",
    "[CLS] [SEP] [MASK] [PAD] [UNK]",
    "[mask] [ MASK ] x[SEP]y",
    "##ing ## # ###",
    "<s></s><|endoftext|>",
    "don't won't can't it's they'll I'd we've",
]

CODE = [
    'fn main() { println!("Hello, {}!", name); }',
    "for i in range(10):\n    print(i ** 2)\n",
    "SELECT name, COUNT(*) FROM users WHERE age > 30 GROUP BY name HAVING COUNT(*) > 1;",
    "const add = (a, b) => a + b; // arrow",
    "#include <stdio.h>\nint main(void) { return 0; }",
    "kubectl get pods -n kube-system --watch",
    "<div class=\"row\"><a href='/x?y=1&z=2'>link</a></div>",
    '{"id": 17, "tags": ["a", "b"], "nested": {"ok": true, "none": null}}',
    "https://example.com/path/to/page.html?query=value&other=1#fragment",
    "user.name+tag@example.co.uk",
    "2026-11-28T05:22:17.123456Z",
    "192.168.0.1:8080 ::1 fe80::1%eth0",
    "0xDEADBEEF 0b1010 1e-10 -273.15 1,234,567.89",
    "C:\\Users\\me\\file.txt ~/.cache/models",
    "camelCaseIdentifier snake_case_identifier SCREAMING_CASE kebab-case",
    "error[E0308]: mismatched types --> src/main.rs:4:18",
    'let re = r"(?i)^[a-z]+\\d{2,}$";',
    "sha256:53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "SGVsbG8gd29ybGQhIFRoaXMgaXMgYmFzZTY0Lg==",
    "diff --git a/x b/x\n@@ -1,2 +1,3 @@\n-old\n+new",
    "git rebase --interactive HEAD~3 && git push --force-with-lease",
    "\\frac{d}{dx} \\int_0^x f(t)\\,dt = f(x)",
    "apiVersion: v1\nkind: Pod\nmetadata:\n  name: p\n",
    "SUBJECT: RE: FW: URGENT!!! 100% FREE $$$",
    "if (x == NULL || *x <= 0) { goto fail; }",
]

WORDS = [
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
    "student",
    "group",
    "country",
    "problem",
]


def lengths() -> list[str]:
    """Texts of nearly every length at which something changes: tiles of 16, the cut at 256, both ways
    beyond.
    """
    counts = [
        1,
        2,
        3,
        5,
        7,
        13,
        14,
        15,
        17,
        29,
        30,
        31,
        45,
        46,
        47,
        61,
        62,
        63,
        93,
        94,
        95,
        125,
        126,
        127,
        128,
        129,
        190,
        191,
    ]
    counts += [250, 252, 253, 254, 255, 256, 257, 260, 300, 400, 511, 513, 900]
    return [" ".join(WORDS[(count + 7 * i) % len(WORDS)] for i in range(count)) for count in counts]


LONG = [
    "a" * 99,
    "a" * 100,
    "a" * 101,
    "supercalifragilisticexpialidocious" * 2,
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "日本語" * 120,
    "🙂 " * 130,
    (
        "The harbour master closed the book and asked how much it would cost to fill the vaults with stone. "
        * 20
    ).strip(),
    "word\n" * 270,
    "1234567890 " * 60,
]


def texts() -> list[str]:
    """All of them, in the order of the file."""
    first = GIVEN + SENTENCES + SCRIPTS + SYMBOLS + CODE + lengths() + LONG
    # Pairs of what came before, in capitals and with odd blanks, until there are two hundred.
    both = SENTENCES + SCRIPTS
    count = 200 - len(first)
    more = [f"  {both[i].upper()}\t\n{both[(i * 7 + 31) % len(both)]} " for i in range(count)]
    return first + more
