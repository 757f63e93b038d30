//! Small checkpoints of every family of encoders, with and without a head that gives logits, as folders.
//!
//! The recipe of the values is that of [`super`], under the names of the tensors in the file; so
//! `e2e/reference/heads.py` makes the same checkpoints in another language.

use super::encoder::{SeededEncoder, Tensors, vocabulary};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

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

impl SeededEncoderFamily {
    /// Every family.
    pub const ALL: [Self; 5] = [Self::Bert, Self::Roberta, Self::DistilBert, Self::Electra, Self::ModernBert];

    /// Its word in `model_type`.
    #[must_use]
    pub const fn model_type(self) -> &'static str {
        match self {
            Self::Bert => "bert",
            Self::Roberta => "roberta",
            Self::DistilBert => "distilbert",
            Self::Electra => "electra",
            Self::ModernBert => "modernbert",
        }
    }

    const fn class(self) -> &'static str {
        match self {
            Self::Bert => "Bert",
            Self::Roberta => "Roberta",
            Self::DistilBert => "DistilBert",
            Self::Electra => "Electra",
            Self::ModernBert => "ModernBert",
        }
    }

    /// Names of BERT's layers; ModernBERT has other tensors, see `modern_weights`.
    const fn layer_names(self) -> &'static LayerNames {
        match self {
            Self::DistilBert => &DISTILBERT_NAMES,
            Self::Bert | Self::Roberta | Self::Electra | Self::ModernBert => &BERT_NAMES,
        }
    }

    /// Names of the two projections of a head.
    const fn head_names(self) -> [&'static str; 2] {
        match self {
            Self::Bert => ["bert.pooler.dense", "classifier"],
            Self::DistilBert => ["pre_classifier", "classifier"],
            Self::Roberta | Self::Electra => ["classifier.dense", "classifier.out_proj"],
            Self::ModernBert => ["head.dense", "classifier"],
        }
    }

    /// Rows of the table of token types.
    const fn types(self) -> usize {
        match self {
            Self::Bert | Self::Electra => 2,
            Self::Roberta => 1,
            Self::DistilBert | Self::ModernBert => 0,
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
    /// Further keys of `config.json`, such as `problem_type`, as one JSON object.
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
        for (name, content) in self.files() {
            let path = folder.join(name);
            if let Some(parent) = path.parent() {
                std::fs::create_dir_all(parent)?;
            }
            std::fs::write(path, content)?;
        }
        Ok(())
    }

    /// Every file's bytes by its path below the folder.
    ///
    /// # Panics
    /// As [`SeededEncoder::files`].
    pub fn files(&self) -> BTreeMap<&'static str, Vec<u8>> {
        let mut files = self.shape.files();
        files.insert("config.json", self.config().to_string().into_bytes());
        files.insert("model.safetensors", self.weights());
        if self.labels > 0 {
            files.retain(|name, _| !name.starts_with("1_Pooling") && *name != "modules.json");
        }
        files
    }

    /// Rows of the table of positions, with those before the first text's.
    fn position_rows(&self) -> usize {
        self.shape.positions + usize::from(self.family == SeededEncoderFamily::Roberta)
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
        if self.family == SeededEncoderFamily::ModernBert {
            return self.modern_weights();
        }
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
        if self.labels > 0 {
            let [dense, out] = self.family.head_names();
            tensors.dense(dense, width, width);
            tensors.dense(out, self.labels, width);
        }
        tensors.file()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Model, PlanRequest, ScoreActivation};
    use trustformers_plan::{FusedOps, Limits};
    use trustformers_proto::Task;

    fn load(checkpoint: &SeededCheckpoint) -> Result<Model, String> {
        let folder = tempfile::tempdir().unwrap();
        checkpoint.write(folder.path()).unwrap();
        Model::load(folder.path(), &mut |_| {}).map_err(|error| error.to_string())
    }

    #[test]
    fn every_family_loads_as_embedder_classifier_and_reranker() {
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
