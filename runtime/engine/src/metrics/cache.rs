//! Series about the KV cache: who holds its blocks, what was found in it and what had to be computed again.

use super::New;
use prometheus::{IntCounter, IntCounterVec, IntGauge, IntGaugeVec};

/// The families, by the label `model`.
#[derive(Clone)]
pub(super) struct CacheFamilies {
    reused_tokens: IntCounterVec,
    recomputed_tokens: IntCounterVec,
    preemptions: IntCounterVec,
    used: IntGaugeVec,
    kept: IntGaugeVec,
    total: IntGaugeVec,
}

/// One label's series.
#[derive(Debug, Clone)]
pub(crate) struct CacheMetrics {
    pub(crate) reused_tokens: IntCounter,
    pub(crate) recomputed_tokens: IntCounter,
    pub(crate) preemptions: IntCounter,
    pub(crate) blocks: BlockGauges,
}

/// The gauges of a pool of blocks.
#[derive(Debug, Clone)]
pub(crate) struct BlockGauges {
    /// Blocks that sequences hold.
    pub(crate) used: IntGauge,
    /// Blocks that nobody holds and whose content may still be found.
    pub(crate) kept: IntGauge,
    /// All blocks.
    pub(crate) total: IntGauge,
}

impl CacheFamilies {
    pub(super) fn register(new: &New<'_>) -> Result<Self, prometheus::Error> {
        Ok(Self {
            reused_tokens: new.counter(
                "trustformers_prompt_tokens_reused_total",
                "Prompt tokens that were in the KV cache already.",
                &["model"],
            )?,
            recomputed_tokens: new.counter(
                "trustformers_tokens_recomputed_total",
                "Tokens that were computed once more after their sequence had given up its KV blocks.",
                &["model"],
            )?,
            preemptions: new.counter(
                "trustformers_preemptions_total",
                "Running sequences that gave up their KV blocks and waited again.",
                &["model"],
            )?,
            used: new.gauge("trustformers_kv_blocks_used", "KV cache blocks that sequences hold.")?,
            kept: new.gauge(
                "trustformers_kv_blocks_kept",
                "KV cache blocks that no sequence holds and that a prompt with the same beginning would find.",
            )?,
            total: new.gauge("trustformers_kv_blocks_total", "KV cache blocks that exist.")?,
        })
    }

    pub(super) fn for_model(&self, label: &str) -> CacheMetrics {
        CacheMetrics {
            reused_tokens: self.reused_tokens.with_label_values(&[label]),
            recomputed_tokens: self.recomputed_tokens.with_label_values(&[label]),
            preemptions: self.preemptions.with_label_values(&[label]),
            blocks: BlockGauges {
                used: self.used.with_label_values(&[label]),
                kept: self.kept.with_label_values(&[label]),
                total: self.total.with_label_values(&[label]),
            },
        }
    }
}
