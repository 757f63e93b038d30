//! A/B tests: the variant of a request, and what is counted of it.
//!
//! A request counts at the variant that it was assigned to, one time, with the time that its caller waited,
//! however many attempts it needed and whoever answered it in the end. A user counts as seen when the first
//! request is assigned, whatever becomes of it.

mod fault;
mod rule;
mod series;

use std::sync::{Arc, Weak};
use std::time::Duration;

use http::{HeaderMap, HeaderValue};
use sha2::{Digest, Sha256};
use trustformers_proto::buckets::{BUCKETS, BucketOwners};
use trustformers_proto::control::v1::Outcome;

use crate::answer_end::EndUsage;
use crate::score_token::{ScorePlace, Sealed};
use crate::split::Split;
use crate::user::KnownUser;

pub use fault::SplitSkew;
pub use rule::{TestRule, VariantWeight};
pub(crate) use series::{ChangedVariants, VariantRegistry, VariantSeries};
use series::{CountedScore, VariantKey};

/// The header of an answer that names the variant that gave it.
pub(crate) const VARIANT_HEADER: &str = "x-trustformers-variant";

/// A user as the analysis of a test distinguishes users.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TestUser {
    /// The bucket in which the user's requests are summed.
    pub(crate) bucket: u8,
    /// Tells users apart.
    pub(crate) fingerprint: u64,
}

impl TestUser {
    /// The user with this value of the header. Bucket and fingerprint are independent of the bucket that
    /// decides the variant: the hash has another beginning.
    pub(crate) fn of(salt: &str, user: &[u8]) -> Self {
        let mut hash = Sha256::new();
        hash.update(b"analysis");
        // The length in front keeps a salt and a user apart.
        hash.update((salt.len() as u64).to_be_bytes());
        hash.update(salt.as_bytes());
        hash.update(user);
        let digest = hash.finalize();
        let number = |from: usize| {
            digest.iter().skip(from).take(8).fold(0_u64, |number, &byte| number << 8 | u64::from(byte))
        };
        // The lowest byte of the first eight.
        Self { bucket: (number(0) & 0xff) as u8, fingerprint: number(8) }
    }
}

/// What decides the variant of a request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct VariantChoice<'a> {
    /// The request's number in the split.
    pub(crate) sequence: u64,
    /// The bucket of its user that decides.
    pub(crate) bucket: Option<u16>,
    /// The variant of a user who is forced to one.
    pub(crate) forced: Option<&'a str>,
    /// Whether the request names the revision that must answer.
    pub(crate) names_revision: bool,
}

/// A backend of a route, as far as its test needs to know it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TestBackend<'a> {
    /// Its variant.
    pub(crate) variant: &'a str,
    /// Its share of the variant's requests; 0 where it takes none.
    pub(crate) weight: u32,
}

/// The test of a route, prepared for choices.
#[derive(Debug)]
pub(crate) struct LiveTest {
    variants: Vec<LiveVariant>,
    split: Split,
    /// By bucket of users the index of the variant that owns it, where users are split.
    owners: Option<Box<[u16]>>,
    /// Whether the first variant answers every request.
    is_baseline: bool,
    /// A fault, in tests of the platform.
    skew: Option<SplitSkew>,
}

#[derive(Debug)]
struct LiveVariant {
    /// Indices of its backends in the route.
    backends: Vec<usize>,
    within: Split,
    series: Arc<VariantSeries>,
}

impl LiveTest {
    /// Joins the rule of a test with its backends and its series.
    pub(crate) fn new(
        rule: &TestRule,
        owners: Option<&BucketOwners>,
        backends: &[TestBackend<'_>],
        registry: &VariantRegistry,
    ) -> Self {
        let weights: Vec<u32> = rule.variants.iter().map(|variant| variant.weight).collect();
        let owners = owners.map(|owners| {
            let index_of = |bucket| {
                let owner = owners.owner(bucket)?;
                let index = rule.variants.iter().position(|variant| variant.name == owner)?;
                u16::try_from(index).ok()
            };
            (0..BUCKETS).map(|bucket| index_of(bucket).unwrap_or(u16::MAX)).collect()
        });
        let variant = |variant: &VariantWeight| {
            let own: Vec<usize> =
                (0..backends.len()).filter(|&index| backends[index].variant == variant.name).collect();
            let weights: Vec<u32> = own.iter().map(|&index| backends[index].weight).collect();
            LiveVariant {
                backends: own,
                within: Split::new(&weights),
                series: registry.series(rule, &variant.name),
            }
        };
        Self {
            variants: rule.variants.iter().map(variant).collect(),
            split: Split::new(&weights),
            owners,
            is_baseline: rule.baseline,
            skew: registry.skew(),
        }
    }

    /// The variant that a request is assigned to. None where every weight is 0.
    fn variant(&self, choice: VariantChoice<'_>) -> Option<&LiveVariant> {
        let forced = choice
            .forced
            .and_then(|name| self.variants.iter().find(|variant| variant.series.key.variant == name));
        let owner = choice.bucket.and_then(|bucket| {
            let owner = *self.owners.as_ref()?.get(usize::from(bucket))?;
            let is_moved = owner == 0 && self.skew.is_some_and(|skew| skew.moves(bucket));
            self.variants.get(if is_moved { 1 } else { usize::from(owner) })
        });
        forced.or(owner).or_else(|| self.variants.get(self.split.choose(choice.sequence)?))
    }

    /// The backend of a request: one of its variant's. A user keeps the revision while the shares stay. None
    /// where the variant has no backend that takes requests.
    pub(crate) fn backend(&self, choice: VariantChoice<'_>) -> Option<usize> {
        let variant = if self.is_baseline { self.variants.first()? } else { self.variant(choice)? };
        let number = choice.bucket.map_or(choice.sequence, u64::from);
        // Mixed, because numbers of one variant follow a pattern.
        let chosen = variant.within.choose(mixed(number))?;
        variant.backends.get(chosen).copied()
    }

    /// What counts a variant; none where the test does not have it.
    pub(crate) fn series_of(&self, variant: &str) -> Option<Arc<VariantSeries>> {
        let named = self.variants.iter().find(|one| one.series.key.variant == variant);
        named.map(|variant| Arc::clone(&variant.series))
    }

    /// What counts a request. `user` is its user, where users are split and it names one.
    pub(crate) fn observe(&self, choice: VariantChoice<'_>, user: Option<TestUser>) -> Option<Observation> {
        let series = Arc::clone(&self.variant(choice)?.series);
        let bucket = match (user, &self.owners) {
            _ if choice.forced.is_some() || choice.names_revision => {
                series.count_forced();
                None
            }
            (Some(user), _) => {
                series.count_user(user.fingerprint);
                Some(user.bucket)
            }
            (None, Some(_)) => {
                series.count_unidentified();
                None
            }
            // Requests are the units: each is drawn a bucket of its own.
            (None, None) => Some(fastrand::u8(..)),
        };
        Some(Observation { series, bucket, user: None, is_baseline: self.is_baseline })
    }
}

/// What tells the answers of one variant and epoch apart, the same at every gateway.
fn answer_fingerprint(request_id: &str, bucket: u8) -> u64 {
    let mut hash = Sha256::new();
    hash.update(b"scored");
    hash.update([bucket]);
    hash.update(request_id);
    let digest = hash.finalize();
    digest.iter().take(8).fold(0_u64, |number, &byte| number << 8 | u64::from(byte))
}

/// `SplitMix64`'s finisher.
fn mixed(number: u64) -> u64 {
    let mut mixed = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// A request of a test.
#[derive(Debug)]
pub(crate) struct Observation {
    series: Arc<VariantSeries>,
    /// None of a request that does not count in the analysis.
    bucket: Option<u8>,
    /// Who sent it, where users are split.
    user: Option<KnownUser>,
    /// Whether another variant answers it by intention.
    is_baseline: bool,
}

/// How a request ended for its caller.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ObservedEnd {
    /// How.
    pub(crate) outcome: Outcome,
    /// From the request to its end.
    pub(crate) took: Duration,
    /// From the request to the first bytes of its stream.
    pub(crate) first_token: Option<Duration>,
    /// Tokens, where the answer tells them.
    pub(crate) usage: Option<EndUsage>,
}

/// The bucket in which the score of an answer counts.
#[derive(Debug, Clone)]
pub(crate) struct ScoredBucket {
    series: Weak<VariantSeries>,
    bucket: u8,
    /// Who may score, where users are split.
    user: Option<KnownUser>,
}

impl Observation {
    /// The same of a request of this user, who alone may score its answer.
    pub(crate) fn of_user(self, user: Option<KnownUser>) -> Self {
        Self { user, ..self }
    }

    /// The request has ended; `answered` is the variant that gave the answer.
    pub(crate) fn ended(&self, end: &ObservedEnd, answered: Option<&HeaderValue>) {
        let is_other = answered.is_some_and(|answered| Some(answered) != self.series.header.as_ref());
        let is_fallback = is_other && !self.is_baseline;
        self.series.count_end(self.bucket, end, is_fallback);
    }

    /// What lets other gateways count a score of its answer; none where no score counts.
    pub(crate) fn token(&self, request_id: &str) -> Option<String> {
        let VariantKey { test, epoch, variant } = &self.series.key;
        let place = ScorePlace { epoch: *epoch, bucket: self.bucket? };
        Some(Sealed { test, variant, request_id }.token(place))
    }

    /// Where a score of its answer counts.
    pub(crate) fn scored_bucket(&self) -> Option<ScoredBucket> {
        let user = self.user.clone();
        Some(ScoredBucket { series: Arc::downgrade(&self.series), bucket: self.bucket?, user })
    }
}

impl ScoredBucket {
    /// Where the score of an answer counts that another gateway gave to a request of this test.
    pub(crate) fn of_token(
        rule: &TestRule,
        token: &str,
        request_id: &str,
        registry: &VariantRegistry,
    ) -> Option<Self> {
        let found = rule.variants.iter().find_map(|variant| {
            let sealed = Sealed { test: &rule.uid, variant: &variant.name, request_id };
            Some((variant, sealed.place(token)?))
        });
        let (variant, ScorePlace { epoch, bucket }) = found?;
        let series = registry.series(&TestRule { epoch, ..rule.clone() }, &variant.name);
        Some(Self { series: Arc::downgrade(&series), bucket, user: None })
    }

    /// Whether a score with these headers is of the user who got the answer.
    pub(crate) fn is_of_its_user(&self, headers: &HeaderMap) -> bool {
        self.user.as_ref().is_none_or(|user| user.sent(headers))
    }

    /// Whether the test counts scores of this metric.
    pub(crate) fn counts(&self, metric: &str) -> bool {
        self.series.upgrade().is_some_and(|series| series.counts_metric(metric))
    }

    /// A caller scored the answer of this request.
    pub(crate) fn scored(&self, metric: &str, request_id: &str, score: f64) {
        // A score comes too late once the counts of the epoch are over.
        if let Some(series) = self.series.upgrade() {
            let answer = answer_fingerprint(request_id, self.bucket);
            series.count_score(metric, CountedScore { answer, bucket: self.bucket, score });
        }
    }
}

#[cfg(test)]
mod tests;
