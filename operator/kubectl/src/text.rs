//! How ages, sizes, rates and shares are written.

use k8s_openapi::jiff::Timestamp;

const SECONDS_OF_MINUTE: i64 = 60;
const SECONDS_OF_HOUR: i64 = 3600;
const SECONDS_OF_DAY: i64 = 86_400;

/// Cells of a progress bar.
const BAR_CELLS: usize = 20;

/// The time between two times, in the two largest units that matter, as kubectl shows ages.
#[must_use]
pub fn age(since: Timestamp, now: Timestamp) -> String {
    seconds(now.as_second() - since.as_second())
}

/// A number of seconds, such as `4m20s`. What is negative is `0s`: clocks of machines differ.
#[must_use]
pub fn seconds(seconds: i64) -> String {
    let seconds = seconds.max(0);
    let pair = |big: i64, big_unit: &str, small: i64, small_unit: &str| match small {
        0 => format!("{big}{big_unit}"),
        _ => format!("{big}{big_unit}{small}{small_unit}"),
    };
    match seconds {
        0..SECONDS_OF_MINUTE => format!("{seconds}s"),
        SECONDS_OF_MINUTE..SECONDS_OF_HOUR => {
            pair(seconds / SECONDS_OF_MINUTE, "m", seconds % SECONDS_OF_MINUTE, "s")
        }
        SECONDS_OF_HOUR..SECONDS_OF_DAY => {
            pair(seconds / SECONDS_OF_HOUR, "h", seconds % SECONDS_OF_HOUR / SECONDS_OF_MINUTE, "m")
        }
        _ => pair(seconds / SECONDS_OF_DAY, "d", seconds % SECONDS_OF_DAY / SECONDS_OF_HOUR, "h"),
    }
}

/// A number of bytes in binary units.
#[must_use]
pub fn bytes(bytes: i64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes.max(0) as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = usize::from(unit > 0);
    format!("{value:.digits$} {}", UNITS.get(unit).copied().unwrap_or_default())
}

/// A bar for a share of 0 to 1.
#[must_use]
pub fn bar(share: f64) -> String {
    // A share of 0 to 1 times 20 is between 0 and 20.
    let full = (share.clamp(0.0, 1.0) * BAR_CELLS as f64).floor() as usize;
    format!("[{}{}]", "█".repeat(full), "·".repeat(BAR_CELLS - full))
}

/// The first characters of a digest.
#[must_use]
pub fn short_digest(digest: &str) -> String {
    digest.chars().take(12).collect()
}

/// A time as RFC 3339 in whole seconds.
#[must_use]
pub fn time(at: Timestamp) -> String {
    Timestamp::from_second(at.as_second()).unwrap_or(at).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_have_their_two_largest_units() {
        let shown = [-5, 0, 59, 60, 260, 3600, 3660, 90_000, 864_000].map(seconds);
        assert_eq!(shown, ["0s", "0s", "59s", "1m", "4m20s", "1h", "1h1m", "1d1h", "10d"]);
    }

    #[test]
    fn sizes_have_binary_units() {
        assert_eq!(
            [0, 1023, 1536, 98 << 20, 3 << 40].map(bytes),
            ["0 B", "1023 B", "1.5 KiB", "98.0 MiB", "3.0 TiB"]
        );
    }

    #[test]
    fn a_bar_is_full_at_one_and_empty_at_zero() {
        assert_eq!(bar(0.0), format!("[{}]", "·".repeat(20)));
        assert_eq!(bar(0.5), format!("[{}{}]", "█".repeat(10), "·".repeat(10)));
        assert_eq!(bar(0.999), format!("[{}·]", "█".repeat(19)));
        assert_eq!(bar(7.0), format!("[{}]", "█".repeat(20)));
        assert_eq!(bar(f64::NAN), format!("[{}]", "·".repeat(20)));
    }
}
