//! Phi-3 and Phi-4: one tensor for queries, keys and values, and one for gate and up projection. Long
//! variants rotate by LongRoPE, some rotate a part of each head only, and some have a window in every layer.

use super::decoder::{Family, LayerKinds, LayerPattern, WINDOW};

/// Converters store queries and keys as they were trained.
pub(super) const FAMILY: Family = Family {
    joined_gate: true,
    honoured: &[WINDOW],
    layers: |keys| LayerKinds::windowed(keys, LayerPattern::All),
    ..Family::PLAIN
};

#[cfg(test)]
mod tests {
    use crate::seeded::{SeededFamily, SeededModel};
    use crate::{Model, PlanRequest};
    use std::path::Path;
    use std::sync::Arc;
    use trustformers_plan::{FusedOps, Limits};

    #[test]
    fn the_plan_of_a_tiny_model() {
        let file = SeededModel { family: SeededFamily::Phi3, layers: 1, ..SeededModel::default() }.gguf();
        let model = Model::from_bytes(Path::new("tiny.gguf"), Arc::new(file)).unwrap();
        let limits = Limits { rows: 8, sequences: 2, logits_rows: 2 };
        let request = PlanRequest { context_tokens: 32, limits, fused: FusedOps::ALL };
        insta::assert_snapshot!("tiny_phi3", model.plan(&request).unwrap().dump());
    }
}
