//! Rules of this repository that no lint can check: which crate may import which, how long a file may be,
//! which names are banned, that every module says what it is for, that nothing of one person's machine is
//! committed.
//!
//! A rule is a function from the tree (or from one file of it) to findings, so that each is tested here on
//! planted bad input. `tests/repository.rs` applies them to the repository itself, one test a rule, and says
//! what to do.

pub mod boundaries;
pub mod comments;
pub mod edges;
pub mod hygiene;
pub mod lexer;
pub mod manifests;
pub mod names;
pub mod reach;
pub mod rust;
pub mod shape;
pub mod text;
pub mod tree;

use std::fmt;

/// One place that breaks a rule.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    /// File relative to the repository's root, or the name of a package.
    pub location: String,
    /// Line, counted from 1; none where the whole file or package is meant.
    pub line: Option<usize>,
    /// What is wrong there.
    pub what: String,
}

impl Finding {
    /// A finding about a whole file or package.
    pub fn whole(location: impl Into<String>, what: impl Into<String>) -> Self {
        Self { location: location.into(), line: None, what: what.into() }
    }

    /// A finding about one line, counted from 1.
    pub fn at(location: impl Into<String>, line: usize, what: impl Into<String>) -> Self {
        Self { location: location.into(), line: Some(line), what: what.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "{}:{line}: {}", self.location, self.what),
            None => write!(f, "{}: {}", self.location, self.what),
        }
    }
}
