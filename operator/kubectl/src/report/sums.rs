//! The sums of a test as its ConfigMap has them: one part for each gateway process.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::ConfigMap;
use serde::Serialize;
use trustformers_crds::{ABTest, ABTestStatus};
use trustformers_proto::control::v1::{LatencyHistogram, TestCheckpoint, VariantCounts};
use trustformers_proto::latency::lower_end_us;

/// A part of the sums cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the sums of gateway process {process} cannot be read ({reason}): use the plugin of the installed version"
)]
pub struct UnreadableSums {
    process: String,
    reason: String,
}

/// The sums of a test.
#[derive(Debug, Clone, Default)]
pub struct StoredSums {
    counts: Vec<VariantCounts>,
}

/// How the latencies of a variant are distributed.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LatencyCurve {
    /// The variant.
    pub variant: String,
    /// Answers.
    pub answers: u64,
    /// The share of answers within each latency, ascending.
    pub points: Vec<CurvePoint>,
}

/// One point of a distribution.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CurvePoint {
    /// A latency in ms.
    pub latency_ms: f64,
    /// The share of answers that do not exceed it, 0 to 1.
    pub share: f64,
}

impl StoredSums {
    /// The sums that a ConfigMap has of the test with this UID.
    ///
    /// # Errors
    /// When a part cannot be decoded.
    pub fn of(map: Option<&ConfigMap>, uid: &str) -> Result<Self, UnreadableSums> {
        let mut counts = Vec::new();
        for (process, bytes) in map.and_then(|map| map.binary_data.as_ref()).into_iter().flatten() {
            let part = <TestCheckpoint as prost::Message>::decode(bytes.0.as_slice());
            let part =
                part.map_err(|error| UnreadableSums { process: process.clone(), reason: error.to_string() })?;
            counts.extend(part.counts.into_iter().filter(|one| one.test == uid));
        }
        Ok(Self { counts })
    }

    /// Whether nothing is stored.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.counts.is_empty()
    }

    /// The distributions of the newest epoch, in the order of the spec's variants. Earlier epochs had other
    /// weights, and the operator compares quantiles of the newest one alone, too.
    #[must_use]
    pub fn latencies(&self, test: &ABTest, status: &ABTestStatus) -> Vec<LatencyCurve> {
        let newest = status.epochs.iter().filter_map(|one| u64::try_from(one.epoch).ok()).max();
        let curves = test.spec.variants.iter().filter_map(|variant| {
            let of_variant =
                self.counts.iter().filter(|one| one.variant == variant.name && Some(one.epoch) == newest);
            curve(&variant.name, of_variant.filter_map(|one| one.answer.as_ref()))
        });
        curves.collect()
    }
}

/// The distribution of all processes; none without an answer.
fn curve<'a>(variant: &str, histograms: impl Iterator<Item = &'a LatencyHistogram>) -> Option<LatencyCurve> {
    let mut counts: BTreeMap<usize, u64> = BTreeMap::new();
    for counted in histograms.flat_map(LatencyHistogram::bucket_counts) {
        let sum = counts.entry(counted.bucket).or_default();
        *sum = sum.saturating_add(counted.count);
    }
    let answers = counts.values().fold(0_u64, |sum, count| sum.saturating_add(*count));
    if answers == 0 {
        return None;
    }
    let mut below = 0_u64;
    let points = counts.iter().filter(|(_, count)| **count > 0).map(|(bucket, count)| {
        below = below.saturating_add(*count);
        CurvePoint {
            // A bucket ends where the next one begins.
            latency_ms: lower_end_us(bucket + 1) as f64 / 1000.0,
            share: below as f64 / answers as f64,
        }
    });
    Some(LatencyCurve { variant: variant.to_owned(), answers, points: points.collect() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::ByteString;
    use trustformers_proto::latency::BucketCount;

    fn encoded(counts: Vec<VariantCounts>) -> ByteString {
        ByteString(prost::Message::encode_to_vec(&TestCheckpoint { counts, ..TestCheckpoint::default() }))
    }

    fn counts(test: &str, epoch: u64, variant: &str, buckets: &[(usize, u64)]) -> VariantCounts {
        let buckets = buckets.iter().map(|&(bucket, count)| BucketCount { bucket, count });
        VariantCounts {
            test: test.to_owned(),
            epoch,
            variant: variant.to_owned(),
            answer: Some(LatencyHistogram::of_buckets(buckets, 0)),
            ..VariantCounts::default()
        }
    }

    fn map(parts: &[(&str, ByteString)]) -> ConfigMap {
        let data = parts.iter().map(|(process, bytes)| ((*process).to_owned(), bytes.clone())).collect();
        ConfigMap { binary_data: Some(data), ..ConfigMap::default() }
    }

    fn test() -> ABTest {
        serde_yaml::from_str(include_str!("../../tests/objects/ab-test.yaml")).unwrap()
    }

    #[test]
    fn processes_are_added_up_and_other_tests_and_epochs_left_out() {
        let map = map(&[
            (
                "p1",
                encoded(vec![
                    counts("u", 2, "control", &[(0, 1), (40, 2)]),
                    counts("x", 2, "control", &[(0, 9)]),
                ]),
            ),
            (
                "p2",
                encoded(vec![counts("u", 2, "control", &[(40, 1)]), counts("u", 1, "control", &[(0, 9)])]),
            ),
        ]);
        let sums = StoredSums::of(Some(&map), "u").unwrap();
        let test = test();
        let curves = sums.latencies(&test, test.status.as_ref().unwrap());
        assert_eq!(curves.len(), 1, "the treatment has no answer");
        assert_eq!((curves[0].variant.as_str(), curves[0].answers), ("control", 4));
        let shares: Vec<f64> = curves[0].points.iter().map(|point| point.share).collect();
        assert_eq!(shares, [0.25, 1.0]);
        assert_eq!(curves[0].points[0].latency_ms, 0.032);
    }

    #[test]
    fn a_part_that_cannot_be_read_is_named() {
        let map = map(&[("p1", ByteString(vec![255]))]);
        let error = StoredSums::of(Some(&map), "u").unwrap_err().to_string();
        assert!(error.starts_with("the sums of gateway process p1 cannot be read"), "{error}");
        assert!(StoredSums::of(None, "u").unwrap().is_empty());
    }
}
