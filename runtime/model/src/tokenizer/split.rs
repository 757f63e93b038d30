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

static RULES: [Rule; 9] = [
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
    Rule { names: &["falcon"], cuts: &[Cut::At(FALCON_MARKS), Cut::Gpt2, Cut::At(THREE_DIGITS)], ..PLAIN },
];

const SUPPORTED: &str = "default, gpt-2, mpt, olmo, phi-2, jais, trillion, smollm, starcoder, refact, command-r, \
     codeshell, exaone, qwen2, deepseek-r1-qwen, megrez, llama-bpe, llama3, llama-v3, falcon3, pixtral, dbrx, \
     smaug-bpe, gpt-4o, llama4, tekken, falcon";

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
