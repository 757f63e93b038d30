//! A GGUF file, through the loader: keys, tensors, tokenizer, architecture and chat template.

use crate::{KIB, MIB, TIME, fuzz_made, seeds};
use std::path::Path;
use std::sync::Arc;
use trustformers_fuzz::Bounds;
use trustformers_model::Model;

/// The shortest list element takes one byte of the file (a text in the list of tokens takes 8), and some 200
/// bytes in the tokenizer's tables; the expressions that split texts take some MiB, whatever the file holds.
const BOUNDS: Bounds = Bounds { input_bytes: 64 * KIB, heap_bytes: 48 * MIB, time: TIME };

const WORDS: [&str; 12] = [
    "general.architecture",
    "llama.",
    "qwen2.",
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.token_type",
    "tokenizer.ggml.merges",
    "tokenizer.chat_template",
    "split.count",
    "general.alignment",
    "output.weight",
    "token_embd.weight",
    "{% set ns.x = ns %}",
];

#[test]
fn gguf() {
    fuzz_made("gguf", &seeds::models(), &WORDS, BOUNDS, |input| {
        match Model::from_bytes(Path::new("m.gguf"), Arc::new(input.to_vec())) {
            Err(error) => error.to_string(),
            Ok(model) => {
                let encoded = model.tokenizer().encode("hello the <|im_start|> 12 \u{e9}\n");
                let ids = encoded.map(|ids| model.tokenizer().decode(&ids));
                format!("{ids:?} {} {:?}", model.facts().vocabulary, model.chat().map(|_| ()))
            }
        }
    });
}
