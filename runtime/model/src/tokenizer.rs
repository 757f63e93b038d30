//! Tokenizers. A GGUF file carries byte-level BPE, pieces of SentencePiece (joined by scores, or by
//! Unigram) or those of WordPiece, of which the tokenizer is built here. The tokenizer of a checkpoint is
//! read from its `tokenizer.json`.

mod charsmap;
#[cfg(test)]
mod digests;
mod generator;
mod json;
mod spans;
mod special;
mod split;
mod spm;
mod unigram;
mod word_piece;

pub use json::{EncodedPair, EncodedText};
pub use spans::{TokenSpan, TokenSpans};
pub(crate) use special::rows_with_token;

use crate::detokenizer::Detokenizer;
use crate::error::TokenizerProblem;
use crate::gguf::Gguf;
use special::{SpecialIds, SpecialRules};
use split::{SplitRule, split_rule};
use std::collections::HashMap;
use std::fmt;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::{AddedToken, Tokenizer as Library};

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";

/// Token types as GGUF numbers them; the others are plain text.
const TYPE_CONTROL: i64 = 3;
const TYPE_USER_DEFINED: i64 = 4;
const TYPE_UNUSED: i64 = 5;
/// One byte, of the pieces of SentencePiece.
const TYPE_BYTE: i64 = 6;

/// Text to ids and ids to text, as one model was trained with.
pub struct Tokenizer {
    library: Library,
    bytes: TokenBytes,
    begin: Option<u32>,
    eos: Vec<u32>,
    /// Tokens that the file marks as unused; a model must not produce them.
    unused: Vec<u32>,
    /// Whether the library's template puts special tokens around a text.
    templated: bool,
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer").field("len", &self.len()).field("eos", &self.eos).finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Builds the tokenizer that `gguf`, parsed from `file`, describes.
    pub(crate) fn from_gguf(gguf: &Gguf, file: &[u8]) -> Result<Self, TokenizerProblem> {
        let meta = &gguf.metadata;
        let mut tokens = texts(gguf, file, TOKENS)?;
        let mut types = token_types(gguf, file, tokens.len())?;
        let used = rows_with_token(gguf, file).unwrap_or(tokens.len());
        tokens.truncate(used);
        types.truncate(used);
        match meta.string(MODEL)? {
            "gpt2" => {}
            "llama" => return Self::from_pieces(gguf, file, &tokens, &types),
            "bert" => return Self::from_word_pieces(meta, &tokens, &types),
            "t5" => return Self::from_unigram(gguf, file, &tokens, &types),
            other => {
                let supported =
                    "gpt2 (byte-level BPE), llama (SentencePiece), bert (WordPiece), t5 (Unigram)";
                return Err(unsupported(MODEL, other, supported));
            }
        }
        let SplitRule { normaliser, cut, keeps_tokens, end } =
            split_rule(meta.opt_string(PRE)?.unwrap_or("default"))?;
        let mut vocab = Vocab::default();
        for (token, id) in tokens.iter().zip(0..) {
            vocab.entry((*token).to_owned()).or_insert(id);
        }
        let merges = merges(gguf, file)?;
        let model = BPE::builder()
            .vocab_and_merges(vocab, merges)
            .ignore_merges(keeps_tokens)
            .build()
            .map_err(|error| TokenizerProblem::Library(error.to_string()))?;
        let mut library = Library::new(model);
        library.with_normalizer(normaliser).map_err(|error| TokenizerProblem::Library(error.to_string()))?;
        library.with_pre_tokenizer(Some(cut));
        let special =
            tokens.iter().zip(&types).filter(|(token, kind)| is_special(**kind) && !token.is_empty());
        library
            .add_special_tokens(special.map(|(token, _)| AddedToken::from(*token, true).normalized(false)))
            .map_err(|error| TokenizerProblem::Library(error.to_string()))?;
        let reads = special::reads_texts(meta)?;
        let rules = SpecialRules::byte_level(end);
        let rules = if reads { rules.of_readers() } else { rules };
        let SpecialIds { begin, ends: eos } = SpecialIds::read(gguf, file, &tokens, &rules)?;
        let closing = if reads { special::closing_id(meta, tokens.len())? } else { None };
        if let Some(id) = closing {
            library.with_post_processor(Some(special::after_each_text(id, tokens[id as usize])?));
        }
        let (unused, bytes) = (unused_ids(&types), TokenBytes::new(&tokens, &types));
        Ok(Self { library, bytes, begin, eos, unused, templated: closing.is_some() })
    }

    /// The ids of a text. Special tokens spelled in the text are recognised. A begin token, or the special
    /// tokens of a template, surround it only where the model's file asks for them. A byte without a token in
    /// the vocabulary is left out, as in the implementations that models are trained with; SmolLM2 lacks six
    /// control characters and the bytes of unassigned planes.
    ///
    /// # Errors
    /// The library's own; none is known for valid UTF-8.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerProblem> {
        let encoding = self
            .library
            .encode_fast(text, self.templated)
            .map_err(|error| TokenizerProblem::Library(error.to_string()))?;
        Ok(self.begin.into_iter().chain(encoding.get_ids().iter().copied()).collect())
    }

    /// The ids of a text that a chat template rendered. The begin token comes once, whether the template
    /// wrote it or not.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_rendered(&self, text: &str) -> Result<Vec<u32>, TokenizerProblem> {
        let mut ids = self.encode(text)?;
        if let (Some(begin), [first, second, ..]) = (self.begin, ids.as_slice())
            && *first == begin
            && *second == begin
        {
            ids.remove(0);
        }
        Ok(ids)
    }

    /// The id of a token by how the vocabulary spells it.
    pub(crate) fn id(&self, token: &str) -> Option<u32> {
        self.library.token_to_id(token)
    }

    /// How the vocabulary spells a token: of a control token the text that encodes to it, of any other one
    /// with the characters that stand for its bytes.
    pub fn token(&self, id: u32) -> Option<String> {
        self.library.id_to_token(id)
    }

    /// The text of all ids; control tokens have none.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut detokenizer = Detokenizer::new();
        let mut text: String = ids.iter().map(|id| detokenizer.push(self.token_bytes(*id))).collect();
        text.push_str(&detokenizer.finish());
        text
    }

    /// The bytes that a token adds to a text; none for control tokens and ids outside the vocabulary.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.bytes.get(id)
    }

    /// Ids that end a generation.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos
    }

    /// Ids that the file marks as unused. A sampler must exclude them.
    pub fn unused_ids(&self) -> &[u32] {
        &self.unused
    }

    /// The id that is put before every text, if the model's file asks for one.
    pub fn begin_id(&self) -> Option<u32> {
        self.begin
    }

    /// How many tokens the vocabulary has.
    pub fn len(&self) -> usize {
        self.bytes.ends.len()
    }

    /// The most bytes of a text that one token can stand for: a text longer than `n` times this has more than
    /// `n` tokens, not counting bytes that have no token at all.
    pub fn longest_token_bytes(&self) -> usize {
        let starts = std::iter::once(0).chain(self.bytes.ends.iter().copied());
        let plain = starts.zip(&self.bytes.ends).map(|(start, end)| end - start).max().unwrap_or(0);
        let added = self.library.get_added_tokens_decoder();
        let special = added.values().map(|token| token.content.len()).max().unwrap_or(0);
        // Composing characters shortens a text at most threefold: nine bytes of Hangul jamo become three.
        let shrinks = if self.library.get_normalizer().is_some() { 3 } else { 1 };
        plain.max(special).saturating_mul(shrinks)
    }

    /// Whether the vocabulary is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Most tokens that end an answer. The largest known lists have eight; each token of an answer is compared
/// with all of them.
const MAX_ENDS: usize = 256;

/// The ids that end an answer, each once.
fn distinct_ends(key: &'static str, ids: Vec<u32>) -> Result<Vec<u32>, TokenizerProblem> {
    let mut ends: Vec<u32> = Vec::new();
    for id in ids {
        if ends.contains(&id) {
            continue;
        }
        if ends.len() == MAX_ENDS {
            return Err(entry(key, format!("more than {MAX_ENDS} tokens end an answer")));
        }
        ends.push(id);
    }
    Ok(ends)
}

fn unsupported(key: &'static str, found: &str, supported: &'static str) -> TokenizerProblem {
    TokenizerProblem::Unsupported { key, found: found.to_owned(), supported }
}

fn entry(key: &'static str, why: String) -> TokenizerProblem {
    TokenizerProblem::Entry { key, why }
}

/// The ids of tokens that the file marks as unused.
fn unused_ids(types: &[i64]) -> Vec<u32> {
    types.iter().zip(0..).filter(|(kind, _)| **kind == TYPE_UNUSED).map(|(_, id)| id).collect()
}

fn is_special(kind: i64) -> bool {
    matches!(kind, TYPE_CONTROL | TYPE_USER_DEFINED)
}

fn texts<'a>(gguf: &Gguf, file: &'a [u8], key: &'static str) -> Result<Vec<&'a str>, TokenizerProblem> {
    let array = gguf.metadata.array(key, file)?;
    let texts: Vec<&str> =
        array.strings().ok_or_else(|| entry(key, "it is not a list of texts".to_owned()))?.collect();
    if texts.is_empty() {
        return Err(entry(key, "it is empty".to_owned()));
    }
    if u32::try_from(texts.len()).is_err() {
        return Err(entry(key, format!("{} entries are more than ids can number", texts.len())));
    }
    Ok(texts)
}

/// The type of every token; all plain where the file has no types.
fn token_types(gguf: &Gguf, file: &[u8], count: usize) -> Result<Vec<i64>, TokenizerProblem> {
    let Some(array) = gguf.metadata.opt_array(TYPES, file)? else { return Ok(vec![1; count]) };
    let types: Vec<i64> =
        array.integers().ok_or_else(|| entry(TYPES, "it is not a list of integers".to_owned()))?.collect();
    if types.len() != count {
        return Err(entry(TYPES, format!("{} entries for a vocabulary of {count}", types.len())));
    }
    Ok(types)
}

fn merges(gguf: &Gguf, file: &[u8]) -> Result<Vec<(String, String)>, TokenizerProblem> {
    texts(gguf, file, MERGES)?
        .into_iter()
        .map(|merge| match merge.split_once(' ') {
            Some((left, right)) if !left.is_empty() && !right.is_empty() => {
                Ok((left.to_owned(), right.to_owned()))
            }
            _ => Err(entry(MERGES, format!("{merge:?} is not two pieces with a space between"))),
        })
        .collect()
}

/// The character that stands for a byte in a byte-level vocabulary: printable Latin-1 for itself, the others
/// in order from U+0100 on.
pub(crate) fn byte_chars() -> [char; 256] {
    let mut next = 0x100_u32;
    std::array::from_fn(|byte| {
        let printable = matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
        let code = if printable {
            byte as u32
        } else {
            next += 1;
            next - 1
        };
        // All codes are below U+0200, where no surrogate lies.
        char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER)
    })
}

/// The bytes of every token, one after the other, so that a large vocabulary is two allocations.
struct TokenBytes {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl TokenBytes {
    fn new(tokens: &[&str], types: &[i64]) -> Self {
        let of_char: HashMap<char, u8> = byte_chars().into_iter().zip(0..=255).collect();
        let mut all = Self { bytes: Vec::new(), ends: Vec::with_capacity(tokens.len()) };
        for (token, kind) in tokens.iter().zip(types) {
            match *kind {
                TYPE_CONTROL | TYPE_UNUSED => {}
                TYPE_USER_DEFINED => all.bytes.extend_from_slice(token.as_bytes()),
                _ => {
                    let from = all.bytes.len();
                    let whole = token.chars().all(|c| of_char.get(&c).map(|b| all.bytes.push(*b)).is_some());
                    if !whole {
                        // A token that no byte-level text can produce; it stands for itself.
                        all.bytes.truncate(from);
                        all.bytes.extend_from_slice(token.as_bytes());
                    }
                }
            }
            all.ends.push(all.bytes.len());
        }
        all
    }

    fn get(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(end) = self.ends.get(id) else { return &[] };
        let start = id.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.bytes[start..*end]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Model;
    use crate::gguf::{GgufValue, GgufWriter};
    use crate::seeded::{SeededFamily, SeededModel};
    use proptest::prelude::*;
    use std::path::Path;
    use std::sync::Arc;

    fn seeded() -> Model {
        Model::from_bytes(Path::new("seeded.gguf"), Arc::new(SeededModel::default().gguf())).unwrap()
    }

    #[test]
    fn texts_round_trip_and_merges_apply() {
        let model = seeded();
        let tokenizer = model.tokenizer();
        for text in ["", "hello the world", "žluťoučký kůň 🦀👩‍💻", "a\r\n\t b  ", "1234567890", "\0\u{7f}"]
        {
            let ids = tokenizer.encode(text).unwrap();
            assert_eq!(tokenizer.decode(&ids), text);
        }
        assert_eq!(tokenizer.encode("hello").unwrap().len(), 1);
        assert_eq!(tokenizer.encode("in the").unwrap().len(), 2);
    }

    #[test]
    fn special_tokens_are_recognised_without_text() {
        let model = seeded();
        let tokenizer = model.tokenizer();
        let ids = tokenizer.encode("<|im_start|>t<|im_end|>").unwrap();
        assert_eq!((ids[0], ids[2], ids.len()), (1, 2, 3));
        assert_eq!(tokenizer.decode(&ids), "t");
        assert_eq!(tokenizer.eos_ids(), [2]);
        assert_eq!(tokenizer.token_bytes(u32::MAX), b"");
    }

    #[test]
    fn no_token_stands_for_more_than_the_longest() {
        let model = seeded();
        let tokenizer = model.tokenizer();
        let longest = tokenizer.longest_token_bytes();
        assert!(longest >= "<|im_start|>".len());
        for text in ["hello the world", "<|im_start|><|im_end|>", "e\u{301}e\u{301}", "7777"] {
            assert!(tokenizer.encode(text).unwrap().len() * longest >= text.len(), "{text}");
        }
    }

    fn splits(rule: &str, text: &str) -> Vec<String> {
        let mut cut = tokenizers::PreTokenizedString::from(text);
        let rule = split_rule(rule).unwrap();
        tokenizers::PreTokenizer::pre_tokenize(&rule.cut, &mut cut).unwrap();
        let parts = cut.get_splits(tokenizers::OffsetReferential::Original, tokenizers::OffsetType::Byte);
        parts.into_iter().map(|(_, (from, to), _)| text[from..to].to_owned()).collect()
    }

    #[test]
    fn digits_are_split_and_words_keep_their_space() {
        let text = "In 2024, it's  x";
        let smollm = ["In", " ", "2", "0", "2", "4", ",", " it", "'s", " ", " x"];
        assert_eq!(splits("smollm", text), smollm);
        assert_eq!(splits("qwen2", text), smollm);
    }

    #[test]
    fn qwen2_splits_marks_and_line_ends() {
        let text = "fn(x)\t{\r\n\n  IT'LL(»»)\n \n y";
        let expected = ["fn", "(x", ")", "\t", "{\r\n\n", " ", " IT", "'LL", "(»»)\n", " \n", " y"];
        assert_eq!(splits("qwen2", text), expected);
    }

    #[test]
    fn rules_differ_in_digits_and_words() {
        let text = "HelloWorld's 12345";
        let cases: [(&str, &[&str]); 10] = [
            ("deepseek-llm", &["HelloWorld", "'", "s", " ", "12345"]),
            ("deepseek-coder", &["HelloWorld", "'", "s", " ", "1", "2", "3", "4", "5"]),
            ("deepseek-v3", &["HelloWorld", "'s", " ", "123", "45"]),
            ("gpt-2", &["HelloWorld", "'s", " 12345"]),
            ("llama-bpe", &["HelloWorld", "'s", " ", "123", "45"]),
            ("dbrx", &["HelloWorld", "'s", " ", "123", "45"]),
            ("gpt-4o", &["Hello", "World's", " ", "123", "45"]),
            ("tekken", &["Hello", "World", "'s", " ", "1", "2", "3", "4", "5"]),
            ("falcon", &["HelloWorld", "'", "s", " ", "123", "45"]),
            ("starcoder", &["HelloWorld", "'s", " ", "1", "2", "3", "4", "5"]),
        ];
        for (rule, expected) in cases {
            assert_eq!(splits(rule, text), expected, "{rule}");
        }
        let keeps = |rule| split_rule(rule).unwrap().keeps_tokens;
        assert!(keeps("llama3") && keeps("tekken") && !keeps("dbrx") && !keeps("qwen2"));
    }

    #[test]
    fn qwen2_composes_characters_and_ends_documents() {
        let load = |family| {
            let file = SeededModel { family, ..SeededModel::default() }.gguf();
            Model::from_bytes(Path::new("seeded.gguf"), Arc::new(file)).unwrap()
        };
        let ends = |family| load(family).tokenizer().eos_ids().to_vec();
        assert_eq!((ends(SeededFamily::Qwen2), ends(SeededFamily::Llama)), (vec![2, 0], vec![2]));
        for (family, expected) in [(SeededFamily::Qwen2, "\u{e9}"), (SeededFamily::Llama, "e\u{301}")] {
            let model = load(family);
            let ids = model.tokenizer().encode("e\u{301}").unwrap();
            assert_eq!(model.tokenizer().decode(&ids), expected);
        }
    }

    /// A file with a tokenizer of three tokens, each key replaceable.
    fn tokenizer_with(key: &str, value: &GgufValue) -> Result<Tokenizer, String> {
        let text = |t: &str| GgufValue::String(t.to_owned());
        let texts = |t: &[&str]| GgufValue::Strings(t.iter().map(|t| (*t).to_owned()).collect());
        let defaults = [
            (MODEL, text("gpt2")),
            (PRE, text("smollm")),
            (TOKENS, texts(&["a", "b", "ab", "<end>"])),
            (TYPES, GgufValue::Integers(vec![1, 1, 1, 3])),
            (MERGES, texts(&["a b"])),
            ("tokenizer.ggml.eos_token_id", GgufValue::U32(3)),
            ("tokenizer.ggml.eot_token_id", GgufValue::U32(3)),
        ];
        let mut file = GgufWriter::new();
        for (name, default) in defaults.iter().filter(|(name, _)| *name != key) {
            file.pair(name, default);
        }
        file.pair(key, value);
        let bytes = file.finish();
        Tokenizer::from_gguf(&Gguf::parse(&bytes).unwrap(), &bytes).map_err(|error| error.to_string())
    }

    #[test]
    fn unsupported_tokenizers_are_refused_by_name() {
        let text = |t: &str| GgufValue::String(t.to_owned());
        let cases = [
            (MODEL, text("rwkv"), "key tokenizer.ggml.model is \"rwkv\", which is not supported"),
            (
                PRE,
                text("superbpe"),
                "key tokenizer.ggml.pre is \"superbpe\", which is not supported; supported: default, gpt-2",
            ),
            (TOKENS, GgufValue::Strings(vec![]), "key tokenizer.ggml.tokens: it is empty"),
            (TOKENS, GgufValue::Integers(vec![1]), "key tokenizer.ggml.tokens: it is not a list of texts"),
            (TYPES, GgufValue::Integers(vec![1]), "1 entries for a vocabulary of 4"),
            (MERGES, GgufValue::Strings(vec!["ab".into()]), "\"ab\" is not two pieces"),
            (MERGES, GgufValue::Strings(vec!["a z".into()]), "the tokenizer failed"),
            ("tokenizer.ggml.eos_token_id", GgufValue::U32(4), "id 4 is outside the vocabulary of 4"),
            (
                "tokenizer.ggml.add_bos_token",
                GgufValue::Bool(true),
                "key tokenizer.ggml.bos_token_id: it is missing",
            ),
        ];
        for (key, value, expected) in cases {
            let error = tokenizer_with(key, &value).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn bytes_without_a_token_are_left_out() {
        let plain = tokenizer_with("tokenizer.ggml.bos_token_id", &GgufValue::U32(3)).unwrap();
        assert_eq!(plain.encode("a\u{4}b<end>").unwrap(), [0, 1, 3]);
    }

    #[test]
    fn the_begin_token_follows_the_file() {
        let plain = tokenizer_with("tokenizer.ggml.bos_token_id", &GgufValue::U32(3)).unwrap();
        assert_eq!(plain.encode("ab").unwrap(), [2]);
        assert_eq!((plain.begin_id(), plain.eos_ids()), (None, &[3][..]));
        let text = |t: &str| GgufValue::String(t.to_owned());
        let mut file = GgufWriter::new();
        file.pair(MODEL, &text("gpt2"))
            .pair(PRE, &text("smollm"))
            .pair(TOKENS, &GgufValue::Strings(["a", "b", "ab"].map(str::to_owned).to_vec()))
            .pair(MERGES, &GgufValue::Strings(vec!["a b".to_owned()]))
            .pair("tokenizer.ggml.bos_token_id", &GgufValue::U32(1))
            .pair("tokenizer.ggml.add_bos_token", &GgufValue::Bool(true));
        let bytes = file.finish();
        let asked = Tokenizer::from_gguf(&Gguf::parse(&bytes).unwrap(), &bytes).unwrap();
        assert_eq!(asked.encode("ab").unwrap(), [1, 2]);
        assert_eq!(asked.encode_rendered("ab").unwrap(), [1, 2]);
        assert_eq!(asked.encode_rendered("bab").unwrap(), [1, 2], "a template may write it itself");
        assert_eq!((asked.begin_id(), asked.eos_ids()), (Some(1), &[][..]));
    }

    #[test]
    fn every_byte_has_its_own_character() {
        let mut chars = byte_chars().to_vec();
        assert_eq!((chars[usize::from(b' ')], chars[usize::from(b'A')]), ('Ġ', 'A'));
        chars.sort_unstable();
        chars.dedup();
        assert_eq!(chars.len(), 256);
    }

    proptest! {
        #[test]
        fn any_text_round_trips(text in any::<String>()) {
            let model = seeded();
            // Control tokens have no text of their own; random text spells none.
            prop_assume!(!text.contains("<|"));
            let ids = model.tokenizer().encode(&text).unwrap();
            prop_assert_eq!(model.tokenizer().decode(&ids), text);
        }
    }
}
