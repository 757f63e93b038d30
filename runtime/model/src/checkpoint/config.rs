//! `config.json` of a BERT, or of another encoder of its kind.

use super::CheckpointProblem;
use super::encoder_checks::{check_base, check_class, check_eps, check_heads, check_sizes};
use crate::arch::encoder_family::{EncoderBlocks, EncoderFamily, FirstPosition};
use crate::arch::mpnet;
use serde::Deserialize;

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
    /// The base of the rotation, of families that have one.
    rotary_emb_base: Option<f32>,
    /// Rows of the table of what scores get for distances, of families that have one.
    relative_attention_num_buckets: Option<usize>,
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
        check_class(&self.architectures, family.classes)?;
        let only = match family.blocks {
            EncoderBlocks::Biased => "\"gelu\"",
            EncoderBlocks::Rotary => "\"silu\"",
        };
        let activation = format!("{:?}", self.hidden_act);
        if activation != only {
            return Err(unsupported("hidden_act", activation, only));
        }
        if self.position_embedding_type != "absolute" {
            let found = format!("{:?}", self.position_embedding_type);
            return Err(unsupported("position_embedding_type", found, "\"absolute\""));
        }
        if let Some(buckets) = self.relative_attention_num_buckets.filter(|_| family.distances)
            && buckets != mpnet::BUCKETS
        {
            return Err(unsupported("relative_attention_num_buckets", buckets.to_string(), "32"));
        }
        if self.is_decoder {
            return Err(unsupported("is_decoder", "true".to_owned(), "false"));
        }
        if self.add_cross_attention {
            return Err(unsupported("add_cross_attention", "true".to_owned(), "false"));
        }
        self.check_sizes(family)?;
        let (first, rows) = (self.first_position(family), self.max_position_embeddings);
        if first < rows {
            return Ok(());
        }
        let (key, why) = match family.first_position {
            FirstPosition::AfterPadding => {
                ("pad_token_id", format!("{first} leaves no row of the {rows} positions for a text"))
            }
            FirstPosition::Zero | FirstPosition::Fixed(_) => {
                let why = format!("a text begins at row {first} of the positions, and there are {rows}");
                ("max_position_embeddings", why)
            }
        };
        Err(CheckpointProblem::Malformed { key, why })
    }

    /// Whether the checkpoint is for scores instead of vectors.
    pub(crate) fn is_classifier(&self) -> bool {
        self.architectures.first().is_some_and(|class| EncoderFamily::is_classifier(class))
    }

    /// Whether the checkpoint is for scores of tokens.
    pub(crate) fn is_token_classifier(&self) -> bool {
        self.architectures.first().is_some_and(|class| EncoderFamily::is_token_classifier(class))
    }

    /// Values of an embedding.
    pub(crate) fn embedding_width(&self) -> usize {
        self.embedding_size.unwrap_or(self.hidden_size)
    }

    /// The row of the table of positions for the first token of a text.
    pub(crate) fn first_position(&self, family: &EncoderFamily) -> usize {
        match family.first_position {
            FirstPosition::Zero => 0,
            FirstPosition::AfterPadding => self.pad_token_id.unwrap_or(1).saturating_add(1),
            FirstPosition::Fixed(row) => row,
        }
    }

    /// Rows of the table of positions for a text's tokens.
    pub(crate) fn positions(&self, family: &EncoderFamily) -> usize {
        self.max_position_embeddings.saturating_sub(self.first_position(family))
    }

    /// The base of the rotation, of families that have one.
    pub(crate) fn rope_base(&self) -> Option<f32> {
        self.rotary_emb_base
    }

    fn check_sizes(&self, family: &EncoderFamily) -> Result<(), CheckpointProblem> {
        // Families without token types have any number there.
        let types = if family.token_types { self.type_vocab_size } else { 1 };
        check_sizes(&[
            ("hidden_size", self.hidden_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("intermediate_size", self.intermediate_size),
            ("max_position_embeddings", self.max_position_embeddings),
            ("vocab_size", self.vocab_size),
            ("type_vocab_size", types),
            ("embedding_size", self.embedding_width()),
        ])?;
        let rotated = family.blocks == EncoderBlocks::Rotary;
        check_heads(self.num_attention_heads, self.hidden_size, rotated)?;
        if rotated {
            // A base that is missing gives no frequencies either.
            check_base("rotary_emb_base", self.rotary_emb_base.unwrap_or_default())?;
        }
        check_eps("layer_norm_eps", self.layer_norm_eps)
    }
}
