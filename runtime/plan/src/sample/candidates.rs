//! Sampling with filters: top-k, typical-p, top-p and min-p, in this order, then a draw.
//!
//! The vocabulary is never sorted. Candidates are the tokens above a floor, which is lowered only while there
//! are too few: the best forty of 150,000 tokens are found in one pass that compares and hardly ever stores.
//!
//! Which token is drawn depends on no order in which candidates are kept here: weights are added as whole
//! numbers, and the draw goes through the ids from the lowest on. So a device may look at candidates in any
//! order, many at a time, and a new version of the sort chooses the same tokens.

use super::scan;
use std::cmp::Ordering;

/// Distances below the best logit, in units of the temperature, up to which candidates are gathered. A token
/// beyond the last distance has less than 2e-16 of the best one's probability and is not drawn where a filter
/// applies.
const REACHES: [f32; 4] = [4.0, 8.0, 16.0, 36.0];

/// So many candidates are few enough to be sorted.
const FEW: usize = 64;

/// Weights are added as whole numbers of this many parts of one. A weight is at most 1, so that those of four
/// million tokens fit 64 bits.
const WEIGHT_UNITS: f64 = (1_u64 << 42) as f64;

/// A weight, or a part of one, as a whole number of units.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "it is from 0 to 1; the rest is cut off"
)]
fn units(weight: f64) -> u64 {
    (weight * WEIGHT_UNITS) as u64
}

/// The weight of so many units.
fn share_of(units: u64) -> f64 {
    units as f64 / WEIGHT_UNITS
}

/// The filters of a sequence: which tokens may be drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Filters {
    /// Only so many best ones; 0: all.
    pub top_k: usize,
    /// Only the most typical that together reach this share; 1: all.
    pub typical_p: f32,
    /// Only the best that together reach this share; 1: all.
    pub top_p: f32,
    /// Only those that are at least this share of the best one; 0: all.
    pub min_p: f32,
}

impl Filters {
    /// Every token may be drawn.
    pub const NONE: Self = Self { top_k: 0, typical_p: 1.0, top_p: 1.0, min_p: 0.0 };

    /// Whether they keep every token.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.top_k == 0 && self.typical_p >= 1.0 && self.top_p >= 1.0 && self.min_p <= 0.0
    }
}

/// A row of logits to draw from.
#[derive(Debug, Clone, Copy)]
pub(super) struct LogitsRow<'a> {
    /// Logits; minus infinity for tokens that must not be drawn.
    pub(super) logits: &'a [f32],
    /// The largest of them, finite.
    pub(super) max: f32,
    /// Inverse temperature, finite.
    pub(super) scale: f32,
}

/// A token that may be drawn.
#[derive(Debug, Clone, Copy)]
pub(super) struct CandidateToken {
    /// The order, smaller first; then by id.
    order: f32,
    weight: f32,
    id: u32,
}

impl CandidateToken {
    fn units(&self) -> u64 {
        units(f64::from(self.weight))
    }
}

fn in_order(a: &CandidateToken, b: &CandidateToken) -> Ordering {
    a.order.total_cmp(&b.order).then(a.id.cmp(&b.id))
}

/// Scratch space for the candidates of one row at a time.
#[derive(Debug, Default)]
pub(super) struct CandidateTokens {
    list: Vec<CandidateToken>,
}

impl CandidateTokens {
    /// For a vocabulary of this size.
    pub(super) fn with_room_for(vocabulary: usize) -> Self {
        Self { list: Vec::with_capacity(vocabulary) }
    }

    /// Draws from the tokens that the filters keep; `uniform` is in [0, 1).
    #[inline(always)]
    pub(super) fn draw(&mut self, row: LogitsRow<'_>, filters: &Filters, uniform: f64) -> u32 {
        let mut mass = self.gather(row, filters);
        if filters.typical_p < 1.0 {
            mass = self.keep_typical(filters.typical_p, mass, row);
        }
        if filters.top_p < 1.0 {
            for candidate in &mut self.list {
                candidate.order = -candidate.weight;
            }
            mass = self.keep_mass(mass * f64::from(filters.top_p));
        }
        if filters.min_p > 0.0 {
            let best = self.list.iter().fold(0.0, |best, candidate| candidate.weight.max(best));
            self.list.retain(|candidate| candidate.weight >= best * filters.min_p);
            mass = self.mass();
        }
        self.list.sort_unstable_by_key(|candidate| candidate.id);
        let (left, mut sum) = (uniform * mass, 0);
        for candidate in &self.list {
            sum += candidate.units();
            if share_of(sum) > left {
                return candidate.id;
            }
        }
        self.list.last().map_or(0, |candidate| candidate.id)
    }

    fn mass(&self) -> f64 {
        share_of(self.list.iter().map(CandidateToken::units).sum())
    }

    /// Gathers at least the tokens that the first filter keeps, applies top-k, and gives the mass that later
    /// filters take shares of.
    #[inline(always)]
    fn gather(&mut self, row: LogitsRow<'_>, filters: &Filters) -> f64 {
        let [.., furthest] = REACHES;
        if filters.top_k > 0 {
            for reach in REACHES {
                self.reach(row, reach);
                if self.list.len() >= filters.top_k {
                    break;
                }
            }
            self.keep_best(filters.top_k);
            self.mass()
        } else if filters.typical_p < 1.0 {
            self.reach(row, furthest);
            self.mass()
        } else if filters.top_p < 1.0 {
            let mass = scan::mass(row.logits, row.max, row.scale);
            let wanted = mass * f64::from(filters.top_p);
            for reach in REACHES {
                self.reach(row, reach);
                if self.mass() >= wanted {
                    break;
                }
            }
            mass
        } else {
            // min-p alone: a floor in logits, a little below so that the exact comparison decides.
            self.reach(row, (1e-3 - filters.min_p.ln()).min(furthest));
            self.mass()
        }
    }

    /// Gathers every token whose logit is within `reach` temperatures of the best one.
    #[inline(always)]
    fn reach(&mut self, row: LogitsRow<'_>, reach: f32) {
        self.list.clear();
        let floor = row.max - reach / row.scale;
        let list = &mut self.list;
        scan::at_least(row.logits, floor, |index, logit| {
            // Ids are indices of a vocabulary, which has fewer than 2^32 entries.
            let id = u32::try_from(index).unwrap_or(u32::MAX);
            list.push(CandidateToken { order: -logit, weight: scan::weight(logit, row.max, row.scale), id });
        });
    }

    /// Keeps the best `count`; candidates are still ordered by logit.
    fn keep_best(&mut self, count: usize) {
        if count < self.list.len() {
            self.list.select_nth_unstable_by(count - 1, in_order);
            self.list.truncate(count);
        }
    }

    /// Keeps the tokens whose surprise is nearest to the expected one, until they reach `share` of `mass`.
    /// Candidates are ordered by logit before, which gives the surprise without a logarithm for each.
    fn keep_typical(&mut self, share: f32, mass: f64, row: LogitsRow<'_>) -> f64 {
        // The surprise relative to the best token; the rest of it is the same for all.
        let surprise = |candidate: &CandidateToken| (candidate.order + row.max) * row.scale;
        let total = self.list.iter().map(|c| units(f64::from(c.weight) * f64::from(surprise(c)))).sum();
        #[expect(clippy::cast_possible_truncation, reason = "f32 is precise enough for an order")]
        let expected = (share_of(total) / mass) as f32;
        for candidate in &mut self.list {
            candidate.order = (surprise(candidate) - expected).abs();
        }
        self.keep_mass(mass * f64::from(share))
    }

    /// Keeps the fewest candidates, in order, whose weights add up to at least `wanted`, and gives their
    /// weight. It halves the undecided range until that is small enough to be sorted, so a flat row of a
    /// large vocabulary costs two passes and not a sort.
    fn keep_mass(&mut self, wanted: f64) -> f64 {
        let (mut low, mut high, mut sum) = (0, self.list.len(), 0);
        while high - low > FEW {
            let half = (high - low) / 2;
            self.list[low..high].select_nth_unstable_by(half, in_order);
            let lower: u64 = self.list[low..low + half].iter().map(CandidateToken::units).sum();
            if share_of(sum + lower) >= wanted {
                high = low + half;
            } else {
                sum += lower;
                low += half;
            }
        }
        self.list[low..high].sort_unstable_by(in_order);
        for index in low..high {
            sum += self.list[index].units();
            if share_of(sum) >= wanted {
                high = index + 1;
                break;
            }
        }
        self.list.truncate(high);
        share_of(sum)
    }
}
