//! What a checkpoint says: how variants differ, whether one has won, whether a guardrail is broken, and
//! whether users are divided as configured.
//!
//! Every statement holds however often it is asked for. A verdict is that of the first checkpoint that is
//! sure enough, so nothing but the information so far has to be remembered between checkpoints.

use std::collections::{BTreeMap, BTreeSet};

use trustformers_crds::{ABTestVerdict, AssignBy, Direction, Guardrail, Metric};
use trustformers_proto::ab_test::UserSet;
use trustformers_stats::buckets::{ArmDifference, Scale, estimate};
use trustformers_stats::correction::{alpha_per_goal, e_bh};
use trustformers_stats::power::{days_left, detectable_effect, needed_information};
use trustformers_stats::sequential::{ln_evidence_above, tau_for};
use trustformers_stats::split_check::{self, SplitEpoch};
use trustformers_stats::verdict::{self, ArmSample, EffectInterval, TestVerdict};

use super::metric::{
    CompareSettings, EpochPair, PairHistory, VariantDifference, compare, quantile_of, ratio_sums, scale_of,
    value,
};
use super::sample::VariantSums;
use super::validate::ValidatedTest;

/// Probability that a guardrail that holds ever ends a test.
const GUARDRAIL_ALPHA: f64 = 0.05;
/// Requests below which a guardrail says nothing.
const GUARDRAIL_MIN_REQUESTS: f64 = 20.0;
/// Buckets with as large a precision below which a guardrail says nothing: one user is no population.
const GUARDRAIL_MIN_BUCKETS: f64 = 10.0;
/// Excesses, as shares of the limit, that a guardrail is tuned for: a small one that lasts, and a large one
/// that must be found at the next checkpoint. The evidence is the mean of both.
const GUARDRAIL_EFFECTS: [f64; 2] = [0.25, 2.0];
/// The information may fall by this share: late heavy users break the order in which the test is valid.
const MAX_FALL: f64 = 0.05;

/// What was counted in one epoch.
#[derive(Debug, Clone, PartialEq)]
pub struct EpochSample {
    /// The share of each variant, in ten-thousandths.
    pub weights: Vec<u32>,
    /// The sums of each variant.
    pub variants: Vec<VariantSums>,
}

/// What a checkpoint has.
#[derive(Debug, Clone, Copy)]
pub struct AssessInputs<'a> {
    /// The test.
    pub test: &'a ValidatedTest,
    /// Its epochs, the newest last.
    pub epochs: &'a [EpochSample],
    /// What users did before the test, where all of them got the control.
    pub baseline: Option<&'a EpochSample>,
    /// By variant and metric the coefficient of that, as the checkpoint before found it.
    pub thetas: &'a [BTreeMap<Metric, f64>],
    /// Users that were seen before these epochs.
    pub earlier_users: &'a UserSet,
    /// The most information of each variant so far; 0 of the control.
    pub information: &'a [f64],
    /// Days since the samples began.
    pub days: f64,
}

/// One metric of a variant.
#[derive(Debug, Clone, PartialEq)]
pub struct MetricJudgement {
    /// Which one.
    pub metric: Metric,
    /// Its value.
    pub value: Option<f64>,
    /// How it differs from the control's; none of the control itself.
    pub comparison: Option<VariantDifference>,
    /// Whether the difference is one beyond chance, all comparisons considered.
    pub differs: bool,
}

/// What is said of one variant.
#[derive(Debug, Clone, PartialEq)]
pub struct VariantJudgement {
    /// All that was counted of it.
    pub total: VariantSums,
    /// Its users; its requests, where requests are assigned.
    pub samples: u64,
    /// The goal, then the secondary metrics.
    pub metrics: Vec<MetricJudgement>,
    /// Why it has too little for a verdict.
    pub shortfalls: Vec<String>,
    /// The most information so far.
    pub information: f64,
}

/// A limit that a variant passed.
#[derive(Debug, Clone, PartialEq)]
pub struct Breach {
    /// Index of the variant.
    pub variant: usize,
    /// The metric.
    pub metric: Metric,
    /// Its value.
    pub value: f64,
    /// The limit.
    pub limit: f64,
}

/// A verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conclusion {
    /// What the test says.
    pub verdict: ABTestVerdict,
    /// Index of the variant that won.
    pub winner: Option<usize>,
}

/// What a checkpoint says.
#[derive(Debug, Clone, PartialEq)]
pub struct Judgement {
    /// The variants.
    pub variants: Vec<VariantJudgement>,
    /// Logarithm of the evidence that users are not divided as configured; none where requests are assigned.
    pub split_ln_evidence: Option<f64>,
    /// The first limit that a variant passed.
    pub breach: Option<Breach>,
    /// The verdict, once there is one.
    pub conclusion: Option<Conclusion>,
    /// Index of the variant that is ahead.
    pub leader: Option<usize>,
    /// How sure it is that it differs from the control, 0 to 1.
    pub confidence: Option<f64>,
    /// The effect that the test finds now with a probability of 80 %.
    pub detectable_effect: Option<f64>,
    /// Days until the smallest effect that matters is found.
    pub days_left: Option<f64>,
}

impl Judgement {
    /// Whether users are not divided as configured.
    #[must_use]
    pub fn split_is_broken(&self) -> bool {
        self.split_ln_evidence.is_some_and(|evidence| evidence > split_check::ALARM.ln())
    }
}

/// Says what a checkpoint shows.
#[must_use]
pub fn assess(inputs: &AssessInputs<'_>) -> Judgement {
    let split = splits(inputs);
    let split_ln_evidence = split.as_deref().map(split_check::ln_evidence);
    let users = users_of(inputs);
    let mut variants: Vec<VariantJudgement> =
        (0..inputs.test.variants.len()).map(|index| assess_variant(inputs, index, users[index])).collect();
    correct_secondary(inputs, &mut variants);
    remember_information(inputs.information, &mut variants);
    let breach = (1..variants.len()).find_map(|index| {
        let mut guardrails = inputs.test.guardrails.iter();
        guardrails.find_map(|one| breach(one, index, &variants[index].total))
    });
    let leader = leader(inputs, &variants);
    let mut judgement = Judgement {
        split_ln_evidence,
        breach,
        conclusion: None,
        leader,
        confidence: leader.and_then(|leader| confidence(&variants, leader)),
        detectable_effect: None,
        days_left: None,
        variants,
    };
    plan_ahead(inputs, &mut judgement);
    judgement.conclusion = conclude(inputs, &judgement);
    judgement
}

fn settings(test: &ValidatedTest) -> CompareSettings {
    CompareSettings {
        alpha: alpha_per_goal(test.alpha, 1, test.variants.len()),
        smallest_effect: test.goal.smallest_effect,
    }
}

fn assess_variant(inputs: &AssessInputs<'_>, index: usize, users: u64) -> VariantJudgement {
    let test = inputs.test;
    let mut total = VariantSums::default();
    inputs.epochs.iter().for_each(|epoch| total.merge(&epoch.variants[index]));
    // Of a time without a share nothing can be compared.
    let shared = inputs.epochs.iter().filter(|epoch| epoch.weights[index] > 0 && epoch.weights[0] > 0);
    let pairs: Vec<EpochPair<'_>> = shared
        .map(|epoch| EpochPair { treatment: &epoch.variants[index], control: &epoch.variants[0] })
        .collect();
    let metrics = std::iter::once(test.goal.metric).chain(test.secondary.iter().map(|one| one.metric));
    let metrics: Vec<MetricJudgement> = metrics
        .map(|metric| {
            let settings = settings(test);
            let history = inputs.baseline.map(|before| PairHistory {
                before: EpochPair { treatment: &before.variants[index], control: &before.variants[0] },
                theta: inputs
                    .thetas
                    .get(index)
                    .and_then(|thetas| thetas.get(&metric))
                    .map_or(0.0, |one| *one),
            });
            let comparison = if index == 0 { None } else { compare(metric, &pairs, settings, history) };
            // Of the goal; those of secondary metrics are corrected together.
            let differs = comparison.as_ref().is_some_and(|one| one.ln_evidence >= -settings.alpha.ln());
            MetricJudgement { metric, value: value(metric, &total), comparison, differs }
        })
        .collect();
    let samples = if test.assignment.by == AssignBy::User { users } else { total.requests() };
    let goal = metrics.first().and_then(|one| one.comparison.as_ref());
    let mut shortfalls = shortfalls(test, &total, samples);
    if goal.and_then(|goal| goal.skewness).is_some_and(is_skewed) {
        shortfalls.push("Skewed".to_owned());
    }
    VariantJudgement { total, samples, metrics, shortfalls, information: 0.0 }
}

/// Compares the information of each variant with the most that it had `before`. What too small a sample says
/// is not remembered: a few scores that are equal by chance seem precise, and no later look would be as
/// precise.
fn remember_information(before: &[f64], variants: &mut [VariantJudgement]) {
    let control_is_enough = variants.first().is_some_and(|control| control.shortfalls.is_empty());
    for (index, variant) in variants.iter_mut().enumerate() {
        let before = before.get(index).copied().unwrap_or(0.0);
        let goal = variant.metrics.first().and_then(|one| one.comparison.as_ref());
        let information = goal.map_or(0.0, |goal| goal.information);
        let is_enough = control_is_enough && variant.shortfalls.is_empty();
        if index > 0 && information < (1.0 - MAX_FALL) * before {
            variant.shortfalls.push("InformationFell".to_owned());
        }
        variant.information = if is_enough { information.max(before) } else { before };
    }
}

/// Whether one tail of the interval is too short.
fn is_skewed(skewness: f64) -> bool {
    let nothing = ArmDifference { estimate: 0.0, standard_error: 1.0, degrees_of_freedom: 1.0, skewness };
    verdict::is_skewed(&nothing)
}

/// Why a variant has too little for a verdict about the goal.
fn shortfalls(test: &ValidatedTest, total: &VariantSums, samples: u64) -> Vec<String> {
    let mut found = Vec::new();
    if samples < test.min_samples {
        found.push("Samples".to_owned());
    }
    let metric = test.goal.metric;
    if let Some(quantile) = quantile_of(metric) {
        let limit_ms = quantile.value_ms(total).unwrap_or(0.0);
        let tail = quantile.tail(total, limit_ms);
        if (tail.requests as f64) * (1.0 - quantile.p) < 50.0 * tail.design_effect {
            found.push("Requests".to_owned());
        }
        return found;
    }
    let Some(estimate) = estimate(&ratio_sums(metric, total)) else {
        found.push("Requests".to_owned());
        return found;
    };
    let events = match metric {
        Metric::ErrorRate => Some(total.errors() as f64),
        Metric::FeedbackScore => Some(total.buckets.iter().map(|one| one.scores as f64).sum()),
        _ => None,
    };
    // The least number of users is that of the spec.
    let sample = ArmSample { users: u64::MAX, events, estimate: &estimate };
    found.extend(verdict::shortfalls(&sample).into_iter().map(|one| format!("{one:?}")));
    found
}

/// Which secondary metrics differ, with a bounded share of wrong ones among all that are said to.
fn correct_secondary(inputs: &AssessInputs<'_>, variants: &mut [VariantJudgement]) {
    let evidence: Vec<f64> = variants
        .iter()
        .skip(1)
        .flat_map(|variant| variant.metrics.iter().skip(1))
        .map(|one| one.comparison.as_ref().map_or(f64::NEG_INFINITY, |one| one.ln_evidence))
        .collect();
    let mut differs = e_bh(&evidence, inputs.test.alpha).into_iter();
    let secondary = variants.iter_mut().skip(1).flat_map(|variant| variant.metrics.iter_mut().skip(1));
    for one in secondary {
        one.differs = differs.next().unwrap_or(false) && one.comparison.is_some();
    }
}

/// Users of each variant that were first seen in each epoch, by the weights of the epoch. None where requests
/// are assigned.
fn splits(inputs: &AssessInputs<'_>) -> Option<Vec<SplitEpoch>> {
    if inputs.test.assignment.by != AssignBy::User {
        return None;
    }
    // Users that were first seen in the baseline are divided then.
    let epochs: Vec<&EpochSample> = inputs.baseline.into_iter().chain(inputs.epochs).collect();
    let level = users_level(&epochs).max(inputs.earlier_users.level());
    let mut earlier = inputs.earlier_users.clone();
    earlier.raise_to(level);
    let mut seen: BTreeSet<u64> = earlier.iter().collect();
    let mut splits = Vec::new();
    for epoch in epochs {
        let whole: f64 = epoch.weights.iter().map(|weight| f64::from(*weight)).sum();
        let mut split = SplitEpoch { weights: Vec::new(), users: Vec::new() };
        let mut now: BTreeSet<u64> = BTreeSet::new();
        for (weight, sums) in epoch.weights.iter().zip(&epoch.variants) {
            let mut sampled = sums.users.clone();
            sampled.raise_to(level);
            let new = sampled.iter().filter(|user| !seen.contains(user)).count();
            now.extend(sampled.iter());
            if *weight > 0 {
                split.weights.push(f64::from(*weight) / whole);
                split.users.push(new as u64);
            }
        }
        seen.extend(now);
        if split.weights.len() > 1 {
            splits.push(split);
        }
    }
    Some(splits)
}

/// The highest level of all samples of users.
fn users_level(epochs: &[&EpochSample]) -> u32 {
    let all = epochs.iter().flat_map(|epoch| &epoch.variants);
    all.map(|sums| sums.users.level()).max().unwrap_or(0)
}

/// Distinct users of each variant over all epochs.
fn users_of(inputs: &AssessInputs<'_>) -> Vec<u64> {
    let of = |index: usize| {
        let mut users = VariantSums::default().users;
        inputs.epochs.iter().for_each(|epoch| users.merge(&epoch.variants[index].users));
        users.estimate()
    };
    (0..inputs.test.variants.len()).map(of).collect()
}

/// A limit that a variant passed beyond doubt.
fn breach(guardrail: &Guardrail, variant: usize, sums: &VariantSums) -> Option<Breach> {
    let metric = guardrail.metric;
    let (limit, sign) = match (guardrail.max, guardrail.min) {
        (Some(limit), _) => (limit, 1.0),
        (None, Some(limit)) => (limit, -1.0),
        (None, None) => return None,
    };
    let ln_evidence = match quantile_of(metric) {
        Some(quantile) => {
            // More than 5 % are above the limit of a 95th percentile.
            let tail = quantile.tail(sums, limit);
            let allowed = 1.0 - quantile.p;
            let requests = tail.requests as f64;
            let share = tail.above as f64 / requests.max(1.0);
            let variance = allowed * (1.0 - allowed) / requests.max(1.0) * tail.design_effect;
            let excess = Excess { estimate: share - allowed, variance, limit: allowed };
            (requests >= GUARDRAIL_MIN_REQUESTS).then(|| excess.ln_evidence())?
        }
        None => {
            let arm = estimate(&ratio_sums(metric, sums))?;
            let requests: f64 = sums.requests() as f64;
            if requests < GUARDRAIL_MIN_REQUESTS || arm.effective_buckets < GUARDRAIL_MIN_BUCKETS {
                return None;
            }
            // Where all buckets are equal the variance between them is 0: at least that of single events.
            let share = (arm.ratio * requests + 1.0) / (requests + 2.0);
            let single =
                if metric == Metric::ErrorRate { share * (1.0 - share).max(0.0) / requests } else { 0.0 };
            let variance = arm.variance.max(single).max(f64::MIN_POSITIVE);
            // Of a limit of 0 the excess has another unit.
            let limit_or_unit = limit.abs().max(0.01);
            Excess { estimate: sign * (arm.ratio - limit), variance, limit: limit_or_unit }.ln_evidence()
        }
    };
    let value = value(metric, sums).unwrap_or(f64::INFINITY);
    (ln_evidence > -GUARDRAIL_ALPHA.ln()).then_some(Breach { variant, metric, value, limit })
}

/// By how much something is above its limit.
struct Excess {
    estimate: f64,
    variance: f64,
    /// The limit.
    limit: f64,
}

impl Excess {
    fn ln_evidence(&self) -> f64 {
        let difference = ArmDifference {
            estimate: self.estimate,
            standard_error: self.variance.sqrt(),
            degrees_of_freedom: f64::INFINITY,
            skewness: 0.0,
        };
        let [small, large] =
            GUARDRAIL_EFFECTS.map(|effect| ln_evidence_above(&difference, tau_for(effect * self.limit)));
        // The logarithm of the mean.
        small.max(large) + (0.5 * (1.0 + (-(small - large).abs()).exp())).ln()
    }
}

/// The variant with the best value of the goal.
fn leader(inputs: &AssessInputs<'_>, variants: &[VariantJudgement]) -> Option<usize> {
    let sign = if inputs.test.goal.direction == Direction::Higher { 1.0 } else { -1.0 };
    let values = variants.iter().enumerate().filter_map(|(index, variant)| {
        let value = variant.metrics.first()?.value?;
        Some((index, sign * value))
    });
    // The first of equals: the control.
    values.reduce(|best, next| if next.1 > best.1 { next } else { best }).map(|(index, _)| index)
}

/// How sure it is that the leader differs from the control; of the control, that it differs from some other.
fn confidence(variants: &[VariantJudgement], leader: usize) -> Option<f64> {
    let behind = variants.iter().enumerate().skip(1);
    let relevant = behind.filter(|(index, _)| leader == 0 || *index == leader);
    let evidence =
        relevant.filter_map(|(_, variant)| Some(variant.metrics.first()?.comparison.as_ref()?.ln_evidence));
    let comparisons = variants.len().saturating_sub(1).max(1) as f64;
    let most = evidence.reduce(f64::max)?;
    Some(1.0 - (comparisons * (-most).exp()).min(1.0))
}

/// What the test finds now, and how long it takes at the present rate.
fn plan_ahead(inputs: &AssessInputs<'_>, judgement: &mut Judgement) {
    let settings = settings(inputs.test);
    let metric = inputs.test.goal.metric;
    let tau = settings.tau(metric);
    // Of several variants the one with the least information.
    let comparisons = judgement.variants.iter().filter_map(|one| one.metrics.first()?.comparison.as_ref());
    let errors = comparisons.filter_map(|one| one.standard_error);
    let Some(largest) = errors.reduce(f64::max).filter(|error| *error > 0.0) else { return };
    let effect = detectable_effect(largest, tau, settings.alpha);
    let is_relative = scale_of(metric) == Scale::LogRatio;
    judgement.detectable_effect = Some(if is_relative { effect.exp_m1() } else { effect });
    let smallest = if is_relative { settings.smallest_effect.ln_1p() } else { settings.smallest_effect };
    let information = largest.powi(-2);
    let needed = needed_information(smallest, tau, settings.alpha);
    let per_day = if inputs.days > 0.0 { information / inputs.days } else { 0.0 };
    judgement.days_left = days_left(needed, information, per_day);
}

/// The verdict of a checkpoint; none while more has to be observed.
fn conclude(inputs: &AssessInputs<'_>, judgement: &Judgement) -> Option<Conclusion> {
    let test = inputs.test;
    if judgement.split_is_broken() {
        return Some(Conclusion { verdict: ABTestVerdict::Invalid, winner: None });
    }
    if inputs.days * 86_400.0 < test.min_duration.as_secs_f64()
        || judgement.variants.iter().any(|variant| !variant.shortfalls.is_empty())
    {
        return None;
    }
    let direction = match test.goal.direction {
        Direction::Higher => verdict::Direction::Higher,
        Direction::Lower => verdict::Direction::Lower,
    };
    let is_relative = scale_of(test.goal.metric) == Scale::LogRatio;
    let margin = if is_relative { test.goal.margin.ln_1p() } else { test.goal.margin };
    let of = |variant: &VariantJudgement| {
        let comparison = variant.metrics.first().and_then(|one| one.comparison.as_ref());
        comparison.filter(|one| one.low.is_finite() && one.high.is_finite()).map_or(
            TestVerdict::Inconclusive,
            |one| {
                let interval = EffectInterval {
                    estimate: 0.5 * (one.low + one.high),
                    half_width: 0.5 * (one.high - one.low),
                    margin,
                };
                verdict::verdict(interval, direction, false)
            },
        )
    };
    let verdicts: Vec<TestVerdict> = judgement.variants.iter().skip(1).map(of).collect();
    let sign = if test.goal.direction == Direction::Higher { 1.0 } else { -1.0 };
    let value = |index: usize| judgement.variants[index].metrics[0].value.unwrap_or(0.0) * sign;
    let won = (1..).zip(&verdicts).filter(|(_, one)| **one == TestVerdict::TreatmentWins);
    let best =
        won.map(|(index, _)| index).reduce(|best, next| if value(next) > value(best) { next } else { best });
    let is_all = |wanted: &[TestVerdict]| verdicts.iter().all(|one| wanted.contains(one));
    if let Some(winner) = best {
        Some(Conclusion { verdict: ABTestVerdict::Winner, winner: Some(winner) })
    } else if is_all(&[TestVerdict::ControlWins]) {
        Some(Conclusion { verdict: ABTestVerdict::Winner, winner: Some(0) })
    } else if is_all(&[TestVerdict::Equivalent, TestVerdict::ControlWins]) {
        Some(Conclusion { verdict: ABTestVerdict::Equivalent, winner: None })
    } else {
        None
    }
}
