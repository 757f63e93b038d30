//! WordPiece in GGUF files. Their vocabulary is written in another way than that of `tokenizer.json`: pieces
//! that begin a word have the mark of a space before them, and those that continue one have nothing, where
//! the original has nothing and `##`.

use super::special::{CLASSIFY, END_OF_PART, LOWERCASE, SpecialRules, UNKNOWN, id_of};
use super::{Tokenizer, entry, is_special};
use crate::error::TokenizerProblem;
use crate::gguf::Metadata;
use serde_json::{Map, Value, json};

/// Stands before a piece that begins a word.
const BEGINS_WORD: char = '\u{2581}';
/// Stands before a piece that continues a word, in the original.
const CONTINUES: &str = "##";
/// The begin token, which is the one before a text where no other is named.
const BEGIN: &str = "tokenizer.ggml.bos_token_id";
/// Whether the special tokens stand around a text: this version only has models where they do.
const AROUND: [&str; 2] = ["tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_sep_token"];

impl Tokenizer {
    /// Builds the tokenizer of a file with these tokens.
    pub(super) fn from_word_pieces(
        meta: &Metadata,
        tokens: &[&str],
        types: &[i64],
    ) -> Result<Self, TokenizerProblem> {
        SpecialRules::word_piece().check(meta)?;
        for key in AROUND {
            if meta.opt_bool(key)? == Some(false) {
                return Err(entry(key, "false is not supported; only true is".to_owned()));
            }
        }
        let pieces: Vec<String> =
            tokens.iter().zip(types).map(|(text, kind)| original(text, *kind)).collect();
        let named = |keys: &[&'static str], token: &str| -> Result<usize, TokenizerProblem> {
            for &key in keys {
                if let Some(id) = id_of(meta, key, tokens.len())? {
                    return Ok(id as usize);
                }
            }
            let found = pieces.iter().position(|piece| piece == token);
            found.ok_or_else(|| entry(keys[0], format!("it is missing, and no token is {token}")))
        };
        let first = named(&[CLASSIFY, BEGIN], "[CLS]")?;
        let last = named(&END_OF_PART, "[SEP]")?;
        let unknown = named(&[UNKNOWN], "[UNK]")?;
        // A tokenizer that lower-cases never gives a piece with a capital letter.
        let has_capitals = || {
            let plain =
                pieces.iter().zip(types).filter(|(piece, kind)| !is_special(**kind) && !bracketed(piece));
            plain.flat_map(|(piece, _)| piece.chars()).any(char::is_uppercase)
        };
        let lowercase = meta.opt_bool(LOWERCASE)?.unwrap_or_else(|| !has_capitals());
        let vocabulary: Map<String, Value> =
            pieces.iter().zip(0_u32..).map(|(piece, id)| (piece.clone(), Value::from(id))).collect();
        if vocabulary.len() != pieces.len() {
            return Err(entry(super::TOKENS, "two tokens are the same".to_owned()));
        }
        let added = pieces.iter().zip(types).enumerate().filter(|(_, (_, kind))| is_special(**kind));
        let added = added.map(|(id, (content, _))| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        });
        let added: Vec<Value> = added.collect();
        let special =
            |id: usize, segment: u32| json!({"SpecialToken": {"id": pieces[id], "type_id": segment}});
        let text = |name: &str, segment: u32| json!({"Sequence": {"id": name, "type_id": segment}});
        let defined: Map<String, Value> = [first, last]
            .map(|id| (pieces[id].clone(), json!({"id": pieces[id], "ids": [id], "tokens": [pieces[id]]})))
            .into_iter()
            .collect();
        let file = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
            "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
                "strip_accents": null, "lowercase": lowercase},
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "post_processor": {"type": "TemplateProcessing",
                "single": [special(first, 0), text("A", 0), special(last, 0)],
                "pair": [special(first, 0), text("A", 0), special(last, 0), text("B", 1), special(last, 1)],
                "special_tokens": defined},
            "model": {"type": "WordPiece", "unk_token": pieces[unknown], "continuing_subword_prefix": CONTINUES,
                "max_input_chars_per_word": 100, "vocab": vocabulary},
        });
        Self::from_json(file.to_string().as_bytes())
    }
}

/// A token as the original vocabulary writes it.
fn original(text: &str, kind: i64) -> String {
    if is_special(kind) || bracketed(text) {
        return text.to_owned();
    }
    match text.strip_prefix(BEGINS_WORD) {
        Some(word) => word.to_owned(),
        None => format!("{CONTINUES}{text}"),
    }
}

/// Whether converters leave the token as it is, because it is in square brackets.
fn bracketed(text: &str) -> bool {
    text.starts_with('[') && text.ends_with(']')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_become_those_of_the_original() {
        let cases = [
            ("[CLS]", 3, "[CLS]"),
            ("[unused7]", 1, "[unused7]"),
            ("\u{2581}the", 1, "the"),
            ("ing", 1, "##ing"),
            ("\u{2581}[", 1, "["),
            ("[", 1, "##["),
            ("\u{2581}\u{2581}", 1, "\u{2581}"),
        ];
        for (stored, kind, wanted) in cases {
            assert_eq!(original(stored, kind), wanted);
        }
    }
}
