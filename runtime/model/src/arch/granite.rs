//! Granite 3: a Llama with factors of the embedding, of what a block adds, of scores and of logits.

use super::decoder::{ATTENTION_SCALE, EMBEDDING_SCALE, Family, LOGIT_DIVISOR, RESIDUAL_SCALE};
use trustformers_plan::RopeLayout;

/// Converters store queries and keys so that neighbouring elements rotate together.
pub(super) const FAMILY: Family = Family {
    rope: RopeLayout::Interleaved,
    honoured: &[ATTENTION_SCALE, EMBEDDING_SCALE, LOGIT_DIVISOR, RESIDUAL_SCALE],
    ..Family::PLAIN
};
