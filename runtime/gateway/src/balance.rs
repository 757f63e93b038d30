//! Chooses an endpoint: of two taken at random, the one with fewer requests in flight.
//!
//! Comparing two at random avoids what comparing all does: every gateway sending to the same momentarily idle pod.
//! Requests to a model differ by orders of magnitude in length, so the number in flight says more than any turn
//! order would.

use crate::dice::below;

/// Picks among `loads.len()` endpoints by their requests in flight; `None` where there are none. The random bits
/// decide which two are compared, and which wins where both carry the same.
#[must_use]
pub fn least_of_two(loads: &[usize], bits: u64) -> Option<usize> {
    match loads.len() {
        0 => None,
        1 => Some(0),
        count => {
            // The two halves of the bits are independent draws; the second skips over the first.
            let first = below(bits << 32, count as u64) as usize;
            let second = below(bits & 0xffff_ffff_0000_0000, count as u64 - 1) as usize;
            let second = second + usize::from(second >= first);
            Some(if loads[second] < loads[first] { second } else { first })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dice::Dice;

    #[test]
    fn none_of_none_and_one_of_one() {
        assert_eq!(least_of_two(&[], 5), None);
        assert_eq!(least_of_two(&[9], 5), Some(0));
    }

    #[test]
    fn of_two_the_less_busy_always_wins() {
        let dice = Dice::seeded(2);
        for _ in 0..1000 {
            assert_eq!(least_of_two(&[3, 1], dice.roll()), Some(1));
            assert_eq!(least_of_two(&[0, 1], dice.roll()), Some(0));
        }
    }

    #[test]
    fn the_busiest_is_never_chosen_and_equals_share() {
        let dice = Dice::seeded(3);
        let mut counts = [0_u32; 5];
        for _ in 0..50_000 {
            counts[least_of_two(&[2, 2, 9, 2, 2], dice.roll()).unwrap()] += 1;
        }
        assert_eq!(counts[2], 0);
        // 12,500 expected in each of four; five standard deviations are about 485.
        for count in [counts[0], counts[1], counts[3], counts[4]] {
            assert!(count.abs_diff(12_500) < 485, "{counts:?}");
        }
    }

    #[test]
    fn loads_even_out() {
        let dice = Dice::seeded(4);
        let mut loads = vec![0_usize; 20];
        for _ in 0..20_000 {
            let chosen = least_of_two(&loads, dice.roll()).unwrap();
            loads[chosen] += 1;
        }
        let spread = loads.iter().max().unwrap() - loads.iter().min().unwrap();
        assert!(spread <= 6, "{loads:?}");
    }
}
