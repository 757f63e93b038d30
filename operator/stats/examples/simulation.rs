//! Simulates A/B tests that are looked at all the time, and prints how often they say what is not true.
//!
//! `cargo run --profile ci -p trustformers-stats --example simulation -- [RUNS] [SEED]`
//!
//! 10,000 runs draw 10 billion values, which takes one core three minutes; fewer runs take less in
//! proportion. Each run is one test of 30 days with a look three times a day. A t-test that is looked at as
//! often is beside the sequential one. Rows are independent of each other: the seed of each is SEED plus its
//! number.

use fastrand::Rng;
use trustformers_stats::buckets::{BucketSums, Scale, difference, estimate};
use trustformers_stats::quantile::{LatencyArm, QuantileTest};
use trustformers_stats::sequential::{student_look, tau_for};
use trustformers_stats::split_check::{self, SplitEpoch};

const ALPHA: f64 = 0.05;
const BUCKETS: usize = 256;
const LOOKS: u32 = 90;
/// Effect for which the tests are tightest.
const SMALLEST_EFFECT: f64 = 0.05;

fn main() {
    let mut arguments = std::env::args().skip(1).map(|text| text.parse::<u64>());
    let runs = arguments.next().and_then(Result::ok).unwrap_or(10_000);
    let seed = arguments.next().and_then(Result::ok).unwrap_or(20_261_129);
    println!("{runs} runs of {LOOKS} looks, {BUCKETS} buckets, alpha {ALPHA}, seed {seed}");
    println!("{:<46} {:>10} {:>10} {:>10}", "", "sequential", "t-test", "coverage");
    let scenarios = [
        ("independent users, no effect", Users { returning: 0.0, effect: 0.0, rate: 1.0 }),
        ("returning users, no effect", Users { returning: 0.3, effect: 0.0, rate: 1.0 }),
        ("events of 5 %, returning users, no effect", Users { returning: 0.3, effect: 0.0, rate: 0.05 }),
        ("returning users, effect 2 %", Users { returning: 0.1, effect: 0.02, rate: 1.0 }),
        ("returning users, effect 5 %", Users { returning: 0.1, effect: 0.05, rate: 1.0 }),
        ("returning users, effect 10 %", Users { returning: 0.1, effect: 0.1, rate: 1.0 }),
    ];
    for (number, (name, users)) in (0_u64..).zip(scenarios) {
        let mut random = Rng::with_seed(seed + number);
        let mut counts = [0_u64; 3];
        for _ in 0..runs {
            for (count, happened) in counts.iter_mut().zip(users.run(&mut random)) {
                *count += u64::from(happened);
            }
        }
        let percent = counts.map(|count| 100.0 * count as f64 / runs as f64);
        println!("{name:<46} {:>9.2}% {:>9.2}% {:>9.2}%", percent[0], percent[1], percent[2]);
    }
    let mut random = Rng::with_seed(seed + 100);
    let slow = (0..runs).filter(|_| quantile_concludes(&mut random)).count();
    println!("{:<46} {:>9.2}%", "p95 of equal latencies", 100.0 * slow as f64 / runs as f64);
    let mut random = Rng::with_seed(seed + 101);
    let alarms = (0..runs).filter(|_| split_alarms(&mut random)).count();
    println!(
        "{:<46} {:>9.2}%",
        "split check of a correct split (bound 0.1 %)",
        100.0 * alarms as f64 / runs as f64
    );
}

/// Users of both arms. Each bucket keeps its own level, so that its requests are not independent.
#[derive(Clone, Copy)]
struct Users {
    /// Standard deviation of the level of a bucket, relative to the mean.
    returning: f64,
    /// True relative effect of the treatment.
    effect: f64,
    /// Mean of a request's value. Below 1 the values are events that happen or not.
    rate: f64,
}

impl Users {
    /// Whether the sequential test concludes at any look, the t-test does, and the interval covers the effect
    /// at every look.
    fn run(self, random: &mut Rng) -> [bool; 3] {
        let mut arms = [(); 2].map(|()| {
            let mut level = || (1.0 + self.returning * normal(random)).max(0.05);
            (0..BUCKETS).map(|_| (level(), BucketSums::default())).collect::<Vec<_>>()
        });
        let (mut sequential, mut fixed, mut covers) = (false, false, true);
        let truth = self.effect.ln_1p();
        for _ in 0..LOOKS {
            for (arm, factor) in arms.iter_mut().zip([1.0 + self.effect, 1.0]) {
                for (level, sums) in arm.iter_mut() {
                    let mean = self.rate * *level * factor;
                    sums.n += 4.0;
                    if self.rate < 1.0 {
                        for _ in 0..4 {
                            sums.y += f64::from(u8::from(random.f64() < mean));
                        }
                    } else {
                        for value in [normals(random), normals(random)].as_flattened() {
                            sums.y += (mean + 0.5 * value).max(0.0);
                        }
                    }
                }
            }
            let sums = |arm: &[(f64, BucketSums)]| arm.iter().map(|(_, sums)| *sums).collect::<Vec<_>>();
            let both = estimate(&sums(&arms[0])).zip(estimate(&sums(&arms[1])));
            let Some(found) =
                both.and_then(|(treatment, control)| difference(&treatment, &control, Scale::LogRatio))
            else {
                continue;
            };
            let look = student_look(&found, tau_for(SMALLEST_EFFECT), ALPHA);
            sequential |= look.half_width <= found.estimate.abs();
            fixed |= found.estimate.abs() > 1.96 * found.standard_error;
            covers &= (found.estimate - truth).abs() <= look.half_width;
        }
        [sequential, fixed, covers]
    }
}

/// Whether a test of the 95th percentile of equal, lognormal latencies ever concludes.
fn quantile_concludes(random: &mut Rng) -> bool {
    let test = QuantileTest { p: 0.95, planned_requests: 20_000.0, bin_ratio: 1.05 };
    // Bins from 1/e³ to e³ of the median.
    let bins = (6.0 / test.bin_ratio.ln()) as usize;
    let mut arms = [(); 2].map(|()| vec![0_u64; bins + 1]);
    (0..LOOKS).any(|_| {
        for counts in &mut arms {
            for _ in 0..200 {
                let bin = ((0.5 * normal(random) + 3.0) / test.bin_ratio.ln()).clamp(0.0, bins as f64);
                counts[bin as usize] += 1;
            }
        }
        let arm = |counts: &Vec<u64>| {
            let mut sum = 0;
            let cumulative = counts.iter().map(|count| {
                sum += count;
                sum
            });
            let cumulative: Vec<u64> = cumulative.collect();
            LatencyArm { requests: cumulative.last().copied().unwrap_or(0), cumulative, design_effect: 1.0 }
        };
        test.ln_evidence(&arm(&arms[0]), &arm(&arms[1])) >= -ALPHA.ln()
    })
}

/// Whether a correct split of 90 to 10 ever raises an alarm.
fn split_alarms(random: &mut Rng) -> bool {
    let mut epoch = SplitEpoch { weights: vec![0.9, 0.1], users: vec![0, 0] };
    (0..LOOKS).any(|_| {
        for _ in 0..100 {
            epoch.users[usize::from(random.f64() < 0.1)] += 1;
        }
        split_check::is_broken(std::slice::from_ref(&epoch))
    })
}

/// A standard normal variable.
fn normal(random: &mut Rng) -> f64 {
    normals(random)[0]
}

/// Two independent standard normal variables (Box and Muller).
fn normals(random: &mut Rng) -> [f64; 2] {
    let radius = (-2.0 * (1.0 - random.f64()).ln()).sqrt();
    let (sine, cosine) = (std::f64::consts::TAU * random.f64()).sin_cos();
    [radius * cosine, radius * sine]
}
