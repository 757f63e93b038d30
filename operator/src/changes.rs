//! Models for which something changed: a task that keeps something of every model looks at these alone.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use tokio::sync::Notify;
use trustformers_control::routes::ModelKey;

/// What changed since a task looked last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Marked {
    /// Anything may have changed.
    All,
    /// Something of these models changed. At most one entry for each model that exists.
    Models(BTreeSet<ModelKey>),
}

/// Marks of one task.
#[derive(Debug)]
pub struct Changes {
    marked: Mutex<Marked>,
    wake: Notify,
}

impl Default for Changes {
    /// A task looks at everything first.
    fn default() -> Self {
        Self { marked: Mutex::new(Marked::All), wake: Notify::new() }
    }
}

impl Changes {
    /// Marks one model, and wakes the task.
    pub fn mark(&self, key: &ModelKey) {
        if let Marked::Models(models) = &mut *self.lock() {
            models.insert(key.clone());
        }
        self.wake.notify_one();
    }

    /// Marks all models, and wakes the task.
    pub fn mark_all(&self) {
        *self.lock() = Marked::All;
        self.wake.notify_one();
    }

    /// Wakes the task: something else than a model changed.
    pub fn notify_one(&self) {
        self.wake.notify_one();
    }

    /// Waits until the task is woken.
    pub async fn notified(&self) {
        self.wake.notified().await;
    }

    /// Takes the marks.
    #[must_use]
    pub fn drain(&self) -> Marked {
        std::mem::replace(&mut *self.lock(), Marked::Models(BTreeSet::new()))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Marked> {
        self.marked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn marks_are_kept_until_the_task_takes_them() {
        let changes = Changes::default();
        assert_eq!(changes.drain(), Marked::All, "everything at first");
        let key = ("team".to_owned(), "chat".to_owned());
        changes.mark(&key);
        changes.mark(&key);
        changes.notified().await;
        assert_eq!(changes.drain(), Marked::Models(BTreeSet::from([key.clone()])));
        changes.mark(&key);
        changes.mark_all();
        changes.mark(&key);
        assert_eq!(changes.drain(), Marked::All);
    }
}
