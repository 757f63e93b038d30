//! Gemma 2 and Gemma 3: norms of what a block's parts read and of what they add, GELU gates, embeddings that
//! are multiplied by the root of the width, and windows in most layers. Gemma 2 has soft caps; Gemma 3 norms
//! query and key heads, and its windowed layers have a rotation of their own.

use super::decoder::{
    ATTENTION_SCALE, BlockNorms, Family, Gate, LOGIT_CAP, LayerKinds, LayerPattern, QkNorm, SCORE_CAP, WINDOW,
};
use trustformers_plan::Hyper;

/// The base of the rotation of Gemma 3's windowed layers.
const WINDOW_BASE: f32 = 10_000.0;
/// One layer in so many of Gemma 2 attends to all positions, and of Gemma 3.
const GEMMA2_INTERVAL: usize = 2;
const GEMMA3_INTERVAL: usize = 6;
/// Layers of the models of 27 billion parameters.
const GEMMA2_27B_LAYERS: usize = 46;
const GEMMA3_27B_LAYERS: usize = 62;

/// Converters store queries and keys as they were trained, and the weights of norms plus one.
const SHARED: Family = Family {
    norms: BlockNorms::Both,
    gate: Gate::Gelu,
    scales_embedding: true,
    norms_less_one: true,
    honoured: &[ATTENTION_SCALE, LOGIT_CAP, SCORE_CAP, WINDOW],
    ..Family::PLAIN
};

/// Gemma 2.
pub(super) const GEMMA2: Family = Family {
    score_scale: |hyper| score_scale(hyper, GEMMA2_27B_LAYERS),
    layers: |keys| LayerKinds::windowed(keys, LayerPattern::ExceptEvery(GEMMA2_INTERVAL)),
    ..SHARED
};

/// Gemma 3, the part that reads text.
pub(super) const GEMMA3: Family = Family {
    qk_norm: QkNorm::Heads,
    score_scale: |hyper| score_scale(hyper, GEMMA3_27B_LAYERS),
    layers: |keys| {
        let interval = keys.optional_count("attention.sliding_window_pattern")?.unwrap_or(GEMMA3_INTERVAL);
        let base = keys.optional_float("rope.freq_base_swa")?.unwrap_or(WINDOW_BASE);
        if base <= 0.0 {
            return Err(keys.invalid("rope.freq_base_swa", format!("{base} is not above 0")));
        }
        let kinds = LayerKinds::windowed(keys, LayerPattern::ExceptEvery(interval))?;
        Ok(LayerKinds { window_base: Some(base), ..kinds })
    },
    ..SHARED
};

/// GGUF files do not say by what the products of queries and keys are multiplied: in the largest model by the
/// root of the width for each head, in all others by that of the head's own elements.
fn score_scale(hyper: &Hyper, largest_layers: usize) -> f32 {
    let elements = if hyper.layers == largest_layers { hyper.width / hyper.heads } else { hyper.head_dim };
    1.0 / (elements as f32).sqrt()
}

#[cfg(test)]
mod tests {
    use crate::seeded::{SeededFamily, SeededModel};
    use crate::{Model, PlanRequest};
    use std::path::Path;
    use std::sync::Arc;
    use trustformers_plan::{FusedOps, Limits};

    #[test]
    fn the_plan_of_a_tiny_model() {
        let file = SeededModel { family: SeededFamily::Gemma2, ..SeededModel::default() }.gguf();
        let model = Model::from_bytes(Path::new("tiny.gguf"), Arc::new(file)).unwrap();
        let limits = Limits { rows: 8, sequences: 2, logits_rows: 2 };
        let request = PlanRequest { context_tokens: 32, limits, fused: FusedOps::NONE };
        insta::assert_snapshot!("tiny_gemma2", model.plan(&request).unwrap().dump());
    }
}
