//! Small decoders that read whole texts, as folders: a Qwen3 that embeds, as sentence-transformers writes it,
//! and two that rank.
//!
//! The values are those of the seeded Qwen3 of [`super::SeededModel`]; so `e2e/reference/readers.py` makes
//! the same models in another language.

use super::encoder::Tensors;
use super::folder::{self, Files, NORMALIZE, POOLING, json_file};
use super::store::store;
use super::{CONTROL_TOKENS, SeededFamily, SeededModel, decoders};
use crate::gguf::{GgufValue, GgufWriter};
use crate::reading::{AFTER, BEFORE, INSTRUCTION};
use crate::tokenizer::byte_chars;
use decoders::Content;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use trustformers_plan::DType;

/// Pairs that the tokenizer merges: the answers of a model that ranks are tokens.
const READER_MERGES: [[&str; 2]; 3] = [["y", "e"], ["ye", "s"], ["n", "o"]];

/// What a seeded reader does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SeededReading {
    /// It embeds: the last row of a text with an end token behind it.
    Embed,
    /// It ranks by the logits of "yes" and "no". Its files are those of a model that generates.
    Words,
    /// It ranks by a projection of its own.
    Projection,
}

/// A decoder that reads whole texts. It takes about 200 KB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeededReader {
    /// What it does.
    pub reading: SeededReading,
    /// The seed of all weights.
    pub seed: u64,
    /// Longest text in tokens. The prompt of a model that ranks takes some 300.
    pub context_tokens: usize,
}

impl SeededReader {
    /// A model that does this, with seed 1 and texts of up to 512 tokens.
    #[must_use]
    pub const fn new(reading: SeededReading) -> Self {
        Self { reading, seed: 1, context_tokens: 512 }
    }

    /// Writes all files into `folder`, which must exist.
    ///
    /// # Errors
    /// When a file or folder cannot be written.
    pub fn write(&self, folder: &Path) -> std::io::Result<()> {
        folder::write(&self.files(), folder)
    }

    /// Every file's bytes by its path below the folder.
    pub fn files(&self) -> BTreeMap<&'static str, Vec<u8>> {
        let mut files = Files::from([
            ("config.json", json_file(&self.config())),
            ("model.safetensors", self.weights()),
            ("tokenizer.json", json_file(&self.tokenizer())),
        ]);
        if self.reading == SeededReading::Embed {
            files.insert("modules.json", json_file(&folder::modules(&[POOLING, NORMALIZE])));
            let pooling = json!({"pooling_mode_lasttoken": true, "include_prompt": true});
            files.insert("1_Pooling/config.json", json_file(&pooling));
            let prompts = json!({"query": "Instruct: find it\nQuery:", "document": ""});
            let prompts = json!({"prompts": prompts, "default_prompt_name": null});
            files.insert("config_sentence_transformers.json", json_file(&prompts));
        }
        files
    }

    /// The bytes of a GGUF file of a model that ranks by its words, as llama.cpp's converter writes it: the
    /// rows of "yes" and "no" for a head, their names, and the prompt as a template. Keys are added, or have
    /// these values.
    pub fn ranking_gguf(&self, keys: &[(&str, GgufValue)]) -> Vec<u8> {
        let model = self.model();
        let mut pairs = model.pairs();
        let labels = ["yes", "no"].map(str::to_owned).to_vec();
        let body = format!("<Instruct>: {INSTRUCTION}\n<Query>: {{query}}\n<Document>: {{document}}");
        let own = [
            ("qwen3.pooling_type", GgufValue::U32(4)),
            ("qwen3.classifier.output_labels", GgufValue::Strings(labels)),
            ("tokenizer.chat_template.rerank", GgufValue::String(format!("{BEFORE}{body}{AFTER}"))),
        ];
        for (key, value) in own.iter().chain(keys) {
            pairs.retain(|(name, _)| name != key);
            pairs.push(((*key).to_owned(), value.clone()));
        }
        let mut file = GgufWriter::new();
        for (key, value) in &pairs {
            file.pair(key, value);
        }
        decoders::tensors(&model).iter().for_each(|recipe| model.tensor(&mut file, recipe));
        let (width, rows) = (model.width(), model.vocabulary());
        let words = model.matrix_values("token_embd.weight", rows, width);
        // The ids of "yes" and "no" in the folder's tokenizer: the last two that merges make.
        let first = CONTROL_TOKENS.len() + 256 + 1;
        let head = store(&words[first * width..(first + 2) * width], DType::F32);
        file.tensor("cls.output.weight", &[width, 2], DType::F32, &head);
        file.finish()
    }

    fn model(&self) -> SeededModel {
        let (seed, context_tokens) = (self.seed, self.context_tokens);
        SeededModel { family: SeededFamily::Qwen3, seed, context_tokens, ..SeededModel::default() }
    }

    fn config(&self) -> Value {
        let model = self.model();
        let class = match self.reading {
            SeededReading::Embed | SeededReading::Words => "Qwen3ForCausalLM",
            SeededReading::Projection => "Qwen3ForSequenceClassification",
        };
        let mut config = json!({
            "architectures": [class], "model_type": "qwen3", "hidden_size": model.width(),
            "num_hidden_layers": model.layers, "num_attention_heads": model.heads,
            "num_key_value_heads": model.kv_heads, "head_dim": model.head_dim,
            "intermediate_size": model.feed_forward, "max_position_embeddings": model.context_tokens,
            "vocab_size": model.vocabulary(), "rms_norm_eps": 1e-5, "rope_theta": 10_000.0,
            "hidden_act": "silu", "attention_bias": false, "tie_word_embeddings": true,
            "use_sliding_window": false, "eos_token_id": 2,
        });
        if self.reading == SeededReading::Projection {
            config["id2label"] = json!({"0": "LABEL_0"});
            config["pad_token_id"] = json!(0);
        }
        config
    }

    fn weights(&self) -> Vec<u8> {
        let model = self.model();
        let mut tensors = Tensors { seed: self.seed, dtype: DType::F32, list: Vec::new() };
        for recipe in decoders::tensors(&model) {
            let (shape, values) = match recipe.content {
                Content::Matrix { rows } => {
                    (vec![rows, recipe.cols], model.matrix_values(&recipe.name, rows, recipe.cols))
                }
                Content::Norm | Content::Bias | Content::Divisors => {
                    (vec![recipe.cols], recipe.vector_values(self.seed))
                }
            };
            let name = self.stored_name(&recipe.name);
            tensors.list.push((name, shape, store(&values, DType::F32)));
        }
        if self.reading == SeededReading::Projection {
            let (name, width) = ("cls.output.weight", model.width());
            let values = model.matrix_values(name, 1, width);
            tensors.list.push(("score.weight".to_owned(), vec![1, width], store(&values, DType::F32)));
        }
        tensors.file()
    }

    /// The name of a tensor in the folder. A model without a head has no prefix.
    fn stored_name(&self, own: &str) -> String {
        const PARTS: [(&str, &str); 11] = [
            ("attn_norm", "input_layernorm"),
            ("attn_q_norm", "self_attn.q_norm"),
            ("attn_k_norm", "self_attn.k_norm"),
            ("attn_q", "self_attn.q_proj"),
            ("attn_k", "self_attn.k_proj"),
            ("attn_v", "self_attn.v_proj"),
            ("attn_output", "self_attn.o_proj"),
            ("ffn_norm", "post_attention_layernorm"),
            ("ffn_gate", "mlp.gate_proj"),
            ("ffn_up", "mlp.up_proj"),
            ("ffn_down", "mlp.down_proj"),
        ];
        let prefix = if self.reading == SeededReading::Embed { "" } else { "model." };
        let stored = match own {
            "token_embd.weight" => "embed_tokens.weight".to_owned(),
            "output_norm.weight" => "norm.weight".to_owned(),
            block => {
                let mut words = block.splitn(4, '.').skip(1);
                let (layer, part) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
                let stored = PARTS.iter().find(|(name, _)| *name == part).map_or(part, |(_, stored)| stored);
                format!("layers.{layer}.{stored}.weight")
            }
        };
        format!("{prefix}{stored}")
    }

    fn tokenizer(&self) -> Value {
        let letters = byte_chars().map(String::from);
        let tokens = CONTROL_TOKENS.map(str::to_owned).into_iter().chain(letters);
        let tokens = tokens.chain(READER_MERGES.iter().map(|pair| pair.concat()));
        let vocabulary: Map<String, Value> =
            tokens.zip(0..).map(|(text, id)| (text, Value::from(id))).collect();
        let added = CONTROL_TOKENS.iter().zip(0..).map(|(content, id)| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        });
        let end = CONTROL_TOKENS[0];
        let byte_level =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true});
        let post_processor = match self.reading {
            SeededReading::Embed => json!({"type": "Sequence", "processors": [byte_level.clone(), {
                "type": "TemplateProcessing",
                "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": end, "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {end: {"id": end, "ids": [0], "tokens": [end]}},
            }]}),
            SeededReading::Words | SeededReading::Projection => byte_level.clone(),
        };
        json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added.collect::<Vec<_>>(),
            "normalizer": {"type": "NFC"}, "pre_tokenizer": byte_level.clone(), "post_processor": post_processor,
            "decoder": byte_level,
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                "vocab": vocabulary, "merges": READER_MERGES},
        })
    }
}
