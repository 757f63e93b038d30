//! The rules by which GGUF files of byte-level BPE say how texts are cut before merging: a closed table of
//! the names under `tokenizer.ggml.pre`, with the expressions of llama.cpp (`llama-vocab.cpp`).

use super::{PRE, unsupported};
use crate::error::TokenizerProblem;
use tokenizers::SplitDelimiterBehavior;
use tokenizers::normalizers::{NFC, NormalizerWrapper};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};

/// Ends a document of Qwen2. Files name one end token, that of a turn; the models produce this one as well,
/// and their own generation settings name both.
const END_OF_TEXT: &str = "<|endoftext|>";

/// Qwen2: contractions, words with one mark or space before them, single digits, runs of marks, line ends,
/// white space.
const QWEN2: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
    r"|[^\r\n\p{L}\p{N}]?\p{L}+",
    r"|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
);

/// Llama 3: the same with up to three digits.
const LLAMA3: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
    r"|[^\r\n\p{L}\p{N}]?\p{L}+",
    r"|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
);

/// GPT-4o: words end where lower case is followed by upper case, contractions belong to their words.
const GPT4O: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
);

/// Mistral's Tekken: the same with single digits and without contractions.
const TEKKEN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
);

/// Falcon: runs of punctuation by themselves, before the expression of GPT-2.
const FALCON_MARKS: &str = r"[\p{P}\$\+<=>\^~\|`]+";
/// The same without the backtick, where a file names no rule.
const DEFAULT_MARKS: &str = r"[\p{P}\$\+<=>\^~\|]+";
/// Digits in groups of three.
const THREE_DIGITS: &str = "[0-9][0-9][0-9]";
/// Runs of digits.
const DIGITS: &str = r"\p{N}+";

/// DeepSeek LLM: letters of the scripts with two cases, with one space before them.
const DEEPSEEK_LETTERS: &str = concat!(
    r"\s?[",
    r"\u{41}-\u{5a}\u{61}-\u{7a}\u{b5}\u{c0}-\u{d6}\u{d8}-\u{f6}\u{f8}-\u{1ba}\u{1bc}-\u{1bf}",
    r"\u{1c4}-\u{293}\u{295}-\u{2af}\u{370}-\u{373}\u{376}\u{377}\u{37b}-\u{37d}\u{37f}\u{386}",
    r"\u{388}-\u{38a}\u{38c}\u{38e}-\u{3a1}\u{3a3}-\u{3f5}\u{3f7}-\u{481}\u{48a}-\u{52f}",
    r"\u{531}-\u{556}\u{10a0}-\u{10c5}\u{13a0}-\u{13f5}\u{13f8}-\u{13fd}\u{1c90}-\u{1cba}",
    r"\u{1cbd}-\u{1cbf}\u{1d00}-\u{1d2b}\u{1d6b}-\u{1d77}\u{1d79}-\u{1d9a}\u{1e00}-\u{1f15}",
    r"\u{1f18}-\u{1f1d}\u{1f20}-\u{1f45}\u{1f48}-\u{1f4d}\u{1f50}-\u{1f57}\u{1f59}\u{1f5b}\u{1f5d}",
    r"\u{1f5f}-\u{1f7d}\u{1f80}-\u{1fb4}\u{1fb6}-\u{1fbc}\u{1fbe}\u{1fc2}-\u{1fc4}",
    r"\u{1fc6}-\u{1fcc}\u{1fd0}-\u{1fd3}\u{1fd6}-\u{1fdb}\u{1fe0}-\u{1fec}\u{1ff2}-\u{1ff4}",
    r"\u{1ff6}-\u{1ffc}\u{2102}\u{2107}\u{210a}-\u{2113}\u{2115}\u{2119}-\u{211d}\u{2124}\u{2126}",
    r"\u{2128}\u{212a}-\u{212d}\u{212f}-\u{2134}\u{2139}\u{213c}-\u{213f}\u{2145}-\u{2149}\u{214e}",
    r"\u{2183}\u{2184}\u{2c00}-\u{2c7b}\u{2c7e}-\u{2ce4}\u{2ceb}-\u{2cee}\u{2cf2}\u{2cf3}",
    r"\u{a640}-\u{a66d}\u{a680}-\u{a69b}\u{a722}-\u{a76f}\u{a771}-\u{a787}\u{a78b}-\u{a78e}",
    r"\u{ab70}-\u{abbf}\u{fb00}-\u{fb06}\u{fb13}-\u{fb17}\u{ff21}-\u{ff3a}\u{ff41}-\u{ff5a}",
    r"\u{10400}-\u{1044f}\u{104b0}-\u{104d3}\u{104d8}-\u{104fb}\u{10c80}-\u{10cb2}",
    r"\u{10cc0}-\u{10cf2}\u{118a0}-\u{118df}\u{1e900}-\u{1e943}",
    "]+",
);
/// DeepSeek LLM: runs of ASCII from `!` on but digits, of their wide forms, and of quotation marks.
const DEEPSEEK_MARKS: &str =
    r"\s?[!-/:-~\u{ff01}-\u{ff0f}\u{ff1a}-\u{ff5e}\u{2018}-\u{201f}\u{3000}-\u{3002}]+";
/// DeepSeek: scripts without spaces between words.
const DEEPSEEK_IDEOGRAPHS: &str = r"[\u{4e00}-\u{9fa5}\u{800}-\u{4e00}\u{ac00}-\u{d7ff}]+";
/// Line ends, one by one.
const LINE_ENDS: &str = "[\r\n]";

/// DeepSeek V3: ideographs and kana.
const DEEPSEEK3_IDEOGRAPHS: &str = r"[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+";
/// DeepSeek V3: words with one mark before them, runs of marks, line ends, white space.
const DEEPSEEK3: &str = concat!(
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"##,
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
    r"| ?[\p{P}\p{S}]+[\r\n]*",
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
);

/// A step of a rule.
#[derive(Clone, Copy)]
enum Cut {
    /// At the matches of an expression.
    At(&'static str),
    /// Digits one by one.
    SingleDigits,
    /// The expression of GPT-2.
    Gpt2,
}

/// A rule of the table.
struct Rule {
    names: &'static [&'static str],
    cuts: &'static [Cut],
    /// Whether characters are composed first.
    composes: bool,
    /// Whether a piece that is a token stays whole, whatever the merges make of it.
    keeps_tokens: bool,
    end: Option<&'static str>,
}

const PLAIN: Rule = Rule { names: &[], cuts: &[], composes: false, keeps_tokens: false, end: None };

static RULES: [Rule; 12] = [
    Rule {
        names: &["default"],
        cuts: &[Cut::At(DEFAULT_MARKS), Cut::Gpt2, Cut::At(DIGITS), Cut::At(THREE_DIGITS)],
        ..PLAIN
    },
    Rule { names: &["gpt-2", "mpt", "olmo", "phi-2", "jais", "trillion"], cuts: &[Cut::Gpt2], ..PLAIN },
    Rule {
        names: &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"],
        cuts: &[Cut::SingleDigits, Cut::Gpt2],
        ..PLAIN
    },
    Rule {
        names: &["qwen2", "deepseek-r1-qwen", "megrez"],
        cuts: &[Cut::At(QWEN2)],
        composes: true,
        end: Some(END_OF_TEXT),
        ..PLAIN
    },
    Rule {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"],
        cuts: &[Cut::At(LLAMA3)],
        keeps_tokens: true,
        ..PLAIN
    },
    Rule { names: &["dbrx", "smaug-bpe"], cuts: &[Cut::At(LLAMA3)], ..PLAIN },
    Rule { names: &["gpt-4o", "llama4"], cuts: &[Cut::At(GPT4O)], ..PLAIN },
    Rule { names: &["tekken"], cuts: &[Cut::At(TEKKEN)], keeps_tokens: true, ..PLAIN },
    Rule {
        names: &["deepseek-llm"],
        cuts: &[
            Cut::At(LINE_ENDS),
            Cut::At(DEEPSEEK_LETTERS),
            Cut::At(DEEPSEEK_MARKS),
            Cut::At(r"\s+$"),
            Cut::At(DEEPSEEK_IDEOGRAPHS),
            Cut::At(DIGITS),
        ],
        ..PLAIN
    },
    Rule {
        names: &["deepseek-coder"],
        cuts: &[
            Cut::At(LINE_ENDS),
            Cut::At(r"\s?\p{L}+"),
            Cut::At(r"\s?\p{P}+"),
            Cut::At(DEEPSEEK_IDEOGRAPHS),
            Cut::At(r"\p{N}"),
        ],
        ..PLAIN
    },
    Rule {
        names: &["deepseek-v3"],
        cuts: &[Cut::At(r"\p{N}{1,3}"), Cut::At(DEEPSEEK3_IDEOGRAPHS), Cut::At(DEEPSEEK3)],
        ..PLAIN
    },
    Rule { names: &["falcon"], cuts: &[Cut::At(FALCON_MARKS), Cut::Gpt2, Cut::At(THREE_DIGITS)], ..PLAIN },
];

const SUPPORTED: &str = "default, gpt-2, mpt, olmo, phi-2, jais, trillion, smollm, starcoder, refact, command-r, \
     codeshell, exaone, qwen2, deepseek-r1-qwen, megrez, llama-bpe, llama3, llama-v3, falcon3, pixtral, dbrx, \
     smaug-bpe, gpt-4o, llama4, tekken, falcon, deepseek-llm, deepseek-coder, deepseek-v3";

/// What happens to a text before merging.
pub(super) struct SplitRule {
    pub(super) normaliser: Option<NormalizerWrapper>,
    pub(super) cut: PreTokenizerWrapper,
    /// Whether a piece that is a token stays whole, whatever the merges make of it.
    pub(super) keeps_tokens: bool,
    /// A token that ends texts although the file does not name it.
    pub(super) end: Option<&'static str>,
}

/// The rule with that name in the GGUF key. No step adds a space.
pub(super) fn split_rule(name: &str) -> Result<SplitRule, TokenizerProblem> {
    let Some(rule) = RULES.iter().find(|rule| rule.names.contains(&name)) else {
        return Err(unsupported(PRE, name, SUPPORTED));
    };
    let mut steps = rule.cuts.iter().map(|cut| step(*cut)).collect::<Result<Vec<_>, _>>()?;
    // Each piece as bytes.
    steps.push(ByteLevel::new(false, true, false).into());
    let cut = Sequence::new(steps).into();
    let normaliser = rule.composes.then(|| NFC.into());
    Ok(SplitRule { normaliser, cut, keeps_tokens: rule.keeps_tokens, end: rule.end })
}

/// The expression of GPT-2, where other cuts follow it.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

fn step(cut: Cut) -> Result<PreTokenizerWrapper, TokenizerProblem> {
    let at = |pattern: &str| {
        let pattern = SplitPattern::Regex(pattern.to_owned());
        Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
            .map(PreTokenizerWrapper::from)
            .map_err(|error| TokenizerProblem::Library(error.to_string()))
    };
    match cut {
        Cut::At(pattern) => at(pattern),
        Cut::SingleDigits => Ok(Digits::new(true).into()),
        Cut::Gpt2 => at(GPT2),
    }
}
