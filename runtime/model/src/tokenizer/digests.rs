//! Ids of 10,000 texts for every kind of tokenizer, compared by digests with those of the tokenizers library
//! for Python. `e2e/reference/tokenizer_digests.py` repeats the sequence of texts and wrote the digests.

use super::*;
use crate::gguf::{GgufValue, GgufWriter};
use crate::source;
use serde::Deserialize;
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::PathBuf;

const TEXTS: usize = 10_000;
/// Texts of one digest, so that a difference can be found among fewer texts.
const PER_DIGEST: usize = 1000;
const SEED: u64 = 16;

/// The control tokens of the small byte-level tokenizer.
const CONTROLS: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

#[derive(Deserialize)]
struct Digests {
    texts: String,
    trained: BTreeMap<String, Vec<String>>,
    splits: BTreeMap<String, Vec<String>>,
    models: BTreeMap<String, Vec<String>>,
}

impl Digests {
    fn read() -> Self {
        serde_json::from_str(include_str!("reference/digests.json")).unwrap()
    }
}

/// What texts are made of.
#[derive(Deserialize)]
struct Fragments {
    words: Vec<String>,
    emoji: Vec<String>,
    code: Vec<String>,
    special: Vec<String>,
    spaces: Vec<String>,
    punctuation: String,
    blocks: Vec<[u32; 2]>,
}

/// The texts of a seeded sequence.
struct TextSequence {
    state: u64,
    fragments: Fragments,
}

impl TextSequence {
    fn new() -> Self {
        let fragments = serde_json::from_str(include_str!("reference/fragments.json")).unwrap();
        Self { state: SEED, fragments }
    }

    fn below(&mut self, count: usize) -> usize {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % count as u64) as usize
    }

    fn pick(&mut self, list: impl Fn(&Fragments) -> &Vec<String>) -> String {
        let index = self.below(list(&self.fragments).len());
        list(&self.fragments)[index].clone()
    }

    fn many(&mut self, most: usize, make: impl Fn(&mut Self) -> String) -> String {
        (0..=self.below(most)).map(|_| make(self)).collect()
    }

    fn code_point(&mut self) -> String {
        let index = self.below(self.fragments.blocks.len());
        let [first, last] = self.fragments.blocks[index];
        let code = first + self.below((last - first + 1) as usize) as u32;
        char::from_u32(code).unwrap().to_string()
    }

    fn ascii(&mut self, first: u8, count: usize) -> String {
        char::from(first + self.below(count) as u8).to_string()
    }

    fn part(&mut self) -> Vec<u8> {
        let text = match self.below(10) {
            0 => {
                let space = if self.below(2) == 1 { " " } else { "" };
                format!("{space}{}", self.pick(|own| &own.words))
            }
            1 => self.many(6, |own| own.pick(|own| &own.spaces)),
            2 => self.many(6, Self::code_point),
            3 => self.pick(|own| &own.emoji),
            4 => self.pick(|own| &own.code),
            5 => self.many(12, |own| own.ascii(b'0', 10)),
            6 => self.pick(|own| &own.special),
            7 => return (0..=self.below(5)).map(|_| self.below(256) as u8).collect(),
            8 => self.many(5, |own| {
                let marks: Vec<char> = own.fragments.punctuation.chars().collect();
                marks[own.below(marks.len())].to_string()
            }),
            _ => {
                let letter = self.ascii(b'a', 26);
                let accents =
                    self.many(3, |own| char::from_u32(0x300 + own.below(0x70) as u32).unwrap().to_string());
                letter + &accents
            }
        };
        text.into_bytes()
    }

    /// Bytes that are no UTF-8 come as every text does that is read from bytes: with a mark in their place.
    fn text(&mut self) -> String {
        let bytes: Vec<u8> = (0..=self.below(8)).flat_map(|_| self.part()).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn all() -> Vec<String> {
        let mut own = Self::new();
        (0..TEXTS).map(|_| own.text()).collect()
    }
}

fn hex(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Compares the ids of all texts, and what the ids spell with the characters that tokens make.
fn check(what: &str, tokenizer: &Tokenizer, texts: &[String], expected: &[String]) {
    assert_eq!(expected.len(), TEXTS / PER_DIGEST);
    for (index, (texts, expected)) in texts.chunks(PER_DIGEST).zip(expected).enumerate() {
        let mut digest = Sha256::new();
        for text in texts {
            let ids = tokenizer.encode(text).unwrap();
            digest.update((ids.len() as u32).to_le_bytes());
            ids.iter().for_each(|id| digest.update(id.to_le_bytes()));
        }
        let first = index * PER_DIGEST;
        assert_eq!(
            hex(digest.finalize().as_slice()),
            *expected,
            "{what}, texts {first} to {}",
            first + PER_DIGEST - 1
        );
    }
}

/// Texts come out of a stream of tokens in whole characters.
fn check_characters(what: &str, tokenizer: &Tokenizer, texts: &[String]) {
    for text in &texts[..500] {
        let ids = tokenizer.encode(text).unwrap();
        let mut detokenizer = Detokenizer::new();
        let mut streamed = String::new();
        for id in &ids {
            let piece = detokenizer.push(tokenizer.token_bytes(*id));
            // A mark that stands for half a character must stand in the text itself.
            assert!(
                !piece.contains('\u{fffd}') || text.contains('\u{fffd}'),
                "{what}: {piece:?} of {text:?}"
            );
            streamed.push_str(&piece);
        }
        streamed.push_str(&detokenizer.finish());
        assert_eq!(streamed, tokenizer.decode(&ids), "{what}: {text:?}");
    }
}

#[test]
fn the_sequence_of_texts_is_that_of_the_recipe() {
    let texts = TextSequence::all();
    assert_eq!(hex(Sha256::digest(texts.concat()).as_slice()), Digests::read().texts);
}

#[test]
fn small_tokenizers_of_every_kind_give_the_ids_of_the_reference() {
    let (texts, expected) = (TextSequence::all(), Digests::read().trained);
    let cases = [
        ("byte_level", Tokenizer::of_generator(include_bytes!("reference/byte_level.json"), Vec::new())),
        ("pieces", Tokenizer::of_generator(include_bytes!("reference/pieces.json"), Vec::new())),
        ("word_piece", Tokenizer::from_json(include_bytes!("reference/word_piece.json"))),
        ("unigram", Tokenizer::from_json(include_bytes!("reference/unigram.json"))),
    ];
    assert_eq!(expected.len(), cases.len());
    for (name, tokenizer) in cases {
        let tokenizer = tokenizer.unwrap();
        check(name, &tokenizer, &texts, &expected[name]);
        if ["byte_level", "pieces"].contains(&name) {
            check_characters(name, &tokenizer, &texts);
        }
    }
}

/// The small byte-level vocabulary in a GGUF file that names this cut.
fn with_cut(name: &str) -> Tokenizer {
    let content: Value = serde_json::from_str(include_str!("reference/byte_level.json")).unwrap();
    let vocab = content["model"]["vocab"].as_object().unwrap();
    let mut tokens = vec![String::new(); vocab.len()];
    for (token, id) in vocab {
        tokens[id.as_u64().unwrap() as usize] = token.clone();
    }
    let types = tokens.iter().map(|token| if CONTROLS.contains(&token.as_str()) { 3 } else { 1 }).collect();
    let merges = content["model"]["merges"].as_array().unwrap().iter();
    let merges = merges.map(|pair| format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()));
    let mut file = GgufWriter::new();
    file.pair(MODEL, &GgufValue::String("gpt2".to_owned()))
        .pair(PRE, &GgufValue::String(name.to_owned()))
        .pair(MERGES, &GgufValue::Strings(merges.collect()))
        .pair(TYPES, &GgufValue::Integers(types))
        .pair(TOKENS, &GgufValue::Strings(tokens));
    let bytes = file.finish();
    Tokenizer::from_gguf(&Gguf::parse(&bytes).unwrap(), &bytes).unwrap()
}

#[test]
fn every_cut_of_gguf_files_gives_the_ids_of_the_reference() {
    let (texts, expected) = (TextSequence::all(), Digests::read().splits);
    assert_eq!(expected.len(), 16);
    for (name, expected) in expected {
        check(&name, &with_cut(&name), &texts, &expected);
    }
}

/// The folder of the test models, as in scripts and other tests.
fn models() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).map(PathBuf::from);
    set("TRUSTFORMERS_MODELS").or_else(|| {
        let cache = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")))?;
        Some(cache.join("trustformers").join("models"))
    })
}

#[test]
fn tokenizers_of_real_models_give_the_ids_of_the_reference() {
    let (texts, expected) = (TextSequence::all(), Digests::read().models);
    for (name, expected) in expected {
        let path = models().unwrap_or_default().join(&name);
        if !path.exists() {
            println!("skipped: {} is missing: get it with `make models`", path.display());
            continue;
        }
        let file = source::open(&path, &mut |_| ControlFlow::Continue(())).unwrap();
        let bytes: &[u8] = (*file).as_ref();
        let tokenizer = if name.ends_with(".gguf") {
            Tokenizer::from_gguf(&Gguf::parse(bytes).unwrap(), bytes).unwrap()
        } else {
            Tokenizer::from_json(bytes).unwrap()
        };
        check(&name, &tokenizer, &texts, &expected);
    }
}
