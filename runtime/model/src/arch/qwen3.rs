//! Qwen3: a Llama without biases whose query and key heads are normed before they rotate. Its variants with
//! experts have an architecture of their own.

use super::decoder::{EXPERTS, EXPERTS_USED, Family, QkNorm};

/// Converters store queries and keys as they were trained.
pub(super) const FAMILY: Family = Family { qk_norm: QkNorm::Heads, ..Family::PLAIN };

/// The variants with experts.
pub(super) const WITH_EXPERTS: Family = Family { honoured: &[EXPERTS, EXPERTS_USED], ..FAMILY };

#[cfg(test)]
mod tests {
    use crate::seeded::{SeededFamily, SeededModel};
    use crate::{Model, PlanRequest};
    use std::path::Path;
    use std::sync::Arc;
    use trustformers_plan::{FusedOps, Limits};

    #[test]
    fn the_plan_of_a_tiny_model() {
        let file = SeededModel { family: SeededFamily::Qwen3Moe, layers: 1, ..SeededModel::default() }.gguf();
        let model = Model::from_bytes(Path::new("tiny.gguf"), Arc::new(file)).unwrap();
        let limits = Limits { rows: 8, sequences: 2, logits_rows: 2 };
        let request = PlanRequest { context_tokens: 32, limits, fused: FusedOps::ALL };
        insta::assert_snapshot!("tiny_qwen3_moe", model.plan(&request).unwrap().dump());
    }
}
