//! Small checkpoints of every family of encoders, with and without a head that gives logits, as folders.
//!
//! The recipe of the values is that of [`super`], under the names of the tensors in the file; so
//! `e2e/reference/heads.py` makes the same checkpoints in another language.

use super::encoder::{SeededEncoder, Tensors, gguf_name, vocabulary};
use super::folder::{self, json_file};
use crate::gguf::{GgufValue, GgufWriter};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use trustformers_plan::DType;

/// A family of encoders.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SeededEncoderFamily {
    /// `bert`.
    Bert,
    /// `roberta`; padding has the id 0, so that texts begin at position 1.
    Roberta,
    /// `distilbert`.
    DistilBert,
    /// `electra`, with embeddings of half the width.
    Electra,
    /// `modernbert`, with windows of three positions on either side in every second layer.
    ModernBert,
    /// `mpnet`; texts begin at position 2.
    MpNet,
    /// `nomic_bert`, which has no class with a head.
    Nomic,
}

/// What one layer's tensors are called, below the layer.
struct LayerNames {
    layers: &'static str,
    query: &'static str,
    key: &'static str,
    value: &'static str,
    attention_output: &'static str,
    attention_norm: &'static str,
    up: &'static str,
    down: &'static str,
    output_norm: &'static str,
}

const BERT_NAMES: LayerNames = LayerNames {
    layers: "encoder.layer",
    query: "attention.self.query",
    key: "attention.self.key",
    value: "attention.self.value",
    attention_output: "attention.output.dense",
    attention_norm: "attention.output.LayerNorm",
    up: "intermediate.dense",
    down: "output.dense",
    output_norm: "output.LayerNorm",
};

const DISTILBERT_NAMES: LayerNames = LayerNames {
    layers: "transformer.layer",
    query: "attention.q_lin",
    key: "attention.k_lin",
    value: "attention.v_lin",
    attention_output: "attention.out_lin",
    attention_norm: "sa_layer_norm",
    up: "ffn.lin1",
    down: "ffn.lin2",
    output_norm: "output_layer_norm",
};

const MPNET_NAMES: LayerNames = LayerNames {
    query: "attention.attn.q",
    key: "attention.attn.k",
    value: "attention.attn.v",
    attention_output: "attention.attn.o",
    attention_norm: "attention.LayerNorm",
    ..BERT_NAMES
};

impl SeededEncoderFamily {
    /// Every family.
    pub const ALL: [Self; 7] = [
        Self::Bert,
        Self::Roberta,
        Self::DistilBert,
        Self::Electra,
        Self::ModernBert,
        Self::MpNet,
        Self::Nomic,
    ];

    /// Its word in `model_type`.
    #[must_use]
    pub const fn model_type(self) -> &'static str {
        match self {
            Self::Bert => "bert",
            Self::Roberta => "roberta",
            Self::DistilBert => "distilbert",
            Self::Electra => "electra",
            Self::ModernBert => "modernbert",
            Self::MpNet => "mpnet",
            Self::Nomic => "nomic_bert",
        }
    }

    const fn class(self) -> &'static str {
        match self {
            Self::Bert => "Bert",
            Self::Roberta => "Roberta",
            Self::DistilBert => "DistilBert",
            Self::Electra => "Electra",
            Self::ModernBert => "ModernBert",
            Self::MpNet => "MPNet",
            Self::Nomic => "NomicBert",
        }
    }

    /// Names of BERT's layers; ModernBERT and Nomic BERT have other tensors, see `modern_weights` and
    /// `nomic_tensors`.
    const fn layer_names(self) -> &'static LayerNames {
        match self {
            Self::DistilBert => &DISTILBERT_NAMES,
            Self::MpNet => &MPNET_NAMES,
            Self::Bert | Self::Roberta | Self::Electra | Self::ModernBert | Self::Nomic => &BERT_NAMES,
        }
    }

    /// Names of the two projections of a head.
    const fn head_names(self) -> [&'static str; 2] {
        match self {
            Self::Bert | Self::Nomic => ["bert.pooler.dense", "classifier"],
            Self::DistilBert => ["pre_classifier", "classifier"],
            Self::Roberta | Self::Electra | Self::MpNet => ["classifier.dense", "classifier.out_proj"],
            Self::ModernBert => ["head.dense", "classifier"],
        }
    }

    /// Rows of the table of token types.
    const fn types(self) -> usize {
        match self {
            Self::Bert | Self::Electra | Self::Nomic => 2,
            Self::Roberta => 1,
            Self::DistilBert | Self::ModernBert | Self::MpNet => 0,
        }
    }
}

/// A checkpoint of a family. The default is a classifier of two labels.
#[derive(Debug, Clone, PartialEq)]
pub struct SeededCheckpoint {
    /// Its family.
    pub family: SeededEncoderFamily,
    /// Its sizes and the type of its tensors; pooling and normalising only count without labels.
    pub shape: SeededEncoder,
    /// Logits of its head; 0: none, the checkpoint embeds.
    pub labels: usize,
    /// Further keys of `config.json`, such as `problem_type`, as one JSON object. A class in `architectures`
    /// decides whether texts or tokens have the logits.
    pub keys: Value,
}

impl Default for SeededCheckpoint {
    fn default() -> Self {
        Self {
            family: SeededEncoderFamily::Bert,
            shape: SeededEncoder::default(),
            labels: 2,
            keys: json!({"id2label": {"0": "HAM", "1": "SPAM"}}),
        }
    }
}

impl SeededCheckpoint {
    /// A model that compares two texts.
    #[must_use]
    pub fn reranker() -> Self {
        Self { labels: 1, keys: json!({}), ..Self::default() }
    }

    /// Writes all files into `folder`, which must exist.
    ///
    /// # Errors
    /// When a file or folder cannot be written.
    ///
    /// # Panics
    /// As [`SeededEncoder::files`].
    pub fn write(&self, folder: &Path) -> std::io::Result<()> {
        folder::write(&self.files(), folder)
    }

    /// Every file's bytes by its path below the folder.
    ///
    /// # Panics
    /// As [`SeededEncoder::files`].
    pub fn files(&self) -> BTreeMap<&'static str, Vec<u8>> {
        let mut files = self.shape.files();
        files.insert("config.json", json_file(&self.config()));
        files.insert("model.safetensors", self.weights());
        if self.labels > 0 {
            files.retain(|name, _| !name.starts_with("1_Pooling") && *name != "modules.json");
        }
        files
    }

    /// The bytes of a GGUF file of the same model in F32, as llama.cpp's converter writes it, with these keys
    /// added, or with these values for keys that it has. The head of a BERT has its pooler, which that
    /// converter leaves out.
    ///
    /// # Panics
    /// Of families other than BERT and RoBERTa.
    pub fn gguf_with(&self, keys: &[(&str, GgufValue)]) -> Vec<u8> {
        let families = [SeededEncoderFamily::Bert, SeededEncoderFamily::Roberta];
        assert!(families.contains(&self.family), "no converter writes {}", self.family.model_type());
        let plain = SeededEncoder { dtype: DType::F32, ..self.shape };
        let mut pairs = plain.pairs("bert");
        let labels = (0..self.labels).map(|id| format!("LABEL_{id}")).collect();
        let own = [
            ("bert.pooling_type", GgufValue::U32(4)),
            ("bert.classifier.output_labels", GgufValue::Strings(labels)),
        ];
        let own = own.iter().filter(|_| self.labels > 0);
        for (key, value) in own.chain(keys) {
            pairs.retain(|(name, _)| name != key);
            pairs.push(((*key).to_owned(), value.clone()));
        }
        let mut file = GgufWriter::new();
        for (key, value) in &pairs {
            file.pair(key, value);
        }
        let bytes_before = (self.position_rows() - self.shape.positions) * self.embedding_width() * 4;
        for (name, mut shape, mut bytes) in (Self { shape: plain, ..self.clone() }).tensors().list {
            let Some(own) = self.gguf_name(&name) else { continue };
            if own == "position_embd.weight" {
                // Converters leave out the rows before the first text's.
                bytes.drain(..bytes_before);
                shape[0] = self.shape.positions;
            }
            let dims: Vec<usize> = shape.iter().rev().copied().collect();
            file.tensor(&own, &dims, DType::F32, &bytes);
        }
        file.finish()
    }

    /// The name of a tensor in a GGUF file; `None` of those that converters leave out.
    fn gguf_name(&self, name: &str) -> Option<String> {
        let [dense, out] = self.family.head_names();
        for (stored, own) in [(dense, "cls"), (out, "cls.output")] {
            if let Some(kind) = name.strip_prefix(stored).and_then(|rest| rest.strip_prefix('.')) {
                return Some(format!("{own}.{kind}"));
            }
        }
        let prefix = format!("{}.", self.family.model_type());
        gguf_name(name.strip_prefix(&prefix).unwrap_or(name)).map(|(own, _)| own)
    }

    /// Whether the keys say that its head gives each token logits.
    fn labels_tokens(&self) -> bool {
        let class = self.keys["architectures"][0].as_str();
        self.labels > 0 && class.is_some_and(|class| class.ends_with("ForTokenClassification"))
    }

    /// Rows of the table of positions, with those before the first text's.
    fn position_rows(&self) -> usize {
        let before = match self.family {
            SeededEncoderFamily::Roberta => 1,
            SeededEncoderFamily::MpNet => 2,
            _ => 0,
        };
        self.shape.positions + before
    }

    fn embedding_width(&self) -> usize {
        if self.family == SeededEncoderFamily::Electra { self.shape.width() / 2 } else { self.shape.width() }
    }

    fn config(&self) -> Value {
        let head = if self.labels > 0 { "ForSequenceClassification" } else { "Model" };
        let SeededEncoder { layers, heads, feed_forward, .. } = self.shape;
        let mut config = match self.family {
            SeededEncoderFamily::DistilBert => json!({
                "dim": self.shape.width(), "n_layers": layers, "n_heads": heads, "hidden_dim": feed_forward,
                "activation": "gelu", "sinusoidal_pos_embds": false,
            }),
            SeededEncoderFamily::Nomic => self.nomic_config(),
            SeededEncoderFamily::ModernBert => json!({
                "hidden_size": self.shape.width(), "num_hidden_layers": layers, "num_attention_heads": heads,
                "intermediate_size": feed_forward, "hidden_activation": "gelu", "norm_eps": 1e-5,
                "global_attn_every_n_layers": 2, "local_attention": 6, "global_rope_theta": 160_000.0,
                "local_rope_theta": 10_000.0, "classifier_pooling": "cls", "norm_bias": false,
            }),
            _ => json!({
                "hidden_size": self.shape.width(), "num_hidden_layers": layers, "num_attention_heads": heads,
                "intermediate_size": feed_forward, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
                "type_vocab_size": self.family.types(), "position_embedding_type": "absolute",
            }),
        };
        config["architectures"] = json!([format!("{}{head}", self.family.class())]);
        config["model_type"] = json!(self.family.model_type());
        config["max_position_embeddings"] = json!(self.position_rows());
        config["vocab_size"] = json!(vocabulary().len());
        config["pad_token_id"] = json!(0);
        if self.family == SeededEncoderFamily::Electra {
            config["embedding_size"] = json!(self.embedding_width());
        }
        for (key, value) in self.keys.as_object().into_iter().flatten() {
            config[key] = value.clone();
        }
        config
    }

    /// The tensors of ModernBERT.
    fn modern_weights(&self) -> Vec<u8> {
        let (width, inner) = (self.shape.width(), self.shape.feed_forward);
        let prefix = if self.labels > 0 { "model." } else { "" };
        let mut tensors = Tensors { seed: self.shape.seed, dtype: self.shape.dtype, list: Vec::new() };
        tensors.matrix(&format!("{prefix}embeddings.tok_embeddings.weight"), vocabulary().len(), width);
        tensors.ones(&format!("{prefix}embeddings.norm.weight"), width);
        for layer in 0..self.shape.layers {
            let name = |part: &str| format!("{prefix}layers.{layer}.{part}.weight");
            if layer > 0 {
                tensors.ones(&name("attn_norm"), width);
            }
            tensors.matrix(&name("attn.Wqkv"), 3 * width, width);
            tensors.matrix(&name("attn.Wo"), width, width);
            tensors.ones(&name("mlp_norm"), width);
            tensors.matrix(&name("mlp.Wi"), 2 * inner, width);
            tensors.matrix(&name("mlp.Wo"), width, inner);
        }
        tensors.ones(&format!("{prefix}final_norm.weight"), width);
        if self.labels > 0 {
            let [dense, out] = self.family.head_names();
            tensors.matrix(&format!("{dense}.weight"), width, width);
            tensors.ones("head.norm.weight", width);
            tensors.dense(out, self.labels, width);
        }
        tensors.file()
    }

    fn weights(&self) -> Vec<u8> {
        match self.family {
            SeededEncoderFamily::ModernBert => self.modern_weights(),
            SeededEncoderFamily::Nomic => self.nomic_tensors().file(),
            _ => self.tensors().file(),
        }
    }

    /// The tensors of all families but ModernBERT and Nomic BERT.
    fn tensors(&self) -> Tensors {
        let (width, inner, embedding) = (self.shape.width(), self.shape.feed_forward, self.embedding_width());
        let names = self.family.layer_names();
        // Without a head the class is the encoder itself, and names have no prefix.
        let prefix = if self.labels > 0 { format!("{}.", self.family.model_type()) } else { String::new() };
        let name = |part: &str| format!("{prefix}{part}");
        let mut tensors = Tensors { seed: self.shape.seed, dtype: self.shape.dtype, list: Vec::new() };
        tensors.matrix(&name("embeddings.word_embeddings.weight"), vocabulary().len(), embedding);
        tensors.matrix(&name("embeddings.position_embeddings.weight"), self.position_rows(), embedding);
        if self.family.types() > 0 {
            tensors.matrix(&name("embeddings.token_type_embeddings.weight"), self.family.types(), embedding);
        }
        tensors.norm(&name("embeddings.LayerNorm"), embedding);
        if embedding != width {
            tensors.dense(&name("embeddings_project"), width, embedding);
        }
        if self.family == SeededEncoderFamily::MpNet {
            tensors.matrix(&name("encoder.relative_attention_bias.weight"), 32, self.shape.heads);
        }
        for layer in 0..self.shape.layers {
            let name = |part: &str| name(&format!("{}.{layer}.{part}", names.layers));
            tensors.dense(&name(names.query), width, width);
            tensors.dense(&name(names.key), width, width);
            tensors.dense(&name(names.value), width, width);
            tensors.dense(&name(names.attention_output), width, width);
            tensors.norm(&name(names.attention_norm), width);
            tensors.dense(&name(names.up), inner, width);
            tensors.dense(&name(names.down), width, inner);
            tensors.norm(&name(names.output_norm), width);
        }
        if self.labels_tokens() {
            tensors.dense("classifier", self.labels, width);
        } else if self.labels > 0 {
            let [dense, out] = self.family.head_names();
            tensors.dense(dense, width, width);
            tensors.dense(out, self.labels, width);
        }
        tensors
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Model, PlanRequest, ScoreActivation};
    use trustformers_plan::{FusedOps, Limits, RowSpace};
    use trustformers_proto::Task;

    fn load(checkpoint: &SeededCheckpoint) -> Result<Model, String> {
        let folder = tempfile::tempdir().unwrap();
        checkpoint.write(folder.path()).unwrap();
        Model::load(folder.path(), &mut |_| {}).map_err(|error| error.to_string())
    }

    #[test]
    fn every_family_loads_as_embedder_and_those_with_heads_as_classifier_and_reranker() {
        for family in SeededEncoderFamily::ALL {
            let load = |labels: usize, keys: Value| {
                let shape = SeededEncoder::default();
                load(&SeededCheckpoint { family, shape, labels, keys }).unwrap()
            };
            let embedder = load(0, json!({}));
            assert_eq!(
                (embedder.task(), embedder.facts().architecture.as_str()),
                (Task::Embed, family.model_type())
            );
            assert_eq!(embedder.logits(&[0.0; 64]), None);
            if family == SeededEncoderFamily::Nomic {
                continue;
            }
            let classifier = load(3, json!({"problem_type": "multi_label_classification"}));
            let facts = classifier.facts().classification.clone().unwrap();
            assert_eq!((classifier.task(), facts.activation), (Task::Classify, ScoreActivation::Sigmoid));
            assert_eq!((facts.width, facts.labels.len()), (64, 3));
            assert_eq!(classifier.logits(&[0.0; 64]).unwrap().len(), 3);
            assert!(classifier.facts().embedding.is_none());
            assert_eq!(classifier.facts().context_tokens, 64);
            let reranker = load(1, json!({}));
            let pair = reranker.encode_pair("the cat", "hello", 64).unwrap();
            assert_eq!((reranker.task(), pair.second_segment), (Task::Rerank, Some(4)));
        }
    }

    #[test]
    fn only_the_layers_of_modernbert_that_say_so_have_a_window() {
        let family = SeededEncoderFamily::ModernBert;
        let limits = Limits { rows: 8, sequences: 2, logits_rows: 0 };
        let request = PlanRequest { context_tokens: 12, limits, fused: FusedOps::NONE };
        for (labels, rotated) in [(0, 4), (3, 3)] {
            let checkpoint = SeededCheckpoint::default();
            let model = load(&SeededCheckpoint { family, labels, keys: json!({}), ..checkpoint }).unwrap();
            let dump = model.plan(&request).unwrap().dump();
            let attentions: Vec<&str> =
                dump.lines().filter(|line| line.contains("encoder_attention")).collect();
            assert_eq!(attentions.len(), 2, "{dump}");
            assert!(!attentions[0].contains("within") && attentions[1].contains("within 3"), "{dump}");
            // Of a classifier's last layer the first rows ask, whose position is 0.
            assert_eq!(dump.lines().filter(|line| line.contains(" rope ")).count(), rotated, "{dump}");
            // Views of the joined projections count once; three norms are those of the words, of the second
            // layer's attention and of the end.
            let layer = 64 * (4 * 64 + 3 * 128) + 64;
            let head = if labels == 0 { 0 } else { 64 * 64 + 64 };
            let words = model.facts().vocabulary as u64 * 64;
            assert_eq!(model.facts().parameters, words + 2 * layer + 3 * 64 + head);
        }
    }

    #[test]
    fn every_family_with_heads_labels_tokens() {
        let with_heads =
            SeededEncoderFamily::ALL.into_iter().filter(|family| *family != SeededEncoderFamily::Nomic);
        for family in with_heads {
            let class = format!("{}ForTokenClassification", family.class());
            let keys = json!({"architectures": [class], "id2label": {"0": "O", "1": "B-A", "2": "I-A"}});
            let checkpoint = SeededCheckpoint { family, labels: 3, keys, ..SeededCheckpoint::default() };
            let model = load(&checkpoint).unwrap();
            let facts = model.facts().classification.clone().unwrap();
            assert_eq!((model.task(), facts.activation), (Task::Classify, ScoreActivation::Softmax));
            assert_eq!((facts.width, facts.by_token, facts.labels.len()), (3, true, 3), "{family:?}");
            assert_eq!(model.logits(&[0.0; 3]).unwrap().len(), 3);
            let limits = Limits { rows: 8, sequences: 2, logits_rows: 8 };
            let request = PlanRequest { context_tokens: 12, limits, fused: FusedOps::NONE };
            let plan = model.plan(&request).unwrap();
            assert_eq!((plan.answer().rows, plan.answer().cols), (RowSpace::Logits, 3), "{family:?}");
            assert!(!plan.dump().contains("pool "), "{}", plan.dump());
        }
        let few = json!({"architectures": ["BertForTokenClassification"], "id2label": {"0": "O"}});
        let error = load(&SeededCheckpoint { keys: few, ..SeededCheckpoint::default() }).unwrap_err();
        assert!(error.contains("key id2label: 1 labels for a head with 2 logits"), "{error}");
    }

    #[test]
    fn the_head_of_modernbert_may_read_the_mean_of_all_rows() {
        let family = SeededEncoderFamily::ModernBert;
        let keys = json!({"classifier_pooling": "mean"});
        let model =
            load(&SeededCheckpoint { family, labels: 3, keys, ..SeededCheckpoint::default() }).unwrap();
        let limits = Limits { rows: 8, sequences: 2, logits_rows: 0 };
        let request = PlanRequest { context_tokens: 12, limits, fused: FusedOps::NONE };
        let dump = model.plan(&request).unwrap().dump();
        let at = |words: &str| {
            dump.lines().position(|line| line.contains(words)).unwrap_or_else(|| panic!("{dump}"))
        };
        assert!(at(" * final_norm.weight ") < at("pool        mean "), "{dump}");
        assert!(at("pool        mean ") < at("[head.dense.weight]"), "{dump}");
        assert!(at("[head.dense.weight]") < at("pool        cls "), "{dump}");
        assert_eq!(dump.lines().filter(|line| line.contains(" rope ")).count(), 4, "all rows ask: {dump}");
    }

    #[test]
    fn a_head_that_does_not_fit_its_labels_is_refused() {
        let keys = json!({"id2label": {"0": "a", "1": "b", "2": "c"}});
        let error = load(&SeededCheckpoint { keys, ..SeededCheckpoint::default() }).unwrap_err();
        assert!(error.contains("config.json: key id2label: 3 labels for a head with 2 logits"), "{error}");
        let shape = SeededEncoder { positions: 1, ..SeededEncoder::default() };
        let keys = json!({"pad_token_id": 5});
        let roberta = SeededCheckpoint { family: SeededEncoderFamily::Roberta, shape, keys, labels: 1 };
        let error = load(&roberta).unwrap_err();
        assert!(error.contains("key pad_token_id: 6 leaves no row of the 2 positions"), "{error}");
    }
}
