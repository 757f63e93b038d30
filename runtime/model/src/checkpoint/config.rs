//! `config.json` of a BERT.

use super::CheckpointProblem;
use serde::Deserialize;

/// Largest size that is believed: every number that a plan carries fits 32 bits.
const MOST: usize = u32::MAX as usize / 2;

/// What a BERT's `config.json` says. Keys without meaning for inference (dropout, initialisation) are left
/// out.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct BertConfig {
    /// Classes of the library that wrote it; the first decides what the checkpoint is for.
    #[serde(default)]
    architectures: Vec<String>,
    pub(crate) hidden_size: usize,
    pub(crate) num_hidden_layers: usize,
    pub(crate) num_attention_heads: usize,
    pub(crate) intermediate_size: usize,
    pub(crate) max_position_embeddings: usize,
    pub(crate) vocab_size: usize,
    #[serde(default = "two")]
    pub(crate) type_vocab_size: usize,
    #[serde(default = "tiny")]
    pub(crate) layer_norm_eps: f32,
    #[serde(default = "gelu")]
    hidden_act: String,
    #[serde(default = "absolute")]
    position_embedding_type: String,
    #[serde(default)]
    is_decoder: bool,
    #[serde(default)]
    add_cross_attention: bool,
}

fn two() -> usize {
    2
}

fn tiny() -> f32 {
    1e-12
}

fn gelu() -> String {
    "gelu".to_owned()
}

fn absolute() -> String {
    "absolute".to_owned()
}

/// Classes whose encoder is a plain BERT; what else they have (a pooler, a head that guesses words) gives no
/// embedding.
const CLASSES: [&str; 3] = ["BertModel", "BertForMaskedLM", "BertForPreTraining"];

impl BertConfig {
    /// Refuses what a plan of this crate would not compute.
    pub(crate) fn check(&self) -> Result<(), CheckpointProblem> {
        let unsupported = CheckpointProblem::unsupported;
        if let Some(class) = self.architectures.first().filter(|class| !CLASSES.contains(&class.as_str())) {
            let supported = "BertModel, BertForMaskedLM, BertForPreTraining";
            return Err(unsupported("architectures", format!("{class:?}"), supported));
        }
        if self.hidden_act != "gelu" {
            return Err(unsupported("hidden_act", format!("{:?}", self.hidden_act), "\"gelu\""));
        }
        if self.position_embedding_type != "absolute" {
            let found = format!("{:?}", self.position_embedding_type);
            return Err(unsupported("position_embedding_type", found, "\"absolute\""));
        }
        if self.is_decoder {
            return Err(unsupported("is_decoder", "true".to_owned(), "false"));
        }
        if self.add_cross_attention {
            return Err(unsupported("add_cross_attention", "true".to_owned(), "false"));
        }
        self.check_sizes()
    }

    fn check_sizes(&self) -> Result<(), CheckpointProblem> {
        let sizes = [
            ("hidden_size", self.hidden_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("intermediate_size", self.intermediate_size),
            ("max_position_embeddings", self.max_position_embeddings),
            ("vocab_size", self.vocab_size),
            ("type_vocab_size", self.type_vocab_size),
        ];
        if let Some((key, size)) = sizes.into_iter().find(|(_, size)| !(1..=MOST).contains(size)) {
            return Err(CheckpointProblem::Malformed {
                key,
                why: format!("{size} is not between 1 and {MOST}"),
            });
        }
        if !self.hidden_size.is_multiple_of(self.num_attention_heads) {
            let (key, heads, width) = ("num_attention_heads", self.num_attention_heads, self.hidden_size);
            let why = format!("{heads} does not divide the {width} of hidden_size");
            return Err(CheckpointProblem::Malformed { key, why });
        }
        if !(self.layer_norm_eps >= 0.0 && self.layer_norm_eps.is_finite()) {
            let why = format!("{} is not a number from 0 on", self.layer_norm_eps);
            return Err(CheckpointProblem::Malformed { key: "layer_norm_eps", why });
        }
        Ok(())
    }
}
