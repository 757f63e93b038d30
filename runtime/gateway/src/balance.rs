//! Chooses an endpoint: of two picked at random, the one with fewer requests in flight.
//!
//! Comparing two at random avoids the herd that comparing all causes, where every gateway sends to the same
//! momentarily idle pod. Requests to a model differ by orders of magnitude in length, so the number in flight
//! says more than round robin would.

use fastrand::Rng;

/// Picks among `loads.len()` endpoints by their requests in flight; `None` where there are none. The random
/// numbers decide which two are compared, and which wins where both have the same load.
#[must_use]
pub fn least_of_two(loads: &[usize], rng: &mut Rng) -> Option<usize> {
    match loads.len() {
        0 => None,
        1 => Some(0),
        count => {
            let first = rng.usize(..count);
            // The second draw skips over the first.
            let second = rng.usize(..count - 1);
            let second = second + usize::from(second >= first);
            Some(if loads[second] < loads[first] { second } else { first })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_endpoint_gives_none_and_one_gives_itself() {
        let mut rng = Rng::with_seed(1);
        assert_eq!(least_of_two(&[], &mut rng), None);
        assert_eq!(least_of_two(&[9], &mut rng), Some(0));
    }

    #[test]
    fn of_two_endpoints_the_less_busy_wins() {
        let mut rng = Rng::with_seed(2);
        for _ in 0..1000 {
            assert_eq!(least_of_two(&[3, 1], &mut rng), Some(1));
            assert_eq!(least_of_two(&[0, 1], &mut rng), Some(0));
        }
    }

    #[test]
    fn the_busiest_is_never_chosen_and_equal_loads_share() {
        let mut rng = Rng::with_seed(3);
        let mut counts = [0_u32; 5];
        for _ in 0..50_000 {
            counts[least_of_two(&[2, 2, 9, 2, 2], &mut rng).unwrap()] += 1;
        }
        assert_eq!(counts[2], 0);
        // 12,500 expected in each of four; five standard deviations are about 485.
        for count in [counts[0], counts[1], counts[3], counts[4]] {
            assert!(count.abs_diff(12_500) < 485, "{counts:?}");
        }
    }

    #[test]
    fn loads_even_out() {
        let mut rng = Rng::with_seed(4);
        let mut loads = vec![0_usize; 20];
        for _ in 0..20_000 {
            let chosen = least_of_two(&loads, &mut rng).unwrap();
            loads[chosen] += 1;
        }
        let range = loads.iter().max().unwrap() - loads.iter().min().unwrap();
        assert!(range <= 6, "{loads:?}");
    }
}
