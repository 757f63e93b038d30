//! The priority classes of requests.

use std::fmt;
use std::str::FromStr;

/// The priority class of a request. Classes are ordered: the first one is the most urgent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, strum::IntoStaticStr)]
#[strum(serialize_all = "lowercase")]
pub enum Priority {
    /// Interactive requests.
    High,
    /// The default class.
    #[default]
    Normal,
    /// Background requests.
    Low,
}

impl Priority {
    /// All classes, the most urgent first.
    pub const ALL: [Self; 3] = [Self::High, Self::Normal, Self::Low];

    /// The word in requests, headers and metrics.
    pub fn as_str(self) -> &'static str {
        self.into()
    }
}

impl fmt::Display for Priority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Priority {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|class| class.as_str() == text);
        found.ok_or_else(|| format!("{text:?} is no class; use \"high\", \"normal\" or \"low\""))
    }
}
