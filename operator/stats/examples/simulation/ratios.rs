//! Tests of ratios of sums: means, error rates, tokens per second and scores.

use fastrand::Rng;
use trustformers_stats::buckets::{ArmDifference, ArmEstimate, BucketSums, Scale, difference, estimate};
use trustformers_stats::cuped::{ArmWithHistory, adjusted, coefficient};
use trustformers_stats::sequential::{student_look, tau_for};

use super::{ALPHA, BUCKETS, LOOKS, SMALLEST_EFFECT};

/// Requests of a bucket between two looks.
const REQUESTS: u32 = 4;
/// Looks' worth of requests before the test, where CUPED has them: seven days.
const LOOKS_BEFORE: usize = 21;
/// Events below which an arm says nothing, as in a test of the operator.
const MIN_EVENTS: f64 = 50.0;

/// What is measured.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Kind {
    /// The mean of a value with a deviation of 50 % within a user.
    Mean,
    /// Events that happen or not.
    Errors {
        /// How often.
        rate: f64,
    },
    /// Tokens by the time of answers, which differ in length.
    Throughput,
    /// One of five answers is scored, 1 or -1, with a mean of 0.2.
    Scores,
}

/// Users of both arms. Each bucket keeps a level of its own, so that its requests are not independent.
pub(super) struct Users {
    /// What is measured.
    pub(super) kind: Kind,
    /// Standard deviation of the level of a bucket, relative to the mean.
    pub(super) returning: f64,
    /// True effect of the treatment: relative, and of scores their difference.
    pub(super) effect: f64,
    /// Whether the seven days before the test reduce the variance.
    pub(super) cuped: bool,
}

/// How one test went.
pub(super) struct Outcome {
    /// The look at which the sequential test concludes.
    pub(super) sequential: Option<usize>,
    /// The look at which a t-test does.
    pub(super) t_test: Option<usize>,
    /// Whether the interval holds the effect at every look.
    pub(super) covers: bool,
}

/// One arm of a test.
struct Arm {
    levels: Vec<f64>,
    before: Vec<BucketSums>,
    during: Vec<BucketSums>,
}

impl Users {
    /// One test.
    pub(super) fn run(&self, random: &mut Rng) -> Outcome {
        // The treatment, then the control.
        let mut arms = [(); 2].map(|()| self.arm(random));
        let mut outcome = Outcome { sequential: None, t_test: None, covers: true };
        let scale = if self.kind == Kind::Scores { Scale::Difference } else { Scale::LogRatio };
        let (truth, tau) = match scale {
            Scale::LogRatio => (self.effect.ln_1p(), tau_for(SMALLEST_EFFECT.ln_1p())),
            Scale::Difference => (self.effect, tau_for(SMALLEST_EFFECT)),
        };
        let mut theta = 0.0;
        for at in 0..LOOKS {
            for (arm, effect) in arms.iter_mut().zip([self.effect, 0.0]) {
                for (level, sums) in arm.levels.iter().zip(&mut arm.during) {
                    self.kind.add(random, *level, effect, sums);
                }
            }
            let found = self.difference(&arms, &mut theta, scale);
            let Some(found) = found.filter(|_| self.has_events(&arms)) else { continue };
            let look = student_look(&found, tau, ALPHA);
            if outcome.sequential.is_none() && look.half_width <= found.estimate.abs() {
                outcome.sequential = Some(at);
            }
            if outcome.t_test.is_none() && found.estimate.abs() > 1.96 * found.standard_error {
                outcome.t_test = Some(at);
            }
            outcome.covers &= (found.estimate - truth).abs() <= look.half_width;
        }
        outcome
    }

    fn arm(&self, random: &mut Rng) -> Arm {
        let levels: Vec<f64> =
            (0..BUCKETS).map(|_| (1.0 + self.returning * normal(random)).max(0.05)).collect();
        let mut before = vec![BucketSums::default(); BUCKETS];
        if self.cuped {
            for (level, sums) in levels.iter().zip(&mut before) {
                (0..LOOKS_BEFORE).for_each(|_| self.kind.add(random, *level, 0.0, sums));
            }
        }
        Arm { levels, before, during: vec![BucketSums::default(); BUCKETS] }
    }

    /// The difference at a look. `theta` is the coefficient of the look before, and becomes that of this one.
    fn difference(&self, arms: &[Arm; 2], theta: &mut f64, scale: Scale) -> Option<ArmDifference> {
        let [treatment, control] = if self.cuped {
            let with_history =
                [&arms[0], &arms[1]].map(|arm| ArmWithHistory { during: &arm.during, before: &arm.before });
            let both = adjusted(&with_history, 0, *theta).zip(adjusted(&with_history, 1, *theta));
            *theta = coefficient(&with_history);
            <[ArmEstimate; 2]>::from(both?)
        } else {
            [estimate(&arms[0].during)?, estimate(&arms[1].during)?]
        };
        difference(&treatment, &control, scale)
    }

    /// Whether both arms have enough events, where events are counted.
    fn has_events(&self, arms: &[Arm; 2]) -> bool {
        let events = |arm: &Arm| arm.during.iter().map(|sums| sums.y).sum::<f64>();
        !matches!(self.kind, Kind::Errors { .. }) || arms.iter().all(|arm| events(arm) >= MIN_EVENTS)
    }
}

impl Kind {
    /// Adds the requests of a bucket between two looks.
    fn add(self, random: &mut Rng, level: f64, effect: f64, sums: &mut BucketSums) {
        let requests = f64::from(REQUESTS);
        match self {
            Self::Mean => {
                // The sum of four values with a deviation of 0.5 each has one of 1.
                sums.y += requests * level * (1.0 + effect) + 0.5 * requests.sqrt() * normal(random);
                sums.n += requests;
            }
            Self::Errors { rate } => {
                let failed = (0..REQUESTS).filter(|_| random.f64() < rate * level * (1.0 + effect)).count();
                sums.y += failed as f64;
                sums.n += requests;
            }
            Self::Throughput => {
                for _ in 0..REQUESTS {
                    let [length, speed] = normals(random);
                    let seconds = (0.5 * length).exp();
                    sums.y += seconds * level * (1.0 + effect) * (1.0 + 0.2 * speed).max(0.0);
                    sums.n += seconds;
                }
            }
            Self::Scores => {
                for _ in 0..REQUESTS {
                    if random.f64() < 0.2 {
                        let positive = random.f64() < 0.5 * (1.0 + 0.2 * level + effect);
                        sums.y += if positive { 1.0 } else { -1.0 };
                        sums.n += 1.0;
                    }
                }
            }
        }
    }
}

/// A standard normal variable.
pub(super) fn normal(random: &mut Rng) -> f64 {
    normals(random)[0]
}

/// Two independent standard normal variables (Box and Muller).
fn normals(random: &mut Rng) -> [f64; 2] {
    let radius = (-2.0 * (1.0 - random.f64()).ln()).sqrt();
    let (sine, cosine) = (std::f64::consts::TAU * random.f64()).sin_cos();
    [radius * cosine, radius * sine]
}
