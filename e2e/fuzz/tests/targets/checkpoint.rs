//! The files of a checkpoint, one of them mutated: the weights, the tokenizer, and the small JSON files.

use crate::{KIB, MIB, TIME, fuzz, fuzz_made, split_line};
use std::path::Path;
use trustformers_fuzz::Bounds;
use trustformers_model::Model;
use trustformers_model::seeded::SeededEncoder;

/// A tensor takes some 60 bytes of the header and some 300 in the list of tensors; names may be escaped. The
/// plan and the other files take some MiB.
const WEIGHTS: Bounds = Bounds { input_bytes: 64 * KIB, heap_bytes: 32 * MIB, time: TIME };

/// Parsed JSON takes up to 100 bytes for two of the file (`1,`), three times: as a value, as text, and in the
/// library.
const TOKENIZER: Bounds = Bounds { input_bytes: 64 * KIB, heap_bytes: 48 * MIB, time: TIME };

/// As above, with one copy only.
const JSON: Bounds = Bounds { input_bytes: 32 * KIB, heap_bytes: 32 * MIB, time: TIME };

/// A checkpoint of a few KiB.
pub(crate) fn encoder() -> SeededEncoder {
    SeededEncoder {
        layers: 1,
        heads: 2,
        head_dim: 4,
        feed_forward: 16,
        positions: 24,
        ..SeededEncoder::default()
    }
}

/// Writes a file anew. A file system writes one that is truncated to nothing to the disk at once, so it goes
/// first.
fn replace(path: &Path, content: &[u8]) {
    let _absent_at_first = std::fs::remove_file(path);
    std::fs::write(path, content).unwrap();
}

/// The outcome of loading the folder and of reading some texts.
fn load(folder: &Path) -> String {
    match Model::load(folder, &mut |_| {}) {
        Err(error) => error.to_string().replace(&folder.display().to_string(), ""),
        Ok(model) => {
            let texts = ["", "the cat sat", "zq \u{65e5}\u{672c} ~~ \u{1f980}", "[CLS] a [SEP] b [MASK]"];
            let encoded = texts.map(|text| model.encode(text).map(|encoded| encoded.ids));
            let rows = model.facts().vocabulary;
            for ids in encoded.iter().flatten() {
                assert!(ids.iter().all(|id| (*id as usize) < rows), "{ids:?} of {rows}");
            }
            assert!(encoded.iter().all(Result::is_ok), "{encoded:?}");
            // A template may have no form for pairs; then an error says so.
            if let Ok(pair) = model.encode_pair("the cat sat", "[SEP] b", 8) {
                assert!(pair.ids.iter().all(|id| (*id as usize) < rows), "{:?} of {rows}", pair.ids);
            }
            "loaded".to_owned()
        }
    }
}

#[test]
fn safetensors() {
    let folder = tempfile::tempdir().unwrap();
    encoder().write(folder.path()).unwrap();
    let words =
        ["\"dtype\":\"F32\"", "\"I64\"", "data_offsets", "__metadata__", "bert.", "embeddings.position_ids"];
    let made = [encoder().files()["model.safetensors"].clone()];
    fuzz_made("safetensors", &made, &words, WEIGHTS, |input| {
        replace(&folder.path().join("model.safetensors"), input);
        load(folder.path())
    });
}

#[test]
fn tokenizer() {
    let folder = tempfile::tempdir().unwrap();
    encoder().write(folder.path()).unwrap();
    let words = [
        "\"type\":\"BPE\"",
        "\"type\":\"Sequence\"",
        "\"BertProcessing\"",
        "\"[UNK]\"",
        "\"special_tokens\":",
        "\"ids\":[",
        "null",
        "{",
        "[",
    ];
    fuzz("tokenizer", &words, TOKENIZER, |input| {
        replace(&folder.path().join("tokenizer.json"), input);
        load(folder.path())
    });
}

/// The first line of an input names the file.
#[test]
fn checkpoint() {
    let names = [
        "config.json",
        "modules.json",
        "1_Pooling/config.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
        "tokenizer_config.json",
    ];
    let files = encoder().files();
    let words = ["NaN", "-Infinity", "null", "true", "1e400", "[", "{", "\"chat_template\":", "\"prompts\":"];
    let folder = tempfile::tempdir().unwrap();
    encoder().write(folder.path()).unwrap();
    fuzz("checkpoint", &words, JSON, |input| {
        let (line, content) = split_line(input);
        let name = names.iter().find(|name| **name == line).unwrap_or(&names[0]);
        replace(&folder.path().join(name), content);
        let outcome = load(folder.path());
        match files.get(name) {
            Some(content) => replace(&folder.path().join(name), content),
            None => std::fs::remove_file(folder.path().join(name)).unwrap(),
        }
        outcome
    });
}
