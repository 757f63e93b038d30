//! `config.json` of a BERT, or of another encoder of its kind.

use super::CheckpointProblem;
use crate::arch::encoder_family::EncoderFamily;
use serde::Deserialize;

/// Largest size that is believed: every number that a plan carries fits 32 bits.
const MOST: usize = u32::MAX as usize / 2;

/// What a BERT's `config.json` says; DistilBERT spells some keys otherwise. Keys without meaning for
/// inference (dropout, initialisation) are left out.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct BertConfig {
    /// Classes of the library that wrote it; the first decides what the checkpoint is for.
    #[serde(default)]
    architectures: Vec<String>,
    #[serde(alias = "dim")]
    pub(crate) hidden_size: usize,
    #[serde(alias = "n_layers")]
    pub(crate) num_hidden_layers: usize,
    #[serde(alias = "n_heads")]
    pub(crate) num_attention_heads: usize,
    #[serde(alias = "hidden_dim")]
    pub(crate) intermediate_size: usize,
    /// Width of the embeddings, where the blocks have another one.
    embedding_size: Option<usize>,
    /// The id of padding. Where positions begin after it, that is the id and the number of rows before
    /// the first position.
    pad_token_id: Option<usize>,
    pub(crate) max_position_embeddings: usize,
    pub(crate) vocab_size: usize,
    #[serde(default = "two")]
    pub(crate) type_vocab_size: usize,
    #[serde(default = "tiny")]
    pub(crate) layer_norm_eps: f32,
    #[serde(default = "gelu", alias = "activation")]
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

impl BertConfig {
    /// Refuses what a plan of this crate would not compute.
    pub(crate) fn check(&self, family: &EncoderFamily) -> Result<(), CheckpointProblem> {
        let unsupported = CheckpointProblem::unsupported;
        if let Some(class) = self.architectures.first().filter(|class| !family.has_class(class)) {
            return Err(unsupported("architectures", format!("{class:?}"), family.classes));
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
        self.check_sizes()?;
        let first = self.first_position(family);
        if first >= self.max_position_embeddings {
            let why =
                format!("{first} leaves no row of the {} positions for a text", self.max_position_embeddings);
            return Err(CheckpointProblem::Malformed { key: "pad_token_id", why });
        }
        Ok(())
    }

    /// Whether the checkpoint is for scores instead of vectors.
    pub(crate) fn is_classifier(&self) -> bool {
        self.architectures.first().is_some_and(|class| EncoderFamily::is_classifier(class))
    }

    /// Values of an embedding.
    pub(crate) fn embedding_width(&self) -> usize {
        self.embedding_size.unwrap_or(self.hidden_size)
    }

    /// The row of the table of positions for the first token of a text.
    pub(crate) fn first_position(&self, family: &EncoderFamily) -> usize {
        if family.positions_after_padding { self.pad_token_id.unwrap_or(1).saturating_add(1) } else { 0 }
    }

    /// Rows of the table of positions for a text's tokens.
    pub(crate) fn positions(&self, family: &EncoderFamily) -> usize {
        self.max_position_embeddings.saturating_sub(self.first_position(family))
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
            ("embedding_size", self.embedding_width()),
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
