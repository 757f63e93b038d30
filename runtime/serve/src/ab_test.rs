//! A/B tests in one process: users of a name are divided between models of this server, by the gateway's own
//! split, and compared with the statistics of an `ABTest` of a cluster.
//!
//! The sums live as long as the process. There are no verdicts, guardrails or ramps: the program that
//! embeds the server reads [`ABTestReport`] and decides.

use hyper::header::HeaderName;
use trustformers_proto::ab_test::USER_BUCKETS;
use trustformers_proto::buckets::{BucketOwners, RevisionWeight};
use trustformers_proto::control::v1 as wire;
use trustformers_stats::buckets::{BucketSums, Scale, difference, estimate};
use trustformers_stats::correction::alpha_per_goal;
use trustformers_stats::sequential::{student_look, tau_for};

use crate::config::{ConfigError, wrong};

/// Most variants, as in a cluster.
const MOST_VARIANTS: usize = 4;
/// A weight of 1 in the units of the split.
const WHOLE: f64 = 10_000.0;
/// Weights may miss 1 by this, because 0.1 has no exact double.
const WEIGHT_TOLERANCE: f64 = 1e-6;
/// Probability that an interval ever misses the truth.
const ALPHA: f64 = 0.05;
/// The effect that intervals are narrowest for.
const SMALLEST_EFFECT: f64 = 0.05;
/// The metric of scores that count.
const FEEDBACK_METRIC: &str = "score";

/// How the users of a name are divided.
#[derive(Debug, Clone, PartialEq)]
pub struct ABTestConfig {
    /// The models; the first one is the control. The weights sum to 1.
    pub variants: Vec<Variant>,
    /// What is divided.
    pub routing_key: RoutingKey,
}

/// A model and its share.
#[derive(Debug, Clone, PartialEq)]
pub struct Variant {
    /// Name of the model.
    pub model: String,
    /// Share of the users, 0 to 1.
    pub weight: f64,
}

/// What is divided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RoutingKey {
    /// Users, whom the header `x-user-id` names; each keeps the model. Requests without it are divided one by
    /// one and do not count.
    UserId,
    /// The same with another header.
    Header(String),
    /// Requests, exactly.
    Request,
}

/// What a test shows so far. It holds whenever it is asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct ABTestReport {
    /// The variants, the control first.
    pub variants: Vec<VariantReport>,
}

/// One variant.
#[derive(Debug, Clone, PartialEq)]
pub struct VariantReport {
    /// Name of the model.
    pub model: String,
    /// Distinct users.
    pub users: u64,
    /// Requests that were answered or failed.
    pub requests: u64,
    /// Requests that failed.
    pub errors: u64,
    /// Failures by requests.
    pub error_rate: Option<MetricReport>,
    /// Tokens by the time of the answers with them.
    pub tokens_per_second: Option<MetricReport>,
    /// The mean score of `POST /v1/feedback`.
    pub score: Option<MetricReport>,
}

/// One metric of a variant.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MetricReport {
    /// Its value.
    pub value: f64,
    /// How it differs from the control's; none of the control, and with too little to compare.
    pub effect: Option<Effect>,
}

/// A difference: relative to the control, 0.02 is 2 %; of scores in their units.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Effect {
    /// The estimate.
    pub estimate: f64,
    /// The lower end of the interval that holds with 95 % at every look together.
    pub low: f64,
    /// The upper end; infinite while too little is known.
    pub high: f64,
}

/// A metric that is a ratio of two sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ratio {
    ErrorRate,
    TokensPerSecond,
    Score,
}

/// A test that was checked.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ABTest {
    name: String,
    config: ABTestConfig,
}

impl ABTest {
    /// Checks a test of this name over models that the server has.
    ///
    /// # Errors
    /// Names what cannot be honoured.
    pub(crate) fn new(name: &str, config: ABTestConfig, known: &[&str]) -> Result<Self, ConfigError> {
        let variants = &config.variants;
        if !(2..=MOST_VARIANTS).contains(&variants.len()) {
            let message = format!("{} are given; give 2 to {MOST_VARIANTS}", variants.len());
            return Err(wrong("ab_test.variants", message));
        }
        for (index, Variant { model, weight }) in variants.iter().enumerate() {
            let path = format!("ab_test.variants[{index}]");
            if !known.contains(&model.as_str()) {
                let message = format!("{model} is no model of this server; give one of {}", known.join(", "));
                return Err(wrong(&path, message));
            }
            if variants.iter().take(index).any(|other| other.model == *model) {
                return Err(wrong(&path, format!("{model} stands twice")));
            }
            if !model.bytes().all(|byte| byte.is_ascii_graphic()) {
                return Err(wrong(&path, "answers name it in a header: rename it in visible ASCII"));
            }
            if !(0.0..=1.0).contains(weight) {
                return Err(wrong(&path, format!("the weight {weight} is not between 0 and 1")));
            }
        }
        if let RoutingKey::Header(header) = &config.routing_key
            && header.parse::<HeaderName>().is_err()
        {
            return Err(wrong("ab_test.routing_key", format!("{header:?} is no name of a header")));
        }
        let sum: f64 = variants.iter().map(|variant| variant.weight).sum();
        if (sum - 1.0).abs() > WEIGHT_TOLERANCE {
            return Err(wrong("ab_test.variants", format!("the weights sum to {sum}, and must sum to 1")));
        }
        Ok(Self { name: name.to_owned(), config })
    }

    /// The name whose users are divided.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// What tells its counts from those of other tests.
    pub(crate) fn uid(&self) -> String {
        format!("one-process/{}", self.name)
    }

    /// Takes the route of its name, with the backends of the variants' own routes.
    pub(crate) fn take_route(&self, routes: &mut Vec<wire::Route>) {
        let mut route = self.route(routes);
        if let Some(index) = routes.iter().position(|one| one.name == self.name) {
            route.aliases.extend(routes.remove(index).aliases);
        }
        for other in routes.iter_mut() {
            other.aliases.retain(|alias| *alias != self.name);
        }
        route.aliases.push(self.name.clone());
        route.aliases.sort();
        route.aliases.dedup();
        routes.push(route);
    }

    fn route(&self, routes: &[wire::Route]) -> wire::Route {
        let of = |variant: &Variant| routes.iter().find(|route| route.name == variant.model);
        let control = self.config.variants.first().and_then(of);
        let backends = self.config.variants.iter().flat_map(|variant| {
            let own = of(variant).map(|route| route.backends.as_slice()).unwrap_or_default();
            own.iter().map(move |backend| wire::Backend {
                revision: format!("{}:{}", variant.model, backend.revision),
                variant: variant.model.clone(),
                model: variant.model.clone(),
                ..backend.clone()
            })
        });
        let variants = self
            .config
            .variants
            .iter()
            .map(|variant| wire::RouteVariant { name: variant.model.clone(), weight: units(variant.weight) });
        wire::Route {
            name: self.name.clone(),
            backends: backends.collect(),
            policy: control.and_then(|route| route.policy.clone()),
            task: control.map(|route| route.task.clone()).unwrap_or_default(),
            split: Some(self.split()),
            test: Some(wire::RouteTest {
                uid: self.uid(),
                epoch: 1,
                variants: variants.collect(),
                feedback_metric: FEEDBACK_METRIC.to_owned(),
                baseline: false,
            }),
            ..Default::default()
        }
    }

    fn split(&self) -> wire::Split {
        let header: &str = match &self.config.routing_key {
            RoutingKey::Request => return wire::Split::default(),
            RoutingKey::UserId => "x-user-id",
            RoutingKey::Header(header) => header,
        };
        let weights = self
            .config
            .variants
            .iter()
            .map(|variant| RevisionWeight { revision: variant.model.clone(), weight: units(variant.weight) });
        let owners = BucketOwners::with_weights(&weights.collect::<Vec<_>>());
        wire::Split {
            by: wire::SplitBy::User.into(),
            user_header: header.to_owned(),
            salt: self.uid(),
            owners: owners.map(|owners| owners.to_ranges()).unwrap_or_default(),
            ..Default::default()
        }
    }

    /// What these counts show.
    pub(crate) fn report(&self, counts: &[wire::VariantCounts]) -> ABTestReport {
        let nothing = wire::VariantCounts::default();
        let of = |variant: &Variant| {
            counts.iter().find(|counts| counts.variant == variant.model).unwrap_or(&nothing)
        };
        let alpha = alpha_per_goal(ALPHA, 1, self.config.variants.len());
        let variant = |(index, variant): (usize, &Variant)| {
            let own = of(variant);
            let control = self.config.variants.first().filter(|_| index > 0).map(of);
            let metric = |ratio: Ratio| ratio.report(own, control, alpha);
            VariantReport {
                model: variant.model.clone(),
                users: (own.users.len() as u64).checked_shl(own.users_level).unwrap_or(u64::MAX),
                requests: own.buckets.iter().map(|bucket| bucket.requests).sum(),
                errors: own.buckets.iter().map(|bucket| bucket.errors).sum(),
                error_rate: metric(Ratio::ErrorRate),
                tokens_per_second: metric(Ratio::TokensPerSecond),
                score: metric(Ratio::Score),
            }
        };
        ABTestReport { variants: self.config.variants.iter().enumerate().map(variant).collect() }
    }
}

/// A weight in the units of the split; it is from 0 to 1.
fn units(weight: f64) -> u32 {
    (weight * WHOLE).round() as u32
}

impl Ratio {
    fn sums(self, counts: &wire::VariantCounts) -> Vec<BucketSums> {
        let mut sums = vec![BucketSums::default(); USER_BUCKETS];
        for bucket in &counts.buckets {
            let Some(sum) = sums.get_mut(bucket.bucket as usize) else { continue };
            *sum = match self {
                Self::ErrorRate => BucketSums { y: bucket.errors as f64, n: bucket.requests as f64 },
                Self::TokensPerSecond => {
                    BucketSums { y: bucket.completion_tokens as f64, n: bucket.token_us as f64 / 1e6 }
                }
                Self::Score => BucketSums { y: bucket.score_sum, n: bucket.scores as f64 },
            };
        }
        sums
    }

    fn report(
        self,
        own: &wire::VariantCounts,
        control: Option<&wire::VariantCounts>,
        alpha: f64,
    ) -> Option<MetricReport> {
        let arm = estimate(&self.sums(own))?;
        let scale = if self == Self::Score { Scale::Difference } else { Scale::LogRatio };
        let tau = match scale {
            Scale::LogRatio => tau_for(SMALLEST_EFFECT.ln_1p()),
            Scale::Difference => tau_for(SMALLEST_EFFECT),
        };
        let control = control.and_then(|control| estimate(&self.sums(control)));
        let found = control.and_then(|control| difference(&arm, &control, scale));
        let effect = found.map(|found| {
            let width = student_look(&found, tau, alpha).half_width;
            let shown = |value: f64| if scale == Scale::LogRatio { value.exp_m1() } else { value };
            Effect {
                estimate: shown(found.estimate),
                low: shown(found.estimate - width),
                high: shown(found.estimate + width),
            }
        });
        Some(MetricReport { value: arm.ratio, effect })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(weights: [(&str, f64); 2]) -> ABTestConfig {
        let variants = weights.map(|(model, weight)| Variant { model: model.to_owned(), weight });
        ABTestConfig { variants: variants.to_vec(), routing_key: RoutingKey::UserId }
    }

    fn test() -> ABTest {
        ABTest::new("a", config([("a", 0.9), ("b", 0.1)]), &["a", "b"]).unwrap()
    }

    #[test]
    fn what_cannot_be_divided_is_refused_by_its_place() {
        for (weights, expected) in [
            ([("a", 0.9), ("c", 0.1)], "ab_test.variants[1]: c is no model of this server; give one of a, b"),
            ([("a", 0.9), ("a", 0.1)], "ab_test.variants[1]: a stands twice"),
            ([("a", 0.9), ("b", 0.2)], "ab_test.variants: the weights sum to 1.1"),
            ([("a", 1.5), ("b", -0.5)], "ab_test.variants[0]: the weight 1.5"),
            ([("a", f64::NAN), ("b", 0.5)], "ab_test.variants[0]: the weight NaN"),
        ] {
            let error = ABTest::new("a", config(weights), &["a", "b"]).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
        let one = ABTestConfig { variants: Vec::new(), routing_key: RoutingKey::Request };
        let error = ABTest::new("a", one, &["a"]).unwrap_err().to_string();
        assert!(error.contains("give 2 to 4"), "{error}");
    }

    #[test]
    fn a_test_takes_the_route_of_its_name_and_its_variants_keep_theirs() {
        let route = |name: &str, alias: &str| wire::Route {
            name: name.to_owned(),
            aliases: vec![name.to_owned(), alias.to_owned()],
            backends: vec![wire::Backend { revision: "local".to_owned(), weight: 1, ..Default::default() }],
            task: "generate".to_owned(),
            ..Default::default()
        };
        let mut routes = vec![route("a", "first"), route("b", "second")];
        test().take_route(&mut routes);
        let names: Vec<_> = routes.iter().map(|route| route.name.as_str()).collect();
        assert_eq!(names, ["b", "a"]);
        let taken = &routes[1];
        assert_eq!(taken.aliases, ["a", "first"]);
        let backends: Vec<_> =
            taken.backends.iter().map(|one| (one.revision.as_str(), one.model.as_str())).collect();
        assert_eq!(backends, [("a:local", "a"), ("b:local", "b")]);
        let ends: Vec<_> = taken.split.as_ref().unwrap().owners.iter().map(|range| range.end).collect();
        assert_eq!(ends, [9000, 10_000]);
    }

    #[test]
    fn a_report_has_the_counts_and_an_interval_that_holds() {
        let counts = |variant: &str, errors: u64| wire::VariantCounts {
            variant: variant.to_owned(),
            users: vec![1, 2, 3],
            buckets: (0..256)
                .map(|bucket| wire::UserBucketCounts {
                    bucket,
                    requests: 100,
                    errors: errors + u64::from(bucket % 3),
                    scores: 2,
                    score_sum: f64::from(bucket % 2),
                    ..Default::default()
                })
                .collect(),
            ..Default::default()
        };
        let report = test().report(&[counts("a", 9), counts("b", 19)]);
        let [control, treatment] = &report.variants[..] else { panic!("{report:?}") };
        assert_eq!((control.users, control.requests, control.errors), (3, 25_600, 2559));
        assert!(control.error_rate.unwrap().effect.is_none() && control.tokens_per_second.is_none());
        let effect = treatment.error_rate.unwrap().effect.unwrap();
        // 20 errors by 10.
        assert!(effect.low > 0.5 && effect.low < 1.0 && effect.high > 1.0, "{effect:?}");
        let score = treatment.score.unwrap().effect.unwrap();
        assert!(score.low < 0.0 && score.high > 0.0, "{score:?}");
        assert_eq!(test().report(&[]).variants[1].requests, 0);
    }
}
