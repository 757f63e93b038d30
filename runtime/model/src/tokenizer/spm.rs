//! The tokenizer of GGUF files whose model is `llama`: pieces of SentencePiece with scores, and bytes for
//! what no piece spells.
//!
//! SentencePiece joins, again and again, the two neighbouring pieces whose join has the highest score. That
//! is byte-pair encoding whose merges are all ways to join two pieces to a third, ordered by its score; so
//! transformers builds it, too.

use super::special::{SpecialIds, SpecialRules};
use super::{
    PRE, TOKENS, TYPE_BYTE, TYPE_CONTROL, TYPE_UNUSED, TYPE_USER_DEFINED, TYPES, TokenBytes, Tokenizer,
    entry, is_special, unsupported, unused_ids,
};
use crate::error::TokenizerProblem;
use crate::gguf::{Gguf, Metadata};
use std::collections::HashMap;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::replace::Replace;
use tokenizers::normalizers::{NormalizerWrapper, Prepend, Sequence};
use tokenizers::{AddedToken, Tokenizer as Library};

const SCORES: &str = "tokenizer.ggml.scores";
const ADD_SPACE: &str = "tokenizer.ggml.add_space_prefix";
const ESCAPE: &str = "tokenizer.ggml.escape_whitespaces";
const UNKNOWN: &str = "tokenizer.ggml.unknown_token_id";

/// Stands for a space in a piece.
const SPACE: &str = "\u{2581}";

/// Longest piece whose ways to be joined are listed, in characters. SentencePiece makes pieces of 16.
const MAX_PIECE_CHARS: usize = 64;

impl Tokenizer {
    /// Builds the tokenizer of a file with pieces.
    pub(super) fn from_pieces(
        gguf: &Gguf,
        file: &[u8],
        tokens: &[&str],
        types: &[i64],
    ) -> Result<Self, TokenizerProblem> {
        let meta = &gguf.metadata;
        let failed = |error: tokenizers::Error| TokenizerProblem::Library(error.to_string());
        // Pieces are found in whole texts: no rule cuts them before.
        if let Some(rule) = meta.opt_string(PRE)?.filter(|rule| !["default", "gemma"].contains(rule)) {
            return Err(unsupported(PRE, rule, "default and gemma, for SentencePiece"));
        }
        check_bytes(tokens, types)?;
        let scores = scores(gguf, file, tokens.len())?;
        let mut vocab = Vocab::default();
        for (token, id) in tokens.iter().zip(0..) {
            vocab.entry((*token).to_owned()).or_insert(id);
        }
        let merges = merges(tokens, types, &scores);
        let mut model = BPE::builder().vocab_and_merges(vocab, merges).byte_fallback(true).fuse_unk(true);
        if let Some(unknown) = unknown_token(meta, tokens)? {
            model = model.unk_token(unknown);
        }
        let mut library = Library::new(model.build().map_err(failed)?);
        library.with_normalizer(Some(normaliser(meta)?)).map_err(failed)?;
        let special =
            tokens.iter().zip(types).filter(|(token, kind)| is_special(**kind) && !token.is_empty());
        let special = special.map(|(token, _)| AddedToken::from(*token, true).normalized(false));
        library.add_special_tokens(special).map_err(failed)?;
        let SpecialIds { begin, ends: eos } = SpecialIds::read(gguf, file, tokens, &SpecialRules::pieces())?;
        let bytes = TokenBytes::of_pieces(tokens, types);
        Ok(Self { library, bytes, begin, eos, unused: unused_ids(types), templated: false })
    }
}

/// Spaces become [`SPACE`], with one more before each piece of text unless the file says no.
fn normaliser(meta: &Metadata) -> Result<NormalizerWrapper, TokenizerProblem> {
    let replace = Replace::new(" ", SPACE).map_err(|error| TokenizerProblem::Library(error.to_string()))?;
    if meta.opt_bool(ESCAPE)? == Some(false) {
        return Err(entry(ESCAPE, "false is not supported; only true is".to_owned()));
    }
    let mut steps: Vec<NormalizerWrapper> = Vec::new();
    if meta.opt_bool(ADD_SPACE)?.unwrap_or(true) {
        steps.push(Prepend::new(SPACE.to_owned()).into());
    }
    steps.push(replace.into());
    Ok(Sequence::new(steps).into())
}

/// Refuses a vocabulary that lacks a byte: texts would lose characters.
fn check_bytes(tokens: &[&str], types: &[i64]) -> Result<(), TokenizerProblem> {
    let own = tokens.iter().zip(types).filter(|(_, kind)| **kind == TYPE_BYTE);
    let own: Vec<Option<u8>> = own.map(|(token, _)| byte_of(token)).collect();
    match (0..=255).find(|byte| !own.contains(&Some(*byte))) {
        None => Ok(()),
        Some(byte) => {
            let why = format!("no token of type 6 spells the byte 0x{byte:02X}");
            Err(entry(TYPES, why))
        }
    }
}

/// The byte that a token such as `<0x0A>` stands for.
fn byte_of(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

pub(super) fn scores(gguf: &Gguf, file: &[u8], count: usize) -> Result<Vec<f32>, TokenizerProblem> {
    let array = gguf.metadata.array(SCORES, file)?;
    let mut scores = array.floats().ok_or_else(|| entry(SCORES, "it is not a list of numbers".to_owned()))?;
    if scores.len() < count {
        return Err(entry(SCORES, format!("{} entries for a vocabulary of {count}", scores.len())));
    }
    scores.truncate(count);
    match scores.iter().position(|score| !score.is_finite()) {
        None => Ok(scores),
        Some(id) => Err(entry(SCORES, format!("the score of token {id} is not a number"))),
    }
}

fn unknown_token(meta: &Metadata, tokens: &[&str]) -> Result<Option<String>, TokenizerProblem> {
    let Some(id) = meta.opt_unsigned(UNKNOWN)? else { return Ok(None) };
    match usize::try_from(id).ok().and_then(|id| tokens.get(id)) {
        Some(token) => Ok(Some((*token).to_owned())),
        None => Err(entry(TOKENS, format!("{UNKNOWN} {id} is outside the vocabulary of {}", tokens.len()))),
    }
}

/// A way to join two pieces.
struct Join<'t> {
    left: &'t str,
    right: &'t str,
    score: f32,
}

/// All ways to join two pieces to a third, the highest score first.
fn merges(tokens: &[&str], types: &[i64], scores: &[f32]) -> Vec<(String, String)> {
    let plain = |kind: i64| ![TYPE_CONTROL, TYPE_USER_DEFINED, TYPE_UNUSED, TYPE_BYTE].contains(&kind);
    let pieces: HashMap<&str, usize> = tokens
        .iter()
        .zip(types)
        .enumerate()
        .filter(|(_, (_, k))| plain(**k))
        .map(|(i, (t, _))| (*t, i))
        .collect();
    let mut joins: Vec<Join<'_>> = Vec::new();
    for ((token, kind), score) in tokens.iter().zip(types).zip(scores) {
        let chars = token.chars().count();
        if !plain(*kind) || !(2..=MAX_PIECE_CHARS).contains(&chars) {
            continue;
        }
        let first = joins.len();
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if pieces.contains_key(left) && pieces.contains_key(right) {
                joins.push(Join { left, right, score: *score });
            }
        }
        joins[first..].sort_by_key(|join| (pieces[join.left], pieces[join.right]));
    }
    // Among equal scores the longer left piece first, as in the implementation that models are tested with.
    joins.sort_by(|a, b| {
        let longer = |x: &str, y: &str| y.chars().count().cmp(&x.chars().count());
        b.score
            .total_cmp(&a.score)
            .then_with(|| longer(a.left, b.left))
            .then_with(|| longer(a.right, b.right))
    });
    joins.into_iter().map(|join| (join.left.to_owned(), join.right.to_owned())).collect()
}

impl TokenBytes {
    /// The bytes of pieces: a piece spells itself, with spaces for [`SPACE`].
    pub(super) fn of_pieces(tokens: &[&str], types: &[i64]) -> Self {
        let mut all = Self { bytes: Vec::new(), ends: Vec::with_capacity(tokens.len()) };
        for (token, kind) in tokens.iter().zip(types) {
            match *kind {
                TYPE_CONTROL | TYPE_UNUSED => {}
                TYPE_USER_DEFINED => all.bytes.extend_from_slice(token.as_bytes()),
                TYPE_BYTE => all.bytes.extend(byte_of(token)),
                _ => all.bytes.extend_from_slice(token.replace(SPACE, " ").as_bytes()),
            }
            all.ends.push(all.bytes.len());
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Model;
    use crate::gguf::GgufValue;
    use crate::seeded::SeededModel;
    use std::path::Path;
    use std::sync::Arc;

    /// A model with a vocabulary of 271: three control tokens, 256 bytes and twelve pieces.
    fn pieces(others: &[(&str, GgufValue)]) -> Result<Model, String> {
        let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
        tokens.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
        let own =
            [SPACE, "h", "e", "l", "o", "he", "ll", "hell", "hello", "\u{2581}hello", "lo", "\u{2581}h"];
        tokens.extend(own.map(str::to_owned));
        let types = (0..tokens.len())
            .map(|id| {
                if id < 3 {
                    3
                } else if id < 259 {
                    6
                } else {
                    1
                }
            })
            .collect();
        let mut scores = vec![0.0; 264];
        scores.extend([-1.0, -2.0, -3.0, -4.0, -5.0, -0.5, -6.0]);
        let mut keys = vec![
            ("tokenizer.ggml.model", GgufValue::String("llama".to_owned())),
            ("tokenizer.ggml.pre", GgufValue::String("default".to_owned())),
            ("tokenizer.ggml.tokens", GgufValue::Strings(tokens)),
            ("tokenizer.ggml.token_type", GgufValue::Integers(types)),
            ("tokenizer.ggml.scores", GgufValue::Floats(scores)),
            ("tokenizer.ggml.unknown_token_id", GgufValue::U32(0)),
            ("tokenizer.ggml.add_bos_token", GgufValue::Bool(true)),
        ];
        keys.extend(others.iter().cloned());
        let file = SeededModel::default().gguf_with(&keys);
        Model::from_bytes(Path::new("m.gguf"), Arc::new(file)).map_err(|error| error.to_string())
    }

    #[test]
    fn the_join_with_the_highest_score_comes_first() {
        let model = pieces(&[]).unwrap();
        let tokenizer = model.tokenizer();
        let token = |id: u32| tokenizer.token(id).unwrap();
        let ids = tokenizer.encode("hello").unwrap();
        // "lo" has the highest score, so that "hello" is never made.
        let texts: Vec<String> = ids.iter().map(|id| token(*id)).collect();
        assert_eq!(texts, ["<s>", SPACE, "he", "l", "lo"]);
        assert_eq!(tokenizer.decode(&ids), " hello");
        assert_eq!(tokenizer.eos_ids(), [2]);
    }

    #[test]
    fn bytes_spell_what_no_piece_does() {
        let model = pieces(&[("tokenizer.ggml.add_space_prefix", GgufValue::Bool(false))]).unwrap();
        let ids = model.tokenizer().encode("é").unwrap();
        assert_eq!(ids, [1, 3 + 0xC3, 3 + 0xA9]);
        assert_eq!(model.tokenizer().decode(&ids), "é");
        assert_eq!(model.tokenizer().decode(&model.tokenizer().encode(" h").unwrap()), " h");
    }

    #[test]
    fn a_rule_that_cuts_texts_is_refused_by_name() {
        let refused = pieces(&[("tokenizer.ggml.pre", GgufValue::String("smollm".to_owned()))]).unwrap_err();
        assert!(
            refused.contains("key tokenizer.ggml.pre is \"smollm\", which is not supported"),
            "{refused}"
        );
    }

    #[test]
    fn wrong_lists_are_refused_by_name() {
        let short = pieces(&[("tokenizer.ggml.scores", GgufValue::Floats(vec![0.0; 3]))]).unwrap_err();
        assert!(short.contains("tokenizer.ggml.scores: 3 entries for a vocabulary of 271"), "{short}");
        let types = GgufValue::Integers(vec![1; 271]);
        let plain = pieces(&[("tokenizer.ggml.token_type", types)]).unwrap_err();
        assert!(plain.contains("no token of type 6 spells the byte 0x00"), "{plain}");
    }
}
