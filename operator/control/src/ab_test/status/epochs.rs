//! The epochs of a test: which shares and owners begin one, what was counted in them, and what of it is still
//! needed.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use trustformers_crds::{ABTestPhase, ABTestStatus, Metric, MetricStatus, TestEpoch, VariantStatus};

use super::super::assess::EpochSample;
use super::super::assign::{owners, promoted, weights_at};
use super::super::sample::{SampleStore, VariantId, VariantSums};
use super::super::validate::{ValidatedTest, ValidatedVariant};
use super::Next;

/// Epochs that a test keeps. Those before leave the analysis.
const MAX_EPOCHS: usize = 3;

impl Next<'_> {
    /// The share that each variant should have now.
    pub(super) fn wanted_weights(&self) -> Vec<u32> {
        let weights = weights_at(self.test, self.status.ramp_step);
        if self.status.phase == Some(ABTestPhase::Stopped) {
            return promoted(&weights, 0, 100);
        }
        let winner = self.status.winner.as_ref();
        let winner = winner.and_then(|name| self.test.variants.iter().position(|one| one.name == *name));
        winner.map_or_else(|| weights.clone(), |winner| promoted(&weights, winner, self.status.promoted))
    }

    /// Whether a promotion or a guardrail gives buckets to others than the weights say.
    fn is_given_away(&self) -> bool {
        self.status.promoted > 0 || self.status.phase == Some(ABTestPhase::Stopped)
    }

    /// Other shares are another epoch, and so are the owners that come back.
    pub(super) fn reweigh(&mut self) {
        let weights = self.wanted_weights();
        let come_back = !self.is_given_away() && !self.status.owners_before.is_empty();
        if come_back || self.status.epochs.last().is_some_and(|epoch| epoch.weights != weights) {
            self.new_epoch(weights);
        }
    }

    pub(super) fn new_epoch(&mut self, weights: Vec<u32>) {
        self.change_owners(&weights);
        let percent = |weight: &u32| {
            let (whole, rest) = (weight / 100, weight % 100);
            if rest == 0 { whole.to_string() } else { format!("{whole}.{rest:02}") }
        };
        self.status.weights = Some(weights.iter().map(percent).collect::<Vec<_>>().join("/"));
        // Without a stored one the time: it is larger than any number before.
        let number = self.status.epochs.last().map_or(self.now.as_second(), |last| last.epoch + 1);
        let baseline = self.status.phase == Some(ABTestPhase::Baseline);
        if baseline {
            self.status.epochs.clear();
        }
        self.status.epochs.push(TestEpoch { epoch: number, since: Time(self.now), weights, baseline });
        let epochs = &mut self.status.epochs;
        let mut beyond = epochs.iter().filter(|one| !one.baseline).count().saturating_sub(MAX_EPOCHS);
        epochs.retain(|one| {
            let goes = !one.baseline && beyond > 0;
            beyond -= usize::from(goes);
            !goes
        });
    }

    /// Gives the variants these shares, with the fewest moves. What a promotion or a guardrail gave away
    /// comes back to its owners. These are stored, because they do not follow from anything else that is:
    /// they are the outcome of every earlier change of the weights, also by other specs, and of most of
    /// these nothing is kept.
    fn change_owners(&mut self, weights: &[u32]) {
        let names = self.names();
        if self.is_given_away() {
            if self.status.owners_before.is_empty() {
                self.status.owners_before.clone_from(&self.status.owners);
            }
        } else if !self.status.owners_before.is_empty() {
            self.status.owners = std::mem::take(&mut self.status.owners_before);
        }
        self.status.owners = owners(&self.status.owners, &names, weights);
    }
}

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
