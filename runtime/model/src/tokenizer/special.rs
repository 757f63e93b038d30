//! The `tokenizer.ggml.*` keys beside the vocabulary: special tokens, and switches that change a text's ids.

use super::{TOKENS, TYPE_UNUSED, TYPES, distinct_ends, entry};
use crate::error::TokenizerProblem;
use crate::gguf::{Gguf, GgufProblem, Metadata};
use serde_json::json;
use tokenizers::processors::PostProcessorWrapper;

const PREFIX: &str = "tokenizer.ggml.";
/// The token before a text.
pub(super) const BEGIN: &str = "tokenizer.ggml.bos_token_id";
const ADD_BEGIN: &str = "tokenizer.ggml.add_bos_token";
const END_LIST: &str = "tokenizer.ggml.eos_token_ids";

/// The token after a text.
pub(super) const END: &str = "tokenizer.ggml.eos_token_id";
/// The token for words that no pieces make.
pub(super) const UNKNOWN: &str = "tokenizer.ggml.unknown_token_id";
/// The token before a text, of WordPiece.
pub(super) const CLASSIFY: &str = "tokenizer.ggml.cls_token_id";
/// The token after a text, of WordPiece, in all its spellings.
pub(super) const END_OF_PART: [&str; 3] =
    ["tokenizer.ggml.seperator_token_id", "tokenizer.ggml.separator_token_id", "tokenizer.ggml.sep_token_id"];
/// Whether texts are lower-cased, of WordPiece.
pub(super) const LOWERCASE: &str = "tokenizer.ggml.normalizer.lowercase";
/// Whether a text of pieces of SentencePiece has one more space before it.
pub(super) const SPACE_PREFIX: &str = "tokenizer.ggml.add_space_prefix";
/// Whether such a text has no spaces at its ends, and one between words.
pub(super) const EXTRA_SPACES: &str = "tokenizer.ggml.remove_extra_whitespaces";
/// The table that SentencePiece normalises characters with.
pub(super) const CHARSMAP: &str = "tokenizer.ggml.precompiled_charsmap";
const ADD_END_OF_PART: &str = "tokenizer.ggml.add_sep_token";
const ADD_END: &str = "tokenizer.ggml.add_eos_token";

/// Tokens that end an answer: the end of a text, of a turn and of a message.
const ENDS: [&str; 3] = [END, "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];

/// Further ids that must lie in the vocabulary: chat templates print these tokens.
const PRINTED: [&str; 2] = [UNKNOWN, "tokenizer.ggml.padding_token_id"];

/// Switches that would change the ids of a text. Byte-level BPE is built here without any of them.
const SWITCHES: [(&str, &str); 6] = [
    (
        ADD_END,
        "true puts an end token after every prompt, which ends the answer before it begins; set the key to false",
    ),
    (ADD_END_OF_PART, "true is not supported; only false is"),
    (SPACE_PREFIX, "true is not supported; only false is"),
    (EXTRA_SPACES, "true is not supported; only false is"),
    ("tokenizer.ggml.escape_whitespaces", "true is not supported; only false is"),
    ("tokenizer.ggml.treat_whitespace_as_suffix", "true is not supported; only false is"),
];

/// Keys that cannot change a result here: tokens that no prompt and no answer needs, and what BPE does not
/// use.
const WITHOUT_EFFECT: [&str; 16] = [
    "cls_token_id",
    "fim_mid_token_id",
    "fim_pad_token_id",
    "fim_pre_token_id",
    "fim_rep_token_id",
    "fim_sep_token_id",
    "fim_suf_token_id",
    "mask_token_id",
    "middle_token_id",
    "prefix_token_id",
    "scores",
    "sep_token_id",
    "separator_token_id",
    "seperator_token_id",
    "suffix_token_id",
    "token_type_count",
];

/// Keys that the rest of the tokenizer reads.
const VOCABULARY: [&str; 5] = ["model", "pre", "tokens", "token_type", "merges"];

/// How the keys of a kind of tokenizer are read.
pub(super) struct SpecialRules {
    /// A token that ends texts although the file does not name it.
    end: Option<&'static str>,
    /// Switches that the tokenizer honours.
    honoured: &'static [&'static str],
    /// Whether a text begins with the begin token where the file does not say it.
    begins: bool,
    /// The kind, for messages.
    kind: &'static str,
}

impl SpecialRules {
    pub(super) fn byte_level(end: Option<&'static str>) -> Self {
        Self { end, honoured: &[], begins: false, kind: "byte-level BPE" }
    }

    /// The same of a model that reads whole texts: a token after each text ends no answer there.
    pub(super) fn of_readers(self) -> Self {
        Self { honoured: &[ADD_END], ..self }
    }

    /// Both special tokens stand around every text, whatever the switches say.
    pub(super) fn word_piece() -> Self {
        let honoured = &[ADD_END, ADD_END_OF_PART, LOWERCASE];
        Self { end: None, honoured, begins: true, kind: "WordPiece" }
    }

    /// Special tokens stand around every text, as the pieces of SentencePiece have them.
    pub(super) fn unigram() -> Self {
        let honoured = &[ADD_END, ADD_END_OF_PART, SPACE_PREFIX, EXTRA_SPACES, CHARSMAP];
        Self { end: None, honoured, begins: true, kind: "Unigram" }
    }

    /// Refuses switches that are not honoured, and keys that are not read.
    pub(super) fn check(&self, meta: &Metadata) -> Result<(), TokenizerProblem> {
        refuse_switches(meta, self)?;
        refuse_unread(meta, self)
    }

    pub(super) fn pieces() -> Self {
        let honoured = &["tokenizer.ggml.add_space_prefix", "tokenizer.ggml.escape_whitespaces"];
        Self { end: None, honoured, begins: true, kind: "SentencePiece" }
    }
}

/// The special tokens of a file.
#[derive(Debug)]
pub(super) struct SpecialIds {
    /// The token before every text, where the file asks for one.
    pub(super) begin: Option<u32>,
    /// The tokens that end an answer, each once.
    pub(super) ends: Vec<u32>,
}

impl SpecialIds {
    /// Reads and checks the ids and switches.
    pub(super) fn read(
        gguf: &Gguf,
        file: &[u8],
        tokens: &[&str],
        rules: &SpecialRules,
    ) -> Result<Self, TokenizerProblem> {
        let (meta, end) = (&gguf.metadata, rules.end);
        rules.check(meta)?;
        let begin = begin_id(meta, tokens.len(), rules.begins)?;
        for key in PRINTED {
            id_of(meta, key, tokens.len())?;
        }
        let mut named = Vec::new();
        for key in ENDS {
            named.extend(id_of(meta, key, tokens.len())?);
        }
        named.extend(end_list(gguf, file, tokens.len())?);
        named.extend((0..).zip(tokens).find(|(_, token)| Some(**token) == end).map(|(id, _)| id));
        Ok(Self { begin, ends: distinct_ends(END_LIST, named)? })
    }
}

fn refuse_switches(meta: &Metadata, rules: &SpecialRules) -> Result<(), TokenizerProblem> {
    for (key, why) in SWITCHES.into_iter().filter(|(key, _)| !rules.honoured.contains(key)) {
        if meta.opt_bool(key)? == Some(true) {
            return Err(entry(key, why.to_owned()));
        }
    }
    Ok(())
}

fn refuse_unread(meta: &Metadata, rules: &SpecialRules) -> Result<(), TokenizerProblem> {
    let read = |key: &str| {
        let switch = SWITCHES.iter().any(|(name, _)| *name == key);
        let switch = switch || rules.honoured.contains(&key);
        switch || ENDS.contains(&key) || PRINTED.contains(&key) || [BEGIN, ADD_BEGIN, END_LIST].contains(&key)
    };
    let unread = meta.keys().find(|key| {
        let name = key.strip_prefix(PREFIX);
        name.is_some_and(|name| !read(key) && !VOCABULARY.contains(&name) && !WITHOUT_EFFECT.contains(&name))
    });
    match unread {
        None => Ok(()),
        Some(key) => {
            let group = format!("the tokenizer ({})", rules.kind);
            Err(GgufProblem::UnreadKey { key: key.to_owned(), group }.into())
        }
    }
}

/// The id under `key`, which must be in a vocabulary of `count`.
pub(super) fn id_of(
    meta: &Metadata,
    key: &'static str,
    count: usize,
) -> Result<Option<u32>, TokenizerProblem> {
    let Some(id) = meta.opt_unsigned(key)? else { return Ok(None) };
    in_vocabulary(key, id, count).map(Some)
}

fn in_vocabulary(key: &'static str, id: u64, count: usize) -> Result<u32, TokenizerProblem> {
    match u32::try_from(id).ok().filter(|id| (*id as usize) < count) {
        Some(id) => Ok(id),
        None => Err(entry(key, format!("id {id} is outside the vocabulary of {count}"))),
    }
}

fn begin_id(meta: &Metadata, count: usize, begins: bool) -> Result<Option<u32>, TokenizerProblem> {
    let begin = id_of(meta, BEGIN, count)?;
    let Some(asked) = meta.opt_bool(ADD_BEGIN)? else { return Ok(begin.filter(|_| begins)) };
    if !asked {
        return Ok(None);
    }
    begin.map(Some).ok_or_else(|| entry(BEGIN, "it is missing although add_bos_token is true".to_owned()))
}

fn end_list(gguf: &Gguf, file: &[u8], count: usize) -> Result<Vec<u32>, TokenizerProblem> {
    let Some(list) = gguf.metadata.opt_array(END_LIST, file)? else { return Ok(Vec::new()) };
    let ids = list.integers().ok_or_else(|| entry(END_LIST, "it is not a list of integers".to_owned()))?;
    ids.map(|id| match u64::try_from(id) {
        Ok(id) => in_vocabulary(END_LIST, id, count),
        Err(_) => Err(entry(END_LIST, format!("id {id} is negative"))),
    })
    .collect()
}

/// Whether the file's model reads whole texts and pools their rows.
pub(super) fn reads_texts(meta: &Metadata) -> Result<bool, TokenizerProblem> {
    let Some(architecture) = meta.opt_string("general.architecture")? else { return Ok(false) };
    Ok(meta.opt_unsigned(&format!("{architecture}.pooling_type"))?.is_some_and(|pooling| pooling != 0))
}

/// The token after every text, where the file asks for one.
pub(super) fn closing_id(meta: &Metadata, count: usize) -> Result<Option<u32>, TokenizerProblem> {
    if meta.opt_bool(ADD_END)? != Some(true) {
        return Ok(None);
    }
    let end = id_of(meta, END, count)?;
    end.map(Some).ok_or_else(|| entry(END, "it is missing although add_eos_token is true".to_owned()))
}

/// The template that puts this token after a text.
pub(super) fn after_each_text(id: u32, token: &str) -> Result<PostProcessorWrapper, TokenizerProblem> {
    let text = |name: &str| json!({"Sequence": {"id": name, "type_id": 0}});
    let template = json!({
        "type": "TemplateProcessing",
        "single": [text("A"), {"SpecialToken": {"id": "end", "type_id": 0}}],
        "pair": [text("A"), text("B"), {"SpecialToken": {"id": "end", "type_id": 0}}],
        "special_tokens": {"end": {"id": "end", "ids": [id], "tokens": [token]}},
    });
    serde_json::from_value(template).map_err(|error| TokenizerProblem::Library(error.to_string()))
}

/// How many leading rows of the embedding have a token: those beyond the list of tokens, and tokens at its
/// end that the file marks as unused, are padding that must never be produced. `None` where the lists are not
/// as expected.
pub(crate) fn rows_with_token(gguf: &Gguf, file: &[u8]) -> Option<usize> {
    let count = gguf.metadata.opt_array(TOKENS, file).ok()??.len();
    let types = gguf.metadata.opt_array(TYPES, file).ok().flatten();
    let Some(types) = types.filter(|types| types.len() == count).and_then(|types| types.integers()) else {
        return Some(count);
    };
    let used = types.zip(1..).filter(|(kind, _)| *kind != TYPE_UNUSED).map(|(_, rows)| rows).last();
    Some(used.unwrap_or(count))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::GgufValue;
    use crate::seeded::SeededModel;
    use crate::tokenizer::byte_chars;
    use crate::{LoadError, Model};
    use std::path::Path;
    use std::sync::Arc;

    fn load(key: &str, value: GgufValue) -> Result<Model, String> {
        let file = SeededModel::default().gguf_with(&[(key, value)]);
        Model::from_bytes(Path::new("m.gguf"), Arc::new(file)).map_err(|error: LoadError| error.to_string())
    }

    #[test]
    fn end_tokens_of_every_key_end_answers() {
        for key in ["eot_token_id", "eom_token_id"] {
            let model = load(&format!("tokenizer.ggml.{key}"), GgufValue::U32(7)).unwrap();
            assert_eq!(model.tokenizer().eos_ids(), [2, 7], "{key}");
        }
        let list = load("tokenizer.ggml.eos_token_ids", GgufValue::Integers(vec![2, 9, 8])).unwrap();
        assert_eq!(list.tokenizer().eos_ids(), [2, 9, 8]);
    }

    #[test]
    fn a_list_of_too_many_end_tokens_is_refused() {
        let list =
            |count: i32| load("tokenizer.ggml.eos_token_ids", GgufValue::Integers((0..count).collect()));
        assert_eq!(list(256).unwrap().tokenizer().eos_ids().len(), 256);
        let refused = list(257).unwrap_err();
        assert!(refused.contains("eos_token_ids: more than 256 tokens end an answer"), "{refused}");
    }

    #[test]
    fn special_ids_outside_the_vocabulary_are_refused() {
        for key in ["bos", "eos", "eot", "eom", "unknown", "padding"] {
            let key = format!("tokenizer.ggml.{key}_token_id");
            let error = load(&key, GgufValue::U32(271)).unwrap_err();
            assert!(error.contains(&format!("{key}: id 271 is outside the vocabulary of 271")), "{error}");
        }
        let error = load("tokenizer.ggml.eos_token_ids", GgufValue::Integers(vec![2, -1])).unwrap_err();
        assert!(error.contains("eos_token_ids: id -1 is negative"), "{error}");
    }

    #[test]
    fn switches_that_change_ids_are_refused() {
        for key in ["add_eos_token", "add_sep_token", "add_space_prefix", "remove_extra_whitespaces"] {
            let key = format!("tokenizer.ggml.{key}");
            let error = load(&key, GgufValue::Bool(true)).unwrap_err();
            assert!(error.contains(&format!("key {key}: true ")), "{error}");
            load(&key, GgufValue::Bool(false)).unwrap();
        }
    }

    #[test]
    fn unread_keys_of_the_tokenizer_are_refused() {
        let error = load("tokenizer.ggml.precompiled_charsmap", GgufValue::Integers(vec![1])).unwrap_err();
        assert!(error.contains("key tokenizer.ggml.precompiled_charsmap is not part of"), "{error}");
        load("tokenizer.ggml.mask_token_id", GgufValue::U32(99_999)).unwrap();
        load("tokenizer.chat_template.tool_use", GgufValue::String("{{".into())).unwrap();
    }

    #[test]
    fn a_file_without_an_end_token_warns() {
        let plain = Model::from_bytes(Path::new("m.gguf"), Arc::new(SeededModel::default().gguf())).unwrap();
        assert!(plain.facts().warnings.is_empty());
        let ends = SeededModel::default().gguf_without("tokenizer.ggml.eos_token_id");
        let model = Model::from_bytes(Path::new("m.gguf"), Arc::new(ends)).unwrap();
        assert!(model.facts().warnings[0].contains("no end token"), "{:?}", model.facts().warnings);
    }

    /// The seeded model with its control tokens, bytes and one merge, and this many unused tokens at the end.
    fn padded(unused: usize) -> Model {
        let chars = byte_chars().map(String::from);
        let controls = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"].map(str::to_owned);
        let mut tokens: Vec<String> = controls.into_iter().chain(chars).collect();
        tokens.push("\u{120}t".to_owned());
        let types = (0..tokens.len()).map(|id| if id < 3 { 3 } else { 1 });
        let types = types.chain(std::iter::repeat_n(5, unused)).collect();
        tokens.extend((0..unused).map(|index| format!("[PAD{index}]")));
        let file = SeededModel { tied: false, ..SeededModel::default() }.gguf_with(&[
            (TOKENS, GgufValue::Strings(tokens)),
            (TYPES, GgufValue::Integers(types)),
            ("tokenizer.ggml.merges", GgufValue::Strings(vec!["\u{120} t".to_owned()])),
        ]);
        Model::from_bytes(Path::new("m.gguf"), Arc::new(file)).unwrap()
    }

    #[test]
    fn rows_without_a_token_are_not_part_of_the_model() {
        for unused in [0, 5, 11] {
            let model = padded(unused);
            assert_eq!((model.facts().vocabulary, model.tokenizer().len()), (260, 260));
            for name in ["token_embd.weight", "output.weight"] {
                let weights = model.weights();
                assert_eq!(weights.get(weights.find(name).unwrap()).rows(), 260, "{name}");
            }
        }
    }

    #[test]
    fn unused_tokens_in_the_middle_are_listed() {
        let types = (0..271).map(|id| match id {
            0..3 => 3,
            40 | 41 => 5,
            _ => 1,
        });
        let model = load(TYPES, GgufValue::Integers(types.collect())).unwrap();
        assert_eq!(model.tokenizer().unused_ids(), [40, 41]);
        assert_eq!(model.facts().vocabulary, 271);
    }
}
