//! The tasks that a model can serve, and their words in files, on the wire and in errors.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// What a model does.
///
/// The word of a task ([`Task::as_str`]) is the same in custom resources, `pod.yaml`, `config.yaml`, route
/// tables and model states. [`Task::from_str`] reads it, [`fmt::Display`] and serde write it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Task {
    /// The model continues texts.
    Generate,
    /// The model turns texts into vectors.
    Embed,
    /// The model gives texts a score for each of its labels.
    Classify,
    /// The model says how well documents answer a query.
    Rerank,
}

impl Task {
    /// Every task, in the order in which lists name them.
    pub const ALL: &'static [Self] = &[Self::Generate, Self::Embed, Self::Classify, Self::Rerank];

    /// The word of this task.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Generate => "generate",
            Self::Embed => "embed",
            Self::Classify => "classify",
            Self::Rerank => "rerank",
        }
    }

    /// The task in a field of a message, where the empty text means that the task is not known yet. A word
    /// that this version does not know gives none too: the sender may be newer.
    #[must_use]
    pub fn from_wire(word: &str) -> Option<Self> {
        word.parse().ok()
    }

    /// The field of a message for a task that may not be known yet.
    #[must_use]
    pub fn to_wire(task: Option<Self>) -> String {
        task.map_or(String::new(), |task| task.as_str().to_owned())
    }
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A word that is not the word of a task.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a task of this version; use {list}", list = known_words())]
pub struct UnknownTask(
    /// The first 40 characters of the word.
    pub String,
);

/// The words of all tasks, quoted.
fn known_words() -> String {
    let quoted: Vec<String> = Task::ALL.iter().map(|task| format!("{:?}", task.as_str())).collect();
    quoted.join(" or ")
}

impl FromStr for Task {
    type Err = UnknownTask;

    fn from_str(word: &str) -> Result<Self, UnknownTask> {
        let found = Self::ALL.iter().find(|task| task.as_str() == word);
        found.copied().ok_or_else(|| UnknownTask(word.chars().take(40).collect()))
    }
}

impl Serialize for Task {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for Task {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let word = String::deserialize(deserializer)?;
        word.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_is_read_from_its_own_word() {
        for &task in Task::ALL {
            assert_eq!(task.as_str().parse(), Ok(task));
            assert_eq!(task.to_string(), task.as_str());
            assert_eq!(crate::yaml::read::<Task>(task.as_str(), |_| ()).unwrap(), task);
            assert_eq!(Task::from_wire(&Task::to_wire(Some(task))), Some(task));
        }
        assert_eq!(Task::from_wire(&Task::to_wire(None)), None);
    }

    #[test]
    fn unknown_words_are_refused_with_the_known_ones() {
        let error = "rank".parse::<Task>().unwrap_err().to_string();
        let known = "\"generate\" or \"embed\" or \"classify\" or \"rerank\"";
        assert_eq!(error, format!("\"rank\" is not a task of this version; use {known}"));
        assert!("x".repeat(10_000).parse::<Task>().unwrap_err().to_string().len() < 200);
    }
}
