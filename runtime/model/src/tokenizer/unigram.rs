//! The tokenizer of GGUF files whose model is `t5`: pieces of SentencePiece, of which a text gets those whose
//! scores add up to the most. Encoders have it (XLM-RoBERTa and its like), so that it is built from the
//! `tokenizer.json` that these have: a table that normalises characters, words between white space, and the
//! special tokens around a text, or around two.

use super::special::{
    BEGIN, CHARSMAP, CLASSIFY, END, END_OF_PART, EXTRA_SPACES, SPACE_PREFIX, SpecialRules, UNKNOWN, id_of,
};
use super::spm::scores;
use super::{PRE, TYPE_BYTE, TYPES, Tokenizer, entry, is_special, unsupported};
use crate::error::TokenizerProblem;
use crate::gguf::Gguf;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};

/// The type of the token for what no piece spells.
const TYPE_UNKNOWN: i64 = 2;
/// The token for a word that is to be guessed; it takes the space before it.
const MASK: &str = "tokenizer.ggml.mask_token_id";
/// What the files of all these models switch on, and what is not built otherwise.
const SWITCHES: [&str; 4] =
    ["tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token", SPACE_PREFIX, EXTRA_SPACES];

impl Tokenizer {
    /// Builds the tokenizer of a file with these tokens.
    pub(super) fn from_unigram(
        gguf: &Gguf,
        file: &[u8],
        tokens: &[&str],
        types: &[i64],
    ) -> Result<Self, TokenizerProblem> {
        let meta = &gguf.metadata;
        SpecialRules::unigram().check(meta)?;
        if let Some(rule) = meta.opt_string(PRE)?.filter(|rule| *rule != "default") {
            return Err(unsupported(PRE, rule, "default, for Unigram"));
        }
        for key in SWITCHES {
            if meta.opt_bool(key)? == Some(false) {
                return Err(entry(key, "false is not supported; only true is".to_owned()));
            }
        }
        if types.contains(&TYPE_BYTE) {
            return Err(entry(TYPES, "tokens of type 6 (bytes) are not supported for Unigram".to_owned()));
        }
        let named = |keys: &[&'static str]| -> Result<usize, TokenizerProblem> {
            for &key in keys {
                if let Some(id) = id_of(meta, key, tokens.len())? {
                    return Ok(id as usize);
                }
            }
            Err(entry(keys[0], "it is missing".to_owned()))
        };
        let first = named(&[CLASSIFY, BEGIN])?;
        let last = named(&[END_OF_PART[0], END_OF_PART[1], END_OF_PART[2], END])?;
        let unknown = named(&[UNKNOWN])?;
        let mask = meta.opt_unsigned(MASK)?;
        let scores = scores(gguf, file, tokens.len())?;
        let pieces: Vec<Value> =
            tokens.iter().zip(scores).map(|(piece, score)| json!([piece, score])).collect();
        let added =
            tokens.iter().zip(types).enumerate().filter(|(_, (text, kind))| {
                (is_special(**kind) || **kind == TYPE_UNKNOWN) && !text.is_empty()
            });
        let added: Vec<Value> = added
            .map(|(id, (content, _))| {
                json!({"id": id, "content": content, "single_word": false, "lstrip": mask == Some(id as u64),
                       "rstrip": false, "normalized": false, "special": true})
            })
            .collect();
        let file = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
            "normalizer": normaliser(gguf, file)?,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"},
                {"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "always", "split": true}]},
            "post_processor": template([first, last], tokens),
            "model": {"type": "Unigram", "unk_id": unknown, "vocab": pieces, "byte_fallback": false},
        });
        Self::from_json(file.to_string().as_bytes())
    }
}

/// The table that SentencePiece normalises characters with, where the file has one.
fn normaliser(gguf: &Gguf, file: &[u8]) -> Result<Value, TokenizerProblem> {
    let Some(table) = gguf.metadata.opt_array(CHARSMAP, file)? else { return Ok(Value::Null) };
    let bytes = table.bytes().ok_or_else(|| entry(CHARSMAP, "it is not a list of bytes".to_owned()))?;
    if bytes.is_empty() {
        return Ok(Value::Null);
    }
    Ok(json!({"type": "Precompiled", "precompiled_charsmap": STANDARD.encode(bytes)}))
}

/// Special tokens around a text, and two between texts that are read together.
fn template([first, last]: [usize; 2], tokens: &[&str]) -> Value {
    let special = |id: usize| json!({"SpecialToken": {"id": tokens[id], "type_id": 0}});
    let text = |name: &str| json!({"Sequence": {"id": name, "type_id": 0}});
    let defined: Map<String, Value> = [first, last]
        .map(|id| (tokens[id].to_owned(), json!({"id": tokens[id], "ids": [id], "tokens": [tokens[id]]})))
        .into_iter()
        .collect();
    json!({
        "type": "TemplateProcessing",
        "single": [special(first), text("A"), special(last)],
        "pair": [special(first), text("A"), special(last), special(last), text("B"), special(last)],
        "special_tokens": defined,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::{GgufValue, GgufWriter};
    use crate::tokenizer::{MODEL, TOKENS};

    const PIECES: [(&str, f32, i32); 13] = [
        ("<s>", 0.0, 3),
        ("<pad>", 0.0, 3),
        ("</s>", 0.0, 3),
        ("<unk>", 0.0, 2),
        ("\u{2581}hello", -1.0, 1),
        ("\u{2581}wor", -2.0, 1),
        ("ld", -2.0, 1),
        ("\u{2581}", -3.0, 1),
        ("l", -4.0, 1),
        ("d", -4.0, 1),
        ("b", -4.0, 1),
        ("\u{2581}world", -9.0, 1),
        ("<mask>", 0.0, 3),
    ];

    /// A table that replaces `a` by `b`, as SentencePiece stores it.
    fn table() -> Vec<u8> {
        let mut units = vec![0_u32; 512];
        units[0] = 256 << 10;
        units[256 ^ 0x61] = 0x61 | 1 << 8 | 1 << 10;
        units[256 ^ 0x60] = 1 << 31;
        let array = units.iter().flat_map(|unit| unit.to_le_bytes());
        2048_u32.to_le_bytes().into_iter().chain(array).chain(*b"b\0").collect()
    }

    fn tokenizer(changes: &[(&str, GgufValue)]) -> Result<Tokenizer, String> {
        let id = GgufValue::U32;
        let own = [
            (MODEL, GgufValue::String("t5".to_owned())),
            (PRE, GgufValue::String("default".to_owned())),
            (TOKENS, GgufValue::Strings(PIECES.map(|(text, ..)| text.to_owned()).to_vec())),
            ("tokenizer.ggml.scores", GgufValue::Floats(PIECES.map(|(_, score, _)| score).to_vec())),
            (TYPES, GgufValue::Integers(PIECES.map(|(.., kind)| kind).to_vec())),
            ("tokenizer.ggml.add_space_prefix", GgufValue::Bool(true)),
            ("tokenizer.ggml.remove_extra_whitespaces", GgufValue::Bool(true)),
            ("tokenizer.ggml.token_type_count", id(1)),
            ("tokenizer.ggml.bos_token_id", id(0)),
            ("tokenizer.ggml.eos_token_id", id(2)),
            ("tokenizer.ggml.unknown_token_id", id(3)),
            ("tokenizer.ggml.seperator_token_id", id(2)),
            ("tokenizer.ggml.padding_token_id", id(1)),
            ("tokenizer.ggml.cls_token_id", id(0)),
            ("tokenizer.ggml.mask_token_id", id(12)),
            ("tokenizer.ggml.add_bos_token", GgufValue::Bool(true)),
            ("tokenizer.ggml.add_eos_token", GgufValue::Bool(true)),
            ("tokenizer.ggml.add_sep_token", GgufValue::Bool(true)),
        ];
        let mut file = GgufWriter::new();
        for (key, value) in own.iter().filter(|(key, _)| !changes.iter().any(|(other, _)| other == key)) {
            file.pair(key, value);
        }
        for (key, value) in changes {
            file.pair(key, value);
        }
        let bytes = file.finish();
        Tokenizer::from_gguf(&Gguf::parse(&bytes).unwrap(), &bytes).map_err(|error| error.to_string())
    }

    #[test]
    fn a_text_gets_the_pieces_whose_scores_add_up_to_the_most() {
        let tokenizer = tokenizer(&[]).unwrap();
        let ids = |text: &str| tokenizer.encode(text).unwrap();
        assert_eq!(ids("hello world"), [0, 4, 5, 6, 2]);
        assert_eq!(ids("  hello \t\n world "), ids("hello world"), "white space is one space");
        assert_eq!(ids("ld xd"), [0, 7, 6, 7, 3, 9, 2], "what no piece spells is unknown");
        assert_eq!(ids("hello <mask>world"), [0, 4, 12, 5, 6, 2], "the mask takes the space before it");
        assert_eq!(ids(""), [0, 2]);
        let cut = tokenizer.encode_up_to("hello world", 4).unwrap();
        assert_eq!((cut.ids, cut.cut), (vec![0, 4, 5, 2], true));
    }

    #[test]
    fn two_special_tokens_stand_between_two_texts() {
        let tokenizer = tokenizer(&[]).unwrap();
        let pair = tokenizer.encode_pair("hello", "world", 16).unwrap();
        assert_eq!((pair.ids, pair.second_segment, pair.cut), (vec![0, 4, 2, 2, 5, 6, 2], None, false));
        let cut = tokenizer.encode_pair("hello", "world", 6).unwrap();
        assert_eq!((cut.ids, cut.cut), (vec![0, 4, 2, 2, 5, 2], true));
    }

    #[test]
    fn the_table_of_a_file_normalises_texts() {
        let ids = |tokenizer: Tokenizer| tokenizer.encode("ald").unwrap();
        assert_eq!(ids(tokenizer(&[]).unwrap()), [0, 7, 3, 6, 2]);
        let with_table = tokenizer(&[(CHARSMAP, GgufValue::Bytes(table()))]).unwrap();
        assert_eq!(ids(with_table), [0, 7, 10, 6, 2]);
        let damaged = tokenizer(&[(CHARSMAP, GgufValue::Bytes(vec![1]))]).unwrap_err();
        assert!(damaged.contains("precompiled_charsmap: it is shorter than"), "{damaged}");
    }

    #[test]
    fn what_would_change_ids_is_refused_by_its_key() {
        let no = || GgufValue::Bool(false);
        let mut bytes = PIECES.map(|(.., kind)| kind).to_vec();
        bytes[10] = 6;
        let cases = [
            ("tokenizer.ggml.add_bos_token", no(), "add_bos_token: false is not supported"),
            ("tokenizer.ggml.add_eos_token", no(), "add_eos_token: false is not supported"),
            ("tokenizer.ggml.add_space_prefix", no(), "add_space_prefix: false is not supported"),
            ("tokenizer.ggml.remove_extra_whitespaces", no(), "extra_whitespaces: false is not supported"),
            ("tokenizer.ggml.escape_whitespaces", GgufValue::Bool(true), "escape_whitespaces: true is not"),
            ("tokenizer.ggml.something", GgufValue::U32(1), "is not part of the tokenizer (Unigram)"),
            ("tokenizer.ggml.scores", GgufValue::Floats(vec![0.0]), "1 entries for a vocabulary of 13"),
            ("tokenizer.ggml.unknown_token_id", GgufValue::U32(13), "id 13 is outside the vocabulary of 13"),
            (PRE, GgufValue::String("gpt-2".to_owned()), "key tokenizer.ggml.pre is \"gpt-2\""),
            (TYPES, GgufValue::Integers(bytes), "tokens of type 6 (bytes) are not supported"),
            (CHARSMAP, GgufValue::U32(1), "precompiled_charsmap is an integer, an array was expected"),
            (TOKENS, GgufValue::Strings(vec!["a".to_owned(); 13]), "has the id"),
        ];
        for (key, value, wanted) in cases {
            let error = tokenizer(&[(key, value)]).unwrap_err();
            assert!(error.contains(wanted), "{key}: {error}");
        }
    }
}
