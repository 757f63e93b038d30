//! A fault for tests of the platform: a splitter that does not divide users as it is told.

use std::fmt;

use super::mixed;

/// Ten-thousandths of a whole.
const WHOLE: u16 = 10_000;

/// The share of the first variant's users that get, and count at, the second one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SplitSkew {
    ten_thousandths: u16,
}

impl SplitSkew {
    /// Reads `split-skew=0.1`.
    ///
    /// # Errors
    /// It is not that, or the share is not above 0 and at most 1.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let share: Option<f64> = text.strip_prefix("split-skew=").and_then(|share| share.parse().ok());
        let share = share.filter(|share| *share > 0.0 && *share <= 1.0);
        let share = share.ok_or_else(|| "expected split-skew=SHARE, above 0 and at most 1".to_owned())?;
        // A share of at most 1 is at most the whole.
        Ok(Self { ten_thousandths: (share * f64::from(WHOLE)).round() as u16 })
    }

    /// Whether the users of a bucket are moved.
    pub(super) fn moves(self, bucket: u16) -> bool {
        mixed(u64::from(bucket)) % u64::from(WHOLE) < u64::from(self.ten_thousandths)
    }
}

impl fmt::Display for SplitSkew {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "split-skew={}", f64::from(self.ten_thousandths) / f64::from(WHOLE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_skew_moves_its_share_of_the_buckets() {
        let skew = SplitSkew::parse("split-skew=0.1").unwrap();
        assert_eq!(skew.to_string(), "split-skew=0.1");
        let moved = (0..WHOLE).filter(|bucket| skew.moves(*bucket)).count();
        // 1,000 expected; five standard deviations are 150.
        assert!(moved.abs_diff(1000) < 150, "{moved}");
        for wrong in ["split-skew=0", "split-skew=1.1", "split-skew=NaN", "0.1", "split-skew=", ""] {
            assert!(SplitSkew::parse(wrong).is_err(), "{wrong}");
        }
    }
}
