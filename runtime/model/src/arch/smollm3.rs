//! SmolLM3: a Llama of which every fourth layer has no positions at all (NoPE).

use super::decoder::{Family, LayerKinds, LayerPattern};
use trustformers_plan::RopeLayout;

/// GGUF files have no key for the layers without positions; a checkpoint lists them.
const NO_ROPE_INTERVAL: usize = 4;

/// Converters store queries and keys so that neighbouring elements rotate together.
pub(super) const FAMILY: Family = Family {
    rope: RopeLayout::Interleaved,
    layers: |_| {
        let rotated = LayerPattern::ExceptEvery(NO_ROPE_INTERVAL);
        Ok(LayerKinds { rotated, ..LayerKinds::ALIKE })
    },
    ..Family::PLAIN
};
