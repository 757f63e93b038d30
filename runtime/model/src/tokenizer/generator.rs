//! The `tokenizer.json` of a model that generates text: byte-pair encoding over bytes, or over the pieces of
//! SentencePiece with bytes for what no piece spells.

use super::{
    TYPE_BYTE, TYPE_CONTROL, TYPE_UNUSED, TYPE_USER_DEFINED, TokenBytes, Tokenizer, distinct_ends, unused_ids,
};
use crate::error::TokenizerProblem;
use serde_json::Value;
use tokenizers::Tokenizer as Library;
use tokenizers::models::ModelWrapper;

/// Parts of the file whose kind decides the ids, with the supported kinds; a part may also be missing. The
/// library would panic on some damaged parts of other kinds.
const KINDS: [(&str, &str, &[&str]); 3] = [
    ("normalizer", "normalizer.type", &["NFC", "Prepend", "Replace", "Sequence"]),
    ("pre_tokenizer", "pre_tokenizer.type", &["ByteLevel", "Digits", "Metaspace", "Sequence", "Split"]),
    ("post_processor", "post_processor.type", &["ByteLevel", "Sequence", "TemplateProcessing"]),
];

/// The lists in which a part of kind `Sequence` holds its steps.
const STEPS: [&str; 3] = ["normalizers", "pretokenizers", "processors"];

/// How the tokens of a vocabulary spell bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Spelling {
    /// A character for each byte.
    ByteLevel,
    /// Characters, a mark for a space, and tokens such as `<0x0A>`.
    Pieces,
}

impl Tokenizer {
    /// Builds the tokenizer that the bytes of a `tokenizer.json` describe; `ends` are the ids that end an
    /// answer. The file's own truncation and padding are dropped.
    pub(crate) fn of_generator(file: &[u8], ends: Vec<u32>) -> Result<Self, TokenizerProblem> {
        let Parsed { library, bytes, unused } = Parsed::read(file)?;
        let count = bytes.ends.len();
        if let Some(id) = ends.iter().find(|id| **id as usize >= count) {
            let why = format!("id {id} is outside the vocabulary of {count}");
            return Err(TokenizerProblem::Entry { key: "eos_token_id", why });
        }
        let begin = begin(&library, count)?;
        let eos = distinct_ends("eos_token_id", ends)?;
        Ok(Self { library, bytes, begin, eos, unused, templated: false })
    }

    /// The same of a model that reads whole texts: its template may put tokens after a text as well.
    pub(crate) fn of_reader(file: &[u8]) -> Result<Self, TokenizerProblem> {
        let Parsed { library, bytes, unused } = Parsed::read(file)?;
        let tokenizer = Self { library, bytes, begin: None, eos: Vec::new(), unused, templated: true };
        tokenizer.check_template()?;
        Ok(tokenizer)
    }
}

/// What was read from a file.
struct Parsed {
    library: Library,
    bytes: TokenBytes,
    unused: Vec<u32>,
}

impl Parsed {
    fn read(file: &[u8]) -> Result<Self, TokenizerProblem> {
        let failed = |error: tokenizers::Error| TokenizerProblem::Library(error.to_string());
        let not_json = |error: serde_json::Error| TokenizerProblem::Library(error.to_string());
        let mut content: Value = serde_json::from_slice(file).map_err(not_json)?;
        let kind = content["model"]["type"].as_str().unwrap_or("BPE");
        if kind != "BPE" {
            let (key, found) = ("model.type", kind.to_owned());
            return Err(TokenizerProblem::Unsupported { key, found, supported: "BPE" });
        }
        for (part, key, kinds) in KINDS {
            check_kinds(&content[part], key, kinds)?;
        }
        check_templates(&content["post_processor"])?;
        let spelling = spelling(&content)?;
        // The decoder is not used: texts are made of the bytes of tokens.
        if let Some(parts) = content.as_object_mut() {
            parts.remove("decoder");
        }
        let bytes = serde_json::to_vec(&content).map_err(not_json)?;
        let mut library = Library::from_bytes(bytes).map_err(failed)?;
        library.with_padding(None).with_truncation(None).map_err(failed)?;
        let ModelWrapper::BPE(_) = library.get_model() else {
            let (key, found) = ("model.type", "another kind".to_owned());
            return Err(TokenizerProblem::Unsupported { key, found, supported: "BPE" });
        };
        let vocabulary = Vocabulary::of(&library)?;
        let (tokens, types) = (vocabulary.tokens(), &vocabulary.types);
        let bytes = match spelling {
            Spelling::ByteLevel => TokenBytes::new(&tokens, types),
            Spelling::Pieces => TokenBytes::of_pieces(&tokens, types),
        };
        let unused = unused_ids(types);
        Ok(Self { library, bytes, unused })
    }
}

/// A vocabulary by ids.
struct Vocabulary {
    texts: Vec<String>,
    types: Vec<i64>,
}

impl Vocabulary {
    fn of(library: &Library) -> Result<Self, TokenizerProblem> {
        let listed = library.get_vocab(true);
        // An id far beyond the number of tokens would take memory out of proportion to the file.
        let most = listed.len().saturating_mul(2);
        let mut own = Self { texts: Vec::new(), types: Vec::new() };
        for (text, id) in listed {
            let index = id as usize;
            if index >= most {
                let why = format!("{text:?} has the id {id} in a vocabulary of {}", most / 2);
                return Err(TokenizerProblem::Entry { key: "model.vocab", why });
            }
            let len = own.texts.len().max(index + 1);
            own.texts.resize(len, String::new());
            // An id without a token must never be produced.
            own.types.resize(len, TYPE_UNUSED);
            own.types[index] = if is_byte(&text) { TYPE_BYTE } else { 1 };
            own.texts[index] = text;
        }
        for (id, token) in library.get_added_tokens_decoder() {
            if let Some(kind) = own.types.get_mut(id as usize) {
                *kind = if token.special { TYPE_CONTROL } else { TYPE_USER_DEFINED };
            }
        }
        Ok(own)
    }

    fn tokens(&self) -> Vec<&str> {
        self.texts.iter().map(String::as_str).collect()
    }
}

/// Whether a token stands for one byte, as `<0x0A>` does.
fn is_byte(text: &str) -> bool {
    let digits = text.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|digits| digits.len() == 2 && u8::from_str_radix(digits, 16).is_ok())
}

/// Steps of a part from which on a file is refused; the longest known list has seven.
const MAX_STEPS: usize = 64;

/// The steps of a part: itself, or those in its list.
fn steps(part: &Value) -> Vec<&Value> {
    let mut open = vec![part];
    let mut all = Vec::new();
    while let Some(part) = open.pop().filter(|_| all.len() < MAX_STEPS) {
        all.push(part);
        open.extend(STEPS.iter().filter_map(|list| part[*list].as_array()).flatten());
    }
    all
}

fn check_kinds(part: &Value, key: &'static str, kinds: &[&str]) -> Result<(), TokenizerProblem> {
    let all = steps(part);
    if all.len() == MAX_STEPS {
        let why = format!("its list has {MAX_STEPS} steps or more");
        return Err(TokenizerProblem::Entry { key, why });
    }
    for step in all.into_iter().filter(|step| !step.is_null()) {
        let found = step["type"].as_str().unwrap_or("unknown");
        if !kinds.contains(&found) {
            let supported =
                "NFC, Prepend, Replace; ByteLevel, Digits, Metaspace, Split; TemplateProcessing; Sequence";
            return Err(TokenizerProblem::Unsupported { key, found: found.to_owned(), supported });
        }
    }
    Ok(())
}

/// Refuses a template with a piece that it does not define: the library would panic at the first text.
fn check_templates(part: &Value) -> Result<(), TokenizerProblem> {
    let wrong = |why: String| TokenizerProblem::Entry { key: "post_processor", why };
    for template in steps(part).into_iter().filter(|step| step["type"] == "TemplateProcessing") {
        let defined = &template["special_tokens"];
        for piece in template["single"].as_array().into_iter().flatten() {
            if let Some(name) = piece["SpecialToken"]["id"].as_str().filter(|name| defined[*name].is_null()) {
                let why = format!("single has the token {name:?}, which special_tokens does not define");
                return Err(wrong(why));
            }
            if piece["Sequence"]["id"] == "B" {
                return Err(wrong("single has the sequence B, but it is for one text, A".to_owned()));
            }
        }
        let count = |token: &Value, key: &str| token[key].as_array().map(Vec::len);
        let uneven = defined.as_object().into_iter().flatten();
        if let Some((name, _)) = uneven.into_iter().find(|(_, t)| count(t, "ids") != count(t, "tokens")) {
            return Err(wrong(format!("the special token {name:?} has not as many ids as tokens")));
        }
    }
    Ok(())
}

fn spelling(content: &Value) -> Result<Spelling, TokenizerProblem> {
    let has = |part: &str, kind: &str| steps(&content[part]).iter().any(|step| step["type"] == kind);
    if has("pre_tokenizer", "ByteLevel") {
        return Ok(Spelling::ByteLevel);
    }
    if content["model"]["byte_fallback"] == true {
        return Ok(Spelling::Pieces);
    }
    let why =
        "it has neither the pre_tokenizer ByteLevel nor byte_fallback, so some texts could not be spelled";
    Err(TokenizerProblem::Entry { key: "model.byte_fallback", why: why.to_owned() })
}

/// The token that the file's template puts before every text.
fn begin(library: &Library, count: usize) -> Result<Option<u32>, TokenizerProblem> {
    let failed = |error: tokenizers::Error| TokenizerProblem::Library(error.to_string());
    let ids = |special: bool| library.encode_fast("a", special).map(|text| text.get_ids().to_vec());
    let (plain, whole) = (ids(false).map_err(failed)?, ids(true).map_err(failed)?);
    let wrong = |why: &str| TokenizerProblem::Entry { key: "post_processor", why: why.to_owned() };
    match whole.split_first() {
        _ if whole == plain => Ok(None),
        Some((first, rest)) if rest == plain && (*first as usize) < count => Ok(Some(*first)),
        Some((_, rest)) if rest == plain => Err(wrong("its token lies outside the vocabulary")),
        _ => Err(wrong(
            "it adds other tokens than one before a text; one after it would end an answer before it begins",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Llama 3's kind of file, with a vocabulary of the 256 bytes, one merge and two special tokens.
    fn byte_level() -> Value {
        let mut vocab: serde_json::Map<String, Value> = serde_json::Map::new();
        for (id, c) in crate::tokenizer::byte_chars().iter().enumerate() {
            vocab.insert(c.to_string(), id.into());
        }
        vocab.insert("he".to_owned(), 256.into());
        let special = |id: u32, content: &str| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        };
        json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": [special(257, "<begin>"), special(258, "<end>")],
            "normalizer": null,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "post_processor": {"type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<begin>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<begin>": {"id": "<begin>", "ids": [257], "tokens": ["<begin>"]}}},
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                "vocab": vocab, "merges": [["h", "e"]]},
        })
    }

    fn load(file: &Value) -> Result<Tokenizer, String> {
        Tokenizer::of_generator(file.to_string().as_bytes(), vec![258]).map_err(|error| error.to_string())
    }

    #[test]
    fn bytes_are_spelled_and_the_begin_token_comes_once() {
        let tokenizer = load(&byte_level()).unwrap();
        let ids = tokenizer.encode("he é").unwrap();
        assert_eq!((ids[0], ids[1], ids.len()), (257, 256, 5));
        assert_eq!(tokenizer.decode(&ids), "he é");
        assert_eq!((tokenizer.begin_id(), tokenizer.eos_ids()), (Some(257), &[258][..]));
        assert_eq!(tokenizer.encode_rendered("<begin>he").unwrap(), [257, 256]);
        assert_eq!(tokenizer.token(258).as_deref(), Some("<end>"));
    }

    #[test]
    fn what_would_change_answers_is_refused_by_name() {
        let changed = |change: fn(&mut Value)| {
            let mut file = byte_level();
            change(&mut file);
            load(&file).unwrap_err()
        };
        let error = changed(|file| file["model"]["type"] = "Unigram".into());
        assert!(error.contains("key model.type is \"Unigram\""), "{error}");
        let error = changed(|file| file["normalizer"] = json!({"type": "Precompiled"}));
        assert!(error.contains("key normalizer.type is \"Precompiled\""), "{error}");
        let error = changed(|file| {
            // The first steps of a long list must be checked as well.
            let mut steps = vec![json!({"type": "NFC"}); 70];
            steps[0] = json!({"type": "Precompiled"});
            file["normalizer"] = json!({"type": "Sequence", "normalizers": steps});
        });
        assert!(error.contains("key normalizer.type: its list has 64 steps or more"), "{error}");
        let error = changed(|file| file["pre_tokenizer"] = Value::Null);
        assert!(error.contains("neither the pre_tokenizer ByteLevel nor byte_fallback"), "{error}");
        let error = changed(|file| {
            file["post_processor"]["single"]
                .as_array_mut()
                .unwrap()
                .push(json!({"SpecialToken": {"id": "<begin>", "type_id": 0}}));
        });
        assert!(error.contains("adds other tokens than one before a text"), "{error}");
        let error = changed(|file| file["post_processor"]["special_tokens"] = json!({}));
        assert!(error.contains("which special_tokens does not define"), "{error}");
        let outside = Tokenizer::of_generator(byte_level().to_string().as_bytes(), vec![900]);
        assert!(outside.unwrap_err().to_string().contains("id 900 is outside the vocabulary of 259"));
    }
}
