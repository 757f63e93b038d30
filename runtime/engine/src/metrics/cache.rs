//! Series about the KV cache: its blocks, the tokens that were reused and the tokens that were computed
//! again.

use super::FamilyRegistrar;
use prometheus::{IntCounter, IntCounterVec, IntGauge, IntGaugeVec};

/// The families, by the label `model`.
#[derive(Clone)]
pub(super) struct CacheFamilies {
    reused_tokens: IntCounterVec,
    recomputed_tokens: IntCounterVec,
    preemptions: IntCounterVec,
    used: IntGaugeVec,
    evictable: IntGaugeVec,
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
    /// Blocks that sequences use.
    pub(crate) used: IntGauge,
    /// Cached blocks that no sequence uses.
    pub(crate) evictable: IntGauge,
    /// All blocks.
    pub(crate) total: IntGauge,
}

impl CacheFamilies {
    pub(super) fn register(registrar: &FamilyRegistrar<'_>) -> Result<Self, prometheus::Error> {
        Ok(Self {
            reused_tokens: registrar.counter(
                "trustformers_prompt_tokens_reused_total",
                "Prompt tokens that were in the KV cache already.",
                &["model"],
            )?,
            recomputed_tokens: registrar.counter(
                "trustformers_tokens_recomputed_total",
                "Tokens that were computed again after their sequence was preempted.",
                &["model"],
            )?,
            preemptions: registrar.counter(
                "trustformers_preemptions_total",
                "Running sequences that were preempted: their KV blocks were released and they waited again.",
                &["model"],
            )?,
            used: registrar.gauge("trustformers_kv_blocks_used", "KV cache blocks that sequences use.")?,
            evictable: registrar.gauge(
                "trustformers_kv_blocks_kept",
                "Cached KV cache blocks that no sequence uses and that a prompt with the same prefix can reuse.",
            )?,
            total: registrar.gauge("trustformers_kv_blocks_total", "All KV cache blocks.")?,
        })
    }

    pub(super) fn for_model(&self, label: &str) -> CacheMetrics {
        CacheMetrics {
            reused_tokens: self.reused_tokens.with_label_values(&[label]),
            recomputed_tokens: self.recomputed_tokens.with_label_values(&[label]),
            preemptions: self.preemptions.with_label_values(&[label]),
            blocks: BlockGauges {
                used: self.used.with_label_values(&[label]),
                evictable: self.evictable.with_label_values(&[label]),
                total: self.total.with_label_values(&[label]),
            },
        }
    }
}
