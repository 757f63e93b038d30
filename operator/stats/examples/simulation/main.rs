//! Simulates A/B tests that are looked at all the time: how often they say what is not true, how often they
//! find what is there, and how often their intervals hold.
//!
//! `cargo run --profile ci -p trustformers-stats --example simulation -- [RUNS] [SEED] [CHART]`
//!
//! Prints the table of `docs/ab-tests.md` and writes its picture to CHART (default `docs/ab-tests.svg`, from
//! the root of the repository). Each run is one test of 30 days with a look three times a day. A t-test that
//! is looked at as often is beside the sequential one. Rows are independent of each other: the seed of each
//! is SEED plus its number. The cost is proportional to RUNS: 10,000 runs draw some 30 billion values.

mod chart;
mod ratios;
mod shares;

use std::process::ExitCode;

use chart::{Chart, DAYS};
use fastrand::Rng;
use ratios::{Kind, Outcome, Users};

/// Probability of a wrong verdict that each test allows.
const ALPHA: f64 = 0.05;
/// Buckets of users of each arm.
const BUCKETS: usize = 256;
/// Looks of one test: three a day for 30 days.
const LOOKS: usize = 90;
/// Effect that the tests are tuned for.
const SMALLEST_EFFECT: f64 = 0.05;
/// True effects of the power curve, in percent.
const EFFECTS_PERCENT: [u32; 9] = [0, 1, 2, 3, 4, 5, 6, 8, 10];
/// Seeds of the power curve begin this far behind those of the table.
const POWER_SEED: u64 = 1000;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let mut number = |default: u64| match arguments.next() {
        Some(text) => text.parse::<u64>().map_err(|error| format!("{text}: {error}")),
        None => Ok(default),
    };
    let numbers = number(10_000).and_then(|runs| Ok((runs, number(20_261_129)?)));
    let path = arguments.next().unwrap_or_else(|| "docs/ab-tests.svg".to_owned());
    let (runs, seed) = match numbers {
        Ok((runs, seed)) if runs > 0 => (runs, seed),
        Ok(_) => return failed("RUNS must be above 0"),
        Err(error) => return failed(&error),
    };
    println!("{runs} runs of {LOOKS} looks, {BUCKETS} buckets, alpha {ALPHA}, seed {seed}");
    let by_day = table(runs, seed);
    shares_table(runs, seed);
    let power = power_curve(runs, seed);
    let chart = Chart { runs, seed, by_day, power };
    match std::fs::write(&path, chart.to_svg()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&format!("{path} could not be written: {error}")),
    }
}

fn failed(message: &str) -> ExitCode {
    eprintln!("simulation: {message}");
    ExitCode::FAILURE
}

/// Shares of the runs of one row.
struct Row {
    sequential: f64,
    t_test: f64,
    coverage: f64,
    /// Median day of the sequential verdict among the runs that have one.
    median_day: Option<f64>,
    /// Runs that have concluded by the end of each day: sequential and t-test.
    by_day: Vec<[f64; 2]>,
}

/// The row of these users.
fn row(users: &Users, runs: u64, seed: u64) -> Row {
    let mut random = Rng::with_seed(seed);
    let outcomes: Vec<Outcome> = (0..runs).map(|_| users.run(&mut random)).collect();
    let share = |holds: &dyn Fn(&Outcome) -> bool| {
        outcomes.iter().filter(|one| holds(one)).count() as f64 / runs as f64
    };
    let mut looks: Vec<usize> = outcomes.iter().filter_map(|one| one.sequential).collect();
    looks.sort_unstable();
    let day = |look: usize| (look + 1) as f64 * f64::from(DAYS) / LOOKS as f64;
    let by = |end: f64| {
        [
            share(&|one| one.sequential.is_some_and(|look| day(look) <= end)),
            share(&|one| one.t_test.is_some_and(|look| day(look) <= end)),
        ]
    };
    Row {
        sequential: share(&|one| one.sequential.is_some()),
        t_test: share(&|one| one.t_test.is_some()),
        coverage: share(&|one| one.covers),
        median_day: looks.get(looks.len() / 2).map(|look| day(*look)),
        by_day: (0..=DAYS).map(|end| by(f64::from(end) + 1e-9)).collect(),
    }
}

/// Prints the rows of ratios. Gives how many null tests with returning users have concluded by each day.
fn table(runs: u64, seed: u64) -> Vec<[f64; 2]> {
    let of = |kind: Kind, returning: f64, effect: f64| Users { kind, returning, effect, cuped: false };
    let errors = Kind::Errors { rate: 0.05 };
    let rare = Kind::Errors { rate: 0.005 };
    let scenarios = [
        ("mean, independent users, no effect", of(Kind::Mean, 0.0, 0.0)),
        ("mean, returning users, no effect", of(Kind::Mean, 0.3, 0.0)),
        ("error rate 5 %, returning, no effect", of(errors, 0.3, 0.0)),
        ("error rate 0.5 %, returning, no effect", of(rare, 0.3, 0.0)),
        ("tokens per second, returning, no effect", of(Kind::Throughput, 0.3, 0.0)),
        ("feedback score, returning, no effect", of(Kind::Scores, 0.3, 0.0)),
        ("mean with CUPED, returning, no effect", Users { cuped: true, ..of(Kind::Mean, 0.3, 0.0) }),
        ("mean, returning, effect 5 %", of(Kind::Mean, 0.3, 0.05)),
        ("mean with CUPED, returning, effect 5 %", Users { cuped: true, ..of(Kind::Mean, 0.3, 0.05) }),
        ("tokens per second, returning, effect 5 %", of(Kind::Throughput, 0.1, 0.05)),
        ("feedback score, returning, effect 0.05", of(Kind::Scores, 0.3, 0.05)),
    ];
    println!("{:<44} {:>10} {:>9} {:>9} {:>11}", "", "sequential", "t-test", "coverage", "median day");
    let mut by_day = Vec::new();
    for (number, (name, users)) in (0_u64..).zip(scenarios) {
        let row = row(&users, runs, seed + number);
        print_row(name, &row);
        // The chart shows the null test whose users return.
        if number == 1 {
            by_day = row.by_day;
        }
    }
    by_day
}

fn print_row(name: &str, row: &Row) {
    let Row { sequential, t_test, coverage, median_day, .. } = row;
    let day = median_day.map_or_else(|| "-".to_owned(), |day| format!("{day:.1}"));
    let [sequential, t_test, coverage] = [sequential, t_test, coverage].map(|share| 100.0 * share);
    println!("{name:<44} {sequential:>9.2}% {t_test:>8.2}% {coverage:>8.2}% {day:>11}");
}

/// Prints the rows that are no ratios of sums: quantiles and the division of users.
fn shares_table(runs: u64, seed: u64) {
    let percent = |count: usize| 100.0 * count as f64 / runs as f64;
    let latencies = [
        ("p50 of equal latencies, returning", shares::Latencies { p: 0.5, returning: 0.3 }),
        ("p95 of equal latencies, independent", shares::Latencies { p: 0.95, returning: 0.0 }),
        ("p95 of equal latencies, returning", shares::Latencies { p: 0.95, returning: 0.3 }),
    ];
    for (number, (name, latencies)) in (100_u64..).zip(latencies) {
        let mut random = Rng::with_seed(seed + number);
        let concluded = (0..runs).filter(|_| latencies.concludes(&mut random)).count();
        println!("{name:<44} {:>9.2}%", percent(concluded));
    }
    let mut random = Rng::with_seed(seed + 110);
    let stops = (0..runs).filter(|_| shares::guardrail_stops(&mut random)).count();
    println!("{:<44} {:>9.2}%", "guardrail, error rate exactly at its limit", percent(stops));
    for (number, (name, split)) in (120_u64..).zip([
        ("split check, correct 90/10 (bound 0.1 %)", shares::Divided { configured: 0.1, served: 0.1 }),
        ("split check, 90/10 served as 88/12", shares::Divided { configured: 0.1, served: 0.12 }),
    ]) {
        let mut random = Rng::with_seed(seed + number);
        let alarms = (0..runs).filter(|_| split.alarms(&mut random)).count();
        println!("{name:<44} {:>9.2}%", percent(alarms));
    }
}

/// Prints how often each effect is found within 30 days. Gives the shares of the sequential test, of a t-test
/// that peeks, and the median day.
fn power_curve(runs: u64, seed: u64) -> Vec<[f64; 3]> {
    println!("power, mean of returning users (deviation 10 %), tests tuned for 5 %");
    let mut curve = Vec::new();
    for (number, percent) in (POWER_SEED..).zip(EFFECTS_PERCENT) {
        let effect = f64::from(percent) / 100.0;
        let users = Users { kind: Kind::Mean, returning: 0.1, effect, cuped: false };
        let row = row(&users, runs, seed + number);
        print_row(&format!("effect {percent} %"), &row);
        curve.push([f64::from(percent), row.sequential, row.t_test]);
    }
    curve
}
