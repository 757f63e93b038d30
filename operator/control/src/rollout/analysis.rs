//! Compares a candidate with the limits of its rollout, from counts of its requests.
//!
//! Counts are looked at again and again while they grow, so a test for one fixed sample would fail a good
//! candidate sooner or later. The test here is valid at every look: for requests of which each exceeds with a
//! probability of at most `q`, the value of [`ln_evidence`] rises above `ln(1/ALPHA)` at any time with a
//! probability of at most [`ALPHA`] (Ville's inequality for the beta-binomial mixture).

use std::f64::consts::PI;

use trustformers_stats::special::ln_beta;

/// Probability that a candidate within its limits is ever failed by one of them.
pub const ALPHA: f64 = 0.01;

/// The share of requests that may be slower than the latency that is compared: the 95th percentile.
const SLOW_SHARE: f64 = 0.05;

/// Requests below which nothing fails: errors of few requests often have one cause, such as one caller.
const MIN_REQUESTS_TO_FAIL: u64 = 10;

/// The limits that a candidate must stay within.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct AnalysisLimits {
    /// Largest share of failed requests, 0 to 1.
    pub max_error_rate: Option<f64>,
    /// Largest ratio of the candidate's 95th percentile of latency to that of the stable revision.
    pub max_latency_ratio: Option<f64>,
    /// Requests of the candidate that a step needs before it passes.
    pub min_requests: u64,
}

/// Requests with a latency between two bounds. Buckets without requests may be missing.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LatencyBucket {
    /// Lower bound in milliseconds.
    pub lower_ms: f64,
    /// Upper bound in milliseconds; infinite for the last bucket.
    pub upper_ms: f64,
    /// Number of requests.
    pub requests: u64,
}

/// Requests of one revision within a time.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RequestSample {
    /// Requests that ended.
    pub requests: u64,
    /// Those of them that the revision failed. A caller's own fault is no failure.
    pub errors: u64,
    /// Latency of those that did not fail, in ascending buckets.
    pub latency: Vec<LatencyBucket>,
}

/// Which step of which attempt a sample is about. A sample of another one says nothing.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct SampleKey {
    /// The candidate.
    pub revision: String,
    /// The step.
    pub step: u32,
    /// The attempt to roll the candidate out.
    pub attempt: u32,
}

/// What was counted since a step started.
#[derive(Debug, Clone, PartialEq)]
pub struct StepSample {
    /// The step.
    pub key: SampleKey,
    /// Requests of the candidate since the step started.
    pub candidate: RequestSample,
    /// Requests of the stable revision since the attempt started: the last step may leave it none.
    pub stable: RequestSample,
}

/// What a sample says about the candidate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It is within all limits.
    Pass {
        /// The figures.
        figures: String,
    },
    /// There is too little to say so, and nothing to the contrary.
    Inconclusive {
        /// What is missing.
        figures: String,
    },
    /// It exceeds a limit.
    Fail {
        /// One CamelCase word.
        reason: &'static str,
        /// The figures.
        figures: String,
    },
}

/// Compares a sample with the limits. `stable_serves` is false if the stable revision has no pod that serves:
/// nothing is compared with it then, and only absolute limits count.
#[must_use]
pub fn verdict(limits: AnalysisLimits, sample: Option<&StepSample>, stable_serves: bool) -> Verdict {
    let Some(sample) = sample else {
        return Verdict::Inconclusive { figures: format!("0 of {} requests", limits.min_requests) };
    };
    let mut all = vec![enough_requests(limits, &sample.candidate)];
    all.extend(limits.max_error_rate.map(|limit| error_rate(limit, &sample.candidate)));
    if stable_serves {
        all.extend(limits.max_latency_ratio.map(|limit| latency_ratio(limit, sample)));
    }
    worst(all)
}

/// A failure before what is inconclusive, and that before a pass; passes join their figures.
fn worst(all: Vec<Verdict>) -> Verdict {
    let mut passed = Vec::new();
    let mut inconclusive = None;
    for one in all {
        match one {
            Verdict::Fail { .. } => return one,
            Verdict::Inconclusive { .. } => inconclusive = inconclusive.or(Some(one)),
            Verdict::Pass { figures } => passed.push(figures),
        }
    }
    inconclusive.unwrap_or_else(|| Verdict::Pass { figures: passed.join("; ") })
}

fn enough_requests(limits: AnalysisLimits, candidate: &RequestSample) -> Verdict {
    let figures = format!("{} of {} requests", candidate.requests, limits.min_requests);
    if candidate.requests >= limits.min_requests {
        Verdict::Pass { figures }
    } else {
        Verdict::Inconclusive { figures }
    }
}

fn error_rate(limit: f64, candidate: &RequestSample) -> Verdict {
    let RequestSample { requests, errors, .. } = *candidate;
    let figures = format!(
        "{errors} of {requests} requests failed ({:.2} %, limit {:.2} %)",
        100.0 * share(errors, requests),
        100.0 * limit
    );
    compare("ErrorRate", Exceeding { count: errors, of: requests, limit }, figures)
}

fn latency_ratio(limit: f64, sample: &StepSample) -> Verdict {
    let Some(stable_ms) = percentile_bound_ms(&sample.stable.latency) else {
        let few = total(&sample.stable.latency);
        let figures = format!("{few} requests of the stable revision are too few to compare latencies with");
        return Verdict::Inconclusive { figures };
    };
    let limit_ms = limit * stable_ms;
    let (slow, all) = (slower_than(&sample.candidate.latency, limit_ms), total(&sample.candidate.latency));
    let figures = format!(
        "{slow} of {all} requests took longer than {limit_ms:.0} ms, {limit} times the stable revision's p95 \
         (limit {:.0} %)",
        100.0 * SLOW_SHARE
    );
    compare("Latency", Exceeding { count: slow, of: all, limit: SLOW_SHARE }, figures)
}

/// How many requests exceed something, and the share that may.
#[derive(Clone, Copy)]
struct Exceeding {
    count: u64,
    of: u64,
    limit: f64,
}

fn compare(reason: &'static str, exceeding: Exceeding, figures: String) -> Verdict {
    let Exceeding { count, of, limit } = exceeding;
    if of == 0 || share(count, of) <= limit {
        return Verdict::Pass { figures };
    }
    if of >= MIN_REQUESTS_TO_FAIL && ln_evidence(count, of, limit) >= -ALPHA.ln() {
        Verdict::Fail { reason, figures }
    } else {
        Verdict::Inconclusive { figures }
    }
}

/// The smallest bucket bound below which, with confidence, 95 % of the requests are; `None` for too few.
fn percentile_bound_ms(latency: &[LatencyBucket]) -> Option<f64> {
    let all = total(latency);
    let mut above = all;
    latency.iter().find_map(|bucket| {
        above -= bucket.requests;
        let is_below = share(above, all) < SLOW_SHARE && ln_evidence(above, all, SLOW_SHARE) >= -ALPHA.ln();
        is_below.then_some(bucket.upper_ms)
    })
}

/// Requests in buckets that are above `limit_ms` as a whole.
fn slower_than(latency: &[LatencyBucket], limit_ms: f64) -> u64 {
    latency.iter().filter(|bucket| bucket.lower_ms >= limit_ms).map(|bucket| bucket.requests).sum()
}

fn total(latency: &[LatencyBucket]) -> u64 {
    latency.iter().map(|bucket| bucket.requests).sum()
}

fn share(count: u64, of: u64) -> f64 {
    count as f64 / of.max(1) as f64
}

/// Logarithm of the evidence against a share of `q`, of `count` among `of` requests: the likelihood under a
/// mixture of all shares (Jeffreys' prior) over that under `q`.
///
/// For a count above `q × of` it is the least over all shares of at most `q`, so that it tests all of them.
#[must_use]
pub fn ln_evidence(count: u64, of: u64, q: f64) -> f64 {
    let (count, rest) = (count as f64, of.saturating_sub(count) as f64);
    // A factor of power 0 is 1, also for a share of 0 or 1.
    let power = |times: f64, base: f64| if times > 0.0 { times * base.ln() } else { 0.0 };
    ln_beta(&[count + 0.5, rest + 0.5]) - PI.ln() - power(count, q) - power(rest, 1.0 - q)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: AnalysisLimits =
        AnalysisLimits { max_error_rate: Some(0.01), max_latency_ratio: Some(1.2), min_requests: 200 };

    fn requests(requests: u64, errors: u64, fast: u64, slow: u64) -> RequestSample {
        let fast = LatencyBucket { lower_ms: 0.0, upper_ms: 100.0, requests: fast };
        let slow = LatencyBucket { lower_ms: 150.0, upper_ms: f64::INFINITY, requests: slow };
        let latency = vec![fast, slow];
        RequestSample { requests, errors, latency }
    }

    fn sample(candidate: RequestSample, stable: RequestSample) -> StepSample {
        let key = SampleKey { revision: "r2".to_owned(), step: 0, attempt: 1 };
        StepSample { key, candidate, stable }
    }

    fn of(candidate: RequestSample, stable: RequestSample) -> Verdict {
        verdict(LIMITS, Some(&sample(candidate, stable)), true)
    }

    #[test]
    fn too_little_traffic_is_inconclusive_and_never_a_failure() {
        let stable = requests(1000, 0, 1000, 0);
        assert!(matches!(verdict(LIMITS, None, true), Verdict::Inconclusive { .. }));
        for candidate in [requests(0, 0, 0, 0), requests(9, 9, 0, 0), requests(199, 1, 198, 0)] {
            assert!(
                matches!(of(candidate.clone(), stable.clone()), Verdict::Inconclusive { .. }),
                "{candidate:?}"
            );
        }
        // Nothing can be compared with a stable revision that has few requests.
        assert!(matches!(
            of(requests(500, 0, 500, 0), requests(100, 0, 100, 0)),
            Verdict::Inconclusive { .. }
        ));
    }

    #[test]
    fn verdicts_follow_errors_and_latency() {
        let stable = requests(1000, 0, 1000, 0);
        assert!(matches!(of(requests(200, 2, 198, 0), stable.clone()), Verdict::Pass { .. }));
        let failed = |candidate, expected: &str| match of(candidate, stable.clone()) {
            Verdict::Fail { reason, figures } => assert_eq!(reason, expected, "{figures}"),
            other => panic!("{other:?}"),
        };
        failed(requests(12, 12, 0, 0), "ErrorRate");
        failed(requests(400, 16, 384, 0), "ErrorRate");
        failed(requests(400, 0, 300, 100), "Latency");
        // Slightly above the limit: more requests will tell.
        assert!(matches!(of(requests(400, 5, 395, 0), stable.clone()), Verdict::Inconclusive { .. }));
        assert!(matches!(of(requests(400, 0, 378, 22), stable.clone()), Verdict::Inconclusive { .. }));
    }

    #[test]
    fn a_stable_revision_that_does_not_serve_is_not_compared_with() {
        let sample = sample(requests(200, 0, 0, 200), requests(0, 0, 0, 0));
        assert!(matches!(verdict(LIMITS, Some(&sample), false), Verdict::Pass { .. }));
    }

    #[test]
    fn a_candidate_at_its_limit_is_rarely_failed_though_it_is_looked_at_after_each_request() {
        // 500 runs of 2000 requests at exactly the limit. The bound is 1 % of the runs in the long term; more
        // than 13 of 500 have a probability below 1e-3 under it.
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        let mut failed_runs = 0;
        for _ in 0..500 {
            let mut errors = 0;
            for of in 1..=2000_u64 {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                errors += u64::from(random.is_multiple_of(100));
                let exceeding = Exceeding { count: errors, of, limit: 0.01 };
                if matches!(compare("ErrorRate", exceeding, String::new()), Verdict::Fail { .. }) {
                    failed_runs += 1;
                    break;
                }
            }
        }
        assert!(failed_runs <= 13, "{failed_runs} of 500 runs");
    }
}
