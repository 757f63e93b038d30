//! The epochs of a test: what was counted in them, and what of it is still needed.

use std::collections::{BTreeMap, BTreeSet};

use trustformers_crds::{ABTestStatus, Metric, MetricStatus, TestEpoch, VariantStatus};

use super::super::assess::EpochSample;
use super::super::sample::{SampleStore, VariantId, VariantSums};
use super::super::validate::{ValidatedTest, ValidatedVariant};

/// The coefficients of the baseline that the last checkpoint found.
pub(super) fn thetas(status: &ABTestStatus) -> Vec<BTreeMap<Metric, f64>> {
    let theta = |one: &MetricStatus| Some((one.metric, one.cuped.as_ref()?.parse::<f64>().ok()?));
    let of = |variant: &VariantStatus| variant.metrics.iter().filter_map(theta).collect();
    status.variants.iter().map(of).collect()
}

/// What was counted in an epoch of a test.
pub(super) fn epoch_sample(test: &ValidatedTest, epoch: &TestEpoch, samples: &SampleStore) -> EpochSample {
    let sums = |variant: &ValidatedVariant| -> VariantSums {
        let number = u64::try_from(epoch.epoch).unwrap_or(0);
        let id = VariantId { test: test.uid.clone(), epoch: number, variant: variant.name.clone() };
        let mut sums = samples.of(&id);
        sums.cost = variant.cost.unwrap_or_default();
        sums
    };
    EpochSample {
        weights: (0..test.variants.len())
            .map(|index| epoch.weights.get(index).copied().unwrap_or(0))
            .collect(),
        variants: test.variants.iter().map(sums).collect(),
    }
}

/// The epochs whose sums are still needed.
#[must_use]
pub fn epochs_of(status: &ABTestStatus) -> BTreeSet<u64> {
    status.epochs.iter().filter_map(|epoch| u64::try_from(epoch.epoch).ok()).collect()
}

/// What may have been stored of a test with this UID.
#[must_use]
pub fn stored_variants(uid: &str, status: &ABTestStatus) -> BTreeSet<VariantId> {
    let mut known = BTreeSet::from([VariantId::earlier(uid)]);
    for epoch in epochs_of(status) {
        for variant in &status.variants {
            known.insert(VariantId { test: uid.to_owned(), epoch, variant: variant.name.clone() });
        }
    }
    known
}
