//! Chooses an endpoint of a backend.
//!
//! | algorithm | for |
//! |---|---|
//! | least requests | the default: requests to a model differ by orders of magnitude in length |
//! | round robin, weighted | pods whose requests are alike, or whose capacities are told |
//! | latency | pods of unlike speed: the one that is expected to answer first |
//! | consistent hash | a prefix cache: what begins alike, a session or a user meets one pod |
//!
//! Least requests and latency compare two endpoints that are drawn. Comparing all would cause a herd, where
//! every gateway sends to the same momentarily idle pod.

use fastrand::Rng;

/// How an endpoint is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Algorithm {
    /// Of two drawn endpoints, the one with fewer requests for its weight.
    #[default]
    LeastRequests,
    /// One after the other.
    RoundRobin,
    /// Drawn with the weights as odds.
    Weighted,
    /// Of two drawn endpoints, the one whose recent latency times its requests is lower.
    LatencyEwma,
    /// Equal keys go to the same endpoint while its load is bounded.
    ConsistentHash,
}

/// An endpoint that can be chosen.
#[derive(Debug, Clone, Copy)]
pub struct Candidate {
    /// Requests in flight.
    pub load: usize,
    /// Its capacity relative to the others: above 0, and less than its own during slow start.
    pub weight: f64,
    /// What it recently took to answer, in milliseconds; `None` before its first answer.
    pub latency_ms: Option<f64>,
    /// A hash of its identity, the same in every gateway.
    pub identity: u64,
}

/// What a choice is made by.
#[derive(Debug, Clone, Copy)]
pub struct Balance {
    /// The algorithm.
    pub algorithm: Algorithm,
    /// Number of the request at its backend, for round robin.
    pub sequence: u64,
    /// The request's key, for the consistent hash; a request without one goes to the less busy of two.
    pub key: Option<u64>,
}

/// Chooses among candidates; `None` where there are none.
#[must_use]
pub fn choose(candidates: &[Candidate], balance: Balance, rng: &mut Rng) -> Option<usize> {
    if candidates.len() < 2 {
        return candidates.first().map(|_| 0);
    }
    let chosen = match (balance.algorithm, balance.key) {
        (Algorithm::RoundRobin, _) => next_in_order(candidates, balance.sequence, rng),
        (Algorithm::Weighted, _) => weighted(candidates, rng),
        (Algorithm::LatencyEwma, _) => better_of_two(candidates, expected_wait, rng),
        (Algorithm::ConsistentHash, Some(key)) => hashed(candidates, key),
        (Algorithm::LeastRequests, _) | (Algorithm::ConsistentHash, None) => {
            better_of_two(candidates, busyness, rng)
        }
    };
    Some(chosen)
}

/// What one more request would make of its load, for its weight.
fn busyness(candidate: &Candidate) -> f64 {
    (candidate.load as f64 + 1.0) / candidate.weight
}

/// What an endpoint without an answer yet is believed to take while requests wait there: more than any pod
/// that answers. An idle one is tried at once.
const UNKNOWN_LATENCY_MS: f64 = 60_000.0;

/// When it would answer one more request. Peak EWMA: the latency times the requests in front.
fn expected_wait(candidate: &Candidate) -> f64 {
    match candidate.latency_ms {
        Some(latency_ms) => latency_ms.max(f64::MIN_POSITIVE) * busyness(candidate),
        None if candidate.load == 0 => 0.0,
        None => UNKNOWN_LATENCY_MS * busyness(candidate),
    }
}

/// The better of two that are drawn; of equal ones the first.
fn better_of_two(candidates: &[Candidate], cost: fn(&Candidate) -> f64, rng: &mut Rng) -> usize {
    let count = candidates.len();
    let first = rng.usize(..count);
    // The second draw skips over the first.
    let second = rng.usize(..count - 1);
    let second = second + usize::from(second >= first);
    if cost(&candidates[second]) < cost(&candidates[first]) { second } else { first }
}

/// The next in order. One that starts slowly is skipped as often as its weight is below the largest.
fn next_in_order(candidates: &[Candidate], sequence: u64, rng: &mut Rng) -> usize {
    let largest = candidates.iter().map(|candidate| candidate.weight).fold(0.0, f64::max);
    let count = candidates.len() as u64;
    let mut index = (sequence % count) as usize;
    for _ in 0..candidates.len() {
        if rng.f64() * largest <= candidates[index].weight {
            return index;
        }
        index = (index + 1) % candidates.len();
    }
    index
}

fn weighted(candidates: &[Candidate], rng: &mut Rng) -> usize {
    let total: f64 = candidates.iter().map(|candidate| candidate.weight).sum();
    let mut drawn = rng.f64() * total;
    for (index, candidate) in candidates.iter().enumerate() {
        drawn -= candidate.weight;
        if drawn < 0.0 {
            return index;
        }
    }
    candidates.len() - 1
}

/// The most that one endpoint may have of the mean load: 5/4. A lower bound moves more keys, a higher one
/// lets one popular key fill a pod while others are idle.
const LOAD_BOUND: f64 = 1.25;

/// Weighted rendezvous hashing: the endpoint with the best score among those whose load is within the bound.
/// An endpoint that comes or goes moves its own keys alone.
fn hashed(candidates: &[Candidate], key: u64) -> usize {
    let total_load: usize = candidates.iter().map(|candidate| candidate.load).sum();
    let total_weight: f64 = candidates.iter().map(|candidate| candidate.weight).sum();
    let mean = (total_load as f64 + 1.0) / total_weight;
    // The mean is below the bound of some endpoint, so one always fits.
    let fits =
        |candidate: &Candidate| (candidate.load as f64) < (LOAD_BOUND * mean * candidate.weight).ceil();
    let score = |candidate: &Candidate| {
        // In (0, 1], from the 53 bits that a float holds.
        let uniform = ((mix(key ^ candidate.identity) >> 11) as f64 + 1.0) / (1_u64 << 53) as f64;
        -candidate.weight / uniform.ln().min(-f64::MIN_POSITIVE)
    };
    let fitting = candidates.iter().enumerate().filter(|(_, candidate)| fits(candidate));
    let best = fitting.max_by(|(_, one), (_, other)| score(one).total_cmp(&score(other)));
    best.map_or(0, |(index, _)| index)
}

/// Mixes the bits of a hash (the finalizer of SplitMix64).
fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

/// The factor of an endpoint's weight while it starts slowly: it grows from a tenth to 1.
#[must_use]
pub fn slow_start_factor(age: std::time::Duration, slow_start: std::time::Duration) -> f64 {
    if age >= slow_start {
        return 1.0;
    }
    (age.as_secs_f64() / slow_start.as_secs_f64()).max(0.1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn candidate(load: usize) -> Candidate {
        Candidate { load, weight: 1.0, latency_ms: None, identity: 0 }
    }

    fn numbered(count: u64) -> Vec<Candidate> {
        (0..count).map(|number| Candidate { identity: mix(number + 1), ..candidate(0) }).collect()
    }

    fn by(algorithm: Algorithm) -> Balance {
        Balance { algorithm, sequence: 0, key: None }
    }

    fn counts(candidates: &[Candidate], algorithm: Algorithm, draws: u64) -> Vec<u32> {
        let mut rng = Rng::with_seed(3);
        let mut counts = vec![0; candidates.len()];
        for sequence in 0..draws {
            let balance = Balance { sequence, ..by(algorithm) };
            counts[choose(candidates, balance, &mut rng).unwrap()] += 1;
        }
        counts
    }

    const ALL: [Algorithm; 5] = [
        Algorithm::LeastRequests,
        Algorithm::RoundRobin,
        Algorithm::Weighted,
        Algorithm::LatencyEwma,
        Algorithm::ConsistentHash,
    ];

    #[test]
    fn no_endpoint_gives_none_and_one_gives_itself() {
        for algorithm in ALL {
            let balance = Balance { key: Some(7), ..by(algorithm) };
            assert_eq!(choose(&[], balance, &mut Rng::with_seed(1)), None);
            assert_eq!(choose(&[candidate(9)], balance, &mut Rng::with_seed(1)), Some(0));
        }
    }

    #[test]
    fn the_busiest_is_never_chosen_and_equal_loads_share() {
        let loads = [2, 2, 9, 2, 2].map(candidate);
        let counts = counts(&loads, Algorithm::LeastRequests, 50_000);
        assert_eq!(counts[2], 0);
        // 12,500 expected in each of four; five standard deviations are about 485.
        for count in [counts[0], counts[1], counts[3], counts[4]] {
            assert!(count.abs_diff(12_500) < 485, "{counts:?}");
        }
    }

    #[test]
    fn loads_even_out_for_their_weights() {
        let mut rng = Rng::with_seed(4);
        let mut endpoints: Vec<Candidate> = (0..20)
            .map(|index| Candidate { weight: if index < 10 { 1.0 } else { 3.0 }, ..candidate(0) })
            .collect();
        for _ in 0..20_000 {
            let chosen = choose(&endpoints, by(Algorithm::LeastRequests), &mut rng).unwrap();
            endpoints[chosen].load += 1;
        }
        // 500 and 1500, with the differences that two draws leave.
        for (index, endpoint) in endpoints.iter().enumerate() {
            let expected = if index < 10 { 500 } else { 1500 };
            assert!(endpoint.load.abs_diff(expected) <= 15, "{index}: {}", endpoint.load);
        }
    }

    #[test]
    fn round_robin_is_exact_and_skips_what_starts_slowly() {
        assert_eq!(counts(&numbered(3), Algorithm::RoundRobin, 300), [100, 100, 100]);
        let mut starting = numbered(2);
        starting[1].weight = 0.1;
        let counts = counts(&starting, Algorithm::RoundRobin, 10_000);
        // 500 expected; five standard deviations are about 109.
        assert!(counts[1].abs_diff(500) < 109, "{counts:?}");
    }

    #[test]
    fn weights_are_odds() {
        let mut endpoints = numbered(3);
        (endpoints[0].weight, endpoints[1].weight, endpoints[2].weight) = (1.0, 2.0, 7.0);
        let counts = counts(&endpoints, Algorithm::Weighted, 10_000);
        for (count, expected) in counts.iter().zip([1000, 2000, 7000]) {
            assert!(count.abs_diff(expected) < 230, "{counts:?}");
        }
    }

    #[test]
    fn a_slow_pod_gets_few_requests_by_latency_and_a_new_one_is_tried() {
        let mut endpoints = [candidate(3), candidate(3)];
        (endpoints[0].latency_ms, endpoints[1].latency_ms) = (Some(20.0), Some(400.0));
        assert_eq!(counts(&endpoints, Algorithm::LatencyEwma, 100), [100, 0]);
        // Twenty times as many requests in front of the fast one are as long.
        (endpoints[0].load, endpoints[1].load) = (99, 3);
        assert_eq!(counts(&endpoints, Algorithm::LatencyEwma, 100), [0, 100]);
        endpoints[0] = candidate(0);
        assert_eq!(counts(&endpoints, Algorithm::LatencyEwma, 100), [100, 0]);
        // While its first answer is not there it gets no more.
        endpoints[0].load = 1;
        assert_eq!(counts(&endpoints, Algorithm::LatencyEwma, 100), [0, 100]);
    }

    #[test]
    fn an_endpoint_that_comes_or_goes_moves_its_own_keys_alone() {
        let pick = |endpoints: &[Candidate], key| {
            let balance = Balance { key: Some(mix(key)), ..by(Algorithm::ConsistentHash) };
            choose(endpoints, balance, &mut Rng::with_seed(0)).unwrap()
        };
        let (ten, nine) = (numbered(10), numbered(9));
        let mut to_the_tenth = 0;
        for key in 0..10_000 {
            let (with, without) = (pick(&ten, key), pick(&nine, key));
            if with == 9 {
                to_the_tenth += 1;
            } else {
                assert_eq!(with, without, "key {key}");
            }
        }
        // A tenth of the keys; five standard deviations are 150.
        assert!(1000_u32.abs_diff(to_the_tenth) < 150, "{to_the_tenth}");
    }

    #[test]
    fn a_popular_key_fills_no_endpoint_beyond_the_bound() {
        let mut endpoints = numbered(8);
        for _ in 0..800 {
            let balance = Balance { key: Some(5), ..by(Algorithm::ConsistentHash) };
            let chosen = choose(&endpoints, balance, &mut Rng::with_seed(0)).unwrap();
            endpoints[chosen].load += 1;
            let total: usize = endpoints.iter().map(|endpoint| endpoint.load).sum();
            let bound = (LOAD_BOUND * total as f64 / 8.0).ceil() as usize;
            assert!(endpoints.iter().all(|endpoint| endpoint.load <= bound), "{total}");
        }
    }

    #[test]
    fn slow_start_grows_to_the_whole_share() {
        let slow_start = Duration::from_secs(30);
        for (age_s, expected) in [(0, 0.1), (3, 0.1), (15, 0.5), (30, 1.0), (99, 1.0)] {
            let factor = slow_start_factor(Duration::from_secs(age_s), slow_start);
            assert!((factor - expected).abs() < 1e-9, "{age_s} s: {factor}");
        }
        assert!((slow_start_factor(Duration::ZERO, Duration::ZERO) - 1.0).abs() < 1e-9);
    }
}
