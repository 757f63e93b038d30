//! The test of a route, parsed from the operator's table.

use trustformers_proto::control::v1 as wire;

/// The A/B test of a route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TestRule {
    /// UID of the test.
    pub uid: String,
    /// A time of constant weights and revisions.
    pub epoch: u64,
    /// The variants, the control first.
    pub variants: Vec<VariantWeight>,
    /// The metric of scores that counts.
    pub feedback_metric: String,
    /// Whether the first variant answers every request.
    pub baseline: bool,
}

/// A variant and its share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VariantWeight {
    /// Its name.
    pub name: String,
    /// Share of the requests, relative to the other variants'.
    pub weight: u32,
}

impl TestRule {
    /// Reads a test. One without variants is none: all backends then share the requests.
    #[must_use]
    pub(crate) fn parse(test: wire::RouteTest) -> Option<Self> {
        let wire::RouteTest { uid, epoch, variants, feedback_metric, baseline } = test;
        let variant = |one: wire::RouteVariant| VariantWeight { name: one.name, weight: one.weight };
        let variants: Vec<VariantWeight> = variants.into_iter().map(variant).collect();
        (!variants.is_empty()).then_some(Self { uid, epoch, variants, feedback_metric, baseline })
    }

    /// The weight of a variant; 0 of one that the test does not have.
    #[must_use]
    pub(crate) fn weight_of(&self, variant: &str) -> u32 {
        self.variants.iter().find(|one| one.name == variant).map_or(0, |one| one.weight)
    }
}
