//! Several metrics at a time.

/// The error rate of one goal among several, with several variants against one control (Bonferroni).
#[must_use]
pub fn alpha_per_goal(alpha: f64, goals: usize, variants: usize) -> f64 {
    alpha / (goals.max(1) * variants.saturating_sub(1).max(1)) as f64
}

/// Which of several hypotheses with these values of evidence are rejected, with a false discovery rate of
/// `alpha` whatever their dependence (e-BH).
#[must_use]
pub fn e_bh(ln_evidence: &[f64], alpha: f64) -> Vec<bool> {
    let all = ln_evidence.len() as f64;
    let mut sorted = ln_evidence.to_vec();
    sorted.sort_by(|one, other| other.total_cmp(one));
    let needed = |rank: usize| (all / (rank as f64 * alpha)).ln();
    let rejected = (1..=sorted.len()).rev().find(|rank| sorted[rank - 1] >= needed(*rank));
    let limit = rejected.map_or(f64::INFINITY, |rank| sorted[rank - 1]);
    ln_evidence.iter().map(|one| *one >= limit).collect()
}

/// Adjusted p-values of Holm's procedure.
#[must_use]
pub fn holm(p: &[f64]) -> Vec<f64> {
    let order = ascending(p);
    let mut adjusted = vec![0.0; p.len()];
    let mut largest: f64 = 0.0;
    for (rank, &index) in order.iter().enumerate() {
        largest = largest.max(p[index] * (p.len() - rank) as f64).min(1.0);
        adjusted[index] = largest;
    }
    adjusted
}

/// Adjusted p-values of Benjamini's and Hochberg's procedure.
#[must_use]
pub fn benjamini_hochberg(p: &[f64]) -> Vec<f64> {
    let order = ascending(p);
    let mut adjusted = vec![0.0; p.len()];
    let mut smallest: f64 = 1.0;
    for (rank, &index) in order.iter().enumerate().rev() {
        smallest = smallest.min(p[index] * p.len() as f64 / (rank + 1) as f64);
        adjusted[index] = smallest;
    }
    adjusted
}

fn ascending(p: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|one, other| p[*one].total_cmp(&p[*other]));
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_strongest_evidence_is_rejected_first() {
        let ln = |e: f64| e.ln();
        assert_eq!(e_bh(&[ln(1.0), ln(100.0), ln(25.0), ln(0.1)], 0.1), [false, true, true, false]);
        assert_eq!(e_bh(&[ln(1.0), ln(9.0)], 0.1), [false, false]);
        assert_eq!(e_bh(&[], 0.1), Vec::<bool>::new());
        assert!((alpha_per_goal(0.06, 2, 4) - 0.01).abs() < 1e-15);
    }
}
