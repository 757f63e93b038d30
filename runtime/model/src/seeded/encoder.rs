//! Small BERT checkpoints with random weights, as folders like those that sentence-transformers writes.

use super::folder::{self, Files, NORMALIZE, POOLING, json_file};
use super::store::store;
use super::{BIAS_SCALE, SCALE, element, fnv1a};
use crate::gguf::{GgufValue, GgufWriter};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use trustformers_plan::{DType, Pooling};

/// Special tokens, the first ids of the vocabulary.
const SPECIAL_TOKENS: [&str; 5] = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];

/// Words and pieces beside the single letters and digits, which begin or continue a word.
const WORDS: [&str; 8] = ["the", "cat", "hello", "world", "##ing", "##er", "##ed", "##s"];

/// Marks, each a word by itself.
const MARKS: &str = ".,:;!?'\"()-_/+*=<>[]{}#$%&@\\^`|~";

/// The shape of a seeded encoder. The default takes about 200 KB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeededEncoder {
    /// The seed of all weights.
    pub seed: u64,
    /// Transformer blocks.
    pub layers: usize,
    /// Heads.
    pub heads: usize,
    /// Elements of a head; `heads * head_dim` is the width.
    pub head_dim: usize,
    /// Width of the feed-forward part.
    pub feed_forward: usize,
    /// Rows of the table of positions.
    pub positions: usize,
    /// Tokens of the longest text, as `sentence_bert_config.json` says; `None`: there is no such file.
    pub max_tokens: Option<usize>,
    /// As `modules.json` and the folder of the pooling say; `None`: there are no such files.
    pub pooling: Option<Pooling>,
    /// Whether `modules.json` ends in `Normalize`; not without pooling.
    pub normalised: bool,
    /// How all tensors are stored: F32, F16 or BF16.
    pub dtype: DType,
}

impl Default for SeededEncoder {
    fn default() -> Self {
        Self {
            seed: 1,
            layers: 2,
            heads: 4,
            head_dim: 16,
            feed_forward: 128,
            positions: 128,
            max_tokens: Some(64),
            pooling: Some(Pooling::Mean),
            normalised: true,
            dtype: DType::F32,
        }
    }
}

impl SeededEncoder {
    /// Writes all files into `folder`, which must exist.
    ///
    /// # Errors
    /// When a file or folder cannot be written.
    ///
    /// # Panics
    /// As [`Self::files`].
    pub fn write(&self, folder: &Path) -> std::io::Result<()> {
        folder::write(&self.files(), folder)
    }

    /// Every file's bytes by its path below the folder.
    ///
    /// # Panics
    /// When [`Self::dtype`] is not one of a checkpoint.
    pub fn files(&self) -> BTreeMap<&'static str, Vec<u8>> {
        let mut files = Files::from([
            ("config.json", json_file(&self.config())),
            ("model.safetensors", self.weights()),
            ("tokenizer.json", self.tokenizer()),
        ]);
        if let Some(tokens) = self.max_tokens {
            let config = json!({"max_seq_length": tokens, "do_lower_case": false});
            files.insert("sentence_bert_config.json", json_file(&config));
        }
        if let Some(pooling) = self.pooling {
            let modules: &[folder::SentenceModule] =
                if self.normalised { &[POOLING, NORMALIZE] } else { &[POOLING] };
            files.insert("modules.json", json_file(&folder::modules(modules)));
            let pooling = json!({
                "word_embedding_dimension": self.width(),
                "pooling_mode_cls_token": pooling == Pooling::Cls,
                "pooling_mode_mean_tokens": pooling == Pooling::Mean,
                "pooling_mode_max_tokens": pooling == Pooling::Max,
                "pooling_mode_mean_sqrt_len_tokens": false,
                "pooling_mode_lasttoken": pooling == Pooling::Last,
            });
            files.insert("1_Pooling/config.json", json_file(&pooling));
        }
        files
    }

    pub(super) fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    fn config(&self) -> Value {
        json!({
            "architectures": ["BertModel"],
            "model_type": "bert",
            "hidden_size": self.width(),
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": self.feed_forward,
            "max_position_embeddings": self.positions,
            "vocab_size": vocabulary().len(),
            "type_vocab_size": 2,
            "layer_norm_eps": 1e-12,
            "hidden_act": "gelu",
            "position_embedding_type": "absolute",
        })
    }

    /// The bytes of `tokenizer.json`.
    pub fn tokenizer(&self) -> Vec<u8> {
        let vocabulary = vocabulary();
        let id = |token: &str| vocabulary.iter().position(|known| known == token);
        let around = |token: &str| json!({"SpecialToken": {"id": token, "type_id": 0}});
        let ids = |token: &str| json!({"id": token, "ids": [id(token)], "tokens": [token]});
        let added = SPECIAL_TOKENS.iter().map(|token| {
            json!({"id": id(token), "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        });
        let words: serde_json::Map<String, Value> =
            vocabulary.iter().zip(0..).map(|(word, id)| (word.clone(), Value::from(id))).collect();
        let text = json!({"Sequence": {"id": "A", "type_id": 0}});
        let second = json!({"Sequence": {"id": "B", "type_id": 1}});
        let second_end = json!({"SpecialToken": {"id": "[SEP]", "type_id": 1}});
        json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added.collect::<Vec<_>>(),
            "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
                           "strip_accents": null, "lowercase": true},
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [around("[CLS]"), text, around("[SEP]")],
                "pair": [around("[CLS]"), text, around("[SEP]"), second, second_end],
                "special_tokens": {"[CLS]": ids("[CLS]"), "[SEP]": ids("[SEP]")},
            },
            "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
            "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                      "max_input_chars_per_word": 100, "vocab": words},
        })
        .to_string()
        .into_bytes()
    }

    /// The bytes of a GGUF file of the same model, as llama.cpp's converter writes it, with matrices of
    /// blocks and the word embedding in `matrices`, and everything else in F32. It pools by the mean.
    ///
    /// # Panics
    /// When a row is no whole number of blocks of the type.
    pub fn gguf(&self, matrices: DType) -> Vec<u8> {
        self.gguf_with(matrices, &[])
    }

    /// [`Self::gguf`] with these keys added, or with these values for keys that it has.
    ///
    /// # Panics
    /// As [`Self::gguf`].
    pub fn gguf_with(&self, matrices: DType, keys: &[(&str, GgufValue)]) -> Vec<u8> {
        let plain = Self { dtype: DType::F32, ..*self };
        let format = GgufFormat { architecture: "bert", name: gguf_name, matrices };
        self.gguf_of(&format, &plain.tensors(), keys)
    }

    /// The same of an architecture with these tensors, which are F32.
    pub(super) fn gguf_of(
        &self,
        format: &GgufFormat,
        tensors: &Tensors,
        keys: &[(&str, GgufValue)],
    ) -> Vec<u8> {
        let mut file = GgufWriter::new();
        let given = |name: &str| keys.iter().any(|(key, _)| *key == name);
        for (key, value) in self.pairs(format.architecture).iter().filter(|(key, _)| !given(key)) {
            file.pair(key, value);
        }
        for (key, value) in keys {
            file.pair(key, value);
        }
        for (name, shape, bytes) in &tensors.list {
            let Some((own, is_packed)) = (format.name)(name) else { continue };
            let dims: Vec<usize> = shape.iter().rev().copied().collect();
            let values = bytes.as_chunks::<4>().0.iter().map(|value| f32::from_le_bytes(*value));
            let dtype = if is_packed { format.matrices } else { DType::F32 };
            file.tensor(&own, &dims, dtype, &store(&values.collect::<Vec<_>>(), dtype));
        }
        file.finish()
    }

    /// The keys of the GGUF file.
    pub(super) fn pairs(&self, architecture: &str) -> Vec<(String, GgufValue)> {
        // Sizes of a test model fit 32 bits by a wide margin.
        let number = |n: usize| GgufValue::U32(n as u32);
        let text = |t: &str| GgufValue::String(t.to_owned());
        let own = [
            ("block_count", number(self.layers)),
            ("context_length", number(self.positions)),
            ("embedding_length", number(self.width())),
            ("feed_forward_length", number(self.feed_forward)),
            ("attention.head_count", number(self.heads)),
            ("attention.layer_norm_epsilon", GgufValue::F32(1e-12)),
            ("attention.causal", GgufValue::Bool(false)),
            ("pooling_type", GgufValue::U32(1)),
        ];
        let vocabulary = vocabulary();
        let stored = |(id, token): (usize, &String)| match token.strip_prefix("##") {
            _ if SPECIAL_TOKENS.contains(&token.as_str()) => token.clone(),
            // Of equal tokens `tokenizer.json` gives the last one; a file has no two that are equal.
            _ if vocabulary[id + 1..].contains(token) => format!("[unused{id}]"),
            Some(rest) => rest.to_owned(),
            None => format!("\u{2581}{token}"),
        };
        let tokens: Vec<String> = vocabulary.iter().enumerate().map(stored).collect();
        let kind = |id: usize| if id < SPECIAL_TOKENS.len() { 3 } else { 1 };
        let types = (0..tokens.len()).map(kind).collect();
        let tokenizer = [
            ("model", text("bert")),
            ("pre", text("bert-bge")),
            ("tokens", GgufValue::Strings(tokens)),
            ("token_type", GgufValue::Integers(types)),
            ("token_type_count", GgufValue::U32(2)),
            ("unknown_token_id", GgufValue::U32(1)),
            ("cls_token_id", GgufValue::U32(2)),
            ("seperator_token_id", GgufValue::U32(3)),
            ("padding_token_id", GgufValue::U32(0)),
            ("mask_token_id", GgufValue::U32(4)),
        ];
        let general = [("general.architecture".to_owned(), text(architecture))].into_iter();
        let own = own.map(|(key, value)| (format!("{architecture}.{key}"), value));
        general
            .chain(own)
            .chain(tokenizer.map(|(key, value)| (format!("tokenizer.ggml.{key}"), value)))
            .collect()
    }

    fn weights(&self) -> Vec<u8> {
        self.tensors().file()
    }

    fn tensors(&self) -> Tensors {
        let (width, inner) = (self.width(), self.feed_forward);
        let mut tensors = Tensors { seed: self.seed, dtype: self.dtype, list: Vec::new() };
        tensors.matrix("embeddings.word_embeddings.weight", vocabulary().len(), width);
        tensors.matrix("embeddings.position_embeddings.weight", self.positions, width);
        tensors.matrix("embeddings.token_type_embeddings.weight", 2, width);
        tensors.norm("embeddings.LayerNorm", width);
        for layer in 0..self.layers {
            let name = |part: &str| format!("encoder.layer.{layer}.{part}");
            tensors.dense(&name("attention.self.query"), width, width);
            tensors.dense(&name("attention.self.key"), width, width);
            tensors.dense(&name("attention.self.value"), width, width);
            tensors.dense(&name("attention.output.dense"), width, width);
            tensors.norm(&name("attention.output.LayerNorm"), width);
            tensors.dense(&name("intermediate.dense"), inner, width);
            tensors.dense(&name("output.dense"), width, inner);
            tensors.norm(&name("output.LayerNorm"), width);
        }
        tensors.dense("pooler.dense", width, width);
        tensors
    }
}

/// How the tensors of an encoder stand in a GGUF file.
pub(super) struct GgufFormat {
    pub(super) architecture: &'static str,
    /// The name of a tensor there, and whether converters pack it; `None` of those that they leave out.
    pub(super) name: fn(&str) -> Option<(String, bool)>,
    /// The type of those that are packed.
    pub(super) matrices: DType,
}

/// [`GgufFormat::name`] of BERT.
pub(super) fn gguf_name(name: &str) -> Option<(String, bool)> {
    let stem = |from: &str, to: &str| name.strip_prefix(from).map(|kind| format!("{to}{kind}"));
    if let Some(rest) = name.strip_prefix("encoder.layer.") {
        let (layer, rest) = rest.split_once('.')?;
        let (part, kind) = rest.rsplit_once('.')?;
        let (own, is_norm) = match part {
            "attention.self.query" => ("attn_q", false),
            "attention.self.key" => ("attn_k", false),
            "attention.self.value" => ("attn_v", false),
            "attention.output.dense" => ("attn_output", false),
            "attention.output.LayerNorm" => ("attn_output_norm", true),
            "intermediate.dense" => ("ffn_up", false),
            "output.dense" => ("ffn_down", false),
            "output.LayerNorm" => ("layer_output_norm", true),
            _ => return None,
        };
        return Some((format!("blk.{layer}.{own}.{kind}"), kind == "weight" && !is_norm));
    }
    let words = stem("embeddings.word_embeddings", "token_embd").map(|own| (own, true));
    let others = [
        ("embeddings.position_embeddings", "position_embd"),
        ("embeddings.token_type_embeddings", "token_types"),
        ("embeddings.LayerNorm", "token_embd_norm"),
    ];
    words.or_else(|| others.iter().find_map(|(from, to)| stem(from, to)).map(|own| (own, false)))
}

/// Tensors on their way into a file.
pub(super) struct Tensors {
    pub(super) seed: u64,
    pub(super) dtype: DType,
    pub(super) list: Vec<(String, Vec<usize>, Vec<u8>)>,
}

impl Tensors {
    fn random(&self, name: &str, count: usize, scale: f32) -> Vec<u8> {
        let start = self.seed ^ fnv1a(name);
        let values: Vec<f32> = (0..count as u64).map(|i| element(start, i) * scale).collect();
        store(&values, self.dtype)
    }

    pub(super) fn matrix(&mut self, name: &str, rows: usize, cols: usize) {
        let bytes = self.random(name, rows * cols, SCALE / (cols as f32).sqrt());
        self.list.push((name.to_owned(), vec![rows, cols], bytes));
    }

    pub(super) fn dense(&mut self, name: &str, rows: usize, cols: usize) {
        self.matrix(&format!("{name}.weight"), rows, cols);
        self.bias(&format!("{name}.bias"), rows);
    }

    fn bias(&mut self, name: &str, len: usize) {
        let bytes = self.random(name, len, BIAS_SCALE);
        self.list.push((name.to_owned(), vec![len], bytes));
    }

    pub(super) fn ones(&mut self, name: &str, width: usize) {
        self.list.push((name.to_owned(), vec![width], store(&vec![1.0; width], self.dtype)));
    }

    pub(super) fn norm(&mut self, name: &str, width: usize) {
        self.ones(&format!("{name}.weight"), width);
        self.bias(&format!("{name}.bias"), width);
    }

    pub(super) fn file(&self) -> Vec<u8> {
        let dtype = match self.dtype {
            DType::F32 => Dtype::F32,
            DType::F16 => Dtype::F16,
            DType::BF16 => Dtype::BF16,
            other => panic!("a checkpoint has no {other} tensors"),
        };
        let views = self.list.iter().map(|(name, shape, bytes)| {
            let view =
                TensorView::new(dtype, shape.clone(), bytes).expect("the bytes were made for the shape");
            (name.clone(), view)
        });
        safetensors::serialize(views, None).expect("names and sizes are in order")
    }
}

/// Every token, in the order of the ids.
pub(super) fn vocabulary() -> Vec<String> {
    let mut tokens: Vec<String> = SPECIAL_TOKENS.map(str::to_owned).to_vec();
    let letters: Vec<char> = ('a'..='z').chain('0'..='9').collect();
    tokens.extend(letters.iter().map(char::to_string));
    tokens.extend(letters.iter().map(|letter| format!("##{letter}")));
    tokens.extend(MARKS.chars().map(String::from));
    tokens.extend(WORDS.map(str::to_owned));
    tokens
}
